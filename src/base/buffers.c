/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Views on scattered memory (struct buffers), and the fast test for zero memory.
 *
 * Invariants:
 * 1. A view that is advanced is normal: skip is less than iov[0].iov_len, empty iovecs in front are stepped over, and a
 *    view with nothing left has count 0.
 * 2. Nothing here goes beyond the `bytes` asked for; a view that holds fewer is a caller's error and an assertion.
 * 3. A view of bytes that are elsewhere can be advanced, and tells when memory is put into it; anything else that is
 *    done to it is an assertion.
 *
 * It allocates nothing and owns nothing.
 */
#include "base/buffers.h"
#include "base/size.h"

#include <glib.h>
#include <stdbool.h>
#include <string.h>

struct buffers buffers_advance(struct buffers from, size_t bytes)
{
    size_t skip = from.skip + bytes;
    if (from.count == BUFFERS_ELSEWHERE) {
        from.skip = skip;
        return from;
    }
    while (from.count && skip >= from.iov->iov_len) {
        skip -= from.iov->iov_len;
        from.iov++;
        from.count--;
    }
    g_assert(from.count || skip == 0);
    from.skip = skip;
    return from;
}

size_t buffers_size(struct buffers of)
{
    size_t total = 0;
    g_assert(!buffers_elsewhere(of));
    for (unsigned i = 0; i < of.count; i++) {
        total += of.iov[i].iov_len;
    }
    return total - of.skip;
}

/* The contiguous piece at the view's start, no more than *bytes; takes it off *view and *bytes. */
static struct iovec buffers_take(struct buffers *view, size_t *bytes)
{
    g_assert(view->count != BUFFERS_ELSEWHERE);
    while (view->count && view->skip == view->iov->iov_len) {
        view->iov++;
        view->count--;
        view->skip = 0;
    }
    g_assert(view->count);
    size_t length = MIN(view->iov->iov_len - view->skip, *bytes);
    struct iovec piece = {(char *)view->iov->iov_base + view->skip, length};
    view->skip += length;
    *bytes -= length;
    return piece;
}

void buffers_copy_out(struct buffers from, void *to, size_t bytes)
{
    for (char *out = to; bytes;) {
        struct iovec piece = buffers_take(&from, &bytes);
        memcpy(out, piece.iov_base, piece.iov_len);
        out += piece.iov_len;
    }
}

/* What comes from memory is not taken there. */
static bool buffers_missed(struct buffers to, size_t bytes)
{
    struct buffers_elsewhere *elsewhere = buffers_elsewhere(to);
    if (elsewhere && bytes) {
        elsewhere->missed = true;
    }
    return elsewhere;
}

void buffers_copy_in(struct buffers to, const void *from, size_t bytes)
{
    if (buffers_missed(to, bytes)) {
        return;
    }
    for (const char *in = from; bytes;) {
        struct iovec piece = buffers_take(&to, &bytes);
        memcpy(piece.iov_base, in, piece.iov_len);
        in += piece.iov_len;
    }
}

void buffers_fill(struct buffers to, int value, size_t bytes)
{
    if (buffers_missed(to, bytes)) {
        return;
    }
    while (bytes) {
        struct iovec piece = buffers_take(&to, &bytes);
        memset(piece.iov_base, value, piece.iov_len);
    }
}

_Bool buffers_is_zero(struct buffers of, size_t bytes)
{
    while (bytes) {
        struct iovec piece = buffers_take(&of, &bytes);
        if (!memory_is_zero(piece.iov_base, piece.iov_len)) {
            return false;
        }
    }
    return true;
}

unsigned buffers_to_iov(struct buffers from, size_t bytes, struct iovec *out, unsigned max)
{
    unsigned count = 0;
    while (bytes) {
        struct iovec piece = buffers_take(&from, &bytes);
        if (count == max) {
            return 0;
        }
        out[count++] = piece;
    }
    return count;
}

void *buffers_contiguous(struct buffers of, size_t bytes)
{
    if (!bytes) {
        g_assert(!buffers_elsewhere(of));
        return of.count ? (char *)of.iov->iov_base + of.skip : NULL;
    }
    size_t left = bytes;
    struct iovec piece = buffers_take(&of, &left);
    return left ? NULL : piece.iov_base;
}

/* Four 16-byte vectors per step: what the compiler makes of it is one load and one OR each, on any machine. */
typedef uint64_t zero_vector __attribute__((vector_size(16)));

static inline zero_vector vector_load(const char *at)
{
    zero_vector value;
    memcpy(&value, at, sizeof(value));
    return value;
}

_Bool memory_is_zero(const void *memory, size_t bytes)
{
    const char *at = memory;
    if (bytes < 16) {
        char any = 0;
        for (size_t i = 0; i < bytes; i++) {
            any |= at[i];
        }
        return any == 0;
    }
    /* Data that is not zero mostly shows it at an end or in the middle. */
    zero_vector last = vector_load(at + bytes - 16);
    zero_vector early = vector_load(at) | vector_load(at + (bytes - 16) / 2) | last;
    if (early[0] | early[1]) {
        return false;
    }
    const char *end = at + bytes;
    for (; end - at >= 256; at += 256) {
        zero_vector any = {0, 0};
        for (unsigned i = 0; i < 256; i += 64) {
            any |= (vector_load(at + i) | vector_load(at + i + 16)) |
                   (vector_load(at + i + 32) | vector_load(at + i + 48));
        }
        if (any[0] | any[1]) {
            return false;
        }
    }
    zero_vector any = last;
    for (; end - at >= 16; at += 16) {
        any |= vector_load(at);
    }
    return (any[0] | any[1]) == 0;
}

_Bool memory_has_zero_unit(const void *memory, size_t bytes, uint64_t offset, uint64_t unit)
{
    for (size_t at = 0; at < bytes;) {
        size_t next = (size_t)min_u64(bytes, at + unit - (offset + at) % unit);
        if (memory_is_zero((const char *)memory + at, next - at)) {
            return true;
        }
        at = next;
    }
    return false;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BASE_BUFFERS_H
#define INTERLOCK_BASE_BUFFERS_H

#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct file;

/*
 * A view on scattered memory: an array of iovecs, starting `skip` bytes into the first. Passed by
 * value, never owns anything; the iovec array and the memory must outlive the use. How many bytes
 * of it are meant is always a separate argument.
 */
struct buffers {
    const struct iovec *iov;
    unsigned count; /* iovecs from iov on */
    size_t skip;    /* bytes to skip in iov[0]; less than iov[0].iov_len unless count is 0 */
};

/*
 * For a copy from file to file: memory that it may use meanwhile, more than nothing; and what it leaves to others:
 * data with an aligned unit of so many zero bytes (a power of two; 0: nothing). It fails with -ENOTSUP then.
 */
struct copy_aid {
    struct iovec memory;
    uint64_t zero_unit;
};

/*
 * What a view stands for whose bytes are in a file and which nobody here needs to see: a write takes them from `file`,
 * from `offset` on, while a read tells `found` where they are, piece by piece, instead of fetching them. Only drivers
 * that say so (struct driver, `offloads`) are given such a view. What is put into it from memory is not taken:
 * `missed`.
 */
struct buffers_elsewhere {
    struct file *file;
    uint64_t offset;
    struct copy_aid aid; /* for a write */
    /* [offset, offset + bytes) of `file` are the view's bytes from `at` on, and stay so until this returns: in a
     * coroutine; 0 or a negative errno, which the read fails with. */
    int (*found)(struct buffers_elsewhere *elsewhere, struct file *file, uint64_t offset, size_t at, uint64_t bytes);
    _Bool missed;
};
#define BUFFERS_ELSEWHERE UINT_MAX /* in place of a count; `iov` is a struct buffers_elsewhere then */

static inline struct buffers buffers_of_elsewhere(struct buffers_elsewhere *elsewhere)
{
    return (struct buffers){(const struct iovec *)elsewhere, BUFFERS_ELSEWHERE, 0};
}
/* NULL: its bytes are in memory. */
static inline struct buffers_elsewhere *buffers_elsewhere(struct buffers of)
{
    return of.count == BUFFERS_ELSEWHERE ? (struct buffers_elsewhere *)of.iov : NULL;
}

/* A view of one iovec that the caller keeps alive. */
static inline struct buffers buffers_one(const struct iovec *iov)
{
    return (struct buffers){iov, 1, 0};
}
/* The view `bytes` further on; bytes must not be more than the view holds. */
struct buffers buffers_advance(struct buffers from, size_t bytes);
/* Bytes that the view holds. */
size_t buffers_size(struct buffers of);
/* Copies `bytes` out of / into the view, or fills it with `value`. */
void buffers_copy_out(struct buffers from, void *to, size_t bytes);
void buffers_copy_in(struct buffers to, const void *from, size_t bytes);
void buffers_fill(struct buffers to, int value, size_t bytes);
/* True when all `bytes` are zero. */
_Bool buffers_is_zero(struct buffers of, size_t bytes);
/* Writes iovecs that cover exactly `bytes` of the view to out[0..max); returns how many, or 0 if max is too few. */
unsigned buffers_to_iov(struct buffers from, size_t bytes, struct iovec *out, unsigned max);
/* Pointer to the view's start when its first `bytes` are contiguous, else NULL. */
void *buffers_contiguous(struct buffers of, size_t bytes);
/* True when `bytes` of memory are zero (fast). */
_Bool memory_is_zero(const void *memory, size_t bytes);
/* True when there is an aligned unit among them that is zero, or a part of one at an end; they are at `offset`. */
_Bool memory_has_zero_unit(const void *memory, size_t bytes, uint64_t offset, uint64_t unit);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Padding and bouncing. Owns the way of a request that a node's limits would not take as it is: offset or length off
 * limits.alignment (O_DIRECT), or memory off limits.memory_alignment. Called from request.c only.
 *
 * 1. A write that is padded reads its partial blocks and writes them back under an exclusive hold of node->overlap;
 *    every aligned write to such a node takes a shared hold (request.c). So no write between reading and writing back
 * is lost, and aligned writes do not wait for each other.
 * 2. Only the first and the last block are read, and only when the request covers them in part.
 * 3. A block behind the node's end is zero and is not read.
 *
 * Slow on purpose and simple: one buffer of at most PIECE bytes, one piece at a time.
 */
#include "block/padded.h"
#include "base/size.h"
#include "block/driver.h"
#include "loop/file.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PIECE (1 * MiB)

static bool memory_fits(struct buffers memory, uint64_t bytes, uint64_t alignment)
{
    size_t skip = memory.skip;
    for (unsigned i = 0; bytes; i++) {
        uint64_t length = min_u64(bytes, memory.iov[i].iov_len - skip);
        if (!is_aligned(((uintptr_t)memory.iov[i].iov_base + skip) | length, alignment)) {
            return false;
        }
        bytes -= length;
        skip = 0;
    }
    return true;
}

bool padded_is_needed(const struct node *node, uint64_t offset, uint64_t bytes, struct buffers memory)
{
    const struct limits *limits = &node->limits;
    return (limits->alignment > 1 && !is_aligned(offset | bytes, limits->alignment)) ||
           (limits->memory_alignment > 1 && !memory_fits(memory, bytes, limits->memory_alignment));
}

static uint64_t piece_size(const struct limits *limits)
{
    uint64_t piece = limits->max_transfer ? min_u64(limits->max_transfer, PIECE) : PIECE;
    return max_u64(align_down(piece, max_u64(limits->alignment, 1)), max_u64(limits->alignment, 1));
}

static int coroutine_fn read_block(struct node *node, uint64_t offset, void *to, uint64_t bytes)
{
    struct iovec iov = {to, bytes};
    if (offset >= atomic_load(&node->size)) {
        memset(to, 0, bytes);
        return 0;
    }
    if (!node->driver->read) { /* a filter that passes reads on */
        return edge_read(node->filtered, offset, bytes, buffers_one(&iov), 0);
    }
    return node->driver->read(node, offset, bytes, buffers_one(&iov), 0);
}

int coroutine_fn padded_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to, unsigned flags)
{
    uint64_t alignment = max_u64(node->limits.alignment, 1), end = offset + bytes;
    uint64_t at = align_down(offset, alignment), stop = align_up(end, alignment);
    uint64_t piece = min_u64(piece_size(&node->limits), stop - at);
    char *bounce = file_memory(piece);
    int r = bounce ? 0 : -ENOMEM;
    while (r == 0 && at < stop) {
        uint64_t length = min_u64(piece, stop - at);
        struct iovec iov = {bounce, length};
        r = node->driver->read(node, at, length, buffers_one(&iov), flags);
        if (r == 0) {
            uint64_t from = max_u64(at, offset), until = min_u64(at + length, end);
            buffers_copy_in(to, bounce + (from - at), until - from);
            to = buffers_advance(to, until - from);
            at += length;
        }
    }
    free(bounce);
    return r;
}

/* For a blkdebug node whose own requests are padded. */
static void coroutine_fn padded_event(struct node *node, enum blkdebug_event event)
{
    if (node->driver->event) {
        node->driver->event(node, event);
    }
}

/* Brings what the request leaves of the blocks in [at, at + length) into bounce. */
static int coroutine_fn read_edges(struct node *node, uint64_t at, uint64_t length, uint64_t offset, uint64_t end,
                                   char *bounce)
{
    uint64_t alignment = max_u64(node->limits.alignment, 1);
    bool head = at<offset, tail = at + length> end;
    int r = 0;
    if (head) {
        padded_event(node, BLKDEBUG_EVENT_PWRITEV_RMW_HEAD);
        r = read_block(node, at, bounce, alignment);
        padded_event(node, BLKDEBUG_EVENT_PWRITEV_RMW_AFTER_HEAD);
    }
    if (r == 0 && tail && !(head && length == alignment)) {
        padded_event(node, BLKDEBUG_EVENT_PWRITEV_RMW_TAIL);
        r = read_block(node, at + length - alignment, bounce + length - alignment, alignment);
        padded_event(node, BLKDEBUG_EVENT_PWRITEV_RMW_AFTER_TAIL);
    }
    return r;
}

int coroutine_fn padded_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from, unsigned flags)
{
    uint64_t alignment = max_u64(node->limits.alignment, 1), end = offset + bytes;
    uint64_t at = align_down(offset, alignment), stop = align_up(end, alignment);
    uint64_t piece = min_u64(piece_size(&node->limits), stop - at);
    char *bounce = file_memory(piece);
    if (!bounce) {
        return -ENOMEM;
    }
    struct range_hold hold;
    int r = 0;
    range_lock_acquire(&node->overlap, &hold, at, stop - at, false);
    while (r == 0 && at < stop) {
        uint64_t length = min_u64(piece, stop - at);
        struct iovec iov = {bounce, length};
        uint64_t start = max_u64(at, offset), until = min_u64(at + length, end);
        r = read_edges(node, at, length, offset, end, bounce);
        if (r == 0) {
            buffers_copy_out(from, bounce + (start - at), until - start);
            from = buffers_advance(from, until - start);
            r = node->driver->write(node, at, length, buffers_one(&iov), flags);
            at += length;
        }
    }
    range_lock_release(&node->overlap, &hold);
    free(bounce);
    return r;
}

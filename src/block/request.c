/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The request path: what happens to every request between an edge and the driver of its child. Owns the checks
 * (grant, read-only, range), the split at max_transfer and the fall-backs; padded.c owns what limits.alignment and
 * limits.memory_alignment ask for.
 *
 * 1. The common case (granted, in range, no alignment) allocates nothing, takes no lock and copies nothing.
 * 2. A request whose action was not granted to the edge never reaches a driver.
 * 3. Options of a node (discard, detect-zeroes, cache.no-flush) are applied where a request enters that node, so they
 *    hold for parents and backends alike.
 * 4. Only this file moves node->size because of a write or a truncation.
 * 5. What a request may have changed, if it failed too, is marked in the node's bitmaps when it ends.
 *
 * Called on any loop, inside a request that a backend counts (backend.c) or while the graph is held still: it does not
 * look at drains, and does not count.
 */
#include "block/request.h"
#include "base/list.h"
#include "base/size.h"
#include "block/bitmap.h"
#include "block/enforce.h"
#include "block/padded.h"
#include "block/private.h"
#include <errno.h>

/* Who may move data up into a node may read what it moves. */
#define NEED_READ (ACCESS_READ_DATA | ACCESS_WRITE_METADATA)
#define NEED_STATUS (ACCESS_READ_DATA | ACCESS_READ_METADATA | ACCESS_WRITE_DATA | ACCESS_WRITE_METADATA)
#define ZERO_BLOCK (64 * KiB)
#define ZERO_VECTORS 16

/* Aligned for direct I/O; all zero, in .bss. */
static char zero_block[ZERO_BLOCK] __attribute__((aligned(4096)));

static int __attribute__((cold)) request_refuse(const struct edge *edge, const char *what, unsigned need)
{
    return enforce_refuse(edge->parent ? edge->parent->name : edge->backend->owner, what, edge->child->name, need);
}

static inline uint64_t node_size(const struct node *node)
{
    return atomic_load_explicit(&node->size, memory_order_acquire);
}

static void node_grow(struct node *node, uint64_t size)
{
    uint64_t old = node_size(node);
    while (old < size && !atomic_compare_exchange_weak(&node->size, &old, size)) {
    }
}

/* No padding, no bouncing, no splitting needed? */
static inline bool limits_are_plain(const struct limits *limits, uint64_t bytes)
{
    return (limits->alignment | limits->memory_alignment) <= 1 &&
           (!limits->max_transfer || bytes <= limits->max_transfer);
}

/* Bytes that are elsewhere: does the driver know that, and nothing need their memory? */
static inline bool node_takes(const struct node *node, struct buffers view, uint64_t bytes)
{
    return G_LIKELY(view.count != BUFFERS_ELSEWHERE) ||
           (node->driver->offloads && limits_are_plain(&node->limits, bytes));
}

/* The length of the next piece of a long request. */
static inline uint64_t piece_of(const struct limits *limits, uint64_t bytes)
{
    if (!limits->max_transfer) {
        return bytes;
    }
    return min_u64(bytes, max_u64(align_down(limits->max_transfer, max_u64(limits->alignment, 1)), 1));
}

static bool passes_through(const struct node *node)
{
    return node->driver->kind == DRIVER_FILTER && node->filtered;
}

/* --- reading --- */

static int coroutine_fn node_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to, unsigned flags)
{
    if (!bytes) {
        return 0;
    }
    if (G_UNLIKELY(!node->driver->read)) {
        return passes_through(node) ? edge_read(node->filtered, offset, bytes, to, flags) : -ENOTSUP;
    }
    if (!node_takes(node, to, bytes)) {
        return -ENOTSUP;
    }
    if (G_LIKELY(limits_are_plain(&node->limits, bytes))) {
        return node->driver->read(node, offset, bytes, to, flags);
    }
    if (padded_is_needed(node, offset, bytes, to)) {
        return padded_read(node, offset, bytes, to, flags);
    }
    while (bytes) {
        uint64_t piece = piece_of(&node->limits, bytes);
        int r = node->driver->read(node, offset, piece, to, flags);
        if (r < 0) {
            return r;
        }
        offset += piece;
        bytes -= piece;
        to = buffers_advance(to, piece);
    }
    return 0;
}

/* What lies behind the end is zero. */
static int coroutine_fn read_past_end(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to,
                                      unsigned flags, uint64_t size)
{
    uint64_t inside = offset < size ? size - offset : 0;
    if (inside) {
        int r = node_read(node, offset, inside, to, flags);
        if (r < 0) {
            return r;
        }
    }
    buffers_fill(buffers_advance(to, inside), 0, bytes - inside);
    return 0;
}

int coroutine_fn edge_read(struct edge *edge, uint64_t offset, uint64_t bytes, struct buffers to, unsigned flags)
{
    struct node *node = edge->child;
    if (G_UNLIKELY(!(edge->granted & NEED_READ))) {
        return request_refuse(edge, "read", NEED_READ);
    }
    uint64_t size = node_size(node);
    if (G_UNLIKELY(offset > size || bytes > size - offset)) {
        return read_past_end(node, offset, bytes, to, flags, size);
    }
    return node_read(node, offset, bytes, to, flags);
}

/* --- writing --- */

/* Writes that change nothing visible need less than others. */
static inline unsigned write_needs(unsigned flags)
{
    return flags & REQUEST_IF_UNALLOCATED ? ACCESS_WRITE_METADATA : ACCESS_WRITE_DATA;
}

/* What write and write-zeroes have in common: 0, or why not. */
static inline int write_check(struct edge *edge, const char *what, uint64_t offset, uint64_t bytes, unsigned need)
{
    struct node *node = edge->child;
    if (G_UNLIKELY(!(edge->granted & need))) {
        return request_refuse(edge, what, need);
    }
    if (G_UNLIKELY(!node->writable)) {
        return -EROFS;
    }
    if (G_UNLIKELY(need == ACCESS_WRITE_METADATA) && !node->driver->write_if_unallocated && !passes_through(node)) {
        return -ENOTSUP; /* it would write over what is there */
    }
    uint64_t size = node_size(node);
    if (G_UNLIKELY(offset > size || bytes > size - offset)) {
        if (offset > INT64_MAX || bytes > INT64_MAX - offset) {
            return -EFBIG;
        }
        if (!node->driver->grows_on_write || !(edge->granted & ACCESS_ATTRIBUTES)) {
            return -ENOSPC;
        }
    }
    return 0;
}

/* What fills in unallocated clusters changes nothing that is seen. */
static inline void record_change(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    if (!(flags & REQUEST_IF_UNALLOCATED)) {
        bitmaps_mark(node, offset, bytes);
    }
}

static int coroutine_fn node_write_pieces(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                          unsigned flags)
{
    while (bytes) {
        uint64_t piece = piece_of(&node->limits, bytes);
        int r = node->driver->write(node, offset, piece, from, flags);
        if (r < 0) {
            return r;
        }
        offset += piece;
        bytes -= piece;
        from = buffers_advance(from, piece);
    }
    return 0;
}

static int coroutine_fn node_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                   unsigned flags)
{
    int r;
    if (!bytes) {
        return 0;
    }
    if (G_UNLIKELY(!node->driver->write)) {
        return passes_through(node) ? edge_write(node->filtered, offset, bytes, from, flags) : -ENOTSUP;
    }
    if (!node_takes(node, from, bytes)) {
        return -ENOTSUP;
    }
    if (node->no_flush && node->driver->kind == DRIVER_PROTOCOL) {
        flags &= ~REQUEST_FUA;
    }
    if (G_LIKELY(limits_are_plain(&node->limits, bytes))) {
        r = node->driver->write(node, offset, bytes, from, flags);
    } else if (padded_is_needed(node, offset, bytes, from)) {
        r = padded_write(node, offset, bytes, from, flags);
    } else if (node->limits.alignment > 1) {
        struct range_hold hold;
        range_lock_acquire(&node->overlap, &hold, offset, bytes, true);
        r = node_write_pieces(node, offset, bytes, from, flags);
        range_lock_release(&node->overlap, &hold);
    } else {
        r = node_write_pieces(node, offset, bytes, from, flags);
    }
    if (r == 0 && G_UNLIKELY(offset + bytes > node_size(node))) {
        node_grow(node, offset + bytes);
    }
    return r;
}

int coroutine_fn edge_write(struct edge *edge, uint64_t offset, uint64_t bytes, struct buffers from, unsigned flags)
{
    struct node *node = edge->child;
    int r = write_check(edge, "write", offset, bytes, write_needs(flags));
    if (G_UNLIKELY(r < 0)) {
        return r;
    }
    if (G_UNLIKELY(flags & REQUEST_COMPRESSED) && !node->driver->compresses && node->driver->kind != DRIVER_FILTER) {
        return -ENOTSUP; /* a filter passes it on to who knows */
    }
    if (G_UNLIKELY(from.count == BUFFERS_ELSEWHERE) && (node->detect_zeroes || flags & REQUEST_COMPRESSED)) {
        return -ENOTSUP; /* they have to be looked at */
    }
    if (G_UNLIKELY(node->detect_zeroes) && bytes && buffers_is_zero(from, bytes)) {
        unsigned unmap = node->detect_zeroes_unmap ? REQUEST_MAY_UNMAP : 0;
        return edge_write_zeroes(edge, offset, bytes, (flags & ~REQUEST_COMPRESSED) | unmap);
    }
    r = node_write(node, offset, bytes, from, flags);
    record_change(node, offset, bytes, flags);
    return r;
}

/* --- from edge to edge --- */

struct edge_copying {
    struct buffers_elsewhere view;
    struct edge *target;
    uint64_t offset, to;
    unsigned flags;
};

static int coroutine_fn copy_found(struct buffers_elsewhere *view, struct file *file, uint64_t offset, size_t at,
                                   uint64_t bytes)
{
    const struct edge_copying *copying = container_of(view, struct edge_copying, view);
    struct buffers_elsewhere from = {.file = file, .offset = offset, .aid = view->aid};
    uint64_t place = copying->offset + at, unit = view->aid.zero_unit;
    if (unit && ((offset ^ place) & (unit - 1) || (at && place & (unit - 1)))) {
        return -ENOTSUP; /* a unit is in pieces here, and nobody would see that it is zero */
    }
    return edge_write(copying->target, copying->to + at, bytes, buffers_of_elsewhere(&from), copying->flags);
}

int coroutine_fn edge_copy(struct edge *source, uint64_t offset, struct edge *target, uint64_t to, uint64_t bytes,
                           unsigned flags, const struct copy_aid *aid)
{
    struct edge_copying copying = {
        .view = {.found = copy_found, .aid = *aid}, .target = target, .offset = offset, .to = to, .flags = flags};
    int r = edge_read(source, offset, bytes, buffers_of_elsewhere(&copying.view), 0);
    return r == 0 && copying.view.missed ? -ENOTSUP : r;
}

/* --- zeroes --- */

static int coroutine_fn write_zero_data(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    struct iovec iov[ZERO_VECTORS];
    for (unsigned i = 0; i < ZERO_VECTORS; i++) {
        iov[i] = (struct iovec){zero_block, ZERO_BLOCK};
    }
    while (bytes) {
        uint64_t piece = min_u64(bytes, ZERO_BLOCK * ZERO_VECTORS);
        int r = node_write(node, offset, piece, (struct buffers){iov, ZERO_VECTORS, 0}, flags);
        if (r < 0) {
            return r;
        }
        offset += piece;
        bytes -= piece;
    }
    return 0;
}

/* An aligned range; shared with other aligned ones, excluding padded writes. */
static int coroutine_fn node_zero_aligned(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    uint64_t end = offset + bytes;
    struct range_hold hold;
    bool guarded = node->limits.alignment > 1;
    int r = -ENOTSUP;
    if (guarded) {
        range_lock_acquire(&node->overlap, &hold, offset, bytes, true);
    }
    while (node->driver->write_zeroes && offset < end) {
        uint64_t piece = piece_of(&node->limits, end - offset);
        r = node->driver->write_zeroes(node, offset, piece, flags);
        if (r < 0) {
            break;
        }
        offset += piece;
    }
    if (guarded) {
        range_lock_release(&node->overlap, &hold);
    }
    if (r == -ENOTSUP && !(flags & REQUEST_NO_FALLBACK)) {
        r = write_zero_data(node, offset, end - offset, flags & ~REQUEST_MAY_UNMAP);
    }
    if (r == 0 && end > node_size(node)) {
        node_grow(node, end);
    }
    return r;
}

static int coroutine_fn node_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    uint64_t alignment = max_u64(node->limits.alignment, 1), end = offset + bytes;
    if (!bytes) {
        return 0;
    }
    if (!node->driver->write_zeroes && !node->driver->write) {
        return passes_through(node) ? edge_write_zeroes(node->filtered, offset, bytes, flags) : -ENOTSUP;
    }
    if (node->no_flush && node->driver->kind == DRIVER_PROTOCOL) {
        flags &= ~REQUEST_FUA;
    }
    if (is_aligned(offset | bytes, alignment)) {
        return node_zero_aligned(node, offset, bytes, flags);
    }
    uint64_t first = align_up(offset, alignment), last = align_down(end, alignment);
    if (first >= last) {
        return write_zero_data(node, offset, bytes, flags & ~(REQUEST_MAY_UNMAP | REQUEST_NO_FALLBACK));
    }
    int r = node_zero_aligned(node, first, last - first, flags);
    if (r == 0) {
        r = write_zero_data(node, offset, first - offset, flags & REQUEST_FUA);
    }
    return r < 0 ? r : write_zero_data(node, last, end - last, flags & REQUEST_FUA);
}

int coroutine_fn edge_write_zeroes(struct edge *edge, uint64_t offset, uint64_t bytes, unsigned flags)
{
    struct node *node = edge->child;
    int r = write_check(edge, "write-zeroes", offset, bytes, write_needs(flags));
    if (G_UNLIKELY(r < 0)) {
        return r;
    }
    if (!node->discard) {
        flags &= ~REQUEST_MAY_UNMAP;
    }
    r = node_write_zeroes(node, offset, bytes, flags);
    record_change(node, offset, bytes, flags);
    return r;
}

static int coroutine_fn node_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    int r = 0;
    if (!node->driver->discard) {
        return passes_through(node) ? edge_discard(node->filtered, offset, bytes) : 0;
    }
    uint64_t alignment = max_u64(node->limits.alignment, 1);
    uint64_t first = align_up(offset, alignment), last = align_down(offset + bytes, alignment);
    struct range_hold hold;
    if (first >= last) {
        return 0;
    }
    if (alignment > 1) {
        range_lock_acquire(&node->overlap, &hold, first, last - first, true);
    }
    while (first < last && r == 0) {
        uint64_t piece = piece_of(&node->limits, last - first);
        r = node->driver->discard(node, first, piece);
        first += piece;
    }
    if (alignment > 1) {
        range_lock_release(&node->overlap, &hold);
    }
    return r == -ENOTSUP ? 0 : r;
}

int coroutine_fn edge_discard(struct edge *edge, uint64_t offset, uint64_t bytes)
{
    struct node *node = edge->child;
    int r = write_check(edge, "discard", offset, bytes, ACCESS_WRITE_DATA);
    if (G_UNLIKELY(r < 0)) {
        return r;
    }
    if (!node->discard || !bytes) {
        return 0;
    }
    r = node_discard(node, offset, bytes);
    bitmaps_mark(node, offset, bytes);
    return r;
}

/* --- the rest --- */

int coroutine_fn edge_flush(struct edge *edge)
{
    struct node *node = edge->child;
    if (node->driver->kind == DRIVER_PROTOCOL && node->no_flush) {
        return 0;
    }
    if (node->driver->flush) {
        int result = node->driver->flush(node);
        bool more = result == 0 && node->backing && atomic_load(&node_beneath_filters(node->backing->child)->unsettled);
        return more ? edge_flush(node->backing) : result;
    }
    struct edge *below = node->filtered ? node->filtered : node->file;
    return below ? edge_flush(below) : 0;
}

void coroutine_fn edge_event_to_filter(struct node *filter, enum blkdebug_event event)
{
    struct node *node = filter;
    while (!node->driver->event && passes_through(node)) {
        node = node->filtered->child;
    }
    if (node->driver->event) {
        node->driver->event(node, event);
    }
}

int coroutine_fn node_block_status(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    uint64_t size = node_size(node);
    if (offset >= size || !bytes) {
        return -EINVAL;
    }
    bytes = min_u64(bytes, size - offset);
    *ret = (struct extent){.bytes = bytes, .flags = EXTENT_DATA | EXTENT_ALLOCATED};
    if (node->driver->block_status) {
        int r = node->driver->block_status(node, offset, bytes, ret);
        if (r < 0) {
            return r;
        }
        g_assert(ret->bytes > 0 && ret->bytes <= bytes);
    } else if (passes_through(node)) {
        return node_block_status(node->filtered->child, offset, bytes, ret);
    }
    if (offset + ret->bytes == size) {
        ret->flags |= EXTENT_END;
    } else {
        ret->flags &= ~EXTENT_END;
    }
    return 0;
}

int edge_block_status_check(struct edge *edge)
{
    return G_UNLIKELY(!(edge->granted & NEED_STATUS)) ? request_refuse(edge, "block status", NEED_STATUS) : 0;
}

int coroutine_fn edge_block_status(struct edge *edge, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    int r = edge_block_status_check(edge);
    return r < 0 ? r : node_block_status(edge->child, offset, bytes, ret);
}

/* May the edge set this size? */
static int resize_check(struct edge *edge, uint64_t size, struct error **err)
{
    struct node *node = edge->child;
    unsigned need = ACCESS_ATTRIBUTES | (size < node_size(node) ? ACCESS_WRITE_BENEATH : 0);
    if ((edge->granted & need) != need) {
        int r = request_refuse(edge, "truncate", need);
        return error_set_errno(err, r, "Cannot change the size of node '%s'", node->name);
    }
    if (!node->writable) {
        return error_set(err, -EROFS, "Node '%s' is read-only", node->name);
    }
    if (size > INT64_MAX) {
        return error_set(err, -EFBIG, "A size of %" G_GUINT64_FORMAT " bytes is too large for node '%s'", size,
                         node->name);
    }
    return 0;
}

static void node_resized(struct node *node, uint64_t size)
{
    atomic_store(&node->size, size);
    node_size_changed(node);
}

int coroutine_fn edge_resize(struct edge *edge, uint64_t size, struct error **err)
{
    struct node *node = edge->child;
    int r = resize_check(edge, size, err);
    if (r < 0) {
        return r;
    }
    if (!node->driver->truncate) {
        return passes_through(node) ? edge_resize(node->filtered, size, err)
                                    : error_set(err, -ENOTSUP, "Driver '%s' of node '%s' cannot change its size",
                                                node->driver->name, node->name);
    }
    r = bitmaps_resize_begin(node, size, err);
    if (r < 0) {
        return r;
    }
    r = node->driver->truncate(node, size, err);
    bitmaps_resize_end(node, r == 0);
    if (r == 0) {
        node_resized(node, size);
    }
    return r;
}

int coroutine_fn edge_grow(struct edge *edge, uint64_t size, enum preallocation_mode mode, struct error **err)
{
    struct node *node = edge->child;
    const struct image_driver *image = node->driver->image;
    g_assert(size >= node_size(node));
    if (mode == PREALLOCATION_MODE_OFF) {
        return edge_resize(edge, size, err);
    }
    int r = resize_check(edge, size, err);
    if (r < 0) {
        return r;
    }
    if (!image || !image->grow) {
        return passes_through(node) ? edge_grow(node->filtered, size, mode, err)
                                    : error_set(err, -ENOTSUP, "Driver '%s' of node '%s' cannot preallocate",
                                                node->driver->name, node->name);
    }
    r = bitmaps_resize_begin(node, size, err);
    if (r < 0) {
        return r;
    }
    r = image->grow(node, size, mode, err);
    bitmaps_resize_end(node, r == 0);
    if (r == 0) {
        node_resized(node, size);
    }
    return r;
}

int coroutine_fn edge_truncate(struct edge *edge, uint64_t size)
{
    return edge_resize(edge, size, NULL);
}

uint64_t edge_size(const struct edge *edge)
{
    return node_size(edge->child);
}

int coroutine_fn edge_read_memory(struct edge *edge, uint64_t offset, void *to, uint64_t bytes)
{
    struct iovec iov = {to, bytes};
    return edge_read(edge, offset, bytes, buffers_one(&iov), 0);
}

int coroutine_fn edge_write_memory(struct edge *edge, uint64_t offset, const void *from, uint64_t bytes, unsigned flags)
{
    struct iovec iov = {(void *)from, bytes};
    return edge_write(edge, offset, bytes, buffers_one(&iov), flags);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The compress filter: what is written through it is stored compressed by the image that it shows, wherever that has
 * nothing of its own yet.
 *
 * 1. The image is written in whole clusters: of one that is written in part, the rest is read from where it is now.
 *    node->overlap keeps other changes that come through the filter from a cluster meanwhile, and whole clusters from
 *    being written twice at a time.
 * 2. What has a place in the image already is written as it is: the format compresses nothing that is there, and frees
 *    the old compressed data itself. (The peer fails such writes.) Others who store in the image what it shows (stream,
 *    copy-on-read) may be faster than us: the format then fails with EIO, and what fails is written as it is.
 * 3. The format decides whether a cluster becomes smaller; it stores it plain if not. An image that cannot have
 *    compressed data (its data are in an external file) gets them plain too.
 *
 * The node itself has no alignment, so clients see no larger blocks than those of the image.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "driver/drivers.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

static int coroutine_fn compress_open(struct node *node, const struct blockdev_options *options, struct error **err)
{
    const struct node *image = node_beneath_filters(node->filtered->child);
    if (!image->driver->compresses || !image->limits.cluster_size) {
        int code = error_set(err, -ENOTSUP, "Node '%s': the format '%s' of '%s' cannot store compressed data",
                             node->name, image->driver->name, image->name);
        error_hint(err, "The filter 'compress' stands directly over an image of a format that can, like qcow2");
        return code;
    }
    node->filename = g_strdup(node->filtered->child->filename);
    return 0;
}

static uint64_t unit_of(const struct node *node)
{
    return node_beneath_filters(node->filtered->child)->limits.cluster_size;
}

/* How far from `offset`, of `bytes`, the image has a place for its data already (*ret), or has not. */
static int coroutine_fn find_place(struct node *node, uint64_t offset, uint64_t *bytes, bool *ret)
{
    uint64_t done = 0;
    while (done < *bytes) {
        struct extent extent;
        int code = edge_block_status(node->filtered, offset + done, *bytes - done, &extent);
        if (code < 0) {
            return code;
        }
        bool place = extent.flags & EXTENT_ALLOCATED && extent.flags & (EXTENT_DATA | EXTENT_MAPPED);
        if (done && place != *ret) {
            break;
        }
        *ret = place;
        done += extent.bytes;
    }
    *bytes = done;
    return 0;
}

/* Whole clusters; the last one may be cut by the end of the image. */
static int coroutine_fn write_whole(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                    unsigned flags)
{
    uint64_t unit = unit_of(node), end = offset + bytes;
    while (offset < end) {
        uint64_t piece = end - offset;
        bool place = false;
        int code = find_place(node, offset, &piece, &place);
        if (code < 0) {
            return code;
        }
        if (offset + piece < end) { /* in a cluster with subclusters, some may have a place */
            uint64_t cut = place ? align_up(offset + piece, unit) : align_down(offset + piece, unit);
            place |= cut == offset;
            piece = min_u64(cut == offset ? offset + unit : cut, end) - offset;
        }
        code = place ? -ENOTSUP : edge_write(node->filtered, offset, piece, from, flags | REQUEST_COMPRESSED);
        if (code == -ENOTSUP || code == -EIO) {
            code = edge_write(node->filtered, offset, piece, from, flags);
        }
        if (code < 0) {
            return code;
        }
        from = buffers_advance(from, offset + piece < end ? piece : 0);
        offset += piece;
    }
    return 0;
}

/* Some bytes of the cluster at `start`, which is `length` long. */
static int coroutine_fn write_part(struct node *node, uint64_t start, uint64_t length, uint64_t offset, uint64_t bytes,
                                   struct buffers from, unsigned flags)
{
    uint64_t some = length;
    bool place = false;
    int code = find_place(node, start, &some, &place);
    if (code < 0) {
        return code;
    }
    if (place || some < length) {
        return edge_write(node->filtered, offset, bytes, from, flags);
    }
    g_autofree uint8_t *cluster = g_try_malloc(length);
    if (!cluster) {
        return -ENOMEM;
    }
    code = edge_read_memory(node->filtered, start, cluster, length);
    if (code == 0) {
        buffers_copy_out(from, cluster + (offset - start), bytes);
        code = edge_write_memory(node->filtered, start, cluster, length, flags | REQUEST_COMPRESSED);
    }
    return code == -ENOTSUP || code == -EIO ? edge_write(node->filtered, offset, bytes, from, flags) : code;
}

static int coroutine_fn write_clusters(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                       unsigned flags)
{
    uint64_t unit = unit_of(node), size = atomic_load(&node->size), end = offset + bytes;
    while (offset < end) {
        uint64_t start = align_down(offset, unit), stop = min_u64(start + unit, max_u64(size, end));
        uint64_t piece;
        int code;
        if (offset > start || end < stop) {
            piece = min_u64(stop, end) - offset;
            code = write_part(node, start, stop - start, offset, piece, from, flags);
        } else {
            piece = (end == size ? end : align_down(end, unit)) - offset;
            code = write_whole(node, offset, piece, from, flags);
        }
        if (code < 0) {
            return code;
        }
        from = buffers_advance(from, offset + piece < end ? piece : 0);
        offset += piece;
    }
    return 0;
}

/* The clusters that a change touches, in the way of others. */
static void coroutine_fn hold_clusters(struct node *node, uint64_t offset, uint64_t bytes, bool shared,
                                       struct range_hold *hold)
{
    uint64_t unit = unit_of(node), start = align_down(offset, unit);
    range_lock_acquire(&node->overlap, hold, start, align_up(offset + bytes, unit) - start, shared);
}

static int coroutine_fn compress_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                       unsigned flags)
{
    struct range_hold hold;
    if (flags & REQUEST_IF_UNALLOCATED) { /* whole clusters that have no place, or nothing happens to them */
        return edge_write(node->filtered, offset, bytes, from, flags | REQUEST_COMPRESSED);
    }
    hold_clusters(node, offset, bytes, false, &hold);
    int code = write_clusters(node, offset, bytes, from, flags & ~REQUEST_COMPRESSED);
    range_lock_release(&node->overlap, &hold);
    return code;
}

static int coroutine_fn compress_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    struct range_hold hold;
    hold_clusters(node, offset, bytes, true, &hold);
    int code = edge_write_zeroes(node->filtered, offset, bytes, flags);
    range_lock_release(&node->overlap, &hold);
    return code;
}

static int coroutine_fn compress_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    struct range_hold hold;
    hold_clusters(node, offset, bytes, true, &hold);
    int code = edge_discard(node->filtered, offset, bytes);
    range_lock_release(&node->overlap, &hold);
    return code;
}

const struct driver driver_compress = {
    .name = "compress",
    .id = BLOCKDEV_DRIVER_COMPRESS,
    .kind = DRIVER_FILTER,
    .write_if_unallocated = true,
    .open = compress_open,
    .write = compress_write,
    .write_zeroes = compress_write_zeroes,
    .discard = compress_discard,
};

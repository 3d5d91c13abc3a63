/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Block status: what the tables say of a range, without reading data.
 *
 * 1. Runs that are alike, and contiguous where they have a place, are one answer, across clusters and tables; up to a
 *    limit, so that the lock is not held for long, however large and empty the image is.
 * 2. Where places were given out ahead of data (preallocated metadata), an image's file has holes where its tables show
 *    data. That is found out once, by comparing the clusters in use with the space that the file takes; then the file
 * is asked about data as well, and what is a hole there is said to be zero.
 *
 * The question to the file is asked without the lock, in an epoch, like a read.
 */
#include "driver/format/qcow2_status.h"
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_map.h"
#include "driver/format/qcow2_refcount.h"
#include <errno.h>

enum { STATUS_RUNS_MAX = 64 };

static unsigned extent_flags_of(const struct qcow2 *image, const struct qcow2_run *run)
{
    bool mappable = run->placed && !image->crypto; /* what lies there is what the guest reads */
    unsigned mapped = mappable ? EXTENT_MAPPED | (image->external ? EXTENT_IN_DATA_FILE : 0) : 0;
    switch (run->kind) {
    case QCOW2_DATA:
        return EXTENT_DATA | EXTENT_ALLOCATED | mapped;
    case QCOW2_COMPRESSED_DATA:
        return EXTENT_DATA | EXTENT_ALLOCATED | EXTENT_COMPRESSED;
    case QCOW2_PLAIN_ZERO:
    case QCOW2_ALLOCATED_ZERO:
        return EXTENT_ZERO | EXTENT_ALLOCATED | mapped;
    case QCOW2_UNALLOCATED:
    case QCOW2_INVALID:
        break;
    }
    return mapped;
}

/* Joins runs. The lock is held. */
static int coroutine_fn join_runs(struct qcow2 *image, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    struct extent extent = {0};
    for (unsigned runs = 0; extent.bytes < bytes && runs < STATUS_RUNS_MAX; runs++) {
        struct qcow2_run run;
        int code = qcow2_lookup(image, offset + extent.bytes, bytes - extent.bytes, &run);
        if (code < 0 && extent.bytes == 0) {
            return code;
        }
        if (code < 0) {
            break;
        }
        unsigned flags = extent_flags_of(image, &run);
        if (extent.bytes == 0) {
            extent.flags = flags;
            extent.host_offset = run.host_offset;
        } else if (flags != extent.flags ||
                   (flags & EXTENT_MAPPED && run.host_offset != extent.host_offset + extent.bytes)) {
            break;
        }
        extent.bytes += run.bytes;
    }
    *ret = extent;
    return 0;
}

/* --- holes --- */

/* The clusters of one refcount block that are in use. */
static int coroutine_fn count_block(struct qcow2 *image, uint64_t index, void *memory, uint64_t *count)
{
    uint64_t block = image->refcount_table[index];
    if (block == 0 || qcow2_in_cluster(image, block) || block > QCOW2_HOST_OFFSET_MAX) {
        return 0;
    }
    int code = edge_read_memory(image->node->file, block, memory, image->cluster_size);
    for (uint64_t i = 0; code == 0 && i < (uint64_t)1 << image->refcount_block_bits; i++) {
        *count += qcow2_refcount_load(memory, image->header.refcount_order, i) != 0;
    }
    return code;
}

/* Does the file take so much less space than the clusters in use that there must be holes among them? */
static bool coroutine_fn has_holes(struct qcow2 *image)
{
    const struct node *file = node_beneath_filters(image->node->file->child);
    uint64_t taken = file->driver->allocated_size ? file->driver->allocated_size((struct node *)file) : UINT64_MAX;
    taken >>= image->cluster_bits;
    uint64_t limit = max_u64(taken + taken / 9, taken + 2);
    uint64_t end = div_up(edge_size(image->node->file), image->cluster_size);
    if (taken > UINT64_MAX >> 16 || end < limit) {
        return false;
    }
    uint64_t count = 0;
    uint64_t blocks = min_u64(image->refcount_table_entries, (end >> image->refcount_block_bits) + 1);
    g_autofree void *memory = g_try_malloc(image->cluster_size);
    for (uint64_t i = 0; memory && i < blocks && count < limit; i++) {
        if (count_block(image, i, memory, &count) < 0) {
            return false;
        }
    }
    return count >= limit;
}

/* Data that are a hole in the file read as zeroes. */
static void coroutine_fn look_into_file(struct qcow2 *image, struct extent *extent)
{
    struct edge *edge = qcow2_data_edge(image);
    uint64_t size = edge ? edge_size(edge) : 0;
    struct extent below;
    if (!edge) {
        return;
    }
    if (extent->host_offset >= size) {
        extent->flags |= EXTENT_ZERO;
        return;
    }
    uint64_t bytes = min_u64(extent->bytes, size - extent->host_offset);
    if (edge_block_status(edge, extent->host_offset, bytes, &below) == 0) {
        bool to_end = below.bytes == bytes && below.flags & EXTENT_ZERO; /* what is behind is zero, too */
        extent->bytes = to_end ? extent->bytes : below.bytes;
        extent->flags |= below.flags & EXTENT_ZERO;
    }
}

int coroutine_fn qcow2_block_status(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    struct qcow2 *image = node->state;
    struct extent extent;
    co_mutex_lock(&image->lock);
    int code = join_runs(image, offset, bytes, &extent);
    bool data = code == 0 && extent.flags & EXTENT_DATA && extent.flags & EXTENT_MAPPED;
    if (data && !image->holes_known) {
        image->holes_known = true;
        image->holes = has_holes(image);
    }
    bool look = data && image->holes;
    unsigned parity = qcow2_epoch_enter(image);
    co_mutex_unlock(&image->lock);
    if (look) {
        look_into_file(image, &extent);
    }
    qcow2_epoch_leave(image, parity);
    if (code < 0) {
        return code;
    }
    if (offset + extent.bytes == atomic_load(&node->size)) {
        extent.flags |= EXTENT_END;
    }
    *ret = extent;
    return 0;
}

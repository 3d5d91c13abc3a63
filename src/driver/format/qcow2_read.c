/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Reading, and block status. A read is a sequence of runs: each is looked up under the lock, entered into the current
 * epoch, and read without the lock straight into the caller's buffers. The epoch keeps the clusters of the run from
 * being reused while they are read (qcow2.h, 2); that they may be overwritten in place by a request that runs at the
 * same time is the client's affair.
 *
 * Compressed clusters are inflated by the worker pool. What a compressed cluster says of its length is rounded up to
 * sectors, and may reach behind the end of the file; the deflate stream itself says where it ends.
 */
#include "driver/format/qcow2_read.h"
#include "base/size.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_map.h"
#include "loop/worker.h"
#include <errno.h>
#include <string.h>
#include <zlib.h>

struct inflation {
    void *from, *to;
    size_t from_bytes, to_bytes;
};

/* On a worker: a raw deflate stream of exactly one cluster. */
static int inflate_cluster(void *argument)
{
    struct inflation *inflation = argument;
    z_stream stream = {
        .next_in = inflation->from,
        .avail_in = inflation->from_bytes,
        .next_out = inflation->to,
        .avail_out = inflation->to_bytes,
    };
    if (inflateInit2(&stream, -MAX_WBITS) != Z_OK) {
        return -ENOMEM;
    }
    int code = inflate(&stream, Z_FINISH);
    bool whole = stream.avail_out == 0 && (code == Z_STREAM_END || code == Z_BUF_ERROR || code == Z_OK);
    inflateEnd(&stream);
    return whole ? 0 : -EIO;
}

static int coroutine_fn read_compressed(struct qcow2 *image, uint64_t entry, uint64_t in_cluster, uint64_t bytes,
                                        struct buffers to)
{
    uint64_t place;
    uint64_t stored;
    qcow2_compressed_place(image->cluster_bits, entry, &place, &stored);
    g_autofree void *from = g_try_malloc(stored);
    g_autofree uint8_t *cluster = g_try_malloc(image->cluster_size);
    if (!from || !cluster) {
        return -ENOMEM;
    }
    int code = edge_read_memory(image->node->file, place, from, stored);
    if (code == 0) {
        struct inflation inflation = {from, cluster, stored, image->cluster_size};
        code = worker_run(inflate_cluster, &inflation);
    }
    if (code == 0) {
        buffers_copy_in(to, cluster + in_cluster, bytes);
    }
    return code;
}

int coroutine_fn qcow2_read_run(struct qcow2 *image, const struct qcow2_run *run, uint64_t offset, uint64_t bytes,
                                struct buffers to)
{
    struct node *node = image->node;
    switch (run->kind) {
    case QCOW2_DATA:
        return edge_read(node->file, run->host_offset, bytes, to, 0);
    case QCOW2_UNALLOCATED:
        if (node->backing) {
            return edge_read(node->backing, offset, bytes, to, 0);
        }
        buffers_fill(to, 0, bytes);
        return 0;
    case QCOW2_PLAIN_ZERO:
    case QCOW2_ALLOCATED_ZERO:
        buffers_fill(to, 0, bytes);
        return 0;
    case QCOW2_COMPRESSED_DATA:
        return read_compressed(image, run->entry, qcow2_in_cluster(image, offset), bytes, to);
    case QCOW2_INVALID:
        break;
    }
    return -EIO;
}

int coroutine_fn qcow2_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to, unsigned flags)
{
    struct qcow2 *image = node->state;
    while (bytes) {
        struct qcow2_run run;
        co_mutex_lock(&image->lock);
        int code = qcow2_lookup(image, offset, bytes, &run);
        unsigned parity = qcow2_epoch_enter(image);
        co_mutex_unlock(&image->lock);
        if (code == 0) {
            code = qcow2_read_run(image, &run, offset, run.bytes, to);
        }
        qcow2_epoch_leave(image, parity);
        if (code < 0) {
            return code;
        }
        offset += run.bytes;
        bytes -= run.bytes;
        if (bytes) {
            to = buffers_advance(to, run.bytes);
        }
    }
    return 0;
}

static unsigned extent_flags_of(enum qcow2_kind kind)
{
    switch (kind) {
    case QCOW2_DATA:
        return EXTENT_DATA | EXTENT_ALLOCATED | EXTENT_MAPPED;
    case QCOW2_COMPRESSED_DATA:
        return EXTENT_DATA | EXTENT_ALLOCATED | EXTENT_COMPRESSED;
    case QCOW2_PLAIN_ZERO:
        return EXTENT_ZERO | EXTENT_ALLOCATED;
    case QCOW2_ALLOCATED_ZERO:
        return EXTENT_ZERO | EXTENT_ALLOCATED | EXTENT_MAPPED;
    case QCOW2_UNALLOCATED:
    case QCOW2_INVALID:
        break;
    }
    return 0;
}

/* Runs that one answer joins: the lock is not held for long, however large and empty the image is. */
#define STATUS_RUNS_MAX 64

int coroutine_fn qcow2_block_status(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    struct qcow2 *image = node->state;
    struct extent extent = {0};
    co_mutex_lock(&image->lock);
    int code = 0;
    for (unsigned runs = 0; extent.bytes < bytes && runs < STATUS_RUNS_MAX; runs++) {
        struct qcow2_run run;
        code = qcow2_lookup(image, offset + extent.bytes, bytes - extent.bytes, &run);
        if (code < 0) {
            break;
        }
        unsigned flags = extent_flags_of(run.kind);
        if (extent.bytes == 0) {
            extent.flags = flags;
            extent.host_offset = run.host_offset;
        } else if (flags != extent.flags ||
                   (flags & EXTENT_MAPPED && run.host_offset != extent.host_offset + extent.bytes)) {
            break;
        }
        extent.bytes += run.bytes;
    }
    co_mutex_unlock(&image->lock);
    if (extent.bytes == 0) {
        return code;
    }
    if (offset + extent.bytes == atomic_load(&node->size)) {
        extent.flags |= EXTENT_END;
    }
    *ret = extent;
    return 0;
}

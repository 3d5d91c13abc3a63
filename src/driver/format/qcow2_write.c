/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Writing guest data. A write is a sequence of steps; each is decided under the lock:
 *
 * - in place, into (sub)clusters that are ours alone: like a read, in an epoch, without the lock;
 * - by allocation everywhere else: qcow2_step.c.
 *
 * 1. A request holds one allocation at a time and waits only while it holds none: no deadlock.
 * 2. REQUEST_IF_UNALLOCATED decides and registers under one hold of the lock, so it is atomic against other writes.
 */
#include "driver/format/qcow2_write.h"
#include "base/size.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_compressed.h"
#include "driver/format/qcow2_data.h"
#include "driver/format/qcow2_flush.h"
#include "driver/format/qcow2_map.h"
#include "driver/format/qcow2_overlap.h"
#include "driver/format/qcow2_step.h"
#include <errno.h>

static uint8_t zeroes[64 << 10]; /* never written; backs as many iovecs as are needed */

bool coroutine_fn qcow2_wait_for_allocations(struct qcow2 *image, uint64_t offset, uint64_t *bytes)
{
    uint64_t start = qcow2_cluster_floor(image, offset);
    list_for_each (link, &image->allocations) {
        struct qcow2_allocation *other = container_of(link, struct qcow2_allocation, link);
        if (other->offset + other->bytes <= start || other->offset >= offset + *bytes) {
            continue;
        }
        if (other->offset <= start) {
            co_queue_wait(&other->waiters, &image->lock);
            return true;
        }
        *bytes = other->offset - offset;
    }
    return false;
}

/* One step of any kind; *ret_bytes is how far it went. */
static int coroutine_fn write_some(struct qcow2 *image, uint64_t offset, uint64_t bytes, struct buffers from,
                                   unsigned flags, uint64_t *ret_bytes)
{
    struct qcow2_run run;
    int code;
    co_mutex_lock(&image->lock);
    uint64_t some;
    do {
        some = bytes;
    } while (qcow2_wait_for_allocations(image, offset, &some));
    code = atomic_load(&image->corrupt) ? -EIO : qcow2_lookup(image, offset, some, &run);
    if (code < 0) {
        co_mutex_unlock(&image->lock);
        return code;
    }
    *ret_bytes = run.bytes;
    if (flags & REQUEST_IF_UNALLOCATED && run.kind != QCOW2_UNALLOCATED) {
        co_mutex_unlock(&image->lock);
        return 0;
    }
    if (run.kind == QCOW2_DATA && run.copied) {
        if (image->overlap_places && !image->external && qcow2_overlap_hits(image, run.host_offset, run.bytes)) {
            code = qcow2_mark_corrupt(image, "data at 0x%" G_GINT64_MODIFIER "x would overwrite metadata",
                                      run.host_offset);
            co_mutex_unlock(&image->lock);
            return code;
        }
        unsigned parity = qcow2_epoch_enter(image);
        co_mutex_unlock(&image->lock);
        if (!buffers_elsewhere(from)) {
            edge_event(image->node->file, BLKDEBUG_EVENT_WRITE_AIO);
        }
        code = qcow2_data_write(image, run.host_offset, offset, run.bytes, from);
        qcow2_epoch_leave(image, parity);
        return code;
    }
    code = qcow2_write_by_allocation(image, offset, &run, from, ret_bytes);
    co_mutex_unlock(&image->lock);
    return code;
}

static int coroutine_fn write_all(struct qcow2 *image, uint64_t offset, uint64_t bytes, struct buffers from,
                                  unsigned flags)
{
    while (bytes) {
        uint64_t done = 0;
        int code = write_some(image, offset, bytes, from, flags, &done);
        if (code < 0) {
            return code;
        }
        offset += done;
        bytes -= done;
        if (bytes) {
            from = buffers_advance(from, done);
        }
    }
    return 0;
}

int coroutine_fn qcow2_write_plain(struct qcow2 *image, uint64_t offset, uint64_t bytes, struct buffers from,
                                   unsigned flags)
{
    return write_all(image, offset, bytes, from, flags);
}

int coroutine_fn qcow2_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from, unsigned flags)
{
    struct qcow2 *image = node->state;
    if (flags & REQUEST_COMPRESSED && image->crypto) {
        return -ENOTSUP; /* the format has no clusters that are both */
    }
    int code = qcow2_prepare_write(image);
    if (code == 0) {
        code = flags & REQUEST_COMPRESSED ? qcow2_compressed_write(image, offset, bytes, from, flags)
                                          : write_all(image, offset, bytes, from, flags);
    }
    if (code < 0) {
        return code;
    }
    if (flags & REQUEST_FUA) {
        return qcow2_flush(node);
    }
    qcow2_settle(image);
    return 0;
}

int coroutine_fn qcow2_write_zero_data(struct qcow2 *image, uint64_t offset, uint64_t bytes, unsigned flags)
{
    while (bytes) {
        uint64_t part = min_u64(bytes, sizeof(zeroes));
        struct iovec iov = {zeroes, part};
        int code = write_all(image, offset, part, buffers_one(&iov), flags);
        if (code < 0) {
            return code;
        }
        offset += part;
        bytes -= part;
    }
    return 0;
}

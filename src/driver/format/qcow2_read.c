/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Reading. A read is a sequence of runs: each is looked up under the lock, entered into the current
 * epoch, and read without the lock straight into the caller's buffers. The epoch keeps the clusters of the run from
 * being reused while they are read (qcow2.h, 2); that they may be overwritten in place by a request that runs at the
 * same time is the client's affair.
 *
 * Compressed clusters of one request are unpacked side by side (qcow2_compressed.c); each keeps its epoch until it is
 * done.
 */
#include "driver/format/qcow2_read.h"
#include "base/size.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_compressed.h"
#include "driver/format/qcow2_data.h"
#include "driver/format/qcow2_map.h"
#include <errno.h>
#include <string.h>

int coroutine_fn qcow2_read_run(struct qcow2 *image, const struct qcow2_run *run, uint64_t offset, uint64_t bytes,
                                struct buffers to)
{
    struct node *node = image->node;
    switch (run->kind) {
    case QCOW2_DATA:
        return qcow2_data_read(image, run->host_offset, offset, bytes, to);
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
        return qcow2_compressed_read(image, run->entry.descriptor, qcow2_in_cluster(image, offset), bytes, to);
    case QCOW2_INVALID:
        break;
    }
    return -EIO;
}

/* For fault injection. */
static void coroutine_fn tell_read(struct qcow2 *image, const struct qcow2_run *run)
{
    if (run->kind == QCOW2_DATA) {
        edge_event(image->node->file, BLKDEBUG_EVENT_READ_AIO);
    } else if (run->kind == QCOW2_COMPRESSED_DATA) {
        edge_event(image->node->file, BLKDEBUG_EVENT_READ_COMPRESSED);
    } else if (run->kind == QCOW2_UNALLOCATED && image->node->backing) {
        edge_event(image->node->file, BLKDEBUG_EVENT_READ_BACKING_AIO);
    }
}

int coroutine_fn qcow2_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to, unsigned flags)
{
    struct qcow2 *image = node->state;
    struct qcow2_inflating inflating; /* in use if `several` */
    bool several = false;
    int code = 0;
    while (bytes && code == 0) {
        struct qcow2_run run;
        co_mutex_lock(&image->lock);
        code = qcow2_lookup(image, offset, bytes, &run);
        unsigned parity = qcow2_epoch_enter(image);
        co_mutex_unlock(&image->lock);
        if (code == 0 && run.kind == QCOW2_COMPRESSED_DATA && buffers_elsewhere(to)) {
            code = -ENOTSUP;
        }
        if (code == 0 && !buffers_elsewhere(to)) { /* those are refused by who is to be told, and come again */
            tell_read(image, &run);
        }
        if (code == 0 && run.kind == QCOW2_COMPRESSED_DATA && (several || run.bytes < bytes)) {
            if (!several) {
                qcow2_inflating_begin(&inflating, image);
                several = true;
            }
            qcow2_inflating_read(&inflating, run.entry.descriptor, qcow2_in_cluster(image, offset), run.bytes, to,
                                 parity);
        } else {
            code = code == 0 ? qcow2_read_run(image, &run, offset, run.bytes, to) : code;
            qcow2_epoch_leave(image, parity);
        }
        if (code < 0) {
            break;
        }
        offset += run.bytes;
        bytes -= run.bytes;
        if (bytes) {
            to = buffers_advance(to, run.bytes);
        }
    }
    if (several) {
        int other = qcow2_inflating_end(&inflating);
        code = code < 0 ? code : other;
    }
    return code;
}

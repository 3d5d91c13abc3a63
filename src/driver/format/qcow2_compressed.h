/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_COMPRESSED_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_COMPRESSED_H

#include "base/buffers.h"
#include "loop/coroutine.h"
#include "loop/sync.h"
#include <stdint.h>

/* Compressed clusters: reading them, and writing new ones. Specification: "Compressed Clusters Descriptor". */
struct qcow2;
struct node;

/* Reads `bytes` of the cluster that an entry's descriptor shows, from `in_cluster` on. In an epoch, without the lock.
 */
int coroutine_fn qcow2_compressed_read(struct qcow2 *image, uint64_t descriptor, uint64_t in_cluster, uint64_t bytes,
                                       struct buffers to);

/* Reading of several clusters side by side, for one request. */
struct qcow2_inflating {
    struct qcow2 *image;
    struct co_group group;
    atomic_uint running;
    atomic_int code; /* the first error, or 0 */
    struct iovec *iov;
};
void qcow2_inflating_begin(struct qcow2_inflating *inflating, struct qcow2 *image);
/* The same as qcow2_compressed_read(), but it may go on after this returns. The epoch `parity` is left when it is
 * done. */
void coroutine_fn qcow2_inflating_read(struct qcow2_inflating *inflating, uint64_t descriptor, uint64_t in_cluster,
                                       uint64_t bytes, struct buffers to, unsigned parity);
/* Waits for all of it. */
int coroutine_fn qcow2_inflating_end(struct qcow2_inflating *inflating);

/* A write with REQUEST_COMPRESSED, whole clusters but for the last one of the image: -EINVAL else. -EIO where a cluster
 * has a place already (with REQUEST_IF_UNALLOCATED it is left alone instead). -ENOTSUP in images that cannot have
 * compressed clusters. What does not become smaller is written as it is. */
int coroutine_fn qcow2_compressed_write(struct qcow2 *image, uint64_t offset, uint64_t bytes, struct buffers from,
                                        unsigned flags);
/* The host cluster, by index, is not to be filled up any further: it is free, or its content is given up. The lock is
 * held. */
void qcow2_compressed_leave(struct qcow2 *image, uint64_t cluster);

#endif

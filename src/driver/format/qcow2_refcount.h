/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_REFCOUNT_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_REFCOUNT_H

#include "loop/coroutine.h"
#include <stdbool.h>
#include <stdint.h>

/* Refcounts and the allocation of clusters. All but load and store: in a coroutine, the image's lock held. */
struct qcow2;

/* One refcount of a block (or slice) in disk order; refcounts are 2^order bits wide. Pure. */
uint64_t qcow2_refcount_load(const void *block, unsigned order, uint64_t index);
void qcow2_refcount_store(void *block, unsigned order, uint64_t index, uint64_t value);

/* Of a cluster, by index. What has no block is 0. */
int coroutine_fn qcow2_refcount_get(struct qcow2 *image, uint64_t cluster, uint64_t *ret);
/* Adds +1 or -1 to `count` clusters whose blocks exist. On an error (-ERANGE: does not fit the width; -EIO: below 0,
 * the image is corrupt) those done so far are undone. */
int coroutine_fn qcow2_refcount_add(struct qcow2 *image, uint64_t cluster, uint64_t count, int delta);

/* Takes 1..wanted contiguous clusters; their refcounts are 1, in memory. *ret_clean: they read as zeroes. */
int coroutine_fn qcow2_allocate(struct qcow2 *image, uint64_t wanted, uint64_t *ret_offset, uint64_t *ret_clusters,
                                bool *ret_clean);
/* Takes exactly `clusters` contiguous ones, near the end of the file: for tables. */
int coroutine_fn qcow2_allocate_exactly(struct qcow2 *image, uint64_t clusters, uint64_t *ret_offset);
/* Gives back what was allocated and never shown by a table. */
void coroutine_fn qcow2_release(struct qcow2 *image, uint64_t offset, uint64_t clusters);
/* Drops one use of clusters that a table showed; takes effect later, see qcow2.h. */
void qcow2_free(struct qcow2 *image, uint64_t offset, uint64_t clusters, bool discard);
/* Lets take effect what may; releases and takes the lock while it passes discards down. */
void coroutine_fn qcow2_reclaim(struct qcow2 *image);
/* Writes changed blocks, then (with a barrier) changed entries of the table. */
int coroutine_fn qcow2_write_refcounts(struct qcow2 *image);

#endif

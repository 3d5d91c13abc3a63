/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_WRITE_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_WRITE_H

#include "base/buffers.h"
#include "block/request.h"

struct qcow2;
struct node;

/* The driver's write, write_zeroes and discard. */
int coroutine_fn qcow2_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from, unsigned flags);
int coroutine_fn qcow2_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags);
int coroutine_fn qcow2_discard(struct node *node, uint64_t offset, uint64_t bytes);
/* Unmaps whole subclusters inside the range: they read as zeroes. pass_down: the space they had is discarded in its
 * file; keep: clusters of our own keep it. Whoever calls it has prepared the image for writing. */
int coroutine_fn qcow2_unmap(struct qcow2 *image, uint64_t offset, uint64_t bytes, bool pass_down, bool keep);
/* Writes zeroes as data would be written; allocates. No FUA, no settling. */
int coroutine_fn qcow2_write_zero_data(struct qcow2 *image, uint64_t offset, uint64_t bytes, unsigned flags);

/* Cuts *bytes so that no allocation in flight is met. Where one is met at `offset` itself: waits for it, releasing the
 * lock meanwhile, and returns true: what was looked up before is void. */
bool coroutine_fn qcow2_wait_for_allocations(struct qcow2 *image, uint64_t offset, uint64_t *bytes);

/* An ordinary write of any bytes that are inside the image, without the rest of what a request is (qcow2_write()). */
int coroutine_fn qcow2_write_plain(struct qcow2 *image, uint64_t offset, uint64_t bytes, struct buffers from,
                                   unsigned flags);

#endif

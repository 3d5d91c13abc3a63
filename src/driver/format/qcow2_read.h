/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_READ_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_READ_H

#include "base/buffers.h"
#include "block/request.h"

struct qcow2;
struct qcow2_run;
struct node;

/* The driver's read. */
int coroutine_fn qcow2_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to, unsigned flags);
/* Reads what `run`, looked up for `offset`, shows there: bytes <= run->bytes. The lock is not held; the caller is in an
 * epoch since the lookup, or an allocation of its own keeps the clusters. */
int coroutine_fn qcow2_read_run(struct qcow2 *image, const struct qcow2_run *run, uint64_t offset, uint64_t bytes,
                                struct buffers to);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_STEP_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_STEP_H

#include "base/buffers.h"
#include "driver/format/qcow2_map.h"

/*
 * Writes the beginning of [offset, offset + run->bytes) where `run`, looked up for it under this hold of the lock, is
 * nothing that can be written in place; no allocation in flight is in the way. *ret_bytes: how far it went. The lock is
 * held at the beginning and at the end, not between.
 */
int coroutine_fn qcow2_write_by_allocation(struct qcow2 *image, uint64_t offset, const struct qcow2_run *run,
                                           struct buffers from, uint64_t *ret_bytes);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_PREALLOCATE_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_PREALLOCATE_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdint.h>

struct qcow2;

/* Gives every cluster that begins in [offset, offset + bytes) and has none a place, in the state that `mode` (not off)
 * says. All of them read as zeroes. Written, not flushed. The node is drained, on the control thread; the image is
 * prepared for writing, and the lock is not held. */
int coroutine_fn qcow2_preallocate(struct qcow2 *image, uint64_t offset, uint64_t bytes, enum preallocation_mode mode,
                                   struct error **err);

#endif

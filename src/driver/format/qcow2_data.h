/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_DATA_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_DATA_H

#include "base/buffers.h"
#include "loop/coroutine.h"
#include <stdint.h>

struct qcow2;

/* Moves the data of standard clusters between the guest and where they are: the image's file, or its data file. `guest`
 * is the guest offset whose place is `host`. The lock is not held. -ENOMEDIUM: there is a data file, but not open. */
int coroutine_fn qcow2_data_read(struct qcow2 *image, uint64_t host, uint64_t guest, uint64_t bytes, struct buffers to);
int coroutine_fn qcow2_data_write(struct qcow2 *image, uint64_t host, uint64_t guest, uint64_t bytes,
                                  struct buffers from);

#endif

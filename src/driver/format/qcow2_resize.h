/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_RESIZE_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_RESIZE_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdint.h>

struct node;

/* The driver's truncate: the node is drained, on the control thread. */
int coroutine_fn qcow2_truncate(struct node *node, uint64_t size, struct error **err);
/* image_driver.grow: the same for a larger size, and allocates what is added. */
int coroutine_fn qcow2_grow(struct node *node, uint64_t size, enum preallocation_mode mode, struct error **err);

#endif

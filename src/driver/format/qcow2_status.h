/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_STATUS_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_STATUS_H

#include "block/request.h"

struct node;

/* The driver's block_status. A subcluster that has nothing, in a cluster that has a place, is EXTENT_MAPPED without
 * being EXTENT_ALLOCATED. */
int coroutine_fn qcow2_block_status(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret);

#endif

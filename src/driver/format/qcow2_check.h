/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_CHECK_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_CHECK_H

#include "base/error.h"
#include "loop/coroutine.h"

struct qcow2;

/*
 * For an image with the dirty bit, opened for writing: counts every use of every cluster, writes new refcounts, sets
 * the COPIED flags accordingly, and clears the bit. Runs alone, with the L1 table loaded and the caches empty; the
 * refcount table in memory is replaced. A crash in the middle leaves the image dirty.
 */
int coroutine_fn qcow2_repair_dirty(struct qcow2 *image, struct error **err);

#endif

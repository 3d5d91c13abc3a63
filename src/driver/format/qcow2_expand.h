/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_EXPAND_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_EXPAND_H

#include "driver/format/qcow2_repair.h"

/*
 * Rewrites all L2 tables, those of snapshots too, so that none has zero clusters, which version 2 does not know; what
 * is read stays the same. Places that zero clusters kept become leaks. `repair` is new, with the census of a clean
 * image without subclusters. On stable storage when it returns; a crash leaves leaks.
 */
int coroutine_fn qcow2_expand_zeroes(struct qcow2_repair *repair);

#endif

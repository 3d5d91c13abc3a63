/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_INTERNAL_SNAPSHOT_H
#define INTERLOCK_JOB_INTERNAL_SNAPSHOT_H

#include "block/action.h"
#include "schema/commands.h"

/* Snapshots inside the image of a node that may be in use. Control thread. */

/* blockdev-snapshot-internal-sync as an action; the arguments are borrowed until its clean. */
void internal_snapshot_action(struct action *ret, const struct blockdev_snapshot_internal_sync *args);
/* blockdev-snapshot-delete-internal-sync. *ret: what it was; snapshot_info_free(). Takes graph->lock. */
int coroutine_fn internal_snapshot_delete(struct graph *graph,
                                          const struct blockdev_snapshot_delete_internal_sync_args *args,
                                          struct snapshot_info **ret, struct error **err);

#endif

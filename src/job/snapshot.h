/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_SNAPSHOT_H
#define INTERLOCK_JOB_SNAPSHOT_H

#include "block/action.h"
#include "schema/types.h"

/*
 * Snapshots of nodes that are in use, as actions (block/action.h): alone or several as one. An overlay: from one moment
 * on all users of the node (exports, overlays, users' filters) use the overlay instead, and the node stays as it is.
 * Jobs, with their filters and backends, stay with the node that they were asked for.
 *
 * Each makes *ret an action; the arguments are borrowed until its clean. Control thread.
 */
void snapshot_action(struct action *ret, const struct blockdev_snapshot *args);
/* The overlay is made first, while nobody waits. */
void snapshot_sync_action(struct action *ret, const struct blockdev_snapshot_sync *args);

#endif

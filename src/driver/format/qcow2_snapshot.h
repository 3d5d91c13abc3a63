/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_SNAPSHOT_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_SNAPSHOT_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/types.h"

/* Snapshots inside a qcow2 image: members of image_driver (block/image.h). */
struct node;

int coroutine_fn qcow2_snapshot_list(struct node *node, struct snapshot_info_list **ret, struct error **err);
/* The id is chosen here, whatever `snapshot` says. */
int coroutine_fn qcow2_snapshot_make(struct node *node, const struct snapshot_info *snapshot, struct error **err);
int coroutine_fn qcow2_snapshot_apply(struct node *node, const char *name, struct error **err);
int coroutine_fn qcow2_snapshot_delete(struct node *node, const char *name, struct error **err);
int coroutine_fn qcow2_snapshot_load(struct node *node, const char *name, struct error **err);
/* image_driver.empty: the same step, to an active table that shows nothing. */
int coroutine_fn qcow2_empty(struct node *node, struct error **err);

#endif

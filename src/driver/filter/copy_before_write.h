/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FILTER_COPY_BEFORE_WRITE_H
#define INTERLOCK_DRIVER_FILTER_COPY_BEFORE_WRITE_H

#include "block/driver.h"

struct before;

/*
 * A filter that shows the node below it unchanged, and has what is about to be overwritten copied to its target first
 * (copy/before.h). Made by a user's options, or by a job: with graph_create_node() and graph_attach_target_locked(),
 * inserted by graph_insert_filter_locked().
 */
extern const struct driver driver_copy_before_write;
/* The image under such a filter as it was when that was added. */
extern const struct driver driver_snapshot_access;

/* A job's filter: what guards its writes; before it is inserted. It outlives the filter's requests. */
void copy_before_write_set(struct node *filter, struct before *before);

#endif

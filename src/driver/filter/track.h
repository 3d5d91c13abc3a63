/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FILTER_TRACK_H
#define INTERLOCK_DRIVER_FILTER_TRACK_H

#include "block/driver.h"

struct dirty;

/*
 * A job's filter: shows the node below it unchanged, and marks in a dirty bitmap what was written through it. Made by
 * graph_create_node() and inserted by graph_insert_filter(), never by a user's options.
 */
extern const struct driver driver_track;

/* Which bitmap to mark; before the filter is inserted. The bitmap outlives the filter's requests. */
void track_set_dirty(struct node *filter, struct dirty *dirty);

#endif

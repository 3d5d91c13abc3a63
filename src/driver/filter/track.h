/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FILTER_TRACK_H
#define INTERLOCK_DRIVER_FILTER_TRACK_H

#include "block/driver.h"

struct dirty;
struct range_lock;

/*
 * A job's filter: shows the node below it unchanged, and keeps account of what was written through it, so that a copy
 * of the node can be made the same. Either it marks in a dirty bitmap what was written, for the job to copy; or it
 * writes to both sides, the node and the copy, before it acknowledges. Made by graph_create_node() and inserted by
 * graph_insert_filter(), never by a user's options.
 */
extern const struct driver driver_track;

/* Which bitmap to mark; before the filter is inserted. The bitmap outlives the filter's requests. */
void track_set_dirty(struct node *filter, struct dirty *dirty);

/* How both sides are written: the copy is the filter's target edge (graph_attach_target_locked()). */
struct track_sides {
    struct range_lock *busy; /* copy_busy() of the copy that takes what is marked, and writes by the same edge */
    uint64_t unit;   /* a power of two: where the copy takes whole units only, since it shows something else than
                      * the node around what it was not given yet; else 1 */
    bool pin_zeroes; /* as in struct copy_config */
};
/* Before the filter is inserted; the lock outlives its requests. It goes on marking. */
void track_set_sides(struct node *filter, const struct track_sides *sides);
/* Any thread, at any time: requests that begin later write both sides, or mark. Needs track_set_sides(). */
void track_write_both(struct node *filter, bool both);
bool track_writes_both(const struct node *filter);
/* The first error of writing to the copy since the last call, or 0. What it was about is marked. Any thread. */
int track_take_error(struct node *filter);
/* Has anything been written to the copy since the last call? Then it may not be stable there yet, though the user has
 * flushed the node since: who puts the copy in the node's place flushes it first. Any thread. */
bool track_take_stored(struct node *filter);

#endif

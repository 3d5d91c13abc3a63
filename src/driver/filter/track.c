/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The tracking filter: passes every request on, and marks what may have changed.
 *
 * 1. A region is marked after its change has completed below, and before the change is acknowledged: who clears the
 * mark and reads then finds the change, or finds the mark again.
 * 2. A failed write marks as well: nobody knows how much of it arrived.
 * 3. It is writable always; whether the node below may be written is decided there.
 *
 * Requests come from any loop; the bitmap is atomic, so there is no lock. Flush, read and block status are not
 * implemented: the request path passes them on.
 */
#include "driver/filter/track.h"
#include "block/dirty.h"

struct track {
    struct dirty *dirty;
};

void track_set_dirty(struct node *filter, struct dirty *dirty)
{
    struct track *track = filter->state;
    track->dirty = dirty;
    filter->writable = true;
    filter->wants_writable = true;
    filter->discard = true;
}

static void track_mark(struct node *node, uint64_t offset, uint64_t bytes)
{
    const struct track *track = node->state;
    dirty_mark(track->dirty, offset, bytes);
}

static int coroutine_fn track_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                    unsigned flags)
{
    int result = edge_write(node->filtered, offset, bytes, from, flags);
    if (!(flags & REQUEST_IF_UNALLOCATED)) {
        track_mark(node, offset, bytes);
    }
    return result;
}

static int coroutine_fn track_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    int result = edge_write_zeroes(node->filtered, offset, bytes, flags);
    if (!(flags & REQUEST_IF_UNALLOCATED)) {
        track_mark(node, offset, bytes);
    }
    return result;
}

static int coroutine_fn track_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    int result = edge_discard(node->filtered, offset, bytes);
    track_mark(node, offset, bytes);
    return result;
}

const struct driver driver_track = {
    .name = "track",
    .kind = DRIVER_FILTER,
    .state_size = sizeof(struct track),
    .write_if_unallocated = true,
    .write = track_write,
    .write_zeroes = track_write_zeroes,
    .discard = track_discard,
};

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The tracking filter: passes every request on, and sees to it that a copy of the node, which a job makes meanwhile,
 * misses nothing. A change is either marked, for the job to copy, or written to the copy as well.
 *
 * 1. A region is marked after its change has completed below, and before the change is acknowledged: who clears the
 * mark and reads then finds the change, or finds the mark again.
 * 2. A failed write changes as well: nobody knows how much of it arrived. Where both sides are written, what the node
 *    shows now is written to the copy, so that a guest which goes on trying keeps no job from being ready.
 * 3. It is writable always; whether the node below may be written is decided there.
 * 4. A region that is not marked, and that the job is not about to copy, reads the same on both sides whenever nobody
 *    holds its place in `busy`. A write to both sides holds it, in whole regions (and units), from before the node is
 *    written until the copy is. Where a region is marked it leaves the copy alone: the job will take it.
 * 5. A write that the copy refused marks, and is acknowledged: the guest has its data.
 *
 * What can meet in a region, and why each ends well:
 *   - The job has taken the mark and waits for the place that a write holds: it reads what was written. It has found
 *     zeroes there before: it looks again once it has the place (copy.h, target_edge).
 *   - The job has the place: the write waits, and comes after what the job has read and written.
 *   - The mark is taken between the write's look at it and its end: the job cannot have had the place yet, so it reads
 *     what was written.
 *   - A write that marks only (it began before the filter was told to write both, or after it was told not to) takes no
 *     place. Whatever it meets, it marks when it has ended, and the region is copied after that.
 * Marks are set more often than needed, never less.
 *
 * Requests come from any loop; the bitmap is atomic. Flush, read and block status have no member here: the request path
 * passes them on to the node. When to write both is the job's decision (src/job/converge.c).
 */
#include "driver/filter/track.h"
#include "base/size.h"
#include "block/dirty.h"
#include "loop/file.h"
#include "loop/sync.h"
#include <errno.h>
#include <glib.h>
#include <stdlib.h>

#define UNKNOWN_STEP (256 * KiB) /* what a failed write may have changed is read and written by so much */
#define UNKNOWN_MOST (4 * MiB)   /* a guest waits for it: more is marked */

struct track {
    struct dirty *dirty;
    struct track_sides sides;
    atomic_bool both;
    atomic_int error;
    atomic_bool stored; /* in the copy, by us, since somebody asked */
};

void track_set_dirty(struct node *filter, struct dirty *dirty)
{
    struct track *track = filter->state;
    track->dirty = dirty;
    filter->writable = true;
    filter->wants_writable = true;
    filter->discard = true;
}

void track_set_sides(struct node *filter, const struct track_sides *sides)
{
    struct track *track = filter->state;
    g_assert(is_power_of_two(sides->unit));
    track->sides = *sides;
}

void track_write_both(struct node *filter, bool both)
{
    struct track *track = filter->state;
    g_assert(track->sides.busy && filter->target);
    atomic_store(&track->both, both);
}

bool track_writes_both(const struct node *filter)
{
    struct track *track = filter->state;
    return atomic_load(&track->both);
}

int track_take_error(struct node *filter)
{
    struct track *track = filter->state;
    return atomic_exchange(&track->error, 0);
}

bool track_take_stored(struct node *filter)
{
    struct track *track = filter->state;
    return atomic_exchange(&track->stored, false);
}

static void track_mark(struct node *node, uint64_t offset, uint64_t bytes)
{
    const struct track *track = node->state;
    dirty_mark(track->dirty, offset, bytes);
}

/* --- both sides --- */

/* What is written to the copy; `from` NULL: zeroes. */
struct change {
    uint64_t offset, bytes;
    const struct buffers *from;
    unsigned flags;
    bool unknown; /* whatever the node shows now */
};

static void track_hold(struct track *track, struct range_hold *hold, uint64_t offset, uint64_t bytes)
{
    uint64_t unit = max_u64(dirty_granularity(track->dirty), track->sides.unit);
    uint64_t start = align_down(offset, unit);
    range_lock_acquire(track->sides.busy, hold, start, align_up(offset + bytes, unit) - start, false);
}

static int coroutine_fn copy_change(struct node *node, const struct change *change, uint64_t offset, uint64_t bytes)
{
    const struct track *track = node->state;
    if (!change->from) {
        unsigned flags = change->flags & ~(track->sides.pin_zeroes ? (unsigned)REQUEST_MAY_UNMAP : 0);
        return edge_write_zeroes(node->target, offset, bytes, flags);
    }
    return edge_write(node->target, offset, bytes, buffers_advance(*change->from, offset - change->offset),
                      change->flags);
}

/* Units of which a part has changed: as the node shows them now. *ret_read: what fails is not the node. */
static int coroutine_fn copy_shown(struct node *node, uint64_t offset, uint64_t bytes, bool *ret_read)
{
    *ret_read = false;
    bytes = min_u64(bytes, atomic_load(&node->size) - offset);
    void *memory = file_memory(bytes);
    struct iovec iov = {memory, bytes};
    if (!memory) {
        return -ENOMEM;
    }
    int result = edge_read(node->filtered, offset, bytes, buffers_one(&iov), 0);
    if (result == 0) {
        *ret_read = true;
        result = edge_write(node->target, offset, bytes, buffers_one(&iov), 0);
    }
    free(memory);
    return result;
}

/* [offset, end), in whole units, as the node shows it now. */
static int coroutine_fn copy_unknown(struct node *node, uint64_t offset, uint64_t end, bool *ret_read)
{
    const struct track *track = node->state;
    uint64_t unit = track->sides.unit, step = max_u64(unit, UNKNOWN_STEP);
    int result = 0;
    for (uint64_t at = align_down(offset, unit), stop = align_up(end, unit); result == 0 && at < stop; at += step) {
        result = copy_shown(node, at, min_u64(step, stop - at), ret_read);
    }
    return result;
}

/* [offset, end) of the change, which is not marked, in whole units. */
static int coroutine_fn copy_clean(struct node *node, const struct change *change, uint64_t offset, uint64_t end,
                                   bool *ret_read)
{
    const struct track *track = node->state;
    uint64_t unit = track->sides.unit;
    bool cut = !is_aligned(end, unit) && end != atomic_load(&node->size);
    uint64_t first = align_up(offset, unit), last = cut ? align_down(end, unit) : end;
    int result = 0;
    if (change->unknown) {
        return copy_unknown(node, offset, end, ret_read);
    }
    if (first > offset) {
        result = copy_shown(node, first - unit, unit, ret_read);
    }
    if (result == 0 && first < last) {
        result = copy_change(node, change, first, last - first);
    }
    if (result == 0 && cut && last >= first) {
        result = copy_shown(node, last, unit, ret_read);
    }
    return result;
}

/* The node has the change, and its place is held. */
static void coroutine_fn track_copy(struct node *node, const struct change *change)
{
    struct track *track = node->state;
    uint64_t end = change->offset + change->bytes;
    for (uint64_t at = change->offset; at < end;) {
        uint64_t marked = end, marked_bytes = 0;
        if (!dirty_next_within(track->dirty, at, end, &marked, &marked_bytes)) {
            marked = end;
        }
        bool read = true;
        int result = marked > at ? copy_clean(node, change, at, marked, &read) : 0;
        if (result < 0) {
            int none = 0;
            dirty_mark(track->dirty, at, marked - at);
            if (read) { /* else the job will meet it */
                atomic_compare_exchange_strong(&track->error, &none, result);
            }
        }
        at = marked + marked_bytes;
    }
    atomic_store(&track->stored, true);
}

/* What the copy is not asked for: it is flushed when the job ends, and stores as it likes. */
#define NODE_ALONE (REQUEST_FUA | REQUEST_NO_FALLBACK | REQUEST_COMPRESSED)

/* Writes, or (`from` NULL) writes zeroes, on both sides. */
static int coroutine_fn track_change_both(struct node *node, uint64_t offset, uint64_t bytes,
                                          const struct buffers *from, unsigned flags)
{
    struct track *track = node->state;
    struct range_hold hold;
    track_hold(track, &hold, offset, bytes);
    int result = from ? edge_write(node->filtered, offset, bytes, *from, flags)
                      : edge_write_zeroes(node->filtered, offset, bytes, flags);
    struct change change = {offset, bytes, from, flags & ~NODE_ALONE, result < 0};
    if (result < 0 && bytes > UNKNOWN_MOST) {
        track_mark(node, offset, bytes);
    } else {
        track_copy(node, &change);
    }
    range_lock_release(track->sides.busy, &hold);
    return result;
}

/* What a discard leaves behind is anything: zeroes go on, the rest as it is now. It may be what it was (parts of
 * clusters): were that marked, a guest that goes on discarding would keep the job from being ready. */
static int coroutine_fn track_discard_both(struct node *node, uint64_t offset, uint64_t bytes)
{
    struct track *track = node->state;
    struct range_hold hold;
    struct extent extent;
    uint64_t room = UNKNOWN_MOST;
    track_hold(track, &hold, offset, bytes);
    int result = edge_discard(node->filtered, offset, bytes);
    for (uint64_t at = offset, end = offset + bytes; at < end; at += extent.bytes) {
        bool known = chain_block_status(node->filtered->child, NULL, at, end - at, &extent) == 0;
        extent.bytes = known ? extent.bytes : end - at;
        if (known && extent.flags & EXTENT_ZERO) {
            struct change change = {at, extent.bytes, NULL, REQUEST_MAY_UNMAP};
            track_copy(node, &change);
        } else if (extent.bytes <= room) {
            struct change change = {at, extent.bytes, .unknown = true};
            track_copy(node, &change);
            room -= extent.bytes;
        } else {
            track_mark(node, at, extent.bytes);
        }
    }
    range_lock_release(track->sides.busy, &hold);
    return result;
}

/* --- requests --- */

/* What fills in where nothing was changes nothing that is seen. */
static bool track_is_to_copy(const struct node *node, unsigned flags)
{
    return !(flags & REQUEST_IF_UNALLOCATED) && track_writes_both(node);
}

static int coroutine_fn track_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                    unsigned flags)
{
    if (track_is_to_copy(node, flags)) {
        return track_change_both(node, offset, bytes, &from, flags);
    }
    int result = edge_write(node->filtered, offset, bytes, from, flags);
    if (!(flags & REQUEST_IF_UNALLOCATED)) {
        track_mark(node, offset, bytes);
    }
    return result;
}

static int coroutine_fn track_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    if (track_is_to_copy(node, flags)) {
        return track_change_both(node, offset, bytes, NULL, flags);
    }
    int result = edge_write_zeroes(node->filtered, offset, bytes, flags);
    if (!(flags & REQUEST_IF_UNALLOCATED)) {
        track_mark(node, offset, bytes);
    }
    return result;
}

static int coroutine_fn track_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    if (!node->filtered->child->discard) {
        return edge_discard(node->filtered, offset, bytes); /* which checks, and does nothing */
    }
    if (track_writes_both(node)) {
        return track_discard_both(node, offset, bytes);
    }
    int result = edge_discard(node->filtered, offset, bytes);
    track_mark(node, offset, bytes);
    return result;
}

const struct driver driver_track = {
    .name = "track",
    .kind = DRIVER_FILTER,
    .state_size = sizeof(struct track),
    .write_if_unallocated = true,
    .offloads = true,
    .write = track_write,
    .write_zeroes = track_write_zeroes,
    .discard = track_discard,
};

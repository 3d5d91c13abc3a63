/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Copies of a point in time. A guest's write goes: filter -> before_guard(): for each unit of its range that is `left`,
 * lock it, look again, read the source, write the target, clear `left`, unlock -> only then the source is written.
 * A unit's bit in `left` means: the source has the old data, and nobody has written there since the point in time.
 *
 * What would break it, and what keeps it from happening:
 * 1. `left` only ever goes from set to clear, and is cleared when the old data are on the target, under the unit's
 *    exclusive lock. So who finds it clear, without any lock, may write; and who has the lock and finds it set reads
 * old data, for a writer would be waiting for this lock. (Cleared earlier, a write could slip in before the read.)
 * 2. Who has waited for the lock looks again: another may have copied the unit meanwhile, and a write may have
 * followed. (Without it new data would be copied over the old ones.)
 * 3. Who reads the frozen view holds the lock shared from before he looks until he has read the source: no guard can
 *    pass meanwhile. (Without it he would read what was written between his look and his read.)
 * 4. Once it is broken, guards let writes pass without copying: readers and the background copy look at `broken` after
 *    they have read. It is set before such a write is let through.
 * 5. Who holds the lock waits for no drain: guards and readers are inside a request that reaches both source and target
 *    and do their I/O on edges; pieces of the background copy have entered both before. So requests that wait for the
 *    lock get it, whatever is drained.
 * 6. A guard takes its share of the memory before the lock, so who holds the lock waits for no memory.
 *
 * The bits are atomic (block/dirty.c) and nobody marks any once guards run. Knows no graph; opens and flushes nothing.
 */
#include "copy/before.h"
#include "base/size.h"
#include "block/dirty.h"
#include "block/node.h"
#include "loop/file.h"
#include "loop/loop.h"
#include "loop/sync.h"
#include <errno.h>
#include <glib.h>
#include <stdlib.h>

#define PIECE (256 * KiB)          /* what a guard copies at once; at least a unit */
#define MEMORY (8 * MiB)           /* for all guards at a time; at least one piece */
#define READ_PIECE ((uint64_t)MiB) /* of the frozen view: how much is locked at once */

struct before {
    struct before_config config;
    struct dirty *left;     /* still to be copied */
    struct dirty *readable; /* part of the frozen view */
    struct range_lock lock;
    atomic_int broken;
    struct co_group late; /* guards that run in coroutines of their own */
    /* the memory of guards */
    struct co_mutex mutex;
    struct co_queue queue;
    unsigned pieces; /* free */
};

int before_create(const struct before_config *config, struct before **ret)
{
    g_assert(is_power_of_two(config->unit) && config->unit >= 512);
    struct before *before = g_new0(struct before, 1);
    before->config = *config;
    int code = dirty_create(config->size, config->unit, &before->left);
    if (code == 0) {
        code = dirty_create(config->size, config->unit, &before->readable);
    }
    if (code < 0) {
        dirty_destroy(before->left);
        g_free(before);
        return code;
    }
    range_lock_init(&before->lock);
    co_group_init(&before->late);
    co_mutex_init(&before->mutex);
    co_queue_init(&before->queue);
    before->pieces = (unsigned)max_u64(MEMORY / max_u64(PIECE, config->unit), 1);
    *ret = before;
    return 0;
}

void before_destroy(struct before *before)
{
    if (before) {
        range_lock_destroy(&before->lock);
        co_group_destroy(&before->late);
        co_mutex_destroy(&before->mutex);
        dirty_destroy(before->left);
        dirty_destroy(before->readable);
        g_free(before);
    }
}

void before_keep(struct before *before, uint64_t offset, uint64_t bytes)
{
    dirty_mark(before->left, offset, bytes);
    dirty_mark(before->readable, offset, bytes);
}

struct range_lock *before_lock(struct before *before)
{
    return &before->lock;
}

uint64_t before_size(const struct before *before)
{
    return before->config.size;
}

uint64_t before_unit(const struct before *before)
{
    return before->config.unit;
}

uint64_t before_left(const struct before *before)
{
    return dirty_bytes(before->left);
}

const struct dirty *before_bits(const struct before *before)
{
    return before->left;
}

bool before_next(const struct before *before, uint64_t from, uint64_t *ret_offset, uint64_t *ret_bytes)
{
    return dirty_next(before->left, from, ret_offset, ret_bytes);
}

int before_broken(const struct before *before)
{
    return atomic_load(&before->broken);
}

static void before_break(struct before *before, int error)
{
    int whole = 0;
    atomic_compare_exchange_strong(&before->broken, &whole, error);
}

bool before_wanted(const struct before *before, uint64_t *offset, uint64_t *bytes)
{
    return dirty_next_within(before->left, *offset, *offset + *bytes, offset, bytes);
}

void before_moved(struct before *before, uint64_t offset, uint64_t bytes)
{
    dirty_unmark(before->left, offset, bytes);
}

/* --- memory --- */

static void coroutine_fn memory_take(struct before *before)
{
    co_mutex_lock(&before->mutex);
    while (before->pieces == 0) {
        co_queue_wait(&before->queue, &before->mutex);
    }
    before->pieces--;
    co_mutex_unlock(&before->mutex);
}

static void coroutine_fn memory_give(struct before *before)
{
    co_mutex_lock(&before->mutex);
    before->pieces++;
    co_queue_wake_one(&before->queue);
    co_mutex_unlock(&before->mutex);
}

/* --- the guard --- */

/* Moves one run, which is locked and left, with `buffer` of at least its length. */
static int coroutine_fn copy_run(struct before *before, const struct before_edges *edges, uint64_t offset,
                                 uint64_t bytes, char *buffer)
{
    int code = edge_read_memory(edges->source, offset, buffer, bytes);
    for (uint64_t done = 0, length; code == 0 && done < bytes; done += length) {
        bool zero = false;
        for (length = 0; done + length < bytes;) { /* the units from `done` on that are all zero, or all not */
            uint64_t unit = min_u64(before->config.unit, bytes - done - length);
            bool this_zero = memory_is_zero(buffer + done + length, unit);
            if (length && this_zero != zero) {
                break;
            }
            zero = this_zero;
            length += unit;
        }
        unsigned flags = before->config.write_flags;
        code = zero ? edge_write_zeroes(edges->target, offset + done, length, flags & ~REQUEST_COMPRESSED)
                    : edge_write_memory(edges->target, offset + done, buffer + done, length, flags);
    }
    if (code == 0) {
        dirty_unmark(before->left, offset, bytes);
    }
    return code;
}

/* [offset, offset + bytes): whole units, at most a piece. */
static int coroutine_fn copy_piece(struct before *before, const struct before_edges *edges, uint64_t offset,
                                   uint64_t bytes)
{
    uint64_t end = offset + bytes;
    struct range_hold hold;
    int code = 0;
    memory_take(before);
    char *buffer = file_memory(bytes);
    range_lock_acquire(&before->lock, &hold, offset, bytes, false);
    while (code == 0 && !before_broken(before) && dirty_next_within(before->left, offset, end, &offset, &bytes)) {
        code = buffer ? copy_run(before, edges, offset, bytes, buffer) : -ENOMEM;
        offset += bytes;
    }
    if (code < 0 && before->config.break_snapshot) {
        before_break(before, code);
    }
    range_lock_release(&before->lock, &hold);
    free(buffer);
    memory_give(before);
    return code;
}

/* [offset, end): whole units. */
static int coroutine_fn copy_left(struct before *before, const struct before_edges *edges, uint64_t offset,
                                  uint64_t end)
{
    uint64_t piece = max_u64(PIECE, before->config.unit), bytes;
    int code = 0;
    while (code == 0 && dirty_next_within(before->left, offset, end, &offset, &bytes)) {
        bytes = min_u64(bytes, piece);
        code = copy_piece(before, edges, offset, bytes);
        offset += bytes;
    }
    return code;
}

/* A guard with a time-out: the copy runs in a coroutine of its own, and who is last frees this. One loop. */
struct late_guard {
    struct before *before;
    struct before_edges edges;
    uint64_t offset, end;
    struct loop_sleep sleep;
    int code;
    bool done, left_alone;
};

static void late_guard_entry(void *argument)
{
    struct late_guard *guard = argument;
    struct before *before = guard->before;
    guard->code = copy_left(before, &guard->edges, guard->offset, guard->end);
    guard->done = true;
    if (guard->left_alone) {
        g_free(guard);
    } else {
        loop_sleep_wake(&guard->sleep);
    }
    co_group_leave(&before->late);
}

static int coroutine_fn copy_left_in_time(struct before *before, const struct before_edges *edges, uint64_t offset,
                                          uint64_t end)
{
    struct late_guard *guard = g_new0(struct late_guard, 1);
    *guard = (struct late_guard){.before = before, .edges = *edges, .offset = offset, .end = end};
    co_group_enter(&before->late);
    coroutine_enter(coroutine_create(late_guard_entry, guard));
    int64_t deadline = loop_now_ns() + (int64_t)before->config.timeout_s * 1000 * 1000 * 1000;
    while (!guard->done && loop_now_ns() < deadline) {
        loop_sleep_ns(&guard->sleep, deadline - loop_now_ns());
    }
    if (!guard->done) {
        guard->left_alone = true;
        if (before->config.break_snapshot) {
            before_break(before, -ETIMEDOUT);
        }
        return -ETIMEDOUT;
    }
    int code = guard->code;
    g_free(guard);
    return code;
}

int coroutine_fn before_guard(struct before *before, const struct before_edges *edges, uint64_t offset, uint64_t bytes)
{
    uint64_t size = before->config.size, unit = before->config.unit, first, run;
    if (offset >= size || before_broken(before)) {
        return 0;
    }
    bytes = min_u64(bytes, size - offset);
    uint64_t end = min_u64(align_up(offset + bytes, unit), size);
    offset = align_down(offset, unit);
    if (!dirty_next_within(before->left, offset, end, &first, &run)) {
        return 0;
    }
    int code =
        before->config.timeout_s ? copy_left_in_time(before, edges, first, end) : copy_left(before, edges, first, end);
    return code < 0 && before_broken(before) ? 0 : code;
}

void coroutine_fn before_settle(struct before *before)
{
    co_group_wait(&before->late);
}

/* --- the frozen view --- */

/* A run from `offset` on, in a locked range that ends at `end`: as far as `readable` and `left` are the same. */
struct view_run {
    uint64_t bytes;
    bool readable, left;
};

/* How far from `offset` the bits are all as the first one. */
static uint64_t same_bits(const struct dirty *dirty, uint64_t offset, uint64_t end, bool *ret)
{
    uint64_t first, bytes;
    if (!dirty_next_within(dirty, offset, end, &first, &bytes)) {
        *ret = false;
        return end - offset;
    }
    *ret = first == offset;
    return *ret ? bytes : first - offset;
}

static struct view_run view_next(const struct before *before, uint64_t offset, uint64_t end)
{
    struct view_run run;
    uint64_t readable = same_bits(before->readable, offset, end, &run.readable);
    uint64_t left = same_bits(before->left, offset, end, &run.left);
    run.bytes = min_u64(readable, left);
    return run;
}

static int coroutine_fn read_locked(struct before *before, const struct before_edges *edges, uint64_t offset,
                                    uint64_t end, struct buffers to)
{
    int code = 0;
    while (code == 0 && offset < end) {
        struct view_run run = view_next(before, offset, end);
        struct edge *from = run.left ? edges->source : edges->target;
        code = run.readable ? edge_read(from, offset, run.bytes, to, 0) : -EACCES;
        to = buffers_advance(to, run.bytes);
        offset += run.bytes;
    }
    return code;
}

int coroutine_fn before_read(struct before *before, const struct before_edges *edges, uint64_t offset, uint64_t bytes,
                             struct buffers to)
{
    int code = 0;
    while (code == 0 && bytes) {
        uint64_t piece = min_u64(bytes, READ_PIECE);
        struct range_hold hold;
        range_lock_acquire(&before->lock, &hold, offset, piece, true);
        code = read_locked(before, edges, offset, offset + piece, to);
        range_lock_release(&before->lock, &hold);
        to = buffers_advance(to, piece);
        offset += piece;
        bytes -= piece;
        if (before_broken(before)) {
            code = -EIO;
        }
    }
    return code;
}

int coroutine_fn before_block_status(struct before *before, const struct before_edges *edges, uint64_t offset,
                                     uint64_t bytes, struct extent *ret)
{
    struct extent extent = {0};
    struct range_hold hold;
    range_lock_acquire(&before->lock, &hold, offset, bytes, true);
    struct view_run run = view_next(before, offset, offset + bytes);
    int code = run.readable ? 0 : -EACCES;
    if (code == 0) {
        const struct edge *from = run.left ? edges->source : edges->target;
        code = chain_block_status(from->child, NULL, offset, run.bytes, &extent);
    }
    range_lock_release(&before->lock, &hold);
    if (code == 0) {
        *ret = (struct extent){.bytes = min_u64(extent.bytes, run.bytes),
                               .flags = EXTENT_ALLOCATED | (extent.flags & (EXTENT_ZERO | EXTENT_DATA))};
    }
    return before_broken(before) ? -EIO : code;
}

int coroutine_fn before_discard(struct before *before, const struct before_edges *edges, uint64_t offset,
                                uint64_t bytes)
{
    uint64_t unit = before->config.unit, size = before->config.size, end = offset + bytes;
    uint64_t last = end >= size ? size : align_down(end, unit), at = align_up(offset, unit);
    struct range_hold hold;
    int code = 0;
    if (at >= last) {
        return 0;
    }
    range_lock_acquire(&before->lock, &hold, at, last - at, false);
    while (at < last && code == 0) {
        struct view_run run = view_next(before, at, last);
        if (run.readable) {
            dirty_unmark(before->readable, at, run.bytes);
            dirty_unmark(before->left, at, run.bytes);
            code = run.left ? 0 : edge_discard(edges->target, at, run.bytes);
        }
        at += run.bytes;
    }
    range_lock_release(&before->lock, &hold);
    return code;
}

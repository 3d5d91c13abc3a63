/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The copy engine: one dispatcher (the caller's coroutine), and a coroutine for each piece in flight.
 *
 * The dispatcher walks a run of offsets (a whole range, or run after run of a dirty bitmap), asks its owner what lies
 * there while earlier pieces are still moving, cuts pieces and launches them. It is also the only one that waits: for a
 * free slot, for the speed limit, for the end of a rest, or for the last piece; always in control->sleep.
 *
 * 1. Two pieces that overlap never move at the same time (the range lock `busy`): the later one reads after the
 *    earlier one has written, so an old copy never lands on a newer one.
 * 2. `resting` holds failed pieces that are to be tried again; they are counted neither in flight nor done. What they
 *    write is read, or looked at, anew.
 * 3. copy_range() and copy_dirty() return with nothing in flight and nothing resting.
 * 4. A cancel is seen at the next look at `control`, and nothing sleeps through one: each wait is woken by it.
 *
 * It knows no job and no graph; it opens, closes and flushes nothing.
 */
#include "copy/copy.h"
#include "base/list.h"
#include "base/size.h"
#include "block/dirty.h"
#include "block/user.h"
#include "loop/file.h"
#include "loop/sync.h"
#include <errno.h>
#include <glib.h>
#include <stdlib.h>

#define RETRY_DELAY_NS (100LL * 1000 * 1000)
#define FOREVER_NS ((int64_t)3600 * 1000 * 1000 * 1000)
#define ZERO_PIECES 64      /* a piece of zeroes needs no memory: it may be as long as this many others */
#define EXTENTS_PER_TURN 64 /* looks at extents before the loop's other work gets its turn */

struct copy {
    struct copy_config config;
    struct range_lock busy;
    struct list resting; /* struct copy_piece, to be tried again */
    struct list buffers; /* struct copy_buffer, unused */
    unsigned in_flight;
    uint64_t memory_used;
    uint64_t done;
    uint64_t taken; /* out of a dirty bitmap, not done */
    int error;      /* a verdict of COPY_FAIL */
    int64_t retry_ns;
    struct dirty *dirty; /* of the running copy_dirty() */
    bool urgent;
    unsigned looks;
    uint64_t pass; /* how far the running copy_dirty() has come in its dirty bitmap */
    /* the run that is being cut up */
    uint64_t position, end;
    struct copy_extent ahead; /* what lies at position; bytes 0: not asked yet */
};
struct copy_piece {
    struct list link;
    struct copy *copy;
    uint64_t offset, bytes;
    uint64_t credit; /* how far it moves `done` */
    enum copy_kind kind;
    void *buffer;
};
struct copy_buffer {
    struct list link;
};

void copy_control_wake(struct copy_control *control)
{
    loop_sleep_wake(&control->sleep);
}

struct copy *copy_create(const struct copy_config *config)
{
    struct copy *copy = g_new0(struct copy, 1);
    copy->config = *config;
    struct copy_config *own = &copy->config;
    g_assert(is_power_of_two(own->alignment) && is_power_of_two(own->zero_alignment));
    own->workers = own->workers ? own->workers : COPY_WORKERS;
    own->piece = max_u64(own->piece ? own->piece : COPY_PIECE, own->alignment);
    own->piece = align_down(own->piece, own->alignment);
    own->memory = max_u64(own->memory ? own->memory : COPY_MEMORY, own->piece);
    own->zero_alignment = max_u64(own->zero_alignment, own->alignment);
    range_lock_init(&copy->busy);
    list_init(&copy->resting);
    list_init(&copy->buffers);
    return copy;
}

void copy_destroy(struct copy *copy)
{
    if (!copy) {
        return;
    }
    g_assert(copy->in_flight == 0 && list_is_empty(&copy->resting));
    list_for_each_safe (link, &copy->buffers) {
        free(container_of(link, struct copy_buffer, link));
    }
    range_lock_destroy(&copy->busy);
    g_free(copy);
}

uint64_t copy_done(const struct copy *copy)
{
    return copy->done;
}

uint64_t copy_in_flight(const struct copy *copy)
{
    return copy->taken;
}

/* Memory of config.piece bytes. NULL: there is none just now. */
static void *copy_buffer_get(struct copy *copy)
{
    if (copy->memory_used + copy->config.piece > copy->config.memory) {
        return NULL;
    }
    void *buffer;
    if (!list_is_empty(&copy->buffers)) {
        struct copy_buffer *unused = container_of(copy->buffers.next, struct copy_buffer, link);
        list_remove(&unused->link);
        buffer = unused;
    } else {
        buffer = file_memory(copy->config.piece);
    }
    if (buffer) {
        copy->memory_used += copy->config.piece;
    }
    return buffer;
}

static void copy_buffer_put(struct copy *copy, void *buffer)
{
    if (buffer) {
        struct copy_buffer *unused = buffer;
        list_prepend(&copy->buffers, &unused->link);
        copy->memory_used -= copy->config.piece;
    }
}

/* The bytes of the piece that a run of the same kind has from `at` on, in units of zero_alignment. */
static uint64_t piece_run(const struct copy_piece *piece, uint64_t at, bool *ret_zero)
{
    uint64_t unit = piece->copy->config.zero_alignment, from = at;
    const char *memory = piece->buffer;
    while (at < piece->bytes) {
        uint64_t next = min_u64(align_down(piece->offset + at, unit) + unit - piece->offset, piece->bytes);
        bool zero = memory_is_zero(memory + at, next - at);
        if (at == from) {
            *ret_zero = zero;
        } else if (zero != *ret_zero) {
            break;
        }
        at = next;
    }
    return at - from;
}

static int coroutine_fn piece_write(struct copy_piece *piece)
{
    struct copy *copy = piece->copy;
    for (uint64_t at = 0; at < piece->bytes;) {
        bool zero = false;
        uint64_t bytes = piece_run(piece, at, &zero);
        struct iovec iov = {(char *)piece->buffer + at, bytes};
        int result =
            zero ? backend_write_zeroes(copy->config.target, piece->offset + at, bytes, copy->config.write_flags)
                 : backend_write(copy->config.target, piece->offset + at, bytes, buffers_one(&iov),
                                 copy->config.write_flags);
        if (result < 0) {
            return result;
        }
        at += bytes;
    }
    return 0;
}

static int coroutine_fn piece_move(struct copy_piece *piece, bool *ret_reading)
{
    struct copy *copy = piece->copy;
    *ret_reading = false;
    if (piece->kind == COPY_ZERO) {
        return backend_write_zeroes(copy->config.target, piece->offset, piece->bytes,
                                    copy->config.write_flags | REQUEST_MAY_UNMAP);
    }
    struct iovec iov = {piece->buffer, piece->bytes};
    int result = backend_read(copy->config.source, piece->offset, piece->bytes, buffers_one(&iov), 0);
    if (result < 0) {
        *ret_reading = true;
        return result;
    }
    return piece_write(piece);
}

static void piece_done(struct copy_piece *piece)
{
    struct copy *copy = piece->copy;
    copy->done += piece->credit;
    if (copy->dirty) {
        copy->taken -= piece->credit;
    }
    g_free(piece);
}

/* The owner's verdict on a failed piece, which may be freed. */
static void piece_failed(struct copy_piece *piece, bool reading, int error)
{
    struct copy *copy = piece->copy;
    switch (copy->error ? COPY_FAIL : copy->config.failed(copy->config.argument, reading, error)) {
    case COPY_LEAVE:
        piece_done(piece);
        return;
    case COPY_FAIL:
        copy->error = copy->error ? copy->error : error;
        break;
    case COPY_RETRY:
        copy->retry_ns = loop_now_ns() + RETRY_DELAY_NS;
        break;
    case COPY_PAUSE:
        break;
    }
    list_append(&copy->resting, &piece->link);
}

static void piece_entry(void *argument)
{
    struct copy_piece *piece = argument;
    struct copy *copy = piece->copy;
    struct range_hold hold;
    range_lock_acquire(&copy->busy, &hold, piece->offset, piece->bytes, false);
    bool reading;
    int result = piece_move(piece, &reading);
    range_lock_release(&copy->busy, &hold);
    copy_buffer_put(copy, piece->buffer);
    piece->buffer = NULL;
    copy->in_flight--;
    if (result < 0) {
        piece_failed(piece, reading, result);
    } else {
        piece_done(piece);
    }
    copy_control_wake(copy->config.control);
}

/* Asks what lies at `position`, unless that is known. */
static int coroutine_fn copy_look(struct copy *copy)
{
    if (copy->ahead.bytes) {
        return 0;
    }
    if (++copy->looks % EXTENTS_PER_TURN == 0) {
        coroutine_pause();
    }
    uint64_t bytes = copy->end - copy->position;
    int result = copy->config.extent(copy->config.argument, copy->position, bytes, &copy->ahead);
    if (result < 0) {
        copy->ahead.bytes = 0;
        return result;
    }
    g_assert(copy->ahead.bytes > 0 && copy->ahead.bytes <= bytes);
    return 0;
}

/* Moves `position` on over what has been dealt with. */
static void copy_advance(struct copy *copy, uint64_t bytes)
{
    copy->position += bytes;
    copy->ahead.bytes -= min_u64(bytes, copy->ahead.bytes);
}

/* Cuts the next piece off what lies ahead (which is not to be skipped), and moves on behind it. */
static struct copy_piece *copy_cut(struct copy *copy)
{
    const struct copy_config *config = &copy->config;
    const struct speed_limit *speed = &config->control->speed;
    bool limited = speed->rate && !copy->urgent;
    uint64_t longest =
        limited ? speed_piece(speed, max_u64(config->alignment, 64 * KiB), config->piece) : config->piece;
    if (!limited && copy->ahead.kind == COPY_ZERO) {
        longest *= ZERO_PIECES;
    }
    uint64_t from = align_down(copy->position, config->alignment);
    uint64_t extent_end = copy->position + copy->ahead.bytes;
    uint64_t to = min_u64(align_up(extent_end, config->alignment), copy->end);
    enum copy_kind kind = copy->ahead.kind;
    if (from < copy->position || to > extent_end) {
        /* Rounded outward it holds something of its neighbours: that has to be read. */
        kind = COPY_DATA;
        longest = min_u64(longest, config->piece);
    }
    to = min_u64(to, from + max_u64(align_down(longest, config->alignment), config->alignment));
    struct copy_piece *piece = g_new0(struct copy_piece, 1);
    list_init(&piece->link);
    piece->copy = copy;
    piece->offset = from;
    piece->bytes = to - from;
    piece->credit = to - copy->position;
    piece->kind = kind;
    copy_advance(copy, piece->credit);
    return piece;
}

/* The next run of the dirty bitmap becomes the run to be cut up. False: the pass is over. */
static bool copy_next_run(struct copy *copy)
{
    uint64_t offset, bytes;
    if (!copy->dirty || !dirty_take(copy->dirty, copy->pass, copy->config.piece, &offset, &bytes)) {
        return false;
    }
    if (offset < copy->pass) { /* round the end: it was marked behind our back, and is for the next pass */
        dirty_mark(copy->dirty, offset, bytes);
        return false;
    }
    copy->pass = offset + bytes;
    copy->position = offset;
    copy->end = offset + bytes;
    copy->ahead.bytes = 0;
    copy->taken += bytes;
    return true;
}

/* Sleeps until something changes, but not longer than this. */
static void coroutine_fn copy_sleep(struct copy *copy, int64_t duration_ns)
{
    loop_sleep_ns(&copy->config.control->sleep, min_u64(duration_ns, FOREVER_NS));
}

/*
 * A failed piece whose time has come, or NULL. In a dirty copy, zeroes are looked at again like a run of their own,
 * once the present run is cut up: users may have written there meanwhile, and that may have been copied already.
 */
static struct copy_piece *copy_next_resting(struct copy *copy)
{
    if (list_is_empty(&copy->resting) || loop_now_ns() < copy->retry_ns) {
        return NULL;
    }
    struct copy_piece *piece = container_of(copy->resting.next, struct copy_piece, link);
    if (copy->dirty && piece->kind == COPY_ZERO) {
        if (copy->position == copy->end) {
            list_remove(&piece->link);
            copy->position = piece->offset;
            copy->end = piece->offset + piece->bytes;
            copy->ahead.bytes = 0;
            g_free(piece);
        }
        return NULL;
    }
    list_remove(&piece->link);
    return piece;
}

/*
 * Finds the next piece to launch: one that failed before, or a new one. NULL with 0: all is launched. What is to be
 * skipped is skipped here.
 */
static int coroutine_fn copy_next(struct copy *copy, struct copy_piece **ret)
{
    *ret = copy_next_resting(copy);
    if (*ret) {
        return 0;
    }
    if (copy->position == copy->end && !copy_next_run(copy)) {
        return 0;
    }
    int result = copy_look(copy);
    if (result < 0) {
        /* Nobody knows what lies there: a piece stands for it, to be retried like one that could not be read. */
        copy->ahead.bytes = min_u64(copy->end - copy->position, copy->config.piece);
        copy->ahead.kind = COPY_DATA;
        struct copy_piece *piece = copy_cut(copy);
        piece_failed(piece, true, result);
        return -EAGAIN;
    }
    if (copy->ahead.kind == COPY_SKIP) {
        copy->done += copy->ahead.bytes;
        if (copy->dirty) {
            copy->taken -= copy->ahead.bytes;
        }
        copy_advance(copy, copy->ahead.bytes);
        return -EAGAIN;
    }
    *ret = copy_cut(copy);
    return 0;
}

/* Waits until the piece may go; 0, or -EAGAIN when something else has to be looked at first. */
static int coroutine_fn copy_admit(struct copy *copy, struct copy_piece *piece)
{
    struct copy_control *control = copy->config.control;
    if (copy->in_flight >= copy->config.workers) {
        copy_sleep(copy, FOREVER_NS);
        return -EAGAIN;
    }
    if (piece->kind == COPY_DATA && !piece->buffer) {
        piece->buffer = copy_buffer_get(copy);
        if (!piece->buffer) {
            if (copy->in_flight == 0) {
                copy->error = -ENOMEM;
            } else {
                copy_sleep(copy, FOREVER_NS);
            }
            return -EAGAIN;
        }
    }
    if (!copy->urgent) {
        int64_t wait = speed_ask(&control->speed, piece->bytes, loop_now_ns());
        if (wait > 0) {
            copy_sleep(copy, wait);
            return -EAGAIN;
        }
    }
    return 0;
}

static void copy_launch(struct copy *copy, struct copy_piece *piece)
{
    copy->in_flight++;
    coroutine_enter(coroutine_create(piece_entry, piece));
}

/* Puts back what was begun and will not be finished: in a dirty copy it is dirty again. */
static void copy_abandon(struct copy *copy, struct copy_piece *waiting)
{
    if (waiting) {
        copy_buffer_put(copy, waiting->buffer);
        list_append(&copy->resting, &waiting->link);
    }
    list_for_each_safe (link, &copy->resting) {
        struct copy_piece *piece = container_of(link, struct copy_piece, link);
        list_remove(&piece->link);
        if (copy->dirty) {
            dirty_mark(copy->dirty, piece->offset, piece->bytes);
        }
        g_free(piece);
    }
    if (copy->dirty) {
        dirty_mark(copy->dirty, copy->position, copy->end - copy->position);
        copy->taken = 0;
    }
    copy->position = copy->end = copy->ahead.bytes = 0;
}

/* Whether the dispatcher has to let the pieces in flight come home before it launches more. */
static bool copy_must_settle(const struct copy *copy)
{
    const struct copy_control *control = copy->config.control;
    return copy->error || control->cancelled || (control->pauses && !copy->urgent);
}

static int coroutine_fn copy_run(struct copy *copy)
{
    struct copy_control *control = copy->config.control;
    struct copy_piece *piece = NULL;
    while (true) {
        if (copy_must_settle(copy)) {
            if (copy->in_flight) {
                copy_sleep(copy, FOREVER_NS);
            } else if (copy->error || control->cancelled) {
                break;
            } else {
                control->rest(control);
            }
            continue;
        }
        if (!piece && (copy_next(copy, &piece) == -EAGAIN || piece)) {
            continue; /* it may have yielded: a wake that came meanwhile found nobody asleep */
        }
        if (!piece) {
            if (copy->in_flight == 0 && list_is_empty(&copy->resting)) {
                break;
            }
            bool retry = !list_is_empty(&copy->resting);
            copy_sleep(copy, retry ? max_u64(copy->retry_ns - loop_now_ns(), 1) : (uint64_t)FOREVER_NS);
            continue;
        }
        if (copy_admit(copy, piece) == 0) {
            copy_launch(copy, piece);
            piece = NULL;
        }
    }
    int result = copy->error ? copy->error : control->cancelled ? -ECANCELED : 0;
    copy_abandon(copy, piece);
    copy->error = 0;
    return result;
}

int coroutine_fn copy_range(struct copy *copy, uint64_t offset, uint64_t bytes, bool urgent)
{
    g_assert(copy->in_flight == 0 && is_aligned(offset, copy->config.alignment));
    copy->position = offset;
    copy->end = offset + bytes;
    copy->ahead.bytes = 0;
    copy->dirty = NULL;
    copy->urgent = urgent;
    return copy_run(copy);
}

int coroutine_fn copy_dirty(struct copy *copy, struct dirty *dirty, bool urgent)
{
    g_assert(copy->in_flight == 0);
    copy->position = copy->end = 0;
    copy->ahead.bytes = 0;
    copy->pass = 0;
    copy->dirty = dirty;
    copy->urgent = urgent;
    int result = copy_run(copy);
    copy->dirty = NULL;
    return result;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_COPY_COPY_H
#define INTERLOCK_COPY_COPY_H

#include "base/buffers.h"
#include "copy/speed.h"
#include "loop/coroutine.h"
#include "loop/loop.h"
#include <stdbool.h>
#include <stdint.h>

/*
 * The one copy engine. A copy moves pieces from a source backend to a target backend (which may be the same one),
 * keeping many in flight; what is to be copied, and what a failure means, are its owner's callbacks. Everything here
 * runs on one loop, in coroutines. Offsets and lengths in bytes; 0 or a negative errno.
 */
struct backend;
struct copy;
struct dirty;
struct edge;
struct range_lock;

/* How a running copy is told to stop, to rest and to go slower. Zero-initialise but for `rest`. */
struct copy_control {
    bool cancelled;           /* the copy ends with -ECANCELED as soon as nothing is in flight */
    unsigned pauses;          /* more than 0: the copy rests as soon as nothing is in flight */
    struct speed_limit speed; /* change with speed_set(), then copy_control_wake() */
    struct loop_sleep sleep;  /* the one place where a copy sleeps for itself */
    /* Called while `pauses` is more than 0 with nothing in flight; returns when that, or cancelled, has changed. */
    void coroutine_fn (*rest)(struct copy_control *control);
};
/* After any change of the fields above, on the copy's loop: whatever it waits for, it looks again. */
void copy_control_wake(struct copy_control *control);

enum copy_kind {
    COPY_SKIP, /* nothing to do there */
    COPY_DATA,
    COPY_ZERO, /* reads as zeroes: written without being read */
};
struct copy_extent {
    uint64_t bytes; /* more than 0, at most what was asked for */
    enum copy_kind kind;
};
/* What a failed piece means. */
enum copy_verdict {
    COPY_FAIL,  /* the copy ends with this error */
    COPY_RETRY, /* again, after a moment */
    COPY_LEAVE, /* count it as done and go on */
    COPY_PAUSE, /* again, once the owner's pause is over: it has raised control->pauses */
};

struct copy_config {
    struct copy_control *control;
    struct backend *source; /* NULL: `read` takes its place */
    struct backend *target; /* NULL, and no target_edge: nothing is written, `differs` is told */
    /* If not NULL, data go by this edge, of a node that `source` reaches, and each piece is one request of `source`: it
     * is inside from before it takes its place in copy_busy() until it has written. So who waits for it inside a
     * request of his own (a filter that writes both sides) is never waited for by a drain that holds the piece up.
     * Zeroes of copy_dirty() are looked at once more in there: others who lock may have written since. What is none any
     * more is copied as data, in the same pass. */
    struct edge *target_edge;
    uint64_t alignment; /* of pieces, rounded outward: the target's unit where it matters, else 1 */
    /* Aligned runs of zeroes inside data are written as zeroes: in units of zero_alignment (at least 512; 0: zeroes are
     * written like other data). Between data in one piece a run needs zero_minimum bytes (0: one unit). */
    uint64_t zero_alignment, zero_minimum;
    bool target_is_zero; /* it reads as zeroes everywhere: such runs are not written at all */
    /* Pieces begin to be written in order of offset, so that a target which takes its space as it is written is laid
     * out in order. What failed and is tried again comes later. */
    bool ordered;
    /* If not 0, a power of two: a piece that ends inside such a unit is written before the next begins to be. */
    uint64_t order_unit;
    unsigned write_flags; /* enum request_flags of every write (REQUEST_COMPRESSED: not of zeroes) */
    bool pin_zeroes;      /* zeroes are stored, also where nothing reads as zeroes now: something may lie below later */
    unsigned workers;     /* pieces in flight; 0: COPY_WORKERS */
    uint64_t piece;       /* longest piece; 0: COPY_PIECE. Never less than `alignment`. */
    uint64_t memory;      /* for pieces in flight, at least one piece; 0: COPY_MEMORY */
    /* What lies at `offset`. May be asked about one place more than once. */
    int coroutine_fn (*extent)(void *argument, uint64_t offset, uint64_t bytes, struct copy_extent *ret);
    /* Reads what is to be copied, instead of `source`. */
    int coroutine_fn (*read)(void *argument, uint64_t offset, uint64_t bytes, struct buffers to);
    /* If not NULL: reads what the target shows there already. Units (of the larger alignment) where that is the same as
     * what is to be copied are left alone. */
    int coroutine_fn (*shown)(void *argument, uint64_t offset, uint64_t bytes, struct buffers to);
    /* Without target: `read` and `shown` differ at this offset and are the same before it in its piece. The copy ends
     * with -ECANCELED once the pieces before it have been looked at, which may report smaller offsets. */
    void (*differs)(void *argument, uint64_t offset);
    /* The lock that copy_busy() gives, instead of one of the copy's own: with others who move the same things. */
    struct range_lock *busy;
    /* If not NULL: asked with the range of a piece locked: sets the first run in [*offset, *offset + *bytes), in units
     * of `alignment`, that is still to be moved; false: none. The others are done. */
    bool (*wanted)(void *argument, uint64_t *offset, uint64_t *bytes);
    /* If not NULL: this has been moved; it is locked still. */
    void coroutine_fn (*moved)(void *argument, uint64_t offset, uint64_t bytes);
    /* A piece could not be read (or asked about), or written. */
    enum copy_verdict (*failed)(void *argument, bool reading, int error);
    void *argument;
};
#define COPY_WORKERS 16
#define COPY_PIECE ((uint64_t)2 << 20)   /* a huge page; long enough for the worker pool: two processors copy */
#define COPY_MEMORY ((uint64_t)12 << 20) /* six such: a disk has something to do while others are being answered */

struct copy *copy_create(const struct copy_config *config);
void copy_destroy(struct copy *copy); /* nothing is in flight; accepts NULL */

/* Copies [offset, offset + bytes) in order of offset, completing in any order. Returns with nothing in flight:
 * 0, -ECANCELED, or the error that `failed` let through. urgent: without rest and speed limit (somebody is held up
 * meanwhile). */
int coroutine_fn copy_range(struct copy *copy, uint64_t offset, uint64_t bytes, bool urgent);
/* After copy_range() has failed by a piece: where, and whether it was reading. With several, the first in the range. */
void copy_failed_at(const struct copy *copy, uint64_t *ret_offset, bool *ret_reading);
/*
 * One pass: copies every region that is dirty when it begins. What is marked meanwhile behind the place that the pass
 * has reached stays dirty, so that writing users cannot keep it from ending; without them everything is clean
 * afterwards. On failure what was taken and not copied is dirty again.
 */
int coroutine_fn copy_dirty(struct copy *copy, struct dirty *dirty, bool urgent);

/* The lock over what is being moved just now: every piece holds its range, exclusively, from before it reads until it
 * has written. Who moves something at the same place himself (a filter that copies before a write, or writes both
 * sides) takes it too, on whatever loop. */
struct range_lock *copy_busy(struct copy *copy);

/* Bytes copied or skipped since the start. Only grows. */
uint64_t copy_done(const struct copy *copy);
/* Bytes taken out of a dirty bitmap and not yet done. */
uint64_t copy_in_flight(const struct copy *copy);

#endif

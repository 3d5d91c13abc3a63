/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_COPY_BEFORE_H
#define INTERLOCK_COPY_BEFORE_H

#include "base/buffers.h"
#include "block/request.h"
#include "loop/coroutine.h"
#include <stdbool.h>
#include <stdint.h>

/*
 * A copy of a source as it was at one point in time, beside which the source goes on being written: the synchronous
 * half of the copy engine. Whoever writes to the source calls before_guard() first, on any loop; it copies what is
 * still to be kept to the target. A background copy (copy.h: busy, wanted, moved) and readers of the frozen view take
 * part by the same lock. Offsets and lengths in bytes; 0 or a negative errno.
 */
struct before;
struct dirty;
struct range_lock;

struct before_config {
    uint64_t size;        /* of the source, at that point in time */
    uint64_t unit;        /* what is copied at once at least: a power of two, at least 512 */
    bool break_snapshot;  /* what cannot be copied breaks the copy; else it fails the write */
    unsigned timeout_s;   /* a guard that takes longer has failed; 0: it waits */
    unsigned write_flags; /* enum request_flags of what is written to the target (REQUEST_COMPRESSED: not of zeroes) */
};
/* Nothing is to be kept yet. 0 or -ENOMEM. */
int before_create(const struct before_config *config, struct before **ret);
/* Nobody is inside any more. Accepts NULL. */
void before_destroy(struct before *before);

/* Before the first guard: [offset, offset + bytes), rounded outward, is to be kept, and can be read. */
void before_keep(struct before *before, uint64_t offset, uint64_t bytes);

/* Where a guard or a reader does its I/O, its caller being inside a request that may use both edges. */
struct before_edges {
    struct edge *source, *target;
};
/* Before [offset, offset + bytes) of the source changes: 0, and the change may be made; or an error that is to be the
 * change's. What lies behind the size needs no guard. */
int coroutine_fn before_guard(struct before *before, const struct before_edges *edges, uint64_t offset, uint64_t bytes);
/* Guards go on after their time-out, and outlive the request that called them: waits for those. The graph does not
 * change while one runs. */
void coroutine_fn before_settle(struct before *before);

/* The frozen view. -EACCES where nothing was to be kept or it was given up, -EIO once the copy is broken. */
int coroutine_fn before_read(struct before *before, const struct before_edges *edges, uint64_t offset, uint64_t bytes,
                             struct buffers to);
/* As driver->block_status of an image of its own. */
int coroutine_fn before_block_status(struct before *before, const struct before_edges *edges, uint64_t offset,
                                     uint64_t bytes, struct extent *ret);
/* Whole units in it are not needed any more: neither kept nor read. What was copied is discarded in the target. */
int coroutine_fn before_discard(struct before *before, const struct before_edges *edges, uint64_t offset,
                                uint64_t bytes);

/* For a background copy: copy_config's busy, wanted and moved (with the struct before in place of their argument). */
struct range_lock *before_lock(struct before *before);
bool before_wanted(const struct before *before, uint64_t *offset, uint64_t *bytes);
void before_moved(struct before *before, uint64_t offset, uint64_t bytes);

uint64_t before_size(const struct before *before);
uint64_t before_unit(const struct before *before);
/* Bytes still to be kept, each unit counted whole. */
uint64_t before_left(const struct before *before);
/* The bits themselves; a set one is a unit still to be kept. */
const struct dirty *before_bits(const struct before *before);
/* The next run of them at or after `from`; false: none. */
bool before_next(const struct before *before, uint64_t from, uint64_t *ret_offset, uint64_t *ret_bytes);
/* Why it is broken, a negative errno, or 0: what was read or copied until now is whole. */
int before_broken(const struct before *before);

#endif

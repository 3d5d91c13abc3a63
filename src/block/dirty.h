/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_DIRTY_H
#define INTERLOCK_BLOCK_DIRTY_H

#include <stdbool.h>
#include <stdint.h>

/* Which regions of a node have changed since somebody copied them. Offsets and lengths in bytes. */
struct dirty;

/* All clean. granularity: a power of two, at least 512. 0, or -ENOMEM (also for more than DIRTY_REGIONS_MAX). */
#define DIRTY_REGIONS_MAX ((uint64_t)1 << 33)
int dirty_create(uint64_t size, uint64_t granularity, struct dirty **ret);
void dirty_destroy(struct dirty *dirty); /* accepts NULL */
uint64_t dirty_granularity(const struct dirty *dirty);

/* Any thread, at the same time as everything else. Every region that [offset, offset + bytes) touches is dirty when
 * this returns; what lies behind the size is cut off. */
void dirty_mark(struct dirty *dirty, uint64_t offset, uint64_t bytes);
/*
 * Finds the next run of dirty regions at or after `from`, going round once, at most max_bytes long (at least one
 * region), and clears it. A mark that comes later than this call sets it again: so read the data after taking. One
 * thread at a time. False: none was found.
 */
bool dirty_take(struct dirty *dirty, uint64_t from, uint64_t max_bytes, uint64_t *ret_offset, uint64_t *ret_bytes);
/* Any thread: bytes in dirty regions (a whole region each). Exact when nobody marks. */
uint64_t dirty_bytes(const struct dirty *dirty);

#endif

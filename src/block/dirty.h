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
/* The next run of dirty regions at or after `from`, to the end of the last of them or of the bitmap. False: none. */
bool dirty_next(const struct dirty *dirty, uint64_t from, uint64_t *ret_offset, uint64_t *ret_bytes);
/* The same, of those regions that touch [from, to), cut off at `to`; it does not look further. */
bool dirty_next_within(const struct dirty *dirty, uint64_t from, uint64_t to, uint64_t *ret_offset,
                       uint64_t *ret_bytes);
/* Any thread, beside marks and unmarks of other regions: the regions that touch [offset, offset + bytes) are clean. */
void dirty_unmark(struct dirty *dirty, uint64_t offset, uint64_t bytes);
/* Any thread: bytes in dirty regions (a whole region each). Exact when nobody marks. */
uint64_t dirty_bytes(const struct dirty *dirty);
uint64_t dirty_size(const struct dirty *dirty);

/* While nobody else uses it. */
void dirty_clear(struct dirty *dirty);
/* A copy for a node of `size` bytes: what was dirty is, what is new is not. Errors as dirty_create(). */
int dirty_copy(const struct dirty *dirty, uint64_t size, struct dirty **ret);
/* Marks in `to` what is dirty in `from`. */
void dirty_merge(struct dirty *to, const struct dirty *from);

/* The bits as bytes: region n is bit n % 8 of byte n / 8. `first` (a multiple of 8) and `bytes` are of that form; what
 * lies behind the last region is 0 on saving and ignored on loading. */
uint64_t dirty_saved_bytes(const struct dirty *dirty);
/* Whether any bit of the part is set. */
bool dirty_save(const struct dirty *dirty, uint64_t first, uint64_t bytes, uint8_t *to);
/* Bits are added to those that are set. */
void dirty_load(struct dirty *dirty, uint64_t first, uint64_t bytes, const uint8_t *from);

#endif

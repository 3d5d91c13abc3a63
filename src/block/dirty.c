/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A dirty bitmap: one bit per region of `granularity` bytes, in 64-bit atomic words.
 *
 * 1. A bit is set after the change that it stands for has completed (by the tracking filter), and cleared before the
 *    data are read (by the copy). So whichever way the two interleave, a change that was not read leaves its bit set.
 * 2. `count` is the number of set bits: each operation that flips bits adds what it flipped, so it is exact whenever
 *    nobody is inside mark or take, and never below zero.
 * 3. Bits behind the last region are never set.
 *
 * Scanning goes by words; an empty bitmap is seen by `count` without a scan. 1 TiB at 64 KiB are 2 MiB of words.
 */
#include "block/dirty.h"
#include "base/size.h"
#include <endian.h>
#include <errno.h>
#include <glib.h>
#include <stdatomic.h>
#include <string.h>

struct dirty {
    uint64_t size;
    uint64_t regions;
    unsigned shift; /* granularity = 1 << shift */
    atomic_int_fast64_t count;
    atomic_uint_fast64_t *words;
    uint64_t word_count;
};

int dirty_create(uint64_t size, uint64_t granularity, struct dirty **ret)
{
    g_assert(is_power_of_two(granularity) && granularity >= 512);
    uint64_t regions = div_up(size, granularity);
    if (regions > DIRTY_REGIONS_MAX) {
        return -ENOMEM;
    }
    struct dirty *dirty = g_new0(struct dirty, 1);
    dirty->size = size;
    dirty->regions = regions;
    dirty->shift = (unsigned)__builtin_ctzll(granularity);
    dirty->word_count = div_up(regions, 64);
    dirty->words = g_try_malloc0_n(dirty->word_count ? dirty->word_count : 1, sizeof(*dirty->words));
    if (!dirty->words) {
        g_free(dirty);
        return -ENOMEM;
    }
    *ret = dirty;
    return 0;
}

void dirty_destroy(struct dirty *dirty)
{
    if (dirty) {
        g_free(dirty->words);
        g_free(dirty);
    }
}

uint64_t dirty_granularity(const struct dirty *dirty)
{
    return (uint64_t)1 << dirty->shift;
}

/* Bits [first, last] of one word. */
static uint64_t dirty_mask(unsigned first, unsigned last)
{
    return (UINT64_MAX >> (63 - last)) & (UINT64_MAX << first);
}

void dirty_mark(struct dirty *dirty, uint64_t offset, uint64_t bytes)
{
    if (bytes == 0 || offset >= dirty->size) {
        return;
    }
    uint64_t end = bytes > dirty->size - offset ? dirty->size : offset + bytes;
    uint64_t first = offset >> dirty->shift, last = (end - 1) >> dirty->shift;
    for (uint64_t word = first / 64; word <= last / 64; word++) {
        uint64_t mask = dirty_mask(word == first / 64 ? first % 64 : 0, word == last / 64 ? last % 64 : 63);
        uint64_t before = atomic_fetch_or_explicit(&dirty->words[word], mask, memory_order_acq_rel);
        int flipped = __builtin_popcountll(mask & ~before);
        if (flipped) {
            atomic_fetch_add_explicit(&dirty->count, flipped, memory_order_acq_rel);
        }
    }
}

/* The first set bit in [from, to), or `to`. */
static uint64_t dirty_find(const struct dirty *dirty, uint64_t from, uint64_t to)
{
    while (from < to) {
        uint64_t word = atomic_load_explicit(&dirty->words[from / 64], memory_order_acquire);
        word &= UINT64_MAX << (from % 64);
        if (word) {
            uint64_t found = align_down(from, 64) + (unsigned)__builtin_ctzll(word);
            return found < to ? found : to;
        }
        from = align_down(from, 64) + 64;
    }
    return to;
}

/* Clears set bits from `first` on, up to `most` of them, until the first clear one; returns how many. */
static uint64_t dirty_clear_run(struct dirty *dirty, uint64_t first, uint64_t most)
{
    uint64_t cleared = 0;
    while (cleared < most && first + cleared < dirty->regions) {
        uint64_t at = first + cleared;
        unsigned bit = at % 64;
        uint64_t word = atomic_load_explicit(&dirty->words[at / 64], memory_order_acquire);
        uint64_t rest = ~(word >> bit);
        unsigned run = rest ? (unsigned)__builtin_ctzll(rest) : 64;
        run = (unsigned)min_u64(min_u64(run, 64 - bit), most - cleared);
        if (run == 0) {
            break;
        }
        /* Only marks run beside this, so these bits are still set. */
        atomic_fetch_and_explicit(&dirty->words[at / 64], ~dirty_mask(bit, bit + run - 1), memory_order_acq_rel);
        atomic_fetch_sub_explicit(&dirty->count, run, memory_order_acq_rel);
        cleared += run;
        if (bit + run < 64) {
            break;
        }
    }
    return cleared;
}

bool dirty_take(struct dirty *dirty, uint64_t from, uint64_t max_bytes, uint64_t *ret_offset, uint64_t *ret_bytes)
{
    if (dirty->regions == 0 || dirty_bytes(dirty) == 0) {
        return false;
    }
    uint64_t start = from < dirty->size ? from >> dirty->shift : 0;
    uint64_t found = dirty_find(dirty, start, dirty->regions);
    if (found == dirty->regions) {
        found = dirty_find(dirty, 0, start);
        if (found == start) {
            return false;
        }
    }
    uint64_t most = max_u64(max_bytes >> dirty->shift, 1);
    uint64_t run = dirty_clear_run(dirty, found, most);
    *ret_offset = found << dirty->shift;
    *ret_bytes = min_u64(run << dirty->shift, dirty->size - *ret_offset);
    return true;
}

uint64_t dirty_bytes(const struct dirty *dirty)
{
    int64_t count = (int64_t)atomic_load_explicit(&dirty->count, memory_order_acquire);
    return count > 0 ? (uint64_t)count << dirty->shift : 0;
}

uint64_t dirty_size(const struct dirty *dirty)
{
    return dirty->size;
}

/* The first clear bit in [from, to), or `to`. */
static uint64_t dirty_find_clear(const struct dirty *dirty, uint64_t from, uint64_t to)
{
    while (from < to) {
        uint64_t word = ~atomic_load_explicit(&dirty->words[from / 64], memory_order_acquire);
        word &= UINT64_MAX << (from % 64);
        if (word) {
            return min_u64(align_down(from, 64) + (unsigned)__builtin_ctzll(word), to);
        }
        from = align_down(from, 64) + 64;
    }
    return to;
}

bool dirty_next_within(const struct dirty *dirty, uint64_t from, uint64_t to, uint64_t *ret_offset, uint64_t *ret_bytes)
{
    to = min_u64(to, dirty->size);
    if (from >= to || dirty_bytes(dirty) == 0) {
        return false;
    }
    uint64_t last = div_up(to, dirty_granularity(dirty));
    uint64_t first = dirty_find(dirty, from >> dirty->shift, last);
    if (first == last) {
        return false;
    }
    uint64_t end = dirty_find_clear(dirty, first, last);
    *ret_offset = max_u64(first << dirty->shift, from);
    *ret_bytes = min_u64(end << dirty->shift, to) - *ret_offset;
    return true;
}

bool dirty_next(const struct dirty *dirty, uint64_t from, uint64_t *ret_offset, uint64_t *ret_bytes)
{
    return dirty_next_within(dirty, from, dirty->size, ret_offset, ret_bytes);
}

void dirty_unmark(struct dirty *dirty, uint64_t offset, uint64_t bytes)
{
    if (bytes == 0 || offset >= dirty->size) {
        return;
    }
    uint64_t end = bytes > dirty->size - offset ? dirty->size : offset + bytes;
    uint64_t first = offset >> dirty->shift, last = (end - 1) >> dirty->shift;
    for (uint64_t word = first / 64; word <= last / 64; word++) {
        uint64_t mask = dirty_mask(word == first / 64 ? first % 64 : 0, word == last / 64 ? last % 64 : 63);
        uint64_t before = atomic_fetch_and_explicit(&dirty->words[word], ~mask, memory_order_acq_rel);
        int flipped = __builtin_popcountll(mask & before);
        if (flipped) {
            atomic_fetch_sub_explicit(&dirty->count, flipped, memory_order_acq_rel);
        }
    }
}

void dirty_clear(struct dirty *dirty)
{
    for (uint64_t i = 0; i < dirty->word_count; i++) {
        /* What was never written stays memory that was never touched. */
        if (atomic_load_explicit(&dirty->words[i], memory_order_relaxed)) {
            atomic_store_explicit(&dirty->words[i], 0, memory_order_relaxed);
        }
    }
    atomic_store_explicit(&dirty->count, 0, memory_order_release);
}

void dirty_merge(struct dirty *to, const struct dirty *from)
{
    uint64_t offset;
    uint64_t bytes;
    for (uint64_t at = 0; dirty_next(from, at, &offset, &bytes); at = offset + bytes) {
        dirty_mark(to, offset, bytes);
    }
}

int dirty_copy(const struct dirty *dirty, uint64_t size, struct dirty **ret)
{
    int code = dirty_create(size, dirty_granularity(dirty), ret);
    if (code == 0) {
        dirty_merge(*ret, dirty);
    }
    return code;
}

uint64_t dirty_saved_bytes(const struct dirty *dirty)
{
    return div_up(dirty->regions, 8);
}

bool dirty_save(const struct dirty *dirty, uint64_t first, uint64_t bytes, uint8_t *to)
{
    uint64_t any = 0;
    g_assert(is_aligned(first, 8));
    for (uint64_t done = 0; done < bytes; done += 8) {
        uint64_t index = (first + done) / 8;
        uint64_t word =
            index < dirty->word_count ? atomic_load_explicit(&dirty->words[index], memory_order_acquire) : 0;
        uint64_t disk = htole64(word);
        memcpy(to + done, &disk, min_u64(8, bytes - done));
        any |= word;
    }
    return any;
}

void dirty_load(struct dirty *dirty, uint64_t first, uint64_t bytes, const uint8_t *from)
{
    g_assert(is_aligned(first, 8));
    for (uint64_t done = 0; done < bytes; done += 8) {
        uint64_t index = (first + done) / 8;
        uint64_t disk = 0;
        memcpy(&disk, from + done, min_u64(8, bytes - done));
        if (disk == 0 || index >= dirty->word_count) {
            continue;
        }
        uint64_t last = min_u64(63, dirty->regions - 1 - index * 64);
        uint64_t word = le64toh(disk) & dirty_mask(0, (unsigned)last);
        uint64_t before = atomic_fetch_or_explicit(&dirty->words[index], word, memory_order_acq_rel);
        atomic_fetch_add_explicit(&dirty->count, __builtin_popcountll(word & ~before), memory_order_acq_rel);
    }
}

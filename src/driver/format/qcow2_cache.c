/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The table cache: a chained hash over an array of slices, a last-used shortcut, and a clock (second chance) that
 * evicts. A hit is one comparison, or one multiplication and a short chain.
 *
 * 1. An offset is in the hash at most once; a slice in use (`used`) is in the hash.
 * 2. A slice is in `dirty` exactly if its `dirty_at` is not 0 (it is its place there + 1).
 * 3. A slice is evicted only when clean: either written here (nobody cares for the order), or by make_clean.
 * 4. Who goes through an image once (a job, a backup program) does not fill memory: a slice that comes for the first
 *    time is `passing`, and passing slices take the place of each other once there are some. One that comes again after
 *    it has had to go (`ghosts` remember) is here to stay. Dirty slices may be more, for they cost to be written.
 * 5. The image's lock is held over every call, reads and writes of slices included, so nothing here has a lock.
 *
 * It does not know what the tables mean, and never writes by itself but for the sake of 3.
 */
#include "driver/format/qcow2_cache.h"
#include "block/driver.h"
#include "loop/file.h"
#include <errno.h>
#include <glib.h>
#include <stdlib.h>
#include <string.h>

struct qcow2_slice {
    uint64_t offset;
    uint32_t next;     /* in the chain: index + 1, or 0 */
    uint32_t dirty_at; /* place in cache->dirty + 1, or 0 */
    bool used;
    bool referenced; /* since the hand passed */
    bool touched;    /* since the last trim */
    bool passing;    /* used for the first time, as far as is known */
};

enum {
    SLAB_BYTES_BITS = 17,
    PASSING_MIN = 256,       /* slices; else */
    PASSING_SHARE = 16,      /* of all that there may be: the most that pass through */
    PASSING_DIRTY_SHARE = 8, /* and of those that are dirty */
};

static void *slice_data(const struct qcow2_cache *cache, const struct qcow2_slice *slice)
{
    unsigned index = slice - cache->slices;
    unsigned in_slab = index & ((1u << cache->slab_bits) - 1);
    return cache->slabs[index >> cache->slab_bits] + ((size_t)in_slab << cache->slice_bits);
}

void qcow2_cache_init(struct qcow2_cache *cache, struct edge *file, unsigned slice_bits, unsigned max_slices)
{
    memset(cache, 0, sizeof(*cache));
    cache->file = file;
    cache->slice_bits = slice_bits;
    cache->max_slices = max_slices;
    cache->slab_bits = slice_bits < SLAB_BYTES_BITS ? SLAB_BYTES_BITS - slice_bits : 0;
    cache->bucket_bits = 10;
    while (cache->bucket_bits < 16 && (1u << cache->bucket_bits) < max_slices) {
        cache->bucket_bits++;
    }
    cache->buckets = g_new0(uint32_t, 1u << cache->bucket_bits);
    cache->passing_max = MAX(PASSING_MIN, max_slices / PASSING_SHARE);
}

/* Frees the slabs from number `first` on. */
static void free_slabs(struct qcow2_cache *cache, unsigned first)
{
    while (cache->slab_count > first) {
        free(cache->slabs[--cache->slab_count]);
    }
}

void qcow2_cache_finish(struct qcow2_cache *cache)
{
    free_slabs(cache, 0);
    g_free(cache->slabs);
    g_free(cache->slices);
    g_free(cache->buckets);
    g_free(cache->dirty);
    g_free(cache->ghosts);
    memset(cache, 0, sizeof(*cache));
}

static uint64_t cache_hash(const struct qcow2_cache *cache, uint64_t offset)
{
    return (offset >> cache->slice_bits) * UINT64_C(0x9e3779b97f4a7c15) >> (64 - cache->bucket_bits);
}

static uint32_t *cache_bucket(struct qcow2_cache *cache, uint64_t offset)
{
    return &cache->buckets[cache_hash(cache, offset)];
}

/* Was it here, and had to go? A guess: of several with the same hash the last one is remembered. */
static bool cache_knows(const struct qcow2_cache *cache, uint64_t offset)
{
    return cache->ghosts && cache->ghosts[cache_hash(cache, offset)] == offset;
}

static void cache_remember(struct qcow2_cache *cache, uint64_t offset)
{
    if (!cache->ghosts) {
        cache->ghosts = g_try_new0(uint64_t, (size_t)1 << cache->bucket_bits);
    }
    if (cache->ghosts) {
        cache->ghosts[cache_hash(cache, offset)] = offset;
    }
}

static struct qcow2_slice *cache_find(struct qcow2_cache *cache, uint64_t offset)
{
    for (uint32_t i = *cache_bucket(cache, offset); i; i = cache->slices[i - 1].next) {
        if (cache->slices[i - 1].offset == offset) {
            return &cache->slices[i - 1];
        }
    }
    return NULL;
}

static void cache_clean_slice(struct qcow2_cache *cache, struct qcow2_slice *slice)
{
    uint32_t place = slice->dirty_at - 1;
    uint32_t moved = cache->dirty[--cache->dirty_count];
    cache->dirty[place] = moved;
    cache->slices[moved].dirty_at = place + 1;
    slice->dirty_at = 0;
}

static void cache_remove(struct qcow2_cache *cache, struct qcow2_slice *slice)
{
    uint32_t *link = cache_bucket(cache, slice->offset);
    while (&cache->slices[*link - 1] != slice) {
        link = &cache->slices[*link - 1].next;
    }
    *link = slice->next;
    if (slice->dirty_at) {
        cache_clean_slice(cache, slice);
    }
    cache->passing_count -= slice->passing;
    slice->used = false;
    slice->referenced = false;
    slice->passing = false;
}

static int coroutine_fn cache_write_slice(struct qcow2_cache *cache, struct qcow2_slice *slice)
{
    edge_event(cache->file, cache->on_write);
    return edge_write_memory(cache->file, slice->offset, slice_data(cache, slice), (uint64_t)1 << cache->slice_bits, 0);
}

/* Memory for one slice more; false: there is none. */
static bool cache_grow(struct qcow2_cache *cache)
{
    if (cache->slice_count == cache->room) {
        unsigned room = MIN(cache->max_slices, MAX(16, cache->room * 2));
        struct qcow2_slice *grown = g_try_renew(struct qcow2_slice, cache->slices, room);
        unsigned slabs = (room >> cache->slab_bits) + 1;
        uint8_t **grown_slabs = grown ? g_try_renew(uint8_t *, cache->slabs, slabs) : NULL;
        cache->slices = grown ? grown : cache->slices;
        cache->slabs = grown_slabs ? grown_slabs : cache->slabs;
        if (!grown_slabs) {
            return false;
        }
        cache->room = room;
    }
    if (cache->slice_count == cache->slab_count << cache->slab_bits) {
        void *slab = file_memory((size_t)1 << (cache->slab_bits + cache->slice_bits));
        if (!slab) {
            return false;
        }
        cache->slabs[cache->slab_count++] = slab;
    }
    cache->slices[cache->slice_count++] = (struct qcow2_slice){0};
    return true;
}

/* Whether a slice that is to pass through has to take the place of another such. */
static bool is_crowded(const struct qcow2_cache *cache, bool passing)
{
    return passing && cache->passing_count >= cache->passing_max;
}

/* Whether a dirty slice may stay, and a new one come, though the place is crowded. */
static bool may_spread(const struct qcow2_cache *cache)
{
    return cache->slice_count < cache->max_slices && cache->dirty_count < cache->max_slices / PASSING_DIRTY_SHARE;
}

/* A slice that nobody uses, for one that passes through or stays. */
static int coroutine_fn cache_take(struct qcow2_cache *cache, bool passing, struct qcow2_slice **ret)
{
    bool crowded = is_crowded(cache, passing);
    if (!crowded && cache->slice_count < cache->max_slices && cache_grow(cache)) {
        *ret = &cache->slices[cache->slice_count - 1];
        return 0;
    }
    if (cache->slice_count == 0) {
        return -ENOMEM;
    }
    int failed = 0;
    for (uint64_t looked_at = 0;; looked_at++) {
        struct qcow2_slice *slice = &cache->slices[cache->hand];
        cache->hand = (cache->hand + 1) % cache->slice_count;
        if (slice->used && !slice->passing && crowded && cache->passing_count) {
            continue;
        }
        if (slice->used && slice->referenced) {
            slice->referenced = false;
            continue;
        }
        if (slice->used && slice->dirty_at && crowded && may_spread(cache) && cache_grow(cache)) {
            *ret = &cache->slices[cache->slice_count - 1];
            return 0;
        }
        if (slice->used && slice->dirty_at && failed == 0) {
            failed = cache->make_clean ? cache->make_clean(cache->argument) : cache_write_slice(cache, slice);
            looked_at = 0;
        }
        if (slice->used && slice->dirty_at && failed < 0) {
            crowded = false; /* any clean one will do: reads go on where nothing can be written */
            if (looked_at > 2 * (uint64_t)cache->slice_count) {
                return failed;
            }
            continue;
        }
        if (slice->used) {
            cache_remember(cache, slice->offset);
            cache_remove(cache, slice);
        }
        *ret = slice;
        return 0;
    }
}

static void cache_insert(struct qcow2_cache *cache, struct qcow2_slice *slice, uint64_t offset, bool passing,
                         void **ret)
{
    uint32_t *bucket = cache_bucket(cache, offset);
    slice->passing = passing;
    cache->passing_count += passing;
    slice->offset = offset;
    slice->used = true;
    slice->referenced = slice->touched = true;
    slice->next = *bucket;
    cache->last = slice - cache->slices;
    *bucket = cache->last + 1;
    *ret = slice_data(cache, slice);
}

int coroutine_fn qcow2_cache_get(struct qcow2_cache *cache, uint64_t offset, void **ret)
{
    struct qcow2_slice *slice;
    if (cache->last < cache->slice_count) {
        slice = &cache->slices[cache->last];
        if (slice->offset == offset && slice->used) {
            slice->referenced = slice->touched = true;
            *ret = slice_data(cache, slice);
            return 0;
        }
    }
    slice = cache_find(cache, offset);
    if (slice) {
        slice->referenced = slice->touched = true;
        cache->last = slice - cache->slices;
        *ret = slice_data(cache, slice);
        return 0;
    }
    bool passing = !cache_knows(cache, offset);
    int code = cache_take(cache, passing, &slice);
    if (code < 0) {
        return code;
    }
    edge_event(cache->file, cache->on_load);
    code = edge_read_memory(cache->file, offset, slice_data(cache, slice), (uint64_t)1 << cache->slice_bits);
    if (code < 0) {
        return code;
    }
    cache_insert(cache, slice, offset, passing, ret);
    return 0;
}

int coroutine_fn qcow2_cache_get_zeroed(struct qcow2_cache *cache, uint64_t offset, void **ret)
{
    struct qcow2_slice *slice = cache_find(cache, offset);
    if (slice) {
        cache->last = slice - cache->slices;
        *ret = slice_data(cache, slice);
    } else {
        int code = cache_take(cache, true, &slice);
        if (code < 0) {
            return code;
        }
        cache_insert(cache, slice, offset, true, ret);
    }
    memset(*ret, 0, (size_t)1 << cache->slice_bits);
    qcow2_cache_mark_dirty(cache);
    return 0;
}

void qcow2_cache_mark_dirty(struct qcow2_cache *cache)
{
    struct qcow2_slice *slice = &cache->slices[cache->last];
    g_assert(slice->used);
    if (slice->dirty_at) {
        return;
    }
    if (cache->dirty_count == cache->dirty_room) {
        cache->dirty_room = MAX(16, cache->dirty_room * 2);
        cache->dirty = g_renew(uint32_t, cache->dirty, cache->dirty_room);
    }
    cache->dirty[cache->dirty_count++] = cache->last;
    slice->dirty_at = cache->dirty_count;
}

static int compare_offsets(const void *a, const void *b, void *argument)
{
    const struct qcow2_cache *cache = argument;
    uint64_t first = cache->slices[*(const uint32_t *)a].offset;
    uint64_t second = cache->slices[*(const uint32_t *)b].offset;
    return (first > second) - (first < second);
}

int coroutine_fn qcow2_cache_write(struct qcow2_cache *cache)
{
    int result = 0;
    if (cache->dirty_count > 1) {
        g_qsort_with_data(cache->dirty, cache->dirty_count, sizeof(*cache->dirty), compare_offsets, cache);
        for (unsigned i = 0; i < cache->dirty_count; i++) {
            cache->slices[cache->dirty[i]].dirty_at = i + 1;
        }
    }
    unsigned kept = 0;
    for (unsigned i = 0; i < cache->dirty_count; i++) {
        uint32_t index = cache->dirty[i];
        struct qcow2_slice *slice = &cache->slices[index];
        int code = result == 0 ? cache_write_slice(cache, slice) : result;
        if (code < 0) {
            result = code;
            cache->dirty[kept++] = index;
            slice->dirty_at = kept;
        } else {
            slice->dirty_at = 0;
        }
    }
    cache->dirty_count = kept;
    return result;
}

void qcow2_cache_forget(struct qcow2_cache *cache, uint64_t offset, uint64_t bytes)
{
    for (uint64_t at = offset; at < offset + bytes; at += (uint64_t)1 << cache->slice_bits) {
        struct qcow2_slice *slice = cache_find(cache, at);
        if (slice) {
            cache_remove(cache, slice);
        }
    }
}

/* The slices that are left after a trim move together; the hash and the list of dirty ones follow. */
static void cache_compact(struct qcow2_cache *cache)
{
    unsigned kept = 0;
    for (unsigned i = 0; i < cache->slice_count; i++) {
        struct qcow2_slice *from = &cache->slices[i];
        struct qcow2_slice *to = &cache->slices[kept];
        if (!from->used) {
            continue;
        }
        if (from != to) {
            memcpy(slice_data(cache, to), slice_data(cache, from), (size_t)1 << cache->slice_bits);
            *to = *from;
        }
        if (to->dirty_at) {
            cache->dirty[to->dirty_at - 1] = kept;
        }
        kept++;
    }
    cache->slice_count = kept;
    cache->hand = cache->last = 0;
    free_slabs(cache, (kept + (1u << cache->slab_bits) - 1) >> cache->slab_bits);
    memset(cache->buckets, 0, sizeof(*cache->buckets) << cache->bucket_bits);
    for (unsigned i = 0; i < kept; i++) {
        uint32_t *bucket = cache_bucket(cache, cache->slices[i].offset);
        cache->slices[i].next = *bucket;
        *bucket = i + 1;
    }
}

void qcow2_cache_trim(struct qcow2_cache *cache)
{
    bool any = false;
    for (unsigned i = 0; i < cache->slice_count; i++) {
        struct qcow2_slice *slice = &cache->slices[i];
        if (slice->used && !slice->touched && !slice->dirty_at) {
            cache->passing_count -= slice->passing;
            slice->used = slice->passing = false;
            any = true;
        }
        slice->touched = false;
    }
    if (any) {
        cache_compact(cache);
    }
}

void qcow2_cache_clear(struct qcow2_cache *cache)
{
    g_assert(cache->dirty_count == 0);
    free_slabs(cache, 0);
    cache->slice_count = cache->passing_count = 0;
    cache->hand = 0;
    memset(cache->buckets, 0, sizeof(*cache->buckets) << cache->bucket_bits);
}

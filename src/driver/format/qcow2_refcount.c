/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Refcounts: packed 2^order bits wide into blocks of one cluster, found through the refcount table, which is kept in
 * memory whole. Blocks go through the refcount cache.
 *
 * 1. A region of clusters without a block is free throughout; its block is made when the first of it is allocated,
 *    out of these clusters, so it counts itself.
 * 2. A new block is on disk (or in the cache, dirty) before its table entry is written, with a barrier between.
 * 3. The table grows by moving: blocks, new table, barrier, header, barrier; the old one is freed.
 * 4. free_hint: no cluster below it is free, but for those remembered in `known_free` (a stack, so that what a discard
 *    gave back is found again without a search). clean_from: no cluster from it on was ever written.
 * 5. Lowering a refcount goes through the list of freed clusters (qcow2.h, 2), except for what no table ever showed.
 *
 * When tables are written relative to each other is decided in qcow2_flush.c.
 */
#include "driver/format/qcow2_refcount.h"
#include "base/size.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_compressed.h"
#include "driver/format/qcow2_overlap.h"
#include <endian.h>
#include <errno.h>
#include <string.h>

enum { KNOWN_FREE_MAX = 16384 };

uint64_t qcow2_refcount_load(const void *block, unsigned order, uint64_t index)
{
    switch (order) {
    case 3:
        return ((const uint8_t *)block)[index];
    case 4:
        return be16toh(((const uint16_t *)block)[index]);
    case 5:
        return be32toh(((const uint32_t *)block)[index]);
    case 6:
        return be64toh(((const uint64_t *)block)[index]);
    default: {
        unsigned per_byte_bits = 3 - order;
        unsigned shift = (index & ((1u << per_byte_bits) - 1)) << order;
        return ((const uint8_t *)block)[index >> per_byte_bits] >> shift & ((1u << (1u << order)) - 1);
    }
    }
}

void qcow2_refcount_store(void *block, unsigned order, uint64_t index, uint64_t value)
{
    switch (order) {
    case 3:
        ((uint8_t *)block)[index] = value;
        break;
    case 4:
        ((uint16_t *)block)[index] = htobe16(value);
        break;
    case 5:
        ((uint32_t *)block)[index] = htobe32(value);
        break;
    case 6:
        ((uint64_t *)block)[index] = htobe64(value);
        break;
    default: {
        unsigned per_byte_bits = 3 - order;
        unsigned shift = (index & ((1u << per_byte_bits) - 1)) << order;
        uint8_t mask = ((1u << (1u << order)) - 1) << shift;
        uint8_t *byte = &((uint8_t *)block)[index >> per_byte_bits];
        *byte = (*byte & ~mask) | (value << shift & mask);
        break;
    }
    }
}

static unsigned slice_bits_of(const struct qcow2 *image)
{
    return image->refcount_cache.slice_bits + 3 - image->header.refcount_order;
}

static uint64_t width_max(const struct qcow2 *image)
{
    return image->header.refcount_order == 6 ? UINT64_MAX : (UINT64_C(1) << (1u << image->header.refcount_order)) - 1;
}

/* The slice with `cluster`'s refcount and the index in it; *ret NULL where there is no block. */
static int coroutine_fn load_slice(struct qcow2 *image, uint64_t cluster, void **ret, uint64_t *ret_index)
{
    uint64_t table_index = cluster >> image->refcount_block_bits;
    uint64_t block = table_index < image->refcount_table_entries ? image->refcount_table[table_index] : 0;
    *ret = NULL;
    if (block == 0) {
        return 0;
    }
    /* The reserved bits are below the least cluster size. */
    if (qcow2_in_cluster(image, block) || block > QCOW2_HOST_OFFSET_MAX ||
        qcow2_overlaps_metadata(image, block, image->cluster_size)) {
        return qcow2_mark_corrupt(image, "refcount table entry %" G_GUINT64_FORMAT " is 0x%" G_GINT64_MODIFIER "x",
                                  table_index, block);
    }
    unsigned bits = slice_bits_of(image);
    uint64_t in_block = cluster & ((UINT64_C(1) << image->refcount_block_bits) - 1);
    *ret_index = in_block & ((UINT64_C(1) << bits) - 1);
    return qcow2_cache_get(&image->refcount_cache, block + (in_block >> bits << image->refcount_cache.slice_bits), ret);
}

int coroutine_fn qcow2_refcount_get(struct qcow2 *image, uint64_t cluster, uint64_t *ret)
{
    void *slice = NULL;
    uint64_t index = 0;
    int code = load_slice(image, cluster, &slice, &index);
    if (code == 0) {
        *ret = slice ? qcow2_refcount_load(slice, image->header.refcount_order, index) : 0;
    }
    return code;
}

static void remember_free(struct qcow2 *image, uint64_t cluster)
{
    if (image->known_free->len) {
        struct qcow2_free_run *last =
            &g_array_index(image->known_free, struct qcow2_free_run, image->known_free->len - 1);
        if (last->first + last->count == cluster) {
            last->count++;
            return;
        }
    }
    if (image->known_free->len == KNOWN_FREE_MAX) {
        image->free_hint = cluster; /* from now on it is found by searching */
        return;
    }
    struct qcow2_free_run run = {cluster, 1};
    g_array_append_val(image->known_free, run);
}

static int coroutine_fn refcount_add_one(struct qcow2 *image, uint64_t cluster, int delta)
{
    void *slice = NULL;
    uint64_t index = 0;
    int code = load_slice(image, cluster, &slice, &index);
    if (code < 0) {
        return code;
    }
    uint64_t value = slice ? qcow2_refcount_load(slice, image->header.refcount_order, index) : 0;
    if (delta < 0 && value == 0) {
        return qcow2_mark_corrupt(image, "a cluster in use (0x%" G_GINT64_MODIFIER "x) has refcount 0",
                                  cluster << image->cluster_bits);
    }
    if (delta > 0 && value == width_max(image)) {
        return -ERANGE;
    }
    g_assert(slice);
    value += delta;
    qcow2_refcount_store(slice, image->header.refcount_order, index, value);
    qcow2_cache_mark_dirty(&image->refcount_cache);
    if (value == 0) {
        qcow2_compressed_leave(image, cluster);
        if (cluster < image->free_hint) {
            remember_free(image, cluster);
        }
    }
    return 0;
}

int coroutine_fn qcow2_refcount_add(struct qcow2 *image, uint64_t cluster, uint64_t count, int delta)
{
    for (uint64_t i = 0; i < count; i++) {
        int code = refcount_add_one(image, cluster + i, delta);
        if (code < 0) {
            while (i-- > 0) {
                if (refcount_add_one(image, cluster + i, -delta) < 0) {
                    break; /* leaks */
                }
            }
            return code;
        }
    }
    return 0;
}

static void table_entry_changed(struct qcow2 *image, uint32_t index)
{
    if (image->refcount_dirty_first == image->refcount_dirty_end) {
        image->refcount_dirty_first = index;
        image->refcount_dirty_end = index + 1;
    } else {
        image->refcount_dirty_first = MIN(image->refcount_dirty_first, index);
        image->refcount_dirty_end = MAX(image->refcount_dirty_end, index + 1);
    }
}

static void now_in_use(struct qcow2 *image, uint64_t cluster, uint64_t count)
{
    image->clean_from = max_u64(image->clean_from, (cluster + count) << image->cluster_bits);
}

/* An empty block at `cluster`, for the region of table entry `index`. Its own refcount is left to the caller. */
static int coroutine_fn create_block(struct qcow2 *image, uint32_t index, uint64_t cluster)
{
    uint64_t offset = cluster << image->cluster_bits;
    int code;
    edge_event(image->node->file, BLKDEBUG_EVENT_REFBLOCK_ALLOC);
    if (qcow2_overlaps_metadata(image, offset, image->cluster_size)) {
        return qcow2_mark_corrupt(image, "a new refcount block at 0x%" G_GINT64_MODIFIER "x would overwrite metadata",
                                  offset);
    }
    if (image->refcount_cache.slice_bits == image->cluster_bits) {
        void *slice;
        code = qcow2_cache_get_zeroed(&image->refcount_cache, offset, &slice);
    } else {
        qcow2_cache_forget(&image->refcount_cache, offset, image->cluster_size);
        edge_event(image->node->file, BLKDEBUG_EVENT_REFBLOCK_ALLOC_WRITE);
        code = edge_write_zeroes(image->node->file, offset, image->cluster_size, 0);
    }
    if (code == 0) {
        image->refcount_table[index] = offset;
        table_entry_changed(image, index);
        now_in_use(image, cluster, 1);
    }
    return code;
}

static void forget_block(struct qcow2 *image, uint32_t index)
{
    qcow2_cache_forget(&image->refcount_cache, image->refcount_table[index], image->cluster_size);
    image->refcount_table[index] = 0;
}

static bool has_block(const struct qcow2 *image, uint64_t index)
{
    return index < image->refcount_table_entries && image->refcount_table[index] != 0;
}

/* Whether [first, first + count) is free; else *ret_used is the last cluster of it that is not. */
static int coroutine_fn find_used(struct qcow2 *image, uint64_t first, uint64_t count, bool *ret, uint64_t *ret_used)
{
    *ret = false;
    for (uint64_t cluster = first + count; cluster-- > first;) {
        uint64_t value;
        int code = qcow2_refcount_get(image, cluster, &value);
        if (code < 0) {
            return code;
        }
        if (value) {
            *ret = true;
            *ret_used = cluster;
            return 0;
        }
    }
    return 0;
}

/* The clusters [*first, *first + blocks + clusters), free, of which the first `blocks` are to be the refcount blocks
 * that are missing to count them all; found at or behind *first. */
static int coroutine_fn find_room(struct qcow2 *image, uint64_t clusters, uint64_t *first, uint64_t *ret_blocks)
{
    for (;;) {
        uint64_t blocks = 0;
        uint64_t missing = 0;
        do {
            blocks = missing;
            missing = 0;
            uint64_t last = *first + blocks + clusters - 1;
            for (uint64_t i = *first >> image->refcount_block_bits; i <= last >> image->refcount_block_bits; i++) {
                missing += !has_block(image, i);
            }
        } while (missing > blocks);
        bool used;
        uint64_t used_at = 0;
        int code = find_used(image, *first, blocks + clusters, &used, &used_at);
        if (code < 0 || !used) {
            *ret_blocks = blocks;
            return code;
        }
        *first = used_at + 1;
    }
}

static int coroutine_fn grow_table(struct qcow2 *image, uint64_t wanted_entries);

/* growing: the table in memory is ahead of the one on disk, and is not to grow again. */
static int coroutine_fn allocate_exactly(struct qcow2 *image, uint64_t clusters, bool growing, uint64_t *ret_offset)
{
    uint64_t first = max_u64(image->clean_from >> image->cluster_bits, image->free_hint);
    uint64_t blocks;
    for (;;) {
        int code = find_room(image, clusters, &first, &blocks);
        if (code < 0) {
            return code;
        }
        uint64_t last_index = (first + blocks + clusters - 1) >> image->refcount_block_bits;
        if (last_index < image->refcount_table_entries) {
            break;
        }
        code = growing ? -EFBIG : grow_table(image, last_index + 1);
        if (code < 0) {
            return code;
        }
    }
    uint64_t offset = first << image->cluster_bits;
    uint64_t bytes = (blocks + clusters) << image->cluster_bits;
    if (offset + bytes > QCOW2_HOST_OFFSET_MAX) {
        return -EFBIG;
    }
    if (qcow2_overlaps_metadata(image, offset, bytes)) {
        return qcow2_mark_corrupt(image, "a new table at 0x%" G_GINT64_MODIFIER "x would overwrite metadata", offset);
    }
    uint64_t made = 0;
    int code = 0;
    uint64_t first_index = first >> image->refcount_block_bits;
    for (uint64_t index = first_index; made < blocks && code == 0; index++) {
        if (!has_block(image, index)) {
            code = create_block(image, index, first + made);
            made += code == 0;
        }
    }
    if (code == 0) {
        code = qcow2_refcount_add(image, first, blocks + clusters, 1);
    }
    if (code < 0) {
        for (uint64_t index = first_index; made > 0; index++) {
            uint64_t block = image->refcount_table[index];
            if (block >= offset && block < offset + (blocks << image->cluster_bits)) {
                forget_block(image, index);
                made--;
            }
        }
        return code;
    }
    now_in_use(image, first, blocks + clusters);
    *ret_offset = offset + (blocks << image->cluster_bits);
    return 0;
}

int coroutine_fn qcow2_allocate_exactly(struct qcow2 *image, uint64_t clusters, uint64_t *ret_offset)
{
    return allocate_exactly(image, clusters, false, ret_offset);
}

static int coroutine_fn write_table(struct qcow2 *image, uint64_t table_offset, uint32_t first, uint32_t end)
{
    g_autofree uint64_t *disk = g_try_new(uint64_t, end - first);
    if (!disk) {
        return -ENOMEM;
    }
    for (uint32_t i = first; i < end; i++) {
        disk[i - first] = htobe64(image->refcount_table[i]);
    }
    return edge_write_memory(image->node->file, table_offset + (uint64_t)first * 8, disk, (uint64_t)(end - first) * 8,
                             0);
}

/* The grown table is in memory: gives it a place, writes it, and makes the header point at it. */
static int coroutine_fn place_table(struct qcow2 *image, uint64_t clusters)
{
    struct edge *file = image->node->file;
    uint64_t offset;
    int code = allocate_exactly(image, clusters, true, &offset);
    if (code < 0) {
        return code;
    }
    edge_event(file, BLKDEBUG_EVENT_REFBLOCK_ALLOC_WRITE_BLOCKS);
    code = qcow2_cache_write(&image->refcount_cache);
    if (code == 0) {
        edge_event(file, BLKDEBUG_EVENT_REFBLOCK_ALLOC_WRITE_TABLE);
        code = write_table(image, offset, 0, image->refcount_table_entries);
    }
    if (code == 0) {
        code = edge_flush(file);
    }
    if (code < 0) {
        qcow2_release(image, offset, clusters);
        return code;
    }
    uint64_t old_offset = image->header.refcount_table_offset;
    uint32_t old_clusters = image->header.refcount_table_clusters;
    image->header.refcount_table_offset = offset;
    image->header.refcount_table_clusters = clusters;
    edge_event(file, BLKDEBUG_EVENT_REFBLOCK_ALLOC_SWITCH_TABLE);
    code = qcow2_header_write_refcount_table(file, &image->header);
    if (code == 0) {
        code = edge_flush(file);
    }
    if (code < 0) {
        /* Nobody knows which table the header shows now. Both are good, as long as neither changes. */
        image->frozen = true;
        atomic_store(&image->corrupt, true);
        return code;
    }
    image->refcount_dirty_first = image->refcount_dirty_end = 0;
    qcow2_free(image, old_offset, old_clusters, false);
    return 0;
}

static int coroutine_fn grow_table(struct qcow2 *image, uint64_t wanted_entries)
{
    uint32_t old_entries = image->refcount_table_entries;
    uint64_t entries = max_u64(wanted_entries + 1, (uint64_t)old_entries + old_entries / 2);
    uint64_t bytes = min_u64(align_up(entries * 8, image->cluster_size), QCOW2_REFCOUNT_TABLE_BYTES_MAX);
    if (wanted_entries >= QCOW2_REFCOUNT_TABLE_BYTES_MAX / 8 || bytes / 8 <= old_entries) {
        return -EFBIG;
    }
    uint64_t *grown = g_try_realloc(image->refcount_table, bytes);
    if (!grown) {
        return -ENOMEM;
    }
    memset(grown + old_entries, 0, bytes - (uint64_t)old_entries * 8);
    image->refcount_table = grown;
    edge_event(image->node->file, BLKDEBUG_EVENT_REFTABLE_GROW);
    image->refcount_table_entries = bytes / 8;
    int code = place_table(image, bytes >> image->cluster_bits);
    if (code < 0 && !image->frozen) {
        for (uint32_t i = old_entries; i < image->refcount_table_entries; i++) {
            if (image->refcount_table[i]) {
                qcow2_release(image, image->refcount_table[i], 1);
            }
        }
        for (uint32_t i = old_entries; i < image->refcount_table_entries; i++) {
            if (image->refcount_table[i]) {
                forget_block(image, i);
            }
        }
        image->refcount_table_entries = old_entries;
        image->refcount_dirty_end = MIN(image->refcount_dirty_end, old_entries);
        image->refcount_dirty_first = MIN(image->refcount_dirty_first, image->refcount_dirty_end);
    }
    return code;
}

/* In the slice from `index` on: the first free one and how many follow, at most `wanted`. */
static uint64_t find_free(const void *slice, unsigned order, uint64_t index, uint64_t end, uint64_t wanted,
                          uint64_t *ret_first)
{
    uint64_t found = 0;
    for (; index < end; index++) {
        if (qcow2_refcount_load(slice, order, index) == 0) {
            if (found++ == 0) {
                *ret_first = index;
            }
            if (found == wanted) {
                break;
            }
        } else if (found) {
            break;
        }
    }
    return found;
}

/* A region without a block: makes it, of the region's cluster `cluster`. */
static int coroutine_fn begin_region(struct qcow2 *image, uint64_t cluster)
{
    uint64_t index = cluster >> image->refcount_block_bits;
    if (index >= image->refcount_table_entries) {
        return grow_table(image, index + 1);
    }
    int code = create_block(image, index, cluster);
    if (code == 0) {
        code = qcow2_refcount_add(image, cluster, 1, 1);
        if (code < 0) {
            forget_block(image, index);
        }
    }
    return code;
}

/* From the top of `known_free`; 0 when there is nothing (any more). What is in use again was found by a search. */
static int coroutine_fn take_known(struct qcow2 *image, uint64_t wanted, uint64_t *ret_cluster, uint64_t *ret_count)
{
    unsigned order = image->header.refcount_order;
    *ret_count = 0;
    while (image->known_free->len && *ret_count == 0) {
        struct qcow2_free_run *run =
            &g_array_index(image->known_free, struct qcow2_free_run, image->known_free->len - 1);
        void *slice;
        uint64_t index = 0;
        uint64_t first = 0;
        int code = load_slice(image, run->first, &slice, &index);
        if (code < 0) {
            return code;
        }
        uint64_t end = min_u64(UINT64_C(1) << slice_bits_of(image), index + run->count);
        uint64_t found = slice ? find_free(slice, order, index, end, wanted, &first) : 0;
        uint64_t skipped = found ? first - index : end - index;
        *ret_cluster = run->first + skipped;
        *ret_count = found;
        for (uint64_t i = 0; i < found; i++) {
            qcow2_refcount_store(slice, order, first + i, 1);
        }
        if (found) {
            qcow2_cache_mark_dirty(&image->refcount_cache);
        }
        run->first += skipped + found;
        run->count -= skipped + found;
        if (run->count == 0) {
            g_array_set_size(image->known_free, image->known_free->len - 1);
        }
    }
    return 0;
}

/* Refcounts that are too low would have us overwrite a table in use. Looks once per slice, on the first cluster of it
 * that may be given out. */
static int coroutine_fn check_free(struct qcow2 *image, const void *slice, uint64_t cluster)
{
    unsigned bits = slice_bits_of(image);
    uint64_t number = (cluster >> bits) + 1;
    if (image->slice_checked == number) {
        return 0;
    }
    uint64_t tables = (uint64_t)image->header.l1_size + image->refcount_table_entries;
    for (uint64_t i = 0; i < tables; i++) {
        uint64_t offset = i < image->header.l1_size ? image->l1[i] & QCOW2_OFFSET_MASK
                                                    : image->refcount_table[i - image->header.l1_size];
        uint64_t at = offset >> image->cluster_bits;
        if (offset && (at >> bits) + 1 == number &&
            qcow2_refcount_load(slice, image->header.refcount_order, at & ((UINT64_C(1) << bits) - 1)) == 0) {
            return qcow2_mark_corrupt(image, "a table in use (0x%" G_GINT64_MODIFIER "x) has refcount 0", offset);
        }
    }
    image->slice_checked = number;
    return 0;
}

/* From free_hint on; makes blocks as it comes to regions without one. */
static int coroutine_fn take_next(struct qcow2 *image, uint64_t wanted, uint64_t *ret_cluster, uint64_t *ret_count)
{
    unsigned order = image->header.refcount_order;
    uint64_t end = UINT64_C(1) << slice_bits_of(image);
    for (;;) {
        uint64_t cluster = image->free_hint;
        void *slice = NULL;
        uint64_t index = 0;
        uint64_t first = 0;
        int code = cluster < QCOW2_HOST_OFFSET_MAX >> image->cluster_bits ? load_slice(image, cluster, &slice, &index)
                                                                          : -EFBIG;
        if (code == 0 && !slice) {
            code = begin_region(image, cluster);
            if (code == 0) {
                continue;
            }
        }
        if (code == 0) {
            code = check_free(image, slice, cluster);
        }
        if (code < 0) {
            return code;
        }
        uint64_t found = find_free(slice, order, index, end, wanted, &first);
        if (found == 0) {
            image->free_hint += end - index;
            continue;
        }
        for (uint64_t i = 0; i < found; i++) {
            qcow2_refcount_store(slice, order, first + i, 1);
        }
        qcow2_cache_mark_dirty(&image->refcount_cache);
        *ret_cluster = cluster + (first - index);
        *ret_count = found;
        image->free_hint = *ret_cluster + found;
        return 0;
    }
}

int coroutine_fn qcow2_allocate(struct qcow2 *image, uint64_t wanted, uint64_t *ret_offset, uint64_t *ret_clusters,
                                bool *ret_clean)
{
    uint64_t cluster = 0;
    uint64_t count = 0;
    edge_event(image->node->file, BLKDEBUG_EVENT_CLUSTER_ALLOC);
    int code = take_known(image, wanted, &cluster, &count);
    if (code == 0 && count == 0) {
        code = take_next(image, wanted, &cluster, &count);
    }
    if (code < 0) {
        return code;
    }
    uint64_t offset = cluster << image->cluster_bits;
    if (qcow2_overlaps_metadata(image, offset, count << image->cluster_bits) ||
        (image->overlap_places && qcow2_overlap_hits(image, offset, count << image->cluster_bits))) {
        return qcow2_mark_corrupt(image, "allocating 0x%" G_GINT64_MODIFIER "x would overwrite metadata", offset);
    }
    *ret_offset = offset;
    *ret_clusters = count;
    *ret_clean = offset >= image->clean_from;
    now_in_use(image, cluster, count);
    return 0;
}

void coroutine_fn qcow2_release(struct qcow2 *image, uint64_t offset, uint64_t clusters)
{
    (void)qcow2_refcount_add(image, offset >> image->cluster_bits, clusters, -1); /* else they leak */
}

void qcow2_free(struct qcow2 *image, uint64_t offset, uint64_t clusters, bool discard)
{
    image->freed_clusters += clusters;
    if (image->freed->len) {
        struct qcow2_freed *last = &g_array_index(image->freed, struct qcow2_freed, image->freed->len - 1);
        if (last->offset + (last->clusters << image->cluster_bits) == offset && last->epoch == image->epoch &&
            last->generation == image->generation && last->discard == discard) {
            last->clusters += clusters;
            return;
        }
    }
    struct qcow2_freed freed = {offset, clusters, image->epoch, image->generation, discard};
    g_array_append_val(image->freed, freed);
}

/* An epoch may begin when nobody is left in the one before the current: they share a counter. */
static void advance_epoch(struct qcow2 *image)
{
    for (unsigned i = 0; i < 2; i++) {
        if (atomic_load_explicit(&image->inflight[(image->epoch + 1) & 1], memory_order_acquire)) {
            return;
        }
        image->epoch++;
    }
}

/* Passes the discard of those of the clusters down that have no other use. They are not free yet. */
static void coroutine_fn discard_freed(struct qcow2 *image, const struct qcow2_freed *freed)
{
    uint64_t first = freed->offset >> image->cluster_bits;
    uint64_t run = 0;
    for (uint64_t i = 0; i <= freed->clusters; i++) {
        uint64_t value = 0;
        if (i < freed->clusters && qcow2_refcount_get(image, first + i, &value) == 0 && value == 1) {
            qcow2_compressed_leave(image, first + i);
            run++;
            continue;
        }
        if (run) {
            uint64_t offset = (first + i - run) << image->cluster_bits;
            co_mutex_unlock(&image->lock);
            (void)edge_discard(image->node->file, offset, run << image->cluster_bits); /* a hint */
            co_mutex_lock(&image->lock);
            run = 0;
        }
    }
}

void coroutine_fn qcow2_reclaim(struct qcow2 *image)
{
    if (image->freed->len == 0) {
        return;
    }
    advance_epoch(image);
    g_autoptr(GArray) ready = g_array_new(FALSE, FALSE, sizeof(struct qcow2_freed));
    unsigned kept = 0;
    for (unsigned i = 0; i < image->freed->len; i++) {
        struct qcow2_freed *freed = &g_array_index(image->freed, struct qcow2_freed, i);
        if (freed->generation <= image->stable_generation && freed->epoch + 2 <= image->epoch) {
            g_array_append_val(ready, *freed);
            image->freed_clusters -= freed->clusters;
        } else {
            g_array_index(image->freed, struct qcow2_freed, kept++) = *freed;
        }
    }
    g_array_set_size(image->freed, kept);
    for (unsigned i = 0; i < ready->len; i++) {
        const struct qcow2_freed *freed = &g_array_index(ready, struct qcow2_freed, i);
        edge_event(image->node->file, BLKDEBUG_EVENT_CLUSTER_FREE);
        if (freed->discard) {
            discard_freed(image, freed);
        }
        for (uint64_t n = 0; n < freed->clusters; n++) {
            (void)qcow2_refcount_add(image, (freed->offset >> image->cluster_bits) + n, 1, -1); /* else leaked */
        }
    }
}

int coroutine_fn qcow2_write_refcounts(struct qcow2 *image)
{
    int code = qcow2_cache_write(&image->refcount_cache);
    if (code < 0 || image->refcount_dirty_first == image->refcount_dirty_end) {
        return code;
    }
    code = edge_flush(image->node->file);
    if (code == 0) {
        edge_event(image->node->file, BLKDEBUG_EVENT_REFBLOCK_ALLOC_HOOKUP);
        code = write_table(image, image->header.refcount_table_offset, image->refcount_dirty_first,
                           image->refcount_dirty_end);
    }
    if (code == 0) {
        image->refcount_dirty_first = image->refcount_dirty_end = 0;
        image->barrier_wanted = true;
        image->change_count++;
    }
    return code;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Changing everything at once. A snapshot raises or lowers the refcounts of all clusters that an L1 table shows, and
 * with them change the COPIED flags in all its L2 tables, the L1 tables, and the snapshot table. No order of writing
 * these in place has every prefix consistent. So nothing that the header leads to is touched:
 *
 * 1. New tables are written to clusters whose refcount on disk is 0. That includes each refcount block that is to
 *    change (it moves: the new one is made in the cache, for a place of its own) and the refcount table.
 * 2. If power goes while they are written, the image is what it was, without so much as a leak: refcounts on disk know
 *    nothing of the new clusters.
 * 3. Then a flush, then one write of the header's bytes 24 to 71 (size, L1 table, refcount table, snapshot table, all
 *    in its first sector), and a flush. If power goes at this write the image is the old one or the new one, whole.
 * 4. The new refcounts know what is not used any more: old tables, moved blocks, what a deleted snapshot had. It is
 *    free from 3 on, and nothing was taken from it before. So nothing is left to do that a crash could prevent.
 * 5. Giving a refcount to a new cluster may move another block, which takes another cluster: they wait in `pending`
 *    until none is left.
 *
 * In memory image->refcount_table shows the new blocks from the first change on, and is put back by an abort.
 */
#include "driver/format/qcow2_switch.h"
#include "base/size.h"
#include "block/request.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_flush.h"
#include "driver/format/qcow2_overlap.h"
#include "driver/format/qcow2_refcount.h"
#include <endian.h>
#include <errno.h>
#include <string.h>

enum { FREED_RUNS_MAX = 1 << 18 };

struct qcow2_switch_change {
    uint64_t cluster, count;
    int delta;
};

static int compare_clusters(const void *a, const void *b)
{
    uint64_t first = *(const uint64_t *)a;
    uint64_t second = *(const uint64_t *)b;
    return (first > second) - (first < second);
}

static void note_tables(struct qcow2_switch *change)
{
    const struct qcow2 *image = change->image;
    for (uint32_t i = 0; i < image->header.l1_size; i++) {
        uint64_t cluster = (image->l1[i] & QCOW2_OFFSET_MASK) >> image->cluster_bits;
        if (cluster) {
            g_array_append_val(change->in_use, cluster);
        }
    }
    for (uint32_t i = 0; i < image->refcount_table_entries; i++) {
        uint64_t cluster = image->refcount_table[i] >> image->cluster_bits;
        if (cluster) {
            g_array_append_val(change->in_use, cluster);
        }
    }
    g_array_sort(change->in_use, compare_clusters);
}

static bool is_table(const struct qcow2_switch *change, uint64_t cluster)
{
    return change->in_use->len &&
           bsearch(&cluster, change->in_use->data, change->in_use->len, sizeof(uint64_t), compare_clusters);
}

int coroutine_fn qcow2_switch_begin(struct qcow2 *image, struct qcow2_switch *change)
{
    int code = qcow2_prepare_write(image);
    if (code == 0) {
        code = qcow2_flush_all(image);
    }
    if (code < 0) {
        return code;
    }
    uint64_t *old_table = g_try_new(uint64_t, MAX(image->refcount_table_entries, 1));
    if (!old_table) {
        return -ENOMEM;
    }
    co_mutex_lock(&image->lock);
    if (image->frozen || image->freed->len || image->refcount_cache.dirty_count || image->l2_cache.dirty_count ||
        image->l1_dirty_count || image->refcount_dirty_first != image->refcount_dirty_end) {
        co_mutex_unlock(&image->lock);
        g_free(old_table);
        return -EIO; /* something could not be written, or somebody is inside */
    }
    image->compressed_next = 0; /* its cluster may lose its uses */
    memcpy(old_table, image->refcount_table, (size_t)image->refcount_table_entries * 8);
    *change = (struct qcow2_switch){
        .image = image,
        .old_table = old_table,
        .old_entries = image->refcount_table_entries,
        .moved = g_byte_array_new(),
        .in_use = g_array_new(FALSE, FALSE, sizeof(uint64_t)),
        .taken = g_array_new(FALSE, FALSE, sizeof(struct qcow2_free_run)),
        .pending = g_array_new(FALSE, FALSE, sizeof(struct qcow2_switch_change)),
        .freed = g_array_new(FALSE, FALSE, sizeof(struct qcow2_free_run)),
    };
    g_byte_array_set_size(change->moved, image->refcount_table_entries);
    memset(change->moved->data, 0, image->refcount_table_entries);
    note_tables(change);
    return 0;
}

static void end(struct qcow2_switch *change)
{
    struct qcow2 *image = change->image;
    g_free(change->old_table);
    g_byte_array_unref(change->moved);
    g_array_unref(change->in_use);
    g_array_unref(change->taken);
    g_array_unref(change->pending);
    g_array_unref(change->freed);
    co_mutex_unlock(&image->lock);
}

/* --- taking clusters --- */

/* The slice with the refcount of `cluster` in a block at `block`. */
static int coroutine_fn load_slice(struct qcow2 *image, uint64_t block, uint64_t cluster, void **ret,
                                   uint64_t *ret_index)
{
    if (qcow2_in_cluster(image, block) || block > QCOW2_HOST_OFFSET_MAX ||
        qcow2_overlaps_metadata(image, block, image->cluster_size)) {
        return qcow2_mark_corrupt(image, "a refcount block is at 0x%" G_GINT64_MODIFIER "x", block);
    }
    unsigned slice_bits = image->refcount_cache.slice_bits;
    unsigned bits = slice_bits + 3 - image->header.refcount_order;
    uint64_t in_block = cluster & ((UINT64_C(1) << image->refcount_block_bits) - 1);
    *ret_index = in_block & ((UINT64_C(1) << bits) - 1);
    return qcow2_cache_get(&image->refcount_cache, block + (in_block >> bits << slice_bits), ret);
}

/* Whether a cluster is free on disk. */
static int coroutine_fn is_free(struct qcow2_switch *change, uint64_t cluster, bool *ret)
{
    struct qcow2 *image = change->image;
    uint64_t index = cluster >> image->refcount_block_bits;
    uint64_t block = index < change->old_entries ? change->old_table[index] : 0;
    void *slice = NULL;
    uint64_t at = 0;
    int code = block ? load_slice(image, block, cluster, &slice, &at) : 0;
    if (code == 0) {
        *ret = !slice || qcow2_refcount_load(slice, image->header.refcount_order, at) == 0;
    }
    if (code == 0 && *ret &&
        (is_table(change, cluster) ||
         qcow2_overlaps_metadata(image, cluster << image->cluster_bits, image->cluster_size))) {
        return qcow2_mark_corrupt(image, "a table in use (0x%" G_GINT64_MODIFIER "x) has refcount 0",
                                  cluster << image->cluster_bits);
    }
    return code;
}

static void add_pending(struct qcow2_switch *change, uint64_t offset, uint64_t clusters, int delta)
{
    struct qcow2_switch_change entry = {offset >> change->image->cluster_bits, clusters, delta};
    g_array_append_val(change->pending, entry);
}

int coroutine_fn qcow2_switch_take(struct qcow2_switch *change, uint64_t clusters, uint64_t *ret_offset)
{
    struct qcow2 *image = change->image;
    uint64_t first = change->cursor;
    uint64_t found = 0;
    while (found < clusters) {
        bool free = false;
        if (first + found >= QCOW2_HOST_OFFSET_MAX >> image->cluster_bits) {
            return -EFBIG;
        }
        int code = is_free(change, first + found, &free);
        if (code < 0) {
            return code;
        }
        if (free) {
            found++;
        } else {
            first += found + 1;
            found = 0;
        }
    }
    struct qcow2_free_run run = {first, clusters};
    g_array_append_val(change->taken, run);
    change->cursor = first + clusters;
    *ret_offset = first << image->cluster_bits;
    add_pending(change, *ret_offset, clusters, 1);
    image->clean_from = max_u64(image->clean_from, change->cursor << image->cluster_bits);
    qcow2_cache_forget(&image->refcount_cache, *ret_offset, clusters << image->cluster_bits);
    return 0;
}

void qcow2_switch_share(struct qcow2_switch *change, uint64_t offset)
{
    add_pending(change, offset, 1, 1);
}

/* --- refcounts --- */

/* Makes room in the table, in memory, for the entry `index`. */
static int grow_table(struct qcow2_switch *change, uint64_t index)
{
    struct qcow2 *image = change->image;
    uint64_t entries = align_up((index + 1) * 8, image->cluster_size) / 8;
    if (index >= QCOW2_REFCOUNT_TABLE_BYTES_MAX / 8 || entries > QCOW2_REFCOUNT_TABLE_BYTES_MAX / 8) {
        return -EFBIG;
    }
    uint64_t *grown = g_try_renew(uint64_t, image->refcount_table, entries);
    if (!grown) {
        return -ENOMEM;
    }
    uint32_t had = image->refcount_table_entries;
    memset(grown + had, 0, (entries - had) * 8);
    g_byte_array_set_size(change->moved, entries);
    memset(change->moved->data + had, 0, entries - had);
    image->refcount_table = grown;
    image->refcount_table_entries = entries;
    return 0;
}

/* Makes a block for the entry `index`, in a new place, with what the old one has, if there is one. */
static int coroutine_fn move_block(struct qcow2_switch *change, uint64_t index)
{
    struct qcow2 *image = change->image;
    struct qcow2_cache *cache = &image->refcount_cache;
    uint64_t old = image->refcount_table[index];
    uint64_t slice_size = UINT64_C(1) << cache->slice_bits;
    uint64_t place;
    g_autofree void *copy = g_malloc0(slice_size);
    int code = qcow2_switch_take(change, 1, &place);
    for (uint64_t at = 0; code == 0 && at < image->cluster_size; at += slice_size) {
        void *slice;
        uint64_t unused;
        uint64_t first = index << image->refcount_block_bits;
        if (old) {
            uint64_t cluster = first + (at * 8 >> image->header.refcount_order);
            code = load_slice(image, old, cluster, &slice, &unused);
            if (code == 0) {
                memcpy(copy, slice, slice_size);
            }
        }
        if (code == 0) {
            code = qcow2_cache_get_zeroed(cache, place + at, &slice);
        }
        if (code == 0) {
            memcpy(slice, copy, slice_size);
        }
    }
    if (code < 0) {
        return code;
    }
    image->refcount_table[index] = place;
    change->moved->data[index] = 1;
    if (old) {
        add_pending(change, old, 1, -1);
    }
    return 0;
}

static void note_freed(struct qcow2_switch *change, uint64_t cluster)
{
    if (change->freed->len) {
        struct qcow2_free_run *last = &g_array_index(change->freed, struct qcow2_free_run, change->freed->len - 1);
        if (last->first + last->count == cluster) {
            last->count++;
            return;
        }
    }
    if (change->freed->len < FREED_RUNS_MAX) {
        struct qcow2_free_run run = {cluster, 1};
        g_array_append_val(change->freed, run);
    }
}

static int coroutine_fn add_one(struct qcow2_switch *change, uint64_t cluster, int delta)
{
    struct qcow2 *image = change->image;
    uint64_t index = cluster >> image->refcount_block_bits;
    unsigned order = image->header.refcount_order;
    uint64_t most = order == 6 ? UINT64_MAX : (UINT64_C(1) << (1u << order)) - 1;
    int code = index < image->refcount_table_entries ? 0 : grow_table(change, index);
    if (code == 0 && !change->moved->data[index]) {
        code = move_block(change, index);
    }
    void *slice = NULL;
    uint64_t at = 0;
    if (code == 0) {
        code = load_slice(image, image->refcount_table[index], cluster, &slice, &at);
    }
    if (code < 0) {
        return code;
    }
    uint64_t value = qcow2_refcount_load(slice, order, at);
    if (delta < 0 && value == 0) {
        return qcow2_mark_corrupt(image, "a cluster in use (0x%" G_GINT64_MODIFIER "x) has refcount 0",
                                  cluster << image->cluster_bits);
    }
    if (delta > 0 && value == most) {
        return -ERANGE;
    }
    qcow2_refcount_store(slice, order, at, value + delta);
    qcow2_cache_mark_dirty(&image->refcount_cache);
    if (value + delta == 0) {
        note_freed(change, cluster);
    }
    return 0;
}

int coroutine_fn qcow2_switch_add(struct qcow2_switch *change, uint64_t offset, uint64_t bytes, int delta)
{
    unsigned bits = change->image->cluster_bits;
    if (bytes == 0) {
        return 0;
    }
    if (offset > QCOW2_HOST_OFFSET_MAX || bytes > QCOW2_HOST_OFFSET_MAX - offset) {
        return qcow2_mark_corrupt(change->image, "a cluster in use is at 0x%" G_GINT64_MODIFIER "x", offset);
    }
    for (uint64_t cluster = offset >> bits; cluster <= (offset + bytes - 1) >> bits; cluster++) {
        uint64_t value = 1;
        int code = delta > 0 ? qcow2_refcount_get(change->image, cluster, &value) : 0;
        if (code == 0 && value == 0) {
            code = qcow2_mark_corrupt(change->image, "a cluster in use (0x%" G_GINT64_MODIFIER "x) has refcount 0",
                                      cluster << bits);
        }
        if (code == 0) {
            code = add_one(change, cluster, delta);
        }
        if (code < 0) {
            return code;
        }
    }
    return 0;
}

int coroutine_fn qcow2_switch_get(struct qcow2_switch *change, uint64_t offset, uint64_t *ret)
{
    return qcow2_refcount_get(change->image, offset >> change->image->cluster_bits, ret);
}

static int coroutine_fn settle_pending(struct qcow2_switch *change)
{
    while (change->pending->len) {
        guint last = change->pending->len - 1;
        struct qcow2_switch_change next = g_array_index(change->pending, struct qcow2_switch_change, last);
        g_array_set_size(change->pending, last);
        for (uint64_t i = 0; i < next.count; i++) {
            int code = add_one(change, next.cluster + i, next.delta);
            if (code < 0) {
                return code;
            }
        }
    }
    return 0;
}

/* --- the end --- */

/* Finds a place for the new refcount table that is long enough for all blocks, its own included. */
static int coroutine_fn place_table(struct qcow2_switch *change, uint64_t *ret_offset, uint64_t *ret_clusters)
{
    struct qcow2 *image = change->image;
    const struct qcow2_header *header = &image->header;
    uint64_t offset = 0;
    uint64_t clusters = 0;
    add_pending(change, header->refcount_table_offset, header->refcount_table_clusters, -1);
    for (;;) {
        int code = settle_pending(change);
        uint64_t wanted = div_up((uint64_t)image->refcount_table_entries * 8, image->cluster_size);
        if (code == 0 && wanted <= clusters) {
            *ret_offset = offset;
            *ret_clusters = clusters;
            return 0;
        }
        if (code == 0) {
            add_pending(change, offset, clusters, -1);
            clusters = wanted;
            code = qcow2_switch_take(change, clusters, &offset);
        }
        if (code < 0) {
            return code;
        }
    }
}

static int coroutine_fn write_table(struct qcow2_switch *change, uint64_t offset, uint64_t clusters)
{
    struct qcow2 *image = change->image;
    uint64_t bytes = clusters << image->cluster_bits;
    g_autofree uint64_t *disk = g_try_malloc0(bytes);
    if (!disk) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < image->refcount_table_entries; i++) {
        disk[i] = htobe64(image->refcount_table[i]);
    }
    return edge_write_memory(image->node->file, offset, disk, bytes, 0);
}

/* The header's bytes 24 to 71. */
struct header_part {
    uint64_t size;
    uint32_t crypt_method, l1_size;
    uint64_t l1_offset, refcount_table_offset;
    uint32_t refcount_table_clusters, snapshot_count;
    uint64_t snapshots_offset;
};
static_assert(sizeof(struct header_part) == 48, "layout");

static int coroutine_fn write_header(struct qcow2_switch *change, const struct qcow2_switch_target *target,
                                     uint64_t table_offset, uint64_t table_clusters)
{
    struct edge *file = change->image->node->file;
    uint64_t at = offsetof(struct qcow2_disk_header, size);
    struct header_part part;
    int code = edge_read_memory(file, at, &part, sizeof(part));
    if (code < 0) {
        return code;
    }
    part = (struct header_part){
        .size = htobe64(target->size),
        .crypt_method = part.crypt_method,
        .l1_size = htobe32(target->l1_size),
        .l1_offset = htobe64(target->l1_offset),
        .refcount_table_offset = htobe64(table_offset),
        .refcount_table_clusters = htobe32(table_clusters),
        .snapshot_count = htobe32(target->snapshot_count),
        .snapshots_offset = htobe64(target->snapshots_offset),
    };
    code = edge_write_memory(file, at, &part, sizeof(part), 0);
    if (code == 0) {
        code = edge_flush(file);
    }
    if (code < 0) {
        /* Nobody knows which tables the header shows now. Both are good, as long as neither changes. */
        change->image->frozen = true;
        atomic_store(&change->image->corrupt, true);
    }
    return code;
}

/* On disk it is done: memory follows. */
static void coroutine_fn adopt(struct qcow2_switch *change, const struct qcow2_switch_target *target, uint64_t *l1,
                               uint8_t *l1_dirty)
{
    struct qcow2 *image = change->image;
    g_free(image->l1);
    g_free(image->l1_dirty);
    image->l1 = l1;
    image->l1_dirty = l1_dirty;
    image->header.size = target->size;
    image->header.l1_offset = target->l1_offset;
    image->header.l1_size = target->l1_size;
    image->header.snapshot_count = target->snapshot_count;
    image->header.snapshots_offset = target->snapshots_offset;
    qcow2_cache_clear(&image->l2_cache);
    for (uint32_t i = 0; i < change->old_entries; i++) {
        if (change->moved->data[i] && change->old_table[i]) {
            qcow2_cache_forget(&image->refcount_cache, change->old_table[i], image->cluster_size);
        }
    }
    for (unsigned i = 0; i < change->freed->len; i++) {
        uint64_t first = g_array_index(change->freed, struct qcow2_free_run, i).first;
        image->free_hint = min_u64(image->free_hint, first);
    }
    if (change->freed->len == FREED_RUNS_MAX) {
        image->free_hint = 0;
    }
    image->slice_checked = 0;
}

static void coroutine_fn discard_freed(struct qcow2_switch *change)
{
    struct qcow2 *image = change->image;
    for (unsigned i = 0; i < change->freed->len; i++) {
        const struct qcow2_free_run *run = &g_array_index(change->freed, struct qcow2_free_run, i);
        (void)edge_discard(image->node->file, run->first << image->cluster_bits,
                           run->count << image->cluster_bits); /* a hint */
    }
}

static void restore(struct qcow2_switch *change)
{
    struct qcow2 *image = change->image;
    for (unsigned i = 0; i < change->taken->len; i++) {
        const struct qcow2_free_run *run = &g_array_index(change->taken, struct qcow2_free_run, i);
        qcow2_cache_forget(&image->refcount_cache, run->first << image->cluster_bits,
                           run->count << image->cluster_bits);
    }
    g_free(image->refcount_table);
    image->refcount_table = g_steal_pointer(&change->old_table);
    image->refcount_table_entries = change->old_entries;
}

int coroutine_fn qcow2_switch_commit(struct qcow2_switch *change, const struct qcow2_switch_target *target,
                                     uint64_t *l1, bool discard)
{
    struct qcow2 *image = change->image;
    uint64_t offset = 0;
    uint64_t clusters = 0;
    uint8_t *l1_dirty = g_try_malloc0(target->l1_size / 64 + 1);
    int code = l1_dirty ? place_table(change, &offset, &clusters) : -ENOMEM;
    if (code == 0) {
        code = qcow2_cache_write(&image->refcount_cache);
    }
    if (code == 0) {
        code = write_table(change, offset, clusters);
    }
    if (code == 0) {
        code = edge_flush(image->node->file);
    }
    if (code == 0) {
        code = write_header(change, target, offset, clusters);
    }
    if (code < 0) {
        g_free(l1);
        g_free(l1_dirty);
        restore(change);
        end(change);
        return code;
    }
    image->header.refcount_table_offset = offset;
    image->header.refcount_table_clusters = clusters;
    adopt(change, target, l1, l1_dirty);
    qcow2_overlap_forget(image);
    if (discard) {
        discard_freed(change);
    }
    end(change);
    return 0;
}

void coroutine_fn qcow2_switch_abort(struct qcow2_switch *change)
{
    restore(change);
    end(change);
}

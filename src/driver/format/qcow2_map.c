/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * From guest offsets to clusters: the L1 table, in memory whole, and L2 tables through the L2 cache, slice by slice.
 *
 * 1. A table without the COPIED flag in its L1 entry may be shared with a snapshot: it is copied before it changes.
 * 2. A new table is complete on disk, or in the cache if it is a single slice, before its L1 entry is changed in
 *    memory; qcow2_flush.c keeps that order on disk.
 * 3. An entry is believed only if its reserved bits are 0 and its offset is that of a cluster (in a data file: its
 *    own); else the image is marked corrupt and the request fails.
 *
 * It changes entries of L1 only; what is put into L2 entries is decided by qcow2_write.c and qcow2_zero.c.
 */
#include "driver/format/qcow2_map.h"
#include "base/size.h"
#include "block/request.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_flush.h"
#include "driver/format/qcow2_refcount.h"
#include <endian.h>
#include <errno.h>

static uint64_t l1_index(const struct qcow2 *image, uint64_t offset)
{
    return offset >> (image->l2_bits + image->cluster_bits);
}

/* Guest bytes from offset to the end of what its L2 table covers. */
static uint64_t table_span(const struct qcow2 *image, uint64_t offset)
{
    uint64_t span = (uint64_t)1 << (image->l2_bits + image->cluster_bits);
    return span - (offset & (span - 1));
}

/* The table of an L1 entry; 0: none. */
static int coroutine_fn table_offset(struct qcow2 *image, uint64_t index, uint64_t *ret)
{
    uint64_t entry = image->l1[index];
    *ret = entry & QCOW2_OFFSET_MASK;
    if (entry & QCOW2_L1_RESERVED || qcow2_in_cluster(image, *ret) ||
        (*ret && qcow2_overlaps_metadata(image, *ret, image->cluster_size))) {
        return qcow2_mark_corrupt(image, "L1 entry %" G_GUINT64_FORMAT " is 0x%" G_GINT64_MODIFIER "x", index, entry);
    }
    return 0;
}

/* The slice of the table at `table`, from the entry of `offset` on. */
static int coroutine_fn load_entries(struct qcow2 *image, uint64_t table, uint64_t offset, void **ret,
                                     unsigned *ret_count)
{
    unsigned slice_entry_bits = image->l2_cache.slice_bits - image->entry_bits;
    uint64_t in_table = offset >> image->cluster_bits & (((uint64_t)1 << image->l2_bits) - 1);
    unsigned in_slice = in_table & ((1u << slice_entry_bits) - 1);
    void *slice;
    int code =
        qcow2_cache_get(&image->l2_cache, table + (in_table >> slice_entry_bits << image->l2_cache.slice_bits), &slice);
    if (code == 0) {
        *ret = (uint8_t *)slice + ((size_t)in_slice << image->entry_bits);
        *ret_count = (1u << slice_entry_bits) - in_slice;
    }
    return code;
}

uint64_t qcow2_unmapped_span(struct qcow2 *image, uint64_t offset, uint64_t bytes)
{
    uint64_t done = 0;
    while (done < bytes && (image->l1[l1_index(image, offset + done)] & QCOW2_OFFSET_MASK) == 0) {
        done += min_u64(bytes - done, table_span(image, offset + done));
    }
    return done;
}

bool qcow2_entry_is_possible(const struct qcow2 *image, struct qcow2_entry entry, enum qcow2_kind kind, uint64_t guest)
{
    bool placed = qcow2_entry_has_place(image, entry);
    uint64_t place = entry.descriptor & QCOW2_OFFSET_MASK;
    if (kind == QCOW2_INVALID) {
        return false;
    }
    if (image->external) {
        return kind != QCOW2_COMPRESSED_DATA && (!placed || place == guest);
    }
    return !placed || !qcow2_overlaps_metadata(image, place, image->cluster_size);
}

/* How many subclusters from `index` of the first of `limit` entries on are like it, and contiguous if they have a
 * place. */
static uint64_t subclusters_alike(const struct qcow2 *image, const void *entries, uint64_t limit, unsigned index,
                                  enum qcow2_kind kind)
{
    struct qcow2_entry first = qcow2_entry_load(image, entries, 0);
    uint64_t run = qcow2_subcluster_run(image, first, index);
    if (kind == QCOW2_COMPRESSED_DATA) {
        return run;
    }
    bool split = qcow2_has_subclusters(image);
    unsigned per_cluster_bits = image->cluster_bits - image->subcluster_bits;
    uint64_t step = qcow2_entry_has_place(image, first) ? image->cluster_size : 0;
    for (uint64_t i = 1; i < limit && index + run == i << per_cluster_bits; i++) {
        struct qcow2_entry next = qcow2_entry_load(image, entries, i);
        if (next.descriptor != first.descriptor + i * step ||
            (split && qcow2_subcluster_kind(image, next, 0) != kind)) {
            break;
        }
        run += qcow2_subcluster_run(image, next, 0);
    }
    return run;
}

int coroutine_fn qcow2_lookup(struct qcow2 *image, uint64_t offset, uint64_t bytes, struct qcow2_run *ret)
{
    uint64_t table;
    void *entries = NULL;
    unsigned count = 0;
    uint64_t index = l1_index(image, offset);
    g_assert(bytes && index < image->header.l1_size);
    int code = table_offset(image, index, &table);
    if (code < 0) {
        return code;
    }
    if (table == 0) {
        *ret = (struct qcow2_run){.kind = QCOW2_UNALLOCATED, .bytes = qcow2_unmapped_span(image, offset, bytes)};
        return 0;
    }
    code = load_entries(image, table, offset, &entries, &count);
    if (code < 0) {
        return code;
    }
    struct qcow2_entry entry = qcow2_entry_load(image, entries, 0);
    unsigned index_in_cluster = qcow2_subcluster_index(image, offset);
    enum qcow2_kind kind = qcow2_subcluster_kind(image, entry, index_in_cluster);
    uint64_t in_cluster = qcow2_in_cluster(image, offset);
    if (!qcow2_entry_is_possible(image, entry, kind, offset - in_cluster)) {
        return qcow2_mark_corrupt(image,
                                  "L2 entry of guest offset 0x%" G_GINT64_MODIFIER "x is 0x%" G_GINT64_MODIFIER
                                  "x (subclusters: 0x%" G_GINT64_MODIFIER "x)",
                                  offset - in_cluster, entry.descriptor, entry.subclusters);
    }
    bool placed = qcow2_entry_has_place(image, entry);
    uint64_t host = placed ? entry.descriptor & QCOW2_OFFSET_MASK : 0;
    uint64_t run_bytes = bytes;
    if (in_cluster + bytes > image->cluster_size || qcow2_has_subclusters(image)) {
        uint64_t limit = min_u64(count, (in_cluster + bytes + image->cluster_size - 1) >> image->cluster_bits);
        uint64_t run = subclusters_alike(image, entries, limit, index_in_cluster, kind);
        run_bytes = min_u64(bytes, (run << image->subcluster_bits) - (offset & (image->subcluster_size - 1)));
    }
    *ret = (struct qcow2_run){.kind = kind,
                              .copied = image->external || entry.descriptor & QCOW2_COPIED,
                              .bytes = run_bytes,
                              .placed = placed,
                              .host_offset = placed ? host + in_cluster : 0,
                              .entry = entry};
    if (placed && !image->external && ret->bytes > image->cluster_size - in_cluster &&
        qcow2_overlaps_metadata(image, host, in_cluster + ret->bytes)) {
        ret->bytes = image->cluster_size - in_cluster; /* which cluster it is, the next lookups find out */
    }
    return 0;
}

void qcow2_l1_changed(struct qcow2 *image, uint64_t index)
{
    if (!image->l1_dirty[index / 64]) {
        image->l1_dirty[index / 64] = 1;
        image->l1_dirty_count++;
    }
    image->barrier_wanted = true;
    image->change_count++;
}

/* Fills the new table: zeroes, or a copy of `old`. */
static int coroutine_fn fill_table(struct qcow2 *image, uint64_t table, uint64_t old)
{
    struct edge *file = image->node->file;
    qcow2_cache_forget(&image->l2_cache, table, image->cluster_size);
    if (old) {
        g_autofree void *copy = g_try_malloc(image->cluster_size);
        edge_event(file, BLKDEBUG_EVENT_L2_ALLOC_COW_READ);
        int code = copy ? edge_read_memory(file, old, copy, image->cluster_size) : -ENOMEM;
        return code == 0 ? edge_write_memory(file, table, copy, image->cluster_size, 0) : code;
    }
    edge_event(file, BLKDEBUG_EVENT_L2_ALLOC_WRITE);
    if (image->l2_cache.slice_bits == image->cluster_bits) {
        void *slice;
        return qcow2_cache_get_zeroed(&image->l2_cache, table, &slice);
    }
    return edge_write_zeroes(file, table, image->cluster_size, 0);
}

/* A table of our own for L1 entry `index`; `old` is the shared one, or 0. */
static int coroutine_fn make_table(struct qcow2 *image, uint64_t index, uint64_t old, uint64_t *ret)
{
    uint64_t table;
    uint64_t clusters;
    bool clean;
    int code = qcow2_allocate(image, 1, &table, &clusters, &clean);
    if (code < 0) {
        return code;
    }
    code = fill_table(image, table, old);
    if (code < 0) {
        qcow2_cache_forget(&image->l2_cache, table, image->cluster_size);
        qcow2_release(image, table, 1);
        return code;
    }
    image->l1[index] = table | QCOW2_COPIED;
    qcow2_l1_changed(image, index);
    if (old) {
        /* A shared table is never dirty, but it may be cached, and its cluster may be reused for something else. */
        qcow2_cache_forget(&image->l2_cache, old, image->cluster_size);
        qcow2_free(image, old, 1, false);
    }
    *ret = table;
    return 0;
}

int coroutine_fn qcow2_l2_for_write(struct qcow2 *image, uint64_t offset, void **ret, unsigned *ret_count)
{
    uint64_t index = l1_index(image, offset);
    uint64_t table;
    int code = table_offset(image, index, &table);
    if (code == 0 && !(image->l1[index] & QCOW2_COPIED)) {
        code = make_table(image, index, table, &table);
    } else if (code == 0 && table == 0) {
        code = make_table(image, index, 0, &table);
    }
    return code == 0 ? load_entries(image, table, offset, ret, ret_count) : code;
}

void qcow2_map_changed(struct qcow2 *image, bool leans_on_new)
{
    qcow2_cache_mark_dirty(&image->l2_cache);
    if (leans_on_new) {
        image->barrier_wanted = true;
        image->change_count++;
    }
    qcow2_consider_settling(image);
}

void qcow2_free_entry(struct qcow2 *image, struct qcow2_entry entry, bool discard)
{
    if (entry.descriptor & QCOW2_COMPRESSED) {
        uint64_t offset;
        uint64_t bytes;
        qcow2_compressed_place(image->cluster_bits, entry.descriptor, &offset, &bytes);
        uint64_t first = qcow2_cluster_floor(image, offset);
        uint64_t end = qcow2_cluster_ceiling(image, offset + bytes);
        qcow2_free(image, first, (end - first) >> image->cluster_bits, discard);
    } else if (qcow2_entry_has_place(image, entry) && !image->external &&
               qcow2_entry_kind(image, entry) != QCOW2_INVALID) {
        qcow2_free(image, entry.descriptor & QCOW2_OFFSET_MASK, 1, discard);
    }
}

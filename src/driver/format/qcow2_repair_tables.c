/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Repair of L2 tables, in use or of snapshots, and of the entries of L1 tables.
 *
 * 1. What an entry becomes is decided from the census alone: flags and reserved bits go; a place that is not at a
 *    cluster is taken down to the cluster, if that has a refcount and no other use; what then shows no place in the
 * file shows zeroes. An L1 entry that shows no table shows nothing.
 * 2. Data in a cluster of metadata are copied behind the end of the file before either of the two is changed, so that
 *    nothing that could be read is lost; so is an L2 table that shares its cluster with other metadata.
 * 3. A table is written where it is: every entry is right by itself, before and after, whichever a crash leaves.
 */
#include "base/size.h"
#include "block/request.h"
#include "driver/format/qcow2_crypto.h"
#include "driver/format/qcow2_repair.h"
#include <errno.h>
#include <string.h>

/* Keys of repair->copies: a cluster of data, the same as an L2 table, the clusters from there on that compressed data
 * may touch, and zeroes for version 2, which has no other way to hide what a backing file shows. */
enum copied { COPIED_DATA, COPIED_TABLE, COPIED_COMPRESSED, COPIED_KINDS };
#define COPIED_ZEROES UINT64_MAX
enum { COPIES_MAX = 1 << 16, COMPRESSED_CLUSTERS = 3 };

void qcow2_repair_init(struct qcow2_repair *repair, struct qcow2_census *census, struct error **err)
{
    *repair = (struct qcow2_repair){.image = census->image, .census = census, .end = census->clusters, .err = err};
    repair->copies = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free, g_free);
}

void qcow2_repair_finish(struct qcow2_repair *repair)
{
    g_hash_table_unref(repair->copies);
}

uint64_t qcow2_repair_take(struct qcow2_repair *repair, uint64_t clusters)
{
    uint64_t first = repair->end;
    for (uint64_t i = 0; i < clusters; i++) {
        qcow2_tally_add(&repair->census->uses, first + i, 1);
    }
    repair->end += clusters;
    return first;
}

static uint64_t copy_of(const struct qcow2_repair *repair, uint64_t key)
{
    const uint64_t *known = g_hash_table_lookup(repair->copies, &key);
    return known ? *known : 0;
}

static void set_copy(struct qcow2_repair *repair, uint64_t key, uint64_t offset)
{
    g_hash_table_insert(repair->copies, g_memdup2(&key, sizeof(key)), g_memdup2(&offset, sizeof(offset)));
}

static uint64_t key_of(uint64_t cluster, enum copied kind)
{
    return cluster * COPIED_KINDS + kind;
}

/* What a cluster at `to` has to hold, to be the copy `key`. `content` is zeroes. */
static int coroutine_fn copy_content(const struct qcow2 *image, uint64_t key, uint64_t to, uint8_t *content,
                                     uint64_t bytes)
{
    if (key == COPIED_ZEROES) {
        return 0;
    }
    uint64_t from = key / COPIED_KINDS << image->cluster_bits;
    int code = edge_read_memory(image->node->file, from, content, bytes);
    bool encrypted = image->crypto && key % COPIED_KINDS == COPIED_DATA;
    return code == 0 && encrypted ? qcow2_crypto_moved(image->crypto, from, to, content, bytes) : code;
}

/* Makes the copy, if it is not there yet. One too many stays as it is; the next round has it. */
static int coroutine_fn make_copy(struct qcow2_repair *repair, uint64_t key)
{
    struct qcow2 *image = repair->image;
    struct edge *file = image->node->file;
    if (copy_of(repair, key) || g_hash_table_size(repair->copies) >= COPIES_MAX) {
        return 0;
    }
    unsigned clusters = key != COPIED_ZEROES && key % COPIED_KINDS == COPIED_COMPRESSED ? COMPRESSED_CLUSTERS : 1;
    uint64_t bytes = clusters << image->cluster_bits;
    uint64_t to = qcow2_repair_take(repair, clusters) << image->cluster_bits;
    g_autofree uint8_t *content = g_try_malloc0(bytes);
    int code = content ? copy_content(image, key, to, content, bytes) : -ENOMEM;
    if (code == 0) {
        code = key == COPIED_ZEROES && image->crypto ? qcow2_crypto_write_zeroes(image->crypto, file, to, bytes)
                                                     : edge_write_memory(file, to, content, bytes, 0);
    }
    if (code < 0) {
        error_set_errno(repair->err, code, "Could not copy a cluster");
        if (code == -EACCES) {
            error_hint(repair->err, "Data of an encrypted image only move with its key: encrypt.key-secret");
        }
        return code;
    }
    set_copy(repair, key, to);
    return 0;
}

/* --- entries --- */

/* The cluster that a place which is not at one was meant to be, or 0. `uses`: how often the entry itself counts. */
static uint64_t salvage(const struct qcow2_repair *repair, uint64_t offset, uint32_t uses)
{
    const struct qcow2_census *census = repair->census;
    uint64_t place = qcow2_cluster_floor(repair->image, offset);
    uint64_t cluster = place >> repair->image->cluster_bits;
    bool good = place && qcow2_census_inside(census, place, repair->image->cluster_size) &&
                qcow2_tally_get(&census->refcounts, cluster) && qcow2_tally_get(&census->uses, cluster) <= uses &&
                !qcow2_census_is_metadata(census, cluster, false);
    return good ? place : 0;
}

/* What stands for a cluster that cannot be read. */
static struct qcow2_entry lost_entry(const struct qcow2_repair *repair)
{
    const struct qcow2 *image = repair->image;
    if (qcow2_has_subclusters(image)) {
        return (struct qcow2_entry){0, QCOW2_ALL_ZERO};
    }
    if (image->header.version >= 3) {
        return (struct qcow2_entry){QCOW2_ZERO, 0};
    }
    return (struct qcow2_entry){image->header.backing_file ? copy_of(repair, COPIED_ZEROES) : 0, 0};
}

/* Bits of both halves made one that can be; what was said to be data stays so, if there is a place. */
static uint64_t sane_subclusters(uint64_t subclusters, bool place)
{
    uint64_t allocated = subclusters & QCOW2_ALL_ALLOCATED;
    uint64_t zero = subclusters >> QCOW2_SUBCLUSTERS;
    if (!place) {
        return (zero | allocated) << QCOW2_SUBCLUSTERS;
    }
    return (zero & ~allocated) << QCOW2_SUBCLUSTERS | allocated;
}

static struct qcow2_entry sane_compressed(const struct qcow2_repair *repair, struct qcow2_entry entry)
{
    uint64_t offset;
    uint64_t bytes;
    qcow2_compressed_place(repair->image->cluster_bits, entry.descriptor, &offset, &bytes);
    if (!qcow2_census_inside(repair->census, offset, bytes)) {
        return lost_entry(repair);
    }
    return (struct qcow2_entry){entry.descriptor & ~QCOW2_COPIED, 0};
}

/* The entry as it can be, apart from where its data are. */
static struct qcow2_entry sane_entry(const struct qcow2_repair *repair, struct qcow2_entry entry, uint32_t uses)
{
    const struct qcow2 *image = repair->image;
    if (!qcow2_entry_is_wrong(repair->census, entry)) {
        return entry;
    }
    if (entry.descriptor & QCOW2_COMPRESSED) {
        return sane_compressed(repair, entry);
    }
    bool zero_flag = image->header.version >= 3 && !qcow2_has_subclusters(image);
    uint64_t offset = entry.descriptor & QCOW2_OFFSET_MASK;
    bool is_zero = entry.descriptor & QCOW2_ZERO;
    bool inside = repair->census->data_file || qcow2_census_inside(repair->census, offset, image->cluster_size);
    if (offset && !is_aligned(offset, image->cluster_size)) {
        offset = is_zero ? 0 : salvage(repair, offset, uses);
        inside = offset;
    }
    if (offset && !inside) {
        offset = 0;
    }
    if (qcow2_has_subclusters(image)) {
        return (struct qcow2_entry){offset, sane_subclusters(entry.subclusters, offset)};
    }
    if (is_zero && zero_flag) {
        return (struct qcow2_entry){offset | QCOW2_ZERO, 0};
    }
    return offset                                            ? (struct qcow2_entry){offset, 0}
           : entry.descriptor & QCOW2_OFFSET_MASK || is_zero ? lost_entry(repair)
                                                             : (struct qcow2_entry){0, 0};
}

static bool is_only_zero(struct qcow2_entry entry)
{
    return !(entry.descriptor & QCOW2_COMPRESSED) && entry.descriptor & QCOW2_ZERO;
}

/* The clusters that the data of a sane entry are in; *ret_count 0: it has none here. */
static void data_clusters(const struct qcow2_repair *repair, struct qcow2_entry entry, uint64_t *ret_first,
                          uint64_t *ret_count)
{
    unsigned bits = repair->image->cluster_bits;
    uint64_t offset = entry.descriptor & QCOW2_OFFSET_MASK;
    uint64_t bytes = offset && !repair->census->data_file ? repair->image->cluster_size : 0;
    if (entry.descriptor & QCOW2_COMPRESSED) {
        qcow2_compressed_place(bits, entry.descriptor, &offset, &bytes);
    }
    *ret_first = offset >> bits;
    *ret_count = bytes ? ((offset + bytes - 1) >> bits) - *ret_first + 1 : 0;
}

/* Whether the data of a sane entry share a cluster with metadata; *ret is the key of their copy. */
static bool is_misplaced(const struct qcow2_repair *repair, struct qcow2_entry entry, uint64_t *ret)
{
    const struct qcow2_census *census = repair->census;
    uint64_t first;
    uint64_t count;
    data_clusters(repair, entry, &first, &count);
    for (uint64_t i = first; i < first + count && i < census->clusters; i++) {
        if (qcow2_tally_get(&census->uses, i) > 1 && qcow2_census_is_metadata(census, i, false)) {
            *ret = key_of(first, entry.descriptor & QCOW2_COMPRESSED ? COPIED_COMPRESSED : COPIED_DATA);
            return true;
        }
    }
    return false;
}

/* A sane entry whose data are at `to` now, `first` being the cluster where they were. */
static struct qcow2_entry moved_entry(const struct qcow2_repair *repair, struct qcow2_entry entry, uint64_t to)
{
    unsigned bits = repair->image->cluster_bits;
    if (entry.descriptor & QCOW2_COMPRESSED) {
        uint64_t offset;
        uint64_t bytes;
        qcow2_compressed_place(bits, entry.descriptor, &offset, &bytes);
        uint64_t wanted = to + qcow2_in_cluster(repair->image, offset);
        entry.descriptor = (entry.descriptor & ~offset) | wanted;
        uint64_t got;
        qcow2_compressed_place(bits, entry.descriptor, &got, &bytes);
        return got == wanted ? entry : lost_entry(repair); /* too far behind for a compressed cluster */
    }
    entry.descriptor = to;
    return entry;
}

/* The entry as it is to be. Copies are made already. */
static struct qcow2_entry right_entry(const struct qcow2_repair *repair, struct qcow2_entry entry, uint32_t uses)
{
    uint64_t key;
    struct qcow2_entry sane = sane_entry(repair, entry, uses);
    if (!is_misplaced(repair, sane, &key)) {
        return sane;
    }
    if (is_only_zero(sane)) { /* a place that holds nothing */
        sane.descriptor = QCOW2_ZERO;
        return sane;
    }
    uint64_t copy = copy_of(repair, key);
    return copy ? moved_entry(repair, sane, copy) : sane;
}

/* --- tables --- */

static bool needs_look(const struct qcow2_census *census, const struct qcow2_census_table *table)
{
    return table->broken || census->overlaps;
}

/* Reads each table that may need it and calls `work`, which says whether it has changed the content. */
static int coroutine_fn for_each_table(struct qcow2_repair *repair, bool active_only,
                                       int coroutine_fn (*work)(struct qcow2_repair *repair,
                                                                const struct qcow2_census_table *table, void *entries,
                                                                bool *ret_changed))
{
    struct qcow2 *image = repair->image;
    struct edge *file = image->node->file;
    g_autofree void *entries = g_try_malloc(image->cluster_size);
    int code = entries ? 0 : error_set_errno(repair->err, -ENOMEM, "Could not repair the image");
    for (unsigned i = 0; code == 0 && i < repair->census->tables->len; i++) {
        const struct qcow2_census_table *table = &g_array_index(repair->census->tables, struct qcow2_census_table, i);
        bool changed = false;
        bool at_cluster = !qcow2_in_cluster(image, table->offset);
        if (!at_cluster || (active_only ? !table->active_uses : !needs_look(repair->census, table))) {
            continue;
        }
        uint64_t cluster = table->offset >> image->cluster_bits;
        uint64_t copy = copy_of(repair, key_of(cluster, COPIED_TABLE));
        uint64_t at = copy ? copy : table->offset;
        code = edge_read_memory(file, at, entries, image->cluster_size);
        if (code < 0) {
            return error_set_errno(repair->err, code, "Could not read an L2 table");
        }
        code = work(repair, table, entries, &changed);
        if (code == 0 && changed) {
            code = edge_write_memory(file, at, entries, image->cluster_size, 0);
            if (code < 0) {
                return error_set_errno(repair->err, code, "Could not write an L2 table");
            }
        }
    }
    return code;
}

static int coroutine_fn prepare_table(struct qcow2_repair *repair, const struct qcow2_census_table *table,
                                      void *entries, bool *ret_changed)
{
    struct qcow2 *image = repair->image;
    uint64_t key;
    for (uint64_t i = 0; i < (uint64_t)1 << image->l2_bits; i++) {
        struct qcow2_entry entry = sane_entry(repair, qcow2_entry_load(image, entries, i), table->uses);
        if (!is_misplaced(repair, entry, &key) || is_only_zero(entry)) {
            continue;
        }
        int code = make_copy(repair, key);
        if (code < 0) {
            return code;
        }
        uint64_t copy = copy_of(repair, key);
        unsigned clusters = copy ? (entry.descriptor & QCOW2_COMPRESSED ? COMPRESSED_CLUSTERS : 1) : 0;
        for (unsigned n = 0; n < clusters; n++) {
            qcow2_tally_add(&repair->census->uses, (copy >> image->cluster_bits) + n, table->uses);
        }
    }
    return 0;
}

/* L2 tables that share their cluster with other metadata. */
static int coroutine_fn move_tables(struct qcow2_repair *repair)
{
    const struct qcow2_census *census = repair->census;
    for (unsigned i = 0; census->overlaps && i < census->tables->len; i++) {
        const struct qcow2_census_table *table = &g_array_index(census->tables, struct qcow2_census_table, i);
        uint64_t cluster = table->offset >> repair->image->cluster_bits;
        if (!qcow2_in_cluster(repair->image, table->offset) && qcow2_census_is_metadata(census, cluster, true)) {
            int code = make_copy(repair, key_of(cluster, COPIED_TABLE));
            uint64_t copy = copy_of(repair, key_of(cluster, COPIED_TABLE));
            if (code < 0) {
                return code;
            }
            qcow2_tally_add(&repair->census->uses, copy >> repair->image->cluster_bits, table->uses - 1);
        }
    }
    return 0;
}

int coroutine_fn qcow2_repair_prepare(struct qcow2_repair *repair)
{
    const struct qcow2_header *header = &repair->image->header;
    int code = 0;
    if (header->version < 3 && header->backing_file) {
        code = make_copy(repair, COPIED_ZEROES);
        uint64_t cluster = copy_of(repair, COPIED_ZEROES) >> repair->image->cluster_bits;
        qcow2_tally_add(&repair->census->uses, cluster, 1); /* shared, until it is counted again */
    }
    if (code == 0 && repair->census->l1_misplaced) {
        uint64_t clusters = div_up((uint64_t)header->l1_size * 8, repair->image->cluster_size);
        repair->l1_moved_to = qcow2_repair_take(repair, clusters) << repair->image->cluster_bits;
    }
    if (code == 0) {
        qcow2_repair_prepare_snapshots(repair);
        code = move_tables(repair);
    }
    if (code == 0) {
        code = for_each_table(repair, false, prepare_table);
    }
    if (code == 0) {
        code = edge_flush(repair->image->node->file);
        if (code < 0) {
            return error_set_errno(repair->err, code, "Could not write copies of clusters");
        }
    }
    return code;
}

static int coroutine_fn correct_table(struct qcow2_repair *repair, const struct qcow2_census_table *table,
                                      void *entries, bool *ret_changed)
{
    struct qcow2 *image = repair->image;
    for (uint64_t i = 0; i < (uint64_t)1 << image->l2_bits; i++) {
        struct qcow2_entry entry = qcow2_entry_load(image, entries, i);
        struct qcow2_entry right = right_entry(repair, entry, table->uses);
        if (!qcow2_entry_same(entry, right)) {
            qcow2_entry_store(image, entries, i, right);
            *ret_changed = true;
        }
    }
    return 0;
}

bool qcow2_repair_l1_entries(struct qcow2_repair *repair, uint64_t *l1, uint64_t entries)
{
    const struct qcow2 *image = repair->image;
    bool changed = false;
    for (uint64_t i = 0; i < entries; i++) {
        uint64_t offset = l1[i] & QCOW2_OFFSET_MASK;
        uint64_t right = l1[i] & QCOW2_L1_RESERVED ? offset : l1[i];
        if (l1[i] == 0) {
            continue;
        }
        if (qcow2_in_cluster(image, offset)) {
            right = salvage(repair, offset, 1);
        } else if (offset == 0 || !qcow2_census_inside(repair->census, offset, image->cluster_size)) {
            right = 0;
        } else {
            uint64_t copy = copy_of(repair, key_of(offset >> image->cluster_bits, COPIED_TABLE));
            right = copy ? copy : right;
        }
        changed |= right != l1[i];
        l1[i] = right;
    }
    return changed;
}

/* The L1 table in use: written where it is, or, if it shares a cluster, to a place of its own. */
static int coroutine_fn correct_l1(struct qcow2_repair *repair)
{
    struct qcow2 *image = repair->image;
    const struct qcow2_census *census = repair->census;
    struct edge *file = image->node->file;
    uint64_t entries = image->header.l1_size;
    if (!census->l1 || !(census->l1_broken || census->overlaps)) {
        return 0;
    }
    bool changed = qcow2_repair_l1_entries(repair, census->l1, entries);
    if (!changed && !repair->l1_moved_to) {
        return 0;
    }
    g_autofree uint64_t *disk = g_try_new(uint64_t, entries);
    int code = disk ? 0 : -ENOMEM;
    for (uint64_t i = 0; code == 0 && i < entries; i++) {
        disk[i] = htobe64(census->l1[i]);
    }
    uint64_t at = repair->l1_moved_to ? repair->l1_moved_to : image->header.l1_offset;
    if (code == 0) {
        code = edge_write_memory(file, at, disk, entries * 8, 0);
    }
    if (code == 0 && repair->l1_moved_to) {
        code = edge_flush(file);
        if (code == 0) {
            image->header.l1_offset = at;
            code = qcow2_header_write_size(file, &image->header);
        }
    }
    return code < 0 ? error_set_errno(repair->err, code, "Could not write the L1 table") : 0;
}

int coroutine_fn qcow2_repair_tables(struct qcow2_repair *repair)
{
    int code = for_each_table(repair, false, correct_table);
    if (code == 0) {
        code = edge_flush(repair->image->node->file);
        if (code < 0) {
            return error_set_errno(repair->err, code, "Could not write the L2 tables");
        }
    }
    return code == 0 ? correct_l1(repair) : code;
}

/* --- flags --- */

static bool correct_flag(const struct qcow2_repair *repair, uint64_t *descriptor)
{
    uint64_t cluster = (*descriptor & QCOW2_OFFSET_MASK) >> repair->image->cluster_bits;
    if (qcow2_flag_is_right(*descriptor, qcow2_tally_get(&repair->census->uses, cluster))) {
        return false;
    }
    *descriptor ^= QCOW2_COPIED;
    return true;
}

static int coroutine_fn correct_flags(struct qcow2_repair *repair, const struct qcow2_census_table *table,
                                      void *entries, bool *ret_changed)
{
    struct qcow2 *image = repair->image;
    for (uint64_t i = 0; i < (uint64_t)1 << image->l2_bits; i++) {
        struct qcow2_entry entry = qcow2_entry_load(image, entries, i);
        bool place = !(entry.descriptor & QCOW2_COMPRESSED) && entry.descriptor & QCOW2_OFFSET_MASK;
        if (place && correct_flag(repair, &entry.descriptor)) {
            qcow2_entry_store(image, entries, i, entry);
            *ret_changed = true;
        }
    }
    return 0;
}

int coroutine_fn qcow2_repair_flags(struct qcow2_repair *repair)
{
    struct qcow2 *image = repair->image;
    struct edge *file = image->node->file;
    uint64_t *l1 = repair->census->l1;
    int code = repair->census->data_file ? 0 : for_each_table(repair, true, correct_flags);
    for (uint64_t i = 0; code == 0 && l1 && i < image->header.l1_size; i++) {
        if (l1[i] & QCOW2_OFFSET_MASK && correct_flag(repair, &l1[i])) {
            uint64_t disk = htobe64(l1[i]);
            code = edge_write_memory(file, image->header.l1_offset + i * 8, &disk, 8, 0);
            if (code < 0) {
                return error_set_errno(repair->err, code, "Could not write the L1 table");
            }
        }
    }
    if (code == 0) {
        code = edge_flush(file);
        if (code < 0) {
            return error_set_errno(repair->err, code, "Could not write the flags of the tables");
        }
    }
    return code;
}

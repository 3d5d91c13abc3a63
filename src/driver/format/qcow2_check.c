/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Repair of an image whose writer kept refcounts lazily and died: the refcounts on disk are too low (or too high) and
 * nothing else is wrong. The image's own tables tell what is used: header, L1 and L2 tables, data, the same of each
 * snapshot, the snapshot table, and persistent bitmaps.
 *
 * 1. The old refcount structures are not believed and not touched. New ones are laid out behind the end of the file
 *    and behind every cluster in use, written, flushed, and then made the image's by one write of the header.
 * 2. The counts are kept in memory, 4 bytes per cluster of the file; an image that refers far behind its file's end
 *    is refused rather than given that memory.
 * 3. COPIED flags are corrected after the refcounts, and the dirty bit is cleared last.
 */
#include "driver/format/qcow2_check.h"
#include "base/size.h"
#include "block/request.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_map.h"
#include "driver/format/qcow2_refcount.h"
#include <endian.h>
#include <errno.h>
#include <string.h>

enum { CLUSTERS_MAX = 1 << 29 }; /* 2 GiB of counts */

struct count {
    struct qcow2 *image;
    uint32_t *uses; /* per cluster */
    uint64_t clusters;
    struct error **err;
};

static int count_uses(struct count *count, uint64_t offset, uint64_t bytes, const char *what)
{
    struct qcow2 *image = count->image;
    if (bytes == 0) {
        return 0;
    }
    uint64_t end = count->clusters << image->cluster_bits;
    if (offset >= end || bytes > end - offset) {
        return error_set(count->err, -EIO, "%s at 0x%" G_GINT64_MODIFIER "x lies behind the end of the image file",
                         what, offset);
    }
    for (uint64_t i = offset >> image->cluster_bits; i <= (offset + bytes - 1) >> image->cluster_bits; i++) {
        if (count->uses[i] == UINT32_MAX) {
            return error_set(count->err, -EIO, "cluster 0x%" G_GINT64_MODIFIER "x is used too often",
                             i << image->cluster_bits);
        }
        count->uses[i]++;
    }
    return 0;
}

/* Reads a table whose length was checked against the file. */
static int coroutine_fn read_table(struct count *count, uint64_t offset, uint64_t bytes, const char *what, void **ret)
{
    uint64_t end = count->clusters << count->image->cluster_bits;
    if (offset >= end || bytes > end - offset) {
        return error_set(count->err, -EIO, "%s at 0x%" G_GINT64_MODIFIER "x lies behind the end of the image file",
                         what, offset);
    }
    void *table = g_try_malloc(bytes);
    int code = table ? edge_read_memory(count->image->node->file, offset, table, bytes) : -ENOMEM;
    if (code < 0) {
        g_free(table);
        return error_set_errno(count->err, code, "Could not read the %s", what);
    }
    *ret = table;
    return 0;
}

static int coroutine_fn count_l2(struct count *count, uint64_t table)
{
    struct qcow2 *image = count->image;
    g_autofree void *entries = NULL;
    int code = count_uses(count, table, image->cluster_size, "an L2 table");
    if (code == 0) {
        code = read_table(count, table, image->cluster_size, "L2 table", &entries);
    }
    for (uint64_t i = 0; code == 0 && i < (uint64_t)1 << image->l2_bits; i++) {
        struct qcow2_entry entry = qcow2_entry_load(image, entries, i);
        enum qcow2_kind kind = qcow2_entry_kind(image, entry);
        if (kind == QCOW2_INVALID) {
            return error_set(count->err, -EIO, "an L2 entry is invalid (0x%" G_GINT64_MODIFIER "x)", entry.descriptor);
        }
        if (kind == QCOW2_COMPRESSED_DATA) {
            uint64_t offset;
            uint64_t bytes;
            qcow2_compressed_place(image->cluster_bits, entry.descriptor, &offset, &bytes);
            code = count_uses(count, offset, bytes, "compressed data");
        } else if (qcow2_kind_has_place(kind)) {
            code = count_uses(count, entry.descriptor & QCOW2_OFFSET_MASK, image->cluster_size, "data");
        }
    }
    return code;
}

/* The table itself, and all that it shows. `l1` in disk order. */
static int coroutine_fn count_l1(struct count *count, const uint64_t *l1, uint64_t offset, uint64_t entries)
{
    int code = count_uses(count, offset, entries * 8, "an L1 table");
    for (uint64_t i = 0; code == 0 && i < entries; i++) {
        uint64_t entry = be64toh(l1[i]);
        uint64_t table = entry & QCOW2_OFFSET_MASK;
        if (entry & QCOW2_L1_RESERVED || qcow2_in_cluster(count->image, table)) {
            return error_set(count->err, -EIO, "an L1 entry is invalid (0x%" G_GINT64_MODIFIER "x)", entry);
        }
        if (table) {
            code = count_l2(count, table);
        }
    }
    return code;
}

static int coroutine_fn count_active(struct count *count)
{
    const struct qcow2_header *header = &count->image->header;
    g_autofree uint64_t *disk = NULL;
    if (header->l1_size == 0) {
        return 0;
    }
    int code = read_table(count, header->l1_offset, (uint64_t)header->l1_size * 8, "L1 table", (void **)&disk);
    return code == 0 ? count_l1(count, disk, header->l1_offset, header->l1_size) : code;
}

static int coroutine_fn count_snapshot(struct count *count, const struct qcow2_disk_snapshot *snapshot)
{
    uint64_t offset = be64toh(snapshot->l1_table_offset);
    uint64_t entries = be32toh(snapshot->l1_size);
    g_autofree uint64_t *l1 = NULL;
    if (qcow2_in_cluster(count->image, offset) || entries * 8 > QCOW2_L1_BYTES_MAX) {
        return error_set(count->err, -EIO, "a snapshot's L1 table is invalid");
    }
    if (entries == 0) {
        return 0;
    }
    int code = read_table(count, offset, entries * 8, "L1 table of a snapshot", (void **)&l1);
    return code == 0 ? count_l1(count, l1, offset, entries) : code;
}

static int coroutine_fn count_snapshots(struct count *count)
{
    struct qcow2 *image = count->image;
    uint64_t start = image->header.snapshots_offset;
    uint64_t at = start;
    for (uint32_t i = 0; i < image->header.snapshot_count; i++) {
        struct qcow2_disk_snapshot snapshot;
        int code = edge_read_memory(image->node->file, at, &snapshot, sizeof(snapshot));
        if (code < 0) {
            return error_set_errno(count->err, code, "Could not read the snapshot table");
        }
        uint32_t extra = be32toh(snapshot.extra_size);
        at = align_up(at + sizeof(snapshot) + extra + be16toh(snapshot.id_size) + be16toh(snapshot.name_size), 8);
        if (extra > QCOW2_SNAPSHOT_EXTRA_MAX || at - start > QCOW2_SNAPSHOT_TABLE_BYTES_MAX) {
            return error_set(count->err, -EIO, "the snapshot table is invalid");
        }
        code = count_snapshot(count, &snapshot);
        if (code < 0) {
            return code;
        }
    }
    return count_uses(count, start, at - start, "the snapshot table");
}

static int coroutine_fn count_bitmap(struct count *count, uint64_t offset, uint64_t entries)
{
    g_autofree uint64_t *table = NULL;
    if (qcow2_in_cluster(count->image, offset) || entries > QCOW2_BITMAP_TABLE_ENTRIES_MAX) {
        return error_set(count->err, -EIO, "a bitmap's table is invalid");
    }
    if (entries == 0) {
        return 0;
    }
    int code = read_table(count, offset, entries * 8, "bitmap table", (void **)&table);
    if (code == 0) {
        code = count_uses(count, offset, entries * 8, "a bitmap table");
    }
    for (uint64_t i = 0; code == 0 && i < entries; i++) {
        uint64_t data = be64toh(table[i]) & QCOW2_OFFSET_MASK;
        code = data ? count_uses(count, data, count->image->cluster_size, "a bitmap") : 0;
    }
    return code;
}

static int coroutine_fn count_bitmaps(struct count *count)
{
    const struct qcow2_disk_bitmaps *bitmaps = &count->image->header.bitmaps;
    g_autofree uint8_t *directory = NULL;
    bool consistent = count->image->header.autoclear & QCOW2_AUTOCLEAR_BITMAPS;
    if (!consistent || bitmaps->bitmap_count == 0) { /* else the extension says nothing that holds */
        return 0;
    }
    if (bitmaps->bitmap_count > QCOW2_BITMAPS_MAX || bitmaps->directory_size > QCOW2_BITMAP_DIRECTORY_BYTES_MAX) {
        return error_set(count->err, -EIO, "the bitmap directory is invalid");
    }
    uint64_t bytes = bitmaps->directory_size;
    int code = read_table(count, bitmaps->directory_offset, bytes, "bitmap directory", (void **)&directory);
    if (code == 0) {
        code = count_uses(count, bitmaps->directory_offset, bytes, "the bitmap directory");
    }
    uint64_t at = 0;
    for (uint32_t i = 0; code == 0 && i < bitmaps->bitmap_count; i++) {
        struct qcow2_disk_bitmap bitmap;
        if (bytes - at < sizeof(bitmap)) {
            return error_set(count->err, -EIO, "the bitmap directory is too short");
        }
        memcpy(&bitmap, directory + at, sizeof(bitmap));
        uint64_t length = align_up(sizeof(bitmap) + be32toh(bitmap.extra_size) + be16toh(bitmap.name_size), 8);
        if (length > bytes - at) {
            return error_set(count->err, -EIO, "the bitmap directory is too short");
        }
        at += length;
        code = count_bitmap(count, be64toh(bitmap.table_offset), be32toh(bitmap.table_size));
    }
    return code;
}

static int coroutine_fn count_everything(struct count *count)
{
    struct qcow2 *image = count->image;
    int code = count_uses(count, 0, image->cluster_size, "the header");
    if (code == 0) {
        code = count_active(count);
    }
    if (code == 0 && image->header.snapshot_count) {
        code = count_snapshots(count);
    }
    if (code == 0) {
        code = count_bitmaps(count);
    }
    return code;
}

/* The new structures: `blocks` blocks and then the table, from cluster `first` on. */
struct layout {
    uint64_t first, blocks, table_clusters, total;
    uint64_t entries; /* of the table */
};

static bool region_in_use(const struct count *count, uint64_t region, const struct layout *layout)
{
    uint64_t begin = region << count->image->refcount_block_bits;
    uint64_t end = (region + 1) << count->image->refcount_block_bits;
    if (begin < layout->first + layout->total && end > layout->first) {
        return true;
    }
    for (uint64_t i = begin; i < min_u64(end, count->clusters); i++) {
        if (count->uses[i]) {
            return true;
        }
    }
    return false;
}

static void plan(const struct count *count, struct layout *layout)
{
    unsigned block_bits = count->image->refcount_block_bits;
    unsigned cluster_bits = count->image->cluster_bits;
    *layout = (struct layout){.first = count->clusters};
    for (;;) {
        struct layout next = *layout;
        next.entries = ((layout->first + layout->total) >> block_bits) + 1;
        next.blocks = 0;
        for (uint64_t region = 0; region < next.entries; region++) {
            next.blocks += region_in_use(count, region, layout);
        }
        next.table_clusters = div_up(next.entries * 8, count->image->cluster_size);
        next.entries = next.table_clusters << (cluster_bits - 3);
        next.total = next.blocks + next.table_clusters;
        if (next.total == layout->total) {
            *layout = next;
            return;
        }
        layout->total = next.total;
    }
}

static uint64_t uses_of(const struct count *count, const struct layout *layout, uint64_t cluster)
{
    if (cluster >= layout->first && cluster < layout->first + layout->total) {
        return 1;
    }
    return cluster < count->clusters ? count->uses[cluster] : 0;
}

static int coroutine_fn write_blocks(struct count *count, const struct layout *layout, uint64_t *table)
{
    struct qcow2 *image = count->image;
    unsigned order = image->header.refcount_order;
    uint64_t per_block = (uint64_t)1 << image->refcount_block_bits;
    uint64_t written = 0;
    g_autofree void *block = g_try_malloc(image->cluster_size);
    if (!block) {
        return error_set_errno(count->err, -ENOMEM, "Could not rebuild the refcounts");
    }
    for (uint64_t region = 0; written < layout->blocks; region++) {
        if (!region_in_use(count, region, layout)) {
            continue;
        }
        memset(block, 0, image->cluster_size);
        for (uint64_t i = 0; i < per_block; i++) {
            uint64_t uses = uses_of(count, layout, (region << image->refcount_block_bits) + i);
            if (order < 6 && uses >> (1u << order)) {
                return error_set(count->err, -EIO,
                                 "a cluster is used %" G_GUINT64_FORMAT " times, more than its refcount can say", uses);
            }
            if (uses) {
                qcow2_refcount_store(block, order, i, uses);
            }
        }
        uint64_t offset = (layout->first + written) << image->cluster_bits;
        int code = edge_write_memory(image->node->file, offset, block, image->cluster_size, 0);
        if (code < 0) {
            return error_set_errno(count->err, code, "Could not write a refcount block");
        }
        table[region] = offset;
        written++;
    }
    return 0;
}

/* The new table is on disk at its place: makes it the image's. Takes `table` (host byte order). */
static int coroutine_fn switch_table(struct count *count, const struct layout *layout, uint64_t *table)
{
    struct qcow2 *image = count->image;
    uint64_t offset = (layout->first + layout->blocks) << image->cluster_bits;
    g_autofree uint64_t *disk = g_try_new(uint64_t, layout->entries);
    int code = disk ? 0 : -ENOMEM;
    for (uint64_t i = 0; code == 0 && i < layout->entries; i++) {
        disk[i] = htobe64(table[i]);
    }
    if (code == 0) {
        code = edge_write_memory(image->node->file, offset, disk, layout->entries * 8, 0);
    }
    if (code == 0) {
        code = edge_flush(image->node->file);
    }
    if (code == 0) {
        image->header.refcount_table_offset = offset;
        image->header.refcount_table_clusters = layout->table_clusters;
        code = qcow2_header_write_refcount_table(image->node->file, &image->header);
    }
    if (code == 0) {
        code = edge_flush(image->node->file);
    }
    if (code < 0) {
        g_free(table);
        return error_set_errno(count->err, code, "Could not write the refcount table");
    }
    g_free(image->refcount_table);
    image->refcount_table = table;
    image->refcount_table_entries = layout->entries;
    image->clean_from = max_u64(image->clean_from, (layout->first + layout->total) << image->cluster_bits);
    image->free_hint = 0;
    g_array_set_size(image->known_free, 0);
    return 0;
}

static int coroutine_fn rebuild(struct count *count)
{
    struct layout layout;
    plan(count, &layout);
    if (layout.table_clusters << count->image->cluster_bits > QCOW2_REFCOUNT_TABLE_BYTES_MAX) {
        return error_set(count->err, -EFBIG, "the image needs a refcount table of more than 8 MiB");
    }
    uint64_t *table = g_try_new0(uint64_t, layout.entries);
    if (!table) {
        return error_set_errno(count->err, -ENOMEM, "Could not rebuild the refcounts");
    }
    int code = write_blocks(count, &layout, table);
    if (code < 0) {
        g_free(table);
        return code;
    }
    return switch_table(count, &layout, table);
}

static bool correct_flag(const struct count *count, uint64_t *entry, uint64_t offset)
{
    uint64_t wanted = *entry & ~QCOW2_COPIED;
    if (count->uses[offset >> count->image->cluster_bits] == 1) {
        wanted |= QCOW2_COPIED;
    }
    bool changed = wanted != *entry;
    *entry = wanted;
    return changed;
}

static int coroutine_fn correct_table(struct count *count, uint64_t table)
{
    struct qcow2 *image = count->image;
    g_autofree void *entries = NULL;
    int code = read_table(count, table, image->cluster_size, "L2 table", &entries);
    bool changed = false;
    for (uint64_t i = 0; code == 0 && i < (uint64_t)1 << image->l2_bits; i++) {
        struct qcow2_entry entry = qcow2_entry_load(image, entries, i);
        if (qcow2_kind_has_place(qcow2_entry_kind(image, entry)) &&
            correct_flag(count, &entry.descriptor, entry.descriptor & QCOW2_OFFSET_MASK)) {
            qcow2_entry_store(image, entries, i, entry);
            changed = true;
        }
    }
    if (code == 0 && changed) {
        code = edge_write_memory(image->node->file, table, entries, image->cluster_size, 0);
        if (code < 0) {
            error_set_errno(count->err, code, "Could not write an L2 table");
        }
    }
    return code;
}

static int coroutine_fn correct_flags(struct count *count)
{
    struct qcow2 *image = count->image;
    for (uint64_t i = 0; i < image->header.l1_size; i++) {
        uint64_t table = image->l1[i] & QCOW2_OFFSET_MASK;
        if (table == 0) {
            continue;
        }
        int code = correct_table(count, table);
        if (code < 0) {
            return code;
        }
        if (correct_flag(count, &image->l1[i], table)) {
            uint64_t disk = htobe64(image->l1[i]);
            code = edge_write_memory(image->node->file, image->header.l1_offset + i * 8, &disk, 8, 0);
            if (code < 0) {
                return error_set_errno(count->err, code, "Could not write the L1 table");
            }
        }
    }
    return 0;
}

int coroutine_fn qcow2_repair_dirty(struct qcow2 *image, struct error **err)
{
    struct edge *file = image->node->file;
    /* A file may end inside its last cluster. */
    uint64_t clusters = div_up(edge_size(file), image->cluster_size);
    g_autofree uint32_t *uses = clusters <= CLUSTERS_MAX ? g_try_new0(uint32_t, clusters) : NULL;
    if (!uses) {
        return error_set_errno(err, -ENOMEM, "Could not count the clusters of a dirty qcow2 image");
    }
    struct count count = {image, uses, clusters, err};
    int code = count_everything(&count);
    if (code == 0) {
        code = rebuild(&count);
    }
    if (code == 0) {
        code = correct_flags(&count);
    }
    if (code < 0) {
        error_prepend(err, "Could not repair the refcounts of a qcow2 image that was not closed properly");
        return code;
    }
    image->header.incompatible &= ~(uint64_t)QCOW2_INCOMPATIBLE_DIRTY;
    code = edge_flush(file);
    if (code == 0) {
        code = qcow2_header_write_incompatible(file, &image->header);
    }
    if (code == 0) {
        code = edge_flush(file);
    }
    return code < 0 ? error_set_errno(err, code, "Could not clear the dirty bit") : 0;
}

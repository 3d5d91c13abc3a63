/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The census of what is not the mapping in use: refcounts, snapshots, persistent bitmaps.
 *
 * 1. Refcount structures that are wrong are not believed: what an entry of the table that leads nowhere would say is 0.
 * 2. A refcount block has one use. One with more is about to be overwritten, so the structures are rebuilt.
 * 3. Snapshots come one after the other in their table; the table ends for us where an entry makes no sense.
 * 4. Bitmaps count while their autoclear bit says that they are true; without it their clusters are leaked, and free.
 */
#include "base/size.h"
#include "driver/format/qcow2_census_private.h"
#include "driver/format/qcow2_refcount.h"
#include <string.h>

/* --- refcounts --- */

/* Where entry `index` of the refcount table leads, or CENSUS_NOWHERE; what is wrong with it is found later. */
static uint64_t block_offset(const struct qcow2_census *census, uint64_t index)
{
    uint64_t offset = census->refcount_table[index] & QCOW2_REFCOUNT_TABLE_MASK;
    bool sane = offset && is_aligned(offset, census->image->cluster_size) &&
                qcow2_census_inside(census, offset, census->image->cluster_size);
    return sane ? offset : CENSUS_NOWHERE;
}

static void take_block(struct qcow2_census *census, uint64_t index, const uint8_t *content)
{
    const struct qcow2 *image = census->image;
    unsigned order = image->header.refcount_order;
    uint64_t first = index << image->refcount_block_bits;
    uint64_t count = min_u64(UINT64_C(1) << image->refcount_block_bits, census->clusters - first);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t value =
            order == 4 ? be16toh(((const uint16_t *)(const void *)content)[i]) : qcow2_refcount_load(content, order, i);
        if (value) {
            qcow2_tally_set(&census->refcounts, first + i, value);
        }
    }
}

int coroutine_fn census_load_refcounts(struct qcow2_census *census, struct error **err)
{
    const struct qcow2_header *header = &census->image->header;
    uint64_t bytes = (uint64_t)header->refcount_table_clusters << header->cluster_bits;
    uint64_t offset = header->refcount_table_offset;
    if (bytes == 0 || bytes > QCOW2_REFCOUNT_TABLE_BYTES_MAX || offset == 0 ||
        !is_aligned(offset, census->image->cluster_size)) {
        if (bytes) { /* else every cluster in use tells */
            census_corruption(census, "The header shows no refcount table that can be");
        }
        census->refcounts_broken = true;
        return 0;
    }
    if (!census_use_metadata(census, offset, bytes, QCOW2_PLACE_REFCOUNT_TABLE, "the refcount table")) {
        census->refcounts_broken = true;
        return 0;
    }
    census->refcount_table = census_read_table(census, offset, bytes / 8, "The refcount table");
    if (!census->refcount_table) {
        return error_set(err, -EIO, "Could not read the refcount table");
    }
    census->refcount_entries = bytes / 8;
    uint64_t regions = div_up(census->clusters, UINT64_C(1) << census->image->refcount_block_bits);
    struct census_clusters blocks = {"a refcount block", min_u64(regions, census->refcount_entries), block_offset,
                                     take_block};
    census_read_clusters(census, &blocks);
    return 0;
}

static void count_block(struct qcow2_census *census, uint64_t index)
{
    uint64_t offset = census->refcount_table[index];
    const char *wrong = NULL;
    if (offset & ~QCOW2_REFCOUNT_TABLE_MASK) {
        wrong = "has reserved bits set";
    } else if (qcow2_in_cluster(census->image, offset)) {
        wrong = "is not at a cluster";
    } else if (!qcow2_census_inside(census, offset, census->image->cluster_size)) {
        wrong = "lies behind the end of the image file";
    } else {
        census_use_metadata(census, offset, census->image->cluster_size, QCOW2_PLACE_REFCOUNT_BLOCK,
                            "a refcount block");
        if (qcow2_tally_get(&census->uses, offset >> census->image->cluster_bits) != 1) {
            wrong = "is used for something else too";
        }
    }
    if (wrong) {
        census_corruption(census, "Refcount block %" G_GUINT64_FORMAT " (0x%" G_GINT64_MODIFIER "x) %s", index, offset,
                          wrong);
        census->refcounts_broken = true;
    }
}

void census_count_blocks(struct qcow2_census *census)
{
    for (uint64_t i = 0; i < census->refcount_entries; i++) {
        if (census->refcount_table[i]) {
            count_block(census, i);
        }
    }
    uint64_t table = census->image->header.refcount_table_offset >> census->image->cluster_bits;
    for (uint64_t i = 0; i < census->image->header.refcount_table_clusters && census->refcount_table; i++) {
        census->refcounts_broken |= qcow2_tally_get(&census->uses, table + i) > 1;
    }
}

/* --- snapshots --- */

static void coroutine_fn count_snapshot(struct qcow2_census *census, uint32_t index,
                                        struct qcow2_census_snapshot *snapshot)
{
    uint64_t bytes = (uint64_t)snapshot->l1_size * 8;
    const char *wrong = qcow2_in_cluster(census->image, snapshot->l1_offset) ? "is not at a cluster"
                        : bytes > QCOW2_L1_BYTES_MAX                         ? "is too large"
                                                                             : NULL;
    if (wrong) {
        census_corruption(census, "The L1 table of snapshot %u (0x%" G_GINT64_MODIFIER "x) %s", index,
                          snapshot->l1_offset, wrong);
        snapshot->unusable = true;
        return;
    }
    if (bytes == 0) {
        return;
    }
    if (!census_use_metadata(census, snapshot->l1_offset, bytes, QCOW2_PLACE_SNAPSHOT_L1,
                             "the L1 table of a snapshot")) {
        snapshot->unusable = true;
        return;
    }
    g_autofree uint64_t *l1 =
        census_read_table(census, snapshot->l1_offset, snapshot->l1_size, "The L1 table of a snapshot");
    bool active_broken = census->l1_broken;
    census->l1_broken = false;
    if (l1) {
        census_count_l1(census, l1, snapshot->l1_size, false);
    }
    snapshot->broken = census->l1_broken;
    census->l1_broken = active_broken;
}

/* Why the entry of the snapshot table cannot be as it is, or NULL. */
static const char *snapshot_fault(const struct qcow2_census *census, uint32_t extra, uint64_t end)
{
    if (extra > QCOW2_SNAPSHOT_EXTRA_MAX) {
        return "has too many extra data";
    }
    if (end > QCOW2_SNAPSHOT_TABLE_BYTES_MAX) {
        return "makes the table too large";
    }
    return census->image->header.version >= 3 && extra < 16 ? "is incomplete" : NULL;
}

void coroutine_fn census_count_snapshots(struct qcow2_census *census)
{
    const struct qcow2_header *header = &census->image->header;
    uint64_t start = header->snapshots_offset;
    uint64_t at = 0;
    if (header->snapshot_count == 0) {
        if (!is_aligned(start, census->image->cluster_size) ||
            start > INT64_MAX) { /* others do not open such an image */
            census_corruption(census, "The header shows no snapshots, at a place that cannot be");
            census->snapshots_broken = true;
        }
        return;
    }
    if (!is_aligned(start, census->image->cluster_size) || start == 0 || header->snapshot_count > QCOW2_SNAPSHOTS_MAX) {
        census_corruption(census, "The header shows no snapshot table that can be");
        census->snapshots_broken = true;
        if (header->snapshot_count > QCOW2_SNAPSHOTS_MAX || !is_aligned(start, 8)) {
            return;
        }
    }
    for (uint32_t i = 0; i < header->snapshot_count; i++) {
        struct qcow2_disk_snapshot disk;
        if (!census_read(census, start + at, &disk, sizeof(disk), "The snapshot table")) {
            return;
        }
        uint32_t extra = be32toh(disk.extra_size);
        uint64_t end = align_up(at + sizeof(disk) + extra + be16toh(disk.id_size) + be16toh(disk.name_size), 8);
        const char *fault = snapshot_fault(census, extra, end);
        struct qcow2_census_snapshot snapshot = {
            .at = at, .l1_offset = be64toh(disk.l1_table_offset), .l1_size = be32toh(disk.l1_size)};
        if (fault) {
            census_corruption(census, "Entry %u of the snapshot table %s", i, fault);
            census->snapshots_broken = true;
        }
        if (end > QCOW2_SNAPSHOT_TABLE_BYTES_MAX) {
            break;
        }
        count_snapshot(census, i, &snapshot);
        g_array_append_val(census->snapshots, snapshot);
        at = end;
    }
    census->snapshot_bytes = at;
    if (!census_use_metadata(census, start, at, QCOW2_PLACE_SNAPSHOT_TABLE, "the snapshot table")) {
        census->snapshots_broken = true;
    }
}

/* --- bitmaps --- */

static bool coroutine_fn count_bitmap(struct qcow2_census *census, uint64_t offset, uint64_t entries)
{
    if (qcow2_in_cluster(census->image, offset) || entries > QCOW2_BITMAP_TABLE_ENTRIES_MAX) {
        census_corruption(census, "The table of a bitmap (0x%" G_GINT64_MODIFIER "x) cannot be", offset);
        return false;
    }
    if (entries == 0) {
        return true;
    }
    if (!census_use_metadata(census, offset, entries * 8, QCOW2_PLACE_BITMAPS, "the table of a bitmap")) {
        return false;
    }
    g_autofree uint64_t *table = census_read_table(census, offset, entries, "The table of a bitmap");
    bool good = true;
    for (uint64_t i = 0; table && i < entries; i++) {
        uint64_t data = table[i] & QCOW2_OFFSET_MASK;
        if (table[i] & ~(QCOW2_OFFSET_MASK | 1) || (data && table[i] & 1) || qcow2_in_cluster(census->image, data)) {
            census_corruption(census, "An entry in the table of a bitmap cannot be: 0x%016" G_GINT64_MODIFIER "x",
                              table[i]);
            good = false;
        } else if (data) {
            good &= census_use_metadata(census, data, census->image->cluster_size, QCOW2_PLACE_BITMAPS, "a bitmap");
        }
    }
    return good;
}

static bool coroutine_fn count_directory(struct qcow2_census *census)
{
    const struct qcow2_disk_bitmaps *bitmaps = &census->image->header.bitmaps;
    uint64_t bytes = bitmaps->directory_size;
    if (bitmaps->bitmap_count > QCOW2_BITMAPS_MAX || bytes > QCOW2_BITMAP_DIRECTORY_BYTES_MAX ||
        qcow2_in_cluster(census->image, bitmaps->directory_offset)) {
        census_corruption(census, "The bitmap directory cannot be where the header says");
        return false;
    }
    if (!census_use_metadata(census, bitmaps->directory_offset, bytes, QCOW2_PLACE_BITMAPS, "the bitmap directory")) {
        return false;
    }
    g_autofree uint8_t *directory = g_try_malloc(MAX(bytes, 1));
    if (!directory) {
        census_error(census, "The bitmap directory is too large for the memory that there is");
        return true;
    }
    if (!census_read(census, bitmaps->directory_offset, directory, bytes, "The bitmap directory")) {
        return true;
    }
    uint64_t at = 0;
    bool good = true;
    for (uint32_t i = 0; i < bitmaps->bitmap_count; i++) {
        struct qcow2_disk_bitmap bitmap;
        uint64_t length = 0;
        if (bytes - at >= sizeof(bitmap)) {
            memcpy(&bitmap, directory + at, sizeof(bitmap));
            length = align_up(sizeof(bitmap) + (uint64_t)be32toh(bitmap.extra_size) + be16toh(bitmap.name_size), 8);
        }
        if (length == 0 || length > bytes - at) {
            census_corruption(census, "The bitmap directory is too short for %u bitmaps", bitmaps->bitmap_count);
            return false;
        }
        at += length;
        good &= count_bitmap(census, be64toh(bitmap.table_offset), be32toh(bitmap.table_size));
    }
    return good;
}

void coroutine_fn census_count_bitmaps(struct qcow2_census *census)
{
    const struct qcow2_header *header = &census->image->header;
    if (header->autoclear & QCOW2_AUTOCLEAR_BITMAPS && header->bitmaps.bitmap_count) {
        census->bitmaps_broken = !count_directory(census);
    }
}

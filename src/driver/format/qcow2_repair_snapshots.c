/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Repair of the snapshot table and of the L1 tables of snapshots.
 *
 * 1. A table that is wrong, or that has to say something else, is written anew behind the end of the file, flushed, and
 *    made the image's by one write of the header. The old one is not touched.
 * 2. Extra data that are missing are made up as the peer does (the size of the disk is the image's); too many are cut
 *    down to those that mean something.
 * 3. A snapshot whose L1 table cannot be found has lost everything, and goes.
 */
#include "base/size.h"
#include "block/request.h"
#include "driver/format/qcow2_repair.h"
#include <errno.h>
#include <string.h>

enum { EXTRA_LEAST = 16, EXTRA_KNOWN = 24 };

static uint64_t l1_clusters(const struct qcow2_repair *repair, const struct qcow2_census_snapshot *snapshot)
{
    return div_up((uint64_t)snapshot->l1_size * 8, repair->image->cluster_size);
}

static bool shares_clusters(const struct qcow2_repair *repair, const struct qcow2_census_snapshot *snapshot)
{
    uint64_t first = snapshot->l1_offset >> repair->image->cluster_bits;
    for (uint64_t i = 0; i < l1_clusters(repair, snapshot); i++) {
        if (qcow2_tally_get(&repair->census->uses, first + i) > 1) {
            return true;
        }
    }
    return false;
}

/* An L1 table whose offset has lost its way: the cluster it begins in, if nobody else has that. */
static void salvage(struct qcow2_repair *repair, struct qcow2_census_snapshot *snapshot)
{
    const struct qcow2_census *census = repair->census;
    uint64_t offset = qcow2_cluster_floor(repair->image, snapshot->l1_offset);
    uint64_t bytes = (uint64_t)snapshot->l1_size * 8;
    uint64_t cluster = offset >> repair->image->cluster_bits;
    if (offset && offset != snapshot->l1_offset && bytes <= QCOW2_L1_BYTES_MAX &&
        qcow2_census_inside(census, offset, bytes) && qcow2_tally_get(&census->refcounts, cluster) &&
        !qcow2_tally_get(&census->uses, cluster)) {
        snapshot->l1_offset = offset;
        snapshot->unusable = false;
    }
}

void qcow2_repair_prepare_snapshots(struct qcow2_repair *repair)
{
    struct qcow2_census *census = repair->census;
    bool again = census->snapshots_broken || census->snapshots_misplaced || repair->complete_extra;
    for (unsigned i = 0; i < census->snapshots->len; i++) {
        struct qcow2_census_snapshot *snapshot = &g_array_index(census->snapshots, struct qcow2_census_snapshot, i);
        if (snapshot->unusable) {
            salvage(repair, snapshot);
            again = true;
        } else if (census->snapshots_misplaced && shares_clusters(repair, snapshot)) {
            snapshot->moved_to = qcow2_repair_take(repair, l1_clusters(repair, snapshot))
                                 << repair->image->cluster_bits;
            again = true;
        }
    }
    if (again) {
        uint64_t most = census->snapshot_bytes + (uint64_t)census->snapshots->len * EXTRA_KNOWN;
        repair->snapshots_room = align_up(MAX(most, 1), repair->image->cluster_size);
        repair->snapshots_to = qcow2_repair_take(repair, repair->snapshots_room >> repair->image->cluster_bits)
                               << repair->image->cluster_bits;
    }
}

/* The L1 table of a snapshot, corrected and where it is to be. */
static int coroutine_fn correct_l1(struct qcow2_repair *repair, const struct qcow2_census_snapshot *snapshot)
{
    struct edge *file = repair->image->node->file;
    uint64_t entries = snapshot->l1_size;
    if (entries == 0 || (!snapshot->broken && !repair->census->overlaps)) {
        return 0;
    }
    g_autofree uint64_t *l1 = g_try_new(uint64_t, entries);
    int code = l1 ? edge_read_memory(file, snapshot->l1_offset, l1, entries * 8) : -ENOMEM;
    if (code == 0) {
        for (uint64_t i = 0; i < entries; i++) {
            l1[i] = be64toh(l1[i]);
        }
        bool changed = qcow2_repair_l1_entries(repair, l1, entries);
        for (uint64_t i = 0; i < entries; i++) {
            l1[i] = htobe64(l1[i]);
        }
        if (changed || snapshot->moved_to) {
            code = edge_write_memory(file, snapshot->moved_to ? snapshot->moved_to : snapshot->l1_offset, l1,
                                     entries * 8, 0);
        }
    }
    return code < 0 ? error_set_errno(repair->err, code, "Could not correct the L1 table of a snapshot") : 0;
}

/* Appends a snapshot's entry to the new table. It is read anew, and may have another length than was counted, where the
 * table lies over something else, or was not counted to its end. */
static int coroutine_fn append_entry(struct qcow2_repair *repair, const struct qcow2_census_snapshot *snapshot,
                                     uint8_t *to, uint64_t *at)
{
    struct qcow2 *image = repair->image;
    struct qcow2_disk_snapshot disk;
    uint64_t from = image->header.snapshots_offset + snapshot->at;
    int code = edge_read_memory(image->node->file, from, &disk, sizeof(disk));
    if (code < 0) {
        return code;
    }
    uint32_t extra = be32toh(disk.extra_size);
    uint32_t names = be16toh(disk.id_size) + be16toh(disk.name_size);
    uint32_t kept = extra > QCOW2_SNAPSHOT_EXTRA_MAX ? EXTRA_KNOWN : extra;
    uint32_t written = image->header.version >= 3 || repair->complete_extra ? MAX(kept, (uint32_t)EXTRA_LEAST) : kept;
    uint64_t made_up[2] = {htobe64(be32toh(disk.vm_state_size)), htobe64(image->header.size)};
    disk.l1_table_offset = htobe64(snapshot->moved_to ? snapshot->moved_to : snapshot->l1_offset);
    disk.extra_size = htobe32(written);
    uint64_t end = align_up(*at + sizeof(disk) + MAX(kept, written) + names, 8);
    if (end > repair->snapshots_room) {
        return -EIO;
    }
    uint8_t *place = to + *at;
    memcpy(place, &disk, sizeof(disk));
    place += sizeof(disk);
    if (written > kept) {
        memcpy(place, made_up, sizeof(made_up));
    }
    if (kept) {
        code = edge_read_memory(image->node->file, from + sizeof(disk), place, kept);
    }
    if (code == 0 && names) {
        code = edge_read_memory(image->node->file, from + sizeof(disk) + extra, place + written, names);
    }
    *at = end;
    return code;
}

static int coroutine_fn write_header(struct qcow2_repair *repair, uint32_t count, uint64_t offset)
{
    struct qcow2 *image = repair->image;
    struct edge *file = image->node->file;
    struct {
        uint32_t count;
        uint64_t offset;
    } __attribute__((packed)) disk = {htobe32(count), htobe64(offset)};
    int code = edge_flush(file);
    if (code == 0) {
        code = edge_write_memory(file, offsetof(struct qcow2_disk_header, snapshot_count), &disk, sizeof(disk), 0);
    }
    if (code == 0) {
        image->header.snapshot_count = count;
        image->header.snapshots_offset = offset;
        code = edge_flush(file);
    }
    return code;
}

static int coroutine_fn write_table(struct qcow2_repair *repair)
{
    const struct qcow2_census *census = repair->census;
    g_autofree uint8_t *table = g_try_malloc0(repair->snapshots_room);
    int code = table ? 0 : -ENOMEM;
    uint64_t bytes = 0;
    uint32_t count = 0;
    for (unsigned i = 0; code == 0 && i < census->snapshots->len; i++) {
        const struct qcow2_census_snapshot *snapshot =
            &g_array_index(census->snapshots, struct qcow2_census_snapshot, i);
        if (!snapshot->unusable) {
            code = append_entry(repair, snapshot, table, &bytes);
            count++;
        }
    }
    if (code == 0 && count) {
        code = edge_write_memory(repair->image->node->file, repair->snapshots_to, table, bytes, 0);
    }
    if (code == 0) {
        code = write_header(repair, count, count ? repair->snapshots_to : 0);
    }
    return code;
}

int coroutine_fn qcow2_repair_snapshots(struct qcow2_repair *repair)
{
    const struct qcow2_census *census = repair->census;
    int code = 0;
    for (unsigned i = 0; code == 0 && i < census->snapshots->len; i++) {
        const struct qcow2_census_snapshot *snapshot =
            &g_array_index(census->snapshots, struct qcow2_census_snapshot, i);
        code = snapshot->unusable ? 0 : correct_l1(repair, snapshot);
    }
    if (code == 0 && repair->snapshots_to) {
        code = write_table(repair);
        if (code < 0) {
            return error_set_errno(repair->err, code, "Could not write the snapshot table");
        }
    }
    return code;
}

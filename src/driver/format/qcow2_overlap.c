/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Overlap checks by option. Two sources tell where metadata are:
 *
 * 1. the L1 table and the refcount table in memory: L2 tables and refcount blocks in use, as of now;
 * 2. the census (qcow2_census.c), taken before the first write: snapshots' tables and the bitmap directory. They stay
 *    where they are until somebody changes snapshots, who then says so; a bitmap directory that has moved is left out.
 *
 * The peer's names: `constant` is the header, the L1 table, the refcount table, the snapshot table and the bitmap
 * directory; `cached` adds L2 tables, refcount blocks and the L1 tables of snapshots; `all` adds their L2 tables. The
 * first three are checked whatever the option says. It does not check what is written to tables themselves.
 */
#include "driver/format/qcow2_overlap.h"
#include "base/size.h"
#include "driver/format/qcow2_census.h"
#include "schema/types.h"

#define PLACE(name) (1u << QCOW2_PLACE_##name)
/* L2 tables of snapshots have no place of their own in the census. */
#define INACTIVE_L2 (1u << 31)
#define CONSTANT (PLACE(HEADER) | PLACE(L1) | PLACE(REFCOUNT_TABLE) | PLACE(SNAPSHOT_TABLE) | PLACE(BITMAPS))
#define CACHED (CONSTANT | PLACE(L2) | PLACE(REFCOUNT_BLOCK) | PLACE(SNAPSHOT_L1))
#define ALL (CACHED | INACTIVE_L2)
#define FROM_CENSUS (PLACE(SNAPSHOT_TABLE) | PLACE(BITMAPS) | PLACE(SNAPSHOT_L1) | INACTIVE_L2)

static unsigned places_of(enum qcow2_overlap_check_mode mode)
{
    static const unsigned places[] = {[QCOW2_OVERLAP_CHECK_MODE_NONE] = 0,
                                      [QCOW2_OVERLAP_CHECK_MODE_CONSTANT] = CONSTANT,
                                      [QCOW2_OVERLAP_CHECK_MODE_CACHED] = CACHED,
                                      [QCOW2_OVERLAP_CHECK_MODE_ALL] = ALL};
    return places[mode];
}

static void set_flag(unsigned *places, unsigned place, bool has, bool value)
{
    if (has) {
        *places = value ? *places | place : *places & ~place;
    }
}

void qcow2_overlap_configure(struct qcow2 *image, const struct blockdev_options_qcow2 *options)
{
    const struct qcow2_overlap_checks *wanted = options->overlap_check;
    if (!wanted) {
        return;
    }
    if (wanted->kind == QCOW2_OVERLAP_CHECKS_MODE) {
        image->overlap_places = places_of(wanted->u.mode);
        return;
    }
    const struct qcow2_overlap_check_flags *flags = wanted->u.flags;
    unsigned places = places_of(flags->has_template ? flags->template : QCOW2_OVERLAP_CHECK_MODE_CACHED);
    set_flag(&places, PLACE(HEADER), flags->has_main_header, flags->main_header);
    set_flag(&places, PLACE(L1), flags->has_active_l1, flags->active_l1);
    set_flag(&places, PLACE(L2), flags->has_active_l2, flags->active_l2);
    set_flag(&places, PLACE(REFCOUNT_TABLE), flags->has_refcount_table, flags->refcount_table);
    set_flag(&places, PLACE(REFCOUNT_BLOCK), flags->has_refcount_block, flags->refcount_block);
    set_flag(&places, PLACE(SNAPSHOT_TABLE), flags->has_snapshot_table, flags->snapshot_table);
    set_flag(&places, PLACE(SNAPSHOT_L1), flags->has_inactive_l1, flags->inactive_l1);
    set_flag(&places, INACTIVE_L2, flags->has_inactive_l2, flags->inactive_l2);
    set_flag(&places, PLACE(BITMAPS), flags->has_bitmap_directory, flags->bitmap_directory);
    image->overlap_places = places;
}

void qcow2_overlap_forget(struct qcow2 *image)
{
    if (image->overlap_runs) {
        g_array_free(image->overlap_runs, TRUE);
        image->overlap_runs = NULL;
    }
    if (image->overlap_places & FROM_CENSUS) {
        atomic_store(&image->prepared, false);
    }
}

static void keep_runs(struct qcow2 *image, const struct qcow2_census *census)
{
    uint64_t directory = image->header.bitmaps.directory_offset >> image->cluster_bits;
    for (unsigned i = 0; i < census->metadata->len; i++) {
        const struct qcow2_metadata_run *run = &g_array_index(census->metadata, struct qcow2_metadata_run, i);
        bool wanted = run->place != QCOW2_PLACE_L2 && image->overlap_places & FROM_CENSUS & (1u << run->place);
        if (wanted && (run->place != QCOW2_PLACE_BITMAPS || run->first == directory)) {
            g_array_append_val(image->overlap_runs, *run);
        }
    }
    for (unsigned i = 0; i < census->tables->len && image->overlap_places & INACTIVE_L2; i++) {
        const struct qcow2_census_table *table = &g_array_index(census->tables, struct qcow2_census_table, i);
        struct qcow2_metadata_run run = {table->offset >> image->cluster_bits, 1, table->uses, QCOW2_PLACE_L2};
        if (!table->active_uses) {
            g_array_append_val(image->overlap_runs, run);
        }
    }
}

int coroutine_fn qcow2_overlap_prepare(struct qcow2 *image)
{
    bool anything = image->header.snapshot_count || image->header.bitmaps.bitmap_count;
    if (!(image->overlap_places & FROM_CENSUS) || !anything || image->overlap_runs) {
        return 0;
    }
    struct qcow2_findings findings;
    struct qcow2_census census;
    qcow2_findings_init(&findings);
    int code = qcow2_census_take(&census, image, &findings, NULL);
    if (code == 0) {
        image->overlap_runs = g_array_new(FALSE, FALSE, sizeof(struct qcow2_metadata_run));
        image->overlap_directory = image->header.bitmaps.directory_offset;
        keep_runs(image, &census);
        qcow2_census_finish(&census);
    }
    qcow2_findings_finish(&findings);
    return code;
}

static bool table_hits(const uint64_t *table, uint64_t entries, uint64_t mask, uint64_t offset, uint64_t end)
{
    bool hit = false;
    for (uint64_t i = 0; i < entries; i++) {
        uint64_t at = table[i] & mask;
        hit |= at >= offset && at < end && at;
    }
    return hit;
}

bool qcow2_overlap_hits(const struct qcow2 *image, uint64_t offset, uint64_t bytes)
{
    uint64_t first = qcow2_cluster_floor(image, offset);
    uint64_t end = offset + bytes;
    if (image->overlap_places & PLACE(L2) &&
        table_hits(image->l1, image->header.l1_size, QCOW2_OFFSET_MASK, first, end)) {
        return true;
    }
    if (image->overlap_places & PLACE(REFCOUNT_BLOCK) &&
        table_hits(image->refcount_table, image->refcount_table_entries, QCOW2_REFCOUNT_TABLE_MASK, first, end)) {
        return true;
    }
    for (unsigned i = 0; image->overlap_runs && i < image->overlap_runs->len; i++) {
        const struct qcow2_metadata_run *run = &g_array_index(image->overlap_runs, struct qcow2_metadata_run, i);
        uint64_t at = run->first << image->cluster_bits;
        bool moved =
            run->place == QCOW2_PLACE_BITMAPS && image->header.bitmaps.directory_offset != image->overlap_directory;
        if (!moved && at < end && first < at + (run->count << image->cluster_bits)) {
            return true;
        }
    }
    return false;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Whether the clusters of a bitmap may be freed when it is removed or stored anew. A table that was found in the image
 * may lie: name a guest's data as its bits, and have them freed.
 *
 * 1. Tables and a directory that we wrote since the image was opened are right. For those that were found, the whole
 *    image is looked through (the census: every use of every cluster) before the directory is replaced for the first
 *    time. If any cluster of a bitmap, or of the directory, has another use, nothing of what was found is ever freed:
 *    that leaks, and a check frees it.
 * 2. Once is enough: whatever is given out later is given out by its refcount, and theirs are not 0.
 * 3. It takes as long as reading the image's tables, and users wait; so an image with more tables than
 *    LOOKED_THROUGH_MAX is not looked through, and leaks. These are the tables of 1 TiB of data in clusters of 64 KiB.
 * 4. Refcounts have the last word: only what has one use by its refcount too is freed.
 */
#include "driver/format/qcow2_bitmap_trust.h"
#include "base/size.h"
#include "block/driver.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_bitmap_directory.h"
#include "driver/format/qcow2_census.h"
#include "driver/format/qcow2_overlap.h"
#include "driver/format/qcow2_refcount.h"

#define LOOKED_THROUGH_MAX (128 * MiB)

/* --- looking through the image --- */

static bool coroutine_fn nothing_is_shared(struct qcow2 *image)
{
    struct qcow2_findings findings;
    struct qcow2_census census;
    qcow2_findings_init(&findings);
    int code = qcow2_census_take(&census, image, &findings, NULL);
    bool good = code == 0 && findings.errors == 0 && !census.bitmaps_broken;
    if (code == 0) {
        qcow2_census_finish(&census);
    }
    qcow2_findings_finish(&findings);
    return good;
}

static uint64_t table_bytes(const struct qcow2 *image)
{
    uint64_t tables = 0;
    for (uint32_t i = 0; i < image->header.l1_size; i++) {
        tables += image->l1[i] != 0;
    }
    return tables << image->cluster_bits;
}

void coroutine_fn qcow2_bitmaps_look_through(struct qcow2 *image)
{
    bool there = image->header.autoclear & QCOW2_AUTOCLEAR_BITMAPS && image->header.bitmaps.bitmap_count;
    if (image->bitmaps_seen_through || image->bitmaps_ours || !there) {
        return;
    }
    image->bitmaps_seen_through = true;
    image->bitmaps_trusted = table_bytes(image) <= LOOKED_THROUGH_MAX && nothing_is_shared(image);
    if (!image->bitmaps_trusted) {
        g_message(
            "qcow2 image of node '%s': its bitmaps may share clusters with something else, so what they use is not "
            "freed",
            image->node->name);
    }
}

/* --- freeing --- */

/* Whether a cluster that the image's tables call a bitmap's can be one: used once, and not as a table of another kind.
 * `seen` has those that cannot be, and gets those that were asked about. */
static bool coroutine_fn is_ours(struct qcow2 *image, uint64_t offset, GHashTable *seen)
{
    uint64_t refcount = 0;
    return g_hash_table_add(seen, GSIZE_TO_POINTER(offset >> image->cluster_bits)) &&
           !qcow2_overlaps_metadata(image, offset, image->cluster_size) &&
           qcow2_refcount_get(image, offset >> image->cluster_bits, &refcount) == 0 && refcount == 1;
}

bool coroutine_fn qcow2_bitmap_may_be_freed(struct qcow2 *image, const struct qcow2_bitmap_record *record,
                                            const uint64_t *table)
{
    g_autoptr(GHashTable) seen = g_hash_table_new(NULL, NULL);
    uint64_t end = record->table_offset + (uint64_t)record->table_entries * 8;
    bool ours = record->ours || record->table_entries == 0 || image->bitmaps_trusted;
    for (uint32_t i = 0; i < image->header.l1_size; i++) {
        g_hash_table_add(seen, GSIZE_TO_POINTER((image->l1[i] & QCOW2_OFFSET_MASK) >> image->cluster_bits));
    }
    for (uint32_t i = 0; i < image->refcount_table_entries; i++) {
        g_hash_table_add(seen, GSIZE_TO_POINTER(image->refcount_table[i] >> image->cluster_bits));
    }
    for (uint64_t at = record->table_offset; ours && at < end; at += image->cluster_size) {
        ours = is_ours(image, at, seen);
    }
    for (uint32_t i = 0; ours && i < record->table_entries; i++) {
        uint64_t offset = table[i] & QCOW2_OFFSET_MASK;
        ours = offset == 0 || is_ours(image, offset, seen);
    }
    return ours;
}

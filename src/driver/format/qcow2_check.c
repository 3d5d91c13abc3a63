/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Check and repair of an image: takes the census (qcow2_census.c), compares what is used with what the refcounts say,
 * and drives the steps of a repair. The order of a repair of everything:
 *
 *     copies of misplaced clusters, flushed         nobody sees them
 *     refcounts too low are raised, flushed         now nothing in use can be given out again
 *     entries, L2 before L1, snapshots; flushed     what cannot be becomes what can; see qcow2_repair_tables.c
 *     (the census again, until there is nothing more to correct)
 *     refcounts too high are lowered, flushed
 *     COPIED flags, flushed
 *     the dirty and the corrupt bit, flushed
 *
 * 1. After a crash anywhere the image is what it was, less some of what was wrong, plus leaks.
 * 2. Nothing is repaired while a part of the image could not be read: what that part uses is not known.
 * 3. Leaks alone are not freed while entries cannot be: they may be what those entries meant.
 * 4. What could be read is never dropped. An image that cannot be made whole is left with its corrupt bit.
 */
#include "driver/format/qcow2_check.h"
#include "base/size.h"
#include "block/driver.h"
#include "driver/format/qcow2_repair.h"
#include <errno.h>

enum { ROUNDS_MAX = 8 };

/* What is found in one pass. */
struct tally {
    uint64_t corruptions, leaks, errors;
    uint64_t end_offset;
};

/* Where refcounts and uses differ. */
static void compare_refcounts(struct qcow2_census *census, struct tally *tally)
{
    uint64_t end = 0;
    const uint64_t in_chunk = (UINT64_C(1) << QCOW2_TALLY_CHUNK_BITS) - 1;
    for (uint64_t i = 0; i < census->clusters; i++) {
        if ((i & in_chunk) == 0) {
            i = qcow2_tally_skip(&census->uses, &census->refcounts, i, census->clusters);
            if (i >= census->clusters) {
                break;
            }
        }
        uint32_t uses = qcow2_tally_get(&census->uses, i);
        uint32_t refcount = qcow2_tally_get(&census->refcounts, i);
        if (uses | refcount) {
            end = i + 1;
        }
        if (uses == refcount) {
            continue;
        }
        qcow2_findings_add(census->findings, "Cluster %" G_GUINT64_FORMAT " %s: it has %u uses and refcount %u", i,
                           uses > refcount ? "can be lost" : "is leaked", uses, refcount);
        *(uses > refcount ? &tally->corruptions : &tally->leaks) += 1;
    }
    tally->end_offset = end << census->image->cluster_bits;
}

static int coroutine_fn look(struct qcow2_census *census, struct qcow2 *image, struct qcow2_findings *findings,
                             struct tally *ret, struct error **err)
{
    int code = qcow2_census_take(census, image, findings, err);
    if (code == 0) {
        *ret = (struct tally){0};
        compare_refcounts(census, ret);
        ret->corruptions += findings->corruptions;
        ret->errors = findings->errors;
    }
    return code;
}

/* The same without telling anybody. */
static int coroutine_fn look_again(struct qcow2_census *census, struct qcow2 *image, struct tally *ret,
                                   struct error **err)
{
    struct qcow2_findings findings;
    qcow2_findings_init(&findings);
    int code = look(census, image, &findings, ret, err);
    qcow2_findings_finish(&findings);
    census->findings = NULL;
    return code;
}

/* Is there something that is not a matter of refcounts and flags alone? */
static bool has_wrong_entries(const struct qcow2_census *census)
{
    bool wrong = census->l1_broken || census->overlaps || census->snapshots_broken || census->bitmaps_broken;
    for (unsigned i = 0; i < census->tables->len; i++) {
        wrong |= g_array_index(census->tables, struct qcow2_census_table, i).broken;
    }
    for (unsigned i = 0; i < census->snapshots->len; i++) {
        const struct qcow2_census_snapshot *snapshot =
            &g_array_index(census->snapshots, struct qcow2_census_snapshot, i);
        wrong |= snapshot->unusable || snapshot->broken;
    }
    return wrong;
}

/* Bitmaps that cannot be relied on go, with what they use. */
static int coroutine_fn drop_bitmaps(struct qcow2 *image, struct error **err)
{
    struct qcow2_header *header = &image->header;
    header->autoclear &= ~(uint64_t)QCOW2_AUTOCLEAR_BITMAPS;
    int code = qcow2_header_write_autoclear(image->node->file, header);
    if (code == 0) {
        code = edge_flush(image->node->file);
    }
    return code < 0 ? error_set_errno(err, code, "Could not drop the image's bitmaps") : 0;
}

/* One round of correcting entries. */
static int coroutine_fn correct_entries(struct qcow2_census *census, struct error **err)
{
    struct qcow2_repair repair;
    qcow2_repair_init(&repair, census, err);
    int code = qcow2_repair_prepare(&repair);
    if (code == 0) {
        code = qcow2_repair_refcounts(&repair, true);
    }
    if (code == 0) {
        code = qcow2_repair_tables(&repair);
    }
    if (code == 0) {
        code = qcow2_repair_snapshots(&repair);
    }
    if (code == 0 && census->bitmaps_broken) {
        code = drop_bitmaps(census->image, err);
    }
    if (code == 0) {
        code = edge_flush(census->file);
        if (code < 0) {
            error_set_errno(err, code, "Could not write the corrected tables");
        }
    }
    qcow2_repair_finish(&repair);
    return code;
}

/* Entries, until none is wrong; *census is that of the image as it is now. */
static int coroutine_fn correct_all_entries(struct qcow2_census *census, struct tally *tally, struct error **err)
{
    struct qcow2 *image = census->image;
    for (unsigned round = 0; round < ROUNDS_MAX && tally->errors == 0 && has_wrong_entries(census); round++) {
        int code = correct_entries(census, err);
        qcow2_census_finish(census);
        if (code == 0) {
            code = look_again(census, image, tally, err);
        }
        if (code < 0) {
            return code;
        }
    }
    return 0;
}

static int coroutine_fn correct_counts(struct qcow2_census *census, struct error **err)
{
    struct qcow2_repair repair;
    qcow2_repair_init(&repair, census, err);
    int code = qcow2_repair_refcounts(&repair, true);
    if (code == 0) {
        code = qcow2_repair_refcounts(&repair, false);
    }
    if (code == 0) {
        code = qcow2_repair_flags(&repair);
    }
    qcow2_repair_finish(&repair);
    return code;
}

static int coroutine_fn clear_bits(struct qcow2 *image, struct error **err)
{
    const uint64_t bits = QCOW2_INCOMPATIBLE_DIRTY | QCOW2_INCOMPATIBLE_CORRUPT;
    if (!(image->header.incompatible & bits)) {
        return 0;
    }
    image->header.incompatible &= ~bits;
    int code = edge_flush(image->node->file);
    if (code == 0) {
        code = qcow2_header_write_incompatible(image->node->file, &image->header);
    }
    if (code == 0) {
        code = edge_flush(image->node->file);
    }
    if (code == 0) {
        atomic_store(&image->corrupt, false);
        image->corrupt_logged = false;
    }
    return code < 0 ? error_set_errno(err, code, "Could not clear the dirty and the corrupt bit") : 0;
}

/* From the census of the image as it is to the one of the image as it is left. */
static int coroutine_fn repair(struct qcow2_census *census, enum image_fix fix, struct tally *tally, struct error **err)
{
    struct qcow2 *image = census->image;
    int code = 0;
    if (fix == IMAGE_FIX_ALL && (tally->corruptions || tally->leaks)) {
        code = correct_all_entries(census, tally, err);
    }
    bool wrong = code == 0 && has_wrong_entries(census);
    bool counts = fix == IMAGE_FIX_ALL ? tally->corruptions + tally->leaks : tally->leaks;
    if (code == 0 && !wrong && tally->errors == 0 && counts) {
        code = correct_counts(census, err);
        qcow2_census_finish(census);
        if (code == 0) {
            code = look_again(census, image, tally, err);
        }
    }
    if (code == 0 && fix == IMAGE_FIX_ALL && tally->errors + tally->corruptions == 0) {
        code = clear_bits(image, err);
    }
    return code;
}

static int coroutine_fn check_image(struct qcow2 *image, enum image_fix fix, struct qcow2_findings *findings,
                                    struct tally *ret_found, struct tally *ret_left, struct qcow2_census *census,
                                    struct error **err)
{
    int code = look(census, image, findings, ret_found, err);
    if (code < 0) {
        return code;
    }
    *ret_left = *ret_found;
    if (fix != IMAGE_FIX_NONE) {
        code = repair(census, fix, ret_left, err);
        struct error *ignored = NULL;
        int loaded = qcow2_reload_tables(image, code < 0 ? &ignored : err);
        error_free(ignored);
        code = code < 0 ? code : loaded;
    }
    if (code < 0) {
        qcow2_census_finish(census);
    }
    return code;
}

static void set_count(bool *has, int64_t *to, uint64_t value)
{
    *has = value != 0;
    *to = value;
}

int coroutine_fn qcow2_check(struct node *node, enum image_fix fix, struct image_check *ret, struct error **err)
{
    struct qcow2 *image = node->state;
    struct qcow2_findings findings;
    struct qcow2_census census;
    struct tally found;
    struct tally left;
    g_assert(fix == IMAGE_FIX_NONE || node->writable);
    qcow2_findings_init(&findings);
    int code = check_image(image, fix, &findings, &found, &left, &census, err);
    if (code == 0) {
        ret->check_errors = left.errors;
        set_count(&ret->has_corruptions, &ret->corruptions, left.corruptions);
        set_count(&ret->has_leaks, &ret->leaks, left.leaks);
        set_count(&ret->has_corruptions_fixed, &ret->corruptions_fixed,
                  found.corruptions - min_u64(found.corruptions, left.corruptions));
        set_count(&ret->has_leaks_fixed, &ret->leaks_fixed, found.leaks - min_u64(found.leaks, left.leaks));
        set_count(&ret->has_total_clusters, &ret->total_clusters, div_up(image->header.size, image->cluster_size));
        set_count(&ret->has_allocated_clusters, &ret->allocated_clusters, census.allocated);
        set_count(&ret->has_fragmented_clusters, &ret->fragmented_clusters, census.fragmented);
        set_count(&ret->has_compressed_clusters, &ret->compressed_clusters, census.compressed);
        set_count(&ret->has_image_end_offset, &ret->image_end_offset, left.end_offset);
        ret->has_findings = findings.lines->len > 0;
        for (unsigned i = 0; i < findings.lines->len; i++) {
            str_list_append(&ret->findings, g_strdup(findings.lines->pdata[i]));
        }
        qcow2_census_finish(&census);
    }
    qcow2_findings_finish(&findings);
    return code;
}

int coroutine_fn qcow2_repair_dirty(struct qcow2 *image, struct error **err)
{
    struct qcow2_findings findings;
    struct qcow2_census census;
    struct tally found;
    struct tally left;
    qcow2_findings_init(&findings);
    int code = check_image(image, IMAGE_FIX_ALL, &findings, &found, &left, &census, err);
    if (code == 0) {
        qcow2_census_finish(&census);
        if (left.errors + left.corruptions) {
            code = error_set(err, -EIO, "%s",
                             findings.lines->len ? (const char *)findings.lines->pdata[0] : "it has errors");
        }
    }
    if (code < 0) {
        error_prepend(err, "Could not repair a qcow2 image that was not closed properly");
    }
    qcow2_findings_finish(&findings);
    return code;
}

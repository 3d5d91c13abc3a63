/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Writing refcounts in a repair.
 *
 * 1. Where the refcount structures are sound, refcounts are corrected in place, block by block. Each is right by
 * itself, so it does not matter which of them a crash leaves undone, as long as none is lowered before everything that
 * uses the cluster is known: the caller sees to that (raise_only).
 * 2. Where they are not, or a cluster in use has no block, new structures are laid out behind the end of the file and
 *    behind every cluster in use, written, flushed, and made the image's by one write of the header. The old ones are
 *    not touched, and free from then on.
 */
#include "base/size.h"
#include "block/request.h"
#include "driver/format/qcow2_refcount.h"
#include "driver/format/qcow2_repair.h"
#include <errno.h>
#include <string.h>

static uint64_t block_count(const struct qcow2 *image)
{
    return UINT64_C(1) << image->refcount_block_bits;
}

static uint64_t region_end(const struct qcow2_repair *repair, uint64_t region)
{
    return min_u64((region + 1) << repair->image->refcount_block_bits, repair->end);
}

/* Can the refcount hold it? */
static int check_width(const struct qcow2_repair *repair, uint64_t uses)
{
    unsigned order = repair->image->header.refcount_order;
    if (order < 6 && uses >> (1u << order)) {
        return error_set(repair->err, -ERANGE,
                         "a cluster is used %" G_GUINT64_FORMAT " times, more than its refcount can say", uses);
    }
    return 0;
}

static uint64_t known_refcount(const struct qcow2_repair *repair, uint64_t cluster)
{
    return qcow2_tally_get(&repair->census->refcounts, cluster);
}

static bool needs_change(const struct qcow2_repair *repair, uint64_t cluster, bool raise_only)
{
    uint64_t uses = qcow2_tally_get(&repair->census->uses, cluster);
    uint64_t refcount = known_refcount(repair, cluster);
    return uses > refcount || (!raise_only && uses < refcount);
}

static int coroutine_fn correct_block(struct qcow2_repair *repair, uint64_t region, bool raise_only)
{
    struct qcow2 *image = repair->image;
    uint64_t offset = repair->census->refcount_table[region];
    unsigned order = image->header.refcount_order;
    g_autofree uint8_t *block = g_try_malloc(image->cluster_size);
    int code = block ? edge_read_memory(image->node->file, offset, block, image->cluster_size) : -ENOMEM;
    uint64_t first = region << image->refcount_block_bits;
    for (uint64_t cluster = first; code == 0 && cluster < region_end(repair, region); cluster++) {
        uint64_t uses = qcow2_tally_get(&repair->census->uses, cluster);
        uint64_t value = qcow2_refcount_load(block, order, cluster - first);
        if (uses > value || (uses < value && !raise_only)) {
            code = check_width(repair, uses);
            qcow2_refcount_store(block, order, cluster - first, uses);
        }
    }
    if (code == -ERANGE) {
        return code;
    }
    if (code == 0) {
        code = edge_write_memory(image->node->file, offset, block, image->cluster_size, 0);
    }
    return code < 0 ? error_set_errno(repair->err, code, "Could not correct a refcount block") : 0;
}

/* `cluster`, or behind it, before `end`: where uses or refcounts are that may differ. */
static uint64_t skip_nothing(const struct qcow2_repair *repair, uint64_t cluster, uint64_t end, bool raise_only)
{
    const struct qcow2_census *census = repair->census;
    return qcow2_tally_skip(&census->uses, raise_only ? NULL : &census->refcounts, cluster, end);
}

/* The first cluster of the region whose refcount is to change; the region's end if there is none. */
static uint64_t find_change(const struct qcow2_repair *repair, uint64_t region, bool raise_only)
{
    uint64_t end = region_end(repair, region);
    uint64_t cluster = skip_nothing(repair, region << repair->image->refcount_block_bits, end, raise_only);
    while (cluster < end && !needs_change(repair, cluster, raise_only)) {
        cluster++;
        if ((cluster & ((1u << QCOW2_TALLY_CHUNK_BITS) - 1)) == 0) {
            cluster = skip_nothing(repair, cluster, end, raise_only);
        }
    }
    return min_u64(cluster, end);
}

/* The first region from this one on that has uses or refcounts; their number if there is none. */
static uint64_t next_region(const struct qcow2_repair *repair, uint64_t region)
{
    unsigned bits = repair->image->refcount_block_bits;
    uint64_t cluster = skip_nothing(repair, region << bits, repair->end, false);
    return cluster < repair->end ? cluster >> bits : div_up(repair->end, block_count(repair->image));
}

static bool has_block(const struct qcow2_repair *repair, uint64_t region)
{
    return region < repair->census->refcount_entries && repair->census->refcount_table[region];
}

/* Whether everything in use has a block that can be corrected. */
static bool in_place(const struct qcow2_repair *repair)
{
    if (repair->census->refcounts_broken) {
        return false;
    }
    uint64_t regions = div_up(repair->end, block_count(repair->image));
    for (uint64_t region = next_region(repair, 0); region < regions; region = next_region(repair, region + 1)) {
        if (!has_block(repair, region) && find_change(repair, region, true) < region_end(repair, region)) {
            return false;
        }
    }
    return true;
}

/* --- new structures --- */

/* `blocks` blocks and then the table, from cluster `first` on. */
struct layout {
    uint64_t first, blocks, table_clusters, total;
    uint64_t entries; /* of the table */
};

static bool region_in_use(const struct qcow2_repair *repair, uint64_t region, const struct layout *layout)
{
    uint64_t begin = region << repair->image->refcount_block_bits;
    uint64_t end = (region + 1) << repair->image->refcount_block_bits;
    if (begin < layout->first + layout->total && end > layout->first) {
        return true;
    }
    end = min_u64(end, repair->end);
    for (uint64_t i = qcow2_tally_skip(&repair->census->uses, NULL, begin, end); i < end; i++) {
        if (qcow2_tally_get(&repair->census->uses, i)) {
            return true;
        }
    }
    return false;
}

static bool table_fits(const struct qcow2 *image, const struct layout *layout)
{
    return layout->table_clusters <= QCOW2_REFCOUNT_TABLE_BYTES_MAX >> image->cluster_bits;
}

/* A table that does not fit is left half planned. */
static void plan(const struct qcow2_repair *repair, struct layout *layout)
{
    const struct qcow2 *image = repair->image;
    *layout = (struct layout){.first = repair->end};
    for (;;) {
        struct layout next = *layout;
        uint64_t regions = div_up(layout->first + max_u64(layout->total, 1), block_count(image));
        next.table_clusters = div_up(regions * 8, image->cluster_size);
        if (!table_fits(image, &next)) {
            *layout = next;
            return;
        }
        next.blocks = 0;
        for (uint64_t region = 0; region < regions; region++) {
            next.blocks += region_in_use(repair, region, layout);
        }
        next.entries = next.table_clusters << (image->cluster_bits - 3);
        next.total = next.blocks + next.table_clusters;
        if (next.total == layout->total) {
            *layout = next;
            return;
        }
        layout->total = next.total;
    }
}

static uint64_t new_refcount(const struct qcow2_repair *repair, const struct layout *layout, uint64_t cluster,
                             bool raise_only)
{
    if (cluster >= layout->first && cluster < layout->first + layout->total) {
        return 1;
    }
    uint64_t uses = qcow2_tally_get(&repair->census->uses, cluster);
    return raise_only ? max_u64(uses, known_refcount(repair, cluster)) : uses;
}

static int coroutine_fn write_blocks(struct qcow2_repair *repair, const struct layout *layout, bool raise_only,
                                     uint64_t *table)
{
    struct qcow2 *image = repair->image;
    g_autofree void *block = g_try_malloc(image->cluster_size);
    uint64_t written = 0;
    if (!block) {
        return error_set_errno(repair->err, -ENOMEM, "Could not rebuild the refcounts");
    }
    for (uint64_t region = 0; written < layout->blocks; region++) {
        if (!region_in_use(repair, region, layout)) {
            continue;
        }
        memset(block, 0, image->cluster_size);
        for (uint64_t i = 0; i < block_count(image); i++) {
            uint64_t uses = new_refcount(repair, layout, (region << image->refcount_block_bits) + i, raise_only);
            int code = check_width(repair, uses);
            if (code < 0) {
                return code;
            }
            if (uses) {
                qcow2_refcount_store(block, image->header.refcount_order, i, uses);
            }
        }
        uint64_t offset = (layout->first + written) << image->cluster_bits;
        int code = edge_write_memory(image->node->file, offset, block, image->cluster_size, 0);
        if (code < 0) {
            return error_set_errno(repair->err, code, "Could not write a refcount block");
        }
        table[region] = htobe64(offset);
        written++;
    }
    return 0;
}

static int coroutine_fn switch_table(struct qcow2_repair *repair, const struct layout *layout, const uint64_t *table)
{
    struct qcow2 *image = repair->image;
    struct edge *file = image->node->file;
    uint64_t offset = (layout->first + layout->blocks) << image->cluster_bits;
    int code = edge_write_memory(file, offset, table, layout->entries * 8, 0);
    if (code == 0) {
        code = edge_flush(file);
    }
    if (code == 0) {
        image->header.refcount_table_offset = offset;
        image->header.refcount_table_clusters = layout->table_clusters;
        code = qcow2_header_write_refcounts(file, &image->header);
    }
    if (code == 0) {
        code = edge_flush(file);
    }
    return code < 0 ? error_set_errno(repair->err, code, "Could not write the refcount table") : 0;
}

static void drop_use(struct qcow2_repair *repair, uint64_t cluster)
{
    uint32_t uses = qcow2_tally_get(&repair->census->uses, cluster);
    if (uses) {
        qcow2_tally_set(&repair->census->uses, cluster, uses - 1);
    }
}

/* The old structures are no longer in use. */
static void drop_old(struct qcow2_repair *repair)
{
    const struct qcow2_census *census = repair->census;
    for (unsigned i = 0; i < census->metadata->len; i++) {
        const struct qcow2_metadata_run *run = &g_array_index(census->metadata, struct qcow2_metadata_run, i);
        if (run->place == QCOW2_PLACE_REFCOUNT_TABLE || run->place == QCOW2_PLACE_REFCOUNT_BLOCK) {
            for (uint64_t n = 0; n < run->count; n++) {
                drop_use(repair, run->first + n);
            }
        }
    }
}

static int coroutine_fn rebuild(struct qcow2_repair *repair, bool raise_only)
{
    struct layout layout;
    drop_old(repair);
    plan(repair, &layout);
    if (!table_fits(repair->image, &layout)) {
        return error_set(repair->err, -EFBIG, "the image needs a refcount table of more than 8 MiB");
    }
    g_autofree uint64_t *table = g_try_new0(uint64_t, layout.entries);
    if (!table) {
        return error_set_errno(repair->err, -ENOMEM, "Could not rebuild the refcounts");
    }
    int code = write_blocks(repair, &layout, raise_only, table);
    return code == 0 ? switch_table(repair, &layout, table) : code;
}

int coroutine_fn qcow2_repair_refcount_width(struct qcow2_repair *repair, unsigned order)
{
    struct qcow2 *image = repair->image;
    struct qcow2_header *header = &image->header;
    struct qcow2_header old = *header;
    header->refcount_order = order;
    image->refcount_block_bits = image->cluster_bits + 3 - order;
    int code = rebuild(repair, false);
    if (code < 0) {
        header->refcount_order = old.refcount_order;
        header->refcount_table_offset = old.refcount_table_offset;
        header->refcount_table_clusters = old.refcount_table_clusters;
        image->refcount_block_bits = image->cluster_bits + 3 - old.refcount_order;
    }
    return code;
}

int coroutine_fn qcow2_repair_refcounts(struct qcow2_repair *repair, bool raise_only)
{
    if (!in_place(repair)) {
        return rebuild(repair, raise_only);
    }
    uint64_t regions = div_up(repair->end, block_count(repair->image));
    for (uint64_t region = next_region(repair, 0); region < regions; region = next_region(repair, region + 1)) {
        if (!has_block(repair, region) || find_change(repair, region, raise_only) == region_end(repair, region)) {
            continue;
        }
        int code = correct_block(repair, region, raise_only);
        if (code < 0) {
            return code;
        }
    }
    int code = edge_flush(repair->image->node->file);
    return code < 0 ? error_set_errno(repair->err, code, "Could not write the refcounts") : 0;
}

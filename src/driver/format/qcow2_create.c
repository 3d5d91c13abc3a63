/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Owns the making of an empty image, over an edge to its file. The layout, in clusters:
 *
 *     header | refcount table | refcount blocks | L1 table
 *
 * 1. The blocks count these clusters and nothing else; no L2 table exists yet.
 * 2. The header is written last, behind a flush, so that an interrupted creation leaves a file that is not an image
 *    rather than a bad one.
 *
 * It does not make the file, and does not preallocate.
 */
#include "driver/format/qcow2_create.h"
#include "base/size.h"
#include "block/request.h"
#include "driver/format/qcow2_header.h"
#include "driver/format/qcow2_refcount.h"
#include <endian.h>
#include <errno.h>
#include <glib.h>
#include <string.h>

/* In clusters. */
struct plan {
    uint64_t table, blocks, l1;
    uint64_t per_block; /* refcounts */
};

static uint64_t plan_total(const struct plan *plan)
{
    return 1 + plan->table + plan->blocks + plan->l1;
}

static void plan_layout(struct plan *plan, uint64_t cluster_size)
{
    plan->table = plan->blocks = 1;
    for (;;) {
        uint64_t blocks = div_up(plan_total(plan), plan->per_block);
        uint64_t table = div_up(blocks * 8, cluster_size);
        if (blocks <= plan->blocks && table <= plan->table) {
            return;
        }
        plan->blocks = max_u64(blocks, plan->blocks);
        plan->table = max_u64(table, plan->table);
    }
}

/* Defaults and limits. */
static int resolve(const struct qcow2_create_options *options, struct qcow2_header *header, struct error **err)
{
    unsigned refcount_bits = options->refcount_bits ? options->refcount_bits : 16;
    header->version = options->version ? options->version : 3;
    header->cluster_bits = options->cluster_bits ? options->cluster_bits : 16;
    header->size = options->size;
    if (header->version != 2 && header->version != 3) {
        return error_set(err, -EINVAL, "qcow2 has the versions 2 and 3, not %u", header->version);
    }
    if (header->cluster_bits < QCOW2_CLUSTER_BITS_MIN || header->cluster_bits > QCOW2_CLUSTER_BITS_MAX) {
        return error_set(err, -EINVAL, "Cluster size must be a power of two between 512 and 2048k");
    }
    if (!is_power_of_two(refcount_bits) || refcount_bits > 64) {
        return error_set(err, -EINVAL, "Refcount width must be a power of two and may not exceed 64 bits");
    }
    if (header->version == 2 && (refcount_bits != 16 || options->lazy_refcounts)) {
        return error_set(err, -EINVAL, "qcow2 version 2 has neither lazy refcounts nor other widths than 16 bits");
    }
    header->refcount_order = __builtin_ctz(refcount_bits);
    header->length = header->version == 2 ? QCOW2_HEADER_SIZE_V2 : sizeof(struct qcow2_disk_header);
    header->compatible = options->lazy_refcounts ? QCOW2_COMPATIBLE_LAZY_REFCOUNTS : 0;
    unsigned span_bits = 2 * header->cluster_bits - 3;
    uint64_t l1_size = (options->size >> span_bits) + !is_aligned(options->size, (uint64_t)1 << span_bits);
    if (options->size > INT64_MAX - (2u << 20) || l1_size * 8 > QCOW2_L1_BYTES_MAX) {
        return error_set(err, -EFBIG, "Image size is too large for clusters of %u bytes; use larger ones",
                         1u << header->cluster_bits);
    }
    if (options->size % QCOW2_SECTOR) {
        return error_set(err, -EINVAL, "Image size must be a multiple of 512 bytes");
    }
    header->l1_size = max_u64(1, l1_size);
    return 0;
}

static int coroutine_fn write_refcounts(struct edge *file, const struct qcow2_header *header, const struct plan *plan)
{
    uint64_t cluster_size = (uint64_t)1 << header->cluster_bits;
    g_autofree uint64_t *table = g_try_malloc0(plan->table * cluster_size);
    g_autofree void *block = g_try_malloc(cluster_size);
    if (!table || !block) {
        return -ENOMEM;
    }
    int code = 0;
    for (uint64_t i = 0; code == 0 && i < plan->blocks; i++) {
        uint64_t offset = (1 + plan->table + i) * cluster_size;
        memset(block, 0, cluster_size);
        uint64_t used = plan_total(plan) - min_u64(plan_total(plan), i * plan->per_block);
        for (uint64_t n = 0; n < min_u64(used, plan->per_block); n++) {
            qcow2_refcount_store(block, header->refcount_order, n, 1);
        }
        table[i] = htobe64(offset);
        code = edge_write_memory(file, offset, block, cluster_size, 0);
    }
    return code == 0 ? edge_write_memory(file, cluster_size, table, plan->table * cluster_size, 0) : code;
}

static int coroutine_fn write_image(struct edge *file, const struct qcow2_header *header, const struct plan *plan,
                                    const uint8_t *first_cluster)
{
    uint64_t cluster_size = (uint64_t)1 << header->cluster_bits;
    int code = write_refcounts(file, header, plan);
    if (code == 0) {
        code = edge_write_zeroes(file, header->l1_offset, plan->l1 * cluster_size, 0);
    }
    if (code == 0) {
        code = edge_flush(file);
    }
    if (code == 0) {
        code = edge_write_memory(file, 0, first_cluster, cluster_size, 0);
    }
    return code == 0 ? edge_flush(file) : code;
}

int coroutine_fn qcow2_create(struct edge *file, const struct qcow2_create_options *options, struct error **err)
{
    struct qcow2_header header;
    memset(&header, 0, sizeof(header));
    int code = resolve(options, &header, err);
    if (code < 0) {
        return code;
    }
    if (options->backing_file && strlen(options->backing_file) > QCOW2_BACKING_NAME_MAX) {
        return error_set(err, -EINVAL, "Backing file name is too long for qcow2");
    }
    if (options->backing_format && strlen(options->backing_format) >= 16) {
        return error_set(err, -EINVAL, "Backing format name '%s' is too long for qcow2", options->backing_format);
    }
    uint64_t cluster_size = (uint64_t)1 << header.cluster_bits;
    struct plan plan = {
        .per_block = cluster_size * 8 >> header.refcount_order,
        .l1 = div_up((uint64_t)header.l1_size * 8, cluster_size),
    };
    plan_layout(&plan, cluster_size);
    header.refcount_table_offset = cluster_size;
    header.refcount_table_clusters = plan.table;
    header.l1_offset = (1 + plan.table + plan.blocks) * cluster_size;
    uint64_t name_offset;
    g_autofree uint8_t *first = g_malloc0(cluster_size);
    code = qcow2_header_build(&header, options->backing_file, options->backing_format, first, &name_offset);
    if (code < 0) {
        return error_set(err, code, "The qcow2 header cluster has no room for the backing file name");
    }
    code = write_image(file, &header, &plan, first);
    return code < 0 ? error_set_errno(err, code, "Could not write the new qcow2 image") : 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How large a qcow2 file will be: what an empty one of the options would take once every cluster was written, and what
 * it takes with the content of a source. Nothing is made, and no more than block status is asked of the source.
 *
 * 1. Counted are the header (that of encryption too), L1 and all L2 tables, the refcounts of everything, and the data
 * clusters: all of them for `fully-allocated`; for `required` those that have data, not zeroes, in the source or below
 * it.
 * 2. The refcounts are counted for a fully allocated image in both, which is what converting needs at most.
 * 3. An image with a backing file may come to have any cluster of the source; one preallocated (falloc, full) has all.
 * 4. Persistent bitmaps are measured apart: they are copied only on demand.
 */
#include "base/size.h"
#include "block/bitmap.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/drivers.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_create.h"
#include <errno.h>
#include <string.h>

/* Bytes of everything but the data, for an image that has all of it. */
static uint64_t metadata_bytes(const struct qcow2_header *header)
{
    uint64_t cluster_size = (uint64_t)1 << header->cluster_bits;
    unsigned entry_bits = header->incompatible & QCOW2_INCOMPATIBLE_EXTENDED_L2 ? 4 : 3;
    uint64_t data = div_up(header->size, cluster_size);
    uint64_t l2 = div_up(data, cluster_size >> entry_bits);
    uint64_t counted = 1 + div_up(l2 * 8, cluster_size) + l2 + data;
    uint64_t per_block = cluster_size * 8 >> header->refcount_order;
    uint64_t blocks = 0, table = 0;
    for (;;) {
        uint64_t wanted_blocks = div_up(counted + blocks + table, per_block);
        uint64_t wanted_table = div_up(wanted_blocks * 8, cluster_size);
        if (wanted_blocks == blocks && wanted_table == table) {
            return (counted - data + blocks + table) * cluster_size;
        }
        blocks = wanted_blocks;
        table = wanted_table;
    }
}

/* Bytes of clusters that have something to copy. */
static int coroutine_fn data_bytes(struct backend *source, uint64_t size, uint64_t cluster_size, uint64_t *ret)
{
    uint64_t bytes = 0;
    for (uint64_t offset = 0; offset < size;) {
        struct extent extent;
        int code = backend_block_status(source, NULL, offset, size - offset, &extent);
        if (code < 0) {
            return code;
        }
        uint64_t end = offset + extent.bytes;
        if (extent.flags & EXTENT_DATA && !(extent.flags & EXTENT_ZERO)) {
            end = align_up(end, cluster_size);
            bytes += end - align_down(offset, cluster_size);
        }
        offset = end;
    }
    *ret = bytes;
    return 0;
}

/* What copies of the source's bitmaps would take. */
static uint64_t bitmap_bytes(const struct node *node, uint64_t cluster_size)
{
    uint64_t bytes = 0, directory = 0;
    list_for_each (link, &node->bitmaps) {
        const struct bitmap *bitmap = container_of(link, struct bitmap, link);
        if (!bitmap->persistent || bitmap_is_inconsistent(bitmap)) {
            continue;
        }
        uint64_t bits = div_up(atomic_load(&node->size), bitmap->granularity);
        uint64_t clusters = div_up(div_up(bits, 8), cluster_size);
        bytes += (clusters + div_up(clusters * 8, cluster_size)) * cluster_size;
        directory += align_up(sizeof(struct qcow2_disk_bitmap) + strlen(bitmap->name), 8);
    }
    return bytes + align_up(directory, cluster_size);
}

/* May the source have bitmaps that an image of this version can have too? */
static bool bitmaps_fit(const struct node *source, unsigned version)
{
    const struct qcow2 *image = source->driver == &driver_qcow2 ? source->state : NULL;
    return image && image->header.version >= 3 && version >= 3;
}

static int coroutine_fn measure_source(const struct qcow2_create_options *options, const struct qcow2_header *header,
                                       struct backend *source, struct block_measure_info *ret, struct error **err)
{
    const struct node *node = node_beneath_filters(backend_node(source));
    uint64_t cluster_size = (uint64_t)1 << header->cluster_bits;
    uint64_t all = align_up(header->size, cluster_size), data = all;
    if (!options->backing_file) {
        int code = data_bytes(source, min_u64(header->size, backend_size(source)), cluster_size, &data);
        if (code < 0) {
            return error_set_errno(err, code, "Could not find out what node '%s' has", node->name);
        }
    }
    ret->required += min_u64(data, all);
    ret->has_bitmaps = bitmaps_fit(node, header->version);
    ret->bitmaps = ret->has_bitmaps ? bitmap_bytes(node, cluster_size) : 0;
    return 0;
}

int coroutine_fn qcow2_measure(const struct blockdev_create_options *options, struct backend *source,
                               struct block_measure_info *ret, struct error **err)
{
    struct blockdev_create_options_qcow2 own = options->u.qcow2; /* borrows everything */
    struct qcow2_create_options resolved;
    struct qcow2_header header;
    struct block_measure_info info = {0};
    own.size = align_up(own.size, QCOW2_SECTOR);
    int code = qcow2_create_options_from(&own, &resolved, err);
    enum preallocation_mode mode = code == 0 ? resolved.preallocation : PREALLOCATION_MODE_OFF;
    resolved.preallocation = PREALLOCATION_MODE_OFF; /* with a backing file it cannot be made, but measured */
    if (code == 0) {
        code = qcow2_create_resolve(&resolved, &header, err);
    }
    if (code < 0) {
        return code;
    }
    uint64_t metadata = metadata_bytes(&header) + align_up(header.crypto_length, (uint64_t)1 << header.cluster_bits);
    info.fully_allocated = metadata + align_up(header.size, (uint64_t)1 << header.cluster_bits);
    info.required = metadata;
    if (source) {
        code = measure_source(&resolved, &header, source, &info, err);
    }
    if (mode == PREALLOCATION_MODE_FALLOC || mode == PREALLOCATION_MODE_FULL) {
        info.required = info.fully_allocated;
    }
    if (code == 0) {
        *ret = info;
    }
    return code;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Growing and shrinking. The new area reads as zeroes, whatever the backing file has there.
 *
 * 1. Growing: the L1 table moves if it is too short: new table, barrier, one write of the header that changes size,
 *    table and length together, barrier, old table freed. Before the size changes on disk, what could show through in
 *    the new area is hidden: the rest of the last cluster is zeroed, clusters over a longer backing file are marked
 *    zero, and so are clusters that stand behind the old end already. A crash leaves the old size, and behind it
 *    clusters that nobody sees, or the new one with the area hidden.
 * 2. What is preallocated comes after that: a crash in between leaves less of it.
 * 3. Shrinking: clusters behind the new end are freed first, then the header changes; tables stay as they are. Images
 *    with internal snapshots are not shrunk; of version 2 not grown either, for these do not know their own size.
 */
#include "driver/format/qcow2_resize.h"
#include "base/size.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_bitmap.h"
#include "driver/format/qcow2_flush.h"
#include "driver/format/qcow2_map.h"
#include "driver/format/qcow2_preallocate.h"
#include "driver/format/qcow2_refcount.h"
#include "driver/format/qcow2_write.h"
#include <endian.h>
#include <errno.h>
#include <string.h>

static uint64_t l1_entries_for(const struct qcow2 *image, uint64_t size)
{
    unsigned span_bits = image->l2_bits + image->cluster_bits;
    return (size >> span_bits) + !is_aligned(size, (uint64_t)1 << span_bits);
}

/* A longer L1 table in memory and on disk, not yet shown by the header. The lock is held. */
static int coroutine_fn prepare_l1(struct qcow2 *image, uint64_t entries, uint64_t **ret, uint64_t *ret_offset)
{
    uint64_t bytes = align_up(entries * 8, image->cluster_size);
    uint64_t *l1 = g_try_malloc0(bytes);
    uint64_t *disk = g_try_malloc0(bytes);
    edge_event(image->node->file, BLKDEBUG_EVENT_L1_GROW_ALLOC_TABLE);
    int code = l1 && disk ? qcow2_allocate_exactly(image, bytes >> image->cluster_bits, ret_offset) : -ENOMEM;
    if (code == 0) {
        for (uint64_t i = 0; i < image->header.l1_size; i++) {
            l1[i] = image->l1[i];
            disk[i] = htobe64(l1[i]);
        }
        edge_event(image->node->file, BLKDEBUG_EVENT_L1_GROW_WRITE_TABLE);
        code = edge_write_memory(image->node->file, *ret_offset, disk, bytes, 0);
        if (code < 0) {
            qcow2_release(image, *ret_offset, bytes >> image->cluster_bits);
        }
    }
    g_free(disk);
    if (code < 0) {
        g_free(l1);
        return code;
    }
    *ret = l1;
    return 0;
}

/* Writes the header with what is in it now; everything before is stable, and so is it. The lock is held. */
static int coroutine_fn write_header(struct qcow2 *image)
{
    int code = edge_flush(image->node->file);
    if (code == 0) {
        code = qcow2_header_write_size(image->node->file, &image->header);
    }
    return code == 0 ? edge_flush(image->node->file) : code;
}

/* Makes the image's size what is given, or leaves it. Takes the lock. */
static int coroutine_fn write_size(struct qcow2 *image, uint64_t size)
{
    uint64_t old = image->header.size;
    co_mutex_lock(&image->lock);
    image->header.size = size;
    int code = write_header(image);
    if (code < 0) {
        image->header.size = old;
        if (write_header(image) < 0 && size < old) {
            /* The header may show the lesser size: what is written behind that could be lost. */
            image->frozen = true;
            atomic_store(&image->corrupt, true);
        }
    }
    co_mutex_unlock(&image->lock);
    return code;
}

/* Makes the L1 table long enough for `size`; the header's size stays. The lock is held. */
static int coroutine_fn grow_l1(struct qcow2 *image, uint64_t size)
{
    uint64_t entries = l1_entries_for(image, size);
    struct qcow2_header old = image->header;
    uint64_t *l1 = NULL;
    uint64_t offset = 0;
    if (entries <= old.l1_size) {
        return 0;
    }
    /* All that the old table is to show is written, and so are the new one's refcounts. */
    int code = qcow2_write_metadata(image);
    if (code == 0) {
        code = prepare_l1(image, entries, &l1, &offset);
    }
    if (code < 0) {
        return code;
    }
    uint8_t *dirty = g_try_malloc0(div_up(entries, 64));
    code = dirty ? qcow2_write_metadata(image) : -ENOMEM;
    if (code < 0) {
        g_free(l1);
        g_free(dirty);
        qcow2_release(image, offset, div_up(entries * 8, image->cluster_size));
        return code;
    }
    image->header.l1_offset = offset;
    image->header.l1_size = entries;
    edge_event(image->node->file, BLKDEBUG_EVENT_L1_GROW_ACTIVATE_TABLE);
    code = write_header(image);
    if (code < 0) {
        /* Nobody knows which table the header shows now. */
        image->header = old;
        image->frozen = true;
        atomic_store(&image->corrupt, true);
        g_free(l1);
        g_free(dirty);
        return code;
    }
    g_free(image->l1);
    g_free(image->l1_dirty);
    image->l1 = l1;
    image->l1_dirty = dirty;
    image->l1_dirty_count = 0;
    if (old.l1_size) {
        qcow2_free(image, old.l1_offset, div_up((uint64_t)old.l1_size * 8, image->cluster_size), false);
    }
    return 0;
}

/* Where what is below may have data: guest offsets before this one. A backing file that the header names and that is
 * not open may be of any length. */
static uint64_t end_of_backing(const struct node *node)
{
    const struct qcow2 *image = node->state;
    return node->backing ? edge_size(node->backing) : image->header.backing_file ? UINT64_MAX : 0;
}

/* Makes a stretch of one kind read as zeroes, if it does not. */
static int coroutine_fn hide_run(struct node *node, uint64_t offset, const struct qcow2_run *run)
{
    struct qcow2 *image = node->state;
    uint64_t bytes = run->bytes, below = end_of_backing(node);
    if (run->kind == QCOW2_PLAIN_ZERO || run->kind == QCOW2_ALLOCATED_ZERO) {
        return 0;
    }
    if (run->kind == QCOW2_UNALLOCATED) {
        if (offset >= below) {
            return 0;
        }
        bytes = min_u64(bytes, below - offset);
    }
    if (image->external_raw) {
        return qcow2_write_zeroes(node, offset, bytes, REQUEST_MAY_UNMAP);
    }
    if (!is_aligned(offset, image->subcluster_size)) {
        return qcow2_write_zero_data(image, offset, bytes, 0);
    }
    bytes = align_up(bytes, image->subcluster_size);
    int code = qcow2_write_zeroes(node, offset, bytes, REQUEST_MAY_UNMAP);
    /* Version 2 has no zero clusters. */
    return code == -ENOTSUP ? qcow2_write_zero_data(image, offset, bytes, 0) : code;
}

/* Hides what would show in [from, to) of the new area: the rest of the last cluster, the backing file, and clusters
 * that stand behind the end already, left by whoever shrank the image or was stopped while growing it. */
static int coroutine_fn hide(struct node *node, uint64_t from, uint64_t to)
{
    struct qcow2 *image = node->state;
    while (from < to) {
        /* Part of a subcluster comes alone: it is written as data. */
        uint64_t in_subcluster = from & (image->subcluster_size - 1);
        uint64_t bytes = in_subcluster ? min_u64(to - from, image->subcluster_size - in_subcluster) : to - from;
        struct qcow2_run run;
        co_mutex_lock(&image->lock);
        int code = qcow2_lookup(image, from, bytes, &run);
        co_mutex_unlock(&image->lock);
        if (code == 0) {
            code = hide_run(node, from, &run);
        }
        if (code < 0) {
            return code;
        }
        from += run.bytes;
    }
    return 0;
}

/* Can the part of the last cluster that is new be told from the part that is old? Not if what the old part shows is in
 * a backing file that is not open. */
static int coroutine_fn check_last_cluster(struct node *node, uint64_t size, struct error **err)
{
    struct qcow2 *image = node->state;
    struct qcow2_run run;
    if (node->backing || !image->header.backing_file || is_aligned(size, image->subcluster_size)) {
        return 0;
    }
    co_mutex_lock(&image->lock);
    int code = qcow2_lookup(image, align_down(size, image->subcluster_size), 1, &run);
    co_mutex_unlock(&image->lock);
    if (code < 0) {
        return error_set_errno(err, code, "Could not resize node '%s'", node->name);
    }
    if (run.kind != QCOW2_UNALLOCATED) {
        return 0;
    }
    error_set(err, -ENOTSUP, "Node '%s' cannot grow while its backing file '%s' is not open", node->name,
              image->header.backing_file);
    error_hint(err, "The last cluster's data are in that file; open the node with its backing file");
    return -ENOTSUP;
}

/* A raw data file is as long as the image, and zero where the image is new. */
static int coroutine_fn grow_raw(struct node *node, uint64_t old, uint64_t size, enum preallocation_mode mode)
{
    struct edge *data = node->data;
    uint64_t there = edge_size(data);
    int code = there > old ? edge_write_zeroes(data, old, min_u64(there, size) - old, REQUEST_MAY_UNMAP) : 0;
    if (code == 0 && there < size) {
        mode = mode == PREALLOCATION_MODE_METADATA ? PREALLOCATION_MODE_OFF : mode;
        code = edge_grow(data, size, mode, NULL);
    }
    return code;
}

static int coroutine_fn shrink(struct node *node, uint64_t size, struct error **err)
{
    struct qcow2 *image = node->state;
    uint64_t old = image->header.size;
    if (image->header.snapshot_count) {
        return error_set(err, -ENOTSUP, "Node '%s' has internal snapshots and cannot be shrunk", node->name);
    }
    if (image->header.version < 3 && (node->backing || image->header.backing_file)) {
        return error_set(err, -ENOTSUP, "Node '%s' is of qcow2 version 2 and has a backing file: it cannot be shrunk",
                         node->name);
    }
    uint64_t first = qcow2_cluster_ceiling(image, size);
    int code = first < old ? qcow2_unmap(image, first, old - first, image->options.pass_discard, false) : 0;
    if (code == 0) {
        code = qcow2_flush(node);
    }
    if (code == 0) {
        code = write_size(image, size);
    }
    if (code < 0) {
        return error_set_errno(err, code, "Could not resize node '%s'", node->name);
    }
    atomic_store(&node->size, size);
    if (image->external_raw && edge_size(node->data) > size) {
        code = edge_truncate(node->data, size);
        return code < 0 ? error_set_errno(err, code, "Could not shorten the data file of node '%s'", node->name) : 0;
    }
    return 0;
}

/* The places are missing yet. */
static int coroutine_fn grow_empty(struct node *node, uint64_t size, enum preallocation_mode mode, struct error **err)
{
    struct qcow2 *image = node->state;
    uint64_t old = image->header.size;
    if (size > INT64_MAX - image->cluster_size || l1_entries_for(image, size) > QCOW2_L1_BYTES_MAX / 8) {
        return error_set(err, -EFBIG,
                         "Size %" G_GUINT64_FORMAT " is too large for node '%s' with clusters of %" G_GUINT64_FORMAT
                         " bytes",
                         size, node->name, image->cluster_size);
    }
    if (image->header.version < 3 && image->header.snapshot_count) {
        return error_set(err, -ENOTSUP, "Node '%s' is of qcow2 version 2 and has internal snapshots: it cannot grow",
                         node->name);
    }
    int code = check_last_cluster(node, old, err);
    if (code < 0) {
        return code;
    }
    co_mutex_lock(&image->lock);
    code = grow_l1(image, size);
    co_mutex_unlock(&image->lock);
    if (code == 0) {
        atomic_store(&node->size, size);
        code = image->external_raw ? grow_raw(node, old, size, mode) : 0;
    }
    if (code == 0) {
        code = hide(node, old, size);
    }
    if (code == 0) {
        code = qcow2_flush(node);
    }
    if (code == 0) {
        code = write_size(image, size);
    }
    if (code < 0) {
        atomic_store(&node->size, old);
        return error_set_errno(err, code, "Could not resize node '%s'", node->name);
    }
    return 0;
}

/* What could not be allocated leaves the size as it was. */
static int coroutine_fn grow(struct node *node, uint64_t size, enum preallocation_mode mode, struct error **err)
{
    struct qcow2 *image = node->state;
    uint64_t old = image->header.size;
    int code = grow_empty(node, size, mode, err);
    if (image->external_raw && mode == PREALLOCATION_MODE_OFF) {
        mode = PREALLOCATION_MODE_METADATA; /* what a raw reader writes to the data file is to show here */
    }
    if (code < 0 || mode == PREALLOCATION_MODE_OFF) {
        return code;
    }
    code = qcow2_preallocate(image, old, size - old, mode, err);
    if (code == 0) {
        code = qcow2_flush(node);
        if (code < 0) {
            error_set_errno(err, code, "Could not resize node '%s'", node->name);
        }
    }
    if (code < 0) {
        (void)shrink(node, old, NULL);
    }
    return code;
}

int coroutine_fn qcow2_grow(struct node *node, uint64_t size, enum preallocation_mode mode, struct error **err)
{
    struct qcow2 *image = node->state;
    if (size % QCOW2_SECTOR) {
        return error_set(err, -EINVAL, "The size of qcow2 node '%s' must be a multiple of 512 bytes", node->name);
    }
    int code = qcow2_prepare_write(image);
    if (code < 0) {
        return error_set_errno(err, code, "Could not resize node '%s'", node->name);
    }
    if (size == image->header.size) {
        return 0;
    }
    code = qcow2_bitmaps_begin_resize(image);
    if (code < 0) {
        return error_set_errno(err, code, "Could not resize node '%s'", node->name);
    }
    return size > image->header.size ? grow(node, size, mode, err) : shrink(node, size, err);
}

int coroutine_fn qcow2_truncate(struct node *node, uint64_t size, struct error **err)
{
    return qcow2_grow(node, size, PREALLOCATION_MODE_OFF, err);
}

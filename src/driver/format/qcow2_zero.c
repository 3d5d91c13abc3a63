/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Write-zeroes and discard: changes of L2 entries without guest data, slice by slice under the lock, after waiting for
 * allocations in flight in the way. Clusters that lose their place are freed (qcow2.h, 2). Partial clusters are
 * written as data, unless they read as zeroes already.
 *
 * Write-zeroes in version 3 sets the zero flag; a cluster of our own keeps its place unless the request may unmap.
 * Version 2 has no such flag: without a backing file a cluster can be unmapped (if the request allows it), otherwise
 * the request path is left to write zeroes. A discard makes clusters read as zeroes too, but only whole ones, and
 * never what would let older content of the backing file show through.
 */
#include "base/size.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_flush.h"
#include "driver/format/qcow2_map.h"
#include "driver/format/qcow2_write.h"
#include <errno.h>

/* How the entries of a request change. */
struct change {
    unsigned flags; /* of the request */
    bool discard;
    bool pass_down; /* a discard of the freed clusters */
};

/* Unallocated reads as zeroes, and will go on to: the header names no backing file either. */
static bool nothing_below(const struct qcow2 *image)
{
    return !image->node->backing && !image->header.backing_file;
}

/* What an entry becomes; *ret_free: its clusters are freed. */
static int change_entry(const struct qcow2 *image, const struct change *change, struct qcow2_entry entry, uint64_t *ret,
                        bool *ret_free)
{
    uint64_t old = entry.descriptor;
    enum qcow2_kind kind = qcow2_entry_kind(image, entry);
    bool zero_flag = image->header.version >= 3;
    bool below = !nothing_below(image);
    *ret = old;
    *ret_free = false;
    if (kind == QCOW2_INVALID) {
        return -EIO;
    }
    if (change->flags & REQUEST_IF_UNALLOCATED && kind != QCOW2_UNALLOCATED) {
        return 0;
    }
    if (kind == QCOW2_UNALLOCATED && (change->discard || (!zero_flag && !below))) {
        if (change->discard && below && zero_flag) {
            *ret = QCOW2_ZERO;
        }
        return 0;
    }
    if (!zero_flag && (below || !(change->discard || change->flags & REQUEST_MAY_UNMAP))) {
        return change->discard ? 0 : -ENOTSUP;
    }
    bool ours = old & QCOW2_COPIED && qcow2_kind_has_place(kind);
    bool keep = !change->discard && !(change->flags & REQUEST_MAY_UNMAP);
    if (ours && keep && zero_flag) {
        *ret = old | QCOW2_ZERO;
        return 0;
    }
    *ret = !zero_flag || (change->discard && !below) ? 0 : QCOW2_ZERO;
    *ret_free = true;
    return 0;
}

/* Changes the entries of the clusters from `offset` on, inside one slice. The lock is held. */
static int coroutine_fn change_slice(struct qcow2 *image, const struct change *change, uint64_t offset, uint64_t bytes,
                                     uint64_t *ret_bytes)
{
    if (nothing_below(image) || (change->discard && image->header.version < 3)) {
        *ret_bytes = qcow2_unmapped_span(image, offset, bytes);
        if (*ret_bytes) {
            return 0;
        }
    }
    void *entries;
    unsigned count;
    int code = qcow2_l2_for_write(image, offset, &entries, &count);
    if (code < 0) {
        return code;
    }
    uint64_t clusters = min_u64(count, div_up(bytes, image->cluster_size));
    bool changed = false;
    uint64_t i;
    for (i = 0; i < clusters; i++) {
        struct qcow2_entry old = qcow2_entry_load(image, entries, i);
        struct qcow2_entry new = {0};
        bool freed;
        code = change_entry(image, change, old, &new.descriptor, &freed);
        if (code < 0) {
            break;
        }
        if (!qcow2_entry_same(new, old)) {
            qcow2_entry_store(image, entries, i, new);
            changed = true;
        }
        if (freed) {
            qcow2_free_entry(image, old, change->pass_down);
        }
    }
    if (changed) {
        qcow2_map_changed(image, false);
    }
    if (code == -EIO) {
        uint64_t at = offset + (i << image->cluster_bits);
        return qcow2_mark_corrupt(image, "L2 entry of guest offset 0x%" G_GINT64_MODIFIER "x is invalid", at);
    }
    *ret_bytes = min_u64(bytes, clusters << image->cluster_bits);
    return code;
}

/* Whole clusters (the image's last one may be short). */
static int coroutine_fn change_clusters(struct qcow2 *image, const struct change *change, uint64_t offset,
                                        uint64_t bytes)
{
    while (bytes) {
        uint64_t some;
        co_mutex_lock(&image->lock);
        do {
            some = bytes;
        } while (qcow2_wait_for_allocations(image, offset, &some));
        uint64_t done = 0;
        int code = atomic_load(&image->corrupt) ? -EIO : change_slice(image, change, offset, some, &done);
        co_mutex_unlock(&image->lock);
        if (code < 0) {
            return code;
        }
        qcow2_settle(image);
        offset += done;
        bytes -= done;
    }
    return 0;
}

/* Part of one cluster. */
static int coroutine_fn zero_part(struct qcow2 *image, uint64_t offset, uint64_t bytes, unsigned flags)
{
    struct qcow2_run run;
    uint64_t some;
    co_mutex_lock(&image->lock);
    do {
        some = bytes;
    } while (qcow2_wait_for_allocations(image, offset, &some));
    int code = qcow2_lookup(image, offset, bytes, &run);
    co_mutex_unlock(&image->lock);
    if (code < 0 || run.kind == QCOW2_PLAIN_ZERO || run.kind == QCOW2_ALLOCATED_ZERO ||
        (run.kind == QCOW2_UNALLOCATED && nothing_below(image))) {
        return code;
    }
    return qcow2_write_zero_data(image, offset, bytes, flags & REQUEST_IF_UNALLOCATED);
}

int coroutine_fn qcow2_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    struct qcow2 *image = node->state;
    int code = qcow2_prepare_write(image);
    uint64_t in_cluster = qcow2_in_cluster(image, offset);
    if (code == 0 && in_cluster) {
        uint64_t part = min_u64(bytes, image->cluster_size - in_cluster);
        code = zero_part(image, offset, part, flags);
        offset += part;
        bytes -= part;
    }
    bool to_end = offset + bytes == atomic_load(&node->size);
    uint64_t whole = to_end ? bytes : qcow2_cluster_floor(image, bytes);
    if (code == 0 && whole) {
        struct change change = {.flags = flags, .pass_down = image->options.pass_discard_other};
        code = change_clusters(image, &change, offset, whole);
    }
    if (code == 0 && bytes > whole) {
        code = zero_part(image, offset + whole, bytes - whole, flags);
    }
    if (code == 0 && flags & REQUEST_FUA) {
        code = qcow2_flush(node);
    }
    return code;
}

int coroutine_fn qcow2_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    struct qcow2 *image = node->state;
    int code = qcow2_prepare_write(image);
    if (code < 0) {
        return code;
    }
    uint64_t first = qcow2_cluster_ceiling(image, offset);
    uint64_t end = offset + bytes;
    if (end < atomic_load(&node->size)) {
        end = qcow2_cluster_floor(image, end);
    }
    if (first >= end) {
        return 0;
    }
    struct change change = {.discard = true, .pass_down = image->options.pass_discard};
    return change_clusters(image, &change, first, end - first);
}

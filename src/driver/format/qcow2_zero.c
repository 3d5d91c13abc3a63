/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Write-zeroes and discard: changes of L2 entries without guest data, slice by slice under the lock, after waiting for
 * allocations in flight in the way. Clusters that lose their place are freed (qcow2.h, 2). Parts of a subcluster (of a
 * cluster, where there are none) are written as data, unless they read as zeroes already.
 *
 * Write-zeroes in version 3 sets the zero flag; a cluster of our own keeps its place unless the request may unmap.
 * Version 2 has no such flag: without a backing file a cluster can be unmapped (if the request allows it), otherwise
 * the request path is left to write zeroes. A discard makes clusters read as zeroes too, but only whole ones (or
 * subclusters), and never what would let older content of the backing file show through.
 *
 * Places that stay the cluster's (in a data file, or with discard-no-unref) are discarded before their entries change,
 * behind an allocation in flight: nobody writes there meanwhile, and after a crash either content may show.
 *
 * In a raw data file zeroes are written to the file, and the tables are left alone (unless somebody gave the image a
 * backing node for a while): what is unallocated reads as zeroes here, and now there too.
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
    bool keep;      /* clusters of our own keep their place when they are discarded */
    bool in_place;  /* ... and what stays the place of a cluster is discarded first */
};

/* Unallocated reads as zeroes, and will go on to: the header names no backing file either. */
static bool nothing_below(const struct qcow2 *image)
{
    return !image->node->backing && !image->header.backing_file;
}

/* Does a cluster of our own keep its host cluster? */
static bool keeps_place(const struct qcow2 *image, const struct change *change, struct qcow2_entry entry)
{
    bool ours = qcow2_entry_has_place(image, entry) && (image->external || entry.descriptor & QCOW2_COPIED);
    if (change->discard) {
        return ours && change->keep;
    }
    return ours && !(change->flags & REQUEST_MAY_UNMAP);
}

/* What an entry becomes; *ret_free: its clusters are freed. */
static int change_whole(const struct qcow2 *image, const struct change *change, struct qcow2_entry entry,
                        struct qcow2_entry *ret, bool *ret_free)
{
    uint64_t old = entry.descriptor;
    enum qcow2_kind kind = qcow2_entry_kind(image, entry);
    bool zero_flag = image->header.version >= 3;
    bool below = !nothing_below(image);
    *ret = entry;
    *ret_free = false;
    if (kind == QCOW2_INVALID) {
        return -EIO;
    }
    if (change->flags & REQUEST_IF_UNALLOCATED && kind != QCOW2_UNALLOCATED) {
        return 0;
    }
    bool may_skip = change->discard || change->flags & REQUEST_MAY_UNMAP;
    if (kind == QCOW2_UNALLOCATED && (change->discard || (!zero_flag && !below && may_skip))) {
        if (change->discard && below && zero_flag) {
            ret->descriptor = QCOW2_ZERO;
        }
        return 0;
    }
    if (!zero_flag && (below || !(change->discard || change->flags & REQUEST_MAY_UNMAP))) {
        return change->discard ? 0 : -ENOTSUP;
    }
    if (zero_flag && keeps_place(image, change, entry)) {
        ret->descriptor = old | QCOW2_ZERO;
        return 0;
    }
    ret->descriptor = !zero_flag || (change->discard && !below) ? 0 : QCOW2_ZERO;
    *ret_free = true;
    return 0;
}

/* The same of the subclusters in `mask`. 1: that cannot be done for a part of this cluster. */
static int change_split(const struct qcow2 *image, const struct change *change, struct qcow2_entry old, uint64_t mask,
                        struct qcow2_entry *ret, bool *ret_free)
{
    uint64_t allocated = old.subclusters & QCOW2_ALL_ALLOCATED;
    uint64_t zero = old.subclusters >> QCOW2_SUBCLUSTERS;
    bool compressed = old.descriptor & QCOW2_COMPRESSED;
    *ret = old;
    *ret_free = false;
    if (qcow2_entry_kind(image, old) == QCOW2_INVALID) {
        return -EIO;
    }
    if (change->flags & REQUEST_IF_UNALLOCATED) {
        mask &= compressed ? 0 : ~(allocated | zero);
    }
    if (mask == 0) {
        return 0;
    }
    if (compressed && mask != QCOW2_ALL_ALLOCATED) {
        return 1;
    }
    allocated &= ~mask;
    zero = change->discard && nothing_below(image) ? zero & ~mask : zero | mask;
    bool keep = allocated || keeps_place(image, change, old);
    *ret_free = !keep && (compressed || qcow2_entry_has_place(image, old));
    *ret = (struct qcow2_entry){keep ? old.descriptor : 0, allocated | zero << QCOW2_SUBCLUSTERS};
    return 0;
}

/* Changes the entries of what begins at `offset`, inside one slice. The lock is held. 1: *ret_bytes is a part of a
 * compressed cluster, which has not changed. */
static int coroutine_fn change_slice(struct qcow2 *image, const struct change *change, uint64_t offset, uint64_t bytes,
                                     uint64_t *ret_bytes)
{
    bool may_skip = change->discard || change->flags & REQUEST_MAY_UNMAP;
    if ((nothing_below(image) && may_skip) || (change->discard && image->header.version < 3)) {
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
    uint64_t start = qcow2_in_cluster(image, offset);
    uint64_t clusters = min_u64(count, div_up(start + bytes, image->cluster_size));
    uint64_t end = start + bytes;
    if (offset + bytes == atomic_load(&image->node->size)) {
        end = qcow2_cluster_ceiling(image, end); /* the image's last cluster is whole, however short */
    }
    bool changed = false;
    uint64_t i;
    for (i = 0; i < clusters && code == 0; i++) {
        struct qcow2_entry old = qcow2_entry_load(image, entries, i);
        struct qcow2_entry new;
        bool freed;
        if (qcow2_has_subclusters(image)) {
            uint64_t to = min_u64(image->cluster_size, end - (i << image->cluster_bits));
            uint64_t mask = qcow2_subcluster_mask(image, i == 0 ? start : 0, to);
            code = change_split(image, change, old, mask, &new, &freed);
        } else {
            code = change_whole(image, change, old, &new, &freed);
        }
        if (code != 0) {
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
        uint64_t at = offset - start + (i << image->cluster_bits);
        return qcow2_mark_corrupt(image, "L2 entry of guest offset 0x%" G_GINT64_MODIFIER "x is invalid", at);
    }
    if (code == 1 && i > 0) {
        code = 0; /* as far as it went */
    } else if (code == 1) {
        i = 1;
    }
    *ret_bytes = min_u64(bytes, (i << image->cluster_bits) - start);
    return code;
}

/* Discards the places in [offset, offset + bytes) that stay what they are. The lock is held, but not meanwhile; an
 * allocation of ours keeps others away. */
static int coroutine_fn discard_in_place(struct qcow2 *image, uint64_t offset, uint64_t bytes)
{
    while (bytes) {
        struct qcow2_run run = {.placed = true, .copied = true, .host_offset = offset, .bytes = bytes};
        int code = image->external ? 0 : qcow2_lookup(image, offset, bytes, &run);
        if (code < 0) {
            return code;
        }
        struct edge *edge = qcow2_data_edge(image);
        if (run.placed && run.copied && edge) {
            co_mutex_unlock(&image->lock);
            (void)edge_discard(edge, run.host_offset, run.bytes); /* a hint */
            co_mutex_lock(&image->lock);
        }
        offset += run.bytes;
        bytes -= run.bytes;
    }
    return 0;
}

/* The lock is held, but not while what keeps its place is discarded. */
static int coroutine_fn change_some(struct qcow2 *image, const struct change *change, uint64_t offset, uint64_t bytes,
                                    uint64_t *ret_bytes)
{
    if (!change->in_place) {
        return change_slice(image, change, offset, bytes, ret_bytes);
    }
    struct qcow2_allocation allocation = {.offset = qcow2_cluster_floor(image, offset)};
    allocation.bytes = qcow2_cluster_ceiling(image, offset + bytes) - allocation.offset;
    co_queue_init(&allocation.waiters);
    list_append(&image->allocations, &allocation.link);
    int code = discard_in_place(image, offset, bytes);
    *ret_bytes = 0;
    while (code == 0 && *ret_bytes < bytes) {
        uint64_t done = 0;
        code = change_slice(image, change, offset + *ret_bytes, bytes - *ret_bytes, &done);
        if (code == 1 && *ret_bytes > 0) {
            code = 0;
            break;
        }
        *ret_bytes += done;
    }
    list_remove(&allocation.link);
    co_queue_wake_all(&allocation.waiters);
    return code;
}

/* Whole subclusters (the image's last one may be short). */
static int coroutine_fn change_range(struct qcow2 *image, const struct change *change, uint64_t offset, uint64_t bytes)
{
    while (bytes) {
        uint64_t some;
        co_mutex_lock(&image->lock);
        do {
            some = bytes;
        } while (qcow2_wait_for_allocations(image, offset, &some));
        uint64_t done = 0;
        int code = atomic_load(&image->corrupt) ? -EIO : change_some(image, change, offset, some, &done);
        co_mutex_unlock(&image->lock);
        if (code == 1) {
            code = change->discard ? 0 : qcow2_write_zero_data(image, offset, done, 0);
        }
        if (code < 0) {
            return code;
        }
        qcow2_settle(image);
        offset += done;
        bytes -= done;
    }
    return 0;
}

/* Part of one subcluster. */
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
    if (code < 0 || qcow2_kind_is_zero(run.kind) ||
        (run.kind == QCOW2_UNALLOCATED && nothing_below(image) && flags & REQUEST_MAY_UNMAP)) {
        return code;
    }
    return qcow2_write_zero_data(image, offset, bytes, flags & REQUEST_IF_UNALLOCATED);
}

static int coroutine_fn zero_in_tables(struct qcow2 *image, uint64_t offset, uint64_t bytes, unsigned flags)
{
    uint64_t in_subcluster = offset & (image->subcluster_size - 1);
    int code = 0;
    if (in_subcluster) {
        uint64_t part = min_u64(bytes, image->subcluster_size - in_subcluster);
        code = zero_part(image, offset, part, flags);
        offset += part;
        bytes -= part;
    }
    bool to_end = offset + bytes == atomic_load(&image->node->size);
    uint64_t whole = to_end ? bytes : align_down(bytes, image->subcluster_size);
    if (code == 0 && whole) {
        struct change change = {.flags = flags, .pass_down = image->options.pass_discard_other};
        code = change_range(image, &change, offset, whole);
    }
    if (code == 0 && bytes > whole) {
        code = zero_part(image, offset + whole, bytes - whole, flags);
    }
    return code;
}

int coroutine_fn qcow2_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    struct qcow2 *image = node->state;
    int code = qcow2_prepare_write(image);
    if (code == 0 && image->external_raw && !(flags & REQUEST_IF_UNALLOCATED)) {
        unsigned passed = flags & (REQUEST_MAY_UNMAP | REQUEST_NO_FALLBACK);
        uint64_t inside = min_u64(bytes, atomic_load(&node->size) - offset);
        code = edge_write_zeroes(node->data, offset, inside, passed);
    }
    if (code == 0 && (!image->external_raw || node->backing)) {
        code = zero_in_tables(image, offset, bytes, flags);
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
    if (image->external_raw) {
        return image->options.pass_discard ? edge_discard(node->data, offset, bytes) : 0;
    }
    return qcow2_unmap(image, offset, bytes, image->options.pass_discard, image->options.discard_no_unref);
}

int coroutine_fn qcow2_unmap(struct qcow2 *image, uint64_t offset, uint64_t bytes, bool pass_down, bool keep)
{
    uint64_t first = align_up(offset, image->subcluster_size);
    uint64_t end = offset + bytes;
    if (end < atomic_load(&image->node->size)) {
        end = align_down(end, image->subcluster_size);
    }
    if (first >= end) {
        return 0;
    }
    struct change change = {
        .discard = true, .pass_down = pass_down, .keep = keep, .in_place = pass_down && (image->external || keep)};
    return change_range(image, &change, first, end - first);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Places for what was not written yet: for the part by which an image grows. It goes from stretch to stretch of guest
 * clusters without a place, inside one slice of an L2 table each.
 *
 * 1. The places are new ones at the end of the file, so they read as zeroes, as the guest's clusters do: nothing that
 *    shows changes, at any moment. In a data file, where places are given, zeroes are written where it is not new.
 * 2. The file (or the data file) is lengthened over the places, in the state asked for, before tables show them.
 * 3. With subclusters only the place is set: which subclusters are data stays as it is.
 *
 * Images that are made preallocated are laid out by qcow2_create.c.
 */
#include "driver/format/qcow2_preallocate.h"
#include "base/size.h"
#include "block/request.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_flush.h"
#include "driver/format/qcow2_map.h"
#include "driver/format/qcow2_refcount.h"
#include <errno.h>

/* Lengthens the file over [from, end), if it is not that long. */
static int coroutine_fn extend(struct edge *edge, uint64_t end, enum preallocation_mode mode, struct error **err)
{
    auto_error error = NULL;
    uint64_t size = edge_size(edge);
    bool holes = mode == PREALLOCATION_MODE_METADATA;
    if (end <= size) {
        return 0;
    }
    int code = edge_grow(edge, end, holes ? PREALLOCATION_MODE_OFF : mode, &error);
    if (code == -ENOTSUP && mode == PREALLOCATION_MODE_FULL) {
        code = edge_write_zeroes(edge, size, end - size, 0);
    } else if (code == -ENOTSUP && holes) {
        code = 0; /* what has a fixed size, or grows by itself */
    }
    return code < 0 ? error_move(err, g_steal_pointer(&error)) : 0;
}

/* Room for `clusters` of the guest's, from `guest` on. The lock is held. */
static int coroutine_fn take_room(struct qcow2 *image, uint64_t guest, uint64_t clusters, enum preallocation_mode mode,
                                  uint64_t *ret_host, struct error **err)
{
    uint64_t bytes = clusters << image->cluster_bits;
    if (!image->external) {
        int code = qcow2_allocate_exactly(image, clusters, ret_host);
        if (code < 0) {
            return error_set_errno(err, code, "Could not allocate clusters for node '%s'", image->node->name);
        }
        code = extend(image->node->file, *ret_host + bytes, mode, err);
        if (code < 0) {
            qcow2_release(image, *ret_host, clusters);
        }
        return code;
    }
    *ret_host = guest;
    uint64_t used_end = min_u64(min_u64(image->data_clean_from, edge_size(image->node->data)), guest + bytes);
    int code = guest < used_end ? edge_write_zeroes(image->node->data, guest, used_end - guest, 0) : 0;
    if (code < 0) {
        return error_set_errno(err, code, "Could not write zeroes to the data file of node '%s'", image->node->name);
    }
    image->data_clean_from = max_u64(image->data_clean_from, guest + bytes);
    /* The image's end may be inside the last cluster. */
    return extend(image->node->data, min_u64(guest + bytes, atomic_load(&image->node->size)), mode, err);
}

static bool wants_place(const struct qcow2 *image, struct qcow2_entry entry)
{
    return !(entry.descriptor & QCOW2_COMPRESSED) && !qcow2_entry_has_place(image, entry) &&
           qcow2_entry_kind(image, entry) != QCOW2_INVALID;
}

/* From `offset`, a cluster's, inside one slice; *ret_bytes: how far it went. The lock is held. */
static int coroutine_fn preallocate_some(struct qcow2 *image, uint64_t offset, uint64_t bytes,
                                         enum preallocation_mode mode, uint64_t *ret_bytes, struct error **err)
{
    void *entries;
    unsigned count;
    uint64_t host = 0;
    int code = qcow2_l2_for_write(image, offset, &entries, &count);
    if (code < 0) {
        return error_set_errno(err, code, "Could not allocate clusters for node '%s'", image->node->name);
    }
    uint64_t limit = min_u64(count, div_up(bytes, image->cluster_size));
    uint64_t run = 0;
    bool wanted = wants_place(image, qcow2_entry_load(image, entries, 0));
    while (run < limit && wants_place(image, qcow2_entry_load(image, entries, run)) == wanted) {
        run++;
    }
    *ret_bytes = min_u64(bytes, run << image->cluster_bits);
    if (!wanted) {
        return 0;
    }
    code = take_room(image, offset, run, mode, &host, err);
    if (code < 0) {
        return code;
    }
    code = qcow2_l2_for_write(image, offset, &entries, &count);
    if (code < 0) {
        if (!image->external) {
            qcow2_release(image, host, run);
        }
        return error_set_errno(err, code, "Could not allocate clusters for node '%s'", image->node->name);
    }
    for (uint64_t i = 0; i < run; i++) {
        struct qcow2_entry entry = qcow2_entry_load(image, entries, i);
        entry.descriptor = (host + (i << image->cluster_bits)) | QCOW2_COPIED;
        if (image->crypto && !qcow2_has_subclusters(image)) {
            entry.descriptor |= QCOW2_ZERO; /* zeroes do not decrypt to zeroes */
        }
        qcow2_entry_store(image, entries, i, entry);
    }
    qcow2_map_changed(image, true);
    return 0;
}

int coroutine_fn qcow2_preallocate(struct qcow2 *image, uint64_t offset, uint64_t bytes, enum preallocation_mode mode,
                                   struct error **err)
{
    uint64_t end = offset + bytes;
    if (image->crypto && image->header.version < 3) {
        return error_set(err, -ENOTSUP,
                         "Encrypted qcow2 images of version 2 cannot be preallocated: they have no mark for zeroes");
    }
    offset = qcow2_cluster_ceiling(image, offset); /* part of a cluster may show the backing file */
    while (offset < end) {
        uint64_t done = 0;
        co_mutex_lock(&image->lock);
        int code = preallocate_some(image, offset, end - offset, mode, &done, err);
        co_mutex_unlock(&image->lock);
        if (code < 0) {
            return code;
        }
        offset += done;
        qcow2_settle(image);
    }
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Compressed clusters. They lie one behind the other in host clusters, at any byte, also across the border of two that
 * are neighbours; each host cluster's refcount counts the compressed clusters that have bytes in it.
 *
 * 1. A cluster that is written compressed is an allocation in flight (qcow2.h, 1) from before it is packed, so nobody
 *    else gives it a place meanwhile. Its refcounts and its data come before its L2 entry, as those of any other.
 * 2. image->compressed_next is where the next one goes: inside a host cluster that has compressed data and room (or 0).
 *    The cluster counts only what uses it, so it may become free under our hands: then compressed_next is given up
 *    (qcow2_compressed_leave()), before anybody else gets the cluster or its discard is passed down.
 * 3. Bytes are given out once: what was written before a failure, or was freed, stays unused until all of its host
 *    cluster is free.
 * 4. Whoever waits for a codec holds no lock; whoever has one waits for no allocation in flight.
 *
 * Packing and unpacking are qcow2_codec.c's, on the worker pool, several clusters of one request side by side. A
 * cluster that was read in part is kept with its codec for the next part of it.
 *
 * What an entry says of its length is rounded up to sectors, and may reach behind the end of the file; the stream
 * itself says where it ends.
 */
#include "driver/format/qcow2_compressed.h"
#include "base/size.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_codec.h"
#include "driver/format/qcow2_flush.h"
#include "driver/format/qcow2_map.h"
#include "driver/format/qcow2_refcount.h"
#include "driver/format/qcow2_write.h"
#include <errno.h>
#include <string.h>

/* --- reading --- */

/* The whole cluster to `to`. */
static int coroutine_fn load_cluster(struct qcow2 *image, struct qcow2_codec *codec, uint64_t descriptor, uint8_t *to)
{
    uint64_t place;
    uint64_t stored;
    qcow2_compressed_place(image->cluster_bits, descriptor, &place, &stored);
    int code = edge_read_memory(image->node->file, place, qcow2_codec_packed(codec), stored);
    return code == 0 ? qcow2_codec_unpack(codec, stored, to) : code;
}

int coroutine_fn qcow2_compressed_read(struct qcow2 *image, uint64_t descriptor, uint64_t in_cluster, uint64_t bytes,
                                       struct buffers to)
{
    uint64_t key = descriptor | QCOW2_COMPRESSED;
    struct qcow2_codec *codec = qcow2_codec_take(image->codecs, key);
    if (!codec) {
        return -ENOMEM;
    }
    uint8_t *cluster = qcow2_codec_cluster(codec);
    uint8_t *whole = bytes == image->cluster_size ? buffers_contiguous(to, bytes) : NULL;
    bool kept = qcow2_codec_kept(codec) == key;
    int code = 0;
    if (!kept) {
        if (!whole) {
            qcow2_codec_keep(codec, 0);
        }
        code = load_cluster(image, codec, descriptor, whole ? whole : cluster);
    }
    if (code == 0 && (kept || !whole)) {
        buffers_copy_in(to, cluster + in_cluster, bytes);
        /* Once its end was read, nobody is likely to ask for it again. */
        qcow2_codec_keep(codec, in_cluster + bytes < image->cluster_size ? key : 0);
    }
    qcow2_codec_give(image->codecs, codec);
    return code;
}

struct inflation {
    struct qcow2_inflating *of;
    uint64_t descriptor, in_cluster, bytes;
    struct buffers to;
    unsigned parity;
};

static void coroutine_fn inflation_run(const struct inflation *inflation)
{
    struct qcow2_inflating *of = inflation->of;
    int none = 0;
    int code =
        qcow2_compressed_read(of->image, inflation->descriptor, inflation->in_cluster, inflation->bytes, inflation->to);
    qcow2_epoch_leave(of->image, inflation->parity);
    if (code < 0) {
        atomic_compare_exchange_strong(&of->code, &none, code);
    }
}

static void coroutine_fn inflation_entry(void *argument)
{
    struct inflation inflation = *(struct inflation *)argument; /* whose memory goes at the first yield */
    struct qcow2_inflating *of = inflation.of;
    inflation_run(&inflation);
    of->running--;
    co_group_leave(&of->group);
}

void qcow2_inflating_begin(struct qcow2_inflating *inflating, struct qcow2 *image)
{
    *inflating = (struct qcow2_inflating){.image = image};
    co_group_init(&inflating->group);
}

void coroutine_fn qcow2_inflating_read(struct qcow2_inflating *inflating, uint64_t descriptor, uint64_t in_cluster,
                                       uint64_t bytes, struct buffers to, unsigned parity)
{
    struct inflation inflation = {inflating, descriptor, in_cluster, bytes, to, parity};
    if (inflating->running + 1 >= qcow2_codecs_limit(inflating->image->codecs)) {
        inflation_run(&inflation);
        return;
    }
    inflating->running++;
    co_group_enter(&inflating->group);
    coroutine_enter(coroutine_create(inflation_entry, &inflation));
}

int coroutine_fn qcow2_inflating_end(struct qcow2_inflating *inflating)
{
    co_group_wait(&inflating->group);
    co_group_destroy(&inflating->group);
    return atomic_load(&inflating->code);
}

/* --- places --- */

void qcow2_compressed_leave(struct qcow2 *image, uint64_t cluster)
{
    if (image->compressed_next && image->compressed_next >> image->cluster_bits == cluster) {
        image->compressed_next = 0;
    }
}

static void take_bytes(struct qcow2 *image, uint64_t offset, uint64_t bytes)
{
    uint64_t end = offset + bytes;
    image->compressed_next = qcow2_in_cluster(image, end) ? end : 0;
}

/* A place for `bytes`, less than a cluster. The lock is held. */
static int coroutine_fn place_bytes(struct qcow2 *image, uint64_t bytes, uint64_t *ret)
{
    uint64_t next = image->compressed_next;
    uint64_t room = next ? image->cluster_size - qcow2_in_cluster(image, next) : 0;
    if (bytes <= room) {
        int code = qcow2_refcount_add(image, next >> image->cluster_bits, 1, 1);
        if (code != -ERANGE) { /* else the refcount is as high as it can be */
            *ret = next;
            take_bytes(image, next, bytes);
            return code;
        }
        room = 0;
    }
    uint64_t host;
    uint64_t clusters;
    bool clean;
    int code = qcow2_allocate(image, 1, &host, &clusters, &clean);
    if (code < 0) {
        return code;
    }
    *ret = host;
    if (room && host == next + room && image->compressed_next == next &&
        qcow2_refcount_add(image, next >> image->cluster_bits, 1, 1) == 0) {
        *ret = next;
    }
    take_bytes(image, *ret, bytes);
    return 0;
}

/* Gives back what no entry has shown. The lock is held. */
static void coroutine_fn release_bytes(struct qcow2 *image, uint64_t offset, uint64_t bytes)
{
    uint64_t first = qcow2_cluster_floor(image, offset);
    qcow2_release(image, first, (qcow2_cluster_ceiling(image, offset + bytes) - first) >> image->cluster_bits);
}

/* --- writing --- */

/* One cluster on its way. */
struct packing {
    struct qcow2 *image;
    struct qcow2_codec *codec;
    uint64_t offset; /* of the guest */
    uint64_t bytes;  /* a cluster's, or less at the end of the image */
    struct buffers from;
    unsigned flags;
    uint64_t place;
    size_t packed;
    bool plain; /* it is to be written as it is */
};

/* False: too far away for an entry to say. */
static bool describe_place(const struct qcow2 *image, uint64_t place, uint64_t bytes, uint64_t *ret_descriptor)
{
    unsigned offset_bits = 62 - (image->cluster_bits - 8);
    uint64_t sectors = (place + bytes - 1) / QCOW2_SECTOR - place / QCOW2_SECTOR;
    *ret_descriptor = QCOW2_COMPRESSED | sectors << offset_bits | place;
    return place >> offset_bits == 0;
}

/* Packs it, unless it does not become smaller. */
static int coroutine_fn pack(struct packing *packing)
{
    const struct qcow2 *image = packing->image;
    const uint8_t *cluster = NULL;
    if (packing->bytes == image->cluster_size) {
        cluster = buffers_contiguous(packing->from, packing->bytes);
    }
    if (!cluster) {
        uint8_t *copy = qcow2_codec_cluster(packing->codec);
        qcow2_codec_keep(packing->codec, 0);
        buffers_copy_out(packing->from, copy, packing->bytes);
        memset(copy + packing->bytes, 0, image->cluster_size - packing->bytes);
        cluster = copy;
    }
    int code = qcow2_codec_pack(packing->codec, cluster, &packing->packed);
    packing->plain = code == -ENOSPC;
    return packing->plain ? 0 : code;
}

/* The data are written: shows them. The lock is held. */
static int coroutine_fn link_packed(struct packing *packing, uint64_t descriptor)
{
    struct qcow2 *image = packing->image;
    void *entries;
    unsigned count;
    edge_event(image->node->file, BLKDEBUG_EVENT_L2_UPDATE_COMPRESSED);
    int code = qcow2_l2_for_write(image, packing->offset, &entries, &count);
    if (code < 0) {
        return code;
    }
    qcow2_codecs_forget(image->codecs, descriptor);
    qcow2_entry_store(image, entries, 0, (struct qcow2_entry){descriptor, 0});
    qcow2_map_changed(image, true);
    return 0;
}

/* Gives the packed cluster a place, writes and shows it. The cluster is an allocation in flight, and has no place. */
static int coroutine_fn store_packed(struct packing *packing)
{
    struct qcow2 *image = packing->image;
    uint64_t descriptor = 0;
    co_mutex_lock(&image->lock);
    edge_event(image->node->file, BLKDEBUG_EVENT_CLUSTER_ALLOC_BYTES);
    int code = place_bytes(image, packing->packed, &packing->place);
    if (code < 0) {
        co_mutex_unlock(&image->lock);
        return code;
    }
    packing->plain = !describe_place(image, packing->place, packing->packed, &descriptor);
    if (!packing->plain) {
        unsigned parity = qcow2_epoch_enter(image);
        co_mutex_unlock(&image->lock);
        edge_event(image->node->file, BLKDEBUG_EVENT_WRITE_COMPRESSED);
        code = edge_write_memory(image->node->file, packing->place, qcow2_codec_packed(packing->codec), packing->packed,
                                 0);
        qcow2_epoch_leave(image, parity);
        co_mutex_lock(&image->lock);
        if (code == 0) {
            code = link_packed(packing, descriptor);
        }
    }
    if (code < 0 || packing->plain) {
        release_bytes(image, packing->place, packing->packed);
    }
    co_mutex_unlock(&image->lock);
    return code;
}

/* May it be written compressed? 0, if need be with packing->plain (of a cluster with subclusters, some have data and
 * others nothing); 1: nothing is to be done; or why not. The lock is held. */
static int coroutine_fn look(struct packing *packing)
{
    struct qcow2 *image = packing->image;
    struct qcow2_run run;
    uint64_t some;
    do {
        some = packing->bytes;
    } while (qcow2_wait_for_allocations(image, packing->offset, &some));
    if (atomic_load(&image->corrupt)) {
        return -EIO;
    }
    bool placed = false;
    bool decided = false; /* something is shown that is the cluster's own */
    bool open = false;    /* something is not */
    for (uint64_t done = 0; done < packing->bytes; done += run.bytes) {
        int code = qcow2_lookup(image, packing->offset + done, packing->bytes - done, &run);
        if (code < 0) {
            return code;
        }
        placed = placed || run.placed || (run.kind != QCOW2_UNALLOCATED && run.kind != QCOW2_PLAIN_ZERO);
        decided = decided || run.kind != QCOW2_UNALLOCATED;
        open = open || run.kind == QCOW2_UNALLOCATED;
    }
    if (packing->flags & REQUEST_IF_UNALLOCATED) {
        packing->plain = placed || decided;
        return !open;
    }
    packing->plain = placed && open;
    return placed && !open ? -EIO : 0;
}

static int coroutine_fn pack_and_store(struct packing *packing)
{
    struct qcow2_codecs *codecs = packing->image->codecs;
    packing->codec = qcow2_codec_take(codecs, 0);
    if (!packing->codec) {
        return -ENOMEM;
    }
    int code = pack(packing);
    if (code == 0 && !packing->plain) {
        code = store_packed(packing);
    }
    qcow2_codec_give(codecs, packing->codec);
    return code;
}

static int coroutine_fn write_cluster(struct packing *packing)
{
    struct qcow2 *image = packing->image;
    struct qcow2_allocation allocation = {.offset = packing->offset, .bytes = image->cluster_size};
    co_mutex_lock(&image->lock);
    int code = look(packing);
    if (code != 0) {
        co_mutex_unlock(&image->lock);
        return MIN(code, 0);
    }
    if (!packing->plain) {
        co_queue_init(&allocation.waiters);
        list_append(&image->allocations, &allocation.link);
        co_mutex_unlock(&image->lock);
        code = pack_and_store(packing);
        co_mutex_lock(&image->lock);
        list_remove(&allocation.link);
        co_queue_wake_all(&allocation.waiters);
    }
    co_mutex_unlock(&image->lock);
    if (code == 0 && packing->plain) {
        code = qcow2_write_plain(image, packing->offset, packing->bytes, packing->from, packing->flags);
    }
    return code;
}

/* The clusters of one request. */
struct packings {
    struct co_group group;
    atomic_uint running;
    atomic_int code;
};
struct packing_start {
    struct packings *of;
    struct packing packing;
};

static void coroutine_fn packing_entry(void *argument)
{
    struct packing_start start = *(struct packing_start *)argument; /* whose memory goes at the first yield */
    int none = 0;
    int code = write_cluster(&start.packing);
    if (code < 0) {
        atomic_compare_exchange_strong(&start.of->code, &none, code);
    }
    start.of->running--;
    co_group_leave(&start.of->group);
}

static void coroutine_fn start_packing(struct packings *packings, const struct packing *packing, bool last)
{
    struct packing_start start = {packings, *packing};
    packings->running++;
    co_group_enter(&packings->group);
    if (last || packings->running >= qcow2_codecs_limit(packing->image->codecs)) {
        packing_entry(&start);
    } else {
        coroutine_enter(coroutine_create(packing_entry, &start));
    }
}

int coroutine_fn qcow2_compressed_write(struct qcow2 *image, uint64_t offset, uint64_t bytes, struct buffers from,
                                        unsigned flags)
{
    uint64_t end = offset + bytes;
    struct packings packings = {.code = 0};
    if (image->external) {
        return -ENOTSUP; /* a cluster's place there is its guest offset */
    }
    if (qcow2_in_cluster(image, offset) || (qcow2_in_cluster(image, end) && end != atomic_load(&image->node->size))) {
        return -EINVAL;
    }
    co_group_init(&packings.group);
    while (bytes && atomic_load(&packings.code) == 0) {
        struct packing packing = {.image = image,
                                  .offset = offset,
                                  .bytes = min_u64(bytes, image->cluster_size),
                                  .from = from,
                                  .flags = flags};
        bytes -= packing.bytes;
        start_packing(&packings, &packing, bytes == 0);
        offset += packing.bytes;
        if (bytes) {
            from = buffers_advance(from, packing.bytes);
        }
    }
    co_group_wait(&packings.group);
    co_group_destroy(&packings.group);
    return atomic_load(&packings.code);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Writing guest data. A write is a sequence of steps; each is decided under the lock:
 *
 * - in place, into clusters that are ours alone: like a read, in an epoch, without the lock;
 * - by allocation, where there is no cluster, or a shared, compressed or zero one. The new clusters are taken and an
 *   allocation in flight is registered under the lock; without it, what the guest does not overwrite of the first and
 *   the last cluster is read from where it is now, and all of it goes to the file in one write; under the lock again
 *   the L2 entries are set and the old clusters freed.
 *
 * 1. A mapping changes from here only between the registration and its end, so no write is lost between the reading
 *    of the old content and the linking of the new.
 * 2. A request holds one allocation at a time and waits only while it holds none: no deadlock.
 * 3. Clusters of the file that were never written read as zeroes, so zeroes are not written there.
 * 4. An entry is set only after its data are written; that they are stable before it is, is qcow2_flush.c's part.
 * 5. REQUEST_IF_UNALLOCATED decides and registers under one hold of the lock, so it is atomic against other writes.
 */
#include "driver/format/qcow2_write.h"
#include "base/size.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_compressed.h"
#include "driver/format/qcow2_flush.h"
#include "driver/format/qcow2_map.h"
#include "driver/format/qcow2_read.h"
#include "driver/format/qcow2_refcount.h"
#include <errno.h>
#include <limits.h>
#include <string.h>

static uint8_t zeroes[64 << 10]; /* never written; backs as many iovecs as are needed */

bool coroutine_fn qcow2_wait_for_allocations(struct qcow2 *image, uint64_t offset, uint64_t *bytes)
{
    uint64_t start = qcow2_cluster_floor(image, offset);
    list_for_each (link, &image->allocations) {
        struct qcow2_allocation *other = container_of(link, struct qcow2_allocation, link);
        if (other->offset + other->bytes <= start || other->offset >= offset + *bytes) {
            continue;
        }
        if (other->offset <= start) {
            co_queue_wait(&other->waiters, &image->lock);
            return true;
        }
        *bytes = other->offset - offset;
    }
    return false;
}

/* One step by allocation. */
struct step {
    struct qcow2 *image;
    uint64_t offset, bytes; /* of the guest's data */
    struct buffers from;
    struct qcow2_run run; /* what is there now */
    uint64_t first;       /* guest offset of the first cluster */
    uint64_t clusters;
    uint64_t host;       /* of the first cluster */
    bool reused;         /* the host clusters were the guest's before, marked zero */
    bool clean;          /* they read as zeroes */
    uint64_t head, tail; /* bytes around the guest's */
    uint8_t *around;     /* head and tail, if they are not zero */
    bool head_zero, tail_zero;
};

/* Fills `to` with what the step's clusters show at `offset`; nothing but zeroes shows behind the image's end. */
static int coroutine_fn read_around(struct step *step, uint64_t offset, uint64_t bytes, uint8_t *to)
{
    struct qcow2_run run = step->run;
    uint64_t size = atomic_load(&step->image->node->size);
    uint64_t inside = offset < size ? min_u64(bytes, size - offset) : 0;
    memset(to + inside, 0, bytes - inside);
    if (inside == 0) {
        return 0;
    }
    if (run.kind == QCOW2_DATA) {
        run.host_offset += offset - step->offset; /* may well be before it */
    }
    struct iovec iov = {to, inside};
    return qcow2_read_run(step->image, &run, offset, inside, buffers_one(&iov));
}

static int coroutine_fn prepare_around(struct step *step)
{
    struct qcow2 *image = step->image;
    uint64_t end = step->first + (step->clusters << image->cluster_bits);
    step->head = step->offset - step->first;
    step->tail = end - (step->offset + step->bytes);
    step->head_zero = step->tail_zero = true;
    bool zero = step->run.kind == QCOW2_PLAIN_ZERO || step->run.kind == QCOW2_ALLOCATED_ZERO ||
                (step->run.kind == QCOW2_UNALLOCATED && !image->node->backing);
    if (zero || step->head + step->tail == 0) {
        return 0;
    }
    step->around = g_try_malloc(step->head + step->tail);
    if (!step->around) {
        return -ENOMEM;
    }
    edge_event(image->node->file, BLKDEBUG_EVENT_COW_READ);
    int code = step->head ? read_around(step, step->first, step->head, step->around) : 0;
    if (code == 0 && step->tail) {
        code = read_around(step, step->offset + step->bytes, step->tail, step->around + step->head);
    }
    if (code == 0) {
        step->head_zero = memory_is_zero(step->around, step->head);
        step->tail_zero = memory_is_zero(step->around + step->head, step->tail);
    }
    return code;
}

/* Appends `bytes` of `memory`, or of zeroes if it is NULL. */
static unsigned append_iov(struct iovec *iov, unsigned count, void *memory, uint64_t bytes)
{
    while (bytes) {
        uint64_t part = memory ? bytes : min_u64(bytes, sizeof(zeroes));
        iov[count++] = (struct iovec){memory ? memory : zeroes, part};
        bytes -= part;
    }
    return count;
}

static int coroutine_fn write_step(struct step *step)
{
    bool skip_head = step->clean && step->head_zero;
    bool skip_tail = step->clean && step->tail_zero;
    uint64_t head = skip_head ? 0 : step->head;
    uint64_t tail = skip_tail ? 0 : step->tail;
    struct edge *file = step->image->node->file;
    uint64_t at = step->host + (step->head - head);
    edge_event(step->image->node->file, head + tail ? BLKDEBUG_EVENT_COW_WRITE : BLKDEBUG_EVENT_WRITE_AIO);
    if (head + tail == 0) {
        return edge_write(file, at, step->bytes, step->from, 0);
    }
    unsigned room = step->from.count + 2 + (head + tail) / sizeof(zeroes) + 2;
    struct iovec few[32];
    g_autofree struct iovec *many = NULL;
    struct iovec *iov = few;
    if (room > G_N_ELEMENTS(few)) {
        many = room <= IOV_MAX ? g_try_new(struct iovec, room) : NULL;
        iov = many;
    }
    g_autofree uint8_t *bounce = NULL;
    unsigned count = 0;
    if (iov) {
        count = append_iov(iov, 0, step->head_zero ? NULL : step->around, head);
        count += buffers_to_iov(step->from, step->bytes, iov + count, step->from.count);
    } else {
        bounce = g_try_malloc(step->bytes);
        if (!bounce) {
            return -ENOMEM;
        }
        iov = few; /* clusters have at most 2 MiB: head and tail take 64 zero pieces at most */
        buffers_copy_out(step->from, bounce, step->bytes);
        int code = edge_write_memory(file, step->host + step->head, bounce, step->bytes, 0);
        for (uint64_t done = 0; code == 0 && done < head;) {
            uint64_t part = min_u64(head - done, sizeof(zeroes));
            code = edge_write_memory(file, step->host + done, step->head_zero ? zeroes : step->around + done, part, 0);
            done += part;
        }
        for (uint64_t done = 0; code == 0 && done < tail;) {
            uint64_t part = min_u64(tail - done, sizeof(zeroes));
            code = edge_write_memory(file, step->host + step->head + step->bytes + done,
                                     step->tail_zero ? zeroes : step->around + step->head + done, part, 0);
            done += part;
        }
        return code;
    }
    count = append_iov(iov, count, step->tail_zero ? NULL : step->around + step->head, tail);
    return edge_write(file, at, head + step->bytes + tail, (struct buffers){iov, count, 0}, 0);
}

/* The data are written: shows them. The lock is held. */
static int coroutine_fn link_step(struct step *step)
{
    struct qcow2 *image = step->image;
    uint64_t done = 0;
    while (done < step->clusters) {
        void *entries;
        unsigned count;
        int code = qcow2_l2_for_write(image, step->first + (done << image->cluster_bits), &entries, &count);
        if (code < 0) {
            return code; /* only before anything was linked: a step stays inside a slice */
        }
        for (unsigned i = 0; i < count && done < step->clusters; i++, done++) {
            struct qcow2_entry old = qcow2_entry_load(image, entries, i);
            struct qcow2_entry new = {(step->host + (done << image->cluster_bits)) | QCOW2_COPIED, 0};
            qcow2_entry_store(image, entries, i, new);
            if (!step->reused) {
                qcow2_free_entry(image, old, image->options.pass_discard_other);
            }
        }
        qcow2_map_changed(image, true);
    }
    return 0;
}

/* Finds clusters for the step, cutting it to what there is in one piece. The lock is held. */
static int coroutine_fn place_step(struct step *step)
{
    struct qcow2 *image = step->image;
    void *entries;
    unsigned count;
    step->first = qcow2_cluster_floor(image, step->offset);
    uint64_t end = qcow2_cluster_ceiling(image, step->offset + step->bytes);
    int code = qcow2_l2_for_write(image, step->offset, &entries, &count);
    if (code < 0) {
        return code;
    }
    step->clusters = min_u64((end - step->first) >> image->cluster_bits, count);
    step->reused = step->run.kind == QCOW2_ALLOCATED_ZERO && step->run.copied;
    if (step->reused) {
        step->host = step->run.host_offset - qcow2_in_cluster(image, step->offset);
    } else {
        uint64_t wanted = step->clusters;
        code = qcow2_allocate(image, wanted, &step->host, &step->clusters, &step->clean);
    }
    uint64_t covered = step->first + (step->clusters << image->cluster_bits) - step->offset;
    step->bytes = min_u64(step->bytes, covered);
    return code;
}

/* The lock is held at the beginning and at the end, not between. */
static int coroutine_fn write_by_allocation(struct step *step)
{
    struct qcow2 *image = step->image;
    int code = place_step(step);
    if (code < 0) {
        return code;
    }
    struct qcow2_allocation allocation = {.offset = step->first, .bytes = step->clusters << image->cluster_bits};
    co_queue_init(&allocation.waiters);
    list_append(&image->allocations, &allocation.link);
    unsigned parity = qcow2_epoch_enter(image);
    co_mutex_unlock(&image->lock);
    code = prepare_around(step);
    if (code == 0) {
        code = write_step(step);
    }
    g_free(step->around);
    qcow2_epoch_leave(image, parity);
    co_mutex_lock(&image->lock);
    if (code == 0) {
        code = link_step(step);
    }
    if (code < 0 && !step->reused) {
        qcow2_release(image, step->host, step->clusters);
    }
    list_remove(&allocation.link);
    co_queue_wake_all(&allocation.waiters);
    return code;
}

/* One step of any kind; *ret_bytes is how far it went. */
static int coroutine_fn write_some(struct qcow2 *image, uint64_t offset, uint64_t bytes, struct buffers from,
                                   unsigned flags, uint64_t *ret_bytes)
{
    struct qcow2_run run;
    int code;
    co_mutex_lock(&image->lock);
    uint64_t some;
    do {
        some = bytes;
    } while (qcow2_wait_for_allocations(image, offset, &some));
    code = atomic_load(&image->corrupt) ? -EIO : qcow2_lookup(image, offset, some, &run);
    if (code < 0) {
        co_mutex_unlock(&image->lock);
        return code;
    }
    *ret_bytes = run.bytes;
    if (flags & REQUEST_IF_UNALLOCATED && run.kind != QCOW2_UNALLOCATED) {
        co_mutex_unlock(&image->lock);
        return 0;
    }
    if (run.kind == QCOW2_DATA && run.copied) {
        unsigned parity = qcow2_epoch_enter(image);
        co_mutex_unlock(&image->lock);
        edge_event(image->node->file, BLKDEBUG_EVENT_WRITE_AIO);
        code = edge_write(image->node->file, run.host_offset, run.bytes, from, 0);
        qcow2_epoch_leave(image, parity);
        return code;
    }
    struct step step = {.image = image, .offset = offset, .bytes = run.bytes, .from = from, .run = run};
    code = write_by_allocation(&step);
    co_mutex_unlock(&image->lock);
    *ret_bytes = step.bytes;
    return code;
}

static int coroutine_fn write_all(struct qcow2 *image, uint64_t offset, uint64_t bytes, struct buffers from,
                                  unsigned flags)
{
    while (bytes) {
        uint64_t done = 0;
        int code = write_some(image, offset, bytes, from, flags, &done);
        if (code < 0) {
            return code;
        }
        offset += done;
        bytes -= done;
        if (bytes) {
            from = buffers_advance(from, done);
        }
    }
    return 0;
}

int coroutine_fn qcow2_write_plain(struct qcow2 *image, uint64_t offset, uint64_t bytes, struct buffers from,
                                   unsigned flags)
{
    return write_all(image, offset, bytes, from, flags);
}

int coroutine_fn qcow2_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from, unsigned flags)
{
    struct qcow2 *image = node->state;
    int code = qcow2_prepare_write(image);
    if (code == 0) {
        code = flags & REQUEST_COMPRESSED ? qcow2_compressed_write(image, offset, bytes, from, flags)
                                          : write_all(image, offset, bytes, from, flags);
    }
    if (code < 0) {
        return code;
    }
    if (flags & REQUEST_FUA) {
        return qcow2_flush(node);
    }
    qcow2_settle(image);
    return 0;
}

int coroutine_fn qcow2_write_zero_data(struct qcow2 *image, uint64_t offset, uint64_t bytes, unsigned flags)
{
    while (bytes) {
        uint64_t part = min_u64(bytes, sizeof(zeroes));
        struct iovec iov = {zeroes, part};
        int code = write_all(image, offset, part, buffers_one(&iov), flags);
        if (code < 0) {
            return code;
        }
        offset += part;
        bytes -= part;
    }
    return 0;
}

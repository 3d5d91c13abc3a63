/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One step of a write by allocation: where there is no cluster, or a shared, compressed or zero one, or where a cluster
 * of ours lacks the subcluster. The clusters are taken and an allocation in flight is registered under the lock;
 * without it, what the guest does not overwrite around its data is read from where it is now, and all of it goes to the
 * file in one write; under the lock again the L2 entries are set and the old clusters freed.
 *
 * 1. A mapping changes only between the registration and its end, so no write is lost between the reading of the old
 *    content and the linking of the new.
 * 2. What is filled around the guest's data is the rest of its subclusters, no more; but all of a compressed cluster,
 *    and of a shared one what is allocated there.
 * 3. Clusters of the file that were never written read as zeroes, so zeroes are not written there.
 * 4. An entry is set only after its data are written; that they are stable before it is, is qcow2_flush.c's part.
 * 5. In a data file a cluster's place is given: nothing is taken, given back or counted.
 */
#include "driver/format/qcow2_step.h"
#include "base/size.h"
#include "driver/format/qcow2_data.h"
#include "driver/format/qcow2_read.h"
#include "driver/format/qcow2_refcount.h"
#include <errno.h>
#include <limits.h>
#include <string.h>

static uint8_t zeroes[64 << 10]; /* never written; backs as many iovecs as are needed */

struct step {
    struct qcow2 *image;
    uint64_t offset, bytes; /* of the guest's data */
    struct buffers from;
    struct qcow2_run run; /* what is there now */
    uint64_t first;       /* guest offset of the first cluster */
    uint64_t clusters;
    uint64_t host;       /* of the first cluster */
    bool fresh;          /* the host clusters were taken for this step */
    bool clean;          /* they read as zeroes */
    bool moves;          /* a shared cluster with subclusters: those with data go along */
    uint64_t head, tail; /* bytes around the guest's */
    uint8_t *around;     /* head and tail, if they are not zero */
    bool head_zero, tail_zero;
};

/* Is it in a subcluster that the guest's data touch? */
static bool is_touched(const struct step *step, uint64_t offset)
{
    uint64_t size = step->image->subcluster_size;
    return offset >= align_down(step->offset, size) && offset < align_up(step->offset + step->bytes, size);
}

/* The stretch of one kind at `offset`, which is in the clusters of the step. */
static struct qcow2_run run_at(const struct step *step, uint64_t offset, uint64_t bytes)
{
    const struct qcow2 *image = step->image;
    struct qcow2_run run = step->run;
    if (run.placed) {
        run.host_offset += offset - step->offset; /* may well be before it */
    }
    run.bytes = bytes;
    if (step->moves) {
        unsigned index = qcow2_subcluster_index(image, offset);
        run.kind = qcow2_subcluster_kind(image, run.entry, index);
        unsigned alike = run.kind == QCOW2_UNALLOCATED ? 1 : qcow2_subcluster_run(image, run.entry, index);
        uint64_t span = (uint64_t)alike << image->subcluster_bits;
        run.bytes = min_u64(bytes, span - (offset & (image->subcluster_size - 1)));
        if (run.kind == QCOW2_UNALLOCATED && !is_touched(step, offset)) {
            run.kind = QCOW2_PLAIN_ZERO; /* it stays unallocated: whatever is written there is not seen */
        }
    }
    return run;
}

/* Fills `to` with what the step's clusters show at `offset`; nothing but zeroes shows behind the image's end. */
static int coroutine_fn read_around(struct step *step, uint64_t offset, uint64_t bytes, uint8_t *to)
{
    uint64_t size = atomic_load(&step->image->node->size);
    uint64_t inside = offset < size ? min_u64(bytes, size - offset) : 0;
    memset(to + inside, 0, bytes - inside);
    while (inside) {
        struct qcow2_run run = run_at(step, offset, inside);
        struct iovec iov = {to, run.bytes};
        int code = qcow2_read_run(step->image, &run, offset, run.bytes, buffers_one(&iov));
        if (code < 0) {
            return code;
        }
        offset += run.bytes;
        to += run.bytes;
        inside -= run.bytes;
    }
    return 0;
}

static int coroutine_fn prepare_around(struct step *step)
{
    struct qcow2 *image = step->image;
    bool whole = step->moves || step->run.kind == QCOW2_COMPRESSED_DATA;
    uint64_t unit = whole ? image->cluster_size : image->subcluster_size;
    step->head = step->offset & (unit - 1);
    step->tail = align_up(step->offset + step->bytes, unit) - (step->offset + step->bytes);
    step->head_zero = step->tail_zero = true;
    bool zero = !step->moves &&
                (qcow2_kind_is_zero(step->run.kind) || (step->run.kind == QCOW2_UNALLOCATED && !image->node->backing));
    if (zero || step->head + step->tail == 0) {
        return 0;
    }
    step->around = g_try_malloc(step->head + step->tail);
    if (!step->around) {
        return -ENOMEM;
    }
    edge_event(image->node->file, BLKDEBUG_EVENT_COW_READ);
    int code = step->head ? read_around(step, step->offset - step->head, step->head, step->around) : 0;
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

/* To guest offset `guest` of the step's clusters. */
static int coroutine_fn write_at(const struct step *step, uint64_t guest, uint64_t bytes, struct buffers from)
{
    return qcow2_data_write(step->image, step->host + (guest - step->first), guest, bytes, from);
}

/* `bytes` of `memory`, or of zeroes if it is NULL. */
static int coroutine_fn write_memory_at(const struct step *step, uint64_t guest, uint8_t *memory, uint64_t bytes)
{
    int code = 0;
    while (bytes && code == 0) {
        uint64_t part = memory ? bytes : min_u64(bytes, sizeof(zeroes));
        struct iovec iov = {memory ? memory : zeroes, part};
        code = write_at(step, guest, part, buffers_one(&iov));
        guest += part;
        bytes -= part;
    }
    return code;
}

/* For buffers in more pieces than one request may have. */
static int coroutine_fn write_in_parts(const struct step *step, uint64_t head, uint64_t tail)
{
    g_autofree uint8_t *bounce = g_try_malloc(step->bytes);
    if (!bounce) {
        return -ENOMEM;
    }
    buffers_copy_out(step->from, bounce, step->bytes);
    int code = write_memory_at(step, step->offset, bounce, step->bytes);
    if (code == 0) {
        code = write_memory_at(step, step->offset - head, step->head_zero ? NULL : step->around, head);
    }
    if (code == 0) {
        uint8_t *memory = step->tail_zero ? NULL : step->around + step->head;
        code = write_memory_at(step, step->offset + step->bytes, memory, tail);
    }
    return code;
}

static int coroutine_fn write_step(struct step *step)
{
    uint64_t head = step->clean && step->head_zero ? 0 : step->head;
    uint64_t tail = step->clean && step->tail_zero ? 0 : step->tail;
    if (!buffers_elsewhere(step->from)) {
        edge_event(step->image->node->file, head + tail ? BLKDEBUG_EVENT_COW_WRITE : BLKDEBUG_EVENT_WRITE_AIO);
    }
    if (head + tail == 0) {
        return write_at(step, step->offset, step->bytes, step->from);
    }
    if (buffers_elsewhere(step->from)) {
        return -ENOTSUP;
    }
    unsigned room = step->from.count + 2 + (head + tail) / sizeof(zeroes) + 2;
    struct iovec few[32];
    g_autofree struct iovec *many = NULL;
    struct iovec *iov = few;
    if (room > G_N_ELEMENTS(few)) {
        many = room <= IOV_MAX ? g_try_new(struct iovec, room) : NULL;
        iov = many;
    }
    if (!iov) {
        return write_in_parts(step, head, tail);
    }
    unsigned count = append_iov(iov, 0, step->head_zero ? NULL : step->around, head);
    count += buffers_to_iov(step->from, step->bytes, iov + count, step->from.count);
    count = append_iov(iov, count, step->tail_zero ? NULL : step->around + step->head, tail);
    return write_at(step, step->offset - head, head + step->bytes + tail, (struct buffers){iov, count, 0});
}

/* What the entry of the step's cluster number `number` becomes. */
static struct qcow2_entry linked_entry(const struct step *step, uint64_t number, struct qcow2_entry old)
{
    const struct qcow2 *image = step->image;
    uint64_t in_step = number << image->cluster_bits;
    struct qcow2_entry entry = {(step->host + in_step) | QCOW2_COPIED, 0};
    if (!qcow2_has_subclusters(image)) {
        return entry;
    }
    if (old.descriptor & QCOW2_COMPRESSED) {
        entry.subclusters = QCOW2_ALL_ALLOCATED;
        return entry;
    }
    uint64_t cluster = step->first + in_step;
    uint64_t from = max_u64(step->offset, cluster) - cluster;
    uint64_t to = min_u64(step->offset + step->bytes, cluster + image->cluster_size) - cluster;
    uint64_t touched = qcow2_subcluster_mask(image, from, to);
    entry.subclusters = (old.subclusters & ~(touched << QCOW2_SUBCLUSTERS)) | touched;
    return entry;
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
            qcow2_entry_store(image, entries, i, linked_entry(step, done, old));
            if (step->fresh) {
                qcow2_free_entry(image, old, image->options.pass_discard_other);
            }
        }
        qcow2_map_changed(image, true);
    }
    return 0;
}

/* Finds the place in the data file for the step. */
static void place_in_data_file(struct step *step)
{
    struct qcow2 *image = step->image;
    uint64_t end = step->first + (step->clusters << image->cluster_bits);
    step->host = step->first;
    step->clean = step->first >= image->data_clean_from;
    image->data_clean_from = max_u64(image->data_clean_from, end);
}

/* Finds clusters for the step, cutting it to what there is in one piece. The lock is held. */
static int coroutine_fn place_step(struct step *step)
{
    struct qcow2 *image = step->image;
    void *entries;
    unsigned count;
    step->first = qcow2_cluster_floor(image, step->offset);
    step->moves = qcow2_has_subclusters(image) && step->run.placed && !step->run.copied;
    int code = qcow2_l2_for_write(image, step->offset, &entries, &count);
    if (code < 0) {
        return code;
    }
    uint64_t end = qcow2_cluster_ceiling(image, step->offset + step->bytes);
    uint64_t wanted = min_u64((end - step->first) >> image->cluster_bits, step->moves ? 1 : count);
    step->clusters = wanted;
    if (image->external) {
        place_in_data_file(step);
    } else if (step->run.placed && step->run.copied && step->run.kind != QCOW2_DATA) {
        step->host = step->run.host_offset - qcow2_in_cluster(image, step->offset);
    } else {
        step->fresh = true;
        code = qcow2_allocate(image, wanted, &step->host, &step->clusters, &step->clean);
    }
    step->clean = step->clean && !image->crypto; /* zeroes do not decrypt to zeroes */
    uint64_t covered = step->first + (step->clusters << image->cluster_bits) - step->offset;
    step->bytes = min_u64(step->bytes, covered);
    return code;
}

int coroutine_fn qcow2_write_by_allocation(struct qcow2 *image, uint64_t offset, const struct qcow2_run *run,
                                           struct buffers from, uint64_t *ret_bytes)
{
    struct step step = {.image = image, .offset = offset, .bytes = run->bytes, .from = from, .run = *run};
    int code = place_step(&step);
    if (code < 0) {
        return code;
    }
    struct qcow2_allocation allocation = {.offset = step.first, .bytes = step.clusters << image->cluster_bits};
    co_queue_init(&allocation.waiters);
    list_append(&image->allocations, &allocation.link);
    unsigned parity = qcow2_epoch_enter(image);
    co_mutex_unlock(&image->lock);
    code = prepare_around(&step);
    if (code == 0) {
        code = write_step(&step);
    }
    g_free(step.around);
    qcow2_epoch_leave(image, parity);
    co_mutex_lock(&image->lock);
    if (code == 0) {
        code = link_step(&step);
    }
    if (code < 0 && step.fresh) {
        qcow2_release(image, step.host, step.clusters);
    }
    list_remove(&allocation.link);
    co_queue_wake_all(&allocation.waiters);
    *ret_bytes = step.bytes;
    return code;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The order in which metadata reach the disk, and what happens to the header before the first write and when the
 * image turns out to be corrupt.
 *
 * 1. Refcounts (and guest data, in the data file too) are stable before an L2 entry that leans on them is written; L2
 * tables are stable before the L1 entries that show them. Where nothing leans on anything new there is no barrier.
 * 2. A generation is one complete writing of L2 and L1. What was freed under generation g is hidden on disk once g is
 *    written, and may be reused once a flush after that has succeeded (stable_generation).
 * 3. The long part of a guest's flush, the first fdatasync, runs without the lock; if what it covered has changed in
 *    the meantime the barrier is repeated under the lock, and is short then.
 * 4. Dirty and freed metadata are bounded: qcow2_settle().
 */
#include "driver/format/qcow2_flush.h"
#include "base/size.h"
#include "block/request.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_bitmap.h"
#include "driver/format/qcow2_overlap.h"
#include "driver/format/qcow2_refcount.h"
#include "loop/loop.h"
#include <endian.h>
#include <errno.h>

enum { DIRTY_SLICES_MAX = 2048, FREED_RANGES_MAX = 8192, FREED_BYTES_MAX = 256 << 20, L1_ENTRIES_PER_SECTOR = 64 };

int coroutine_fn qcow2_mark_corrupt(struct qcow2 *image, const char *format, ...)
{
    atomic_store(&image->corrupt, true);
    if (image->corrupt_logged) {
        return -EIO;
    }
    image->corrupt_logged = true;
    va_list arguments;
    va_start(arguments, format);
    g_autofree char *text = g_strdup_vprintf(format, arguments);
    va_end(arguments);
    g_message("qcow2 image of node '%s' is corrupt: %s; %s", image->node->name, text,
              image->node->writable ? "no more writes" : "it is read-only");
    if (image->node->writable && image->header.version >= 3) {
        image->header.incompatible |= QCOW2_INCOMPATIBLE_CORRUPT;
        if (qcow2_header_write_incompatible(image->node->file, &image->header) == 0) {
            (void)edge_flush(image->node->file);
        }
    }
    return -EIO;
}

static bool overlaps(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes)
{
    return a_bytes && b_bytes && a < b + b_bytes && b < a + a_bytes;
}

bool qcow2_overlaps_metadata(const struct qcow2 *image, uint64_t offset, uint64_t bytes)
{
    const struct qcow2_header *header = &image->header;
    return offset < image->cluster_size || overlaps(offset, bytes, header->l1_offset, (uint64_t)header->l1_size * 8) ||
           overlaps(offset, bytes, header->refcount_table_offset,
                    (uint64_t)header->refcount_table_clusters << image->cluster_bits);
}

int coroutine_fn qcow2_flush_files(struct qcow2 *image)
{
    int code = image->external && image->node->data ? edge_flush(image->node->data) : 0;
    return code == 0 ? edge_flush(image->node->file) : code;
}

int coroutine_fn qcow2_prepare_write(struct qcow2 *image)
{
    if (atomic_load_explicit(&image->corrupt, memory_order_relaxed)) {
        return -EIO;
    }
    if (atomic_load_explicit(&image->prepared, memory_order_acquire)) {
        return 0;
    }
    if (image->external && !image->node->data) {
        return -ENOMEDIUM;
    }
    int code = 0;
    co_mutex_lock(&image->lock);
    if (!atomic_load(&image->prepared)) {
        if (image->external) {
            uint64_t end = align_up(edge_size(image->node->data), image->cluster_size);
            image->data_clean_from = max_u64(image->data_clean_from, end);
        }
        uint64_t before = image->header.autoclear;
        if (before & ~image->autoclear_kept) {
            image->header.autoclear = before & image->autoclear_kept;
            code = qcow2_header_write_autoclear(image->node->file, &image->header);
            if (code == 0) {
                code = edge_flush(image->node->file);
            }
        }
        if (code < 0) {
            image->header.autoclear = before;
        } else {
            code = qcow2_bitmaps_begin_writing(image);
        }
        if (code == 0) {
            code = qcow2_overlap_prepare(image);
        }
        if (code == 0) {
            atomic_store_explicit(&image->prepared, true, memory_order_release);
        }
    }
    co_mutex_unlock(&image->lock);
    return code;
}

static int coroutine_fn write_l1(struct qcow2 *image)
{
    unsigned sectors = (image->header.l1_size + L1_ENTRIES_PER_SECTOR - 1) / L1_ENTRIES_PER_SECTOR;
    for (unsigned i = 0; i < sectors && image->l1_dirty_count; i++) {
        if (!image->l1_dirty[i]) {
            continue;
        }
        uint64_t disk[L1_ENTRIES_PER_SECTOR];
        unsigned first = i * L1_ENTRIES_PER_SECTOR;
        unsigned count = MIN((unsigned)L1_ENTRIES_PER_SECTOR, image->header.l1_size - first);
        for (unsigned n = 0; n < count; n++) {
            disk[n] = htobe64(image->l1[first + n]);
        }
        edge_event(image->node->file, BLKDEBUG_EVENT_L1_UPDATE);
        int code = edge_write_memory(image->node->file, image->header.l1_offset + (uint64_t)first * 8, disk,
                                     (uint64_t)count * 8, 0);
        if (code < 0) {
            return code;
        }
        image->l1_dirty[i] = 0;
        image->l1_dirty_count--;
    }
    return 0;
}

int coroutine_fn qcow2_write_metadata(struct qcow2 *image)
{
    if (image->frozen) {
        return -EIO;
    }
    struct edge *file = image->node->file;
    int code = qcow2_write_refcounts(image);
    if (code == 0 && (image->l2_cache.dirty_count || image->l1_dirty_count)) {
        if (image->barrier_wanted) {
            code = qcow2_flush_files(image);
        }
        if (code == 0) {
            image->barrier_wanted = false;
            code = qcow2_cache_write(&image->l2_cache);
        }
        if (code == 0 && image->l1_dirty_count) {
            code = edge_flush(file);
            if (code == 0) {
                code = write_l1(image);
            }
        }
    }
    if (code == 0) {
        image->generation++;
    }
    return code;
}

int coroutine_fn qcow2_make_clean(void *argument)
{
    return qcow2_write_metadata(argument);
}

static bool has_dirty_tables(const struct qcow2 *image)
{
    return image->l2_cache.dirty_count || image->l1_dirty_count || image->refcount_cache.dirty_count ||
           image->refcount_dirty_first != image->refcount_dirty_end;
}

static void trim_caches(struct qcow2 *image)
{
    int64_t now = loop_now_ns();
    if (image->options.trim_interval_ns && now - image->trimmed_at_ns >= image->options.trim_interval_ns) {
        image->trimmed_at_ns = now;
        qcow2_cache_trim(&image->l2_cache);
        qcow2_cache_trim(&image->refcount_cache);
    }
}

int coroutine_fn qcow2_flush(struct node *node)
{
    struct qcow2 *image = node->state;
    int code = 0;
    edge_event(node->file, BLKDEBUG_EVENT_FLUSH_TO_OS);
    co_mutex_lock(&image->lock);
    if (image->l2_cache.dirty_count && image->barrier_wanted && !image->frozen) {
        code = qcow2_write_refcounts(image);
        uint64_t change_count = image->change_count;
        co_mutex_unlock(&image->lock);
        if (code == 0) {
            code = qcow2_flush_files(image);
        }
        co_mutex_lock(&image->lock);
        if (code == 0 && image->change_count == change_count) {
            image->barrier_wanted = false;
        }
    }
    if (code == 0 && (has_dirty_tables(image) || image->freed->len)) {
        code = qcow2_write_metadata(image);
    }
    uint64_t generation = image->generation - 1;
    co_mutex_unlock(&image->lock);
    if (code == 0) {
        edge_event(node->file, BLKDEBUG_EVENT_FLUSH_TO_DISK);
        code = qcow2_flush_files(image);
    }
    if (code < 0) {
        return code;
    }
    co_mutex_lock(&image->lock);
    image->stable_generation = MAX(image->stable_generation, generation);
    qcow2_reclaim(image);
    trim_caches(image);
    image->settle_at = image->freed_clusters + (FREED_BYTES_MAX >> image->cluster_bits);
    co_mutex_unlock(&image->lock);
    return 0;
}

void qcow2_consider_settling(struct qcow2 *image)
{
    if (image->l2_cache.dirty_count > MIN(DIRTY_SLICES_MAX, image->l2_cache.max_slices / 2) ||
        image->freed->len > FREED_RANGES_MAX || image->freed_clusters > image->settle_at) {
        atomic_store_explicit(&image->settle_wanted, true, memory_order_relaxed);
    }
}

void coroutine_fn qcow2_settle(struct qcow2 *image)
{
    if (!atomic_load_explicit(&image->settle_wanted, memory_order_relaxed)) {
        return;
    }
    co_mutex_lock(&image->lock);
    bool mine = !image->settling;
    image->settling = true;
    co_mutex_unlock(&image->lock);
    if (!mine) {
        return;
    }
    (void)qcow2_flush(image->node); /* what fails stays dirty, and fails the guest's next flush */
    co_mutex_lock(&image->lock);
    image->settling = false;
    atomic_store_explicit(&image->settle_wanted, false, memory_order_relaxed);
    co_mutex_unlock(&image->lock);
}

int coroutine_fn qcow2_flush_all(struct qcow2 *image)
{
    int code = qcow2_flush(image->node);
    if (code == 0) {
        /* The first made clusters free, which dirtied refcounts. */
        code = qcow2_flush(image->node);
    }
    return code;
}

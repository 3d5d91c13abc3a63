/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The blklogwrites filter: shows the node below it, and writes every change down in a log (the data child), in the
 * format of log_writes_format.h. Who replays the log has the node as it was after any of its entries.
 *
 * 1. A change is made first and logged then, both before it is acknowledged; overlapping changes one after the other
 *    (`ranges`). So the order of the log is one in which the changes happened.
 * 2. A flush is logged when it has succeeded, and nothing is logged while it runs: all entries before its own are
 * stable with it.
 * 3. `lock` guards the end of the log. An entry is counted by the superblock once it is in the log whole, after
 * `interval` entries, at a flush, and at the end.
 * 4. Once the log could not be written, every further change fails before it is made: a log with a gap is worth
 * nothing.
 *
 * Zeroes are logged as data. What changes no content (REQUEST_IF_UNALLOCATED) is not logged, and neither is a new size,
 * which the format cannot say.
 */
#include "base/size.h"
#include "block/driver.h"
#include "driver/drivers.h"
#include "driver/filter/log_writes_format.h"
#include <endian.h>
#include <errno.h>
#include <glib.h>
#include <string.h>

enum { SECTOR_SIZE = 512, SECTOR_SIZE_MAX = 8 << 20 };

struct log_writes {
    uint64_t sector_size;
    uint64_t interval;
    struct co_mutex lock; /* of all below, but for `broken` */
    uint64_t entries;     /* in the log */
    uint64_t counted;     /* of these, by the superblock */
    uint64_t end;         /* of the log, bytes */
    uint8_t *sector;      /* zeroes but for its first bytes */
    atomic_int broken;    /* why the log could not be written, or 0 */
    struct range_lock ranges;
};

/* --- the log --- */

/* One sector that begins with `head`. The lock is held. */
static int coroutine_fn write_sector(struct node *node, uint64_t offset, const void *head, size_t bytes)
{
    struct log_writes *log = node->state;
    memcpy(log->sector, head, bytes);
    return edge_write_memory(node->data, offset, log->sector, log->sector_size, 0);
}

/* The lock is held. */
static int coroutine_fn write_super(struct node *node)
{
    struct log_writes *log = node->state;
    struct log_writes_super super = {.magic = htole64(LOG_WRITES_MAGIC),
                                     .version = htole64(LOG_WRITES_VERSION),
                                     .entries = htole64(log->entries),
                                     .sector_size = htole32((uint32_t)log->sector_size)};
    memset(log->sector, 0, sizeof(struct log_writes_entry));
    int code = write_sector(node, 0, &super, sizeof(super));
    if (code == 0) {
        log->counted = log->entries;
    }
    return code;
}

static void note_broken(struct node *node, int code)
{
    struct log_writes *log = node->state;
    int none = 0;
    if (code < 0 && atomic_compare_exchange_strong(&log->broken, &none, code)) {
        g_warning("blklogwrites node '%s': the log on '%s' could not be written: %s; further changes fail", node->name,
                  node->data->child->name, g_strerror(-code));
    }
}

/* `from` NULL: zeroes. The range is in whole sectors. The lock is held. */
static int coroutine_fn append(struct node *node, uint64_t offset, uint64_t bytes, const struct buffers *from,
                               unsigned flags)
{
    struct log_writes *log = node->state;
    bool has_data = !(flags & LOG_WRITES_DISCARD) && bytes > 0;
    struct log_writes_entry entry = {.sector = htole64(offset / log->sector_size),
                                     .sectors = htole64(bytes / log->sector_size),
                                     .flags = htole64(flags)};
    int code = 0;
    if (has_data) {
        code = from ? edge_write(node->data, log->end + log->sector_size, bytes, *from, 0)
                    : edge_write_zeroes(node->data, log->end + log->sector_size, bytes, 0);
    }
    if (code == 0) {
        code = write_sector(node, log->end, &entry, sizeof(entry));
    }
    if (code == 0) {
        log->end += log->sector_size + (has_data ? bytes : 0);
        log->entries++;
        code = log->entries - log->counted >= log->interval ? write_super(node) : 0;
    }
    note_broken(node, code);
    return code;
}

static int coroutine_fn append_alone(struct node *node, uint64_t offset, uint64_t bytes, const struct buffers *from,
                                     unsigned flags)
{
    struct log_writes *log = node->state;
    co_mutex_lock(&log->lock);
    int code = append(node, offset, bytes, from, flags);
    co_mutex_unlock(&log->lock);
    return code;
}

/* --- requests --- */

static int coroutine_fn log_writes_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                         unsigned flags)
{
    struct log_writes *log = node->state;
    struct range_hold hold;
    if (flags & REQUEST_IF_UNALLOCATED) {
        return edge_write(node->filtered, offset, bytes, from, flags);
    }
    range_lock_acquire(&log->ranges, &hold, offset, bytes, false);
    int code = atomic_load(&log->broken);
    code = code < 0 ? code : edge_write(node->filtered, offset, bytes, from, flags);
    code = code < 0 ? code : append_alone(node, offset, bytes, &from, flags & REQUEST_FUA ? LOG_WRITES_FUA : 0);
    range_lock_release(&log->ranges, &hold);
    return code;
}

static int coroutine_fn log_writes_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    struct log_writes *log = node->state;
    struct range_hold hold;
    if (flags & REQUEST_IF_UNALLOCATED) {
        return edge_write_zeroes(node->filtered, offset, bytes, flags);
    }
    range_lock_acquire(&log->ranges, &hold, offset, bytes, false);
    int code = atomic_load(&log->broken);
    code = code < 0 ? code : edge_write_zeroes(node->filtered, offset, bytes, flags);
    code = code < 0 ? code : append_alone(node, offset, bytes, NULL, flags & REQUEST_FUA ? LOG_WRITES_FUA : 0);
    range_lock_release(&log->ranges, &hold);
    return code;
}

static int coroutine_fn log_writes_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    struct log_writes *log = node->state;
    struct range_hold hold;
    range_lock_acquire(&log->ranges, &hold, offset, bytes, false);
    int code = atomic_load(&log->broken);
    code = code < 0 ? code : edge_discard(node->filtered, offset, bytes);
    code = code < 0 ? code : append_alone(node, offset, bytes, NULL, LOG_WRITES_DISCARD);
    range_lock_release(&log->ranges, &hold);
    return code;
}

static int coroutine_fn log_writes_flush(struct node *node)
{
    struct log_writes *log = node->state;
    if (!node->writable) {
        return edge_flush(node->filtered);
    }
    co_mutex_lock(&log->lock);
    int code = edge_flush(node->filtered);
    if (code == 0) {
        code = atomic_load(&log->broken);
        code = code < 0 ? code : append(node, 0, 0, NULL, LOG_WRITES_FLUSH);
        code = code < 0 ? code : write_super(node);
        code = code < 0 ? code : edge_flush(node->data);
        note_broken(node, code);
    }
    co_mutex_unlock(&log->lock);
    return code;
}

/* --- opening --- */

static int check_sector_size(uint64_t size, struct error **err)
{
    bool valid = size >= SECTOR_SIZE && size <= SECTOR_SIZE_MAX && is_power_of_two(size);
    return valid ? 0 : error_set(err, -EINVAL, "Invalid log sector size %" G_GUINT64_FORMAT, size);
}

/* Where the log that is there ends. */
static int coroutine_fn find_end(struct node *node, struct error **err)
{
    struct log_writes *log = node->state;
    uint64_t size = edge_size(node->data);
    log->end = log->sector_size;
    for (uint64_t i = 0; i < log->entries; i++) {
        struct log_writes_entry entry;
        int code = log->end < size ? edge_read_memory(node->data, log->end, &entry, sizeof(entry)) : -EINVAL;
        if (code < 0) {
            return error_set_errno(err, code, "Failed to read log entry %" G_GUINT64_FORMAT, i);
        }
        uint64_t flags = le64toh(entry.flags), sectors = flags & LOG_WRITES_DISCARD ? 0 : le64toh(entry.sectors);
        if (sectors > (size - log->end) / log->sector_size) {
            return error_set(err, -EINVAL, "Log entry %" G_GUINT64_FORMAT " leads behind the end of the log", i);
        }
        log->end += (1 + sectors) * log->sector_size;
    }
    return 0;
}

static int coroutine_fn read_log(struct node *node, struct error **err)
{
    struct log_writes *log = node->state;
    struct log_writes_super super;
    int code = edge_read_memory(node->data, 0, &super, sizeof(super));
    if (code < 0) {
        return error_set_errno(err, code, "Could not read log superblock");
    }
    if (le64toh(super.magic) != LOG_WRITES_MAGIC) {
        return error_set(err, -EINVAL, "Invalid log superblock magic");
    }
    if (le64toh(super.version) != LOG_WRITES_VERSION) {
        return error_set(err, -EINVAL, "Unsupported log version %" G_GUINT64_FORMAT, (uint64_t)le64toh(super.version));
    }
    log->sector_size = le32toh(super.sector_size);
    log->entries = log->counted = le64toh(super.entries);
    code = check_sector_size(log->sector_size, err);
    return code < 0 ? code : find_end(node, err);
}

/* The log as it is now, or a new one. */
static int coroutine_fn open_log(struct node *node, const struct blockdev_options_blklogwrites *own, struct error **err)
{
    struct log_writes *log = node->state;
    int64_t interval = own->has_log_super_update_interval ? own->log_super_update_interval : 4096;
    if (interval <= 0) {
        return error_set(err, -EINVAL, "Invalid log superblock update interval %" G_GINT64_FORMAT, interval);
    }
    if (own->log_append && own->has_log_sector_size) {
        return error_set(err, -EINVAL, "log-append and log-sector-size are mutually exclusive");
    }
    log->interval = (uint64_t)interval;
    log->sector_size = own->has_log_sector_size ? own->log_sector_size : SECTOR_SIZE;
    int code = own->log_append ? read_log(node, err) : check_sector_size(log->sector_size, err);
    if (code < 0) {
        return code;
    }
    log->sector = g_malloc0(log->sector_size);
    if (own->log_append || !node->writable) {
        return 0;
    }
    log->end = log->sector_size;
    code = write_super(node);
    return code < 0 ? error_set_errno(err, code, "Could not write log superblock") : 0;
}

static int set_limits(struct node *node, struct error **err)
{
    const struct log_writes *log = node->state;
    node->limits.alignment = MAX(node->limits.alignment, log->sector_size);
    if (!is_aligned(edge_size(node->filtered), node->limits.alignment) &&
        !node->filtered->child->driver->grows_on_write) {
        return error_set(err, -EINVAL, "Node '%s': the size of '%s' is not a multiple of the log's sectors", node->name,
                         node->filtered->child->name);
    }
    return 0;
}

static int coroutine_fn log_writes_open(struct node *node, const struct blockdev_options *options, struct error **err)
{
    struct log_writes *log = node->state;
    co_mutex_init(&log->lock);
    range_lock_init(&log->ranges);
    int code = open_log(node, &options->u.blklogwrites, err);
    code = code < 0 ? code : set_limits(node, err);
    if (code < 0) {
        g_free(log->sector);
        range_lock_destroy(&log->ranges);
        co_mutex_destroy(&log->lock);
        return code;
    }
    node->filename = g_strdup(node->filtered->child->filename);
    return 0;
}

static void coroutine_fn log_writes_close(struct node *node)
{
    struct log_writes *log = node->state;
    if (node->writable && log->counted != log->entries && !atomic_load(&log->broken)) {
        co_mutex_lock(&log->lock);
        note_broken(node, write_super(node));
        co_mutex_unlock(&log->lock);
    }
    g_free(log->sector);
    range_lock_destroy(&log->ranges);
    co_mutex_destroy(&log->lock);
}

const struct driver driver_blklogwrites = {
    .name = "blklogwrites",
    .id = BLOCKDEV_DRIVER_BLKLOGWRITES,
    .kind = DRIVER_FILTER,
    .state_size = sizeof(struct log_writes),
    .write_if_unallocated = true,
    .grows_on_write = true,
    .open = log_writes_open,
    .close = log_writes_close,
    .write = log_writes_write,
    .write_zeroes = log_writes_write_zeroes,
    .discard = log_writes_discard,
    .flush = log_writes_flush,
};

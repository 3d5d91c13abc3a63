/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The blkverify filter: shows the image under test, and compares it with a second one that gets the same writes (the
 * data child).
 *
 * 1. Both have the same content wherever both have been written alike: changes of a range go to both while nobody else
 *    reads or changes it (`ranges`), reference first.
 * 2. A read that differs fails with EIO, and says where in the log; so does a change that one of them refuses. The
 *    program goes on: a daemon has other users.
 * 3. What changes no content (REQUEST_IF_UNALLOCATED) goes to the image under test alone. A discard is a hint that the
 *    two may take differently, so neither gets it.
 *
 * Slow on purpose: whole reads are held in memory twice.
 */
#include "base/size.h"
#include "block/driver.h"
#include "driver/drivers.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

enum { PIECE = 1 << 20 };

struct blkverify {
    struct range_lock ranges;
};

static int coroutine_fn blkverify_open(struct node *node, const struct blockdev_options *options, struct error **err)
{
    uint64_t test = edge_size(node->filtered), raw = edge_size(node->data);
    if (test != raw) {
        return error_set(err, -EINVAL,
                         "Node '%s': 'test' has %" G_GUINT64_FORMAT " bytes, but 'raw', which it is compared with, has "
                         "%" G_GUINT64_FORMAT,
                         node->name, test, raw);
    }
    node->limits.alignment = MAX(node->limits.alignment, node->data->child->limits.alignment);
    node->limits.max_transfer = node->limits.max_transfer ? MIN(node->limits.max_transfer, PIECE) : PIECE;
    if (!is_aligned(test, node->limits.alignment)) {
        return error_set(err, -EINVAL, "Node '%s': its size is not a multiple of the alignment", node->name);
    }
    struct blkverify *verify = node->state;
    range_lock_init(&verify->ranges);
    node->filename = g_strdup(node->filtered->child->filename);
    return 0;
}

static void coroutine_fn blkverify_close(struct node *node)
{
    struct blkverify *verify = node->state;
    range_lock_destroy(&verify->ranges);
}

/* The first byte that differs, from `offset` on, or UINT64_MAX. */
static uint64_t first_difference(struct buffers test, const char *raw, uint64_t offset, uint64_t bytes)
{
    size_t skip = test.skip;
    for (unsigned i = 0; bytes; i++, skip = 0) {
        const char *own = (const char *)test.iov[i].iov_base + skip;
        uint64_t length = min_u64(bytes, test.iov[i].iov_len - skip);
        if (memcmp(own, raw, length) != 0) {
            uint64_t at = 0;
            while (own[at] == raw[at]) {
                at++;
            }
            return offset + at;
        }
        raw += length;
        offset += length;
        bytes -= length;
    }
    return UINT64_MAX;
}

static int coroutine_fn blkverify_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to,
                                       unsigned flags)
{
    g_autofree char *raw = g_try_malloc(bytes);
    struct blkverify *verify = node->state;
    struct range_hold hold;
    if (!raw) {
        return -ENOMEM;
    }
    range_lock_acquire(&verify->ranges, &hold, offset, bytes, true);
    int code = edge_read_memory(node->data, offset, raw, bytes);
    code = code < 0 ? code : edge_read(node->filtered, offset, bytes, to, flags);
    range_lock_release(&verify->ranges, &hold);
    uint64_t differs = code == 0 ? first_difference(to, raw, offset, bytes) : UINT64_MAX;
    if (differs != UINT64_MAX) {
        g_warning("blkverify node '%s': read offset=%" G_GUINT64_FORMAT " bytes=%" G_GUINT64_FORMAT
                  " contents mismatch at offset %" G_GUINT64_FORMAT,
                  node->name, offset, bytes, differs);
        return -EIO;
    }
    return code;
}

/* Both have answered a change. */
static int verdict(const struct node *node, const char *what, uint64_t offset, uint64_t bytes, int raw, int test)
{
    if ((raw < 0) != (test < 0)) {
        g_warning("blkverify node '%s': %s offset=%" G_GUINT64_FORMAT " bytes=%" G_GUINT64_FORMAT
                  " return value mismatch: 'raw' says %s, 'test' says %s",
                  node->name, what, offset, bytes, raw < 0 ? g_strerror(-raw) : "success",
                  test < 0 ? g_strerror(-test) : "success");
        return -EIO;
    }
    return test;
}

static int coroutine_fn blkverify_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                        unsigned flags)
{
    struct blkverify *verify = node->state;
    struct range_hold hold;
    if (flags & REQUEST_IF_UNALLOCATED) {
        return edge_write(node->filtered, offset, bytes, from, flags);
    }
    range_lock_acquire(&verify->ranges, &hold, offset, bytes, false);
    int raw = edge_write(node->data, offset, bytes, from, flags & REQUEST_FUA);
    int test = edge_write(node->filtered, offset, bytes, from, flags);
    range_lock_release(&verify->ranges, &hold);
    return verdict(node, "write", offset, bytes, raw, test);
}

static int coroutine_fn blkverify_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    struct blkverify *verify = node->state;
    struct range_hold hold;
    if (flags & REQUEST_IF_UNALLOCATED) {
        return edge_write_zeroes(node->filtered, offset, bytes, flags);
    }
    if (flags & REQUEST_NO_FALLBACK) {
        return -ENOTSUP; /* one of the two could, and the other not */
    }
    range_lock_acquire(&verify->ranges, &hold, offset, bytes, false);
    int raw = edge_write_zeroes(node->data, offset, bytes, flags);
    int test = edge_write_zeroes(node->filtered, offset, bytes, flags);
    range_lock_release(&verify->ranges, &hold);
    return verdict(node, "write-zeroes", offset, bytes, raw, test);
}

static int coroutine_fn blkverify_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    return -ENOTSUP;
}

static int coroutine_fn blkverify_flush(struct node *node)
{
    int raw = edge_flush(node->data);
    int test = edge_flush(node->filtered);
    return verdict(node, "flush", 0, 0, raw, test);
}

static int coroutine_fn blkverify_truncate(struct node *node, uint64_t size, struct error **err)
{
    int raw = edge_truncate(node->data, size);
    if (raw < 0) {
        return error_set_errno(err, raw, "Cannot set the size of node '%s'", node->data->child->name);
    }
    int test = edge_truncate(node->filtered, size);
    return test < 0 ? error_set_errno(err, test, "Cannot set the size of node '%s'", node->filtered->child->name) : 0;
}

const struct driver driver_blkverify = {
    .name = "blkverify",
    .id = BLOCKDEV_DRIVER_BLKVERIFY,
    .kind = DRIVER_FILTER,
    .state_size = sizeof(struct blkverify),
    .write_if_unallocated = true,
    .open = blkverify_open,
    .close = blkverify_close,
    .read = blkverify_read,
    .write = blkverify_write,
    .write_zeroes = blkverify_write_zeroes,
    .discard = blkverify_discard,
    .flush = blkverify_flush,
    .truncate = blkverify_truncate,
};

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The `raw` format: the content of the file child as it is, or a window of it (options offset and size). Owns nothing
 * but the window's beginning and whether its size was given.
 *
 * 1. offset + node->size never overflows, and the window begins inside the child.
 * 2. Without a given size the node has what the child has behind offset, in whole sectors: the part of the last one
 *    that the child has not, reads as zeroes.
 *
 * Every request is passed on with the offset added; the request path has checked it against node->size. The node has no
 * alignment of its own: what the child wants is padded at the file edge, where the child's true end is known.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "driver/drivers.h"
#include <errno.h>
#include <glib.h>

#define SECTOR 512

struct raw_state {
    uint64_t offset;
    bool fixed; /* its size was given */
};

static uint64_t raw_offset(const struct node *node)
{
    const struct raw_state *state = node->state;
    return state->offset;
}

static int coroutine_fn raw_open(struct node *node, const struct blockdev_options *options, struct error **err)
{
    const struct blockdev_options_raw *own = &options->u.raw;
    struct raw_state *state = node->state;
    uint64_t child = edge_size(node->file), offset = own->has_offset ? own->offset : 0;
    if (!is_aligned(offset, SECTOR) || (own->has_size && !is_aligned(own->size, SECTOR))) {
        return error_set(err, -EINVAL, "Node '%s': offset and size of a raw node must be multiples of %d", node->name,
                         SECTOR);
    }
    if (offset > child) {
        return error_set(err, -EINVAL,
                         "Node '%s': the offset %" G_GUINT64_FORMAT " is behind the end of '%s' (%" G_GUINT64_FORMAT
                         " bytes)",
                         node->name, offset, node->file->child->name, child);
    }
    if (own->has_size && own->size > child - offset) {
        return error_set(err, -EINVAL,
                         "Node '%s': offset %" G_GUINT64_FORMAT " and size %" G_GUINT64_FORMAT
                         " go beyond the end of '%s' (%" G_GUINT64_FORMAT " bytes)",
                         node->name, offset, own->size, node->file->child->name, child);
    }
    state->offset = offset;
    state->fixed = own->has_size;
    atomic_store(&node->size, own->has_size ? own->size : align_up(child - offset, SECTOR));
    node->filename = g_strdup(node_beneath_filters(node->file->child)->filename);
    return 0;
}

static int coroutine_fn raw_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to, unsigned flags)
{
    if (!buffers_elsewhere(to)) { /* a driver that takes part in tests refuses those, and is asked again */
        edge_event(node->file, BLKDEBUG_EVENT_READ_AIO);
    }
    return edge_read(node->file, raw_offset(node) + offset, bytes, to, flags);
}

static int coroutine_fn raw_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                  unsigned flags)
{
    if (!buffers_elsewhere(from)) {
        edge_event(node->file, BLKDEBUG_EVENT_WRITE_AIO);
    }
    return edge_write(node->file, raw_offset(node) + offset, bytes, from, flags);
}

static int coroutine_fn raw_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    return edge_write_zeroes(node->file, raw_offset(node) + offset, bytes, flags);
}

static int coroutine_fn raw_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    return edge_discard(node->file, raw_offset(node) + offset, bytes);
}

static int coroutine_fn raw_block_status(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    uint64_t from = raw_offset(node) + offset;
    if (from >= edge_size(node->file)) { /* the end of the last sector */
        *ret = (struct extent){.bytes = bytes, .flags = EXTENT_ZERO | EXTENT_ALLOCATED};
        return 0;
    }
    int r = edge_block_status(node->file, from, bytes, ret);
    if (r == 0) {
        ret->host_offset = from;
        ret->flags |= EXTENT_ALLOCATED | EXTENT_MAPPED;
    }
    return r;
}

static int check_size(const struct node *node, uint64_t size, struct error **err)
{
    const struct raw_state *state = node->state;
    if (state->fixed) {
        return error_set(err, -ENOTSUP, "Node '%s' is a window with a fixed size and cannot change it", node->name);
    }
    if (size > INT64_MAX - state->offset) {
        return error_set(err, -EFBIG, "Node '%s': the new size is too large", node->name);
    }
    return 0;
}

static int coroutine_fn raw_truncate(struct node *node, uint64_t size, struct error **err)
{
    int r = check_size(node, size, err);
    if (r < 0) {
        return r;
    }
    r = edge_truncate(node->file, raw_offset(node) + size);
    return r < 0 ? error_set_errno(err, r, "Cannot set the size of node '%s'", node->file->child->name) : 0;
}

static int coroutine_fn raw_grow(struct node *node, uint64_t size, enum preallocation_mode mode, struct error **err)
{
    int r = check_size(node, size, err);
    uint64_t end = raw_offset(node) + size;
    /* The node may count a last sector that the child has not whole. */
    return r < 0 || end <= edge_size(node->file) ? r : edge_grow(node->file, end, mode, err);
}

/* A raw image is its file: how to make one, and how large it will be, is the file's to say. */
static const struct image_driver raw_image = {
    .grow = raw_grow,
};

const struct driver driver_raw = {
    .name = "raw",
    .id = BLOCKDEV_DRIVER_RAW,
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct raw_state),
    .offloads = true,
    .open = raw_open,
    .read = raw_read,
    .write = raw_write,
    .write_zeroes = raw_write_zeroes,
    .discard = raw_discard,
    .block_status = raw_block_status,
    .truncate = raw_truncate,
    .image = &raw_image,
};

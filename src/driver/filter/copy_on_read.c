/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The copy-on-read filter: what is read from the images below the one that it shows is stored in that one, so that it
 * is not read from there again.
 *
 * 1. What is stored is what was read, and it is stored only where the image has nothing of its own: the format driver
 *    decides that atomically against writes (REQUEST_IF_UNALLOCATED). So no write is lost, and nothing visible changes.
 * 2. It works in whole clusters of the image.
 * 3. Its edge claims write-metadata of its own (driver.filtered_claim): nobody reads through an edge that would change
 *    the image behind the back of one who does not allow it.
 * 4. A node that was opened read-only stores nothing. A cluster that cannot be stored fails the read that wanted it.
 *
 * With `bottom`, what comes from below that image is shown and not stored. Once that image has left the chain (it was
 * committed), nothing is stored any more.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "driver/drivers.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

enum { PIECE = 1 << 20 };

struct copy_on_read {
    char *bottom; /* the name of a node, or NULL */
};

/* The image under `bottom`, whose data are not stored any more (*ret NULL: there is none). False: `bottom` is not in
 * the chain. The chain does not change under a request. */
static bool find_end(const struct node *node, struct node **ret)
{
    const struct copy_on_read *state = node->state;
    *ret = NULL;
    if (!state->bottom) {
        return true;
    }
    for (struct node *image = node_beneath_filters(node->filtered->child); image; image = node_backing(image)) {
        if (g_str_equal(image->name, state->bottom)) {
            *ret = node_backing(image);
            return true;
        }
    }
    return false;
}

static int coroutine_fn copy_on_read_open(struct node *node, const struct blockdev_options *options, struct error **err)
{
    struct copy_on_read *state = node->state;
    struct node *end;
    state->bottom = g_strdup(options->u.copy_on_read.bottom);
    if (!find_end(node, &end)) {
        error_set(err, -EINVAL, "Node '%s': there is no image '%s' (bottom) in the backing chain of '%s'", node->name,
                  state->bottom, node->filtered->child->name);
        error_hint(err, "It is the name of an image, not of a filter over it");
        g_free(state->bottom);
        return -EINVAL;
    }
    node->filename = g_strdup(node->filtered->child->filename);
    return 0;
}

static void coroutine_fn copy_on_read_close(struct node *node)
{
    struct copy_on_read *state = node->state;
    g_free(state->bottom);
}

/* Is the beginning of [offset, offset + *bytes) to be copied? *bytes becomes the length of what that is true for. */
static int coroutine_fn is_wanted(struct node *node, uint64_t offset, uint64_t *bytes, struct node *end)
{
    struct node *image = node_beneath_filters(node->filtered->child);
    struct extent extent;
    int code = edge_block_status(node->filtered, offset, *bytes, &extent);
    if (code < 0) {
        return code;
    }
    *bytes = extent.bytes;
    if (extent.flags & EXTENT_ALLOCATED || !end) {
        return !(extent.flags & EXTENT_ALLOCATED);
    }
    code = chain_block_status(image, end, offset, *bytes, &extent);
    if (code < 0) {
        return code;
    }
    *bytes = extent.bytes;
    return extent.flags & EXTENT_ALLOCATED ? 1 : 0;
}

/* Reads the clusters that [offset, offset + bytes) touches, stores them, and copies the range out. */
static int coroutine_fn copy_up(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to)
{
    uint64_t unit = max_u64(node->limits.cluster_size, 1), size = edge_size(node->filtered);
    uint64_t at = offset / unit * unit, stop = min_u64(div_up(offset + bytes, unit) * unit, size);
    uint64_t most = max_u64(PIECE / unit, 1) * unit;
    g_autofree char *bounce = g_try_malloc(min_u64(most, stop - at));
    int code = bounce ? 0 : -ENOMEM;
    while (code == 0 && at < stop) {
        struct iovec iov = {bounce, min_u64(most, stop - at)};
        code = edge_read(node->filtered, at, iov.iov_len, buffers_one(&iov), 0);
        if (code < 0) {
            break;
        }
        edge_event(node->filtered, BLKDEBUG_EVENT_COR_WRITE);
        if (memory_is_zero(bounce, iov.iov_len)) {
            code = edge_write_zeroes(node->filtered, at, iov.iov_len, REQUEST_IF_UNALLOCATED);
        } else {
            code = edge_write(node->filtered, at, iov.iov_len, buffers_one(&iov), REQUEST_IF_UNALLOCATED);
        }
        uint64_t from = max_u64(at, offset), until = min_u64(at + iov.iov_len, offset + bytes);
        buffers_copy_in(to, bounce + (from - at), until - from);
        to = buffers_advance(to, until - from);
        at += iov.iov_len;
    }
    return code;
}

static int coroutine_fn copy_on_read_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to,
                                          unsigned flags)
{
    struct node *end;
    if (!node->writable || !find_end(node, &end)) {
        return edge_read(node->filtered, offset, bytes, to, flags);
    }
    while (bytes) {
        uint64_t piece = bytes;
        int wanted = is_wanted(node, offset, &piece, end);
        if (wanted < 0) {
            return wanted;
        }
        int code = wanted ? copy_up(node, offset, piece, to) : edge_read(node->filtered, offset, piece, to, flags);
        if (code < 0) {
            return code;
        }
        to = buffers_advance(to, piece);
        offset += piece;
        bytes -= piece;
    }
    return 0;
}

const struct driver driver_copy_on_read = {
    .name = "copy-on-read",
    .id = BLOCKDEV_DRIVER_COPY_ON_READ,
    .kind = DRIVER_FILTER,
    .state_size = sizeof(struct copy_on_read),
    .write_if_unallocated = true,
    .filtered_claim = ACCESS_WRITE_METADATA,
    .open = copy_on_read_open,
    .close = copy_on_read_close,
    .read = copy_on_read_read,
};

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the open image is, and what changes it as a whole: alloc, map, length, info, truncate, flush.
 *
 * 1. "Allocated" is what the image itself has, whatever lies below it; -C and -s put nodes over it, and it is the top
 *    one that counts.
 * 2. A flush that fails says nothing and makes the exit status 1: that is what scripts look for.
 *
 * Sizes are printed by text.c; what is particular to a format, as img info prints it.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "schema/types.h"
#include "tool/img/img.h"
#include "tool/io/io.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>
#include <string.h>

/* Whether the beginning of [offset, offset + bytes) is allocated: 1 or 0, and *ret_bytes of it; a negative errno. */
static int coroutine_fn is_allocated(struct io *io, uint64_t offset, uint64_t bytes, uint64_t *ret_bytes)
{
    struct node *image = node_beneath_filters(backend_node(io->backend));
    struct extent extent;
    int code = backend_block_status(io->backend, node_backing(image), offset, bytes, &extent);
    if (code < 0) {
        return code;
    }
    *ret_bytes = extent.bytes;
    return node_backing(image) ? (extent.flags & EXTENT_ALLOCATED) != 0
                               : extent.depth == 0 && extent.flags & EXTENT_ALLOCATED;
}

int coroutine_fn io_command_alloc(struct io *io, int argc, char **argv)
{
    int64_t offset, bytes = 512;
    char size[64];
    int code = io_number_or_tell(argv[1], &offset);
    if (code == 0 && argc > 2) {
        code = io_number_or_tell(argv[2], &bytes);
    }
    if (code < 0) {
        return code;
    }
    uint64_t end = backend_size(io->backend), at = (uint64_t)offset, allocated = 0;
    uint64_t stop = at < end ? at + min_u64((uint64_t)bytes, end - at) : at;
    for (uint64_t part; at < stop; at += part) {
        code = is_allocated(io, at, stop - at, &part);
        if (code < 0) {
            struct error *error = NULL;
            error_set_errno(&error, code, "Failed to get allocation status");
            io_tell_error(io, error);
            return code;
        }
        allocated += code ? part : 0;
    }
    printf("%" G_GUINT64_FORMAT "/%" G_GUINT64_FORMAT " bytes allocated at offset %s\n", allocated,
           stop - (uint64_t)offset, io_size((double)offset, size));
    return 0;
}

int coroutine_fn io_command_map(struct io *io, int argc, char **argv)
{
    uint64_t end = backend_size(io->backend), part;
    for (uint64_t at = 0, bytes; at < end; at += bytes) {
        int first = is_allocated(io, at, end - at, &bytes), next = first;
        while (first >= 0 && at + bytes < end) {
            next = is_allocated(io, at + bytes, end - at - bytes, &part);
            if (next != first) {
                break;
            }
            bytes += part;
        }
        if (first < 0 || next < 0) {
            printf("is_allocated failed: %s\n", g_strerror(first < 0 ? -first : -next));
            return first < 0 ? first : next;
        }
        char length[64], offset[64];
        printf("%s (0x%" G_GINT64_MODIFIER "x) bytes %s at offset %s (0x%" G_GINT64_MODIFIER "x)\n",
               io_size((double)bytes, length), bytes, first ? "    allocated" : "not allocated",
               io_size((double)at, offset), at);
    }
    return 0;
}

int coroutine_fn io_command_length(struct io *io, int argc, char **argv)
{
    char size[64];
    printf("%s\n", io_size((double)backend_size(io->backend), size));
    return 0;
}

/* Behind what the guest sees of a qcow2 image, in whole L2 tables, its format has room for a machine's state. */
static uint64_t vm_state_offset(const struct node *node, json_t *specific)
{
    uint64_t cluster = node->limits.cluster_size;
    const struct node *image = node_beneath_filters((struct node *)node);
    if (image->driver->id != BLOCKDEV_DRIVER_QCOW2) {
        return 0;
    }
    uint64_t entry = json_is_true(json_object_get(specific, "extended-l2")) ? 16 : 8;
    uint64_t span = cluster * (cluster / entry);
    return div_up(atomic_load(&node->size), span) * span;
}

int coroutine_fn io_command_info(struct io *io, int argc, char **argv)
{
    struct node *node = io_image_node(io);
    char cluster[64], state[64];
    graph_lock(io->graph);
    json_t *described = graph_describe_node_flat(node);
    graph_unlock(io->graph);
    json_t *specific = json_object_get(json_object_get(json_object_get(described, "image"), "format-specific"), "data");
    printf("format name: %s\ncluster size: %s\nvm state offset: %s\n", node->driver->name,
           io_size(node->limits.cluster_size, cluster), io_size((double)vm_state_offset(node, specific), state));
    if (node->driver->id == BLOCKDEV_DRIVER_QCOW2 && json_object_size(specific)) {
        printf("Format specific information:\n");
        img_print_members(specific, 4);
    }
    json_decref(described);
    return 0;
}

static int coroutine_fn resize(struct io *io, uint64_t size, enum preallocation_mode mode, struct error **err)
{
    struct node *node = backend_node(io->backend);
    struct drain drain;
    if (mode == PREALLOCATION_MODE_OFF) {
        return backend_truncate(io->backend, size, err);
    }
    if (size < backend_size(io->backend)) {
        return error_set(err, -EINVAL, "Cannot use preallocation for shrinking files");
    }
    graph_lock(io->graph);
    graph_drain_begin(io->graph, &node, 1, NULL, &drain);
    int code = edge_grow(backend_edge(io->backend), size, mode, err);
    graph_drain_end(&drain);
    graph_unlock(io->graph);
    return code;
}

int coroutine_fn io_command_truncate(struct io *io, int argc, char **argv)
{
    enum preallocation_mode mode = PREALLOCATION_MODE_OFF;
    struct error *error = NULL;
    int64_t size;
    int code = 0;
    for (int option; (option = getopt(argc, argv, "m:")) != -1;) {
        if (option != 'm') {
            return io_usage(argv[0]);
        }
        if (preallocation_mode_parse(optarg, &mode, NULL) < 0) {
            code = error_set(&error, -EINVAL, "Invalid preallocation mode '%s'", optarg);
            io_tell_error(io, error);
            return code;
        }
    }
    if (optind != argc - 1) {
        return io_usage(argv[0]);
    }
    code = io_number_or_tell(argv[optind], &size);
    if (code == 0) {
        code = resize(io, (uint64_t)size, mode, &error);
        if (code < 0) {
            io_tell_error(io, error);
        }
    }
    return code;
}

int coroutine_fn io_command_flush(struct io *io, int argc, char **argv)
{
    return backend_flush(io->backend);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Two drivers around a copy of a point in time (copy/before.c): the filter copy-before-write, which calls its guard
 * before each change that enters through it, and snapshot-access, which shows the frozen view of such a filter. They
 * are one thing seen from two sides, and share its state.
 *
 * 1. Every change of the image enters through the filter: it is part of the image's head, from a drained moment on (the
 *    point in time) until it leaves under a drain. Changes that do not enter there (write-beneath) are not allowed by
 *    its operation.
 * 2. A user's filter holds an operation of its own as long as it is open: backup's claims on image and target. A job's
 *    filter has its job's.
 * 3. snapshot-access stands on the filter by a target edge, which no change of the graph moves; with it there the
 * filter does not leave.
 * 4. Guards that outlive their request (a time-out) are waited for by every drain (settle).
 * 5. The view has the size of that moment, and its own alignment: whoever is below pads.
 */
#include "driver/filter/copy_before_write.h"
#include "base/size.h"
#include "block/bitmap.h"
#include "block/graph.h"
#include "block/operation.h"
#include "copy/before.h"
#include <errno.h>
#include <glib.h>

#define UNIT_MIN (64 * KiB)
#define UNIT_MAX (64 * MiB)

struct copy_before_write {
    struct before *before;
    struct operation *operation; /* of a user's filter, whose `before` is its own; or NULL */
};

static const struct claim_clause clauses[] = {
    {.role = CLAIM_ROLE_NODE,
     .first = CLAIM_NODE,
     .require = ACCESS_READ_DATA,
     .deny = ACCESS_WRITE_BENEATH,
     .path = "node"},
    {.role = CLAIM_ROLE_NODE,
     .first = CLAIM_TARGET,
     .require = ACCESS_WRITE_DATA | ACCESS_WRITE_METADATA | ACCESS_ATTRIBUTES | ACCESS_READ_METADATA | ACCESS_READ_DATA,
     .deny = ACCESS_ALL & ~(ACCESS_READ_METADATA | ACCESS_READ_DATA),
     .path = "target"},
};
static const struct claim_table claims = {
    .operation = "copy-before-write", .clauses = clauses, .count = G_N_ELEMENTS(clauses)};

static struct before_edges edges_of(struct node *filter)
{
    return (struct before_edges){filter->filtered, filter->target};
}

void copy_before_write_set(struct node *filter, struct before *before)
{
    struct copy_before_write *state = filter->state;
    state->before = before;
}

/* --- opening --- */

static int check_options(const struct node *node, const struct blockdev_options_copy_before_write *options,
                         struct error **err)
{
    const struct node *image = node->filtered->child, *target = node->target->child;
    uint64_t unit = options->has_min_cluster_size && options->min_cluster_size ? options->min_cluster_size : UNIT_MIN;
    if (node->opened_for) {
        error_set(err, -EINVAL, "A copy-before-write filter takes its place over an image: it is a node of its own");
        error_hint(err, "Add it by a command of its own, with a node-name, and name it where it is used");
        return -EINVAL;
    }
    if (!is_power_of_two(unit)) {
        return error_set(err, -EINVAL, "min-cluster-size needs to be a power of 2");
    }
    if (unit > UNIT_MAX) {
        return error_set(err, -EINVAL, "min-cluster-size must be at most 64 MiB");
    }
    if (node_reaches(target, image)) {
        error_set(err, -EINVAL, "Node '%s' cannot take what is copied from '%s': it is that, or lies over it",
                  target->name, image->name);
        error_hint(err, "A target needs no backing file: snapshot-access shows what is not copied from the image");
        return -EINVAL;
    }
    if (atomic_load(&image->size) != atomic_load(&target->size)) {
        return error_set(err, -EINVAL, "Node '%s' and its target '%s' have different sizes", image->name, target->name);
    }
    return target->writable ? 0 : error_set(err, -EROFS, "Target '%s' is read-only", target->name);
}

/* Everything, or what a bitmap says. */
static int keep(struct before *before, struct graph *graph, const struct blockdev_options_copy_before_write *options,
                struct error **err)
{
    if (!options->bitmap) {
        before_keep(before, 0, before_size(before));
        return 0;
    }
    const struct node *owner = graph_find_or_error(graph, options->bitmap->node, err);
    const struct bitmap *bitmap = owner ? bitmap_find_or_error(owner, options->bitmap->name, err) : NULL;
    int code = bitmap ? bitmap_check(bitmap, BITMAP_ALLOW_READ_ONLY, err) : -ENOENT;
    uint64_t offset, bytes;
    for (uint64_t at = 0; code == 0 && bitmap_next(bitmap, at, &offset, &bytes); at = offset + bytes) {
        before_keep(before, offset, bytes);
    }
    return code;
}

static int begin(struct node *node, const struct blockdev_options_copy_before_write *options, struct error **err)
{
    struct copy_before_write *state = node->state;
    uint64_t unit = options->has_min_cluster_size ? options->min_cluster_size : 0;
    struct before_config config = {
        .size = atomic_load(&node->filtered->child->size),
        .unit = max_u64(max_u64(unit, UNIT_MIN), node->target->child->limits.cluster_size),
        .break_snapshot = options->has_on_cbw_error && options->on_cbw_error == ON_CBW_ERROR_BREAK_SNAPSHOT,
        .timeout_s = options->has_cbw_timeout ? (unsigned)options->cbw_timeout : 0,
    };
    struct operation_config operation = {
        .kind = "node",
        .id = node->name,
        .table = &claims,
        .bound = {[CLAIM_NODE] = node->filtered->child, [CLAIM_TARGET] = node->target->child},
    };
    int code = before_create(&config, &state->before);
    if (code < 0) {
        return error_set_errno(err, code, "Cannot keep track of node '%s'", node->filtered->child->name);
    }
    code = keep(state->before, node->graph, options, err);
    if (code == 0) {
        code = operation_begin(node->graph, &operation, &state->operation, err);
    }
    if (code == 0) {
        node->target->granted = operation_granted(state->operation, node->target->child);
    }
    return code;
}

static void coroutine_fn end(struct node *node)
{
    struct copy_before_write *state = node->state;
    if (state->operation || !node->opened_for) {
        operation_end_locked(state->operation);
        before_destroy(state->before);
    }
}

static int coroutine_fn cbw_open(struct node *node, const struct blockdev_options *options, struct error **err)
{
    const struct blockdev_options_copy_before_write *own = &options->u.copy_before_write;
    struct drain drain;
    int code = check_options(node, own, err);
    if (code < 0) {
        return code;
    }
    graph_drain_begin(node->graph, &node->filtered->child, 1, NULL, &drain);
    node->writable = node->wants_writable = true; /* whether the image may be written is decided there */
    node->discard = true;
    node->filename = g_strdup(node->filtered->child->filename);
    code = begin(node, own, err);
    if (code == 0) {
        code = graph_enter_filter_locked(node, err);
    }
    graph_drain_end(&drain);
    if (code < 0) {
        end(node);
    }
    return code;
}

static void coroutine_fn cbw_close(struct node *node)
{
    end(node);
}

/* --- the filter --- */

static int coroutine_fn cbw_guard(struct node *node, uint64_t offset, uint64_t bytes)
{
    const struct copy_before_write *state = node->state;
    struct before_edges edges = edges_of(node);
    return before_guard(state->before, &edges, offset, bytes);
}

static int coroutine_fn cbw_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                  unsigned flags)
{
    int code = flags & REQUEST_IF_UNALLOCATED ? 0 : cbw_guard(node, offset, bytes);
    return code < 0 ? code : edge_write(node->filtered, offset, bytes, from, flags);
}

static int coroutine_fn cbw_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    int code = flags & REQUEST_IF_UNALLOCATED ? 0 : cbw_guard(node, offset, bytes);
    return code < 0 ? code : edge_write_zeroes(node->filtered, offset, bytes, flags);
}

static int coroutine_fn cbw_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    int code = cbw_guard(node, offset, bytes);
    return code < 0 ? code : edge_discard(node->filtered, offset, bytes);
}

static void coroutine_fn cbw_settle(struct node *node)
{
    const struct copy_before_write *state = node->state;
    if (state->before) {
        before_settle(state->before);
    }
}

const struct driver driver_copy_before_write = {
    .name = "copy-before-write",
    .id = BLOCKDEV_DRIVER_COPY_BEFORE_WRITE,
    .kind = DRIVER_FILTER,
    .state_size = sizeof(struct copy_before_write),
    .write_if_unallocated = true,
    .guards = true,
    .open = cbw_open,
    .close = cbw_close,
    .write = cbw_write,
    .write_zeroes = cbw_write_zeroes,
    .discard = cbw_discard,
    .settle = cbw_settle,
};

/* --- the frozen view --- */

static struct before *view_of(const struct node *node, struct before_edges *ret_edges)
{
    struct node *filter = node->target->child;
    const struct copy_before_write *state = filter->state;
    *ret_edges = edges_of(filter);
    return state->before;
}

static int coroutine_fn view_open(struct node *node, const struct blockdev_options *options, struct error **err)
{
    struct before_edges edges;
    const struct node *filter = node->target->child;
    if (filter->driver != &driver_copy_before_write) {
        return error_set(err, -EINVAL, "Node '%s': 'file' is a node of driver 'copy-before-write', which '%s' is not",
                         node->name, filter->name);
    }
    atomic_store(&node->size, before_size(view_of(node, &edges)));
    node->writable = node->wants_writable = true; /* for discards */
    node->discard = true;
    node->filename = g_strdup(filter->filename);
    return 0;
}

static int coroutine_fn view_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to, unsigned flags)
{
    struct before_edges edges;
    struct before *before = view_of(node, &edges);
    return before_read(before, &edges, offset, bytes, to);
}

static int coroutine_fn view_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                   unsigned flags)
{
    return -EACCES;
}

static int coroutine_fn view_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    struct before_edges edges;
    struct before *before = view_of(node, &edges);
    return before_discard(before, &edges, offset, bytes);
}

static int coroutine_fn view_flush(struct node *node)
{
    return 0;
}

static int coroutine_fn view_block_status(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    struct before_edges edges;
    struct before *before = view_of(node, &edges);
    return before_block_status(before, &edges, offset, bytes, ret);
}

const struct driver driver_snapshot_access = {
    .name = "snapshot-access",
    .id = BLOCKDEV_DRIVER_SNAPSHOT_ACCESS,
    .kind = DRIVER_FORMAT,
    .open = view_open,
    .read = view_read,
    .write = view_write,
    .discard = view_discard,
    .flush = view_flush,
    .block_status = view_block_status,
};

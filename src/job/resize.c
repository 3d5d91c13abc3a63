/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Resizing a node on command. Owns the order of its steps; how a size changes is the driver's, who follows is
 * src/block's (request.c).
 *
 *   lock, claim, drain, writable, change the size, flush, not writable, let requests go on, unlock
 *
 * 1. Whether it grows or shrinks is found out under the lock that it is claimed and done under, so nothing is shrunk on
 *    the claims of a growth; nor by a command that was to make it grow when it began to wait.
 * 2. A size that is the same already is claimed as a growth, and changes nothing.
 *
 * The node named may have job filters over it; it is the image below them that changes, and they follow.
 */
#include "job/resize.h"
#include "access/queue.h"
#include "block/graph.h"
#include "block/operation.h"
#include "block/user.h"
#include "schema/claims.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

struct resize {
    struct graph *graph;
    struct node *node; /* a reference */
    uint64_t size;
    struct operation *operation;
    struct backend *backend;
};

/* Is it to get shorter? Who asked for a growth and waited does not cut what has become longer meanwhile. */
static int resize_check_direction(const struct resize *resize, bool *ret_shrinks, struct error **err)
{
    uint64_t size = atomic_load(&resize->node->size);
    bool shrinks = resize->size < size;
    const char *chosen = access_asker_note(resize->graph->ledger, shrinks ? "shrink" : "grow");
    if (shrinks && strcmp(chosen, "shrink") != 0) {
        return error_set(err, -EBUSY,
                         "Node '%s' was to grow to %" G_GUINT64_FORMAT " bytes, but while the command waited it has "
                         "become longer than that: %" G_GUINT64_FORMAT " bytes",
                         resize->node->name, resize->size, size);
    }
    *ret_shrinks = shrinks;
    return 0;
}

/* All that the arguments decide, up to the claims; graph->lock is held. */
static int resize_plan(struct resize *resize, const struct block_resize_args *args, struct operation_config *ret,
                       struct error **err)
{
    const char *name = args->node_name ? args->node_name : args->device;
    if (!name || (args->node_name && args->device)) {
        return error_set(err, -EINVAL, "Exactly one of 'device' and 'node-name' must be given");
    }
    struct node *node = graph_find(resize->graph, name);
    if (!node) {
        return error_set(err, -ENODEV, "Cannot find device='%s' nor node-name='%s'", args->device ? args->device : "",
                         args->node_name ? args->node_name : "");
    }
    if (args->size < 0) {
        return error_set(err, -EINVAL, "Parameter 'size' expects a non-negative value");
    }
    resize->node = node_ref(node_beneath_filters(node));
    resize->size = (uint64_t)args->size;
    bool shrinks = false;
    int result = resize_check_direction(resize, &shrinks, err);
    if (result < 0) {
        return result;
    }
    *ret = (struct operation_config){
        .kind = "command",
        .id = resize->node->name,
        .table = &block_resize_claims,
        .bound = {[CLAIM_NODE] = resize->node},
        .conditions = shrinks ? CLAIM_IF_SHRINK : 0,
    };
    return 0;
}

static int coroutine_fn resize_writable(struct resize *resize, struct error **err)
{
    int result = backend_truncate_locked(resize->backend, resize->size, err);
    if (result == 0) {
        result = edge_flush(backend_edge(resize->backend));
        if (result < 0) {
            error_set_errno(err, result, "Node '%s' has its new size, which may not be on stable storage",
                            resize->node->name);
        }
    }
    return result;
}

/* graph->lock is held. */
static int coroutine_fn resize_do(struct resize *resize, struct error **err)
{
    struct drain drain;
    unsigned granted = operation_granted(resize->operation, resize->node);
    g_autofree char *owner = g_strdup_printf("block_resize %s", resize->node->name);
    resize->backend = backend_create(resize->graph, owner);
    int result = backend_attach_locked(resize->backend, resize->node, granted, err);
    if (result < 0) {
        return result;
    }
    graph_drain_begin(resize->graph, &resize->node, 1, NULL, &drain);
    result = node_writable_begin_locked(resize->node, err);
    if (result == 0) {
        result = resize_writable(resize, err);
        node_writable_end_locked(resize->node);
    }
    graph_drain_end(&drain);
    return result;
}

int coroutine_fn resize_node(struct graph *graph, const struct block_resize_args *args, struct error **err)
{
    struct resize resize = {.graph = graph};
    struct operation_config config;
    graph_lock(graph);
    int result = resize_plan(&resize, args, &config, err);
    if (result == 0) {
        result = operation_begin(graph, &config, &resize.operation, err);
    }
    if (result == 0) {
        result = resize_do(&resize, err);
    }
    graph_unlock(graph);
    backend_destroy(resize.backend);
    operation_end(resize.operation);
    node_release(resize.node);
    return result;
}

int coroutine_fn resize_check(struct graph *graph, const struct block_resize_args *args, json_t **ret_claims,
                              struct error **err)
{
    struct resize resize = {.graph = graph};
    struct operation_config config;
    graph_lock(graph);
    int result = resize_plan(&resize, args, &config, err);
    if (result == 0) {
        result = operation_preview(graph, &config, ret_claims, err);
    }
    if (result == 0) {
        result = node_writable_check(resize.node, err);
    }
    graph_unlock(graph);
    node_release(resize.node);
    return result;
}

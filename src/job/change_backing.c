/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Changing the name that an image's header has for its backing file. Owns the checks and the order of the steps; the
 * writing is relink.c's.
 *
 * 1. The new name is another name of the image that is open there: so the header's format becomes that image's, and an
 *    image without a backing image, or a name that is empty, is refused: what the image shows would change with the
 * next opening. Whether the name leads there cannot be checked (it may be meant for another host), and is not.
 * 2. The name was chosen for what the image leant on when the command came. Where a job that the command had to wait
 *    for (its last step, or with on-conflict=wait all of it) has changed that, the command is refused.
 * 3. A failure has changed nothing.
 */
#include "job/change_backing.h"
#include "access/queue.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/operation.h"
#include "job/relink.h"
#include "schema/claims.h"
#include <errno.h>
#include <string.h>

struct change_backing {
    struct graph *graph;
    struct node *node; /* a reference */
    struct operation *operation;
};

/* All that the arguments decide, up to the claims; graph->lock is held. */
static int change_plan(struct change_backing *change, const struct change_backing_file_args *args,
                       struct operation_config *ret, struct error **err)
{
    struct node *device = graph_find(change->graph, args->device), *node;
    if (!device) {
        return error_set(err, -ENODEV, "Cannot find device='%s' nor node-name='%s'", args->device, args->device);
    }
    device = node_beneath_filters(device);
    node = relink_find_node(change->graph, args->image_node_name, err);
    if (!node) {
        return -ENODEV;
    }
    if (node != device && !node_is_above(device, node)) {
        return error_set(err, -EINVAL, "Node '%s' is not in the backing chain of '%s'", node->name, device->name);
    }
    if (!node_backing(node)) {
        return error_set(err, -EINVAL, "Node '%s' has no backing image, so its header is to name none", node->name);
    }
    if (!args->backing_file[0]) {
        error_set(err, -EINVAL, "'backing-file' is empty, but node '%s' needs its backing image '%s'", node->name,
                  node_backing(node)->name);
        error_hint(err, "block-stream makes an image independent of what is below it");
        return -EINVAL;
    }
    change->node = node_ref(node);
    *ret = (struct operation_config){
        .kind = "command",
        .id = node->name,
        .table = &change_backing_file_claims,
        .bound = {[CLAIM_NODE] = node},
    };
    return 0;
}

/* graph->lock is held, and the node is drained. */
static int coroutine_fn change_write(struct change_backing *change, const char *file, struct error **err)
{
    struct relink relink = {.operation = change->operation};
    struct backing_name name;
    int result = relink_name(change->node, node_backing(change->node), file, true, &name, err);
    if (result == 0) {
        result = relink_write(&relink, change->node, &name, err);
        backing_name_clear(&name);
    }
    relink_clear(&relink);
    return result;
}

/* graph->lock is held. */
static int coroutine_fn change_do(struct change_backing *change, const char *file, struct error **err)
{
    struct drain drain;
    graph_drain_begin(change->graph, &change->node, 1, NULL, &drain);
    int result = node_writable_begin_locked(change->node, err);
    if (result == 0) {
        result = change_write(change, file, err);
        node_writable_end_locked(change->node);
    }
    graph_drain_end(&drain);
    return result;
}

/* The name of the image's backing node, or NULL; g_free(). */
static char *backing_now(struct graph *graph, const char *name)
{
    const struct node *node = graph_find(graph, name), *below = node ? node_backing(node) : NULL;
    return below ? g_strdup(below->name) : NULL;
}

int coroutine_fn change_backing_file(struct graph *graph, const struct change_backing_file_args *args,
                                     struct error **err)
{
    struct change_backing change = {.graph = graph};
    struct operation_config config;
    g_autofree char *before = backing_now(graph, args->image_node_name);
    graph_lock(graph);
    g_autofree char *now = backing_now(graph, args->image_node_name);
    int result = change_plan(&change, args, &config, err);
    if (result == 0 && strcmp(access_asker_note(graph->ledger, before ? before : ""), now) != 0) {
        result = error_set(err, -EBUSY, "Node '%s' leans on '%s' since a job ended while this command waited",
                           args->image_node_name, now);
        error_hint(err, "Look at the graph again, and name that image if its name is to change");
    }
    if (result == 0) {
        result = operation_begin(graph, &config, &change.operation, err);
    }
    if (result == 0) {
        result = change_do(&change, args->backing_file, err);
    }
    graph_unlock(graph);
    operation_end(change.operation);
    node_release(change.node);
    return result;
}

int coroutine_fn change_backing_file_check(struct graph *graph, const struct change_backing_file_args *args,
                                           json_t **ret_claims, struct error **err)
{
    struct change_backing change = {.graph = graph};
    struct operation_config config;
    graph_lock(graph);
    int result = change_plan(&change, args, &config, err);
    if (result == 0) {
        result = operation_preview(graph, &config, ret_claims, err);
    }
    if (result == 0) {
        result = node_writable_check(change.node, err);
    }
    graph_unlock(graph);
    node_release(change.node);
    return result;
}

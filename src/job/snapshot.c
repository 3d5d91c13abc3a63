/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Snapshots by overlay. Owns the checks of an overlay (O), the order of the steps that put it over a node (N), and the
 * way back; the moving of edges is the transaction's, strings in headers are relink.c's, making an image new_image.c's.
 *
 * In apply, all drained:
 *
 * - O's header gets N's name, if it names nothing: else the chain would be gone with the next opening.
 * - One graph transaction: O leans on N's head, and the users of the head move to O.
 * - The headers of the images that leant on N get O's name. O holds nothing yet, so after a crash between two of these,
 *   or before them, each image shows the same whether it leads to O or to N.
 *
 * 1. O is whole, writable if N is written, at least as long, and nobody's before. So what N's users see does not
 * change.
 * 2. From the commit on N is written by nobody but jobs that commit into it: it stops being open for writing, in clean,
 *    when users go on. What is not yet on stable storage is flushed before, without holding anybody up;
 *    until it is, a flush of O flushes N as well (node->unsettled).
 * 3. snapshot_withdraw() undoes in reverse what apply did, from whatever point.
 */
#include "job/snapshot.h"
#include "block/driver.h"
#include "block/enforce.h"
#include "block/graph.h"
#include "block/new_image.h"
#include "block/operation.h"
#include "block/user.h"
#include "job/relink.h"
#include "schema/claims.h"
#include <errno.h>
#include <string.h>

struct snapshot {
    const struct claim_table *table;
    const struct blockdev_snapshot_sync *sync; /* or NULL */
    const char *node_name, *overlay_name;      /* borrowed from the arguments */
    struct node *node, *overlay;               /* references */
    struct node *image;                        /* N beneath users' filters; a reference while `writing` */
    struct operation *operation;
    struct relink relink;
    GPtrArray *relinked; /* struct node, references, made writable for their headers */
    bool moved;
    bool writing; /* a node_writable_begin() of ours on `image` */
};

/* --- what the arguments mean; graph->lock is held --- */

static int snapshot_find_node(struct snapshot *snapshot, struct graph *graph, struct error **err)
{
    const struct blockdev_snapshot_sync *sync = snapshot->sync;
    const char *device = sync ? sync->device : snapshot->node_name;
    const char *name = sync ? sync->node_name : snapshot->node_name;
    struct node *node = device ? graph_find(graph, device) : NULL;
    if (!node && name) {
        node = graph_find(graph, name);
    }
    if (!node) {
        return error_set(err, -ENODEV, "Cannot find device='%s' nor node-name='%s'", device ? device : "",
                         name ? name : "");
    }
    snapshot->node = node_ref(node);
    return 0;
}

static int snapshot_check_unused(const struct snapshot *snapshot, struct error **err)
{
    const struct node *overlay = snapshot->overlay;
    if (overlay == snapshot->node) {
        return error_set(err, -EINVAL, "Making '%s' a backing child of '%s' would create a cycle", overlay->name,
                         overlay->name);
    }
    if (!list_is_empty(&overlay->parents)) {
        return error_set(err, -EBUSY, "The overlay is already in use: node '%s'", overlay->name);
    }
    if (!overlay->driver->backing) {
        return error_set(err, -EINVAL, "The overlay does not support backing images: node '%s' is of format '%s'",
                         overlay->name, overlay->driver->name);
    }
    if (overlay->backing) {
        return error_set(err, -EINVAL, "The overlay already has a backing image: node '%s' leans on '%s'",
                         overlay->name, node_beneath_filters(overlay->backing->child)->name);
    }
    return 0;
}

/* Users of N must find in O what they had. */
static int snapshot_check_fit(const struct snapshot *snapshot, struct error **err)
{
    const struct node *node = snapshot->node, *overlay = snapshot->overlay;
    uint64_t size = atomic_load(&node->size), overlay_size = atomic_load(&overlay->size);
    unsigned required, denied;
    if (overlay_size < size) {
        return error_set(err, -EINVAL,
                         "The overlay is too small: node '%s' has %" G_GUINT64_FORMAT
                         " bytes, node '%s' %" G_GUINT64_FORMAT,
                         overlay->name, overlay_size, node->name, size);
    }
    access_node_masks(node->graph->ledger, node_beneath_filters((struct node *)node)->name, &required, &denied);
    if ((required & ACCESS_WRITE_DATA) && !overlay->wants_writable) {
        int code = error_set(err, -EROFS, "The overlay is read-only: node '%s'", overlay->name);
        error_hint(err, "Node '%s' is written, so what takes its place must be writable", node->name);
        return code;
    }
    return 0;
}

/* The headers of images that lean on N, which are to call O. */
static int snapshot_check_overlays(const struct snapshot *snapshot, struct error **err)
{
    int code = 0;
    list_for_each (link, &node_head(snapshot->node)->parents) {
        const struct edge *edge = container_of(link, struct edge, child_link);
        struct backing_name name;
        if (code < 0 || edge->role != EDGE_BACKING || edge->parent->stale) {
            continue;
        }
        if (!edge->parent->driver->change_backing) {
            return error_set(err, -ENOTSUP,
                             "Driver '%s' of node '%s', which leans on '%s', cannot change its backing file",
                             edge->parent->driver->name, edge->parent->name, snapshot->node->name);
        }
        code = relink_name(edge->parent, snapshot->overlay, NULL, true, &name, err);
        if (code == 0) {
            backing_name_clear(&name);
            code = node_writable_check(edge->parent, err);
        }
    }
    return code;
}

static struct operation_config snapshot_config(const struct snapshot *snapshot)
{
    return (struct operation_config){
        .kind = "command",
        .id = snapshot->node->name,
        .table = snapshot->table,
        .bound = {[CLAIM_NODE] = snapshot->node, [CLAIM_OVERLAY] = snapshot->overlay},
    };
}

static int coroutine_fn snapshot_plan(struct action *action, struct error **err)
{
    struct snapshot *snapshot = action->state;
    int code = snapshot->node ? 0 : snapshot_find_node(snapshot, action->graph, err);
    if (code == 0 && !snapshot->overlay) {
        struct node *overlay = graph_find(action->graph, snapshot->overlay_name);
        code = overlay ? 0
                       : error_set(err, -ENODEV, "Cannot find device='%s' nor node-name='%s'", snapshot->overlay_name,
                                   snapshot->overlay_name);
        snapshot->overlay = overlay ? node_ref(overlay) : NULL;
    }
    if (code == 0) {
        code = snapshot_check_unused(snapshot, err);
    }
    if (code == 0) {
        code = snapshot_check_fit(snapshot, err);
    }
    if (code == 0) {
        code = snapshot_check_overlays(snapshot, err);
    }
    if (code == 0) {
        action_drain(action, snapshot->node);
        action_drain(action, snapshot->overlay);
    }
    return code;
}

static int coroutine_fn snapshot_preview(struct action *action, json_t **ret_claims, struct error **err)
{
    struct operation_config config = snapshot_config(action->state);
    return operation_preview(action->graph, &config, ret_claims, err);
}

/* --- doing; all drained --- */

/* O's own header. An image that has no file name (a device of its own, memory) cannot be named: then nothing can. */
static int coroutine_fn snapshot_name_node(struct snapshot *snapshot, struct error **err)
{
    struct backing_name name;
    const struct node *image = node_beneath_filters(snapshot->node);
    if (snapshot->overlay->header_backing || !image->filename || !snapshot->overlay->driver->change_backing) {
        return 0;
    }
    int code = node_writable_begin_locked(snapshot->overlay, err);
    if (code == 0) {
        g_ptr_array_add(snapshot->relinked, node_ref(snapshot->overlay));
        code = relink_name(snapshot->overlay, image, NULL, true, &name, err);
    }
    if (code == 0) {
        code = relink_write(&snapshot->relink, snapshot->overlay, &name, err);
        backing_name_clear(&name);
    }
    return code;
}

static int snapshot_move(struct snapshot *snapshot, struct graph *graph, struct error **err)
{
    struct node *head = node_head(snapshot->node);
    g_autofree char *subject = g_strdup_printf("%s %s", snapshot->table->operation, snapshot->node->name);
    struct transaction *transaction = graph_begin(graph, subject);
    transaction_by(transaction, snapshot->operation);
    transaction_attach(transaction, snapshot->overlay, EDGE_BACKING, head, NULL);
    transaction_move_users(transaction, head, snapshot->overlay);
    int code = graph_commit(transaction, err);
    snapshot->moved = code == 0;
    return code;
}

static void snapshot_move_back(struct snapshot *snapshot, struct graph *graph)
{
    auto_error error = NULL;
    struct node *head = snapshot->overlay->backing->child;
    struct transaction *transaction = graph_begin(graph, "taking a snapshot back");
    transaction_takes_back(transaction);
    transaction_move_parents(transaction, snapshot->overlay, head, NULL);
    transaction_detach(transaction, snapshot->overlay->backing);
    if (graph_commit(transaction, &error) < 0) {
        g_error("The overlay '%s' cannot be taken away: %s", snapshot->overlay->name,
                error ? error->message : "unknown error");
    }
    snapshot->moved = false;
}

/* What leans on O now, and named N. */
static int coroutine_fn snapshot_name_overlay(struct snapshot *snapshot, struct error **err)
{
    int code = 0;
    list_for_each (link, &snapshot->overlay->parents) {
        struct edge *edge = container_of(link, struct edge, child_link);
        struct backing_name name;
        if (code < 0 || edge->role != EDGE_BACKING || edge->parent->stale) {
            continue;
        }
        code = node_writable_begin_locked(edge->parent, err);
        if (code == 0) {
            g_ptr_array_add(snapshot->relinked, node_ref(edge->parent));
            code = relink_name(edge->parent, snapshot->overlay, NULL, true, &name, err);
        }
        if (code == 0) {
            code = relink_write(&snapshot->relink, edge->parent, &name, err);
            backing_name_clear(&name);
        }
    }
    return code;
}

/* graph->lock is held. */
static void coroutine_fn snapshot_end_relinking(struct snapshot *snapshot)
{
    for (unsigned i = 0; i < snapshot->relinked->len; i++) {
        node_writable_end_locked(snapshot->relinked->pdata[i]);
        node_unref(snapshot->relinked->pdata[i]);
    }
    g_ptr_array_set_size(snapshot->relinked, 0);
    relink_clear(&snapshot->relink);
    operation_end_locked(snapshot->operation);
    snapshot->operation = NULL;
}

static void coroutine_fn snapshot_withdraw(struct action *action)
{
    struct snapshot *snapshot = action->state;
    if (snapshot->moved) {
        snapshot_move_back(snapshot, action->graph);
    }
    relink_undo(&snapshot->relink);
    snapshot_end_relinking(snapshot);
    if (snapshot->writing) {
        snapshot->writing = false;
        node_writable_end_locked(snapshot->image);
        node_unref(snapshot->image);
    }
}

static int coroutine_fn snapshot_apply(struct action *action, struct error **err)
{
    struct snapshot *snapshot = action->state;
    struct operation_config config = snapshot_config(snapshot);
    int code = operation_begin(action->graph, &config, &snapshot->operation, err);
    if (code < 0) {
        return code;
    }
    snapshot->relink.operation = snapshot->operation;
    code = enforce_claim(snapshot->operation, snapshot->node, ACCESS_READ_DATA, "linking to an image", err);
    snapshot->image = node_beneath_filters(snapshot->node);
    if (code == 0 && snapshot->image->wants_writable && snapshot->image->writable) {
        code = node_writable_begin_locked(snapshot->image, err);
        snapshot->writing = code == 0;
        snapshot->image = code == 0 ? node_ref(snapshot->image) : NULL;
    }
    if (code == 0) {
        code = snapshot_name_node(snapshot, err);
    }
    if (code == 0) {
        code = snapshot_move(snapshot, action->graph, err);
    }
    if (code == 0) {
        code = snapshot_name_overlay(snapshot, err);
    }
    if (code < 0) {
        snapshot_withdraw(action);
    }
    return code;
}

static void coroutine_fn snapshot_commit(struct action *action)
{
    struct snapshot *snapshot = action->state;
    snapshot_end_relinking(snapshot);
    if (snapshot->writing) {
        node_renounce_writing(snapshot->image);
        atomic_store(&snapshot->image->unsettled, true); /* what users have written there, their flushes cover still */
    }
    if (snapshot->sync && !snapshot->overlay->monitor_owned) {
        snapshot->overlay->monitor_owned = true;
        node_ref(snapshot->overlay);
    }
}

/* --- the end --- */

/* What users have written to N, on stable storage. A failure shows again when N stops writing, or is the next flush's.
 */
static void coroutine_fn snapshot_flush(struct graph *graph, struct node *image)
{
    struct backend *backend = backend_create(graph, "blockdev-snapshot");
    if (backend_attach(backend, image, 0, NULL) == 0 && backend_flush(backend) == 0) {
        atomic_store(&image->unsettled, false);
    }
    backend_destroy(backend);
}

static void coroutine_fn snapshot_clean(struct action *action)
{
    struct snapshot *snapshot = action->state;
    if (snapshot->writing) {
        snapshot_flush(action->graph, snapshot->image);
        node_writable_end(snapshot->image);
        node_release(snapshot->image);
    }
    node_release(snapshot->node);
    node_release(snapshot->overlay);
    g_ptr_array_free(snapshot->relinked, TRUE);
    g_free(snapshot);
}

static const struct action_kind snapshot_kind = {
    .name = "blockdev-snapshot",
    .plan = snapshot_plan,
    .apply = snapshot_apply,
    .revert = snapshot_withdraw,
    .commit = snapshot_commit,
    .clean = snapshot_clean,
    .preview = snapshot_preview,
};

static struct snapshot *snapshot_create(void)
{
    struct snapshot *snapshot = g_new0(struct snapshot, 1);
    snapshot->relinked = g_ptr_array_new();
    return snapshot;
}

void snapshot_action(struct action *ret, const struct blockdev_snapshot *args)
{
    struct snapshot *snapshot = snapshot_create();
    snapshot->table = &blockdev_snapshot_claims;
    snapshot->node_name = args->node;
    snapshot->overlay_name = args->overlay;
    *ret = (struct action){.kind = &snapshot_kind, .state = snapshot};
}

/* --- with an overlay that is made for it --- */

/* All that can be said before a file is made; graph->lock is held. */
static int snapshot_sync_plan(struct snapshot *snapshot, struct graph *graph, struct error **err)
{
    const struct blockdev_snapshot_sync *sync = snapshot->sync;
    int code = snapshot_find_node(snapshot, graph, err);
    if (code == 0 && !sync->snapshot_node_name && sync->node_name) {
        code = error_set(err, -EINVAL, "New overlay node-name missing");
    }
    if (code == 0 && sync->snapshot_node_name && graph_find(graph, sync->snapshot_node_name)) {
        code = error_set(err, -EEXIST, "New overlay node-name already in use");
    }
    if (code == 0 && sync->snapshot_node_name) {
        code = graph_check_name(graph, sync->snapshot_node_name, err);
    }
    if (code == 0 && sync->mode != NEW_IMAGE_MODE_EXISTING && !node_beneath_filters(snapshot->node)->filename) {
        code = error_set(err, -EINVAL, "Node '%s' has no file name that the header of the overlay could hold",
                         snapshot->node->name);
    }
    return code;
}

static int coroutine_fn snapshot_sync_make(struct snapshot *snapshot, struct graph *graph, struct error **err)
{
    const struct blockdev_snapshot_sync *sync = snapshot->sync;
    const struct node *image = node_beneath_filters(snapshot->node);
    g_autofree char *below = !image->filename                       ? NULL
                             : image_name_protocol(image->filename) ? g_strdup(image->filename)
                                                                    : g_canonicalize_filename(image->filename, NULL);
    struct new_image config = {
        .filename = sync->snapshot_file,
        .format = sync->format,
        .node_name = sync->snapshot_node_name,
        .mode = sync->mode,
        .size = atomic_load(&snapshot->node->size),
        .backing = below,
        .backing_format = image->driver->kind == DRIVER_PROTOCOL ? "raw" : image->driver->name,
        .no_flush = image->no_flush,
        .direct = image->direct,
        .discard = image->discard,
    };
    return new_image_open(graph, &config, &snapshot->overlay, err);
}

/* A refusal that can be seen now leaves no file behind, and joins the queue if the command may wait. */
static int coroutine_fn snapshot_sync_prepare(struct action *action, struct error **err)
{
    struct snapshot *snapshot = action->state;
    graph_lock(action->graph);
    int code = snapshot_sync_plan(snapshot, action->graph, err);
    if (code == 0) {
        struct operation_config config = snapshot_config(snapshot);
        code = operation_begin(action->graph, &config, &snapshot->operation, err);
        if (code == 0) {
            operation_end_locked(g_steal_pointer(&snapshot->operation));
        }
    }
    graph_unlock(action->graph);
    return code < 0 ? code : snapshot_sync_make(snapshot, action->graph, err);
}

static int coroutine_fn snapshot_sync_preview(struct action *action, json_t **ret_claims, struct error **err)
{
    struct snapshot *snapshot = action->state;
    int code = snapshot_sync_plan(snapshot, action->graph, err);
    return code < 0 ? code : snapshot_preview(action, ret_claims, err);
}

/* In the dry run there is no overlay, so there is nothing to plan; snapshot_sync_preview() looks at the arguments. */
static int coroutine_fn snapshot_sync_plan_made(struct action *action, struct error **err)
{
    const struct snapshot *snapshot = action->state;
    return snapshot->overlay ? snapshot_plan(action, err) : 0;
}

static const struct action_kind snapshot_sync_kind = {
    .name = "blockdev-snapshot-sync",
    .prepare = snapshot_sync_prepare,
    .plan = snapshot_sync_plan_made,
    .apply = snapshot_apply,
    .revert = snapshot_withdraw,
    .commit = snapshot_commit,
    .clean = snapshot_clean,
    .preview = snapshot_sync_preview,
};

void snapshot_sync_action(struct action *ret, const struct blockdev_snapshot_sync *args)
{
    struct snapshot *snapshot = snapshot_create();
    snapshot->table = &blockdev_snapshot_sync_claims;
    snapshot->sync = args;
    *ret = (struct action){.kind = &snapshot_sync_kind, .state = snapshot};
}

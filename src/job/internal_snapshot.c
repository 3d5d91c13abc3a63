/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Snapshots inside images that are in use. Owns the checks of names and the order: claims, writable, the driver's work
 * under the drain. How it is stored, safely at every moment, is the driver's.
 *
 * 1. A name is given to one snapshot of an image only, so it finds the one that is to be taken back.
 * 2. The image is writable for as long as the driver works.
 * 3. Deleting claims nothing: what the image shows stays.
 */
#include "job/internal_snapshot.h"
#include "block/driver.h"
#include "block/enforce.h"
#include "block/graph.h"
#include "block/operation.h"
#include "loop/loop.h"
#include "schema/claims.h"
#include <errno.h>
#include <string.h>

struct internal_snapshot {
    const struct blockdev_snapshot_internal_sync *args;
    struct node *node; /* a reference */
    struct operation *operation;
    bool writing; /* a node_writable_begin() of ours */
};

static struct node *find_device(struct graph *graph, const char *device, struct error **err)
{
    struct node *node = graph_find(graph, device);
    if (!node) {
        error_set(err, -ENODEV, "Cannot find device='%s' nor node-name='%s'", device, device);
    }
    return node ? node_beneath_filters(node) : NULL;
}

/* The snapshot with this id and this name (NULL: any), or NULL. */
static const struct snapshot_info *find_snapshot(const struct snapshot_info_list *list, const char *id,
                                                 const char *name)
{
    for (size_t i = 0; list && i < list->count; i++) {
        const struct snapshot_info *info = list->items[i];
        if ((!id || strcmp(info->id, id) == 0) && (!name || strcmp(info->name, name) == 0)) {
            return info;
        }
    }
    return NULL;
}

/* --- making one --- */

static int check_name(const struct node *node, const char *device, const char *name, struct error **err)
{
    const struct image_driver *image = node->driver->image;
    struct snapshot_info_list *list = NULL;
    if (!image || !image->snapshot_create) {
        return error_set(err, -ENOTSUP, "Block format '%s' used by device '%s' does not support internal snapshots",
                         node->driver->name, device);
    }
    if (!*name) {
        return error_set(err, -EINVAL, "Name is empty");
    }
    int code = image->snapshot_list((struct node *)node, &list, err);
    if (code == 0 && find_snapshot(list, NULL, name)) {
        code = error_set(err, -EEXIST, "Snapshot with name '%s' already exists on device '%s'", name, device);
    }
    snapshot_info_list_free(list);
    return code;
}

static int coroutine_fn internal_plan(struct action *action, struct error **err)
{
    struct internal_snapshot *snapshot = action->state;
    struct node *node = find_device(action->graph, snapshot->args->device, err);
    if (!node) {
        return -ENODEV;
    }
    snapshot->node = node_ref(node);
    action_drain(action, node);
    int code = check_name(node, snapshot->args->device, snapshot->args->name, err);
    return code < 0 ? code : node_writable_check(node, err);
}

static struct operation_config internal_config(const struct internal_snapshot *snapshot)
{
    return (struct operation_config){.kind = "command",
                                     .id = snapshot->node->name,
                                     .table = &blockdev_snapshot_internal_sync_claims,
                                     .bound = {[CLAIM_NODE] = snapshot->node}};
}

/* Ends what apply has begun, but for the snapshot. */
static void coroutine_fn internal_end(struct internal_snapshot *snapshot)
{
    if (snapshot->writing) {
        node_writable_end_locked(snapshot->node);
        snapshot->writing = false;
    }
    operation_end_locked(g_steal_pointer(&snapshot->operation));
}

static int coroutine_fn internal_make(struct internal_snapshot *snapshot, struct error **err)
{
    struct node *node = snapshot->node;
    int64_t now_us = loop_realtime_us();
    struct snapshot_info info = {
        .name = snapshot->args->name, .date_sec = now_us / 1000000, .date_nsec = now_us % 1000000 * 1000};
    int code = enforce_claim(snapshot->operation, node, ACCESS_READ_DATA, "keeping the content", err);
    if (code == 0) {
        code = enforce_claim(snapshot->operation, node, ACCESS_WRITE_METADATA, "making a snapshot inside", err);
    }
    if (code == 0) {
        code = node_writable_begin_locked(node, err);
        snapshot->writing = code == 0;
    }
    return code < 0 ? code : node->driver->image->snapshot_create(node, &info, err);
}

static int coroutine_fn internal_apply(struct action *action, struct error **err)
{
    struct internal_snapshot *snapshot = action->state;
    struct operation_config config = internal_config(snapshot);
    int code = operation_begin(action->graph, &config, &snapshot->operation, err);
    if (code == 0) {
        code = internal_make(snapshot, err);
    }
    if (code < 0) {
        internal_end(snapshot);
    }
    return code;
}

/* *ret (may be NULL): what it was. -ENOENT without an error: there is none. */
static int coroutine_fn delete_by_name(struct node *node, const char *id, const char *name, struct snapshot_info **ret,
                                       struct error **err)
{
    struct snapshot_info_list *list = NULL;
    const struct image_driver *image = node->driver->image;
    int code = image->snapshot_list(node, &list, err);
    const struct snapshot_info *found = code == 0 ? find_snapshot(list, id, name) : NULL;
    if (code == 0 && !found) {
        code = -ENOENT;
    }
    if (code == 0) {
        code = image->snapshot_delete(node, found->id, err);
    }
    for (size_t i = 0; code == 0 && ret && i < list->count; i++) {
        if (list->items[i] == found) {
            *ret = g_steal_pointer(&list->items[i]);
            list->items[i] = list->items[--list->count];
            break;
        }
    }
    snapshot_info_list_free(list);
    return code;
}

static void coroutine_fn internal_revert(struct action *action)
{
    struct internal_snapshot *snapshot = action->state;
    auto_error error = NULL;
    if (delete_by_name(snapshot->node, NULL, snapshot->args->name, NULL, &error) < 0) {
        g_warning("Snapshot '%s' inside node '%s' stays: %s", snapshot->args->name, snapshot->node->name,
                  error ? error->message : "it is not found");
    }
    internal_end(snapshot);
}

static void coroutine_fn internal_commit(struct action *action)
{
    internal_end(action->state);
}

static void coroutine_fn internal_clean(struct action *action)
{
    struct internal_snapshot *snapshot = action->state;
    node_release(snapshot->node);
    g_free(snapshot);
}

static int coroutine_fn internal_preview(struct action *action, json_t **ret_claims, struct error **err)
{
    struct operation_config config = internal_config(action->state);
    return operation_preview(action->graph, &config, ret_claims, err);
}

static const struct action_kind internal_kind = {
    .name = "blockdev-snapshot-internal-sync",
    .plan = internal_plan,
    .apply = internal_apply,
    .revert = internal_revert,
    .commit = internal_commit,
    .clean = internal_clean,
    .preview = internal_preview,
};

void internal_snapshot_action(struct action *ret, const struct blockdev_snapshot_internal_sync *args)
{
    struct internal_snapshot *snapshot = g_new0(struct internal_snapshot, 1);
    snapshot->args = args;
    *ret = (struct action){.kind = &internal_kind, .state = snapshot};
}

/* --- deleting one --- */

static int coroutine_fn delete_drained(struct node *node,
                                       const struct blockdev_snapshot_delete_internal_sync_args *args,
                                       struct snapshot_info **ret, struct error **err)
{
    int code = node_writable_begin_locked(node, err);
    if (code < 0) {
        return code;
    }
    code = delete_by_name(node, args->id, args->name, ret, err);
    if (code == -ENOENT && err && !*err) {
        error_set(err, code, "Snapshot with id '%s' and name '%s' does not exist on device '%s'",
                  args->id ? args->id : "null", args->name ? args->name : "null", args->device);
    }
    node_writable_end_locked(node);
    return code;
}

int coroutine_fn internal_snapshot_delete(struct graph *graph,
                                          const struct blockdev_snapshot_delete_internal_sync_args *args,
                                          struct snapshot_info **ret, struct error **err)
{
    struct drain drain;
    int code = 0;
    graph_lock(graph);
    struct node *node = find_device(graph, args->device, err);
    if (!node) {
        code = -ENODEV;
    } else if (!args->id && !args->name) {
        code = error_set(err, -EINVAL, "Name or id must be provided");
    } else if (!node->driver->image || !node->driver->image->snapshot_delete) {
        code = error_set(err, -ENOTSUP, "Block format '%s' used by device '%s' does not support internal snapshots",
                         node->driver->name, args->device);
    } else {
        node_ref(node);
        graph_drain_begin(graph, &node, 1, NULL, &drain);
        code = delete_drained(node, args, ret, err);
        graph_drain_end(&drain);
        node_unref(node);
    }
    graph_unlock(graph);
    return code;
}

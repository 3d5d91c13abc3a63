/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Nodes and the graph as JSON: query-named-block-nodes (keys and meaning are the peer's) and query-graph. Owns no
 * state. Control thread, in a coroutine: the size on disk is asked of the file system.
 *
 * A chain of images is described from its end upwards and put together without recursion, because a chain may be long.
 * A size is shown in whole sectors, as the peer does.
 */
#include "base/size.h"
#include "block/bitmap.h"
#include "block/private.h"

#define SECTOR 512

static char *node_filename(const struct node *node)
{
    return g_strdup(node->filename ? node->filename : "");
}

/* Bytes on disk, or -1. */
static int64_t coroutine_fn allocated_size(struct node *node)
{
    while (!node->driver->allocated_size) {
        const struct edge *below = node->filtered ? node->filtered : node->file;
        if (!below) {
            return -1;
        }
        node = below->child;
    }
    return node->driver->allocated_size(node);
}

/* Those that cannot be read are not shown. */
static void coroutine_fn describe_snapshots(struct node *node, struct image_info *info)
{
    struct snapshot_info_list *list = NULL;
    const struct image_driver *image = node->driver->image;
    if (image && image->snapshot_list && image->snapshot_list(node, &list, NULL) == 0) {
        info->has_snapshots = list->count > 0;
        info->snapshots = *list;
        g_free(list);
    }
}

/* One image, without those below it. */
static json_t *coroutine_fn describe_image(struct node *node)
{
    int64_t allocated = allocated_size(node);
    struct image_info *info = g_new0(struct image_info, 1);
    *info = (struct image_info){.filename = node_filename(node),
                                .format = g_strdup(node->driver->name),
                                .has_dirty_flag = true,
                                .dirty_flag = node->dirty,
                                .has_actual_size = allocated >= 0,
                                .actual_size = allocated,
                                .virtual_size = align_up(atomic_load(&node->size), SECTOR),
                                .has_cluster_size = node->limits.cluster_size != 0,
                                .cluster_size = node->limits.cluster_size,
                                .has_encrypted = node->encrypted,
                                .encrypted = node->encrypted};
    if (node->header_backing && *node->header_backing) {
        info->backing_filename = g_strdup(node->header_backing);
        info->full_backing_filename = node_backing_path(node, NULL);
        if (!info->full_backing_filename) {
            info->full_backing_filename = g_strdup(node->header_backing);
        }
        info->backing_filename_format = g_strdup(node->header_backing_format);
    }
    describe_snapshots(node, info);
    if (node->driver->specific_info) {
        info->format_specific = node->driver->specific_info(node);
    }
    json_t *json = image_info_to_json(info);
    image_info_free(info);
    return json;
}

/* The image with all below it as "backing-image". */
static json_t *coroutine_fn describe_chain(struct node *node)
{
    g_autoptr(GPtrArray) images = g_ptr_array_new();
    for (struct node *image = node; image; image = node_backing(image)) {
        g_ptr_array_add(images, image);
    }
    json_t *below = NULL;
    for (unsigned i = images->len; i > 0; i--) {
        json_t *image = describe_image(images->pdata[i - 1]);
        if (below) {
            json_object_set_new(image, "backing-image", below);
        }
        below = image;
    }
    return below;
}

static json_t *coroutine_fn describe_node(struct node *node, bool flat)
{
    const struct node *backing = node_backing(node);
    struct blockdev_cache_info cache = {.writeback = true, .direct = node->direct, .no_flush = node->no_flush};
    enum blockdev_detect_zeroes_options detect_zeroes = BLOCKDEV_DETECT_ZEROES_OPTIONS_OFF;
    if (node->detect_zeroes) {
        detect_zeroes =
            node->detect_zeroes_unmap ? BLOCKDEV_DETECT_ZEROES_OPTIONS_UNMAP : BLOCKDEV_DETECT_ZEROES_OPTIONS_ON;
    }
    g_autofree char *file = node_filename(node);
    struct image_info image = {.filename = file, .format = (char *)node->driver->name};
    struct block_device_info info = {.file = file,
                                     .node_name = node->name,
                                     .ro = !node->writable,
                                     .drv = (char *)node->driver->name,
                                     .backing_file = backing ? backing->filename : NULL,
                                     .backing_file_depth = flat ? 0 : node_backing_depth(node),
                                     .active = true,
                                     .encrypted = node->encrypted,
                                     .detect_zeroes = detect_zeroes,
                                     .image = &image,
                                     .cache = &cache};
    struct block_dirty_info_list *bitmaps = bitmaps_describe(node);
    info.has_dirty_bitmaps = bitmaps->count > 0;
    info.dirty_bitmaps = *bitmaps;
    json_t *json = block_device_info_to_json(&info); /* `info` borrows everything */
    block_dirty_info_list_free(bitmaps);
    json_object_set_new(json, "image", flat ? describe_image(node) : describe_chain(node));
    return json;
}

json_t *coroutine_fn graph_describe_node(struct node *node)
{
    return describe_node(node, false);
}

json_t *coroutine_fn graph_describe_node_flat(struct node *node)
{
    return describe_node(node, true);
}

char *node_describe_origin(const struct node *node)
{
    if (!node->opened_for) {
        return NULL;
    }
    return node->filename ? g_strdup_printf("%s, %s", node->opened_for, node->filename) : g_strdup(node->opened_for);
}

/* --- the whole graph --- */

static json_t *describe_actions(unsigned actions)
{
    json_t *list = json_array();
    for (unsigned i = 0; i < ACCESS_ACTION_COUNT; i++) {
        if (actions & (1U << i)) {
            json_array_append_new(list, json_string(access_action_name(1U << i)));
        }
    }
    return list;
}

static json_t *describe_graph_node(const struct node *node)
{
    json_t *json = json_pack("{s:s, s:s, s:I, s:b}", "node-name", node->name, "driver", node->driver->name, "size",
                             (json_int_t)atomic_load(&node->size), "writable", node->writable);
    if (node->filename) {
        json_object_set_new(json, "filename", json_string(node->filename));
    }
    if (node->stale) {
        json_object_set_new(json, "stale", json_string(node->stale));
    }
    if (node->opened_for) {
        json_object_set_new(json, "opened-for", json_string(node->opened_for));
    }
    return json;
}

json_t *graph_describe(struct graph *graph)
{
    json_t *nodes = json_array(), *edges = json_array(), *users = json_array();
    list_for_each (node_link, &graph->nodes) {
        const struct node *node = container_of(node_link, struct node, graph_link);
        json_array_append_new(nodes, describe_graph_node(node));
        list_for_each (link, &node->children) {
            const struct edge *edge = container_of(link, struct edge, parent_link);
            json_array_append_new(edges, json_pack("{s:s, s:s, s:s, s:o}", "parent", node->name, "child",
                                                   edge->child->name, "role", edge_role_name(edge->role), "granted",
                                                   describe_actions(edge->granted)));
        }
    }
    list_for_each (link, &graph->backends) {
        const struct backend *backend = container_of(link, struct backend, graph_link);
        if (backend->root.child) {
            json_array_append_new(users, json_pack("{s:s, s:s, s:o}", "owner", backend->owner, "node",
                                                   backend->root.child->name, "granted",
                                                   describe_actions(backend->root.granted)));
        }
    }
    return json_pack("{s:o, s:o, s:o}", "nodes", nodes, "edges", edges, "users", users);
}

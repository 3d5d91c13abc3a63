/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Handlers of the commands that make, remove and show nodes: blockdev-add, blockdev-del, query-named-block-nodes,
 * query-graph; and query-access. Each runs in a coroutine on the control loop, is called by the generated dispatcher
 * only, and keeps no state of its own: the graph is control->graph. What is shown is a snapshot under the graph's lock.
 * Decisions (may this be opened, may it go) are src/block's.
 */
#include "access/access.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "control/control.h"
#include "schema/commands.h"
#include "schema/marshal.h"
#include <glib.h>

int coroutine_fn command_blockdev_add(struct control *control, struct blockdev_options *args, struct error **err)
{
    return graph_add(control->graph, args, NULL, err);
}

int coroutine_fn command_blockdev_del(struct control *control, struct blockdev_del_args *args, struct error **err)
{
    return graph_delete(control->graph, args->node_name, err);
}

int coroutine_fn command_query_named_block_nodes(struct control *control, struct query_named_block_nodes_args *args,
                                                 struct block_device_info_list **ret, struct error **err)
{
    json_t *array = json_array();
    int code;

    graph_lock(control->graph);
    list_for_each (link, &control->graph->nodes) {
        struct node *node = container_of(link, struct node, graph_link);

        json_array_append_new(array, args->flat ? graph_describe_node_flat(node) : graph_describe_node(node));
    }
    graph_unlock(control->graph);
    *ret = g_new0(struct block_device_info_list, 1);
    code = marshal_read(&block_device_info_list_type, array, "nodes", MARSHAL_JSON, *ret, err);
    json_decref(array);
    return code;
}

static const char *role_name(enum edge_role role)
{
    static const char *const names[] = {
        [EDGE_FILE] = "file", [EDGE_BACKING] = "backing", [EDGE_FILTERED] = "filtered", [EDGE_ROOT] = "root"};

    return names[role];
}

static json_t *actions_json(unsigned actions)
{
    json_t *array = json_array();

    for (unsigned left = actions & ACCESS_ALL; left; left &= left - 1) {
        json_array_append_new(array, json_string(access_action_name(left & -left)));
    }
    return array;
}

static json_t *node_json(const struct node *node)
{
    json_t *json = json_pack("{s:s, s:s, s:I, s:b}", "node-name", node->name, "driver", node->driver->name, "size",
                             (json_int_t)atomic_load(&node->size), "writable", (int)node->writable);
    const char *filename = node->filename;

    if (filename) {
        json_object_set_new(json, "filename", json_string(filename));
    }
    if (node->stale) {
        json_object_set_new(json, "stale", json_string(node->stale));
    }
    if (node->opened_for) {
        json_object_set_new(json, "opened-for", json_string(node->opened_for));
    }
    return json;
}

int coroutine_fn command_query_graph(struct control *control, struct graph_info **ret, struct error **err)
{
    json_t *nodes = json_array(), *edges = json_array(), *users = json_array(), *graph;
    int code;

    graph_lock(control->graph);
    list_for_each (link, &control->graph->nodes) {
        struct node *node = container_of(link, struct node, graph_link);

        json_array_append_new(nodes, node_json(node));
        list_for_each (edge_link, &node->children) {
            struct edge *edge = container_of(edge_link, struct edge, parent_link);

            json_array_append_new(edges,
                                  json_pack("{s:s, s:s, s:s, s:o}", "parent", node->name, "child", edge->child->name,
                                            "role", role_name(edge->role), "granted", actions_json(edge->granted)));
        }
        list_for_each (parent_link, &node->parents) {
            struct edge *edge = container_of(parent_link, struct edge, child_link);

            if (edge->backend) {
                json_array_append_new(users, json_pack("{s:s, s:s, s:o}", "owner", backend_owner(edge->backend), "node",
                                                       node->name, "granted", actions_json(edge->granted)));
            }
        }
    }
    graph_unlock(control->graph);
    graph = json_pack("{s:o, s:o, s:o}", "nodes", nodes, "edges", edges, "users", users);
    code = graph_info_from_json(graph, "graph", ret, err);
    json_decref(graph);
    return code;
}

int coroutine_fn command_query_access(struct control *control, struct access_info **ret, struct error **err)
{
    json_t *access = access_describe(control->graph->ledger);
    int code = access_info_from_json(access, "access", ret, err);

    json_decref(access);
    return code;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Handlers of the commands that make, change, remove and show nodes: blockdev-add, blockdev-del, block_resize,
 * change-backing-file, query-named-block-nodes, query-graph. Each runs in a coroutine on the control loop, is called by
 * the generated dispatcher only, and keeps no state of its own: the graph is control->graph. What is shown is a
 * snapshot under the graph's lock. Decisions (may this be opened, may it go) are src/block's.
 */
#include "block/graph.h"
#include "control/control.h"
#include "job/change_backing.h"
#include "job/resize.h"
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

int coroutine_fn command_block_resize(struct control *control, struct block_resize_args *args, struct error **err)
{
    return resize_node(control->graph, args, err);
}

int coroutine_fn command_block_resize_check(struct control *control, struct block_resize_args *args,
                                            json_t **ret_claims, struct error **err)
{
    return resize_check(control->graph, args, ret_claims, err);
}

int coroutine_fn command_change_backing_file(struct control *control, struct change_backing_file_args *args,
                                             struct error **err)
{
    return change_backing_file(control->graph, args, err);
}

int coroutine_fn command_change_backing_file_check(struct control *control, struct change_backing_file_args *args,
                                                   json_t **ret_claims, struct error **err)
{
    return change_backing_file_check(control->graph, args, ret_claims, err);
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

int coroutine_fn command_query_graph(struct control *control, struct graph_info **ret, struct error **err)
{
    json_t *graph;
    int code;

    graph_lock(control->graph);
    graph = graph_describe(control->graph);
    graph_unlock(control->graph);
    code = graph_info_from_json(graph, "graph", ret, err);
    json_decref(graph);
    return code;
}

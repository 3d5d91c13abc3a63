/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Shapes: graphs of images without storage, made with the means of any job: nodes of a driver that does nothing, and
 * one transaction that attaches their backing edges. So the edges have their standing claims and the ledger is the real
 * one. Nobody does I/O on them. The table below is data: a shape more is a row more.
 */
#include "tool/shape.h"
#include "base/size.h"
#include "block/driver.h"
#include <glib.h>

const struct shape shapes[] = {
    {"chain", {{"base", NULL}, {"a", "base"}, {"b", "a"}, {"c", "b"}, {"top", "c"}}},
    {"fork", {{"base", NULL}, {"a", "base"}, {"top", "a"}, {"s", "base"}}},
    {"crown", {{"base", NULL}, {"m", "base"}, {"l1", "m"}, {"l2", "l1"}, {"r1", "m"}, {"r2", "r1"}}},
    {"tower", {{"n0", NULL}, {"n1", "n0"}, {"n2", "n1"}, {"n3", "n2"}, {"n4", "n3"}, {"n5", "n4"}, {"n6", "n5"}}},
};
const unsigned shape_count = array_size(shapes);

static const struct driver shape_driver = {.name = "shape", .kind = DRIVER_FORMAT, .backing = true};

unsigned shape_size(const struct shape *shape)
{
    unsigned size = 0;

    while (size < G_N_ELEMENTS(shape->images) && shape->images[size].node) {
        size++;
    }
    return size;
}

/* Nothing is in the way of a new graph's edges. */
static void coroutine_fn shape_attach(struct graph *graph, const struct shape *shape, struct node **nodes)
{
    graph_lock(graph);
    struct transaction *transaction = graph_begin(graph, "making a shape");

    for (unsigned i = 0; i < shape_size(shape); i++) {
        if (shape->images[i].backing) {
            struct node *backing = graph_find(graph, shape->images[i].backing);

            g_assert(backing);
            transaction_attach(transaction, nodes[i], EDGE_BACKING, backing, NULL);
        }
    }
    int code = graph_commit(transaction, NULL);
    graph_unlock(graph);
    g_assert(code == 0);
}

struct graph *coroutine_fn shape_open(const struct shape *shape, struct node **ret_nodes)
{
    struct graph *graph = graph_create();

    for (unsigned i = 0; i < shape_size(shape); i++) {
        int code = graph_create_node(graph, &shape_driver, shape->images[i].node, NULL, &ret_nodes[i], NULL);

        g_assert(code == 0);
    }
    for (unsigned i = 0; i < SHAPE_SPARES; i++) {
        static const char *const names[SHAPE_SPARES] = {"spare0", "spare1"};
        int code = graph_create_node(graph, &shape_driver, names[i], NULL, &ret_nodes[shape_size(shape) + i], NULL);

        g_assert(code == 0);
    }
    shape_attach(graph, shape, ret_nodes);
    return graph;
}

void coroutine_fn shape_close(struct graph *graph, const struct shape *shape, struct node **nodes)
{
    for (unsigned i = shape_size(shape) + SHAPE_SPARES; i-- > 0;) {
        node_release(nodes[i]);
    }
    graph_destroy(graph);
}

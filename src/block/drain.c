/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Drains: from graph_drain_begin() to graph_drain_end() no request is inside the given nodes. Owns the question which
 * backends can reach a node; holding them back and waiting for them is backend.c's.
 *
 * 1. graph->lock is held from before the begin until after the end: the backends found are the backends that there are.
 * 2. All backends are held back before the first is waited for; so requests that wait for each other all get to their
 *    ends, and none that comes later gets in between.
 * 3. What nodes do of their own that outlives requests (driver.settle) is waited for when these have ended.
 * 4. A drain of a drained backend counts: the last end lets the requests go on.
 */
#include "block/private.h"

/* Adds the backends from which requests reach `node`; `seen` keeps a graph with many ways to a node linear. */
static void collect_backends(struct node *node, GHashTable *seen, GPtrArray *backends)
{
    if (!g_hash_table_add(seen, node)) {
        return;
    }
    list_for_each (link, &node->parents) {
        struct edge *edge = container_of(link, struct edge, child_link);
        if (edge->role == EDGE_ROOT) {
            g_ptr_array_add(backends, edge->backend);
        } else {
            collect_backends(edge->parent, seen, backends);
        }
    }
}

static struct gate *gate_of(struct backend *backend)
{
    return &backend->gate;
}

/* The given nodes and all above them. */
static void coroutine_fn settle_nodes(GHashTable *nodes)
{
    GHashTableIter at;
    gpointer node;
    g_hash_table_iter_init(&at, nodes);
    while (g_hash_table_iter_next(&at, &node, NULL)) {
        const struct driver *driver = ((struct node *)node)->driver;
        if (driver->settle) {
            driver->settle(node);
        }
    }
}

void coroutine_fn graph_drain_begin(struct graph *graph, struct node *const *nodes, unsigned count,
                                    struct backend *except, struct drain *drain)
{
    g_autoptr(GHashTable) seen = g_hash_table_new(NULL, NULL);
    GPtrArray *backends = g_ptr_array_new();
    for (unsigned i = 0; i < count; i++) {
        collect_backends(nodes[i], seen, backends);
    }
    if (except) {
        g_ptr_array_remove_fast(backends, except);
    }
    for (unsigned i = 0; i < backends->len; i++) {
        gate_close(gate_of(backends->pdata[i]));
    }
    for (unsigned i = 0; i < backends->len; i++) {
        gate_settle(gate_of(backends->pdata[i]));
    }
    settle_nodes(seen);
    drain->count = backends->len;
    drain->backends = (struct backend **)g_ptr_array_free(backends, FALSE);
}

void graph_drain_end(struct drain *drain)
{
    for (unsigned i = 0; i < drain->count; i++) {
        gate_open(gate_of(drain->backends[i]));
    }
    g_free(drain->backends);
    *drain = (struct drain){0};
}

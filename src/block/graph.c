/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The graph as a whole: its lists, its lock, finding nodes by name, adding and deleting them for the monitor, and
 * putting job filters in and out. Opening is open.c's, changes of shape are transaction.c's.
 *
 * 1. `nodes` holds the nodes that are open whole; a name occurs once.
 * 2. graph->lock is held by whoever changes the shape, from before its drains until after them.
 * 3. A node that the monitor added holds one reference of the monitor's (monitor_owned), which only graph_delete() and
 *    graph_delete_all() drop. Nothing is ever closed under a user's feet: a node in use is not deleted.
 */
#include "block/private.h"
#include <errno.h>

struct graph *graph_create(void)
{
    struct graph *graph = g_new0(struct graph, 1);
    list_init(&graph->nodes);
    list_init(&graph->backends);
    list_init(&graph->operations);
    graph->ledger = access_ledger_create();
    co_mutex_init(&graph->lock);
    atomic_init(&graph->client_ns, INT64_MIN / 2);
    return graph;
}

void graph_destroy(struct graph *graph)
{
    if (!graph) {
        return;
    }
    g_assert(list_is_empty(&graph->nodes) && list_is_empty(&graph->backends) && list_is_empty(&graph->operations));
    access_ledger_destroy(graph->ledger);
    co_mutex_destroy(&graph->lock);
    g_free(graph);
}

void coroutine_fn graph_lock(struct graph *graph)
{
    co_mutex_lock(&graph->lock);
}

void coroutine_fn graph_unlock(struct graph *graph)
{
    co_mutex_unlock(&graph->lock);
}

struct node *graph_find(struct graph *graph, const char *name)
{
    list_for_each (link, &graph->nodes) {
        struct node *node = container_of(link, struct node, graph_link);
        if (g_str_equal(node->name, name)) {
            return node;
        }
    }
    return NULL;
}

struct node *graph_find_or_error(struct graph *graph, const char *name, struct error **err)
{
    struct node *node = graph_find(graph, name);
    if (!node) {
        error_set(err, -ENOENT, "Cannot find node '%s'", name);
    }
    return node;
}

/* --- the monitor's nodes --- */

static int coroutine_fn leave_filter(struct node *filter, struct error **err);

int coroutine_fn graph_add(struct graph *graph, const struct blockdev_options *options, struct node **ret,
                           struct error **err)
{
    struct node *node;
    graph_lock(graph);
    int r = open_node(graph, options, 0, &node, err);
    if (r == 0) {
        node->monitor_owned = true;
        if (ret) {
            *ret = node;
        }
    }
    graph_unlock(graph);
    return r;
}

int coroutine_fn graph_open(struct graph *graph, const struct blockdev_options *options, unsigned flags,
                            struct node **ret, struct error **err)
{
    struct blockdev_options named = *options; /* borrows everything else */
    graph_lock(graph);
    g_autofree char *name = options->node_name ? NULL : node_name_unused(graph, "opened");
    named.node_name = name ? name : options->node_name;
    int r = open_node(graph, &named, flags, ret, err);
    graph_unlock(graph);
    return r;
}

/* graph->lock is held. */
static int coroutine_fn graph_may_delete(struct graph *graph, const char *name, struct node **ret, struct error **err)
{
    struct node *node = graph_find_or_error(graph, name, err);
    if (!node) {
        return -ENOENT;
    }
    if (!node->monitor_owned) {
        return error_set(err, -EPERM, "Node '%s' is not owned by the monitor: it is the %s, and closes with it", name,
                         node->opened_for ? node->opened_for : "node of a job");
    }
    if (node->job_filter && node->filtered) { /* its users are those of the image */
        int r = leave_filter(node, err);
        if (r < 0) {
            return r;
        }
    }
    g_autofree char *users = node_users(node);
    if (*users) {
        return error_set(err, -EBUSY, "Node '%s' is in use by %s", name, users);
    }
    if (node->references > 1) {
        return error_set(err, -EBUSY, "Node '%s' is in use by an operation", name);
    }
    *ret = node;
    return 0;
}

int coroutine_fn graph_delete(struct graph *graph, const char *name, struct error **err)
{
    struct node *node = NULL;
    graph_lock(graph);
    int r = graph_may_delete(graph, name, &node, err);
    if (r == 0) {
        node->monitor_owned = false;
        node_unref(node);
    }
    graph_unlock(graph);
    return r;
}

/* The youngest of the monitor's nodes that nobody stands on, or NULL. */
static struct node *last_unused(struct graph *graph)
{
    for (struct list *link = graph->nodes.prev; link != &graph->nodes; link = link->prev) {
        struct node *node = container_of(link, struct node, graph_link);
        if (node->monitor_owned && list_is_empty(&node->parents)) {
            return node;
        }
    }
    return NULL;
}

void coroutine_fn graph_delete_all(struct graph *graph)
{
    graph_lock(graph);
    /* Parents first, so that each is closed while all that it stands on is open. */
    for (struct node *node; (node = last_unused(graph));) {
        node->monitor_owned = false;
        node_unref(node);
    }
    /* What is left is used by backends or operations, and closes with them. */
    list_for_each_safe (link, &graph->nodes) {
        struct node *node = container_of(link, struct node, graph_link);
        if (node->monitor_owned) {
            g_autofree char *users = node_users(node);
            g_warning("Node '%s' is still in use by %s", node->name, users);
        }
    }
    graph_unlock(graph);
}

/* --- nodes of jobs --- */

int coroutine_fn graph_create_node(struct graph *graph, const struct driver *driver, const char *name,
                                   const char *opened_for, struct node **ret, struct error **err)
{
    g_autofree char *wanted = g_strdup_printf("#%s", opened_for ? opened_for : driver->name);
    g_autofree char *unused = name ? g_strdup(name) : node_name_unused(graph, wanted);
    if (graph_find(graph, unused)) {
        return error_set(err, -EEXIST, "Duplicate nodes with node-name='%s'", unused);
    }
    struct node *node = node_create(graph, driver, unused);
    node->opened_for = g_strdup(opened_for);
    node->job_filter = driver->kind == DRIVER_FILTER;
    node->discard = true; /* the image beneath decides */
    node->writable = node->wants_writable = true;
    node->open = true;
    node_publish(node);
    *ret = node;
    return 0;
}

int graph_attach_target_locked(const struct operation *operation, struct node *filter, struct node *target,
                               struct error **err)
{
    g_assert(filter->job_filter);
    int r = edge_attach(filter, EDGE_TARGET, node_head(target), NULL, err);
    if (r == 0) {
        filter->target->granted = operation_granted(operation, target);
    }
    return r;
}

/* For users' filters that guard: who leans on the image finds its edge changed. */
static const struct claim_clause head_clauses[] = {
    {.role = CLAIM_ROLE_NODE, .first = CLAIM_NODE, .require = ACCESS_READ_METADATA, .path = "node"},
    {.role = CLAIM_ROLE_OVERLAYS, .first = CLAIM_NODE, .require = ACCESS_GRAPH, .path = "overlays(node)"}};
static const struct claim_table head_claims = {
    .operation = "a change of the filters over a node", .clauses = head_clauses, .count = G_N_ELEMENTS(head_clauses)};

/* Drained. All parents of `from` but `filter` come to stand on `to`. */
static int coroutine_fn move_head(struct node *filter, struct node *from, struct node *to, struct error **err)
{
    struct graph *graph = filter->graph;
    struct operation_config config = {.kind = "command",
                                      .id = filter->name,
                                      .table = &head_claims,
                                      .bound = {[CLAIM_NODE] = node_beneath_filters(filter)}};
    struct operation *operation = NULL;
    int r = operation_begin(graph, &config, &operation, err);
    if (r == 0) {
        g_autofree char *subject = g_strdup_printf("moving '%s'", filter->name);
        struct transaction *transaction = graph_begin(graph, subject);
        transaction_by(transaction, operation);
        transaction_move_parents(transaction, from, to, filter);
        if (from == filter) {
            transaction_detach(transaction, filter->filtered);
        }
        r = graph_commit(transaction, err);
    }
    operation_end_locked(operation);
    return r;
}

int coroutine_fn graph_enter_filter_locked(struct node *filter, struct error **err)
{
    filter->job_filter = true;
    int r = move_head(filter, filter->filtered->child, filter, err);
    filter->job_filter = r == 0;
    return r;
}

static int coroutine_fn leave_filter(struct node *filter, struct error **err)
{
    struct drain drain;
    list_for_each (link, &filter->parents) {
        const struct edge *edge = container_of(link, struct edge, child_link);
        if (edge->role == EDGE_TARGET) {
            return error_set(err, -EBUSY, "Node '%s' is in use by node '%s', which shows its frozen view", filter->name,
                             edge->parent->name);
        }
    }
    graph_drain_begin(filter->graph, &filter, 1, NULL, &drain);
    int r = move_head(filter, filter, filter->filtered->child, err);
    graph_drain_end(&drain);
    return r;
}

void graph_filter_follow(struct node *filter, struct operation *operation, unsigned variable)
{
    g_assert(filter->job_filter && variable < CLAIM_VARIABLE_COUNT);
    filter->operation = operation;
    filter->variable = variable;
}

int coroutine_fn graph_insert_filter_locked(struct graph *graph, const struct operation *operation, struct node *filter,
                                            struct node *over, struct error **err)
{
    struct node *const touched[] = {over, filter};
    g_autofree char *subject = g_strdup_printf("inserting '%s' over node '%s'", filter->name, over->name);
    struct drain drain;
    g_assert(!filter->filtered && list_is_empty(&filter->parents));
    graph_drain_begin(graph, touched, G_N_ELEMENTS(touched), NULL, &drain);
    struct transaction *transaction = graph_begin(graph, subject);
    transaction_by(transaction, operation);
    transaction_attach(transaction, filter, EDGE_FILTERED, over, NULL);
    transaction_move_parents(transaction, over, filter, NULL);
    int r = graph_commit(transaction, err);
    graph_drain_end(&drain);
    return r;
}

int coroutine_fn graph_insert_filter(struct graph *graph, const struct operation *operation, struct node *filter,
                                     struct node *over, struct error **err)
{
    graph_lock(graph);
    int r = graph_insert_filter_locked(graph, operation, filter, over, err);
    graph_unlock(graph);
    return r;
}

int coroutine_fn graph_remove_filter_locked(struct graph *graph, const struct operation *operation, struct node *filter,
                                            struct error **err)
{
    g_autofree char *subject = g_strdup_printf("removing '%s'", filter->name);
    struct drain drain;
    struct node *over = filter->filtered->child;
    struct node *const touched[] = {over, filter};
    graph_drain_begin(graph, touched, G_N_ELEMENTS(touched), NULL, &drain);
    struct transaction *transaction = graph_begin(graph, subject);
    transaction_by(transaction, operation);
    transaction_move_parents(transaction, filter, over, NULL);
    transaction_detach(transaction, filter->filtered);
    int r = graph_commit(transaction, err);
    graph_drain_end(&drain);
    return r;
}

int coroutine_fn graph_remove_filter(struct graph *graph, const struct operation *operation, struct node *filter,
                                     struct error **err)
{
    graph_lock(graph);
    int r = graph_remove_filter_locked(graph, operation, filter, err);
    graph_unlock(graph);
    return r;
}

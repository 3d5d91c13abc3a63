/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Nodes: life, writability, size. Owns references and what happens when the last one goes, and the count of who needs a
 * node writable that was opened read-only.
 *
 * 1. A node lives as long as `references` > 0: the monitor's, one per parent edge or backend, and the caller's.
 * 2. A node whose last reference went has no parents, so no request is inside: it leaves the graph's list at once, its
 *    driver closes it with its children still attached, and then its own references on them go. All under graph->lock:
 *    while the driver writes, the node is still among the parents of its children.
 * 3. writable == (wants_writable || writers > 0), but for a node whose driver failed to stop writing: that stays
 *    writable, which loses nothing.
 * 4. Whoever makes a node writable has made its containers (file and data child, and what a filter shows) writable
 *    first, and their edges claim accordingly.
 *
 * Names, opening and deletion by the monitor are graph.c's and open.c's.
 */
#include "block/bitmap.h"
#include "block/enforce.h"
#include "block/private.h"
#include <errno.h>

struct node *node_create(struct graph *graph, const struct driver *driver, const char *name)
{
    struct node *node = g_new0(struct node, 1);
    node->graph = graph;
    node->driver = driver;
    node->name = g_strdup(name);
    node->state = g_malloc0(driver->state_size);
    node->references = 1;
    node->limits.alignment = 1;
    node->limits.memory_alignment = 1;
    list_init(&node->children);
    list_init(&node->parents);
    list_init(&node->bitmaps);
    range_lock_init(&node->overlap);
    list_init(&node->graph_link);
    return node;
}

void node_publish(struct node *node)
{
    list_append(&node->graph->nodes, &node->graph_link);
}

static void node_drop(struct node *node, struct list *dying)
{
    g_assert(node->references > 0);
    if (--node->references == 0) {
        g_assert(list_is_empty(&node->parents));
        list_remove(&node->graph_link);
        list_append(dying, &node->graph_link);
    }
}

/* Do the parent's writes go there? To its containers, and to what a filter shows; a job's filter passes on whatever is
 * legal beneath it. */
static bool edge_carries_writes(const struct edge *edge)
{
    return edge_is_container(edge) || (edge->role == EDGE_FILTERED && !edge->parent->job_filter);
}

static void coroutine_fn node_close(struct node *node, struct list *dying)
{
    if (node->open && node->driver->close) {
        node->driver->close(node);
    }
    while (!list_is_empty(&node->children)) {
        struct edge *edge = container_of(node->children.next, struct edge, parent_link);
        bool made_writable = edge_carries_writes(edge) && node->made_files_writable;
        struct node *child = edge_detach(edge);
        if (made_writable) {
            node_writable_end_locked(child);
        }
        node_drop(child, dying);
    }
    bitmaps_destroy(node);
    access_clear_stale(node->graph->ledger, node->name);
    range_lock_destroy(&node->overlap);
    g_free(node->state);
    g_free(node->stale);
    g_free(node->filename);
    g_free(node->header_backing);
    g_free(node->header_backing_format);
    g_free(node->header_data);
    g_free(node->opened_for);
    json_decref(node->options);
    g_free(node->name);
    g_free(node);
}

struct node *node_ref(struct node *node)
{
    g_assert(node->references > 0);
    node->references++;
    return node;
}

/* Chains may be long: closing is a loop, not a recursion. */
struct node *coroutine_fn node_unref(struct node *node)
{
    struct list dying = LIST_INIT(dying);
    if (node) {
        node_drop(node, &dying);
    }
    while (!list_is_empty(&dying)) {
        struct node *next = container_of(dying.next, struct node, graph_link);
        g_assert(!co_mutex_try_lock(&next->graph->lock));
        list_remove(&next->graph_link);
        node_close(next, &dying);
    }
    return NULL;
}

struct node *coroutine_fn node_release(struct node *node)
{
    if (node && node->references > 1) {
        return node_unref(node);
    }
    if (node) {
        struct graph *graph = node->graph;
        graph_lock(graph);
        node_unref(node);
        graph_unlock(graph);
    }
    return NULL;
}

/* --- size --- */

void node_follow_child(struct node *filter)
{
    const struct node *child = filter->filtered->child;
    if (filter->open && !filter->job_filter) { /* has limits of its own, which hold as well */
        filter->limits.alignment = MAX(filter->limits.alignment, child->limits.alignment);
        filter->limits.memory_alignment = MAX(filter->limits.memory_alignment, child->limits.memory_alignment);
    } else {
        filter->limits = child->limits;
    }
    atomic_store(&filter->size, atomic_load(&child->size));
}

void node_size_changed(struct node *node)
{
    list_for_each (link, &node->parents) {
        struct edge *edge = container_of(link, struct edge, child_link);
        if (edge->role == EDGE_ROOT) {
            backend_tell_changed(edge->backend);
        } else if (edge->role == EDGE_FILTERED) {
            atomic_store(&edge->parent->size, atomic_load(&node->size)); /* its limits stay its own */
            node_size_changed(edge->parent);
        }
    }
}

void node_catch_up(struct node *node)
{
    if (node->driver->kind != DRIVER_FILTER || !node->filtered || node->driver->truncate || node->driver->guards) {
        return;
    }
    node_catch_up(node->filtered->child);
    uint64_t size = atomic_load(&node->filtered->child->size);
    if (size != atomic_load(&node->size)) {
        atomic_store(&node->size, size);
        node_size_changed(node);
    }
}

/* --- writing to a node that was opened read-only --- */

static int node_check_never_writable(const struct node *node, struct error **err)
{
    if (!node->never_writable) {
        return 0;
    }
    error_set(err, -EROFS, "Node '%s' is read-only", node->name);
    error_hint(err, "It was opened with read-only=on, or its storage is read-only; open it with read-only=off");
    return -EROFS;
}

static char *node_writing_subject(const struct node *node)
{
    return g_strdup_printf("opening node '%s' for writing", node->name);
}

int node_writable_check(struct node *node, struct error **err)
{
    node = node_beneath_filters(node);
    if (node->writable) {
        return 0;
    }
    g_autofree char *subject = node_writing_subject(node);
    int r = node_check_never_writable(node, err);
    list_for_each (link, &node->children) {
        struct edge *edge = container_of(link, struct edge, parent_link);
        if (r == 0 && edge_carries_writes(edge)) {
            r = edge_writable_check(edge, subject, err);
            r = r < 0 ? r : node_writable_check(edge->child, err); /* formats nest a few levels (open.c) */
        }
    }
    return r;
}

/* The edges that carry its writes: at most two. */
struct containers {
    struct edge *edges[2];
    unsigned count;
};

static struct containers node_containers(struct node *node)
{
    struct containers containers = {{0}, 0};
    list_for_each (link, &node->children) {
        struct edge *edge = container_of(link, struct edge, parent_link);
        if (edge_carries_writes(edge)) {
            g_assert(containers.count < G_N_ELEMENTS(containers.edges));
            containers.edges[containers.count++] = edge;
        }
    }
    return containers;
}

static int coroutine_fn containers_start_writing(const struct containers *containers, struct error **err)
{
    for (unsigned i = 0; i < containers->count; i++) {
        int r = node_writable_begin_locked(containers->edges[i]->child, err);
        if (r < 0) {
            while (i-- > 0) {
                node_writable_end_locked(containers->edges[i]->child);
            }
            return r;
        }
    }
    return 0;
}

static void coroutine_fn containers_stop_writing(const struct containers *containers)
{
    for (unsigned i = 0; i < containers->count; i++) {
        node_writable_end_locked(containers->edges[i]->child);
    }
}

/* After node->writable changed. Fewer claims cannot be refused. */
static int containers_claim_again(const struct containers *containers, const char *subject, struct error **err)
{
    int r = 0;
    for (unsigned i = 0; i < containers->count && r == 0; i++) {
        r = edge_claim_again(containers->edges[i], subject, err);
    }
    return r;
}

static int coroutine_fn node_start_writing(struct node *node, struct error **err)
{
    g_autofree char *subject = node_writing_subject(node);
    struct containers containers = node_containers(node);
    int r = node_check_never_writable(node, err);
    if (r == 0) {
        r = containers_start_writing(&containers, err);
    }
    if (r < 0) {
        return r;
    }
    node->made_files_writable = true;
    node->writable = true;
    r = containers_claim_again(&containers, subject, err);
    if (r == 0 && node->driver->set_writable) {
        r = node->driver->set_writable(node, true, err);
    }
    if (r < 0) {
        node->writable = false;
        containers_claim_again(&containers, subject, NULL);
        node->made_files_writable = false;
        containers_stop_writing(&containers);
    }
    return r;
}

static void coroutine_fn node_stop_writing(struct node *node)
{
    struct containers containers = node_containers(node);
    struct error *error = NULL;
    if (node->driver->set_writable && node->driver->set_writable(node, false, &error) < 0) {
        g_warning("Node '%s' stays open for writing: %s", node->name, error ? error->message : "unknown error");
        error_free(error);
        node->wants_writable = true;
        return;
    }
    node->writable = false;
    containers_claim_again(&containers, node->name, NULL);
    if (node->made_files_writable) {
        node->made_files_writable = false;
        containers_stop_writing(&containers);
    }
}

int coroutine_fn node_want_writable_locked(struct node *node, bool wanted, struct error **err)
{
    bool never = node->never_writable;
    int r = 0;
    if (wanted && !node->writable) {
        node->never_writable = false;
        r = node_start_writing(node, err);
        node->never_writable = r < 0 && never;
    } else if (!wanted && node->writable && node->writers) {
        r = error_set(err, -EBUSY, "Node '%s' cannot become read-only: a user needs it writable", node->name);
    }
    if (r < 0) {
        return r;
    }
    node->wants_writable = wanted;
    if (!wanted && node->writable) {
        node_stop_writing(node);
        if (node->writable) {
            return error_set(err, -EIO, "Node '%s' cannot become read-only: it cannot be flushed", node->name);
        }
    }
    return 0;
}

int coroutine_fn node_writable_begin_locked(struct node *node, struct error **err)
{
    node = node_beneath_job_filters(node);
    int r = node->writable ? 0 : node_start_writing(node, err);
    if (r == 0) {
        node->writers++;
    }
    return r;
}

void coroutine_fn node_writable_end_locked(struct node *node)
{
    node = node_beneath_job_filters(node);
    g_assert(node->writers > 0);
    if (--node->writers == 0 && !node->wants_writable) {
        node_stop_writing(node);
    }
}

void node_renounce_writing(struct node *node)
{
    g_assert(node->writers > 0);
    if (!node->wants_writable) {
        return;
    }
    node->wants_writable = false;
    struct containers containers = node_containers(node);
    for (unsigned i = 0; !node->made_files_writable && i < containers.count; i++) {
        struct node *child = node_beneath_job_filters(containers.edges[i]->child);
        child->writers++;
        if (child->parents.next == child->parents.prev) { /* nobody else's */
            node_renounce_writing(child);
        }
    }
    node->made_files_writable = true;
}

int coroutine_fn node_writable_begin(struct node *node, struct error **err)
{
    struct graph *graph = node->graph;
    struct drain drain;
    int r;
    graph_lock(graph);
    node = node_beneath_filters(node);
    if (node->writable) {
        r = node_writable_begin_locked(node, err);
    } else {
        graph_drain_begin(graph, &node, 1, NULL, &drain);
        r = node_writable_begin_locked(node, err);
        graph_drain_end(&drain);
    }
    graph_unlock(graph);
    return r;
}

void coroutine_fn node_writable_end(struct node *node)
{
    struct graph *graph = node->graph;
    struct drain drain;
    graph_lock(graph);
    node = node_beneath_filters(node);
    if (node->writers > 1 || node->wants_writable) {
        node_writable_end_locked(node);
    } else {
        graph_drain_begin(graph, &node, 1, NULL, &drain);
        node_writable_end_locked(node);
        graph_drain_end(&drain);
    }
    graph_unlock(graph);
}

/* --- the header --- */

int coroutine_fn node_change_backing(struct node *node, const struct operation *operation, const char *file,
                                     const char *format, struct error **err)
{
    if (!node->driver->change_backing) {
        return error_set(err, -ENOTSUP, "Driver '%s' of node '%s' cannot change its backing file", node->driver->name,
                         node->name);
    }
    int r = enforce_claim(operation, node, ACCESS_GRAPH, "changing the backing file", err);
    if (r == 0) {
        r = node->driver->change_backing(node, file, format, err);
    }
    if (r == 0) {
        g_autofree char *old_file = node->header_backing, *old_format = node->header_backing_format;
        node->header_backing = g_strdup(file);
        node->header_backing_format = g_strdup(format);
    }
    return r;
}

/* --- who uses it --- */

/* Is this operation there as a backend already ("export e0")? */
static bool has_backend(const struct node *node, const struct operation *operation)
{
    list_for_each (link, &node->parents) {
        const struct edge *edge = container_of(link, struct edge, child_link);
        if (edge->role == EDGE_ROOT && backend_is_of(edge->backend, operation)) {
            return true;
        }
    }
    return false;
}

static bool is_bound(const struct node *node, const struct operation *operation)
{
    for (unsigned i = 0; i < CLAIM_VARIABLE_COUNT; i++) {
        if (operation->bound[i] == node) {
            return true;
        }
    }
    return false;
}

char *node_users(struct node *node)
{
    GString *text = g_string_new(NULL);
    list_for_each (link, &node->parents) {
        const struct edge *edge = container_of(link, struct edge, child_link);
        g_string_append(text, text->len ? ", " : "");
        if (edge->role == EDGE_ROOT) {
            g_string_append(text, edge->backend->owner);
        } else {
            const char *origin = edge->parent->opened_for;
            g_string_append_printf(text, "node '%s' (%s%s%s)", edge->parent->name, edge_role_name(edge->role),
                                   origin ? "; it is the " : "", origin ? origin : "");
        }
    }
    list_for_each (link, &node->graph->operations) {
        const struct operation *operation = container_of(link, struct operation, link);
        if (is_bound(node, operation) && !has_backend(node, operation)) {
            g_string_append_printf(text, "%s%s %s", text->len ? ", " : "", operation->table->operation,
                                   access_holder_id(operation->holder));
        }
    }
    return g_string_free(text, FALSE);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Backends: the only way into a graph from outside, and the only place where requests are counted and held back.
 * Owns attaching and detaching, and the gate that every request passes.
 *
 * 1. A request is inside backend->gate from before it looks at the root edge until its driver has answered.
 * 2. root.child changes only while the gate is closed and nobody is inside, on the control thread, under graph->lock.
 * 3. Gates are closed under graph->lock, so one coroutine at a time waits for one to be empty.
 *
 * Which backends a drain touches is drain.c's; what a request may do is request.c's.
 */
#include "base/size.h"
#include "block/private.h"
#include "loop/loop.h"
#include <errno.h>

#define CLIENT_NS (1000 * 1000) /* how exactly the coming of clients is known */

/* --- life --- */

struct backend *backend_create(struct graph *graph, const char *owner)
{
    struct backend *backend = g_new0(struct backend, 1);
    backend->graph = graph;
    backend->owner = g_strdup(owner);
    backend->root = (struct edge){.backend = backend, .role = EDGE_ROOT};
    list_init(&backend->root.parent_link);
    list_init(&backend->root.child_link);
    list_init(&backend->root.adopter_link);
    gate_init(&backend->gate);
    list_append(&graph->backends, &backend->graph_link);
    return backend;
}

bool backend_follows(const struct backend *backend)
{
    return backend->operation != NULL;
}

bool backend_is_of(const struct backend *backend, const struct operation *operation)
{
    g_autofree char *suffix = g_strdup_printf(" %s", access_holder_id(operation->holder));
    return g_str_has_suffix(backend->owner, suffix);
}

static void backend_free(struct backend *backend)
{
    list_remove(&backend->graph_link);
    gate_destroy(&backend->gate);
    g_free(backend->owner);
    g_free(backend);
}

void coroutine_fn backend_destroy(struct backend *backend)
{
    if (backend) {
        backend_detach(backend);
        backend_free(backend);
    }
}

void coroutine_fn backend_destroy_locked(struct backend *backend)
{
    if (backend) {
        backend_detach_locked(backend);
        backend_free(backend);
    }
}

int coroutine_fn backend_attach_locked(struct backend *backend, struct node *node, unsigned granted, struct error **err)
{
    struct node *old = backend->root.child;
    if (old) {
        return error_set(err, -EBUSY, "%s is attached to node '%s' already", backend->owner, old->name);
    }
    gate_close(&backend->gate);
    gate_settle(&backend->gate);
    edge_link(&backend->root, node_ref(node_head(node)));
    backend->root.granted = granted;
    gate_open(&backend->gate);
    backend_tell_changed(backend);
    return 0;
}

int coroutine_fn backend_attach(struct backend *backend, struct node *node, unsigned granted, struct error **err)
{
    if (!node) {
        return 0;
    }
    node_ref(node);
    graph_lock(backend->graph);
    int r = backend_attach_locked(backend, node, granted, err);
    graph_unlock(backend->graph);
    node_release(node);
    return r;
}

void backend_follow(struct backend *backend, struct operation *operation, unsigned variable)
{
    g_assert(variable < CLAIM_VARIABLE_COUNT);
    backend->operation = operation;
    backend->variable = variable;
}

void coroutine_fn backend_detach_locked(struct backend *backend)
{
    struct node *node = NULL;
    gate_close(&backend->gate);
    gate_settle(&backend->gate);
    if (backend->root.child) {
        node = backend->root.child;
        edge_unlink(&backend->root);
        backend->root.granted = 0;
    }
    backend->operation = NULL;
    gate_open(&backend->gate);
    node_unref(node);
}

void coroutine_fn backend_detach(struct backend *backend)
{
    graph_lock(backend->graph);
    backend_detach_locked(backend);
    graph_unlock(backend->graph);
}

struct node *backend_node(const struct backend *backend)
{
    return backend->root.child;
}

struct edge *backend_edge(struct backend *backend)
{
    return &backend->root;
}

void backend_set_changed(struct backend *backend, void (*changed)(void *argument), void *argument)
{
    backend->changed = changed;
    backend->argument = argument;
}

void backend_tell_changed(struct backend *backend)
{
    if (backend->changed) {
        backend->changed(backend->argument);
    }
}

void backend_set_client(struct backend *backend)
{
    backend->client = true;
}

int64_t backend_client_ns(const struct backend *backend)
{
    return atomic_load_explicit(&backend->graph->client_ns, memory_order_relaxed);
}

/* Seldom writes: all loops share it. */
static inline void backend_note_client(struct backend *backend)
{
    if (backend->client) {
        int64_t now = loop_now_ns();
        if (now - atomic_load_explicit(&backend->graph->client_ns, memory_order_relaxed) > CLIENT_NS) {
            atomic_store_explicit(&backend->graph->client_ns, now, memory_order_relaxed);
        }
    }
}

/* --- I/O --- */

uint64_t backend_size(const struct backend *backend)
{
    const struct node *node = backend->root.child;
    return node ? atomic_load_explicit(&node->size, memory_order_acquire) : 0;
}

/* Inside: is there a medium, and the range in it? */
static inline int backend_check(const struct backend *backend, uint64_t offset, uint64_t bytes)
{
    if (G_UNLIKELY(!backend->root.child)) {
        return -ENOMEDIUM;
    }
    uint64_t size = atomic_load_explicit(&backend->root.child->size, memory_order_acquire);
    return G_UNLIKELY(offset > size || bytes > size - offset) ? -EINVAL : 0;
}

int coroutine_fn backend_read(struct backend *backend, uint64_t offset, uint64_t bytes, struct buffers to,
                              unsigned flags)
{
    gate_enter(&backend->gate);
    int r = backend_check(backend, offset, bytes);
    backend_note_client(backend);
    if (G_LIKELY(r == 0)) {
        r = edge_read(&backend->root, offset, bytes, to, flags);
    }
    gate_leave(&backend->gate);
    return r;
}

int coroutine_fn backend_write(struct backend *backend, uint64_t offset, uint64_t bytes, struct buffers from,
                               unsigned flags)
{
    gate_enter(&backend->gate);
    int r = backend_check(backend, offset, bytes);
    backend_note_client(backend);
    if (G_LIKELY(r == 0)) {
        r = edge_write(&backend->root, offset, bytes, from, flags);
    }
    gate_leave(&backend->gate);
    return r;
}

int coroutine_fn backend_copy(struct backend *source, uint64_t offset, struct backend *target, uint64_t to,
                              uint64_t bytes, unsigned flags, const struct copy_aid *aid)
{
    gate_enter(&source->gate);
    int r = backend_check(source, offset, bytes);
    /* Who waited for one gate inside the other would be waited for by a drain of both. */
    if (r == 0 && !gate_try_enter(&target->gate)) {
        r = -ENOTSUP;
    } else if (r == 0) {
        r = backend_check(target, to, bytes);
        r = r == 0 ? edge_copy(&source->root, offset, &target->root, to, bytes, flags, aid) : r;
        gate_leave(&target->gate);
    }
    gate_leave(&source->gate);
    return r;
}

int coroutine_fn backend_write_zeroes(struct backend *backend, uint64_t offset, uint64_t bytes, unsigned flags)
{
    gate_enter(&backend->gate);
    int r = backend_check(backend, offset, bytes);
    if (r == 0) {
        r = edge_write_zeroes(&backend->root, offset, bytes, flags);
    }
    gate_leave(&backend->gate);
    return r;
}

int coroutine_fn backend_discard(struct backend *backend, uint64_t offset, uint64_t bytes)
{
    gate_enter(&backend->gate);
    int r = backend_check(backend, offset, bytes);
    if (r == 0) {
        r = edge_discard(&backend->root, offset, bytes);
    }
    gate_leave(&backend->gate);
    return r;
}

int coroutine_fn backend_flush(struct backend *backend)
{
    gate_enter(&backend->gate);
    int r = backend_check(backend, 0, 0);
    if (r == 0) {
        r = edge_flush(&backend->root);
    }
    gate_leave(&backend->gate);
    return r;
}

int coroutine_fn backend_block_status(struct backend *backend, struct node *base, uint64_t offset, uint64_t bytes,
                                      struct extent *ret)
{
    gate_enter(&backend->gate);
    int r = bytes ? backend_check(backend, offset, bytes) : -EINVAL;
    if (r == 0) {
        r = edge_block_status_check(&backend->root);
    }
    if (r == 0) {
        r = chain_block_status(backend->root.child, base, offset, bytes, ret);
    }
    gate_leave(&backend->gate);
    return r;
}

void coroutine_fn backend_enter(struct backend *backend)
{
    gate_enter(&backend->gate);
}

void backend_leave(struct backend *backend)
{
    gate_leave(&backend->gate);
}

/* --- size --- */

int coroutine_fn backend_truncate_locked(struct backend *backend, uint64_t size, struct error **err)
{
    struct drain drain;
    int r = 0;
    if (!backend->root.child) {
        return error_set(err, -ENOMEDIUM, "%s has no medium", backend->owner);
    }
    struct node *node = node_beneath_filters(backend->root.child);
    graph_drain_begin(backend->graph, &node, 1, NULL, &drain);
    if (size != backend_size(backend)) {
        r = edge_resize(&backend->root, size, err);
    }
    graph_drain_end(&drain);
    return r;
}

int coroutine_fn backend_truncate(struct backend *backend, uint64_t size, struct error **err)
{
    graph_lock(backend->graph);
    int r = backend_truncate_locked(backend, size, err);
    graph_unlock(backend->graph);
    return r;
}

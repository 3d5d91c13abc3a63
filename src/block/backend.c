/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Backends: the only way into a graph from outside, and the only place where requests are counted and held back.
 * Owns attaching and detaching, the count of requests inside, and the queue of those that wait for the end of a drain.
 *
 * 1. `state` holds the requests inside (low half) and the drains that hold the backend (high half) in one word. A
 *    request enters with one atomic addition; seeing a drain, it takes itself out again and queues.
 * 2. A request leaves with a compare-and-swap while no drain is seen, and never touches the backend after it: whoever
 *    drained and saw no request inside may free the backend. Under a drain it leaves under `guard`, which the drainer
 *    takes too.
 * 3. root.child changes only while the backend is drained, on the control thread, under graph->lock.
 * 4. Drains are taken under graph->lock, so there is one drainer at a time.
 *
 * Which backends a drain touches is drain.c's; what a request may do is request.c's.
 */
#include "base/size.h"
#include "block/private.h"
#include <errno.h>

#define DRAIN_ONE ((uint64_t)1 << 32)
#define INSIDE_MASK (DRAIN_ONE - 1)

/* A request that waits for the end of a drain; in its coroutine's frame. */
struct waiter {
    struct list link;
    struct coroutine *coroutine;
};

/* --- requests and drains --- */

/* The guard is held: the last one out wakes the drainer. */
static void leave_guarded(struct backend *backend)
{
    uint64_t old = atomic_fetch_sub(&backend->state, 1);
    g_assert(old & INSIDE_MASK);
    if ((old & INSIDE_MASK) == 1 && backend->drainer) {
        struct coroutine *drainer = backend->drainer;
        backend->drainer = NULL;
        coroutine_wake(drainer);
    }
}

static void __attribute__((noinline)) coroutine_fn enter_drained(struct backend *backend)
{
    do {
        pthread_mutex_lock(&backend->guard);
        leave_guarded(backend);
        bool drained = atomic_load(&backend->state) >= DRAIN_ONE;
        struct waiter waiter = {.coroutine = coroutine_self()};
        if (drained) {
            list_append(&backend->waiters, &waiter.link);
        }
        pthread_mutex_unlock(&backend->guard);
        if (drained) {
            coroutine_yield();
        }
    } while (atomic_fetch_add(&backend->state, 1) >= DRAIN_ONE);
}

static inline void coroutine_fn backend_enter(struct backend *backend)
{
    if (G_UNLIKELY(atomic_fetch_add(&backend->state, 1) >= DRAIN_ONE)) {
        enter_drained(backend);
    }
}

static inline void backend_leave(struct backend *backend)
{
    uint64_t old = atomic_load_explicit(&backend->state, memory_order_relaxed);
    do {
        if (G_UNLIKELY(old >= DRAIN_ONE)) {
            pthread_mutex_lock(&backend->guard);
            leave_guarded(backend);
            pthread_mutex_unlock(&backend->guard);
            return;
        }
    } while (!atomic_compare_exchange_weak(&backend->state, &old, old - 1));
}

void backend_quiesce(struct backend *backend)
{
    atomic_fetch_add(&backend->state, DRAIN_ONE);
}

void coroutine_fn backend_settle(struct backend *backend)
{
    for (;;) {
        pthread_mutex_lock(&backend->guard);
        bool inside = atomic_load(&backend->state) & INSIDE_MASK;
        if (inside) {
            g_assert(!backend->drainer);
            backend->drainer = coroutine_self();
        }
        pthread_mutex_unlock(&backend->guard);
        if (!inside) {
            return;
        }
        coroutine_yield();
    }
}

void backend_resume(struct backend *backend)
{
    pthread_mutex_lock(&backend->guard);
    uint64_t old = atomic_fetch_sub(&backend->state, DRAIN_ONE);
    g_assert(old >= DRAIN_ONE);
    if (old < 2 * DRAIN_ONE) {
        /* A woken waiter's frame is gone as soon as it is woken: unlink first. */
        while (!list_is_empty(&backend->waiters)) {
            struct waiter *waiter = container_of(backend->waiters.next, struct waiter, link);
            list_remove(&waiter->link);
            coroutine_wake(waiter->coroutine);
        }
    }
    pthread_mutex_unlock(&backend->guard);
}

/* --- life --- */

struct backend *backend_create(struct graph *graph, const char *owner)
{
    struct backend *backend = g_new0(struct backend, 1);
    backend->graph = graph;
    backend->owner = g_strdup(owner);
    backend->root = (struct edge){.backend = backend, .role = EDGE_ROOT};
    list_init(&backend->root.parent_link);
    list_init(&backend->root.child_link);
    list_init(&backend->waiters);
    pthread_mutex_init(&backend->guard, NULL);
    list_append(&graph->backends, &backend->graph_link);
    return backend;
}

void coroutine_fn backend_destroy(struct backend *backend)
{
    if (!backend) {
        return;
    }
    backend_detach(backend);
    g_assert(list_is_empty(&backend->waiters) && !atomic_load(&backend->state));
    list_remove(&backend->graph_link);
    pthread_mutex_destroy(&backend->guard);
    g_free(backend->owner);
    g_free(backend);
}

int coroutine_fn backend_attach(struct backend *backend, struct node *node, unsigned granted, struct error **err)
{
    if (!node) {
        return 0;
    }
    node_ref(node);
    graph_lock(backend->graph);
    struct node *old = backend->root.child;
    if (!old) {
        backend_quiesce(backend);
        backend_settle(backend);
        edge_link(&backend->root, node_ref(node_head(node)));
        backend->root.granted = granted;
        backend_resume(backend);
    }
    graph_unlock(backend->graph);
    int r = old ? error_set(err, -EBUSY, "%s is attached to node '%s' already", backend->owner, old->name) : 0;
    node_unref(node);
    if (r == 0) {
        backend_tell_changed(backend);
    }
    return r;
}

void backend_follow(struct backend *backend, struct operation *operation, unsigned variable)
{
    g_assert(variable < CLAIM_VARIABLE_COUNT);
    backend->operation = operation;
    backend->variable = variable;
}

void coroutine_fn backend_detach(struct backend *backend)
{
    struct node *node = NULL;
    graph_lock(backend->graph);
    backend_quiesce(backend);
    backend_settle(backend);
    if (backend->root.child) {
        node = backend->root.child;
        edge_unlink(&backend->root);
        backend->root.granted = 0;
    }
    backend->operation = NULL;
    backend_resume(backend);
    graph_unlock(backend->graph);
    node_unref(node);
}

const char *backend_owner(const struct backend *backend)
{
    return backend->owner;
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
    backend_enter(backend);
    int r = backend_check(backend, offset, bytes);
    if (G_LIKELY(r == 0)) {
        r = edge_read(&backend->root, offset, bytes, to, flags);
    }
    backend_leave(backend);
    return r;
}

int coroutine_fn backend_write(struct backend *backend, uint64_t offset, uint64_t bytes, struct buffers from,
                               unsigned flags)
{
    backend_enter(backend);
    int r = backend_check(backend, offset, bytes);
    if (G_LIKELY(r == 0)) {
        r = edge_write(&backend->root, offset, bytes, from, flags);
    }
    backend_leave(backend);
    return r;
}

int coroutine_fn backend_write_zeroes(struct backend *backend, uint64_t offset, uint64_t bytes, unsigned flags)
{
    backend_enter(backend);
    int r = backend_check(backend, offset, bytes);
    if (r == 0) {
        r = edge_write_zeroes(&backend->root, offset, bytes, flags);
    }
    backend_leave(backend);
    return r;
}

int coroutine_fn backend_discard(struct backend *backend, uint64_t offset, uint64_t bytes)
{
    backend_enter(backend);
    int r = backend_check(backend, offset, bytes);
    if (r == 0) {
        r = edge_discard(&backend->root, offset, bytes);
    }
    backend_leave(backend);
    return r;
}

int coroutine_fn backend_flush(struct backend *backend)
{
    backend_enter(backend);
    int r = backend_check(backend, 0, 0);
    if (r == 0) {
        r = edge_flush(&backend->root);
    }
    backend_leave(backend);
    return r;
}

int coroutine_fn backend_block_status(struct backend *backend, struct node *base, uint64_t offset, uint64_t bytes,
                                      struct extent *ret)
{
    backend_enter(backend);
    int r = bytes ? backend_check(backend, offset, bytes) : -EINVAL;
    if (r == 0) {
        r = edge_block_status_check(&backend->root);
    }
    if (r == 0) {
        r = chain_block_status(backend->root.child, base, offset, bytes, ret);
    }
    backend_leave(backend);
    return r;
}

/* --- size --- */

static int coroutine_fn truncate_drained(struct backend *backend, struct node *node, uint64_t size, struct error **err)
{
    uint64_t old = atomic_load(&node->size);
    unsigned need = size < old ? ACCESS_WRITE_BENEATH : ACCESS_ATTRIBUTES;
    if (size == old) {
        return 0;
    }
    if (!(backend->root.granted & need)) {
        g_autofree char *actions = access_actions_format(need);
        return error_set(err, -EPERM, "%s was not granted %s on node '%s'", backend->owner, actions, node->name);
    }
    if (!node->writable) {
        return error_set(err, -EROFS, "Node '%s' is read-only", node->name);
    }
    if (size > INT64_MAX) {
        return error_set(err, -EFBIG, "A size of %" G_GUINT64_FORMAT " bytes is too large for node '%s'", size,
                         node->name);
    }
    if (!node->driver->truncate) {
        return error_set(err, -ENOTSUP, "Driver '%s' of node '%s' cannot change its size", node->driver->name,
                         node->name);
    }
    int r = node->driver->truncate(node, size, err);
    if (r == 0) {
        atomic_store(&node->size, size);
        node_size_changed(node);
    }
    return r;
}

int coroutine_fn backend_truncate(struct backend *backend, uint64_t size, struct error **err)
{
    struct drain drain;
    graph_lock(backend->graph);
    if (!backend->root.child) {
        graph_unlock(backend->graph);
        return error_set(err, -ENOMEDIUM, "%s has no medium", backend->owner);
    }
    struct node *node = node_beneath_filters(backend->root.child);
    graph_drain_begin(backend->graph, &node, 1, NULL, &drain);
    int r = truncate_drained(backend, node, size, err);
    graph_drain_end(&drain);
    graph_unlock(backend->graph);
    return r;
}

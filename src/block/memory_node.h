/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_MEMORY_NODE_H
#define INTERLOCK_BLOCK_MEMORY_NODE_H

/*
 * For the tests of this folder: a node in memory, with the bookkeeping of an overlay (clusters that it has, others come
 * from its backing child), and what a test needs around it. Include it in test programs only.
 */
#include "base/size.h"
#include "block/private.h"
#include "loop/loop.h"
#include <errno.h>
#include <string.h>

#define MEMORY_CLUSTER 4096
#define MEMORY_SIZE (64 * KiB)

struct memory_state {
    unsigned char data[MEMORY_SIZE];
    atomic_bool allocated[MEMORY_SIZE / MEMORY_CLUSTER];
    atomic_uint inside; /* requests in the driver now */
    atomic_uint reads, writes, zeroes, discards, flushes;
    bool pauses;         /* each request lets others run */
    bool no_zeroes;      /* write_zeroes is not supported */
    unsigned last_flags; /* of the last write or write_zeroes */
};

static inline struct memory_state *memory_of(const struct node *node)
{
    return node->state;
}

static inline void coroutine_fn memory_enter(struct node *node)
{
    atomic_fetch_add(&memory_of(node)->inside, 1);
    if (memory_of(node)->pauses) {
        coroutine_pause();
    }
}

static inline int memory_leave(struct node *node, int r)
{
    atomic_fetch_sub(&memory_of(node)->inside, 1);
    return r;
}

static int coroutine_fn memory_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to,
                                    unsigned flags)
{
    struct memory_state *state = memory_of(node);
    int r = 0;
    g_assert(((offset | bytes) & (node->limits.alignment - 1)) == 0);
    g_assert(!node->limits.max_transfer || bytes <= node->limits.max_transfer);
    memory_enter(node);
    atomic_fetch_add(&state->reads, 1);
    while (bytes && r == 0) {
        uint64_t piece = min_u64(bytes, MEMORY_CLUSTER - offset % MEMORY_CLUSTER);
        if (offset >= MEMORY_SIZE) {
            buffers_fill(to, 0, piece);
        } else if (state->allocated[offset / MEMORY_CLUSTER] || !node->backing) {
            buffers_copy_in(to, state->data + offset, piece);
        } else {
            r = edge_read(node->backing, offset, piece, to, 0);
        }
        to = buffers_advance(to, piece);
        offset += piece;
        bytes -= piece;
    }
    return memory_leave(node, r);
}

/* The rest of a cluster that comes to be allocated. */
static inline int coroutine_fn memory_fill(struct node *node, uint64_t cluster)
{
    struct memory_state *state = memory_of(node);
    if (state->allocated[cluster]) {
        return 0;
    }
    int r = node->backing ? edge_read_memory(node->backing, cluster * MEMORY_CLUSTER,
                                             state->data + cluster * MEMORY_CLUSTER, MEMORY_CLUSTER)
                          : 0;
    state->allocated[cluster] = true;
    return r;
}

static int coroutine_fn memory_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                     unsigned flags)
{
    struct memory_state *state = memory_of(node);
    g_assert(((offset | bytes) & (node->limits.alignment - 1)) == 0);
    g_assert(!node->limits.max_transfer || bytes <= node->limits.max_transfer);
    memory_enter(node);
    atomic_fetch_add(&state->writes, 1);
    state->last_flags = flags;
    while (bytes) {
        uint64_t piece = min_u64(bytes, MEMORY_CLUSTER - offset % MEMORY_CLUSTER), cluster = offset / MEMORY_CLUSTER;
        g_assert(offset + piece <= MEMORY_SIZE);
        if (!(flags & REQUEST_IF_UNALLOCATED) || !state->allocated[cluster]) {
            memory_fill(node, cluster);
            buffers_copy_out(from, state->data + offset, piece);
        }
        from = buffers_advance(from, piece);
        offset += piece;
        bytes -= piece;
    }
    return memory_leave(node, 0);
}

static int coroutine_fn memory_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    struct memory_state *state = memory_of(node);
    g_assert(((offset | bytes) & (node->limits.alignment - 1)) == 0);
    if (state->no_zeroes) {
        return -ENOTSUP;
    }
    state->last_flags = flags;
    atomic_fetch_add(&state->zeroes, 1);
    for (uint64_t at = offset; at < offset + bytes; at++) {
        memory_fill(node, at / MEMORY_CLUSTER);
        state->data[at] = 0;
    }
    return 0;
}

static int coroutine_fn memory_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    atomic_fetch_add(&memory_of(node)->discards, 1);
    return 0;
}

static int coroutine_fn memory_flush(struct node *node)
{
    atomic_fetch_add(&memory_of(node)->flushes, 1);
    return 0;
}

static int coroutine_fn memory_block_status(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    bool allocated = memory_of(node)->allocated[offset / MEMORY_CLUSTER];
    ret->bytes = min_u64(bytes, MEMORY_CLUSTER - offset % MEMORY_CLUSTER);
    ret->flags = allocated ? EXTENT_DATA | EXTENT_ALLOCATED : 0;
    return 0;
}

static int coroutine_fn memory_truncate(struct node *node, uint64_t size, struct error **err)
{
    return size > MEMORY_SIZE ? error_set(err, -EFBIG, "too large") : 0;
}

static const struct driver memory_driver = {
    .name = "memory",
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct memory_state),
    .backing = true,
    .write_if_unallocated = true,
    .read = memory_read,
    .write = memory_write,
    .write_zeroes = memory_write_zeroes,
    .discard = memory_discard,
    .flush = memory_flush,
    .block_status = memory_block_status,
    .truncate = memory_truncate,
};

/* A filter that passes everything on. */
static const struct driver pass_driver __attribute__((unused)) = {.name = "pass", .kind = DRIVER_FILTER};

static inline struct node *coroutine_fn memory_node(struct graph *graph, const char *name, struct node *backing)
{
    struct node *node = node_create(graph, &memory_driver, name);
    atomic_store(&node->size, MEMORY_SIZE);
    node->writable = node->wants_writable = node->open = node->monitor_owned = node->discard = true;
    if (backing) {
        g_assert(edge_attach(node, EDGE_BACKING, backing, NULL, NULL) == 0);
    }
    node_publish(node);
    return node;
}

/* base <- a <- b <- c <- top */
enum { BASE, A, B, C, TOP, CHAIN_LENGTH };
static inline void coroutine_fn memory_chain(struct graph *graph, struct node *chain[CHAIN_LENGTH])
{
    static const char *const names[] = {"base", "a", "b", "c", "top"};
    for (unsigned i = 0; i < CHAIN_LENGTH; i++) {
        chain[i] = memory_node(graph, names[i], i ? chain[i - 1] : NULL);
    }
}

static inline struct backend *coroutine_fn memory_backend(struct graph *graph, const char *owner, struct node *node,
                                                          unsigned granted)
{
    struct backend *backend = backend_create(graph, owner);
    g_assert(backend_attach(backend, node, granted, NULL) == 0);
    return backend;
}

/* One who may change the edge of `node`, so that it leads to `target` or `other`. */
static inline struct operation *memory_surgery(struct graph *graph, struct node *node, struct node *target,
                                               struct node *other)
{
    static const struct claim_clause clauses[] = {
        {.role = CLAIM_ROLE_NODE, .first = CLAIM_NODE, .require = ACCESS_GRAPH, .path = "node"},
        {.role = CLAIM_ROLE_NODE, .first = CLAIM_TARGET, .require = ACCESS_READ_METADATA, .path = "target"},
        {.role = CLAIM_ROLE_NODE, .first = CLAIM_BASE, .require = ACCESS_READ_METADATA, .path = "base"}};
    static const struct claim_table table = {.operation = "surgery", .clauses = clauses, .count = 3};
    struct operation_config config = {.kind = "command",
                                      .id = "test",
                                      .table = &table,
                                      .bound = {[CLAIM_NODE] = node, [CLAIM_TARGET] = target, [CLAIM_BASE] = other}};
    struct operation *operation = NULL;
    g_assert(operation_begin(graph, &config, &operation, NULL) == 0);
    return operation;
}

static inline void coroutine_fn memory_end(struct graph *graph)
{
    graph_delete_all(graph);
    graph_destroy(graph);
}

/* Runs a test's body in a coroutine of the control loop. */
static inline void in_coroutine(const void *entry)
{
    struct loop *loop;
    g_assert(loop_create(ENGINE_AUTO, &loop, NULL) == 0);
    loop_run_coroutine(loop, (void (*)(void *))entry, NULL);
    loop_destroy(loop);
}

#endif

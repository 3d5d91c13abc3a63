/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The request path: ranges, grants, padding, zeroes, options of a node. One node in memory, one loop.
 */
#include "block/memory_node.h"
#include "loop/sim.h"
#include <stdlib.h>

static int coroutine_fn put(struct backend *backend, uint64_t offset, const void *from, uint64_t bytes)
{
    struct iovec iov = {(void *)from, bytes};
    return backend_write(backend, offset, bytes, buffers_one(&iov), 0);
}

static int coroutine_fn get(struct backend *backend, uint64_t offset, void *to, uint64_t bytes)
{
    struct iovec iov = {to, bytes};
    return backend_read(backend, offset, bytes, buffers_one(&iov), 0);
}

static void coroutine_fn bounds(void *argument)
{
    struct graph *graph = graph_create();
    struct node *node = memory_node(graph, "n", NULL);
    struct backend *backend = memory_backend(graph, "test", node, ACCESS_ALL), *empty = backend_create(graph, "empty");
    char buffer[16] = "0123456789abcde";
    g_assert_cmpint(put(backend, MEMORY_SIZE - 16, buffer, 16), ==, 0);
    g_assert_cmpint(put(backend, MEMORY_SIZE - 15, buffer, 16), ==, -EINVAL);
    g_assert_cmpint(put(backend, UINT64_MAX - 3, buffer, 16), ==, -EINVAL);
    g_assert_cmpint(get(backend, MEMORY_SIZE, buffer, 1), ==, -EINVAL);
    g_assert_cmpint(get(backend, MEMORY_SIZE, buffer, 0), ==, 0);
    g_assert_cmpint(backend_write_zeroes(backend, 1, MEMORY_SIZE, 0), ==, -EINVAL);
    g_assert_cmpint(backend_discard(backend, UINT64_MAX, 2), ==, -EINVAL);
    g_assert_cmpint(get(empty, 0, buffer, 1), ==, -ENOMEDIUM);
    g_assert_cmpint(backend_flush(empty), ==, -ENOMEDIUM);
    g_assert_cmpuint(backend_size(empty), ==, 0);
    node->writable = false;
    g_assert_cmpint(put(backend, 0, buffer, 1), ==, -EROFS);
    node->writable = true;
    /* Behind the end of a child there are zeroes. */
    atomic_store(&node->size, 8);
    memset(memory_of(node)->data, 'x', 16);
    g_assert_cmpint(edge_read_memory(backend_edge(backend), 4, buffer, 8), ==, 0);
    g_assert(!memcmp(buffer, "xxxx\0\0\0\0", 8));
    g_assert_cmpint(edge_read_memory(backend_edge(backend), 1000, buffer, 8), ==, 0);
    g_assert(!memcmp(buffer, "\0\0\0\0\0\0\0\0", 8));
    g_assert_cmpint(edge_write_memory(backend_edge(backend), 4, buffer, 8, 0), ==, -ENOSPC);
    backend_destroy(backend);
    backend_destroy(empty);
    memory_end(graph);
}

static void test_bounds(void)
{
    in_coroutine(bounds);
}

/* Each action alone lets through what it is for, and nothing else. */
static void coroutine_fn grants(void *argument)
{
#ifndef INTERLOCK_DEBUG
    static const struct {
        unsigned granted;
        bool read, write, if_unallocated, zeroes, discard, status, grow, shrink;
    } rows[] = {
        {0, 0, 0, 0, 0, 0, 0, 0, 0},
        {ACCESS_READ_DATA, 1, 0, 0, 0, 0, 1, 0, 0},
        {ACCESS_READ_METADATA, 0, 0, 0, 0, 0, 1, 0, 0},
        {ACCESS_WRITE_DATA, 0, 1, 0, 1, 1, 1, 0, 0},
        {ACCESS_WRITE_METADATA, 1, 0, 1, 0, 0, 1, 0, 0},
        {ACCESS_ATTRIBUTES, 0, 0, 0, 0, 0, 0, 1, 0},
        {ACCESS_GRAPH, 0, 0, 0, 0, 0, 0, 0, 0},
        {ACCESS_WRITE_BENEATH, 0, 0, 0, 0, 0, 0, 0, 0},
        {ACCESS_WRITE_BENEATH | ACCESS_ATTRIBUTES, 0, 0, 0, 0, 0, 0, 1, 1},
    };
    struct graph *graph = graph_create();
    struct node *node = memory_node(graph, "n", NULL);
    char buffer[16] = "0123456789abcde";
    struct iovec iov = {buffer, sizeof(buffer)};
    struct extent extent;
    /* Each refusal is logged; here it is expected. */
    g_log_set_always_fatal(G_LOG_FATAL_MASK);
    g_log_set_handler(NULL, G_LOG_LEVEL_CRITICAL, (GLogFunc)(void (*)(void))abs, NULL);
    for (unsigned i = 0; i < G_N_ELEMENTS(rows); i++) {
        struct backend *backend = memory_backend(graph, "test", node, rows[i].granted);
        struct edge *edge = backend_edge(backend);
        g_assert_cmpint(get(backend, 0, buffer, 16), ==, rows[i].read ? 0 : -EPERM);
        g_assert_cmpint(put(backend, 0, buffer, 16), ==, rows[i].write ? 0 : -EPERM);
        g_assert_cmpint(backend_write(backend, 0, 16, buffers_one(&iov), REQUEST_IF_UNALLOCATED), ==,
                        rows[i].if_unallocated ? 0 : -EPERM);
        g_assert_cmpint(backend_write_zeroes(backend, 0, 16, 0), ==, rows[i].zeroes ? 0 : -EPERM);
        g_assert_cmpint(backend_discard(backend, 0, 16), ==, rows[i].discard ? 0 : -EPERM);
        g_assert_cmpint(backend_block_status(backend, NULL, 0, 16, &extent), ==, rows[i].status ? 0 : -EPERM);
        atomic_store(&node->size, MEMORY_SIZE / 2);
        g_assert_cmpint(edge_truncate(edge, MEMORY_SIZE), ==, rows[i].grow ? 0 : -EPERM);
        atomic_store(&node->size, MEMORY_SIZE);
        g_assert_cmpint(edge_truncate(edge, MEMORY_SIZE / 2), ==, rows[i].shrink ? 0 : -EPERM);
        atomic_store(&node->size, MEMORY_SIZE);
        backend_destroy(backend);
    }
    memory_end(graph);
#endif
}

static void test_grants(void)
{
#ifdef INTERLOCK_DEBUG
    g_test_skip("debug builds abort on a request without a claim");
#endif
    in_coroutine(grants);
}

static void coroutine_fn unclaimed_read(void *argument)
{
    struct graph *graph = graph_create();
    struct backend *backend = memory_backend(graph, "test", memory_node(graph, "n", NULL), ACCESS_WRITE_DATA);
    char byte;
    get(backend, 0, &byte, 1);
}

static void test_unclaimed_aborts(void)
{
#ifdef INTERLOCK_DEBUG
    if (g_test_subprocess()) {
        in_coroutine(unclaimed_read);
        return;
    }
    g_test_trap_subprocess(NULL, 0, 0);
    g_test_trap_assert_failed();
    g_test_trap_assert_stderr("*read by 'test' on node 'n' without a claim*");
#else
    (void)unclaimed_read;
    g_test_skip("release builds refuse and log");
#endif
}

/* Random reads, writes and zeroes against a copy, on a node that takes whole sectors only. */
static void coroutine_fn padding(void *argument)
{
    struct graph *graph = graph_create();
    struct node *node = memory_node(graph, "n", NULL);
    struct backend *backend = memory_backend(graph, "test", node, ACCESS_ALL);
    g_autofree unsigned char *model = g_malloc0(MEMORY_SIZE), *buffer = g_malloc(MEMORY_SIZE + 8);
    GRand *random = g_rand_new_with_seed(7);
    node->limits = (struct limits){.alignment = 512, .memory_alignment = 512, .max_transfer = 3000};
    for (unsigned round = 0; round < 3000; round++) {
        uint64_t offset = g_rand_int_range(random, 0, MEMORY_SIZE), bytes = g_rand_int_range(random, 0, 9000);
        unsigned char *at = buffer + g_rand_int_range(random, 0, 8);
        if (g_rand_int_range(random, 0, 4) == 0) {
            offset = align_down(offset, 512);
            bytes = align_down(bytes, 512);
        }
        bytes = min_u64(bytes, MEMORY_SIZE - offset);
        memory_of(node)->no_zeroes = g_rand_boolean(random);
        switch (g_rand_int_range(random, 0, 3)) {
        case 0:
            memset(at, round, bytes);
            g_assert_cmpint(put(backend, offset, at, bytes), ==, 0);
            memcpy(model + offset, at, bytes);
            break;
        case 1:
            g_assert_cmpint(backend_write_zeroes(backend, offset, bytes, 0), ==, 0);
            memset(model + offset, 0, bytes);
            break;
        default:
            g_assert_cmpint(get(backend, offset, at, bytes), ==, 0);
            g_assert(!memcmp(at, model + offset, bytes));
        }
    }
    g_assert(!memcmp(memory_of(node)->data, model, MEMORY_SIZE));
    g_rand_free(random);
    backend_destroy(backend);
    memory_end(graph);
}

static void test_padding(void)
{
    in_coroutine(padding);
}

struct writer {
    struct backend *backend;
    unsigned index;
    struct co_group *group;
};

/* 16 writers, each to its own 100 bytes of the same few sectors, again and again. */
static void coroutine_fn write_own(void *argument)
{
    struct writer *writer = argument;
    unsigned char own[100];
    for (unsigned round = 1; round <= 50; round++) {
        memset(own, round, sizeof(own));
        g_assert_cmpint(put(writer->backend, writer->index * 100, own, sizeof(own)), ==, 0);
    }
    co_group_leave(writer->group);
}

static void coroutine_fn overlapping(void *argument)
{
    struct graph *graph = graph_create();
    struct node *node = memory_node(graph, "n", NULL);
    struct writer writers[16];
    struct co_group group;
    co_group_init(&group);
    node->limits.alignment = 512;
    memory_of(node)->pauses = true;
    for (unsigned i = 0; i < G_N_ELEMENTS(writers); i++) {
        writers[i] = (struct writer){memory_backend(graph, "test", node, ACCESS_ALL), i, &group};
        co_group_enter(&group);
        loop_spawn(loop_self(), write_own, &writers[i]);
    }
    co_group_wait(&group);
    for (unsigned i = 0; i < 1600; i++) {
        g_assert_cmpuint(memory_of(node)->data[i], ==, 50);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(writers); i++) {
        backend_destroy(writers[i].backend);
    }
    co_group_destroy(&group);
    memory_end(graph);
}

static void test_overlapping(void)
{
    in_coroutine(overlapping);
}

static void coroutine_fn zeroes_and_discards(void *argument)
{
    struct graph *graph = graph_create();
    struct node *node = memory_node(graph, "n", NULL);
    struct memory_state *state = memory_of(node);
    struct backend *backend = memory_backend(graph, "test", node, ACCESS_ALL);
    char zero[512] = {0};
    g_assert_cmpint(put(backend, 0, zero, 512), ==, 0);
    g_assert_cmpuint(state->zeroes, ==, 0);
    node->detect_zeroes = true;
    g_assert_cmpint(put(backend, 0, zero, 512), ==, 0);
    g_assert_cmpuint(state->zeroes, ==, 1);
    g_assert_cmpuint(state->last_flags, ==, 0);
    node->detect_zeroes_unmap = true;
    g_assert_cmpint(put(backend, 0, zero, 512), ==, 0);
    g_assert_cmpuint(state->last_flags, ==, REQUEST_MAY_UNMAP);
    zero[511] = 1;
    g_assert_cmpint(put(backend, 0, zero, 512), ==, 0);
    g_assert_cmpuint(state->zeroes, ==, 2);
    g_assert_cmpint(backend_discard(backend, 0, 512), ==, 0);
    g_assert_cmpuint(state->discards, ==, 1);
    node->discard = false;
    g_assert_cmpint(backend_discard(backend, 0, 512), ==, 0);
    g_assert_cmpuint(state->discards, ==, 1);
    g_assert_cmpint(backend_write_zeroes(backend, 0, 512, REQUEST_MAY_UNMAP | REQUEST_FUA), ==, 0);
    g_assert_cmpuint(state->last_flags, ==, REQUEST_FUA);
    state->no_zeroes = true;
    g_assert_cmpint(backend_write_zeroes(backend, 0, 512, REQUEST_NO_FALLBACK), ==, -ENOTSUP);
    backend_destroy(backend);
    memory_end(graph);
}

static void test_zeroes_and_discards(void)
{
    in_coroutine(zeroes_and_discards);
}

static void coroutine_fn chain_status(void *argument)
{
    struct graph *graph = graph_create();
    struct node *chain[CHAIN_LENGTH], *filter;
    struct extent extent;
    memory_chain(graph, chain);
    memory_of(chain[TOP])->allocated[0] = true;
    memory_of(chain[B])->allocated[1] = true;
    memory_of(chain[BASE])->allocated[2] = true;
    atomic_store(&chain[A]->size, 5 * MEMORY_CLUSTER);
    g_assert_cmpint(graph_create_node(graph, &pass_driver, NULL, "job j1", &filter, NULL), ==, 0);
    g_assert_cmpint(graph_insert_filter(graph, NULL, filter, chain[C], NULL), ==, 0);
    g_assert(node_head(chain[C]) == filter && node_beneath_filters(filter) == chain[C]);
    g_assert_cmpuint(node_backing_depth(chain[TOP]), ==, 4);

    static const struct {
        unsigned cluster, base, flags, depth;
    } rows[] = {
        {0, CHAIN_LENGTH, EXTENT_DATA | EXTENT_ALLOCATED, 0},
        {1, CHAIN_LENGTH, EXTENT_DATA | EXTENT_ALLOCATED, 2},
        {1, B, 0, 3},
        {2, CHAIN_LENGTH, EXTENT_DATA | EXTENT_ALLOCATED, 4},
        {2, BASE, 0, 5},
        {3, CHAIN_LENGTH, EXTENT_ZERO, 6},
        {6, CHAIN_LENGTH, EXTENT_ZERO | EXTENT_ALLOCATED, 3},
        {6, BASE, EXTENT_ZERO | EXTENT_ALLOCATED, 3},
        {6, A, 0, 4},
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(rows); i++) {
        struct node *base = rows[i].base == CHAIN_LENGTH ? NULL : chain[rows[i].base];
        g_assert_cmpint(chain_block_status(chain[TOP], base, rows[i].cluster * MEMORY_CLUSTER + 1, 100, &extent), ==,
                        0);
        g_assert_cmpuint(extent.flags, ==, rows[i].flags);
        g_assert_cmpuint(extent.depth, ==, rows[i].depth);
        g_assert_cmpuint(extent.bytes, ==, 100);
    }
    g_assert_cmpint(graph_remove_filter(graph, NULL, filter, NULL), ==, 0);
    node_release(filter);
    memory_end(graph);
}

static void test_chain_status(void)
{
    in_coroutine(chain_status);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    sim_create_if_asked();
    g_test_add_func("/request/bounds", test_bounds);
    g_test_add_func("/request/grants", test_grants);
    g_test_add_func("/request/unclaimed-aborts", test_unclaimed_aborts);
    g_test_add_func("/request/padding", test_padding);
    g_test_add_func("/request/overlapping-padded-writes", test_overlapping);
    g_test_add_func("/request/zeroes-and-discards", test_zeroes_and_discards);
    g_test_add_func("/chain/status", test_chain_status);
    return g_test_run();
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Drains against requests from two loop threads: no request is inside a drained node, none is lost, and an edge may be
 * moved meanwhile. Run under TSan as well.
 */
#include "block/memory_node.h"
#include "loop/sim.h"

#define CLIENTS 8
#define ROUNDS 200

struct client {
    struct backend *backend;
    atomic_bool *stop;
    struct co_group *group;
    atomic_uint done;
};

#define ENOUGH 100 /* requests of each client */

static void coroutine_fn client_run(void *argument)
{
    struct client *client = argument;
    char buffer[64];
    struct iovec iov = {buffer, sizeof(buffer)};
    while (!atomic_load(client->stop)) {
        g_assert_cmpint(backend_read(client->backend, 0, sizeof(buffer), buffers_one(&iov), 0), ==, 0);
        client->done++;
        coroutine_pause();
    }
    co_group_leave(client->group);
}

static bool all_did_enough(struct client *clients, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        if (atomic_load(&clients[i].done) < ENOUGH) {
            return false;
        }
    }
    return true;
}

static void coroutine_fn drain_body(void *argument)
{
    struct graph *graph = graph_create();
    struct node *chain[CHAIN_LENGTH], *other;
    struct loop *loops[2];
    struct client clients[CLIENTS];
    atomic_bool stop = false;
    struct co_group group;
    memory_chain(graph, chain);
    other = memory_node(graph, "other", NULL);
    for (unsigned i = 0; i < CHAIN_LENGTH; i++) {
        memory_of(chain[i])->pauses = true;
    }
    memory_of(other)->pauses = true;
    co_group_init(&group);
    for (unsigned i = 0; i < G_N_ELEMENTS(loops); i++) {
        g_assert_cmpint(loop_thread_start("io", ENGINE_AUTO, &loops[i], NULL), ==, 0);
    }
    struct backend *backends[2] = {memory_backend(graph, "one", chain[TOP], ACCESS_READ_DATA),
                                   memory_backend(graph, "two", chain[B], ACCESS_READ_DATA)};
    for (unsigned i = 0; i < CLIENTS; i++) {
        clients[i] = (struct client){.backend = backends[i / 2 % 2], .stop = &stop, .group = &group};
        co_group_enter(&group);
        loop_spawn(loops[i % 2], client_run, &clients[i]);
    }
    struct operation *surgery = memory_surgery(graph, chain[A], chain[BASE], other);
    for (unsigned round = 0; round < ROUNDS || !all_did_enough(clients, CLIENTS); round++) {
        struct drain drain, nested;
        struct node *target = round % 2 ? other : chain[BASE];
        graph_lock(graph);
        graph_drain_begin(graph, &chain[A], 1, NULL, &drain);
        g_assert_cmpuint(drain.count, ==, 2);
        graph_drain_begin(graph, &chain[BASE], 1, NULL, &nested);
        for (unsigned i = 0; i < CHAIN_LENGTH; i++) {
            g_assert_cmpuint(atomic_load(&memory_of(chain[i])->inside), ==, 0);
        }
        g_assert_cmpuint(atomic_load(&memory_of(other)->inside), ==, 0);
        struct transaction *transaction = graph_begin(graph, "test");
        transaction_by(transaction, surgery);
        transaction_move_edge(transaction, chain[A]->backing, target);
        g_assert_cmpint(graph_commit(transaction, NULL), ==, 0);
        graph_drain_end(&nested);
        graph_drain_end(&drain);
        graph_unlock(graph);
        coroutine_pause();
    }
    atomic_store(&stop, true);
    co_group_wait(&group);
    for (unsigned i = 0; i < G_N_ELEMENTS(loops); i++) {
        backend_destroy(backends[i]);
        loop_thread_join(loops[i]);
    }
    co_group_destroy(&group);
    operation_end(surgery);
    memory_end(graph);
}

static void test_drain(void)
{
    in_coroutine(drain_body);
}

/* A backend that comes and goes under its clients answers -ENOMEDIUM, and nothing worse. */
static void coroutine_fn eject_client(void *argument)
{
    struct client *client = argument;
    char buffer[64];
    struct iovec iov = {buffer, sizeof(buffer)};
    while (!atomic_load(client->stop)) {
        int r = backend_read(client->backend, 0, sizeof(buffer), buffers_one(&iov), 0);
        g_assert(r == 0 || r == -ENOMEDIUM);
        client->done += r == 0;
        coroutine_pause();
    }
    co_group_leave(client->group);
}

static void coroutine_fn eject_body(void *argument)
{
    struct graph *graph = graph_create();
    struct node *node = memory_node(graph, "n", NULL);
    struct loop *io;
    struct client clients[2];
    atomic_bool stop = false;
    struct co_group group;
    struct backend *backend = backend_create(graph, "test");
    memory_of(node)->pauses = true;
    co_group_init(&group);
    g_assert_cmpint(loop_thread_start("io", ENGINE_AUTO, &io, NULL), ==, 0);
    for (unsigned i = 0; i < G_N_ELEMENTS(clients); i++) {
        clients[i] = (struct client){.backend = backend, .stop = &stop, .group = &group};
        co_group_enter(&group);
        loop_spawn(i ? io : loop_self(), eject_client, &clients[i]);
    }
    for (unsigned round = 0; round < ROUNDS || !all_did_enough(clients, 2); round++) {
        g_assert_cmpint(backend_attach(backend, node, ACCESS_READ_DATA, NULL), ==, 0);
        g_assert_cmpint(backend_attach(backend, node, ACCESS_READ_DATA, NULL), ==, -EBUSY);
        coroutine_pause();
        backend_detach(backend);
        g_assert_cmpuint(atomic_load(&memory_of(node)->inside), ==, 0);
        g_assert(!backend_node(backend));
    }
    atomic_store(&stop, true);
    co_group_wait(&group);
    backend_destroy(backend);
    loop_thread_join(io);
    co_group_destroy(&group);
    memory_end(graph);
}

static void test_eject(void)
{
    in_coroutine(eject_body);
}

struct late {
    struct backend *backend;
    struct co_group *group;
    bool done;
};

static void coroutine_fn late_read(void *argument)
{
    struct late *late = argument;
    char byte;
    struct iovec iov = {&byte, 1};
    g_assert_cmpint(backend_read(late->backend, 0, 1, buffers_one(&iov), 0), ==, 0);
    late->done = true;
    co_group_leave(late->group);
}

/* A drain stops everybody but the drainer's own backend. */
static void coroutine_fn except_body(void *argument)
{
    struct graph *graph = graph_create();
    struct node *node = memory_node(graph, "n", NULL);
    struct backend *own = memory_backend(graph, "own", node, ACCESS_ALL),
                   *client = memory_backend(graph, "client", node, ACCESS_ALL);
    struct co_group group;
    struct late waits = {client, &group, false};
    struct drain drain;
    char byte = 1;
    struct iovec iov = {&byte, 1};
    co_group_init(&group);
    graph_lock(graph);
    graph_drain_begin(graph, &node, 1, own, &drain);
    g_assert_cmpuint(drain.count, ==, 1);
    co_group_enter(&group);
    loop_spawn(loop_self(), late_read, &waits);
    for (unsigned i = 0; i < 10; i++) {
        g_assert_cmpint(backend_write(own, 0, 1, buffers_one(&iov), 0), ==, 0);
        coroutine_pause();
        g_assert(!waits.done);
    }
    graph_drain_end(&drain);
    graph_unlock(graph);
    co_group_wait(&group);
    g_assert(waits.done);
    backend_destroy(own);
    backend_destroy(client);
    co_group_destroy(&group);
    memory_end(graph);
}

static void test_except(void)
{
    in_coroutine(except_body);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    sim_create_if_asked();
    g_test_add_func("/drain/requests-from-two-loops", test_drain);
    g_test_add_func("/drain/attach-and-detach-under-clients", test_eject);
    g_test_add_func("/drain/except-own-backend", test_except);
    return g_test_run();
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Requests without a claim, for every driver: each kind of request is tried with nothing granted, with each action
 * alone, with all but each, and with all. What is not granted fails with EPERM and a line in the log, whatever the
 * driver, and its image is as it was; what is granted never fails for that reason. The same for changes of the graph:
 * the backing string in a header, and moving an edge.
 */
#include "base/size.h"
#include "block/dirty.h"
#include "block/enforce.h"
#include "block/graph.h"
#include "block/operation.h"
#include "block/user.h"
#include "driver/drivers.h"
#include "driver/filter/track.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include <errno.h>
#include <string.h>

enum { SIZE = 256 << 10, PIECE = 64 << 10 };

static unsigned refusals; /* that were logged */

struct subject {
    struct graph *graph;
    struct node *node, *filter; /* filter: the node under test, over `node`, or NULL */
    struct dirty *dirty;
    char *path; /* of the image, or NULL */
};

/* --- kinds of request --- */

static int coroutine_fn try_read(struct backend *backend)
{
    g_autofree void *data = g_malloc0(PIECE);
    struct iovec iov = {data, PIECE};
    return backend_read(backend, 0, PIECE, buffers_one(&iov), 0);
}

static int coroutine_fn write_with(struct backend *backend, unsigned flags)
{
    g_autofree void *data = g_malloc(PIECE);
    struct iovec iov = {memset(data, 0x77, PIECE), PIECE};
    return backend_write(backend, PIECE, PIECE, buffers_one(&iov), flags);
}

static int coroutine_fn try_write(struct backend *backend)
{
    return write_with(backend, 0);
}

static int coroutine_fn try_write_new(struct backend *backend)
{
    return write_with(backend, REQUEST_IF_UNALLOCATED);
}

static int coroutine_fn try_zeroes(struct backend *backend)
{
    return backend_write_zeroes(backend, 0, PIECE, REQUEST_MAY_UNMAP);
}

static int coroutine_fn try_zeroes_new(struct backend *backend)
{
    return backend_write_zeroes(backend, 0, PIECE, REQUEST_IF_UNALLOCATED);
}

static int coroutine_fn try_discard(struct backend *backend)
{
    return backend_discard(backend, 0, PIECE);
}

static int coroutine_fn try_status(struct backend *backend)
{
    struct extent extent;
    return backend_block_status(backend, NULL, 0, PIECE, &extent);
}

static int coroutine_fn try_grow(struct backend *backend)
{
    return backend_truncate(backend, backend_size(backend) + PIECE, NULL);
}

static int coroutine_fn try_shrink(struct backend *backend)
{
    return backend_truncate(backend, backend_size(backend) - PIECE, NULL);
}

static int coroutine_fn try_flush(struct backend *backend)
{
    return backend_flush(backend);
}

static const struct kind {
    const char *name;
    int coroutine_fn (*try)(struct backend *backend);
    unsigned any, all; /* what is enough: one of `any`, all of `all` */
} kinds[] = {
    {"read", try_read, ACCESS_READ_DATA | ACCESS_WRITE_METADATA, 0},
    {"write", try_write, ACCESS_WRITE_DATA, 0},
    {"write where nothing is", try_write_new, ACCESS_WRITE_METADATA, 0},
    {"zeroes", try_zeroes, ACCESS_WRITE_DATA, 0},
    {"zeroes where nothing is", try_zeroes_new, ACCESS_WRITE_METADATA, 0},
    {"discard", try_discard, ACCESS_WRITE_DATA, 0},
    {"block status", try_status, ACCESS_READ_DATA | ACCESS_READ_METADATA | ACCESS_WRITE_DATA | ACCESS_WRITE_METADATA,
     0},
    {"grow", try_grow, 0, ACCESS_ATTRIBUTES},
    {"shrink", try_shrink, 0, ACCESS_ATTRIBUTES | ACCESS_WRITE_BENEATH},
    {"flush", try_flush, 0, 0},
};

static bool is_enough(const struct kind *kind, unsigned granted)
{
    return (!kind->any || granted & kind->any) && (granted & kind->all) == kind->all;
}

/* --- drivers --- */

static void coroutine_fn open_file(struct subject *subject, const char *name)
{
    g_autofree char *content = g_malloc(SIZE);
    subject->path = g_strdup_printf("%s/%s", testing_directory(), name);
    memset(content, 0x33, SIZE);
    g_file_set_contents(subject->path, content, SIZE, NULL);
    subject->node = testing_add(subject->graph, NULL,
                                "{\"driver\":\"file\",\"node-name\":\"%s\",\"filename\":\"%s\",\"discard\":\"unmap\"}",
                                name, subject->path);
}

static void coroutine_fn open_raw(struct subject *subject)
{
    open_file(subject, "file");
    subject->node = testing_add(subject->graph, NULL,
                                "{\"driver\":\"raw\",\"node-name\":\"node\",\"file\":\"file\",\"discard\":\"unmap\"}");
}

static void coroutine_fn open_protocol(struct subject *subject)
{
    open_file(subject, "node");
}

static void coroutine_fn open_qcow2(struct subject *subject)
{
    subject->path = g_strdup_printf("%s/image", testing_directory());
    testing_run(true, "qemu-img create -q -f qcow2 %s %d", subject->path, SIZE);
    subject->node = testing_add(subject->graph, NULL,
                                "{\"driver\":\"qcow2\",\"node-name\":\"node\",\"discard\":\"unmap\",\"file\":"
                                "{\"driver\":\"file\",\"filename\":\"%s\"}}",
                                subject->path);
}

static void coroutine_fn open_null(struct subject *subject)
{
    subject->node = testing_add(
        subject->graph, NULL, "{\"driver\":\"null-co\",\"node-name\":\"node\",\"size\":%d,\"read-zeroes\":true}", SIZE);
}

static void coroutine_fn open_track(struct subject *subject)
{
    open_qcow2(subject);
    g_assert_cmpint(dirty_create(SIZE, PIECE, &subject->dirty), ==, 0);
    g_assert_cmpint(graph_create_node(subject->graph, &driver_track, "filter", "test", &subject->filter, NULL), ==, 0);
    track_set_dirty(subject->filter, subject->dirty);
    g_assert_cmpint(graph_insert_filter(subject->graph, NULL, subject->filter, subject->node, NULL), ==, 0);
}

static const struct opener {
    const char *driver;
    void coroutine_fn (*open)(struct subject *subject);
} openers[] = {
    {"file", open_protocol}, {"raw", open_raw}, {"qcow2", open_qcow2}, {"null-co", open_null}, {"track", open_track},
};

static void coroutine_fn subject_close(struct subject *subject)
{
    if (subject->filter) {
        g_assert_cmpint(graph_remove_filter(subject->graph, NULL, subject->filter, NULL), ==, 0);
        node_release(subject->filter);
        dirty_destroy(subject->dirty);
    }
    graph_delete_all(subject->graph);
    graph_destroy(subject->graph);
    g_free(subject->path);
}

/* --- trying --- */

static char *content_of(const struct subject *subject, gsize *ret_bytes)
{
    char *content = NULL;
    *ret_bytes = 0;
    if (subject->path) {
        g_file_get_contents(subject->path, &content, ret_bytes, NULL);
    }
    return content;
}

static void coroutine_fn try_once(struct subject *subject, const struct kind *kind, unsigned granted)
{
    struct backend *backend = backend_create(subject->graph, "test");
    gsize bytes_before, bytes_after;
    g_assert_cmpint(backend_attach(backend, subject->node, granted, NULL), ==, 0);
    g_assert_true(backend_node(backend) == (subject->filter ? subject->filter : subject->node));
    uint64_t size = backend_size(backend);
    refusals = 0;
    if (is_enough(kind, granted)) {
        int result = kind->try(backend);
        g_assert_cmpint(result, !=, -EPERM);
        g_assert_true(result == 0 || result == -ENOTSUP); /* not every driver can do everything */
        g_assert_cmpuint(refusals, ==, 0);
    } else {
        g_autofree char *before = content_of(subject, &bytes_before);
        uint64_t marked = subject->dirty ? dirty_bytes(subject->dirty) : 0;
        g_assert_cmpint(kind->try(backend), ==, -EPERM);
        g_assert_cmpuint(refusals, ==, 1);
        g_autofree char *after = content_of(subject, &bytes_after);
        g_assert_cmpmem(before, bytes_before, after, bytes_after);
        g_assert_cmpuint(backend_size(backend), ==, size);
        g_assert_cmpuint(subject->dirty ? dirty_bytes(subject->dirty) : 0, ==, marked);
    }
    backend_destroy(backend);
}

static void coroutine_fn requests(void *unused)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(openers); i++) {
        struct subject subject = {.graph = graph_create()};
        openers[i].open(&subject);
        for (unsigned k = 0; k < G_N_ELEMENTS(kinds); k++) {
            g_test_message("%s: %s", openers[i].driver, kinds[k].name);
            try_once(&subject, &kinds[k], 0);
            try_once(&subject, &kinds[k], ACCESS_ALL);
            for (unsigned bit = 1; bit < ACCESS_ALL; bit <<= 1) {
                try_once(&subject, &kinds[k], bit);
                try_once(&subject, &kinds[k], ACCESS_ALL & ~bit);
            }
        }
        subject_close(&subject);
    }
}

/* --- changes of the graph --- */

/* An operation that requires `node_actions` on `node`, and `target_actions` on `target`. */
static struct operation *begin(struct graph *graph, struct node *node, unsigned node_actions, struct node *target,
                               unsigned target_actions, struct claim_clause clauses[2], struct claim_table *table)
{
    clauses[0] =
        (struct claim_clause){.role = CLAIM_ROLE_NODE, .first = CLAIM_NODE, .require = node_actions, .path = "node"};
    clauses[1] = (struct claim_clause){
        .role = CLAIM_ROLE_NODE, .first = CLAIM_TARGET, .require = target_actions, .path = "target"};
    *table = (struct claim_table){.operation = "test", .clauses = clauses, .count = 2};
    struct operation_config config = {
        .kind = "command", .id = "t", .table = table, .bound = {[CLAIM_NODE] = node, [CLAIM_TARGET] = target}};
    struct operation *operation;
    g_assert_cmpint(operation_begin(graph, &config, &operation, NULL), ==, 0);
    return operation;
}

static int coroutine_fn move_edge(struct graph *graph, const struct operation *operation, struct edge *edge,
                                  struct node *to)
{
    struct drain drain;
    graph_lock(graph);
    graph_drain_begin(graph, &edge->parent, 1, NULL, &drain);
    struct transaction *transaction = graph_begin(graph, "test");
    transaction_by(transaction, operation);
    transaction_move_edge(transaction, edge, to);
    int result = graph_commit(transaction, NULL);
    graph_drain_end(&drain);
    graph_unlock(graph);
    return result;
}

static int coroutine_fn make_stale(struct graph *graph, const struct operation *operation, struct node *node)
{
    graph_lock(graph);
    struct transaction *transaction = graph_begin(graph, "test");
    transaction_by(transaction, operation);
    transaction_mark_stale(transaction, node, "test");
    int result = graph_commit(transaction, NULL);
    graph_unlock(graph);
    return result;
}

static int coroutine_fn rewrite(struct graph *graph, const struct operation *operation, struct node *node)
{
    graph_lock(graph);
    int result = node_change_backing(node, operation, "other", "raw", NULL);
    graph_unlock(graph);
    return result;
}

static void coroutine_fn changes(void *unused)
{
    struct subject subject = {.graph = graph_create()};
    struct claim_clause clauses[2];
    struct claim_table table;
    open_qcow2(&subject);
    struct node *first =
        testing_add(subject.graph, NULL, "{\"driver\":\"null-co\",\"node-name\":\"first\",\"read-only\":true}");
    struct node *second =
        testing_add(subject.graph, NULL, "{\"driver\":\"null-co\",\"node-name\":\"second\",\"read-only\":true}");
    g_assert_cmpint(graph_delete(subject.graph, "node", NULL), ==, 0);
    struct node *node = testing_add(subject.graph, NULL,
                                    "{\"driver\":\"qcow2\",\"node-name\":\"node\",\"backing\":\"first\",\"file\":"
                                    "{\"driver\":\"file\",\"filename\":\"%s\"}}",
                                    subject.path);
    struct backend *user = backend_create(subject.graph, "user");
    g_assert_cmpint(backend_attach(user, node, ACCESS_READ_DATA, NULL), ==, 0);
    for (unsigned bit = 0; bit < ACCESS_ALL; bit = bit ? bit << 1 : 1) {
        bool graph = bit == ACCESS_GRAPH;
        struct operation *operation = begin(subject.graph, node, bit, second, ACCESS_READ_METADATA, clauses, &table);
        refusals = 0;
        g_assert_cmpint(rewrite(subject.graph, operation, node), ==, graph ? 0 : -EPERM);
        g_assert_cmpint(move_edge(subject.graph, operation, node->backing, second), ==, graph ? 0 : -EPERM);
        g_assert_cmpuint(refusals, ==, graph ? 0 : 2);
        g_assert_true(node_backing(node) == (graph ? second : first));
        g_assert_cmpstr(node->header_backing, ==, graph ? "other" : NULL);
        operation_end(operation);
        if (graph) { /* and back, where nothing is claimed on the image that it is to lead to */
            operation = begin(subject.graph, node, ACCESS_GRAPH, first, 0, clauses, &table);
            g_assert_cmpint(move_edge(subject.graph, operation, node->backing, first), ==, -EPERM);
            g_assert_true(node_backing(node) == second);
            operation_end(operation);
        }
    }
    refusals = 0;
    g_assert_cmpint(rewrite(subject.graph, NULL, node), ==, -EPERM);
    g_assert_cmpint(move_edge(subject.graph, NULL, node->backing, first), ==, -EPERM);
    struct operation *operation = begin(subject.graph, node, ACCESS_GRAPH, NULL, 0, clauses, &table);
    g_assert_cmpint(make_stale(subject.graph, operation, second), ==, -EPERM);
    g_assert_null(second->stale);
    g_assert_cmpuint(refusals, ==, 3);
    operation_end(operation);
    backend_destroy(user);
    subject_close(&subject);
}

static void count_refusal(const char *domain, GLogLevelFlags level, const char *message, void *unused)
{
    if (!strstr(message, "without a claim")) {
        g_error("%s", message);
    }
    refusals++;
}

static void run(gconstpointer test)
{
    struct loop *loop;
    if (!testing_have_peer()) {
        return;
    }
    g_assert_cmpint(loop_create(ENGINE_AUTO, &loop, NULL), ==, 0);
    loop_run_coroutine(loop, (void (*)(void *))test, NULL);
    loop_destroy(loop);
    testing_remove_directory();
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    testing_register_drivers();
    driver_register(&driver_null_co);
    g_log_set_always_fatal(G_LOG_FATAL_MASK);
    g_log_set_handler(NULL, G_LOG_LEVEL_CRITICAL, count_refusal, NULL);
    enforce_set_fatal(false);
    g_test_add_data_func("/unclaimed/requests", requests, run);
    g_test_add_data_func("/unclaimed/changes-of-the-graph", changes, run);
    return g_test_run();
}

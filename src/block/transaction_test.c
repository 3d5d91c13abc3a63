/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Transactions and operations on a chain base <- a <- b <- c <- top in memory: what commit and stream claim and adopt,
 * how roles follow the graph, and that a refusal changes nothing.
 */
#include "block/memory_node.h"
#include "loop/sim.h"
#include "schema/claims.h"

/* Begins an operation on up to two nodes. NULL: refused. */
static struct operation *begin(struct graph *graph, const char *id, const struct claim_table *table,
                               unsigned conditions, struct node *top, unsigned second, struct node *other)
{
    struct operation_config config = {.kind = "job", .id = id, .table = table, .conditions = conditions};
    struct operation *operation = NULL;
    auto_error error = NULL;
    config.bound[table == &block_export_add_claims ? CLAIM_NODE : CLAIM_TOP] = top;
    config.bound[second] = other;
    int checked = operation_check(graph, &config, NULL);
    int r = operation_begin(graph, &config, &operation, &error);
    g_assert_cmpint(checked, ==, r);
    g_assert((r == 0) == (error == NULL));
    return operation;
}

static struct operation *commit(struct graph *graph, const char *id, struct node *top, struct node *base)
{
    return begin(graph, id, &block_commit_claims, 0, top, CLAIM_BASE, base);
}

static struct operation *stream(struct graph *graph, const char *id, struct node *top, struct node *bottom)
{
    return begin(graph, id, &block_stream_claims, 0, top, CLAIM_BOTTOM, bottom);
}

static struct operation *export(struct graph *graph, const char *id, struct node *node, bool writable)
{
    return begin(graph, id, &block_export_add_claims, writable ? CLAIM_IF_WRITABLE : 0, node, CLAIM_NODE, node);
}

static char *ledger_text(struct graph *graph)
{
    json_t *json = access_describe(graph->ledger);
    json_t *holder;
    size_t index;
    json_array_foreach(json_object_get(json, "holders"), index, holder)
    {
        json_object_del(holder, "since");
    }
    char *text = json_dumps(json, JSON_SORT_KEYS);
    json_decref(json);
    return text;
}

static void coroutine_fn claims_body(void *argument)
{
    struct graph *graph = graph_create();
    struct node *chain[CHAIN_LENGTH];
    memory_chain(graph, chain);
    struct operation *guest = export(graph, "e0", chain[TOP], true), *job;
    g_assert_cmpuint(operation_granted(guest, chain[TOP]), ==, ACCESS_READ_DATA | ACCESS_WRITE_DATA);
    g_assert(guest);

    /* A commit takes its whole chain, and adopts its edges. */
    job = commit(graph, "j1", chain[C], chain[A]);
    g_assert(job);
    g_assert(chain[C]->backing->adopter == job && chain[B]->backing->adopter == job);
    g_assert(!chain[A]->backing->adopter && !chain[TOP]->backing->adopter);
    g_assert_cmpuint(operation_granted(job, chain[A]), ==, ACCESS_WRITE_DATA | ACCESS_ATTRIBUTES);
    g_assert_cmpuint(operation_granted(job, chain[C]), ==, ACCESS_READ_DATA);
    g_assert_cmpuint(operation_granted(job, chain[BASE]), ==, 0);
    g_assert(!export(graph, "e1", chain[B], false)); /* its view is about to go */
    g_assert(!export(graph, "e1", chain[A], false)); /* half-written */
    g_assert(!commit(graph, "j2", chain[B], chain[BASE]));
    g_assert(!stream(graph, "j2", chain[B], chain[A]));
    operation_end(job);
    g_assert(!chain[C]->backing->adopter);

    /* A sibling overlay on base refuses the commit into it; without it the same is admitted. */
    struct node *sibling = memory_node(graph, "s", chain[BASE]);
    g_assert(!commit(graph, "j1", chain[A], chain[BASE]));
    g_assert_cmpint(graph_delete(graph, "s", NULL), ==, 0);
    (void)sibling;
    job = commit(graph, "j1", chain[A], chain[BASE]);
    g_assert(job);

    /* Disjoint parts of one chain go together. */
    struct operation *other = commit(graph, "j2", chain[C], chain[B]);
    g_assert(other);
    operation_end(other);
    other = stream(graph, "j2", chain[C], chain[B]);
    g_assert(other);
    operation_end(other);
    operation_end(job);
    operation_end(guest);
    memory_end(graph);
}

static void test_claims(void)
{
    in_coroutine(claims_body);
}

/* What a commit of `top` into `base` does at its end, in one step. */
static int coroutine_fn finish_commit(struct graph *graph, struct operation *job, struct node *top, struct node *base,
                                      struct error **err)
{
    struct node *touched[] = {top, base};
    struct drain drain;
    graph_lock(graph);
    graph_drain_begin(graph, touched, 2, NULL, &drain);
    struct transaction *transaction = graph_begin(graph, "block-commit");
    transaction_by(transaction, job);
    transaction_move_parents(transaction, top, base, NULL);
    for (struct node *node = top; node != base; node = node_backing(node)) {
        transaction_mark_stale(transaction, node, "its data were committed");
    }
    transaction_end_operation(transaction, job);
    int r = graph_commit(transaction, err);
    graph_drain_end(&drain);
    graph_unlock(graph);
    return r;
}

/* stream b..c runs beside commit a>base (a is its bottom's child): the commit's end makes b lean on base. */
static void coroutine_fn bottom_body(void *argument)
{
    struct graph *graph = graph_create();
    struct node *chain[CHAIN_LENGTH];
    memory_chain(graph, chain);
    struct operation *job = commit(graph, "j1", chain[A], chain[BASE]);
    struct operation *streaming = stream(graph, "j2", chain[C], chain[B]);
    g_assert(job && streaming);
    g_assert_cmpint(finish_commit(graph, job, chain[A], chain[BASE], NULL), ==, 0);
    operation_end(job);
    g_assert(node_backing(chain[B]) == chain[BASE]);
    g_assert(streaming->bound[CLAIM_BOTTOM] == chain[B]);
    operation_end(streaming);

    /* A bottom that goes out of the chain hands its role to the overlay that was moved. */
    streaming = stream(graph, "j3", chain[TOP], chain[B]);
    g_assert(streaming);
    struct operation *surgery = memory_surgery(graph, chain[C], chain[BASE], NULL);
    graph_lock(graph);
    struct transaction *transaction = graph_begin(graph, "test");
    transaction_by(transaction, surgery);
    transaction_move_edge(transaction, chain[C]->backing, chain[BASE]);
    g_assert_cmpint(graph_commit(transaction, NULL), ==, 0);
    graph_unlock(graph);
    operation_end(surgery);
    g_assert(streaming->bound[CLAIM_BOTTOM] == chain[C]);
    g_autofree char *text = ledger_text(graph);
    g_assert(strstr(text, "below(bottom)"));
    operation_end(streaming);

    /* A stale node is good for nothing any more. */
    g_assert(!export(graph, "e1", chain[A], false));
    memory_end(graph);
}

static void test_bottom(void)
{
    in_coroutine(bottom_body);
}

/* A backend that is moved takes its export's claims with it; the pivot of an active commit. */
static void coroutine_fn pivot_body(void *argument)
{
    struct graph *graph = graph_create();
    struct node *chain[CHAIN_LENGTH];
    memory_chain(graph, chain);
    struct operation *guest = export(graph, "e0", chain[TOP], true);
    struct backend *backend = memory_backend(graph, "export e0", chain[TOP], operation_granted(guest, chain[TOP]));
    backend_follow(backend, guest, CLAIM_NODE);
    struct operation *job = begin(graph, "j1", &block_commit_claims, CLAIM_IF_ACTIVE, chain[TOP], CLAIM_BASE, chain[A]);
    g_assert(job);
    g_autofree char *before = ledger_text(graph);

    /* Without the end of the commit in the same step, the export would write to a node that it denies writes on. */
    graph_lock(graph);
    struct drain drain;
    graph_drain_begin(graph, &chain[TOP], 1, NULL, &drain);
    struct transaction *transaction = graph_begin(graph, "test");
    transaction_by(transaction, job);
    transaction_move_parents(transaction, chain[TOP], chain[A], NULL);
    transaction_mark_stale(transaction, chain[TOP], "test");
    struct error *error = NULL;
    g_assert_cmpint(graph_commit(transaction, &error), ==, -EBUSY);
    error_free(error);
    graph_drain_end(&drain);
    graph_unlock(graph);
    g_autofree char *refused = ledger_text(graph);
    g_assert_cmpstr(before, ==, refused);
    g_assert(backend_node(backend) == chain[TOP] && guest->bound[CLAIM_NODE] == chain[TOP] && !chain[TOP]->stale);

    g_assert_cmpint(finish_commit(graph, job, chain[TOP], chain[A], NULL), ==, 0);
    operation_end(job);
    g_assert(backend_node(backend) == chain[A] && guest->bound[CLAIM_NODE] == chain[A]);
    g_assert_cmpuint(operation_granted(guest, chain[A]), ==, ACCESS_READ_DATA | ACCESS_WRITE_DATA);
    unsigned require, deny;
    access_node_masks(graph->ledger, "top", &require, &deny);
    g_assert_cmpuint(require, ==, 0);
    backend_destroy(backend);
    operation_end(guest);
    memory_end(graph);
}

static void test_pivot(void)
{
    in_coroutine(pivot_body);
}

/* A commit that may change the edges of its chain too: nobody else may, while it runs. */
static const struct claim_table *with_graph(const struct claim_table *table)
{
    static struct claim_clause clauses[16];
    static struct claim_table copy;
    copy = *table;
    memcpy(clauses, table->clauses, table->count * sizeof(clauses[0]));
    for (unsigned i = 0; i < table->count; i++) {
        clauses[i].require |= clauses[i].role == CLAIM_ROLE_NODE && clauses[i].first == CLAIM_TOP ? ACCESS_GRAPH : 0;
    }
    copy.clauses = clauses;
    return &copy;
}

/* Adopted edges: those that come into the chain are adopted, those that leave it are let go. */
static void coroutine_fn adoption_body(void *argument)
{
    struct graph *graph = graph_create();
    struct node *chain[CHAIN_LENGTH], *filter;
    memory_chain(graph, chain);
    graph->substitute = with_graph;
    struct operation *job = commit(graph, "j1", chain[C], chain[A]);
    g_assert(job);
    g_assert_cmpint(graph_create_node(graph, &pass_driver, NULL, "backup j9", &filter, NULL), ==, 0);
    g_assert_cmpint(graph_insert_filter(graph, job, filter, chain[B], NULL), ==, 0);
    g_assert(chain[C]->backing->child == filter && chain[C]->backing->adopter == job);
    g_assert(filter->filtered->adopter == job);
    g_assert_cmpuint(atomic_load(&filter->size), ==, MEMORY_SIZE);
    char byte = 0;
    memory_of(chain[BASE])->data[5] = 42;
    memory_of(chain[BASE])->allocated[0] = true;
    struct backend *backend = memory_backend(graph, "test", chain[B], ACCESS_READ_DATA);
    g_assert(backend_node(backend) == filter);
    g_assert_cmpint(edge_read_memory(backend_edge(backend), 5, &byte, 1), ==, 0);
    g_assert_cmpint(byte, ==, 42);
    g_assert_cmpint(graph_remove_filter(graph, job, filter, NULL), ==, 0);
    g_assert(backend_node(backend) == chain[B] && chain[C]->backing->child == chain[B]);
    g_assert(chain[C]->backing->adopter == job);
    node_release(filter);
    backend_destroy(backend);
    operation_end(job);
    memory_end(graph);
}

static void test_adoption(void)
{
    in_coroutine(adoption_body);
}

static void coroutine_fn shape_body(void *argument)
{
    struct graph *graph = graph_create();
    struct node *chain[CHAIN_LENGTH];
    struct edge *edge = NULL;
    memory_chain(graph, chain);
    struct node *extra = memory_node(graph, "extra", NULL);

    /* Attach and detach, one after the other and both in one step. */
    graph_lock(graph);
    struct transaction *transaction = graph_begin(graph, "test");
    transaction_attach(transaction, extra, EDGE_BACKING, chain[C], &edge);
    g_assert_cmpint(graph_commit(transaction, NULL), ==, 0);
    g_assert(extra->backing == edge && edge->child == chain[C] && edge->granted == ACCESS_READ_DATA);
    g_assert_cmpuint(chain[C]->references, ==, 3);
    transaction = graph_begin(graph, "test");
    transaction_detach(transaction, extra->backing);
    transaction_attach(transaction, extra, EDGE_BACKING, chain[B], &edge);
    g_assert_cmpint(graph_commit(transaction, NULL), ==, 0);
    g_assert(node_backing(extra) == chain[B]);
    g_assert_cmpuint(chain[C]->references, ==, 2);

    /* Refused by a guest that writes to `c`: neither the edge nor a reference is left behind. */
    transaction = graph_begin(graph, "test");
    transaction_detach(transaction, chain[TOP]->backing);
    g_assert_cmpint(graph_commit(transaction, NULL), ==, 0);
    graph_unlock(graph);
    struct operation *guest = export(graph, "e0", chain[C], true);
    g_autofree char *before = ledger_text(graph);
    graph_lock(graph);
    transaction = graph_begin(graph, "test");
    transaction_move_edge(transaction, extra->backing, chain[BASE]);
    transaction_attach(transaction, chain[TOP], EDGE_BACKING, chain[C], NULL);
    struct error *error = NULL;
    g_assert_cmpint(graph_commit(transaction, &error), ==, -EBUSY);
    g_assert(strstr(error->message, "test"));
    error_free(error);
    graph_unlock(graph);
    g_autofree char *after = ledger_text(graph);
    g_assert_cmpstr(before, ==, after);
    g_assert(!chain[TOP]->backing && node_backing(extra) == chain[B]);
    operation_end(guest);
    memory_end(graph);
}

static void test_shape(void)
{
    in_coroutine(shape_body);
}

/* A stale image lets go of what it leans on; its file is its own until it is closed, which writes metadata. */
static void coroutine_fn stale_file_body(void *argument)
{
    struct graph *graph = graph_create();
    struct node *disk = memory_node(graph, "disk", NULL), *below = memory_node(graph, "below", NULL);
    struct node *image = memory_node(graph, "image", below), *other = memory_node(graph, "other", NULL);
    g_assert_cmpint(edge_attach(image, EDGE_FILE, disk, NULL, NULL), ==, 0);
    struct operation *surgery = memory_surgery(graph, image, NULL, NULL);
    graph_lock(graph);
    struct transaction *transaction = graph_begin(graph, "test");
    transaction_by(transaction, surgery);
    transaction_mark_stale(transaction, image, "test");
    g_assert_cmpint(graph_commit(transaction, NULL), ==, 0);
    graph_unlock(graph);
    operation_end(surgery);
    struct operation *guest = export(graph, "e0", below, true);
    g_assert(guest);
    operation_end(guest);
    g_assert_cmpint(edge_attach(other, EDGE_FILE, disk, NULL, NULL), ==, -EBUSY);
    g_assert_cmpint(graph_delete(graph, "image", NULL), ==, 0);
    g_assert_cmpint(edge_attach(other, EDGE_FILE, disk, NULL, NULL), ==, 0);
    memory_end(graph);
}

static void test_stale_file(void)
{
    in_coroutine(stale_file_body);
}

static void coroutine_fn users_body(void *argument)
{
    struct graph *graph = graph_create();
    struct node *chain[CHAIN_LENGTH];
    auto_error error = NULL;
    memory_chain(graph, chain);
    struct backend *backend = memory_backend(graph, "export e0", chain[C], ACCESS_READ_DATA);
    g_assert_cmpint(graph_delete(graph, "c", &error), ==, -EBUSY);
    g_assert_cmpstr(error->message, ==, "Node 'c' is in use by node 'top' (backing), export e0");
    json_t *picture = graph_describe(graph), *user = json_array_get(json_object_get(picture, "users"), 0);
    g_assert_cmpstr(json_string_value(json_object_get(user, "owner")), ==, "export e0");
    g_assert_cmpstr(json_string_value(json_object_get(user, "node")), ==, "c");
    g_assert_cmpuint(json_array_size(json_object_get(picture, "edges")), ==, CHAIN_LENGTH - 1);
    json_decref(picture);
    backend_destroy(backend);
    g_assert_cmpint(graph_delete(graph, "top", NULL), ==, 0);
    g_assert_cmpint(graph_delete(graph, "c", NULL), ==, 0);
    g_assert_cmpint(graph_delete(graph, "c", NULL), ==, -ENOENT);
    memory_end(graph);
}

static void test_users(void)
{
    in_coroutine(users_body);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    sim_create_if_asked();
    g_test_add_func("/operation/claims-of-commit-and-stream", test_claims);
    g_test_add_func("/operation/bottom-is-a-role", test_bottom);
    g_test_add_func("/operation/claims-follow-the-backend", test_pivot);
    g_test_add_func("/operation/adoption-follows-the-chain", test_adoption);
    g_test_add_func("/transaction/shape-and-refusal", test_shape);
    g_test_add_func("/transaction/files-of-stale-images", test_stale_file);
    g_test_add_func("/graph/users-of-a-node", test_users);
    return g_test_run();
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Claims that are withheld. Each operation is run with one bit of what its table requires taken out, for every bit of
 * every table: it must fail where requests and changes of the graph are tested, with a line in the log, and must have
 * harmed nobody: every image that it does not write into as claimed shows what it showed, leads where it led, is called
 * what it was called. With all its claims the same run succeeds, and nothing is logged.
 *
 * A claim that is added to the schema is tried by itself; if no run here notices that it is missing, the test fails.
 */
#include "base/size.h"
#include "block/enforce.h"
#include "job/backup.h"
#include "job/chain_testing.h"
#include "job/change_backing.h"
#include "job/commit.h"
#include "job/internal_snapshot.h"
#include "job/mirror.h"
#include "job/resize.h"
#include "job/snapshot.h"
#include "job/stream.h"
#include "schema/claims.h"
#include <errno.h>
#include <string.h>

#define SIZE (12 * TEST_CLUSTER - 512)
#define COUNT 6

enum { BASE, A, B, C, D, E };

static struct loop *control_loop;
static unsigned refusals; /* that were logged */

/* --- runs: 0 if the operation did all that it was asked for --- */

static int coroutine_fn end_of_job(struct test_bench *bench)
{
    bench_await(bench, "j", JOB_STATUS_NULL);
    bool good = g_ptr_array_find_with_equal_func(bench->events, "BLOCK_JOB_COMPLETED j complete", g_str_equal, NULL);
    return good ? 0 : -EPERM;
}

static int coroutine_fn run_commit(struct test_bench *bench)
{
    struct block_commit_args args = {.job_id = "j", .device = "e", .top_node = "c", .base_node = "a"};
    int result = commit_start(bench->jobs, &args, NULL);
    return result < 0 ? result : end_of_job(bench);
}

/* Into an image that is longer, which those who lean on a will find. */
static int coroutine_fn run_commit_into_longer(struct test_bench *bench)
{
    struct block_commit_args args = {.job_id = "j", .device = "e", .top_node = "a", .base_node = "base"};
    bench_resize(bench->nodes[BASE], SIZE);
    int result = commit_start(bench->jobs, &args, NULL);
    return result < 0 ? result : end_of_job(bench);
}

static int coroutine_fn run_active_commit(struct test_bench *bench)
{
    struct block_commit_args args = {.job_id = "j", .device = "e", .base_node = "a"};
    int result = commit_start(bench->jobs, &args, NULL);
    if (result < 0) {
        return result;
    }
    bench_await(bench, "j", JOB_STATUS_READY);
    struct job *job = jobs_find(bench->jobs, "j");
    if (job) {
        g_assert_cmpint(job_complete(job, NULL), ==, 0);
    }
    return end_of_job(bench);
}

static int coroutine_fn run_stream(struct test_bench *bench)
{
    struct block_stream_args args = {.job_id = "j", .device = "e", .base_node = "b"};
    int result = stream_start(bench->jobs, &args, NULL);
    return result < 0 ? result : end_of_job(bench);
}

/* Of c into an image of its own, in c's place, over what c leans on. */
static int coroutine_fn run_mirror(struct test_bench *bench)
{
    struct blockdev_mirror args = {
        .job_id = "j", .device = "c", .target = "f", .replaces = "c", .sync = MIRROR_SYNC_MODE_TOP};
    struct action action;
    bench_add(bench, atomic_load(&bench->nodes[C]->size));
    mirror_action(&action, bench->jobs, &args, NULL);
    int result = actions_run(bench->graph, &action, 1, NULL);
    if (result < 0) {
        return result;
    }
    bench_await(bench, "j", JOB_STATUS_READY);
    struct job *job = jobs_find(bench->jobs, "j");
    if (job) {
        g_assert_cmpint(job_complete(job, NULL), ==, 0);
    }
    return end_of_job(bench);
}

static int coroutine_fn back_up(struct test_bench *bench, unsigned node, bool discard)
{
    struct blockdev_backup_options args = {.job_id = "j",
                                           .device = bench->nodes[node]->name,
                                           .discard_source = discard,
                                           .target = "f",
                                           .sync = MIRROR_SYNC_MODE_FULL,
                                           .has_auto_finalize = true,
                                           .auto_finalize = true,
                                           .has_auto_dismiss = true,
                                           .auto_dismiss = true};
    struct action action;
    bench_add(bench, atomic_load(&bench->nodes[node]->size));
    blockdev_backup_action(&action, bench->jobs, NULL, &args);
    int result = actions_run(bench->graph, &action, 1, NULL);
    return result < 0 ? result : end_of_job(bench);
}

/* Into an image of its own. */
static int coroutine_fn run_backup(struct test_bench *bench)
{
    return back_up(bench, C, false);
}

/* What has been copied is discarded. */
static int coroutine_fn run_moving_backup(struct test_bench *bench)
{
    return back_up(bench, E, true);
}

static int coroutine_fn run_grow(struct test_bench *bench)
{
    struct block_resize_args args = {.node_name = "c", .size = SIZE + 512};
    return resize_node(bench->graph, &args, NULL);
}

static int coroutine_fn run_shrink(struct test_bench *bench)
{
    struct block_resize_args args = {.node_name = "e", .size = SIZE - 512};
    return resize_node(bench->graph, &args, NULL);
}

static int coroutine_fn run_backing_name(struct test_bench *bench)
{
    struct change_backing_file_args args = {.device = "e", .image_node_name = "c", .backing_file = (char *)"x"};
    return change_backing_file(bench->graph, &args, NULL);
}

/* Over an image in the middle, so that headers are written on both sides of the overlay. */
static int coroutine_fn run_snapshot(struct test_bench *bench)
{
    struct node *overlay = bench_add_overlay(bench);
    bench_resize(overlay, SIZE);
    struct blockdev_snapshot args = {.node = (char *)"c", .overlay = overlay->name};
    struct action action;
    snapshot_action(&action, &args);
    int result = actions_run(bench->graph, &action, 1, NULL);
    if (result < 0) {
        g_assert_null(overlay->backing);
        g_assert_null(overlay->header_backing);
    }
    return result;
}

static int coroutine_fn run_internal_snapshot(struct test_bench *bench)
{
    struct blockdev_snapshot_internal_sync args = {.device = (char *)"c", .name = (char *)"s"};
    struct action action;
    internal_snapshot_action(&action, &args);
    int result = actions_run(bench->graph, &action, 1, NULL);
    g_assert_cmpuint(bench_snapshots(bench->nodes[C]), ==, result == 0);
    return result;
}

/* As src/export does it. */
static int coroutine_fn run_export(struct test_bench *bench)
{
    struct operation_config config = {.kind = "export",
                                      .id = "e0",
                                      .table = &block_export_add_claims,
                                      .bound = {[CLAIM_NODE] = bench->nodes[E]},
                                      .conditions = CLAIM_IF_WRITABLE};
    struct operation *operation;
    g_autofree unsigned char *data = g_malloc(TEST_CLUSTER);
    struct iovec iov = {data, TEST_CLUSTER};
    int result = operation_begin(bench->graph, &config, &operation, NULL);
    g_assert_cmpint(result, ==, 0);
    struct backend *backend = backend_create(bench->graph, "export e0");
    result = backend_attach(backend, bench->nodes[E], operation_granted(operation, bench->nodes[E]), NULL);
    bench_view(bench->nodes[E], data, TEST_CLUSTER);
    result = result == 0 ? backend_read(backend, 0, TEST_CLUSTER, buffers_one(&iov), 0) : result;
    result = result == 0 ? backend_write(backend, 0, TEST_CLUSTER, buffers_one(&iov), 0) : result;
    backend_destroy(backend);
    operation_end(operation);
    return result;
}

static const struct run {
    const char *name;
    const struct claim_table *table;
    unsigned conditions;
    int coroutine_fn (*run)(struct test_bench *bench);
    unsigned keeps; /* nodes whose view must stay, a bit each */
} runs[] = {
    {"commit", &block_commit_claims, 0, run_commit, 1 << BASE | 1 << C | 1 << D | 1 << E},
    {"commit into a longer image", &block_commit_claims, CLAIM_IF_LONGER, run_commit_into_longer,
     (1 << COUNT) - 1 - (1 << BASE)},
    {"active commit", &block_commit_claims, CLAIM_IF_ACTIVE, run_active_commit, 1 << BASE | 1 << E},
    {"stream", &block_stream_claims, 0, run_stream, (1 << COUNT) - 1},
    {"mirror", &blockdev_mirror_claims, CLAIM_IF_REPLACE | CLAIM_IF_SHALLOW, run_mirror, (1 << COUNT) - 1},
    {"backup", &blockdev_backup_claims, 0, run_backup, (1 << COUNT) - 1},
    {"backup that discards", &blockdev_backup_claims, CLAIM_IF_DISCARD, run_moving_backup, (1 << E) - 1},
    {"grow", &block_resize_claims, 0, run_grow, (1 << COUNT) - 1},
    {"shrink", &block_resize_claims, CLAIM_IF_SHRINK, run_shrink, (1 << COUNT) - 1},
    {"backing name", &change_backing_file_claims, 0, run_backing_name, (1 << COUNT) - 1},
    {"snapshot", &blockdev_snapshot_claims, 0, run_snapshot, (1 << COUNT) - 1},
    {"snapshot by a new image", &blockdev_snapshot_sync_claims, 0, run_snapshot, (1 << COUNT) - 1},
    {"snapshot inside", &blockdev_snapshot_internal_sync_claims, 0, run_internal_snapshot, (1 << COUNT) - 1},
    {"export", &block_export_add_claims, CLAIM_IF_WRITABLE, run_export, (1 << COUNT) - 1},
};

/* --- withholding --- */

static struct {
    const struct claim_table *table; /* NULL: nothing is withheld */
    unsigned clause, bit;
} withheld;

/* What is made new for a snapshot goes the same way from there on. */
static const struct claim_table *withhold(const struct claim_table *table)
{
    static struct claim_clause clauses[32];
    static struct claim_table copy;
    if (table == &blockdev_snapshot_claims && withheld.table == &blockdev_snapshot_sync_claims) {
        table = &blockdev_snapshot_sync_claims;
    }
    if (table != withheld.table) {
        return table;
    }
    g_assert_cmpuint(table->count, <=, G_N_ELEMENTS(clauses));
    copy = *table;
    memcpy(clauses, table->clauses, table->count * sizeof(clauses[0]));
    clauses[withheld.clause].require &= ~withheld.bit;
    copy.clauses = clauses;
    return &copy;
}

static void count_refusal(const char *domain, GLogLevelFlags level, const char *message, void *unused)
{
    if (!strstr(message, "without a claim")) {
        g_error("%s", message);
    }
    refusals++;
}

/* --- what must stay --- */

struct state {
    unsigned char *view;
    uint64_t size;
    struct node *backing;
    char *name;
};

static void state_take(struct test_bench *bench, struct state states[COUNT])
{
    for (unsigned i = 0; i < COUNT; i++) {
        struct node *node = bench->nodes[i];
        states[i] = (struct state){.size = atomic_load(&node->size), .backing = node_backing(node)};
        states[i].view = g_malloc(states[i].size);
        bench_view(node, states[i].view, states[i].size);
        states[i].name = g_strdup(bench_disk_backing(node));
    }
}

static void state_check(struct test_bench *bench, const struct run *run, const struct state states[COUNT])
{
    for (unsigned i = 0; i < COUNT; i++) {
        struct node *node = bench->nodes[i];
        g_assert_true(node_backing(node) == states[i].backing);
        g_assert_cmpstr(bench_disk_backing(node), ==, states[i].name);
        g_assert_cmpstr(node->header_backing, ==, states[i].name);
        g_assert_null(node->stale);
        if (run->keeps & 1u << i) {
            g_autofree unsigned char *view = g_malloc(states[i].size);
            g_assert_cmpuint(atomic_load(&node->size), ==, states[i].size);
            bench_view(node, view, states[i].size);
            g_assert_cmpint(memcmp(view, states[i].view, states[i].size), ==, 0);
        }
    }
    g_assert_true(list_is_empty(&bench->graph->operations));
}

static void state_clear(struct state states[COUNT])
{
    for (unsigned i = 0; i < COUNT; i++) {
        g_free(states[i].view);
        g_free(states[i].name);
    }
}

static void coroutine_fn try(const struct run *run)
{
    struct test_bench bench;
    struct state states[COUNT];
    bench_open(&bench, COUNT, SIZE);
    bench_resize(bench.nodes[BASE], SIZE - 3 * TEST_CLUSTER);
    bench_resize(bench.nodes[A], SIZE - 3 * TEST_CLUSTER); /* which a commit makes longer */
    bench_fill(bench.nodes[C], 0, 2 * TEST_CLUSTER, 0x44);
    bench_fill(bench.nodes[D], 2 * TEST_CLUSTER, TEST_CLUSTER, 0x45);
    bench.graph->substitute = withhold;
    state_take(&bench, states);
    refusals = 0;
    int result = run->run(&bench);
    if (withheld.table) {
        /* To discard is a hint: it does not happen, and the job goes on. */
        bool is_hint = withheld.bit == ACCESS_WRITE_DATA && withheld.table->clauses[withheld.clause].condition;
        g_assert_true(result < 0 || (run->run == run_moving_backup && is_hint));
        g_assert_cmpuint(refusals, >, 0);
        state_check(&bench, run, states);
    } else {
        g_assert_cmpint(result, ==, 0);
        g_assert_cmpuint(refusals, ==, 0);
    }
    state_clear(states);
    bench_close(&bench);
}

/* --- all of them --- */

static bool is_in_effect(const struct claim_clause *clause, unsigned conditions)
{
    return (conditions & clause->condition) == clause->condition && !(conditions & clause->unless);
}

/* Nodes of the clause's role are missing in the run, or other runs have tried it. */
static bool is_without(const struct run *run, const struct claim_clause *clause)
{
    return (run->run == run_active_commit && clause->role == CLAIM_ROLE_OVERLAYS) ||
           (run->run == run_commit_into_longer && !(clause->condition & CLAIM_IF_LONGER));
}

/* Operations that do not run here. */
static bool is_elsewhere(const struct claim_table *table)
{
    static const struct claim_table *const elsewhere[] = {
        &drive_backup_claims,     /* the same action as blockdev-backup's, by the same claims, */
        &drive_mirror_claims,     /* and as blockdev-mirror's */
        &blockdev_create_claims,  /* images in memory are not made by it, */
        &x_blockdev_amend_claims, /* have no keys, */
        &blockdev_reopen_claims,  /* and no options */
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(elsewhere); i++) {
        if (table == elsewhere[i]) {
            return true;
        }
    }
    return false;
}

static void coroutine_fn every_claim_is_missed(void *unused)
{
    g_autoptr(GHashTable) tried = g_hash_table_new(NULL, NULL); /* of clauses: bits that were tried */
    for (unsigned i = 0; i < G_N_ELEMENTS(runs); i++) {
        const struct run *run = &runs[i];
        withheld.table = NULL;
        try(run);
        for (unsigned clause = 0; clause < run->table->count; clause++) {
            const struct claim_clause *claims = &run->table->clauses[clause];
            if (!is_in_effect(claims, run->conditions) || is_without(run, claims)) {
                continue;
            }
            for (unsigned bit = 1; bit < ACCESS_ALL; bit <<= 1) {
                if (claims->require & bit) {
                    g_test_message("%s: %s does not require %s", run->name, claims->path, access_action_name(bit));
                    withheld.table = run->table;
                    withheld.clause = clause;
                    withheld.bit = bit;
                    try(run);
                    unsigned before = GPOINTER_TO_UINT(g_hash_table_lookup(tried, claims));
                    g_hash_table_insert(tried, (void *)claims, GUINT_TO_POINTER(before | bit));
                }
            }
        }
    }
    for (unsigned i = 0; i < claim_table_count; i++) {
        if (is_elsewhere(claim_tables[i])) {
            continue;
        }
        for (unsigned clause = 0; clause < claim_tables[i]->count; clause++) {
            const struct claim_clause *claims = &claim_tables[i]->clauses[clause];
            if (GPOINTER_TO_UINT(g_hash_table_lookup(tried, claims)) != claims->require) {
                g_error("No run here misses a claim of %s on %s", claim_tables[i]->operation, claims->path);
            }
        }
    }
}

static void run_test(gconstpointer test)
{
    loop_run_coroutine(control_loop, (void (*)(void *))test, NULL);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_log_set_always_fatal(G_LOG_FATAL_MASK);
    g_log_set_handler(NULL, G_LOG_LEVEL_CRITICAL, count_refusal, NULL);
    enforce_set_fatal(false);
    g_assert_cmpint(loop_create(ENGINE_AUTO, &control_loop, NULL), ==, 0);
    g_test_add_data_func("/withheld/every-claim-is-missed", every_claim_is_missed, run_test);
    int result = g_test_run();
    loop_destroy(control_loop);
    return result;
}

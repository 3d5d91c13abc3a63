/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Jobs on chains in memory: the events in the peer's order, the verbs, errors, shutdown. */
#include "base/size.h"
#include "job/chain_testing.h"
#include "job/commit.h"
#include "job/stream.h"
#include "loop/sim.h"
#include "schema/claims.h"
#include <errno.h>

#define SIZE (40 * TEST_CLUSTER - 512)

static struct loop *control_loop;

static void start_commit(struct test_bench *bench, struct block_commit_args args)
{
    auto_error error = NULL;
    args.job_id = args.job_id ? args.job_id : "j";
    if (commit_start(bench->jobs, &args, &error) < 0) {
        g_error("%s", error->message);
    }
}

static void start_stream(struct test_bench *bench, struct block_stream_args args)
{
    auto_error error = NULL;
    args.job_id = args.job_id ? args.job_id : "j";
    if (stream_start(bench->jobs, &args, &error) < 0) {
        g_error("%s", error->message);
    }
}

static void expect_events(struct test_bench *bench, const char *expected)
{
    g_autofree char *got = bench_events(bench);
    g_assert_cmpstr(got, ==, expected);
}

static void error_says(int result, struct error *error, const char *text)
{
    g_assert_cmpint(result, <, 0);
    g_assert_nonnull(error);
    if (!strstr(error->message, text)) {
        g_error("'%s' does not say '%s'", error->message, text);
    }
    error_free(error);
}

/* `call` uses `&error`. */
#define expect_error(call, text)           \
    do {                                   \
        struct error *error = NULL;        \
        int result = (call);               \
        error_says(result, error, (text)); \
    } while (0)

static struct job *job_of(struct test_bench *bench)
{
    struct job *job = jobs_find(bench->jobs, "j");
    g_assert_nonnull(job);
    return job;
}

#define S(status) "JOB_STATUS_CHANGE j " status
#define STARTED S("created") "; " S("running")
#define FINISHED S("waiting") "; " S("pending") "; BLOCK_JOB_COMPLETED j complete; " S("concluded") "; " S("null")
#define CANCELLED(state) S("aborting") "; BLOCK_JOB_CANCELLED j " state "; " S("concluded") "; " S("null")

/* Each test body runs in a coroutine. */
static void run(gconstpointer body)
{
    loop_run_coroutine(control_loop, (void (*)(void *))body, NULL);
}

static void middle_commit(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 4, SIZE);
    g_autofree unsigned char *before = g_malloc(SIZE), *after = g_malloc(SIZE);
    bench_view(bench.nodes[3], before, SIZE);
    start_commit(&bench, (struct block_commit_args){.device = "c", .top_node = "b", .base_node = "base"});
    bench_await(&bench, "j", JOB_STATUS_NULL);
    expect_events(&bench, STARTED "; " FINISHED);
    bench_view(bench.nodes[3], after, SIZE);
    g_assert_cmpmem(before, SIZE, after, SIZE);
    g_assert_true(node_backing(bench.nodes[3]) == bench.nodes[0]);
    g_assert_cmpstr(bench_disk_backing(bench.nodes[3]), ==, "base.img");
    g_assert_nonnull(bench.nodes[2]->stale);
    g_assert_nonnull(bench.nodes[1]->stale);
    g_assert_false(bench.nodes[0]->writable);
    bench_close(&bench);
}

static void stream_to_base(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 4, SIZE);
    g_autofree unsigned char *before = g_malloc(SIZE), *after = g_malloc(SIZE);
    bench_view(bench.nodes[3], before, SIZE);
    start_stream(&bench, (struct block_stream_args){.device = "c", .base_node = "a"});
    bench_await(&bench, "j", JOB_STATUS_NULL);
    expect_events(&bench, STARTED "; " FINISHED);
    bench_view(bench.nodes[3], after, SIZE);
    g_assert_cmpmem(before, SIZE, after, SIZE);
    g_assert_true(node_backing(bench.nodes[3]) == bench.nodes[1]);
    g_assert_cmpstr(bench_disk_backing(bench.nodes[3]), ==, "a.img");
    g_assert_null(bench.nodes[2]->stale);
    start_stream(&bench, (struct block_stream_args){.device = "c"});
    bench_await(&bench, "j", JOB_STATUS_NULL);
    bench_view(bench.nodes[3], after, SIZE);
    g_assert_cmpmem(before, SIZE, after, SIZE);
    g_assert_null(node_backing(bench.nodes[3]));
    g_assert_null(bench_disk_backing(bench.nodes[3]));
    g_autofree char *both = bench_events(&bench);
    start_stream(&bench, (struct block_stream_args){.device = "base"});
    bench_await(&bench, "j", JOB_STATUS_NULL);
    expect_events(&bench, STARTED "; " FINISHED);
    bench_close(&bench);
}

static void active_commit(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 3, SIZE);
    struct guest *guest = guest_start(&bench, bench.nodes[2], control_loop, false);
    start_commit(&bench, (struct block_commit_args){.device = "b"});
    bench_await(&bench, "j", JOB_STATUS_READY);
    expect_events(&bench, STARTED "; " S("ready") "; BLOCK_JOB_READY j");
    bench_sleep_ms(20);
    g_assert_cmpint(job_complete(job_of(&bench), NULL), ==, 0);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    expect_events(&bench, FINISHED);
    g_assert_true(backend_node(guest->backend) == bench.nodes[0]);
    g_assert_true(bench.nodes[0]->writable);
    bench_sleep_ms(10);
    guest_finish(guest);
    bench_close(&bench);
}

/* How an active commit that is ready ends without a pivot. */
static void end_ready(bool force, bool job_verb, const char *events)
{
    struct test_bench bench;
    bench_open(&bench, 3, SIZE);
    struct guest *guest = guest_start(&bench, bench.nodes[2], control_loop, false);
    start_commit(&bench, (struct block_commit_args){.device = "b", .filter_node_name = "filter"});
    g_assert_nonnull(graph_find(bench.graph, "filter"));
    bench_await(&bench, "j", JOB_STATUS_READY);
    g_autofree char *begun = bench_events(&bench);
    g_assert_cmpint(job_cancel(job_of(&bench), force || job_verb, NULL), ==, 0);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    expect_events(&bench, events);
    g_assert_null(graph_find(bench.graph, "filter"));
    g_assert_true(backend_node(guest->backend) == bench.nodes[2]);
    g_assert_null(bench.nodes[2]->stale);
    g_assert_false(bench.nodes[0]->writable);
    guest_finish(guest);
    bench_close(&bench);
}

static void active_cancel_soft(void *unused)
{
    end_ready(false, false, FINISHED);
}

static void active_cancel_forced(void *unused)
{
    end_ready(true, false, CANCELLED("partial"));
}

static void manual_steps(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 3, SIZE);
    start_commit(&bench,
                 (struct block_commit_args){.device = "b", .has_auto_finalize = true, .has_auto_dismiss = true});
    bench_await(&bench, "j", JOB_STATUS_READY);
    struct job *job = job_of(&bench);
    g_assert_cmpint(job_pause(job, NULL), ==, 0);
    expect_error(job_pause(job, &error), "already paused");
    bench_await(&bench, "j", JOB_STATUS_STANDBY);
    g_assert_cmpint(job_complete(job, NULL), ==, 0);
    bench_sleep_ms(20);
    g_assert_cmpint(job_resume(job, NULL), ==, 0);
    bench_await(&bench, "j", JOB_STATUS_PENDING);
    expect_events(&bench, STARTED "; " S("ready") "; BLOCK_JOB_READY j; " S("standby") "; " S("ready") "; " S(
                              "waiting") "; " S("pending") "; BLOCK_JOB_PENDING j");
    expect_error(job_pause(job, &error), "Job 'j' in state 'pending' cannot accept command verb 'pause'");
    g_assert_cmpint(job_finalize(job, NULL), ==, 0);
    expect_events(&bench, "BLOCK_JOB_COMPLETED j complete; " S("concluded"));
    expect_error(job_cancel(job, true, &error), "Job 'j' in state 'concluded' cannot accept command verb 'cancel'");
    g_assert_cmpint(job_dismiss(job, NULL), ==, 0);
    expect_events(&bench, S("null"));
    bench_close(&bench);
}

static void cancel_while_pending(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 3, SIZE);
    start_stream(&bench, (struct block_stream_args){.device = "b", .base_node = "base", .has_auto_finalize = true});
    bench_await(&bench, "j", JOB_STATUS_PENDING);
    g_autofree char *begun = bench_events(&bench);
    g_assert_cmpint(job_cancel(job_of(&bench), true, NULL), ==, 0);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    expect_events(&bench, CANCELLED("intact"));
    g_assert_true(node_backing(bench.nodes[2]) == bench.nodes[1]);
    g_assert_cmpstr(bench_disk_backing(bench.nodes[2]), ==, "a.img");
    bench_close(&bench);
}

static void throttled_pause_and_cancel(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 3, SIZE);
    bench_fill(bench.nodes[1], 0, 10 * TEST_CLUSTER, 0x55);
    start_stream(&bench, (struct block_stream_args){.device = "b", .base_node = "base", .has_speed = true, .speed = 1});
    bench_sleep_ms(20);
    struct job *job = job_of(&bench);
    g_assert_cmpint(job_pause(job, NULL), ==, 0);
    bench_sleep_ms(5);
    expect_events(&bench, STARTED "; " S("paused"));
    g_assert_cmpint(job_resume(job, NULL), ==, 0);
    bench_sleep_ms(5);
    expect_events(&bench, S("running"));
    expect_error(job_complete(job, &error), "cannot accept command verb 'complete'");
    expect_error(job_resume(job, &error), "was not paused");
    g_assert_cmpint(job_pause(job, NULL), ==, 0);
    bench_sleep_ms(5);
    int64_t before = loop_clock_ns();
    g_assert_cmpint(job_cancel(job, true, NULL), ==, 0);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    g_assert_cmpint(loop_clock_ns() - before, <, 500000000);
    expect_events(&bench, S("paused") "; " S("running") "; " CANCELLED("intact"));
    bench_close(&bench);
}

/* Also while it looks at what lies ahead, before it sleeps for its speed. */
static void a_cancel_is_heard_at_any_moment(void *unused)
{
    for (unsigned i = 0; i < 300; i++) {
        struct test_bench bench;
        bench_open(&bench, 3, 4 * TEST_CLUSTER);
        bench_fill(bench.nodes[1], 0, TEST_CLUSTER, 0);
        bench_fill(bench.nodes[1], TEST_CLUSTER, TEST_CLUSTER, 0x55);
        bench_fill(bench.nodes[1], 2 * TEST_CLUSTER, TEST_CLUSTER, 0);
        start_commit(&bench, (struct block_commit_args){.device = "b", .top_node = "a", .has_speed = true, .speed = 1});
        for (int pauses = g_test_rand_int_range(0, 40); pauses > 0; pauses--) {
            coroutine_pause();
        }
        g_assert_cmpint(job_cancel(job_of(&bench), true, NULL), ==, 0);
        bench_await(&bench, "j", JOB_STATUS_NULL);
        bench_close(&bench);
    }
}

static void a_new_speed_counts_at_once(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 3, SIZE);
    bench_fill(bench.nodes[1], 0, 10 * TEST_CLUSTER, 0x55);
    start_stream(&bench, (struct block_stream_args){.device = "b", .has_speed = true, .speed = 1});
    bench_sleep_ms(20);
    g_assert_cmpint(job_set_speed(job_of(&bench), 0, NULL), ==, 0);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    expect_events(&bench, STARTED "; " FINISHED);
    bench_close(&bench);
}

static void shutdown_is_quick(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 6, SIZE);
    for (unsigned i = 0; i < 6; i++) {
        bench_fill(bench.nodes[i], 0, 10 * TEST_CLUSTER, 0x55);
        bench_fill(bench.nodes[i], 20 * TEST_CLUSTER, 10 * TEST_CLUSTER, 0x66);
    }
    struct block_commit_args slow = {.job_id = "low", .device = "e", .top_node = "a", .base_node = "base"};
    slow.has_speed = true;
    slow.speed = 1;
    start_commit(&bench, slow);
    slow = (struct block_commit_args){.job_id = "high", .device = "e", .base_node = "d", .has_speed = true, .speed = 1};
    start_commit(&bench, slow);
    struct block_stream_args stream = {.job_id = "stream", .device = "c", .base_node = "a"};
    stream.has_auto_finalize = stream.has_auto_dismiss = true;
    start_stream(&bench, stream);
    bench_await(&bench, "stream", JOB_STATUS_PENDING);
    int64_t before = loop_clock_ns();
    jobs_cancel_all_and_wait(bench.jobs);
    g_assert_cmpint(loop_clock_ns() - before, <, 1000000000);
    expect_error(stream_start(bench.jobs, &stream, &error), "shutting down");
    bench_close(&bench);
}

/* --- errors --- */

static void expect_failing_stream(enum blockdev_on_error on_error, int fault, const char *events)
{
    struct test_bench bench;
    bench_open(&bench, 3, SIZE);
    bench_fill(bench.nodes[1], 0, 10 * TEST_CLUSTER, 0x55);
    memset(bench_faults(bench.nodes[2]), 0, sizeof(struct memory_faults));
    for (uint64_t at = 0; at < 10; at++) {
        struct memory_faults *faults = bench_faults(bench.nodes[1]);
        *faults = (struct memory_faults){.read_error = fault, .at = 5 * TEST_CLUSTER};
    }
    /* X has nothing of its own there, so that it is read from below. */
    g_autoptr(GArray) unused = NULL;
    bench_resize(bench.nodes[2], 0);
    bench_resize(bench.nodes[2], SIZE);
    start_stream(&bench, (struct block_stream_args){
                             .device = "b", .base_node = "base", .has_on_error = true, .on_error = on_error});
    if (on_error == BLOCKDEV_ON_ERROR_STOP || (on_error == BLOCKDEV_ON_ERROR_ENOSPC && fault == -ENOSPC)) {
        bench_await(&bench, "j", JOB_STATUS_PAUSED);
        struct block_job_info_list *list = jobs_query_block(bench.jobs);
        g_assert_cmpint(list->items[0]->io_status, ==,
                        fault == -ENOSPC ? BLOCK_DEVICE_IO_STATUS_NOSPACE : BLOCK_DEVICE_IO_STATUS_FAILED);
        g_assert_true(list->items[0]->paused);
        block_job_info_list_free(list);
        bench_faults(bench.nodes[1])->read_error = 0;
        g_assert_cmpint(job_resume(job_of(&bench), NULL), ==, 0);
    }
    bench_await(&bench, "j", JOB_STATUS_NULL);
    expect_events(&bench, events);
    g_assert_true(node_backing(bench.nodes[2]) == bench.nodes[strstr(events, "waiting") ? 0 : 1]);
    bench_faults(bench.nodes[1])->read_error = 0;
    bench_close(&bench);
}

#define FAILED(error) S("aborting") "; BLOCK_JOB_COMPLETED j " error " intact; " S("concluded") "; " S("null")

static void errors_of_a_stream(void *unused)
{
    expect_failing_stream(BLOCKDEV_ON_ERROR_REPORT, -EIO,
                          STARTED "; BLOCK_JOB_ERROR j read report; " FAILED("Input/output error"));
    expect_failing_stream(BLOCKDEV_ON_ERROR_ENOSPC, -EIO,
                          STARTED "; BLOCK_JOB_ERROR j read report; " FAILED("Input/output error"));
    expect_failing_stream(BLOCKDEV_ON_ERROR_STOP, -EIO,
                          STARTED "; BLOCK_JOB_ERROR j read stop; " S("paused") "; " S("running") "; " FINISHED);
    expect_failing_stream(BLOCKDEV_ON_ERROR_ENOSPC, -ENOSPC,
                          STARTED "; BLOCK_JOB_ERROR j read stop; " S("paused") "; " S("running") "; " FINISHED);
    expect_failing_stream(BLOCKDEV_ON_ERROR_IGNORE, -EIO,
                          STARTED "; BLOCK_JOB_ERROR j read ignore; " FAILED("Input/output error"));
}

static void a_commit_ignores_by_trying_again(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 3, SIZE);
    bench_fill(bench.nodes[1], 0, 10 * TEST_CLUSTER, 0x55);
    *bench_faults(bench.nodes[0]) = (struct memory_faults){.write_error = -ENOSPC, .at = 3 * TEST_CLUSTER};
    start_commit(&bench,
                 (struct block_commit_args){
                     .device = "b", .top_node = "a", .has_on_error = true, .on_error = BLOCKDEV_ON_ERROR_IGNORE});
    bench_sleep_ms(250);
    bench_faults(bench.nodes[0])->write_error = 0;
    bench_await(&bench, "j", JOB_STATUS_NULL);
    g_autofree char *events = bench_events(&bench);
    g_assert_true(g_str_has_prefix(events, STARTED "; BLOCK_JOB_ERROR j write ignore; BLOCK_JOB_ERROR j write ignore"));
    g_assert_true(g_str_has_suffix(events, FINISHED));
    bench_close(&bench);
}

/* Writes `value` to a cluster as a client of the node does. */
static void coroutine_fn client_writes(struct test_bench *bench, struct node *node, uint64_t offset, int value)
{
    struct operation_config config = {.kind = "export",
                                      .id = "client",
                                      .table = &block_export_add_claims,
                                      .bound = {[CLAIM_NODE] = node},
                                      .conditions = CLAIM_IF_WRITABLE};
    struct operation *operation;
    g_autofree unsigned char *data = g_malloc(TEST_CLUSTER);
    struct iovec iov = {memset(data, value, TEST_CLUSTER), TEST_CLUSTER};
    g_assert_cmpint(operation_begin(bench->graph, &config, &operation, NULL), ==, 0);
    struct backend *backend = backend_create(bench->graph, "client");
    g_assert_cmpint(backend_attach(backend, node, operation_granted(operation, node), NULL), ==, 0);
    g_assert_cmpint(backend_write(backend, offset, TEST_CLUSTER, buffers_one(&iov), 0), ==, 0);
    backend_destroy(backend);
    operation_end(operation);
}

/* What failed as zeroes is written by a client before it is tried again. */
static void an_old_zero_does_not_land_on_new_data(void *unused)
{
    struct test_bench bench;
    const uint64_t at = 4 * TEST_CLUSTER;
    bench_open(&bench, 3, SIZE);
    bench_fill(bench.nodes[2], 0, 10 * TEST_CLUSTER, 0x55);
    bench_fill(bench.nodes[2], at, TEST_CLUSTER, 0);
    bench_fill(bench.nodes[0], at, TEST_CLUSTER, 0x11); /* zeroes that are there already are not written */
    *bench_faults(bench.nodes[0]) = (struct memory_faults){.write_error = -EIO, .at = at};
    start_commit(&bench,
                 (struct block_commit_args){.device = "b", .has_on_error = true, .on_error = BLOCKDEV_ON_ERROR_IGNORE});
    while (!g_ptr_array_find_with_equal_func(bench.events, "BLOCK_JOB_ERROR j write ignore", g_str_equal, NULL)) {
        bench_sleep_ms(1);
    }
    bench_faults(bench.nodes[0])->write_error = 0;
    client_writes(&bench, bench.nodes[2], at, 0x77);
    g_assert_cmpint(job_set_speed(job_of(&bench), 0, NULL), ==, 0); /* it looks around before the time */
    bench_await(&bench, "j", JOB_STATUS_READY);
    g_assert_cmpint(job_complete(job_of(&bench), NULL), ==, 0);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    g_autofree unsigned char *after = g_malloc(SIZE);
    bench_view(bench.nodes[0], after, SIZE);
    g_assert_cmpint(after[at], ==, 0x77);
    bench_close(&bench);
}

static void starting_entry(void *argument)
{
    start_commit(argument, (struct block_commit_args){
                               .device = "c", .top_node = "b", .base_node = "base", .speed = 1, .has_speed = true});
}

/* Who holds the graph's lock is about to change the shape: nobody claims by the old one any more. */
static void a_job_does_not_begin_inside_a_change_of_the_graph(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 4, SIZE);
    graph_lock(bench.graph);
    loop_spawn(loop_self(), starting_entry, &bench);
    bench_sleep_ms(20);
    g_assert_true(list_is_empty(&bench.graph->operations));
    graph_unlock(bench.graph);
    bench_await(&bench, "j", JOB_STATUS_RUNNING);
    bench_sleep_ms(20);
    g_assert_false(list_is_empty(&bench.graph->operations));
    bench_close(&bench);
}

static void a_header_that_cannot_be_written_changes_nothing(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 4, SIZE);
    g_autofree unsigned char *before = g_malloc(SIZE), *after = g_malloc(SIZE);
    bench_view(bench.nodes[3], before, SIZE);
    bench_faults(bench.nodes[3])->header_error = -EIO;
    bench_faults(bench.nodes[3])->header_once = true;
    start_commit(&bench, (struct block_commit_args){.device = "c", .top_node = "b", .base_node = "a"});
    bench_await(&bench, "j", JOB_STATUS_NULL);
    g_autofree char *events = bench_events(&bench);
    g_assert_nonnull(strstr(events, "BLOCK_JOB_COMPLETED j Cannot change the backing file of node 'c'"));
    g_assert_true(node_backing(bench.nodes[3]) == bench.nodes[2]);
    g_assert_cmpstr(bench_disk_backing(bench.nodes[3]), ==, "b.img");
    bench_view(bench.nodes[3], after, SIZE);
    g_assert_cmpmem(before, SIZE, after, SIZE);
    start_commit(&bench, (struct block_commit_args){.device = "c", .top_node = "b", .base_node = "a"});
    bench_await(&bench, "j", JOB_STATUS_NULL);
    g_assert_true(node_backing(bench.nodes[3]) == bench.nodes[1]);
    bench_close(&bench);
}

static void bad_arguments(void *unused)
{
    static const struct {
        struct block_commit_args args;
        const char *text;
    } commits[] = {
        {{.device = "nope"}, "Device 'nope' not found"},
        {{.device = "b", .top_node = "nope"}, "nope"},
        {{.device = "b", .base_node = "b"}, "into itself"},
        {{.device = "base"}, "nothing below"},
        {{.device = "b", .top_node = "base", .base_node = "a"}, "'a' is not in the backing chain of 'base'"},
        {{.device = "a", .top_node = "b"}, "'b' is not in the backing chain of 'a'"},
        {{.device = "b", .top = "zz"}, "zz"},
        {{.device = "b", .base = "a.img", .base_node = "a"}, "same time"},
        {{.device = "b", .backing_file = "x"}, "backing-file"},
        {{.device = "b", .filter_node_name = "a"}, "Duplicate nodes"},
        {{.device = "b", .filter_node_name = ""}, "Invalid node-name: ''"},
        {{.device = "b", .filter_node_name = "#x"}, "Invalid node-name: '#x'"},
        {{.device = "b", .job_id = "9"}, "Invalid job ID '9'"},
        {{.device = "b", .job_id = ""}, "Invalid job ID ''"},
        {{.device = "b", .has_speed = true, .speed = -1}, "non-negative"},
    };
    struct test_bench bench;
    bench_open(&bench, 3, SIZE);
    for (unsigned i = 0; i < G_N_ELEMENTS(commits); i++) {
        struct block_commit_args args = commits[i].args;
        args.job_id = args.job_id ? args.job_id : "j";
        expect_error(commit_start(bench.jobs, &args, &error), commits[i].text);
    }
    static const struct {
        struct block_stream_args args;
        const char *text;
    } streams[] = {
        {{.device = "nope"}, "Cannot find device='nope' nor node-name='nope'"},
        {{.device = "b", .base = "a.img", .base_node = "a"}, "'base' and 'base-node'"},
        {{.device = "b", .bottom = "a", .base_node = "a"}, "'bottom' and 'base-node'"},
        {{.device = "a", .bottom = "b"}, "'b' is not in a chain starting from 'a'"},
        {{.device = "a", .base_node = "b"}, "'b' is not a backing image of 'a'"},
        {{.device = "a", .base = "b.img"}, "Can't find 'b.img'"},
        {{.device = "b", .backing_file = "x"}, "whole chain"},
        {{.device = "b", .job_id = "a b"}, "Invalid job ID 'a b'"},
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(streams); i++) {
        struct block_stream_args args = streams[i].args;
        args.job_id = args.job_id ? args.job_id : "j";
        expect_error(stream_start(bench.jobs, &args, &error), streams[i].text);
    }
    expect_events(&bench, "");
    bench_close(&bench);
}

/* Files by their names as well as nodes; a middle layer shorter than the others; a base that is longer or shorter. */
static void sizes_differ(void *unused)
{
    static const uint64_t sizes[][4] = {
        {10, 8, 12, 16}, {4, 8, 8, 16}, {16, 4, 4, 16}, {16, 12, 8, 16}, {16, 4, 16, 16}, {1, 1, 20, 1},
    };
    for (unsigned i = 0; i < 3 * G_N_ELEMENTS(sizes); i++) {
        struct test_bench bench;
        bench_open(&bench, 4, 20 * TEST_CLUSTER);
        for (unsigned at = 0; at < 4; at++) {
            bench_resize(bench.nodes[at], sizes[i / 3][at] * TEST_CLUSTER - 512);
        }
        uint64_t size = atomic_load(&bench.nodes[3]->size);
        g_autofree unsigned char *before = g_malloc(size), *after = g_malloc(size);
        bench_view(bench.nodes[3], before, size);
        if (i % 3 == 0) {
            start_commit(&bench, (struct block_commit_args){.device = "c", .top = "b.img", .base = "dir/base.img"});
        } else if (i % 3 == 1) {
            start_commit(&bench, (struct block_commit_args){.device = "c", .top = "dir/b.img", .base = "a.img"});
        } else {
            start_stream(&bench, (struct block_stream_args){.device = "c", .base = "base.img"});
        }
        bench_await(&bench, "j", JOB_STATUS_NULL);
        g_assert_true(node_backing(bench.nodes[3]) == bench.nodes[i % 3 == 1 ? 1 : 0]);
        bench_view(bench.nodes[3], after, size);
        g_assert_cmpmem(before, size, after, size);
        bench_close(&bench);
    }
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*body)(void *);
    } tests[] = {
        {"/job/middle-commit", middle_commit},
        {"/job/stream", stream_to_base},
        {"/job/active-commit", active_commit},
        {"/job/active-cancel-soft", active_cancel_soft},
        {"/job/active-cancel-forced", active_cancel_forced},
        {"/job/manual-steps", manual_steps},
        {"/job/cancel-while-pending", cancel_while_pending},
        {"/job/throttled-pause-and-cancel", throttled_pause_and_cancel},
        {"/job/a-cancel-is-heard-at-any-moment", a_cancel_is_heard_at_any_moment},
        {"/job/a-new-speed-counts-at-once", a_new_speed_counts_at_once},
        {"/job/shutdown-is-quick", shutdown_is_quick},
        {"/job/errors-of-a-stream", errors_of_a_stream},
        {"/job/a-commit-ignores-by-trying-again", a_commit_ignores_by_trying_again},
        {"/job/a-job-does-not-begin-inside-a-change-of-the-graph", a_job_does_not_begin_inside_a_change_of_the_graph},
        {"/job/an-old-zero-does-not-land-on-new-data", an_old_zero_does_not_land_on_new_data},
        {"/job/a-header-that-cannot-be-written-changes-nothing", a_header_that_cannot_be_written_changes_nothing},
        {"/job/bad-arguments", bad_arguments},
        {"/job/sizes-differ", sizes_differ},
    };
    g_test_init(&argc, &argv, NULL);
    sim_create_if_asked();
    g_assert_cmpint(loop_create(ENGINE_AUTO, &control_loop, NULL), ==, 0);
    for (unsigned i = 0; i < G_N_ELEMENTS(tests); i++) {
        g_test_add_data_func(tests[i].name, tests[i].body, run);
    }
    int result = g_test_run();
    loop_destroy(control_loop);
    return result;
}

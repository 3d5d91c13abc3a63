/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A cancel in every state that a job can be in: it answers at once, exactly one of BLOCK_JOB_CANCELLED and
 * BLOCK_JOB_COMPLETED follows, the images show what they showed, and the claims are free again.
 */
#include "base/size.h"
#include "job/chain_testing.h"
#include "job/commit.h"
#include "job/policy.h"
#include "job/stream.h"
#include "loop/sim.h"
#include <errno.h>

#define SIZE (14 * TEST_CLUSTER)

static struct loop *control_loop;

/* --- how it comes there --- */

static void launch_commit(struct test_bench *bench, struct block_commit_args args)
{
    auto_error error = NULL;
    args.job_id = "j";
    args.device = "c";
    if (commit_start(bench->jobs, &args, &error) < 0) {
        g_error("%s", error->message);
    }
}

static void launch_stream(struct test_bench *bench, struct block_stream_args args)
{
    auto_error error = NULL;
    args.job_id = "j";
    args.device = "c";
    if (stream_start(bench->jobs, &args, &error) < 0) {
        g_error("%s", error->message);
    }
}

static struct job *job_of(struct test_bench *bench)
{
    return jobs_find(bench->jobs, "j");
}

static void pause_and_await(struct test_bench *bench, enum job_status status)
{
    g_assert_cmpint(job_pause(job_of(bench), NULL), ==, 0);
    bench_await(bench, "j", status);
}

static void coroutine_fn just_begun(struct test_bench *bench)
{
    launch_commit(bench, (struct block_commit_args){.top_node = "b"});
}

static void coroutine_fn throttled(struct test_bench *bench)
{
    launch_stream(bench, (struct block_stream_args){.has_speed = true, .speed = 1});
    bench_sleep_ms(10);
}

static void coroutine_fn paused(struct test_bench *bench)
{
    launch_commit(bench, (struct block_commit_args){.top_node = "b"});
    pause_and_await(bench, JOB_STATUS_PAUSED);
}

static void coroutine_fn paused_and_throttled(struct test_bench *bench)
{
    throttled(bench);
    pause_and_await(bench, JOB_STATUS_PAUSED);
}

static void coroutine_fn stopped_by_reading(struct test_bench *bench)
{
    *bench_faults(bench->nodes[2]) = (struct memory_faults){.read_error = -EIO, .at = 5 * TEST_CLUSTER};
    launch_stream(bench, (struct block_stream_args){.has_on_error = true, .on_error = BLOCKDEV_ON_ERROR_STOP});
    bench_await(bench, "j", JOB_STATUS_PAUSED);
}

static void coroutine_fn stopped_by_writing(struct test_bench *bench)
{
    *bench_faults(bench->nodes[0]) = (struct memory_faults){.write_error = -ENOSPC, .at = 5 * TEST_CLUSTER};
    launch_commit(
        bench, (struct block_commit_args){.top_node = "b", .has_on_error = true, .on_error = BLOCKDEV_ON_ERROR_ENOSPC});
    bench_await(bench, "j", JOB_STATUS_PAUSED);
}

static void coroutine_fn stopped_by_flushing(struct test_bench *bench)
{
    bench_faults(bench->nodes[0])->flush_error = -EIO;
    launch_commit(
        bench, (struct block_commit_args){.top_node = "b", .has_on_error = true, .on_error = BLOCKDEV_ON_ERROR_STOP});
    bench_await(bench, "j", JOB_STATUS_PAUSED);
}

static void coroutine_fn stopped_by_asking(struct test_bench *bench)
{
    *bench_faults(bench->nodes[2]) = (struct memory_faults){.status_error = -EIO, .at = 5 * TEST_CLUSTER};
    launch_commit(bench, (struct block_commit_args){.has_on_error = true, .on_error = BLOCKDEV_ON_ERROR_STOP});
    bench_await(bench, "j", JOB_STATUS_PAUSED);
}

static void coroutine_fn trying_again(struct test_bench *bench)
{
    *bench_faults(bench->nodes[0]) = (struct memory_faults){.write_error = -EIO, .at = 5 * TEST_CLUSTER};
    launch_commit(
        bench, (struct block_commit_args){.top_node = "b", .has_on_error = true, .on_error = BLOCKDEV_ON_ERROR_IGNORE});
    bench_sleep_ms(30);
}

static void coroutine_fn trying_to_flush_again(struct test_bench *bench)
{
    bench_faults(bench->nodes[0])->flush_error = -EIO;
    launch_commit(
        bench, (struct block_commit_args){.top_node = "b", .has_on_error = true, .on_error = BLOCKDEV_ON_ERROR_IGNORE});
    bench_sleep_ms(30);
}

static void coroutine_fn ready(struct test_bench *bench)
{
    launch_commit(bench, (struct block_commit_args){.has_on_error = true, .on_error = BLOCKDEV_ON_ERROR_STOP});
    bench_await(bench, "j", JOB_STATUS_READY);
}

static void coroutine_fn standby(struct test_bench *bench)
{
    ready(bench);
    pause_and_await(bench, JOB_STATUS_STANDBY);
}

static void coroutine_fn pending(struct test_bench *bench)
{
    launch_stream(bench, (struct block_stream_args){.has_auto_finalize = true});
    bench_await(bench, "j", JOB_STATUS_PENDING);
}

static void coroutine_fn told_to_complete(struct test_bench *bench)
{
    ready(bench);
    g_assert_cmpint(job_complete(job_of(bench), NULL), ==, 0);
}

static void coroutine_fn in_its_last_step(struct test_bench *bench)
{
    told_to_complete(bench);
    bench_await(bench, "j", JOB_STATUS_PENDING);
    for (unsigned turns = (unsigned)(loop_random() % 6); turns > 0; turns--) {
        coroutine_pause();
    }
}

struct place {
    const char *name;
    void coroutine_fn (*come_there)(struct test_bench *bench);
    const char *soft, *forced; /* CANCELLED, COMPLETED, or "" for either; `forced` NULL: the same */
};
static const struct place places[] = {
    {"just begun", just_begun, "CANCELLED", NULL},
    {"throttled", throttled, "CANCELLED", NULL},
    {"paused", paused, "CANCELLED", NULL},
    {"paused and throttled", paused_and_throttled, "CANCELLED", NULL},
    {"stopped by reading", stopped_by_reading, "CANCELLED", NULL},
    {"stopped by writing", stopped_by_writing, "CANCELLED", NULL},
    {"stopped by flushing", stopped_by_flushing, "CANCELLED", NULL},
    {"stopped by asking", stopped_by_asking, "CANCELLED", NULL},
    {"trying again", trying_again, "CANCELLED", NULL},
    {"trying to flush again", trying_to_flush_again, "CANCELLED", NULL},
    {"ready", ready, "COMPLETED", "CANCELLED"},
    {"standby", standby, "COMPLETED", "CANCELLED"},
    {"pending", pending, "CANCELLED", NULL},
    {"told to complete", told_to_complete, "", "CANCELLED"},
    {"in its last step", in_its_last_step, "", NULL},
};

/* --- what is true afterwards --- */

static unsigned count_events(char **lines, const char *prefix)
{
    unsigned count = 0;
    for (; *lines; lines++) {
        count += g_str_has_prefix(*lines, prefix);
    }
    return count;
}

static void expect_one_end(struct test_bench *bench, const struct place *place, const char *expected)
{
    g_autofree char *events = bench_events(bench);
    g_auto(GStrv) lines = g_strsplit(events, "; ", -1);
    unsigned cancelled = count_events(lines, "BLOCK_JOB_CANCELLED j");
    unsigned completed = count_events(lines, "BLOCK_JOB_COMPLETED j");
    unsigned well = count_events(lines, "BLOCK_JOB_COMPLETED j complete");
    if (cancelled + completed != 1 || completed != well ||
        (*expected && cancelled != (strcmp(expected, "CANCELLED") == 0))) {
        g_error("%s: %s", place->name, events);
    }
}

static void coroutine_fn cancel_there(const struct place *place, bool force, bool twice)
{
    struct test_bench bench;
    bench_open(&bench, 4, SIZE);
    for (unsigned i = 1; i < 3; i++) {
        bench_fill(bench.nodes[i], 4 * TEST_CLUSTER, 4 * TEST_CLUSTER, (unsigned char)(0x50 + i));
    }
    bench_forget(bench.nodes[3], 4 * TEST_CLUSTER, 4 * TEST_CLUSTER);
    bench_fill(bench.nodes[3], 12 * TEST_CLUSTER, 2 * TEST_CLUSTER, 0x77);
    g_autofree unsigned char *before = g_malloc(SIZE), *after = g_malloc(SIZE);
    bench_view(bench.nodes[3], before, SIZE);
    place->come_there(&bench);
    int64_t start = loop_clock_ns();
    struct job *job = job_of(&bench);
    bool taken = job && job_cancel(job, force, NULL) == 0;
    g_assert_true(taken || place->come_there == in_its_last_step); /* which may be over */
    if (twice && taken) {
        job_cancel(job, force, NULL);
    }
    bench_await(&bench, "j", JOB_STATUS_NULL);
    g_assert_cmpint(loop_clock_ns() - start, <, 500 * 1000000);
    expect_one_end(&bench, place, force && place->forced ? place->forced : place->soft);
    g_assert_true(list_is_empty(&bench.graph->operations));
    if (!bench.nodes[3]->stale) {
        bench_view(bench.nodes[3], after, SIZE);
        g_assert_cmpmem(before, SIZE, after, SIZE);
    } else { /* it lost the race: everybody uses the base by now */
        bench_view(bench.nodes[0], after, SIZE);
        g_assert_cmpmem(before, SIZE, after, SIZE);
    }
    for (unsigned i = 0; i < 4; i++) {
        *bench_faults(bench.nodes[i]) = (struct memory_faults){0};
    }
    bench_close(&bench);
}

static void every_place(void *unused)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(places); i++) {
        for (unsigned how = 0; how < 4; how++) {
            if (places[i].forced || how == 0 || how == 3) {
                cancel_there(&places[i], how & 1, how & 2);
            }
        }
    }
}

/* --- where it is refused, or takes its time --- */

static void expect_refused(struct job *job, const char *state)
{
    struct error *error = NULL;
    g_autofree char *text = g_strdup_printf("Job 'j' in state '%s' cannot accept command verb 'cancel'", state);
    g_assert_cmpint(job_cancel(job, true, &error), <, 0);
    g_assert_cmpstr(error->message, ==, text);
    error_free(error);
}

static void concluded_is_too_late(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 4, SIZE);
    launch_stream(&bench, (struct block_stream_args){.has_auto_dismiss = true});
    bench_await(&bench, "j", JOB_STATUS_CONCLUDED);
    g_autofree char *begun = bench_events(&bench);
    expect_refused(job_of(&bench), "concluded");
    bench_sleep_ms(2);
    g_autofree char *silence = bench_events(&bench);
    g_assert_cmpstr(silence, ==, "");
    g_assert_cmpint(job_dismiss(job_of(&bench), NULL), ==, 0);
    bench_close(&bench);
}

/* The last step waits for another change of the graph: the cancel answers at once, and wins. */
static void while_another_changes_the_graph(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 4, SIZE);
    launch_stream(&bench, (struct block_stream_args){.has_auto_finalize = true, .auto_finalize = true});
    graph_lock(bench.graph);
    bench_await(&bench, "j", JOB_STATUS_PENDING);
    bench_sleep_ms(2);
    g_assert_cmpint(job_cancel(job_of(&bench), true, NULL), ==, 0);
    bench_sleep_ms(2);
    graph_unlock(bench.graph);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    g_autofree char *events = bench_events(&bench);
    g_assert_true(g_str_has_suffix(events, "JOB_STATUS_CHANGE j aborting; BLOCK_JOB_CANCELLED j intact; "
                                           "JOB_STATUS_CHANGE j concluded; JOB_STATUS_CHANGE j null"));
    bench_close(&bench);
}

/* --- while it takes back what it did: toys --- */

static int coroutine_fn toy_run(struct job *job, struct error **err)
{
    return -EIO;
}

static void coroutine_fn toy_abort(struct job *job)
{
    bench_sleep_ms(10);
}

static void coroutine_fn toy_clean(struct job *job)
{
}

static void while_it_takes_back(void *unused)
{
    static const struct job_policy policy = {
        .type = JOB_TYPE_MIRROR, .run = toy_run, .prepare = toy_run, .abort = toy_abort, .clean = toy_clean};
    struct job_config config = {.id = "j", .auto_finalize = true, .auto_dismiss = true};
    struct test_bench bench;
    bench_open(&bench, 1, SIZE);
    job_start(job_create(bench.jobs, &policy, &config));
    bench_await(&bench, "j", JOB_STATUS_ABORTING);
    expect_refused(job_of(&bench), "aborting");
    bench_await(&bench, "j", JOB_STATUS_NULL);
    g_autofree char *events = bench_events(&bench);
    g_assert_nonnull(strstr(events, "BLOCK_JOB_COMPLETED j Input/output error"));
    g_assert_null(strstr(events, "CANCELLED"));
    bench_close(&bench);
}

static void run(gconstpointer body)
{
    loop_run_coroutine(control_loop, (void (*)(void *))body, NULL);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    sim_create_if_asked();
    g_assert_cmpint(loop_create(ENGINE_AUTO, &control_loop, NULL), ==, 0);
    g_test_add_data_func("/cancel/every-place", every_place, run);
    g_test_add_data_func("/cancel/concluded-is-too-late", concluded_is_too_late, run);
    g_test_add_data_func("/cancel/while-another-changes-the-graph", while_another_changes_the_graph, run);
    g_test_add_data_func("/cancel/while-it-takes-back", while_it_takes_back, run);
    int result = g_test_run();
    loop_destroy(control_loop);
    return result;
}

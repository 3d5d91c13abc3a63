/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Backups of nodes that guests on several loops write and verify: every sync and bitmap mode against what was frozen at
 * the same drained moment, by an action of the same run; several at once; errors of either side; starts that are taken
 * back. The order of everything is the loops' (in simulated worlds: the seed's).
 */
#include "base/size.h"
#include "block/bitmap.h"
#include "job/backup.h"
#include "job/chain_testing.h"
#include "job/policy.h"
#include "loop/sim.h"
#include <errno.h>
#include <string.h>

#define SIZE (48 * TEST_CLUSTER - 512)
#define ROUNDS 6

static struct loop *control_loop, *guest_loops[2];

static void run(gconstpointer body)
{
    loop_run_coroutine(control_loop, (void (*)(void *))body, NULL);
}

/* --- what a node shows at the moment of a run --- */

struct frozen {
    struct node *node;
    unsigned char *data;
};

static int coroutine_fn freeze_plan(struct action *action, struct error **err)
{
    const struct frozen *frozen = action->state;
    action_drain(action, frozen->node);
    return 0;
}

static int coroutine_fn freeze_apply(struct action *action, struct error **err)
{
    struct frozen *frozen = action->state;
    bench_view(frozen->node, frozen->data, SIZE);
    return 0;
}

static const struct action_kind freeze_kind = {.name = "freeze", .plan = freeze_plan, .apply = freeze_apply};

static int coroutine_fn abort_plan(struct action *action, struct error **err)
{
    return error_set(err, -ECANCELED, "not today");
}

static const struct action_kind abort_kind = {.name = "abort", .plan = abort_plan};

/* Starts the backup, and freezes `node` with it if it is not NULL. */
static int coroutine_fn try_backup(struct test_bench *bench, struct blockdev_backup_options options, struct node *node,
                                   unsigned char *to, struct error **err)
{
    struct action actions[2];
    struct frozen frozen = {node, to};
    options.job_id = options.job_id ? options.job_id : "j";
    blockdev_backup_action(&actions[0], bench->jobs, NULL, &options);
    actions[1] = (struct action){.kind = &freeze_kind, .state = &frozen};
    return actions_run(bench->graph, actions, node ? 2 : 1, err);
}

static void coroutine_fn start_backup(struct test_bench *bench, struct blockdev_backup_options options,
                                      struct node *node, unsigned char *to)
{
    auto_error error = NULL;
    if (try_backup(bench, options, node, to, &error) < 0) {
        g_error("%s", error->message);
    }
}

static void expect_end(struct test_bench *bench, const char *text)
{
    g_autofree char *events = bench_events(bench);
    if (!strstr(events, text)) {
        g_error("'%s' is not in '%s'", text, events);
    }
}

static unsigned draw(unsigned below)
{
    return (unsigned)(loop_random() % below);
}

/* --- exactness --- */

/* base <- a, written by guests; b, the target, alone. */
static struct guest *coroutine_fn open_bench(struct test_bench *bench)
{
    bench_open(bench, 2, SIZE);
    bench_add(bench, SIZE);
    return guest_start_on(bench, bench->nodes[1], guest_loops, G_N_ELEMENTS(guest_loops));
}

static void coroutine_fn full_round(bool break_snapshot)
{
    struct test_bench bench;
    struct guest *guest = open_bench(&bench);
    g_autofree unsigned char *frozen = g_malloc(SIZE), *copy = g_malloc(SIZE);
    struct blockdev_backup_options options = {
        .device = "a",
        .target = "b",
        .sync = MIRROR_SYNC_MODE_FULL,
        .has_speed = true,
        .speed = draw(2) ? 0 : 4 * MiB,
        .has_on_cbw_error = true,
        .on_cbw_error = break_snapshot ? ON_CBW_ERROR_BREAK_SNAPSHOT : ON_CBW_ERROR_BREAK_GUEST_WRITE,
    };
    bench_sleep_ms(1);
    start_backup(&bench, options, bench.nodes[1], frozen);
    bench_sleep_ms(draw(5));
    struct job *job = jobs_find(bench.jobs, "j");
    if (job) {
        job_set_speed(job, 0, NULL);
    }
    bench_await(&bench, "j", JOB_STATUS_NULL);
    expect_end(&bench, "BLOCK_JOB_COMPLETED j");
    bench_view(bench.nodes[2], copy, SIZE);
    g_assert(memcmp(copy, frozen, SIZE) == 0);
    guest_finish(guest);
    bench_close(&bench);
}

static void coroutine_fn full_is_exact(void *argument)
{
    for (unsigned round = 0; round < ROUNDS; round++) {
        full_round(round % 2);
    }
}

/* What the top layer does not have comes from the base. */
static void coroutine_fn top_is_exact(void *argument)
{
    struct test_bench bench;
    struct guest *guest = open_bench(&bench);
    g_autofree unsigned char *frozen = g_malloc(SIZE), *copy = g_malloc(SIZE), *base = g_malloc(SIZE);
    struct blockdev_backup_options options = {.device = "a", .target = "b", .sync = MIRROR_SYNC_MODE_TOP};
    start_backup(&bench, options, bench.nodes[1], frozen);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    expect_end(&bench, "BLOCK_JOB_COMPLETED j");
    bench_view(bench.nodes[2], copy, SIZE);
    bench_view(bench.nodes[0], base, SIZE);
    unsigned copied = 0;
    for (uint64_t at = 0; at < SIZE; at += TEST_CLUSTER) {
        uint64_t bytes = min_u64(TEST_CLUSTER, SIZE - at);
        bool has = bench_allocated(bench.nodes[2], at);
        g_assert(memcmp((has ? copy : base) + at, frozen + at, bytes) == 0);
        copied += has;
    }
    g_assert_cmpuint(copied, >, 0);
    guest_finish(guest);
    bench_close(&bench);
}

static struct bitmap *coroutine_fn add_bitmap(struct test_bench *bench, struct node *node)
{
    struct bitmap_config config = {.name = "bits", .granularity = TEST_CLUSTER};
    struct bitmap *bitmap;
    struct drain drain;
    graph_lock(bench->graph);
    graph_drain_begin(bench->graph, &node, 1, NULL, &drain);
    g_assert_cmpint(bitmap_add(node, &config, &bitmap, NULL), ==, 0);
    graph_drain_end(&drain);
    graph_unlock(bench->graph);
    return bitmap;
}

/* A full one, then increments into the same target: after each it is what was frozen. Some are cancelled: then the next
 * has what they had not. */
static void coroutine_fn increments_are_exact(void *argument)
{
    struct test_bench bench;
    struct guest *guest = open_bench(&bench);
    g_autofree unsigned char *frozen = g_malloc(SIZE), *copy = g_malloc(SIZE);
    struct bitmap *bitmap = add_bitmap(&bench, bench.nodes[1]);
    struct blockdev_backup_options options = {
        .device = "a",
        .target = "b",
        .sync = MIRROR_SYNC_MODE_FULL,
        .bitmap = "bits",
        .has_bitmap_mode = true,
        .bitmap_mode = BITMAP_SYNC_MODE_ON_SUCCESS,
    };
    for (unsigned round = 0; round < 3 * ROUNDS; round++) {
        bool cancel = round && draw(3) == 0;
        options.has_speed = true;
        options.speed = cancel ? MiB : 0;
        start_backup(&bench, options, bench.nodes[1], frozen);
        g_assert_cmpuint(bitmap->busy, ==, 1);
        if (cancel) {
            bench_sleep_ms(1);
            struct job *job = jobs_find(bench.jobs, "j"); /* may have ended meanwhile */
            if (job) {
                job_cancel(job, true, NULL);
            }
        }
        bench_await(&bench, "j", JOB_STATUS_NULL);
        g_assert_cmpuint(bitmap->busy, ==, 0);
        g_autofree char *events = bench_events(&bench);
        if (strstr(events, "BLOCK_JOB_COMPLETED j")) {
            bench_view(bench.nodes[2], copy, SIZE);
            g_assert(memcmp(copy, frozen, SIZE) == 0);
        } else {
            g_assert_true(cancel);
        }
        options.sync = MIRROR_SYNC_MODE_INCREMENTAL;
        options.has_bitmap_mode = false;
        bench_sleep_ms(draw(3));
    }
    guest_finish(guest);
    bench_close(&bench);
}

/* --- several --- */

static void coroutine_fn two_of_one_node(void *argument)
{
    struct test_bench bench;
    struct guest *guest = open_bench(&bench);
    bench_add(&bench, SIZE);
    g_autofree unsigned char *first = g_malloc(SIZE), *second = g_malloc(SIZE), *copy = g_malloc(SIZE);
    struct blockdev_backup_options options = {
        .device = "a", .target = "b", .sync = MIRROR_SYNC_MODE_FULL, .has_speed = true, .speed = 2 * MiB};
    start_backup(&bench, options, bench.nodes[1], first);
    bench_sleep_ms(1);
    options.job_id = "k";
    options.target = "c";
    options.speed = 0;
    start_backup(&bench, options, bench.nodes[1], second);
    bench_await(&bench, "k", JOB_STATUS_NULL);
    struct job *job = jobs_find(bench.jobs, "j");
    if (job) {
        job_set_speed(job, 0, NULL);
    }
    bench_await(&bench, "j", JOB_STATUS_NULL);
    bench_view(bench.nodes[2], copy, SIZE);
    g_assert(memcmp(copy, first, SIZE) == 0);
    bench_view(bench.nodes[3], copy, SIZE);
    g_assert(memcmp(copy, second, SIZE) == 0);
    guest_finish(guest);
    bench_close(&bench);
}

static void assert_untouched(struct test_bench *bench, const struct bitmap *bitmap)
{
    g_assert_true(node_head(bench->nodes[1]) == bench->nodes[1]);
    g_assert_cmpuint(bitmap->busy, ==, 0);
    g_assert_null(bitmap->since);
    g_assert_null(jobs_find(bench->jobs, "j"));
}

/* Every start is taken back by a later action that fails; the last one stays. */
static void coroutine_fn starts_are_taken_back(void *argument)
{
    struct test_bench bench;
    struct guest *guest = open_bench(&bench);
    struct bitmap *bitmap = add_bitmap(&bench, bench.nodes[1]);
    struct blockdev_backup_options options = {.job_id = "j",
                                              .device = "a",
                                              .target = "b",
                                              .sync = MIRROR_SYNC_MODE_FULL,
                                              .bitmap = "bits",
                                              .has_bitmap_mode = true,
                                              .bitmap_mode = BITMAP_SYNC_MODE_ALWAYS};
    for (unsigned round = 0; round < ROUNDS; round++) {
        struct action actions[2];
        blockdev_backup_action(&actions[0], bench.jobs, NULL, &options);
        actions[1] = (struct action){.kind = &abort_kind};
        g_assert_cmpint(actions_run(bench.graph, actions, 2, NULL), ==, -ECANCELED);
        assert_untouched(&bench, bitmap);
    }
    expect_end(&bench, "");
    options.target = "a";
    g_assert_cmpint(try_backup(&bench, options, NULL, NULL, NULL), <, 0);
    assert_untouched(&bench, bitmap);
    options.target = "b";
    start_backup(&bench, options, NULL, NULL);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    assert_untouched(&bench, bitmap);
    guest_finish(guest);
    bench_close(&bench);
}

/* --- errors --- */

/* The guests go on; the job ends with the error. */
static void coroutine_fn a_failing_target_breaks_the_copy(void *argument)
{
    struct test_bench bench;
    struct guest *guest = open_bench(&bench);
    struct blockdev_backup_options options = {.device = "a",
                                              .target = "b",
                                              .sync = MIRROR_SYNC_MODE_NONE,
                                              .has_on_cbw_error = true,
                                              .on_cbw_error = ON_CBW_ERROR_BREAK_SNAPSHOT};
    bench_faults(bench.nodes[2])->at = 5 * TEST_CLUSTER;
    bench_faults(bench.nodes[2])->write_error = -ENOSPC;
    start_backup(&bench, options, NULL, NULL);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    expect_end(&bench, "BLOCK_JOB_COMPLETED j");
    g_assert_true(node_head(bench.nodes[1]) == bench.nodes[1]);
    guest_finish(guest);
    bench_close(&bench);
}

/* The job pauses, goes on when there is room, and is exact. Nobody writes where the target fails. */
static void coroutine_fn the_job_waits(bool reading)
{
    struct test_bench bench;
    bench_open(&bench, 2, SIZE);
    bench_add(&bench, SIZE);
    g_autofree unsigned char *frozen = g_malloc(SIZE), *copy = g_malloc(SIZE);
    struct blockdev_backup_options options = {
        .device = "a",
        .target = "b",
        .sync = MIRROR_SYNC_MODE_FULL,
        .has_on_source_error = true,
        .on_source_error = reading ? BLOCKDEV_ON_ERROR_STOP : BLOCKDEV_ON_ERROR_REPORT,
        .has_on_target_error = true,
        .on_target_error = reading ? BLOCKDEV_ON_ERROR_REPORT : BLOCKDEV_ON_ERROR_ENOSPC,
    };
    bench_fill(bench.nodes[1], 7 * TEST_CLUSTER, TEST_CLUSTER, 0x77);
    struct memory_faults *faults = bench_faults(bench.nodes[reading ? 1 : 2]);
    faults->at = 7 * TEST_CLUSTER;
    *(reading ? &faults->read_error : &faults->write_error) = -ENOSPC;
    start_backup(&bench, options, bench.nodes[1], frozen);
    bench_await(&bench, "j", JOB_STATUS_PAUSED);
    expect_end(&bench, "BLOCK_JOB_ERROR j");
    faults->read_error = faults->write_error = 0;
    g_assert_cmpint(job_resume(jobs_find(bench.jobs, "j"), NULL), ==, 0);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    bench_view(bench.nodes[2], copy, SIZE);
    g_assert(memcmp(copy, frozen, SIZE) == 0);
    bench_close(&bench);
}

static void coroutine_fn errors_pause_the_job(void *argument)
{
    the_job_waits(false);
    the_job_waits(true);
}

/* --- claims --- */

static void coroutine_fn who_may_not_meet(void *argument)
{
    struct test_bench bench;
    struct guest *guest = open_bench(&bench);
    bench_add(&bench, SIZE);
    auto_error error = NULL;
    struct blockdev_backup_options options = {
        .device = "a", .target = "b", .sync = MIRROR_SYNC_MODE_NONE, .has_speed = true, .speed = 1};
    start_backup(&bench, options, NULL, NULL);
    options.job_id = "k"; /* into what is written already */
    g_assert_cmpint(try_backup(&bench, options, NULL, NULL, &error), ==, -EBUSY);
    options.device = "b"; /* of what is half */
    options.target = "c";
    g_assert_cmpint(try_backup(&bench, options, NULL, NULL, NULL), ==, -EBUSY);
    options.device = "a"; /* what guests use is not discarded */
    options.has_discard_source = options.discard_source = true;
    g_assert_cmpint(try_backup(&bench, options, NULL, NULL, NULL), ==, -EBUSY);
    g_assert_cmpint(job_cancel(jobs_find(bench.jobs, "j"), true, NULL), ==, 0);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    expect_end(&bench, "BLOCK_JOB_CANCELLED j");
    guest_finish(guest);
    bench_close(&bench);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*body)(void *);
    } tests[] = {
        {"/backup/full-is-exact", full_is_exact},
        {"/backup/top-is-exact", top_is_exact},
        {"/backup/increments-are-exact", increments_are_exact},
        {"/backup/two-of-one-node", two_of_one_node},
        {"/backup/starts-are-taken-back", starts_are_taken_back},
        {"/backup/a-failing-target-breaks-the-copy", a_failing_target_breaks_the_copy},
        {"/backup/errors-pause-the-job", errors_pause_the_job},
        {"/backup/who-may-not-meet", who_may_not_meet},
    };
    g_test_init(&argc, &argv, NULL);
    sim_create_if_asked();
    g_assert_cmpint(loop_create(ENGINE_AUTO, &control_loop, NULL), ==, 0);
    g_assert_cmpint(loop_thread_start("guest-0", ENGINE_AUTO, &guest_loops[0], NULL), ==, 0);
    g_assert_cmpint(loop_thread_start("guest-1", ENGINE_AUTO, &guest_loops[1], NULL), ==, 0);
    for (unsigned i = 0; i < G_N_ELEMENTS(tests); i++) {
        g_test_add_data_func(tests[i].name, tests[i].body, run);
    }
    int result = g_test_run();
    loop_thread_join(guest_loops[0]);
    loop_thread_join(guest_loops[1]);
    loop_destroy(control_loop);
    return result;
}

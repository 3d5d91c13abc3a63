/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The way to READY of a mirror and of an active commit once both sides are written, in simulated worlds: what is dirty
 * then is copied once and nothing is added to it, at whatever speed the user has set and whatever guests do. These
 * write data and zeroes in turn over the whole disk, so that what the copy has found somewhere is seldom true any more
 * when the speed limit lets it go on. Time is the worlds': a bound is a bound.
 */
#include "base/size.h"
#include "block/operation.h"
#include "job/chain_testing.h"
#include "job/commit.h"
#include "job/mirror.h"
#include "loop/sim.h"
#include "schema/claims.h"
#include <errno.h>
#include <string.h>

#define CLUSTERS 160
#define SIZE (CLUSTERS * TEST_CLUSTER)
#define SPEED (64 * TEST_CLUSTER)
#define PASS_NS ((int64_t)1000 * 1000 * 1000 * SIZE / SPEED)
#define SLACK_NS ((int64_t)300 * 1000 * 1000)
#define SEEDS 3
#define LOOPS 2
#define WRITERS 4
#define OWN (CLUSTERS / WRITERS) /* of each writer */
#define WRITE_MOST 8             /* clusters at once */

enum way {
    WAY_MIRROR,
    WAY_MIRROR_SWITCHED, /* it begins with marks alone */
    WAY_MIRROR_UNITS,    /* what is found may be a part of what may be written */
    WAY_MIRROR_DISCARDS, /* and what zeroes would be is discarded, in parts of clusters too */
    WAY_MIRROR_FAILING,  /* the node fails to say what it has, every now and then */
    WAY_COMMIT,
    WAYS,
};

struct scene {
    enum way way;
    struct loop *loops[LOOPS];
    struct test_bench bench;
    struct node *node, *target;
    struct backend *guest;
    struct operation *operation;
    atomic_bool stop;
    struct co_group writers;
};
struct writer {
    struct scene *scene;
    unsigned number;
};

/* Data and zeroes in turn, in stretches of its own clusters. */
static void coroutine_fn writer_entry(void *argument)
{
    struct writer *writer = argument;
    struct scene *scene = writer->scene;
    g_autofree unsigned char *data = g_malloc(WRITE_MOST * TEST_CLUSTER);
    struct loop_sleep sleep = {0};
    bool zero[OWN] = {false};
    memset(data, 1 + (int)writer->number, WRITE_MOST * TEST_CLUSTER);
    while (!atomic_load(&scene->stop)) {
        unsigned first = (unsigned)(loop_random() % OWN);
        unsigned count = 1 + (unsigned)(loop_random() % MIN(WRITE_MOST, OWN - first));
        bool zeroes = !zero[first];
        uint64_t offset = (writer->number * OWN + first) * TEST_CLUSTER;
        struct iovec iov = {data, count * TEST_CLUSTER};
        memset(zero + first, zeroes, count);
        uint64_t cut = scene->way == WAY_MIRROR_DISCARDS ? TEST_CLUSTER / 2 : 0;
        int result = zeroes && cut ? backend_discard(scene->guest, offset, iov.iov_len - cut)
                     : zeroes      ? backend_write_zeroes(scene->guest, offset, iov.iov_len, 0)
                                   : backend_write(scene->guest, offset, iov.iov_len, buffers_one(&iov), 0);
        g_assert_cmpint(result, ==, 0);
        loop_sleep_ns(&sleep, (int64_t)(loop_random() % 8000000));
    }
    g_free(writer);
    co_group_leave(&scene->writers);
}

static void coroutine_fn guest_begin(struct scene *scene)
{
    struct operation_config config = {.kind = "export",
                                      .id = "guest",
                                      .table = &block_export_add_claims,
                                      .bound = {[CLAIM_NODE] = scene->node},
                                      .conditions = CLAIM_IF_WRITABLE};
    g_assert_cmpint(operation_begin(scene->bench.graph, &config, &scene->operation, NULL), ==, 0);
    scene->guest = backend_create(scene->bench.graph, "guest");
    unsigned granted = operation_granted(scene->operation, scene->node);
    g_assert_cmpint(backend_attach(scene->guest, scene->node, granted, NULL), ==, 0);
    backend_follow(scene->guest, scene->operation, CLAIM_NODE);
    co_group_init(&scene->writers);
    for (unsigned i = 0; i < WRITERS; i++) {
        struct writer *writer = g_new(struct writer, 1);
        *writer = (struct writer){scene, i};
        co_group_enter(&scene->writers);
        loop_spawn(scene->loops[i % LOOPS], writer_entry, writer);
    }
}

static void coroutine_fn guest_rest(struct scene *scene)
{
    atomic_store(&scene->stop, true);
    co_group_wait(&scene->writers);
    co_group_destroy(&scene->writers);
}

static void coroutine_fn job_begin(struct scene *scene)
{
    struct test_bench *bench = &scene->bench;
    auto_error error = NULL;
    int result;
    if (scene->way == WAY_COMMIT) {
        struct block_commit_args args = {.job_id = "j",
                                         .device = "a",
                                         .has_speed = true,
                                         .speed = SPEED,
                                         .has_copy_mode = true,
                                         .copy_mode = MIRROR_COPY_MODE_WRITE_BLOCKING};
        result = commit_start(bench->jobs, &args, &error);
    } else {
        struct action action;
        struct blockdev_mirror args = {
            .job_id = "j",
            .device = "a",
            .target = "b",
            .sync = scene->way == WAY_MIRROR_UNITS ? MIRROR_SYNC_MODE_TOP : MIRROR_SYNC_MODE_FULL,
            .speed = SPEED,
            .has_switch_after = true,
            .has_switch_ratio = true,
            .has_on_source_error = true,
            .on_source_error = BLOCKDEV_ON_ERROR_IGNORE,
            .copy_mode =
                scene->way == WAY_MIRROR_SWITCHED ? MIRROR_COPY_MODE_BACKGROUND : MIRROR_COPY_MODE_WRITE_BLOCKING};
        mirror_action(&action, bench->jobs, &args, NULL);
        result = actions_run(bench->graph, &action, 1, &error);
    }
    if (result < 0) {
        g_error("%s", error->message);
    }
}

static void job_figures(struct scene *scene, int64_t *ret_done, int64_t *ret_total)
{
    struct block_job_info_list *list = jobs_query_block(scene->bench.jobs);
    g_assert_cmpuint(list->count, ==, 1);
    *ret_done = list->items[0]->offset;
    *ret_total = list->items[0]->len;
    block_job_info_list_free(list);
}

/* Where the copy is, for moments. */
static void coroutine_fn failer_entry(void *argument)
{
    struct scene *scene = argument;
    struct memory_faults *faults = bench_faults(scene->node);
    struct loop_sleep sleep = {0};
    int64_t done, total;
    while (!atomic_load(&scene->stop)) {
        job_figures(scene, &done, &total);
        faults->at = (uint64_t)done + loop_random() % (SPEED / 10);
        faults->status_error = -EIO;
        loop_sleep_ns(&sleep, (int64_t)(loop_random() % 50000));
        faults->status_error = 0;
        loop_sleep_ns(&sleep, (int64_t)(loop_random() % 100000));
    }
    co_group_leave(&scene->writers);
}

/* Both sides are written from when this has returned. */
static void coroutine_fn both_begin(struct scene *scene)
{
    struct block_job_change_options options = {
        .id = "j", .type = JOB_TYPE_MIRROR, .u.mirror.copy_mode = MIRROR_COPY_MODE_WRITE_BLOCKING};
    if (scene->way == WAY_MIRROR_SWITCHED) {
        bench_sleep_ms((unsigned)(PASS_NS / 1000000 * 3 / 2));
        struct job *job = jobs_find(scene->bench.jobs, "j");
        g_assert_cmpint(job->status, ==, JOB_STATUS_RUNNING); /* it would never be ready */
        g_assert_cmpint(job_change(job, &options, NULL), ==, 0);
    }
    bench_sleep_ms(20); /* what had begun before has ended; all has been looked through */
    if (scene->way == WAY_MIRROR_FAILING) {
        co_group_enter(&scene->writers);
        coroutine_enter(coroutine_create(failer_entry, scene));
    }
}

static void coroutine_fn job_end(struct scene *scene)
{
    guest_rest(scene);
    for (uint64_t at = 0; at < SIZE; at += TEST_CLUSTER) { /* the same, without a pass since */
        g_assert_cmpuint(bench_byte(scene->node, at), ==, bench_byte(scene->target, at));
        g_assert_cmpuint(bench_byte(scene->node, at + TEST_CLUSTER - 1), ==,
                         bench_byte(scene->target, at + TEST_CLUSTER - 1));
    }
    g_assert_cmpint(job_complete(jobs_find(scene->bench.jobs, "j"), NULL), ==, 0);
    bench_await(&scene->bench, "j", JOB_STATUS_NULL);
    g_assert_true(backend_node(scene->guest) == scene->target);
}

static void coroutine_fn scene_play(void *argument)
{
    struct scene *scene = argument;
    int64_t done, total;
    for (unsigned i = 0; i < LOOPS; i++) {
        g_assert_cmpint(loop_thread_start("guest", ENGINE_SIM, &scene->loops[i], NULL), ==, 0);
    }
    bench_open(&scene->bench, 2, SIZE);
    scene->node = scene->bench.nodes[1];
    scene->target = scene->way == WAY_COMMIT ? scene->bench.nodes[0] : bench_add(&scene->bench, SIZE);
    scene->node->discard = scene->way == WAY_MIRROR_DISCARDS;
    scene->target->limits.cluster_size *= scene->way == WAY_MIRROR_UNITS ? 2 : 1;
    bench_fill(scene->node, 0, SIZE, 0x11);
    guest_begin(scene);
    job_begin(scene);
    both_begin(scene);
    int64_t before = loop_clock_ns();
    job_figures(scene, &done, &total);
    g_assert_cmpint(done, <, total);
    g_assert_cmpint(total - done, <=, SIZE + SPEED);
    int64_t left_ns = (int64_t)((double)(total - done) / SPEED * 1e9);
    bench_await(&scene->bench, "j", JOB_STATUS_READY);
    int64_t took = loop_clock_ns() - before;
    g_test_message("READY after %d ms of %d", (int)(took / 1000000), (int)(left_ns / 1000000));
    int64_t done_then, total_then;
    job_figures(scene, &done_then, &total_then);
    g_assert_cmpint(total_then, ==, total); /* nothing became dirty again, */
    g_assert_cmpint(done_then, ==, total);  /* all was copied once */
    if (scene->way != WAY_MIRROR_FAILING) {
        g_assert_cmpint(took, <, left_ns + SLACK_NS);
    }
    g_assert_cmpint(took, >, left_ns / 2); /* the limit was one */
    job_end(scene);
    backend_destroy(scene->guest);
    operation_end(scene->operation);
    bench_close(&scene->bench);
    for (unsigned i = 0; i < LOOPS; i++) {
        loop_thread_join(scene->loops[i]);
    }
}

static void every_region_is_copied_once(gconstpointer way)
{
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        struct sim_config config = {.seed = seed, .preempt_percent = seed % 3 * 10};
        struct scene scene = {.way = (enum way)GPOINTER_TO_UINT(way)};
        struct sim *sim = sim_create(&config);
        struct loop *loop;
        g_test_message("seed %u", (unsigned)seed);
        g_assert_cmpint(loop_create(ENGINE_SIM, &loop, NULL), ==, 0);
        loop_run_coroutine(loop, scene_play, &scene);
        loop_destroy(loop);
        sim_destroy(sim);
    }
}

int main(int argc, char **argv)
{
    static const char *const names[WAYS] = {"/converge/mirror",         "/converge/mirror-switched",
                                            "/converge/mirror-units",   "/converge/mirror-discards",
                                            "/converge/mirror-failing", "/converge/active-commit"};
    g_test_init(&argc, &argv, NULL);
    for (unsigned way = 0; way < WAYS; way++) {
        g_test_add_data_func(names[way], GUINT_TO_POINTER(way), every_region_is_copied_once);
    }
    return g_test_run();
}

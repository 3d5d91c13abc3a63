/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Jobs that meet, while guests on other threads write and verify: both orders of ending, and random rounds. */
#include "base/size.h"
#include "job/chain_testing.h"
#include "job/change_backing.h"
#include "job/commit.h"
#include "job/resize.h"
#include "job/stream.h"
#include "loop/sim.h"
#include <errno.h>

#define SIZE (48 * TEST_CLUSTER - 512)
#define ROUNDS_DEFAULT 60

static struct loop *control_loop, *guest_loop;

static void run(gconstpointer body)
{
    loop_run_coroutine(control_loop, (void (*)(void *))body, NULL);
}

static struct job *begin_commit(struct test_bench *bench, const char *id, const char *top, const char *base)
{
    struct block_commit_args args = {
        .job_id = (char *)id, .device = (char *)top, .base_node = (char *)base, .has_auto_finalize = true};
    auto_error error = NULL;
    if (commit_start(bench->jobs, &args, &error) < 0) {
        g_error("%s", error->message);
    }
    return jobs_find(bench->jobs, id);
}

static struct job *begin_stream(struct test_bench *bench, const char *id, const char *node, const char *base)
{
    struct block_stream_args args = {
        .job_id = (char *)id, .device = (char *)node, .base_node = (char *)base, .has_auto_finalize = true};
    auto_error error = NULL;
    if (stream_start(bench->jobs, &args, &error) < 0) {
        g_error("%s", error->message);
    }
    return jobs_find(bench->jobs, id);
}

/* One pair of jobs on base <- a <- b <- c <- d, each done but for its last step; then they end in the given order. */
struct pair {
    bool stream[2];
    const char *upper[2], *lower[2]; /* lower NULL: nothing */
    const char *chain;               /* what d leans on at the end, in order */
};

static struct job *begin(struct test_bench *bench, const struct pair *pair, unsigned which)
{
    const char *ids[] = {"first", "second"};
    return pair->stream[which] ? begin_stream(bench, ids[which], pair->upper[which], pair->lower[which])
                               : begin_commit(bench, ids[which], pair->upper[which], pair->lower[which]);
}

static char *chain_text(struct node *node)
{
    GString *text = g_string_new(node->name);
    while ((node = node_backing(node))) {
        g_string_append_printf(text, " %s", node->name);
    }
    return g_string_free(text, FALSE);
}

static void run_pair(const struct pair *pair, bool reversed, bool cancel_one)
{
    struct test_bench bench;
    bench_open(&bench, 5, SIZE);
    struct guest *guest = guest_start(&bench, bench.nodes[4], guest_loop, false);
    struct job *jobs[] = {begin(&bench, pair, 0), begin(&bench, pair, 1)};
    bench_await(&bench, "first", JOB_STATUS_PENDING);
    bench_await(&bench, "second", JOB_STATUS_PENDING);
    if (cancel_one) {
        job_cancel(jobs[!reversed], true, NULL);
        bench_await(&bench, reversed ? "first" : "second", JOB_STATUS_NULL);
    } else {
        g_assert_cmpint(job_finalize(jobs[reversed], NULL), ==, 0);
    }
    bench_sleep_ms(2);
    g_assert_cmpint(job_finalize(jobs[cancel_one ? reversed : !reversed], NULL), ==, 0);
    g_autofree char *events = bench_events(&bench);
    g_assert_null(strstr(events, "BLOCK_JOB_ERROR"));
    if (!cancel_one) {
        if (strstr(events, "aborting")) {
            g_error("%s", events);
        }
        g_autofree char *chain = chain_text(bench.nodes[4]);
        g_assert_cmpstr(chain, ==, pair->chain);
        g_autofree char *string =
            node_backing(bench.nodes[4]) ? g_strdup_printf("%s.img", node_backing(bench.nodes[4])->name) : NULL;
        g_assert_cmpstr(bench_disk_backing(bench.nodes[4]), ==, string);
    }
    guest_finish(guest);
    bench_close(&bench);
}

static const struct pair pairs[] = {
    {{false, true}, {"a", "c"}, {"base", "a"}, "d c base"},  {{false, true}, {"c", "d"}, {"b", "base"}, "d base"},
    {{false, true}, {"a", "d"}, {"base", "base"}, "d base"}, {{false, true}, {"b", "c"}, {"base", "b"}, "d c base"},
    {{false, true}, {"c", "b"}, {"b", NULL}, "d b"},         {{false, true}, {"c", "d"}, {"a", NULL}, "d"},
    {{false, false}, {"a", "c"}, {"base", "b"}, "d b base"}, {{true, true}, {"d", "b"}, {"b", NULL}, "d b"},
    {{true, true}, {"c", "a"}, {"a", NULL}, "d c a"},        {{true, true}, {"d", "c"}, {NULL, "a"}, "d"},
    {{true, true}, {"d", "b"}, {NULL, NULL}, "d"},           {{true, true}, {"d", "a"}, {"b", NULL}, "d b a"},
};

static void pairs_in_both_orders(void *unused)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(pairs); i++) {
        g_test_message("pair %u", i);
        for (unsigned how = 0; how < 4; how++) {
            run_pair(&pairs[i], how & 1, how & 2);
        }
    }
}

/* An active commit with a guest on it, beside a stream below; then the guest lives on base. */
static void active_commit_over_a_stream(void *unused)
{
    for (unsigned round = 0; round < 4; round++) {
        struct test_bench bench;
        bench_open(&bench, 5, SIZE);
        struct guest *guest = guest_start(&bench, bench.nodes[4], guest_loop, false);
        struct job *stream = begin_stream(&bench, "stream", "b", round & 2 ? "base" : NULL);
        struct job *commit = begin_commit(&bench, "commit", "d", "c");
        bench_await(&bench, "commit", JOB_STATUS_READY);
        bench_await(&bench, "stream", JOB_STATUS_PENDING);
        if (round & 1) {
            g_assert_cmpint(job_finalize(stream, NULL), ==, 0);
        }
        g_assert_cmpint(job_complete(commit, NULL), ==, 0);
        bench_await(&bench, "commit", JOB_STATUS_PENDING);
        bench_sleep_ms(5);
        g_assert_cmpint(job_finalize(commit, NULL), ==, 0);
        g_assert_true(backend_node(guest->backend) == bench.nodes[3]);
        bench_sleep_ms(5);
        if (!(round & 1)) {
            g_assert_cmpint(job_finalize(stream, NULL), ==, 0);
        }
        guest_finish(guest);
        bench_close(&bench);
    }
}

static void finalize_entry(void *argument)
{
    job_finalize(argument, NULL);
}

/* A client that leaves while an active commit makes its last step does not make it fail. */
static void a_client_leaves_in_the_last_step(void *unused)
{
    for (unsigned round = 0; round < 12; round++) {
        struct test_bench bench;
        bench_open(&bench, 3, SIZE);
        struct guest *guest = guest_start(&bench, bench.nodes[2], guest_loop, true);
        struct job *commit = begin_commit(&bench, "commit", "b", "a");
        bench_await(&bench, "commit", JOB_STATUS_READY);
        g_assert_cmpint(job_complete(commit, NULL), ==, 0);
        bench_await(&bench, "commit", JOB_STATUS_PENDING);
        guest_stop(guest);
        loop_spawn(control_loop, finalize_entry, commit);
        for (unsigned i = 0; i < round; i++) {
            coroutine_pause();
        }
        guest_leave(guest);
        bench_await(&bench, "commit", JOB_STATUS_NULL);
        g_autofree char *events = bench_events(&bench);
        if (strstr(events, "aborting")) {
            g_error("round %u: %s", round, events);
        }
        bench_close(&bench);
    }
}

/* A commit takes away the whole range of a stream inside another one's: what is left of it brings nothing in. */
static void a_commit_empties_a_nested_stream(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 5, SIZE);
    struct guest *guest = guest_start(&bench, bench.nodes[4], guest_loop, false);
    struct job *outer = begin_stream(&bench, "outer", "d", "base"), *inner = begin_stream(&bench, "inner", "b", "base");
    struct job *commit = begin_commit(&bench, "commit", "a", "base");
    bench_await(&bench, "outer", JOB_STATUS_PENDING);
    bench_await(&bench, "inner", JOB_STATUS_PENDING);
    bench_await(&bench, "commit", JOB_STATUS_PENDING);
    g_assert_cmpint(job_finalize(commit, NULL), ==, 0);
    g_assert_cmpint(job_finalize(inner, NULL), ==, 0);
    g_assert_cmpint(job_finalize(outer, NULL), ==, 0);
    g_autofree char *events = bench_events(&bench), *chain = chain_text(bench.nodes[4]);
    g_assert_null(strstr(events, "aborting"));
    g_assert_cmpstr(chain, ==, "d base");
    guest_finish(guest);
    bench_close(&bench);
}

/* What the peer's rules and ours refuse: nothing has changed, and the refusal says who. */
static void refusals(void *unused)
{
    static const struct pair refused[] = {
        {{false, false}, {"c", "b"}, {"b", "a"}, NULL},    {{false, false}, {"a", "b"}, {"base", "base"}, NULL},
        {{false, false}, {"c", "c"}, {"a", "b"}, NULL},    {{false, false}, {"d", "b"}, {"a", "base"}, NULL},
        {{true, true}, {"b", "d"}, {NULL, "a"}, NULL},     {{true, true}, {"c", "d"}, {"a", "b"}, NULL},
        {{false, true}, {"b", "d"}, {"base", "a"}, NULL},  {{false, true}, {"c", "b"}, {"a", "base"}, NULL},
        {{false, true}, {"b", "b"}, {"base", NULL}, NULL},
    };
    for (unsigned i = 0; i < 2 * G_N_ELEMENTS(refused); i++) {
        struct test_bench bench;
        const struct pair *pair = &refused[i / 2];
        unsigned second = i % 2 == 0;
        bench_open(&bench, 5, SIZE);
        begin(&bench, pair, !second);
        struct error *error = NULL;
        struct block_commit_args commit = {
            .job_id = (char *)"x", .device = (char *)pair->upper[second], .base_node = (char *)pair->lower[second]};
        struct block_stream_args stream = {
            .job_id = (char *)"x", .device = (char *)pair->upper[second], .base_node = (char *)pair->lower[second]};
        int result = pair->stream[second] ? stream_start(bench.jobs, &stream, &error)
                                          : commit_start(bench.jobs, &commit, &error);
        g_assert_cmpint(result, ==, -EBUSY);
        g_assert_nonnull(strstr(error->message, second ? "first" : "second"));
        error_free(error);
        bench_close(&bench);
    }
}

/* Below a stream's feet the node does not get shorter; longer it may get. */
static void a_stream_is_not_cut_short(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 3, SIZE);
    struct job *stream = begin_stream(&bench, "stream", "b", NULL);
    struct block_resize_args shrink = {.node_name = (char *)"b", .size = SIZE / 2},
                             grow = {.node_name = (char *)"b", .size = SIZE + 512};
    auto_error error = NULL;
    g_assert_cmpint(resize_node(bench.graph, &shrink, &error), ==, -EBUSY);
    g_assert_nonnull(strstr(error->message, "block-stream stream"));
    g_assert_cmpint(resize_node(bench.graph, &grow, NULL), ==, 0);
    bench_await(&bench, "stream", JOB_STATUS_PENDING);
    g_assert_cmpint(job_finalize(stream, NULL), ==, 0);
    bench_close(&bench);
}

/* The name of a backing file is for the image that was there when the command came. */
static void a_name_does_not_outlive_its_image(void *unused)
{
    unsigned refused = 0;
    for (unsigned round = 0; round < 12; round++) {
        struct test_bench bench;
        bench_open(&bench, 3, SIZE);
        struct job *stream = begin_stream(&bench, "stream", "b", "base");
        struct change_backing_file_args args = {
            .device = (char *)"b", .image_node_name = (char *)"b", .backing_file = (char *)"other-name-of-a.img"};
        bench_await(&bench, "stream", JOB_STATUS_PENDING);
        loop_spawn(control_loop, finalize_entry, stream);
        for (unsigned i = 0; i < round; i++) {
            coroutine_pause();
        }
        bool leant_on_a = node_backing(bench.nodes[2]) == bench.nodes[1];
        int result = change_backing_file(bench.graph, &args, NULL);
        bench_await(&bench, "stream", JOB_STATUS_NULL);
        refused += result == -EBUSY;
        g_assert_true(!leant_on_a || result == -EBUSY);
        g_assert_true(node_backing(bench.nodes[2]) == bench.nodes[0]);
        if (leant_on_a) {
            g_assert_cmpstr(bench_disk_backing(bench.nodes[2]), ==, "base.img");
        }
        bench_close(&bench);
    }
    g_assert_cmpuint(refused, >, 0);
}

/* The same for a commit into "the end of the chain", while a stream cuts that off: the name was given for base. */
static void a_commit_does_not_give_a_name_to_another_base(void *unused)
{
    unsigned refused = 0;
    for (unsigned round = 0; round < 12; round++) {
        struct test_bench bench;
        bench_open(&bench, 4, SIZE);
        struct job *stream = begin_stream(&bench, "stream", "a", NULL);
        struct block_commit_args args = {.job_id = (char *)"commit",
                                         .device = (char *)"c",
                                         .top_node = (char *)"b",
                                         .backing_file = (char *)"other-name-of-base.img"};
        bench_await(&bench, "stream", JOB_STATUS_PENDING);
        loop_spawn(control_loop, finalize_entry, stream);
        for (unsigned i = 0; i < round; i++) {
            coroutine_pause();
        }
        bool whole = node_backing(bench.nodes[1]) == bench.nodes[0];
        int result = commit_start(bench.jobs, &args, NULL);
        refused += result == -EBUSY;
        g_assert_true(!whole || result == -EBUSY);
        bench_await(&bench, "stream", JOB_STATUS_NULL);
        bench_await(&bench, "commit", JOB_STATUS_NULL);
        if (whole) {
            g_assert_cmpstr(bench_disk_backing(bench.nodes[3]), ==, "b.img");
        }
        bench_close(&bench);
    }
    g_assert_cmpuint(refused, >, 0);
}

/* --- random rounds --- */

static void try_start(struct test_bench *bench, unsigned number)
{
    static const char *const names[] = {"base", "a", "b", "c", "d", "e"};
    g_autofree char *id = g_strdup_printf("j%u", number);
    auto_error error = NULL;
    unsigned top = (unsigned)g_test_rand_int_range(0, (gint32)bench->count);
    unsigned base = top ? (unsigned)g_test_rand_int_range(0, (gint32)top) : 0;
    static const int64_t speeds[] = {0, 0, 0, 1, 1 << 20, 64 << 20};
    int64_t speed = speeds[g_test_rand_int_range(0, G_N_ELEMENTS(speeds))];
    bool finalize = g_test_rand_int_range(0, 4) > 0;
    if (g_test_rand_bit()) {
        struct block_commit_args args = {.job_id = id,
                                         .device = (char *)names[top],
                                         .base_node = (char *)names[base],
                                         .has_speed = true,
                                         .speed = speed,
                                         .has_auto_finalize = true,
                                         .auto_finalize = finalize};
        commit_start(bench->jobs, &args, &error);
    } else {
        struct block_stream_args args = {.job_id = id,
                                         .device = (char *)names[top],
                                         .base_node = top && g_test_rand_int_range(0, 3) ? (char *)names[base] : NULL,
                                         .has_speed = true,
                                         .speed = speed,
                                         .has_auto_finalize = true,
                                         .auto_finalize = finalize};
        stream_start(bench->jobs, &args, &error);
    }
}

static void coroutine_fn try_verb(struct test_bench *bench, unsigned number)
{
    g_autofree char *id = g_strdup_printf("j%u", (unsigned)g_test_rand_int_range(0, (gint32)number + 1));
    struct job *job = jobs_find(bench->jobs, id);
    if (!job) {
        return;
    }
    auto_error error = NULL;
    switch (g_test_rand_int_range(0, 7)) {
    case 0:
        job_pause(job, &error);
        break;
    case 1:
        job_resume(job, &error);
        break;
    case 2:
        job_set_speed(job, g_test_rand_bit() ? 0 : g_test_rand_int_range(1, 1 << 24), &error);
        break;
    case 3:
        job_complete(job, &error);
        break;
    case 4:
    case 5:
        job_finalize(job, &error);
        break;
    case 6:
        if (g_test_rand_int_range(0, 3) == 0) {
            job_cancel(job, g_test_rand_bit(), &error);
        }
        break;
    }
}

static void random_rounds(void *unused)
{
    const char *wanted = g_getenv("INTERLOCK_ROUNDS");
    unsigned rounds = wanted ? (unsigned)g_ascii_strtoull(wanted, NULL, 10) : ROUNDS_DEFAULT;
    for (unsigned round = 0; round < rounds; round++) {
        struct test_bench bench;
        bench_open(&bench, (unsigned)g_test_rand_int_range(3, 7), SIZE);
        struct node *top = bench.nodes[bench.count - 1];
        struct guest *guest = guest_start(&bench, top, guest_loop, false);
        unsigned number = 0;
        for (unsigned step = 0; step < 40; step++) {
            if (g_test_rand_int_range(0, 3) == 0) {
                try_start(&bench, number++);
            } else {
                try_verb(&bench, number);
            }
            bench_sleep_ms((unsigned)g_test_rand_int_range(0, 3));
        }
        if (g_test_rand_bit()) {
            jobs_cancel_all_and_wait(bench.jobs);
        }
        guest_finish(guest);
        g_autofree char *events = bench_events(&bench);
        if (strstr(events, "BLOCK_JOB_ERROR") || strstr(events, "COMPLETED j0 intact") ||
            strstr(events, "COMPLETED j0 partial")) {
            g_error("%s", events);
        }
        bench_close(&bench);
    }
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*body)(void *);
    } tests[] = {
        {"/job-meet/pairs-in-both-orders", pairs_in_both_orders},
        {"/job-meet/active-commit-over-a-stream", active_commit_over_a_stream},
        {"/job-meet/a-commit-empties-a-nested-stream", a_commit_empties_a_nested_stream},
        {"/job-meet/a-client-leaves-in-the-last-step", a_client_leaves_in_the_last_step},
        {"/job-meet/refusals", refusals},
        {"/job-meet/a-stream-is-not-cut-short", a_stream_is_not_cut_short},
        {"/job-meet/a-name-does-not-outlive-its-image", a_name_does_not_outlive_its_image},
        {"/job-meet/a-commit-does-not-give-a-name-to-another-base", a_commit_does_not_give_a_name_to_another_base},
        {"/job-meet/random-rounds", random_rounds},
    };
    g_test_init(&argc, &argv, NULL);
    sim_create_if_asked();
    g_assert_cmpint(loop_create(ENGINE_AUTO, &control_loop, NULL), ==, 0);
    g_assert_cmpint(loop_thread_start("guest", ENGINE_AUTO, &guest_loop, NULL), ==, 0);
    for (unsigned i = 0; i < G_N_ELEMENTS(tests); i++) {
        g_test_add_data_func(tests[i].name, tests[i].body, run);
    }
    int result = g_test_run();
    loop_thread_join(guest_loop);
    loop_destroy(control_loop);
    return result;
}

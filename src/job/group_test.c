/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Jobs that end together or not at all: toys with errors and cancels at every step. */
#include "job/chain_testing.h"
#include "job/policy.h"
#include "loop/sim.h"
#include <errno.h>

#define JOBS 3

/* What a toy does, and has done. */
struct toy {
    unsigned run_ms, prepare_ms;
    int run_error, prepare_error;
    bool committed, aborted;
    GString *log; /* the ids of those that prepared, in order */
};

static struct loop *control_loop;

static int coroutine_fn toy_run(struct job *job, struct error **err)
{
    struct toy *toy = job->state;
    for (unsigned i = 0; i < toy->run_ms && !job->control.cancelled; i++) {
        job_idle(job, 1000000);
    }
    return job->control.cancelled ? -ECANCELED : toy->run_error;
}

static int coroutine_fn toy_prepare(struct job *job, struct error **err)
{
    struct toy *toy = job->state;
    g_string_append_printf(toy->log, "%s", job->id);
    bench_sleep_ms(toy->prepare_ms);
    return job->control.cancelled ? -ECANCELED : toy->prepare_error;
}

static void coroutine_fn toy_commit(struct job *job)
{
    struct toy *toy = job->state;
    g_assert_false(toy->committed || toy->aborted);
    toy->committed = true;
}

static void coroutine_fn toy_abort(struct job *job)
{
    struct toy *toy = job->state;
    g_assert_false(toy->committed || toy->aborted);
    toy->aborted = true;
}

static void coroutine_fn toy_clean(struct job *job)
{
}

static enum job_target_state toy_target_state(struct job *job)
{
    return job->result == 0 ? JOB_TARGET_STATE_COMPLETE : JOB_TARGET_STATE_UNCHANGED;
}

static const struct job_policy can_take_back = {.type = JOB_TYPE_BACKUP,
                                                .run = toy_run,
                                                .prepare = toy_prepare,
                                                .commit = toy_commit,
                                                .abort = toy_abort,
                                                .clean = toy_clean,
                                                .target_state = toy_target_state};
static const struct job_policy final = {
    .type = JOB_TYPE_MIRROR, .run = toy_run, .prepare = toy_prepare, .abort = toy_abort, .clean = toy_clean};

struct round {
    const char *name;
    struct {
        bool final, manual;
        struct toy toy;
    } jobs[JOBS];
    int cancel; /* the job that is cancelled, or -1 */
    unsigned after_ms;
    bool finalize;       /* the last job is told to, once it is pending */
    const char *log;     /* NULL: not compared */
    const char *ends[3]; /* COMPLETED, CANCELLED, or COMPLETED with an error */
};

static const char *const ids[JOBS] = {"a", "b", "c"};

static struct job *toy_start(struct test_bench *bench, const struct round *round, unsigned i, struct job_group *group,
                             struct toy *toy)
{
    struct job_config config = {
        .id = ids[i], .auto_finalize = !round->jobs[i].manual, .auto_dismiss = true, .group = group};
    struct job *job = job_create(bench->jobs, round->jobs[i].final ? &final : &can_take_back, &config);
    job->state = toy;
    return job;
}

static void expect_ends(struct test_bench *bench, const struct round *round)
{
    g_autofree char *events = bench_events(bench);
    for (unsigned i = 0; i < JOBS; i++) {
        g_autofree char *completed = g_strdup_printf("BLOCK_JOB_COMPLETED %s", ids[i]);
        g_autofree char *cancelled = g_strdup_printf("BLOCK_JOB_CANCELLED %s", ids[i]);
        const char *end = strstr(events, completed), *stop = strstr(events, cancelled);
        g_assert_true(!end != !stop); /* one of them, */
        const char *only = end ? end : stop;
        g_assert_null(strstr(only + 1, completed)); /* once */
        g_assert_null(strstr(only + 1, cancelled));
        g_autofree char *line = g_strndup(only, strcspn(only, ";"));
        g_autofree char *expected = g_strdup_printf("BLOCK_JOB_%s", round->ends[i]);
        if (!g_pattern_match_simple(expected, line)) {
            g_error("%s: '%s' is not '%s'; all: %s", round->name, line, expected, events);
        }
    }
}

static void run_round(const struct round *round)
{
    struct test_bench bench;
    bench_open(&bench, 1, TEST_CLUSTER);
    g_autoptr(GString) log = g_string_new("");
    struct toy toys[JOBS];
    struct job_group *group = job_group_create();
    struct job *jobs[JOBS];
    for (unsigned i = 0; i < JOBS; i++) {
        toys[i] = round->jobs[i].toy;
        toys[i].log = log;
        jobs[i] = toy_start(&bench, round, i, group, &toys[i]);
    }
    g_autofree char *none = bench_events(&bench);
    g_assert_cmpstr(none, ==, ""); /* nobody has heard of them */
    for (unsigned i = 0; i < JOBS; i++) {
        job_start(jobs[i]);
    }
    bench_sleep_ms(2);
    job_group_close(group);
    bench_sleep_ms(round->after_ms);
    if (round->cancel >= 0) {
        g_assert_cmpint(job_cancel(jobs_find(bench.jobs, ids[round->cancel]), true, NULL), ==, 0);
    }
    if (round->finalize) {
        bench_await(&bench, ids[JOBS - 1], JOB_STATUS_PENDING);
        bench_sleep_ms(5);
        g_assert_cmpstr(log->str, ==, "");
        job_finalize(jobs_find(bench.jobs, ids[JOBS - 1]), NULL);
    }
    for (unsigned i = 0; i < JOBS; i++) {
        bench_await(&bench, ids[i], JOB_STATUS_NULL);
    }
    if (round->log) {
        g_assert_cmpstr(log->str, ==, round->log);
    }
    expect_ends(&bench, round);
    for (unsigned i = 0; i < JOBS; i++) {
        bool well = !strstr(round->ends[i], "error") && g_str_has_prefix(round->ends[i], "COMPLETED");
        g_assert_true(toys[i].committed == (well && !round->jobs[i].final));
        g_assert_true(toys[i].aborted == !well);
    }
    bench_close(&bench);
}

#define ALL_WELL                                                               \
    {                                                                          \
        "COMPLETED ? complete", "COMPLETED ? complete", "COMPLETED ? complete" \
    }
#define ALL_CANCELLED                               \
    {                                               \
        "CANCELLED *", "CANCELLED *", "CANCELLED *" \
    }
static const struct round rounds[] = {
    {"all well", {{0}, {0}, {0}}, -1, 0, false, "abc", ALL_WELL},
    {"the slow one is waited for", {{0}, {.toy = {.run_ms = 30}}, {0}}, -1, 0, false, "abc", ALL_WELL},
    {"what is final comes last",
     {{.final = true}, {0}, {0}},
     -1,
     0,
     false,
     "bca",
     {"COMPLETED ?", "COMPLETED ? complete", "COMPLETED ? complete"}},
    {"one fails while others wait",
     {{0}, {.toy = {.run_ms = 20, .run_error = -EIO}}, {0}},
     -1,
     0,
     false,
     "",
     {"CANCELLED ? unchanged", "COMPLETED ? Input/output error unchanged", "CANCELLED ? unchanged"}},
    {"one fails while others run",
     {{.toy = {.run_ms = 3000}}, {.toy = {.run_error = -EIO}}, {.toy = {.run_ms = 3000}}},
     -1,
     0,
     false,
     NULL,
     {"CANCELLED *", "COMPLETED ? Input/output error*", "CANCELLED *"}},
    {"one is cancelled while it waits", {{0}, {.toy = {.run_ms = 3000}}, {0}}, 0, 10, false, NULL, ALL_CANCELLED},
    {"the one that others wait for is cancelled",
     {{0}, {.toy = {.run_ms = 3000}}, {0}},
     1,
     10,
     false,
     NULL,
     ALL_CANCELLED},
    {"a prepare fails",
     {{0}, {.toy = {.prepare_error = -EIO}}, {0}},
     -1,
     0,
     false,
     "ab",
     {"CANCELLED *", "COMPLETED ? Input/output error*", "CANCELLED *"}},
    {"the final step fails: the others are taken back",
     {{0}, {.final = true, .toy = {.prepare_error = -EIO}}, {0}},
     -1,
     0,
     false,
     "acb",
     {"CANCELLED *", "COMPLETED ? Input/output error*", "CANCELLED *"}},
    {"a cancel during another's final step comes too late",
     {{0}, {.final = true, .toy = {.prepare_ms = 40}}, {0}},
     0,
     20,
     false,
     "acb",
     {"COMPLETED ? complete", "COMPLETED ?", "COMPLETED ? complete"}},
    {"a cancel of the one in its final step",
     {{0}, {.final = true, .toy = {.prepare_ms = 40}}, {0}},
     1,
     20,
     false,
     "acb",
     ALL_CANCELLED},
    {"a cancel while another prepares", {{.toy = {.prepare_ms = 40}}, {0}, {0}}, 2, 20, false, NULL, ALL_CANCELLED},
    {"the second final step fails alone",
     {{.final = true}, {.final = true, .toy = {.prepare_error = -EIO}}, {0}},
     -1,
     0,
     false,
     NULL,
     {"COMPLETED ?", "COMPLETED ? Input/output error", "COMPLETED ? complete"}},
    {"one finalize for all", {{.manual = true}, {0}, {.manual = true}}, -1, 0, true, "abc", ALL_WELL},
    {"a cancel while pending", {{.manual = true}, {0}, {0}}, 2, 20, false, "", ALL_CANCELLED},
};

static void all_or_none(void *unused)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(rounds); i++) {
        g_test_message("%s", rounds[i].name);
        run_round(&rounds[i]);
    }
}

/* The transaction that was to start them failed: nobody hears of them, and their ids are free again. */
static void what_is_discarded_has_never_been(void *unused)
{
    static const struct round round = {.name = "discarded"};
    struct test_bench bench;
    bench_open(&bench, 1, TEST_CLUSTER);
    struct job_group *group = job_group_create();
    struct job *job = toy_start(&bench, &round, 0, group, NULL);
    struct error *error = NULL;
    g_assert_cmpint(job_check_id(bench.jobs, "a", &error), <, 0);
    error_free(error);
    struct job_info_list *list = jobs_query(bench.jobs);
    g_assert_cmpuint(list->count, ==, 0);
    job_info_list_free(list);
    g_assert_cmpint(job_cancel(job, true, NULL), <, 0);
    job_discard(job);
    job_group_close(group);
    g_assert_cmpint(job_check_id(bench.jobs, "a", NULL), ==, 0);
    g_autofree char *events = bench_events(&bench);
    g_assert_cmpstr(events, ==, "");
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
    g_test_add_data_func("/group/all-or-none", all_or_none, run);
    g_test_add_data_func("/group/what-is-discarded-has-never-been", what_is_discarded_has_never_been, run);
    int result = g_test_run();
    loop_destroy(control_loop);
    return result;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The crash engine: records what workloads do to their disks, and plays every crash (doc/crash.md).
 *
 *     crash [--seed N] [--workloads N] [--kind NAME] [--every N] [--mixed N] [--peer N] [--moved N] [--list]
 *
 * Workload number N runs the kind N modulo their number, with the seed N, in a process of its own: so an abort is that
 * one's finding. Ends with status 1 if there was a finding; each names the word to run it again by.
 */
#include "base/seeded.h"
#include "block/driver.h"
#include "driver/drivers.h"
#include "driver/filter/track.h"
#include "loop/loop.h"
#include "test/crash/replay.h"
#include "test/crash/workloads.h"
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static int first_seed = 1, count = 16, every = 1, mixed = 2, peer = 0, moved = 0;
static char *only_kind;
static gboolean list;

static const GOptionEntry entries[] = {
    {"seed", 's', 0, G_OPTION_ARG_INT, &first_seed, "number of the first workload (1)", "N"},
    {"workloads", 'n', 0, G_OPTION_ARG_INT, &count, "how many (16)", "N"},
    {"kind", 'k', 0, G_OPTION_ARG_STRING, &only_kind, "of this kind only", "NAME"},
    {"every", 'e', 0, G_OPTION_ARG_INT, &every, "look at every so many points only (1)", "N"},
    {"mixed", 'm', 0, G_OPTION_ARG_INT, &mixed, "crashes with mixed losses at each point (2)", "N"},
    {"peer", 'p', 0, G_OPTION_ARG_INT, &peer, "every so many crashes qemu-img checks too (0: never)", "N"},
    {"moved", 0, 0, G_OPTION_ARG_INT, &moved, "metadata writes of each workload that are written too early (0)", "N"},
    {"list", 0, 0, G_OPTION_ARG_NONE, &list, "list the kinds", NULL},
    {NULL}};

struct run {
    const struct workload *workload;
    uint64_t seed;
    struct scene scene;
    struct sim *sim;
    struct replay_counts *counts; /* shared with the parent */
    char *problem;
};

static void draw_traits(struct scene *scene, unsigned layers)
{
    struct traits *traits = &scene->traits;
    traits->version2 = scene_chance(scene, 10);
    traits->cluster_bits = 9 + scene_below(scene, 6);
    traits->refcount_bits = traits->version2 ? 16 : 1u << scene_below(scene, 7);
    traits->extended_l2 = !traits->version2 && scene_chance(scene, 25);
    traits->data_file = !traits->version2 && scene_chance(scene, 15);
    traits->data_file_raw = traits->data_file && layers == 1 && scene_chance(scene, 50);
    traits->zstd = !traits->version2 && scene_chance(scene, 50);
    traits->lazy = !traits->version2 && scene_chance(scene, 10);
    if (traits->extended_l2) {
        traits->cluster_bits = 14 + scene_below(scene, 2);
    }
    scene->sectors = scene->sectors_max = traits->cluster_bits < 12 ? 512 : 2048;
}

static void coroutine_fn record(void *argument)
{
    struct run *run = argument;
    scene_begin(&run->scene, run->workload->layers);
    run->workload->run(&run->scene);
    scene_end(&run->scene);
}

static void coroutine_fn replay(void *argument)
{
    struct run *run = argument;
    struct replay_config config = {.mixed = (unsigned)mixed, .every = (unsigned)every, .peer = (unsigned)peer};
    config.seed = run->seed;
    if (replay_all(&run->scene, run->sim, &config, run->counts, &run->problem) && moved) {
        replay_moved(&run->scene, run->sim, (unsigned)moved, run->seed, run->counts);
    }
}

static void in_world(struct run *run, void coroutine_fn (*main)(void *argument))
{
    struct sim_config config = {.seed = run->seed, .limit_ns = INT64_MAX / 2};
    struct loop *loop;
    run->scene.sim = run->sim = sim_create(&config);
    int code = loop_create(ENGINE_SIM, &loop, NULL);
    g_assert_cmpint(code, ==, 0);
    loop_run_coroutine(loop, main, run);
    loop_destroy(loop);
    sim_destroy(run->sim);
}

/* In the child. */
static int run_workload(struct run *run)
{
    run->scene.random = run->seed;
    draw_traits(&run->scene, run->workload->layers);
    if (run->workload->draw) {
        run->workload->draw(&run->scene);
    }
    in_world(run, record);
    in_world(run, replay);
    const struct traits *traits = &run->scene.traits;
    if (run->problem) {
        fprintf(stderr, "FOUND: --seed %d --workloads 1 (%s; clusters 2^%u, refcounts of %u bits%s%s%s%s%s): %s\n",
                (int)run->seed, run->workload->name, traits->cluster_bits, traits->refcount_bits,
                traits->version2 ? ", version 2" : "", traits->extended_l2 ? ", extended L2" : "",
                traits->data_file ? ", data file" : "", traits->data_file_raw ? " (raw)" : "",
                traits->lazy ? ", lazy refcounts" : "", run->problem);
    }
    return run->problem ? 1 : 0;
}

static bool run_child(const struct workload *workload, uint64_t seed, struct replay_counts *shared)
{
    struct run run = {.workload = workload, .seed = seed, .counts = shared};
    int status = 0;
    fflush(NULL);
    pid_t child = fork();
    g_assert(child >= 0);
    if (child == 0) {
        _exit(run_workload(&run));
    }
    waitpid(child, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status) > 1) {
        fprintf(stderr, "FOUND: --seed %d --workloads 1 (%s): ended with status %#x\n", (int)seed, workload->name,
                status);
    }
    return status == 0;
}

int main(int argc, char **argv)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(GOptionContext) context = g_option_context_new(NULL);
    static const struct driver *const drivers[] = {&driver_file, &driver_raw, &driver_qcow2};
    unsigned findings = 0, done = 0;

    g_option_context_add_main_entries(context, entries, NULL);
    if (!g_option_context_parse(context, &argc, &argv, &error)) {
        fprintf(stderr, "crash: %s\n", error->message);
        return 2;
    }
    for (unsigned i = 0; list && i < workload_count; i++) {
        printf("%s\n", workloads[i].name);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(drivers); i++) {
        driver_register(drivers[i]);
    }
    struct replay_counts *counts =
        mmap(NULL, sizeof(*counts), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    g_assert(counts != MAP_FAILED);
    for (int seed = first_seed; !list && done < (unsigned)count; seed++) {
        const struct workload *workload = &workloads[(unsigned)seed % workload_count];
        if (only_kind && strcmp(only_kind, workload->name) != 0) {
            continue;
        }
        findings += !run_child(workload, (uint64_t)seed, counts);
        done++;
    }
    printf("%u workloads, %" PRIu64 " points, %" PRIu64 " crashes (%" PRIu64 " images with leaks, %" PRIu64
           " usable bitmaps), %" PRIu64 " sectors compared, %u findings\n",
           done, counts->points, counts->crashes, counts->leaky, counts->bitmaps, counts->sectors, findings);
    if (moved) {
        printf("%" PRIu64 " metadata writes moved before a flush, %" PRIu64 " of them caught\n", counts->moved,
               counts->caught);
    }
    return findings ? 1 : 0;
}

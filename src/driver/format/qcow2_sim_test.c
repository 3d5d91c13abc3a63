/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * qcow2 on a simulated disk, by way of the file driver: two I/O threads write, zero, discard, read and flush one image
 * while the seed decides who goes on, in which order requests end, and how short they are. The power is cut at every
 * change of the file in turn. What is left is opened again, in a world of its own: each sector must be as it was at
 * some moment between its last acknowledged flush and the cut, and the peer must find leaks at most.
 *
 * A run is a child process: a power cut ends one. What a client was told stands in memory that both share.
 * QCOW2_SEED and QCOW2_CASES choose other runs than the short slice.
 */
#include "base/size.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/format/qcow2_create.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include "loop/sim.h"
#include <inttypes.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BLOCK = 4096, BLOCKS_MAX = 256, LOOPS = 2, WORKERS = 3, OPERATIONS = 14, VERSIONS_MAX = 250 };
#define DISK "/disk"

/* A child under TSan takes a while to start, and a second to end unless it is asked not to. */
#ifdef __SANITIZE_THREAD__
enum { CASES = 1 };
const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
    return "atexit_sleep_ms=0";
}
#else
enum { CASES = 6 };
#endif

struct block {
    uint8_t issued, completed, stable; /* versions; 0 is what was there before: zeroes */
    uint8_t zero[VERSIONS_MAX / 8 + 1];
};

/* Shared with the children. */
struct run {
    uint64_t seed, cut_at, size, blocks, changes;
    unsigned cluster_bits;
    struct block block[BLOCKS_MAX];
};

/* Of one process. */
struct scene {
    struct run *run;
    struct sim *sim;
    struct backend *backend;
    struct range_lock ranges;
    struct co_group workers;
};

static uint64_t below(uint64_t limit)
{
    return loop_random() % limit;
}

static void expected(const struct run *run, uint64_t index, unsigned version, uint8_t *to)
{
    uint64_t word = (index + 1) << 32 | version;

    if (version == 0 || (run->block[index].zero[version / 8] >> (version % 8) & 1)) {
        word = 0;
    }
    for (unsigned i = 0; i < BLOCK; i += 8) {
        memcpy(to + i, &word, 8);
    }
}

static void check_block(const struct run *run, uint64_t index, unsigned first, unsigned last, const uint8_t *content)
{
    unsigned good = 0;

    for (unsigned version = first; version <= last; version++) {
        uint8_t wanted[BLOCK];

        expected(run, index, version, wanted);
        for (unsigned sector = 0; sector < BLOCK / SIM_SECTOR; sector++) {
            if (!memcmp(wanted + sector * SIM_SECTOR, content + sector * SIM_SECTOR, SIM_SECTOR)) {
                good |= 1u << sector;
            }
        }
    }
    if (good != 0xff) {
        uint64_t word;

        memcpy(&word, content, sizeof(word));
        g_error("block %" PRIu64 " holds none of its versions %u to %u: good sectors %02x, first word %016" PRIx64,
                index, first, last, good, word);
    }
}

/* --- the clients --- */

static void issue(struct run *run, uint64_t first, uint64_t count, bool zero)
{
    for (uint64_t i = first; i < first + count; i++) {
        struct block *block = &run->block[i];

        g_assert_cmpuint(++block->issued, <, VERSIONS_MAX);
        if (zero) {
            block->zero[block->issued / 8] |= (uint8_t)(1u << (block->issued % 8));
        }
    }
}

static void complete(struct run *run, uint64_t first, uint64_t count, bool stable)
{
    for (uint64_t i = first; i < first + count; i++) {
        struct block *block = &run->block[i];

        block->completed = block->issued;
        block->stable = stable ? block->completed : block->stable;
    }
}

static void coroutine_fn do_flush(struct scene *scene)
{
    struct run *run = scene->run;
    uint8_t before[BLOCKS_MAX];

    for (uint64_t i = 0; i < run->blocks; i++) {
        before[i] = run->block[i].completed;
    }
    g_assert_cmpint(backend_flush(scene->backend), ==, 0);
    for (uint64_t i = 0; i < run->blocks; i++) {
        run->block[i].stable = MAX(run->block[i].stable, before[i]);
    }
}

static void coroutine_fn do_read(struct scene *scene, uint64_t first, uint64_t count)
{
    struct run *run = scene->run;
    g_autofree uint8_t *data = g_malloc(count * BLOCK);
    uint8_t before[BLOCKS_MAX];
    struct iovec iov = {data, count * BLOCK};

    for (uint64_t i = 0; i < count; i++) {
        before[i] = run->block[first + i].completed;
    }
    g_assert_cmpint(backend_read(scene->backend, first * BLOCK, count * BLOCK, buffers_one(&iov), 0), ==, 0);
    for (uint64_t i = 0; i < count; i++) {
        check_block(run, first + i, before[i], run->block[first + i].issued, data + i * BLOCK);
    }
}

static void coroutine_fn do_write(struct scene *scene, uint64_t first, uint64_t count)
{
    struct run *run = scene->run;
    g_autofree uint8_t *data = g_malloc(count * BLOCK);
    bool stable = below(10) == 0;
    struct iovec iov = {data, count * BLOCK};

    issue(run, first, count, false);
    for (uint64_t i = 0; i < count; i++) {
        expected(run, first + i, run->block[first + i].issued, data + i * BLOCK);
    }
    int code = backend_write(scene->backend, first * BLOCK, count * BLOCK, buffers_one(&iov), stable ? REQUEST_FUA : 0);

    g_assert_cmpint(code, ==, 0);
    complete(run, first, count, stable);
}

static void coroutine_fn do_zero(struct scene *scene, uint64_t first, uint64_t count, bool discard)
{
    int code;

    issue(scene->run, first, count, true);
    if (discard) {
        code = backend_discard(scene->backend, first * BLOCK, count * BLOCK);
    } else {
        unsigned flags = below(2) ? REQUEST_MAY_UNMAP : 0;

        code = backend_write_zeroes(scene->backend, first * BLOCK, count * BLOCK, flags);
    }
    g_assert_cmpint(code, ==, 0);
    complete(scene->run, first, count, false);
}

static void coroutine_fn do_operation(struct scene *scene)
{
    struct run *run = scene->run;
    uint64_t first = below(run->blocks);
    uint64_t count = min_u64(1 + below(below(4) ? 4 : 24), run->blocks - first);
    unsigned what = (unsigned)below(100);
    struct range_hold hold;

    if (what < 12) {
        do_flush(scene);
        return;
    }
    if (what >= 85) {
        do_read(scene, first, count);
        return;
    }
    if (what >= 75) { /* a discard is of whole clusters here */
        uint64_t per_cluster = max_u64((UINT64_C(1) << run->cluster_bits) / BLOCK, 1);

        first = first / per_cluster * per_cluster;
        count = min_u64(div_up(count, per_cluster) * per_cluster, run->blocks - first);
    }
    range_lock_acquire(&scene->ranges, &hold, first * BLOCK, count * BLOCK, false);
    if (what < 60) {
        do_write(scene, first, count);
    } else {
        do_zero(scene, first, count, what >= 75);
    }
    range_lock_release(&scene->ranges, &hold);
}

static void coroutine_fn worker_main(void *argument)
{
    struct scene *scene = argument;

    for (unsigned i = 0; i < OPERATIONS; i++) {
        do_operation(scene);
    }
    co_group_leave(&scene->workers);
}

/* --- before and after the cut --- */

static struct node *coroutine_fn open_image(struct scene *scene, struct graph *graph)
{
    struct node *node = testing_add(graph, NULL,
                                    "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"discard\":\"unmap\",%s"
                                    "\"file\":{\"driver\":\"file\",\"filename\":\"" DISK "\"}}",
                                    scene->run->seed % 3 ? "" : "\"l2-cache-size\":1,\"refcount-cache-size\":1,");

    scene->backend = testing_backend(graph, node);
    return node;
}

static void coroutine_fn close_image(struct scene *scene, struct graph *graph)
{
    backend_destroy(scene->backend);
    g_assert_cmpint(graph_delete(graph, "top", NULL), ==, 0);
    graph_destroy(graph);
}

static void coroutine_fn read_all(struct scene *scene)
{
    g_assert_cmpuint(backend_size(scene->backend), ==, scene->run->size);
    for (uint64_t i = 0; i < scene->run->blocks; i++) {
        uint8_t data[BLOCK];
        struct iovec iov = {data, BLOCK};
        const struct block *block = &scene->run->block[i];

        g_assert_cmpint(backend_read(scene->backend, i * BLOCK, BLOCK, buffers_one(&iov), 0), ==, 0);
        check_block(scene->run, i, block->stable, block->issued, data);
    }
}

static void coroutine_fn look(void *argument)
{
    struct scene *scene = argument;
    struct graph *graph = graph_create();

    open_image(scene, graph);
    read_all(scene);
    close_image(scene, graph);
}

static void coroutine_fn write_and_read(void *argument)
{
    struct scene *scene = argument;
    struct graph *graph = graph_create();
    struct loop *loops[LOOPS];

    open_image(scene, graph);
    range_lock_init(&scene->ranges);
    co_group_init(&scene->workers);
    for (unsigned i = 0; i < LOOPS; i++) {
        g_assert_cmpint(loop_thread_start("io", ENGINE_AUTO, &loops[i], NULL), ==, 0);
    }
    for (unsigned i = 0; i < LOOPS * WORKERS; i++) {
        co_group_enter(&scene->workers);
        loop_spawn(loops[i % LOOPS], worker_main, scene);
    }
    co_group_wait(&scene->workers);
    for (unsigned i = 0; i < LOOPS; i++) {
        loop_thread_join(loops[i]);
    }
    do_flush(scene);
    read_all(scene);
    close_image(scene, graph);
    range_lock_destroy(&scene->ranges);
    co_group_destroy(&scene->workers);
}

/* Every so many cuts the peer looks at the image, too. */
static void check_by_peer(struct sim *sim, const struct run *run)
{
    g_autofree char *path = g_strdup_printf("%s/cut.qcow2", testing_directory());
    uint64_t size;
    g_autofree char *content = sim_disk_get(sim, DISK, &size);

    g_assert_true(g_file_set_contents(path, content, (gssize)size, NULL));
    int code = testing_run(false, "qemu-img check -q -f qcow2 %s", path);

    if (code != 0 && code != 3) {
        testing_run(true, "qemu-img check -f qcow2 %s", path);
    }
}

static bool peer_looks(const struct run *run)
{
    return run->cut_at % 16 == run->seed % 16;
}

static void run_loop(struct scene *scene, void (*entry)(void *argument))
{
    struct loop *loop;

    g_assert_cmpint(loop_create(ENGINE_AUTO, &loop, NULL), ==, 0);
    loop_run_coroutine(loop, entry, scene);
    loop_destroy(loop);
}

static void after_cut(struct sim *world, void *argument)
{
    struct scene scene = {.run = argument, .sim = world};

    if (peer_looks(scene.run)) {
        check_by_peer(world, scene.run);
    }
    run_loop(&scene, look);
    _exit(3);
}

static void coroutine_fn create_image(void *argument)
{
    struct scene *scene = argument;
    struct graph *graph = graph_create();
    struct node *disk =
        testing_add(graph, NULL, "{\"driver\":\"file\",\"node-name\":\"disk\",\"filename\":\"" DISK "\"}");
    struct backend *backend = testing_backend(graph, disk);
    struct qcow2_create_options options = {.size = scene->run->size, .cluster_bits = scene->run->cluster_bits};

    g_assert_cmpint(qcow2_create(backend_edge(backend), &options, NULL), ==, 0);
    backend_destroy(backend);
    g_assert_cmpint(graph_delete(graph, "disk", NULL), ==, 0);
    graph_destroy(graph);
}

static _Noreturn void child_main(struct run *run)
{
    struct sim_config config = {.seed = run->seed, .short_percent = 10, .preempt_percent = 10};
    struct scene scene = {.run = run, .sim = sim_create(&config)};

    sim_disk_set(scene.sim, DISK, NULL, 0);
    run_loop(&scene, create_image);
    sim_cut_power(scene.sim, sim_changes(scene.sim) + run->cut_at, after_cut, run);
    run_loop(&scene, write_and_read);
    run->changes = sim_changes(scene.sim);
    sim_destroy(scene.sim);
    _exit(0);
}

/* False: the run ended before its power was cut. */
static bool run_once(struct run *run)
{
    int status;
    pid_t child = fork();

    if (!child) {
        child_main(run);
    }
    g_assert_cmpint(waitpid(child, &status, 0), ==, child);
    if (!WIFEXITED(status) || (WEXITSTATUS(status) != 3 && WEXITSTATUS(status) != 0)) {
        g_error("seed %" PRIu64 ", power cut at change %" PRIu64 ": status %d", run->seed, run->cut_at, status);
    }
    return WEXITSTATUS(status) == 3;
}

static void test_seed(struct run *run, uint64_t seed)
{
    bool was_cut = true;
    uint64_t cuts = 0;

    for (uint64_t at = 1; was_cut; at++) {
        *run = (struct run){.seed = seed, .cut_at = at};
        run->cluster_bits = (unsigned)(9 + seed % 8);
        run->size = min_u64(max_u64(UINT64_C(40) << run->cluster_bits, 128 * KiB), BLOCK * BLOCKS_MAX);
        run->blocks = run->size / BLOCK;
        was_cut = run_once(run);
        cuts += was_cut;
    }
    g_test_message("seed %" PRIu64 ": %" PRIu64 " cuts", seed, cuts);
    g_assert_cmpuint(cuts, >, 40);
}

static uint64_t number(const char *variable, uint64_t otherwise)
{
    const char *text = g_getenv(variable);

    return text ? g_ascii_strtoull(text, NULL, 10) : otherwise;
}

static void test_power_cuts(void)
{
    struct run *run = mmap(NULL, sizeof(*run), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    uint64_t seed = number("QCOW2_SEED", 1), cases = number("QCOW2_CASES", CASES);

    g_assert_true(run != MAP_FAILED);
    if (!testing_have_peer()) {
        return;
    }
    testing_directory(); /* the children's, too */
    for (uint64_t i = 0; i < cases; i++) {
        test_seed(run, seed + i);
    }
    testing_remove_directory();
    munmap(run, sizeof(*run));
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    testing_register_drivers();
    g_test_add_func("/qcow2/power-cut-at-every-change", test_power_cuts);
    return g_test_run();
}

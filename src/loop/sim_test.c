/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The simulated engine: that it interleaves, that a seed decides everything, that time costs nothing, and what its
 * disks do to those who trust them too much. `--trace SEED` prints the trace of the busy program, for the test that
 * runs it in two processes; a power cut ends a process, so those tests run in children.
 */
#include "base/size.h"
#include "loop/engine.h"
#include "loop/file.h"
#include "loop/loop.h"
#include "loop/sim_private.h"
#include "loop/sync.h"
#include "loop/worker.h"
#include <errno.h>
#include <glib.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *self_path;

/* A child under TSan takes a while to start, and a second to end unless it is asked not to. */
#ifdef __SANITIZE_THREAD__
enum { CUT_SEEDS = 1 };
const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
    return "atexit_sleep_ms=0";
}
#else
enum { CUT_SEEDS = 6 };
#endif

/* Runs `entry` in a world with the seed; gives the trace. */
static uint64_t in_world(const struct sim_config *config, void (*entry)(void *argument), void *argument)
{
    struct sim *sim = sim_create(config);
    struct loop *loop;

    g_assert_cmpint(loop_create(ENGINE_SIM, &loop, NULL), ==, 0);
    g_assert_cmpstr(loop_engine_name(loop), ==, "sim");
    loop_run_coroutine(loop, entry, argument);
    loop_destroy(loop);
    uint64_t trace = sim_trace(sim);

    sim_destroy(sim);
    return trace;
}

/* ---- a busy program: loops, a mutex, sleeps, files, work ---- */

enum { BUSY_LOOPS = 3, BUSY_COROUTINES = 4, BUSY_ROUNDS = 12 };

struct busy {
    struct loop *home, *loops[BUSY_LOOPS];
    struct co_mutex mutex;
    struct co_group group;
    struct file *file;
    unsigned inside, count;
    GString *order; /* who had the mutex */
};
struct busy_one {
    struct busy *busy;
    unsigned number;
};

static int busy_work(void *argument)
{
    g_assert(!loop_self());
    (*(unsigned *)argument)++;
    return 7;
}

static void coroutine_fn busy_round(struct busy *busy, unsigned number)
{
    uint8_t data[3000];
    struct iovec iov = {data, sizeof(data)};
    unsigned worked = 0;

    memset(data, (int)number, sizeof(data));
    g_assert_cmpint(file_write(busy->file, number * 3000, 3000, buffers_one(&iov), number % 2), ==, 0);
    co_mutex_lock(&busy->mutex);
    g_assert_cmpuint(busy->inside++, ==, 0);
    g_string_append_printf(busy->order, "%u ", number);
    unsigned count = busy->count;
    loop_sleep_ns(NULL, (int64_t)(loop_random() % 50000));
    busy->count = count + 1;
    busy->inside--;
    co_mutex_unlock(&busy->mutex);
    g_assert_cmpint(worker_run(busy_work, &worked), ==, 7);
    g_assert_cmpuint(worked, ==, 1);
    memset(data, 0, sizeof(data));
    g_assert_cmpint(file_read(busy->file, number * 3000, 3000, buffers_one(&iov)), ==, 0);
    for (unsigned i = 0; i < sizeof(data); i++) {
        g_assert_cmpuint(data[i], ==, number);
    }
}

static void coroutine_fn busy_one(void *argument)
{
    struct busy_one *one = argument;

    for (unsigned i = 0; i < BUSY_ROUNDS; i++) {
        busy_round(one->busy, one->number);
    }
    co_group_leave(&one->busy->group);
    g_free(one);
}

static void coroutine_fn busy_main(void *argument)
{
    struct busy *busy = argument;

    co_mutex_init(&busy->mutex);
    co_group_init(&busy->group);
    g_assert_cmpint(file_open("disk", FILE_WRITABLE | FILE_CREATE, &busy->file, NULL), ==, 0);
    for (unsigned i = 0; i < BUSY_LOOPS; i++) {
        /* From a coroutine, as a monitor's command does it. ENGINE_AUTO is this world's engine. */
        g_assert_cmpint(loop_thread_start("io", i ? ENGINE_SIM : ENGINE_AUTO, &busy->loops[i], NULL), ==, 0);
    }
    for (unsigned i = 0; i < BUSY_LOOPS * BUSY_COROUTINES; i++) {
        struct busy_one *one = g_new(struct busy_one, 1);

        *one = (struct busy_one){busy, i};
        co_group_enter(&busy->group);
        loop_spawn(busy->loops[i % BUSY_LOOPS], busy_one, one);
    }
    co_group_wait(&busy->group);
    g_assert_cmpuint(busy->count, ==, BUSY_LOOPS * BUSY_COROUTINES * BUSY_ROUNDS);
    for (unsigned i = 0; i < BUSY_LOOPS; i++) {
        loop_thread_join(busy->loops[i]);
    }
    file_close(busy->file);
    co_group_destroy(&busy->group);
    co_mutex_destroy(&busy->mutex);
}

static uint64_t busy_run(uint64_t seed, FILE *to, char **ret_order)
{
    struct sim_config config = {.seed = seed, .short_percent = 20, .preempt_percent = 30, .trace = to};
    struct busy busy = {.order = g_string_new(NULL)};
    uint64_t trace = in_world(&config, busy_main, &busy);

    *ret_order = g_string_free(busy.order, FALSE);
    return trace;
}

static void test_same_seed(void)
{
    for (uint64_t seed = 1; seed <= 10; seed++) {
        char *text[2], *order[2];
        size_t bytes[2];
        uint64_t trace[2];

        for (unsigned i = 0; i < 2; i++) {
            FILE *to = open_memstream(&text[i], &bytes[i]);

            trace[i] = busy_run(seed, to, &order[i]);
            fclose(to);
        }
        g_assert_cmpstr(text[0], ==, text[1]);
        g_assert_cmpstr(order[0], ==, order[1]);
        g_assert_cmphex(trace[0], ==, trace[1]);
        g_assert_cmpuint(bytes[0], >, 10000);
        for (unsigned i = 0; i < 2; i++) {
            free(text[i]);
            g_free(order[i]);
        }
    }
}

static void test_other_seeds(void)
{
    g_autoptr(GHashTable) orders = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);

    for (uint64_t seed = 100; seed < 120; seed++) {
        char *order;

        busy_run(seed, NULL, &order);
        g_hash_table_add(orders, order);
    }
    g_assert_cmpuint(g_hash_table_size(orders), ==, 20);
}

/* Addresses differ from one process to the next; what a seed does must not. */
static void test_two_processes(void)
{
    g_autofree char *out[2] = {NULL, NULL};

    for (unsigned i = 0; i < 2; i++) {
        const char *argv[] = {self_path, "--trace", "77", NULL};
        int status;

        g_assert_true(
            g_spawn_sync(NULL, (char **)argv, NULL, G_SPAWN_DEFAULT, NULL, NULL, &out[i], NULL, &status, NULL));
        g_assert_cmpint(status, ==, 0);
    }
    g_assert_cmpuint(strlen(out[0]), >, 10000);
    g_assert_cmpstr(out[0], ==, out[1]);
    g_free(out[1]);
}

/* ---- time ---- */

struct sleeper {
    struct co_group *group;
    int64_t until_s;
    GString *order;
};

static void coroutine_fn sleeper_main(void *argument)
{
    struct sleeper *sleeper = argument;
    int64_t begin_ns = loop_clock_ns();

    g_assert_true(loop_sleep_ns(NULL, sleeper->until_s * 1000000000));
    int64_t late_ns = loop_clock_ns() - begin_ns - sleeper->until_s * 1000000000;

    g_assert_cmpint(late_ns, >=, 0);
    g_assert_cmpint(late_ns, <, 1000000);
    g_string_append_printf(sleeper->order, "%" PRId64 " ", sleeper->until_s);
    co_group_leave(sleeper->group);
}

static void coroutine_fn time_main(void *argument)
{
    static const int64_t seconds[] = {3000, 1, 20, 3300, 300};
    struct loop *other;
    struct sleeper sleepers[G_N_ELEMENTS(seconds)];
    struct co_group group;
    g_autoptr(GString) order = g_string_new(NULL);
    int64_t realtime_us = loop_realtime_us();

    co_group_init(&group);
    g_assert_cmpint(loop_thread_start("io", ENGINE_SIM, &other, NULL), ==, 0);
    for (size_t i = 0; i < G_N_ELEMENTS(seconds); i++) {
        sleepers[i] = (struct sleeper){&group, seconds[i], order};
        co_group_enter(&group);
        loop_spawn(i % 2 ? other : loop_self(), sleeper_main, &sleepers[i]);
    }
    co_group_wait(&group);
    g_assert_cmpstr(order->str, ==, "1 20 300 3000 3300 ");
    g_assert_cmpint((loop_realtime_us() - realtime_us) / 1000000, ==, 3300);
    co_group_destroy(&group);
    loop_thread_join(other);
}

static void test_time(void)
{
    for (uint64_t seed = 0; seed < 20; seed++) {
        struct sim_config config = {.seed = seed, .preempt_percent = 10};

        in_world(&config, time_main, NULL);
    }
}

/* ---- posted tasks ---- */

enum { POSTS = 50, POSTERS = 3 };

struct posted {
    struct loop_task task;
    unsigned number, *next;
    struct loop *loop;
    struct co_group *group;
};

static void posted_run(struct loop_task *task)
{
    struct posted *posted = container_of(task, struct posted, task);

    g_assert(loop_self() == posted->loop && !coroutine_running());
    g_assert_cmpuint((*posted->next)++, ==, posted->number);
    co_group_leave(posted->group);
}

struct poster {
    struct loop *to;
    struct co_group *group;
    struct posted posted[POSTS];
    unsigned next;
};

static void coroutine_fn poster_main(void *argument)
{
    struct poster *poster = argument;

    for (unsigned i = 0; i < POSTS; i++) {
        poster->posted[i] = (struct posted){{.run = posted_run}, i, &poster->next, poster->to, poster->group};
        co_group_enter(poster->group);
        loop_post(poster->to, &poster->posted[i].task);
        if (loop_random() % 4 == 0) {
            coroutine_pause();
        }
    }
    co_group_leave(poster->group);
}

static void coroutine_fn post_main(void *argument)
{
    struct loop *loops[POSTERS];
    struct poster *posters = g_new0(struct poster, POSTERS);
    struct co_group group;

    co_group_init(&group);
    for (unsigned i = 0; i < POSTERS; i++) {
        g_assert_cmpint(loop_thread_start("io", ENGINE_SIM, &loops[i], NULL), ==, 0);
    }
    for (unsigned i = 0; i < POSTERS; i++) {
        posters[i].to = loops[(i + 1) % POSTERS];
        posters[i].group = &group;
        co_group_enter(&group);
        loop_spawn(loops[i], poster_main, &posters[i]);
    }
    co_group_wait(&group);
    for (unsigned i = 0; i < POSTERS; i++) {
        g_assert_cmpuint(posters[i].next, ==, POSTS);
        loop_thread_join(loops[i]);
    }
    co_group_destroy(&group);
    g_free(posters);
}

static void test_posts(void)
{
    for (uint64_t seed = 0; seed < 20; seed++) {
        struct sim_config config = {.seed = seed, .preempt_percent = 20};

        in_world(&config, post_main, NULL);
    }
}

/* A control thread that has no loop of its own starts and joins others. */
static void test_without_loop(void)
{
    struct sim_config config = {.seed = 5};
    struct sim *sim = sim_create(&config);
    struct loop *loop;

    g_assert_cmpint(loop_thread_start("io", ENGINE_SIM, &loop, NULL), ==, 0);
    loop_thread_join(loop);
    sim_destroy(sim);
    g_assert_cmpint(loop_create(ENGINE_SIM, &loop, NULL), ==, -ENODEV);
}

/* ---- files ---- */

static void fill(uint8_t *data, size_t bytes, unsigned seed)
{
    for (size_t i = 0; i < bytes; i++) {
        data[i] = (uint8_t)(seed + i * 7 + i / 251);
    }
}

static int write_all(struct file *file, uint64_t offset, const void *data, size_t bytes, bool fua)
{
    struct iovec iov[] = {{(void *)data, bytes / 3}, {(uint8_t *)data + bytes / 3, bytes - bytes / 3}};

    return file_write(file, offset, bytes, (struct buffers){iov, 2, 0}, fua);
}

static int read_all(struct file *file, uint64_t offset, void *data, size_t bytes)
{
    struct iovec iov = {data, bytes};

    return file_read(file, offset, bytes, buffers_one(&iov));
}

static struct file *open_file(const char *path, unsigned flags)
{
    struct file *file;

    g_assert_cmpint(file_open(path, flags, &file, NULL), ==, 0);
    return file;
}

enum { BIG = 100 * 1000 };

static void coroutine_fn files_main(void *argument)
{
    g_autofree uint8_t *data = g_malloc(BIG), *back = g_malloc(BIG);
    struct file_info info;
    struct file *file, *other;
    uint64_t size, end;
    bool is_data;

    fill(data, BIG, 3);
    g_assert_cmpint(file_open("a", FILE_WRITABLE, &file, NULL), ==, -ENOENT);
    file = open_file("a", FILE_WRITABLE | FILE_CREATE | FILE_EXCLUSIVE);
    g_assert_cmpint(file_open("a", FILE_CREATE | FILE_EXCLUSIVE, &other, NULL), ==, -EEXIST);
    other = open_file("a", 0);
    g_assert_cmpint(write_all(other, 0, data, 10, false), ==, -EBADF);
    g_assert_cmpint(write_all(file, 777, data, BIG, false), ==, 0);
    g_assert_cmpint(read_all(other, 777, back, BIG), ==, 0);
    g_assert_cmpmem(data, BIG, back, BIG);
    /* Behind the end there are zeroes. */
    g_assert_cmpint(read_all(other, 777 + BIG - 10, back, 20), ==, 0);
    g_assert_cmpmem(back, 10, data + BIG - 10, 10);
    g_assert_cmpmem(back + 10, 10, "\0\0\0\0\0\0\0\0\0\0", 10);
    g_assert_cmpint(file_truncate(file, 1 * MiB), ==, 0);
    g_assert_cmpint(file_extent(other, 0, &is_data, &end), ==, 0);
    g_assert_true(is_data);
    g_assert_cmpuint(end, ==, align_up(777 + BIG, 4096));
    g_assert_cmpint(file_extent(other, end, &is_data, &end), ==, 0);
    g_assert_false(is_data);
    g_assert_cmpuint(end, ==, 1 * MiB);
    g_assert_cmpint(file_extent(other, end, &is_data, &end), ==, -ENXIO);
    g_assert_cmpint(file_allocate(file, FILE_PUNCH, 4096, 8192), ==, 0);
    g_assert_cmpint(file_extent(other, 4096, &is_data, &end), ==, 0);
    g_assert_false(is_data);
    g_assert_cmpuint(end, ==, 4096 + 8192);
    g_assert_cmpint(file_allocate(file, FILE_ZERO, 2 * MiB, 4096), ==, 0);
    g_assert_cmpint(file_info(other, &info), ==, 0);
    g_assert_cmpuint(info.size, ==, 2 * MiB + 4096);
    g_assert_cmpuint(info.allocated, ==, align_up(777 + BIG, 4096) - 8192 + 4096);
    g_assert_cmpint(file_unlink("a"), ==, 0);
    g_assert_null(sim_disk_get(sim_self(), "a", &size));
    g_assert_cmpint(read_all(other, 777, back, 100), ==, 0);
    g_assert_cmpmem(data, 100, back, 100);
    file_close(file);
    file_close(other);
}

static void test_files(void)
{
    for (uint64_t seed = 0; seed < 50; seed++) {
        struct sim_config config = {.seed = seed, .short_percent = seed % 2 ? 50 : 0};

        in_world(&config, files_main, NULL);
    }
}

static void coroutine_fn direct_main(void *argument)
{
    struct file *file = open_file("a", FILE_WRITABLE | FILE_DIRECT);
    struct file_info info;
    g_autofree uint8_t *memory = g_malloc(3 * SIM_SECTOR);
    uint8_t *aligned = memory + SIM_SECTOR - (uintptr_t)memory % SIM_SECTOR;

    g_assert_cmpint(file_info(file, &info), ==, 0);
    g_assert_cmpuint(info.size, ==, 700);
    g_assert_cmpuint(info.alignment, ==, SIM_SECTOR);
    g_assert_cmpint(read_all(file, 0, aligned + 1, SIM_SECTOR), ==, -EINVAL);
    g_assert_cmpint(read_all(file, 1, aligned, SIM_SECTOR), ==, -EINVAL);
    g_assert_cmpint(read_all(file, 0, aligned, 100), ==, -EINVAL);
    /* The end lies inside of a sector. */
    g_assert_cmpint(read_all(file, 0, aligned, 2 * SIM_SECTOR), ==, 0);
    for (unsigned i = 0; i < 2 * SIM_SECTOR; i++) {
        g_assert_cmpuint(aligned[i], ==, i < 700 ? 5 : 0);
    }
    file_close(file);
}

static void test_direct(void)
{
    for (uint64_t seed = 0; seed < 20; seed++) {
        struct sim_config config = {.seed = seed, .short_percent = 30};
        struct sim *sim = sim_create(&config);
        uint8_t fives[700];
        struct loop *loop;

        memset(fives, 5, sizeof(fives));
        sim_disk_set(sim, "a", fives, sizeof(fives));
        g_assert_cmpint(loop_create(ENGINE_AUTO, &loop, NULL), ==, 0);
        loop_run_coroutine(loop, direct_main, NULL);
        loop_destroy(loop);
        sim_destroy(sim);
    }
}

static void coroutine_fn short_main(void *argument)
{
    static uint8_t data[16 * 512];
    struct file *file = open_file("a", FILE_WRITABLE | FILE_CREATE);
    struct iovec iov = {data, sizeof(data)};
    unsigned whole = 0, part = 0;

    for (unsigned i = 0; i < 200; i++) {
        ssize_t moved = file->ops->write(file, 100, &iov, 1, false);

        g_assert_cmpint(moved, >, 0);
        if (moved == (ssize_t)sizeof(data)) {
            whole++;
        } else {
            g_assert_cmpint((100 + moved) % 512, ==, 0);
            part++;
        }
    }
    g_assert_cmpuint(whole, >, 30);
    g_assert_cmpuint(part, >, 30);
    file_close(file);
}

static void test_short(void)
{
    struct sim_config config = {.seed = 1, .short_percent = 50};

    in_world(&config, short_main, NULL);
}

static void coroutine_fn faults_main(void *argument)
{
    struct sim *sim = sim_self();
    uint8_t data[4096], back[4096];
    struct file *file = open_file("a", FILE_WRITABLE | FILE_CREATE), *none;

    memset(data, 1, sizeof(data));
    g_assert_cmpint(write_all(file, 0, data, 4096, true), ==, 0);
    sim_fault_add(sim, &(struct sim_fault){"b", SIM_READ | SIM_WRITE, 0, 100, -EIO});
    sim_fault_add(sim, &(struct sim_fault){"a", SIM_READ, 1, 2, -EIO});
    sim_fault_add(sim, &(struct sim_fault){NULL, SIM_WRITE, 0, 1, -ENOSPC});
    sim_fault_add(sim, &(struct sim_fault){"a", SIM_SYNC, 0, 1, -EDQUOT});
    sim_fault_add(sim, &(struct sim_fault){"a", SIM_ALLOCATE, 0, 2, -EROFS});
    sim_fault_add(sim, &(struct sim_fault){"a", SIM_OPEN, 0, 1, -EACCES});
    g_assert_cmpint(read_all(file, 0, back, 4096), ==, 0);
    g_assert_cmpint(read_all(file, 0, back, 4096), ==, -EIO);
    g_assert_cmpint(read_all(file, 0, back, 4096), ==, -EIO);
    g_assert_cmpint(read_all(file, 0, back, 4096), ==, 0);
    g_assert_cmpmem(data, 4096, back, 4096);
    memset(data, 2, sizeof(data));
    g_assert_cmpint(write_all(file, 0, data, 4096, false), ==, -ENOSPC);
    g_assert_cmpint(read_all(file, 0, back, 4096), ==, 0);
    for (unsigned i = 0; i < 4096; i++) {
        g_assert(back[i] == 1 || back[i] == 2);
        g_assert_cmpuint(back[i], ==, back[i / 512 * 512]);
    }
    g_assert_cmpint(write_all(file, 0, data, 4096, false), ==, 0);
    g_assert_cmpint(file_sync(file), ==, -EDQUOT);
    g_assert_cmpint(file_sync(file), ==, 0);
    g_assert_cmpint(file_allocate(file, FILE_ZERO, 0, 512), ==, -EROFS);
    g_assert_cmpint(file_truncate(file, 512), ==, -EROFS);
    g_assert_cmpint(file_truncate(file, 512), ==, 0);
    g_assert_cmpint(file_open("a", 0, &none, NULL), ==, -EACCES);
    none = open_file("a", 0);
    file_close(none);
    sim_faults_clear(sim);
    file_close(file);
}

static void test_faults(void)
{
    for (uint64_t seed = 0; seed < 20; seed++) {
        struct sim_config config = {.seed = seed};

        in_world(&config, faults_main, NULL);
    }
}

static void coroutine_fn room_main(void *argument)
{
    uint8_t data[8192];
    struct file *file = open_file("a", FILE_WRITABLE | FILE_CREATE);
    struct file_info info;

    memset(data, 1, sizeof(data));
    sim_disk_set_room(sim_self(), "a", 6000);
    g_assert_cmpint(write_all(file, 0, data, 4096, false), ==, 0);
    g_assert_cmpint(write_all(file, 4096, data, 8192, false), ==, -ENOSPC);
    g_assert_cmpint(write_all(file, 6000, data, 1, false), ==, -ENOSPC);
    g_assert_cmpint(file_allocate(file, FILE_PREALLOCATE, 0, 6001), ==, -ENOSPC);
    g_assert_cmpint(file_allocate(file, FILE_PREALLOCATE, 0, 6000), ==, 0);
    g_assert_cmpint(file_info(file, &info), ==, 0);
    g_assert_cmpuint(info.size, ==, 6000);
    sim_disk_set_room(sim_self(), "a", UINT64_MAX);
    g_assert_cmpint(write_all(file, 6000, data, 8192, false), ==, 0);
    file_close(file);
}

static void test_room(void)
{
    struct sim_config config = {.seed = 9};

    in_world(&config, room_main, NULL);
}

/* ---- power cuts ---- */

enum { SLOTS = 24, SLOT = 8 * 512, STEPS = 40 };

/* Shared with the child that loses its power: what it has been told is safe. */
struct cut_case {
    uint64_t at_change;
    uint8_t begun[SLOTS], done[SLOTS], durable[SLOTS];
    bool failed_sync;
    unsigned torn, lost, kept;
};

static void coroutine_fn cut_writer(void *argument)
{
    struct cut_case *cut = argument;
    struct file *file = open_file("a", FILE_WRITABLE);
    uint8_t data[SLOT], done[SLOTS];

    for (unsigned i = 0; i < STEPS; i++) {
        unsigned slot = (unsigned)(loop_random() % SLOTS);
        bool fua = loop_random() % 8 == 0;

        memset(data, ++cut->begun[slot], SLOT);
        g_assert_cmpint(write_all(file, slot * SLOT, data, SLOT, fua), ==, 0);
        cut->done[slot] = cut->begun[slot];
        if (fua) {
            cut->durable[slot] = cut->done[slot];
        }
        if (i % 10 == 9) {
            memcpy(done, cut->done, SLOTS);
            if (file_sync(file) == 0) {
                memcpy(cut->durable, done, SLOTS);
            }
        }
    }
    file_close(file);
}

static void coroutine_fn cut_reader(void *argument)
{
    struct cut_case *cut = argument;
    struct file *file = open_file("a", 0);
    uint8_t data[SLOT];

    for (unsigned slot = 0; slot < SLOTS; slot++) {
        bool differs = false;

        g_assert_cmpint(read_all(file, slot * SLOT, data, SLOT), ==, 0);
        for (unsigned i = 0; i < SLOT; i++) {
            g_assert_cmpuint(data[i], >=, cut->durable[slot]);
            g_assert_cmpuint(data[i], <=, cut->begun[slot]);
            g_assert_cmpuint(data[i], ==, data[i / 512 * 512]);
            differs |= data[i] != data[0];
        }
        cut->torn += differs;
        if (cut->done[slot] > cut->durable[slot]) {
            cut->lost += data[0] < cut->done[slot];
            cut->kept += data[0] == cut->done[slot];
        }
    }
    file_close(file);
}

static void after_cut(struct sim *sim, void *argument)
{
    struct loop *loop;

    g_assert(sim == sim_self() && !loop_self());
    g_assert_cmpint(loop_create(ENGINE_SIM, &loop, NULL), ==, 0);
    loop_run_coroutine(loop, cut_reader, argument);
    loop_destroy(loop);
    _exit(3);
}

static void cut_child(uint64_t seed, struct cut_case *cut)
{
    struct sim_config config = {.seed = seed, .short_percent = 10};
    struct sim *sim = sim_create(&config);
    g_autofree uint8_t *zeroes = g_malloc0(SLOTS * SLOT);
    struct loop *loop;

    sim_disk_set(sim, "a", zeroes, SLOTS * SLOT);
    sim_cut_power(sim, cut->at_change, after_cut, cut);
    if (cut->failed_sync) {
        sim_fault_add(sim, &(struct sim_fault){NULL, SIM_SYNC, 0, UINT64_MAX, -EIO});
    }
    g_assert_cmpint(loop_create(ENGINE_SIM, &loop, NULL), ==, 0);
    loop_run_coroutine(loop, cut_writer, cut);
    loop_destroy(loop);
    sim_destroy(sim);
    _exit(0);
}

/* Runs the case in a child; false: it ended before the cut. The child's counts are in *cut, which is shared memory. */
static bool cut_run(uint64_t seed, struct cut_case *cut)
{
    pid_t child = fork();
    int status;

    if (!child) {
        cut_child(seed, cut);
    }
    g_assert_cmpint(waitpid(child, &status, 0), ==, child);
    g_assert_true(WIFEXITED(status));
    g_assert_true(WEXITSTATUS(status) == 3 || WEXITSTATUS(status) == 0);
    return WEXITSTATUS(status) == 3;
}

static struct cut_case *cut_shared(void)
{
    struct cut_case *cut = mmap(NULL, sizeof(*cut), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    g_assert(cut != MAP_FAILED);
    return cut;
}

/* At every change, over several seeds: what was synced is there, what was not may be lost, torn, or there. */
static void test_power_cut(void)
{
    struct cut_case *cut = cut_shared();
    unsigned torn = 0, lost = 0, kept = 0;

    for (uint64_t seed = 0; seed < CUT_SEEDS; seed++) {
        bool was_cut = true;

        for (uint64_t at = 1; was_cut; at++) {
            *cut = (struct cut_case){.at_change = at};
            was_cut = cut_run(seed, cut);
            torn += cut->torn;
            lost += cut->lost;
            kept += cut->kept;
            g_assert_true(was_cut || at > STEPS);
        }
    }
    g_assert_cmpuint(torn, >, 3 * CUT_SEEDS);
    g_assert_cmpuint(lost, >, 3 * CUT_SEEDS);
    g_assert_cmpuint(kept, >, 3 * CUT_SEEDS);
    munmap(cut, sizeof(*cut));
}

static void test_failed_sync(void)
{
    struct cut_case *cut = cut_shared();
    unsigned lost = 0;

    for (uint64_t seed = 0; seed < 10; seed++) {
        *cut = (struct cut_case){.at_change = STEPS, .failed_sync = true};
        g_assert_true(cut_run(seed, cut));
        lost += cut->lost;
    }
    g_assert_cmpuint(lost, >, 10);
    munmap(cut, sizeof(*cut));
}

static void coroutine_fn grown_writer(void *argument)
{
    struct file *file = open_file("a", FILE_WRITABLE);
    uint8_t data[8192];

    memset(data, 2, sizeof(data));
    g_assert_cmpint(file_truncate(file, 1000), ==, 0);
    g_assert_cmpint(write_all(file, 8192, data, 8192, true), ==, 0);
    g_assert_cmpint(write_all(file, 100000, data, 100, false), ==, 0);
    g_assert_not_reached();
}

static void coroutine_fn grown_reader(void *argument)
{
    struct file *file = open_file("a", 0);
    struct file_info info;
    uint8_t data[16384];

    g_assert_cmpint(file_info(file, &info), ==, 0);
    g_assert_true(info.size == 16384 || (info.size > 16384 && info.size <= 100100));
    g_assert_cmpint(read_all(file, 0, data, sizeof(data)), ==, 0);
    for (unsigned i = 0; i < sizeof(data); i++) {
        g_assert_cmpuint(data[i], ==, i < 1000 ? 1 : i < 8192 ? 0 : 2);
    }
    file_close(file);
}

static void after_grown(struct sim *sim, void *argument)
{
    struct loop *loop;

    g_assert_cmpint(loop_create(ENGINE_SIM, &loop, NULL), ==, 0);
    loop_run_coroutine(loop, grown_reader, NULL);
    loop_destroy(loop);
    _exit(3);
}

/* A size is durable with the FUA write that needs it; what a durable shrinking cut off never comes back. */
static void test_cut_size(void)
{
    for (uint64_t seed = 0; seed < 40; seed++) {
        pid_t child = fork();
        int status;

        if (!child) {
            struct sim_config config = {.seed = seed};
            struct sim *sim = sim_create(&config);
            g_autofree uint8_t *ones = g_malloc(8192);
            struct loop *loop;

            memset(ones, 1, 8192);
            sim_disk_set(sim, "a", ones, 8192);
            sim_cut_power(sim, 3, after_grown, NULL);
            g_assert_cmpint(loop_create(ENGINE_SIM, &loop, NULL), ==, 0);
            loop_run_coroutine(loop, grown_writer, NULL);
        }
        g_assert_cmpint(waitpid(child, &status, 0), ==, child);
        g_assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    }
}

/* ---- programs that hang ---- */

static void coroutine_fn deadlock_one(void *argument)
{
    co_mutex_lock(argument);
    g_assert_not_reached();
}

static void coroutine_fn deadlock_main(void *argument)
{
    struct co_mutex mutex;
    struct loop *loop;

    co_mutex_init(&mutex);
    co_mutex_lock(&mutex);
    g_assert_cmpint(loop_thread_start("stuck", ENGINE_SIM, &loop, NULL), ==, 0);
    loop_spawn(loop, deadlock_one, &mutex);
    coroutine_yield();
}

static void test_deadlock(void)
{
    if (g_test_subprocess()) {
        struct sim_config config = {.seed = 4};

        in_world(&config, deadlock_main, NULL);
        return;
    }
    g_test_trap_subprocess(NULL, 0, 0);
    g_test_trap_assert_failed();
    g_test_trap_assert_stderr("*deadlock: every loop sleeps*seed 4*'stuck': 1 coroutines*");
}

static void coroutine_fn limit_main(void *argument)
{
    for (;;) {
        loop_sleep_ns(NULL, 1000000000);
    }
}

static void test_limit(void)
{
    if (g_test_subprocess()) {
        struct sim_config config = {.seed = 4, .limit_ns = INT64_C(60) * 1000000000};

        in_world(&config, limit_main, NULL);
        return;
    }
    g_test_trap_subprocess(NULL, 0, 0);
    g_test_trap_assert_failed();
    g_test_trap_assert_stderr("*the limit of virtual time is reached*");
}

int main(int argc, char **argv)
{
    self_path = argv[0];
    if (argc == 3 && !strcmp(argv[1], "--trace")) {
        g_autofree char *order = NULL;

        busy_run(g_ascii_strtoull(argv[2], NULL, 10), stdout, &order);
        return 0;
    }
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/sim/same-seed-same-steps", test_same_seed);
    g_test_add_func("/sim/other-seeds-other-steps", test_other_seeds);
    g_test_add_func("/sim/same-steps-in-two-processes", test_two_processes);
    g_test_add_func("/sim/an-hour-of-sleep-takes-no-time", test_time);
    g_test_add_func("/sim/posts-keep-their-order", test_posts);
    g_test_add_func("/sim/threads-without-a-control-loop", test_without_loop);
    g_test_add_func("/sim/files", test_files);
    g_test_add_func("/sim/direct-files", test_direct);
    g_test_add_func("/sim/short-transfers", test_short);
    g_test_add_func("/sim/faults", test_faults);
    g_test_add_func("/sim/room", test_room);
    g_test_add_func("/sim/power-cut-at-every-change", test_power_cut);
    g_test_add_func("/sim/failed-sync-settles-nothing", test_failed_sync);
    g_test_add_func("/sim/power-cut-and-sizes", test_cut_size);
    g_test_add_func("/sim/deadlock-is-reported", test_deadlock);
    g_test_add_func("/sim/limit-is-reported", test_limit);
    return g_test_run();
}

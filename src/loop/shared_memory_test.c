/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Memory by descriptor: what one mapping writes the other reads, what is not in the file is refused, and a file that is
 * cut off behind our back leaves zeroes and a note instead of a dead process.
 */
#include "loop/coroutine.h"
#include "loop/loop.h"
#include "loop/shared_memory.h"
#include <errno.h>
#include <glib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void test_shared(void)
{
    struct shared_memory *one, *other;
    int fd;

    g_assert_cmpint(shared_memory_create("test", 100000, &one, &fd, NULL), ==, 0);
    g_assert_cmpint(shared_memory_map(fd, 5000, 95000, &other, NULL), ==, 0);
    one->bytes[5000] = 1;
    other->bytes[94999] = 2;
    g_assert_cmpint(other->bytes[0], ==, 1);
    g_assert_cmpint(one->bytes[99999], ==, 2);
    g_assert_cmpint(ftruncate(fd, 10), <, 0); /* sealed */
    close(fd);
    shared_memory_unmap(one);
    g_assert_cmpint(other->bytes[0], ==, 1);
    g_assert_false(shared_memory_is_lost(other));
    shared_memory_unmap(other);
    shared_memory_unmap(NULL);
}

static void test_refused(void)
{
    static const struct {
        uint64_t offset, size;
    } bad[] = {{0, 0}, {0, 8193}, {8192, 1}, {8193, 0}, {UINT64_MAX, 2}, {1, UINT64_MAX}};
    struct shared_memory *memory;
    int fd = memfd_create("test", 0), ends[2];

    g_assert_cmpint(ftruncate(fd, 8192), ==, 0);
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        struct error *err = NULL;

        g_assert_cmpint(shared_memory_map(fd, bad[i].offset, bad[i].size, &memory, &err), ==, -EINVAL);
        error_free(err);
    }
    close(fd);
    g_assert_cmpint(pipe(ends), ==, 0);
    g_assert_cmpint(shared_memory_map(ends[0], 0, 1, &memory, NULL), ==, -EINVAL);
    close(ends[0]);
    close(ends[1]);
}

static void test_taken_away(void)
{
    struct shared_memory *memory, *whole;
    int fd = memfd_create("test", 0);

    g_assert_cmpint(ftruncate(fd, 1 << 20), ==, 0);
    g_assert_cmpint(shared_memory_map(fd, 4096, (1 << 20) - 4096, &memory, NULL), ==, 0);
    g_assert_cmpint(shared_memory_map(fd, 0, 4096, &whole, NULL), ==, 0);
    memset(memory->bytes, 7, memory->size);
    g_assert_cmpint(ftruncate(fd, 4096), ==, 0);
    g_assert_false(shared_memory_is_lost(memory));
    g_assert_cmpint(((volatile uint8_t *)memory->bytes)[500000], ==, 0);
    g_assert_true(shared_memory_is_lost(memory));
    memory->bytes[3] = 5;
    g_assert_cmpint(memory->bytes[3], ==, 5);
    g_assert_false(shared_memory_is_lost(whole));
    shared_memory_unmap(memory);
    shared_memory_unmap(whole);
    close(fd);
}

/* The same on the thread of a loop, whose other signals are blocked. */
static void touch_run(void *argument)
{
    void **both = argument;

    g_assert_cmpint(*(volatile uint8_t *)both[0], ==, 0);
    coroutine_wake(both[1]);
}

static void taken_away_from_a_loop_run(void *argument)
{
    struct shared_memory *memory;
    struct loop *thread;
    int fd = memfd_create("test", 0);

    g_assert_cmpint(ftruncate(fd, 4096), ==, 0);
    g_assert_cmpint(shared_memory_map(fd, 0, 4096, &memory, NULL), ==, 0);
    g_assert_cmpint(ftruncate(fd, 0), ==, 0);
    g_assert_cmpint(loop_thread_start("other", ENGINE_AUTO, &thread, NULL), ==, 0);
    void *both[2] = {memory->bytes, coroutine_self()};
    loop_spawn(thread, touch_run, both);
    coroutine_yield();
    loop_thread_join(thread);
    g_assert_true(shared_memory_is_lost(memory));
    shared_memory_unmap(memory);
    close(fd);
}

static void test_taken_away_from_a_loop(void)
{
    struct loop *loop;

    g_assert_cmpint(loop_create(ENGINE_AUTO, &loop, NULL), ==, 0);
    loop_run_coroutine(loop, taken_away_from_a_loop_run, NULL);
    loop_destroy(loop);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/shared-memory/shared", test_shared);
    g_test_add_func("/shared-memory/refused", test_refused);
    g_test_add_func("/shared-memory/taken-away", test_taken_away);
    g_test_add_func("/shared-memory/taken-away-from-a-loop", test_taken_away_from_a_loop);
    return g_test_run();
}

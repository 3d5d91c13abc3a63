/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the ground floor costs: nanoseconds per operation, one line each. Not a test; numbers are for
 * comparing two builds on one machine.
 */
#include "base/size.h"
#include "loop/connection.h"
#include "loop/file.h"
#include "loop/loop.h"
#include "loop/sync.h"
#include "loop/worker.h"
#include <fcntl.h>
#include <glib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void report(const char *what, int64_t start_ns, unsigned rounds)
{
    printf("%-40s %10.1f ns\n", what, (double)(loop_clock_ns() - start_ns) / rounds);
}

static void nothing_entry(void *argument)
{
}

static void yielding_entry(void *argument)
{
    while (!*(bool *)argument) {
        coroutine_yield();
    }
}

static void measure_coroutines(void)
{
    const unsigned rounds = 5000000;
    bool stop = false;
    int64_t start = loop_clock_ns();

    for (unsigned i = 0; i < rounds; i++) {
        coroutine_enter(coroutine_create(nothing_entry, NULL));
    }
    report("create, enter, end", start, rounds);
    struct coroutine *co = coroutine_create(yielding_entry, &stop);
    start = loop_clock_ns();
    for (unsigned i = 0; i < rounds; i++) {
        coroutine_enter(co);
    }
    report("enter, yield", start, rounds);
    stop = true;
    coroutine_enter(co);
    start = loop_clock_ns();
    for (unsigned i = 0; i < rounds; i++) {
        coroutine_pause();
    }
    report("pause (a round of the loop)", start, rounds);
}

static void measure_locks(void)
{
    const unsigned rounds = 5000000;
    struct co_mutex mutex;
    struct co_rwlock rwlock;
    struct co_group group;
    int64_t start = loop_clock_ns();

    co_mutex_init(&mutex);
    for (unsigned i = 0; i < rounds; i++) {
        co_mutex_lock(&mutex);
        co_mutex_unlock(&mutex);
    }
    report("mutex, free", start, rounds);
    co_rwlock_init(&rwlock);
    start = loop_clock_ns();
    for (unsigned i = 0; i < rounds; i++) {
        co_rwlock_read_lock(&rwlock);
        co_rwlock_read_unlock(&rwlock);
    }
    report("read lock, free", start, rounds);
    co_group_init(&group);
    start = loop_clock_ns();
    for (unsigned i = 0; i < rounds; i++) {
        co_group_enter(&group);
        co_group_leave(&group);
    }
    report("group, nobody waits", start, rounds);
}

static int nothing_work(void *argument)
{
    return 0;
}

static void measure_worker(void)
{
    const unsigned rounds = 20000;
    int64_t start = loop_clock_ns();

    for (unsigned i = 0; i < rounds; i++) {
        worker_run(nothing_work, NULL);
    }
    report("worker, there and back", start, rounds);
}

static void measure_file(const char *what, const char *folder)
{
    const unsigned rounds = 200000;
    char *path = NULL;
    struct file *file;
    char *memory = file_memory(4096);
    struct iovec iov = {memory, 4096};

    if (asprintf(&path, "%s/interlock-bench-%d", folder, (int)getpid()) < 0 ||
        file_open(path, FILE_WRITABLE | FILE_CREATE, &file, NULL) < 0) {
        return;
    }
    memset(memory, 1, 4096);
    for (unsigned i = 0; i < 256; i++) {
        file_write(file, i * 4096, 4096, buffers_one(&iov), false);
    }
    int64_t start = loop_clock_ns();
    for (unsigned i = 0; i < rounds; i++) {
        file_read(file, i % 256 * 4096, 4096, buffers_one(&iov));
    }
    report(what, start, rounds);
    file_close(file);
    file_unlink(path);
    free(path);
    free(memory);
}

struct echo {
    struct connection *connection;
    struct co_group group;
};

static void echo_entry(void *argument)
{
    struct echo *echo = argument;
    char buffer[4096];
    ssize_t r;

    while ((r = connection_receive(echo->connection, buffer, sizeof(buffer))) > 0) {
        struct iovec iov = {buffer, (size_t)r};

        connection_send(echo->connection, buffers_one(&iov), (size_t)r);
    }
    connection_close(echo->connection);
    co_group_leave(&echo->group);
}

static void measure_echo(const char *what, struct loop *other)
{
    const unsigned rounds = 2000;
    struct echo echo;
    int pair[2];
    char buffer[32] = {0};
    struct iovec iov = {buffer, sizeof(buffer)};

    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0) {
        return;
    }
    struct connection *client = connection_from_fds(pair[0], pair[0]);
    echo.connection = connection_from_fds(pair[1], pair[1]);
    co_group_init(&echo.group);
    co_group_enter(&echo.group);
    connection_move(echo.connection, other);
    loop_spawn(other, echo_entry, &echo);
    int64_t best_ns = INT64_MAX;
    for (unsigned attempt = 0; attempt < 20; attempt++) {
        int64_t start_ns = loop_clock_ns();

        for (unsigned i = 0; i < rounds; i++) {
            connection_send(client, buffers_one(&iov), sizeof(buffer));
            connection_receive_all(client, buffer, sizeof(buffer));
        }
        best_ns = MIN(best_ns, loop_clock_ns() - start_ns);
    }
    report(what, loop_clock_ns() - best_ns, rounds);
    connection_close(client);
    co_group_wait(&echo.group);
}

static void main_entry(void *argument)
{
    struct loop *other;

    measure_coroutines();
    measure_locks();
    measure_worker();
    measure_file("read of 4 KiB, tmpfs", "/dev/shm");
    measure_file("read of 4 KiB, cached", "/tmp");
    measure_echo("echo inside one loop", loop_self());
    if (loop_thread_start("echo", *(enum engine_kind *)argument, &other, NULL) == 0) {
        measure_echo("echo between two loops", other);
        loop_thread_join(other);
    }
}

int main(int argc, char **argv)
{
    enum engine_kind kind = ENGINE_AUTO;
    struct loop *loop;

    if ((argc > 1 && engine_parse(argv[1], &kind, NULL) < 0) || loop_create(kind, &loop, NULL) < 0) {
        fprintf(stderr, "usage: coroutine_switch [auto|uring|epoll]\n");
        return 1;
    }
    printf("engine %s\n", loop_engine_name(loop));
    loop_run_coroutine(loop, main_entry, &kind);
    loop_destroy(loop);
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which engine a loop gets, and what the real ones share: clocks, random numbers, threads, and the event that ends a
 * wait.
 * ENGINE_AUTO tries uring and falls back to epoll whatever the refusal was (a container's filter,
 * an old kernel, a memory limit). New threads have all signals blocked, so that handlers run on the
 * control thread. Which engine runs is a matter of each loop; nothing here is a global choice.
 */
#include "loop/engine.h"
#include "loop/descriptor.h"
#include "loop/loop_private.h"
#include "loop/sim_private.h"
#include <errno.h>
#include <glib.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

static const struct {
    const char *name;
    enum engine_kind kind;
} engine_names[] = {{"auto", ENGINE_AUTO}, {"uring", ENGINE_URING}, {"epoll", ENGINE_EPOLL}};

int engine_parse(const char *name, enum engine_kind *ret, struct error **err)
{
    for (size_t i = 0; i < G_N_ELEMENTS(engine_names); i++) {
        if (!strcmp(name, engine_names[i].name)) {
            *ret = engine_names[i].kind;
            return 0;
        }
    }
    error_set(err, -EINVAL, "Unknown engine '%s'", name);
    error_hint(err, "Engines are 'auto', 'uring' and 'epoll'");
    return -EINVAL;
}

int engine_create(enum engine_kind kind, struct engine **ret, struct error **err)
{
    int r;

    if (kind == ENGINE_SIM || (kind == ENGINE_AUTO && sim_self())) {
        r = sim_engine_ops.create(ret);
        return r < 0 ? error_set_errno(err, r, "The thread is in no simulated world") : 0;
    }
    g_assert(!sim_self()); /* its wait would stop the world */
    if (kind != ENGINE_EPOLL) {
        r = uring_engine_ops.create(ret);
        if (r >= 0) {
            return 0;
        }
        if (kind == ENGINE_URING) {
            error_set_errno(err, r, "The kernel refuses io_uring");
            error_hint(err, "Use engine 'auto' or 'epoll'");
            return r;
        }
    }
    r = epoll_engine_ops.create(ret);
    if (r < 0) {
        return error_set_errno(err, r, "Could not create an epoll engine");
    }
    return 0;
}

const struct engine_ops *engine_ops_self(void)
{
    if (loop_current) {
        return loop_current->engine->ops;
    }
    return sim_self() ? &sim_engine_ops : &epoll_engine_ops;
}

int64_t native_clock_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int64_t native_realtime_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

uint64_t native_random(void)
{
    static __thread uint64_t pool[32];
    static __thread unsigned left;

    if (!left) {
        /* Up to 256 bytes are delivered whole, and without an interruption. */
        g_assert(getrandom(pool, sizeof(pool), 0) == sizeof(pool));
        left = G_N_ELEMENTS(pool);
    }
    return pool[--left];
}

struct engine_thread {
    pthread_t thread;
    char name[16];
    void (*entry)(void *argument);
    void *argument;
};

static void *native_thread_main(void *argument)
{
    struct engine_thread *thread = argument;

    pthread_setname_np(pthread_self(), thread->name);
    thread->entry(thread->argument);
    return NULL;
}

int native_thread_start(const char *name, void (*entry)(void *argument), void *argument, struct engine_thread **ret)
{
    struct engine_thread *thread = g_new0(struct engine_thread, 1);
    sigset_t all, saved;
    int r;

    g_strlcpy(thread->name, name, sizeof(thread->name));
    thread->entry = entry;
    thread->argument = argument;
    sigfillset(&all);
    sigdelset(&all, SIGBUS); /* it is meant for the thread that touched memory (shared_memory.c) */
    pthread_sigmask(SIG_SETMASK, &all, &saved);
    r = pthread_create(&thread->thread, NULL, native_thread_main, thread);
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
    if (r) {
        g_free(thread);
        return -r;
    }
    *ret = thread;
    return 0;
}

void native_thread_join(struct engine_thread *thread)
{
    pthread_join(thread->thread, NULL);
    g_free(thread);
}

unsigned native_poll_events(unsigned directions)
{
    return (directions & DESCRIPTOR_READABLE ? POLLIN : 0U) | (directions & DESCRIPTOR_WRITABLE ? POLLOUT : 0U);
}

unsigned native_poll_ready(unsigned events, unsigned directions)
{
    unsigned ready = (events & POLLIN ? DESCRIPTOR_READABLE : 0U) | (events & POLLOUT ? DESCRIPTOR_WRITABLE : 0U);

    return ready & directions ? ready & directions : directions;
}

void native_event_signal(int event_fd)
{
    uint64_t one = 1;

    while (write(event_fd, &one, sizeof(one)) < 0 && errno == EINTR) {
    }
}

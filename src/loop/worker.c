/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The worker pool of the process: threads for what has no asynchronous system call, shared by all
 * loops. Invariants, all under pool.guard:
 * 1. every job in the queue stands on the stack of a sleeping coroutine and is run once, first come first served;
 * 2. idle counts the threads that wait for a job, threads all of them, and threads <= WORKERS_MAX;
 * 3. a thread that waited IDLE_SECONDS without a job ends: an idle process has no workers.
 * Nobody joins the threads: they hold nothing that outlives a job.
 */
#include "loop/worker.h"
#include "base/list.h"
#include "loop/engine.h"
#include <errno.h>
#include <glib.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>

#define WORKERS_MAX 16
#define IDLE_SECONDS 5

struct worker_job {
    struct list link;
    int (*work)(void *argument);
    void *argument;
    int result;
    struct coroutine *waiter;
};

static struct {
    pthread_once_t once;
    pthread_mutex_t guard;
    pthread_cond_t more;
    struct list jobs;
    unsigned waiting, idle, threads;
} pool = {.once = PTHREAD_ONCE_INIT};

static void pool_init(void)
{
    pthread_condattr_t attributes;

    pthread_mutex_init(&pool.guard, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&pool.more, &attributes);
    pthread_condattr_destroy(&attributes);
    list_init(&pool.jobs);
}

/* With the guard held: the next job, or NULL after a long time without one. */
static struct worker_job *pool_next_job(void)
{
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += IDLE_SECONDS;
    pool.idle++;
    while (list_is_empty(&pool.jobs)) {
        if (pthread_cond_timedwait(&pool.more, &pool.guard, &until) == ETIMEDOUT && list_is_empty(&pool.jobs)) {
            pool.idle--;
            return NULL;
        }
    }
    struct worker_job *job = container_of(pool.jobs.next, struct worker_job, link);

    pool.idle--;
    pool.waiting--;
    list_remove(&job->link);
    return job;
}

static void *worker_main(void *argument)
{
    struct worker_job *job;

    pthread_setname_np(pthread_self(), "worker");
    pthread_mutex_lock(&pool.guard);
    while ((job = pool_next_job())) {
        pthread_mutex_unlock(&pool.guard);
        job->result = job->work(job->argument);
        coroutine_wake(job->waiter);
        pthread_mutex_lock(&pool.guard);
    }
    pool.threads--;
    pthread_mutex_unlock(&pool.guard);
    return NULL;
}

static int worker_start(void)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, saved;
    int r;

    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &saved);
    r = pthread_create(&thread, &attributes, worker_main, NULL);
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
    pthread_attr_destroy(&attributes);
    return -r;
}

int coroutine_fn worker_pool_run(int (*work)(void *argument), void *argument)
{
    struct worker_job job = {.work = work, .argument = argument, .waiter = coroutine_self()};

    pthread_once(&pool.once, pool_init);
    pthread_mutex_lock(&pool.guard);
    list_append(&pool.jobs, &job.link);
    pool.waiting++;
    if (pool.waiting > pool.idle && pool.threads < WORKERS_MAX) {
        if (worker_start() == 0) {
            pool.threads++;
        } else if (!pool.threads) {
            /* No thread to be had at all: better slow than not. */
            list_remove(&job.link);
            pool.waiting--;
            pthread_mutex_unlock(&pool.guard);
            return work(argument);
        }
    }
    pthread_cond_signal(&pool.more);
    pthread_mutex_unlock(&pool.guard);
    coroutine_yield();
    return job.result;
}

int coroutine_fn worker_run(int (*work)(void *argument), void *argument)
{
    g_assert(coroutine_running());
    return engine_self()->ops->work(work, argument);
}

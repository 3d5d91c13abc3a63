/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The worker pool of the process: threads for what has no asynchronous system call, shared by all
 * loops. Invariants, all under pool.guard:
 * 1. every job in the queue stands on the stack of a sleeping coroutine and is run once, first come first served;
 * 2. idle counts the threads that wait for a job, threads all of them, and threads <= WORKERS_MAX;
 * 3. a thread that waited IDLE_SECONDS without a job ends: an idle process has no workers.
 * Nobody joins the threads: they hold nothing that outlives a job.
 *
 * A turn is a lock whose holder announces its end: a worker that sleeps takes longer to wake up than a processor takes
 * to do what the turn is for. Between announcement and end the next one yields its processor, and does not sleep.
 *
 * A lane is a queue of its own. Each worker that it may have is a slot, which is a job of the pool's from when it is
 * needed (`running`) until it finds no job more. Another slot may have done what it was started for: so a lane may have
 * no job, and be destroyed, while a slot still stands in the pool's queue; the last one to come to rest frees it then.
 * When others wait for a worker, a slot queues up behind them after each job.
 */
#include "loop/worker.h"
#include "base/list.h"
#include "loop/engine.h"
#include <errno.h>
#include <glib.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>

#define WORKERS_MAX 16
#define IDLE_SECONDS 5

struct worker_job {
    struct list link;
    int (*work)(void *argument);
    void *argument;
    int result;
    struct coroutine *waiter; /* NULL: nobody waits, and the job may be gone when it is done */
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
        struct coroutine *waiter = job->waiter;
        int result = job->work(job->argument);
        if (waiter) {
            job->result = result;
            coroutine_wake(waiter);
        }
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
    sigdelset(&all, SIGBUS); /* as in engine.c */
    pthread_sigmask(SIG_SETMASK, &all, &saved);
    r = pthread_create(&thread, &attributes, worker_main, NULL);
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
    pthread_attr_destroy(&attributes);
    return -r;
}

/* False: there is no thread to be had, and the job was not taken. */
static bool pool_submit(struct worker_job *job)
{
    bool taken = true;

    pthread_once(&pool.once, pool_init);
    pthread_mutex_lock(&pool.guard);
    list_append(&pool.jobs, &job->link);
    pool.waiting++;
    if (pool.waiting > pool.idle && pool.threads < WORKERS_MAX) {
        if (worker_start() == 0) {
            pool.threads++;
        } else if (!pool.threads) {
            list_remove(&job->link);
            pool.waiting--;
            taken = false;
        }
    }
    pthread_cond_signal(&pool.more);
    pthread_mutex_unlock(&pool.guard);
    return taken;
}

int coroutine_fn worker_pool_run(int (*work)(void *argument), void *argument)
{
    struct worker_job job = {.work = work, .argument = argument, .waiter = coroutine_self()};

    if (!pool_submit(&job)) {
        return work(argument); /* better slow than not */
    }
    coroutine_yield();
    return job.result;
}

/* ---- lanes ---- */

struct lane_slot {
    struct worker_lane *lane;
    struct worker_job job; /* in the pool */
    bool running;          /* a worker is in lane_work(), or will be */
};

struct worker_lane {
    pthread_mutex_t guard;
    struct list jobs; /* struct worker_job, those that nobody does yet */
    unsigned width;
    bool destroyed;
    struct lane_slot slots[WORKER_LANE_MAX];
};

static bool lane_rests(const struct worker_lane *lane)
{
    for (unsigned i = 0; i < lane->width; i++) {
        if (lane->slots[i].running) {
            return false;
        }
    }
    return true;
}

static void lane_free(struct worker_lane *lane)
{
    pthread_mutex_destroy(&lane->guard);
    g_free(lane);
}

/* The next job, or NULL when the slot has come to rest: then the lane may be gone. */
static struct worker_job *lane_next(struct lane_slot *slot)
{
    struct worker_lane *lane = slot->lane;
    struct worker_job *job = NULL;
    bool is_last = false;

    pthread_mutex_lock(&lane->guard);
    if (list_is_empty(&lane->jobs)) {
        slot->running = false;
        is_last = lane->destroyed && lane_rests(lane);
    } else {
        job = container_of(lane->jobs.next, struct worker_job, link);
        list_remove(&job->link);
    }
    pthread_mutex_unlock(&lane->guard);
    if (is_last) {
        lane_free(lane);
    }
    return job;
}

static bool pool_others_wait(void)
{
    pthread_mutex_lock(&pool.guard);
    bool wait = pool.waiting > pool.idle;
    pthread_mutex_unlock(&pool.guard);
    return wait;
}

static int lane_work(void *argument)
{
    struct lane_slot *slot = argument;
    struct worker_job *job = lane_next(slot);

    while (job) {
        struct coroutine *waiter = job->waiter;

        job->result = job->work(job->argument);
        bool queued = pool_others_wait() && pool_submit(&slot->job);

        job = queued ? NULL : lane_next(slot);
        coroutine_wake(waiter);
    }
    return 0;
}

struct worker_lane *worker_lane_create(unsigned width)
{
    g_assert(width > 0 && width <= WORKER_LANE_MAX);
    struct worker_lane *lane = g_new0(struct worker_lane, 1);

    pthread_mutex_init(&lane->guard, NULL);
    list_init(&lane->jobs);
    lane->width = width;
    for (unsigned i = 0; i < width; i++) {
        struct lane_slot *slot = &lane->slots[i];

        *slot = (struct lane_slot){.lane = lane, .job = {.work = lane_work, .argument = slot}};
    }
    return lane;
}

void worker_lane_destroy(struct worker_lane *lane)
{
    if (lane) {
        pthread_mutex_lock(&lane->guard);
        g_assert(list_is_empty(&lane->jobs));
        lane->destroyed = true;
        bool rests = lane_rests(lane);
        pthread_mutex_unlock(&lane->guard);
        if (rests) {
            lane_free(lane);
        }
    }
}

/* With the guard held: one that rests, and from now on runs; or NULL. */
static struct lane_slot *lane_take_slot(struct worker_lane *lane)
{
    for (unsigned i = 0; i < lane->width; i++) {
        if (!lane->slots[i].running) {
            lane->slots[i].running = true;
            return &lane->slots[i];
        }
    }
    return NULL;
}

int coroutine_fn worker_lane_run(struct worker_lane *lane, int (*work)(void *argument), void *argument)
{
    struct worker_job job = {.work = work, .argument = argument, .waiter = coroutine_self()};

    pthread_mutex_lock(&lane->guard);
    list_append(&lane->jobs, &job.link);
    struct lane_slot *slot = lane_take_slot(lane);
    pthread_mutex_unlock(&lane->guard);
    if (slot && !pool_submit(&slot->job)) {
        lane_work(slot); /* wakes this coroutine too */
    }
    coroutine_yield();
    return job.result;
}

/* ---- turns ---- */

void worker_turn_init(struct worker_turn *turn)
{
    *turn = (struct worker_turn){.waiting = 0};
    pthread_mutex_init(&turn->guard, NULL);
    pthread_cond_init(&turn->nearly_over, NULL);
}

void worker_turn_destroy(struct worker_turn *turn)
{
    g_assert(!atomic_load(&turn->taken) && !turn->waiting);
    pthread_cond_destroy(&turn->nearly_over);
    pthread_mutex_destroy(&turn->guard);
}

void worker_turn_begin(struct worker_turn *turn)
{
    while (atomic_exchange(&turn->taken, true)) {
        if (atomic_load(&turn->ending)) {
            sched_yield();
            continue;
        }
        pthread_mutex_lock(&turn->guard);
        turn->waiting++;
        /* Whoever ends it, or says so, after this look finds us waiting. */
        if (atomic_load(&turn->taken) && !atomic_load(&turn->ending)) {
            pthread_cond_wait(&turn->nearly_over, &turn->guard);
        }
        turn->waiting--;
        pthread_mutex_unlock(&turn->guard);
    }
}

static void turn_wake_one(struct worker_turn *turn)
{
    pthread_mutex_lock(&turn->guard);
    if (turn->waiting) {
        pthread_cond_signal(&turn->nearly_over);
    }
    pthread_mutex_unlock(&turn->guard);
}

void worker_turn_end_soon(struct worker_turn *turn)
{
    atomic_store(&turn->ending, true);
    turn_wake_one(turn);
}

void worker_turn_end(struct worker_turn *turn)
{
    atomic_store(&turn->ending, false);
    atomic_store(&turn->taken, false);
    turn_wake_one(turn);
}

int coroutine_fn worker_run(int (*work)(void *argument), void *argument)
{
    g_assert(coroutine_running());
    return engine_self()->ops->work(work, argument);
}

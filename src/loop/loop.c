/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The event loop: who runs next on a thread. One queue of ready tasks (a coroutine that was woken is one),
 * an inbox that other threads push to, the tasks of the turn's end, and one visit to the engine per turn.
 * Invariants:
 * 1. the ready queue and the turn-end queue are touched by the loop's own thread only;
 * 2. whoever pushes to an empty inbox interrupts the loop if it sleeps; the loop says that it sleeps before
 *    it looks at the inbox for the last time: one of the two sees the other;
 * 3. a local wake makes no system call and no atomic read-modify-write;
 * 4. a loop is not destroyed while another thread is inside of loop_post() or loop_stop() for it (`visitors`);
 * 5. a turn visits the engine after at most ROUNDS_MAX rounds, however busy the coroutines are.
 * Called from the thread's main function (loop_run) or from a synchronous program (loop_run_coroutine).
 */
#include "loop/loop.h"
#include "loop/busy_poll.h"
#include "loop/loop_private.h"
#include <errno.h>
#include <glib.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

/* Rounds through the ready queue before the engine is visited. */
#define ROUNDS_MAX 8

__thread struct loop *loop_current;

struct loop *loop_self(void)
{
    return loop_current;
}

struct engine *engine_self(void)
{
    return loop_current->engine;
}

const char *loop_engine_name(struct loop *loop)
{
    return loop->engine->ops->name;
}

pid_t loop_thread_id(struct loop *loop)
{
    return loop->thread_id;
}

static void loop_interrupt_if_sleeping(struct loop *loop)
{
    if (atomic_load(&loop->sleeping) && atomic_exchange(&loop->sleeping, false)) {
        loop->engine->ops->interrupt(loop->engine);
    }
}

void loop_post(struct loop *loop, struct loop_task *task)
{
    if (loop == loop_current) {
        task_queue_append(&loop->ready, task);
        return;
    }
    atomic_fetch_add(&loop->visitors, 1);
    struct loop_task *head = atomic_load_explicit(&loop->inbox, memory_order_relaxed);
    do {
        task->next = head;
    } while (!atomic_compare_exchange_weak(&loop->inbox, &head, task));
    /* Once it is in, the task belongs to the loop, which lives until we are out; who found it empty must be heard. */
    if (!head) {
        loop_interrupt_if_sleeping(loop);
    }
    atomic_fetch_sub(&loop->visitors, 1);
}

/* Moves the inbox behind the ready queue, the oldest first. */
static void loop_take_inbox(struct loop *loop)
{
    if (!atomic_load_explicit(&loop->inbox, memory_order_relaxed)) {
        return;
    }
    struct loop_task *task = atomic_exchange(&loop->inbox, NULL), *reversed = NULL;

    while (task) {
        struct loop_task *next = task->next;

        task->next = reversed;
        reversed = task;
        task = next;
    }
    while (reversed) {
        struct loop_task *next = reversed->next;

        task_queue_append(&loop->ready, reversed);
        reversed = next;
    }
}

/* Runs what is in the queue now; what is added meanwhile stays for the next round. */
static void loop_run_round(struct loop *loop, struct task_queue *queue)
{
    struct loop_task *task = queue->first;

    task_queue_init(queue);
    while (task) {
        struct loop_task *next = task->next;

        loop->budget = LOOP_BUDGET;
        loop->more_in_round = next != NULL;
        task->run(task);
        task = next;
        loop_step(loop);
    }
}

void loop_at_turn_end(struct loop_task *task)
{
    if (!task->queued) {
        task->queued = true;
        task_queue_append(&loop_current->turn_end, task);
    }
}

void loop_set_busy_poll_ns(struct loop *loop, int64_t ns)
{
    atomic_store_explicit(&loop->busy_poll_ns, ns, memory_order_relaxed);
}

int64_t loop_busy_poll_ns(struct loop *loop)
{
    return atomic_load_explicit(&loop->busy_poll_ns, memory_order_relaxed);
}

bool loop_has_others(const struct loop_task *task)
{
    const struct loop *loop = loop_current;
    const struct loop_task *first = loop->turn_end.first;

    return loop->more_in_round || loop->ready.first || (first && (first != task || first->next));
}

static void loop_run_turn_end(struct loop *loop)
{
    struct loop_task *task = loop->turn_end.first;

    task_queue_init(&loop->turn_end);
    while (task) {
        struct loop_task *next = task->next;

        task->queued = false;
        loop->budget = LOOP_BUDGET;
        task->run(task);
        task = next;
    }
}

/* How long the engine may wait: nobody is ready here. */
static int64_t loop_timeout_ns(struct loop *loop)
{
    int64_t next_ns = timer_next_ns(loop);

    if (next_ns == INT64_MAX) {
        return -1;
    }
    int64_t now_ns = loop->engine->ops->clock_ns();

    return next_ns > now_ns ? next_ns - now_ns : 0;
}

static void loop_visit_engine(struct loop *loop)
{
    int64_t timeout_ns = 0;

    if (!loop->ready.first && !loop->turn_end.first && !loop->hurry) {
        atomic_store(&loop->sleeping, true);
        if (!atomic_load(&loop->inbox) && !atomic_load(&loop->stop) && !signal_is_pending(loop)) {
            timeout_ns = loop_timeout_ns(loop);
        }
    }
    loop->engine->ops->turn(loop->engine, timeout_ns);
    atomic_store_explicit(&loop->sleeping, false, memory_order_relaxed);
    loop->now_ns = loop->engine->ops->clock_ns();
}

static void loop_turn(struct loop *loop)
{
    g_assert(loop == loop_current && !loop->running && !loop->running_tasks);
    loop->running_tasks = true;
    loop_take_inbox(loop);
    for (unsigned round = 0; loop->ready.first && round < ROUNDS_MAX; round++) {
        loop_run_round(loop, &loop->ready);
        loop_take_inbox(loop);
    }
    loop_run_turn_end(loop);
    loop_visit_engine(loop);
    timer_run_due(loop);
    if (signal_is_pending(loop)) {
        signal_run_pending(loop);
    }
    loop->running_tasks = false;
}

void loop_run(struct loop *loop)
{
    while (!atomic_load_explicit(&loop->stop, memory_order_acquire)) {
        loop_turn(loop);
    }
    atomic_store(&loop->stop, false);
}

void loop_stop(struct loop *loop)
{
    atomic_fetch_add(&loop->visitors, 1);
    atomic_store(&loop->stop, true);
    loop_interrupt_if_sleeping(loop);
    atomic_fetch_sub(&loop->visitors, 1);
}

struct loop_run_state {
    void (*entry)(void *argument);
    void *argument;
    bool done;
};

static void loop_run_entry(void *argument)
{
    struct loop_run_state *state = argument;

    state->entry(state->argument);
    state->done = true;
    loop_current->hurry = true;
}

void loop_run_coroutine(struct loop *loop, void (*entry)(void *argument), void *argument)
{
    struct loop_run_state state = {entry, argument, false};

    g_assert(loop == loop_current && !loop->running && !loop->running_tasks);
    loop->now_ns = loop->engine->ops->clock_ns();
    loop->budget = LOOP_BUDGET;
    coroutine_enter(coroutine_create(loop_run_entry, &state));
    while (!state.done) {
        loop_turn(loop);
    }
    loop->hurry = false;
}

int loop_create(enum engine_kind kind, struct loop **ret, struct error **err)
{
    struct engine *engine;
    struct loop *loop;
    int r;

    g_assert(!loop_current);
    r = engine_create(kind, &engine, err);
    if (r < 0) {
        return r;
    }
    g_assert(posix_memalign((void **)&loop, 64, sizeof(*loop)) == 0);
    *loop = (struct loop){.engine = engine, .preemptible = engine->ops->step, .thread_id = gettid()};
    atomic_init(&loop->busy_poll_ns, BUSY_POLL_NS);
    task_queue_init(&loop->ready);
    task_queue_init(&loop->turn_end);
    coroutine_loop_init(loop);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* a file that may not grow fails with EFBIG, and no more than that */
    loop->now_ns = engine->ops->clock_ns();
    loop_current = loop;
    *ret = loop;
    return 0;
}

/* Everything of a loop but its memory; on its own thread. */
static void loop_finish(struct loop *loop)
{
    g_assert(loop == loop_current && !loop->running && !loop->running_tasks);
    /* What was posted before has the right to run: a task's owner waits for it. */
    loop_take_inbox(loop);
    while (loop->ready.first || loop->turn_end.first) {
        loop_run_round(loop, &loop->ready);
        loop_run_turn_end(loop);
        loop_take_inbox(loop);
    }
    /* Whoever posted the last of it may still be on the way out. */
    while (atomic_load(&loop->visitors)) {
        sched_yield();
    }
    signal_loop_finish(loop);
    coroutine_loop_finish(loop);
    timer_loop_finish(loop);
    loop->engine->ops->destroy(loop->engine);
    loop_current = NULL;
}

void loop_destroy(struct loop *loop)
{
    loop_finish(loop);
    free(loop);
}

/* What a starting thread and its starter share, on the starter's stack. */
struct loop_start {
    enum engine_kind kind;
    struct loop *loop;
    struct error *err;
    int result;
    bool ready;
    pthread_mutex_t guard;
    pthread_cond_t started;
};

static void loop_thread_main(void *argument)
{
    struct loop_start *start = argument;
    struct loop *loop = NULL;
    struct error *err = NULL;
    int r = loop_create(start->kind, &loop, &err);

    pthread_mutex_lock(&start->guard);
    start->loop = loop;
    start->err = err;
    start->result = r;
    start->ready = true;
    pthread_cond_signal(&start->started);
    pthread_mutex_unlock(&start->guard);
    if (loop) {
        loop_run(loop);
        loop_finish(loop);
    }
}

int loop_thread_start(const char *name, enum engine_kind kind, struct loop **ret, struct error **err)
{
    struct loop_start start = {.kind = kind};
    struct engine_thread *thread;
    const struct engine_ops *ops = engine_ops_self();
    int r;

    pthread_mutex_init(&start.guard, NULL);
    pthread_cond_init(&start.started, NULL);
    r = ops->thread_start(name, loop_thread_main, &start, &thread);
    if (r < 0) {
        error_set_errno(err, r, "Could not start thread '%s'", name);
    } else {
        pthread_mutex_lock(&start.guard);
        while (!start.ready) {
            pthread_cond_wait(&start.started, &start.guard);
        }
        pthread_mutex_unlock(&start.guard);
        r = start.result;
        if (r < 0) {
            ops->thread_join(thread);
            error_move(err, start.err);
        } else {
            start.loop->thread = thread;
            *ret = start.loop;
        }
    }
    pthread_cond_destroy(&start.started);
    pthread_mutex_destroy(&start.guard);
    return r;
}

void loop_thread_join(struct loop *loop)
{
    g_assert(loop->thread && loop != loop_current);
    loop_stop(loop);
    engine_ops_self()->thread_join(loop->thread);
    free(loop);
}

struct loop_spawn {
    struct loop_task task;
    void (*entry)(void *argument);
    void *argument;
};

static void loop_spawn_run(struct loop_task *task)
{
    struct loop_spawn *spawn = container_of(task, struct loop_spawn, task);
    struct coroutine *co = coroutine_create(spawn->entry, spawn->argument);

    g_free(spawn);
    coroutine_enter(co);
}

void loop_spawn(struct loop *loop, void (*entry)(void *argument), void *argument)
{
    struct loop_spawn *spawn = g_new(struct loop_spawn, 1);

    *spawn = (struct loop_spawn){{.run = loop_spawn_run}, entry, argument};
    loop_post(loop, &spawn->task);
}

void coroutine_fn loop_spend(unsigned units)
{
    struct loop *loop = loop_current;

    if (loop->budget > units) {
        loop->budget -= units;
    } else {
        loop->budget = LOOP_BUDGET;
        coroutine_pause();
    }
}

int64_t loop_now_ns(void)
{
    return loop_current ? loop_current->now_ns : loop_clock_ns();
}

int64_t loop_clock_ns(void)
{
    return engine_ops_self()->clock_ns();
}

int64_t loop_realtime_us(void)
{
    return engine_ops_self()->realtime_us();
}

uint64_t loop_random(void)
{
    return engine_ops_self()->random();
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_LOOP_PRIVATE_H
#define INTERLOCK_LOOP_LOOP_PRIVATE_H

#include "loop/context.h"
#include "loop/coroutine.h"
#include "loop/engine.h"
#include "loop/loop.h"
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* The inside of a loop and of a coroutine, for src/loop only. */

struct coroutine {
    struct context context;
    struct loop_task ready; /* on the loop's ready queue or in its inbox */
    struct loop *loop;
    struct coroutine *caller; /* who entered; NULL: the loop */
    void (*entry)(void *argument);
    void *argument;
    atomic_bool woken; /* on its way through the ready queue */
    bool entered;      /* running, or has entered another one */
    bool ended;
    struct coroutine *next_free;
    void *stack; /* its lowest byte */
};

struct task_queue {
    struct loop_task *first, **last;
};

/* Inline work that a coroutine may do before it lets others run. */
#define LOOP_BUDGET 64

struct loop {
    struct engine *engine;
    struct coroutine *running; /* NULL: the loop itself */
    struct context root;
    struct task_queue ready;    /* this thread only */
    struct task_queue turn_end; /* this thread only */
    bool more_in_round;         /* behind the task that runs */
    atomic_int_fast64_t busy_poll_ns;
    int64_t now_ns;
    unsigned budget;
    bool running_tasks; /* a turn is under way */
    bool hurry;         /* loop_run_coroutine() is done: do not wait any more */
    bool watches_signals;
    bool preemptible; /* its engine has a step */
    pid_t thread_id;

    struct loop_timer **timers; /* binary heap from [1] on, the earliest first */
    unsigned timer_count, timer_room;

    struct coroutine *free_coroutines;
    unsigned free_count;
    unsigned live_count; /* created and not ended */

    struct engine_thread *thread; /* loop_thread_start() only */

    /* Written by other threads. */
    _Atomic(struct loop_task *) inbox __attribute__((aligned(64))); /* newest first */
    atomic_uint visitors; /* other threads that are using this loop right now */
    atomic_bool sleeping;
    atomic_bool stop;
};

extern __thread struct loop *loop_current;

static inline void task_queue_init(struct task_queue *queue)
{
    queue->first = NULL;
    queue->last = &queue->first;
}
static inline void task_queue_append(struct task_queue *queue, struct loop_task *task)
{
    task->next = NULL;
    *queue->last = task;
    queue->last = &task->next;
}

/* A simulated world may let another thread go on here: between tasks, and in coroutines where no guard is held. */
static inline void loop_step(struct loop *loop)
{
    if (__builtin_expect(loop->preemptible, false)) {
        loop->engine->ops->step(loop->engine);
    }
}

/* coroutine.c */
void coroutine_loop_init(struct loop *loop);   /* the calling thread's stack becomes the root */
void coroutine_loop_finish(struct loop *loop); /* frees the pool */

/* timer.c */
void timer_run_due(struct loop *loop);
int64_t timer_next_ns(struct loop *loop); /* INT64_MAX: none */
void timer_loop_finish(struct loop *loop);

/* signal.c */
void signal_run_pending(struct loop *loop);
bool signal_is_pending(struct loop *loop);
void signal_loop_finish(struct loop *loop);

#endif

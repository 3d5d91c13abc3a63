/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_LOOP_H
#define INTERLOCK_LOOP_LOOP_H

#include "base/error.h"
#include "base/list.h"
#include "loop/coroutine.h"
#include <stdbool.h>
#include <stdint.h>

/*
 * One event loop per thread. A turn: run ready coroutines and posted tasks, run the turn-end tasks,
 * enter the engine once (submit everything, wait if nothing is ready), run due timers.
 * Everything with a clock, a random number, a thread or a system call that takes time goes through
 * here, so that the `sim` engine can replace it.
 */
struct loop;

enum engine_kind {
    ENGINE_AUTO,  /* uring where the kernel allows it, else epoll */
    ENGINE_URING, /* fails where io_uring is refused */
    ENGINE_EPOLL,
    ENGINE_SIM, /* in the thread's simulated world (loop/sim.h); for tests */
};
int engine_parse(const char *name, enum engine_kind *ret, struct error **err);

/* Work to be run once on a loop's thread (not in a coroutine). Embedded by its owner, who keeps it alive until it ran.
 */
struct loop_task {
    void (*run)(struct loop_task *task);
    struct loop_task *next;
    bool queued; /* turn-end tasks only */
};

/* A loop for the calling thread (the control thread). */
int loop_create(enum engine_kind kind, struct loop **ret, struct error **err);
/* Runs turns until loop_stop(). */
void loop_run(struct loop *loop);
/* Any thread: makes loop_run() return after the current turn. */
void loop_stop(struct loop *loop);
/* Runs turns on the calling thread until entry has returned; for programs and tests: "synchronous callers run it". */
void loop_run_coroutine(struct loop *loop, void (*entry)(void *argument), void *argument);
/* All of its coroutines have ended. */
void loop_destroy(struct loop *loop);
/* A loop on a thread of its own, running until loop_thread_join(). `name` is cut to 15 characters. */
int loop_thread_start(const char *name, enum engine_kind kind, struct loop **ret, struct error **err);
void loop_thread_join(struct loop *loop); /* stops, joins and destroys; not from that thread */

/* For how long at most it looks for what comes before it sleeps (loop/busy_poll.h); 0: not at all. Any thread. */
void loop_set_busy_poll_ns(struct loop *loop, int64_t ns);
int64_t loop_busy_poll_ns(struct loop *loop);

struct loop *loop_self(void); /* NULL on a thread without one */
const char *loop_engine_name(struct loop *loop);
pid_t loop_thread_id(struct loop *loop);

/* Any thread: runs the task on the loop's thread, in order. */
void loop_post(struct loop *loop, struct loop_task *task);
/* Any thread: creates a coroutine on `loop` and starts it from there. */
void loop_spawn(struct loop *loop, void (*entry)(void *argument), void *argument);
/* The loop's own thread: runs the task once at the end of this turn, before the engine is entered. Twice is once. */
void loop_at_turn_end(struct loop_task *task);
/* Does anything else run in this turn, before its end or at its end? `task` does not count. */
bool loop_has_others(const struct loop_task *task);

/* Monotonic time, read once per turn and fresh enough for limits; loop_clock_ns() asks the clock. */
int64_t loop_now_ns(void);
int64_t loop_clock_ns(void);
/* Seconds and microseconds since the epoch, for event time stamps. */
int64_t loop_realtime_us(void);
uint64_t loop_random(void);

/* A one-shot timer; used on one loop only. */
struct loop_timer {
    struct loop *loop;
    void (*fire)(struct loop_timer *timer); /* on the loop, not in a coroutine */
    int64_t deadline_ns;
    unsigned heap_index; /* 0 = not armed */
};
void loop_timer_init(struct loop_timer *timer, void (*fire)(struct loop_timer *timer));
void loop_timer_arm(struct loop_timer *timer, int64_t deadline_ns);
void loop_timer_cancel(struct loop_timer *timer); /* harmless when not armed */

/* A sleep that another coroutine or callback on the same loop can end early. Zero-initialise. */
struct loop_sleep {
    struct coroutine *sleeper;
};
/* Returns true when it slept to the end, false when woken. */
bool coroutine_fn loop_sleep_ns(struct loop_sleep *sleep, int64_t duration_ns);
void loop_sleep_wake(struct loop_sleep *sleep); /* no-op when nobody sleeps */

/* Calls `handle` on the calling loop (not in a coroutine) for each delivery of `signal_number`; the control loop only.
 */
int loop_watch_signal(int signal_number, void (*handle)(int signal_number, void *argument), void *argument);

#endif

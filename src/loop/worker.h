/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_WORKER_H
#define INTERLOCK_LOOP_WORKER_H

#include "loop/coroutine.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

/* Runs `work` on the process-wide worker pool while the coroutine sleeps; returns what it returned.
 * For what has no asynchronous system call, and for computing that would hold up a loop. */
int coroutine_fn worker_run(int (*work)(void *argument), void *argument);

/*
 * A lane on that pool: its jobs are begun in order, and `width` of them at a time (WORKER_LANE_MAX at most) are done.
 * For calls that would only wait for each other in the kernel, or for a processor: a worker goes on with the next one
 * and need not be woken for it. Made and destroyed (with no job in it) on any thread.
 */
#define WORKER_LANE_MAX 4
struct worker_lane;
struct worker_lane *worker_lane_create(unsigned width);
void worker_lane_destroy(struct worker_lane *lane); /* accepts NULL */
int coroutine_fn worker_lane_run(struct worker_lane *lane, int (*work)(void *argument), void *argument);

/*
 * A turn, for the same in the middle of a job that does other things as well: one worker at a time has it. Who has it
 * says when it is nearly over, so that the next one is awake by then. Any thread but a loop's.
 */
struct worker_turn {
    pthread_mutex_t guard;
    pthread_cond_t nearly_over;
    atomic_bool taken, ending;
    unsigned waiting; /* asleep */
};
void worker_turn_init(struct worker_turn *turn);
void worker_turn_destroy(struct worker_turn *turn);
void worker_turn_begin(struct worker_turn *turn);
void worker_turn_end_soon(struct worker_turn *turn); /* a hint; not asked for */
void worker_turn_end(struct worker_turn *turn);

#endif

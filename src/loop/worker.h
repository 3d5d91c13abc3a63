/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_WORKER_H
#define INTERLOCK_LOOP_WORKER_H

#include "loop/coroutine.h"

/* Runs `work` on the process-wide worker pool while the coroutine sleeps; returns what it returned.
 * For what has no asynchronous system call, and for computing that would hold up a loop. */
int coroutine_fn worker_run(int (*work)(void *argument), void *argument);

/*
 * A lane on that pool: its jobs are done in order, one at a time. For calls that would only wait for each other in the
 * kernel: whoever is next waits without a processor. Made and destroyed (with no job in it) on any thread.
 */
struct worker_lane;
struct worker_lane *worker_lane_create(void);
void worker_lane_destroy(struct worker_lane *lane); /* accepts NULL */
int coroutine_fn worker_lane_run(struct worker_lane *lane, int (*work)(void *argument), void *argument);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_WORKER_H
#define INTERLOCK_LOOP_WORKER_H

#include "loop/coroutine.h"

/* Runs `work` on the process-wide worker pool while the coroutine sleeps; returns what it returned.
 * For what has no asynchronous system call, and for computing that would hold up a loop. */
int coroutine_fn worker_run(int (*work)(void *argument), void *argument);

#endif

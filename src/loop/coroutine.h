/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_COROUTINE_H
#define INTERLOCK_LOOP_COROUTINE_H

#include <stdbool.h>

/*
 * Stackful coroutines. Each belongs to the loop of the thread that created it and never moves.
 * Stacks (256 KiB, guard page below) are pooled per thread. `coroutine_fn` marks a function that may
 * yield and so must be called from a coroutine.
 *
 * The contract of yield and wake: whoever yields has told exactly one other party, and that party
 * wakes it exactly once. The wake may come before the yield, and from any thread.
 */
#define coroutine_fn

struct coroutine;

/* Creates (does not start) a coroutine on the calling thread's loop. Freed by itself when entry returns. */
struct coroutine *coroutine_create(void (*entry)(void *argument), void *argument);
/* Runs `co` now until it yields or ends. Caller is on co's loop thread; may itself be a coroutine (nesting). */
void coroutine_enter(struct coroutine *co);
/* Back to whoever entered. */
void coroutine_fn coroutine_yield(void);
/* The running coroutine, or NULL. */
struct coroutine *coroutine_self(void);
static inline bool coroutine_running(void)
{
    return coroutine_self() != (void *)0;
}
/* Any thread: puts `co` on its loop's ready queue; it is entered from the loop, never from here. */
void coroutine_wake(struct coroutine *co);
/* Lets the loop's other ready work run, then goes on. */
void coroutine_fn coroutine_pause(void);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_GATE_H
#define INTERLOCK_LOOP_GATE_H

#include "base/list.h"
#include "loop/coroutine.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * A gate that coroutines of any loop pass, and that can be closed: who comes then waits, and the closer can wait until
 * nobody is inside. Passing an open gate is one atomic operation each way; no lock.
 */
struct gate {
    atomic_uint_fast64_t state; /* low half: how many are inside; high half: how often it is closed */
    pthread_mutex_t guard;      /* waiters, closer; leaving while it is closed */
    struct list waiters;
    struct coroutine *closer;
};
#define GATE_CLOSED ((uint64_t)1 << 32)

void gate_init(struct gate *gate);
void gate_destroy(struct gate *gate);                   /* asserts: open, nobody inside, nobody waiting */
void coroutine_fn gate_enter_closed(struct gate *gate); /* the slow half of gate_enter() */
void gate_leave_closed(struct gate *gate);              /* the slow half of gate_leave() */

/* Goes in; waits while the gate is closed. */
static inline void coroutine_fn gate_enter(struct gate *gate)
{
    if (__builtin_expect(atomic_fetch_add(&gate->state, 1) >= GATE_CLOSED, 0)) {
        gate_enter_closed(gate);
    }
}

/* Goes in if it is open. */
static inline bool gate_try_enter(struct gate *gate)
{
    uint_fast64_t old = atomic_load_explicit(&gate->state, memory_order_relaxed);
    do {
        if (old >= GATE_CLOSED) {
            return false;
        }
    } while (!atomic_compare_exchange_weak(&gate->state, &old, old + 1));
    return true;
}

/* Goes out. Does not touch the gate any more once a closer may have seen it empty. */
static inline void gate_leave(struct gate *gate)
{
    uint_fast64_t old = atomic_load_explicit(&gate->state, memory_order_relaxed);
    do {
        if (__builtin_expect(old >= GATE_CLOSED, 0)) {
            gate_leave_closed(gate);
            return;
        }
    } while (!atomic_compare_exchange_weak(&gate->state, &old, old - 1));
}

/* From here on who comes waits. Counts. */
void gate_close(struct gate *gate);
/* The gate is closed: returns when nobody is inside. One coroutine at a time. */
void coroutine_fn gate_settle(struct gate *gate);
/* Undoes one gate_close(); with the last one who waits goes in. */
void gate_open(struct gate *gate);

#endif

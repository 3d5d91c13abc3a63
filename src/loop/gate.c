/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Gates. Owns the slow halves: coming to a closed gate, leaving one, closing and opening.
 *
 * 1. `state` holds who is inside and how often the gate is closed in one word. Who enters adds itself first; seeing the
 *    gate closed, it takes itself out again and queues. So either the closer counts it, or it sees the closed gate.
 * 2. Who leaves an open gate does so by compare-and-swap and never touches the gate after it: whoever has closed it and
 *    seen nobody inside may destroy it. Who leaves a closed gate does it under `guard`, which the closer takes too.
 * 3. A queued coroutine's frame is gone as soon as it is woken: it is unlinked before.
 *
 * Whom a gate stands for, and in which order several are closed, is its owner's.
 */
#include "loop/gate.h"
#include <glib.h>
#include <stdbool.h>

#define INSIDE (GATE_CLOSED - 1)

struct gate_waiter {
    struct list link;
    struct coroutine *coroutine;
};

void gate_init(struct gate *gate)
{
    atomic_init(&gate->state, 0);
    pthread_mutex_init(&gate->guard, NULL);
    list_init(&gate->waiters);
    gate->closer = NULL;
}

void gate_destroy(struct gate *gate)
{
    /* Taking the guard waits for the last one to have let go of it. */
    pthread_mutex_lock(&gate->guard);
    g_assert(!atomic_load(&gate->state) && list_is_empty(&gate->waiters) && !gate->closer);
    pthread_mutex_unlock(&gate->guard);
    pthread_mutex_destroy(&gate->guard);
}

/* The guard is held: the last one out wakes the closer. */
static void leave_guarded(struct gate *gate)
{
    uint64_t old = atomic_fetch_sub(&gate->state, 1);
    g_assert(old & INSIDE);
    if ((old & INSIDE) == 1 && gate->closer) {
        struct coroutine *closer = gate->closer;
        gate->closer = NULL;
        coroutine_wake(closer);
    }
}

void gate_leave_closed(struct gate *gate)
{
    pthread_mutex_lock(&gate->guard);
    leave_guarded(gate);
    pthread_mutex_unlock(&gate->guard);
}

void coroutine_fn gate_enter_closed(struct gate *gate)
{
    do {
        struct gate_waiter waiter = {.coroutine = coroutine_self()};
        pthread_mutex_lock(&gate->guard);
        leave_guarded(gate);
        bool closed = atomic_load(&gate->state) >= GATE_CLOSED;
        if (closed) {
            list_append(&gate->waiters, &waiter.link);
        }
        pthread_mutex_unlock(&gate->guard);
        if (closed) {
            coroutine_yield();
        }
    } while (atomic_fetch_add(&gate->state, 1) >= GATE_CLOSED);
}

void gate_close(struct gate *gate)
{
    atomic_fetch_add(&gate->state, GATE_CLOSED);
}

void coroutine_fn gate_settle(struct gate *gate)
{
    for (;;) {
        pthread_mutex_lock(&gate->guard);
        bool occupied = atomic_load(&gate->state) & INSIDE;
        if (occupied) {
            g_assert(!gate->closer);
            gate->closer = coroutine_self();
        }
        pthread_mutex_unlock(&gate->guard);
        if (!occupied) {
            return;
        }
        coroutine_yield();
    }
}

void gate_open(struct gate *gate)
{
    pthread_mutex_lock(&gate->guard);
    uint64_t old = atomic_fetch_sub(&gate->state, GATE_CLOSED);
    g_assert(old >= GATE_CLOSED);
    while (old < 2 * GATE_CLOSED && !list_is_empty(&gate->waiters)) {
        struct gate_waiter *waiter = container_of(gate->waiters.next, struct gate_waiter, link);
        list_remove(&waiter->link);
        coroutine_wake(waiter->coroutine);
    }
    pthread_mutex_unlock(&gate->guard);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Signals, delivered on the control loop. The handler, whatever thread it interrupts, sets a bit and
 * ends the loop's wait; the loop looks at the bits once per turn. Invariants:
 * 1. a signal is watched by one loop, and its table row is written before its handler is installed;
 * 2. the bit is set before the loop is interrupted, so a delivery is never slept over;
 * 3. a loop that finishes waits for running handlers, which look at `watched` after they counted themselves;
 * 4. the handler uses async-signal-safe things only: lock-free atomics and the engine's interrupt (a write).
 */
#include "loop/loop_private.h"
#include <errno.h>
#include <glib.h>
#include <sched.h>
#include <signal.h>

#define SIGNAL_MAX 64

struct signal_watch {
    struct loop *loop;
    void (*handle)(int signal_number, void *argument);
    void *argument;
};
static struct signal_watch watches[SIGNAL_MAX];
static atomic_uint_least64_t watched, pending;
static atomic_uint handling; /* handlers that are running */

static void signal_caught(int signal_number)
{
    int saved_errno = errno;
    uint64_t bit = UINT64_C(1) << signal_number;

    atomic_fetch_add(&handling, 1);
    if (atomic_load(&watched) & bit) {
        struct loop *loop = watches[signal_number].loop;

        atomic_fetch_or(&pending, bit);
        loop->engine->ops->interrupt(loop->engine);
    }
    atomic_fetch_sub(&handling, 1);
    errno = saved_errno;
}

bool signal_is_pending(struct loop *loop)
{
    return loop->watches_signals && atomic_load_explicit(&pending, memory_order_relaxed) != 0;
}

void signal_run_pending(struct loop *loop)
{
    for (int number = 1; number < SIGNAL_MAX; number++) {
        uint64_t bit = UINT64_C(1) << number;

        if ((atomic_load(&watched) & atomic_load(&pending) & bit) && watches[number].loop == loop) {
            atomic_fetch_and(&pending, ~bit);
            watches[number].handle(number, watches[number].argument);
        }
    }
}

int loop_watch_signal(int signal_number, void (*handle)(int signal_number, void *argument), void *argument)
{
    struct sigaction action = {.sa_handler = signal_caught, .sa_flags = SA_RESTART};

    g_assert(loop_current && handle);
    if (signal_number < 1 || signal_number >= SIGNAL_MAX) {
        return -EINVAL;
    }
    if (atomic_load(&watched) & (UINT64_C(1) << signal_number)) {
        return -EBUSY;
    }
    loop_current->watches_signals = true;
    watches[signal_number] = (struct signal_watch){loop_current, handle, argument};
    sigfillset(&action.sa_mask);
    atomic_fetch_or(&watched, UINT64_C(1) << signal_number);
    if (sigaction(signal_number, &action, NULL) < 0) {
        atomic_fetch_and(&watched, ~(UINT64_C(1) << signal_number));
        return -errno;
    }
    return 0;
}

void signal_loop_finish(struct loop *loop)
{
    for (int number = 1; number < SIGNAL_MAX; number++) {
        uint64_t bit = UINT64_C(1) << number;

        if ((atomic_load(&watched) & bit) && watches[number].loop == loop) {
            signal(number, SIG_DFL);
            atomic_fetch_and(&watched, ~bit);
            atomic_fetch_and(&pending, ~bit);
        }
    }
    while (atomic_load(&handling)) {
        sched_yield();
    }
}

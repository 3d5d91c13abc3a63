/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_SYNC_PRIVATE_H
#define INTERLOCK_LOOP_SYNC_PRIVATE_H

#include "base/list.h"
#include <stdbool.h>

/* What the locks' lists of waiters hold: for sync.c, and for its tests to look at. */
struct coroutine;

/* One sleeper, on its own stack. */
struct co_waiter {
    struct list link;
    struct coroutine *sleeper;
    bool exclusive; /* rwlock: wants to write */
    bool woken;     /* mutex: is on its way to compete */
    bool lost;      /* mutex: somebody overtook it */
    bool handed;    /* mutex: owns it */
};

#endif

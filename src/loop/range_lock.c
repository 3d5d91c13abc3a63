/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The one range lock of the house. Holds and waiters stand in one list in order of arrival. Invariants, under
 * the guard:
 * 1. a hold is granted when no earlier one in the list conflicts with it, granted or not: nobody overtakes;
 * 2. two conflict when their ranges overlap and not both are shared; an empty range overlaps nothing;
 * 3. after every release, everyone who became free to go has been granted and woken.
 * Finding a conflict walks the list: it is meant for the few requests that need it, not for all of them.
 */
#include "loop/sync.h"
#include <glib.h>

static bool holds_conflict(const struct range_hold *a, const struct range_hold *b)
{
    if (!a->bytes || !b->bytes || (a->shared && b->shared)) {
        return false;
    }
    return a->offset < b->offset ? b->offset - a->offset < a->bytes : a->offset - b->offset < b->bytes;
}

static bool hold_is_free(struct range_lock *lock, struct range_hold *hold)
{
    for (struct list *link = lock->holds.next; link != &hold->link; link = link->next) {
        if (holds_conflict(container_of(link, struct range_hold, link), hold)) {
            return false;
        }
    }
    return true;
}

void range_lock_init(struct range_lock *lock)
{
    pthread_mutex_init(&lock->guard, NULL);
    list_init(&lock->holds);
}

void range_lock_destroy(struct range_lock *lock)
{
    g_assert(list_is_empty(&lock->holds));
    pthread_mutex_destroy(&lock->guard);
}

void coroutine_fn range_lock_acquire(struct range_lock *lock, struct range_hold *hold, uint64_t offset, uint64_t bytes,
                                     bool shared)
{
    *hold = (struct range_hold){.offset = offset, .bytes = bytes, .shared = shared};
    pthread_mutex_lock(&lock->guard);
    list_append(&lock->holds, &hold->link);
    if (hold_is_free(lock, hold)) {
        hold->granted = true;
        pthread_mutex_unlock(&lock->guard);
        return;
    }
    hold->sleeper = coroutine_self();
    g_assert(hold->sleeper);
    pthread_mutex_unlock(&lock->guard);
    coroutine_yield(); /* granted when we come back */
}

void range_lock_release(struct range_lock *lock, struct range_hold *hold)
{
    struct list *after;

    pthread_mutex_lock(&lock->guard);
    g_assert(hold->granted);
    after = hold->link.next;
    list_remove(&hold->link);
    for (struct list *link = after; link != &lock->holds; link = link->next) {
        struct range_hold *next = container_of(link, struct range_hold, link);

        if (!next->granted && holds_conflict(hold, next) && hold_is_free(lock, next)) {
            next->granted = true;
            coroutine_wake(next->sleeper);
        }
    }
    pthread_mutex_unlock(&lock->guard);
}

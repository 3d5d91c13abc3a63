/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Locks for coroutines: mutex, condition queue, read-write lock, group. A waiter stands on its
 * coroutine's stack in a list; whoever gives way wakes it, on whatever loop it sleeps. All but the mutex
 * take it off the list and give it what it waits for (hand-off: nobody overtakes). Invariants:
 * 1. a mutex's WAITED bit is set exactly while its list has waiters, and changes under the guard only. Who gives it
 *    up frees it and wakes the first waiter, which competes for it; one that has lost once gets it handed over. (With
 *    hand-off always, one wait makes every later user wait: the lock is never free while the next owner has not run
 *    yet.) A waiter that was woken and has not run yet is not woken again;
 * 2. a group's WAITED bit is set exactly while its list has waiters, and the count of a waited-for group
 *    goes to zero under the guard only; so a group may be destroyed as soon as a wait has returned;
 * 3. a read-write lock's waiters have been granted the lock when they are woken.
 * The guards are held for a few instructions, never across a yield. The range lock is range_lock.c.
 */
#include "loop/sync.h"
#include "loop/loop_private.h"
#include "loop/sync_private.h"
#include <glib.h>

enum { MUTEX_FREE = 0, MUTEX_HELD = 1, MUTEX_WAITED = 2 };

static struct co_waiter *waiter_first(struct list *waiters)
{
    return list_is_empty(waiters) ? NULL : container_of(waiters->next, struct co_waiter, link);
}

static inline void mutex_set_owner(struct co_mutex *mutex, struct coroutine *owner)
{
    __atomic_store_n(&mutex->owner, owner, __ATOMIC_RELAXED);
}

void co_mutex_init(struct co_mutex *mutex)
{
    atomic_init(&mutex->state, MUTEX_FREE);
    pthread_mutex_init(&mutex->guard, NULL);
    list_init(&mutex->waiters);
    mutex->owner = NULL;
}

void co_mutex_destroy(struct co_mutex *mutex)
{
    g_assert(atomic_load(&mutex->state) == MUTEX_FREE && list_is_empty(&mutex->waiters));
    pthread_mutex_destroy(&mutex->guard);
}

bool co_mutex_try_lock(struct co_mutex *mutex)
{
    unsigned state = atomic_load_explicit(&mutex->state, memory_order_relaxed);

    while (!(state & MUTEX_HELD)) {
        if (atomic_compare_exchange_weak_explicit(&mutex->state, &state, state | MUTEX_HELD, memory_order_acquire,
                                                  memory_order_relaxed)) {
            mutex_set_owner(mutex, coroutine_self());
            return true;
        }
    }
    return false;
}

/* With the guard held: takes a free mutex (true), or marks a held one as waited for. */
static bool mutex_take_or_mark(struct co_mutex *mutex)
{
    return !(atomic_fetch_or(&mutex->state, MUTEX_HELD | MUTEX_WAITED) & MUTEX_HELD);
}

static void coroutine_fn mutex_lock_slow(struct co_mutex *mutex)
{
    struct co_waiter waiter = {.sleeper = coroutine_self()};

    g_assert(waiter.sleeper && __atomic_load_n(&mutex->owner, __ATOMIC_RELAXED) != waiter.sleeper);
    pthread_mutex_lock(&mutex->guard);
    list_append(&mutex->waiters, &waiter.link);
    while (!mutex_take_or_mark(mutex)) {
        pthread_mutex_unlock(&mutex->guard);
        coroutine_yield();
        if (waiter.handed) {
            return;
        }
        pthread_mutex_lock(&mutex->guard);
        waiter.woken = false;
        waiter.lost = true;
    }
    list_remove(&waiter.link);
    if (list_is_empty(&mutex->waiters)) {
        atomic_store(&mutex->state, MUTEX_HELD);
    }
    mutex_set_owner(mutex, waiter.sleeper);
    pthread_mutex_unlock(&mutex->guard);
}

void coroutine_fn co_mutex_lock(struct co_mutex *mutex)
{
    if (loop_current) {
        loop_step(loop_current);
    }
    if (!co_mutex_try_lock(mutex)) {
        mutex_lock_slow(mutex);
    }
}

void co_mutex_unlock(struct co_mutex *mutex)
{
    unsigned expected = MUTEX_HELD;

    g_assert(__atomic_load_n(&mutex->owner, __ATOMIC_RELAXED) == coroutine_self());
    mutex_set_owner(mutex, NULL);
    if (atomic_compare_exchange_strong_explicit(&mutex->state, &expected, MUTEX_FREE, memory_order_release,
                                                memory_order_relaxed)) {
        return;
    }
    g_assert(expected == (MUTEX_HELD | MUTEX_WAITED));
    pthread_mutex_lock(&mutex->guard);
    struct co_waiter *first = waiter_first(&mutex->waiters);
    struct coroutine *to_wake = first->woken ? NULL : first->sleeper;

    if (first->lost && !first->woken) {
        list_remove(&first->link);
        first->handed = true;
        mutex_set_owner(mutex, first->sleeper);
        atomic_store(&mutex->state, list_is_empty(&mutex->waiters) ? MUTEX_HELD : MUTEX_HELD | MUTEX_WAITED);
    } else {
        first->woken = true;
        atomic_store(&mutex->state, MUTEX_WAITED);
    }
    pthread_mutex_unlock(&mutex->guard);
    if (to_wake) {
        coroutine_wake(to_wake);
    }
}

void co_queue_init(struct co_queue *queue)
{
    list_init(&queue->waiters);
}

void coroutine_fn co_queue_wait(struct co_queue *queue, struct co_mutex *mutex)
{
    struct co_waiter waiter = {.sleeper = coroutine_self()};

    list_append(&queue->waiters, &waiter.link);
    co_mutex_unlock(mutex);
    coroutine_yield();
    co_mutex_lock(mutex);
}

bool co_queue_wake_one(struct co_queue *queue)
{
    struct co_waiter *first = waiter_first(&queue->waiters);

    if (!first) {
        return false;
    }
    struct coroutine *sleeper = first->sleeper;

    list_remove(&first->link);
    coroutine_wake(sleeper);
    return true;
}

void co_queue_wake_all(struct co_queue *queue)
{
    while (co_queue_wake_one(queue)) {
    }
}

void co_rwlock_init(struct co_rwlock *lock)
{
    co_mutex_init(&lock->mutex);
    co_queue_init(&lock->queue);
    lock->readers = 0;
    lock->writers_waiting = 0;
}

void co_rwlock_destroy(struct co_rwlock *lock)
{
    g_assert(!lock->readers && list_is_empty(&lock->queue.waiters));
    co_mutex_destroy(&lock->mutex);
}

/* With the mutex held: lets in from the head of the queue who may come in now. */
static void rwlock_grant(struct co_rwlock *lock)
{
    struct co_waiter *first;

    while ((first = waiter_first(&lock->queue.waiters))) {
        if (first->exclusive ? lock->readers != 0 : lock->readers < 0) {
            break;
        }
        if (first->exclusive) {
            lock->readers = -1;
            lock->writers_waiting--;
        } else {
            lock->readers++;
        }
        co_queue_wake_one(&lock->queue);
    }
}

static void coroutine_fn rwlock_wait(struct co_rwlock *lock, bool exclusive)
{
    struct co_waiter waiter = {.sleeper = coroutine_self(), .exclusive = exclusive};

    list_append(&lock->queue.waiters, &waiter.link);
    co_mutex_unlock(&lock->mutex);
    coroutine_yield(); /* granted when we come back */
}

void coroutine_fn co_rwlock_read_lock(struct co_rwlock *lock)
{
    co_mutex_lock(&lock->mutex);
    if (lock->readers < 0 || !list_is_empty(&lock->queue.waiters)) {
        rwlock_wait(lock, false);
        return;
    }
    lock->readers++;
    co_mutex_unlock(&lock->mutex);
}

void coroutine_fn co_rwlock_read_unlock(struct co_rwlock *lock)
{
    co_mutex_lock(&lock->mutex);
    g_assert(lock->readers > 0);
    lock->readers--;
    rwlock_grant(lock);
    co_mutex_unlock(&lock->mutex);
}

void coroutine_fn co_rwlock_write_lock(struct co_rwlock *lock)
{
    co_mutex_lock(&lock->mutex);
    if (lock->readers || !list_is_empty(&lock->queue.waiters)) {
        lock->writers_waiting++;
        rwlock_wait(lock, true);
        return;
    }
    lock->readers = -1;
    co_mutex_unlock(&lock->mutex);
}

void coroutine_fn co_rwlock_write_unlock(struct co_rwlock *lock)
{
    co_mutex_lock(&lock->mutex);
    g_assert(lock->readers == -1);
    lock->readers = 0;
    rwlock_grant(lock);
    co_mutex_unlock(&lock->mutex);
}

#define GROUP_WAITED (1u << 31)

void co_group_init(struct co_group *group)
{
    atomic_init(&group->count, 0);
    pthread_mutex_init(&group->guard, NULL);
    list_init(&group->waiters);
}

void co_group_destroy(struct co_group *group)
{
    g_assert(atomic_load(&group->count) == 0);
    pthread_mutex_destroy(&group->guard);
}

void co_group_enter(struct co_group *group)
{
    unsigned before = atomic_fetch_add(&group->count, 1);

    g_assert((before & ~GROUP_WAITED) < GROUP_WAITED - 1);
}

/* The last one of a waited-for group leaves, or somebody entered while we came here. */
static void group_leave_waited(struct co_group *group)
{
    struct list woken;

    list_init(&woken);
    pthread_mutex_lock(&group->guard);
    if (atomic_fetch_sub(&group->count, 1) == (GROUP_WAITED | 1)) {
        while (!list_is_empty(&group->waiters)) {
            struct list *link = group->waiters.next;

            list_remove(link);
            list_append(&woken, link);
        }
        atomic_fetch_and(&group->count, ~GROUP_WAITED);
    }
    pthread_mutex_unlock(&group->guard);
    while (!list_is_empty(&woken)) {
        struct co_waiter *waiter = waiter_first(&woken);

        list_remove(&waiter->link);
        coroutine_wake(waiter->sleeper);
    }
}

void co_group_leave(struct co_group *group)
{
    unsigned count = atomic_load_explicit(&group->count, memory_order_relaxed);

    do {
        g_assert((count & ~GROUP_WAITED) > 0);
        if (count == (GROUP_WAITED | 1)) {
            group_leave_waited(group);
            return;
        }
    } while (!atomic_compare_exchange_weak(&group->count, &count, count - 1));
}

void coroutine_fn co_group_wait(struct co_group *group)
{
    struct co_waiter waiter = {.sleeper = coroutine_self()};

    g_assert(waiter.sleeper);
    /* Always by way of the guard: the last leaver may still be holding it. */
    pthread_mutex_lock(&group->guard);
    if ((atomic_fetch_or(&group->count, GROUP_WAITED) & ~GROUP_WAITED) == 0) {
        atomic_fetch_and(&group->count, ~GROUP_WAITED);
        pthread_mutex_unlock(&group->guard);
        return;
    }
    list_append(&group->waiters, &waiter.link);
    pthread_mutex_unlock(&group->guard);
    coroutine_yield();
}

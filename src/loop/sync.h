/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_SYNC_H
#define INTERLOCK_LOOP_SYNC_H

#include "base/list.h"
#include "loop/coroutine.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * Locks for coroutines that work across loops: the waker posts to the sleeper's loop. All are fair
 * (first come, first served); but the first who waits for a mutex may be overtaken until it has come once.
 */

/* Held across yields. Uncontended lock and unlock are one atomic operation each. */
struct co_mutex {
    atomic_uint state;     /* bits: 1 held, 2 has waiters */
    pthread_mutex_t guard; /* the waiters' list */
    struct list waiters;
    struct coroutine *owner; /* for assertions */
};
void co_mutex_init(struct co_mutex *mutex);
void co_mutex_destroy(struct co_mutex *mutex); /* asserts: free, no waiters */
void coroutine_fn co_mutex_lock(struct co_mutex *mutex);
bool co_mutex_try_lock(struct co_mutex *mutex);
void co_mutex_unlock(struct co_mutex *mutex);

/* Waiting for a condition that `mutex` protects. */
struct co_queue {
    struct list waiters;
};
void co_queue_init(struct co_queue *queue);
/* Unlocks mutex, waits, locks it again. All calls on one queue are made with the same mutex held. */
void coroutine_fn co_queue_wait(struct co_queue *queue, struct co_mutex *mutex);
/* Wakes the first / all; false when nobody waited. The mutex is held. */
bool co_queue_wake_one(struct co_queue *queue);
void co_queue_wake_all(struct co_queue *queue);

/* Many readers or one writer; a waiting writer stops new readers. */
struct co_rwlock {
    struct co_mutex mutex;
    struct co_queue queue;
    int readers; /* -1: a writer */
    unsigned writers_waiting;
};
void co_rwlock_init(struct co_rwlock *lock);
void co_rwlock_destroy(struct co_rwlock *lock);
void coroutine_fn co_rwlock_read_lock(struct co_rwlock *lock);
void coroutine_fn co_rwlock_read_unlock(struct co_rwlock *lock);
void coroutine_fn co_rwlock_write_lock(struct co_rwlock *lock);
void coroutine_fn co_rwlock_write_unlock(struct co_rwlock *lock);

/*
 * A group of running coroutines or requests that somebody waits for. enter/leave: any thread.
 * wait: until the count is 0; any number of waiters. Once a wait has returned and nobody enters any more,
 * the group may be destroyed.
 */
struct co_group {
    atomic_uint count; /* the top bit: somebody waits */
    pthread_mutex_t guard;
    struct list waiters;
};
void co_group_init(struct co_group *group);
void co_group_destroy(struct co_group *group);
void co_group_enter(struct co_group *group);
void co_group_leave(struct co_group *group);
void coroutine_fn co_group_wait(struct co_group *group);

/*
 * The one range lock of the house: exclusive or shared holds of byte ranges; overlapping exclusive
 * ones wait in order of arrival. Used for unaligned edges, copy-before-write and the like.
 */
struct range_lock {
    pthread_mutex_t guard;
    struct list holds; /* struct range_hold, held and waiting, in order of arrival */
};
struct range_hold {
    struct list link;
    uint64_t offset, bytes;
    bool shared, granted;
    struct coroutine *sleeper;
};
void range_lock_init(struct range_lock *lock);
void range_lock_destroy(struct range_lock *lock); /* asserts emptiness */
/* `hold` lives in the caller's frame until released. */
void coroutine_fn range_lock_acquire(struct range_lock *lock, struct range_hold *hold, uint64_t offset, uint64_t bytes,
                                     bool shared);
void range_lock_release(struct range_lock *lock, struct range_hold *hold);

#endif

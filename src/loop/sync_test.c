/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Locks for coroutines: exclusion across loops, order of arrival, queues, groups, ranges; on both engines.
 */
#include "base/size.h"
#include "loop/sync.h"
#include "loop/test_support.h"

#define LOOPS 3
#define PER_LOOP 8
#define ROUNDS 300

/* Some coroutines on each of several loops, run to their end. */
struct crowd {
    struct loop *loops[LOOPS];
    struct co_group group;
    void (*body)(void *argument);
    void *argument;
};

static void crowd_entry(void *argument)
{
    struct crowd *crowd = argument;

    crowd->body(crowd->argument);
    co_group_leave(&crowd->group);
}

static void crowd_run(void (*body)(void *argument), void *argument)
{
    struct crowd crowd = {.body = body, .argument = argument};

    co_group_init(&crowd.group);
    for (int i = 0; i < LOOPS; i++) {
        g_assert_cmpint(loop_thread_start("crowd", test_kind, &crowd.loops[i], NULL), ==, 0);
    }
    for (int i = 0; i < LOOPS * PER_LOOP; i++) {
        co_group_enter(&crowd.group);
        loop_spawn(crowd.loops[i % LOOPS], crowd_entry, &crowd);
    }
    co_group_wait(&crowd.group);
    co_group_destroy(&crowd.group);
    for (int i = 0; i < LOOPS; i++) {
        loop_thread_join(crowd.loops[i]);
    }
}

static void maybe_pause(void)
{
    if (loop_random() % 4 == 0) {
        coroutine_pause();
    }
}

/* ---- mutex ---- */

struct counted {
    struct co_mutex mutex;
    unsigned count, inside;
};

static void counted_body(void *argument)
{
    struct counted *counted = argument;

    for (int i = 0; i < ROUNDS; i++) {
        co_mutex_lock(&counted->mutex);
        g_assert_cmpuint(counted->inside++, ==, 0);
        unsigned count = counted->count;
        maybe_pause();
        counted->count = count + 1;
        counted->inside--;
        co_mutex_unlock(&counted->mutex);
        maybe_pause();
    }
}

static void mutex_excludes(void *argument)
{
    struct counted counted = {.count = 0};

    co_mutex_init(&counted.mutex);
    crowd_run(counted_body, &counted);
    g_assert_cmpuint(counted.count, ==, LOOPS * PER_LOOP * ROUNDS);
    co_mutex_destroy(&counted.mutex);
}

struct queue_up {
    struct co_mutex mutex;
    GString *order;
    char letter;
};

static void queue_up_entry(void *argument)
{
    struct queue_up *queue_up = argument;
    char letter = queue_up->letter;

    co_mutex_lock(&queue_up->mutex);
    g_string_append_c(queue_up->order, letter);
    coroutine_pause();
    co_mutex_unlock(&queue_up->mutex);
}

static void mutex_is_fair(void *argument)
{
    struct queue_up queue_up = {.order = g_string_new(NULL)};

    co_mutex_init(&queue_up.mutex);
    co_mutex_lock(&queue_up.mutex);
    g_assert_false(co_mutex_try_lock(&queue_up.mutex));
    for (queue_up.letter = 'a'; queue_up.letter <= 'e'; queue_up.letter++) {
        coroutine_enter(coroutine_create(queue_up_entry, &queue_up));
    }
    co_mutex_unlock(&queue_up.mutex);
    /* It is free until who was woken comes: he can be overtaken, */
    g_assert_true(co_mutex_try_lock(&queue_up.mutex));
    coroutine_pause();
    g_assert_cmpstr(queue_up.order->str, ==, "");
    co_mutex_unlock(&queue_up.mutex);
    /* but once only: it has been handed over. */
    g_assert_false(co_mutex_try_lock(&queue_up.mutex));
    co_mutex_lock(&queue_up.mutex);
    g_assert_cmpstr(queue_up.order->str, ==, "abcde");
    co_mutex_unlock(&queue_up.mutex);
    g_assert_true(co_mutex_try_lock(&queue_up.mutex));
    co_mutex_unlock(&queue_up.mutex);
    co_mutex_destroy(&queue_up.mutex);
    g_string_free(queue_up.order, TRUE);
}

/* ---- queue: a bounded buffer ---- */

struct bounded {
    struct co_mutex mutex;
    struct co_queue not_full, not_empty;
    unsigned filled, put, taken;
    atomic_uint role;
};

static void bounded_body(void *argument)
{
    struct bounded *bounded = argument;
    bool producer = atomic_fetch_add(&bounded->role, 1) % 2;

    for (int i = 0; i < ROUNDS; i++) {
        co_mutex_lock(&bounded->mutex);
        if (producer) {
            while (bounded->filled == 3) {
                co_queue_wait(&bounded->not_full, &bounded->mutex);
            }
            bounded->filled++;
            bounded->put++;
            co_queue_wake_one(&bounded->not_empty);
        } else {
            while (bounded->filled == 0) {
                co_queue_wait(&bounded->not_empty, &bounded->mutex);
            }
            bounded->filled--;
            bounded->taken++;
            co_queue_wake_one(&bounded->not_full);
        }
        co_mutex_unlock(&bounded->mutex);
    }
}

static void queue_bounds(void *argument)
{
    struct bounded bounded = {.filled = 0};

    co_mutex_init(&bounded.mutex);
    co_queue_init(&bounded.not_full);
    co_queue_init(&bounded.not_empty);
    crowd_run(bounded_body, &bounded);
    g_assert_cmpuint(bounded.filled, ==, 0);
    g_assert_cmpuint(bounded.put, ==, bounded.taken);
    g_assert_false(co_queue_wake_one(&bounded.not_empty));
    co_mutex_destroy(&bounded.mutex);
}

/* ---- read-write lock ---- */

struct shared_pair {
    struct co_rwlock lock;
    unsigned a, b;
    atomic_int readers, most_readers;
};

static void shared_pair_body(void *argument)
{
    struct shared_pair *pair = argument;

    for (int i = 0; i < ROUNDS; i++) {
        if (loop_random() % 4) {
            co_rwlock_read_lock(&pair->lock);
            int readers = atomic_fetch_add(&pair->readers, 1) + 1;
            if (readers > atomic_load(&pair->most_readers)) {
                atomic_store(&pair->most_readers, readers);
            }
            unsigned a = pair->a;
            maybe_pause();
            g_assert_cmpuint(a, ==, pair->b);
            atomic_fetch_sub(&pair->readers, 1);
            co_rwlock_read_unlock(&pair->lock);
        } else {
            co_rwlock_write_lock(&pair->lock);
            g_assert_cmpint(atomic_load(&pair->readers), ==, 0);
            pair->a++;
            maybe_pause();
            pair->b++;
            co_rwlock_write_unlock(&pair->lock);
        }
        maybe_pause();
    }
}

static void rwlock_excludes(void *argument)
{
    struct shared_pair pair = {.a = 0};

    co_rwlock_init(&pair.lock);
    crowd_run(shared_pair_body, &pair);
    g_assert_cmpuint(pair.a, ==, pair.b);
    g_assert_cmpint(atomic_load(&pair.most_readers), >, 1);
    co_rwlock_destroy(&pair.lock);
}

struct rw_order {
    struct co_rwlock lock;
    GString *order;
};

static void reader_entry(void *argument)
{
    struct rw_order *order = argument;

    co_rwlock_read_lock(&order->lock);
    g_string_append_c(order->order, 'r');
    coroutine_pause();
    co_rwlock_read_unlock(&order->lock);
}

static void writer_entry(void *argument)
{
    struct rw_order *order = argument;

    co_rwlock_write_lock(&order->lock);
    g_string_append_c(order->order, 'w');
    coroutine_pause();
    co_rwlock_write_unlock(&order->lock);
}

static void rwlock_is_fair(void *argument)
{
    struct rw_order order = {.order = g_string_new(NULL)};

    co_rwlock_init(&order.lock);
    co_rwlock_read_lock(&order.lock);
    coroutine_enter(coroutine_create(reader_entry, &order)); /* at once */
    coroutine_enter(coroutine_create(writer_entry, &order)); /* waits */
    coroutine_enter(coroutine_create(reader_entry, &order)); /* behind the writer */
    coroutine_enter(coroutine_create(reader_entry, &order));
    coroutine_enter(coroutine_create(writer_entry, &order));
    g_assert_cmpstr(order.order->str, ==, "r");
    co_rwlock_read_unlock(&order.lock);
    co_rwlock_write_lock(&order.lock);
    g_assert_cmpstr(order.order->str, ==, "rwrrw");
    co_rwlock_write_unlock(&order.lock);
    co_rwlock_destroy(&order.lock);
    g_string_free(order.order, TRUE);
}

/* ---- group ---- */

static void member_entry(void *argument)
{
    struct co_group *group = argument;

    maybe_pause();
    co_group_leave(group);
}

/* Groups that die as soon as they are empty, while members leave on other loops. */
static void group_body(void *argument)
{
    struct loop **loops = argument;

    for (int i = 0; i < ROUNDS; i++) {
        struct co_group *group = g_new(struct co_group, 1);

        co_group_init(group);
        for (int j = 0; j < 3; j++) {
            co_group_enter(group);
            loop_spawn(loops[j % 2], member_entry, group);
        }
        co_group_wait(group);
        co_group_wait(group);
        co_group_destroy(group);
        g_free(group);
    }
}

static void group_dies_empty(void *argument)
{
    struct loop *loops[2];

    for (int i = 0; i < 2; i++) {
        g_assert_cmpint(loop_thread_start("members", test_kind, &loops[i], NULL), ==, 0);
    }
    group_body(loops);
    for (int i = 0; i < 2; i++) {
        loop_thread_join(loops[i]);
    }
}

struct waiters {
    struct co_group group;
    unsigned returned;
};

static void waiter_entry(void *argument)
{
    struct waiters *waiters = argument;

    co_group_wait(&waiters->group);
    waiters->returned++;
}

static void group_many_waiters(void *argument)
{
    struct waiters waiters = {.returned = 0};

    co_group_init(&waiters.group);
    co_group_enter(&waiters.group);
    for (int i = 0; i < 5; i++) {
        coroutine_enter(coroutine_create(waiter_entry, &waiters));
    }
    co_group_enter(&waiters.group);
    co_group_leave(&waiters.group);
    coroutine_pause();
    g_assert_cmpuint(waiters.returned, ==, 0);
    co_group_leave(&waiters.group);
    coroutine_pause();
    g_assert_cmpuint(waiters.returned, ==, 5);
    co_group_destroy(&waiters.group);
}

/* ---- ranges ---- */

#define CELLS 64

struct ranges {
    struct range_lock lock;
    atomic_int writers[CELLS], readers[CELLS];
};

static void ranges_body(void *argument)
{
    struct ranges *ranges = argument;

    for (int i = 0; i < ROUNDS; i++) {
        struct range_hold hold;
        uint64_t offset = loop_random() % CELLS, bytes = loop_random() % (CELLS - offset);
        bool shared = loop_random() % 2;

        range_lock_acquire(&ranges->lock, &hold, offset, bytes, shared);
        for (uint64_t cell = offset; cell < offset + bytes; cell++) {
            g_assert_cmpint(atomic_load(&ranges->writers[cell]), ==, 0);
            if (!shared) {
                g_assert_cmpint(atomic_load(&ranges->readers[cell]), ==, 0);
            }
            atomic_fetch_add(shared ? &ranges->readers[cell] : &ranges->writers[cell], 1);
        }
        maybe_pause();
        for (uint64_t cell = offset; cell < offset + bytes; cell++) {
            atomic_fetch_sub(shared ? &ranges->readers[cell] : &ranges->writers[cell], 1);
        }
        range_lock_release(&ranges->lock, &hold);
    }
}

static void ranges_exclude(void *argument)
{
    struct ranges *ranges = g_new0(struct ranges, 1);

    range_lock_init(&ranges->lock);
    crowd_run(ranges_body, ranges);
    range_lock_destroy(&ranges->lock);
    g_free(ranges);
}

struct range_order {
    struct range_lock *lock;
    GString *order;
    char letter;
    uint64_t offset, bytes;
    bool shared;
    struct range_hold hold;
};

static void range_order_entry(void *argument)
{
    struct range_order *order = argument;

    range_lock_acquire(order->lock, &order->hold, order->offset, order->bytes, order->shared);
    g_string_append_c(order->order, order->letter);
    coroutine_pause();
    range_lock_release(order->lock, &order->hold);
}

static void ranges_in_order(void *argument)
{
    struct range_lock lock;
    struct range_hold hold;
    GString *text = g_string_new(NULL);
    struct range_order orders[] = {
        {&lock, text, 'a', 0, 10, false, {{0}}},          /* waits for hold */
        {&lock, text, 'b', 100, 10, false, {{0}}},        /* free */
        {&lock, text, 'c', 5, 100, true, {{0}}},          /* behind a and b */
        {&lock, text, 'd', 20, 1, true, {{0}}},           /* shared with c: free */
        {&lock, text, 'e', 50, 1, false, {{0}}},          /* behind c */
        {&lock, text, 'f', 5, 0, false, {{0}}},           /* empty: free */
        {&lock, text, 'g', UINT64_MAX, 10, false, {{0}}}, /* no overflow: free */
    };

    range_lock_init(&lock);
    range_lock_acquire(&lock, &hold, 0, 8, true);
    for (size_t i = 0; i < array_size(orders); i++) {
        coroutine_enter(coroutine_create(range_order_entry, &orders[i]));
    }
    g_assert_cmpstr(text->str, ==, "bdfg");
    coroutine_pause();
    coroutine_pause();
    range_lock_release(&lock, &hold);
    for (int i = 0; i < 10; i++) {
        coroutine_pause();
    }
    g_assert_cmpstr(text->str, ==, "bdfgace");
    range_lock_destroy(&lock);
    g_string_free(text, TRUE);
}

int main(int argc, char **argv)
{
    static const struct loop_case cases[] = {
        {"mutex-excludes", mutex_excludes},
        {"mutex-is-fair", mutex_is_fair},
        {"queue-bounds", queue_bounds},
        {"rwlock-excludes", rwlock_excludes},
        {"rwlock-is-fair", rwlock_is_fair},
        {"group-dies-empty", group_dies_empty},
        {"group-many-waiters", group_many_waiters},
        {"ranges-exclude", ranges_exclude},
        {"ranges-in-order", ranges_in_order},
    };

    g_test_init(&argc, &argv, NULL);
    test_add_loop_cases("sync", cases, array_size(cases));
    return g_test_run();
}

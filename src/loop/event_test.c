/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Eventfds as events: signals before and while somebody waits, interruption, moving to another loop, descriptors that
 * the other side makes blocking, and some that are something else; on both engines.
 */
#include "loop/event.h"
#include "loop/sync.h"
#include "loop/test_support.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct waiter {
    struct event *event;
    int result;
    struct co_group group;
};

static void wait_run(void *argument)
{
    struct waiter *waiter = argument;

    waiter->result = event_wait(waiter->event);
    event_leave(waiter->event);
    co_group_leave(&waiter->group);
}

static void signals(void *argument)
{
    int fd = eventfd(0, EFD_CLOEXEC), other = dup(fd);
    struct event *event;
    struct waiter waiter;
    uint64_t one = 1;

    g_assert_cmpint(event_adopt(fd, &event, NULL), ==, 0);
    event_interrupt(event);
    event_leave(event);
    event_signal(event);
    event_signal(event);
    g_assert_cmpint(event_wait(event), ==, 0);
    co_group_init(&waiter.group);
    for (int i = 0; i < 4; i++) {
        waiter.event = event;
        waiter.result = 1;
        co_group_enter(&waiter.group);
        coroutine_enter(coroutine_create(wait_run, &waiter));
        loop_sleep_ns(NULL, 1000000);
        g_assert_cmpint(waiter.result, ==, 1);
        if (i % 2) {
            event_interrupt(event);
        } else {
            g_assert_cmpint(write(other, &one, sizeof(one)), ==, sizeof(one));
        }
        co_group_wait(&waiter.group);
        g_assert_cmpint(waiter.result, ==, i % 2 ? -ECANCELED : 0);
    }
    co_group_destroy(&waiter.group);
    event_close(event);
    close(other);
}

/* The other side makes the descriptor blocking again, and fills it. */
static void made_blocking(void *argument)
{
    int fd = eventfd(0, EFD_CLOEXEC), other = dup(fd);
    struct waiter waiter = {.result = 1};
    uint64_t most = UINT64_MAX - 1, seen;

    g_assert_cmpint(event_adopt(fd, &waiter.event, NULL), ==, 0);
    g_assert_cmpint(fcntl(other, F_SETFL, 0), ==, 0);
    co_group_init(&waiter.group);
    co_group_enter(&waiter.group);
    coroutine_enter(coroutine_create(wait_run, &waiter));
    event_signal(waiter.event);
    co_group_wait(&waiter.group);
    g_assert_cmpint(waiter.result, ==, 0);
    g_assert_cmpint(write(other, &most, sizeof(most)), ==, sizeof(most));
    event_signal(waiter.event);
    g_assert_cmpint(read(other, &seen, sizeof(seen)), ==, sizeof(seen));
    g_assert_cmpuint(seen, ==, most);
    co_group_destroy(&waiter.group);
    event_close(waiter.event);
    close(other);
}

static void moves(void *argument)
{
    struct event *event;
    struct waiter waiter;
    struct loop *thread;

    g_assert_cmpint(event_adopt(eventfd(0, EFD_CLOEXEC), &event, NULL), ==, 0);
    g_assert_cmpint(loop_thread_start("other", test_kind, &thread, NULL), ==, 0);
    waiter.event = event;
    co_group_init(&waiter.group);
    for (int i = 0; i < 20; i++) {
        co_group_enter(&waiter.group);
        loop_spawn(i % 2 ? thread : loop_self(), wait_run, &waiter);
        coroutine_pause();
        event_signal(event);
        co_group_wait(&waiter.group);
        g_assert_cmpint(waiter.result, ==, 0);
    }
    co_group_destroy(&waiter.group);
    loop_thread_join(thread);
    event_close(event);
}

static void others(void *argument)
{
    struct error *err = NULL;
    struct event *event;
    int ends[2];

    g_assert_cmpint(pipe(ends), ==, 0);
    g_assert_cmpint(event_adopt(ends[0], &event, &err), ==, -EINVAL);
    error_free(err);
    g_assert_cmpint(event_adopt(-1, &event, NULL), ==, -EINVAL);
    close(ends[0]);
    close(ends[1]);
    event_close(NULL);
}

int main(int argc, char **argv)
{
    static const struct loop_case cases[] = {
        {"signals", signals}, {"made-blocking", made_blocking}, {"moves", moves}, {"others", others}};

    g_test_init(&argc, &argv, NULL);
    test_add_loop_cases("event", cases, G_N_ELEMENTS(cases));
    return g_test_run();
}

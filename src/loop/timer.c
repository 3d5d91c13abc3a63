/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One-shot timers in a binary heap per loop, and the sleep of a coroutine made of one. Invariants:
 * 1. timers[1..timer_count] is a heap by deadline, and timers[i]->heap_index == i;
 * 2. a timer that is not armed has heap_index 0;
 * 3. everything here happens on the timer's own loop.
 * Equal deadlines fire in no particular order. Timers do not repeat: fire() may arm its timer again.
 */
#include "loop/loop_private.h"
#include <glib.h>

static void timer_place(struct loop *loop, struct loop_timer *timer, unsigned at)
{
    loop->timers[at] = timer;
    timer->heap_index = at;
}

static void timer_move_up(struct loop *loop, struct loop_timer *timer, unsigned at)
{
    while (at > 1 && loop->timers[at / 2]->deadline_ns > timer->deadline_ns) {
        timer_place(loop, loop->timers[at / 2], at);
        at /= 2;
    }
    timer_place(loop, timer, at);
}

static void timer_move_down(struct loop *loop, struct loop_timer *timer, unsigned at)
{
    for (;;) {
        unsigned child = 2 * at;

        if (child > loop->timer_count) {
            break;
        }
        if (child < loop->timer_count && loop->timers[child + 1]->deadline_ns < loop->timers[child]->deadline_ns) {
            child++;
        }
        if (loop->timers[child]->deadline_ns >= timer->deadline_ns) {
            break;
        }
        timer_place(loop, loop->timers[child], at);
        at = child;
    }
    timer_place(loop, timer, at);
}

void loop_timer_init(struct loop_timer *timer, void (*fire)(struct loop_timer *timer))
{
    g_assert(loop_current);
    *timer = (struct loop_timer){.loop = loop_current, .fire = fire};
}

void loop_timer_arm(struct loop_timer *timer, int64_t deadline_ns)
{
    struct loop *loop = timer->loop;

    g_assert(loop == loop_current);
    loop_timer_cancel(timer);
    timer->deadline_ns = deadline_ns;
    if (loop->timer_count + 1 >= loop->timer_room) {
        loop->timer_room = loop->timer_room ? 2 * loop->timer_room : 32;
        loop->timers = g_renew(struct loop_timer *, loop->timers, loop->timer_room);
    }
    timer_move_up(loop, timer, ++loop->timer_count);
}

void loop_timer_cancel(struct loop_timer *timer)
{
    struct loop *loop = timer->loop;

    if (!timer->heap_index) {
        return;
    }
    g_assert(loop == loop_current && loop->timers[timer->heap_index] == timer);
    unsigned at = timer->heap_index;
    struct loop_timer *last = loop->timers[loop->timer_count--];

    timer->heap_index = 0;
    if (last == timer) {
        return;
    }
    if (at > 1 && loop->timers[at / 2]->deadline_ns > last->deadline_ns) {
        timer_move_up(loop, last, at);
    } else {
        timer_move_down(loop, last, at);
    }
}

void timer_run_due(struct loop *loop)
{
    while (loop->timer_count && loop->timers[1]->deadline_ns <= loop->now_ns) {
        struct loop_timer *timer = loop->timers[1];

        loop_timer_cancel(timer);
        timer->fire(timer);
    }
}

int64_t timer_next_ns(struct loop *loop)
{
    return loop->timer_count ? loop->timers[1]->deadline_ns : INT64_MAX;
}

void timer_loop_finish(struct loop *loop)
{
    g_assert(!loop->timer_count);
    g_free(loop->timers);
}

/* A sleep under way, on the sleeper's stack. */
struct sleep_state {
    struct loop_timer timer;
    struct loop_sleep *sleep;
    bool expired;
};

static void sleep_fire(struct loop_timer *timer)
{
    struct sleep_state *state = container_of(timer, struct sleep_state, timer);

    /* Woken already, and not yet run. */
    if (!state->sleep->sleeper) {
        return;
    }
    state->expired = true;
    loop_sleep_wake(state->sleep);
}

bool coroutine_fn loop_sleep_ns(struct loop_sleep *sleep, int64_t duration_ns)
{
    struct loop_sleep alone = {NULL};
    struct sleep_state state = {.sleep = sleep ? sleep : &alone};
    int64_t now_ns = loop_clock_ns();

    g_assert(!state.sleep->sleeper);
    loop_timer_init(&state.timer, sleep_fire);
    state.sleep->sleeper = coroutine_self();
    loop_timer_arm(&state.timer, duration_ns > INT64_MAX - now_ns ? INT64_MAX : now_ns + duration_ns);
    coroutine_yield();
    loop_timer_cancel(&state.timer);
    return state.expired;
}

void loop_sleep_wake(struct loop_sleep *sleep)
{
    struct coroutine *sleeper = sleep->sleeper;

    if (sleeper) {
        sleep->sleeper = NULL;
        coroutine_wake(sleeper);
    }
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Loops, coroutines, timers and workers: switching, nesting, reuse, wakes from everywhere, on both engines.
 */
#include "base/size.h"
#include "loop/loop.h"
#include "loop/sync.h"
#include "loop/worker.h"
#include <errno.h>
#include <glib.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

static enum engine_kind test_kind;

/* Runs entry in a coroutine on a fresh loop of the engine under test. */
static void run(void (*entry)(void *argument), void *argument)
{
    struct loop *loop;

    g_assert_cmpint(loop_create(test_kind, &loop, NULL), ==, 0);
    loop_run_coroutine(loop, entry, argument);
    loop_destroy(loop);
}

struct steps {
    GString *text;
    struct coroutine *inner;
};

static void inner_entry(void *argument)
{
    struct steps *steps = argument;

    g_string_append(steps->text, "b");
    coroutine_yield();
    g_string_append(steps->text, "d");
}

static void nesting_entry(void *argument)
{
    struct steps *steps = argument;
    struct coroutine *self = coroutine_self();

    g_string_append(steps->text, "a");
    struct coroutine *inner = coroutine_create(inner_entry, steps);
    coroutine_enter(inner);
    g_assert_true(coroutine_self() == self);
    g_string_append(steps->text, "c");
    coroutine_enter(inner);
    g_string_append(steps->text, "e");
    /* A wake that comes before the yield. */
    coroutine_wake(self);
    coroutine_yield();
    g_string_append(steps->text, "f");
}

static void test_nesting(void)
{
    struct steps steps = {g_string_new(NULL), NULL};

    g_assert_false(coroutine_running());
    run(nesting_entry, &steps);
    g_assert_cmpstr(steps.text->str, ==, "abcdef");
    g_string_free(steps.text, TRUE);
}

static void count_entry(void *argument)
{
    (*(unsigned *)argument)++;
}

static void yield_entry(void *argument)
{
    coroutine_yield();
    (*(unsigned *)argument)++;
}

static void pool_entry(void *argument)
{
    unsigned count = 0;
    struct coroutine *many[600];
    struct coroutine *first = coroutine_create(count_entry, &count);

    coroutine_enter(first);
    struct coroutine *second = coroutine_create(count_entry, &count);
    g_assert_true(first == second); /* reused */
    coroutine_enter(second);
    g_assert_cmpuint(count, ==, 2);
    for (size_t i = 0; i < array_size(many); i++) {
        many[i] = coroutine_create(yield_entry, &count);
        coroutine_enter(many[i]);
    }
    for (size_t i = 0; i < array_size(many); i++) {
        coroutine_wake(many[i]);
    }
    while (count < 2 + array_size(many)) {
        coroutine_pause();
    }
}

static void test_pool(void)
{
    run(pool_entry, NULL);
}

static __attribute__((noinline)) unsigned overflow_stack(unsigned depth)
{
    volatile char frame[4096];

    frame[0] = (char)depth;
    frame[4095] = 1;
    if (depth == 0) {
        return 0;
    }
    return overflow_stack(depth - 1) + (unsigned)frame[0];
}

static void overflow_entry(void *argument)
{
    g_test_message("%u", overflow_stack(100000));
}

static void test_guard(void)
{
    if (g_test_subprocess()) {
        run(overflow_entry, NULL);
        return;
    }
    g_test_trap_subprocess(NULL, 0, G_TEST_SUBPROCESS_DEFAULT);
    g_test_trap_assert_failed();
}

static void double_wake_entry(void *argument)
{
    coroutine_wake(coroutine_self());
    coroutine_wake(coroutine_self());
}

static void test_double_wake(void)
{
    if (g_test_subprocess()) {
        run(double_wake_entry, NULL);
        return;
    }
    g_test_trap_subprocess(NULL, 0, G_TEST_SUBPROCESS_DEFAULT);
    g_test_trap_assert_failed();
}

/* ---- wakes across loops ---- */

#define STORM_LOOPS 3
#define STORM_PINGS 2000
#define STORM_PAIRS 4

struct pong {
    struct loop_task task;
    struct coroutine *waiter;
};

struct storm {
    struct loop *loops[STORM_LOOPS];
    struct co_group group;
};

struct storm_pair {
    struct storm *storm;
    struct loop *to;
    unsigned pings;
};

static void pong_run(struct loop_task *task)
{
    struct pong *pong = container_of(task, struct pong, task);

    coroutine_wake(pong->waiter);
}

static void storm_entry(void *argument)
{
    struct storm_pair *pair = argument;

    for (pair->pings = 0; pair->pings < STORM_PINGS; pair->pings++) {
        struct pong pong = {{.run = pong_run}, coroutine_self()};

        loop_post(pair->to, &pong.task);
        coroutine_yield();
    }
    co_group_leave(&pair->storm->group);
}

static void storm_main(void *argument)
{
    struct storm storm;
    struct storm_pair pairs[STORM_LOOPS * STORM_PAIRS];

    co_group_init(&storm.group);
    for (int i = 0; i < STORM_LOOPS; i++) {
        g_assert_cmpint(loop_thread_start("storm", test_kind, &storm.loops[i], NULL), ==, 0);
    }
    for (size_t i = 0; i < array_size(pairs); i++) {
        pairs[i] = (struct storm_pair){&storm, storm.loops[(i + 1 + i / STORM_LOOPS) % STORM_LOOPS], 0};
        co_group_enter(&storm.group);
        loop_spawn(storm.loops[i % STORM_LOOPS], storm_entry, &pairs[i]);
    }
    co_group_wait(&storm.group);
    co_group_destroy(&storm.group);
    for (size_t i = 0; i < array_size(pairs); i++) {
        g_assert_cmpuint(pairs[i].pings, ==, STORM_PINGS);
    }
    for (int i = 0; i < STORM_LOOPS; i++) {
        loop_thread_join(storm.loops[i]);
    }
}

static void test_storm(void)
{
    run(storm_main, NULL);
}

/* ---- order, turn end ---- */

struct ordered {
    struct loop_task task;
    GString *text;
    char letter;
};

static void ordered_run(struct loop_task *task)
{
    struct ordered *ordered = container_of(task, struct ordered, task);

    g_string_append_c(ordered->text, ordered->letter);
}

static void order_entry(void *argument)
{
    GString *text = g_string_new(NULL);
    struct ordered end = {{.run = ordered_run}, text, 'z'};
    struct ordered a = {{.run = ordered_run}, text, 'a'}, b = {{.run = ordered_run}, text, 'b'};

    loop_at_turn_end(&end.task);
    loop_at_turn_end(&end.task);
    loop_post(loop_self(), &a.task);
    loop_post(loop_self(), &b.task);
    coroutine_pause();
    loop_sleep_ns(NULL, 1000000);
    g_assert_cmpstr(text->str, ==, "abz");
    g_string_free(text, TRUE);
}

static void test_order(void)
{
    run(order_entry, NULL);
}

static void stop_run(struct loop_task *task)
{
    loop_stop(loop_self());
}

static void test_stop(void)
{
    struct loop *loop;
    struct loop_task task = {.run = stop_run};

    g_assert_cmpint(loop_create(test_kind, &loop, NULL), ==, 0);
    for (int i = 0; i < 3; i++) {
        loop_post(loop, &task);
        loop_run(loop);
    }
    loop_destroy(loop);
}

/* ---- timers ---- */

#define TIMERS 200

struct numbered_timer {
    struct loop_timer timer;
    int64_t *last;
    unsigned *fired;
};

static void numbered_fire(struct loop_timer *timer)
{
    struct numbered_timer *numbered = container_of(timer, struct numbered_timer, timer);

    g_assert_cmpint(timer->deadline_ns, >=, *numbered->last);
    g_assert_cmpint(timer->deadline_ns, <=, loop_clock_ns());
    *numbered->last = timer->deadline_ns;
    (*numbered->fired)++;
}

static void timers_entry(void *argument)
{
    struct numbered_timer timers[TIMERS];
    int64_t last = 0, start = loop_clock_ns();
    unsigned fired = 0, cancelled = 0;

    for (size_t i = 0; i < TIMERS; i++) {
        loop_timer_init(&timers[i].timer, numbered_fire);
        timers[i].last = &last;
        timers[i].fired = &fired;
        loop_timer_arm(&timers[i].timer, start + (int64_t)(loop_random() % 50000000));
    }
    for (size_t i = 0; i < TIMERS; i += 3, cancelled++) {
        loop_timer_cancel(&timers[i].timer);
        loop_timer_cancel(&timers[i].timer);
    }
    for (size_t i = 1; i < TIMERS; i += 3) {
        loop_timer_arm(&timers[i].timer, start + (int64_t)(loop_random() % 50000000));
    }
    g_assert_true(loop_sleep_ns(NULL, 60000000));
    g_assert_cmpint(loop_clock_ns() - start, >=, 60000000);
    g_assert_cmpuint(fired, ==, TIMERS - cancelled);
}

static void test_timers(void)
{
    run(timers_entry, NULL);
}

static void sleeper_entry(void *argument)
{
    g_assert_false(loop_sleep_ns(argument, INT64_MAX));
}

static void sleep_entry(void *argument)
{
    struct loop_sleep sleep = {NULL};

    loop_sleep_wake(&sleep);
    coroutine_enter(coroutine_create(sleeper_entry, &sleep));
    g_assert_nonnull(sleep.sleeper);
    loop_sleep_wake(&sleep);
    loop_sleep_wake(&sleep);
    coroutine_pause();
    g_assert_null(sleep.sleeper);
    g_assert_true(loop_sleep_ns(&sleep, 0));
    g_assert_true(loop_sleep_ns(&sleep, -5));
}

static void test_sleep(void)
{
    run(sleep_entry, NULL);
}

/* ---- workers ---- */

static int double_work(void *argument)
{
    usleep(1000);
    return *(int *)argument * 2;
}

struct worker_state {
    struct co_group group;
    atomic_int sum;
};

static void worker_entry(void *argument)
{
    struct worker_state *state = argument;
    int number = 21;

    atomic_fetch_add(&state->sum, worker_run(double_work, &number));
    co_group_leave(&state->group);
}

static void workers_entry(void *argument)
{
    struct worker_state state;
    struct loop *other;

    co_group_init(&state.group);
    atomic_init(&state.sum, 0);
    g_assert_cmpint(loop_thread_start("other", test_kind, &other, NULL), ==, 0);
    for (int i = 0; i < 100; i++) {
        co_group_enter(&state.group);
        loop_spawn(i % 2 ? other : loop_self(), worker_entry, &state);
    }
    co_group_wait(&state.group);
    co_group_destroy(&state.group);
    g_assert_cmpint(atomic_load(&state.sum), ==, 4200);
    loop_thread_join(other);
}

static void test_workers(void)
{
    run(workers_entry, NULL);
}

struct lane_state {
    struct worker_lane *lane;
    unsigned width;
    unsigned started, done;            /* on the loop */
    atomic_uint inside, in_turn, most; /* on workers */
};
struct lane_job {
    struct lane_state *state;
    unsigned number;
};
static int lane_work_once(void *argument)
{
    struct lane_job *job = argument;

    unsigned inside = atomic_fetch_add(&job->state->inside, 1) + 1;

    g_assert_cmpuint(inside, <=, job->state->width);
    if (inside > atomic_load(&job->state->most)) {
        atomic_store(&job->state->most, inside);
    }
    if (job->number % 8 == 0) {
        usleep(500);
    }
    unsigned turn = atomic_fetch_add(&job->state->in_turn, 1);

    g_assert_cmpuint(job->state->width == 1 ? job->number : turn, ==, turn);
    atomic_fetch_sub(&job->state->inside, 1);
    return (int)job->number;
}
static void lane_entry(void *argument)
{
    struct lane_state *state = argument;
    struct lane_job job = {state, state->started++};

    g_assert_cmpint(worker_lane_run(state->lane, lane_work_once, &job), ==, (int)job.number);
    state->done++;
}
/* So many at a time, in order if that is one; and it may go as soon as its last job is done. */
static void lanes_entry(void *argument)
{
    unsigned most = 0;

    for (unsigned round = 0; round < 400; round++) {
        unsigned width = 1 + round % 2 * 2, jobs = 1 + round % 20;
        struct lane_state state = {.lane = worker_lane_create(width), .width = width};

        for (unsigned i = 0; i < jobs; i++) {
            coroutine_enter(coroutine_create(lane_entry, &state));
        }
        while (state.done < jobs) {
            coroutine_pause();
        }
        worker_lane_destroy(state.lane);
        most = MAX(most, atomic_load(&state.most));
    }
    g_assert_cmpuint(most, >, 1);
}
static void test_lanes(void)
{
    run(lanes_entry, NULL);
}

enum { NAPS = 15 }; /* all workers but one */
struct crowd {
    struct worker_lane *lane;
    unsigned napping, done; /* on the loop */
};
static int nap_work(void *argument)
{
    usleep(200 * 1000);
    return 0;
}
static int nothing_work(void *argument)
{
    return 0;
}
static void nap_entry(void *argument)
{
    worker_run(nap_work, NULL);
    ((struct crowd *)argument)->napping--;
}
static void crowd_lane_entry(void *argument)
{
    struct crowd *crowd = argument;

    worker_lane_run(crowd->lane, nothing_work, NULL);
    crowd->done++;
}
/* One worker does the jobs of both, and the lane goes while its second slot stands behind somebody else. */
static void lane_goes_early_entry(void *argument)
{
    struct crowd crowd = {.lane = worker_lane_create(2), .napping = NAPS + 1};

    for (unsigned i = 0; i < NAPS; i++) {
        coroutine_enter(coroutine_create(nap_entry, &crowd));
    }
    coroutine_enter(coroutine_create(crowd_lane_entry, &crowd));
    coroutine_enter(coroutine_create(nap_entry, &crowd));
    coroutine_enter(coroutine_create(crowd_lane_entry, &crowd));
    while (crowd.done < 2) {
        coroutine_pause();
    }
    worker_lane_destroy(crowd.lane);
    while (crowd.napping) {
        coroutine_pause();
    }
}
static void test_lane_goes_early(void)
{
    run(lane_goes_early_entry, NULL);
}

struct flood {
    struct worker_lane *lane;
    bool over;
    unsigned running;
};
static int short_nap_work(void *argument)
{
    usleep(1000);
    return 0;
}
static void flood_entry(void *argument)
{
    struct flood *flood = argument;

    while (!flood->over) {
        worker_lane_run(flood->lane, short_nap_work, NULL);
    }
    flood->running--;
}
/* Lanes that never come to rest and could have all workers leave others their turn. */
static void lanes_leave_room_entry(void *argument)
{
    struct flood floods[8];

    for (unsigned i = 0; i < G_N_ELEMENTS(floods); i++) {
        floods[i] = (struct flood){.lane = worker_lane_create(WORKER_LANE_MAX), .running = 8};
        for (unsigned k = 0; k < 8; k++) {
            coroutine_enter(coroutine_create(flood_entry, &floods[i]));
        }
    }
    loop_sleep_ns(NULL, 20 * 1000 * 1000);
    for (unsigned i = 0; i < 10; i++) { /* nobody else would ever end these */
        g_assert_cmpint(worker_run(nothing_work, NULL), ==, 0);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(floods); i++) {
        floods[i].over = true;
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(floods); i++) {
        while (floods[i].running) {
            coroutine_pause();
        }
        worker_lane_destroy(floods[i].lane);
    }
}
static void test_lanes_leave_room(void)
{
    run(lanes_leave_room_entry, NULL);
}

/* ---- signals, idleness ---- */

struct signal_state {
    int count;
    struct coroutine *waiter;
};

static void signal_handle(int number, void *argument)
{
    struct signal_state *state = argument;

    g_assert_cmpint(number, ==, SIGUSR1);
    g_assert_false(coroutine_running());
    state->count++;
    coroutine_wake(state->waiter);
}

static int kill_work(void *argument)
{
    usleep(5000);
    kill(getpid(), SIGUSR1);
    return 0;
}

static void killer_entry(void *argument)
{
    worker_run(kill_work, NULL);
}

static void signal_entry(void *argument)
{
    struct signal_state state = {0, coroutine_self()};

    g_assert_cmpint(loop_watch_signal(SIGUSR1, signal_handle, &state), ==, 0);
    g_assert_cmpint(loop_watch_signal(SIGUSR1, signal_handle, &state), ==, -EBUSY);
    kill(getpid(), SIGUSR1);
    coroutine_yield();
    coroutine_enter(coroutine_create(killer_entry, NULL));
    coroutine_yield();
    g_assert_cmpint(state.count, ==, 2);
    loop_sleep_ns(NULL, 10000000);
}

static void test_signal(void)
{
    run(signal_entry, NULL);
}

static int64_t cpu_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void idle_entry(void *argument)
{
    struct loop *other;

    g_assert_cmpint(loop_thread_start("idle", test_kind, &other, NULL), ==, 0);
    int64_t before = cpu_ns();
    loop_sleep_ns(NULL, 200000000);
    g_assert_cmpint(cpu_ns() - before, <, 20000000);
    loop_thread_join(other);
}

static void test_idle(void)
{
    run(idle_entry, NULL);
}

static void test_engine_names(void)
{
    enum engine_kind kind;
    struct error *err = NULL;

    g_assert_cmpint(engine_parse("epoll", &kind, &err), ==, 0);
    g_assert_cmpint(kind, ==, ENGINE_EPOLL);
    g_assert_cmpint(engine_parse("steam", &kind, &err), ==, -EINVAL);
    g_assert_nonnull(err);
    error_free(err);
}

static void test_clocks(void)
{
    g_assert_cmpint(loop_clock_ns(), >, 0);
    g_assert_cmpint(loop_realtime_us(), >, INT64_C(1600000000) * 1000000);
    g_assert_cmpuint(loop_random(), !=, loop_random());
}

static void with_kind(gconstpointer data)
{
    static const struct {
        const char *name;
        void (*test)(void);
    } tests[] = {
        {"nesting", test_nesting},
        {"pool", test_pool},
        {"order", test_order},
        {"stop", test_stop},
        {"timers", test_timers},
        {"sleep", test_sleep},
        {"workers", test_workers},
        {"lanes", test_lanes},
        {"lane-goes-early", test_lane_goes_early},
        {"lanes-leave-room", test_lanes_leave_room},
        {"storm", test_storm},
        {"signal", test_signal},
        {"idle", test_idle},
    };

    test_kind = (enum engine_kind)GPOINTER_TO_INT(data);
    for (size_t i = 0; i < array_size(tests); i++) {
        g_test_message("%s", tests[i].name);
        tests[i].test();
    }
}

static bool kind_is_available(enum engine_kind kind)
{
    struct loop *loop;

    if (loop_create(kind, &loop, NULL) < 0) {
        return false;
    }
    loop_destroy(loop);
    return true;
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (kind_is_available(ENGINE_URING)) {
        g_test_add_data_func("/loop/uring", GINT_TO_POINTER(ENGINE_URING), with_kind);
    }
    g_test_add_data_func("/loop/epoll", GINT_TO_POINTER(ENGINE_EPOLL), with_kind);
    g_test_add_func("/coroutine/guard", test_guard);
    g_test_add_func("/coroutine/double-wake", test_double_wake);
    g_test_add_func("/loop/engine-names", test_engine_names);
    g_test_add_func("/loop/clocks", test_clocks);
    return g_test_run();
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The simulated engine: threads that are stacks of one real thread, a clock that jumps, and the choice of who goes on.
 * A loop that enters its engine (or has run a task, with preemption) gives up the real thread; the scheduler chooses,
 * by the seed, among the threads that can go on, and when none can, moves the clock on to the next event or timer.
 * Invariants:
 * 1. one simulated thread runs at a time; `loop_current` is its loop's, saved and restored at each switch;
 * 2. nothing is decided by an address, a hash of one, or the machine's clock: the same seed makes the same steps;
 * 3. a new thread runs until its first visit to the engine before its starter goes on, as loop_thread_start() waits
 *    for it without a loop's help;
 * 4. threads are left only in the engine, between tasks and before a coroutine locks a mutex: no guard (pthread mutex)
 *    is held there;
 * 5. every visit to the engine takes a little virtual time, so a loop that polls sees time pass.
 * Files are sim_file.c, what is on disks sim_disk.c. There are no sockets.
 */
#include "loop/sim.h"
#include "base/seeded.h"
#include "base/size.h"
#include "loop/loop_private.h"
#include "loop/sim_private.h"
#include <errno.h>
#include <glib.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define STACK_BYTES (2 * MiB)
/* For who goes on after a power cut: as a program's main stack. */
#define AFTER_STACK_BYTES (8 * MiB)
/* Of preemptions after which a thread gets its processor back only after several transfers' time. */
#define NAP_PERCENT 10
/* The machine has been up for a while, and the year is 2026. */
#define START_NS (INT64_C(1000) * 1000000000)
#define START_US (INT64_C(1767225600) * 1000000)

struct sim_thread {
    struct list link;
    struct sim *sim;
    unsigned number;
    char name[16];
    struct engine engine;
    bool has_loop;
    struct context own;     /* its stack; empty for the real thread's */
    struct context context; /* where it goes on */
    void *stack;            /* NULL: the real thread's */
    size_t stack_bytes;
    void (*entry)(void *argument);
    void *argument;
    struct loop *loop;          /* loop_current, while it does not run */
    struct sim_thread *starter; /* waits for the first visit to the engine */
    struct sim_thread *joins;   /* waits for this one's end */
    int64_t wake_ns;
    int64_t resume_ns; /* has lost its processor until then */
    bool interrupted, ended;
    struct list done; /* struct sim_wait that ended */
    unsigned waits;   /* all that have not been woken */
};

/* A coroutine that waits for an event, on its stack. */
struct sim_wait {
    struct sim_event event;
    struct list link;
    struct sim_thread *thread;
    struct coroutine *waiter;
};

static __thread struct sim *sim_of_thread;

struct sim *sim_self(void)
{
    return sim_of_thread;
}

/* ---- chance ---- */

uint64_t sim_random(struct sim *sim)
{
    return seeded_next(&sim->random);
}

uint64_t sim_below(struct sim *sim, uint64_t limit)
{
    return sim_random(sim) % limit;
}

bool sim_chance(struct sim *sim, unsigned percent)
{
    return percent && sim_below(sim, 100) < percent;
}

int64_t sim_draw_latency(struct sim *sim)
{
    int64_t spread_ns = sim->config.latency_max_ns - sim->config.latency_min_ns;

    return sim->config.latency_min_ns + (int64_t)sim_below(sim, (uint64_t)spread_ns + 1);
}

void sim_note(struct sim *sim, const char *what, uint64_t a, uint64_t b)
{
    uint64_t words[] = {(uint64_t)(sim->now_ns - sim->start_ns), sim->running ? sim->running->number : 0, a, b};

    for (size_t i = 0; i < G_N_ELEMENTS(words); i++) {
        sim->trace = (sim->trace ^ words[i]) * UINT64_C(0x100000001b3);
        sim->trace ^= sim->trace >> 29;
    }
    for (const char *c = what; *c; c++) {
        sim->trace = (sim->trace ^ (uint8_t)*c) * UINT64_C(0x100000001b3);
    }
    if (sim->config.trace) {
        fprintf(sim->config.trace, "%" PRIu64 ".%03u us thread %u: %s %" PRIu64 " %" PRIu64 "\n", words[0] / 1000,
                (unsigned)(words[0] % 1000), (unsigned)words[1], what, a, b);
    }
}

uint64_t sim_trace(const struct sim *sim)
{
    return sim->trace;
}

/* ---- events ---- */

void sim_event_add(struct sim *sim, struct sim_event *event, int64_t at_ns)
{
    struct list *after = sim->events.prev;

    while (after != &sim->events && container_of(after, struct sim_event, link)->at_ns > at_ns) {
        after = after->prev;
    }
    event->at_ns = at_ns;
    list_prepend(after, &event->link);
}

static void sim_happen(struct sim *sim)
{
    while (!list_is_empty(&sim->events)) {
        struct sim_event *event = container_of(sim->events.next, struct sim_event, link);

        if (event->at_ns > sim->now_ns) {
            return;
        }
        list_remove(&event->link);
        event->happen(event);
    }
}

void sim_happen_some(struct sim *sim)
{
    list_for_each_safe (link, &sim->events) {
        struct sim_event *event = container_of(link, struct sim_event, link);

        if (sim_chance(sim, 50)) {
            list_remove(link);
            event->happen(event);
        }
    }
}

static void wait_happen(struct sim_event *event)
{
    struct sim_wait *wait = container_of(event, struct sim_wait, event);

    list_append(&wait->thread->done, &wait->link);
}

void coroutine_fn sim_sleep_until(struct sim *sim, int64_t at_ns)
{
    struct sim_wait wait = {.event.happen = wait_happen, .thread = sim->running, .waiter = coroutine_self()};

    g_assert(wait.waiter && wait.thread->has_loop);
    wait.thread->waits++;
    sim_event_add(sim, &wait.event, at_ns);
    coroutine_yield();
}

/* ---- who goes on ---- */

static void sim_describe_threads(const struct sim *sim)
{
    list_for_each (link, &sim->threads) {
        const struct sim_thread *thread = container_of(link, struct sim_thread, link);
        const struct loop *loop = thread == sim->running ? loop_current : thread->loop;

        if (thread->ended) {
            continue;
        }
        g_printerr("  thread %u '%s': %u coroutines, %u waits for files or work", thread->number, thread->name,
                   loop ? loop->live_count : 0, thread->waits);
        if (thread->joins) {
            g_printerr(", waits for the end of thread %u", thread->joins->number);
        } else if (thread->wake_ns != INT64_MAX) {
            g_printerr(", wakes at %.6f s", (double)(thread->wake_ns - sim->start_ns) / 1e9);
        }
        g_printerr("\n");
    }
}

static _Noreturn void sim_abort(const struct sim *sim, const char *why)
{
    g_printerr("sim: %s; seed %" PRIu64 ", at %.6f s, %" PRIu64 " changes\n", why, sim->config.seed,
               (double)(sim->now_ns - sim->start_ns) / 1e9, sim->changes);
    sim_describe_threads(sim);
    abort();
}

static bool thread_can_go_on(const struct sim_thread *thread)
{
    if (thread->ended || thread->resume_ns > thread->sim->now_ns) {
        return false;
    }
    if (thread->joins) {
        return thread->joins->ended;
    }
    return thread->interrupted || !list_is_empty(&thread->done) || thread->wake_ns <= thread->sim->now_ns;
}

/* When there is a reason to look again. */
static int64_t sim_next_ns(const struct sim *sim)
{
    int64_t next_ns = INT64_MAX;

    if (!list_is_empty(&sim->events)) {
        next_ns = container_of(sim->events.next, struct sim_event, link)->at_ns;
    }
    list_for_each (link, &sim->threads) {
        const struct sim_thread *thread = container_of(link, struct sim_thread, link);

        if (!thread->ended && !thread->joins) {
            next_ns = MIN(next_ns, MAX(thread->wake_ns, thread->resume_ns));
        }
    }
    return next_ns;
}

static struct sim_thread *sim_choose(struct sim *sim)
{
    sim->now_ns += 100 + (int64_t)sim_below(sim, 1900);
    for (;;) {
        struct sim_thread *chosen = NULL;
        uint64_t ready = 0;

        if (sim->now_ns - sim->start_ns > sim->config.limit_ns) {
            sim_abort(sim, "the limit of virtual time is reached: the program hangs");
        }
        sim_happen(sim);
        list_for_each (link, &sim->threads) {
            struct sim_thread *thread = container_of(link, struct sim_thread, link);

            if (thread_can_go_on(thread) && sim_below(sim, ++ready) == 0) {
                chosen = thread;
            }
        }
        if (chosen) {
            sim_note(sim, "chooses", chosen->number, ready);
            return chosen;
        }
        int64_t next_ns = sim_next_ns(sim);

        if (next_ns == INT64_MAX) {
            sim_abort(sim, "deadlock: every loop sleeps and nothing will wake one");
        }
        sim->now_ns = next_ns;
    }
}

/* `last`: the thread that is left has ended. */
static void thread_switch(struct sim_thread *from, struct sim_thread *to, bool last)
{
    struct context here;

    if (!loop_current) {
        context_init_here(&here);
    } else {
        here = loop_current->running ? loop_current->running->context : loop_current->root;
    }
    from->context.stack_bottom = here.stack_bottom;
    from->context.stack_size = here.stack_size;
    from->context.tool_fiber = here.tool_fiber;
    from->loop = loop_current;
    from->sim->running = to;
    loop_current = to->loop;
    context_on = to->stack ? &to->own : NULL;
    context_switch(&from->context, &to->context, last);
}

/* Gives the real thread up; comes back when chosen. */
static void thread_give_way(struct sim_thread *thread)
{
    struct sim_thread *next = sim_choose(thread->sim);

    if (next != thread) {
        thread_switch(thread, next, false);
    }
}

/* ---- the engine ---- */

static struct sim_thread *engine_thread(struct engine *engine)
{
    return container_of(engine, struct sim_thread, engine);
}

static int sim_engine_create(struct engine **ret)
{
    struct sim *sim = sim_self();

    if (!sim) {
        return -ENODEV;
    }
    g_assert(!sim->running->has_loop);
    sim->running->has_loop = true;
    *ret = &sim->running->engine;
    return 0;
}

static void sim_engine_destroy(struct engine *engine)
{
    struct sim_thread *thread = engine_thread(engine);

    g_assert(!thread->waits);
    thread->has_loop = false;
    thread->interrupted = false;
}

static void sim_turn(struct engine *engine, int64_t timeout_ns)
{
    struct sim_thread *thread = engine_thread(engine);
    struct sim *sim = thread->sim;

    g_assert(thread == sim->running);
    if (timeout_ns < 0 || timeout_ns > INT64_MAX - sim->now_ns) {
        thread->wake_ns = INT64_MAX;
    } else {
        thread->wake_ns = sim->now_ns + timeout_ns;
    }
    if (thread->starter) {
        struct sim_thread *starter = thread->starter;

        thread->starter = NULL;
        thread_switch(thread, starter, false);
    } else {
        thread_give_way(thread);
    }
    thread->interrupted = false;
    while (!list_is_empty(&thread->done)) {
        struct sim_wait *wait = container_of(thread->done.next, struct sim_wait, link);

        list_remove(&wait->link);
        thread->waits--;
        coroutine_wake(wait->waiter);
    }
}

static void sim_interrupt(struct engine *engine)
{
    engine_thread(engine)->interrupted = true;
}

static void sim_step(struct engine *engine)
{
    struct sim_thread *thread = engine_thread(engine);

    if (sim_chance(thread->sim, thread->sim->config.preempt_percent)) {
        struct sim *sim = thread->sim;

        thread->wake_ns = sim->now_ns;
        if (sim_chance(sim, NAP_PERCENT)) {
            thread->resume_ns = sim->now_ns + 10 * sim_draw_latency(sim);
        }
        thread_give_way(thread);
    }
}

int64_t sim_now_ns(const struct sim *sim)
{
    return sim->now_ns;
}

static int64_t sim_clock_ns(void)
{
    return sim_self()->now_ns;
}

static int64_t sim_realtime_us(void)
{
    return START_US + sim_self()->now_ns / 1000;
}

static uint64_t sim_engine_random(void)
{
    return sim_random(sim_self());
}

/* The first function on a simulated thread's stack. */
static void thread_main(void)
{
    context_arrived();
    struct sim_thread *thread = sim_self()->running;

    thread->entry(thread->argument);
    g_assert(!loop_current && !thread->has_loop);
    thread->ended = true;
    thread_switch(thread, thread->starter ? thread->starter : sim_choose(thread->sim), true);
    g_assert_not_reached();
}

static struct sim_thread *thread_create(struct sim *sim, const char *name, size_t stack_bytes)
{
    struct sim_thread *thread = g_new0(struct sim_thread, 1);

    thread->sim = sim;
    thread->number = sim->thread_count++;
    g_strlcpy(thread->name, name, sizeof(thread->name));
    thread->engine.ops = &sim_engine_ops;
    thread->stack_bytes = stack_bytes;
    list_init(&thread->done);
    if (stack_bytes) {
        thread->stack = stack_map(stack_bytes);
        context_init(&thread->own, thread->stack, stack_bytes, thread_main);
        thread->context = thread->own;
    }
    list_append(&sim->threads, &thread->link);
    return thread;
}

static void thread_destroy(struct sim_thread *thread)
{
    list_remove(&thread->link);
    if (thread->stack) {
        context_finish(&thread->own);
        stack_unmap(thread->stack, thread->stack_bytes);
    }
    g_free(thread);
}

static int sim_thread_start(const char *name, void (*entry)(void *argument), void *argument, struct engine_thread **ret)
{
    struct sim *sim = sim_self();
    struct sim_thread *self = sim->running, *thread = thread_create(sim, name, STACK_BYTES);

    thread->entry = entry;
    thread->argument = argument;
    thread->starter = self;
    sim_note(sim, "starts", thread->number, 0);
    thread_switch(self, thread, false);
    *ret = (struct engine_thread *)thread;
    return 0;
}

static void sim_thread_join(struct engine_thread *handle)
{
    struct sim_thread *thread = (struct sim_thread *)handle, *self = thread->sim->running;

    if (!thread->ended) {
        self->joins = thread;
        thread_give_way(self);
        self->joins = NULL;
    }
    thread_destroy(thread);
}

/* Other threads work while the coroutine sleeps: at its beginning or its end. */
static int coroutine_fn sim_work(int (*work)(void *argument), void *argument)
{
    struct sim *sim = sim_self();
    struct loop *loop = loop_current;
    int64_t end_ns = sim->now_ns + sim_draw_latency(sim);
    bool first = sim_chance(sim, 50);
    int r;

    if (!first) {
        sim_sleep_until(sim, end_ns);
    }
    loop_current = NULL; /* as on a worker's thread */
    r = work(argument);
    loop_current = loop;
    if (first) {
        sim_sleep_until(sim, end_ns);
    }
    return r;
}

static int coroutine_fn sim_listen(const struct address *address, struct listener **ret, struct error **err)
{
    return error_set(err, -EOPNOTSUPP, "There are no sockets in a simulated world");
}

static int coroutine_fn sim_connect(const struct address *address, struct connecting *connecting,
                                    struct connection **ret, struct error **err)
{
    return error_set(err, -EOPNOTSUPP, "There are no sockets in a simulated world");
}

static struct connection *sim_adopt(int input, int output)
{
    g_error("There are no sockets in a simulated world");
    return NULL;
}

/* What works on an open connection or listener is not here: there is none. */
static const struct stream_ops sim_stream_ops = {
    .listen = sim_listen,
    .connect = sim_connect,
    .adopt = sim_adopt,
};

const struct engine_ops sim_engine_ops = {
    .name = "sim",
    .create = sim_engine_create,
    .destroy = sim_engine_destroy,
    .turn = sim_turn,
    .step = sim_step,
    .interrupt = sim_interrupt,
    .clock_ns = sim_clock_ns,
    .realtime_us = sim_realtime_us,
    .random = sim_engine_random,
    .thread_start = sim_thread_start,
    .thread_join = sim_thread_join,
    .work = sim_work,
    .files = &sim_file_ops,
    .streams = &sim_stream_ops,
};

/* ---- the world ---- */

static struct sim *world_create(const struct sim_config *config)
{
    struct sim *sim = g_new0(struct sim, 1);

    sim->config = *config;
    if (!config->latency_max_ns) {
        sim->config.latency_min_ns = 1000;
        sim->config.latency_max_ns = 100 * 1000;
    }
    if (!config->limit_ns) {
        sim->config.limit_ns = INT64_C(3600) * 1000000000;
    }
    g_assert(sim->config.latency_min_ns >= 0 && sim->config.latency_min_ns <= sim->config.latency_max_ns);
    sim->random = config->seed;
    sim->start_ns = sim->now_ns = START_NS;
    sim->cut_at = UINT64_MAX;
    list_init(&sim->events);
    list_init(&sim->threads);
    sim_files_init(sim);
    return sim;
}

struct sim *sim_create(const struct sim_config *config)
{
    g_assert(!sim_of_thread && !loop_current);
    struct sim *sim = world_create(config);

    sim->running = thread_create(sim, "main", 0);
    sim_of_thread = sim;
    return sim;
}

void sim_create_if_asked(void)
{
    const char *asked = g_getenv("INTERLOCK_SIM");

    if (asked && *asked) {
        uint64_t seed = g_ascii_strtoull(asked, NULL, 10);
        struct sim_config config = {.seed = seed, .preempt_percent = 5 + seed % 4 * 10, .short_percent = seed % 3 * 10};

        sim_create(&config);
    }
}

void sim_destroy(struct sim *sim)
{
    struct sim_thread *main = container_of(sim->threads.next, struct sim_thread, link);

    g_assert(sim == sim_of_thread && sim->running == main && !main->has_loop);
    g_assert(main->link.next == &sim->threads && list_is_empty(&sim->events));
    sim_of_thread = NULL;
    /* After a power cut the main thread's stack is one of ours, and in use. It is the process's last one. */
    if (!main->stack) {
        thread_destroy(main);
        sim_files_finish(sim);
        g_free(sim);
    }
}

static void after_main(void *argument)
{
    struct sim *old = argument;

    old->after_cut(sim_self(), old->after_argument);
    g_error("what goes on after a power cut has returned");
}

/* Every stack is left where it is, and the old world with it. */
static _Noreturn void power_cut(struct sim *sim)
{
    struct sim_config config = sim->config;
    struct context nowhere = {NULL};

    sim_note(sim, "loses its power", sim->changes, 0);
    config.seed++;
    struct sim *world = world_create(&config);

    sim_files_cut(sim, world);
    struct sim_thread *thread = world->running = thread_create(world, "main", AFTER_STACK_BYTES);

    thread->entry = after_main;
    thread->argument = sim;
    sim_of_thread = world;
    loop_current = NULL;
    context_on = &thread->own;
    context_switch(&nowhere, &thread->context, false);
    g_assert_not_reached();
}

void sim_change_begun(struct sim *sim)
{
    if (++sim->changes >= sim->cut_at) {
        power_cut(sim);
    }
}

uint64_t sim_changes(const struct sim *sim)
{
    return sim->changes;
}

void sim_set_recorder(struct sim *sim, void (*record)(const struct sim_record *record, void *argument), void *argument)
{
    sim->record = record;
    sim->record_argument = argument;
}

void sim_cut_power(struct sim *sim, uint64_t at_change, void (*after)(struct sim *world, void *argument),
                   void *argument)
{
    sim->cut_at = at_change;
    sim->after_cut = after;
    sim->after_argument = argument;
    if (sim->changes >= at_change) {
        power_cut(sim);
    }
}

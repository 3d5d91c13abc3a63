/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Stackful coroutines: their life, their pooled stacks, and what the sanitizers and valgrind are told.
 * The switch of stacks itself is coroutine_switch.c. Invariants:
 * 1. a coroutine runs on its loop's thread only, and is entered only when it is suspended;
 * 2. `woken` is true from coroutine_wake() until it is entered: a second wake in between is an error of the caller;
 * 3. a coroutine's stack never unwinds past coroutine_main(), which takes the next entry when the
 *    coroutine is used again, so that a pooled one needs no preparation;
 * 4. struct coroutine stands at the top of its own mapping: guard page, stack, struct.
 * It does not decide who runs next (loop.c) and knows no lock (sync.c).
 */
#include "loop/coroutine.h"
#include "base/size.h"
#include "loop/loop_private.h"
#include <glib.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(USE_ASAN) || defined(USE_TSAN)
#define STACK_BYTES (1024 * KiB)
#else
#define STACK_BYTES (256 * KiB)
#endif
/* Free coroutines that a thread keeps. */
#define POOL_MAX 512
/* Stack tops are spread over so many steps of so many bytes, so that they do not all fall on the same cache sets. */
#define COLOUR_COUNT 16
#define COLOUR_BYTES 192

static struct context *coroutine_caller_context(struct coroutine *co)
{
    return co->caller ? &co->caller->context : &co->loop->root;
}

/* The first function on every coroutine's stack. */
static void coroutine_main(void)
{
    context_arrived();
    struct coroutine *co = loop_current->running;

    while (co->entry) {
        co->entry(co->argument);
        co->ended = true;
        context_switch(&co->context, coroutine_caller_context(co), false);
    }
    context_switch(&co->context, coroutine_caller_context(co), true);
    g_assert_not_reached();
}

static void coroutine_run_ready(struct loop_task *task)
{
    coroutine_enter(container_of(task, struct coroutine, ready));
}

static struct coroutine *coroutine_map(struct loop *loop)
{
    static __thread unsigned colour;
    char *stack = stack_map(STACK_BYTES);
    size_t above = align_up(sizeof(struct coroutine), 64) + colour++ % COLOUR_COUNT * COLOUR_BYTES;
    struct coroutine *co = (struct coroutine *)(stack + STACK_BYTES - above);

    co->stack = stack;
    co->loop = loop;
    co->ready.run = coroutine_run_ready;
    context_init(&co->context, stack, STACK_BYTES - above, coroutine_main);
    return co;
}

/* `co` is fresh or waits in coroutine_main() for its next entry. */
static void coroutine_unmap(struct coroutine *co)
{
#ifdef USE_ASAN
    /* A last visit, to have it give up its fake stack. */
    if (co->ended) {
        struct coroutine *caller = co->loop->running;

        co->entry = NULL;
        co->caller = caller;
        co->loop->running = co;
        context_switch(coroutine_caller_context(co), &co->context, false);
        co->loop->running = caller;
    }
#endif
    context_finish(&co->context);
    stack_unmap(co->stack, STACK_BYTES);
}

struct coroutine *coroutine_create(void (*entry)(void *argument), void *argument)
{
    struct loop *loop = loop_current;
    g_assert(loop);
    struct coroutine *co = loop->free_coroutines;

    if (co) {
        loop->free_coroutines = co->next_free;
        loop->free_count--;
    } else {
        co = coroutine_map(loop);
    }
    loop->live_count++;
    co->ended = false;
    co->entry = entry;
    co->argument = argument;
    return co;
}

static void coroutine_recycle(struct loop *loop, struct coroutine *co)
{
    loop->live_count--;
    g_assert(!atomic_load_explicit(&co->woken, memory_order_relaxed));
    if (loop->free_count < POOL_MAX) {
        co->next_free = loop->free_coroutines;
        loop->free_coroutines = co;
        loop->free_count++;
    } else {
        coroutine_unmap(co);
    }
}

void coroutine_enter(struct coroutine *co)
{
    struct loop *loop = loop_current;
    struct coroutine *caller = loop->running;

    g_assert(co->loop == loop && !co->entered && !co->ended);
    atomic_store_explicit(&co->woken, false, memory_order_relaxed);
    co->caller = caller;
    co->entered = true;
    loop->running = co;
    context_switch(caller ? &caller->context : &loop->root, &co->context, false);
    loop->running = caller;
    co->entered = false;
    if (co->ended) {
        coroutine_recycle(loop, co);
    }
}

void coroutine_fn coroutine_yield(void)
{
    struct coroutine *co = loop_current->running;

    g_assert(co);
    context_switch(&co->context, coroutine_caller_context(co), false);
}

struct coroutine *coroutine_self(void)
{
    struct loop *loop = loop_current;

    return loop ? loop->running : NULL;
}

void coroutine_wake(struct coroutine *co)
{
    g_assert(!atomic_load_explicit(&co->woken, memory_order_relaxed));
    atomic_store_explicit(&co->woken, true, memory_order_relaxed);
    loop_post(co->loop, &co->ready);
}

void coroutine_fn coroutine_pause(void)
{
    coroutine_wake(loop_current->running);
    coroutine_yield();
}

void coroutine_loop_init(struct loop *loop)
{
    context_init_here(&loop->root);
}

void coroutine_loop_finish(struct loop *loop)
{
    if (loop->live_count) {
        g_error("a loop was destroyed while %u of its coroutines had not ended", loop->live_count);
    }
    while (loop->free_coroutines) {
        struct coroutine *co = loop->free_coroutines;

        loop->free_coroutines = co->next_free;
        loop->free_count--;
        coroutine_unmap(co);
    }
}

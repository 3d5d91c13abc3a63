/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_CONTEXT_H
#define INTERLOCK_LOOP_CONTEXT_H

#include "loop/coroutine_switch.h"
#include <stddef.h>

/*
 * Places to go on from: a thread's own stack, a coroutine's, a simulated thread's; and what the sanitizers and valgrind
 * are told when one is left for another. Internal to src/loop.
 */
#if defined(__SANITIZE_ADDRESS__)
#define USE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define USE_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define USE_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define USE_TSAN 1
#endif
#endif
#ifdef USE_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef USE_TSAN
#include <sanitizer/tsan_interface.h>
#endif

struct context {
    void *stack_pointer; /* of who is not running */
    const void *stack_bottom;
    size_t stack_size;
    void *tool_fiber; /* TSan's */
    unsigned valgrind_id;
};

/* The stack on which the caller runs: its thread's own, or that of context_on. */
void context_init_here(struct context *context);
/* The simulated thread (not coroutine) that this thread is running; NULL: itself. Whoever switches sets it. */
extern __thread const struct context *context_on;

/* A stack of so many bytes (whole pages) above a guard page: its lowest byte. Ends the process when there is none. */
void *stack_map(size_t bytes);
void stack_unmap(void *bottom, size_t bytes);
/* [bottom, bottom + size) becomes a context whose first switch calls entry, which calls context_arrived() first, and
 * never returns. */
void context_init(struct context *context, void *bottom, size_t size, void (*entry)(void));
void context_finish(struct context *context);

static inline void context_arrived(void)
{
#ifdef USE_ASAN
    __sanitizer_finish_switch_fiber(NULL, NULL, NULL);
#endif
}

/* Leaves `from`, which goes on when somebody switches back to it. `last`: it never will. */
static inline void context_switch(struct context *from, struct context *to, _Bool last)
{
#ifdef USE_ASAN
    void *fake_stack = NULL;

    __sanitizer_start_switch_fiber(last ? NULL : &fake_stack, to->stack_bottom, to->stack_size);
#endif
#ifdef USE_TSAN
    __tsan_switch_to_fiber(to->tool_fiber, 0);
#endif
    stack_switch(&from->stack_pointer, to->stack_pointer);
#ifdef USE_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, NULL, NULL);
#endif
}

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Stacks beside a thread's own: their memory, their first frame, and what the sanitizers and valgrind need to know of
 * them. Invariants:
 * 1. below every stack lies a page that may not be touched;
 * 2. a stack is a root of the leak sanitizer for as long as it is mapped: what only a sleeper knows is not lost;
 * 3. a context is left and entered by context_switch() only, which tells the tools.
 * The switch itself is coroutine_switch.c. Who runs when is the business of coroutine.c and sim.c.
 */
#include "loop/context.h"
#include <glib.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef USE_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/lsan_interface.h>
#endif
#if __has_include(<valgrind/valgrind.h>)
#include <valgrind/valgrind.h>
#define USE_VALGRIND 1
#endif

__thread const struct context *context_on;

void *stack_map(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *mapping =
        mmap(NULL, page + bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (mapping == MAP_FAILED || mprotect(mapping, page, PROT_NONE) < 0) {
        g_error("no memory for a coroutine's stack");
    }
#ifdef USE_ASAN
    __lsan_register_root_region(mapping + page, bytes);
#endif
    return mapping + page;
}

void stack_unmap(void *bottom, size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);

#ifdef USE_ASAN
    __lsan_unregister_root_region(bottom, bytes);
    ASAN_UNPOISON_MEMORY_REGION(bottom, bytes);
#endif
    munmap((char *)bottom - page, page + bytes);
}

void context_init(struct context *context, void *bottom, size_t size, void (*entry)(void))
{
    context->stack_bottom = bottom;
    context->stack_size = size;
    context->stack_pointer = stack_prepare(bottom, size, entry);
#ifdef USE_TSAN
    context->tool_fiber = __tsan_create_fiber(0);
#endif
#ifdef USE_VALGRIND
    context->valgrind_id = VALGRIND_STACK_REGISTER(bottom, (char *)bottom + size);
#endif
}

void context_finish(struct context *context)
{
#ifdef USE_TSAN
    __tsan_destroy_fiber(context->tool_fiber);
#endif
#ifdef USE_VALGRIND
    VALGRIND_STACK_DEREGISTER(context->valgrind_id);
#endif
    stack_discard(context->stack_pointer);
}

void context_init_here(struct context *context)
{
    *context = (struct context){NULL};
    if (context_on) {
        context->stack_bottom = context_on->stack_bottom;
        context->stack_size = context_on->stack_size;
    } else {
#ifdef USE_ASAN
        pthread_attr_t attributes;
        void *bottom;

        g_assert(pthread_getattr_np(pthread_self(), &attributes) == 0);
        g_assert(pthread_attr_getstack(&attributes, &bottom, &context->stack_size) == 0);
        pthread_attr_destroy(&attributes);
        context->stack_bottom = bottom;
#endif
    }
#ifdef USE_TSAN
    context->tool_fiber = __tsan_get_current_fiber();
#endif
}

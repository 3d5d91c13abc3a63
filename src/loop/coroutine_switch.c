/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The switch from one stack to another: a few instructions for x86-64 (System V) and aarch64 (AAPCS64),
 * ucontext for the rest. The assembly pushes the callee-saved registers and the address to go on at,
 * stores the stack pointer, and does the reverse on the other side. Invariants:
 * 1. a suspended stack's pointer points to the saved registers, in the order below;
 * 2. a fresh stack looks like a suspended one whose address to go on at is its entry;
 * 3. entry never returns (the word above its frame is 0, which also ends a debugger's walk).
 * It tells no tool of the switch: that is coroutine.c's business.
 */
#include "loop/coroutine_switch.h"
#include <glib.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)

/* clang-format off */
__asm__(".text\n"
        ".p2align 4\n"
        ".globl stack_switch\n"
        ".hidden stack_switch\n"
        ".type stack_switch, @function\n"
        "stack_switch:\n"
        "    pushq %rbp\n"
        "    pushq %rbx\n"
        "    pushq %r12\n"
        "    pushq %r13\n"
        "    pushq %r14\n"
        "    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq %rsi, %rsp\n"
        "    popq %r15\n"
        "    popq %r14\n"
        "    popq %r13\n"
        "    popq %r12\n"
        "    popq %rbx\n"
        "    popq %rbp\n"
        "    popq %rcx\n"
        "    jmpq *%rcx\n"
        ".size stack_switch, .-stack_switch\n");
/* clang-format on */

void *stack_prepare(void *bottom, size_t size, void (*entry)(void))
{
    uintptr_t top = ((uintptr_t)bottom + size) & ~(uintptr_t)15;
    uintptr_t *frame = (uintptr_t *)top - 8;

    memset(frame, 0, 8 * sizeof(*frame));
    frame[6] = (uintptr_t)entry; /* entered with frame[7], a 0, as its return address */
    return frame;
}

void stack_discard(void *stack_pointer)
{
}

#elif defined(__aarch64__)

/* clang-format off */
__asm__(".text\n"
        ".p2align 4\n"
        ".globl stack_switch\n"
        ".hidden stack_switch\n"
        ".type stack_switch, %function\n"
        "stack_switch:\n"
        "    sub sp, sp, #160\n"
        "    stp x19, x20, [sp, #0]\n"
        "    stp x21, x22, [sp, #16]\n"
        "    stp x23, x24, [sp, #32]\n"
        "    stp x25, x26, [sp, #48]\n"
        "    stp x27, x28, [sp, #64]\n"
        "    stp x29, x30, [sp, #80]\n"
        "    stp d8, d9, [sp, #96]\n"
        "    stp d10, d11, [sp, #112]\n"
        "    stp d12, d13, [sp, #128]\n"
        "    stp d14, d15, [sp, #144]\n"
        "    mov x9, sp\n"
        "    str x9, [x0]\n"
        "    mov sp, x1\n"
        "    ldp x19, x20, [sp, #0]\n"
        "    ldp x21, x22, [sp, #16]\n"
        "    ldp x23, x24, [sp, #32]\n"
        "    ldp x25, x26, [sp, #48]\n"
        "    ldp x27, x28, [sp, #64]\n"
        "    ldp x29, x9, [sp, #80]\n"
        "    ldp d8, d9, [sp, #96]\n"
        "    ldp d10, d11, [sp, #112]\n"
        "    ldp d12, d13, [sp, #128]\n"
        "    ldp d14, d15, [sp, #144]\n"
        "    add sp, sp, #160\n"
        "    mov x30, xzr\n"
        "    mov x16, x9\n"
        "    br x16\n"
        ".size stack_switch, .-stack_switch\n");
/* clang-format on */

void *stack_prepare(void *bottom, size_t size, void (*entry)(void))
{
    uintptr_t top = ((uintptr_t)bottom + size) & ~(uintptr_t)15;
    uintptr_t *frame = (uintptr_t *)(top - 16 - 160);

    memset(frame, 0, 160 + 16);
    frame[11] = (uintptr_t)entry;
    return frame;
}

void stack_discard(void *stack_pointer)
{
}

#else

#include <ucontext.h>

/* Here the "stack pointer" is a ucontext on the heap; a thread's own is made at its first switch away. */
void stack_switch(void **save, void *to)
{
    if (!*save) {
        *save = g_new0(ucontext_t, 1);
    }
    g_assert(swapcontext(*save, to) == 0);
}

void *stack_prepare(void *bottom, size_t size, void (*entry)(void))
{
    ucontext_t *context = g_new0(ucontext_t, 1);

    g_assert(getcontext(context) == 0);
    context->uc_stack.ss_sp = bottom;
    context->uc_stack.ss_size = size;
    makecontext(context, entry, 0);
    return context;
}

void stack_discard(void *stack_pointer)
{
    g_free(stack_pointer);
}

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_COROUTINE_SWITCH_H
#define INTERLOCK_LOOP_COROUTINE_SWITCH_H

#include <stddef.h>

/*
 * The bare switch of stacks. `*save` receives what stack_switch() needs to come back here. Only the
 * registers that the C calling convention preserves are kept (not the floating-point control words).
 */
void stack_switch(void **save, void *to);
/* Makes a fresh stack [bottom, bottom + size) whose first switch calls entry, which never returns. */
void *stack_prepare(void *bottom, size_t size, void (*entry)(void));
/* Gives back what stack_prepare() took beside the stack. */
void stack_discard(void *stack_pointer);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_COMMANDS_H
#define INTERLOCK_TEST_EXPLORE_COMMANDS_H

#include "base/error.h"
#include "loop/coroutine.h"

/* For the table in moves.c: the moves that are single commands. */
struct actor;

int coroutine_fn grow_begin(struct actor *actor, struct error **err);
int coroutine_fn shrink_begin(struct actor *actor, struct error **err);
void resize_done(struct actor *actor);
int coroutine_fn change_backing_begin(struct actor *actor, struct error **err);
int coroutine_fn bitmap_add_begin(struct actor *actor, struct error **err);
/* Every write since is in the bitmap. */
void bitmap_add_check(struct actor *actor);

#endif

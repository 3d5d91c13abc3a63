/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_COPIES_H
#define INTERLOCK_TEST_EXPLORE_COPIES_H

#include "base/error.h"
#include "loop/coroutine.h"
#include <stdbool.h>

/* For the table in moves.c: the moves that have a target of their own, actor->target. */
struct actor;

int coroutine_fn mirror_begin(struct actor *actor, struct error **err);
int coroutine_fn replace_begin(struct actor *actor, struct error **err);
void mirror_on_begin(struct actor *actor);
void mirror_done(struct actor *actor);
bool mirror_moved(const struct actor *actor);

int coroutine_fn backup_begin(struct actor *actor, struct error **err);
void backup_on_begin(struct actor *actor);
void backup_done(struct actor *actor);

int coroutine_fn snapshot_begin(struct actor *actor, struct error **err);
void snapshot_on_begin(struct actor *actor);

#endif

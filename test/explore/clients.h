/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_CLIENTS_H
#define INTERLOCK_TEST_EXPLORE_CLIENTS_H

#include "base/error.h"
#include "loop/coroutine.h"
#include <stdbool.h>

/* Clients of an export: they read, and write if they may, from a loop of their own, and compare all that they see. */
struct actor;
struct client;

/* As block-export-add does: claims and attaches in one step. 0, or why not. */
int coroutine_fn client_start(struct actor *actor, bool writable, bool exclusive, struct error **err);
/* Stops, looks at everything once more, and goes. */
void coroutine_fn client_finish(struct actor *actor);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FILTER_BLKDEBUG_H
#define INTERLOCK_DRIVER_FILTER_BLKDEBUG_H

#include "block/driver.h"

/*
 * Breakpoints of a blkdebug node: a request stops where the event happens, until it is resumed. Control thread, the
 * graph does not change meanwhile; the requests may be on any loop. Tags are the user's, and need not be unique.
 */

/* The blkdebug node nearest to `top` on the way down through what filters show and what formats lie in; NULL: none. */
struct node *blkdebug_find(struct node *top);

/* The next such event stops. `tell` is called (on the request's loop, or the resumer's) when a request stops and when
 * it goes on. -ENOENT: no such event. */
int blkdebug_break(struct node *node, const char *event, const char *tag, void (*tell)(const char *tag, bool stopped),
                   struct error **err);
/* Lets the request that stopped last with this tag go on; -ENOENT: none has. */
int blkdebug_resume(struct node *node, const char *tag);
/* Takes breakpoints with this tag away and lets all go on that stopped with it; -ENOENT: there was no breakpoint. */
int blkdebug_remove_break(struct node *node, const char *tag);
/* Lets all go on that have stopped, and takes all breakpoints away, so that the node can be drained. */
void blkdebug_release(struct node *node);
bool blkdebug_is_stopped(struct node *node, const char *tag);
/* Until a request has stopped with this tag. One that waits at a time. */
void coroutine_fn blkdebug_wait(struct node *node, const char *tag);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_EVENT_H
#define INTERLOCK_LOOP_EVENT_H

#include "base/error.h"
#include "loop/coroutine.h"

/*
 * Events between processes: eventfds that somebody else made and handed to us. One that is signalled several times
 * before anybody looks was signalled once. Not in simulated worlds, which have no descriptors.
 */
struct event;

/* Takes the descriptor over if it succeeds. -EINVAL: it is no eventfd. Any thread. */
int event_adopt(int fd, struct event **ret, struct error **err);
/* Waits until it was signalled since the last wait. -ECANCELED: event_interrupt(). One coroutine at a time. */
int coroutine_fn event_wait(struct event *event);
/* The loop of the one who waits: he goes on. Nothing when nobody waits. */
void event_interrupt(struct event *event);
/* The loop that has waited: nobody waits any more, and another loop may. Harmless when none has. */
void event_leave(struct event *event);
/* Any thread. Never waits. */
void event_signal(struct event *event);
void event_close(struct event *event); /* no loop waits, nor has not left; accepts NULL */

#endif

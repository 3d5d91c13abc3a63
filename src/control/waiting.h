/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CONTROL_WAITING_H
#define INTERLOCK_CONTROL_WAITING_H

#include "access/queue.h"
#include "control/control.h"
#include <stdbool.h>
#include <stdint.h>

/*
 * Operations that wait for their claims: each is tried again whenever something in the ledger has changed, in the order
 * of the queue (access/queue.h), until it is granted, fails, is cancelled, or its time is up. They belong to the
 * program and not to the session that began them. Control loop only.
 */

/* Goes on for a command that was refused and has joined the queue. Takes `ticket` over; `changes`: control->changes
 * as it was before the command was first tried. timeout_ns 0: no limit. `refusal` is borrowed. */
void waiting_begin(struct control *control, const struct command *command, json_t *arguments,
                   struct access_ticket *ticket, unsigned changes, int64_t timeout_ns, const struct error *refusal);
/* Something in the ledger has changed. Never yields, and runs nothing. */
void waiting_wake(struct control *control);
/* Ends the waiting of the operation of that id. False: none waits. One that has just been granted is waited for, so
 * that whoever wants to cancel it finds what has become of it. `kind`: "job", ..., or NULL for any. */
bool coroutine_fn waiting_cancel(struct control *control, const char *kind, const char *id);
/* Ends the waiting of all. Never yields. */
void waiting_cancel_all(struct control *control);
/* The same; returns when the last of them is gone. */
void coroutine_fn waiting_shutdown(struct control *control);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CONTROL_DISPATCH_H
#define INTERLOCK_CONTROL_DISPATCH_H

#include "access/queue.h"
#include "control/control.h"
#include <stdint.h>

/*
 * The way of a command that a client has sent: the one place that knows the access options (schema: access-options),
 * which every command with claims takes besides its own arguments. Handlers know nothing of them. Control loop only.
 */

/* Runs the command, to its end or until it has to wait; `arguments` (an object) is borrowed. As command->dispatch. */
int coroutine_fn dispatch_command(struct control *control, const struct command *command, json_t *arguments,
                                  json_t **ret, struct error **err);
/* The dry run of the same; as command->check. What the access options would make of a refusal is not asked. */
int coroutine_fn dispatch_check(struct control *control, const struct command *command, json_t *arguments,
                                json_t **ret_claims, struct error **err);
/* The ledger asks who asks, and tells of changes; once there is a graph. Until dispatch_finish(). */
void dispatch_init(struct control *control);
void dispatch_finish(struct control *control);

/* One run of a handler in the name of a ticket; what the ledger is asked in this coroutine is asked by it. `reason`: of
 * an override, or NULL. */
int coroutine_fn dispatch_run(struct control *control, const struct command *command, json_t *arguments,
                              struct access_ticket *ticket, const char *reason, json_t **ret, struct error **err);

#endif

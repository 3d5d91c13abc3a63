/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CONTROL_SESSION_H
#define INTERLOCK_CONTROL_SESSION_H

#include "control/control.h"
#include "loop/connection.h"
#include "loop/coroutine.h"

/* One client's QMP session, from greeting to goodbye. Control loop only. */
struct session;

struct session *session_create(struct control *control, const char *monitor_id, struct connection *connection,
                               bool pretty);
/* Greets, then serves until the client has gone or session_end() was called. The connection stays the caller's. */
void coroutine_fn session_run(struct session *session);
/* Frees it; not while it runs. Accepts NULL. */
void session_destroy(struct session *session);
/* No more commands are begun. Waits up to timeout_ns for the running one to end and for what was answered to be sent,
 * then cuts the connection, which makes session_run() return as soon as the running command has ended. */
void coroutine_fn session_end(struct session *session, int64_t timeout_ns);
bool session_is_negotiated(const struct session *session);
/* Queues text (with its line end) for the client. Never yields: a client that does not read is cut off at a limit. */
void session_send_text(struct session *session, const char *text, size_t size);
bool session_is_pretty(const struct session *session);

#define SESSION_MAX_PENDING 8                  /* commands that wait for their turn; then the input waits */
#define SESSION_OUTPUT_PAUSE ((size_t)1 << 20) /* bytes not sent: no new command is begun until they are fewer */
#define SESSION_OUTPUT_MAX ((size_t)16 << 20)  /* bytes not sent: the client is cut off */

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_CLIENT_H
#define INTERLOCK_TOOL_CLIENT_H

#include "base/error.h"
#include <stdbool.h>

/*
 * A blocking QMP client for the sub-commands that talk to a running daemon. One thread, no loop. Events that arrive
 * between replies are kept for client_wait_event().
 */
struct client;

/* `address`: a unix socket's path, or HOST:PORT; NULL: the environment variable INTERLOCK_QMP. Negotiates. */
int client_connect(const char *address, struct client **ret, struct error **err);
void client_close(struct client *client); /* accepts NULL */
/* Runs a command; takes `arguments` (may be NULL). *ret (may be NULL) is the "return" value, json_decref() it. */
int client_execute(struct client *client, const char *command, json_t *arguments, json_t **ret, struct error **err);
/* The next event in order of arrival, or NULL after `timeout_ms` (negative: no limit) or when the daemon went away
 * (then *ret_gone is true). json_decref() it. */
json_t *client_wait_event(struct client *client, int timeout_ms, bool *ret_gone);

static inline void client_cleanup(struct client **client)
{
    client_close(*client);
}
#define auto_client __attribute__((cleanup(client_cleanup))) struct client *
static inline void json_cleanup(json_t **json)
{
    json_decref(*json);
}
#define auto_json __attribute__((cleanup(json_cleanup))) json_t *

#endif

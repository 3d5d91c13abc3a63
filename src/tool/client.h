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
/* The next event in order of arrival, or NULL after `timeout_ms` (negative: no limit), when a signal came, or when the
 * daemon went away (then *ret_gone is true). json_decref() it. */
json_t *client_wait_event(struct client *client, int timeout_ms, bool *ret_gone);
/* Takes the first event of that name whose data have `key` = `value` out of those that have come; NULL: there is none.
 */
json_t *client_take_event(struct client *client, const char *name, const char *key, const char *value);
/* Waits until a further event has come, or for `timeout_ms`; keeps it. False: the daemon went away. */
bool client_listen(struct client *client, int timeout_ms);
/* Does the daemon know the command? An error only if it cannot be asked. */
int client_knows(struct client *client, const char *command, bool *ret, struct error **err);
/* The daemon is on this machine (its monitor is a unix socket). */
bool client_is_local(const struct client *client);
/* The folder that the daemon was started in; NULL if that cannot be told. g_free() it. */
char *client_folder(const struct client *client);

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

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CONTROL_MONITOR_H
#define INTERLOCK_CONTROL_MONITOR_H

#include "base/error.h"
#include "control/control.h"
#include "loop/connection.h"
#include "loop/coroutine.h"

/*
 * A QMP monitor: serves one client at a time on a listening socket, or on descriptors that it is given. Control loop
 * only.
 */
struct monitor;

struct monitor_config {
    const char *id;                /* its chardev's; for messages */
    const struct address *address; /* to listen on, or to connect to; NULL: use `connection` */
    bool connect;                  /* connect to address, rather than listen */
    struct connection *connection; /* without address: a single client (standard input and output); taken over */
    bool pretty;                   /* replies and events over several lines */
};
/* Starts serving. On failure `connection` stays the caller's. */
int coroutine_fn monitor_open(struct control *control, const struct monitor_config *config, struct monitor **ret,
                              struct error **err);
/*
 * Ends it: no more commands are begun, the one that is running ends, what was answered is sent for up to half a second,
 * the client is dropped. Not from a command handler (it would wait for itself). Accepts NULL.
 */
void coroutine_fn monitor_close(struct monitor *monitor);
/* The same for all monitors of `control`. */
void coroutine_fn monitor_close_all(struct control *control);
/* Waits until there is a client (a chardev's wait=on). One coroutine at a time. False when the monitor is closing. */
bool coroutine_fn monitor_wait_client(struct monitor *monitor);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Monitors: where QMP clients come in, one session after the other on each, and how events reach all of them.
 *
 * Invariants:
 * 1. A monitor has one coroutine, which accepts a client, runs its session to the end and accepts the next.
 * 2. session and connection are set exactly while a client is served; whoever finds them may use them until it yields.
 * 3. monitor_close() returns when that coroutine has ended; until then the monitor is in control->monitors.
 *
 * What is said in a session is session.c's matter.
 */
#include "control/monitor.h"

#include "control/session.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

#define CLOSE_TIMEOUT_NS ((int64_t)500000000)
#define ACCEPT_RETRY_NS ((int64_t)100000000)

struct monitor {
    struct list link; /* control->monitors */
    struct control *control;
    char *id;
    bool pretty;
    struct listener *listener;     /* NULL: one client only */
    struct connection *connection; /* of the client */
    struct session *session;       /* of the client */
    bool closing, ended;
    struct loop_sleep retry;         /* the accepting coroutine, after a failure */
    struct coroutine *closer;        /* waits in monitor_close() for `ended` */
    struct coroutine *client_waiter; /* waits in monitor_wait_client() */
};

static void wake(struct coroutine **waiter)
{
    struct coroutine *co = *waiter;
    if (co) {
        *waiter = NULL;
        coroutine_wake(co);
    }
}

/* Serves monitor->connection to its end, and closes it. */
static void coroutine_fn serve(struct monitor *monitor)
{
    monitor->session = session_create(monitor->control, monitor->id, monitor->connection, monitor->pretty);
    wake(&monitor->client_waiter);
    session_run(monitor->session);
    struct session *session = g_steal_pointer(&monitor->session);
    struct connection *connection = g_steal_pointer(&monitor->connection);
    session_destroy(session);
    connection_close(connection);
}

static void coroutine_fn run_monitor(void *argument)
{
    struct monitor *monitor = argument;
    if (!monitor->listener) {
        serve(monitor);
    }
    while (monitor->listener && !monitor->closing) {
        struct connection *connection = NULL;
        int result = listener_accept(monitor->listener, &connection);
        if (result == -ECANCELED || (result < 0 && monitor->closing)) {
            break;
        }
        if (result < 0) {
            g_message("monitor %s: accepting a client: %s", monitor->id, g_strerror(-result));
            loop_sleep_ns(&monitor->retry, ACCEPT_RETRY_NS);
        } else if (monitor->closing) {
            connection_close(connection);
        } else {
            monitor->connection = connection;
            serve(monitor);
        }
    }
    monitor->ended = true;
    wake(&monitor->client_waiter);
    wake(&monitor->closer);
}

int coroutine_fn monitor_open(struct control *control, const struct monitor_config *config, struct monitor **ret,
                              struct error **err)
{
    struct listener *listener = NULL;
    struct connection *connection = config->connection;
    int result = 0;
    if (config->address && config->connect) {
        result = connection_open(config->address, &connection, err);
    } else if (config->address) {
        result = listener_open(config->address, &listener, err);
    }
    if (result < 0) {
        error_prepend(err, "monitor %s", config->id);
        return result;
    }
    g_assert(listener || connection);
    struct monitor *monitor = g_new0(struct monitor, 1);
    monitor->control = control;
    monitor->id = g_strdup(config->id);
    monitor->pretty = config->pretty;
    monitor->listener = listener;
    monitor->connection = connection;
    list_append(&control->monitors, &monitor->link);
    coroutine_enter(coroutine_create(run_monitor, monitor));
    *ret = monitor;
    return 0;
}

void coroutine_fn monitor_close(struct monitor *monitor)
{
    if (!monitor) {
        return;
    }
    g_assert(!monitor->closing);
    monitor->closing = true;
    if (monitor->listener) {
        listener_shutdown(monitor->listener);
    }
    loop_sleep_wake(&monitor->retry);
    if (monitor->session) {
        session_end(monitor->session, CLOSE_TIMEOUT_NS);
    }
    while (!monitor->ended) {
        monitor->closer = coroutine_self();
        coroutine_yield();
    }
    listener_close(monitor->listener);
    list_remove(&monitor->link);
    g_free(monitor->id);
    g_free(monitor);
}

void coroutine_fn monitor_close_all(struct control *control)
{
    while (!list_is_empty(&control->monitors)) {
        monitor_close(container_of(control->monitors.next, struct monitor, link));
    }
}

bool coroutine_fn monitor_wait_client(struct monitor *monitor)
{
    while (!monitor->session && !monitor->ended && !monitor->closing) {
        g_assert(!monitor->client_waiter);
        monitor->client_waiter = coroutine_self();
        coroutine_yield();
    }
    return monitor->session != NULL;
}

/* The event as text with its line end. */
static char *event_text(json_t *event, bool pretty)
{
    char *text = json_dumps(event, pretty ? JSON_INDENT(4) : 0);
    g_assert(text);
    char *line = g_strconcat(text, "\r\n", NULL);
    free(text);
    return line;
}

void control_emit(struct control *control, json_t *event)
{
    int64_t now_us = loop_realtime_us();
    json_t *stamped = json_pack("{s:{s:I, s:I}}", "timestamp", "seconds", (json_int_t)(now_us / 1000000),
                                "microseconds", (json_int_t)(now_us % 1000000));
    json_object_update(stamped, event);
    json_decref(event);
    g_autofree char *plain = NULL, *pretty = NULL;
    list_for_each (link, &control->monitors) {
        struct session *session = container_of(link, struct monitor, link)->session;
        if (session && session_is_negotiated(session)) {
            char **text = session_is_pretty(session) ? &pretty : &plain;
            if (!*text) {
                *text = event_text(stamped, session_is_pretty(session));
            }
            session_send_text(session, *text, strlen(*text));
        }
    }
    json_decref(stamped);
}

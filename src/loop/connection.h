/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_CONNECTION_H
#define INTERLOCK_LOOP_CONNECTION_H

#include "base/buffers.h"
#include "base/error.h"
#include "loop/coroutine.h"
#include "loop/loop.h"
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/*
 * Stream sockets (and pipes, for stdio), through the loop's engine. A connection or listener belongs
 * to one loop at a time. At most one coroutine receives and one sends at the same time.
 */
struct connection;
struct listener;

enum address_kind { ADDRESS_UNIX, ADDRESS_INET, ADDRESS_FD };
struct address {
    enum address_kind kind;
    char *path; /* unix */
    bool abstract;
    char *host, *port; /* inet; port may be a service name */
    int fd;            /* an inherited descriptor */
};
void address_clear(struct address *address);
/* "unix:/path", "/path", "unix:@abstract", "host:port", "[::1]:port" */
int address_parse(const char *text, struct address *ret, struct error **err);
char *address_format(const struct address *address); /* g_free() */

/* Binds and listens. A stale unix socket file (nobody accepts on it) is replaced; a live one is an error. An empty
 * host is every interface, port "0" one that the kernel chooses. */
int coroutine_fn listener_open(const struct address *address, struct listener **ret, struct error **err);
/* Waits for a client. The connection belongs to the calling loop until connection_move(). -ECANCELED after
 * listener_shutdown(). */
int coroutine_fn listener_accept(struct listener *listener, struct connection **ret);
void listener_shutdown(struct listener *listener);           /* wakes a waiting accept */
void coroutine_fn listener_close(struct listener *listener); /* removes the unix socket file; accepts NULL */
char *listener_address(struct listener *listener);           /* where it really listens, printable; g_free() */

int coroutine_fn connection_open(const struct address *address, struct connection **ret, struct error **err);
/* The same for who may not want to wait to the end: connecting_cancel() on the same loop makes it return -ECANCELED,
 * soon (a name that is being looked up is waited for). Zero-initialise; NULL: nobody cancels. */
struct connecting {
    bool cancelled;
    void *waiting; /* the engine's */
};
int coroutine_fn connection_open_cancellable(const struct address *address, struct connecting *connecting,
                                             struct connection **ret, struct error **err);
void connecting_cancel(struct connecting *connecting);
/* Takes over descriptors (the same one twice for a socket). */
struct connection *connection_from_fds(int input, int output);
/* Receives at least 1 and at most `bytes`; 0 at the end of the stream; negative errno. -ECANCELED after
 * connection_shutdown(). */
ssize_t coroutine_fn connection_receive(struct connection *connection, void *to, size_t bytes);
/* Receives exactly `bytes`; 0 or negative errno (-ECONNRESET when the stream ends inside). */
int coroutine_fn connection_receive_all(struct connection *connection, void *to, size_t bytes);
/* Sends everything; 0 or negative errno. */
int coroutine_fn connection_send(struct connection *connection, struct buffers from, size_t bytes);
/* Sends what goes without waiting: how much, at least 1, or a negative errno (-EAGAIN: nothing). Nobody else is
 * sending. -ENOTSUP where that cannot be done at all (TLS, pipes). */
ssize_t coroutine_fn connection_send_now(struct connection *connection, struct buffers from, size_t bytes);
/*
 * The same over unix sockets with descriptors. What is received has `bytes` (at least 1) and at most `max` descriptors,
 * which came with the first of them and are the caller's to close; -EPROTO when there are more. One descriptor is sent
 * with the first byte, and stays the caller's. -ENOTSUP where descriptors cannot travel.
 */
int coroutine_fn connection_receive_with_fds(struct connection *connection, void *to, size_t bytes, int *fds,
                                             unsigned max, unsigned *ret_count);
int coroutine_fn connection_send_with_fd(struct connection *connection, const void *from, size_t bytes, int fd);
/* Any thread: both directions end; whoever waits is woken. The object stays. */
void connection_shutdown(struct connection *connection);
void coroutine_fn connection_close(struct connection *connection); /* accepts NULL; nobody may be waiting in it */
/* Hands an idle connection (nothing in flight) over to another loop: call on the old one, use on the new one. */
void connection_move(struct connection *connection, struct loop *to);
int connection_fd(struct connection *connection);     /* for SO_PEERCRED and the like */
char *connection_peer(struct connection *connection); /* printable, g_free() */

#endif

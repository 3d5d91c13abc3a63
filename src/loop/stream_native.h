/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_STREAM_NATIVE_H
#define INTERLOCK_LOOP_STREAM_NATIVE_H

#include "loop/engine.h"
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/socket.h>

/* Internal to stream_native.c (connections) and listener_native.c (listeners, connecting). */

/*
 * What a connection and a listener share: a loop, and a way to end them from another thread. A shutdown and the
 * task that it posts hold a reference, so that neither finds memory or descriptors gone when the owner closes
 * meanwhile.
 */
struct native_end {
    _Atomic(struct loop *) loop;
    atomic_uint references;
    atomic_bool shut;
    struct loop_task task;
    void (*cancel)(struct native_end *end);  /* on the loop: wakes who waits */
    void (*release)(struct native_end *end); /* any thread: closes descriptors, frees */
};
void native_end_init(struct native_end *end, void (*cancel)(struct native_end *end),
                     void (*release)(struct native_end *end));
/* Any thread: sets the flag, shuts socket_fd down (-1: none), then has the loop wake who waits. Twice is once. */
void native_end_shutdown(struct native_end *end, int socket_fd);
void native_end_unref(struct native_end *end);
static inline bool native_end_is_shut(struct native_end *end)
{
    return atomic_load_explicit(&end->shut, memory_order_acquire);
}

/* Takes over a connected socket in blocking mode (the calls say MSG_DONTWAIT themselves). */
struct connection *native_connection_create(int fd);
/* "127.0.0.1:10809", "unix:/path", ... of a socket's address; g_free(). */
char *native_address_format(const struct sockaddr_storage *storage, socklen_t size);

int coroutine_fn native_listen(const struct address *address, struct listener **ret, struct error **err);
int coroutine_fn native_accept(struct listener *listener, struct connection **ret);
void native_listener_shutdown(struct listener *listener);
void coroutine_fn native_listener_close(struct listener *listener);
char *native_listener_address(struct listener *listener);
int coroutine_fn native_connect(const struct address *address, struct connecting *connecting, struct connection **ret,
                                struct error **err);

#endif

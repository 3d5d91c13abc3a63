/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Waiting for descriptors that are somebody else's to read and write (a client library's), through the loop's engine;
 * and the ways between such a descriptor and a connection. Owns nothing but what the engine has to remember.
 *
 * 1. A wait is told to the engine before the state of the descriptor is looked at, or is looked at by the kernel
 * itself, so that no change is missed.
 * 2. A wake that finds nobody waiting is forgotten; one that meets a result that is on its way may end the next wait
 *    early. Whoever waits looks again anyway.
 */
#include "loop/descriptor.h"
#include "loop/connection.h"
#include "loop/engine.h"
#include "loop/stream_native.h"
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

struct descriptor_wait {
    struct native_stream stream;
    struct loop *loop;
};

int descriptor_wait_create(int fd, struct descriptor_wait **ret)
{
    if (!engine_self()->ops->native) {
        return -ENOTSUP;
    }
    *ret = g_new0(struct descriptor_wait, 1);
    (*ret)->stream.fd = fd;
    (*ret)->loop = loop_self();
    return 0;
}

void descriptor_wait_destroy(struct descriptor_wait *wait)
{
    struct engine *engine = engine_self();

    if (wait) {
        g_assert(wait->loop == loop_self());
        engine->ops->native->stream_detach(engine, &wait->stream);
        g_free(wait);
    }
}

int coroutine_fn descriptor_wait_ready(struct descriptor_wait *wait, unsigned directions)
{
    struct engine *engine = engine_self();

    g_assert(wait->loop == loop_self() && directions);
    int r = engine->ops->native->stream_wait_any(engine, &wait->stream, directions);

    if (r > 0) {
        loop_spend(1);
    }
    return r == -ECANCELED ? 0 : r;
}

void descriptor_wait_wake(struct descriptor_wait *wait)
{
    struct engine *engine = engine_self();

    g_assert(wait->loop == loop_self());
    engine->ops->native->stream_cancel(engine, &wait->stream);
}

unsigned descriptor_is_ready(int fd, unsigned directions)
{
    struct pollfd ready = {.fd = fd, .events = (short)native_poll_events(directions)};

    return poll(&ready, 1, 0) > 0 ? native_poll_ready((unsigned)ready.revents, directions) : 0;
}

void descriptor_close(int fd)
{
    close(fd);
}

int coroutine_fn connection_take_descriptor(struct connection *connection)
{
    if (connection->ops != &stream_native_ops) {
        return -ENOTSUP;
    }
    int type;
    socklen_t size = sizeof(type);
    int fd = connection->ops->fd(connection);

    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) < 0) {
        return -ENOTSUP;
    }
    fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0) {
        return -errno;
    }
    connection_close(connection);
    return fd;
}

int connection_pair(struct connection **ret, int *ret_fd)
{
    int ends[2];

    if (!engine_self()->ops->native) {
        return -ENOTSUP;
    }
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0) {
        return -errno;
    }
    *ret = native_connection_create(ends[0]);
    *ret_fd = ends[1];
    return 0;
}

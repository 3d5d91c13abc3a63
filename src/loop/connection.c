/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Connections and listeners as the rest of the house sees them: whole transfers made of the engine's
 * possibly short ones. The engine that created a connection serves it for its whole life.
 * Knows no descriptor (stream_native.c) and no address family (listener_native.c).
 */
#include "loop/connection.h"
#include "base/size.h"
#include "loop/engine.h"
#include <errno.h>
#include <glib.h>
#include <unistd.h>

/* Pieces of memory that one send takes. */
#define SEND_PIECES 64

int coroutine_fn listener_open(const struct address *address, struct listener **ret, struct error **err)
{
    g_assert(coroutine_running());
    return engine_self()->ops->streams->listen(address, ret, err);
}

int coroutine_fn listener_accept(struct listener *listener, struct connection **ret)
{
    return listener->ops->accept(listener, ret);
}

void listener_shutdown(struct listener *listener)
{
    listener->ops->listener_shutdown(listener);
}

void coroutine_fn listener_close(struct listener *listener)
{
    if (listener) {
        listener->ops->listener_close(listener);
    }
}

char *listener_address(struct listener *listener)
{
    return listener->ops->listener_address(listener);
}

int coroutine_fn connection_open(const struct address *address, struct connection **ret, struct error **err)
{
    return connection_open_cancellable(address, NULL, ret, err);
}

int coroutine_fn connection_open_cancellable(const struct address *address, struct connecting *connecting,
                                             struct connection **ret, struct error **err)
{
    g_assert(coroutine_running());
    return engine_self()->ops->streams->connect(address, connecting, ret, err);
}

void connecting_cancel(struct connecting *connecting)
{
    struct engine *engine = engine_self();

    connecting->cancelled = true;
    if (connecting->waiting) {
        engine->ops->native->stream_cancel(engine, connecting->waiting);
    }
}

struct connection *connection_from_fds(int input, int output)
{
    return engine_self()->ops->streams->adopt(input, output);
}

ssize_t coroutine_fn connection_receive(struct connection *connection, void *to, size_t bytes)
{
    return bytes ? connection->ops->receive(connection, to, 1, bytes) : 0;
}

int coroutine_fn connection_receive_all(struct connection *connection, void *to, size_t bytes)
{
    char *at = to;

    while (bytes) {
        ssize_t received = connection->ops->receive(connection, at, bytes, bytes);

        if (received <= 0) {
            return received < 0 ? (int)received : -ECONNRESET;
        }
        at += received;
        bytes -= (size_t)received;
    }
    return 0;
}

/* Fills out with the view's next pieces, `bytes` at most; returns how many. */
static unsigned send_iov(struct buffers from, size_t bytes, struct iovec *out)
{
    unsigned count = 0;
    size_t skip = from.skip;

    for (unsigned i = 0; i < from.count && count < SEND_PIECES && bytes; i++, skip = 0) {
        size_t piece = min_u64(from.iov[i].iov_len - skip, bytes);

        if (piece) {
            out[count++] = (struct iovec){(char *)from.iov[i].iov_base + skip, piece};
            bytes -= piece;
        }
    }
    return count;
}

int coroutine_fn connection_send(struct connection *connection, struct buffers from, size_t bytes)
{
    struct iovec iov[SEND_PIECES];

    while (bytes) {
        unsigned count = send_iov(from, bytes, iov);
        g_assert(count);
        ssize_t sent = connection->ops->send(connection, iov, count);

        if (sent < 0) {
            return (int)sent;
        }
        g_assert(sent > 0 && (size_t)sent <= bytes);
        bytes -= (size_t)sent;
        if (bytes) {
            from = buffers_advance(from, (size_t)sent);
        }
    }
    return 0;
}

ssize_t coroutine_fn connection_send_now(struct connection *connection, struct buffers from, size_t bytes)
{
    struct iovec iov[SEND_PIECES];

    if (!connection->ops->send_now) {
        return -ENOTSUP;
    }
    return connection->ops->send_now(connection, iov, send_iov(from, bytes, iov));
}

int coroutine_fn connection_receive_with_fds(struct connection *connection, void *to, size_t bytes, int *fds,
                                             unsigned max, unsigned *ret_count)
{
    *ret_count = 0;
    if (!connection->ops->receive_fds) {
        return -ENOTSUP;
    }
    ssize_t received = connection->ops->receive_fds(connection, to, bytes, fds, max, ret_count);
    if (received <= 0) {
        return received < 0 ? (int)received : -ECONNRESET;
    }
    int r = connection_receive_all(connection, (char *)to + received, bytes - (size_t)received);
    if (r < 0) {
        while (*ret_count) {
            close(fds[--*ret_count]);
        }
    }
    return r;
}

int coroutine_fn connection_send_with_fd(struct connection *connection, const void *from, size_t bytes, int fd)
{
    if (!connection->ops->send_fd) {
        return -ENOTSUP;
    }
    ssize_t sent = connection->ops->send_fd(connection, from, bytes, fd);
    if (sent < 0) {
        return (int)sent;
    }
    struct iovec rest = {(char *)from + sent, bytes - (size_t)sent};
    return rest.iov_len ? connection_send(connection, buffers_one(&rest), rest.iov_len) : 0;
}

void connection_shutdown(struct connection *connection)
{
    connection->ops->shutdown(connection);
}

void coroutine_fn connection_close(struct connection *connection)
{
    if (connection) {
        connection->ops->close(connection);
    }
}

void connection_move(struct connection *connection, struct loop *to)
{
    connection->ops->move(connection, to);
}

int connection_fd(struct connection *connection)
{
    return connection->ops->fd(connection);
}

char *connection_peer(struct connection *connection)
{
    return connection->ops->peer(connection);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Connections of the real engines. A transfer is first tried at once; only when the kernel has nothing
 * to give (or no room) it waits through the loop's engine. Invariants:
 * 1. sockets are in blocking mode and are asked with MSG_DONTWAIT; other descriptors (pipes, terminals) are
 *    set non-blocking, and get their old mode back when they are closed, for others may share them;
 * 2. at most one coroutine waits per direction, on the connection's loop (the engine asserts it);
 * 3. after a shutdown every call returns -ECANCELED: the flag is set first, then whoever waits is woken from the
 *    connection's loop, so that nobody can begin to wait in between;
 * 4. a connection is freed when it was closed and its shutdown task, if any, has run.
 */
#include "loop/stream_native.h"
#include "base/size.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* Budget that an inline transfer takes: one unit, and one for so many bytes. */
#define BYTES_PER_UNIT (32 * KiB)
/* What a unix socket takes before its sender waits, if the kernel's limit allows. */
#define UNIX_SEND_ROOM ((int)MiB)
/* Seconds after which a silent TCP connection is asked whether its other side is still there (power and networks go
 * without a farewell), seconds between the questions, and how many without an answer end it. */
#define ALIVE_IDLE 20
#define ALIVE_INTERVAL 5
#define ALIVE_COUNT 4

struct native_connection {
    struct native_end end; /* first */
    struct connection connection;
    bool socket;
    struct native_stream input, output; /* the same descriptor: input serves both */
    int input_flags, output_flags;      /* to be restored */
};

static struct native_connection *native(struct connection *connection)
{
    return container_of(connection, struct native_connection, connection);
}

static struct native_stream *native_output(struct native_connection *connection)
{
    return connection->output.fd >= 0 ? &connection->output : &connection->input;
}

/* ---- ends ---- */

static void native_end_run(struct loop_task *task)
{
    struct native_end *end = container_of(task, struct native_end, task);
    struct loop *loop = atomic_load(&end->loop);

    if (loop != loop_self()) {
        /* It moved while the task was on its way. */
        loop_post(loop, &end->task);
        return;
    }
    end->cancel(end);
    native_end_unref(end);
}

void native_end_init(struct native_end *end, void (*cancel)(struct native_end *end),
                     void (*release)(struct native_end *end))
{
    atomic_init(&end->loop, loop_self());
    atomic_init(&end->references, 1);
    atomic_init(&end->shut, false);
    end->task.run = native_end_run;
    end->cancel = cancel;
    end->release = release;
}

void native_end_shutdown(struct native_end *end, int socket_fd)
{
    atomic_fetch_add(&end->references, 1);
    if (atomic_exchange(&end->shut, true)) {
        native_end_unref(end);
        return;
    }
    if (socket_fd >= 0) {
        shutdown(socket_fd, SHUT_RDWR);
    }
    loop_post(atomic_load(&end->loop), &end->task);
}

void native_end_unref(struct native_end *end)
{
    if (atomic_fetch_sub(&end->references, 1) == 1) {
        end->release(end);
    }
}

/* ---- life ---- */

static void connection_cancel(struct native_end *end)
{
    struct native_connection *connection = container_of(end, struct native_connection, end);
    struct engine *engine = engine_self();

    engine->ops->native->stream_cancel(engine, &connection->input);
    engine->ops->native->stream_cancel(engine, &connection->output);
}

static void connection_release(struct native_end *end)
{
    struct native_connection *connection = container_of(end, struct native_connection, end);

    close(connection->input.fd);
    if (connection->output.fd >= 0) {
        close(connection->output.fd);
    }
    g_free(connection);
}

static struct native_connection *connection_allocate(int input, int output)
{
    struct native_connection *connection = g_new0(struct native_connection, 1);

    native_end_init(&connection->end, connection_cancel, connection_release);
    connection->connection.ops = &stream_native_ops;
    connection->input.fd = input;
    connection->output.fd = output == input ? -1 : output;
    connection->input_flags = fcntl(input, F_GETFL);
    connection->output_flags = fcntl(output, F_GETFL);
    return connection;
}

static bool fd_is_stream_socket(int fd)
{
    int type;
    socklen_t size = sizeof(type);

    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_STREAM;
}

static void socket_prepare(int fd)
{
    int on = 1, room = UNIX_SEND_ROOM, idle = ALIVE_IDLE, interval = ALIVE_INTERVAL, count = ALIVE_COUNT;

    /* TCP finds its room by itself; a unix socket has no delay to switch off, and a fixed room. */
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) < 0) {
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
        return;
    }
    /* Where the defaults must do, they do. */
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count));
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
}

struct connection *native_connection_create(int fd)
{
    struct native_connection *connection = connection_allocate(fd, fd);

    connection->socket = true;
    socket_prepare(fd);
    return &connection->connection;
}

static struct connection *native_adopt(int input, int output)
{
    struct native_connection *connection;

    if (input == output && fd_is_stream_socket(input)) {
        fcntl(input, F_SETFL, fcntl(input, F_GETFL) & ~O_NONBLOCK);
        return native_connection_create(input);
    }
    connection = connection_allocate(input, output);
    fcntl(input, F_SETFL, connection->input_flags | O_NONBLOCK);
    fcntl(output, F_SETFL, connection->output_flags | O_NONBLOCK);
    return &connection->connection;
}

static void native_detach(struct native_connection *connection)
{
    struct engine *engine = engine_self();

    g_assert(atomic_load(&connection->end.loop) == loop_self());
    engine->ops->native->stream_detach(engine, &connection->input);
    engine->ops->native->stream_detach(engine, &connection->output);
}

static void coroutine_fn native_close(struct connection *base)
{
    struct native_connection *connection = native(base);

    native_detach(connection);
    if (!connection->socket) {
        fcntl(connection->input.fd, F_SETFL, connection->input_flags);
        fcntl(native_output(connection)->fd, F_SETFL, connection->output_flags);
    }
    native_end_unref(&connection->end);
}

static void native_move(struct connection *base, struct loop *to)
{
    struct native_connection *connection = native(base);

    native_detach(connection);
    atomic_store(&connection->end.loop, to);
}

static void native_shutdown(struct connection *base)
{
    struct native_connection *connection = native(base);

    native_end_shutdown(&connection->end, connection->socket ? connection->input.fd : -1);
}

/* ---- transfers ---- */

static ssize_t coroutine_fn inline_result(ssize_t bytes)
{
    loop_spend(1 + (unsigned)((uint64_t)bytes / BYTES_PER_UNIT));
    return bytes;
}

/* A socket that was empty a moment ago is not asked at once, but with the loop's next visit to the kernel. */
static ssize_t coroutine_fn socket_receive(struct native_stream *stream, void *to, size_t minimum, size_t maximum)
{
    struct engine *engine = engine_self();
    bool tried = false;
    ssize_t r;

    if (!stream->drained) {
        r = recv(stream->fd, to, maximum, MSG_DONTWAIT);
        if (r > 0) {
            stream->drained = (size_t)r < maximum;
            return inline_result(r);
        }
        if (r == 0 || errno != EAGAIN) {
            return r < 0 ? -errno : 0;
        }
        tried = true;
    }
    r = engine->ops->native->stream_receive(engine, stream, to, maximum, minimum == maximum, tried);
    stream->drained = r < (ssize_t)maximum;
    return r;
}

static ssize_t coroutine_fn pipe_receive(struct native_stream *stream, void *to, size_t maximum)
{
    struct engine *engine = engine_self();
    ssize_t r = read(stream->fd, to, maximum);

    if (r >= 0) {
        return inline_result(r);
    }
    if (errno != EAGAIN) {
        return -errno;
    }
    r = engine->ops->native->stream_wait(engine, stream, NATIVE_INPUT);
    return r < 0 ? r : -EAGAIN;
}

static ssize_t coroutine_fn native_receive(struct connection *base, void *to, size_t minimum, size_t maximum)
{
    struct native_connection *connection = native(base);
    struct native_stream *stream = &connection->input;
    ssize_t r;

    g_assert(atomic_load_explicit(&connection->end.loop, memory_order_relaxed) == loop_self());
    do {
        if (native_end_is_shut(&connection->end)) {
            return -ECANCELED;
        }
        r = connection->socket ? socket_receive(stream, to, minimum, maximum) : pipe_receive(stream, to, maximum);
    } while (r == -EAGAIN || r == -EINTR);
    return r <= 0 && native_end_is_shut(&connection->end) ? -ECANCELED : r;
}

/* `from` as the socket's or pipe's one attempt, and a wait if there was no room. */
static ssize_t coroutine_fn stream_send(struct native_connection *connection, struct msghdr *from)
{
    struct engine *engine = engine_self();
    struct native_stream *stream = native_output(connection);
    ssize_t r = connection->socket ? sendmsg(stream->fd, from, MSG_DONTWAIT | MSG_NOSIGNAL)
                                   : writev(stream->fd, from->msg_iov, (int)from->msg_iovlen);

    if (r >= 0) {
        return r ? inline_result(r) : -EIO;
    }
    if (errno != EAGAIN) {
        return -errno;
    }
    if (connection->socket) {
        r = engine->ops->native->stream_send(engine, stream, from);
        return r ? r : -EPIPE;
    }
    r = engine->ops->native->stream_wait(engine, stream, NATIVE_OUTPUT);
    return r < 0 ? r : -EAGAIN;
}

/* Until some of it has gone. */
static ssize_t coroutine_fn message_send(struct native_connection *connection, struct msghdr *message)
{
    ssize_t r;

    g_assert(atomic_load_explicit(&connection->end.loop, memory_order_relaxed) == loop_self());
    do {
        if (native_end_is_shut(&connection->end)) {
            return -ECANCELED;
        }
        r = stream_send(connection, message);
    } while (r == -EAGAIN || r == -EINTR);
    return r < 0 && native_end_is_shut(&connection->end) ? -ECANCELED : r;
}

static ssize_t coroutine_fn native_send(struct connection *base, const struct iovec *iov, unsigned count)
{
    struct msghdr message = {.msg_iov = (struct iovec *)iov, .msg_iovlen = count};

    return message_send(native(base), &message);
}

static ssize_t coroutine_fn native_send_now(struct connection *base, const struct iovec *iov, unsigned count)
{
    struct native_connection *connection = native(base);
    struct msghdr message = {.msg_iov = (struct iovec *)iov, .msg_iovlen = count};
    ssize_t r;

    if (!connection->socket) {
        return -ENOTSUP;
    }
    if (native_end_is_shut(&connection->end)) {
        return -ECANCELED;
    }
    do {
        r = sendmsg(native_output(connection)->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : r ? inline_result(r) : -EAGAIN;
}

/* ---- descriptors ---- */

/* What a message may carry at most, as far as its receiver's room goes. */
#define FDS_MAX 64

/* Takes the descriptors out of what was received; closes them all if there are more than `max`, or were for the room.
 */
static int take_fds(struct msghdr *message, int *fds, unsigned max, unsigned *ret_count)
{
    bool fit = !(message->msg_flags & MSG_CTRUNC);
    unsigned count = 0;

    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        for (size_t at = CMSG_LEN(0); at + sizeof(int) <= part->cmsg_len; at += sizeof(int)) {
            int fd;

            memcpy(&fd, (char *)part + at, sizeof(fd));
            if (count < max) {
                fds[count++] = fd;
            } else {
                close(fd);
                fit = false;
            }
        }
    }
    while (!fit && count) {
        close(fds[--count]);
    }
    *ret_count = count;
    return fit ? 0 : -EPROTO;
}

static ssize_t coroutine_fn native_receive_fds(struct connection *base, void *to, size_t bytes, int *fds, unsigned max,
                                               unsigned *ret_count)
{
    struct native_connection *connection = native(base);
    struct engine *engine = engine_self();
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(FDS_MAX * sizeof(int))];
    } control;

    g_assert(atomic_load_explicit(&connection->end.loop, memory_order_relaxed) == loop_self());
    if (!connection->socket) {
        return -ENOTSUP;
    }
    while (!native_end_is_shut(&connection->end)) {
        struct iovec iov = {to, bytes};
        struct msghdr message = {
            .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
        ssize_t r = recvmsg(connection->input.fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

        if (r >= 0) {
            int taken = take_fds(&message, fds, max, ret_count);

            connection->input.drained = false;
            return taken < 0 ? taken : inline_result(r);
        }
        r = errno == EAGAIN  ? engine->ops->native->stream_wait(engine, &connection->input, NATIVE_INPUT)
            : errno == EINTR ? 0
                             : -errno;
        if (r < 0 && !native_end_is_shut(&connection->end)) {
            return r;
        }
    }
    return -ECANCELED;
}

static ssize_t coroutine_fn native_send_fd(struct connection *base, const void *from, size_t bytes, int fd)
{
    struct native_connection *connection = native(base);
    struct iovec iov = {(void *)from, bytes};
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {.align = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};

    if (!connection->socket) {
        return -ENOTSUP;
    }
    memcpy(CMSG_DATA(&control.align), &fd, sizeof(fd));
    return message_send(connection, &message);
}

/* ---- names ---- */

static int native_fd(struct connection *connection)
{
    return native(connection)->input.fd;
}

char *native_address_format(const struct sockaddr_storage *storage, socklen_t size)
{
    char host[INET6_ADDRSTRLEN], port[8];

    if (storage->ss_family == AF_UNIX) {
        const struct sockaddr_un *name = (const struct sockaddr_un *)storage;
        size_t length = size - offsetof(struct sockaddr_un, sun_path);

        if (size <= offsetof(struct sockaddr_un, sun_path)) {
            return g_strdup("unix");
        }
        if (!name->sun_path[0]) {
            return g_strdup_printf("unix:@%.*s", (int)length - 1, name->sun_path + 1);
        }
        return g_strdup_printf("unix:%.*s", (int)length, name->sun_path);
    }
    if (getnameinfo((const struct sockaddr *)storage, size, host, sizeof(host), port, sizeof(port),
                    NI_NUMERICHOST | NI_NUMERICSERV)) {
        return g_strdup("unknown");
    }
    return g_strdup_printf(strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
}

static char *native_peer(struct connection *base)
{
    struct native_connection *connection = native(base);
    struct sockaddr_storage storage;
    socklen_t size = sizeof(storage);
    struct ucred who;
    socklen_t who_size = sizeof(who);

    if (!connection->socket) {
        return g_strdup_printf("descriptor %d", connection->input.fd);
    }
    if (getpeername(connection->input.fd, (struct sockaddr *)&storage, &size) < 0) {
        return g_strdup("disconnected");
    }
    if (storage.ss_family == AF_UNIX &&
        getsockopt(connection->input.fd, SOL_SOCKET, SO_PEERCRED, &who, &who_size) == 0) {
        return g_strdup_printf("unix (process %d, user %u)", (int)who.pid, (unsigned)who.uid);
    }
    return native_address_format(&storage, size);
}

const struct stream_ops stream_native_ops = {
    .listen = native_listen,
    .accept = native_accept,
    .listener_shutdown = native_listener_shutdown,
    .listener_close = native_listener_close,
    .listener_address = native_listener_address,
    .connect = native_connect,
    .adopt = native_adopt,
    .receive = native_receive,
    .send = native_send,
    .send_now = native_send_now,
    .receive_fds = native_receive_fds,
    .send_fd = native_send_fd,
    .shutdown = native_shutdown,
    .close = native_close,
    .move = native_move,
    .fd = native_fd,
    .peer = native_peer,
};

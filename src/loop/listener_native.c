/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Listening and connecting with the real engines. What may block (names, stale sockets) runs on the
 * worker pool; accepting and connecting wait through the loop's engine. Invariants:
 * 1. a listening descriptor is non-blocking, so an accept that finds nobody waits in the engine only;
 * 2. a lack of descriptors or memory makes accept wait ACCEPT_PAUSE_NS, never spin;
 * 3. the socket file that is removed is the one we made: same device, same inode;
 * 4. an inherited listening socket is not shut down, for others may be using it too.
 * A listener has one socket: the first address that its name resolves to and that can be bound.
 */
#include "loop/stream_native.h"
#include "loop/worker.h"
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define ACCEPT_PAUSE_NS 100000000
#define BACKLOG 128
/* A unix socket whose backlog is full is tried again for a while. */
#define CONNECT_PAUSE_NS 10000000
#define CONNECT_TRIES 500

struct native_listener {
    struct native_end end; /* first */
    struct listener listener;
    struct native_stream stream;
    struct loop_sleep pause;
    bool inherited;
    char *path; /* to be removed */
    dev_t device;
    ino_t inode;
};

static struct native_listener *native(struct listener *listener)
{
    return container_of(listener, struct native_listener, listener);
}

static void listener_cancel(struct native_end *end)
{
    struct native_listener *listener = container_of(end, struct native_listener, end);
    struct engine *engine = engine_self();

    engine->ops->native->stream_cancel(engine, &listener->stream);
    loop_sleep_wake(&listener->pause);
}

static void listener_release(struct native_end *end)
{
    struct native_listener *listener = container_of(end, struct native_listener, end);

    close(listener->stream.fd);
    g_free(listener->path);
    g_free(listener);
}

/* ---- listening; on a worker ---- */

struct listen_job {
    const struct address *address;
    int fd;
    bool inherited;
    struct stat file;
    struct error *err;
};

static socklen_t unix_name(const struct address *address, struct sockaddr_un *ret)
{
    size_t length = strlen(address->path);

    *ret = (struct sockaddr_un){.sun_family = AF_UNIX};
    if (length + 1 > sizeof(ret->sun_path)) {
        return 0;
    }
    memcpy(ret->sun_path + address->abstract, address->path, length);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + 1);
}

/* Removes the socket file that nobody accepts on any more; -EADDRINUSE when somebody does. */
static int remove_stale_socket(const struct sockaddr_un *name, socklen_t size)
{
    struct stat status;
    int fd, r;

    if (lstat(name->sun_path, &status) < 0) {
        return errno == ENOENT ? 0 : -errno;
    }
    if (!S_ISSOCK(status.st_mode)) {
        return -EEXIST;
    }
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) {
        return -errno;
    }
    r = connect(fd, (const struct sockaddr *)name, size) < 0 ? -errno : 0;
    close(fd);
    if (r != -ECONNREFUSED) {
        return -EADDRINUSE;
    }
    return unlink(name->sun_path) < 0 && errno != ENOENT ? -errno : 0;
}

static int listen_bind(int fd, const struct sockaddr *name, socklen_t size)
{
    int r = bind(fd, name, size) < 0 ? -errno : 0;

    if (r == -EADDRINUSE && name->sa_family == AF_UNIX && ((const struct sockaddr_un *)name)->sun_path[0]) {
        r = remove_stale_socket((const struct sockaddr_un *)name, size);
        if (r == 0) {
            r = bind(fd, name, size) < 0 ? -errno : 0;
        }
    }
    if (r == 0 && listen(fd, BACKLOG) < 0) {
        r = -errno;
    }
    return r;
}

static int listen_unix(struct listen_job *job)
{
    struct sockaddr_un name;
    socklen_t size = unix_name(job->address, &name);
    int r;

    if (!size) {
        return error_set_errno(&job->err, -ENAMETOOLONG, "Could not listen on '%s'", job->address->path);
    }
    job->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    r = job->fd < 0 ? -errno : listen_bind(job->fd, (struct sockaddr *)&name, size);
    if (r < 0) {
        error_set_errno(&job->err, r, "Could not listen on '%s'", job->address->path);
        if (r == -EADDRINUSE) {
            error_hint(&job->err, "Another program is accepting connections there");
        } else if (r == -EEXIST) {
            error_hint(&job->err, "There is a file with that name that is not a socket");
        }
        return r;
    }
    if (!job->address->abstract && lstat(job->address->path, &job->file) < 0) {
        return error_set_errno(&job->err, -errno, "Could not examine '%s'", job->address->path);
    }
    return 0;
}

static int resolve(const struct address *address, int flags, struct addrinfo **ret, struct error **err)
{
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = flags};
    const char *host = *address->host ? address->host : NULL;
    int r = getaddrinfo(host, address->port, &hints, ret);

    if (r) {
        return error_set(err, r == EAI_SYSTEM && errno ? -errno : -EADDRNOTAVAIL, "Could not resolve '%s:%s': %s",
                         address->host, address->port, gai_strerror(r));
    }
    return 0;
}

static int listen_inet_one(const struct addrinfo *info, int *ret)
{
    int on = 1, off = 0, r;
    int fd = socket(info->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd < 0) {
        return -errno;
    }
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (info->ai_family == AF_INET6) {
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
    }
    r = listen_bind(fd, info->ai_addr, info->ai_addrlen);
    if (r < 0) {
        close(fd);
        return r;
    }
    *ret = fd;
    return 0;
}

static int listen_inet(struct listen_job *job)
{
    struct addrinfo *list;
    int r = resolve(job->address, AI_PASSIVE, &list, &job->err);

    if (r < 0) {
        return r;
    }
    r = -EADDRNOTAVAIL;
    /* For every interface at once a version 6 socket serves both. */
    for (int pass = *job->address->host ? 1 : 0; pass < 2 && r < 0; pass++) {
        for (struct addrinfo *info = list; info && r < 0; info = info->ai_next) {
            if (pass == 1 || info->ai_family == AF_INET6) {
                r = listen_inet_one(info, &job->fd);
            }
        }
    }
    freeaddrinfo(list);
    if (r < 0) {
        return error_set_errno(&job->err, r, "Could not listen on '%s:%s'", job->address->host, job->address->port);
    }
    return 0;
}

static int listen_inherited(struct listen_job *job)
{
    int listening = 0, fd = job->address->fd;
    socklen_t size = sizeof(listening);

    if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) < 0 || !listening) {
        return error_set(&job->err, -EINVAL, "Descriptor %d is not a listening socket", fd);
    }
    if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) < 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) < 0) {
        return error_set_errno(&job->err, -errno, "Could not use descriptor %d", fd);
    }
    job->fd = fd;
    job->inherited = true;
    return 0;
}

static int listen_work(void *argument)
{
    struct listen_job *job = argument;
    int r = -EINVAL;

    switch (job->address->kind) {
    case ADDRESS_UNIX:
        r = listen_unix(job);
        break;
    case ADDRESS_INET:
        r = listen_inet(job);
        break;
    case ADDRESS_FD:
        r = listen_inherited(job);
        break;
    }
    if (r < 0 && job->fd >= 0) {
        close(job->fd);
    }
    return r;
}

int coroutine_fn native_listen(const struct address *address, struct listener **ret, struct error **err)
{
    struct listen_job job = {.address = address, .fd = -1};
    int r = worker_run(listen_work, &job);

    if (r < 0) {
        return error_move(err, job.err);
    }
    struct native_listener *listener = g_new0(struct native_listener, 1);

    native_end_init(&listener->end, listener_cancel, listener_release);
    listener->listener.ops = &stream_native_ops;
    listener->stream.fd = job.fd;
    listener->inherited = job.inherited;
    if (address->kind == ADDRESS_UNIX && !address->abstract) {
        listener->path = g_strdup(address->path);
        listener->device = job.file.st_dev;
        listener->inode = job.file.st_ino;
    }
    *ret = &listener->listener;
    return 0;
}

/* ---- accepting ---- */

/* What to do about a failed accept: 0 to try again, or the error that ends it. */
static int coroutine_fn accept_failed(struct native_listener *listener, int code)
{
    struct engine *engine = engine_self();

    switch (code) {
    case EAGAIN:
        return engine->ops->native->stream_wait(engine, &listener->stream, NATIVE_INPUT);
    case EMFILE:
    case ENFILE:
    case ENOBUFS:
    case ENOMEM:
        loop_sleep_ns(&listener->pause, ACCEPT_PAUSE_NS);
        return 0;
    case EBADF:
    case EINVAL:
    case ENOTSOCK:
    case EOPNOTSUPP:
        return -code;
    default:
        /* The client's own trouble: ECONNABORTED, EPROTO, network errors, EINTR. */
        loop_spend(1);
        return 0;
    }
}

int coroutine_fn native_accept(struct listener *base, struct connection **ret)
{
    struct native_listener *listener = native(base);

    g_assert(atomic_load(&listener->end.loop) == loop_self());
    while (!native_end_is_shut(&listener->end)) {
        int fd = accept4(listener->stream.fd, NULL, NULL, SOCK_CLOEXEC);

        if (fd >= 0) {
            *ret = native_connection_create(fd);
            loop_spend(1);
            return 0;
        }
        int r = accept_failed(listener, errno);

        if (r < 0 && !native_end_is_shut(&listener->end)) {
            return r;
        }
    }
    return -ECANCELED;
}

void native_listener_shutdown(struct listener *base)
{
    struct native_listener *listener = native(base);

    native_end_shutdown(&listener->end, listener->inherited ? -1 : listener->stream.fd);
}

static int remove_socket_work(void *argument)
{
    struct native_listener *listener = argument;
    struct stat status;

    if (lstat(listener->path, &status) == 0 && status.st_dev == listener->device && status.st_ino == listener->inode) {
        unlink(listener->path);
    }
    return 0;
}

void coroutine_fn native_listener_close(struct listener *base)
{
    struct native_listener *listener = native(base);
    struct engine *engine = engine_self();

    g_assert(atomic_load(&listener->end.loop) == loop_self());
    engine->ops->native->stream_detach(engine, &listener->stream);
    if (listener->path) {
        worker_run(remove_socket_work, listener);
    }
    native_end_unref(&listener->end);
}

char *native_listener_address(struct listener *base)
{
    struct sockaddr_storage storage;
    socklen_t size = sizeof(storage);

    if (getsockname(native(base)->stream.fd, (struct sockaddr *)&storage, &size) < 0) {
        return g_strdup("unknown");
    }
    return native_address_format(&storage, size);
}

/* ---- connecting ---- */

static bool is_cancelled(const struct connecting *connecting)
{
    return connecting && connecting->cancelled;
}

/* Waits for a connect that is under way. */
static int coroutine_fn connect_wait(int fd, struct connecting *connecting)
{
    struct engine *engine = engine_self();
    struct native_stream stream = {.fd = fd};
    struct pollfd ready = {.fd = fd, .events = POLLOUT};
    int result = 0, r = 0;
    socklen_t size = sizeof(result);

    while (r >= 0 && poll(&ready, 1, 0) == 0) {
        if (connecting) {
            connecting->waiting = &stream;
        }
        r = is_cancelled(connecting) ? -ECANCELED : engine->ops->native->stream_wait(engine, &stream, NATIVE_OUTPUT);
    }
    if (connecting) {
        connecting->waiting = NULL;
    }
    engine->ops->native->stream_detach(engine, &stream);
    if (r < 0) {
        return r;
    }
    return getsockopt(fd, SOL_SOCKET, SO_ERROR, &result, &size) < 0 ? -errno : -result;
}

static int coroutine_fn connect_one(int family, const struct sockaddr *name, socklen_t size,
                                    struct connecting *connecting, struct connection **ret)
{
    int r, fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd < 0) {
        return -errno;
    }
    for (int tries = 0;; tries++) {
        r = connect(fd, name, size) < 0 ? -errno : 0;
        if (is_cancelled(connecting)) {
            r = -ECANCELED;
        }
        if (r != -EAGAIN || tries == CONNECT_TRIES) {
            break;
        }
        loop_sleep_ns(NULL, CONNECT_PAUSE_NS);
    }
    if (r == -EINPROGRESS || r == -EINTR) {
        r = connect_wait(fd, connecting);
    }
    if (r == 0 && fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK) < 0) {
        r = -errno;
    }
    if (r < 0) {
        close(fd);
        return r;
    }
    *ret = native_connection_create(fd);
    return 0;
}

struct resolve_job {
    const struct address *address;
    struct addrinfo *list;
    struct error *err;
};

static int resolve_work(void *argument)
{
    struct resolve_job *job = argument;

    return resolve(job->address, 0, &job->list, &job->err);
}

static int coroutine_fn connect_inet(const struct address *address, struct connecting *connecting,
                                     struct connection **ret, struct error **err)
{
    struct resolve_job job = {.address = address};
    int r = worker_run(resolve_work, &job);

    if (r < 0) {
        return error_move(err, job.err);
    }
    r = -EADDRNOTAVAIL;
    for (struct addrinfo *info = job.list; info && r < 0 && r != -ECANCELED; info = info->ai_next) {
        r = connect_one(info->ai_family, info->ai_addr, info->ai_addrlen, connecting, ret);
    }
    freeaddrinfo(job.list);
    if (r < 0) {
        return error_set_errno(err, r, "Could not connect to '%s:%s'", address->host, address->port);
    }
    return 0;
}

int coroutine_fn native_connect(const struct address *address, struct connecting *connecting, struct connection **ret,
                                struct error **err)
{
    struct sockaddr_un name;
    socklen_t size;
    int r = -ENAMETOOLONG;

    switch (address->kind) {
    case ADDRESS_INET:
        return connect_inet(address, connecting, ret, err);
    case ADDRESS_FD:
        if (fcntl(address->fd, F_GETFL) < 0) {
            return error_set_errno(err, -errno, "Could not use descriptor %d", address->fd);
        }
        *ret = stream_native_ops.adopt(address->fd, address->fd);
        return 0;
    case ADDRESS_UNIX:
        break;
    }
    size = unix_name(address, &name);
    if (size) {
        r = connect_one(AF_UNIX, (struct sockaddr *)&name, size, connecting, ret);
    }
    if (r < 0) {
        return error_set_errno(err, r, "Could not connect to '%s'", address->path);
    }
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The epoll engine, for kernels and containers without io_uring: sockets wait in epoll, file transfers
 * run on the worker pool. Invariants:
 * 1. a stream is registered edge-triggered for both directions at its first wait, and its callers try the
 *    system call before every wait: an edge that nobody waits for is found by the next try;
 * 2. a wait may end too early (an old edge); the caller tries again and waits again;
 * 3. epoll's data is the stream, or NULL for the eventfd that interrupt() writes.
 */
#include "loop/busy_poll.h"
#include "loop/engine.h"
#include <errno.h>
#include <glib.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define EVENTS_MAX 128

struct epoll_engine {
    struct engine engine;
    int epoll_fd, event_fd;
    bool milliseconds; /* no epoll_pwait2() */
    struct busy_poll poll;
};

static int epoll_engine_create(struct engine **ret)
{
    struct epoll_engine *epoll = g_new0(struct epoll_engine, 1);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};

    epoll->engine.ops = &epoll_engine_ops;
    epoll->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    epoll->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (epoll->epoll_fd < 0 || epoll->event_fd < 0 ||
        epoll_ctl(epoll->epoll_fd, EPOLL_CTL_ADD, epoll->event_fd, &event) < 0) {
        int r = -errno;

        if (epoll->epoll_fd >= 0) {
            close(epoll->epoll_fd);
        }
        if (epoll->event_fd >= 0) {
            close(epoll->event_fd);
        }
        g_free(epoll);
        return r;
    }
    busy_poll_init(&epoll->poll);
    *ret = &epoll->engine;
    return 0;
}

static void epoll_engine_destroy(struct engine *engine)
{
    struct epoll_engine *epoll = container_of(engine, struct epoll_engine, engine);

    close(epoll->epoll_fd);
    close(epoll->event_fd);
    g_free(epoll);
}

/* One who waits for any of both stands in both places, and is woken once. */
static void epoll_finish_wait(struct native_stream *stream, enum native_direction direction, int result)
{
    struct native_wait *wait = direction == NATIVE_INPUT ? stream->input : stream->output;

    if (wait) {
        stream->input = stream->input == wait ? NULL : stream->input;
        stream->output = stream->output == wait ? NULL : stream->output;
        wait->result = result;
        coroutine_wake(wait->waiter);
    }
}

static int epoll_wait_ns(struct epoll_engine *epoll, struct epoll_event *events, int64_t timeout_ns)
{
    if (timeout_ns > 0 && !epoll->milliseconds) {
        struct timespec timeout = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
        int r = epoll_pwait2(epoll->epoll_fd, events, EVENTS_MAX, &timeout, NULL);

        if (r >= 0 || errno == EINTR) {
            return r;
        }
        epoll->milliseconds = true;
    }
    int64_t timeout_ms = timeout_ns <= 0 ? timeout_ns : (timeout_ns - 1) / 1000000 + 1;

    return epoll_wait(epoll->epoll_fd, events, EVENTS_MAX, timeout_ms > G_MAXINT ? G_MAXINT : (int)timeout_ms);
}

/* Only a call could tell. */
static bool epoll_has_news(struct engine *engine)
{
    return false;
}

static void epoll_turn(struct engine *engine, int64_t timeout_ns)
{
    struct epoll_engine *epoll = container_of(engine, struct epoll_engine, engine);
    struct epoll_event events[EVENTS_MAX];

    if (busy_poll_turn(&epoll->poll, timeout_ns, epoll_has_news, engine)) {
        timeout_ns = 0;
    }
    int count = epoll_wait_ns(epoll, events, timeout_ns);

    for (int i = 0; i < count; i++) {
        struct native_stream *stream = events[i].data.ptr;
        /* Nobody need read the eventfd: it is edge-triggered, and its counter does not fill up in practice. */
        if (!stream) {
            continue;
        }
        if (events[i].events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
            epoll_finish_wait(stream, NATIVE_INPUT, 0);
        }
        if (events[i].events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) {
            epoll_finish_wait(stream, NATIVE_OUTPUT, 0);
        }
    }
}

static void epoll_interrupt(struct engine *engine)
{
    struct epoll_engine *epoll = container_of(engine, struct epoll_engine, engine);

    native_event_signal(epoll->event_fd);
}

struct epoll_job {
    int fd;
    bool write;
    const struct iovec *iov;
    unsigned count;
    uint64_t offset;
    int rw_flags;
    ssize_t result;
};

static int epoll_transfer_work(void *argument)
{
    struct epoll_job *job = argument;

    do {
        job->result = job->write ? pwritev2(job->fd, job->iov, (int)job->count, (off_t)job->offset, job->rw_flags)
                                 : preadv2(job->fd, job->iov, (int)job->count, (off_t)job->offset, job->rw_flags);
    } while (job->result < 0 && errno == EINTR);
    if (job->result < 0) {
        job->result = -errno;
    }
    return 0;
}

static ssize_t coroutine_fn epoll_transfer(struct engine *engine, int fd, bool write, const struct iovec *iov,
                                           unsigned count, uint64_t offset, int rw_flags)
{
    struct epoll_job job = {fd, write, iov, count, offset, rw_flags, 0};

    worker_pool_run(epoll_transfer_work, &job);
    return job.result;
}

static int epoll_sync_work(void *argument)
{
    return fdatasync(*(int *)argument) < 0 ? -errno : 0;
}

static int coroutine_fn epoll_sync(struct engine *engine, int fd)
{
    return worker_pool_run(epoll_sync_work, &fd);
}

static int epoll_register(struct epoll_engine *epoll, struct native_stream *stream)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = stream};

    if (!stream->registered) {
        if (epoll_ctl(epoll->epoll_fd, EPOLL_CTL_ADD, stream->fd, &event) < 0) {
            return -errno;
        }
        stream->registered = true;
    }
    return 0;
}

static int coroutine_fn epoll_stream_wait(struct engine *engine, struct native_stream *stream,
                                          enum native_direction direction)
{
    struct epoll_engine *epoll = container_of(engine, struct epoll_engine, engine);
    struct native_wait wait = {.waiter = coroutine_self()};
    struct native_wait **slot = direction == NATIVE_INPUT ? &stream->input : &stream->output;

    g_assert(!*slot);
    int r = epoll_register(epoll, stream);
    if (r < 0) {
        /* A plain file as standard input is always ready. */
        return r == -EPERM ? 0 : r;
    }
    *slot = &wait;
    coroutine_yield();
    return wait.result;
}

/* Registered first, so that what changes after the look is an edge. */
static int coroutine_fn epoll_stream_wait_any(struct engine *engine, struct native_stream *stream, unsigned directions)
{
    struct epoll_engine *epoll = container_of(engine, struct epoll_engine, engine);
    struct native_wait wait = {.waiter = coroutine_self()};
    struct pollfd ready = {.fd = stream->fd, .events = (short)native_poll_events(directions)};

    g_assert(!stream->input && !stream->output);
    int r = epoll_register(epoll, stream);
    while (r == 0) {
        if (poll(&ready, 1, 0) > 0) {
            return (int)native_poll_ready((unsigned)ready.revents, directions);
        }
        stream->input = stream->output = &wait;
        coroutine_yield();
        r = wait.result;
    }
    return r == -EPERM ? (int)directions : r;
}

static ssize_t coroutine_fn epoll_stream_receive(struct engine *engine, struct native_stream *stream, void *to,
                                                 size_t bytes, bool all, bool tried)
{
    struct epoll_engine *epoll = container_of(engine, struct epoll_engine, engine);
    ssize_t polled = busy_poll_receive(&epoll->poll, stream, to, bytes);

    if (polled != -EAGAIN) {
        return polled;
    }
    /* Also if it was tried already: an edge may have come and gone since. */
    for (bool waits = false;; waits = true) {
        int r = waits ? epoll_stream_wait(engine, stream, NATIVE_INPUT) : 0;
        if (r < 0) {
            return r;
        }
        ssize_t received = recv(stream->fd, to, bytes, MSG_DONTWAIT);

        if (received >= 0) {
            return received;
        }
        if (errno != EAGAIN && errno != EINTR) {
            return -errno;
        }
    }
}

static ssize_t coroutine_fn epoll_stream_send(struct engine *engine, struct native_stream *stream,
                                              struct msghdr *message)
{
    for (;;) {
        int r = epoll_stream_wait(engine, stream, NATIVE_OUTPUT);
        if (r < 0) {
            return r;
        }
        ssize_t sent = sendmsg(stream->fd, message, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (sent >= 0) {
            return sent;
        }
        if (errno != EAGAIN && errno != EINTR) {
            return -errno;
        }
    }
}

static void epoll_stream_cancel(struct engine *engine, struct native_stream *stream)
{
    struct epoll_engine *epoll = container_of(engine, struct epoll_engine, engine);

    busy_poll_stop(&epoll->poll, stream, -ECANCELED);
    epoll_finish_wait(stream, NATIVE_INPUT, -ECANCELED);
    epoll_finish_wait(stream, NATIVE_OUTPUT, -ECANCELED);
}

static void epoll_stream_detach(struct engine *engine, struct native_stream *stream)
{
    struct epoll_engine *epoll = container_of(engine, struct epoll_engine, engine);

    g_assert(!stream->input && !stream->output && !busy_poll_has(&epoll->poll, stream));
    if (stream->registered) {
        epoll_ctl(epoll->epoll_fd, EPOLL_CTL_DEL, stream->fd, NULL);
        stream->registered = false;
    }
}

static const struct native_ops epoll_native_ops = {
    .transfer = epoll_transfer,
    .sync = epoll_sync,
    .stream_wait = epoll_stream_wait,
    .stream_wait_any = epoll_stream_wait_any,
    .stream_receive = epoll_stream_receive,
    .stream_send = epoll_stream_send,
    .stream_cancel = epoll_stream_cancel,
    .stream_detach = epoll_stream_detach,
};

const struct engine_ops epoll_engine_ops = {
    .name = "epoll",
    .create = epoll_engine_create,
    .destroy = epoll_engine_destroy,
    .turn = epoll_turn,
    .interrupt = epoll_interrupt,
    NATIVE_ENGINE_OPS,
    .native = &epoll_native_ops,
};

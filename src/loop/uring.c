/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The io_uring engine: one ring per loop for files and sockets, entered once per turn. Requests are
 * prepared while coroutines run, submitted together at the turn's end, and each stands on the stack of
 * the coroutine that waits for it. Invariants:
 * 1. the ring is touched by its loop's thread only (the kernel is told so: SINGLE_ISSUER);
 * 2. a completion's user data is its struct native_wait, 0 (nobody cares), or the engine (the eventfd was read);
 *    A receive that is looked for before the loop sleeps (busy_poll.h) comes to the ring when that was in vain;
 * 3. a read of the eventfd is in flight or prepared all the time, so that interrupt() ends any wait.
 * Where the kernel is too old for some flag it does without; where it refuses io_uring, create fails.
 */
#include "loop/busy_poll.h"
#include "loop/engine.h"
#include <errno.h>
#include <glib.h>
#include <liburing.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define SQ_ENTRIES 256
#define CQ_ENTRIES 4096

struct uring_engine {
    struct engine engine;
    struct io_uring ring;
    bool modern; /* Linux 6.0 and later: poll first, wait for all */
    int event_fd;
    uint64_t event_value;
    struct busy_poll poll;
};

static void uring_reap(struct uring_engine *uring);

/* A fresh request; when the queue is full, what is in it is submitted early. */
static struct io_uring_sqe *uring_sqe(struct uring_engine *uring)
{
    struct io_uring_sqe *sqe;

    while (!(sqe = io_uring_get_sqe(&uring->ring))) {
        int r = io_uring_submit(&uring->ring);

        g_assert(r >= 0 || r == -EINTR || r == -EAGAIN || r == -EBUSY);
        if (r == -EAGAIN || r == -EBUSY) {
            /* The kernel wants its completions to be taken first. */
            io_uring_get_events(&uring->ring);
            uring_reap(uring);
        }
    }
    return sqe;
}

static int coroutine_fn uring_wait(struct io_uring_sqe *sqe)
{
    struct native_wait wait = {.waiter = coroutine_self()};

    io_uring_sqe_set_data(sqe, &wait);
    coroutine_yield();
    return wait.result;
}

static void uring_watch_event(struct uring_engine *uring)
{
    struct io_uring_sqe *sqe = uring_sqe(uring);

    io_uring_prep_read(sqe, uring->event_fd, &uring->event_value, sizeof(uring->event_value), 0);
    io_uring_sqe_set_data(sqe, uring);
}

static int uring_ring_init(struct uring_engine *uring)
{
    static const unsigned attempts[] = {
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
        0,
    };
    int r = -EINVAL;

    for (size_t i = 0; i < G_N_ELEMENTS(attempts) && r == -EINVAL; i++) {
        struct io_uring_params params = {.flags = attempts[i] | IORING_SETUP_CQSIZE, .cq_entries = CQ_ENTRIES};

        r = io_uring_queue_init_params(SQ_ENTRIES, &uring->ring, &params);
        uring->modern = attempts[i] != 0;
    }
    if (r < 0) {
        return r;
    }
    /* Timeouts without a request of their own, and completions that are never dropped: Linux 5.11. */
    if (!(uring->ring.features & IORING_FEAT_EXT_ARG) || !(uring->ring.features & IORING_FEAT_NODROP)) {
        io_uring_queue_exit(&uring->ring);
        return -ENOSYS;
    }
    io_uring_register_ring_fd(&uring->ring);
    return 0;
}

static int uring_create(struct engine **ret)
{
    struct uring_engine *uring = g_new0(struct uring_engine, 1);
    int r;

    uring->engine.ops = &uring_engine_ops;
    uring->event_fd = eventfd(0, EFD_CLOEXEC);
    if (uring->event_fd < 0) {
        r = -errno;
        g_free(uring);
        return r;
    }
    r = uring_ring_init(uring);
    if (r < 0) {
        close(uring->event_fd);
        g_free(uring);
        return r;
    }
    busy_poll_init(&uring->poll);
    uring_watch_event(uring);
    *ret = &uring->engine;
    return 0;
}

static void uring_destroy(struct engine *engine)
{
    struct uring_engine *uring = container_of(engine, struct uring_engine, engine);

    io_uring_queue_exit(&uring->ring);
    close(uring->event_fd);
    g_free(uring);
}

static void uring_reap(struct uring_engine *uring)
{
    struct io_uring_cqe *cqe;
    unsigned head, count = 0;
    bool event = false;

    io_uring_for_each_cqe(&uring->ring, head, cqe)
    {
        void *data = io_uring_cqe_get_data(cqe);

        count++;
        if (data == uring) {
            event = true;
        } else if (data) {
            struct native_wait *wait = data;

            wait->result = cqe->res;
            coroutine_wake(wait->waiter);
        }
    }
    io_uring_cq_advance(&uring->ring, count);
    if (event) {
        uring_watch_event(uring);
    }
}

/* Without a call: are there completions, or is there work that makes some? */
static bool uring_has_news(struct engine *engine)
{
    struct io_uring *ring = &container_of(engine, struct uring_engine, engine)->ring;

    return io_uring_cq_ready(ring) || IO_URING_READ_ONCE(*ring->sq.kflags) & IORING_SQ_TASKRUN;
}

static void uring_turn(struct engine *engine, int64_t timeout_ns)
{
    struct uring_engine *uring = container_of(engine, struct uring_engine, engine);
    struct io_uring *ring = &uring->ring;

    if (!busy_poll_is_idle(&uring->poll) && timeout_ns != 0 && io_uring_sq_ready(ring)) {
        io_uring_submit(ring);
    }
    if (busy_poll_turn(&uring->poll, timeout_ns, uring_has_news, engine)) {
        timeout_ns = 0;
    }
    if (timeout_ns == 0 || io_uring_cq_ready(ring)) {
        unsigned flags = IO_URING_READ_ONCE(*ring->sq.kflags);

        if (io_uring_sq_ready(ring) || (flags & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW))) {
            io_uring_submit_and_get_events(ring);
        }
    } else if (timeout_ns < 0) {
        io_uring_submit_and_wait(ring, 1);
    } else {
        struct __kernel_timespec timeout = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
        struct io_uring_cqe *cqe;

        io_uring_submit_and_wait_timeout(ring, &cqe, 1, &timeout, NULL);
    }
    /* Refusals (EINTR, ETIME, EAGAIN, EBUSY) leave the rest for the next turn. */
    uring_reap(uring);
}

static void uring_interrupt(struct engine *engine)
{
    struct uring_engine *uring = container_of(engine, struct uring_engine, engine);

    native_event_signal(uring->event_fd);
}

static ssize_t coroutine_fn uring_transfer(struct engine *engine, int fd, bool write, const struct iovec *iov,
                                           unsigned count, uint64_t offset, int rw_flags)
{
    struct uring_engine *uring = container_of(engine, struct uring_engine, engine);
    struct io_uring_sqe *sqe = uring_sqe(uring);

    if (write) {
        io_uring_prep_writev2(sqe, fd, iov, count, offset, rw_flags);
    } else {
        io_uring_prep_readv2(sqe, fd, iov, count, offset, rw_flags);
    }
    return uring_wait(sqe);
}

static int coroutine_fn uring_sync(struct engine *engine, int fd)
{
    struct uring_engine *uring = container_of(engine, struct uring_engine, engine);
    struct io_uring_sqe *sqe = uring_sqe(uring);

    io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
    return uring_wait(sqe);
}

/* Waits for a prepared request where stream_cancel finds it. */
static int coroutine_fn uring_stream_request(struct io_uring_sqe *sqe, struct native_wait **slot)
{
    struct native_wait wait = {.waiter = coroutine_self()};

    g_assert(!*slot);
    *slot = &wait;
    io_uring_sqe_set_data(sqe, &wait);
    coroutine_yield();
    *slot = NULL;
    return wait.result;
}

static int coroutine_fn uring_stream_wait(struct engine *engine, struct native_stream *stream,
                                          enum native_direction direction)
{
    struct uring_engine *uring = container_of(engine, struct uring_engine, engine);
    bool input = direction == NATIVE_INPUT;
    int r = input ? (int)busy_poll_receive(&uring->poll, stream, NULL, 0) : -EAGAIN;

    if (r != -EAGAIN) {
        return r;
    }
    struct io_uring_sqe *sqe = uring_sqe(uring);

    io_uring_prep_poll_add(sqe, stream->fd, input ? POLLIN : POLLOUT);
    r = uring_stream_request(sqe, input ? &stream->input : &stream->output);
    return r < 0 ? r : 0;
}

static int coroutine_fn uring_stream_wait_any(struct engine *engine, struct native_stream *stream, unsigned directions)
{
    struct uring_engine *uring = container_of(engine, struct uring_engine, engine);
    struct io_uring_sqe *sqe = uring_sqe(uring);

    g_assert(!stream->output);
    io_uring_prep_poll_add(sqe, stream->fd, native_poll_events(directions));
    int r = uring_stream_request(sqe, &stream->input);
    return r < 0 ? r : (int)native_poll_ready((unsigned)r, directions);
}

static ssize_t coroutine_fn uring_stream_receive(struct engine *engine, struct native_stream *stream, void *to,
                                                 size_t bytes, bool all, bool tried)
{
    struct uring_engine *uring = container_of(engine, struct uring_engine, engine);

    if (!all) {
        ssize_t r = busy_poll_receive(&uring->poll, stream, to, bytes);
        if (r != -EAGAIN) {
            return r;
        }
        tried = true;
    }
    struct io_uring_sqe *sqe = uring_sqe(uring);

    io_uring_prep_recv(sqe, stream->fd, to, MIN(bytes, G_MAXINT32), all && uring->modern ? MSG_WAITALL : 0);
    if (tried && uring->modern) {
        sqe->ioprio |= IORING_RECVSEND_POLL_FIRST;
    }
    return uring_stream_request(sqe, &stream->input);
}

static ssize_t coroutine_fn uring_stream_send(struct engine *engine, struct native_stream *stream,
                                              struct msghdr *message)
{
    struct uring_engine *uring = container_of(engine, struct uring_engine, engine);
    struct io_uring_sqe *sqe = uring_sqe(uring);

    io_uring_prep_sendmsg(sqe, stream->fd, message, MSG_NOSIGNAL | (uring->modern ? MSG_WAITALL : 0));
    if (uring->modern) {
        sqe->ioprio |= IORING_RECVSEND_POLL_FIRST;
    }
    return uring_stream_request(sqe, &stream->output);
}

static void uring_stream_cancel(struct engine *engine, struct native_stream *stream)
{
    struct uring_engine *uring = container_of(engine, struct uring_engine, engine);

    busy_poll_stop(&uring->poll, stream, -ECANCELED);
    struct native_wait *waits[] = {stream->input, stream->output};

    for (size_t i = 0; i < G_N_ELEMENTS(waits); i++) {
        if (waits[i]) {
            struct io_uring_sqe *sqe = uring_sqe(uring);

            io_uring_prep_cancel(sqe, waits[i], 0);
            io_uring_sqe_set_data(sqe, NULL);
        }
    }
}

static void uring_stream_detach(struct engine *engine, struct native_stream *stream)
{
    struct uring_engine *uring = container_of(engine, struct uring_engine, engine);

    g_assert(!stream->input && !stream->output && !busy_poll_has(&uring->poll, stream));
}

static const struct native_ops uring_native_ops = {
    .transfer = uring_transfer,
    .sync = uring_sync,
    .stream_wait = uring_stream_wait,
    .stream_wait_any = uring_stream_wait_any,
    .stream_receive = uring_stream_receive,
    .stream_send = uring_stream_send,
    .stream_cancel = uring_stream_cancel,
    .stream_detach = uring_stream_detach,
};

const struct engine_ops uring_engine_ops = {
    .name = "uring",
    .create = uring_create,
    .destroy = uring_destroy,
    .turn = uring_turn,
    .interrupt = uring_interrupt,
    NATIVE_ENGINE_OPS,
    .native = &uring_native_ops,
};

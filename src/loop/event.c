/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Eventfds that other processes made. Invariants:
 * 1. nothing here waits in the kernel, though whoever shares the descriptor may make it blocking again: a read says
 *    itself that it does not wait, and a signal is left out while the counter is full. (Only who fills it between that
 *    look and the write, 2^64-2 at a time, makes us wait until he reads.)
 * 2. a wait reads first and waits then, so no signal is missed, and none is seen twice;
 * 3. the engine knows the descriptor from the first wait on a loop until event_leave() there.
 */
#include "loop/event.h"
#include "loop/engine.h"
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <poll.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

struct event {
    struct native_stream stream;
    struct loop *loop; /* whose engine knows it, or NULL */
    bool waiting, interrupted;
};

static bool is_eventfd(int fd)
{
    char path[32], target[32];
    g_snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    ssize_t length = readlink(path, target, sizeof(target) - 1);

    target[MAX(length, 0)] = 0;
    return strcmp(target, "anon_inode:[eventfd]") == 0;
}

int event_adopt(int fd, struct event **ret, struct error **err)
{
    if (!is_eventfd(fd)) {
        return error_set(err, -EINVAL, "The descriptor of an event is not an eventfd");
    }
    if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) < 0) {
        return error_set_errno(err, -errno, "Cannot use an eventfd");
    }
    *ret = g_new0(struct event, 1);
    (*ret)->stream.fd = fd;
    return 0;
}

int coroutine_fn event_wait(struct event *event)
{
    struct engine *engine = engine_self();

    g_assert(!event->loop || event->loop == loop_self());
    event->loop = loop_self();
    event->interrupted = false;
    while (!event->interrupted) {
        uint64_t count;
        struct iovec iov = {&count, sizeof(count)};
        ssize_t r = preadv2(event->stream.fd, &iov, 1, -1, RWF_NOWAIT);

        if (r > 0) {
            return 0;
        }
        r = -errno;
        if (r == -EAGAIN) {
            event->waiting = true;
            r = engine->ops->native->stream_wait(engine, &event->stream, NATIVE_INPUT);
            event->waiting = false;
        }
        if (r < 0 && r != -EINTR) {
            return (int)r;
        }
    }
    return -ECANCELED;
}

void event_interrupt(struct event *event)
{
    if (event->waiting) {
        g_assert(event->loop == loop_self());
        event->interrupted = true; /* also if he was woken in vain just now */
        engine_self()->ops->native->stream_cancel(engine_self(), &event->stream);
    }
}

void event_leave(struct event *event)
{
    if (event->loop) {
        g_assert(event->loop == loop_self());
        engine_self()->ops->native->stream_detach(engine_self(), &event->stream);
        event->loop = NULL;
    }
}

void event_signal(struct event *event)
{
    uint64_t one = 1;
    struct pollfd room = {.fd = event->stream.fd, .events = POLLOUT};

    if (poll(&room, 1, 0) < 1) {
        return; /* whoever reads it will know */
    }
    while (write(event->stream.fd, &one, sizeof(one)) < 0 && errno == EINTR) {
    }
}

void event_close(struct event *event)
{
    if (event) {
        g_assert(!event->loop);
        close(event->stream.fd);
        g_free(event);
    }
}

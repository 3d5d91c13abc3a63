/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Looking for a while before sleeping.
 *
 * 1. Sockets are asked directly. An engine that had begun to wait for them would have to be told by the sender, which
 *    is what costs time: looking at what an engine has been told gains nothing.
 * 2. An idle loop does not look: a receive is looked for once, and then waits.
 * 3. Where nothing came in time, more and more receives are not looked for at all; the first that comes in time again
 *    ends that. So who never comes in time costs a fraction of a microsecond each time.
 * 4. Who is to send something may wait for the processor that looks for it: so after a few looks it is offered to
 *    others. Where somebody else takes it for long, it is kept for a while.
 * 5. With one processor whoever is looked for could not run.
 */
#include "loop/busy_poll.h"
#include "loop/engine.h"
#include "loop/loop_private.h"
#include <errno.h>
#include <glib.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>

/* So many are asked in turn. */
#define RECEIVES_MAX 8
#define REST_MAX 255
/* After so many looks in vain the processor is offered. Who takes it for so long is not whom we wait for; then it is
 * not offered for so many times of looking. */
#define OFFER_AFTER 3
#define OFFER_LONG_NS (150 * 1000)
#define OFFER_REST 1000

struct busy_receive {
    struct list link;
    struct native_stream *stream;
    struct native_wait wait;
    void *to; /* NULL: it is to become readable */
    size_t bytes;
};

static bool has_processors(void)
{
    cpu_set_t set;

    return sched_getaffinity(0, sizeof(set), &set) == 0 && CPU_COUNT(&set) > 1;
}

void busy_poll_init(struct busy_poll *poll)
{
    *poll = (struct busy_poll){.count = has_processors() ? 0 : RECEIVES_MAX};
    list_init(&poll->receives);
}

static void finish(struct busy_poll *poll, struct busy_receive *receive, int result)
{
    list_remove(&receive->link);
    poll->count--;
    receive->wait.result = result;
    coroutine_wake(receive->wait.waiter);
}

ssize_t coroutine_fn busy_poll_receive(struct busy_poll *poll, struct native_stream *stream, void *to, size_t bytes)
{
    if (poll->count == RECEIVES_MAX || !loop_busy_poll_ns(loop_current)) {
        return -EAGAIN;
    }
    if (poll->rest) {
        poll->rest--;
        return -EAGAIN;
    }
    struct busy_receive receive = {
        .stream = stream, .wait = {.waiter = coroutine_self()}, .to = to, .bytes = MIN(bytes, G_MAXINT32)};

    g_assert(!stream->input); /* and it stays so: the engine does not wait for it */
    list_append(&poll->receives, &receive.link);
    poll->count++;
    coroutine_yield();
    return receive.wait.result;
}

bool busy_poll_has(const struct busy_poll *poll, const struct native_stream *stream)
{
    list_for_each (link, &poll->receives) {
        if (container_of(link, struct busy_receive, link)->stream == stream) {
            return true;
        }
    }
    return false;
}

/* As recv(2), but with the error as its result. */
static ssize_t look_at(const struct busy_receive *receive)
{
    if (!receive->to) {
        struct pollfd readable = {.fd = receive->stream->fd, .events = POLLIN};

        return poll(&readable, 1, 0) > 0 ? 0 : -EAGAIN;
    }
    ssize_t r = recv(receive->stream->fd, receive->to, receive->bytes, MSG_DONTWAIT);

    return r >= 0 ? r : errno == EINTR ? -EAGAIN : -errno;
}

/* Asks each of them. Has anything come? */
static bool look(struct busy_poll *poll)
{
    bool found = false;

    list_for_each_safe (link, &poll->receives) {
        struct busy_receive *receive = container_of(link, struct busy_receive, link);
        ssize_t r = look_at(receive);

        if (r != -EAGAIN) {
            finish(poll, receive, (int)r);
            found = true;
        }
    }
    return found;
}

void busy_poll_stop(struct busy_poll *poll, const struct native_stream *stream, int result)
{
    list_for_each_safe (link, &poll->receives) {
        struct busy_receive *receive = container_of(link, struct busy_receive, link);

        if (!stream || receive->stream == stream) {
            finish(poll, receive, result);
        }
    }
}

/* Returns the time. */
static int64_t offer_processor(struct busy_poll *poll)
{
    int64_t before_ns = native_clock_ns();

    sched_yield();
    int64_t now_ns = native_clock_ns();

    if (now_ns - before_ns > OFFER_LONG_NS) {
        poll->offer_rest = OFFER_REST;
    }
    return now_ns;
}

/* False: in vain. */
static bool look_for_a_while(struct busy_poll *poll, int64_t timeout_ns, bool (*has_news)(struct engine *engine),
                             struct engine *engine)
{
    int64_t most_ns = loop_busy_poll_ns(loop_current);
    unsigned offer_after = poll->offer_rest ? UINT_MAX : OFFER_AFTER;
    int64_t now_ns = native_clock_ns(), end_ns = now_ns + (timeout_ns > 0 ? MIN(timeout_ns, most_ns) : most_ns);

    poll->offer_rest -= poll->offer_rest > 0;
    for (unsigned looks = 0; now_ns < end_ns; looks++) {
        if (look(poll)) {
            poll->next_rest = 0;
            return true;
        }
        if (has_news(engine) || !atomic_load_explicit(&loop_current->sleeping, memory_order_relaxed)) {
            return false;
        }
        now_ns = looks < offer_after ? native_clock_ns() : offer_processor(poll);
    }
    poll->next_rest = MIN(2 * poll->next_rest + 1, REST_MAX);
    poll->rest = poll->next_rest;
    return false;
}

bool busy_poll_turn(struct busy_poll *poll, int64_t timeout_ns, bool (*has_news)(struct engine *engine),
                    struct engine *engine)
{
    if (busy_poll_is_idle(poll)) {
        return false;
    }
    if (timeout_ns == 0 || !look_for_a_while(poll, timeout_ns, has_news, engine)) {
        busy_poll_stop(poll, NULL, -EAGAIN);
    }
    return true;
}

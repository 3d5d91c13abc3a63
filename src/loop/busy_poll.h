/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_BUSY_POLL_H
#define INTERLOCK_LOOP_BUSY_POLL_H

#include "base/list.h"
#include "loop/coroutine.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/*
 * Looking for a while before sleeping: who has just been answered often comes again at once, and to wake a sleeping
 * processor takes longer than that. An engine has one of it; its loop's thread only.
 */
#define BUSY_POLL_NS 40000 /* for so long, unless told otherwise: about what sleeping and being woken costs */
struct engine;
struct native_stream;
struct busy_poll {
    struct list receives;
    unsigned count;
    unsigned rest,
        next_rest;       /* receives that are not looked for: it did not pay; and how many that will be next time */
    unsigned offer_rest; /* times of looking without offering the processor to others: they took it for long */
};

void busy_poll_init(struct busy_poll *poll);
/* Receives from a socket, as recv(2) does, if something comes before the loop would sleep: bytes, 0 at the end, or
 * negative errno; -EAGAIN: whoever calls is to wait. to NULL: 0 when any descriptor becomes readable. */
ssize_t coroutine_fn busy_poll_receive(struct busy_poll *poll, struct native_stream *stream, void *to, size_t bytes);
static inline bool busy_poll_is_idle(const struct busy_poll *poll)
{
    return list_is_empty(&poll->receives);
}
/* At the begin of an engine's turn, which would wait for timeout_ns (0: it does not). If there is anybody to look for,
 * looks until something has come, has_news() says that there is something else to do, another thread interrupts the
 * loop, or the time is over; true: the turn is not to wait. */
bool busy_poll_turn(struct busy_poll *poll, int64_t timeout_ns, bool (*has_news)(struct engine *engine),
                    struct engine *engine);
bool busy_poll_has(const struct busy_poll *poll, const struct native_stream *stream);
/* Whoever is looked for (on this stream, or NULL: on all) gets this result. */
void busy_poll_stop(struct busy_poll *poll, const struct native_stream *stream, int result);

#endif

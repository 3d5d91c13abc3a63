/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * I/O threads: named loops on threads of their own. This table owns the loops; exports borrow them.
 * 1. A loop lives as long as its entry; an entry whose loop serves an export is not removed.
 * 2. Whether one is in use is asked from those who borrow (iothreads_set_busy()), so that no count can go wrong.
 * Control thread only.
 */
#include "control/iothread.h"
#include "loop/busy_poll.h"
#include <errno.h>
#include <glib.h>

/* Whoever looks for longer does not sleep. */
#define BUSY_POLL_MOST_NS (100 * 1000 * 1000)

struct iothread {
    char *id;
    struct loop *loop;
};

struct iothreads {
    enum engine_kind engine;
    GPtrArray *threads;
    bool (*is_busy)(void *argument, struct loop *loop);
    void *argument;
};

static void iothread_free(void *pointer)
{
    struct iothread *thread = pointer;

    loop_thread_join(thread->loop);
    g_free(thread->id);
    g_free(thread);
}

struct iothreads *iothreads_create(enum engine_kind engine)
{
    struct iothreads *iothreads = g_new0(struct iothreads, 1);

    iothreads->engine = engine;
    iothreads->threads = g_ptr_array_new_with_free_func(iothread_free);
    return iothreads;
}

void iothreads_destroy(struct iothreads *iothreads)
{
    if (iothreads) {
        g_ptr_array_unref(iothreads->threads);
        g_free(iothreads);
    }
}

void iothreads_set_busy(struct iothreads *iothreads, bool (*is_busy)(void *argument, struct loop *loop), void *argument)
{
    iothreads->is_busy = is_busy;
    iothreads->argument = argument;
}

static struct iothread *find(struct iothreads *iothreads, const char *id)
{
    for (unsigned i = 0; i < iothreads->threads->len; i++) {
        struct iothread *thread = g_ptr_array_index(iothreads->threads, i);

        if (!strcmp(thread->id, id)) {
            return thread;
        }
    }
    return NULL;
}

struct loop *iothreads_find(struct iothreads *iothreads, const char *id)
{
    struct iothread *thread = find(iothreads, id);

    return thread ? thread->loop : NULL;
}

int iothreads_add(struct iothreads *iothreads, const char *id, int64_t busy_poll_ns, struct error **err)
{
    struct iothread *thread;
    struct loop *loop;
    int code;

    if (find(iothreads, id)) {
        return error_set(err, -EEXIST, "There is an iothread '%s' already", id);
    }
    if (busy_poll_ns < 0 || busy_poll_ns > BUSY_POLL_MOST_NS) {
        return error_set(err, -EINVAL, "poll-max-ns of iothread '%s' must be from 0 to %d", id, BUSY_POLL_MOST_NS);
    }
    code = loop_thread_start(id, iothreads->engine, &loop, err);
    if (code < 0) {
        return code;
    }
    loop_set_busy_poll_ns(loop, busy_poll_ns);
    thread = g_new0(struct iothread, 1);
    thread->id = g_strdup(id);
    thread->loop = loop;
    g_ptr_array_add(iothreads->threads, thread);
    return 0;
}

int iothreads_remove(struct iothreads *iothreads, const char *id, struct error **err)
{
    struct iothread *thread = find(iothreads, id);

    if (!thread) {
        return error_set(err, -ENOENT, "There is no object '%s'", id);
    }
    if (iothreads->is_busy && iothreads->is_busy(iothreads->argument, thread->loop)) {
        return error_set(err, -EBUSY, "The iothread '%s' serves an export; delete that first", id);
    }
    g_ptr_array_remove(iothreads->threads, thread);
    return 0;
}

json_t *iothreads_query(struct iothreads *iothreads)
{
    json_t *array = json_array();

    for (unsigned i = 0; i < iothreads->threads->len; i++) {
        const struct iothread *thread = g_ptr_array_index(iothreads->threads, i);

        json_array_append_new(array, json_pack("{s:s, s:I, s:I, s:i, s:i, s:i}", "id", thread->id, "thread-id",
                                               (json_int_t)loop_thread_id(thread->loop), "poll-max-ns",
                                               (json_int_t)loop_busy_poll_ns(thread->loop), "poll-grow", 0,
                                               "poll-shrink", 0, "aio-max-batch", 0));
    }
    return array;
}

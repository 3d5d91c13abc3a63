/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Operations that wait for their claims. Each has a coroutine of its own, which runs the command's handler again from
 * the beginning whenever the ledger has changed; the ledger's queue (access/queue.h) sees to the order, so it does not
 * matter here who wakes first, and a handler that takes its time holds up nobody whom it does not clash with.
 *
 *   waiting --changed--> trying --refused again--> waiting
 *      |                   |--granted and begun--> ACCESS_GRANTED
 *      |                   `--failed-------------> ACCESS_WAIT_ENDED failed
 *      `--time is up, cancelled------------------> ACCESS_WAIT_ENDED
 *
 * 1. Each of them ends with exactly one of the two events.
 * 2. control->changes counts the changes of the ledger; who has tried at the present count sleeps. A try that is
 * refused changes nothing, so it wakes nobody: trying comes to rest.
 *    A block job that has not begun and never will gets its one last event all the same, as any other has.
 * 3. Who is cancelled or out of time has left the queue in the same step, and its ticket is not admitted any more.
 */
#include "control/waiting.h"
#include "control/dispatch.h"
#include "loop/loop.h"
#include "schema/commands.h"
#include "schema/events.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

#define LONG_NS ((int64_t)3600 * 1000 * 1000 * 1000)

struct waiting {
    struct list link; /* control->waiting */
    struct control *control;
    const struct command *command;
    json_t *arguments;
    struct access_ticket *ticket;
    struct loop_sleep sleep;
    int64_t deadline_ns; /* 0: none */
    unsigned changes;    /* control->changes when it was last tried */
    bool ended;          /* for `reason` */
    bool told;           /* of the end */
    enum access_wait_end reason;
    char *error;         /* what it was refused or failed with last */
    struct list friends; /* struct friend: they wait for the end of this */
};

struct friend
{
    struct list link;
    struct coroutine *coroutine;
};

static void waiting_emit(const struct waiting *waiting, bool begun);

/* The id is free from here on, so the events leave now: they must not come after those of who takes it next. */
static void waiting_end(struct waiting *waiting, enum access_wait_end reason)
{
    if (!waiting->ended && !access_ticket_was_granted(waiting->ticket)) {
        waiting->ended = true;
        waiting->reason = reason;
        waiting->told = true;
        waiting_emit(waiting, false);
        access_ticket_close(waiting->ticket);
        loop_sleep_wake(&waiting->sleep);
    }
}

static void note_error(struct waiting *waiting, struct error *error)
{
    g_free(waiting->error);
    waiting->error = error->hint ? g_strconcat(error->message, "; ", error->hint, NULL) : g_strdup(error->message);
    error_free(error);
}

/* Until something has changed, or it has ended. */
static void coroutine_fn await_change(struct waiting *waiting)
{
    while (!waiting->ended) {
        int64_t left_ns = waiting->deadline_ns ? waiting->deadline_ns - loop_clock_ns() : LONG_NS;
        if (left_ns <= 0) { /* however much changes meanwhile */
            waiting_end(waiting, ACCESS_WAIT_END_TIMEOUT);
        } else if (waiting->changes != waiting->control->changes) {
            return;
        } else {
            loop_sleep_ns(&waiting->sleep, left_ns);
        }
    }
}

/* True: it has begun. */
static bool coroutine_fn try_again(struct waiting *waiting)
{
    struct error *error = NULL;
    json_t *ret = NULL;
    waiting->changes = waiting->control->changes;
    int result =
        dispatch_run(waiting->control, waiting->command, waiting->arguments, waiting->ticket, NULL, &ret, &error);
    if (result == 0) {
        json_decref(ret);
        return true;
    }
    if (!waiting->ended) {
        note_error(waiting, error);
        if (!access_ticket_was_refused(waiting->ticket) || !access_ticket_waits(waiting->ticket)) {
            waiting->ended = true;
            waiting->reason = ACCESS_WAIT_END_FAILED;
        }
    } else {
        error_free(error);
    }
    return false;
}

/* Who waits for a block job's end need not know that it waited. */
static void emit_end_of_job(const struct waiting *waiting, const char *id)
{
    static const struct {
        const char *command;
        enum job_type type;
    } starts[] = {
        {"block-commit", JOB_TYPE_COMMIT}, {"block-stream", JOB_TYPE_STREAM},    {"blockdev-mirror", JOB_TYPE_MIRROR},
        {"drive-mirror", JOB_TYPE_MIRROR}, {"blockdev-backup", JOB_TYPE_BACKUP}, {"drive-backup", JOB_TYPE_BACKUP},
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(starts); i++) {
        if (strcmp(waiting->command->name, starts[i].command) == 0) {
            enum job_target_state state = JOB_TARGET_STATE_UNCHANGED;
            control_emit(waiting->control,
                         waiting->reason == ACCESS_WAIT_END_CANCELLED
                             ? event_block_job_cancelled(starts[i].type, id, 0, 0, 0, true, state)
                             : event_block_job_completed(starts[i].type, id, 0, 0, 0, waiting->error, true, state));
        }
    }
}

static void waiting_emit(const struct waiting *waiting, bool begun)
{
    const char *operation = waiting->command->name, *id = access_ticket_id(waiting->ticket);
    if (begun) {
        control_emit(waiting->control, event_access_granted(operation, id, access_ticket_age_s(waiting->ticket)));
    } else {
        control_emit(waiting->control, event_access_wait_ended(operation, id, waiting->reason, waiting->error));
        emit_end_of_job(waiting, id);
    }
}

static void waiting_run(void *argument)
{
    struct waiting *waiting = argument;
    bool begun = false;
    while (!begun && !waiting->ended) {
        await_change(waiting);
        if (!waiting->ended) {
            begun = try_again(waiting);
        }
    }
    list_remove(&waiting->link);
    if (!waiting->told) {
        waiting_emit(waiting, begun);
    }
    list_for_each_safe (link, &waiting->friends) {
        struct friend *friend = container_of(link, struct friend, link);
        list_remove(&friend->link);
        coroutine_wake(friend->coroutine);
    }
    access_ticket_destroy(waiting->ticket);
    json_decref(waiting->arguments);
    g_free(waiting->error);
    g_free(waiting);
}

void waiting_begin(struct control *control, const struct command *command, json_t *arguments,
                   struct access_ticket *ticket, unsigned changes, int64_t timeout_ns, const struct error *refusal)
{
    struct waiting *waiting = g_new0(struct waiting, 1);
    waiting->control = control;
    waiting->command = command;
    waiting->arguments = json_incref(arguments);
    waiting->ticket = ticket;
    waiting->changes = changes;
    waiting->deadline_ns = timeout_ns ? loop_clock_ns() + timeout_ns : 0;
    waiting->error = g_strdup(refusal->message);
    list_init(&waiting->friends);
    list_append(&control->waiting, &waiting->link);
    loop_spawn(control->loop, waiting_run, waiting);
}

void waiting_wake(struct control *control)
{
    control->changes++;
    list_for_each (link, &control->waiting) {
        loop_sleep_wake(&container_of(link, struct waiting, link)->sleep);
    }
}

static struct waiting *waiting_find(const struct control *control, const char *kind, const char *id)
{
    list_for_each (link, &control->waiting) {
        struct waiting *waiting = container_of(link, struct waiting, link);
        if (!strcmp(access_ticket_id(waiting->ticket), id) &&
            (!kind || !strcmp(access_ticket_kind(waiting->ticket), kind))) {
            return waiting;
        }
    }
    return NULL;
}

/* Until it has ended, which it is about to. */
static void coroutine_fn await_end(struct waiting *waiting)
{
    struct friend friend = {.coroutine = coroutine_self()};
    list_append(&waiting->friends, &friend.link);
    coroutine_yield();
}

bool coroutine_fn waiting_cancel(struct control *control, const char *kind, const char *id)
{
    struct waiting *waiting = waiting_find(control, kind, id);
    if (!waiting) {
        return false;
    }
    bool in_time = !access_ticket_was_granted(waiting->ticket);
    waiting_end(waiting, ACCESS_WAIT_END_CANCELLED);
    await_end(waiting);
    return in_time;
}

void waiting_cancel_all(struct control *control)
{
    list_for_each (link, &control->waiting) {
        waiting_end(container_of(link, struct waiting, link), ACCESS_WAIT_END_CANCELLED);
    }
}

void coroutine_fn waiting_shutdown(struct control *control)
{
    waiting_cancel_all(control);
    while (!list_is_empty(&control->waiting)) {
        await_end(container_of(control->waiting.next, struct waiting, link));
    }
}

int coroutine_fn command_access_cancel(struct control *control, struct access_cancel_args *args, struct error **err)
{
    return waiting_cancel(control, NULL, args->id)
               ? 0
               : error_set(err, -ENOENT, "No operation waits under the id '%s'", args->id);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * From a client's command to its handler. A command with claims may be told what to do when it is refused: fail, wait,
 * or pass nevertheless (schema: access-options). Its run carries a ticket, which the ledger finds by the coroutine that
 * asks; so a handler that waits for a lock or a disk never lends its ticket or its override to somebody else.
 *
 * 1. The access options are taken out of the arguments here; handlers see their own arguments only.
 * 2. A command waits only if the ledger refused the claims with which it was to begin, for until then a handler has
 *    changed nothing. Whatever it fails with later is an error like any other.
 * 3. Nothing is overridden unless the program was started so and this very command says why.
 * 4. A refusal's data name the operation that was refused.
 *
 * Waiting and trying again is waiting.c's.
 */
#include "control/dispatch.h"
#include "block/graph.h"
#include "control/waiting.h"
#include "schema/events.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

#define TIMEOUT_MAX_S (365.0 * 24 * 3600)

/* A handler that is running, on the stack of its coroutine. */
struct run {
    struct list link; /* control->runs */
    struct coroutine *coroutine;
    const struct command *command;
    struct access_ticket *ticket;
    const char *reason; /* of an override, or NULL */
};

static struct run *run_self(const struct control *control)
{
    list_for_each (link, &control->runs) {
        struct run *run = container_of(link, struct run, link);
        if (run->coroutine == coroutine_self()) {
            return run;
        }
    }
    return NULL;
}

/* --- what the ledger asks --- */

static struct access_ticket *asker(void *argument)
{
    const struct run *run = run_self(argument);
    return run ? run->ticket : NULL;
}

static bool may_override(const char *sentence, void *argument)
{
    struct control *control = argument;
    const struct run *run = run_self(control);
    if (!run || !run->reason) {
        return false;
    }
    const char *id = access_ticket_id(run->ticket);
    id = id ? id : "";
    g_warning("%s %s is let pass (\"%s\"), although %s", run->command->name, id, run->reason, sentence);
    control_emit(control, event_access_overridden(run->command->name, id, run->reason, sentence));
    return true;
}

static void changed(void *argument)
{
    waiting_wake(argument);
}

static char *describe_node(const char *name, void *argument)
{
    const struct control *control = argument;
    const struct node *node = graph_find(control->graph, name);
    return node ? node_describe_origin(node) : NULL;
}

void dispatch_init(struct control *control)
{
    struct access_ledger *ledger = control->graph->ledger;
    access_set_asker(ledger, asker, control);
    access_set_changed(ledger, changed, control);
    access_set_describe_node(ledger, describe_node, control);
    access_set_override(ledger, may_override, control);
}

void dispatch_finish(struct control *control)
{
    struct access_ledger *ledger = control->graph->ledger;
    g_assert(list_is_empty(&control->runs) && list_is_empty(&control->waiting));
    access_set_asker(ledger, NULL, NULL);
    access_set_changed(ledger, NULL, NULL);
    access_set_describe_node(ledger, NULL, NULL);
    access_set_override(ledger, NULL, NULL);
}

/* --- refusals --- */

/* What the arguments are about, for a command whose refusal came from its graph change. */
static json_t *subject_of(json_t *arguments)
{
    static const char *const names[] = {"id", "job-id", "node-name", "device"};
    for (unsigned i = 0; i < G_N_ELEMENTS(names); i++) {
        json_t *value = json_object_get(arguments, names[i]);
        if (json_is_string(value)) {
            return json_incref(value);
        }
    }
    return json_string("");
}

static void complete_refusal(const struct command *command, json_t *arguments, struct error **err)
{
    json_t *data = err && *err ? (*err)->data : NULL;
    if (data && json_object_get(data, "conflicts") && !json_object_get(data, "operation")) {
        json_object_set_new(data, "operation", json_string(command->name));
        json_object_set_new(data, "id", subject_of(arguments));
    }
}

/* --- running --- */

int coroutine_fn dispatch_run(struct control *control, const struct command *command, json_t *arguments,
                              struct access_ticket *ticket, const char *reason, json_t **ret, struct error **err)
{
    struct run run = {.coroutine = coroutine_self(), .command = command, .ticket = ticket, .reason = reason};
    access_ticket_try(ticket);
    list_append(&control->runs, &run.link);
    int result = command->dispatch(control, arguments, ret, err);
    list_remove(&run.link);
    return result;
}

static bool is_access_option(const char *name)
{
    for (unsigned i = 0; i < access_options_type.count; i++) {
        if (!strcmp(access_options_type.members[i].name, name)) {
            return true;
        }
    }
    return false;
}

/* The command's own arguments and the access options; new references. */
static void split(json_t *arguments, json_t **ret_own, json_t **ret_options)
{
    const char *name;
    json_t *value;
    *ret_own = json_object();
    *ret_options = json_object();
    json_object_foreach(arguments, name, value)
    {
        json_object_set(is_access_option(name) ? *ret_options : *ret_own, name, value);
    }
}

static int check_options(const struct control *control, const struct access_options *options, struct error **err)
{
    bool wait = options->on_conflict == ACCESS_ON_CONFLICT_WAIT;
    if (options->has_on_conflict_timeout && !wait) {
        return error_set(err, -EINVAL, "'on-conflict-timeout' is for on-conflict=wait only");
    }
    if (options->has_on_conflict_timeout &&
        !(options->on_conflict_timeout > 0 && options->on_conflict_timeout <= TIMEOUT_MAX_S)) {
        return error_set(err, -EINVAL, "'on-conflict-timeout' is a number of seconds, more than 0 and at most %.0f",
                         TIMEOUT_MAX_S);
    }
    if (options->override && wait) {
        return error_set(err, -EINVAL, "'override' and on-conflict=wait exclude each other");
    }
    if (options->override && !*options->override) {
        return error_set(err, -EINVAL, "'override' needs a reason, in words");
    }
    if (options->override && !control->allow_override) {
        int code = error_set(err, -EPERM, "Overriding a refusal is not allowed here");
        error_hint(err, "It is only if the daemon was started with --allow-override");
        return code;
    }
    if (wait && control->quitting) {
        return error_set(err, -ESHUTDOWN, "The program is about to end: nothing waits any more");
    }
    return 0;
}

static int coroutine_fn run_with_options(struct control *control, const struct command *command, json_t *arguments,
                                         const struct access_options *options, json_t **ret, struct error **err)
{
    bool wait = options->on_conflict == ACCESS_ON_CONFLICT_WAIT;
    struct access_ticket *ticket = access_ticket_create(control->graph->ledger, wait);
    unsigned changes = control->changes;
    struct error *error = NULL;
    if (options->has_on_conflict_timeout) {
        access_ticket_set_timeout(ticket, options->on_conflict_timeout);
    }
    int result = dispatch_run(control, command, arguments, ticket, options->override, ret, &error);
    if (result < 0 && access_ticket_waits(ticket) && !control->quitting) {
        /* The shortest time is not none. */
        int64_t timeout_ns =
            options->has_on_conflict_timeout ? MAX((int64_t)(options->on_conflict_timeout * 1e9), 1) : 0;
        waiting_begin(control, command, arguments, ticket, changes, timeout_ns, error);
        error_free(error);
        *ret = json_object();
        return 0;
    }
    access_ticket_destroy(ticket);
    return result < 0 ? error_move(err, error) : 0;
}

/* The arguments of a command with claims: its own, and the access options. On success both are the caller's. */
static int read_arguments(const struct control *control, json_t *arguments, json_t **ret_own,
                          struct access_options **ret_options, struct error **err)
{
    struct access_options *options = NULL;
    json_t *own, *access;
    split(arguments, &own, &access);
    int result = access_options_from_json(access, NULL, &options, err);
    json_decref(access);
    if (result == 0) {
        result = check_options(control, options, err);
    }
    if (result < 0) {
        access_options_free(options);
        json_decref(own);
        return result;
    }
    *ret_own = own;
    *ret_options = options;
    return 0;
}

int coroutine_fn dispatch_command(struct control *control, const struct command *command, json_t *arguments,
                                  json_t **ret, struct error **err)
{
    struct access_options *options;
    json_t *own;
    int result;
    if (!command->access_options) {
        result = command->dispatch(control, arguments, ret, err);
    } else {
        result = read_arguments(control, arguments, &own, &options, err);
        if (result == 0) {
            result = run_with_options(control, command, own, options, ret, err);
            access_options_free(options);
            json_decref(own);
        }
    }
    if (result < 0) {
        complete_refusal(command, arguments, err);
    }
    return result;
}

int coroutine_fn dispatch_check(struct control *control, const struct command *command, json_t *arguments,
                                json_t **ret_claims, struct error **err)
{
    struct access_options *options;
    json_t *own;
    if (!command->access_options) {
        return command->check(control, arguments, ret_claims, err);
    }
    int result = read_arguments(control, arguments, &own, &options, err);
    if (result == 0) {
        result = command->check(control, own, ret_claims, err);
        access_options_free(options);
        json_decref(own);
    }
    return result;
}

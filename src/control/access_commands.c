/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Handlers of the commands about access control itself: query-access, which shows the ledger, and access-check, the dry
 * run of any other command. They change nothing and decide nothing: the verdict is that of the command's own first half
 * (struct command.check), which ends where it would take its claims.
 *
 * A refusal by access control is an answer of access-check; every other error of the command is its error.
 */
#include "access/access.h"
#include "block/graph.h"
#include "control/control.h"
#include "control/dispatch.h"
#include "schema/commands.h"
#include <errno.h>
#include <glib.h>

int coroutine_fn command_query_access(struct control *control, struct access_info **ret, struct error **err)
{
    json_t *access = access_describe(control->graph->ledger);
    int code = access_info_from_json(access, "access", ret, err);

    json_decref(access);
    return code;
}

/* Every conflict of a refusal, or NULL for an error of another kind; borrowed. */
static json_t *refusal_conflicts(const struct error *error)
{
    return error ? json_object_get(error->data, "conflicts") : NULL;
}

/* Takes `claims` over. */
static int check_describe(const struct command *command, json_t *claims, const struct error *refusal,
                          struct access_check_info **ret, struct error **err)
{
    json_t *conflicts = refusal_conflicts(refusal);
    json_t *info = json_pack("{s:b, s:o, s:o}", "admitted", refusal == NULL, "claims", claims ? claims : json_array(),
                             "conflicts", conflicts ? json_incref(conflicts) : json_array());
    int code;

    if (command->no_claims_because) {
        json_object_set_new(info, "reason", json_string(command->no_claims_because));
    }
    code = access_check_info_from_json(info, "check", ret, err);
    json_decref(info);
    if (!code && refusal) {
        (*ret)->sentence = error_format(refusal);
    }
    return code;
}

int coroutine_fn command_access_check(struct control *control, struct access_check_args *args,
                                      struct access_check_info **ret, struct error **err)
{
    const struct command *command = control_find_command(control, args->command);
    auto_error error = NULL;
    json_t *claims = NULL, *arguments;

    if (!command) {
        return error_set_class(err, ERROR_COMMAND_NOT_FOUND, -ENOENT, "there is no command '%s'", args->command);
    }
    if (args->arguments && !json_is_object(args->arguments)) {
        return error_set(err, -EINVAL, "arguments: must be an object");
    }
    arguments = args->arguments ? json_incref(args->arguments) : json_object();
    dispatch_check(control, command, arguments, &claims, &error);
    json_decref(arguments);
    if (error && !refusal_conflicts(error)) {
        json_decref(claims);
        return error_move(err, g_steal_pointer(&error));
    }
    return check_describe(command, claims, error, ret, err);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The handler of blockdev-reopen. It runs in a coroutine on the control loop and is called by the generated dispatcher
 * only. It keeps no state: each entry of the list is an action of src/block/reopen.c, and the command is a run of them.
 */
#include "block/reopen.h"
#include "control/control.h"
#include "schema/commands.h"
#include <errno.h>

#define ENTRIES_MAX 1024

static int coroutine_fn run_or_check(struct control *control, const struct blockdev_reopen_args *args,
                                     json_t **ret_claims, struct error **err)
{
    size_t count = args->options.count;

    if (count > ENTRIES_MAX) {
        return error_set(err, -E2BIG, "'options' has more than %d entries", ENTRIES_MAX);
    }
    g_autofree struct action *actions = g_new0(struct action, count + 1);
    for (size_t i = 0; i < count; i++) {
        reopen_action(&actions[i], args->options.items[i]);
    }
    return ret_claims ? actions_check(control->graph, actions, (unsigned)count, ret_claims, err)
                      : actions_run(control->graph, actions, (unsigned)count, err);
}

int coroutine_fn command_blockdev_reopen(struct control *control, struct blockdev_reopen_args *args, struct error **err)
{
    return run_or_check(control, args, NULL, err);
}

int coroutine_fn command_blockdev_reopen_check(struct control *control, struct blockdev_reopen_args *args,
                                               json_t **ret_claims, struct error **err)
{
    return run_or_check(control, args, ret_claims, err);
}

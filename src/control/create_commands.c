/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Handlers of the commands that make images and change what opens them: blockdev-create and x-blockdev-amend. Each runs
 * in a coroutine on the control loop and is called by the generated dispatcher only. It keeps no state: each is a run
 * of one action, of src/job/create.c and src/job/amend.c, which starts a job.
 */
#include "control/control.h"
#include "job/create.h"
#include <errno.h>

static int coroutine_fn run_or_check(struct control *control, struct action *action, json_t **ret_claims,
                                     struct error **err)
{
    return ret_claims ? actions_check(control->graph, action, 1, ret_claims, err)
                      : actions_run(control->graph, action, 1, err);
}

static int coroutine_fn create(struct control *control, struct blockdev_create_args *args, json_t **ret_claims,
                               struct error **err)
{
    struct action action;

    if (control->quitting) {
        return error_set(err, -ESHUTDOWN, "The program is about to end: no new job is started");
    }
    create_action(&action, control->jobs, args);
    return run_or_check(control, &action, ret_claims, err);
}

int coroutine_fn command_blockdev_create(struct control *control, struct blockdev_create_args *args, struct error **err)
{
    return create(control, args, NULL, err);
}

int coroutine_fn command_blockdev_create_check(struct control *control, struct blockdev_create_args *args,
                                               json_t **ret_claims, struct error **err)
{
    return create(control, args, ret_claims, err);
}

static int coroutine_fn amend(struct control *control, struct x_blockdev_amend_args *args, json_t **ret_claims,
                              struct error **err)
{
    struct action action;

    if (control->quitting) {
        return error_set(err, -ESHUTDOWN, "The program is about to end: no new job is started");
    }
    amend_action(&action, control->jobs, args);
    return run_or_check(control, &action, ret_claims, err);
}

int coroutine_fn command_x_blockdev_amend(struct control *control, struct x_blockdev_amend_args *args,
                                          struct error **err)
{
    return amend(control, args, NULL, err);
}

int coroutine_fn command_x_blockdev_amend_check(struct control *control, struct x_blockdev_amend_args *args,
                                                json_t **ret_claims, struct error **err)
{
    return amend(control, args, ret_claims, err);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Handlers of the commands about mirrors: blockdev-mirror, drive-mirror and block-job-change. Each runs in a coroutine
 * on the control loop and is called by the generated dispatcher only. It keeps no state: a mirror's beginning is a run
 * of one action (src/job/mirror.h).
 */
#include "control/control.h"
#include "job/mirror.h"
#include "schema/commands.h"
#include <errno.h>

static int refuse_when_quitting(const struct control *control, struct error **err)
{
    return control->quitting ? error_set(err, -ESHUTDOWN, "The program is about to end: no new job is started") : 0;
}

int coroutine_fn command_blockdev_mirror(struct control *control, struct blockdev_mirror *args, struct error **err)
{
    struct action action;
    int code = refuse_when_quitting(control, err);

    if (code == 0) {
        mirror_action(&action, control->jobs, args, NULL);
        code = actions_run(control->graph, &action, 1, err);
    }
    return code;
}

int coroutine_fn command_blockdev_mirror_check(struct control *control, struct blockdev_mirror *args,
                                               json_t **ret_claims, struct error **err)
{
    struct action action;
    int code = refuse_when_quitting(control, err);

    if (code == 0) {
        mirror_action(&action, control->jobs, args, NULL);
        code = actions_check(control->graph, &action, 1, ret_claims, err);
    }
    return code;
}

int coroutine_fn command_drive_mirror(struct control *control, struct drive_mirror *args, struct error **err)
{
    struct action action;
    int code = refuse_when_quitting(control, err);

    if (code == 0) {
        drive_mirror_action(&action, control->jobs, args, NULL);
        code = actions_run(control->graph, &action, 1, err);
    }
    return code;
}

int coroutine_fn command_drive_mirror_check(struct control *control, struct drive_mirror *args, json_t **ret_claims,
                                            struct error **err)
{
    struct action action;
    int code = refuse_when_quitting(control, err);

    if (code == 0) {
        drive_mirror_action(&action, control->jobs, args, NULL);
        code = actions_check(control->graph, &action, 1, ret_claims, err);
    }
    return code;
}

int coroutine_fn command_block_job_change(struct control *control, struct block_job_change_options *args,
                                          struct error **err)
{
    struct job *job = jobs_find_block_or_error(control->jobs, args->id, err);

    return job ? job_change(job, args, err) : -ENOENT;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Handlers of the commands that start backups: each is a run of one action (src/job/backup.h), in a coroutine on the
 * control loop, called by the generated dispatcher only. It keeps no state.
 */
#include "control/control.h"
#include "job/backup.h"
#include "schema/commands.h"
#include <errno.h>

static int refuse_when_quitting(const struct control *control, struct error **err)
{
    return control->quitting ? error_set(err, -ESHUTDOWN, "The program is about to end: no new job is started") : 0;
}

int coroutine_fn command_blockdev_backup(struct control *control, struct blockdev_backup_options *args,
                                         struct error **err)
{
    struct action action;
    int code = refuse_when_quitting(control, err);
    if (code < 0) {
        return code;
    }
    blockdev_backup_action(&action, control->jobs, NULL, args);
    return actions_run(control->graph, &action, 1, err);
}

int coroutine_fn command_blockdev_backup_check(struct control *control, struct blockdev_backup_options *args,
                                               json_t **ret_claims, struct error **err)
{
    struct action action;
    int code = refuse_when_quitting(control, err);
    if (code < 0) {
        return code;
    }
    blockdev_backup_action(&action, control->jobs, NULL, args);
    return actions_check(control->graph, &action, 1, ret_claims, err);
}

int coroutine_fn command_drive_backup(struct control *control, struct drive_backup_options *args, struct error **err)
{
    struct action action;
    int code = refuse_when_quitting(control, err);
    if (code < 0) {
        return code;
    }
    drive_backup_action(&action, control->jobs, NULL, args);
    return actions_run(control->graph, &action, 1, err);
}

int coroutine_fn command_drive_backup_check(struct control *control, struct drive_backup_options *args,
                                            json_t **ret_claims, struct error **err)
{
    struct action action;
    int code = refuse_when_quitting(control, err);
    if (code < 0) {
        return code;
    }
    drive_backup_action(&action, control->jobs, NULL, args);
    return actions_check(control->graph, &action, 1, ret_claims, err);
}

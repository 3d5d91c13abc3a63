/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Handlers of the commands about snapshots: blockdev-snapshot, blockdev-snapshot-sync, blockdev-snapshot-internal-sync
 * and blockdev-snapshot-delete-internal-sync. Each runs in a coroutine on the control loop and is called by the
 * generated dispatcher only. It keeps no state: a snapshot is a run of one action, which decides; src/job/snapshot.c
 * and src/job/internal_snapshot.c have them.
 */
#include "control/control.h"
#include "job/internal_snapshot.h"
#include "job/snapshot.h"
#include "schema/commands.h"

int coroutine_fn command_blockdev_snapshot(struct control *control, struct blockdev_snapshot *args, struct error **err)
{
    struct action action;

    snapshot_action(&action, args);
    return actions_run(control->graph, &action, 1, err);
}

int coroutine_fn command_blockdev_snapshot_check(struct control *control, struct blockdev_snapshot *args,
                                                 json_t **ret_claims, struct error **err)
{
    struct action action;

    snapshot_action(&action, args);
    return actions_check(control->graph, &action, 1, ret_claims, err);
}

int coroutine_fn command_blockdev_snapshot_sync(struct control *control, struct blockdev_snapshot_sync *args,
                                                struct error **err)
{
    struct action action;

    snapshot_sync_action(&action, args);
    return actions_run(control->graph, &action, 1, err);
}

int coroutine_fn command_blockdev_snapshot_sync_check(struct control *control, struct blockdev_snapshot_sync *args,
                                                      json_t **ret_claims, struct error **err)
{
    struct action action;

    snapshot_sync_action(&action, args);
    return actions_check(control->graph, &action, 1, ret_claims, err);
}

int coroutine_fn command_blockdev_snapshot_internal_sync(struct control *control,
                                                         struct blockdev_snapshot_internal_sync *args,
                                                         struct error **err)
{
    struct action action;

    internal_snapshot_action(&action, args);
    return actions_run(control->graph, &action, 1, err);
}

int coroutine_fn command_blockdev_snapshot_internal_sync_check(struct control *control,
                                                               struct blockdev_snapshot_internal_sync *args,
                                                               json_t **ret_claims, struct error **err)
{
    struct action action;

    internal_snapshot_action(&action, args);
    return actions_check(control->graph, &action, 1, ret_claims, err);
}

int coroutine_fn
command_blockdev_snapshot_delete_internal_sync(struct control *control,
                                               struct blockdev_snapshot_delete_internal_sync_args *args,
                                               struct snapshot_info **ret, struct error **err)
{
    return internal_snapshot_delete(control->graph, args, ret, err);
}

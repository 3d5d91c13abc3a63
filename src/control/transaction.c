/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The command `transaction`: several commands as one. Owns the table from the names of actions to what makes a struct
 * action of their arguments, and the group that the jobs of a transaction may form. What an action does is its kind's;
 * how several become one is src/block/action.c's.
 *
 * 1. Every action of the schema has a row.
 * 2. With completion-mode=grouped all actions are such as begin a job, and all jobs join one group, which is closed
 * when the run has ended, whichever way.
 * 3. Names of nodes in the arguments are given to the run as near: all users are held up together, and so for the
 *    shortest time.
 */
#include "block/action.h"
#include "block/bitmap_action.h"
#include "block/reopen.h"
#include "control/control.h"
#include "export/export.h"
#include "job/backup.h"
#include "job/commit.h"
#include "job/internal_snapshot.h"
#include "job/mirror.h"
#include "job/policy.h"
#include "job/snapshot.h"
#include "job/stream.h"
#include "schema/commands.h"
#include <errno.h>
#include <glib.h>

#define NEAR_MAX 3
#define ACTIONS_MAX 1024

/* What the makers work with. */
struct making {
    struct control *control;
    struct job_group *group;           /* NULL: individual */
    const char *(*near)[NEAR_MAX + 1]; /* of the action that is made */
};

static void is_near(const struct making *making, const char *first, const char *second)
{
    unsigned count = 0;

    if (first) {
        (*making->near)[count++] = first;
    }
    if (second) {
        (*making->near)[count++] = second;
    }
}

/* --- abort --- */

static int coroutine_fn abort_plan(struct action *action, struct error **err)
{
    return error_set(err, -ECANCELED, "Transaction aborted using Abort action");
}

static const struct action_kind abort_kind = {.name = "abort", .plan = abort_plan};

static void make_abort(const struct making *making, struct transaction_action *from, struct action *ret)
{
    *ret = (struct action){.kind = &abort_kind};
}

/* --- one maker for each --- */

static void make_bitmap_add(const struct making *making, struct transaction_action *from, struct action *ret)
{
    is_near(making, from->u.block_dirty_bitmap_add.data->node, NULL);
    bitmap_add_action(ret, from->u.block_dirty_bitmap_add.data);
}

static void make_bitmap_remove(const struct making *making, struct transaction_action *from, struct action *ret)
{
    is_near(making, from->u.block_dirty_bitmap_remove.data->node, NULL);
    bitmap_remove_action(ret, from->u.block_dirty_bitmap_remove.data);
}

static void make_bitmap_clear(const struct making *making, struct transaction_action *from, struct action *ret)
{
    is_near(making, from->u.block_dirty_bitmap_clear.data->node, NULL);
    bitmap_clear_action(ret, from->u.block_dirty_bitmap_clear.data);
}

static void make_bitmap_enable(const struct making *making, struct transaction_action *from, struct action *ret)
{
    is_near(making, from->u.block_dirty_bitmap_enable.data->node, NULL);
    bitmap_enable_action(ret, from->u.block_dirty_bitmap_enable.data);
}

static void make_bitmap_disable(const struct making *making, struct transaction_action *from, struct action *ret)
{
    is_near(making, from->u.block_dirty_bitmap_disable.data->node, NULL);
    bitmap_disable_action(ret, from->u.block_dirty_bitmap_disable.data);
}

static void make_bitmap_merge(const struct making *making, struct transaction_action *from, struct action *ret)
{
    is_near(making, from->u.block_dirty_bitmap_merge.data->node, NULL);
    bitmap_merge_action(ret, from->u.block_dirty_bitmap_merge.data);
}

static void make_snapshot(const struct making *making, struct transaction_action *from, struct action *ret)
{
    const struct blockdev_snapshot *args = from->u.blockdev_snapshot.data;

    is_near(making, args->node, args->overlay);
    snapshot_action(ret, args);
}

static void make_snapshot_sync(const struct making *making, struct transaction_action *from, struct action *ret)
{
    const struct blockdev_snapshot_sync *args = from->u.blockdev_snapshot_sync.data;

    is_near(making, args->device, args->node_name);
    snapshot_sync_action(ret, args);
}

static void make_internal_snapshot(const struct making *making, struct transaction_action *from, struct action *ret)
{
    is_near(making, from->u.blockdev_snapshot_internal_sync.data->device, NULL);
    internal_snapshot_action(ret, from->u.blockdev_snapshot_internal_sync.data);
}

static void make_commit(const struct making *making, struct transaction_action *from, struct action *ret)
{
    const struct block_commit_args *args = from->u.block_commit.data;

    is_near(making, args->device, args->top_node);
    commit_action(ret, making->control->jobs, making->group, args);
}

static void make_stream(const struct making *making, struct transaction_action *from, struct action *ret)
{
    is_near(making, from->u.block_stream.data->device, NULL);
    stream_action(ret, making->control->jobs, making->group, from->u.block_stream.data);
}

static void make_backup(const struct making *making, struct transaction_action *from, struct action *ret)
{
    is_near(making, from->u.blockdev_backup.data->device, from->u.blockdev_backup.data->target);
    blockdev_backup_action(ret, making->control->jobs, making->group, from->u.blockdev_backup.data);
}

static void make_drive_backup(const struct making *making, struct transaction_action *from, struct action *ret)
{
    is_near(making, from->u.drive_backup.data->device, NULL);
    drive_backup_action(ret, making->control->jobs, making->group, from->u.drive_backup.data);
}

static void make_mirror(const struct making *making, struct transaction_action *from, struct action *ret)
{
    is_near(making, from->u.blockdev_mirror.data->device, from->u.blockdev_mirror.data->target);
    mirror_action(ret, making->control->jobs, from->u.blockdev_mirror.data, making->group);
}

static void make_drive_mirror(const struct making *making, struct transaction_action *from, struct action *ret)
{
    is_near(making, from->u.drive_mirror.data->device, NULL);
    drive_mirror_action(ret, making->control->jobs, from->u.drive_mirror.data, making->group);
}

/* One for each node that it names. */
static size_t reopen_parts(const struct transaction_action *from)
{
    return from->u.blockdev_reopen.data->options.count;
}

static void make_reopen(const struct making *making, struct transaction_action *from, struct action *ret)
{
    const struct blockdev_reopen_args *args = from->u.blockdev_reopen.data;

    for (size_t i = 0; i < args->options.count; i++) {
        reopen_action(&ret[i], args->options.items[i]);
    }
}

static void make_export_add(const struct making *making, struct transaction_action *from, struct action *ret)
{
    is_near(making, from->u.block_export_add.data->node_name, NULL);
    export_add_action(ret, making->control->exports, from->u.block_export_add.data);
}

static void make_export_del(const struct making *making, struct transaction_action *from, struct action *ret)
{
    export_del_action(ret, making->control->exports, from->u.block_export_del.data);
}

static const struct {
    void (*make)(const struct making *making, struct transaction_action *from, struct action *ret);
    bool begins_job;
    size_t (*parts)(const struct transaction_action *from); /* how many it makes; NULL: one */
} makers[TRANSACTION_ACTION_KIND_COUNT] = {
    [TRANSACTION_ACTION_KIND_ABORT] = {make_abort, false},
    [TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_ADD] = {make_bitmap_add, false},
    [TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_REMOVE] = {make_bitmap_remove, false},
    [TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_CLEAR] = {make_bitmap_clear, false},
    [TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_ENABLE] = {make_bitmap_enable, false},
    [TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_DISABLE] = {make_bitmap_disable, false},
    [TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_MERGE] = {make_bitmap_merge, false},
    [TRANSACTION_ACTION_KIND_BLOCKDEV_SNAPSHOT] = {make_snapshot, false},
    [TRANSACTION_ACTION_KIND_BLOCKDEV_SNAPSHOT_SYNC] = {make_snapshot_sync, false},
    [TRANSACTION_ACTION_KIND_BLOCKDEV_SNAPSHOT_INTERNAL_SYNC] = {make_internal_snapshot, false},
    [TRANSACTION_ACTION_KIND_BLOCK_COMMIT] = {make_commit, true},
    [TRANSACTION_ACTION_KIND_BLOCK_STREAM] = {make_stream, true},
    [TRANSACTION_ACTION_KIND_BLOCKDEV_BACKUP] = {make_backup, true},
    [TRANSACTION_ACTION_KIND_BLOCKDEV_MIRROR] = {make_mirror, true},
    [TRANSACTION_ACTION_KIND_DRIVE_BACKUP] = {make_drive_backup, true},
    [TRANSACTION_ACTION_KIND_DRIVE_MIRROR] = {make_drive_mirror, true},
    [TRANSACTION_ACTION_KIND_BLOCKDEV_REOPEN] = {make_reopen, false, reopen_parts},
    [TRANSACTION_ACTION_KIND_BLOCK_EXPORT_ADD] = {make_export_add, false},
    [TRANSACTION_ACTION_KIND_BLOCK_EXPORT_DEL] = {make_export_del, false},
};

/* --- the command --- */

static bool is_grouped(const struct transaction_args *args)
{
    return args->properties && args->properties->completion_mode == ACTION_COMPLETION_MODE_GROUPED;
}

static size_t transaction_parts(const struct transaction_action *from)
{
    return makers[from->type].parts ? makers[from->type].parts(from) : 1;
}

static int transaction_check_args(const struct control *control, const struct transaction_args *args,
                                  struct error **err)
{
    size_t count = 0;

    for (size_t i = 0; i < args->actions.count; i++) {
        enum transaction_action_kind kind = args->actions.items[i]->type;

        count += transaction_parts(args->actions.items[i]);
        if (is_grouped(args) && !makers[kind].begins_job) {
            return error_set(err, -EINVAL,
                             "Action '%s' does not support transaction property completion-mode = grouped",
                             transaction_action_kind_name(kind));
        }
        if (control->quitting && makers[kind].begins_job) {
            return error_set(err, -ESHUTDOWN, "The program is about to end: no new job is started");
        }
    }
    return count > ACTIONS_MAX ? error_set(err, -E2BIG, "A transaction has %d actions at most", ACTIONS_MAX) : 0;
}

/* Makes the actions, and runs or checks them. ret_claims NULL: they are run. */
static int coroutine_fn transaction_do(struct control *control, struct transaction_args *args, json_t **ret_claims,
                                       struct error **err)
{
    unsigned count = 0;
    int code = transaction_check_args(control, args, err);

    if (code < 0) {
        return code;
    }
    g_autofree struct action *actions = g_new0(struct action, ACTIONS_MAX);
    g_autofree const char *(*near)[NEAR_MAX + 1] = g_new0(typeof(*near), ACTIONS_MAX);
    struct making making = {.control = control, .group = is_grouped(args) ? job_group_create() : NULL};
    for (size_t i = 0; i < args->actions.count; i++) {
        struct transaction_action *from = args->actions.items[i];

        making.near = &near[count];
        makers[from->type].make(&making, from, &actions[count]);
        if (!makers[from->type].parts) {
            actions[count].near = near[count];
        }
        count += (unsigned)transaction_parts(from);
    }
    code = ret_claims ? actions_check(control->graph, actions, count, ret_claims, err)
                      : actions_run(control->graph, actions, count, err);
    if (making.group) {
        job_group_close(making.group);
    }
    return code;
}

int coroutine_fn command_transaction(struct control *control, struct transaction_args *args, struct error **err)
{
    return transaction_do(control, args, NULL, err);
}

int coroutine_fn command_transaction_check(struct control *control, struct transaction_args *args, json_t **ret_claims,
                                           struct error **err)
{
    return transaction_do(control, args, ret_claims, err);
}

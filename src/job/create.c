/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * blockdev-create: a job that makes an image. Owns the claims on the nodes that the image is made in, from the command
 * to the end of the job; how an image is made is its driver's (block/image.h).
 *
 * 1. Nobody else has the place: the job claims everything there. A node that the options name but that does not exist
 *    is the job's error, not the command's; so is what the options say of the image. A node described inline is opened
 *    by the driver, and is nobody else's. A file by its path is guarded by the locks of its kind.
 * 2. An image that was made half-way stays so: whoever sees the error knows what it is worth.
 */
#include "job/create.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/image.h"
#include "block/operation.h"
#include "job/policy.h"
#include "schema/claims.h"
#include <errno.h>
#include <glib.h>

struct create {
    struct jobs *jobs;
    struct blockdev_create_args *args;       /* until the job starts */
    struct blockdev_create_options *options; /* the job's */
    struct graph *graph;
    struct operation *operation;
    struct job *job;
    bool ended;
};

/* --- the job --- */

static int coroutine_fn create_run(struct job *job, struct error **err)
{
    struct create *create = job->state;
    const struct driver *driver = driver_find(blockdev_driver_name(create->options->driver));
    int code = driver->image->create(create->graph, create->options, err);
    create->ended = true;
    return code;
}

static int coroutine_fn create_prepare(struct job *job, struct error **err)
{
    return 0;
}

static void create_progress(struct job *job, uint64_t *ret_done, uint64_t *ret_total)
{
    const struct create *create = job->state;
    *ret_done = create->ended;
    *ret_total = 1;
}

static void coroutine_fn create_clean(struct job *job)
{
    struct create *create = job->state;
    operation_end(create->operation);
    blockdev_create_options_free(create->options);
    g_free(create);
}

static const struct job_policy create_policy = {
    .type = JOB_TYPE_CREATE,
    .plain = true,
    .run = create_run,
    .prepare = create_prepare,
    .clean = create_clean,
    .progress = create_progress,
};

/* --- the command --- */

static struct node *create_node(const struct graph *graph, const struct blockdev_ref *ref)
{
    return ref && ref->kind == BLOCKDEV_REF_REFERENCE ? graph_find((struct graph *)graph, ref->u.reference) : NULL;
}

static struct operation_config create_config(const struct create *create)
{
    const struct blockdev_create_options *options = create->args->options;
    const struct blockdev_ref *file = NULL, *data = NULL;
    if (options->driver == BLOCKDEV_DRIVER_QCOW2) {
        file = options->u.qcow2.file;
        data = options->u.qcow2.data_file;
    } else if (options->driver == BLOCKDEV_DRIVER_LUKS) {
        file = options->u.luks.file;
        data = options->u.luks.header;
    }
    return (struct operation_config){
        .kind = "job",
        .id = create->args->job_id,
        .table = &blockdev_create_claims,
        .bound = {[CLAIM_NODE] = create_node(create->graph, file), [CLAIM_DATA] = create_node(create->graph, data)},
    };
}

static int coroutine_fn create_plan(struct action *action, struct error **err)
{
    struct create *create = action->state;
    const char *name = blockdev_driver_name(create->args->options->driver);
    const struct driver *driver = driver_find(name);
    create->graph = action->graph;
    if (!driver || !driver->image || !driver->image->create) {
        return error_set(err, -ENOTSUP, "Driver '%s' does not support blockdev-create", name);
    }
    return job_check_id(create->jobs, create->args->job_id, err);
}

static int coroutine_fn create_preview(struct action *action, json_t **ret_claims, struct error **err)
{
    struct operation_config config = create_config(action->state);
    return operation_preview(action->graph, &config, ret_claims, err);
}

static int coroutine_fn create_apply(struct action *action, struct error **err)
{
    struct create *create = action->state;
    struct operation_config config = create_config(create);
    int code = operation_begin(action->graph, &config, &create->operation, err);
    if (code == 0) {
        struct job_config job = {.id = create->args->job_id, .auto_finalize = true};
        create->job = job_create(create->jobs, &create_policy, &job);
    }
    return code;
}

static void coroutine_fn create_revert(struct action *action)
{
    struct create *create = action->state;
    job_discard(create->job);
    operation_end_locked(create->operation);
}

static void coroutine_fn create_commit(struct action *action)
{
    struct create *create = action->state;
    create->options = g_steal_pointer(&create->args->options);
    create->args = NULL;
    create->job->state = create;
    action->state = NULL;
    job_start(create->job);
}

static void coroutine_fn create_action_clean(struct action *action)
{
    g_free(action->state);
}

static const struct action_kind create_kind = {
    .name = "blockdev-create",
    .plan = create_plan,
    .apply = create_apply,
    .revert = create_revert,
    .commit = create_commit,
    .clean = create_action_clean,
    .preview = create_preview,
};

void create_action(struct action *ret, struct jobs *jobs, struct blockdev_create_args *args)
{
    struct create *create = g_new0(struct create, 1);
    create->jobs = jobs;
    create->args = args;
    *ret = (struct action){.kind = &create_kind, .state = create};
}

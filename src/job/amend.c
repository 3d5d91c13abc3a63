/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * x-blockdev-amend: a job that changes the keys of an encrypted image. Owns the claims on it and the order of its
 * steps; what is changed, and how that survives a crash, is the driver's (block/image.h).
 *
 *   lock, drain, writable, change, not writable, let requests go on, unlock
 *
 * 1. What the image shows stays the same, so nobody who uses it is asked; but others that write its metadata are.
 * 2. The image's users wait while its header is changed, which takes as long as trying a passphrase does.
 */
#include "block/driver.h"
#include "block/graph.h"
#include "block/image.h"
#include "block/operation.h"
#include "job/create.h"
#include "job/policy.h"
#include "schema/claims.h"
#include <errno.h>
#include <glib.h>

struct amend {
    struct jobs *jobs;
    struct x_blockdev_amend_args *args;     /* until the job starts */
    struct blockdev_amend_options *options; /* the job's */
    bool force;
    struct graph *graph;
    struct node *node; /* a reference of the job's */
    struct operation *operation;
    struct job *job;
    uint64_t done, total;
};

/* --- the job --- */

static void amend_report(uint64_t done, uint64_t of, void *argument)
{
    struct amend *amend = argument;
    amend->done = done;
    amend->total = of;
}

static int coroutine_fn amend_drained(struct amend *amend, struct error **err)
{
    struct image_amendment amendment = {.keys = amend->options, .force = amend->force};
    struct image_progress progress = {.report = amend_report, .argument = amend};
    int code = node_writable_begin_locked(amend->node, err);
    if (code == 0) {
        code = amend->node->driver->image->amend(amend->node, &amendment, &progress, err);
        node_writable_end_locked(amend->node);
    }
    return code;
}

static int coroutine_fn amend_run(struct job *job, struct error **err)
{
    struct amend *amend = job->state;
    struct drain drain;
    int code = -ECANCELED;
    graph_lock(amend->graph);
    if (!job->control.cancelled) {
        graph_drain_begin(amend->graph, &amend->node, 1, NULL, &drain);
        code = amend_drained(amend, err);
        graph_drain_end(&drain);
    }
    graph_unlock(amend->graph);
    amend_report(1, 1, amend);
    return code;
}

static int coroutine_fn amend_prepare(struct job *job, struct error **err)
{
    return 0;
}

static void amend_progress(struct job *job, uint64_t *ret_done, uint64_t *ret_total)
{
    const struct amend *amend = job->state;
    *ret_done = amend->done;
    *ret_total = amend->total;
}

static void coroutine_fn amend_clean(struct job *job)
{
    struct amend *amend = job->state;
    operation_end(amend->operation);
    node_release(amend->node);
    blockdev_amend_options_free(amend->options);
    g_free(amend);
}

static const struct job_policy amend_policy = {
    .type = JOB_TYPE_AMEND,
    .plain = true,
    .run = amend_run,
    .prepare = amend_prepare,
    .clean = amend_clean,
    .progress = amend_progress,
};

/* --- the command --- */

static int coroutine_fn amend_plan(struct action *action, struct error **err)
{
    struct amend *amend = action->state;
    const char *name = amend->args->node_name;
    struct node *node = graph_find(action->graph, name);
    amend->graph = action->graph;
    if (!node) {
        return error_set(err, -ENODEV, "Cannot find device='' nor node-name='%s'", name);
    }
    node = node_beneath_filters(node);
    if (!node->driver->image || !node->driver->image->amend) {
        return error_set(err, -ENOTSUP, "Driver '%s' of node '%s' does not support x-blockdev-amend",
                         node->driver->name, node->name);
    }
    if (!g_str_equal(node->driver->name, blockdev_driver_name(amend->args->options->driver))) {
        return error_set(err, -EINVAL, "x-blockdev-amend doesn't support changing the block driver: node '%s' is %s",
                         node->name, node->driver->name);
    }
    amend->node = node; /* no reference: until apply, or the preview, nothing yields */
    return job_check_id(amend->jobs, amend->args->job_id, err);
}

static struct operation_config amend_config(const struct amend *amend)
{
    return (struct operation_config){
        .kind = "job",
        .id = amend->args->job_id,
        .table = &x_blockdev_amend_claims,
        .bound = {[CLAIM_NODE] = amend->node},
    };
}

static int coroutine_fn amend_preview(struct action *action, json_t **ret_claims, struct error **err)
{
    const struct amend *amend = action->state;
    struct operation_config config = amend_config(amend);
    int code = operation_preview(action->graph, &config, ret_claims, err);
    return code < 0 ? code : node_writable_check(amend->node, err);
}

static int coroutine_fn amend_apply(struct action *action, struct error **err)
{
    struct amend *amend = action->state;
    struct operation_config config = amend_config(amend);
    int code = operation_begin(action->graph, &config, &amend->operation, err);
    if (code == 0) {
        struct job_config job = {.id = amend->args->job_id, .auto_finalize = true};
        amend->job = job_create(amend->jobs, &amend_policy, &job);
        node_ref(amend->node);
    }
    return code;
}

static void coroutine_fn amend_revert(struct action *action)
{
    struct amend *amend = action->state;
    job_discard(amend->job);
    operation_end_locked(amend->operation);
    node_unref(amend->node);
}

static void coroutine_fn amend_commit(struct action *action)
{
    struct amend *amend = action->state;
    amend->options = g_steal_pointer(&amend->args->options);
    amend->force = amend->args->force;
    amend->args = NULL;
    amend->job->state = amend;
    action->state = NULL;
    job_start(amend->job);
}

static void coroutine_fn amend_action_clean(struct action *action)
{
    g_free(action->state);
}

static const struct action_kind amend_kind = {
    .name = "x-blockdev-amend",
    .plan = amend_plan,
    .apply = amend_apply,
    .revert = amend_revert,
    .commit = amend_commit,
    .clean = amend_action_clean,
    .preview = amend_preview,
};

void amend_action(struct action *ret, struct jobs *jobs, struct x_blockdev_amend_args *args)
{
    struct amend *amend = g_new0(struct amend, 1);
    amend->jobs = jobs;
    amend->args = args;
    *ret = (struct action){.kind = &amend_kind, .state = amend};
}

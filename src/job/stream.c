/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Stream: the policy over the copy engine that copies into a node (X) what it shows of the images below it down to its
 * base (Y), so that afterwards X leans on Y, or on nothing.
 *
 * Data are read through X itself, where X has nothing of its own, and written back to X with REQUEST_IF_UNALLOCATED:
 * the driver writes only where there is still nothing. A user's write that comes between wins, whatever the order.
 * Nothing that X shows ever changes, so a cancel, a failure or a crash at any moment leaves a valid image that leans on
 * what it leaned on before.
 *
 * The end, under a drain of everything above X: X is flushed (on disk: everything that X shows of the range is in X,
 * its header is the old one: valid), the header gets Y's name in one write (valid with either), and one graph
 * transaction moves X's edge to Y. If that is refused the old name is written back.
 *
 * 1. The range's lower end is the role `bottom`, held in the operation: other jobs' transactions move it when they take
 *    it out of the chain. Y is never remembered: it is what the bottom's backing edge leads to.
 * 2. What an image of the range does not decide stays where it is; so Y may be written into meanwhile by a commit.
 * 3. Pieces are whole clusters of X.
 * 4. X may grow meanwhile, by a commit into it: what came is copied in the last step.
 *
 * The life cycle is job.c's; claims come from the schema's table.
 */
#include "job/stream.h"
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/operation.h"
#include "block/user.h"
#include "job/policy.h"
#include "job/relink.h"
#include "schema/claims.h"
#include <errno.h>
#include <glib.h>

struct stream {
    struct job *job;
    struct graph *graph;
    struct node *node;   /* X; a reference */
    struct node *bottom; /* only until the operation has it */
    char *base_before;   /* stream_base_before() */
    char *base_name;     /* of Y as it was at the start, or NULL */
    char *backing_file;  /* given by the user for that Y, or NULL */
    bool mask_protocol;
    struct operation *operation;
    bool writable; /* a node_writable_begin() of ours */
    struct backend *backend;
    struct copy *copy;
    uint64_t size; /* bytes looked at, X's size so far; 0 when there is nothing below X */
};

/* Y: what the bottom leans on now. */
static struct node *stream_base(const struct stream *stream)
{
    return node_backing(stream->operation->bound[CLAIM_BOTTOM]);
}

static int coroutine_fn stream_extent(void *argument, uint64_t offset, uint64_t bytes, struct copy_extent *ret)
{
    struct stream *stream = ((struct job *)argument)->state;
    struct extent extent;
    struct node *base;
    bool moved;
    do {
        /* While the request waits for the end of a drain, another job may change what the range is, and its old base
         * may be closed. */
        base = stream_base(stream);
        if (base) {
            node_ref(base);
        }
        int result = backend_block_status(stream->backend, base, offset, bytes, &extent);
        moved = base != stream_base(stream);
        node_release(base);
        if (result < 0) {
            return result;
        }
    } while (moved);
    ret->bytes = extent.bytes;
    if (!(extent.flags & EXTENT_ALLOCATED) || extent.depth == 0) {
        ret->kind = COPY_SKIP;
    } else if (extent.flags & EXTENT_ZERO) {
        /* With nothing below, what X has not is zero anyway. But what hides data of the bottom has to hide them still
         * if X comes to lean on what takes the bottom's place. */
        ret->kind = base || extent.depth < node_backing_depth(stream->node) ? COPY_ZERO : COPY_SKIP;
    } else {
        ret->kind = COPY_DATA;
    }
    return 0;
}

static void stream_progress(struct job *job, uint64_t *ret_done, uint64_t *ret_total)
{
    const struct stream *stream = job->state;
    *ret_done = copy_done(stream->copy);
    *ret_total = stream->size;
}

static int coroutine_fn stream_run(struct job *job, struct error **err)
{
    struct stream *stream = job->state;
    int result = copy_range(stream->copy, 0, stream->size, false);
    return result < 0 ? result : job_flush(job, stream->backend, err);
}

/* --- the end --- */

static int stream_move_edge(struct stream *stream, struct node *base, struct error **err)
{
    g_autofree char *subject = g_strdup_printf("block-stream %s", stream->job->id);
    struct node *node = stream->node;
    struct transaction *transaction = graph_begin(stream->graph, subject);
    transaction_by(transaction, stream->operation);
    if (node->backing) {
        if (base) {
            /* X has all that the range had: its edge to Y stands for the bottom's, also in the eyes of a commit into Y
             * that had adopted that one. Not if its users may still write to what it commits: X would not have that. */
            struct operation *adopter = stream->operation->bound[CLAIM_BOTTOM]->backing->adopter;
            bool writes = adopter && adopter->conditions & CLAIM_IF_ACTIVE;
            transaction_move_edge(transaction, node->backing, node_head(base));
            transaction_adopt(transaction, node->backing, writes ? NULL : adopter);
        } else {
            transaction_detach(transaction, node->backing);
        }
    }
    transaction_end_operation(transaction, stream->operation);
    return graph_commit(transaction, err);
}

static int coroutine_fn stream_relink(struct stream *stream, struct error **err)
{
    struct relink relink = {.operation = stream->operation};
    struct backing_name name;
    struct node *base = stream_base(stream);
    const char *given = base && g_strcmp0(base->name, stream->base_name) == 0 ? stream->backing_file : NULL;
    int result = relink_name(stream->node, base, given, stream->mask_protocol, &name, err);
    if (result < 0) {
        return result;
    }
    result = relink_write(&relink, stream->node, &name, err);
    backing_name_clear(&name);
    if (result == 0) {
        result = stream_move_edge(stream, base, err);
    }
    if (result < 0) {
        relink_undo(&relink);
    }
    relink_clear(&relink);
    return result;
}

static int coroutine_fn stream_flush(struct stream *stream, struct error **err)
{
    int result = backend_flush(stream->backend);
    return result < 0 ? error_set_errno(err, result, "Cannot flush node '%s'", stream->node->name) : 0;
}

/* A commit into X may have made it longer. What it shows there comes from the images of the range, which may be shorter
 * than Y. Users are held up: nobody makes it longer still. */
static int coroutine_fn stream_copy_growth(struct stream *stream, struct error **err)
{
    uint64_t size = backend_size(stream->backend), from = align_down(stream->size, stream->node->limits.cluster_size);
    if (size <= stream->size) {
        return 0;
    }
    stream->size = size;
    int result = copy_range(stream->copy, from, size - from, true);
    return result < 0 ? result : stream_flush(stream, err);
}

static int coroutine_fn stream_prepare(struct job *job, struct error **err)
{
    struct stream *stream = job->state;
    struct drain drain;
    if (!stream->node->backing) {
        return 0;
    }
    int result = stream_flush(stream, err);
    if (result < 0) {
        return result;
    }
    graph_lock(stream->graph);
    graph_drain_begin(stream->graph, &stream->node, 1, stream->backend, &drain);
    result = stream_copy_growth(stream, err);
    if (result == 0) {
        result = job->control.cancelled ? -ECANCELED : stream_relink(stream, err);
    }
    graph_drain_end(&drain);
    graph_unlock(stream->graph);
    return result;
}

/* --- beginning and cleaning up --- */

static void coroutine_fn stream_free(struct stream *stream)
{
    node_release(stream->node);
    g_free(stream->base_name);
    g_free(stream->backing_file);
    g_free(stream->base_before);
    g_free(stream);
}

static void coroutine_fn stream_destroy(struct stream *stream)
{
    copy_destroy(stream->copy);
    backend_destroy(stream->backend);
    operation_end(stream->operation);
    if (stream->writable) {
        node_writable_end(stream->node);
    }
    stream_free(stream);
}

static void coroutine_fn stream_clean(struct job *job)
{
    struct stream *stream = job->state;
    job->state = NULL;
    stream_destroy(stream);
}

static enum job_target_state stream_target_state(struct job *job)
{
    return job->result == 0 ? JOB_TARGET_STATE_COMPLETE : JOB_TARGET_STATE_INTACT;
}

static const struct job_policy stream_policy = {
    .type = JOB_TYPE_STREAM,
    .ignore_leaves = true,
    .run = stream_run,
    .prepare = stream_prepare,
    .clean = stream_clean,
    .progress = stream_progress,
    .target_state = stream_target_state,
};

static int stream_check_args(const struct block_stream_args *args, struct error **err)
{
    const char *names[3];
    unsigned count = 0;
    if (args->base) {
        names[count++] = "base";
    }
    if (args->bottom) {
        names[count++] = "bottom";
    }
    if (args->base_node) {
        names[count++] = "base-node";
    }
    if (count > 1) {
        return error_set(err, -EINVAL, "'%s' and '%s' cannot be specified at the same time", names[0], names[1]);
    }
    if (args->backing_file && count == 0) {
        return error_set(err, -EINVAL, "'backing-file' was given, but the whole chain is to be streamed");
    }
    if (args->has_speed && args->speed < 0) {
        return error_set(err, -EINVAL, "Parameter 'speed' expects a non-negative value");
    }
    return 0;
}

/* The last image above `base` (NULL: the last of all) in X's chain. */
static struct node *stream_find_bottom(struct node *node, const struct node *base)
{
    while (node && node_backing(node) != base) {
        node = node_backing(node);
    }
    return node;
}

/* Finds X, the bottom and Y as the arguments name them. */
static int stream_resolve(struct stream *stream, const struct block_stream_args *args, struct error **err)
{
    struct graph *graph = stream->graph;
    struct node *node = graph_find(graph, args->device), *base = NULL, *bottom;
    if (!node) {
        return error_set(err, -ENODEV, "Cannot find device='%s' nor node-name='%s'", args->device, args->device);
    }
    node = node_beneath_filters(node);
    if (args->bottom) {
        if (!(bottom = relink_find_node(graph, args->bottom, err))) {
            return -ENODEV;
        }
        if (bottom == node || !node_is_above(node, bottom)) {
            return error_set(err, -EINVAL, "Node '%s' is not in a chain starting from '%s'", bottom->name, node->name);
        }
        base = node_backing(bottom);
    } else {
        if (args->base_node && !(base = relink_find_node(graph, args->base_node, err))) {
            return -ENODEV;
        }
        if (args->base && (!(base = relink_find_file(node, args->base)) || base == node)) {
            return error_set(err, -ENOENT, "Can't find '%s' in the backing chain of '%s'", args->base, node->name);
        }
        if (base && (base == node || !node_is_above(node, base))) {
            return error_set(err, -EINVAL, "Node '%s' is not a backing image of '%s'", base->name, node->name);
        }
        bottom = stream_find_bottom(node, base);
    }
    stream->node = node_ref(node);
    stream->base_name = base ? g_strdup(base->name) : NULL;
    stream->bottom = bottom;
    stream->size = node_backing(node) ? atomic_load(&node->size) : 0;
    return 0;
}

static int stream_check_node(const struct stream *stream, const struct block_stream_args *args, struct error **err)
{
    const struct node *node = stream->node;
    if (!node->driver->change_backing || !node->driver->write_if_unallocated || !node->limits.cluster_size) {
        return error_set(err, -ENOTSUP, "Driver '%s' of node '%s' cannot be streamed into", node->driver->name,
                         node->name);
    }
    int result = args->filter_node_name ? graph_check_name(stream->graph, args->filter_node_name, err) : 0;
    if (result < 0) {
        return result;
    }
    struct backing_name name;
    result = relink_name(node, node_backing(stream->bottom), stream->backing_file, stream->mask_protocol, &name, err);
    if (result == 0) {
        backing_name_clear(&name);
    }
    return result;
}

/* The same as a commit's: what the new name was given for when the command came ("": for nothing), or NULL. */
static char *coroutine_fn stream_base_before(struct stream *stream, const struct block_stream_args *args)
{
    struct stream seen = {.graph = stream->graph};
    bool found = stream_resolve(&seen, args, NULL) == 0;
    const struct node *base = found ? node_backing(seen.bottom) : NULL;
    char *name = found ? g_strdup(base ? base->name : "") : NULL;
    node_release(seen.node);
    g_free(seen.base_name);
    return name;
}

/* --- the start, as an action --- */

struct stream_start {
    struct jobs *jobs;
    struct job_group *group;
    const struct block_stream_args *args; /* borrowed */
    const char *id;
    struct stream *stream; /* the job's once that has started */
    struct operation_config config;
};

static int coroutine_fn stream_prepare_action(struct action *action, struct error **err)
{
    struct stream_start *start = action->state;
    if (start->args->backing_file) {
        start->stream->base_before = stream_base_before(start->stream, start->args);
    }
    return 0;
}

static int coroutine_fn stream_plan(struct action *action, struct error **err)
{
    struct stream_start *start = action->state;
    struct stream *stream = start->stream;
    int result = stream_check_args(start->args, err);
    if (result == 0) {
        result = stream_resolve(stream, start->args, err);
    }
    if (result == 0 && start->args->backing_file) {
        result = relink_check_chosen(stream->graph, node_backing(stream->bottom), stream->base_before, err);
    }
    if (result == 0) {
        result = job_check_id(start->jobs, start->id, err);
    }
    if (result == 0) {
        result = stream_check_node(stream, start->args, err);
    }
    if (result == 0) {
        action_drain(action, stream->node);
    }
    start->config = (struct operation_config){
        .kind = "job",
        .id = start->id,
        .table = &block_stream_claims,
        .bound = {[CLAIM_TOP] = stream->node, [CLAIM_BOTTOM] = stream->bottom},
        .progress = job_percent,
        .argument = &stream->job,
    };
    return result;
}

static int coroutine_fn stream_preview(struct action *action, json_t **ret_claims, struct error **err)
{
    struct stream_start *start = action->state;
    int result = operation_preview(action->graph, &start->config, ret_claims, err);
    return result < 0 ? result : node_writable_check(start->stream->node, err);
}

static void stream_create_job(struct stream_start *start)
{
    struct stream *stream = start->stream;
    const struct block_stream_args *args = start->args;
    enum blockdev_on_error on_error = args->has_on_error ? args->on_error : BLOCKDEV_ON_ERROR_REPORT;
    struct job_config config = {
        .id = start->id,
        .speed = args->has_speed ? args->speed : 0,
        .on_source_error = on_error,
        .on_target_error = on_error,
        .auto_finalize = !args->has_auto_finalize || args->auto_finalize,
        .auto_dismiss = !args->has_auto_dismiss || args->auto_dismiss,
        .group = start->group,
    };
    struct job *job = job_create(start->jobs, &stream_policy, &config);
    struct copy_config copy_config = {
        .control = &job->control,
        .source = stream->backend,
        .target = stream->backend,
        .alignment = stream->node->limits.cluster_size,
        .zero_alignment = max_u64(64 * KiB, stream->node->limits.cluster_size),
        .write_flags = REQUEST_IF_UNALLOCATED,
        .extent = stream_extent,
        .failed = job_failed,
        .argument = job,
    };
    stream->copy = copy_create(&copy_config);
    stream->job = job;
    job->state = stream;
}

/* From whatever point of stream_apply(); graph->lock is held, all is drained. */
static void coroutine_fn stream_withdraw(struct stream *stream)
{
    copy_destroy(g_steal_pointer(&stream->copy));
    if (stream->job) {
        job_discard(g_steal_pointer(&stream->job));
    }
    backend_destroy_locked(g_steal_pointer(&stream->backend));
    operation_end_locked(g_steal_pointer(&stream->operation));
    if (stream->writable) {
        node_writable_end_locked(stream->node);
        stream->writable = false;
    }
}

static int coroutine_fn stream_apply(struct action *action, struct error **err)
{
    struct stream_start *start = action->state;
    struct stream *stream = start->stream;
    g_autofree char *owner = g_strdup_printf("block-stream %s", start->id);
    int result = operation_begin(action->graph, &start->config, &stream->operation, err);
    if (result == 0) {
        result = node_writable_begin_locked(stream->node, err);
        stream->writable = result == 0;
    }
    if (result == 0) {
        unsigned granted = operation_granted(stream->operation, stream->node);
        stream->backend = backend_create(action->graph, owner);
        result = backend_attach_locked(stream->backend, stream->node, granted, err);
    }
    if (result == 0) {
        stream_create_job(start);
    } else {
        stream_withdraw(stream);
    }
    return result;
}

static void coroutine_fn stream_revert(struct action *action)
{
    stream_withdraw(((struct stream_start *)action->state)->stream);
}

static void coroutine_fn stream_commit(struct action *action)
{
    struct stream_start *start = action->state;
    job_start(start->stream->job);
    start->stream = NULL;
}

static void coroutine_fn stream_clean_action(struct action *action)
{
    struct stream_start *start = action->state;
    if (start->stream) {
        stream_free(start->stream);
    }
    g_free(start);
}

static const struct action_kind stream_kind = {
    .name = "block-stream",
    .prepare = stream_prepare_action,
    .plan = stream_plan,
    .apply = stream_apply,
    .revert = stream_revert,
    .commit = stream_commit,
    .clean = stream_clean_action,
    .preview = stream_preview,
};

void stream_action(struct action *ret, struct jobs *jobs, struct job_group *group, const struct block_stream_args *args)
{
    struct stream_start *start = g_new0(struct stream_start, 1);
    struct stream *stream = g_new0(struct stream, 1);
    stream->graph = jobs_graph(jobs);
    stream->backing_file = g_strdup(args->backing_file);
    stream->mask_protocol = args->has_backing_mask_protocol && args->backing_mask_protocol;
    start->jobs = jobs;
    start->group = group;
    start->args = args;
    start->id = args->job_id ? args->job_id : "";
    start->stream = stream;
    *ret = (struct action){.kind = &stream_kind, .state = start};
}

int coroutine_fn stream_start(struct jobs *jobs, const struct block_stream_args *args, struct error **err)
{
    struct action action;
    stream_action(&action, jobs, NULL, args);
    return actions_run(jobs_graph(jobs), &action, 1, err);
}

int coroutine_fn stream_check(struct jobs *jobs, const struct block_stream_args *args, json_t **ret_claims,
                              struct error **err)
{
    struct action action;
    stream_action(&action, jobs, NULL, args);
    return actions_check(jobs_graph(jobs), &action, 1, ret_claims, err);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How a commit begins, as an action (block/action.h): what the arguments mean, the claims, and all that the job needs
 * of the graph. The run and the end are commit.c's.
 *
 * 1. Everything between the claims and the job happens under one lock and drain: nobody finds a filter without its job.
 * 2. commit_withdraw() undoes in reverse what commit_apply() did, from whatever point. Sizes are the run's.
 * 3. Each overlay of T is writable from here on, so that its header can be written at the end.
 * 4. In an active commit the tracking filter comes in last, under the backends: its target edge is how the copy writes.
 */
#include "base/size.h"
#include "driver/filter/track.h"
#include "job/commit_private.h"
#include "job/relink.h"
#include "schema/claims.h"
#include <errno.h>
#include <glib.h>

#define DIRTY_GRANULARITY_MIN (64 * KiB)
#define SECOND_NS ((int64_t)1000 * 1000 * 1000)

/* state of the action */
struct commit_start {
    struct jobs *jobs;
    struct job_group *group;
    struct block_commit_args args; /* borrows; has a job-id */
    struct commit *commit;         /* the job's once that has started */
    struct operation_config config;
};

/* --- what the arguments mean --- */

/* Finds top and base as the arguments name them. */
static int commit_resolve(struct commit *commit, const struct block_commit_args *args, struct error **err)
{
    struct node *device = graph_find(commit->graph, args->device), *top, *base;
    if (!device) {
        return error_set_class(err, ERROR_DEVICE_NOT_FOUND, -ENODEV, "Device '%s' not found", args->device);
    }
    if ((args->top && args->top_node) || (args->base && args->base_node)) {
        const char *name = args->top && args->top_node ? "top" : "base";
        return error_set(err, -EINVAL, "'%s' and '%s-node' cannot be specified at the same time", name, name);
    }
    device = top = node_beneath_filters(device);
    if (args->top_node && !(top = relink_find_node(commit->graph, args->top_node, err))) {
        return -ENODEV;
    }
    if (args->top && !(top = relink_find_file(device, args->top))) {
        return error_set(err, -ENOENT, "Top image file %s not found below node '%s'", args->top, args->device);
    }
    if (top != device && !node_is_above(device, top)) {
        return error_set(err, -EINVAL, "Node '%s' is not in the backing chain of '%s'", top->name, args->device);
    }
    for (base = top; node_backing(base);) {
        base = node_backing(base);
    }
    if (args->base_node && !(base = relink_find_node(commit->graph, args->base_node, err))) {
        return -ENODEV;
    }
    if (args->base && !(base = relink_find_file(top, args->base))) {
        return error_set(err, -ENOENT, "Base image file %s not found below node '%s'", args->base, top->name);
    }
    if (base == top) {
        return error_set(err, -EINVAL, "Cannot commit node '%s' into itself%s", top->name,
                         node_backing(top) ? "" : ": there is nothing below it");
    }
    if (!node_is_above(top, base)) {
        return error_set(err, -EINVAL, "Node '%s' is not in the backing chain of '%s'", base->name, top->name);
    }
    commit->top = node_ref(top);
    commit->base = node_ref(base);
    return 0;
}

static int commit_check_args(const struct commit *commit, const struct block_commit_args *args, struct error **err)
{
    if (args->has_speed && args->speed < 0) {
        return error_set(err, -EINVAL, "Parameter 'speed' expects a non-negative value");
    }
    if (commit->active && args->backing_file) {
        return error_set(err, -EINVAL, "'backing-file' is for the headers of overlays, but '%s' has none",
                         commit->top->name);
    }
    return args->filter_node_name ? graph_check_name(commit->graph, args->filter_node_name, err) : 0;
}

static int coroutine_fn check_overlay(struct node *overlay, void *argument, struct error **err)
{
    return commit_check_overlay(argument, overlay, err);
}

/* The overlays that are there already; commit_lock() looks at those that come. */
static int coroutine_fn commit_check_overlays(struct commit *commit, struct error **err)
{
    struct overlays overlays = commit_overlays(commit);
    return overlays_each(&overlays, check_overlay, commit, err);
}

static int coroutine_fn check_writable(struct node *overlay, void *argument, struct error **err)
{
    return node_writable_check(overlay, err);
}

/* For the dry run: can the headers be written? */
static int coroutine_fn commit_check_writable(struct commit *commit, struct error **err)
{
    struct overlays overlays = commit_overlays(commit);
    return overlays_each(&overlays, check_writable, NULL, err);
}

/* The base that the arguments stand for before the graph is locked, or NULL: while the command waits for another job's
 * last step, the same arguments may come to mean another image. g_free(). */
static char *coroutine_fn commit_base_before(struct commit *commit, const struct block_commit_args *args)
{
    struct commit seen = {.graph = commit->graph};
    char *name = commit_resolve(&seen, args, NULL) == 0 ? g_strdup(seen.base->name) : NULL;
    node_release(seen.top);
    node_release(seen.base);
    return name;
}

static void commit_configure(struct commit_start *start)
{
    struct commit *commit = start->commit;
    bool longer = atomic_load(&commit->base->size) > atomic_load(&commit->top->size);
    start->config = (struct operation_config){
        .kind = "job",
        .id = start->args.job_id,
        .table = &block_commit_claims,
        .bound = {[CLAIM_TOP] = commit->top, [CLAIM_BASE] = commit->base},
        .conditions = (commit->active ? CLAIM_IF_ACTIVE : 0) | (longer ? CLAIM_IF_LONGER : 0),
        .progress = job_percent,
        .argument = &commit->job,
    };
}

static int coroutine_fn commit_prepare_action(struct action *action, struct error **err)
{
    struct commit_start *start = action->state;
    if (start->args.backing_file) {
        start->commit->base_before = commit_base_before(start->commit, &start->args);
    }
    return 0;
}

static int coroutine_fn commit_plan(struct action *action, struct error **err)
{
    struct commit_start *start = action->state;
    struct commit *commit = start->commit;
    const struct block_commit_args *args = &start->args;
    int result = commit_resolve(commit, args, err);
    if (result == 0 && args->backing_file) {
        result = relink_check_chosen(commit->graph, commit->base, commit->base_before, err);
    }
    if (result == 0) {
        commit->active = !commit_fresh_overlay(commit);
        result = commit_check_args(commit, args, err);
    }
    if (result == 0) {
        result = commit_check_overlays(commit, err);
    }
    if (result == 0) {
        result = job_check_id(start->jobs, args->job_id, err);
    }
    if (result == 0) {
        commit_configure(start);
        action_drain(action, commit->top);
        action_drain(action, commit->base);
    }
    return result;
}

static int coroutine_fn commit_preview(struct action *action, json_t **ret_claims, struct error **err)
{
    struct commit_start *start = action->state;
    int result = operation_preview(action->graph, &start->config, ret_claims, err);
    if (result == 0) {
        result = node_writable_check(start->commit->base, err);
    }
    return result < 0 ? result : commit_check_writable(start->commit, err);
}

/* --- doing and undoing; graph->lock is held, all is drained --- */

static int coroutine_fn commit_open_overlays(struct commit *commit, struct error **err)
{
    for (struct node *fresh; (fresh = commit_fresh_overlay(commit));) {
        int result = node_writable_begin_locked(fresh, err);
        if (result < 0) {
            return result;
        }
        g_ptr_array_add(commit->overlays, node_ref(fresh));
    }
    return 0;
}

/* The tracking filter, not over T yet. */
static int coroutine_fn commit_begin_tracking(struct commit *commit, const char *id, const char *name,
                                              struct error **err)
{
    g_autofree char *made_name = name ? NULL : g_strdup_printf("#commit-%s", id);
    g_autofree char *opened_for = g_strdup_printf("filter of block-commit %s", id);
    uint64_t granularity = max_u64(DIRTY_GRANULARITY_MIN, commit->base->limits.cluster_size);
    int result = dirty_create(atomic_load(&commit->top->size), granularity, &commit->dirty);
    if (result < 0) {
        return error_set_errno(err, result, "Cannot track the writes to node '%s'", commit->top->name);
    }
    result = graph_create_node(commit->graph, &driver_track, name ? name : made_name, opened_for, &commit->filter, err);
    if (result < 0) {
        return result;
    }
    track_set_dirty(commit->filter, commit->dirty);
    return graph_attach_target_locked(commit->operation, commit->filter, commit->base, err);
}

/* Marks come from here on; the first look at T comes later. */
static int coroutine_fn commit_insert_filter(struct commit *commit, struct error **err)
{
    int result = graph_insert_filter_locked(commit->graph, commit->operation, commit->filter, commit->top, err);
    commit->filter_inserted = result == 0;
    return result;
}

static int coroutine_fn commit_begin_backends(struct commit *commit, const char *id, struct error **err)
{
    g_autofree char *owner = g_strdup_printf("block-commit %s", id);
    commit->source = backend_create(commit->graph, owner);
    commit->target = backend_create(commit->graph, owner);
    unsigned granted = operation_granted(commit->operation, commit->top) & ACCESS_READ_DATA;
    int result = backend_attach_locked(commit->source, commit->top, granted, err);
    if (result == 0) {
        granted = operation_granted(commit->operation, commit->base);
        result = backend_attach_locked(commit->target, commit->base, granted, err);
    }
    commit->size = backend_size(commit->source);
    return result;
}

static void coroutine_fn commit_withdraw(struct commit *commit)
{
    auto_error error = NULL;
    copy_destroy(g_steal_pointer(&commit->copy));
    if (commit->job) {
        job_discard(g_steal_pointer(&commit->job));
    }
    backend_destroy_locked(g_steal_pointer(&commit->source));
    backend_destroy_locked(g_steal_pointer(&commit->target));
    if (commit->filter_inserted &&
        graph_remove_filter_locked(commit->graph, commit->operation, commit->filter, &error) < 0) {
        g_error("The filter of a commit of node '%s' cannot be taken away: %s", commit->top->name,
                error ? error->message : "unknown error");
    }
    commit->filter_inserted = false;
    commit->filter = node_unref(commit->filter);
    dirty_destroy(g_steal_pointer(&commit->dirty));
    for (guint i = 0; i < commit->overlays->len; i++) {
        node_writable_end_locked(commit->overlays->pdata[i]);
        node_unref(commit->overlays->pdata[i]);
    }
    g_ptr_array_set_size(commit->overlays, 0);
    operation_end_locked(g_steal_pointer(&commit->operation));
    if (commit->base_writable) {
        node_writable_end_locked(commit->base);
        commit->base_writable = false;
    }
}

static void commit_create_job(struct commit_start *start)
{
    const struct block_commit_args *args = &start->args;
    enum blockdev_on_error on_error = args->has_on_error ? args->on_error : BLOCKDEV_ON_ERROR_REPORT;
    struct job_config config = {
        .id = args->job_id,
        .speed = args->has_speed ? args->speed : 0,
        .on_source_error = on_error,
        .on_target_error = on_error,
        .auto_finalize = !args->has_auto_finalize || args->auto_finalize,
        .auto_dismiss = !args->has_auto_dismiss || args->auto_dismiss,
        .group = start->group,
    };
    int64_t after = args->has_switch_after ? args->switch_after : CONVERGE_AFTER_SECONDS;
    struct converge_rule rule = {
        .both = args->has_copy_mode && args->copy_mode == MIRROR_COPY_MODE_WRITE_BLOCKING,
        .after_ns = after * SECOND_NS,
        .ratio = args->has_switch_ratio ? (unsigned)args->switch_ratio : CONVERGE_RATIO,
    };
    commit_make_job(start->commit, start->jobs, &config, &rule);
}

static int coroutine_fn commit_apply(struct action *action, struct error **err)
{
    struct commit_start *start = action->state;
    struct commit *commit = start->commit;
    int result = operation_begin(action->graph, &start->config, &commit->operation, err);
    if (result == 0) {
        result = node_writable_begin_locked(commit->base, err);
        commit->base_writable = result == 0;
    }
    if (result == 0) {
        result = commit_open_overlays(commit, err);
    }
    if (result == 0 && commit->active) {
        result = commit_begin_tracking(commit, start->args.job_id, start->args.filter_node_name, err);
    }
    if (result == 0) {
        result = commit_begin_backends(commit, start->args.job_id, err);
    }
    if (result == 0) {
        commit_create_job(start);
    }
    if (result == 0 && commit->active) {
        result = commit_insert_filter(commit, err);
    }
    if (result < 0) {
        commit_withdraw(commit);
    }
    return result;
}

static void coroutine_fn commit_revert(struct action *action)
{
    commit_withdraw(((struct commit_start *)action->state)->commit);
}

static void coroutine_fn commit_commit(struct action *action)
{
    struct commit_start *start = action->state;
    job_start(start->commit->job);
    start->commit = NULL;
}

static void coroutine_fn commit_clean_action(struct action *action)
{
    struct commit_start *start = action->state;
    struct commit *commit = start->commit;
    if (commit) {
        node_release(commit->top);
        node_release(commit->base);
        g_ptr_array_free(commit->overlays, TRUE);
        g_free(commit->backing_file);
        g_free(commit->base_before);
        g_free(commit);
    }
    g_free(start);
}

static const struct action_kind commit_kind = {
    .name = "block-commit",
    .prepare = commit_prepare_action,
    .plan = commit_plan,
    .apply = commit_apply,
    .revert = commit_revert,
    .commit = commit_commit,
    .clean = commit_clean_action,
    .preview = commit_preview,
};

void commit_action(struct action *ret, struct jobs *jobs, struct job_group *group, const struct block_commit_args *args)
{
    struct commit_start *start = g_new0(struct commit_start, 1);
    struct commit *commit = g_new0(struct commit, 1);
    commit->graph = jobs_graph(jobs);
    commit->overlays = g_ptr_array_new();
    commit->backing_file = g_strdup(args->backing_file);
    commit->mask_protocol = args->has_backing_mask_protocol && args->backing_mask_protocol;
    start->jobs = jobs;
    start->group = group;
    start->args = *args;
    start->args.job_id = args->job_id ? args->job_id : "";
    start->commit = commit;
    *ret = (struct action){.kind = &commit_kind, .state = start};
}

int coroutine_fn commit_start(struct jobs *jobs, const struct block_commit_args *args, struct error **err)
{
    struct action action;
    commit_action(&action, jobs, NULL, args);
    return actions_run(jobs_graph(jobs), &action, 1, err);
}

int coroutine_fn commit_check(struct jobs *jobs, const struct block_commit_args *args, json_t **ret_claims,
                              struct error **err)
{
    struct action action;
    commit_action(&action, jobs, NULL, args);
    return actions_check(jobs_graph(jobs), &action, 1, ret_claims, err);
}

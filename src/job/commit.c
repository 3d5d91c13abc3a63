/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Commit: the policy over the copy engine that moves what lies between top (T) and base (B) down into base.
 *
 * While it runs, B holds a mixture, and nobody but us looks at it alone: T and everything above show the same data as
 * before, because what was copied into B is still masked by the images that it was copied from. So a cancel, a failure
 * or a crash at any moment before the end leaves all that T shows as it was.
 *
 * The end, in this order:
 *   - B is flushed. On disk: B is whole, seen as T's content; no header has changed.
 *   - Under a drain of everything above T: (active: what is still dirty, hardly anything, is copied, B flushed again;)
 * each overlay's header gets B's name, flushed. After a crash between two overlays, some lean on T and some on B. Both
 * show the same, since T leads to B and masks nothing that B has not got.
 *   - One graph transaction: overlays, exports and all other users of T move to B; T and the images between are stale.
 *     In memory only: a crash here finds the same disk as the line before. If it is refused the old names are written
 *     back.
 *
 * 1. The set of overlays is a role: it is derived again under the lock at the end, and each is writable by then.
 * 2. B has T's size at least before anything is copied (the run begins with it), and behind T's end reads as zeroes, as
 *    its overlays expect.
 * 3. In an active commit the tracking filter is the head of T from before the first look at T until after the pivot.
 * 4. commit_clean() undoes in reverse what the start did, and the claims, from whatever point.
 *
 * How it begins is commit_start.c's, the life cycle job.c's; claims and adoption come from the schema's table.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/enforce.h"
#include "driver/filter/track.h"
#include "job/commit_private.h"
#include "job/relink.h"
#include <errno.h>
#include <glib.h>

#define TAIL_PIECE (64 * MiB)

/* --- what lies where --- */

/* Middle commit: what the images above B decide. */
static int coroutine_fn commit_extent(void *argument, uint64_t offset, uint64_t bytes, struct copy_extent *ret)
{
    struct commit *commit = ((struct job *)argument)->state;
    struct extent extent;
    int result = backend_block_status(commit->source, commit->base, offset, bytes, &extent);
    if (result < 0) {
        return result;
    }
    ret->bytes = extent.bytes;
    ret->kind = !(extent.flags & EXTENT_ALLOCATED) ? COPY_SKIP : extent.flags & EXTENT_ZERO ? COPY_ZERO : COPY_DATA;
    return 0;
}

/* Active commit: everything that is dirty has to go; is it zero? */
static int coroutine_fn commit_dirty_extent(void *argument, uint64_t offset, uint64_t bytes, struct copy_extent *ret)
{
    struct commit *commit = ((struct job *)argument)->state;
    struct extent extent;
    int result = backend_block_status(commit->source, NULL, offset, bytes, &extent);
    if (result < 0) {
        return result;
    }
    ret->bytes = extent.bytes;
    ret->kind = extent.flags & EXTENT_ZERO ? COPY_ZERO : COPY_DATA;
    return 0;
}

static void commit_progress(struct job *job, uint64_t *ret_done, uint64_t *ret_total)
{
    const struct commit *commit = job->state;
    *ret_done = copy_done(commit->copy);
    *ret_total = commit->size;
    if (commit->active) {
        *ret_total = *ret_done + copy_in_flight(commit->copy) + dirty_bytes(commit->dirty);
    }
}

/* --- running --- */

/* What B has behind T's end would show through overlays that are longer than T, where they show zeroes now. */
static int coroutine_fn commit_zero_tail(struct commit *commit)
{
    struct job *job = commit->job;
    uint64_t end = backend_size(commit->target);
    for (uint64_t at = commit->size; at < end;) {
        if (job->control.cancelled) {
            return -ECANCELED;
        }
        if (job->control.pauses) {
            job->control.rest(&job->control);
            continue;
        }
        uint64_t bytes = min_u64(end - at, TAIL_PIECE);
        int result = backend_write_zeroes(commit->target, at, bytes, REQUEST_MAY_UNMAP);
        if (result == 0) {
            at += bytes;
        } else if (!job_retries(job, false, result, NULL)) {
            return job->control.cancelled ? -ECANCELED : result;
        }
    }
    return 0;
}

static int coroutine_fn commit_run_middle(struct commit *commit)
{
    int result = copy_range(commit->copy, 0, commit->size, false);
    return result < 0 ? result : commit_zero_tail(commit);
}

/* What the images above B decide has to be copied. */
static int coroutine_fn commit_look(void *argument, uint64_t offset, uint64_t bytes, uint64_t *ret_bytes,
                                    bool *ret_needed)
{
    const struct commit *commit = ((struct job *)argument)->state;
    struct extent extent;
    int result = backend_block_status(commit->source, commit->base, offset, bytes, &extent);
    if (result == 0) {
        *ret_bytes = extent.bytes;
        *ret_needed = extent.flags & EXTENT_ALLOCATED;
    }
    return result;
}

static int coroutine_fn commit_run_active(struct commit *commit)
{
    int result = converge_scan(&commit->converge, commit->size, commit_look);
    if (result == 0) {
        result = commit_zero_tail(commit);
    }
    return result < 0 ? result : converge_run(&commit->converge);
}

/* Not before the job runs: a start that is taken back has changed no size. */
static int coroutine_fn commit_grow_base(struct commit *commit, struct error **err)
{
    return backend_size(commit->target) < commit->size ? backend_truncate(commit->target, commit->size, err) : 0;
}

static int coroutine_fn commit_run(struct job *job, struct error **err)
{
    struct commit *commit = job->state;
    int result = commit_grow_base(commit, err);
    if (result < 0) {
        return result;
    }
    result = commit->active ? commit_run_active(commit) : commit_run_middle(commit);
    return result < 0 ? result : job_flush(job, commit->target, err);
}

/* --- the end --- */

struct overlays commit_overlays(const struct commit *commit)
{
    return (struct overlays){.graph = commit->graph, .image = commit->top, .writable = commit->overlays};
}

struct node *commit_fresh_overlay(const struct commit *commit)
{
    struct overlays overlays = commit_overlays(commit);
    return overlays_fresh(&overlays);
}

int commit_check_overlay(const struct commit *commit, const struct node *overlay, struct error **err)
{
    if (!overlay->driver->change_backing) {
        return error_set(err, -ENOTSUP, "Driver '%s' of node '%s', which leans on '%s', cannot change its backing file",
                         overlay->driver->name, overlay->name, commit->top->name);
    }
    struct backing_name name;
    int result = relink_name(overlay, commit->base, commit->backing_file, commit->mask_protocol, &name, err);
    if (result == 0) {
        backing_name_clear(&name);
    }
    return result;
}

/* Takes the graph's lock, with every overlay of T known and writable. On failure it is not locked. */
static int coroutine_fn commit_lock(struct commit *commit, struct error **err)
{
    while (true) {
        graph_lock(commit->graph);
        struct node *fresh = commit_fresh_overlay(commit);
        if (!fresh) {
            return 0;
        }
        int result = commit_check_overlay(commit, fresh, err);
        node_ref(fresh);
        graph_unlock(commit->graph);
        if (result == 0) {
            result = node_writable_begin(fresh, err);
        }
        if (result < 0) {
            node_release(fresh);
            return result;
        }
        g_ptr_array_add(commit->overlays, fresh);
    }
}

struct naming {
    struct commit *commit;
    struct relink *relink;
};

static int coroutine_fn name_base(struct node *overlay, void *argument, struct error **err)
{
    const struct naming *naming = argument;
    const struct commit *commit = naming->commit;
    struct backing_name name;
    int result = relink_name(overlay, commit->base, commit->backing_file, commit->mask_protocol, &name, err);
    if (result == 0) {
        result = relink_write(naming->relink, overlay, &name, err);
        backing_name_clear(&name);
    }
    return result;
}

/* The headers of all overlays, on disk. */
static int coroutine_fn commit_write_headers(struct commit *commit, struct relink *relink, struct error **err)
{
    struct overlays overlays = commit_overlays(commit);
    struct naming naming = {commit, relink};
    return overlays_each(&overlays, name_base, &naming, err);
}

/* The graph: T's users to B, T and what is between are stale, the claims end; one step. */
static int commit_move_users(struct commit *commit, struct error **err)
{
    struct graph *graph = commit->graph;
    g_autofree char *subject = g_strdup_printf("block-commit %s", commit->job->id);
    g_autofree char *reason = g_strdup_printf("%s moved its data into node '%s'", subject, commit->base->name);
    struct transaction *transaction = graph_begin(graph, subject);
    transaction_by(transaction, commit->operation);
    succession_record(transaction, commit->top, commit->filter_inserted ? commit->filter : NULL,
                      node_head(commit->base), SUCCESSION_ALL);
    for (struct node *node = commit->top; node && node != commit->base; node = node_backing(node)) {
        transaction_mark_stale(transaction, node, reason);
    }
    transaction_end_operation(transaction, commit->operation);
    int result = graph_commit(transaction, err);
    if (result == 0) {
        commit->filter_inserted = false;
        /* B is from now on what T was to its users: as writable as T. */
        commit->base->wants_writable |= commit->top->wants_writable;
    }
    return result;
}

static int coroutine_fn commit_relink(struct commit *commit, struct error **err)
{
    struct relink relink = {.operation = commit->operation};
    bool longer = atomic_load(&commit->base->size) > atomic_load(&commit->top->size);
    int result = longer ? enforce_claim(commit->operation, commit->top, ACCESS_ATTRIBUTES,
                                        "handing users over to a longer image", err)
                        : 0;
    if (result == 0) {
        result = commit_write_headers(commit, &relink, err);
    }
    if (result == 0) {
        result = commit_move_users(commit, err);
    }
    if (result < 0) {
        relink_undo(&relink);
    }
    relink_clear(&relink);
    return result;
}

static int coroutine_fn commit_flush(struct commit *commit, struct error **err)
{
    int result = backend_flush(commit->target);
    if (result < 0) {
        error_set_errno(err, result, "Cannot flush node '%s'", commit->base->name);
    }
    return result;
}

/* Users are held up from here on, and so is every command that wants the graph's lock. What was flushed before, and is
 * not dirty again, is not flushed a second time: B may be slow. */
static int coroutine_fn commit_finish_drained(struct commit *commit, struct error **err)
{
    struct job *job = commit->job;
    bool copied = false;
    int result = commit->active ? converge_finish_drained(&commit->converge, &copied) : 0;
    if (result == 0 && copied) {
        result = commit_flush(commit, err);
    }
    if (result == 0 && job->control.cancelled) {
        result = -ECANCELED;
    }
    if (result == 0 && !job->end_asked) {
        result = commit_relink(commit, err);
    }
    return result;
}

static int coroutine_fn commit_prepare(struct job *job, struct error **err)
{
    struct commit *commit = job->state;
    int result = 0;
    if (commit->active) {
        result = converge_finish(&commit->converge);
        result = result < 0 ? result : commit_flush(commit, err);
    }
    if (result == 0) {
        result = commit_lock(commit, err);
    }
    if (result < 0) {
        return result;
    }
    struct drain drain;
    graph_drain_begin(commit->graph, &commit->top, 1, commit->source, &drain);
    result = commit_finish_drained(commit, err);
    graph_drain_end(&drain);
    graph_unlock(commit->graph);
    return result;
}

/* --- beginning and cleaning up --- */

static void coroutine_fn commit_destroy(struct commit *commit)
{
    if (commit->filter_inserted) {
        auto_error error = NULL;
        if (graph_remove_filter(commit->graph, commit->operation, commit->filter, &error) < 0) {
            g_critical("The filter of a commit of node '%s' stays: %s", commit->top->name,
                       error ? error->message : "unknown error");
            g_assert_not_reached();
        }
    }
    copy_destroy(commit->copy); /* requests in the filter took its lock */
    backend_destroy(commit->source);
    backend_destroy(commit->target);
    node_release(commit->filter);
    dirty_destroy(commit->dirty);
    for (guint i = 0; i < commit->overlays->len; i++) {
        node_writable_end(commit->overlays->pdata[i]);
        node_release(commit->overlays->pdata[i]);
    }
    g_ptr_array_free(commit->overlays, TRUE);
    operation_end(commit->operation);
    if (commit->base_writable) {
        node_writable_end(commit->base);
    }
    node_release(commit->top);
    node_release(commit->base);
    g_free(commit->backing_file);
    g_free(commit->base_before);
    g_free(commit);
}

static void coroutine_fn commit_clean(struct job *job)
{
    struct commit *commit = job->state;
    job->state = NULL;
    commit_destroy(commit);
}

static enum job_target_state commit_target_state(struct job *job)
{
    return job->result == 0 ? JOB_TARGET_STATE_COMPLETE : JOB_TARGET_STATE_PARTIAL;
}

static int coroutine_fn commit_change(struct job *job, const struct block_job_change_options *options,
                                      struct error **err)
{
    struct commit *commit = job->state;
    if (options->type != JOB_TYPE_COMMIT) {
        return error_set(err, -EINVAL, "Job '%s' is no %s but a commit", job->id, job_type_name(options->type));
    }
    if (!commit->active) {
        return error_set(err, -ENOTSUP, "Job '%s' is no active commit: no user writes what it copies", job->id);
    }
    converge_change(&commit->converge, options->u.commit.copy_mode == MIRROR_COPY_MODE_WRITE_BLOCKING);
    return 0;
}

static void commit_resting(struct job *job, bool begins)
{
    struct commit *commit = job->state;
    if (commit->active) {
        converge_resting(&commit->converge);
    }
}

static bool commit_synced(const struct job *job, bool *ret_applies)
{
    const struct commit *commit = job->state;
    *ret_applies = commit->active;
    return commit->active && converge_is_synced(&commit->converge);
}

static const struct job_policy commit_policy = {
    .type = JOB_TYPE_COMMIT,
    .run = commit_run,
    .prepare = commit_prepare,
    .clean = commit_clean,
    .progress = commit_progress,
    .target_state = commit_target_state,
    .change = commit_change,
    .resting = commit_resting,
    .synced = commit_synced,
};

void commit_make_job(struct commit *commit, struct jobs *jobs, const struct job_config *config,
                     const struct converge_rule *rule)
{
    struct job *job = job_create(jobs, &commit_policy, config);
    struct copy_config copy_config = {
        .control = &job->control,
        .source = commit->source,
        .target = commit->target,
        .target_edge = commit->active ? commit->filter->target : NULL,
        .alignment = 1,
        .zero_alignment = max_u64(64 * KiB, commit->base->limits.cluster_size),
        .extent = commit->active ? commit_dirty_extent : commit_extent,
        .failed = job_failed,
        .argument = job,
    };
    commit->copy = copy_create(&copy_config);
    commit->job = job;
    job->state = commit;
    if (commit->active) {
        struct track_sides sides = {.busy = copy_busy(commit->copy), .unit = 1};
        track_set_sides(commit->filter, &sides);
        commit->converge = (struct converge){
            .job = job, .copy = commit->copy, .dirty = commit->dirty, .filter = commit->filter, .rule = *rule};
        converge_begin(&commit->converge);
    }
}

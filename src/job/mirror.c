/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Mirror: the policy over the copy engine that makes a target the same as a node that users go on writing, and may put
 * it in the node's place.
 *
 * It begins with everything marked that the target has not got: by a look at both (sync full, top), by a bitmap, or
 * nothing (none). Passes over what is marked, and the way to READY, are converge.c's; keeping account of users' writes
 * is track.c's.
 *
 * The end, in this order:
 *   - Users go on: both sides are written, what is still dirty is copied, the target is flushed.
 *   - Under a drain of everything above the node: the last of it is copied and flushed, if there is any. Here the
 * target is the node, exactly. The bitmap that said what to copy begins anew. Cancelled while ready: this is all.
 *   - On disk: the target's header gets what it leans on, if that is this job's affair; each overlay's header gets the
 *     target's name (replace). After a crash between two of these, some lean on the node and some on the target; both
 *     show the same, since nobody has written to either meanwhile.
 *   - One graph transaction: users, with replace also overlays, go over to the target. If it is refused the old names
 *     are written back.
 *
 * 1. Afterwards the node is not stale: it stays the valid image of that moment, with whatever did not go over (a job of
 *    its own, an overlay without replace).
 * 2. The tracking filter is inserted before the first look at the node, and taken out in the step that moves the users,
 *    or after the last copy.
 * 3. With sync top and none the target shows the node's data only together with what it will lean on. Until then whole
 *    units of it are written, and zeroes are pinned (mirror_start.c).
 * 4. mirror_destroy_locked() undoes in reverse what mirror_start.c did, from whatever point; it is the only undoing.
 */
#include "base/size.h"
#include "block/bitmap.h"
#include "block/dirty.h"
#include "block/graph.h"
#include "block/operation.h"
#include "block/user.h"
#include "driver/filter/track.h"
#include "job/mirror_private.h"
#include <errno.h>
#include <glib.h>

struct node *mirror_node(const struct mirror *mirror)
{
    return mirror->operation->bound[CLAIM_NODE];
}

static const char *mirror_command(const struct mirror *mirror)
{
    return mirror->operation->table->operation;
}

/* Everything that is dirty has to go; is it zero? */
int coroutine_fn mirror_extent(void *argument, uint64_t offset, uint64_t bytes, struct copy_extent *ret)
{
    struct mirror *mirror = ((struct job *)argument)->state;
    struct extent extent;
    int result = backend_block_status(mirror->source, NULL, offset, bytes, &extent);
    if (result < 0) {
        return result;
    }
    mirror->wrote = true;
    ret->bytes = extent.bytes;
    ret->kind = extent.flags & EXTENT_ZERO ? COPY_ZERO : COPY_DATA;
    return 0;
}

static void mirror_progress(struct job *job, uint64_t *ret_done, uint64_t *ret_total)
{
    const struct mirror *mirror = job->state;
    *ret_done = copy_done(mirror->copy);
    *ret_total = *ret_done + copy_in_flight(mirror->copy) + dirty_bytes(mirror->dirty);
}

/* --- what has to be copied --- */

/* What lies at `offset`, and whether the target needs it. */
static int coroutine_fn mirror_look(void *argument, uint64_t offset, uint64_t bytes, uint64_t *ret_bytes,
                                    bool *ret_needed)
{
    struct mirror *mirror = ((struct job *)argument)->state;
    struct extent extent, there;
    struct node *below = mirror->sync == MIRROR_SYNC_MODE_TOP ? node_backing(mirror_node(mirror)) : NULL;
    int result = backend_block_status(mirror->source, below, offset, bytes, &extent);
    if (result < 0) {
        return result;
    }
    *ret_bytes = extent.bytes;
    *ret_needed = below ? extent.flags & EXTENT_ALLOCATED : !(extent.flags & EXTENT_ZERO);
    if (!below && !*ret_needed) { /* zeroes: not where there are such already */
        result = backend_block_status(mirror->destination, NULL, offset, extent.bytes, &there);
        if (result == 0) {
            *ret_bytes = there.bytes;
            *ret_needed = !(there.flags & EXTENT_ZERO);
        }
    }
    return result;
}

static int coroutine_fn mirror_run(struct job *job, struct error **err)
{
    struct mirror *mirror = job->state;
    bool scans = mirror->sync == MIRROR_SYNC_MODE_FULL || mirror->sync == MIRROR_SYNC_MODE_TOP;
    int result = scans ? converge_scan(&mirror->converge, mirror->size, mirror_look) : 0;
    if (result == 0) {
        result = converge_run(&mirror->converge);
    }
    return result < 0 ? result : job_flush(job, mirror->destination, err);
}

/* --- the end --- */

int coroutine_fn mirror_check_overlay(struct node *overlay, void *argument, struct error **err)
{
    const struct mirror *mirror = argument;
    if (mirror->keep_backing) {
        return 0;
    }
    if (!overlay->driver->change_backing) {
        return error_set(err, -ENOTSUP, "Driver '%s' of node '%s', which leans on '%s', cannot change its backing file",
                         overlay->driver->name, overlay->name, mirror->overlays.image->name);
    }
    struct backing_name name;
    int result = relink_name(overlay, mirror->image, mirror->backing_file, false, &name, err);
    if (result == 0) {
        backing_name_clear(&name);
    }
    return result;
}

struct renaming {
    const struct mirror *mirror;
    struct relink *relink;
};

static int coroutine_fn rename_overlay(struct node *overlay, void *argument, struct error **err)
{
    struct renaming *renaming = argument;
    const struct mirror *mirror = renaming->mirror;
    struct backing_name name;
    int result = relink_name(overlay, mirror->image, mirror->backing_file, false, &name, err);
    if (result == 0) {
        result = relink_write(renaming->relink, overlay, &name, err);
        backing_name_clear(&name);
    }
    return result;
}

/* What the target is to lean on, or NULL. */
static struct node *mirror_below(const struct mirror *mirror)
{
    switch (mirror->lean) {
    case MIRROR_LEANS_BELOW:
        return node_backing(mirror_node(mirror));
    case MIRROR_LEANS_ON_NODE:
        return mirror_node(mirror);
    default:
        return NULL;
    }
}

/* Names on disk. A target whose header names something already was made to lean on that. */
static int coroutine_fn mirror_write_headers(struct mirror *mirror, struct relink *relink, struct error **err)
{
    struct node *below = mirror_below(mirror);
    int result = 0;
    if (below && !mirror->image->header_backing) {
        struct backing_name name;
        result = relink_name(mirror->image, below, NULL, false, &name, err);
        if (result == 0) {
            result = relink_write(relink, mirror->image, &name, err);
            backing_name_clear(&name);
        }
    }
    if (result == 0 && mirror->replace && !mirror->keep_backing) {
        struct renaming renaming = {mirror, relink};
        result = overlays_each(&mirror->overlays, rename_overlay, &renaming, err);
    }
    return result;
}

/* The graph: users to the target, the filter out, the claims end; one step. */
static int mirror_move_users(struct mirror *mirror, struct error **err)
{
    struct graph *graph = mirror->graph;
    struct node *node = mirror_node(mirror), *below = mirror_below(mirror);
    g_autofree char *subject = g_strdup_printf("%s %s", mirror_command(mirror), mirror->job->id);
    struct transaction *transaction = graph_begin(graph, subject);
    bool writable = node->wants_writable;
    transaction_by(transaction, mirror->operation);
    succession_record(transaction, node, mirror->filter, node_head(mirror->target),
                      mirror->replace ? SUCCESSION_ALL : SUCCESSION_USERS);
    if (below) {
        transaction_attach(transaction, mirror->image, EDGE_BACKING,
                           mirror->lean == MIRROR_LEANS_ON_NODE ? below : node_head(below), NULL);
    }
    transaction_end_operation(transaction, mirror->operation);
    int result = graph_commit(transaction, err);
    if (result == 0) {
        mirror->pivoted = true;
        mirror->filter_inserted = false;
        /* The target is from now on what the node was to its users: as writable. */
        mirror->image->wants_writable |= writable;
    }
    return result;
}

static int coroutine_fn mirror_pivot(struct mirror *mirror, struct error **err)
{
    struct relink relink = {.operation = mirror->operation, .foundation = mirror->image};
    int result = mirror_write_headers(mirror, &relink, err);
    if (result == 0) {
        result = mirror_move_users(mirror, err);
    }
    if (result < 0) {
        relink_undo(&relink);
    }
    relink_clear(&relink);
    return result;
}

/* The copy is exact. The bitmap has done its work, and begins anew, unless what comes after it fails. */
static int coroutine_fn mirror_conclude(struct mirror *mirror, struct error **err)
{
    struct bitmap *bitmap = g_steal_pointer(&mirror->bitmap);
    struct bitmap_before before = {0};
    bool renews = bitmap && mirror->bitmap_mode != BITMAP_SYNC_MODE_NEVER;
    if (bitmap) {
        bitmap_busy_end(bitmap);
    }
    int result = renews ? bitmap_change_begin(bitmap, BITMAP_EMPTIED, &before, err) : 0;
    if (result < 0) {
        return result;
    }
    mirror->exact = true;
    result = mirror->job->end_asked ? 0 : mirror_pivot(mirror, err);
    if (renews && result < 0) {
        bitmap_change_undo(bitmap, &before);
    } else if (renews) {
        bitmap_change_done(&before);
    }
    return result;
}

static int mirror_check_size(const struct mirror *mirror, struct error **err)
{
    if (backend_size(mirror->source) == mirror->size && backend_size(mirror->destination) == mirror->size) {
        return 0;
    }
    return error_set(err, -EINVAL, "Node '%s' has another size than when the mirror began", mirror_node(mirror)->name);
}

static int coroutine_fn mirror_flush(struct mirror *mirror, struct error **err)
{
    int result = backend_flush(mirror->destination);
    if (result < 0) {
        error_set_errno(err, result, "Cannot flush node '%s'", mirror->target->name);
    }
    return result;
}

/* Users are held up from here on, and so is every command that wants the graph's lock. */
static int coroutine_fn mirror_finish_drained(struct mirror *mirror, struct error **err)
{
    struct job *job = mirror->job;
    bool copied;
    int result = mirror_check_size(mirror, err);
    if (result == 0) {
        result = converge_finish_drained(&mirror->converge, &copied);
    }
    if (result == 0 && copied) {
        result = mirror_flush(mirror, err);
    }
    if (result == 0 && job->control.cancelled) {
        result = -ECANCELED;
    }
    return result < 0 ? result : mirror_conclude(mirror, err);
}

/* Takes the graph's lock, with every overlay writable whose header is to be changed. The node may have been replaced,
 * by another mirror or a commit, while this one waited: then its overlays are those of the successor. */
static int coroutine_fn mirror_lock(struct mirror *mirror, struct error **err)
{
    if (!mirror->replace) {
        graph_lock(mirror->graph);
        return 0;
    }
    while (true) {
        struct node *image = node_ref(mirror_node(mirror));
        mirror->overlays.image = image;
        int result = overlays_lock(&mirror->overlays, mirror_check_overlay, mirror, err);
        bool same = mirror_node(mirror) == image;
        if (result < 0) {
            node_release(image);
            return result;
        }
        node_unref(image);
        if (same) {
            return 0;
        }
        graph_unlock(mirror->graph);
    }
}

static int coroutine_fn mirror_prepare(struct job *job, struct error **err)
{
    struct mirror *mirror = job->state;
    int result = converge_finish(&mirror->converge);
    if (result == 0) {
        result = mirror_flush(mirror, err);
    }
    if (result == 0) {
        result = mirror_lock(mirror, err);
    }
    if (result < 0) {
        return result;
    }
    struct drain drain;
    struct node *node = mirror_node(mirror);
    graph_drain_begin(mirror->graph, &node, 1, mirror->source, &drain);
    result = mirror_finish_drained(mirror, err);
    graph_drain_end(&drain);
    graph_unlock(mirror->graph);
    return result;
}

/* --- the rest --- */

/* sync bitmap, always: what was not copied is what the bitmap says from now on. Under a drain. */
static void coroutine_fn mirror_keep_rest(struct mirror *mirror)
{
    struct bitmap *bitmap = mirror->bitmap;
    auto_error error = NULL;
    bitmap_busy_end(bitmap);
    mirror->bitmap = NULL;
    if (mirror->bitmap_mode != BITMAP_SYNC_MODE_ALWAYS || !mirror->job || mirror->job->status == JOB_STATUS_UNDEFINED) {
        return;
    }
    if (bitmap_clear(bitmap, &error) < 0) {
        g_warning("Bitmap '%s' stays as it was: %s", bitmap->name, error ? error->message : "unknown error");
        return;
    }
    dirty_merge(bitmap->dirty, mirror->dirty);
}

void coroutine_fn mirror_destroy_locked(struct mirror *mirror)
{
    if (mirror->filter) {
        graph_filter_follow(mirror->filter, NULL, CLAIM_NODE);
    }
    if (mirror->bitmap) {
        struct drain drain;
        struct node *node = mirror->bitmap->node;
        graph_drain_begin(mirror->graph, &node, 1, NULL, &drain);
        mirror_keep_rest(mirror);
        graph_drain_end(&drain);
    }
    if (mirror->filter_inserted) {
        auto_error error = NULL;
        if (graph_remove_filter_locked(mirror->graph, mirror->operation, mirror->filter, &error) < 0) {
            g_critical("The filter of a mirror of node '%s' stays: %s", mirror_node(mirror)->name,
                       error ? error->message : "unknown error");
            g_assert_not_reached();
        }
    }
    copy_destroy(mirror->copy);
    backend_destroy_locked(mirror->source);
    backend_destroy_locked(mirror->destination);
    node_unref(mirror->filter);
    dirty_destroy(mirror->dirty);
    overlays_close_locked(&mirror->overlays);
    operation_end_locked(mirror->operation);
    if (mirror->image_writable) {
        struct drain drain;
        graph_drain_begin(mirror->graph, &mirror->image, 1, NULL, &drain);
        node_writable_end_locked(mirror->image);
        graph_drain_end(&drain);
    }
    node_unref(mirror->image);
    node_unref(mirror->target);
    g_free(mirror->backing_file);
    g_free(mirror);
}

static void coroutine_fn mirror_clean(struct job *job)
{
    struct mirror *mirror = job->state;
    struct graph *graph = mirror->graph;
    job->state = NULL;
    graph_lock(graph);
    mirror_destroy_locked(mirror);
    graph_unlock(graph);
}

static enum job_target_state mirror_target_state(struct job *job)
{
    const struct mirror *mirror = job->state;
    if (mirror->exact) {
        return JOB_TARGET_STATE_COMPLETE;
    }
    return mirror->wrote || mirror->converge.touched ? JOB_TARGET_STATE_PARTIAL : JOB_TARGET_STATE_UNCHANGED;
}

static int coroutine_fn mirror_change(struct job *job, const struct block_job_change_options *options,
                                      struct error **err)
{
    struct mirror *mirror = job->state;
    if (options->type != JOB_TYPE_MIRROR) {
        return error_set(err, -EINVAL, "Job '%s' is no %s but a mirror", job->id, job_type_name(options->type));
    }
    converge_change(&mirror->converge, options->u.mirror.copy_mode == MIRROR_COPY_MODE_WRITE_BLOCKING);
    return 0;
}

static void mirror_resting(struct job *job, bool begins)
{
    struct mirror *mirror = job->state;
    converge_resting(&mirror->converge);
}

static bool mirror_synced(const struct job *job, bool *ret_applies)
{
    const struct mirror *mirror = job->state;
    *ret_applies = true;
    return converge_is_synced(&mirror->converge);
}

const struct job_policy mirror_policy = {
    .type = JOB_TYPE_MIRROR,
    .run = mirror_run,
    .prepare = mirror_prepare,
    .clean = mirror_clean,
    .progress = mirror_progress,
    .target_state = mirror_target_state,
    .change = mirror_change,
    .resting = mirror_resting,
    .synced = mirror_synced,
};

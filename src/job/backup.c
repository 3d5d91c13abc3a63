/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Backup: a copy of a node (N) as it was when the job began, made while N goes on being written.
 *
 * The way of a guest's write: it enters through the filter copy-before-write, the head of N, whose guard first copies
 * what the write touches and is still to be kept to the target; then N is written. Beside that the copy engine moves
 * the rest, piece by piece under the same lock (copy/before.h).
 *
 * 1. The point in time is a drained moment: in apply() the filter is put over N, and a bitmap is split, while nobody is
 *    inside N; and everything that was acknowledged before is in N. With other actions it is the same moment for all.
 * 2. What is to be copied is fixed then: the size, and by sync all units or those that the bitmap says. With sync=top
 *    units that N has nothing of its own in are dropped as they are come to; guests may have copied them before.
 * 3. I/O of the job is done as requests of `source`, which reaches N and, through the filter, the target: a drain of
 *    either waits for whole pieces.
 * 4. The bitmap is decided about when it is known how the job (and its group) ends: `anew` by success, or always; what
 *    was not copied stays in it then. Until then it says what it said and what was written since.
 * 5. backup_undo() undoes in reverse what apply() did, from whatever point; it is the only undoing.
 *
 * The life cycle is job.c's; claims come from the schema's table.
 */
#include "job/backup.h"
#include "base/size.h"
#include "block/bitmap.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/new_image.h"
#include "block/operation.h"
#include "block/user.h"
#include "copy/before.h"
#include "driver/filter/copy_before_write.h"
#include "job/policy.h"
#include "schema/claims.h"
#include <errno.h>
#include <glib.h>

#define UNIT_MIN (64 * KiB)
#define UNIT_MAX (64 * MiB)
#define WORKERS_MAX 256
#define LOOK_NS ((int64_t)100 * 1000 * 1000) /* how often sync=none looks whether it is broken */

struct backup {
    struct jobs *jobs;
    struct job_group *group;
    struct graph *graph;
    const struct blockdev_backup_options *options; /* until the action's clean */
    const struct drive_backup_options *drive;      /* of drive-backup, else NULL */
    struct blockdev_backup_options drive_as_node;  /* what `options` is then; its target is no node */
    struct node *made;                             /* drive-backup's target: a reference, once it is open */
    struct job *job;
    bool started; /* the job owns this */
    enum mirror_sync_mode sync;
    enum bitmap_sync_mode bitmap_mode;
    struct node *image;  /* N; a reference */
    struct node *target; /* the same */
    struct bitmap *bitmap;
    bool bitmap_split, bitmap_busy;
    struct node *bitmap_node; /* a reference, if there is a bitmap */
    struct operation *operation;
    bool target_writable; /* a node_writable_begin() of ours */
    struct before *before;
    struct node *filter; /* a reference */
    bool inserted;
    struct backend *source;
    struct copy *copy;
    bool discards;
    uint64_t unit;
    uint64_t total; /* bytes to be kept at the beginning */
};

/* --- running --- */

static struct backup *backup_of(void *job)
{
    return ((struct job *)job)->state;
}

/* What units N has nothing in are not copied. */
static void backup_drop(struct backup *backup, uint64_t offset, uint64_t bytes)
{
    uint64_t size = before_size(backup->before), end = offset + bytes;
    uint64_t first = align_up(offset, backup->unit), last = end == size ? end : align_down(end, backup->unit);
    if (first < last) {
        before_moved(backup->before, first, last - first);
    }
}

/* This layer alone, or all below. */
static int coroutine_fn backup_look(struct backup *backup, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    if (backup->sync != MIRROR_SYNC_MODE_TOP) {
        return backend_block_status(backup->source, NULL, offset, bytes, ret);
    }
    backend_enter(backup->source);
    int result = edge_block_status(backend_edge(backup->source), offset, bytes, ret);
    backend_leave(backup->source);
    return result;
}

static int coroutine_fn backup_extent(void *argument, uint64_t offset, uint64_t bytes, struct copy_extent *ret)
{
    struct backup *backup = backup_of(argument);
    uint64_t next, length;
    struct extent extent;
    bool more = before_next(backup->before, offset, &next, &length);
    if (!more || next > offset) {
        *ret = (struct copy_extent){more ? min_u64(bytes, next - offset) : bytes, COPY_SKIP};
        return 0;
    }
    int result = backup_look(backup, offset, min_u64(bytes, length), &extent);
    if (result < 0) {
        return result;
    }
    bool skip = backup->sync == MIRROR_SYNC_MODE_TOP && !(extent.flags & EXTENT_ALLOCATED);
    if (skip) {
        backup_drop(backup, offset, extent.bytes);
    }
    ret->bytes = extent.bytes;
    ret->kind = skip ? COPY_SKIP : extent.flags & EXTENT_ZERO ? COPY_ZERO : COPY_DATA;
    return 0;
}

static bool backup_wanted(void *argument, uint64_t *offset, uint64_t *bytes)
{
    return before_wanted(backup_of(argument)->before, offset, bytes);
}

static void coroutine_fn backup_moved(void *argument, uint64_t offset, uint64_t bytes)
{
    struct backup *backup = backup_of(argument);
    before_moved(backup->before, offset, bytes);
    if (backup->discards) { /* a hint: whether it is taken changes nothing */
        edge_discard(backend_edge(backup->source), offset, bytes);
    }
}

static void backup_progress(struct job *job, uint64_t *ret_done, uint64_t *ret_total)
{
    const struct backup *backup = job->state;
    uint64_t left = min_u64(before_left(backup->before), backup->total);
    *ret_total = backup->total;
    *ret_done = job->status >= JOB_STATUS_WAITING && job->result == 0 ? backup->total : backup->total - left;
}

static int backup_check_whole(const struct backup *backup, struct error **err)
{
    int broken = before_broken(backup->before);
    return broken < 0
               ? error_set_errno(err, broken, "Old data of node '%s' could not be copied before they were overwritten",
                                 backup->image->name)
               : 0;
}

static int coroutine_fn backup_flush(struct backup *backup, struct error **err)
{
    while (true) {
        backend_enter(backup->source);
        int result = edge_flush(backup->filter->target);
        backend_leave(backup->source);
        bool leave = false;
        if (result == 0) {
            return 0;
        }
        if (job_retries(backup->job, false, result, &leave)) {
            continue;
        }
        if (leave || backup->job->control.cancelled) {
            return leave ? 0 : -ECANCELED;
        }
        return error_set_errno(err, result, "Cannot flush node '%s'", backup->target->name);
    }
}

static int coroutine_fn backup_run(struct job *job, struct error **err)
{
    struct backup *backup = job->state;
    int result = 0;
    if (backup->sync == MIRROR_SYNC_MODE_NONE) {
        while (!job->control.cancelled && !before_broken(backup->before)) {
            job_idle(job, LOOK_NS);
        }
        result = job->control.cancelled ? -ECANCELED : 0;
    } else {
        result = copy_range(backup->copy, 0, before_size(backup->before), false);
    }
    if (result == 0) {
        result = backup_check_whole(backup, err);
    }
    return result < 0 ? result : backup_flush(backup, err);
}

/* --- the end --- */

static int coroutine_fn backup_prepare(struct job *job, struct error **err)
{
    return backup_check_whole(job->state, err);
}

/* graph->lock is held, and who writes to the bitmap's node is held up. */
static void backup_end_bitmap(struct backup *backup, bool success)
{
    if (backup->bitmap_split) {
        bool always = backup->started && backup->bitmap_mode == BITMAP_SYNC_MODE_ALWAYS; /* else it has never been */
        bitmap_split_end(backup->bitmap, success || always, success ? NULL : before_bits(backup->before));
    }
    if (backup->bitmap_busy) {
        bitmap_busy_end(backup->bitmap);
    }
    backup->bitmap_split = backup->bitmap_busy = false;
}

static void coroutine_fn backup_decide(struct job *job, bool success)
{
    struct backup *backup = job->state;
    struct drain drain;
    if (backup->bitmap_split || backup->bitmap_busy) {
        graph_lock(backup->graph);
        graph_drain_begin(backup->graph, &backup->bitmap_node, 1, NULL, &drain);
        backup_end_bitmap(backup, success);
        graph_drain_end(&drain);
        graph_unlock(backup->graph);
    }
}

static void coroutine_fn backup_commit(struct job *job)
{
    backup_decide(job, true);
}

static void coroutine_fn backup_abort(struct job *job)
{
    backup_decide(job, false);
}

static enum job_target_state backup_target_state(struct job *job)
{
    const struct backup *backup = job->state;
    return job->result == 0     ? JOB_TARGET_STATE_COMPLETE
           : backup->total == 0 ? JOB_TARGET_STATE_UNCHANGED
                                : JOB_TARGET_STATE_PARTIAL;
}

/* Filter, claims and what hangs on them. graph->lock is held. */
static void coroutine_fn backup_undo(struct backup *backup)
{
    backup_end_bitmap(backup, false);
    if (backup->inserted) {
        graph_filter_follow(backup->filter, NULL, CLAIM_NODE);
        auto_error error = NULL;
        if (graph_remove_filter_locked(backup->graph, backup->operation, backup->filter, &error) < 0) {
            g_critical("The filter of a backup of node '%s' stays: %s", backup->image->name,
                       error ? error->message : "unknown error");
            g_assert_not_reached();
        }
        backup->inserted = false;
    }
    backup->filter = node_unref(backup->filter);
    if (backup->target_writable) {
        struct drain drain;
        graph_drain_begin(backup->graph, &backup->target, 1, NULL, &drain);
        node_writable_end_locked(backup->target);
        graph_drain_end(&drain);
        backup->target_writable = false;
    }
    operation_end_locked(backup->operation);
    backup->operation = NULL;
}

static void coroutine_fn backup_destroy(struct backup *backup)
{
    copy_destroy(backup->copy);
    backend_destroy(backup->source);
    graph_lock(backup->graph);
    backup_undo(backup);
    graph_unlock(backup->graph);
    before_destroy(backup->before);
    node_release(backup->image);
    node_release(backup->target);
    node_release(backup->bitmap_node);
    node_release(backup->made);
    g_free(backup);
}

static void coroutine_fn backup_clean(struct job *job)
{
    struct backup *backup = job->state;
    job->state = NULL;
    backup_destroy(backup);
}

static const struct job_policy backup_policy = {
    .type = JOB_TYPE_BACKUP,
    .run = backup_run,
    .prepare = backup_prepare,
    .commit = backup_commit,
    .abort = backup_abort,
    .clean = backup_clean,
    .progress = backup_progress,
    .target_state = backup_target_state,
};

/* --- the arguments --- */

static struct node *find_node(const struct backup *backup, const char *name, struct error **err)
{
    struct node *node = graph_find(backup->graph, name);
    if (!node) {
        error_set(err, -ENODEV, "Cannot find device='%s' nor node-name='%s'", name, name);
    }
    return node;
}

/* What goes with what, and which bitmap. */
static int check_bitmap(struct backup *backup, struct node *named, struct error **err)
{
    const struct blockdev_backup_options *options = backup->options;
    bool incremental = options->sync == MIRROR_SYNC_MODE_INCREMENTAL;
    bool by_bitmap = incremental || options->sync == MIRROR_SYNC_MODE_BITMAP;
    enum bitmap_sync_mode mode =
        incremental && !options->has_bitmap_mode ? BITMAP_SYNC_MODE_ON_SUCCESS : options->bitmap_mode;
    if (by_bitmap && !options->bitmap) {
        return error_set(err, -EINVAL, "must provide a valid bitmap name for '%s' sync mode",
                         mirror_sync_mode_name(options->sync));
    }
    if (incremental && mode != BITMAP_SYNC_MODE_ON_SUCCESS) {
        return error_set(err, -EINVAL, "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'");
    }
    if (!options->bitmap) {
        return options->has_bitmap_mode ? error_set(err, -EINVAL, "Cannot specify bitmap sync mode without a bitmap")
                                        : 0;
    }
    backup->bitmap_node = node_ref(bitmap_find(named, options->bitmap) ? named : backup->image);
    backup->bitmap = bitmap_find(backup->bitmap_node, options->bitmap);
    if (!backup->bitmap) {
        return error_set(err, -ENOENT, "Bitmap '%s' could not be found", options->bitmap);
    }
    if (!incremental && !options->has_bitmap_mode) {
        return error_set(err, -EINVAL, "Bitmap sync mode must be given when providing a bitmap");
    }
    if (options->sync == MIRROR_SYNC_MODE_NONE) {
        return error_set(err, -EINVAL, "sync mode 'none' does not produce meaningful bitmap outputs");
    }
    if (!by_bitmap && mode == BITMAP_SYNC_MODE_NEVER) {
        return error_set(err, -EINVAL,
                         "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '%s'",
                         mirror_sync_mode_name(options->sync));
    }
    backup->bitmap_mode = mode;
    return bitmap_check(backup->bitmap, mode == BITMAP_SYNC_MODE_NEVER ? BITMAP_ALLOW_READ_ONLY : 0, err);
}

static int check_performance(struct backup *backup, struct error **err)
{
    const struct backup_perf *perf = backup->options->x_perf;
    uint64_t least = perf && perf->has_min_cluster_size ? perf->min_cluster_size : 0;
    if (perf && perf->has_max_workers && (perf->max_workers < 1 || perf->max_workers > INT32_MAX)) {
        return error_set(err, -EINVAL, "max-workers must be between 1 and %d", INT32_MAX);
    }
    if (perf && perf->has_max_chunk && perf->max_chunk < 0) {
        return error_set(err, -EINVAL, "max-chunk must be zero (which means no limit) or positive");
    }
    if (least && !is_power_of_two(least)) {
        return error_set(err, -EINVAL, "min-cluster-size needs to be a power of 2");
    }
    if (least > UNIT_MAX) {
        return error_set(err, -EINVAL, "min-cluster-size must be at most 64 MiB");
    }
    /* What is compressed is not written twice: one cluster is there, or not. */
    uint64_t cluster = backup->target ? backup->target->limits.cluster_size : 0,
             common = backup->options->compress ? 512 : UNIT_MIN;
    backup->unit = max_u64(max_u64(least, cluster), common);
    if (perf && perf->max_chunk && (uint64_t)perf->max_chunk < backup->unit) {
        return error_set(err, -EINVAL,
                         "Required max-chunk (%" G_GINT64_FORMAT
                         ") is less than backup cluster size (%" G_GUINT64_FORMAT ")",
                         perf->max_chunk, backup->unit);
    }
    return 0;
}

static int refuse_compression(const char *target, struct error **err)
{
    return error_set(err, -ENOTSUP, "Compression is not supported for this drive %s", target);
}

static int check_target(const struct backup *backup, struct error **err)
{
    const struct node *image = backup->image, *target = backup->target;
    if (target == image) {
        return error_set(err, -EINVAL, "Source and target cannot be the same");
    }
    if (node_reaches(target, image)) {
        error_set(err, -EINVAL, "Node '%s' cannot take a backup of '%s', which it lies over", target->name,
                  image->name);
        error_hint(err, "Open it with backing=null; or use the drivers copy-before-write and snapshot-access");
        return -EINVAL;
    }
    if (backup->options->compress && !target->driver->compresses) {
        return refuse_compression(target->name, err);
    }
    if (atomic_load(&image->size) != atomic_load(&target->size)) {
        return error_set(err, -EINVAL, "Source and target image have different sizes");
    }
    return 0;
}

static int check_rest(const struct backup *backup, struct error **err)
{
    const struct blockdev_backup_options *options = backup->options;
    if (options->has_speed && options->speed < 0) {
        return error_set(err, -EINVAL, "Parameter 'speed' expects a non-negative value");
    }
    if (options->filter_node_name && graph_check_name(backup->graph, options->filter_node_name, err) < 0) {
        return -EINVAL;
    }
    return job_check_id(backup->jobs, options->job_id ? options->job_id : "", err);
}

/* --- the action --- */

/* What the arguments mean without the target. */
static int backup_resolve(struct backup *backup, struct error **err)
{
    struct node *named = find_node(backup, backup->options->device, err);
    if (!named) {
        return -ENODEV;
    }
    backup->image = node_ref(node_beneath_filters(named));
    backup->sync = backup->options->sync;
    if (backup->sync == MIRROR_SYNC_MODE_TOP && !node_backing(backup->image)) {
        backup->sync = MIRROR_SYNC_MODE_FULL;
    }
    int result = check_bitmap(backup, named, err);
    return result < 0 ? result : check_rest(backup, err);
}

static int backup_find_target(struct backup *backup, struct error **err)
{
    struct node *target = backup->drive ? backup->made : find_node(backup, backup->options->target, err);
    if (target) {
        backup->target = node_ref(node_beneath_filters(target));
    }
    return target || backup->drive ? 0 : -ENODEV; /* in a dry run of drive-backup there is none */
}

static int coroutine_fn backup_plan(struct action *action, struct error **err)
{
    struct backup *backup = action->state;
    int result = backup_resolve(backup, err);
    result = result < 0 ? result : backup_find_target(backup, err);
    result = result < 0 ? result : check_performance(backup, err);
    if (result == 0 && backup->target) {
        result = check_target(backup, err);
    }
    if (result == 0) {
        action_drain(action, backup->image);
    }
    if (result == 0 && backup->target) {
        action_drain(action, backup->target);
    }
    if (result == 0 && backup->bitmap) {
        action_drain(action, backup->bitmap_node);
    }
    return result;
}

static struct operation_config backup_operation(struct backup *backup)
{
    return (struct operation_config){
        .kind = "job",
        .id = backup->options->job_id,
        .table = backup->drive ? &drive_backup_claims : &blockdev_backup_claims,
        .bound = {[CLAIM_NODE] = backup->image, [CLAIM_TARGET] = backup->target},
        .conditions = backup->options->discard_source ? CLAIM_IF_DISCARD : 0,
        .progress = job_percent,
        .argument = &backup->job,
    };
}

/* What is to be copied, as of now. */
static int backup_begin_before(struct backup *backup, struct error **err)
{
    const struct blockdev_backup_options *options = backup->options;
    struct before_config config = {
        .size = atomic_load(&backup->image->size),
        .unit = backup->unit,
        .break_snapshot = options->has_on_cbw_error && options->on_cbw_error == ON_CBW_ERROR_BREAK_SNAPSHOT,
        .write_flags = options->compress ? REQUEST_COMPRESSED : 0,
    };
    int result = before_create(&config, &backup->before);
    if (result < 0) {
        return error_set_errno(err, result, "Cannot keep track of node '%s'", backup->image->name);
    }
    bool by_bitmap = backup->sync == MIRROR_SYNC_MODE_INCREMENTAL || backup->sync == MIRROR_SYNC_MODE_BITMAP;
    if (!by_bitmap) {
        before_keep(backup->before, 0, config.size);
    }
    uint64_t offset, bytes;
    for (uint64_t at = 0; by_bitmap && bitmap_next(backup->bitmap, at, &offset, &bytes); at = offset + bytes) {
        before_keep(backup->before, offset, bytes);
    }
    backup->total = min_u64(before_left(backup->before), config.size);
    return 0;
}

static int coroutine_fn backup_begin_filter(struct backup *backup, struct error **err)
{
    const struct blockdev_backup_options *options = backup->options;
    g_autofree char *name = options->filter_node_name ? g_strdup(options->filter_node_name)
                                                      : g_strdup_printf("#backup-%s", options->job_id);
    g_autofree char *owner = g_strdup_printf("blockdev-backup %s", options->job_id);
    g_autofree char *opened_for = g_strdup_printf("filter of %s", owner);
    int result = graph_create_node(backup->graph, &driver_copy_before_write, name, opened_for, &backup->filter, err);
    if (result == 0) {
        copy_before_write_set(backup->filter, backup->before);
        result = graph_attach_target_locked(backup->operation, backup->filter, backup->target, err);
    }
    if (result == 0) {
        result = graph_insert_filter_locked(backup->graph, backup->operation, backup->filter, backup->image, err);
        backup->inserted = result == 0;
    }
    if (result == 0) { /* whatever takes N's place, with N's users, shows what N showed */
        graph_filter_follow(backup->filter, backup->operation, CLAIM_NODE);
    }
    if (result == 0) {
        unsigned granted = operation_granted(backup->operation, backup->image);
        backup->source = backend_create(backup->graph, owner);
        result = backend_attach_locked(backup->source, backup->image, granted, err);
    }
    return result;
}

static int coroutine_fn backup_begin_bitmap(struct backup *backup, struct error **err)
{
    int result = 0;
    if (backup->bitmap && backup->bitmap_mode == BITMAP_SYNC_MODE_NEVER) {
        bitmap_busy_begin(backup->bitmap);
        backup->bitmap_busy = true;
    } else if (backup->bitmap) {
        result = bitmap_split_begin(backup->bitmap, err);
        backup->bitmap_split = result == 0;
    }
    return result;
}

static void backup_create_job(struct backup *backup)
{
    const struct blockdev_backup_options *options = backup->options;
    const struct backup_perf *perf = options->x_perf;
    struct job_config config = {
        .id = options->job_id,
        .speed = options->has_speed ? options->speed : 0,
        .on_source_error = options->has_on_source_error ? options->on_source_error : BLOCKDEV_ON_ERROR_REPORT,
        .on_target_error = options->has_on_target_error ? options->on_target_error : BLOCKDEV_ON_ERROR_REPORT,
        .auto_finalize = !options->has_auto_finalize || options->auto_finalize,
        .auto_dismiss = !options->has_auto_dismiss || options->auto_dismiss,
        .group = backup->group,
    };
    backup->job = job_create(backup->jobs, &backup_policy, &config);
    backup->job->state = backup;
    backup->discards = options->discard_source;
    struct copy_config copy_config = {
        .control = &backup->job->control,
        .source = backup->source,
        .target_edge = backup->filter->target,
        .alignment = backup->unit,
        .zero_alignment = backup->unit,
        .write_flags = options->compress ? REQUEST_COMPRESSED : 0,
        .pin_zeroes = backup->sync == MIRROR_SYNC_MODE_TOP,
        .workers = perf && perf->has_max_workers ? (unsigned)min_u64((uint64_t)perf->max_workers, WORKERS_MAX) : 0,
        .piece = perf && perf->has_max_chunk ? (uint64_t)perf->max_chunk : 0,
        .busy = before_lock(backup->before),
        .extent = backup_extent,
        .wanted = backup_wanted,
        .moved = backup_moved,
        .failed = job_failed,
        .argument = backup->job,
    };
    if (options->compress) {
        copy_config.piece = backup->unit;
    }
    backup->copy = copy_create(&copy_config);
}

static int coroutine_fn backup_apply(struct action *action, struct error **err)
{
    struct backup *backup = action->state;
    struct operation_config config = backup_operation(backup);
    int result = operation_begin(backup->graph, &config, &backup->operation, err);
    if (result == 0) {
        result = node_writable_begin_locked(backup->target, err);
        backup->target_writable = result == 0;
    }
    result = result < 0 ? result : backup_begin_before(backup, err);
    result = result < 0 ? result : backup_begin_filter(backup, err);
    result = result < 0 ? result : backup_begin_bitmap(backup, err);
    if (result < 0) {
        backup_undo(backup);
        return result;
    }
    backup_create_job(backup);
    return 0;
}

static void coroutine_fn backup_revert(struct action *action)
{
    struct backup *backup = action->state;
    job_discard(backup->job);
    backup->job = NULL;
    backup_undo(backup);
}

static void coroutine_fn backup_start(struct action *action)
{
    struct backup *backup = action->state;
    backup->started = true;
    job_start(backup->job);
}

static void coroutine_fn backup_action_clean(struct action *action)
{
    struct backup *backup = action->state;
    if (!backup->started) {
        backup_destroy(backup);
    }
}

static int coroutine_fn backup_preview(struct action *action, json_t **ret_claims, struct error **err)
{
    struct backup *backup = action->state;
    struct operation_config config = backup_operation(backup);
    int result = operation_preview(backup->graph, &config, ret_claims, err);
    return result < 0 || !backup->target ? result : node_writable_check(backup->target, err);
}

/* --- drive-backup: the target is a file --- */

/* Before a file is touched: is there anything to be said against it? */
static int coroutine_fn drive_check(struct backup *backup, struct error **err)
{
    struct backup seen = *backup;
    graph_lock(backup->graph);
    int result = backup_resolve(&seen, err);
    result = result < 0 ? result : check_performance(&seen, err);
    if (result == 0 && !backup->drive->format && backup->drive->has_mode &&
        backup->drive->mode == NEW_IMAGE_MODE_EXISTING) {
        result =
            error_set(err, -EINVAL, "The format of '%s' must be given: formats are not guessed", backup->drive->target);
    }
    const struct driver *driver = backup->drive->format ? driver_find(backup->drive->format)
                                  : seen.image          ? seen.image->driver
                                                        : NULL;
    if (result == 0 && driver && backup->options->compress && !driver->compresses) {
        result = refuse_compression(backup->drive->target, err);
    }
    if (result == 0) { /* a refusal leaves what stands there alone, and joins the queue if the command may wait */
        struct operation_config config = backup_operation(&seen);
        result = operation_begin(backup->graph, &config, &seen.operation, err);
        if (result == 0) {
            operation_end_locked(seen.operation);
        }
    }
    graph_unlock(backup->graph);
    node_release(seen.image); /* others have references too */
    node_release(seen.bitmap_node);
    return result;
}

static int coroutine_fn drive_prepare(struct action *action, struct error **err)
{
    struct backup *backup = action->state;
    const struct drive_backup_options *drive = backup->drive;
    int result = drive_check(backup, err);
    if (result < 0) {
        return result;
    }
    const struct node *image = node_beneath_filters(graph_find(backup->graph, drive->device));
    struct new_image wanted = {
        .filename = drive->target,
        .format = drive->format,
        .mode = drive->has_mode ? drive->mode : NEW_IMAGE_MODE_ABSOLUTE_PATHS,
    };
    return new_image_open_copy(backup->graph, image, drive->sync, &wanted, &backup->made, err);
}

static const struct action_kind drive_backup_kind = {
    .name = "drive-backup",
    .prepare = drive_prepare,
    .plan = backup_plan,
    .apply = backup_apply,
    .revert = backup_revert,
    .commit = backup_start,
    .clean = backup_action_clean,
    .preview = backup_preview,
};
static const struct action_kind blockdev_backup_kind = {
    .name = "blockdev-backup",
    .plan = backup_plan,
    .apply = backup_apply,
    .revert = backup_revert,
    .commit = backup_start,
    .clean = backup_action_clean,
    .preview = backup_preview,
};

static struct backup *backup_create(struct jobs *jobs, struct job_group *group)
{
    struct backup *backup = g_new0(struct backup, 1);
    backup->jobs = jobs;
    backup->group = group;
    backup->graph = jobs_graph(jobs);
    return backup;
}

void blockdev_backup_action(struct action *ret, struct jobs *jobs, struct job_group *group,
                            const struct blockdev_backup_options *options)
{
    struct backup *backup = backup_create(jobs, group);
    backup->options = options;
    *ret = (struct action){.kind = &blockdev_backup_kind, .state = backup};
}

void drive_backup_action(struct action *ret, struct jobs *jobs, struct job_group *group,
                         const struct drive_backup_options *options)
{
    struct backup *backup = backup_create(jobs, group);
    backup->drive = options;
    backup->drive_as_node = (struct blockdev_backup_options){
        .job_id = options->job_id,
        .device = options->device,
        .target = options->target,
        .sync = options->sync,
        .has_speed = options->has_speed,
        .speed = options->speed,
        .bitmap = options->bitmap,
        .has_bitmap_mode = options->has_bitmap_mode,
        .bitmap_mode = options->bitmap_mode,
        .has_compress = options->has_compress,
        .compress = options->compress,
        .has_on_source_error = options->has_on_source_error,
        .on_source_error = options->on_source_error,
        .has_on_target_error = options->has_on_target_error,
        .on_target_error = options->on_target_error,
        .has_on_cbw_error = options->has_on_cbw_error,
        .on_cbw_error = options->on_cbw_error,
        .has_auto_finalize = options->has_auto_finalize,
        .auto_finalize = options->auto_finalize,
        .has_auto_dismiss = options->has_auto_dismiss,
        .auto_dismiss = options->auto_dismiss,
        .filter_node_name = options->filter_node_name,
        .has_discard_source = options->has_discard_source,
        .discard_source = options->discard_source,
        .x_perf = options->x_perf,
    };
    backup->options = &backup->drive_as_node;
    *ret = (struct action){.kind = &drive_backup_kind, .state = backup};
}

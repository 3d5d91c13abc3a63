/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The beginning of a mirror, as an action: what the arguments mean in the graph, the claims, and all that has to stand
 * before the job runs. What the job does then is mirror.c's.
 *
 * 1. Users of the node are held up from before the claims are taken until the filter is in: what they write after that
 * is accounted for, and what they wrote before is there to be seen.
 * 2. With sync top and none the target is not given what it will lean on before the end, since that may change until
 *    then, and with none is still being written. So it shows zeroes around what it was given. The copy therefore takes
 *    whole units of it (clusters), and zeroes are stored as such: nothing may show through later that was not there.
 * 3. drive-mirror's target is made before anybody waits. It is closed again when nothing comes of it; the file stays.
 */
#include "base/size.h"
#include "block/bitmap.h"
#include "block/dirty.h"
#include "block/graph.h"
#include "block/new_image.h"
#include "block/operation.h"
#include "block/user.h"
#include "driver/filter/track.h"
#include "job/mirror.h"
#include "job/mirror_private.h"
#include "schema/claims.h"
#include <errno.h>
#include <glib.h>

#define GRANULARITY_LEAST (64 * KiB)
#define GRANULARITY_MIN 512
#define GRANULARITY_MAX (64 * MiB)
#define SECOND_NS ((int64_t)1000 * 1000 * 1000)

/* A run of the action. */
struct mirror_start {
    struct jobs *jobs;
    const struct blockdev_mirror *args;
    const struct drive_mirror *drive;     /* drive-mirror: what was asked for; NULL: blockdev-mirror */
    struct blockdev_mirror drive_as_node; /* what `args` is then; its target is no node */
    struct node *made;                    /* drive-mirror's target: a reference, once it is open */
    bool keeps_zeroes;                    /* unmap=off */
    struct job_group *group;
    const struct claim_table *table;
    struct node *node, *target, *image; /* as found by plan, borrowed */
    struct bitmap *bitmap;
    enum mirror_lean lean;
    struct mirror *mirror; /* from apply to commit or revert */
};

static const char *start_id(const struct mirror_start *start)
{
    return start->args->job_id ? start->args->job_id : "";
}

/* --- what the arguments mean --- */

static struct node *find_node(struct graph *graph, const char *name, struct error **err)
{
    struct node *node = graph_find(graph, name);
    if (!node) {
        error_set(err, -ENODEV, "Cannot find device='%s' nor node-name='%s'", name, name);
    }
    return node;
}

static int check_numbers(const struct blockdev_mirror *args, struct error **err)
{
    int64_t granularity = args->granularity;
    if (granularity != 0 && (granularity < GRANULARITY_MIN || granularity > (int64_t)GRANULARITY_MAX)) {
        return error_set(err, -EINVAL, "Parameter 'granularity' expects a value in range [512B, 64MB]");
    }
    if (granularity & (granularity - 1)) {
        return error_set(err, -EINVAL, "Parameter 'granularity' expects a power of 2");
    }
    if (args->buf_size < 0) {
        return error_set(err, -EINVAL, "Invalid parameter 'buf-size'");
    }
    if (args->speed < 0) {
        return error_set(err, -EINVAL, "Parameter 'speed' expects a non-negative value");
    }
    return 0;
}

/* Nobody's file or data: what is in there is its format's alone. */
static int check_place(const struct node *node, struct error **err)
{
    list_for_each (link, &node->parents) {
        const struct edge *edge = container_of(link, struct edge, child_link);
        if (edge->role == EDGE_FILE || edge->role == EDGE_DATA) {
            error_set(err, -EBUSY, "Node '%s' holds the image '%s'", node->name, edge->parent->name);
            error_hint(err, "Mirror that one");
            return -EBUSY;
        }
    }
    return 0;
}

static int check_replaces(struct graph *graph, const struct mirror_start *start, struct error **err)
{
    const struct blockdev_mirror *args = start->args;
    if (!args->replaces) {
        const char *bound = args->backing_file ? "backing-file" : args->keep_backing ? "keep-backing" : NULL;
        return bound ? error_set(err, -EINVAL, "'%s' is for the headers of overlays, which stay without 'replaces'",
                                 bound)
                     : 0;
    }
    if (args->backing_file && args->keep_backing) {
        return error_set(err, -EINVAL, "'backing-file' and 'keep-backing' cannot be specified at the same time");
    }
    struct node *replaced = graph_find(graph, args->replaces);
    if (!replaced) {
        return error_set(err, -ENODEV, "Failed to find node with node-name='%s'", args->replaces);
    }
    if (node_beneath_filters(replaced) != start->node) {
        return error_set(err, -EINVAL,
                         "Cannot replace '%s' by a node mirrored from '%s', because it cannot be guaranteed that doing "
                         "so would not lead to an abrupt change of visible data",
                         args->replaces, args->device);
    }
    return 0;
}

static int find_bitmap(struct mirror_start *start, struct error **err)
{
    const struct blockdev_mirror *args = start->args;
    bool wanted = args->sync == MIRROR_SYNC_MODE_INCREMENTAL || args->sync == MIRROR_SYNC_MODE_BITMAP;
    start->bitmap = NULL;
    if (!wanted && (args->bitmap || args->has_bitmap_mode)) {
        return error_set(err, -EINVAL, "'%s' is for sync modes 'incremental' and 'bitmap'",
                         args->bitmap ? "bitmap" : "bitmap-mode");
    }
    if (!wanted) {
        return 0;
    }
    if (!args->bitmap) {
        return error_set(err, -EINVAL, "Must provide a valid bitmap name for '%s' sync mode",
                         mirror_sync_mode_name(args->sync));
    }
    if (args->sync == MIRROR_SYNC_MODE_BITMAP && !args->has_bitmap_mode) {
        return error_set(err, -EINVAL, "Bitmap sync mode must be given when providing a bitmap");
    }
    if (args->sync == MIRROR_SYNC_MODE_INCREMENTAL && args->has_bitmap_mode &&
        args->bitmap_mode != BITMAP_SYNC_MODE_ON_SUCCESS) {
        return error_set(err, -EINVAL, "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'");
    }
    start->bitmap = bitmap_find_or_error(start->node, args->bitmap, err);
    if (!start->bitmap) {
        return -ENOENT;
    }
    bool stays = args->has_bitmap_mode && args->bitmap_mode == BITMAP_SYNC_MODE_NEVER;
    return bitmap_check(start->bitmap, stays ? BITMAP_ALLOW_READ_ONLY : 0, err);
}

/* Does the target need something below it to show what the node shows, and can it have that? */
static int find_lean(struct mirror_start *start, struct error **err)
{
    enum mirror_sync_mode sync = start->args->sync;
    struct node *image = start->image;
    bool none = sync == MIRROR_SYNC_MODE_NONE;
    start->lean = MIRROR_LEANS_ON_NOTHING;
    if (!image || image->backing || !(none || (sync == MIRROR_SYNC_MODE_TOP && node_backing(start->node)))) {
        return 0;
    }
    if (!image->driver->backing || !image->driver->change_backing) {
        error_set(err, -ENOTSUP,
                  "Sync mode '%s' leaves to an image below '%s' what it does not copy, but driver '%s' has none",
                  mirror_sync_mode_name(sync), image->name, image->driver->name);
        error_hint(err, "Use sync=full, or a target whose format has backing files");
        return -ENOTSUP;
    }
    if (image->detect_zeroes_unmap) {
        return error_set(err, -EINVAL,
                         "Node '%s' makes holes of zeroes (detect-zeroes=unmap), through which the image "
                         "that it will lean on would show",
                         image->name);
    }
    start->lean = none ? MIRROR_LEANS_ON_NODE : MIRROR_LEANS_BELOW;
    struct backing_name name;
    int result = relink_name(image, none ? start->node : node_backing(start->node), NULL, false, &name, err);
    if (result == 0) {
        backing_name_clear(&name);
    }
    return result;
}

/* Without a target (a dry run of drive-mirror) the rest is looked at. */
static int check_nodes(struct graph *graph, struct mirror_start *start, struct error **err)
{
    const struct blockdev_mirror *args = start->args;
    int result = check_place(start->node, err);
    if (result < 0 || !start->image) {
        return result < 0 ? result : check_replaces(graph, start, err);
    }
    if (start->image == start->node) {
        return error_set(err, -EINVAL, "Can't mirror node into itself");
    }
    if (atomic_load(&start->node->size) != atomic_load(&start->image->size)) {
        return error_set(err, -EINVAL, "Source and target image have different sizes");
    }
    result = check_place(start->image, err);
    if (result == 0) {
        result = check_replaces(graph, start, err);
    }
    if (result == 0 && args->replaces && node_is_above(start->target, start->node)) {
        result = error_set(err, -EINVAL, "Node '%s' leans on '%s', and cannot take its place there", args->target,
                           args->device);
    }
    return result;
}

static int coroutine_fn start_plan(struct action *action, struct error **err)
{
    struct mirror_start *start = action->state;
    const struct blockdev_mirror *args = start->args;
    struct node *device = find_node(action->graph, args->device, err);
    if (!device) {
        return -ENODEV;
    }
    start->target = start->drive ? start->made : find_node(action->graph, args->target, err);
    if (!start->target && !start->drive) {
        return -ENODEV;
    }
    start->node = node_beneath_filters(device);
    start->image = start->target ? node_beneath_filters(start->target) : NULL;
    int result = check_numbers(args, err);
    if (result == 0) {
        result = find_bitmap(start, err);
    }
    if (result == 0) {
        result = check_nodes(action->graph, start, err);
    }
    if (result == 0) {
        result = find_lean(start, err);
    }
    if (result == 0 && args->filter_node_name) {
        result = graph_check_name(action->graph, args->filter_node_name, err);
    }
    if (result == 0) {
        result = job_check_id(start->jobs, start_id(start), err);
    }
    if (result == 0) {
        action_drain(action, start->node);
        if (start->image) {
            action_drain(action, start->image);
        }
    }
    return result;
}

static struct operation_config start_config(const struct mirror_start *start, struct job **job)
{
    return (struct operation_config){
        .kind = "job",
        .id = start_id(start),
        .table = start->table,
        .bound = {[CLAIM_NODE] = start->node, [CLAIM_TARGET] = start->target},
        .conditions = (start->args->replaces ? CLAIM_IF_REPLACE : 0) | (start->lean ? CLAIM_IF_SHALLOW : 0),
        .progress = job_percent,
        .argument = job,
    };
}

/* --- beginning --- */

static struct mirror *mirror_create(const struct action *action, const struct mirror_start *start)
{
    const struct blockdev_mirror *args = start->args;
    struct mirror *mirror = g_new0(struct mirror, 1);
    mirror->graph = action->graph;
    mirror->target = node_ref(start->target);
    mirror->image = node_ref(start->image);
    mirror->sync = args->sync;
    mirror->bitmap_mode = args->has_bitmap_mode ? args->bitmap_mode : BITMAP_SYNC_MODE_ON_SUCCESS;
    mirror->lean = start->lean;
    mirror->replace = args->replaces;
    mirror->keep_backing = args->keep_backing;
    mirror->backing_file = g_strdup(args->backing_file);
    mirror->size = atomic_load(&start->node->size);
    if (mirror->replace) {
        overlays_init(&mirror->overlays, action->graph, start->node);
    }
    return mirror;
}

/* What the copy may not write in part: see 2. above. */
static uint64_t start_unit(const struct mirror_start *start)
{
    return start->lean ? max_u64(start->image->limits.cluster_size, 1) : 1;
}

static uint64_t start_granularity(const struct mirror_start *start)
{
    uint64_t asked = (uint64_t)start->args->granularity;
    uint64_t usual = max_u64(GRANULARITY_LEAST, start->image->limits.cluster_size);
    return max_u64(asked ? asked : usual, start_unit(start));
}

static int begin_dirty(struct mirror *mirror, const struct mirror_start *start, struct error **err)
{
    int result = dirty_create(mirror->size, start_granularity(start), &mirror->dirty);
    if (result < 0) {
        return error_set_errno(err, result, "Cannot track the writes to node '%s'", start->node->name);
    }
    if (start->bitmap) {
        uint64_t offset, bytes;
        for (uint64_t at = 0; bitmap_next(start->bitmap, at, &offset, &bytes); at = offset + bytes) {
            dirty_mark(mirror->dirty, offset, bytes);
        }
        mirror->bitmap = start->bitmap;
        bitmap_busy_begin(start->bitmap);
    }
    return 0;
}

static int coroutine_fn begin_writing(struct mirror *mirror, const struct mirror_start *start, struct error **err)
{
    int result = node_writable_begin_locked(mirror->image, err);
    mirror->image_writable = result == 0;
    if (result == 0 && mirror->replace) {
        result = overlays_open_locked(&mirror->overlays, mirror_check_overlay, mirror, err);
    }
    return result;
}

static void begin_job(struct mirror *mirror, const struct mirror_start *start)
{
    const struct blockdev_mirror *args = start->args;
    struct job_config config = {
        .id = start_id(start),
        .speed = args->speed,
        .on_source_error = args->has_on_source_error ? args->on_source_error : BLOCKDEV_ON_ERROR_REPORT,
        .on_target_error = args->has_on_target_error ? args->on_target_error : BLOCKDEV_ON_ERROR_REPORT,
        .auto_finalize = !args->has_auto_finalize || args->auto_finalize,
        .auto_dismiss = !args->has_auto_dismiss || args->auto_dismiss,
        .group = start->group,
    };
    mirror->job = job_create(start->jobs, &mirror_policy, &config);
    mirror->job->state = mirror;
}

static void begin_copy(struct mirror *mirror, const struct mirror_start *start)
{
    const struct blockdev_mirror *args = start->args;
    bool pin = mirror->lean || start->keeps_zeroes;
    uint64_t unit = start_unit(start);
    uint64_t memory = args->buf_size ? max_u64((uint64_t)args->buf_size, 64 * KiB) : 0;
    struct copy_config config = {
        .control = &mirror->job->control,
        .source = mirror->source,
        .target = mirror->destination,
        .target_edge = mirror->filter->target,
        .alignment = unit,
        .zero_alignment = max_u64(GRANULARITY_LEAST, mirror->image->limits.cluster_size),
        .pin_zeroes = pin,
        .piece = memory ? align_down(min_u64(memory, COPY_PIECE), 64 * KiB) : 0,
        .memory = memory,
        .extent = mirror_extent,
        .failed = job_failed,
        .argument = mirror->job,
    };
    mirror->copy = copy_create(&config);
    struct track_sides sides = {.busy = copy_busy(mirror->copy), .unit = unit, .pin_zeroes = pin};
    track_set_sides(mirror->filter, &sides);
}

static void begin_converging(struct mirror *mirror, const struct blockdev_mirror *args)
{
    int64_t after = args->has_switch_after ? args->switch_after : CONVERGE_AFTER_SECONDS;
    mirror->converge = (struct converge){
        .job = mirror->job,
        .copy = mirror->copy,
        .dirty = mirror->dirty,
        .filter = mirror->filter,
        .rule = {.both = args->copy_mode == MIRROR_COPY_MODE_WRITE_BLOCKING,
                 .after_ns = after * SECOND_NS,
                 .ratio = args->has_switch_ratio ? (unsigned)args->switch_ratio : CONVERGE_RATIO},
    };
    converge_begin(&mirror->converge);
}

static int coroutine_fn begin_filter(struct mirror *mirror, const struct mirror_start *start, struct error **err)
{
    const char *id = start_id(start), *command = start->table->operation;
    g_autofree char *made_name = g_strdup_printf("#mirror-%s", id);
    g_autofree char *owner = g_strdup_printf("%s %s", command, id);
    g_autofree char *opened_for = g_strdup_printf("filter of %s", owner);
    const char *name = start->args->filter_node_name ? start->args->filter_node_name : made_name;
    int result = graph_create_node(mirror->graph, &driver_track, name, opened_for, &mirror->filter, err);
    if (result == 0) {
        track_set_dirty(mirror->filter, mirror->dirty);
        result = graph_attach_target_locked(mirror->operation, mirror->filter, mirror->target, err);
    }
    if (result < 0) {
        return result;
    }
    mirror->source = backend_create(mirror->graph, owner);
    mirror->destination = backend_create(mirror->graph, owner);
    begin_job(mirror, start);
    begin_copy(mirror, start);
    begin_converging(mirror, start->args);
    result = graph_insert_filter_locked(mirror->graph, mirror->operation, mirror->filter, start->node, err);
    mirror->filter_inserted = result == 0;
    if (result == 0 && mirror->sync == MIRROR_SYNC_MODE_FULL) {
        graph_filter_follow(mirror->filter, mirror->operation, CLAIM_NODE);
    }
    return result;
}

static int coroutine_fn begin_backends(struct mirror *mirror, const struct mirror_start *start, struct error **err)
{
    unsigned granted = operation_granted(mirror->operation, start->node) & ACCESS_READ_DATA;
    int result = backend_attach_locked(mirror->source, mirror->filter, granted, err);
    if (result == 0) {
        granted = operation_granted(mirror->operation, start->target);
        result = backend_attach_locked(mirror->destination, start->target, granted, err);
    }
    return result;
}

static void coroutine_fn start_take_back(struct mirror_start *start)
{
    struct mirror *mirror = g_steal_pointer(&start->mirror);
    struct job *job = mirror->job;
    mirror_destroy_locked(mirror);
    if (job) {
        job->state = NULL;
        job_discard(job);
    }
}

static int coroutine_fn start_apply(struct action *action, struct error **err)
{
    struct mirror_start *start = action->state;
    struct mirror *mirror = start->mirror = mirror_create(action, start);
    struct operation_config config = start_config(start, &mirror->job);
    int result = operation_begin(action->graph, &config, &mirror->operation, err);
    if (result == 0) {
        result = begin_writing(mirror, start, err);
    }
    if (result == 0) {
        result = begin_dirty(mirror, start, err);
    }
    if (result == 0) {
        result = begin_filter(mirror, start, err);
    }
    if (result == 0) {
        result = begin_backends(mirror, start, err);
    }
    if (result < 0) {
        start_take_back(start);
    }
    return result;
}

static void coroutine_fn start_revert(struct action *action)
{
    start_take_back(action->state);
}

static void coroutine_fn start_commit(struct action *action)
{
    struct mirror_start *start = action->state;
    struct mirror *mirror = g_steal_pointer(&start->mirror);
    job_start(mirror->job);
}

static void coroutine_fn start_clean(struct action *action)
{
    struct mirror_start *start = action->state;
    node_release(start->made);
    g_free(start);
}

static int coroutine_fn start_preview(struct action *action, json_t **ret_claims, struct error **err)
{
    struct mirror_start *start = action->state;
    struct job *none = NULL;
    struct operation_config config = start_config(start, &none);
    int result = operation_preview(action->graph, &config, ret_claims, err);
    return result < 0 || !start->image ? result : node_writable_check(start->image, err);
}

static const struct action_kind blockdev_mirror_kind = {
    .name = "blockdev-mirror",
    .plan = start_plan,
    .apply = start_apply,
    .revert = start_revert,
    .commit = start_commit,
    .clean = start_clean,
    .preview = start_preview,
};

void mirror_action(struct action *ret, struct jobs *jobs, const struct blockdev_mirror *args, struct job_group *group)
{
    struct mirror_start *start = g_new0(struct mirror_start, 1);
    *start = (struct mirror_start){.jobs = jobs, .args = args, .group = group, .table = &blockdev_mirror_claims};
    *ret = (struct action){.kind = &blockdev_mirror_kind, .state = start};
}

/* --- drive-mirror: the target is a file --- */

/* Before a file is touched: is there anything to be said against it? The claims are taken for a moment, so a refusal
 * leaves what stands there alone, and joins the queue if the command may wait. */
static int coroutine_fn drive_check(struct action *action, struct error **err)
{
    struct mirror_start seen = *(struct mirror_start *)action->state;
    struct action dry = {.graph = action->graph, .state = &seen, .touched = g_ptr_array_new()};
    graph_lock(action->graph);
    int result = start_plan(&dry, err);
    if (result == 0) {
        struct job *none = NULL;
        struct operation_config config = start_config(&seen, &none);
        struct operation *operation;
        result = operation_begin(action->graph, &config, &operation, err);
        if (result == 0) {
            operation_end_locked(operation);
        }
    }
    graph_unlock(action->graph);
    for (guint i = 0; i < dry.touched->len; i++) {
        node_release(dry.touched->pdata[i]); /* others have references too */
    }
    g_ptr_array_unref(dry.touched);
    bool exists = seen.drive->has_mode && seen.drive->mode == NEW_IMAGE_MODE_EXISTING;
    bool partial = seen.drive->sync == MIRROR_SYNC_MODE_INCREMENTAL || seen.drive->sync == MIRROR_SYNC_MODE_BITMAP;
    if (result == 0 && partial && !exists) {
        return error_set(err, -EINVAL,
                         "A new image would hold nothing but what bitmap '%s' says: sync modes 'incremental' and "
                         "'bitmap' go with mode 'existing'",
                         seen.drive->bitmap);
    }
    if (result == 0 && !seen.drive->format && exists) {
        return error_set(err, -EINVAL, "The format of '%s' must be given: formats are not guessed", seen.drive->target);
    }
    return result;
}

static int coroutine_fn drive_prepare(struct action *action, struct error **err)
{
    struct mirror_start *start = action->state;
    const struct drive_mirror *drive = start->drive;
    int result = drive_check(action, err);
    if (result < 0) {
        return result;
    }
    const struct node *node = node_beneath_filters(graph_find(action->graph, drive->device));
    struct new_image wanted = {
        .filename = drive->target,
        .format = drive->format,
        .node_name = drive->node_name,
        .mode = drive->has_mode ? drive->mode : NEW_IMAGE_MODE_ABSOLUTE_PATHS,
    };
    return new_image_open_copy(action->graph, node, drive->sync, &wanted, &start->made, err);
}

static const struct action_kind drive_mirror_kind = {
    .name = "drive-mirror",
    .prepare = drive_prepare,
    .plan = start_plan,
    .apply = start_apply,
    .revert = start_revert,
    .commit = start_commit,
    .clean = start_clean,
    .preview = start_preview,
};

/* The same options, but for those of the new image. */
static struct blockdev_mirror drive_options(const struct drive_mirror *drive)
{
    return (struct blockdev_mirror){
        .job_id = drive->job_id,
        .device = drive->device,
        .target = drive->target,
        .replaces = drive->replaces,
        .sync = drive->sync,
        .bitmap = drive->bitmap,
        .has_bitmap_mode = drive->has_bitmap_mode,
        .bitmap_mode = drive->bitmap_mode,
        .has_speed = drive->has_speed,
        .speed = drive->speed,
        .has_granularity = drive->has_granularity,
        .granularity = drive->granularity,
        .has_buf_size = drive->has_buf_size,
        .buf_size = drive->buf_size,
        .has_on_source_error = drive->has_on_source_error,
        .on_source_error = drive->on_source_error,
        .has_on_target_error = drive->has_on_target_error,
        .on_target_error = drive->on_target_error,
        .has_copy_mode = drive->has_copy_mode,
        .copy_mode = drive->copy_mode,
        .has_switch_after = drive->has_switch_after,
        .switch_after = drive->switch_after,
        .has_switch_ratio = drive->has_switch_ratio,
        .switch_ratio = drive->switch_ratio,
        .backing_file = drive->backing_file,
        .has_keep_backing = drive->has_keep_backing,
        .keep_backing = drive->keep_backing,
        .has_auto_finalize = drive->has_auto_finalize,
        .auto_finalize = drive->auto_finalize,
        .has_auto_dismiss = drive->has_auto_dismiss,
        .auto_dismiss = drive->auto_dismiss,
    };
}

void drive_mirror_action(struct action *ret, struct jobs *jobs, const struct drive_mirror *args,
                         struct job_group *group)
{
    struct mirror_start *start = g_new0(struct mirror_start, 1);
    *start = (struct mirror_start){.jobs = jobs,
                                   .drive = args,
                                   .drive_as_node = drive_options(args),
                                   .group = group,
                                   .keeps_zeroes = args->has_unmap && !args->unmap,
                                   .table = &drive_mirror_claims};
    start->args = &start->drive_as_node;
    *ret = (struct action){.kind = &drive_mirror_kind, .state = start};
}

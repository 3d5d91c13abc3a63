/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Commands on dirty bitmaps, cut into the steps of an action. What a bitmap is and what may be done with it is
 * bitmap.c's; this file finds the bitmaps that arguments name, and takes changes back.
 *
 * 1. A bitmap is named by its node and its name, and looked up in plan: so an action finds what those before it in the
 *    same run have made.
 * 2. Everything is done in apply, under the drain, and taken back by revert: nobody has written between, so what a
 *    bitmap was before is what it is again. Images may have been told of the change (marked in use, a bitmap removed):
 *    that is stored again with the bitmap.
 * 3. The node is referenced from plan to clean; the bitmap is only used while the graph's lock is held.
 */
#include "block/bitmap_action.h"
#include "block/bitmap.h"
#include <errno.h>
#include <glib.h>

struct bitmap_step {
    const void *args;
    struct node *node;     /* a reference, or NULL */
    struct bitmap *bitmap; /* the one that is changed, or NULL */
    struct bitmap_before before;
    struct list *place; /* where it was in its list */
    bool was_enabled, was_changed;
};

static int step_find_node(struct action *action, const char *name, struct error **err)
{
    struct bitmap_step *step = action->state;
    struct node *node = graph_find(action->graph, name);
    if (!node) {
        return error_set(err, -ENODEV, "Node '%s' not found", name);
    }
    step->node = node_ref(node);
    action_drain(action, node);
    return 0;
}

static int step_find(struct action *action, const char *node, const char *name, struct error **err)
{
    struct bitmap_step *step = action->state;
    int code = step_find_node(action, node, err);
    if (code == 0) {
        step->bitmap = bitmap_find_or_error(step->node, name, err);
        code = step->bitmap ? 0 : -ENOENT;
    }
    return code;
}

static int coroutine_fn plan_named(struct action *action, struct error **err)
{
    const struct bitmap_step *step = action->state;
    const struct block_dirty_bitmap *args = step->args;
    return step_find(action, args->node, args->name, err);
}

static void coroutine_fn step_clean(struct action *action)
{
    struct bitmap_step *step = action->state;
    bitmap_change_done(&step->before);
    if (step->node) {
        node_release(step->node);
    }
    g_free(step);
    action->state = NULL;
}

static void step_create(struct action *ret, const struct action_kind *kind, const void *args)
{
    struct bitmap_step *step = g_new0(struct bitmap_step, 1);
    step->args = args;
    *ret = (struct action){.kind = kind, .state = step};
}

/* --- block-dirty-bitmap-add --- */

static int coroutine_fn add_plan(struct action *action, struct error **err)
{
    const struct bitmap_step *step = action->state;
    const struct block_dirty_bitmap_add *args = step->args;
    if (!graph_find(action->graph, args->node)) {
        return error_set(err, -ENODEV, "Cannot find device='%s' nor node-name='%s'", args->node, args->node);
    }
    return step_find_node(action, args->node, err);
}

static int coroutine_fn add_apply(struct action *action, struct error **err)
{
    struct bitmap_step *step = action->state;
    const struct block_dirty_bitmap_add *args = step->args;
    struct bitmap_config config = {.name = args->name,
                                   .granularity = args->has_granularity ? (uint64_t)args->granularity : 0,
                                   .persistent = args->persistent,
                                   .disabled = args->disabled};
    if (args->has_granularity && args->granularity == 0) {
        return error_set(err, -EINVAL, "Granularity must be power of 2 and at least %u", BITMAP_GRANULARITY_MIN);
    }
    return bitmap_add(step->node, &config, &step->bitmap, err);
}

static void coroutine_fn add_revert(struct action *action)
{
    struct bitmap_step *step = action->state;
    auto_error error = NULL;
    if (bitmap_remove(step->bitmap, &error) < 0) { /* the image has it, if it became read-only meanwhile */
        g_warning("Bitmap '%s' stays: %s", step->bitmap->name, error->message);
    }
}

void bitmap_add_action(struct action *ret, const struct block_dirty_bitmap_add *args)
{
    static const struct action_kind kind = {.name = "block-dirty-bitmap-add",
                                            .plan = add_plan,
                                            .apply = add_apply,
                                            .revert = add_revert,
                                            .clean = step_clean};
    step_create(ret, &kind, args);
}

/* --- block-dirty-bitmap-remove --- */

static int coroutine_fn remove_apply(struct action *action, struct error **err)
{
    struct bitmap_step *step = action->state;
    return bitmap_remove_begin(step->bitmap, &step->place, err);
}

static void coroutine_fn remove_revert(struct action *action)
{
    struct bitmap_step *step = action->state;
    bitmap_remove_undo(step->bitmap, step->place);
}

static void coroutine_fn remove_commit(struct action *action)
{
    struct bitmap_step *step = action->state;
    bitmap_forget(g_steal_pointer(&step->bitmap));
}

void bitmap_remove_action(struct action *ret, const struct block_dirty_bitmap *args)
{
    static const struct action_kind kind = {.name = "block-dirty-bitmap-remove",
                                            .plan = plan_named,
                                            .apply = remove_apply,
                                            .revert = remove_revert,
                                            .commit = remove_commit,
                                            .clean = step_clean};
    step_create(ret, &kind, args);
}

/* --- block-dirty-bitmap-clear --- */

static int coroutine_fn clear_apply(struct action *action, struct error **err)
{
    struct bitmap_step *step = action->state;
    return bitmap_change_begin(step->bitmap, BITMAP_EMPTIED, &step->before, err);
}

static void coroutine_fn content_revert(struct action *action)
{
    struct bitmap_step *step = action->state;
    bitmap_change_undo(step->bitmap, &step->before);
}

void bitmap_clear_action(struct action *ret, const struct block_dirty_bitmap *args)
{
    static const struct action_kind kind = {.name = "block-dirty-bitmap-clear",
                                            .plan = plan_named,
                                            .apply = clear_apply,
                                            .revert = content_revert,
                                            .clean = step_clean};
    step_create(ret, &kind, args);
}

/* --- block-dirty-bitmap-enable, -disable --- */

static int coroutine_fn switch_apply(struct action *action, bool enabled, struct error **err)
{
    struct bitmap_step *step = action->state;
    step->was_enabled = step->bitmap->enabled;
    step->was_changed = step->bitmap->changed;
    return bitmap_set_enabled(step->bitmap, enabled, err);
}

static int coroutine_fn enable_apply(struct action *action, struct error **err)
{
    return switch_apply(action, true, err);
}

static int coroutine_fn disable_apply(struct action *action, struct error **err)
{
    return switch_apply(action, false, err);
}

static void coroutine_fn switch_revert(struct action *action)
{
    struct bitmap_step *step = action->state;
    step->bitmap->enabled = step->was_enabled;
    /* Where the image was told, it has to be told again; where it is read-only nothing was. */
    step->bitmap->changed = step->was_changed || (step->bitmap->persistent && step->node->writable);
}

void bitmap_enable_action(struct action *ret, const struct block_dirty_bitmap *args)
{
    static const struct action_kind kind = {.name = "block-dirty-bitmap-enable",
                                            .plan = plan_named,
                                            .apply = enable_apply,
                                            .revert = switch_revert,
                                            .clean = step_clean};
    step_create(ret, &kind, args);
}

void bitmap_disable_action(struct action *ret, const struct block_dirty_bitmap *args)
{
    static const struct action_kind kind = {.name = "block-dirty-bitmap-disable",
                                            .plan = plan_named,
                                            .apply = disable_apply,
                                            .revert = switch_revert,
                                            .clean = step_clean};
    step_create(ret, &kind, args);
}

/* --- block-dirty-bitmap-merge --- */

/* The bitmap that one member of `bitmaps` names. */
static struct bitmap *find_source(struct action *action, const struct block_dirty_bitmap_or_str *source,
                                  struct error **err)
{
    struct bitmap_step *step = action->state;
    if (source->kind == BLOCK_DIRTY_BITMAP_OR_STR_LOCAL) {
        return bitmap_find_or_error(step->node, source->u.local, err);
    }
    const struct block_dirty_bitmap *external = source->u.external;
    struct node *node = graph_find(action->graph, external->node);
    if (!node) {
        error_set(err, -ENODEV, "Node '%s' not found", external->node);
        return NULL;
    }
    return bitmap_find_or_error(node, external->name, err);
}

static int coroutine_fn merge_plan(struct action *action, struct error **err)
{
    const struct bitmap_step *step = action->state;
    const struct block_dirty_bitmap_merge *args = step->args;
    int code = step_find(action, args->node, args->target, err);
    for (size_t i = 0; i < args->bitmaps.count && code == 0; i++) {
        const struct bitmap *source = find_source(action, args->bitmaps.items[i], err);
        code = source ? 0 : -ENOENT;
        if (source) {
            action_drain(action, source->node);
        }
    }
    return code;
}

static int coroutine_fn merge_apply(struct action *action, struct error **err)
{
    struct bitmap_step *step = action->state;
    const struct block_dirty_bitmap_merge *args = step->args;
    int code = bitmap_change_begin(step->bitmap, BITMAP_COPIED, &step->before, err);
    for (size_t i = 0; i < args->bitmaps.count && code == 0; i++) {
        code = bitmap_merge(step->bitmap, find_source(action, args->bitmaps.items[i], NULL), err);
    }
    if (code < 0) {
        bitmap_change_undo(step->bitmap, &step->before);
    }
    return code;
}

void bitmap_merge_action(struct action *ret, const struct block_dirty_bitmap_merge *args)
{
    static const struct action_kind kind = {.name = "block-dirty-bitmap-merge",
                                            .plan = merge_plan,
                                            .apply = merge_apply,
                                            .revert = content_revert,
                                            .clean = step_clean};
    step_create(ret, &kind, args);
}

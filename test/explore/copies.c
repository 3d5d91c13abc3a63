/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The moves that have a target of their own: mirror, replace, backup, snapshot. Each has an empty image for that from
 * the beginning on, which nobody else uses; what a good end means:
 *
 *   backup N    the target shows what N showed at one moment while the command ran
 *   mirror N    the target shows what N showed at one moment between the request to end and the end; or, when it was
 *               asked to complete, the users of N use the target, which shows what N showed, and N stays as it was
 *   replace N   the same, and what leant on N leans on the target; which leans on nothing, or, where it was given
 *               a part of what N shows, on what N leans on, or on N
 *   snapshot N  the target leans on N; who used N, or leant on it, uses the target, and N stays as it was
 *
 * 1. What a target shows before a good end is nobody's business; that it is a whole image is.
 * 2. All that a target shows at a good end is on stable storage by then.
 * 3. A mirror that follows its users to another image when that takes its node's place (actor->subject) mirrors that.
 */
#include "test/explore/copies.h"
#include "block/action.h"
#include "block/graph.h"
#include "job/backup.h"
#include "job/mirror.h"
#include "job/resize.h"
#include "job/snapshot.h"
#include "test/explore/world.h"
#include <string.h>

#define GRANULARITY_MIN 512

/* --- targets --- */

/* As long as the node is now; else the command would have to be refused for its size. */
static void coroutine_fn fit_target(struct actor *actor)
{
    struct world *world = actor->world;
    struct node *node = world_node(world, actor->move->upper), *target = world_node(world, actor->target);
    int64_t size = node ? (int64_t)atomic_load(&node->size) : 0;
    if (node && target && size != (int64_t)atomic_load(&target->size)) {
        struct block_resize_args args = {.node_name = (char *)target->name, .size = size};
        resize_node(world->graph, &args, NULL);
    }
}

static char *node_name_of(const struct actor *actor)
{
    return (char *)actor->world->pictures[actor->move->upper].name;
}

static char *target_name_of(const struct actor *actor)
{
    return (char *)actor->world->pictures[actor->target].name;
}

static void set_view(struct picture *picture, struct view *view)
{
    view_unref(picture->view);
    picture->view = view;
}

/* The target is no more nobody's; and what a failed resize has left open of the image is as open of its copy. */
static void begin_with_target(struct actor *actor)
{
    struct picture *image = &actor->world->pictures[actor->move->upper];
    struct picture *target = &actor->world->pictures[actor->target];
    target->idle = false;
    target->may_grow |= image->may_grow;
    if (image->may_shrink) {
        target->shrinks_to = target->may_shrink ? MIN(target->shrinks_to, image->shrinks_to) : image->shrinks_to;
        target->may_shrink = true;
    }
}

/* Mirrors of `image` go over to what takes its place; also one that has itself come to its end since. */
static void follow_successor(const struct actor *done, int image, int successor)
{
    struct world *world = done->world;
    for (unsigned i = 0; i < world->actor_count; i++) {
        struct actor *actor = &world->actors[i];
        const struct operation *operation = actor->subject == image && actor != done ? world_operation(actor) : NULL;
        bool later = actor->subject == image && actor->moved_at > done->moved_at && !actor->settled &&
                     actor->sync == MIRROR_SYNC_MODE_FULL; /* others stay with their image */
        if (later || (operation && operation->bound[CLAIM_NODE] == world_node(world, successor))) {
            actor->subject = successor;
        }
    }
}

/* Nobody would put an overlay over an image that is longer; growing it stores zeroes, which hide what the image has. */
static int coroutine_fn target_fits(struct action *action, struct error **err)
{
    const struct actor *actor = action->state;
    const struct node *node = world_node(actor->world, actor->move->upper);
    const struct node *target = world_node(actor->world, actor->target);
    if (node && target && atomic_load(&target->size) < atomic_load(&node->size)) {
        return error_set(err, -EINVAL, "Node '%s' is longer than '%s'", node->name, target->name);
    }
    return 0;
}

/* An action in front of the move's own and one behind it tell the model when it happens: nobody else changes the graph
 * in between. */
static int coroutine_fn come_first(struct action *action, struct error **err)
{
    struct actor *actor = action->state;
    world_catch_up(actor->world);
    actor->since = view_clock();
    return 0;
}

static void coroutine_fn come_last(struct action *action)
{
    struct actor *actor = action->state;
    actor->move->kind->on_begin(actor);
}

static int coroutine_fn run_action(struct actor *actor, const struct action *action, struct error **err)
{
    static const struct action_kind first = {.name = "first", .plan = come_first};
    static const struct action_kind last = {.name = "last", .plan = target_fits, .commit = come_last};
    struct action actions[] = {{.kind = &first, .state = actor}, *action, {.kind = &last, .state = actor}};
    return actions_run(actor->world->graph, actions, G_N_ELEMENTS(actions), err);
}

/* What leans on `image`, and is open, leans on `to`. Who has closed since may have been told, or not: both are whole.
 */
static void relink_overlays(struct world *world, int image, int to)
{
    for (int i = 0; i < (int)world->picture_count; i++) {
        struct picture *picture = &world->pictures[i];
        if (i != to && !picture->stale && picture->below == image) {
            if (world_node(world, i)) {
                world_link(world, i, to);
            }
            picture->named = world_node(world, i) ? to : ANY_IMAGE;
        }
    }
}

/* From a moment since `actor->since` on the users of `image` use the target. */
static void move_users(struct actor *actor, int image)
{
    struct world *world = actor->world;
    struct picture *left = &world->pictures[image];
    set_view(&world->pictures[actor->target], view_ref(left->view));
    set_view(left, view_freeze(left->view, actor->since, false));
}

/* --- mirror and replace --- */

/* Sometimes less than all, where the target will lean on the rest in the end. That asks for more claims, so not where
 * the rules themselves are on trial. */
static enum mirror_sync_mode draw_sync(const struct actor *actor)
{
    struct world *world = actor->world;
    unsigned luck = (unsigned)world_below(world, 100);
    if (actor->stays || luck < 70 || world->schedule->mode == MODE_VERDICT || world_in_turn(world)) {
        return MIRROR_SYNC_MODE_FULL;
    }
    return luck < 88 ? MIRROR_SYNC_MODE_TOP : MIRROR_SYNC_MODE_NONE;
}

static int coroutine_fn mirror_start_of(struct actor *actor, bool replaces, struct error **err)
{
    struct world *world = actor->world;
    actor->sync = draw_sync(actor);
    struct blockdev_mirror args = {
        .job_id = actor->id,
        .device = node_name_of(actor),
        .target = target_name_of(actor),
        .replaces = replaces ? node_name_of(actor) : NULL,
        .sync = actor->sync,
        .has_speed = true,
        .speed = world_speed(world),
        .has_granularity = true,
        .granularity = world_chance(world, 20) ? 0 : GRANULARITY_MIN << world_below(world, 4),
        .has_buf_size = true,
        .buf_size = world_chance(world, 50) ? 0 : (int64_t)world->cluster,
        .has_copy_mode = true,
        .copy_mode = world_chance(world, 50) ? MIRROR_COPY_MODE_BACKGROUND : MIRROR_COPY_MODE_WRITE_BLOCKING,
        .has_switch_after = true,
        .switch_after = 1,
        .has_switch_ratio = true,
        .switch_ratio = 1 + (int64_t)world_below(world, 60), /* clients are faster than many a mirror */
        .has_auto_finalize = true,
    };
    struct action action;
    fit_target(actor);
    mirror_action(&action, world->jobs, &args, NULL);
    return run_action(actor, &action, err);
}

void mirror_on_begin(struct actor *actor)
{
    begin_with_target(actor);
    actor->subject = actor->move->upper;
}

int coroutine_fn mirror_begin(struct actor *actor, struct error **err)
{
    actor->stays = world_chance(actor->world, 70);
    return mirror_start_of(actor, false, err);
}

int coroutine_fn replace_begin(struct actor *actor, struct error **err)
{
    return mirror_start_of(actor, true, err);
}

void mirror_done(struct actor *actor)
{
    struct world *world = actor->world;
    struct picture *target = &world->pictures[actor->target];
    int image = actor->subject, below = NO_IMAGE;
    if (actor->settled) {
        return;
    }
    actor->settled = true;
    while (world->pictures[image].stale) {
        image = world->pictures[image].moved_to;
    }
    if (actor->stays) {
        set_view(target, view_freeze(world->pictures[image].view, actor->since, true));
        return;
    }
    move_users(actor, image);
    if (actor->sync != MIRROR_SYNC_MODE_FULL) {
        below = actor->sync == MIRROR_SYNC_MODE_NONE ? image : world->pictures[image].below;
    }
    while (below != NO_IMAGE && world->pictures[below].stale) { /* the image closed before the model saw it relinked */
        below = world->pictures[below].moved_to;
    }
    world_link(world, actor->target, below);
    target->named = below;
    if (actor->move->kind->replaces) {
        relink_overlays(world, image, actor->target);
    }
    follow_successor(actor, image, actor->target);
}

bool mirror_moved(const struct actor *actor)
{
    return actor->verdict == VERDICT_ADMITTED && actor->asked && !actor->stays && !actor->aborts &&
           !world_operation(actor);
}

/* --- backup --- */

int coroutine_fn backup_begin(struct actor *actor, struct error **err)
{
    struct world *world = actor->world;
    struct blockdev_backup_options args = {
        .job_id = actor->id,
        .device = node_name_of(actor),
        .target = target_name_of(actor),
        .sync = MIRROR_SYNC_MODE_FULL,
        .has_speed = true,
        .speed = world_speed(world),
        .has_on_cbw_error = true,
        .on_cbw_error = world_chance(world, 50) ? ON_CBW_ERROR_BREAK_GUEST_WRITE : ON_CBW_ERROR_BREAK_SNAPSHOT,
        .has_auto_finalize = true,
    };
    struct action action;
    fit_target(actor);
    blockdev_backup_action(&action, world->jobs, NULL, &args);
    return run_action(actor, &action, err);
}

void backup_on_begin(struct actor *actor)
{
    struct world *world = actor->world;
    begin_with_target(actor);
    actor->moment = view_freeze(world->pictures[actor->move->upper].view, actor->since, true);
}

void backup_done(struct actor *actor)
{
    set_view(&actor->world->pictures[actor->target], view_ref(actor->moment));
}

/* --- snapshot --- */

int coroutine_fn snapshot_begin(struct actor *actor, struct error **err)
{
    struct blockdev_snapshot args = {.node = node_name_of(actor), .overlay = target_name_of(actor)};
    struct action action;
    snapshot_action(&action, &args);
    return run_action(actor, &action, err);
}

void snapshot_on_begin(struct actor *actor)
{
    struct world *world = actor->world;
    int image = actor->move->upper;
    begin_with_target(actor);
    move_users(actor, image);
    /* N may have got another size since the overlay was made as long. */
    view_resize(world->pictures[actor->target].view, atomic_load(&world_node(world, actor->target)->size));
    world_link(world, actor->target, image); /* first: the chain above is not cut, not even for a moment */
    relink_overlays(world, image, actor->target);
    world->pictures[actor->target].named = image;
}

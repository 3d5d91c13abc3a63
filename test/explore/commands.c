/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The moves that are over when their command is: resize, shrink, cbf, bitmap-add. Each runs the function behind its
 * command, and tells the model what has become of the image; the table of all moves is in moves.c.
 *
 * 1. What a command needs to know of its image it finds out when it begins: another move may have changed it.
 */
#include "test/explore/commands.h"
#include "block/bitmap.h"
#include "block/bitmap_action.h"
#include "block/graph.h"
#include "job/change_backing.h"
#include "job/resize.h"
#include "test/explore/world.h"
#include <errno.h>

#define SECTOR 512

/* --- sizes and names --- */

static int coroutine_fn resize_begin(struct actor *actor, int64_t size, struct error **err)
{
    actor->size = (uint64_t)size;
    struct picture *picture = &actor->world->pictures[actor->move->upper];
    struct block_resize_args args = {.node_name = (char *)picture->name, .size = size};
    return resize_node(actor->world->graph, &args, err);
}

static int64_t size_now(struct actor *actor)
{
    struct node *node = world_node(actor->world, actor->move->upper);
    return node ? (int64_t)atomic_load(&node->size) : 0;
}

int coroutine_fn grow_begin(struct actor *actor, struct error **err)
{
    actor->world->pictures[actor->move->upper].may_grow = true;
    return resize_begin(actor, (size_now(actor) / SECTOR + 2) * SECTOR, err);
}

int coroutine_fn shrink_begin(struct actor *actor, struct error **err)
{
    struct picture *picture = &actor->world->pictures[actor->move->upper];
    struct picture before = *picture;
    int64_t size = (size_now(actor) / SECTOR - 1) * SECTOR;
    world_forget_above(actor->world, actor->move->upper);
    picture->may_shrink = true;
    picture->shrinks_to = (uint64_t)size;
    int code = resize_begin(actor, size, err);
    if (code == -EBUSY) {
        picture->may_shrink = before.may_shrink;
        picture->shrinks_to = before.shrinks_to;
    }
    return code;
}

void resize_done(struct actor *actor)
{
    struct picture *picture = &actor->world->pictures[actor->move->upper];
    if (!picture->stale) {
        view_resize(picture->view, actor->size);
    }
}

/* The name is chosen for what the image leans on at this moment. */
int coroutine_fn change_backing_begin(struct actor *actor, struct error **err)
{
    struct world *world = actor->world;
    const struct picture *picture = &world->pictures[actor->move->upper];
    struct node *node = world_node(world, actor->move->upper), *below = node ? node_backing(node) : NULL;
    g_autofree char *name = g_strdup_printf("/%s.img", below ? below->name : "nothing");
    struct change_backing_file_args args = {
        .device = (char *)picture->name, .image_node_name = (char *)picture->name, .backing_file = name};
    return change_backing_file(world->graph, &args, err);
}

/* --- bitmaps --- */

int coroutine_fn bitmap_add_begin(struct actor *actor, struct error **err)
{
    struct world *world = actor->world;
    struct picture *picture = &world->pictures[actor->move->upper];
    struct block_dirty_bitmap_add args = {.node = (char *)picture->name,
                                          .name = actor->id,
                                          .has_granularity = true,
                                          .granularity = SECTOR << world_below(world, 4)};
    struct action action;
    bitmap_add_action(&action, &args);
    int code = actions_run(world->graph, &action, 1, err);
    if (code == 0) {
        world_catch_up(world);
        actor->moment = view_ref(picture->view);
        actor->since = view_clock();
    }
    return code;
}

static bool is_marked(const struct bitmap *bitmap, const struct view_write *write)
{
    uint64_t at = write->offset, end = write->offset + write->bytes, offset, bytes;
    while (at < end && bitmap_next(bitmap, at, &offset, &bytes) && offset <= at) {
        at = offset + bytes;
    }
    return at >= end;
}

void bitmap_add_check(struct actor *actor)
{
    struct world *world = actor->world;
    const struct picture *picture = &world->pictures[actor->move->upper];
    struct node *node = world_node(world, actor->move->upper);
    if (!node || picture->stale || picture->view != actor->moment) {
        return; /* what is written to the view goes elsewhere by now */
    }
    const struct bitmap *bitmap = bitmap_find(node, actor->id);
    if (!bitmap) {
        world_violation(world, "%s: there is no bitmap any more", actor->move->name);
    }
    for (guint i = 0; i < picture->view->writes->len; i++) {
        const struct view_write *write = picture->view->writes->pdata[i];
        if (write->begun > actor->since && write->acknowledged && !is_marked(bitmap, write)) {
            world_violation(world, "%s: a write of %u bytes at %#x is not marked", actor->move->name,
                            (unsigned)write->bytes, (unsigned)write->offset);
        }
    }
}

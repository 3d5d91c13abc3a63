/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What must be true at the end. The same question is asked three times, each time by other code: does every image that
 * is not stale show what the model says it shows?
 *
 *   check_graph     of the running graph, through a client of each node, which must be admitted now
 *   check_disks     of the bytes on the disks, by the explorer's own reader (image.c); the stale images are gone
 *   check_reopened  of the files, by the real drivers in a graph of its own
 *
 * After a power cut only the last two can be asked, and only what was flushed must be there.
 */
#include "test/explore/checks.h"
#include "block/graph.h"
#include "block/operation.h"
#include "block/user.h"
#include "schema/claims.h"
#include "test/explore/image.h"
#include "test/explore/world.h"
#include <string.h>

/* Nobody promises anything of these any more. */
static bool is_promised(const struct world *world, int image)
{
    return !world->pictures[image].stale && !world->pictures[image].forgotten && !world->pictures[image].idle;
}

/* Compares all of an image with its picture. `where` is for the message. */
static void compare(struct world *world, const struct picture *picture, const char *where, const unsigned char *shown,
                    uint64_t size, bool flushed_only)
{
    const struct view *view = picture->view;
    struct view_look look = view_look_now();
    uint64_t bytes = MIN(size, view->size);
    look.flushed_only = flushed_only;
    if (view->unknown) {
        return;
    }
    if (picture->may_shrink) {
        bytes = MIN(bytes, picture->shrinks_to);
    }
    if ((size < view->size && !picture->may_shrink) || (size > view->size && !picture->may_grow)) {
        world_violation(world, "image %s %s has %u bytes instead of %u", picture->name, where, (unsigned)size,
                        (unsigned)view->size);
    }
    g_autofree char *difference = view_compare(view, &look, 0, bytes, shown);
    if (!difference && view->until) {
        difference = view_compare_moment(view, &look, bytes, shown);
    }
    if (difference) {
        world_violation(world, "image %s %s: %s", picture->name, where, difference);
    }
    for (uint64_t at = view->size; at < size; at++) {
        if (shown[at]) {
            world_violation(world, "image %s %s: byte %#x behind the old end is not zero", picture->name, where,
                            (unsigned)at);
        }
    }
}

/* Reads all that the node shows, as a client. */
static void coroutine_fn look_through(struct world *world, const struct picture *picture, struct graph *graph,
                                      struct node *node, const char *where, bool flushed_only)
{
    struct operation_config config = {
        .kind = "export", .id = "check", .table = &block_export_add_claims, .bound = {[CLAIM_NODE] = node}};
    struct operation *operation;
    auto_error error = NULL;
    if (operation_begin(graph, &config, &operation, &error) < 0) {
        world_violation(world, "image %s %s cannot be read: %s", picture->name, where, error->message);
    }
    struct backend *backend = backend_create(graph, "check");
    int code = backend_attach(backend, node, operation_granted(operation, node), &error);
    uint64_t size = code == 0 ? backend_size(backend) : 0;
    g_autofree unsigned char *shown = g_malloc0(size + 1);
    struct iovec iov = {shown, size};
    code = code == 0 && size ? backend_read(backend, 0, size, buffers_one(&iov), 0) : code;
    if (code < 0) {
        world_violation(world, "image %s %s cannot be read: %s", picture->name, where, g_strerror(-code));
    }
    compare(world, picture, where, shown, size, flushed_only);
    backend_destroy(backend);
    operation_end(operation);
}

/* --- the running graph --- */

static void check_link(struct world *world, const struct picture *picture, struct node *node)
{
    struct node *below = node_backing(node);
    const char *wanted = picture->below == NO_IMAGE ? NULL : world->pictures[picture->below].name;
    if (g_strcmp0(below ? below->name : NULL, wanted) != 0) {
        world_violation(world, "node %s leans on %s instead of %s", picture->name, below ? below->name : "nothing",
                        wanted ? wanted : "nothing");
    }
}

void coroutine_fn check_graph(struct world *world)
{
    for (unsigned i = 0; i < world->picture_count; i++) {
        const struct picture *picture = &world->pictures[i];
        struct node *node = world_node(world, (int)i);
        if (!is_promised(world, (int)i) || !node) {
            continue;
        }
        check_link(world, picture, node);
        look_through(world, picture, world->graph, node, "in the graph", world_has_faults(world));
    }
    for (unsigned i = 0; i < world->actor_count; i++) {
        struct actor *actor = &world->actors[i];
        if (actor->end == ACTOR_DONE && actor->move->kind->check) {
            actor->move->kind->check(actor);
        }
    }
}

/* --- the disks --- */

static void check_header(struct world *world, const struct picture *picture)
{
    g_autofree char *path = NULL;
    image_backing(world->sim, picture->path, &path);
    const char *wanted = picture->named < 0 ? NULL : world->pictures[picture->named].path;
    if (picture->named != ANY_IMAGE && g_strcmp0(path, wanted) != 0) {
        world_violation(world, "the header of image %s names %s instead of %s", picture->name, path ? path : "nothing",
                        wanted ? wanted : "nothing");
    }
}

void check_disks(struct world *world, const struct disk_rules *rules)
{
    for (unsigned i = 0; i < world->picture_count; i++) {
        if (world->pictures[i].stale) {
            sim_disk_remove(world->sim, world->pictures[i].path);
        }
    }
    for (unsigned i = 0; i < world->picture_count; i++) {
        const struct picture *picture = &world->pictures[i];
        if (!is_promised(world, (int)i)) {
            continue;
        }
        uint64_t size;
        g_autofree char *problem = image_check(world->sim, picture->path, rules->exact);
        g_autofree unsigned char *shown = problem ? NULL : image_show(world->sim, picture->path, &size, &problem);
        if (!shown) {
            world_violation(world, "image %s on disk is not whole: %s", picture->name, problem);
        }
        if (rules->links) {
            check_header(world, picture);
        }
        compare(world, picture, "on disk", shown, size, rules->flushed_only);
    }
}

/* --- the drivers, from the files --- */

static struct node *coroutine_fn open_from_file(struct world *world, struct graph *graph, const struct picture *picture)
{
    json_t *json = json_pack("{s:s, s:s, s:b, s:{s:s, s:s}}", "driver", "qcow2", "node-name", picture->name,
                             "read-only", 1, "file", "driver", "file", "filename", picture->path);
    struct blockdev_options *options = NULL;
    struct node *node = NULL;
    auto_error error = NULL;
    int code = blockdev_options_from_json(json, "", &options, &error);
    code = code == 0 ? graph_add(graph, options, &node, &error) : code;
    json_decref(json);
    blockdev_options_free(options);
    if (code < 0) {
        world_violation(world, "image %s does not open from its file: %s", picture->name, error->message);
    }
    return node;
}

void coroutine_fn check_reopened(struct world *world, const struct disk_rules *rules)
{
    for (unsigned i = 0; i < world->picture_count; i++) {
        const struct picture *picture = &world->pictures[i];
        if (!is_promised(world, (int)i)) {
            continue;
        }
        struct graph *graph = graph_create();
        struct node *node = open_from_file(world, graph, picture);
        look_through(world, picture, graph, node, "opened from its file", rules->flushed_only);
        graph_delete_all(graph);
        graph_destroy(graph);
    }
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What is recorded: one row for each kind of thing that changes an image. Each is a few dozen operations of a guest
 * with the kind's own operation among them.
 */
#include "test/crash/workloads.h"
#include "block/bitmap.h"
#include "block/driver.h"

static void draw_discards(struct scene *scene)
{
    scene->discards = true;
}

static void coroutine_fn run_writes(struct scene *scene)
{
    scene_guest(scene, 4, 12);
}

static void draw_compressed(struct scene *scene)
{
    scene->compressed = true;
    scene->traits.data_file = false; /* the format has no compressed clusters there */
}

static void coroutine_fn run_resize(struct scene *scene)
{
    for (unsigned i = 0; i < 4; i++) {
        uint64_t sectors = scene->sectors_max / 4 + scene_below(scene, scene->sectors_max * 3 / 4);
        scene_guest(scene, 2, 5);
        scene_resize(scene, sectors);
    }
    scene_guest(scene, 2, 4);
}

/* The middle image goes down while the guest writes at the top. */
static void coroutine_fn run_commit(struct scene *scene)
{
    scene_guest_start(scene, 2, 8);
    scene_commit(scene, "{\"device\": \"l2\", \"job-id\": \"job\", \"top-node\": \"l1\", \"base-node\": \"l0\"}");
    scene_guest_wait(scene);
    scene_guest(scene, 2, 3);
}

/* The image that the guest writes goes down, and the guest with it. */
static void coroutine_fn run_active_commit(struct scene *scene)
{
    struct view *base = scene_add_view(scene, layer_path(0), NULL, scene->promise);
    base->group = scene->views[0].group;
    scene_guest_follows(scene);
    scene_guest_start(scene, 2, 8);
    scene_commit(scene, "{\"device\": \"l1\", \"job-id\": \"job\", \"base-node\": \"l0\"}");
    scene->views[0].until = scene_point(scene);
    scene_guest_wait(scene);
    scene_guest(scene, 2, 3);
}

static void coroutine_fn run_stream(struct scene *scene)
{
    scene_guest_start(scene, 2, 8);
    if (scene_chance(scene, 50)) {
        scene_stream(scene, "{\"device\": \"l2\", \"job-id\": \"job\"}");
    } else {
        scene_stream(scene, "{\"device\": \"l2\", \"job-id\": \"job\", \"base-node\": \"l0\"}");
    }
    scene_guest_wait(scene);
    scene_guest(scene, 2, 3);
}

static void draw_mirror(struct scene *scene)
{
    scene->target = true;
}

/* What the target has, and what it leans on afterwards, is drawn. g_free() */
static char *mirror_text(struct scene *scene, bool leans, const char *more)
{
    static const char *const syncs[] = {"top", "none", "full"};
    const char *sync = syncs[scene_below(scene, leans ? 2 : 3)];
    const char *mode = scene_chance(scene, 50) ? "background" : "write-blocking";
    return g_strdup_printf("{\"device\": \"l1\", \"job-id\": \"job\", \"target\": \"l%u\", \"sync\": \"%s\", "
                           "\"copy-mode\": \"%s\"%s}",
                           scene->layers, sync, mode, more);
}

/* Another image comes in the place of the middle one. */
static void coroutine_fn run_mirror(struct scene *scene)
{
    g_autofree char *text = mirror_text(scene, false, ", \"replaces\": \"l1\"");
    scene_guest_start(scene, 2, 8);
    scene_mirror(scene, text);
    scene_guest_wait(scene);
    scene_guest(scene, 2, 3);
}

/* It does not come to that, or only just. */
static void coroutine_fn run_mirror_failing(struct scene *scene)
{
    g_autofree char *text = mirror_text(scene, true, ", \"replaces\": \"l1\"");
    unsigned layer = scene_chance(scene, 70) ? 2 : 3;
    scene_guest_start(scene, 2, 6);
    scene_mirror_failing(scene, text, layer_path(layer), (unsigned)scene_below(scene, 5));
    scene_guest(scene, 2, 3);
}

/* The guest goes to the copy of its image. */
static void coroutine_fn run_mirror_top(struct scene *scene)
{
    struct view *target = scene_add_view(scene, layer_path(2), NULL, scene->promise);
    g_autofree char *text = mirror_text(scene, false, "");
    target->group = scene->views[0].group;
    scene_guest_follows(scene);
    scene_guest_start(scene, 2, 8);
    scene_mirror(scene, text);
    scene->views[0].until = scene_point(scene);
    scene_guest_wait(scene);
    scene_guest(scene, 2, 3);
}

/* --- the image at rest --- */

static void draw_snapshots(struct scene *scene)
{
    scene->traits.data_file = false;
    scene->traits.refcount_bits = MAX(scene->traits.refcount_bits, 4);
}

static void coroutine_fn take_snapshot(struct scene *scene, const char *name)
{
    struct snapshot_info info = {.id = "", .name = (char *)name, .date_sec = 1};
    struct error *error = NULL;
    struct node *node = scene_rest_begin(scene);
    scene_must(node->driver->image->snapshot_create(node, &info, &error), error, "taking a snapshot");
    scene_all_stable(scene);
    scene_add_view(scene, layer_path(0), name, promise_freeze(scene->promise));
    scene_rest_end(scene);
}

static void coroutine_fn drop_snapshot(struct scene *scene, struct view *view)
{
    struct error *error = NULL;
    struct node *node = scene_rest_begin(scene);
    view->until = scene_point(scene);
    scene_must(node->driver->image->snapshot_delete(node, view->snapshot, &error), error, "deleting a snapshot");
    scene_rest_end(scene);
}

static void coroutine_fn apply_snapshot(struct scene *scene, const struct view *view)
{
    struct error *error = NULL;
    struct node *node = scene_rest_begin(scene);
    unsigned change = promise_become(scene->promise, scene_point(scene), view->promise);
    scene_must(node->driver->image->snapshot_apply(node, view->snapshot, &error), error, "applying a snapshot");
    promise_become_done(scene->promise, change);
    scene_all_stable(scene);
    scene_rest_end(scene);
}

static void coroutine_fn run_snapshots(struct scene *scene)
{
    static const char *const names[] = {"a", "b", "c", "d"};
    for (unsigned i = 0; i < G_N_ELEMENTS(names); i++) {
        scene_guest(scene, 2, 4);
        take_snapshot(scene, names[i]);
        struct view *some = &scene->views[1 + scene_below(scene, scene->view_count - 1)];
        if (some->until == UINT64_MAX && scene_chance(scene, 50)) {
            scene_guest(scene, 2, 2);
            apply_snapshot(scene, some);
        }
        if (some->until == UINT64_MAX && scene_chance(scene, 40)) {
            drop_snapshot(scene, some);
        }
    }
    scene_guest(scene, 2, 4);
}

static void draw_bitmaps(struct scene *scene)
{
    scene->traits.version2 = false;
}

/* Commands on "other" while both are there, between writes; what "watched" says stays true. */
static void coroutine_fn change_bitmaps(struct scene *scene)
{
    for (unsigned i = 0; i < 3; i++) {
        struct error *error = NULL;
        struct node *node = scene_rest_begin(scene);
        struct bitmap *other = bitmap_find(node, "other");
        switch (scene_below(scene, 4)) {
        case 0:
            scene_must(bitmap_clear(other, &error), error, "clearing a bitmap");
            break;
        case 1:
            scene_must(bitmap_merge(other, bitmap_find(node, "watched"), &error), error, "merging bitmaps");
            break;
        case 2:
            scene_must(bitmap_set_enabled(other, !other->enabled, &error), error, "switching a bitmap");
            break;
        default:
            scene_must(bitmaps_store(node, &error), error, "storing bitmaps");
        }
        scene_rest_end(scene);
        scene_guest(scene, 1, 2);
    }
}

static void coroutine_fn run_bitmaps(struct scene *scene)
{
    struct bitmap_config config = {.name = "watched", .granularity = 512u << scene_below(scene, 8), .persistent = true};
    struct bitmap_config other = {.name = "other", .persistent = true};
    struct error *error = NULL;
    struct bitmap *bitmap;
    scene_guest(scene, 2, 3);
    struct node *node = scene_rest_begin(scene);
    scene_must(bitmap_add(node, &config, &bitmap, &error), error, "adding a bitmap");
    scene_must(bitmaps_store(node, &error), error, "storing bitmaps");
    scene->bitmap = (struct watched_bitmap){"watched", promise_freeze(scene->promise), scene_point(scene), UINT64_MAX};
    scene_rest_end(scene);
    scene_guest(scene, 2, 4);
    node = scene_rest_begin(scene);
    scene_must(bitmap_add(node, &other, &bitmap, &error), error, "adding a bitmap");
    scene_must(bitmaps_store(node, &error), error, "storing bitmaps");
    scene_rest_end(scene);
    scene_guest(scene, 2, 4);
    change_bitmaps(scene);
    if (scene_chance(scene, 50)) {
        node = scene_rest_begin(scene);
        scene_must(bitmap_remove(bitmap_find(node, "other"), &error), error, "removing a bitmap");
        scene_rest_end(scene);
        scene_guest(scene, 2, 2);
    }
    if (scene_chance(scene, 30)) {
        node = scene_rest_begin(scene);
        scene->bitmap.until = scene_point(scene);
        scene_must(bitmap_remove(bitmap_find(node, "watched"), &error), error, "removing a bitmap");
        scene_rest_end(scene);
        scene_guest(scene, 1, 2);
    }
}

static void draw_repair(struct scene *scene)
{
    scene->traits.data_file = scene->traits.lazy = false;
    scene->damaged = true;
}

/* What is damaged are refcounts and flags only, so that all content is there to be kept. */
static void coroutine_fn run_repair(struct scene *scene)
{
    struct error *error = NULL;
    scene_must(scene_check(scene->graph, scene, layer_path(0), IMAGE_FIX_ALL, &(struct image_check){0}, &error), error,
               "repairing");
}

static void draw_amend(struct scene *scene)
{
    scene->traits.version2 = scene->traits.extended_l2 = scene->traits.data_file = scene->traits.lazy = false;
}

static void coroutine_fn run_amend(struct scene *scene)
{
    for (unsigned i = 0; i < 2; i++) {
        struct blockdev_create_options options = {.driver = BLOCKDEV_DRIVER_QCOW2};
        struct image_amendment amendment = {.options = &options};
        struct error *error = NULL;
        options.u.qcow2.has_refcount_bits = true;
        options.u.qcow2.refcount_bits = 1 << scene_below(scene, 7);
        scene_guest(scene, 2, 4);
        struct node *node = scene_rest_begin(scene);
        scene_must(node->driver->image->amend(node, &amendment, NULL, &error), error, "amending");
        scene_rest_end(scene);
    }
    scene_guest(scene, 2, 4);
}

const struct workload workloads[] = {
    {"writes", 1, NULL, run_writes},
    {"overlay", 2, NULL, run_writes},
    {"discards", 1, draw_discards, run_writes},
    {"compressed", 1, draw_compressed, run_writes},
    {"resize", 1, NULL, run_resize},
    {"commit", 3, NULL, run_commit},
    {"active-commit", 2, NULL, run_active_commit},
    {"stream", 3, NULL, run_stream},
    {"mirror", 3, draw_mirror, run_mirror},
    {"mirror-failing", 3, draw_mirror, run_mirror_failing},
    {"mirror-top", 2, draw_mirror, run_mirror_top},
    {"snapshots", 1, draw_snapshots, run_snapshots},
    {"bitmaps", 1, draw_bitmaps, run_bitmaps},
    {"repair", 1, draw_repair, run_repair},
    {"amend", 1, draw_amend, run_amend},
};
const unsigned workload_count = G_N_ELEMENTS(workloads);

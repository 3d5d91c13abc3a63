/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The persistent dirty bitmaps of a converted image. They are copied after the data, so that the copying itself is not
 * recorded: each is made disabled, merged from its origin, and records from then on if that does.
 *
 * What a bitmap is, is src/block/bitmap.c's; this file decides which ones go along, and says so.
 */
#include "tool/img/convert_bitmaps.h"
#include "block/bitmap.h"
#include "block/driver.h"
#include "block/graph.h"
#include "tool/img/img.h"
#include <errno.h>
#include <glib.h>

static bool keeps_bitmaps(const struct node *node)
{
    return node->driver->image && node->driver->image->bitmap_may_add;
}

int convert_bitmaps_check(const struct node *from, bool skip_broken, struct error **err)
{
    if (!keeps_bitmaps(from)) {
        return error_set(err, -ENOTSUP, "Source lacks bitmap support");
    }
    list_for_each (link, &from->bitmaps) {
        const struct bitmap *bitmap = container_of(link, struct bitmap, link);
        if (bitmap->persistent && bitmap_is_inconsistent(bitmap) && !skip_broken) {
            error_set(err, -EINVAL, "Cannot copy inconsistent bitmap '%s'", bitmap->name);
            error_hint(err, "Try --skip-broken-bitmaps, or use 'bitmap --remove' to delete it");
            return -EINVAL;
        }
    }
    return 0;
}

static int coroutine_fn copy_one(struct bitmap *bitmap, struct node *to, struct error **err)
{
    struct bitmap_config config = {
        .name = bitmap->name, .granularity = bitmap->granularity, .persistent = true, .disabled = true};
    struct bitmap *made = NULL;
    int result = bitmap_add(to, &config, &made, err);
    if (result == 0) {
        result = bitmap_merge(made, bitmap, err);
    }
    if (result == 0 && bitmap->enabled) {
        result = bitmap_set_enabled(made, true, err);
    }
    if (result < 0) {
        error_prepend(err, "Failed to copy bitmap '%s'", bitmap->name);
    }
    return result;
}

int coroutine_fn convert_bitmaps_copy(struct graph *graph, struct node *from, struct node *to, struct error **err)
{
    struct node *const touched[] = {from, to};
    struct drain drain;
    int result = 0;
    if (!keeps_bitmaps(to)) {
        return error_set(err, -ENOTSUP, "Format driver '%s' does not support bitmaps", to->driver->name);
    }
    graph_lock(graph);
    graph_drain_begin(graph, touched, G_N_ELEMENTS(touched), NULL, &drain);
    list_for_each (link, &from->bitmaps) {
        struct bitmap *bitmap = container_of(link, struct bitmap, link);
        if (!bitmap->persistent || result < 0) {
            continue;
        }
        if (bitmap_is_inconsistent(bitmap)) {
            img_warn("Skipping inconsistent bitmap '%s'", bitmap->name);
        } else {
            result = copy_one(bitmap, to, err);
        }
    }
    if (result == 0) {
        result = bitmaps_store(to, err);
    }
    graph_drain_end(&drain);
    graph_unlock(graph);
    return result;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Handlers of the commands on dirty bitmaps: block-dirty-bitmap-add, -remove, -clear, -enable, -disable, -merge and
 * x-debug-block-dirty-bitmap-sha256. Each runs in a coroutine on the control loop and is called by the generated
 * dispatcher only. It keeps no state: a change is a run of one action (src/block/bitmap_action.c), which finds what the
 * arguments name, and decides; the commands claim nothing.
 *
 * The digest is computed from a copy of the bits, after the lock was given back.
 */
#include "block/bitmap.h"
#include "block/bitmap_action.h"
#include "block/dirty.h"
#include "control/control.h"
#include "crypto/hash.h"
#include "schema/commands.h"
#include <errno.h>
#include <glib.h>

int coroutine_fn command_block_dirty_bitmap_add(struct control *control, struct block_dirty_bitmap_add *args,
                                                struct error **err)
{
    struct action action;
    bitmap_add_action(&action, args);
    return actions_run(control->graph, &action, 1, err);
}

int coroutine_fn command_block_dirty_bitmap_remove(struct control *control, struct block_dirty_bitmap *args,
                                                   struct error **err)
{
    struct action action;
    bitmap_remove_action(&action, args);
    return actions_run(control->graph, &action, 1, err);
}

int coroutine_fn command_block_dirty_bitmap_clear(struct control *control, struct block_dirty_bitmap *args,
                                                  struct error **err)
{
    struct action action;
    bitmap_clear_action(&action, args);
    return actions_run(control->graph, &action, 1, err);
}

int coroutine_fn command_block_dirty_bitmap_enable(struct control *control, struct block_dirty_bitmap *args,
                                                   struct error **err)
{
    struct action action;
    bitmap_enable_action(&action, args);
    return actions_run(control->graph, &action, 1, err);
}

int coroutine_fn command_block_dirty_bitmap_disable(struct control *control, struct block_dirty_bitmap *args,
                                                    struct error **err)
{
    struct action action;
    bitmap_disable_action(&action, args);
    return actions_run(control->graph, &action, 1, err);
}

int coroutine_fn command_block_dirty_bitmap_merge(struct control *control, struct block_dirty_bitmap_merge *args,
                                                  struct error **err)
{
    struct action action;
    bitmap_merge_action(&action, args);
    return actions_run(control->graph, &action, 1, err);
}

/* The bits in whole words, as the digest wants them; *ret: g_free(). */
static int save_bits(const struct bitmap *bitmap, uint8_t **ret, size_t *ret_bytes, struct error **err)
{
    uint64_t words = (dirty_saved_bytes(bitmap->dirty) + 7) / 8;
    *ret_bytes = words * 8;
    *ret = g_try_malloc(words ? words * 8 : 1);
    if (!*ret) {
        return error_set(err, -ENOMEM, "No memory for bitmap '%s'", bitmap->name);
    }
    dirty_save(bitmap->dirty, 0, words * 8, *ret);
    return 0;
}

int coroutine_fn command_x_debug_block_dirty_bitmap_sha256(struct control *control, struct block_dirty_bitmap *args,
                                                           struct block_dirty_bitmap_sha256 **ret, struct error **err)
{
    struct bitmap *bitmap = NULL;
    g_autofree uint8_t *bits = NULL;
    size_t bytes = 0;
    int code = -ENODEV;
    graph_lock(control->graph);
    const struct node *node = graph_find(control->graph, args->node);
    if (!node) {
        error_set(err, code, "Node '%s' not found", args->node);
    } else {
        bitmap = bitmap_find_or_error(node, args->name, err);
        code = bitmap ? bitmap_check(bitmap, BITMAP_ALLOW_BUSY | BITMAP_ALLOW_READ_ONLY, err) : -ENOENT;
    }
    if (code == 0) {
        code = save_bits(bitmap, &bits, &bytes, err);
    }
    graph_unlock(control->graph);
    if (code == 0) {
        uint8_t digest[HASH_BYTES_MAX];
        GString *text = g_string_new(NULL);
        hash_digest(HASH_SHA256, bits, bytes, NULL, 0, digest);
        for (unsigned i = 0; i < hash_bytes(HASH_SHA256); i++) {
            g_string_append_printf(text, "%02x", digest[i]);
        }
        *ret = g_new0(struct block_dirty_bitmap_sha256, 1);
        (*ret)->sha256 = g_string_free(text, FALSE);
    }
    return code;
}

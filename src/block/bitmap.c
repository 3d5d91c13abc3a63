/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Named dirty bitmaps of nodes. Owns the list node->bitmaps, what may be done with a bitmap when, and the recording.
 *
 * 1. The list, and the members of a bitmap but for its bits, change only while the node is drained. So requests read
 *    them without a lock, and a node without bitmaps costs a request one comparison.
 * 2. A region is marked after the request that changed it has ended, whether it failed or not. Who reads it must clear
 *    the mark before reading.
 * 3. The bits cover the node's size. Where a write behind the end has moved it (protocol nodes), what is new counts as
 *    dirty for those that record, until bitmap_catch_up() gives it bits.
 * 4. Before a persistent bitmap changes by a command its driver is asked (bitmap_change), so that no crash leaves an
 *    older state in the image that looks right. Changes by requests are the driver's own affair: it sees them.
 * 5. Without content (`dirty` NULL) a bitmap is inconsistent: it can be removed, and nothing else.
 *
 * How bits are kept in an image is the format's; which user may do what with a node is decided by its claims.
 */
#include "block/bitmap.h"
#include "base/size.h"
#include "block/dirty.h"
#include "block/driver.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

static uint64_t node_bytes(const struct node *node)
{
    return atomic_load_explicit(&node->size, memory_order_acquire);
}

/* What can be done with the bitmaps of its image; NULL: it keeps none. */
static const struct image_driver *keeper(const struct node *node)
{
    const struct image_driver *image = node->driver->image;
    return image && image->bitmaps_store ? image : NULL;
}

struct bitmap *bitmap_find(const struct node *node, const char *name)
{
    list_for_each (link, &node->bitmaps) {
        struct bitmap *bitmap = container_of(link, struct bitmap, link);
        if (g_str_equal(bitmap->name, name)) {
            return bitmap;
        }
    }
    return NULL;
}

struct bitmap *bitmap_find_or_error(const struct node *node, const char *name, struct error **err)
{
    struct bitmap *bitmap = bitmap_find(node, name);
    if (!bitmap) {
        error_set(err, -ENOENT, "Dirty bitmap '%s' not found", name);
    }
    return bitmap;
}

int bitmap_check(const struct bitmap *bitmap, unsigned allow, struct error **err)
{
    if (bitmap->busy && !(allow & BITMAP_ALLOW_BUSY)) {
        return error_set(err, -EBUSY, "Bitmap '%s' is currently in use by another operation and cannot be used",
                         bitmap->name);
    }
    if (bitmap->persistent && !bitmap->node->writable && !(allow & BITMAP_ALLOW_READ_ONLY)) {
        return error_set(err, -EROFS, "Bitmap '%s' is readonly and cannot be modified", bitmap->name);
    }
    if (bitmap_is_inconsistent(bitmap) && !(allow & BITMAP_ALLOW_INCONSISTENT)) {
        error_set(err, -EINVAL, "Bitmap '%s' is inconsistent and cannot be used", bitmap->name);
        error_hint(err, "Try block-dirty-bitmap-remove to delete this bitmap from disk");
        return -EINVAL;
    }
    return 0;
}

void bitmap_busy_begin(struct bitmap *bitmap)
{
    bitmap->busy++;
}

void bitmap_busy_end(struct bitmap *bitmap)
{
    g_assert(bitmap->busy > 0);
    bitmap->busy--;
}

/* --- making and freeing --- */

static struct bitmap *bitmap_create(struct node *node, const char *name, uint64_t granularity)
{
    struct bitmap *bitmap = g_new0(struct bitmap, 1);
    bitmap->node = node;
    bitmap->name = g_strdup(name);
    bitmap->granularity = granularity;
    list_init(&bitmap->link);
    return bitmap;
}

void bitmap_forget(struct bitmap *bitmap)
{
    g_assert(!bitmap->busy && !bitmap->resize && !bitmap->since);
    list_remove(&bitmap->link);
    dirty_destroy(bitmap->dirty);
    g_free(bitmap->name);
    g_free(bitmap);
}

void bitmaps_destroy(struct node *node)
{
    list_for_each_safe (link, &node->bitmaps) {
        bitmap_forget(container_of(link, struct bitmap, link));
    }
}

uint64_t bitmap_default_granularity(const struct node *node)
{
    uint64_t cluster = node->limits.cluster_size;
    return cluster ? min_u64(max_u64(cluster, 4 * KiB), 64 * KiB) : 64 * KiB;
}

static int check_new(const struct node *node, const char *name, uint64_t granularity, struct error **err)
{
    if (!*name) {
        return error_set(err, -EINVAL, "Bitmap name cannot be empty");
    }
    if (strlen(name) > BITMAP_NAME_MAX) {
        return error_set(err, -EINVAL, "Bitmap name is longer than %d bytes", BITMAP_NAME_MAX);
    }
    if (!is_power_of_two(granularity) || granularity < BITMAP_GRANULARITY_MIN || granularity > BITMAP_GRANULARITY_MAX) {
        return error_set(err, -EINVAL, "Granularity must be power of 2 and at least %u", BITMAP_GRANULARITY_MIN);
    }
    return bitmap_find(node, name) ? error_set(err, -EEXIST, "Bitmap already exists: %s", name) : 0;
}

static int check_persistent(struct node *node, const char *name, uint64_t granularity, struct error **err)
{
    const struct image_driver *image = keeper(node);
    if (!image) {
        return error_set(err, -ENOTSUP, "Can't store persistent bitmaps to %s: its format '%s' has none", node->name,
                         node->driver->name);
    }
    if (!node->writable) {
        return error_set(err, -EROFS, "Can't make bitmap '%s' persistent: node '%s' is read-only", name, node->name);
    }
    int code = image->bitmap_may_add(node, name, granularity, err);
    if (code < 0) {
        error_prepend(err, "Can't make bitmap '%s' persistent in '%s'", name, node->name);
    }
    return code;
}

int coroutine_fn bitmap_add(struct node *node, const struct bitmap_config *config, struct bitmap **ret,
                            struct error **err)
{
    uint64_t granularity = config->granularity ? config->granularity : bitmap_default_granularity(node);
    int code = check_new(node, config->name, granularity, err);
    if (code == 0 && config->persistent) {
        code = check_persistent(node, config->name, granularity, err);
    }
    if (code < 0) {
        return code;
    }
    struct bitmap *bitmap = bitmap_create(node, config->name, granularity);
    code = dirty_create(node_bytes(node), granularity, &bitmap->dirty);
    if (code < 0) {
        error_set_errno(err, code, "No memory for bitmap '%s' of node '%s'", config->name, node->name);
        bitmap_forget(bitmap);
        return code;
    }
    bitmap->enabled = !config->disabled;
    bitmap->persistent = bitmap->changed = config->persistent;
    list_append(&node->bitmaps, &bitmap->link);
    if (ret) {
        *ret = bitmap;
    }
    return 0;
}

int bitmap_restore(struct node *node, const char *name, uint64_t granularity, bool enabled, bool inconsistent,
                   struct bitmap **ret)
{
    struct bitmap *bitmap = bitmap_create(node, name, granularity);
    int code = inconsistent ? 0 : dirty_create(node_bytes(node), granularity, &bitmap->dirty);
    bitmap->enabled = enabled;
    bitmap->persistent = true;
    list_append(&node->bitmaps, &bitmap->link);
    *ret = bitmap;
    return code;
}

/* --- changing --- */

/* Gives bits to what a write behind the end has added. */
static int bitmap_catch_up(struct bitmap *bitmap, struct error **err)
{
    uint64_t size = node_bytes(bitmap->node);
    uint64_t had = bitmap->dirty ? dirty_size(bitmap->dirty) : size;
    struct dirty *grown;
    if (had == size) {
        return 0;
    }
    int code = dirty_copy(bitmap->dirty, size, &grown);
    if (code < 0) {
        return error_set_errno(err, code, "No memory for bitmap '%s'", bitmap->name);
    }
    if (bitmap->enabled && size > had) {
        dirty_mark(grown, had, size - had);
    }
    dirty_destroy(bitmap->dirty);
    bitmap->dirty = grown;
    return 0;
}

/* It is about to change by a command. */
static int coroutine_fn bitmap_begin_change(struct bitmap *bitmap, struct error **err)
{
    int code = bitmap_check(bitmap, 0, err);
    if (code == 0) {
        code = bitmap_catch_up(bitmap, err);
    }
    if (code == 0 && bitmap->persistent) {
        code = keeper(bitmap->node)->bitmap_change(bitmap->node, bitmap, err);
        bitmap->changed |= code == 0;
    }
    return code;
}

int coroutine_fn bitmap_split_begin(struct bitmap *bitmap, struct error **err)
{
    int code = bitmap_begin_change(bitmap, err);
    if (code == 0) {
        code = dirty_create(dirty_size(bitmap->dirty), bitmap->granularity, &bitmap->since);
        if (code < 0) {
            error_set_errno(err, code, "No memory for bitmap '%s'", bitmap->name);
        }
    }
    if (code == 0) {
        bitmap_busy_begin(bitmap);
    }
    return code;
}

void bitmap_split_end(struct bitmap *bitmap, bool anew, const struct dirty *left)
{
    if (anew) {
        struct dirty *old = bitmap->dirty;
        bitmap->dirty = g_steal_pointer(&bitmap->since);
        if (left) {
            dirty_merge(bitmap->dirty, left);
        }
        dirty_destroy(old);
        bitmap->changed |= bitmap->persistent;
    }
    dirty_destroy(bitmap->since);
    bitmap->since = NULL;
    bitmap_busy_end(bitmap);
}

int coroutine_fn bitmap_change_begin(struct bitmap *bitmap, enum bitmap_keep keep, struct bitmap_before *ret,
                                     struct error **err)
{
    struct dirty *other = NULL;
    int code = bitmap_begin_change(bitmap, err);
    if (code == 0) {
        code = keep == BITMAP_COPIED ? dirty_copy(bitmap->dirty, node_bytes(bitmap->node), &other)
                                     : dirty_create(node_bytes(bitmap->node), bitmap->granularity, &other);
        if (code < 0) {
            error_set_errno(err, code, "No memory for bitmap '%s'", bitmap->name);
        }
    }
    if (code == 0) {
        ret->dirty = bitmap->dirty;
        bitmap->dirty = other;
    }
    return code;
}

void coroutine_fn bitmap_change_undo(struct bitmap *bitmap, struct bitmap_before *before)
{
    if (before->dirty) {
        auto_error error = NULL;
        /* The image may have stored it meanwhile (it had become read-only). */
        if (bitmap->persistent && bitmap->node->writable &&
            keeper(bitmap->node)->bitmap_change(bitmap->node, bitmap, &error) < 0) {
            g_warning("%s", error->message);
        }
        bitmap->changed |= bitmap->persistent;
        dirty_destroy(bitmap->dirty);
        bitmap->dirty = g_steal_pointer(&before->dirty);
    }
}

void bitmap_change_done(struct bitmap_before *before)
{
    g_clear_pointer(&before->dirty, dirty_destroy);
}

int coroutine_fn bitmap_remove_begin(struct bitmap *bitmap, struct list **ret_place, struct error **err)
{
    int code = bitmap_check(bitmap, BITMAP_ALLOW_INCONSISTENT, err);
    if (code == 0 && bitmap->persistent) {
        code = keeper(bitmap->node)->bitmap_remove(bitmap->node, bitmap, err);
    }
    if (code == 0) {
        *ret_place = bitmap->link.prev;
        list_remove(&bitmap->link);
    }
    return code;
}

void bitmap_remove_undo(struct bitmap *bitmap, struct list *place)
{
    list_prepend(place, &bitmap->link);
    bitmap->changed = bitmap->persistent;
}

int coroutine_fn bitmap_remove(struct bitmap *bitmap, struct error **err)
{
    struct list *place;
    int code = bitmap_remove_begin(bitmap, &place, err);
    if (code == 0) {
        bitmap_forget(bitmap);
    }
    return code;
}

int coroutine_fn bitmap_clear(struct bitmap *bitmap, struct error **err)
{
    int code = bitmap_begin_change(bitmap, err);
    if (code == 0) {
        dirty_clear(bitmap->dirty);
    }
    return code;
}

int coroutine_fn bitmap_set_enabled(struct bitmap *bitmap, bool enabled, struct error **err)
{
    int code = bitmap_check(bitmap, BITMAP_ALLOW_READ_ONLY, err);
    if (code == 0 && (!bitmap->persistent || bitmap->node->writable)) {
        code = bitmap_begin_change(bitmap, err);
    }
    if (code == 0) {
        bitmap->changed |= bitmap->persistent && bitmap->enabled != enabled;
        bitmap->enabled = enabled;
    }
    return code;
}

int coroutine_fn bitmap_merge(struct bitmap *to, struct bitmap *from, struct error **err)
{
    int code = bitmap_check(to, 0, err);
    if (code == 0) {
        code = bitmap_check(from, BITMAP_ALLOW_READ_ONLY, err);
    }
    if (code == 0 && node_bytes(to->node) != node_bytes(from->node)) {
        code = error_set(err, -EINVAL,
                         "Bitmaps are of different sizes (destination size is %" G_GUINT64_FORMAT
                         ", source size is %" G_GUINT64_FORMAT ") and can't be merged",
                         node_bytes(to->node), node_bytes(from->node));
    }
    if (code == 0) {
        code = bitmap_begin_change(to, err);
    }
    if (code == 0) {
        uint64_t offset;
        uint64_t bytes;
        for (uint64_t at = 0; bitmap_next(from, at, &offset, &bytes); at = offset + bytes) {
            dirty_mark(to->dirty, offset, bytes);
        }
    }
    return code;
}

int coroutine_fn bitmaps_store(struct node *node, struct error **err)
{
    return keeper(node) && node->writable ? keeper(node)->bitmaps_store(node, err) : 0;
}

/* --- looking --- */

/* Bytes behind the bits, written by requests that moved the end. */
static uint64_t unseen_tail(const struct bitmap *bitmap)
{
    uint64_t size = node_bytes(bitmap->node);
    uint64_t had = dirty_size(bitmap->dirty);
    return bitmap->enabled && size > had ? size - had : 0;
}

uint64_t bitmap_count(const struct bitmap *bitmap)
{
    return bitmap->dirty ? dirty_bytes(bitmap->dirty) + align_up(unseen_tail(bitmap), bitmap->granularity) : 0;
}

bool bitmap_next_within(const struct bitmap *bitmap, uint64_t from, uint64_t end, uint64_t *ret_offset,
                        uint64_t *ret_bytes)
{
    if (dirty_next_within(bitmap->dirty, from, end, ret_offset, ret_bytes)) {
        return true;
    }
    uint64_t had = dirty_size(bitmap->dirty);
    end = min_u64(end, had + unseen_tail(bitmap));
    *ret_offset = max_u64(from, had);
    *ret_bytes = end > *ret_offset ? end - *ret_offset : 0;
    return *ret_bytes > 0;
}

bool bitmap_next(const struct bitmap *bitmap, uint64_t from, uint64_t *ret_offset, uint64_t *ret_bytes)
{
    return bitmap_next_within(bitmap, from, UINT64_MAX, ret_offset, ret_bytes);
}

static struct block_dirty_info *bitmap_describe(const struct bitmap *bitmap)
{
    struct block_dirty_info *info = g_new0(struct block_dirty_info, 1);
    bool inconsistent = bitmap_is_inconsistent(bitmap);
    *info = (struct block_dirty_info){.name = g_strdup(bitmap->name),
                                      .count = bitmap_count(bitmap),
                                      .granularity = bitmap->granularity,
                                      .recording = bitmap->enabled && !inconsistent,
                                      .busy = bitmap->busy > 0,
                                      .persistent = bitmap->persistent,
                                      .has_inconsistent = inconsistent,
                                      .inconsistent = inconsistent};
    return info;
}

struct block_dirty_info_list *bitmaps_describe(const struct node *node)
{
    struct block_dirty_info_list *list = g_new0(struct block_dirty_info_list, 1);
    for (struct list *link = node->bitmaps.prev; link != &node->bitmaps; link = link->prev) {
        block_dirty_info_list_append(list, bitmap_describe(container_of(link, struct bitmap, link)));
    }
    return list;
}

/* --- for the request path --- */

void bitmaps_record(struct node *node, uint64_t offset, uint64_t bytes)
{
    list_for_each (link, &node->bitmaps) {
        struct bitmap *bitmap = container_of(link, struct bitmap, link);
        if (bitmap->enabled && bitmap->dirty) {
            dirty_mark(bitmap->dirty, offset, bytes);
            if (bitmap->since) {
                dirty_mark(bitmap->since, offset, bytes);
            }
        }
    }
}

/* One that is only split may change its size. */
static int resize_begin(struct bitmap *bitmap, uint64_t size, struct error **err)
{
    unsigned busy = bitmap->since && bitmap->busy == 1 ? BITMAP_ALLOW_BUSY : 0;
    int code = bitmap_check(bitmap, BITMAP_ALLOW_INCONSISTENT | busy, err);
    if (code < 0 || bitmap_is_inconsistent(bitmap)) {
        return code;
    }
    code = bitmap_catch_up(bitmap, err);
    if (code < 0) {
        return code;
    }
    code = dirty_copy(bitmap->dirty, size, &bitmap->resize);
    if (code == 0 && bitmap->since) {
        code = dirty_copy(bitmap->since, size, &bitmap->resize_since);
    }
    if (code < 0) {
        return error_set_errno(err, code, "No memory for bitmap '%s'", bitmap->name);
    }
    if (bitmap->since && bitmap->enabled) { /* what a write behind the end has added */
        uint64_t had = dirty_size(bitmap->since), has = node_bytes(bitmap->node);
        dirty_mark(bitmap->resize_since, had, has > had ? has - had : 0);
    }
    return 0;
}

int bitmaps_resize_begin(struct node *node, uint64_t size, struct error **err)
{
    list_for_each (link, &node->bitmaps) {
        int code = resize_begin(container_of(link, struct bitmap, link), size, err);
        if (code < 0) {
            bitmaps_resize_end(node, false);
            return code;
        }
    }
    return 0;
}

/* *dirty is `resized` from now on, if that was done; else that goes. */
static void resize_take(struct dirty **dirty, struct dirty **resized, bool done)
{
    if (*resized && done) {
        dirty_destroy(*dirty);
        *dirty = *resized;
    } else {
        dirty_destroy(*resized);
    }
    *resized = NULL;
}

void bitmaps_resize_end(struct node *node, bool done)
{
    list_for_each (link, &node->bitmaps) {
        struct bitmap *bitmap = container_of(link, struct bitmap, link);
        if (bitmap->resize && done) {
            bitmap->changed = bitmap->persistent;
        }
        resize_take(&bitmap->dirty, &bitmap->resize, done);
        resize_take(&bitmap->since, &bitmap->resize_since, done);
    }
}

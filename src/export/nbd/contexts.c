/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Metadata contexts: base:allocation for every export, and what its options add, qemu:allocation-depth and
 * qemu:dirty-bitmap:NAME. Owns which bitmaps an export shows, and turns what the block layer says into extents.
 *
 * 1. A bitmap is busy, and its node referenced, from the export's opening until it is closed: nobody removes, clears or
 *    resizes it meanwhile, so sessions read its bits on their own loop, while requests go on marking them.
 * 2. The contexts of an export never change: a client's choice by place stays right.
 * 3. No two have one name; a bitmap that is named twice is one context.
 * 4. Extents that follow each other have different flags, and end with the range at the latest.
 *
 * What clients send to choose is taken apart in handshake.c, what is sent back is put together in request.c.
 */
#include "export/nbd/contexts.h"
#include "base/size.h"
#include "block/bitmap.h"
#include "block/graph.h"
#include "block/user.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

/* How often the backend is asked for one reply. */
#define STATUS_QUESTIONS_MAX 16384

static_assert(NBD_CONTEXTS_MAX % 64 == 0, "a choice has whole words");

/* ---- the export's ---- */

/* A name alone: the first bitmap of that name on the way from the node to the end of its chain. */
static struct bitmap *find_below(struct node *node, const char *name)
{
    struct bitmap *bitmap = NULL;

    while (node && !bitmap) {
        const struct edge *next = node->filtered ? node->filtered : node->backing;

        bitmap = bitmap_find(node, name);
        node = next ? next->child : NULL;
    }
    return bitmap;
}

static struct bitmap *find_named(struct node *node, const char *name, bool writable, struct error **err)
{
    struct bitmap *bitmap = find_below(node, name);

    if (!bitmap) {
        error_set(err, -ENOENT, "Bitmap '%s' is not found", name);
    } else if (bitmap->enabled && node->writable && !writable) {
        error_set(err, -EINVAL, "Enabled bitmap '%s' incompatible with readonly export", name);
        error_hint(err, "Disable it first: what others write to the node would change it while clients read it");
        bitmap = NULL;
    }
    return bitmap;
}

static struct bitmap *find_bitmap(const struct block_export_options *options, unsigned i, struct node *node,
                                  struct error **err)
{
    const struct block_dirty_bitmap_or_str *item = options->u.nbd.bitmaps.items[i];
    struct bitmap *bitmap;

    if (item->kind == BLOCK_DIRTY_BITMAP_OR_STR_LOCAL) {
        bitmap = find_named(node, item->u.local, options->writable, err);
    } else {
        const struct node *other = graph_find(node->graph, item->u.external->node);

        if (!other) {
            error_set(err, -ENODEV, "Node '%s' not found", item->u.external->node);
            return NULL;
        }
        bitmap = bitmap_find_or_error(other, item->u.external->name, err);
    }
    return bitmap && bitmap_check(bitmap, BITMAP_ALLOW_READ_ONLY, err) == 0 ? bitmap : NULL;
}

/* The one of this name among the first `count` of the options' bitmaps, or NULL. */
static const struct bitmap *find_same(const struct block_export_options *options, unsigned count, struct node *node,
                                      const char *name)
{
    for (unsigned i = 0; i < count; i++) {
        const struct bitmap *bitmap = find_bitmap(options, i, node, NULL);

        if (bitmap && strcmp(bitmap->name, name) == 0) {
            return bitmap;
        }
    }
    return NULL;
}

int nbd_contexts_check(const struct block_export_options *options, struct node *node, struct error **err)
{
    if (options->u.nbd.bitmaps.count > NBD_BITMAPS_MAX) {
        return error_set(err, -E2BIG, "Export '%s' has more than %u bitmaps", options->id, NBD_BITMAPS_MAX);
    }
    for (unsigned i = 0; i < options->u.nbd.bitmaps.count; i++) {
        const struct bitmap *bitmap = find_bitmap(options, i, node, err);
        const struct bitmap *same = bitmap ? find_same(options, i, node, bitmap->name) : NULL;

        if (!bitmap) {
            return -EINVAL;
        }
        if (same && same != bitmap) {
            return error_set(err, -EEXIST, "Export '%s' has two bitmaps named '%s', of nodes '%s' and '%s'",
                             options->id, bitmap->name, same->node->name, bitmap->node->name);
        }
    }
    return 0;
}

static void add_context(struct nbd_contexts *contexts, enum nbd_context_kind kind, char *name, struct bitmap *bitmap)
{
    struct nbd_context *context = &contexts->items[contexts->count++];

    *context = (struct nbd_context){.kind = kind, .id = contexts->count, .name = name, .bitmap = bitmap};
    if (bitmap) {
        bitmap_busy_begin(bitmap);
        context->node = node_ref(bitmap->node);
    }
}

void nbd_contexts_open(struct nbd_contexts *contexts, const struct block_export_options *options, struct node *node)
{
    unsigned count = (unsigned)options->u.nbd.bitmaps.count;
    g_autofree struct bitmap **bitmaps = g_new0(struct bitmap *, count + 1);

    /* All are looked up before the first is busy. */
    for (unsigned i = 0; i < count; i++) {
        struct bitmap *bitmap = find_bitmap(options, i, node, NULL);

        bitmaps[i] = find_same(options, i, node, bitmap->name) ? NULL : bitmap;
    }
    contexts->count = 0;
    contexts->items = g_new0(struct nbd_context, count + 2);
    add_context(contexts, NBD_CONTEXT_IS_ALLOCATION, g_strdup(NBD_CONTEXT_ALLOCATION), NULL);
    if (options->u.nbd.allocation_depth) {
        add_context(contexts, NBD_CONTEXT_IS_DEPTH, g_strdup(NBD_CONTEXT_DEPTH), NULL);
    }
    for (unsigned i = 0; i < count; i++) {
        if (bitmaps[i]) {
            add_context(contexts, NBD_CONTEXT_IS_BITMAP, g_strconcat(NBD_CONTEXT_BITMAP, bitmaps[i]->name, NULL),
                        bitmaps[i]);
        }
    }
}

void coroutine_fn nbd_contexts_close(struct nbd_contexts *contexts)
{
    for (unsigned i = 0; i < contexts->count; i++) {
        struct nbd_context *context = &contexts->items[i];

        if (context->bitmap) {
            bitmap_busy_end(context->bitmap);
            node_release(context->node);
        }
        g_free(context->name);
    }
    g_free(contexts->items);
}

/* ---- a client's choice ---- */

static bool is_meant(const char *name, const char *query, size_t bytes, bool listing)
{
    static const char *const spaces[] = {"", "base:", "qemu:", NBD_CONTEXT_BITMAP};

    if (strlen(name) == bytes && memcmp(name, query, bytes) == 0) {
        return true;
    }
    for (unsigned i = 0; listing && i < G_N_ELEMENTS(spaces); i++) {
        if (strlen(spaces[i]) == bytes && memcmp(spaces[i], query, bytes) == 0) {
            return strncmp(name, query, bytes) == 0;
        }
    }
    return false;
}

void nbd_contexts_choose(const struct nbd_contexts *contexts, const char *query, size_t bytes, bool listing,
                         struct nbd_choice *choice)
{
    for (unsigned i = 0; i < contexts->count; i++) {
        if (is_meant(contexts->items[i].name, query, bytes, listing)) {
            choice->bits[i / 64] |= UINT64_C(1) << i % 64;
        }
    }
}

bool nbd_contexts_choose_id(const struct nbd_contexts *contexts, const struct nbd_choice *among, uint32_t id,
                            struct nbd_choice *choice)
{
    unsigned i = id - 1; /* see add_context() */

    if (id == 0 || id > contexts->count || !nbd_choice_has(among, i) || nbd_choice_has(choice, i)) {
        return false;
    }
    choice->bits[i / 64] |= UINT64_C(1) << i % 64;
    return true;
}

bool nbd_choice_has(const struct nbd_choice *choice, unsigned index)
{
    return choice->bits[index / 64] >> index % 64 & 1;
}

unsigned nbd_choice_count(const struct nbd_choice *choice)
{
    unsigned count = 0;

    for (unsigned i = 0; i < G_N_ELEMENTS(choice->bits); i++) {
        count += (unsigned)__builtin_popcountll(choice->bits[i]);
    }
    return count;
}

/* ---- block status ---- */

struct collection {
    void *out;
    bool extended;
    unsigned max, count;
    uint32_t last_flags;
    uint64_t last_bytes;
};

/* False: there is no room for it. */
static bool collection_add(struct collection *collection, uint64_t bytes, uint32_t flags)
{
    if (collection->count && flags == collection->last_flags) {
        collection->last_bytes += bytes;
    } else if (collection->count == collection->max) {
        return false;
    } else {
        collection->count++;
        collection->last_flags = flags;
        collection->last_bytes = bytes;
    }
    if (collection->extended) {
        ((struct nbd_extended_status_extent *)collection->out)[collection->count - 1] =
            (struct nbd_extended_status_extent){htobe64(collection->last_bytes), htobe64(collection->last_flags)};
    } else {
        ((struct nbd_status_extent *)collection->out)[collection->count - 1] =
            (struct nbd_status_extent){htobe32((uint32_t)collection->last_bytes), htobe32(collection->last_flags)};
    }
    return true;
}

static uint32_t extent_state(enum nbd_context_kind kind, const struct extent *extent)
{
    uint32_t state = 0;

    if (kind == NBD_CONTEXT_IS_DEPTH) {
        return extent->flags & EXTENT_ALLOCATED ? extent->depth + 1 : 0;
    }
    if (extent->flags & EXTENT_ZERO) {
        state |= NBD_STATE_ZERO;
        if (!(extent->flags & EXTENT_DATA)) {
            state |= NBD_STATE_HOLE;
        }
    }
    return state;
}

static int coroutine_fn collect_extents(const struct nbd_context *context, struct backend *backend, uint64_t offset,
                                        uint64_t bytes, struct collection *collection)
{
    uint64_t done = 0;

    for (unsigned questions = 0; done < bytes && questions < STATUS_QUESTIONS_MAX; questions++) {
        struct extent extent;
        int r = backend_block_status(backend, NULL, offset + done, bytes - done, &extent);

        if (r < 0) {
            return r;
        }
        g_assert(extent.bytes > 0 && extent.bytes <= bytes - done);
        if (!collection_add(collection, extent.bytes, extent_state(context->kind, &extent))) {
            break;
        }
        done += extent.bytes;
    }
    return 0;
}

/* What lies behind the bitmap's end (it may be another node's) is not dirty. */
static void collect_bits(const struct bitmap *bitmap, uint64_t offset, uint64_t bytes, struct collection *collection)
{
    uint64_t end = offset + bytes;

    while (offset < end) {
        uint64_t first, length;
        bool any = bitmap_next_within(bitmap, offset, end, &first, &length);
        uint64_t clean = (any ? first : end) - offset;

        if (clean && !collection_add(collection, clean, 0)) {
            return;
        }
        if (any && !collection_add(collection, length, NBD_STATE_DIRTY)) {
            return;
        }
        offset = any ? first + length : end;
    }
}

int coroutine_fn nbd_context_status(const struct nbd_context *context, struct backend *backend, uint64_t offset,
                                    uint64_t bytes, bool extended, void *out, unsigned max)
{
    struct collection collection = {.out = out, .extended = extended, .max = max};
    int r = 0;

    if (context->kind == NBD_CONTEXT_IS_BITMAP) {
        collect_bits(context->bitmap, offset, bytes, &collection);
    } else {
        r = collect_extents(context, backend, offset, bytes, &collection);
    }
    return r < 0 ? r : (int)collection.count;
}

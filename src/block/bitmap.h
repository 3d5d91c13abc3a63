/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_BITMAP_H
#define INTERLOCK_BLOCK_BITMAP_H

#include "base/error.h"
#include "base/list.h"
#include "block/node.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdbool.h>
#include <stdint.h>

/*
 * Named dirty bitmaps of a node: which regions of what the node shows have changed since a bitmap was made or cleared.
 * Those that are persistent are kept inside the image by the format driver.
 *
 * What changes a bitmap, or the list of them, runs on the control thread in a coroutine with graph->lock held and the
 * node drained. Looking (find, count, next) needs the control thread alone. Requests on any loop record their writes.
 */
struct dirty;

#define BITMAP_NAME_MAX 1023
#define BITMAP_GRANULARITY_MIN 512U
#define BITMAP_GRANULARITY_MAX ((uint64_t)1 << 31)

struct bitmap {
    struct list link; /* node->bitmaps, in order of making */
    struct node *node;
    char *name;
    uint64_t granularity; /* bytes */
    struct dirty *dirty;  /* NULL: inconsistent */
    struct dirty *since;  /* between bitmap_split_begin() and its end: what was written in it; in `dirty` as well */
    struct dirty *resize_since;
    struct dirty *resize; /* between bitmaps_resize_begin() and its end */
    bool enabled;         /* records what is written */
    bool persistent;      /* the image keeps it */
    bool changed;         /* persistent, and not as the image has it */
    unsigned busy;        /* operations that use it: nobody else may change it */
};

/* One whose content nobody knows: a program had it open and did not store it. It can be removed, nothing else. */
static inline bool bitmap_is_inconsistent(const struct bitmap *bitmap)
{
    return !bitmap->dirty;
}

struct bitmap_config {
    const char *name;
    uint64_t granularity; /* 0: bitmap_default_granularity() */
    bool persistent;
    bool disabled;
};
/* The cluster size, between 4 KiB and 64 KiB; 64 KiB where there are no clusters. */
uint64_t bitmap_default_granularity(const struct node *node);
/* A new one, clean. *ret may be NULL. */
int coroutine_fn bitmap_add(struct node *node, const struct bitmap_config *config, struct bitmap **ret,
                            struct error **err);
/* Also from the image. */
int coroutine_fn bitmap_remove(struct bitmap *bitmap, struct error **err);
int coroutine_fn bitmap_clear(struct bitmap *bitmap, struct error **err);
/* enabled or not; for a persistent one also in the image. Of a read-only image it is changed in memory alone, and gets
 * into the image if that becomes writable before it is closed. */
int coroutine_fn bitmap_set_enabled(struct bitmap *bitmap, bool enabled, struct error **err);
/* Marks in `to` what is dirty in `from`, which may belong to another node of the same size and have another
 * granularity. The node of `from` is drained too, or `from` is disabled. */
int coroutine_fn bitmap_merge(struct bitmap *to, struct bitmap *from, struct error **err);
/* For a change that may have to be taken back (bitmap_action.c), while the node stays drained: what the bitmap has
 * recorded is kept in *ret, and it goes on with a copy, or empty. Checks, and tells the image, as all changes do.
 * Then one of undo and done. */
enum bitmap_keep { BITMAP_COPIED, BITMAP_EMPTIED };
struct bitmap_before {
    struct dirty *dirty;
};
int coroutine_fn bitmap_change_begin(struct bitmap *bitmap, enum bitmap_keep keep, struct bitmap_before *ret,
                                     struct error **err);
void coroutine_fn bitmap_change_undo(struct bitmap *bitmap, struct bitmap_before *before);
void bitmap_change_done(struct bitmap_before *before);
/* For who copies what the bitmap says at this moment: it is busy until the end, and what is written meanwhile is noted
 * besides. At the end, with `anew`, the bitmap is what was written since, and what `left` (may be NULL) says; else it
 * stays as it has become. Whatever gets into the image meanwhile says too much rather than too little. */
int coroutine_fn bitmap_split_begin(struct bitmap *bitmap, struct error **err);
void bitmap_split_end(struct bitmap *bitmap, bool anew, const struct dirty *left);
/* Takes it out of the image and the list: then bitmap_forget(), or undo, which puts it back behind *ret_place (one that
 * is inconsistent is not stored again). */
int coroutine_fn bitmap_remove_begin(struct bitmap *bitmap, struct list **ret_place, struct error **err);
void bitmap_remove_undo(struct bitmap *bitmap, struct list *place);
/* Writes persistent bitmaps into the image, now; they go on recording. Nothing to do: 0. */
int coroutine_fn bitmaps_store(struct node *node, struct error **err);

struct bitmap *bitmap_find(const struct node *node, const char *name); /* NULL: none */
struct bitmap *bitmap_find_or_error(const struct node *node, const char *name, struct error **err);

/* What stands against using it. */
enum bitmap_allow { BITMAP_ALLOW_BUSY = 1 << 0, BITMAP_ALLOW_READ_ONLY = 1 << 1, BITMAP_ALLOW_INCONSISTENT = 1 << 2 };
int bitmap_check(const struct bitmap *bitmap, unsigned allow, struct error **err);
/* Counted. */
void bitmap_busy_begin(struct bitmap *bitmap);
void bitmap_busy_end(struct bitmap *bitmap);

/* Bytes in dirty regions, each counted whole; 0 of an inconsistent one. */
uint64_t bitmap_count(const struct bitmap *bitmap);
/* The next run of dirty bytes at or after `from`; false: none. Not for inconsistent ones. */
bool bitmap_next(const struct bitmap *bitmap, uint64_t from, uint64_t *ret_offset, uint64_t *ret_bytes);
/* The same of what lies before `end`. Whoever made the bitmap busy may ask on any thread. */
bool bitmap_next_within(const struct bitmap *bitmap, uint64_t from, uint64_t end, uint64_t *ret_offset,
                        uint64_t *ret_bytes);
/* For query-named-block-nodes, newest first; block_dirty_info_list_free(). */
struct block_dirty_info_list *bitmaps_describe(const struct node *node);

/* --- for the request path --- */

void bitmaps_record(struct node *node, uint64_t offset, uint64_t bytes);
/* Any loop, after every request that may have changed something, failed or not. */
static inline void bitmaps_mark(struct node *node, uint64_t offset, uint64_t bytes)
{
    if (__builtin_expect(node->bitmaps.next != &node->bitmaps, 0)) {
        bitmaps_record(node, offset, bytes);
    }
}
/* Around a change of node->size; begin may refuse. What is new is clean. */
int bitmaps_resize_begin(struct node *node, uint64_t size, struct error **err);
void bitmaps_resize_end(struct node *node, bool done);
/* The node is closed: frees them all. */
void bitmaps_destroy(struct node *node);

/* --- for drivers that keep bitmaps (image.h) --- */

/* Puts one that the image has into the list; `inconsistent`: without content. -ENOMEM: it is there, but inconsistent.
 * The caller checked name and granularity. */
int bitmap_restore(struct node *node, const char *name, uint64_t granularity, bool enabled, bool inconsistent,
                   struct bitmap **ret);
/* Takes it out of the list and frees it, without asking the driver. */
void bitmap_forget(struct bitmap *bitmap);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_IMAGE_H
#define INTERLOCK_BLOCK_IMAGE_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdbool.h>
#include <stdint.h>

/*
 * What can be done with an image besides I/O: making, checking, repairing, measuring, changing its options, snapshots
 * inside it. A driver that can do some of it has a const table of this type (driver.h: `image`); a NULL member: its
 * format cannot. All run on the control thread in coroutines. Those that take a node run with graph->lock held and the
 * node drained, and it is writable if they change it; whoever calls them holds claims that say so.
 */
struct backend;
struct bitmap;
struct graph;
struct node;

enum image_fix { IMAGE_FIX_NONE, IMAGE_FIX_LEAKS, IMAGE_FIX_ALL };

/* How far a long operation has come, in units of its own: called from time to time; `argument` is the caller's. */
struct image_progress {
    void (*report)(uint64_t done, uint64_t of, void *argument);
    void *argument;
};

/* Members that are given are changed. */
struct image_amendment {
    const struct blockdev_create_options *options; /* of the image's driver; only what has_... or non-NULL says, and
                                                    * `size` if it is not 0; `file` is NULL */
    const struct blockdev_amend_options *keys;     /* of encryption, or NULL */
    bool force;                                    /* also what may lose access to the data */
};

struct image_driver {
    /* The options of `img create -o` and `img amend -o`, ended by a NULL name (for its help and its parser). */
    const struct image_option *options;
    /* Writes a new, empty image, flushed. Children named by reference exist in `graph`, those described inline are
     * opened for it. No node for the new image is left behind. */
    int coroutine_fn (*create)(struct graph *graph, const struct blockdev_create_options *options, struct error **err);
    /* Sets all members of *ret but filename and format. The image is open without anything that repairs it (the
     * driver's `open` was told so by node->check_only). What was found, repaired or not, is no error. */
    int coroutine_fn (*check)(struct node *node, enum image_fix fix, struct image_check *ret, struct error **err);
    /* What an image with these options (`file` is NULL) would need for the content of `source`, or, if that is NULL,
     * for nothing yet. */
    int coroutine_fn (*measure)(const struct blockdev_create_options *options, struct backend *source,
                                struct block_measure_info *ret, struct error **err);
    int coroutine_fn (*amend)(struct node *node, const struct image_amendment *amendment,
                              const struct image_progress *progress, struct error **err);
    /* Forgets all that the image holds, which then shows what is below it everywhere; snapshots inside it stay. A crash
     * leaves it as it was, or empty. On stable storage when it returns. */
    int coroutine_fn (*empty)(struct node *node, struct error **err);
    /* Like driver->truncate for a larger size, and allocates what is added. */
    int coroutine_fn (*grow)(struct node *node, uint64_t size, enum preallocation_mode mode, struct error **err);

    /* Snapshots inside the image. `name`: an id or a name, ids first. */
    int coroutine_fn (*snapshot_list)(struct node *node, struct snapshot_info_list **ret, struct error **err);
    int coroutine_fn (*snapshot_create)(struct node *node, const struct snapshot_info *snapshot, struct error **err);
    int coroutine_fn (*snapshot_apply)(struct node *node, const char *name, struct error **err);
    int coroutine_fn (*snapshot_delete)(struct node *node, const char *name, struct error **err);
    /* Shows the snapshot's content instead of the active one until the node is closed; read-only nodes only. */
    int coroutine_fn (*snapshot_load)(struct node *node, const char *name, struct error **err);

    /* Dirty bitmaps kept inside the image; src/block/bitmap.c calls these. `open` has put those that are there into
     * node->bitmaps (bitmap_restore()); they are stored again when the node stops being writable. */
    /* Could it keep one more, of this name? */
    int (*bitmap_may_add)(struct node *node, const char *name, uint64_t granularity, struct error **err);
    /* One is about to change otherwise than by a request: until it is stored, the image says that it is in use. */
    int coroutine_fn (*bitmap_change)(struct node *node, struct bitmap *bitmap, struct error **err);
    /* Takes it out of the image, if it is there. */
    int coroutine_fn (*bitmap_remove)(struct node *node, struct bitmap *bitmap, struct error **err);
    int coroutine_fn (*bitmaps_store)(struct node *node, struct error **err);
};

/* One option of `-o`: NAME=VALUE. The QMP name in blockdev-create-options is that with '-' for '_' unless `member` says
 * else. */
struct image_option {
    const char *name;   /* "cluster_size" */
    const char *type;   /* "size", "str", "bool (on/off)", "num": as the help shows it */
    const char *help;   /* one line */
    const char *member; /* dotted path in the QMP options, or NULL */
    bool amendable;     /* also of amend */
    bool amend_only;
    bool keys; /* with amend_only: `member` is of blockdev-amend-options (image_amendment.keys) */
};

#endif

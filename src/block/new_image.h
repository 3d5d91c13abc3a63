/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_NEW_IMAGE_H
#define INTERLOCK_BLOCK_NEW_IMAGE_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdint.h>

/*
 * Images that a command makes for itself, by file name and format: the overlay of blockdev-snapshot-sync, the targets
 * of drive-backup and drive-mirror. For actions' prepare(): control thread, graph->lock is not held.
 */
struct graph;
struct node;

struct new_image {
    const char *filename;     /* a path, or "file:" and a path; others are -ENOTSUP */
    const char *format;       /* "qcow2", "raw", ...; NULL: qcow2 */
    const char *node_name;    /* of the node; NULL: made up */
    enum new_image_mode mode; /* existing: it is opened, and nothing is made */
    uint64_t size;            /* of the disk, bytes; not for existing */
    const char *backing;      /* the string for its header; NULL: none. Not for existing */
    const char *backing_format;
    bool no_flush, direct; /* as its neighbours are opened: cache options */
    bool discard;          /* discard=unmap */
};

/* Makes the image, unless it exists, and opens it for writing without what its header names as backing file. *ret: a
 * reference of the caller's, node_release(). A file that was there is emptied; one that was made stays when a later
 * step of the command fails. */
int coroutine_fn new_image_open(struct graph *graph, const struct new_image *image, struct node **ret,
                                struct error **err);

/* The same for a copy of `image`'s disk, and next to it: as long, opened as it is, of its format unless the caller has
 * set one; size, backing and what follows are set here. sync top: the copy is to lean on what `image` leans on; none:
 * on `image` itself. */
int coroutine_fn new_image_open_copy(struct graph *graph, const struct node *image, enum mirror_sync_mode sync,
                                     const struct new_image *wanted, struct node **ret, struct error **err);

#endif

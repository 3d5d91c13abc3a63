/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_IMAGE_PLACE_H
#define INTERLOCK_DRIVER_FORMAT_IMAGE_PLACE_H

#include "base/error.h"
#include "block/user.h"
#include "schema/types.h"

/* Where a new image is made: a node that the options of its creation name or describe, and a backend on it.
 * Zero-initialise. Control thread; graph->lock is not held. */
struct image_place {
    struct node *node;
    struct backend *backend; /* with all rights */
};

/* -EROFS where nothing can be written. On error too: image_place_close(). */
int coroutine_fn image_place_open(struct graph *graph, const struct blockdev_ref *ref, struct image_place *ret,
                                  struct error **err);
void coroutine_fn image_place_close(struct image_place *place);
/* Empties it. What has a size of its own is not asked: who makes an image there writes everything that matters. */
int coroutine_fn image_place_empty(struct edge *edge, struct error **err);

#endif

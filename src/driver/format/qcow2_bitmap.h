/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_BITMAP_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_BITMAP_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdbool.h>
#include <stdint.h>

/* Dirty bitmaps kept in the image (qcow2_bitmap.c). Coroutines; the node is drained but for begin_writing. */
struct bitmap;
struct node;
struct qcow2;

/* At open, with node->size set: what the image has, into node->bitmaps (not if the node is only to be checked). Never
 * fails: what cannot be read is inconsistent. */
void coroutine_fn qcow2_bitmaps_load(struct qcow2 *image);
void qcow2_bitmaps_unload(struct qcow2 *image);
/* Takes them off the node: it shows something else than they tell of, or the image has none any more. */
void qcow2_bitmaps_forget(struct qcow2 *image);
/* Before the first request that changes anything: those that record are in use, on disk. The lock is held. */
int coroutine_fn qcow2_bitmaps_begin_writing(struct qcow2 *image);
/* Before the disk's size changes: all are in use, on disk, until they are stored. Takes the lock. */
int coroutine_fn qcow2_bitmaps_begin_resize(struct qcow2 *image);
/* For the image's description; an empty list: none. */
void qcow2_bitmaps_describe(struct qcow2 *image, bool *ret_has, struct qcow2_bitmap_info_list *ret);

/* Members of image_driver (block/image.h). */
int qcow2_bitmap_may_add(struct node *node, const char *name, uint64_t granularity, struct error **err);
int coroutine_fn qcow2_bitmap_change(struct node *node, struct bitmap *bitmap, struct error **err);
int coroutine_fn qcow2_bitmap_remove(struct node *node, struct bitmap *bitmap, struct error **err);
int coroutine_fn qcow2_bitmaps_store(struct node *node, struct error **err);

#endif

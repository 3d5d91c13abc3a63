/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_CHECK_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_CHECK_H

#include "block/image.h"

struct qcow2;

/*
 * image_driver.check. Of members of *ret that count something wrong, those that are 0 are absent; `findings` are lines
 * for people, at most a hundred. With a fix the counts are of what is left, and those of what was repaired stand beside
 * them; the tables in memory are loaded again.
 */
int coroutine_fn qcow2_check(struct node *node, enum image_fix fix, struct image_check *ret, struct error **err);

/*
 * For an image with the dirty bit, opened for writing: repairs all, and clears the bit. Runs alone, with the caches
 * empty; the tables in memory are loaded again. A crash in the middle leaves the image dirty. -EIO: it could not be
 * made whole.
 */
int coroutine_fn qcow2_repair_dirty(struct qcow2 *image, struct error **err);

#endif

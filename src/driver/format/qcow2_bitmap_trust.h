/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_BITMAP_TRUST_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_BITMAP_TRUST_H

#include "loop/coroutine.h"
#include <stdbool.h>
#include <stdint.h>

/* Whether what a bitmap leads to is its own (qcow2_bitmap_trust.c). Coroutines; the node is drained, the lock held. */
struct qcow2;
struct qcow2_bitmap_record;

/* The directory is about to be replaced; nothing of the image is unwritten. The first time, if the directory was found
 * in the image, this looks through the whole image; else it does nothing. */
void coroutine_fn qcow2_bitmaps_look_through(struct qcow2 *image);
/* May the clusters that it leads to be freed? It has been looked through; `table` in host byte order. */
bool coroutine_fn qcow2_bitmap_may_be_freed(struct qcow2 *image, const struct qcow2_bitmap_record *record,
                                            const uint64_t *table);

#endif

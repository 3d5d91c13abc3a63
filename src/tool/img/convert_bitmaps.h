/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_IMG_CONVERT_BITMAPS_H
#define INTERLOCK_TOOL_IMG_CONVERT_BITMAPS_H

#include "base/error.h"
#include "loop/coroutine.h"
#include <stdbool.h>

/* `img convert --bitmaps`: images, not filters. */
struct graph;
struct node;

/* Before anything is made: has the source bitmaps that can be copied? skip_broken: some that cannot are no error. */
int convert_bitmaps_check(const struct node *from, bool skip_broken, struct error **err);
/* The persistent bitmaps of `from`, into `to`, which has the same content and is stored with them. Those that cannot be
 * relied on are left out, with a warning. */
int coroutine_fn convert_bitmaps_copy(struct graph *graph, struct node *from, struct node *to, struct error **err);

#endif

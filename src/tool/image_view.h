/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_IMAGE_VIEW_H
#define INTERLOCK_TOOL_IMAGE_VIEW_H

#include "base/error.h"
#include "loop/coroutine.h"
#include <stdbool.h>

/* Other views of an image that is open, for the programs that have a graph of their own. Control thread. */
struct graph;
struct node;

/* Puts a temporary qcow2 image over `base`, whose file has no name any more: what is written goes there, and vanishes
 * when it is closed. One reference to *ret, the caller's. */
int coroutine_fn image_open_overlay(struct graph *graph, struct node *base, bool read_only, struct node **ret,
                                    struct error **err);
/* The image shows its internal snapshot from now on, read-only: an id or a name, or snapshot.id=ID, snapshot.name=NAME,
 * or both with a comma between them (the id decides). */
int coroutine_fn image_show_snapshot(struct graph *graph, struct node *image, const char *snapshot, struct error **err);

#endif

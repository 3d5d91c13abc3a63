/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_RELINK_H
#define INTERLOCK_JOB_RELINK_H

#include "base/error.h"
#include "loop/coroutine.h"
#include <glib.h>
#include <stdbool.h>

/*
 * What jobs share that change what an image leans on: finding nodes in a chain, and backing strings on disk. Control
 * thread; functions that touch a disk are called with graph->lock held and the overlay drained.
 */
struct graph;
struct node;
struct operation;

/* The node at or below `from` whose file is `name`: as it was opened, or as its overlay's header calls it. NULL: none.
 */
struct node *relink_find_file(struct node *from, const char *name);
/* The node by name; an error that names it. */
struct node *relink_find_node(struct graph *graph, const char *name, struct error **err);

/* What stands in an overlay's header for its backing image. */
struct backing_name {
    char *file, *format; /* NULL: none */
};
void backing_name_clear(struct backing_name *name);
/* A name that a user gave for `base` (NULL: nothing), or that is to be given: -EBUSY if it was another image when the
 * command came, before it waited for its claims or for the lock. `before`: the name of that image as it was found
 * before the lock ("": nothing), or NULL: nobody looked. graph->lock is held. */
int relink_check_chosen(struct graph *graph, const struct node *base, const char *before, struct error **err);
/* How `overlay` is to call `base` (NULL: nothing): `given` if not NULL, else base's file name such that it is found
 * from where the overlay is. mask_protocol: a mere protocol is called raw. -EINVAL when base has no file name. */
int relink_name(const struct node *overlay, const struct node *base, const char *given, bool mask_protocol,
                struct backing_name *ret, struct error **err);

/* Strings that were changed, to be put back if a later step fails. Zero-initialise but for the operation. */
struct relink {
    const struct operation *operation; /* who claimed `graph` on the overlays */
    const struct node *foundation;     /* changed first, if at all: what the others then name; or NULL */
    GArray *changed;
};
/* Rewrites one overlay's header (the node is drained and writable). */
int coroutine_fn relink_write(struct relink *relink, struct node *overlay, const struct backing_name *name,
                              struct error **err);
/* Writes the old strings again, also that of a relink_write() that failed. What cannot be written is logged: either
 * string leads to the same data then, for the foundation keeps its new one. */
void coroutine_fn relink_undo(struct relink *relink);
void relink_clear(struct relink *relink); /* forgets; accepts a zeroed one */

#endif

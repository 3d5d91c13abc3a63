/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_SHAPE_H
#define INTERLOCK_TOOL_SHAPE_H

#include "block/graph.h"

/*
 * Graphs that have a shape and nothing else: images without storage, which lean on each other. For asking access
 * control about them. In a coroutine of the control loop.
 */
struct shape {
    const char *name;
    struct {
        const char *node, *backing; /* backing: an earlier node, or NULL */
    } images[8];                    /* ends with a node NULL; the base first */
};
/* chain, fork, crown, tower */
extern const struct shape shapes[];
extern const unsigned shape_count;
unsigned shape_size(const struct shape *shape); /* images */

/* The nodes in the order of the shape, and behind them SHAPE_SPARES that stand alone; the caller's references. */
#define SHAPE_SPARES 2
struct graph *coroutine_fn shape_open(const struct shape *shape, struct node **ret_nodes);
void coroutine_fn shape_close(struct graph *graph, const struct shape *shape, struct node **nodes);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_RESIZE_H
#define INTERLOCK_JOB_RESIZE_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/commands.h"

struct graph;

/*
 * block_resize: an operation that lasts as long as the command. Claims `attributes` on the node, and `write-beneath` if
 * it gets shorter; makes a node writable that was not asked to be read-only. On stable storage when it returns 0; a
 * refusal has changed nothing. Control thread; takes graph->lock.
 */
int coroutine_fn resize_node(struct graph *graph, const struct block_resize_args *args, struct error **err);
/* The dry run of it, up to the decision; see struct command. */
int coroutine_fn resize_check(struct graph *graph, const struct block_resize_args *args, json_t **ret_claims,
                              struct error **err);

#endif

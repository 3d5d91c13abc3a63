/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_CHANGE_BACKING_H
#define INTERLOCK_JOB_CHANGE_BACKING_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/commands.h"

struct graph;

/*
 * change-backing-file: an operation that lasts as long as the command. Claims `graph` on the image and denies it to
 * others: the name fits only the edge that it was chosen for. Writes the header, on stable storage when it returns 0; a
 * crash leaves the old name or the new one. The graph in memory stays as it is. Control thread; takes graph->lock.
 */
int coroutine_fn change_backing_file(struct graph *graph, const struct change_backing_file_args *args,
                                     struct error **err);
/* The dry run of it, up to the decision; see struct command. */
int coroutine_fn change_backing_file_check(struct graph *graph, const struct change_backing_file_args *args,
                                           json_t **ret_claims, struct error **err);

#endif

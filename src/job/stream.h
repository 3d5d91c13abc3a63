/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_STREAM_H
#define INTERLOCK_JOB_STREAM_H

#include "job/job.h"
#include "schema/commands.h"

/*
 * block-stream: copies into a node what it shows of the images below it, down to (not including) base; then it leans on
 * base, or on nothing. Control thread. 0, or a refusal that has changed nothing.
 */
int coroutine_fn stream_start(struct jobs *jobs, const struct block_stream_args *args, struct error **err);
/* The dry run of it, up to the decision; see struct command. */
int coroutine_fn stream_check(struct jobs *jobs, const struct block_stream_args *args, json_t **ret_claims,
                              struct error **err);

#endif

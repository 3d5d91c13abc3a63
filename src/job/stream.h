/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_STREAM_H
#define INTERLOCK_JOB_STREAM_H

#include "block/action.h"
#include "job/job.h"
#include "schema/commands.h"

struct job_group;

/*
 * block-stream: copies into a node what it shows of the images below it, down to (not including) base; then it leans on
 * base, or on nothing. Control thread.
 */
/* Its start as an action (block/action.h); the arguments are borrowed until its clean. `group`: see job/policy.h, may
 * be NULL. */
void stream_action(struct action *ret, struct jobs *jobs, struct job_group *group,
                   const struct block_stream_args *args);
/* Runs it alone. */
int coroutine_fn stream_start(struct jobs *jobs, const struct block_stream_args *args, struct error **err);
/* The dry run of it, up to the decision; see struct command. */
int coroutine_fn stream_check(struct jobs *jobs, const struct block_stream_args *args, json_t **ret_claims,
                              struct error **err);

#endif

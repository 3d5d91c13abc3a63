/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_COMMIT_H
#define INTERLOCK_JOB_COMMIT_H

#include "block/action.h"
#include "job/job.h"
#include "schema/commands.h"

struct job_group;

/*
 * block-commit: moves what the images from top down to (not including) base hold into base; then top's overlays and
 * users lean on base. Top without overlays makes it an active commit: users' writes are tracked, the job becomes ready
 * and waits for job-complete. Control thread.
 */
/* Its start as an action (block/action.h); the arguments are borrowed until its clean. `group`: see job/policy.h, may
 * be NULL. */
void commit_action(struct action *ret, struct jobs *jobs, struct job_group *group,
                   const struct block_commit_args *args);
/* Runs it alone. */
int coroutine_fn commit_start(struct jobs *jobs, const struct block_commit_args *args, struct error **err);
/* The dry run of it, up to the decision; see struct command. */
int coroutine_fn commit_check(struct jobs *jobs, const struct block_commit_args *args, json_t **ret_claims,
                              struct error **err);

#endif

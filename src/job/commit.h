/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_COMMIT_H
#define INTERLOCK_JOB_COMMIT_H

#include "job/job.h"
#include "schema/commands.h"

/*
 * block-commit: moves what the images from top down to (not including) base hold into base; then top's overlays and
 * users lean on base. Top without overlays makes it an active commit: users' writes are tracked, the job becomes ready
 * and waits for job-complete. Control thread. 0, or a refusal that has changed nothing.
 */
int coroutine_fn commit_start(struct jobs *jobs, const struct block_commit_args *args, struct error **err);
/* The dry run of it, up to the decision; see struct command. */
int coroutine_fn commit_check(struct jobs *jobs, const struct block_commit_args *args, json_t **ret_claims,
                              struct error **err);

#endif

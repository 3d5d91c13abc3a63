/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_MIRROR_H
#define INTERLOCK_JOB_MIRROR_H

#include "block/action.h"
#include "job/job.h"
#include "job/policy.h"
#include "schema/types.h"

/*
 * blockdev-mirror and drive-mirror: a copy of a node that keeps up with what users write. The job becomes ready when
 * the copy has caught up. job-complete makes the target the node's successor: for its users, with `replaces` for its
 * overlays too. block-job-cancel without force, while ready, ends it with a consistent copy. Control thread.
 */

/* Makes *ret an action that starts one; the arguments are borrowed until its clean. `group` may be NULL. */
void mirror_action(struct action *ret, struct jobs *jobs, const struct blockdev_mirror *args, struct job_group *group);
/* The same, with an image that is made or opened first, while nobody waits. */
void drive_mirror_action(struct action *ret, struct jobs *jobs, const struct drive_mirror *args,
                         struct job_group *group);

#endif

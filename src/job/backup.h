/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_BACKUP_H
#define INTERLOCK_JOB_BACKUP_H

#include "block/action.h"
#include "schema/types.h"

struct job_group;
struct jobs;

/* The start of a blockdev-backup as an action (block/action.h): alone, or with others at one point in time. The
 * arguments are borrowed until its clean; `group`: see job/policy.h, may be NULL. */
void blockdev_backup_action(struct action *ret, struct jobs *jobs, struct job_group *group,
                            const struct blockdev_backup_options *options);

/* The same of a drive-backup. */
void drive_backup_action(struct action *ret, struct jobs *jobs, struct job_group *group,
                         const struct drive_backup_options *options);

#endif

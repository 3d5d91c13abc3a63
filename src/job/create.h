/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_CREATE_H
#define INTERLOCK_JOB_CREATE_H

#include "block/action.h"
#include "job/job.h"
#include "schema/commands.h"

/*
 * blockdev-create and x-blockdev-amend, as actions (block/action.h) that start a job each. The arguments are borrowed
 * until the action's clean, but for `options`, which a job that starts takes along (and leaves NULL). Control thread.
 *
 * Both jobs are no block jobs: they have no BLOCK_JOB_* events, and stay concluded until job-dismiss. What they do
 * cannot be stopped half-way; a cancel that comes meanwhile is honoured at the end, before the job would end well.
 */
void create_action(struct action *ret, struct jobs *jobs, struct blockdev_create_args *args);
void amend_action(struct action *ret, struct jobs *jobs, struct x_blockdev_amend_args *args);

#endif

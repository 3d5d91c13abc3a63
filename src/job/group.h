/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_GROUP_H
#define INTERLOCK_JOB_GROUP_H

#include "job/policy.h"

/*
 * How the jobs of a group end together; called by the life of a job (job.c), in this order, whether it has a group or
 * not. Control thread only. The coroutine functions return 0 or -ECANCELED.
 */
#define JOB_LONG_NS ((int64_t)3600 * 1000 * 1000 * 1000)
#define JOB_RETRY_NS ((int64_t)100 * 1000 * 1000)

void job_group_join(struct job_group *group, struct job *job);
/* Waiting: until all are there. */
int coroutine_fn job_group_meet(struct job *job);
/* Pending: has one of them been told to finalize, or need none be told? */
bool job_group_is_finalized(const struct job *job);
/* Until it is this job's turn to prepare. */
int coroutine_fn job_group_take_turn(struct job *job);
/* It has prepared. A job that can be taken back: until all others have prepared too. */
int coroutine_fn job_group_agree(struct job *job);
/* job->result is set: if that is an error, the others are cancelled, but for those that are beyond that. */
void job_group_leave(struct job *job);
/* Something was asked of this job that the others wait for too. */
void job_group_wake(struct job *job);

#endif

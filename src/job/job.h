/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_JOB_H
#define INTERLOCK_JOB_JOB_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdbool.h>
#include <stdint.h>

/*
 * Jobs, for who commands them: the monitor's handlers, the shutdown. Control thread only. How jobs are started stands
 * in commit.h and stream.h, how one is implemented in policy.h.
 */
struct block_job_change_options;
struct graph;
struct job;
struct jobs;

/* `emit` gets each event ({"event": NAME, "data": {...}}) and owns the reference. */
struct jobs *jobs_create(struct graph *graph, void (*emit)(json_t *event, void *argument), void *argument);
void jobs_destroy(struct jobs *jobs); /* asserts that there are none; accepts NULL */
struct graph *jobs_graph(struct jobs *jobs);

struct job *jobs_find(struct jobs *jobs, const char *id); /* NULL: none */
/* The two faces of one list: job-* commands say GenericError, block-job-* commands DeviceNotActive. */
struct job *jobs_find_or_error(struct jobs *jobs, const char *id, struct error **err);
struct job *jobs_find_block_or_error(struct jobs *jobs, const char *id, struct error **err);

/*
 * The verbs. Each is refused in the states that do not know it, with an error that names job, state and verb.
 * job_finalize() and job_dismiss() may free the job; after every other verb it is as alive as before the next yield.
 */
int job_pause(struct job *job, struct error **err);
int job_resume(struct job *job, struct error **err);
/* Wakes the job out of whatever it waits for. Not forced, a job that is ready ends well, without its last step
 * (block-job-cancel); job-cancel forces. */
int job_cancel(struct job *job, bool force, struct error **err);
int job_set_speed(struct job *job, int64_t bytes_per_second, struct error **err);
int job_complete(struct job *job, struct error **err);
/* block-job-change. The options' type must be the job's. */
int coroutine_fn job_change(struct job *job, const struct block_job_change_options *options, struct error **err);
/* Returns when the last step is done, well or not. */
int coroutine_fn job_finalize(struct job *job, struct error **err);
int job_dismiss(struct job *job, struct error **err);

/* query-jobs, query-block-jobs; the caller frees. */
struct job_info_list *jobs_query(struct jobs *jobs);
struct block_job_info_list *jobs_query_block(struct jobs *jobs);

/* Shutdown: cancels all jobs, waits for their ends (which nothing but I/O in flight holds up), dismisses them. New jobs
 * are refused from here on. */
void coroutine_fn jobs_cancel_all_and_wait(struct jobs *jobs);

#endif

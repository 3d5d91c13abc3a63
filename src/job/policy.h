/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_POLICY_H
#define INTERLOCK_JOB_POLICY_H

#include "base/list.h"
#include "copy/copy.h"
#include "job/job.h"
#include "loop/sync.h"

/* For who implements a job. Control thread only. */

/*
 * What one kind of job does. The members run in the job's own coroutine, in this order:
 *
 *   run      the long part. 0, -ECANCELED or another negative errno. The job is running (or ready).
 *   prepare  the last step, once the job is finalized. A failure has changed nothing that users see; then abort
 * follows. job->control.cancelled may become true meanwhile: until the point of no return that ends it. abort    after
 * a failure or a cancel: takes back. May be NULL. clean    always, last: afterwards the job holds nodes, backends and
 * claims no more. Frees job->state.
 */
struct job_policy {
    enum job_type type;
    bool ignore_leaves; /* on-error=ignore goes on without the piece, and the job fails at its end; else it tries again
                         */
    int coroutine_fn (*run)(struct job *job, struct error **err);
    int coroutine_fn (*prepare)(struct job *job, struct error **err);
    void coroutine_fn (*abort)(struct job *job);
    void coroutine_fn (*clean)(struct job *job);
    void (*progress)(struct job *job, uint64_t *ret_done, uint64_t *ret_total);
};

struct job {
    struct list link; /* jobs->list */
    struct jobs *jobs;
    char *id;
    const struct job_policy *policy;
    void *state; /* the policy's */
    enum job_status status;
    struct copy_control control;
    bool auto_finalize, auto_dismiss;
    bool user_paused;    /* by job-pause or by an error; counts once in control.pauses */
    bool idle;           /* waits for a command, not for work */
    bool complete_asked; /* job-complete: the last step moves the users */
    bool end_asked;      /* cancelled, not forced, while ready: ends well, the users stay */
    bool finalize_asked; /* pending only */
    bool concluded;      /* what finalize waits for */
    unsigned holds;      /* who still looks at the struct */
    enum blockdev_on_error on_error;
    enum block_device_io_status io_status;
    int left_error;       /* the first error that on-error=ignore left behind */
    uint64_t done, total; /* what was last shown: done only grows */
    int64_t speed;        /* as set by the user */
    char *error;          /* why it failed, for users */
    struct co_mutex ended_mutex;
    struct co_queue ended; /* wakes when the job concludes */
};

struct job_config {
    const char *id;
    int64_t speed;
    enum blockdev_on_error on_error;
    bool auto_finalize, auto_dismiss;
};
/* Is this a fit id, and free? Says why not. Before anything else of a start. */
int job_check_id(struct jobs *jobs, const char *id, struct error **err);
/* A created job; emits the event. The caller sets job->state, then calls job_start(). */
struct job *job_create(struct jobs *jobs, const struct job_policy *policy, const struct job_config *config);
/* Runs it from the loop, soon. */
void job_start(struct job *job);

/* For run(): the copy has caught up; once. Emits the events. */
void job_ready(struct job *job);
/* For run(): waits for a command or for the time to pass; honours pauses. */
void coroutine_fn job_idle(struct job *job, int64_t duration_ns);
/* copy_config.failed of every job; `argument` is the job. */
enum copy_verdict job_failed(void *argument, bool reading, int error);
/* operation_config.progress; `argument` is a struct job **, which may still point to NULL. */
int job_percent(void *argument);

#endif

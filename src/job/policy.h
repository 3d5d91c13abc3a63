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
 *   run      the long part. 0, -ECANCELED or another negative errno. The job is running (or ready). Every error of its
 *            requests goes through job_failed(), flushes with job_flush().
 *   prepare  the last step, once the job is finalized. A failure has changed nothing that users see; then abort
 *            follows. job->control.cancelled may become true meanwhile: until the point of no return that ends it.
 *   commit   only of a kind whose prepare can be taken back by abort: makes it last, and cannot fail. Called when all
 *            of its group (at once, without one) have prepared. NULL: a prepare that went well is final. In a group
 *            those with a commit prepare first, then the others, one after the other.
 *   abort    after a failure or a cancel: takes back. May be NULL.
 *   clean    always, last: afterwards the job holds nodes, backends and claims no more. Frees job->state.
 *
 * On the control thread, whenever somebody asks; may be NULL:
 *
 *   progress      how far it is.
 *   target_state  between abort and clean: what the last event says of the target. job->result is set. NULL: nothing.
 *   change        block-job-change, in states that take the verb. NULL: refused.
 *   resting       it begins to rest (paused or standby), or has done so.
 *   synced        whether users' writes go to the target at once, and nothing is left to copy. NULL: a job of that kind
 *                 does not do that. False in *ret_applies: this one does not.
 */
struct block_job_change_options;
struct job;
struct job_policy {
    enum job_type type;
    bool ignore_leaves; /* on-error=ignore goes on without the piece, and the job fails at its end; else it tries again
                         */
    bool plain;         /* no block job: it is known to the job-* commands only, and has no BLOCK_JOB_* events */
    int coroutine_fn (*run)(struct job *job, struct error **err);
    int coroutine_fn (*prepare)(struct job *job, struct error **err);
    void coroutine_fn (*commit)(struct job *job);
    void coroutine_fn (*abort)(struct job *job);
    void coroutine_fn (*clean)(struct job *job);
    void (*progress)(struct job *job, uint64_t *ret_done, uint64_t *ret_total);
    enum job_target_state (*target_state)(struct job *job);
    int coroutine_fn (*change)(struct job *job, const struct block_job_change_options *options, struct error **err);
    void (*resting)(struct job *job, bool begins);
    bool (*synced)(const struct job *job, bool *ret_applies);
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
    bool beyond;         /* its group has begun what cannot be taken back: a cancel comes too late */
    bool concluded;      /* what finalize waits for */
    unsigned holds;      /* who still looks at the struct */
    enum blockdev_on_error on_source_error, on_target_error;
    enum block_device_io_status io_status;
    int left_error;          /* the first error that on-error=ignore left behind */
    int result;              /* once it is known how it ends: 0, -ECANCELED or another negative errno */
    uint64_t done, total;    /* what was last shown: done only grows */
    int64_t speed;           /* as set by the user */
    char *error;             /* why it failed, for users */
    struct job_group *group; /* or NULL */
    unsigned group_step;     /* group.c's */
    struct co_mutex ended_mutex;
    struct co_queue ended; /* wakes when the job concludes */
};

/*
 * Jobs that end well together or not at all (`completion-mode: grouped` of a transaction). They wait in `waiting` until
 * all are there, are finalized by one job-finalize of any of them, and prepare; one that fails or is cancelled before
 * that cancels the others. What a job of the group cannot take back (job_policy.commit) begins only when none is
 * cancelled any more; an error there is the only thing that can part them.
 */
struct job_group *job_group_create(void);
/* No more jobs will be created in it: who made the group lets it go. Only now can its jobs leave `waiting`. */
void job_group_close(struct job_group *group);

struct job_config {
    const char *id;
    int64_t speed;
    enum blockdev_on_error on_source_error, on_target_error; /* of reading, of writing and flushing */
    bool auto_finalize, auto_dismiss;
    struct job_group *group; /* not closed yet; or NULL */
};
/* Is this a fit id, and free? Says why not. Before anything else of a start. */
int job_check_id(struct jobs *jobs, const char *id, struct error **err);
/* A job that nobody sees yet, but its id is taken. The caller sets job->state, then calls job_start(). */
struct job *job_create(struct jobs *jobs, const struct job_policy *policy, const struct job_config *config);
/* Emits that it was created, and runs it from the loop, soon. */
void job_start(struct job *job);
/* In place of job_start(): it has never been. job->state is the caller's to free. */
void job_discard(struct job *job);

/* For run(): the copy has caught up; once. Emits the events. */
void job_ready(struct job *job);
/* For run(): waits for a command or for the time to pass; honours pauses. */
void coroutine_fn job_idle(struct job *job, int64_t duration_ns);
/* copy_config.failed of every job; `argument` is the job. What the user's policy for that side says of an error: emits
 * the event, pauses. */
enum copy_verdict job_failed(void *argument, bool reading, int error);
/* For run(), where something that is not the copy's failed: job_failed(), then waits as that says. True: try again;
 * false: the job ends with the error, or is cancelled, or (ret_leave, if not NULL, is true) goes on without. */
bool coroutine_fn job_retries(struct job *job, bool reading, int error, bool *ret_leave);
/* For run(), at its end: flushes the target, under the policy for errors of the target. */
int coroutine_fn job_flush(struct job *job, struct backend *target, struct error **err);
/* operation_config.progress; `argument` is a struct job **, which may still point to NULL. */
int job_percent(void *argument);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_CONVERGE_H
#define INTERLOCK_JOB_CONVERGE_H

#include "base/error.h"
#include "job/policy.h"
#include "loop/coroutine.h"
#include <stdbool.h>
#include <stdint.h>

/*
 * How a job that copies a node which users go on writing catches up with them: passes over what is dirty until little
 * is left, READY, and an end with next to nothing to do. Users who write faster than the copy goes are held to its
 * speed in the end: the tracking filter is told to write both sides. Mirror and active commit; the control thread, in
 * the job's coroutine unless said.
 */
struct dirty;
struct node;

/* When the job goes over to writing both sides by itself. */
struct converge_rule {
    bool both;        /* from the beginning, and until block-job-change says else */
    int64_t after_ns; /* how long it may go on not being ready, or not ready any more, once all was copied; 0: never */
    unsigned ratio;   /* in percent: passes that leave more of what they began with; 0: never */
};
#define CONVERGE_AFTER_SECONDS 30
#define CONVERGE_RATIO 90
#define CONVERGE_PASSES 3 /* in a row by which `ratio` is judged */

struct converge {
    struct job *job;
    struct copy *copy;
    struct dirty *dirty;
    struct node *filter;
    struct converge_rule rule;
    bool both; /* wanted; while the job rests, the filter marks nevertheless */
    bool ready;
    bool touched;    /* users' writes may have gone to the target */
    int64_t late_ns; /* since when there has been more than little, or 0: all is well, or nothing was copied yet */
    unsigned slow;   /* passes in a row that left too much */
    uint64_t rate;   /* bytes per second that the copy has shown, or 0: not known */
};

/* The members above `both` are set by the caller; the copy writes by the filter's target edge. */
void converge_begin(struct converge *converge);
/* What lies at `offset`: *ret_bytes (1 to `bytes`) of which all or nothing has to be copied. `argument` is the job. */
typedef int coroutine_fn (*converge_look)(void *argument, uint64_t offset, uint64_t bytes, uint64_t *ret_bytes,
                                          bool *ret_needed);
/* Before the long part: looks through [0, size) and marks what has to be copied; users' writes mark for themselves.
 * Errors are the source's, under the job's policy. */
int coroutine_fn converge_scan(struct converge *converge, uint64_t size, converge_look look);
/* The long part: returns when the user has asked for the end of a job that is ready, or with an error. */
int coroutine_fn converge_run(struct converge *converge);
/* The last step, while users go on: hardly anything stays dirty, and nothing gets dirty any more. */
int coroutine_fn converge_finish(struct converge *converge);
/* Users are held up: copies the rest. *ret_copied: there was some, so that the target has to be flushed again. From
 * here on the filter marks only. */
int coroutine_fn converge_finish_drained(struct converge *converge, bool *ret_copied);
/* job_policy.resting. */
void converge_resting(struct converge *converge);
/* block-job-change. */
void converge_change(struct converge *converge, bool both);
/* Is the copy the same as the node, but for requests in flight, and kept so? */
bool converge_is_synced(const struct converge *converge);

#endif

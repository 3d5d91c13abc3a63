/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Convergence: the passes of a job that copies what users are writing, and the look before them at what there is to
 * copy. Owns the decision when little enough is left to
 * be ready, and when users have to be held to the speed of the copy.
 *
 *   passes, users' writes are marked --> (outrun) both sides are written --> READY --> end asked --> last pass -->
 * drain
 *
 * 1. Little is what the copy, at the speed that it has shown, moves in LITTLE_NS; nothing at all while both sides are
 *    written. So a job that is ready ends at once: the last pass is short, and under the drain there is next to
 * nothing.
 * 2. The way to READY is bounded: one pass over everything, then at most rule.after_ns, then, both sides being written
 *    (so that no region gets dirty again, and the copy takes each that is as it finds it), one more pass. What is not
 *    bounded is a target that fails, and one that the user has told to be slow.
 * 3. A job that is ready and falls behind is late like one that is not ready yet: the same rule holds for it.
 * 4. While the job rests nothing is written to the target, so the filter marks only; so does it after the end.
 *
 * What the passes copy, and what comes at the end, is the job's; how the two ways of keeping account meet is track.c's.
 */
#include "job/converge.h"
#include "base/size.h"
#include "block/dirty.h"
#include "block/node.h"
#include "driver/filter/track.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib.h>

#define LOOK_NS ((int64_t)100 * 1000 * 1000)   /* how often a job that is ready looks for new dirt */
#define LITTLE_NS ((int64_t)100 * 1000 * 1000) /* copying what is little takes no longer than that */
#define LITTLE_MOST (16 * MiB)
#define SECOND_NS ((int64_t)1000 * 1000 * 1000)
#define MEASURED_LEAST MiB /* a pass of less says nothing about speed */
#define FINISH_ROUNDS 16
#define LOOKS_PER_TURN 64

/* What is wanted, unless the job rests. */
static void converge_apply(struct converge *converge)
{
    enum job_status status = converge->job->status;
    bool rests = status == JOB_STATUS_PAUSED || status == JOB_STATUS_STANDBY;
    bool both = converge->both && !rests;
    track_write_both(converge->filter, both);
    converge->touched |= both;
}

static void converge_set_both(struct converge *converge, bool both)
{
    converge->both = both;
    converge->slow = 0;
    converge_apply(converge);
}

void converge_begin(struct converge *converge)
{
    converge_set_both(converge, converge->rule.both);
}

void converge_resting(struct converge *converge)
{
    converge_apply(converge);
    track_take_error(converge->filter); /* of before: the user has seen to it, and what it was about is marked */
}

void converge_change(struct converge *converge, bool both)
{
    converge->late_ns = converge->late_ns ? loop_now_ns() : 0;
    converge_set_both(converge, both);
    copy_control_wake(&converge->job->control);
}

bool converge_is_synced(const struct converge *converge)
{
    return converge->both && track_writes_both(converge->filter) && dirty_bytes(converge->dirty) == 0 &&
           copy_in_flight(converge->copy) == 0;
}

static uint64_t converge_little(const struct converge *converge)
{
    uint64_t little = converge->rate / (SECOND_NS / LITTLE_NS);
    return converge->both ? 0 : min_u64(little, LITTLE_MOST);
}

/* A write to both sides whose half for the target failed: as if the copy had failed there. */
static int converge_take_error(struct converge *converge)
{
    int error = track_take_error(converge->filter);
    if (error && job_failed(converge->job, false, error) == COPY_FAIL) {
        return converge->job->control.cancelled ? -ECANCELED : error;
    }
    return 0;
}

static int coroutine_fn converge_pass(struct converge *converge, bool urgent)
{
    int64_t before_ns = loop_now_ns();
    uint64_t before = copy_done(converge->copy);
    int result = copy_dirty(converge->copy, converge->dirty, urgent);
    int64_t took_ns = loop_now_ns() - before_ns;
    uint64_t bytes = copy_done(converge->copy) - before;
    if (result == 0 && bytes >= MEASURED_LEAST && took_ns > 0) {
        converge->rate = (uint64_t)((double)bytes * (double)SECOND_NS / (double)took_ns);
    }
    return result < 0 ? result : converge_take_error(converge);
}

/* After a pass that began with `before` dirty bytes. */
static void converge_judge(struct converge *converge, uint64_t before, uint64_t left)
{
    const struct converge_rule *rule = &converge->rule;
    int64_t now = loop_now_ns();
    if (left <= converge_little(converge)) {
        converge->late_ns = 0;
        converge->slow = 0;
        return;
    }
    bool first = converge->late_ns == 0 && !converge->ready; /* it was over everything: says nothing about users */
    converge->late_ns = converge->late_ns ? converge->late_ns : now;
    converge->slow = !first && rule->ratio && left > before / 100 * rule->ratio ? converge->slow + 1 : 0;
    bool late = rule->after_ns && now - converge->late_ns >= rule->after_ns;
    if (!converge->both && (late || converge->slow >= CONVERGE_PASSES)) {
        converge_set_both(converge, true);
    }
}

int coroutine_fn converge_scan(struct converge *converge, uint64_t size, converge_look look)
{
    struct job *job = converge->job;
    struct copy_control *control = &job->control;
    unsigned looks = 0;
    for (uint64_t at = 0; at < size; looks++) {
        if (control->cancelled) {
            return -ECANCELED;
        }
        if (control->pauses) {
            control->rest(control);
            continue;
        }
        if (looks % LOOKS_PER_TURN == LOOKS_PER_TURN - 1) {
            coroutine_pause();
        }
        uint64_t bytes;
        bool needed;
        int result = look(job, at, size - at, &bytes, &needed);
        if (result == 0) {
            if (needed) {
                dirty_mark(converge->dirty, at, bytes);
            }
            at += bytes;
        } else if (!job_retries(job, true, result, NULL)) {
            return control->cancelled ? -ECANCELED : result;
        }
    }
    return 0;
}

int coroutine_fn converge_run(struct converge *converge)
{
    struct job *job = converge->job;
    while (true) {
        uint64_t before = dirty_bytes(converge->dirty);
        int result = converge_pass(converge, false);
        if (result < 0) {
            return result;
        }
        uint64_t left = dirty_bytes(converge->dirty);
        converge_judge(converge, before, left);
        bool little = left <= converge_little(converge);
        if (!converge->ready && !little) {
            coroutine_pause();
            continue;
        }
        if (!converge->ready) {
            converge->ready = true;
            job_ready(job);
        }
        if ((job->complete_asked && job->control.pauses == 0) || job->end_asked) {
            return 0;
        }
        if (little || job->control.pauses) {
            job_idle(job, LOOK_NS);
        } else {
            coroutine_pause();
        }
    }
}

int coroutine_fn converge_finish(struct converge *converge)
{
    converge_set_both(converge, true);
    for (unsigned round = 0; round < FINISH_ROUNDS && dirty_bytes(converge->dirty) > 0; round++) {
        int result = converge_pass(converge, true);
        if (result < 0) {
            return result;
        }
    }
    track_take_stored(converge->filter); /* the caller flushes it */
    return converge_take_error(converge);
}

int coroutine_fn converge_finish_drained(struct converge *converge, bool *ret_copied)
{
    converge_set_both(converge, false);
    bool rest = dirty_bytes(converge->dirty) > 0;
    *ret_copied = track_take_stored(converge->filter) || rest;
    return rest ? converge_pass(converge, true) : 0;
}

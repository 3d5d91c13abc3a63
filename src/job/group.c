/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Groups of jobs that end well together or not at all.
 *
 *   joined --meet--> met --finalized--> ready for its turn --prepare--> agreed --> (left)
 *
 * 1. Nobody goes on from `met` before the group is closed and all have met; nobody prepares before all are ready.
 * 2. The jobs prepare one after the other, in the order that they joined: first those that can take it back
 *    (job_policy.commit), then the others.
 * 3. When the first of the others begins, none is cancelled, and from then on a cancel of any but itself comes too
 *    late (job->beyond). If it fails nothing has happened yet. Once it has succeeded the group is decided: nobody is
 *    cancelled by the group any more, and a job that then fails fails alone.
 * 4. A job that leaves with an error before that cancels those that are still there.
 *
 * A job without a group passes through everything at once. The states and events are job.c's.
 */
#include "job/group.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib.h>

enum group_step { GROUP_JOINED, GROUP_MET, GROUP_READY, GROUP_AGREED };

struct job_group {
    GPtrArray *members; /* struct job, in the order they joined; those that have left are gone */
    bool closed;
    bool failed;
    bool decided;
};

struct job_group *job_group_create(void)
{
    struct job_group *group = g_new0(struct job_group, 1);
    group->members = g_ptr_array_new();
    return group;
}

static void group_wake(struct job_group *group)
{
    for (guint i = 0; i < group->members->len; i++) {
        struct job *job = group->members->pdata[i];
        copy_control_wake(&job->control);
    }
}

static void group_free_if_over(struct job_group *group)
{
    if (group->closed && group->members->len == 0) {
        g_ptr_array_free(group->members, TRUE);
        g_free(group);
    }
}

void job_group_close(struct job_group *group)
{
    group->closed = true;
    group_wake(group);
    group_free_if_over(group);
}

void job_group_join(struct job_group *group, struct job *job)
{
    g_assert(!group->closed && !job->group);
    job->group = group;
    job->group_step = GROUP_JOINED;
    g_ptr_array_add(group->members, job);
    if (group->failed) {
        job->control.cancelled = true;
    }
}

static bool group_all(const struct job_group *group, enum group_step step)
{
    for (guint i = 0; i < group->members->len; i++) {
        const struct job *job = group->members->pdata[i];
        if (job->group_step < step) {
            return false;
        }
    }
    return true;
}

static bool group_is_cancelled(const struct job_group *group)
{
    for (guint i = 0; i < group->members->len; i++) {
        const struct job *job = group->members->pdata[i];
        if (job->control.cancelled) {
            return true;
        }
    }
    return group->failed;
}

static void group_step(struct job *job, enum group_step step)
{
    job->group_step = step;
    group_wake(job->group);
}

static void coroutine_fn group_sleep(struct job *job)
{
    loop_sleep_ns(&job->control.sleep, JOB_LONG_NS);
}

int coroutine_fn job_group_meet(struct job *job)
{
    struct job_group *group = job->group;
    if (!group) {
        return 0;
    }
    group_step(job, GROUP_MET);
    while (!job->control.cancelled && !(group->closed && group_all(group, GROUP_MET))) {
        group_sleep(job);
    }
    return job->control.cancelled ? -ECANCELED : 0;
}

bool job_group_is_finalized(const struct job *job)
{
    if (!job->group) {
        return job->auto_finalize || job->finalize_asked;
    }
    bool all = true;
    for (guint i = 0; i < job->group->members->len; i++) {
        const struct job *member = job->group->members->pdata[i];
        if (member->finalize_asked || member->group_step >= GROUP_READY) {
            return true;
        }
        all = all && member->auto_finalize;
    }
    return all;
}

static bool job_can_take_back(const struct job *job)
{
    return job->policy->commit;
}

static bool group_is_turn_of(const struct job_group *group, const struct job *job)
{
    if (!group_all(group, GROUP_READY)) {
        return false;
    }
    bool joined_earlier = true;
    for (guint i = 0; i < group->members->len; i++) {
        const struct job *member = group->members->pdata[i];
        joined_earlier = joined_earlier && member != job;
        bool same = job_can_take_back(member) == job_can_take_back(job);
        bool earlier = same ? joined_earlier : job_can_take_back(member);
        if (earlier && member->group_step < GROUP_AGREED) {
            return false;
        }
    }
    return true;
}

int coroutine_fn job_group_take_turn(struct job *job)
{
    struct job_group *group = job->group;
    if (!group) {
        return 0;
    }
    group_step(job, GROUP_READY);
    while (!job->control.cancelled && !group_is_turn_of(group, job)) {
        group_sleep(job);
    }
    if (group->decided) {
        return 0;
    }
    if (group_is_cancelled(group)) {
        return -ECANCELED;
    }
    for (guint i = 0; i < group->members->len && !job_can_take_back(job); i++) {
        struct job *member = group->members->pdata[i];
        member->beyond = member != job;
    }
    return 0;
}

static void group_decide(struct job_group *group)
{
    group->decided = true;
    for (guint i = 0; i < group->members->len; i++) {
        struct job *member = group->members->pdata[i];
        member->beyond = true;
    }
    group_wake(group);
}

int coroutine_fn job_group_agree(struct job *job)
{
    struct job_group *group = job->group;
    if (!group) {
        return 0;
    }
    group_step(job, GROUP_AGREED);
    if (!job_can_take_back(job) || (group_all(group, GROUP_AGREED) && !group_is_cancelled(group))) {
        group_decide(group);
    }
    while (!group->decided && !job->control.cancelled) {
        group_sleep(job);
    }
    return group->decided ? 0 : -ECANCELED;
}

void job_group_leave(struct job *job)
{
    struct job_group *group = job->group;
    if (!group) {
        return;
    }
    job->group = NULL;
    g_ptr_array_remove(group->members, job);
    if (job->result < 0 && !group->decided) {
        group->failed = true;
        for (guint i = 0; i < group->members->len; i++) {
            struct job *member = group->members->pdata[i];
            member->beyond = false;
            member->control.cancelled = true;
        }
    }
    group_wake(group);
    group_free_if_over(group);
}

void job_group_wake(struct job *job)
{
    if (job->group) {
        group_wake(job->group);
    } else {
        copy_control_wake(&job->control);
    }
}

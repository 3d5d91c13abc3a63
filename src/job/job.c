/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The life of jobs: the list, the verbs, the states and their events, and the coroutine that takes a job from its
 * start to its end.
 *
 * 1. A job's status changes in job_set_status() only, along the table in state.c, and each change is an event.
 * 2. Everything of a job runs on the control thread; between two yields nobody else sees it change.
 * 3. A cancel is taken in every state up to pending and wakes the job out of whatever it waits for: a rest, the speed
 *    limit, a pause after an error, the wait for finalize.
 * 4. BLOCK_JOB_COMPLETED and BLOCK_JOB_CANCELLED leave after the policy's clean(): whoever acts on them finds the
 *    graph changed and the claims free.
 * 5. The order of events is that of QMP's job API (checked by experiment): created, running, [ready,
 *    BLOCK_JOB_READY,] waiting, pending, [BLOCK_JOB_PENDING,] BLOCK_JOB_COMPLETED, concluded, null; a failed or
 *    cancelled job goes through aborting in place of waiting and pending.
 *
 * 6. A job that ends emits one of BLOCK_JOB_COMPLETED and BLOCK_JOB_CANCELLED, once, whatever was asked of it.
 *
 * What a job does to the graph is in commit.c and stream.c; moving data is copy/'s; ending together is group.c's.
 */
#include "access/queue.h"
#include "base/size.h"
#include "block/graph.h"
#include "block/user.h"
#include "job/group.h"
#include "job/policy.h"
#include "job/state.h"
#include "loop/loop.h"
#include "schema/events.h"
#include <errno.h>
#include <glib.h>

#define JOBS_MAX 256

struct jobs {
    struct list list; /* struct job, in order of creation */
    struct graph *graph;
    void (*emit)(json_t *event, void *argument);
    void *argument;
    unsigned count;
    bool closing;
};

struct jobs *jobs_create(struct graph *graph, void (*emit)(json_t *event, void *argument), void *argument)
{
    struct jobs *jobs = g_new0(struct jobs, 1);
    list_init(&jobs->list);
    jobs->graph = graph;
    jobs->emit = emit;
    jobs->argument = argument;
    return jobs;
}

void jobs_destroy(struct jobs *jobs)
{
    if (jobs) {
        g_assert(list_is_empty(&jobs->list));
        g_free(jobs);
    }
}

struct graph *jobs_graph(struct jobs *jobs)
{
    return jobs->graph;
}

struct job *jobs_find(struct jobs *jobs, const char *id)
{
    list_for_each (link, &jobs->list) {
        struct job *job = container_of(link, struct job, link);
        if (strcmp(job->id, id) == 0) {
            return job;
        }
    }
    return NULL;
}

struct job *jobs_find_or_error(struct jobs *jobs, const char *id, struct error **err)
{
    struct job *job = jobs_find(jobs, id);
    if (!job) {
        error_set(err, -ENOENT, "Job '%s' not found", id);
    }
    return job;
}

struct job *jobs_find_block_or_error(struct jobs *jobs, const char *id, struct error **err)
{
    struct job *job = jobs_find(jobs, id);
    if (job && job->policy->plain) {
        job = NULL;
    }
    if (!job) {
        error_set_class(err, ERROR_DEVICE_NOT_ACTIVE, -ENOENT, "Block job '%s' not found", id);
    }
    return job;
}

/* --- states and events --- */

static void job_emit(struct job *job, json_t *event)
{
    job->jobs->emit(event, job->jobs->argument);
}

static void job_set_status(struct job *job, enum job_status status)
{
    g_assert(job_state_leads_to(job->status, status));
    job->status = status;
    job_emit(job, event_job_status_change(job->id, status));
}

/* Asks the policy how far it is; what users see never goes back. */
static void job_update_progress(struct job *job)
{
    uint64_t done = job->done, total = job->total;
    if (job->policy->progress && job->state) {
        job->policy->progress(job, &done, &total);
    }
    job->done = max_u64(job->done, done);
    job->total = max_u64(total, job->done);
}

int job_percent(void *argument)
{
    struct job *job = *(struct job **)argument;
    if (!job) {
        return -1;
    }
    job_update_progress(job);
    return job->total ? (int)((unsigned __int128)job->done * 100 / job->total) : -1;
}

static void job_emit_end(struct job *job, bool cancelled, bool has_state, enum job_target_state state)
{
    enum job_type type = job->policy->type;
    int64_t total = (int64_t)job->total, done = (int64_t)job->done, speed = job->speed;
    if (!job->policy->plain) {
        job_emit(job, cancelled
                          ? event_block_job_cancelled(type, job->id, total, done, speed, has_state, state)
                          : event_block_job_completed(type, job->id, total, done, speed, job->error, has_state, state));
    }
}

void job_ready(struct job *job)
{
    job_update_progress(job);
    job_set_status(job, JOB_STATUS_READY);
    job_emit(job,
             event_block_job_ready(job->policy->type, job->id, (int64_t)job->total, (int64_t)job->done, job->speed));
}

/* --- life --- */

int job_check_id(struct jobs *jobs, const char *id, struct error **err)
{
    bool fit = g_ascii_isalpha(id[0]) && strlen(id) <= 255;
    for (const char *at = id; fit && *at; at++) {
        fit = g_ascii_isalnum(*at) || strchr("-._", *at);
    }
    if (!fit) {
        int code = error_set(err, -EINVAL, "Invalid job ID '%s'", id);
        error_hint(err, "%s",
                   id[0] ? "An ID begins with a letter and goes on with letters, digits, '-', '.' and '_'"
                         : "Give a job-id: a node has no name of a device to take it from");
        return code;
    }
    if (access_id_waits(jobs->graph->ledger, id)) {
        return error_set(err, -EEXIST, "Job ID '%s' already in use by an operation that waits for its turn", id);
    }
    if (jobs_find(jobs, id)) {
        return error_set(err, -EEXIST, "Job ID '%s' already in use", id);
    }
    if (jobs->closing) {
        return error_set(err, -ESHUTDOWN, "Job '%s' cannot start: shutting down", id);
    }
    if (jobs->count >= JOBS_MAX) {
        return error_set(err, -EMFILE, "Job '%s' cannot start: there are %u jobs already", id, jobs->count);
    }
    return 0;
}

/* copy_control.rest: nothing is in flight, and somebody wants it to stay so. */
static void coroutine_fn job_rest(struct copy_control *control)
{
    struct job *job = container_of(control, struct job, control);
    enum job_status before = job->status;
    g_assert(before == JOB_STATUS_RUNNING || before == JOB_STATUS_READY);
    job_set_status(job, before == JOB_STATUS_READY ? JOB_STATUS_STANDBY : JOB_STATUS_PAUSED);
    if (job->policy->resting) {
        job->policy->resting(job, true);
    }
    while (control->pauses && !control->cancelled) {
        loop_sleep_ns(&control->sleep, JOB_LONG_NS);
    }
    job_set_status(job, before);
    if (job->policy->resting) {
        job->policy->resting(job, false);
    }
}

struct job *job_create(struct jobs *jobs, const struct job_policy *policy, const struct job_config *config)
{
    struct job *job = g_new0(struct job, 1);
    job->jobs = jobs;
    job->id = g_strdup(config->id);
    job->policy = policy;
    job->control.rest = job_rest;
    job->speed = config->speed;
    job->on_source_error = config->on_source_error;
    job->on_target_error = config->on_target_error;
    job->auto_finalize = config->auto_finalize;
    job->auto_dismiss = config->auto_dismiss;
    job->holds = 1;
    co_mutex_init(&job->ended_mutex);
    co_queue_init(&job->ended);
    speed_set(&job->control.speed, (uint64_t)config->speed, loop_now_ns());
    list_append(&jobs->list, &job->link);
    jobs->count++;
    if (config->group) {
        job_group_join(config->group, job);
    }
    return job;
}

static void job_unhold(struct job *job)
{
    if (--job->holds == 0) {
        co_mutex_destroy(&job->ended_mutex);
        g_free(job->error);
        g_free(job->id);
        g_free(job);
    }
}

static void job_forget(struct job *job)
{
    list_remove(&job->link);
    job->jobs->count--;
    job_unhold(job);
}

/* The job is concluded and leaves. */
static void job_remove(struct job *job)
{
    job_set_status(job, JOB_STATUS_NULL);
    job_forget(job);
}

/* Waits for the end, whichever it is. */
static void coroutine_fn job_wait(struct job *job)
{
    job->holds++;
    co_mutex_lock(&job->ended_mutex);
    while (!job->concluded) {
        co_queue_wait(&job->ended, &job->ended_mutex);
    }
    co_mutex_unlock(&job->ended_mutex);
    job_unhold(job);
}

/* Waiting and pending: until the others of its group are there too, and the user, or auto-finalize, wants the last
 * step. */
static int coroutine_fn job_await_finalize(struct job *job)
{
    job_set_status(job, JOB_STATUS_WAITING);
    job->idle = true;
    int result = job_group_meet(job);
    if (result == 0) {
        job_set_status(job, JOB_STATUS_PENDING);
        if (!job->auto_finalize && !job->policy->plain) {
            job_emit(job, event_block_job_pending(job->policy->type, job->id));
        }
        while (!job_group_is_finalized(job) && !job->control.cancelled) {
            loop_sleep_ns(&job->control.sleep, JOB_LONG_NS);
        }
        result = job->control.cancelled ? -ECANCELED : job_group_take_turn(job);
    }
    job->idle = false;
    return result;
}

/* The last step, in agreement with the others of the group. */
static int coroutine_fn job_last_step(struct job *job, struct error **err)
{
    int result = job_await_finalize(job);
    if (result == 0) {
        result = job->policy->prepare(job, err);
        if (result == 0) {
            result = job_group_agree(job);
        }
        if (result == 0 && job->policy->commit) {
            job->policy->commit(job);
        }
    }
    return result;
}

static void job_note_error(struct job *job, int result, struct error *error)
{
    if (result < 0 && result != -ECANCELED) {
        job->error = g_strdup(error ? error->message : g_strerror(-result));
    }
}

static void coroutine_fn job_end(struct job *job, bool cancelled)
{
    job_update_progress(job);
    bool has_state = job->policy->target_state;
    enum job_target_state state = has_state ? job->policy->target_state(job) : JOB_TARGET_STATE_UNCHANGED;
    job->policy->clean(job);
    job->state = NULL;
    job_emit_end(job, cancelled, has_state, state);
    job_set_status(job, JOB_STATUS_CONCLUDED);
    job->idle = true;
    bool dismiss = job->auto_dismiss || job->jobs->closing;
    job->holds++;
    co_mutex_lock(&job->ended_mutex);
    job->concluded = true;
    co_queue_wake_all(&job->ended);
    co_mutex_unlock(&job->ended_mutex);
    if (dismiss && job->status == JOB_STATUS_CONCLUDED) {
        job_remove(job);
    }
    job_unhold(job);
}

static void job_entry(void *argument)
{
    struct job *job = argument;
    auto_error error = NULL;
    int result = job->policy->run(job, &error);
    if (result == 0 && job->left_error) {
        result = job->left_error;
    }
    if (result == 0) {
        result = job->control.cancelled ? -ECANCELED : job_last_step(job, &error);
    }
    job_note_error(job, result, error);
    job->result = result;
    job_group_leave(job);
    if (result < 0) {
        job_set_status(job, JOB_STATUS_ABORTING);
        if (job->policy->abort) {
            job->policy->abort(job);
        }
    }
    job_end(job, result == -ECANCELED && job->control.cancelled);
}

void job_start(struct job *job)
{
    job_set_status(job, JOB_STATUS_CREATED);
    job_set_status(job, JOB_STATUS_RUNNING);
    loop_spawn(loop_self(), job_entry, job);
}

void job_discard(struct job *job)
{
    g_assert(job->status == JOB_STATUS_UNDEFINED);
    job_group_leave(job);
    job->holds++;
    co_mutex_lock(&job->ended_mutex);
    job->concluded = true;
    co_queue_wake_all(&job->ended);
    co_mutex_unlock(&job->ended_mutex);
    job_forget(job);
    job_unhold(job);
}

void coroutine_fn job_idle(struct job *job, int64_t duration_ns)
{
    if (job->control.pauses && !job->control.cancelled && !job->end_asked) {
        job_rest(&job->control);
        return;
    }
    job->idle = true;
    loop_sleep_ns(&job->control.sleep, duration_ns);
    job->idle = false;
}

/* --- errors --- */

static enum block_error_action job_error_action(const struct job *job, bool reading, int error)
{
    if (job->status == JOB_STATUS_PENDING) {
        return BLOCK_ERROR_ACTION_REPORT; /* users are held up: no time to wait for somebody */
    }
    switch (reading ? job->on_source_error : job->on_target_error) {
    case BLOCKDEV_ON_ERROR_IGNORE:
        return BLOCK_ERROR_ACTION_IGNORE;
    case BLOCKDEV_ON_ERROR_STOP:
        return BLOCK_ERROR_ACTION_STOP;
    case BLOCKDEV_ON_ERROR_ENOSPC:
    case BLOCKDEV_ON_ERROR_AUTO:
        return error == -ENOSPC ? BLOCK_ERROR_ACTION_STOP : BLOCK_ERROR_ACTION_REPORT;
    default:
        return BLOCK_ERROR_ACTION_REPORT;
    }
}

enum copy_verdict job_failed(void *argument, bool reading, int error)
{
    struct job *job = argument;
    if (job->control.cancelled) {
        return COPY_FAIL;
    }
    enum block_error_action action = job_error_action(job, reading, error);
    if (action == BLOCK_ERROR_ACTION_STOP && job->io_status != BLOCK_DEVICE_IO_STATUS_OK) {
        return COPY_PAUSE; /* others of the same flock */
    }
    job_emit(job, event_block_job_error(job->id, reading ? IO_OPERATION_TYPE_READ : IO_OPERATION_TYPE_WRITE, action));
    switch (action) {
    case BLOCK_ERROR_ACTION_STOP:
        job->io_status = error == -ENOSPC ? BLOCK_DEVICE_IO_STATUS_NOSPACE : BLOCK_DEVICE_IO_STATUS_FAILED;
        if (!job->user_paused) {
            job->user_paused = true;
            job->control.pauses++;
        }
        return COPY_PAUSE;
    case BLOCK_ERROR_ACTION_IGNORE:
        if (!job->policy->ignore_leaves) {
            return COPY_RETRY;
        }
        job->left_error = job->left_error ? job->left_error : error;
        return COPY_LEAVE;
    default:
        return COPY_FAIL;
    }
}

bool coroutine_fn job_retries(struct job *job, bool reading, int error, bool *ret_leave)
{
    enum copy_verdict verdict = job_failed(job, reading, error);
    if (ret_leave) {
        *ret_leave = verdict == COPY_LEAVE;
    }
    if (job->control.cancelled || verdict == COPY_FAIL || (verdict == COPY_LEAVE && ret_leave)) {
        return false;
    }
    if (job->control.pauses) {
        job_rest(&job->control);
    } else {
        job_idle(job, JOB_RETRY_NS);
    }
    return !job->control.cancelled;
}

int coroutine_fn job_flush(struct job *job, struct backend *target, struct error **err)
{
    int result;
    while ((result = backend_flush(target)) < 0) {
        bool leave;
        if (job_retries(job, false, result, &leave)) {
            continue;
        }
        if (leave || job->control.cancelled) {
            return leave ? 0 : -ECANCELED;
        }
        return error_set_errno(err, result, "Cannot flush node '%s'", backend_node(target)->name);
    }
    return 0;
}

/* --- verbs --- */

static int job_check_verb(const struct job *job, enum job_verb verb, struct error **err)
{
    if (job_state_takes(job->status, verb)) {
        return 0;
    }
    return error_set(err, -EPERM, "Job '%s' in state '%s' cannot accept command verb '%s'", job->id,
                     job_status_name(job->status), job_verb_name(verb));
}

int job_pause(struct job *job, struct error **err)
{
    int result = job_check_verb(job, JOB_VERB_PAUSE, err);
    if (result == 0 && job->user_paused) {
        result = error_set(err, -EBUSY, "Job '%s' is already paused", job->id);
    }
    if (result == 0) {
        job->user_paused = true;
        job->control.pauses++;
        copy_control_wake(&job->control);
    }
    return result;
}

static void job_end_user_pause(struct job *job)
{
    if (job->user_paused) {
        job->user_paused = false;
        job->control.pauses--;
    }
    job->io_status = BLOCK_DEVICE_IO_STATUS_OK;
    copy_control_wake(&job->control);
}

int job_resume(struct job *job, struct error **err)
{
    int result = job_check_verb(job, JOB_VERB_RESUME, err);
    if (result == 0 && !job->user_paused) {
        result = error_set(err, -EPERM, "Can't resume job '%s', which was not paused", job->id);
    }
    if (result == 0) {
        job_end_user_pause(job);
    }
    return result;
}

int job_cancel(struct job *job, bool force, struct error **err)
{
    int result = job_check_verb(job, JOB_VERB_CANCEL, err);
    if (result < 0) {
        return result;
    }
    bool ready = job->status == JOB_STATUS_READY || job->status == JOB_STATUS_STANDBY;
    if (job->beyond) {
        return 0; /* it has lost the race, and will be told so by BLOCK_JOB_COMPLETED */
    }
    if (ready && !force) {
        job->end_asked = true;
        job_end_user_pause(job);
    } else {
        job->control.cancelled = true;
    }
    copy_control_wake(&job->control);
    return 0;
}

int job_set_speed(struct job *job, int64_t bytes_per_second, struct error **err)
{
    int result = job_check_verb(job, JOB_VERB_SET_SPEED, err);
    if (result == 0 && bytes_per_second < 0) {
        result = error_set(err, -EINVAL, "Parameter 'speed' expects a non-negative value");
    }
    if (result == 0) {
        job->speed = bytes_per_second;
        speed_set(&job->control.speed, (uint64_t)bytes_per_second, loop_now_ns());
        copy_control_wake(&job->control);
    }
    return result;
}

int job_complete(struct job *job, struct error **err)
{
    int result = job_check_verb(job, JOB_VERB_COMPLETE, err);
    if (result == 0 && (job->complete_asked || job->end_asked)) {
        result = error_set(err, -EBUSY, "Job '%s' is ending already", job->id);
    }
    if (result == 0) {
        job->complete_asked = true;
        copy_control_wake(&job->control);
    }
    return result;
}

int coroutine_fn job_change(struct job *job, const struct block_job_change_options *options, struct error **err)
{
    int result = job_check_verb(job, JOB_VERB_CHANGE, err);
    if (result == 0 && !job->policy->change) {
        result = error_set(err, -ENOTSUP, "Job '%s' has nothing that could be changed", job->id);
    }
    return result < 0 ? result : job->policy->change(job, options, err);
}

int coroutine_fn job_finalize(struct job *job, struct error **err)
{
    int result = job_check_verb(job, JOB_VERB_FINALIZE, err);
    if (result == 0) {
        job->finalize_asked = true;
        job_group_wake(job);
        job_wait(job);
    }
    return result;
}

int job_dismiss(struct job *job, struct error **err)
{
    int result = job_check_verb(job, JOB_VERB_DISMISS, err);
    if (result == 0) {
        job_remove(job);
    }
    return result;
}

/* --- questions --- */

struct job_info_list *jobs_query(struct jobs *jobs)
{
    struct job_info_list *list = g_new0(struct job_info_list, 1);
    list_for_each (link, &jobs->list) {
        struct job *job = container_of(link, struct job, link);
        if (job->status == JOB_STATUS_UNDEFINED) {
            continue;
        }
        struct job_info *info = g_new0(struct job_info, 1);
        job_update_progress(job);
        info->id = g_strdup(job->id);
        info->type = job->policy->type;
        info->status = job->status;
        info->current_progress = (int64_t)job->done;
        info->total_progress = (int64_t)job->total;
        info->error = g_strdup(job->error);
        job_info_list_append(list, info);
    }
    return list;
}

struct block_job_info_list *jobs_query_block(struct jobs *jobs)
{
    struct block_job_info_list *list = g_new0(struct block_job_info_list, 1);
    list_for_each (link, &jobs->list) {
        struct job *job = container_of(link, struct job, link);
        if (job->status == JOB_STATUS_UNDEFINED || job->policy->plain) {
            continue;
        }
        struct block_job_info *info = g_new0(struct block_job_info, 1);
        bool resting = job->status == JOB_STATUS_PAUSED || job->status == JOB_STATUS_STANDBY;
        job_update_progress(job);
        info->type = job->policy->type;
        info->device = g_strdup(job->id);
        info->len = (int64_t)job->total;
        info->offset = (int64_t)job->done;
        info->busy = !job->idle && !resting;
        info->paused = job->control.pauses > 0;
        info->speed = job->speed;
        info->io_status = job->io_status;
        info->ready = job->status == JOB_STATUS_READY || job->status == JOB_STATUS_STANDBY;
        info->status = job->status;
        info->auto_finalize = job->auto_finalize;
        info->auto_dismiss = job->auto_dismiss;
        info->error = g_strdup(job->error);
        if (job->policy->synced && job->state) {
            info->actively_synced = job->policy->synced(job, &info->has_actively_synced);
        }
        block_job_info_list_append(list, info);
    }
    return list;
}

void coroutine_fn jobs_cancel_all_and_wait(struct jobs *jobs)
{
    jobs->closing = true;
    list_for_each (link, &jobs->list) {
        struct job *job = container_of(link, struct job, link);
        if (job_state_takes(job->status, JOB_VERB_CANCEL)) {
            job_cancel(job, true, NULL);
        } else if (job->status == JOB_STATUS_UNDEFINED) {
            job->control.cancelled = true; /* if it is started at all */
        }
    }
    while (!list_is_empty(&jobs->list)) {
        struct job *job = container_of(jobs->list.next, struct job, link);
        if (job->status == JOB_STATUS_CONCLUDED) {
            job_remove(job);
        } else {
            job_wait(job);
        }
    }
}

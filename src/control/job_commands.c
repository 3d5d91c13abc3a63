/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Handlers of the commands about jobs: those that start one, and the verbs in their two spellings (job-* by id, which
 * answer GenericError for an unknown one, and block-job-* by device, which answer DeviceNotActive). Each runs in a
 * coroutine on the control loop and is called by the generated dispatcher only. Which verb a state knows is a table of
 * src/job/state.c.
 */
#include "control/control.h"
#include "control/waiting.h"
#include "job/commit.h"
#include "job/job.h"
#include "job/stream.h"
#include "schema/commands.h"
#include <errno.h>

static int refuse_when_quitting(const struct control *control, struct error **err)
{
    return control->quitting ? error_set(err, -ESHUTDOWN, "The program is about to end: no new job is started") : 0;
}

int coroutine_fn command_block_commit(struct control *control, struct block_commit_args *args, struct error **err)
{
    int code = refuse_when_quitting(control, err);

    return code ? code : commit_start(control->jobs, args, err);
}

int coroutine_fn command_block_commit_check(struct control *control, struct block_commit_args *args,
                                            json_t **ret_claims, struct error **err)
{
    int code = refuse_when_quitting(control, err);

    return code ? code : commit_check(control->jobs, args, ret_claims, err);
}

int coroutine_fn command_block_stream(struct control *control, struct block_stream_args *args, struct error **err)
{
    int code = refuse_when_quitting(control, err);

    return code ? code : stream_start(control->jobs, args, err);
}

int coroutine_fn command_block_stream_check(struct control *control, struct block_stream_args *args,
                                            json_t **ret_claims, struct error **err)
{
    int code = refuse_when_quitting(control, err);

    return code ? code : stream_check(control->jobs, args, ret_claims, err);
}

int coroutine_fn command_query_jobs(struct control *control, struct job_info_list **ret, struct error **err)
{
    *ret = jobs_query(control->jobs);
    return 0;
}

int coroutine_fn command_query_block_jobs(struct control *control, struct block_job_info_list **ret, struct error **err)
{
    *ret = jobs_query_block(control->jobs);
    return 0;
}

/* --- the verbs by id --- */

int coroutine_fn command_job_pause(struct control *control, struct job_pause_args *args, struct error **err)
{
    struct job *job = jobs_find_or_error(control->jobs, args->id, err);

    return job ? job_pause(job, err) : -ENOENT;
}

int coroutine_fn command_job_resume(struct control *control, struct job_resume_args *args, struct error **err)
{
    struct job *job = jobs_find_or_error(control->jobs, args->id, err);

    return job ? job_resume(job, err) : -ENOENT;
}

int coroutine_fn command_job_cancel(struct control *control, struct job_cancel_args *args, struct error **err)
{
    if (waiting_cancel(control, "job", args->id)) {
        return 0;
    }
    struct job *job = jobs_find_or_error(control->jobs, args->id, err);

    return job ? job_cancel(job, true, err) : -ENOENT;
}

int coroutine_fn command_job_complete(struct control *control, struct job_complete_args *args, struct error **err)
{
    struct job *job = jobs_find_or_error(control->jobs, args->id, err);

    return job ? job_complete(job, err) : -ENOENT;
}

int coroutine_fn command_job_finalize(struct control *control, struct job_finalize_args *args, struct error **err)
{
    struct job *job = jobs_find_or_error(control->jobs, args->id, err);

    return job ? job_finalize(job, err) : -ENOENT;
}

int coroutine_fn command_job_dismiss(struct control *control, struct job_dismiss_args *args, struct error **err)
{
    struct job *job = jobs_find_or_error(control->jobs, args->id, err);

    return job ? job_dismiss(job, err) : -ENOENT;
}

/* --- the verbs by device --- */

int coroutine_fn command_block_job_pause(struct control *control, struct block_job_pause_args *args, struct error **err)
{
    struct job *job = jobs_find_block_or_error(control->jobs, args->device, err);

    return job ? job_pause(job, err) : -ENOENT;
}

int coroutine_fn command_block_job_resume(struct control *control, struct block_job_resume_args *args,
                                          struct error **err)
{
    struct job *job = jobs_find_block_or_error(control->jobs, args->device, err);

    return job ? job_resume(job, err) : -ENOENT;
}

int coroutine_fn command_block_job_cancel(struct control *control, struct block_job_cancel_args *args,
                                          struct error **err)
{
    if (waiting_cancel(control, "job", args->device)) {
        return 0;
    }
    struct job *job = jobs_find_block_or_error(control->jobs, args->device, err);

    return job ? job_cancel(job, args->force, err) : -ENOENT;
}

int coroutine_fn command_block_job_complete(struct control *control, struct block_job_complete_args *args,
                                            struct error **err)
{
    struct job *job = jobs_find_block_or_error(control->jobs, args->device, err);

    return job ? job_complete(job, err) : -ENOENT;
}

int coroutine_fn command_block_job_finalize(struct control *control, struct block_job_finalize_args *args,
                                            struct error **err)
{
    struct job *job = jobs_find_block_or_error(control->jobs, args->id, err);

    return job ? job_finalize(job, err) : -ENOENT;
}

int coroutine_fn command_block_job_dismiss(struct control *control, struct block_job_dismiss_args *args,
                                           struct error **err)
{
    struct job *job = jobs_find_block_or_error(control->jobs, args->id, err);

    return job ? job_dismiss(job, err) : -ENOENT;
}

int coroutine_fn command_block_job_set_speed(struct control *control, struct block_job_set_speed_args *args,
                                             struct error **err)
{
    struct job *job = jobs_find_block_or_error(control->jobs, args->device, err);

    return job ? job_set_speed(job, args->speed, err) : -ENOENT;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What becomes of a plan, for every verb: asked about only (--dry-run), or its images made, its commands given as one,
 * its turn awaited (--queue), its jobs awaited (or not, --async), and what was opened for it closed again.
 *
 *   making --failed--> undone            starting --refused--> undone
 *   starting --begun--> waiting --ended well--> closed (or left open, if it is what users see from now on)
 *                          |------failed, cancelled--> undone
 *                          `------interrupted--> left as it is; the user is told how to go on
 *
 * 1. Several commands are one transaction: all or nothing, and one point in time.
 * 2. Access options are Interlock's: a daemon without them is told apart before anything is made.
 */
#include "base/size.h"
#include "tool/access.h"
#include "tool/arguments.h"
#include "tool/verb/verb.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

#define STATUS_INTERRUPTED 130

static void step_free(struct step *step)
{
    json_decref(step->arguments);
    json_decref(step->foreseen_arguments);
    g_free(step->job_id);
    g_free(step);
}

void plan_clear(struct plan *plan)
{
    for (unsigned i = 0; i < plan->steps->len; i++) {
        step_free(plan->steps->pdata[i]);
    }
    for (unsigned i = 0; i < plan->targets->len; i++) {
        target_free(plan->targets->pdata[i]);
    }
    g_ptr_array_unref(plan->steps);
    g_ptr_array_unref(plan->targets);
    json_decref(plan->nodes);
}

static struct step *step_at(const struct plan *plan, unsigned index)
{
    return plan->steps->pdata[index];
}

struct step *plan_add(struct plan *plan, const char *command, json_t *arguments)
{
    struct step *step = g_new0(struct step, 1);

    step->command = command;
    step->arguments = arguments;
    g_ptr_array_add(plan->steps, step);
    return step;
}

/* Is a job of that id there, or planned? */
static int job_id_taken(const struct plan *plan, const char *id, bool *ret, struct error **err)
{
    auto_json jobs = NULL;
    int code = client_execute(plan->client, "query-jobs", NULL, &jobs, err);
    size_t index;
    json_t *job;

    *ret = false;
    json_array_foreach(jobs, index, job)
    {
        *ret = *ret || !g_strcmp0(json_string_value(json_object_get(job, "id")), id);
    }
    for (unsigned i = 0; i < plan->steps->len; i++) {
        *ret = *ret || !g_strcmp0(step_at(plan, i)->job_id, id);
    }
    return code;
}

int plan_job_id(const struct plan *plan, const char *prefix, const char *node, char **ret, struct error **err)
{
    bool taken = true;
    int code = 0;

    node += node[0] == '#'; /* an implicit node's name begins so, which a job's may not */
    for (unsigned i = 1; taken && !code; i++) {
        g_free(*ret);
        *ret = i > 1 ? g_strdup_printf("%s-%s-%u", prefix, node, i) : g_strdup_printf("%s-%s", prefix, node);
        code = job_id_taken(plan, *ret, &taken, err);
    }
    return code;
}

/* "on-error" where a job has one policy, else one for each side. */
static void add_policy(json_t *arguments, const char *command, const char *policy)
{
    if (g_str_has_suffix(command, "-mirror") || g_str_has_suffix(command, "-backup")) {
        json_object_set_new(arguments, "on-source-error", json_string(policy));
        json_object_set_new(arguments, "on-target-error", json_string(policy));
    } else {
        json_object_set_new(arguments, "on-error", json_string(policy));
    }
}

int plan_add_job(struct plan *plan, const char *command, const char *node, json_t *arguments, struct step **ret,
                 struct error **err)
{
    const struct verb_options *options = plan->options;
    struct step *step = plan_add(plan, command, arguments);
    uint64_t speed = 0;
    char *id = g_strdup(options->job_id);
    int code = id ? 0 : plan_job_id(plan, plan->verb, node, &id, err);

    step->job_id = id;
    if (!code && options->job_id && plan->steps->len > 1) {
        code = error_set(err, -EINVAL, "--job-id is for one job");
    }
    if (!code && options->speed && size_parse(options->speed, &speed) < 0) {
        code = error_set(err, -EINVAL, "'%s' is no number of bytes per second", options->speed);
    }
    if (code) {
        return code;
    }
    json_object_set_new(arguments, "job-id", json_string(id));
    if (options->speed) {
        json_object_set_new(arguments, "speed", json_integer((json_int_t)speed));
    }
    if (options->on_error) {
        add_policy(arguments, command, options->on_error);
    }
    if (ret) {
        *ret = step;
    }
    return 0;
}

/* The command that does all steps, and its arguments as a new reference. `foreseen`: as a dry run asks about them. */
static json_t *plan_arguments(const struct plan *plan, bool foreseen, const char **ret_command)
{
    json_t *actions = json_array();
    unsigned jobs = 0;

    for (unsigned i = 0; i < plan->steps->len; i++) {
        const struct step *step = step_at(plan, i);
        bool other = foreseen && step->foreseen_by;
        const char *command = other ? step->foreseen_by : step->command;
        json_t *arguments = other ? step->foreseen_arguments : step->arguments;

        if (plan->steps->len == 1) {
            json_decref(actions);
            *ret_command = command;
            return json_incref(arguments);
        }
        jobs += step->job_id != NULL;
        json_array_append_new(actions, json_pack("{s:s, s:O}", "type", command, "data", arguments));
    }
    *ret_command = "transaction";
    json_t *all = json_pack("{s:o}", "actions", actions);

    if (jobs == plan->steps->len) { /* one point in time is worth something only if all are done */
        json_object_set_new(all, "properties", json_pack("{s:s}", "completion-mode", "grouped"));
    }
    return all;
}

static int plan_foresee(struct plan *plan, int *ret_status, struct error **err)
{
    auto_json check = NULL;
    const char *command;
    json_t *arguments = plan_arguments(plan, true, &command);
    int code = client_execute(plan->client, "access-check",
                              json_pack("{s:s, s:o}", "command", command, "arguments", arguments), &check, err);

    if (code) {
        return code;
    }
    if (json_is_true(json_object_get(check, "admitted"))) {
        code = targets_foresee(plan, err);
    }
    if (!code) {
        access_print_check(check);
        *ret_status = json_is_true(json_object_get(check, "admitted")) ? 0 : 1;
    }
    return code;
}

static void add_queue_options(const struct verb_options *options, json_t *arguments)
{
    if (options->queue) {
        json_object_set_new(arguments, "on-conflict", json_string("wait"));
    }
    if (options->queue_timeout > 0) {
        json_object_set_new(arguments, "on-conflict-timeout", json_real(options->queue_timeout));
    }
}

/* How to go on with what is left running. */
static void plan_tell_how(const struct plan *plan, FILE *to)
{
    for (unsigned i = 0; i < plan->steps->len; i++) {
        const char *id = step_at(plan, i)->job_id;

        if (!id) {
            continue;
        }
        if (plan->at_ready == PROGRESS_COMPLETE || plan->options->keep_ready) {
            fprintf(to, "  interlock job complete %s   when it is ready: takes the last step\n", id);
        }
        if (plan->at_ready != PROGRESS_COMPLETE && plan->at_ready != PROGRESS_WAIT) {
            fprintf(to, "  interlock job cancel %s   when it is ready: ends it, and the copy is whole\n", id);
        } else {
            fprintf(to, "  interlock job wait %s   follows it\n  interlock job cancel %s   ends it\n", id, id);
        }
    }
    for (unsigned i = 0; i < plan->targets->len; i++) {
        const struct target *target = plan->targets->pdata[i];

        if (target->opened && !plan->stays) {
            fprintf(to, "  interlock close %s   afterwards: closes %s\n", target->node, target->path);
        }
    }
}

/* Gives the commands, and waits until they have begun. *ret_waits_as: interrupted before (g_free()). */
static int plan_start(struct plan *plan, char **ret_waits_as, struct error **err)
{
    const struct verb_options *options = plan->options;
    auto_json before = NULL;
    const struct step *first = step_at(plan, 0);
    const char *command;
    int code = options->queue ? turn_list(plan->client, &before, err) : 0;

    if (!code) {
        json_t *arguments = plan_arguments(plan, false, &command);

        add_queue_options(options, arguments);
        code = client_execute(plan->client, command, arguments, NULL, err);
    }
    if (!code && options->queue && !options->async) {
        code = turn_await(plan->client, command, first->command, first->job_id, before, ret_waits_as, err);
    }
    return code;
}

/* The jobs' ids, g_free() the array alone; *ret_count may be 0. */
static char **plan_jobs(const struct plan *plan, unsigned *ret_count)
{
    char **ids = g_new0(char *, plan->steps->len + 1);

    *ret_count = 0;
    for (unsigned i = 0; i < plan->steps->len; i++) {
        if (step_at(plan, i)->job_id) {
            ids[(*ret_count)++] = step_at(plan, i)->job_id;
        }
    }
    return ids;
}

static bool jobs_go_on(const struct plan *plan, char *const *ids)
{
    auto_json jobs = NULL;
    size_t index;
    json_t *job;

    client_execute(plan->client, "query-jobs", NULL, &jobs, NULL);
    json_array_foreach(jobs, index, job)
    {
        const char *id = json_string_value(json_object_get(job, "id"));
        const char *status = json_string_value(json_object_get(job, "status"));

        if (id && g_strv_contains((const char *const *)ids, id) && g_strcmp0(status, "concluded") != 0) {
            return true;
        }
    }
    return false;
}

static void plan_dismiss(const struct plan *plan)
{
    for (unsigned i = 0; i < plan->steps->len; i++) {
        const struct step *step = step_at(plan, i);

        if (step->to_dismiss) {
            client_execute(plan->client, "job-dismiss", json_pack("{s:s}", "id", step->job_id), NULL, NULL);
        }
    }
}

/* Until the jobs have ended, and tidies up. */
static int plan_finish(struct plan *plan, char *const *ids, unsigned count, int *ret_status, struct error **err)
{
    int code = count ? progress_wait_jobs(plan->client, ids, count, plan->at_ready, err) : 0;

    if (code && jobs_go_on(plan, ids)) {
        fprintf(stderr, "%s '%s'%s on:\n", count > 1 ? "jobs" : "job", ids[0], count > 1 ? "... go" : " goes");
        plan_tell_how(plan, stderr);
        *ret_status = STATUS_INTERRUPTED;
        return code;
    }
    if (!code && plan->at_ready == PROGRESS_LEAVE && jobs_go_on(plan, ids)) {
        plan_tell_how(plan, stdout);
        return 0;
    }
    plan_dismiss(plan);
    if (code || !plan->stays) {
        targets_close(plan, code != 0);
    }
    return code;
}

/* The commands have been taken, and nobody waits for the jobs. */
static void plan_leave(const struct plan *plan, char *const *ids, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        printf("%s\n", ids[i]);
    }
    fflush(stdout);
    if (plan->targets->len) {
        plan_tell_how(plan, stderr);
    }
}

int plan_run(struct plan *plan, int *ret_status, struct error **err)
{
    const struct verb_options *options = plan->options;
    g_autofree char *waits_as = NULL;
    unsigned count;
    g_autofree char **ids = plan_jobs(plan, &count);
    int code = 0;

    *ret_status = 0;
    if (!plan->steps->len) {
        return 0;
    }
    for (unsigned i = 0; i < plan->steps->len && !code; i++) {
        code = arguments_add(step_at(plan, i)->arguments, options->arguments, err);
        if (!code && step_at(plan, i)->foreseen_arguments) {
            code = arguments_add(step_at(plan, i)->foreseen_arguments, options->arguments, err);
        }
    }
    if (!code && (options->dry_run || options->queue)) { /* before anything is made */
        code = plan->interlock
                   ? 0
                   : error_set(err, -ENOTSUP, "%s needs Interlock: this daemon has no access control to ask",
                               options->dry_run ? "--dry-run" : "--queue");
    }
    if (code || options->dry_run) {
        return code ? code : plan_foresee(plan, ret_status, err);
    }
    code = targets_make(plan, err);
    if (code) {
        return code;
    }
    code = plan_start(plan, &waits_as, err);
    if (waits_as) {
        fprintf(stderr, "'%s' goes on waiting; 'interlock access cancel %s' ends that\n", waits_as, waits_as);
        *ret_status = STATUS_INTERRUPTED;
        return code;
    }
    if (code) {
        targets_close(plan, true);
        return code;
    }
    if (options->async || plan->endless) {
        plan_leave(plan, ids, count);
        return 0;
    }
    return plan_finish(plan, ids, count, ret_status, err);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock job list|wait|cancel|complete|pause|resume|finalize|dismiss|set-speed|change`: the jobs of a running
 * daemon. A client of the monitor: each verb is one QMP command; the table of verbs below is also the help text.
 * Waiting is progress.c's. `list` needs no job; every other verb names one.
 */
#include "base/size.h"
#include "tool/client.h"
#include "tool/progress.h"
#include "tool/tool.h"
#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

struct job_options {
    char *qmp, *copy_mode;
    gboolean force;
    char **words; /* verb and job names */
};

static int job_list(struct client *client, const struct job_options *options, const char *id, struct error **err)
{
    auto_json jobs = NULL;
    int code = client_execute(client, "query-jobs", NULL, &jobs, err);
    size_t index;
    json_t *job;

    if (code) {
        return code;
    }
    if (!json_array_size(jobs)) {
        printf("no jobs\n");
        return 0;
    }
    printf("%-20s %-8s %-10s %9s  %s\n", "ID", "TYPE", "STATUS", "PROGRESS", "ERROR");
    json_array_foreach(jobs, index, job)
    {
        const char *name = "", *type = "", *status = "", *error = "";
        json_int_t done = 0, total = 0;

        json_unpack(job, "{s:s, s:s, s:s, s:I, s:I, s?s}", "id", &name, "type", &type, "status", &status,
                    "current-progress", &done, "total-progress", &total, "error", &error);
        printf("%-20s %-8s %-10s %7.1f %%  %s\n", name, type, status,
               total ? 100.0 * (double)done / (double)total : 0.0, error);
    }
    return 0;
}

static int job_wait(struct client *client, const struct job_options *options, const char *id, struct error **err)
{
    progress_catch_interrupt();
    return progress_wait_jobs(client, options->words + 1, g_strv_length(options->words + 1), PROGRESS_WAIT, err);
}

static int job_cancel(struct client *client, const struct job_options *options, const char *id, struct error **err)
{
    return client_execute(client, "block-job-cancel",
                          json_pack("{s:s, s:b}", "device", id, "force", (int)options->force), NULL, err);
}

static int job_command(struct client *client, const char *command, const char *id, struct error **err)
{
    return client_execute(client, command, json_pack("{s:s}", "id", id), NULL, err);
}

static int job_complete(struct client *client, const struct job_options *options, const char *id, struct error **err)
{
    return job_command(client, "job-complete", id, err);
}
static int job_pause(struct client *client, const struct job_options *options, const char *id, struct error **err)
{
    return job_command(client, "job-pause", id, err);
}
static int job_resume(struct client *client, const struct job_options *options, const char *id, struct error **err)
{
    return job_command(client, "job-resume", id, err);
}
static int job_dismiss(struct client *client, const struct job_options *options, const char *id, struct error **err)
{
    return job_command(client, "job-dismiss", id, err);
}
static int job_finalize(struct client *client, const struct job_options *options, const char *id, struct error **err)
{
    return job_command(client, "job-finalize", id, err);
}

static int job_set_speed(struct client *client, const struct job_options *options, const char *id, struct error **err)
{
    const char *text = options->words[2];
    uint64_t speed;

    if (!text || size_parse(text, &speed) < 0) {
        return error_set(err, -EINVAL, "Say how many bytes per second: job set-speed ID BYTES; 0: no limit");
    }
    return client_execute(client, "block-job-set-speed",
                          json_pack("{s:s, s:I}", "device", id, "speed", (json_int_t)speed), NULL, err);
}

/* The type of a job goes with the change: it is asked for. */
static int job_change(struct client *client, const struct job_options *options, const char *id, struct error **err)
{
    auto_json jobs = NULL;
    const char *type = NULL;
    size_t index;
    json_t *job;

    if (!options->copy_mode) {
        return error_set(err, -EINVAL, "Say what to change: job change ID --copy-mode background|write-blocking");
    }
    int code = client_execute(client, "query-jobs", NULL, &jobs, err);

    json_array_foreach(jobs, index, job)
    {
        if (!g_strcmp0(json_string_value(json_object_get(job, "id")), id)) {
            type = json_string_value(json_object_get(job, "type"));
        }
    }
    if (!code && !type) {
        code = error_set(err, -ENOENT, "There is no job '%s'", id);
    }
    return code ? code
                : client_execute(client, "block-job-change",
                                 json_pack("{s:s, s:s, s:s}", "id", id, "type", type, "copy-mode", options->copy_mode),
                                 NULL, err);
}

static const struct job_verb {
    const char *name;
    int (*run)(struct client *client, const struct job_options *options, const char *id, struct error **err);
    bool needs_id;
    const char *help;
} verbs[] = {
    {"list", job_list, false, "all jobs and how far they are"},
    {"wait", job_wait, true, "wait until all of the named jobs have ended, with progress bars on a terminal"},
    {"cancel", job_cancel, true, "end a job early; every image stays valid (--force: also when it is ready)"},
    {"complete", job_complete, true, "let a job that is ready finish"},
    {"pause", job_pause, true, "stop copying until resumed"},
    {"resume", job_resume, true, "go on after a pause or an error"},
    {"finalize", job_finalize, true, "let a pending job make its graph change"},
    {"dismiss", job_dismiss, true, "forget a concluded job"},
    {"set-speed", job_set_speed, true, "ID BYTES: limit it to so many bytes per second (100M, 2G, ...); 0: no limit"},
    {"change", job_change, true, "change how a mirror copies (--copy-mode)"},
};

static int job_run(const struct job_options *options, struct error **err)
{
    const char *name = options->words ? options->words[0] : "list";
    const char *id = options->words && options->words[0] ? options->words[1] : NULL;
    auto_client client = NULL;

    for (unsigned i = 0; i < G_N_ELEMENTS(verbs); i++) {
        if (strcmp(verbs[i].name, name)) {
            continue;
        }
        if (verbs[i].needs_id && !id) {
            return error_set(err, -EINVAL, "'job %s' needs the job's ID; 'job list' shows them", name);
        }
        int code = client_connect(options->qmp, &client, err);

        return code ? code : verbs[i].run(client, options, id, err);
    }
    return error_set(err, -EINVAL, "There is no 'job %s'; see 'interlock job --help'", name);
}

int tool_job(int argc, char **argv)
{
    struct job_options options = {0};
    const GOptionEntry own[] = {
        {"force", 0, 0, G_OPTION_ARG_NONE, &options.force, "with cancel: at once, also when ready", NULL},
        {"copy-mode", 0, 0, G_OPTION_ARG_STRING, &options.copy_mode,
         "with change: background, or write-blocking: a guest's write waits until it is copied too", "MODE"},
        {G_OPTION_REMAINING, 0, 0, G_OPTION_ARG_STRING_ARRAY, &options.words, NULL, NULL},
        {NULL, 0, 0, 0, NULL, NULL, NULL}};
    g_autoptr(GString) summary = g_string_new("Verbs:");
    struct error *err = NULL;
    int code;

    for (unsigned i = 0; i < G_N_ELEMENTS(verbs); i++) {
        g_string_append_printf(summary, "\n  %-10s %s", verbs[i].name, verbs[i].help);
    }
    code = tool_parse(&argc, &argv, own, "VERB [ID...]", summary->str, NULL, &options.qmp, &err);
    code = code ? code : job_run(&options, &err);
    g_free(options.qmp);
    g_free(options.copy_mode);
    g_strfreev(options.words);
    if (code == -EINTR) {
        fprintf(stderr, "interlock job: the jobs go on; 'interlock job cancel' ends one\n");
        error_free(err);
        return 130;
    }
    return code ? tool_fail("interlock job", err) : 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock commit` and `interlock stream`: the live operations as verbs, named after what they do to the picture
 * (`commit c --into a`, `stream c --above a`). Each is one QMP command and, unless --async, a wait with a progress bar.
 * A client of the monitor: whether an operation may run is the daemon's decision, and its refusal is printed as it is.
 * An active commit is told to complete when it is ready, unless --keep-ready.
 */
#include "tool/client.h"
#include "tool/progress.h"
#include "tool/tool.h"
#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

struct reshape {
    char *qmp, *job_id, *base, *backing_file;
    gint64 speed;
    gboolean async, ready;
    char **nodes;
};

/* Fails unless exactly one node is named. */
static int parse(struct reshape *options, int *argc, char ***argv, const char *base_option, const char *base_help,
                 const char *summary, struct error **err)
{
    const GOptionEntry entries[] = {
        {base_option, 0, 0, G_OPTION_ARG_STRING, &options->base, base_help, "NODE"},
        {"job-id", 0, 0, G_OPTION_ARG_STRING, &options->job_id, "the job's name (default: chosen)", "ID"},
        {"speed", 0, 0, G_OPTION_ARG_INT64, &options->speed, "limit in bytes per second", "BYTES"},
        {"backing-file", 0, 0, G_OPTION_ARG_STRING, &options->backing_file,
         "string to write into the header of the image above, instead of the file's name", "STRING"},
        {"async", 0, 0, G_OPTION_ARG_NONE, &options->async, "print the job's name and do not wait", NULL},
        {"wait", 0, G_OPTION_FLAG_HIDDEN, G_OPTION_ARG_NONE, &(gboolean){0}, "wait (the default)", NULL},
        {"keep-ready", 0, 0, G_OPTION_ARG_NONE, &options->ready,
         "an active commit: leave it ready instead of completing it", NULL},
        {G_OPTION_REMAINING, 0, 0, G_OPTION_ARG_STRING_ARRAY, &options->nodes, NULL, NULL},
        {NULL, 0, 0, 0, NULL, NULL, NULL}};
    int code = tool_parse(argc, argv, entries, "NODE", summary, &options->qmp, err);

    if (code) {
        return code;
    }
    if (!options->nodes || !options->nodes[0] || options->nodes[1]) {
        return error_set(err, -EINVAL, "Name exactly one node; see --help");
    }
    return 0;
}

static void reshape_clear(struct reshape *options)
{
    g_free(options->qmp);
    g_free(options->job_id);
    g_free(options->base);
    g_free(options->backing_file);
    g_strfreev(options->nodes);
}

/* Adds the options that both commands share; the job gets a name that tells what it does. */
static json_t *common_arguments(struct reshape *options, const char *verb)
{
    json_t *arguments = json_object();

    if (!options->job_id) {
        /* An implicit node's name begins with '#', which a job's may not have. */
        const char *name = options->nodes[0] + (options->nodes[0][0] == '#');

        options->job_id = g_strdup_printf("%s-%s", verb, name);
    }
    json_object_set_new(arguments, "job-id", json_string(options->job_id));
    json_object_set_new(arguments, "device", json_string(options->nodes[0]));
    if (options->base) {
        json_object_set_new(arguments, "base-node", json_string(options->base));
    }
    if (options->speed) {
        json_object_set_new(arguments, "speed", json_integer(options->speed));
    }
    if (options->backing_file) {
        json_object_set_new(arguments, "backing-file", json_string(options->backing_file));
    }
    return arguments;
}

static int run(struct reshape *options, const char *verb, const char *command, struct error **err)
{
    auto_client client = NULL;
    int code = client_connect(options->qmp, &client, err);

    if (!code) {
        code = client_execute(client, command, common_arguments(options, verb), NULL, err);
    }
    if (!code && options->async) {
        printf("%s\n", options->job_id);
    } else if (!code) {
        code = progress_wait_jobs(client, &options->job_id, 1, !options->ready, err);
    }
    return code;
}

int tool_commit(int argc, char **argv)
{
    struct reshape options = {0};
    struct error *err = NULL;
    int code = parse(&options, &argc, &argv, "into", "the image that takes the data (default: the lowest)",
                     "Merges the image NODE, and those between, down into another of its chain, live. An image with "
                     "nothing above it is committed actively: its users then move to the image below.",
                     &err);

    code = code ? code : run(&options, "commit", "block-commit", &err);
    reshape_clear(&options);
    return code ? tool_fail("interlock commit", err) : 0;
}

int tool_stream(int argc, char **argv)
{
    struct reshape options = {0};
    struct error *err = NULL;
    int code =
        parse(&options, &argc, &argv, "above",
              "stop above this image, which stays the backing (default: take "
              "everything)",
              "Pulls the data of the images below NODE up into it, live, so that they are no longer needed.", &err);

    code = code ? code : run(&options, "stream", "block-stream", &err);
    reshape_clear(&options);
    return code ? tool_fail("interlock stream", err) : 0;
}

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
    gboolean async, ready, queue;
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
        {"queue", 0, 0, G_OPTION_ARG_NONE, &options->queue,
         "if others stand in the way, wait for them to end and then begin", NULL},
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
    if (options->queue) {
        json_object_set_new(arguments, "on-conflict", json_string("wait"));
    }
    if (options->backing_file) {
        json_object_set_new(arguments, "backing-file", json_string(options->backing_file));
    }
    return arguments;
}

/* Is the job in the queue? Then says whom it waits for. */
static int look_at_queue(const struct reshape *options, struct client *client, bool *ret_waits, struct error **err)
{
    auto_json access = NULL;
    int code = client_execute(client, "query-access", NULL, &access, err);
    size_t index, other;
    json_t *waiting, *behind;

    *ret_waits = false;
    json_array_foreach(json_object_get(access, "waiting"), index, waiting)
    {
        if (g_strcmp0(json_string_value(json_object_get(waiting, "id")), options->job_id) != 0) {
            continue;
        }
        g_autoptr(GString) names = g_string_new(NULL);
        json_array_foreach(json_object_get(waiting, "behind"), other, behind)
        {
            g_string_append_printf(names, "%s%s", names->len ? ", " : "", json_string_value(behind));
        }
        printf("%s waits for %s\n", options->job_id, names->str);
        fflush(stdout);
        *ret_waits = true;
    }
    return code;
}

/* Until the job has begun. What happens to it afterwards is progress.c's, and its events are still to come. */
static int await_turn(const struct reshape *options, struct client *client, struct error **err)
{
    bool waits, gone = false;
    int code = look_at_queue(options, client, &waits, err);

    while (!code && waits) {
        auto_json event = client_wait_event(client, -1, &gone);
        const char *name = json_string_value(json_object_get(event, "event"));
        json_t *data = json_object_get(event, "data");
        const char *error = json_string_value(json_object_get(data, "error"));

        if (gone) {
            code = error_set(err, -ECONNRESET, "The daemon went away while '%s' was waiting", options->job_id);
        } else if (g_strcmp0(json_string_value(json_object_get(data, "id")), options->job_id) != 0) {
            continue;
        } else if (!g_strcmp0(name, "ACCESS_GRANTED")) {
            waits = false;
        } else if (!g_strcmp0(name, "ACCESS_WAIT_ENDED")) {
            code = error_set(err, -ECANCELED, "'%s' does not wait any more (%s)%s%s", options->job_id,
                             json_string_value(json_object_get(data, "reason")), error ? ": " : "", error ? error : "");
        }
    }
    return code;
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
        return 0;
    }
    if (!code && options->queue) {
        code = await_turn(options, client, err);
    }
    if (!code) {
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

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock commit` and `interlock stream`: the verbs that make a chain shorter, named after what they do to the
 * picture (`commit c --into a`, `stream c --above a`). Whether one may run is the daemon's decision. An active commit
 * is told to complete when it is ready, unless --keep-ready.
 */
#include "tool/verb/verb.h"
#include <errno.h>

static int make(struct plan *plan, const char *command, struct error **err)
{
    const struct verb_options *options = plan->options;

    if (!options->words || !options->words[0] || options->words[1]) {
        return error_set(err, -EINVAL, "Name exactly one node; see --help");
    }
    json_t *arguments = json_pack("{s:s}", "device", options->words[0]);

    if (options->base) {
        json_object_set_new(arguments, "base-node", json_string(options->base));
    }
    if (options->backing_file) {
        json_object_set_new(arguments, "backing-file", json_string(options->backing_file));
    }
    plan->at_ready = options->keep_ready ? PROGRESS_LEAVE : PROGRESS_COMPLETE;
    return plan_add_job(plan, command, options->words[0], arguments, NULL, err);
}

static int commit_plan(struct plan *plan, struct error **err)
{
    return make(plan, "block-commit", err);
}

static int stream_plan(struct plan *plan, struct error **err)
{
    return make(plan, "block-stream", err);
}

const struct verb verb_commit = {
    "commit", "NODE",
    "Merges the image NODE, and those between, down into another of its chain, live. An image with nothing\n"
    "above it is committed actively: its users then move to the image below.",
    (const char *const[]){"into", "backing-file", "keep-ready", "job-id", "speed", "on-error", "arg", "wait", "async",
                          "dry-run", "queue", "queue-timeout", NULL},
    commit_plan};

const struct verb verb_stream = {
    "stream", "NODE", "Pulls the data of the images below NODE up into it, live, so that they are no longer needed.",
    (const char *const[]){"above", "backing-file", "job-id", "speed", "on-error", "arg", "wait", "async", "dry-run",
                          "queue", "queue-timeout", NULL},
    stream_plan};

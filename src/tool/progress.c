/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Waiting for a job at the command line. A job's end is learnt from its events (JOB_STATUS_CHANGE to concluded or
 * null, BLOCK_JOB_COMPLETED with or without an error, BLOCK_JOB_CANCELLED); its progress from query-jobs, five times
 * a second. A bar is one line, redrawn in place; without a terminal a line is printed for each tenth. The functions
 * here know no job types: whatever the daemon calls a job is shown.
 */
#include "tool/progress.h"
#include "base/size.h"
#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define BAR_WIDTH 30

struct wait {
    const char *id;
    bool terminal, drawn;
    int last_tenth;
    int64_t started_us;
    uint64_t first_done; /* progress when we began to look */
    bool ended, cancelled, asked_to_complete;
    char *failure;
};

/* "1:05", "2:03:10" */
static void duration_format(uint64_t seconds, char *out, size_t size)
{
    if (seconds >= 3600) {
        g_snprintf(out, size, "%u:%02u:%02u", (unsigned)(seconds / 3600), (unsigned)(seconds / 60 % 60),
                   (unsigned)(seconds % 60));
    } else {
        g_snprintf(out, size, "%u:%02u", (unsigned)(seconds / 60), (unsigned)(seconds % 60));
    }
}

static void draw(struct wait *wait, const char *type, const char *status, uint64_t done, uint64_t total)
{
    bool first = !wait->started_us;

    if (first) {
        wait->started_us = g_get_monotonic_time();
        wait->first_done = done;
    }
    double elapsed = (double)(g_get_monotonic_time() - wait->started_us) / 1e6;
    double rate = elapsed > 0.1 ? (double)(done - MIN(done, wait->first_done)) / elapsed : 0;
    unsigned percent = total ? (unsigned)(100.0 * (double)done / (double)total) : 100;
    char size[32], left[32] = "-:--", bar[BAR_WIDTH + 1];

    if (!wait->terminal) {
        if ((int)percent / 10 != wait->last_tenth) {
            wait->last_tenth = (int)percent / 10;
            printf("%s %s: %u %% (%s)\n", type, wait->id, percent, status);
            fflush(stdout);
        }
        return;
    }
    memset(bar, '.', BAR_WIDTH);
    memset(bar, '#', MIN(percent, 100u) * BAR_WIDTH / 100);
    bar[BAR_WIDTH] = 0;
    if (rate > 0) {
        duration_format((uint64_t)((double)(total - MIN(done, total)) / rate), left, sizeof(left));
    }
    printf("\r%s %s [%s] %3u %%  %s/s  %s left  %-8s\033[K", type, wait->id, bar, percent,
           size_format((uint64_t)rate, size, sizeof(size)), left, status);
    fflush(stdout);
    wait->drawn = true;
}

static bool event_is_ours(const struct wait *wait, json_t *data)
{
    const char *id = json_string_value(json_object_get(data, "id"));

    id = id ? id : json_string_value(json_object_get(data, "device"));
    return id && !strcmp(id, wait->id);
}

static void take_event(struct wait *wait, json_t *event)
{
    const char *name = json_string_value(json_object_get(event, "event"));
    json_t *data = json_object_get(event, "data");
    const char *status = json_string_value(json_object_get(data, "status"));
    const char *error = json_string_value(json_object_get(data, "error"));

    if (!event_is_ours(wait, data)) {
        return;
    }
    if (error && !wait->failure) {
        wait->failure = g_strdup(error);
    }
    if (!strcmp(name, "BLOCK_JOB_CANCELLED")) {
        wait->cancelled = true;
    }
    if (status && (!strcmp(status, "concluded") || !strcmp(status, "null"))) {
        wait->ended = true;
    }
}

/* Looks the job up; 0 with *ret_found. */
static int poll_job(struct wait *wait, struct client *client, bool complete_when_ready, bool *ret_found,
                    struct error **err)
{
    auto_json jobs = NULL;
    int code = client_execute(client, "query-jobs", NULL, &jobs, err);
    size_t index;
    json_t *job;

    *ret_found = false;
    if (code < 0) {
        return code;
    }
    json_array_foreach(jobs, index, job)
    {
        const char *status = json_string_value(json_object_get(job, "status"));
        const char *error = json_string_value(json_object_get(job, "error"));

        if (strcmp(json_string_value(json_object_get(job, "id")), wait->id)) {
            continue;
        }
        *ret_found = true;
        if (error && !wait->failure) {
            wait->failure = g_strdup(error);
        }
        draw(wait, json_string_value(json_object_get(job, "type")), status,
             (uint64_t)json_integer_value(json_object_get(job, "current-progress")),
             (uint64_t)json_integer_value(json_object_get(job, "total-progress")));
        wait->ended = wait->ended || !strcmp(status, "concluded");
        if (!strcmp(status, "ready") && complete_when_ready && !wait->asked_to_complete) {
            wait->asked_to_complete = true;
            return client_execute(client, "job-complete", json_pack("{s:s}", "id", wait->id), NULL, err);
        }
    }
    return 0;
}

static void drain_events(struct wait *wait, struct client *client, int timeout_ms, bool *ret_gone)
{
    for (json_t *event; (event = client_wait_event(client, timeout_ms, ret_gone)); timeout_ms = 0) {
        take_event(wait, event);
        json_decref(event);
    }
}

int progress_wait_job(struct client *client, const char *id, bool complete_when_ready, struct error **err)
{
    struct wait wait = {.id = id, .terminal = isatty(STDOUT_FILENO), .last_tenth = -1};
    g_autofree char *failure = NULL;
    bool found = false, seen = false, gone = false;
    int code = 0;

    while (!wait.ended && !gone && !code) {
        code = poll_job(&wait, client, complete_when_ready, &found, err);
        drain_events(&wait, client, wait.ended || !found ? 0 : 200, &gone);
        if (!found && !wait.ended && !code) {
            drain_events(&wait, client, seen ? 200 : 0, &gone);
            if (!seen && !wait.ended) {
                code = error_set(err, -ENOENT, "There is no job '%s'", id);
            }
            wait.ended = true;
        }
        seen = seen || found;
    }
    failure = wait.failure;
    if (!code && gone && !wait.ended) {
        code = error_set(err, -ECONNRESET, "The daemon went away while job '%s' was running", id);
    }
    if (!code && wait.cancelled) {
        code = error_set(err, -ECANCELED, "Job '%s' was cancelled", id);
    } else if (!code && failure) {
        code = error_set(err, -EIO, "Job '%s' failed: %s", id, failure);
    }
    if (!code && wait.terminal) {
        printf("\r%s: done\033[K", id);
    } else if (!code) {
        printf("%s: done\n", id);
    }
    if (wait.drawn) {
        putchar('\n');
    }
    fflush(stdout);
    return code;
}

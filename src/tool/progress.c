/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Waiting for jobs at the command line. A job's end is learnt from its events (JOB_STATUS_CHANGE to concluded or
 * null, BLOCK_JOB_COMPLETED with or without an error, BLOCK_JOB_CANCELLED); its progress from query-jobs, five times
 * a second. On a terminal each job has a line of its own, redrawn in place; elsewhere a line is printed for each tenth.
 * The functions here know no job types: whatever the daemon calls a job is shown.
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
    int last_tenth;
    int64_t started_us;
    uint64_t first_done; /* progress when we began to look */
    bool seen, found, ended, cancelled, asked_to_complete;
    char *failure;
    char *line; /* what a terminal shows of it */
};

struct waits {
    struct wait *jobs;
    unsigned count;
    bool terminal, drawn, complete_when_ready;
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

static void note_progress(struct wait *wait, bool terminal, const char *type, const char *status, uint64_t done,
                          uint64_t total)
{
    if (!wait->started_us) {
        wait->started_us = g_get_monotonic_time();
        wait->first_done = done;
    }
    double elapsed = (double)(g_get_monotonic_time() - wait->started_us) / 1e6;
    double rate = elapsed > 0.1 ? (double)(done - MIN(done, wait->first_done)) / elapsed : 0;
    unsigned percent = total ? (unsigned)(100.0 * (double)done / (double)total) : 100;
    char size[32], left[32] = "-:--", bar[BAR_WIDTH + 1];

    if (!terminal) {
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
    g_free(wait->line);
    wait->line = g_strdup_printf("%s %s [%s] %3u %%  %s/s  %s left  %-8s", type, wait->id, bar, percent,
                                 size_format((uint64_t)rate, size, sizeof(size)), left, status);
}

/* All lines, over those drawn before. */
static void draw(struct waits *waits)
{
    if (!waits->terminal) {
        return;
    }
    if (waits->drawn) {
        printf("\033[%uA", waits->count);
    }
    for (unsigned i = 0; i < waits->count; i++) {
        const struct wait *wait = &waits->jobs[i];
        printf("\r%s\033[K\n", wait->line ? wait->line : wait->id);
    }
    fflush(stdout);
    waits->drawn = true;
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
    if (!strcmp(name, "ACCESS_WAIT_ENDED")) { /* it was to wait for its turn, and never began */
        wait->ended = true;
        wait->cancelled = !g_strcmp0(json_string_value(json_object_get(data, "reason")), "cancelled");
    }
    if (status && (!strcmp(status, "concluded") || !strcmp(status, "null"))) {
        wait->ended = true;
    }
}

static int look_at_job(struct waits *waits, struct wait *wait, struct client *client, json_t *job, struct error **err)
{
    const char *status = json_string_value(json_object_get(job, "status"));
    const char *error = json_string_value(json_object_get(job, "error"));

    wait->found = wait->seen = true;
    if (error && !wait->failure) {
        wait->failure = g_strdup(error);
    }
    note_progress(wait, waits->terminal, json_string_value(json_object_get(job, "type")), status,
                  (uint64_t)json_integer_value(json_object_get(job, "current-progress")),
                  (uint64_t)json_integer_value(json_object_get(job, "total-progress")));
    wait->ended = wait->ended || !strcmp(status, "concluded");
    if (!strcmp(status, "ready") && waits->complete_when_ready && !wait->asked_to_complete) {
        wait->asked_to_complete = true;
        return client_execute(client, "job-complete", json_pack("{s:s}", "id", wait->id), NULL, err);
    }
    return 0;
}

/* Looks at every job; one that is not there any more has `found` false. */
static int poll_jobs(struct waits *waits, struct client *client, struct error **err)
{
    auto_json jobs = NULL;
    int code = client_execute(client, "query-jobs", NULL, &jobs, err);

    for (unsigned i = 0; i < waits->count && !code; i++) {
        struct wait *wait = &waits->jobs[i];
        size_t index;
        json_t *job;

        wait->found = false;
        json_array_foreach(jobs, index, job)
        {
            if (!code && !wait->ended && !strcmp(json_string_value(json_object_get(job, "id")), wait->id)) {
                code = look_at_job(waits, wait, client, job, err);
            }
        }
    }
    return code;
}

static void drain_events(struct waits *waits, struct client *client, int timeout_ms, bool *ret_gone)
{
    for (json_t *event; (event = client_wait_event(client, timeout_ms, ret_gone)); timeout_ms = 0) {
        for (unsigned i = 0; i < waits->count; i++) {
            take_event(&waits->jobs[i], event);
        }
        json_decref(event);
    }
}

static bool all_ended(const struct waits *waits)
{
    for (unsigned i = 0; i < waits->count; i++) {
        if (!waits->jobs[i].ended) {
            return false;
        }
    }
    return true;
}

/* How one job ended, into its line and, the first failure, into *err. */
static int conclude(struct waits *waits, struct wait *wait, struct error **err)
{
    const char *end = wait->cancelled ? "cancelled" : wait->failure ? "failed" : "done";

    if (wait->seen || wait->ended) {
        g_free(wait->line);
        wait->line = g_strdup_printf("%s: %s", wait->id, end);
        if (!waits->terminal) {
            printf("%s\n", wait->line);
        }
    }
    if (wait->cancelled) {
        return error_set(err, -ECANCELED, "Job '%s' was cancelled", wait->id);
    }
    return wait->failure ? error_set(err, -EIO, "Job '%s' failed: %s", wait->id, wait->failure) : 0;
}

/* Polls and listens until every job has ended. */
static int wait_all(struct waits *waits, struct client *client, struct error **err)
{
    bool gone = false;
    int code = 0;

    while (!all_ended(waits) && !gone && !code) {
        bool some_missing = false;

        code = poll_jobs(waits, client, err);
        draw(waits);
        for (unsigned i = 0; i < waits->count; i++) {
            some_missing = some_missing || (!waits->jobs[i].found && !waits->jobs[i].ended);
        }
        drain_events(waits, client, some_missing || all_ended(waits) ? 0 : 200, &gone);
        for (unsigned i = 0; i < waits->count && !code; i++) {
            struct wait *wait = &waits->jobs[i];

            if (wait->ended || wait->found) {
                continue;
            }
            if (!wait->seen) {
                return error_set(err, -ENOENT, "There is no job '%s'", wait->id);
            }
            wait->ended = true;
        }
    }
    if (!code && gone && !all_ended(waits)) {
        code = error_set(err, -ECONNRESET, "The daemon went away while a job was running");
    }
    return code;
}

int progress_wait_jobs(struct client *client, char *const *ids, unsigned count, bool complete_when_ready,
                       struct error **err)
{
    g_autofree struct wait *jobs = g_new0(struct wait, count);
    struct waits waits = {
        .jobs = jobs, .count = count, .terminal = isatty(STDOUT_FILENO), .complete_when_ready = complete_when_ready};

    for (unsigned i = 0; i < count; i++) {
        jobs[i].id = ids[i];
        jobs[i].last_tenth = -1;
    }
    int code = wait_all(&waits, client, err);
    bool waited = !code;

    for (unsigned i = 0; i < count && waited; i++) {
        int ended = conclude(&waits, &jobs[i], code ? NULL : err);
        code = code ? code : ended;
    }
    if (waited) {
        draw(&waits);
    }
    fflush(stdout);
    for (unsigned i = 0; i < count; i++) {
        g_free(jobs[i].failure);
        g_free(jobs[i].line);
    }
    return code;
}

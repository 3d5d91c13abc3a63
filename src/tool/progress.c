/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Waiting for jobs at the command line. A job's end is learnt from its events (JOB_STATUS_CHANGE to concluded or
 * null, BLOCK_JOB_COMPLETED with or without an error, BLOCK_JOB_CANCELLED); its progress from query-jobs, five times
 * a second; and why one is paused from query-block-jobs and BLOCK_JOB_ERROR. On a terminal each job has a line of its
 * own, redrawn in place; elsewhere a line is printed for each tenth and for each change between running, paused and
 * ready. The functions here know no job types: whatever the daemon calls a job is shown.
 *
 * An interrupt (Ctrl-C) ends the waiting, never a job: the jobs are the daemon's, and go on. Whoever waited says so.
 */
#include "tool/progress.h"
#include "base/size.h"
#include <errno.h>
#include <glib.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define BAR_WIDTH 30
#define BAR_WIDTH_MIN 6
#define LOOK_MS 200
#define RATE_US 3000000

struct wait {
    const char *id;
    int last_tenth;
    char *last_state; /* what was printed last */
    int64_t since_us, looked_us;
    uint64_t first_done, last_done; /* then */
    double rate;                    /* bytes a second */
    unsigned pauses;                /* how often in a row it was found paused */
    bool seen, found, ended, cancelled, ready, told;
    char *operation; /* what failed last: "read", "write" */
    char *failure;
    char *target; /* what has become of the node that it wrote to: "partial" */
    char *line;   /* what a terminal shows of it */
};

struct waits {
    struct wait *jobs;
    unsigned count;
    bool terminal, drawn;
    enum progress_at_ready at_ready;
};

static volatile sig_atomic_t interrupted;

static void on_interrupt(int number)
{
    interrupted = 1;
}

void progress_catch_interrupt(void)
{
    const struct sigaction action = {.sa_handler = on_interrupt};

    sigaction(SIGINT, &action, NULL);
}

bool progress_interrupted(void)
{
    return interrupted;
}

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

static unsigned terminal_columns(void)
{
    struct winsize size;

    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col ? size.ws_col : 80;
}

/* The average of the first seconds, then one in which the last seconds count most: jobs that are limited move in
 * bursts. */
static void note_rate(struct wait *wait, uint64_t done)
{
    int64_t now_us = g_get_monotonic_time();
    uint64_t moved = done - MIN(done, wait->last_done);

    if (!wait->since_us) {
        wait->since_us = wait->looked_us = now_us;
        wait->first_done = done;
    } else if (now_us - wait->since_us < RATE_US) {
        wait->rate = (double)(done - MIN(done, wait->first_done)) * 1e6 / (double)(now_us - wait->since_us + 1);
    } else {
        double elapsed_us = (double)(now_us - wait->looked_us + 1);

        wait->rate += ((double)moved * 1e6 / elapsed_us - wait->rate) * MIN(1, elapsed_us / RATE_US);
    }
    wait->looked_us = now_us;
    wait->last_done = done;
}

static void draw_line(struct wait *wait, const char *type, const char *state, unsigned percent, uint64_t left_bytes)
{
    char size[32], left[32] = "-:--", bar[BAR_WIDTH + 1];

    if (wait->rate >= 1) {
        duration_format((uint64_t)((double)left_bytes / wait->rate), left, sizeof(left));
    }
    size_format((uint64_t)wait->rate, size, sizeof(size));
    g_autofree char *tail = g_strdup_printf("%3u %%  %s/s  %s left  %s", percent, size, left, state);
    int others = (int)(strlen(type) + strlen(wait->id) + strlen(tail)) + 6;
    int width = MIN((int)terminal_columns() - others, BAR_WIDTH);

    if (width < BAR_WIDTH_MIN) { /* the words are worth more */
        width = 0;
    }
    memset(bar, '.', sizeof(bar) - 1);
    memset(bar, '#', MIN(percent, 100u) * (unsigned)width / 100);
    bar[width] = 0;
    g_free(wait->line);
    wait->line = g_strdup_printf(width ? "%s %s [%s] %s" : "%s %s%s %s", type, wait->id, bar, tail);
    if (strlen(wait->line) >= terminal_columns()) { /* a line that wraps could not be drawn over */
        wait->line[terminal_columns() - 1] = 0;
    }
}

static void note_progress(struct wait *wait, bool terminal, const char *type, const char *state, uint64_t done,
                          uint64_t total)
{
    unsigned empty = wait->ready ? 100 : 0; /* of a job that has nothing to do, or does not know yet */
    unsigned percent = total ? (unsigned)(100.0 * (double)done / (double)total) : empty;

    note_rate(wait, done);
    if (terminal) {
        draw_line(wait, type, state, percent, total - MIN(done, total));
    } else if ((int)percent / 10 != wait->last_tenth || g_strcmp0(wait->last_state, state) != 0) {
        wait->last_tenth = (int)percent / 10;
        g_free(wait->last_state);
        wait->last_state = g_strdup(state);
        printf("%s %s: %u %% (%s)\n", type, wait->id, percent, state);
        fflush(stdout);
    }
}

/* All lines, over those drawn before. */
static void draw(struct waits *waits)
{
    if (!waits->terminal || waits->at_ready == PROGRESS_QUIET) {
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
    if (!strcmp(name, "BLOCK_JOB_ERROR")) {
        g_free(wait->operation);
        wait->operation = g_strdup(json_string_value(json_object_get(data, "operation")));
    }
    if (json_object_get(data, "target-state")) {
        g_free(wait->target);
        wait->target = g_strdup(json_string_value(json_object_get(data, "target-state")));
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

static json_t *find_by(json_t *list, const char *key, const char *id)
{
    size_t index;
    json_t *item;

    json_array_foreach(list, index, item)
    {
        if (!g_strcmp0(json_string_value(json_object_get(item, key)), id)) {
            return item;
        }
    }
    return NULL;
}

/* A job's status in words; of a paused one, why. */
static char *state_of(struct wait *wait, struct client *client, const char *status)
{
    auto_json jobs = NULL;
    bool paused = !strcmp(status, "paused") || !strcmp(status, "standby");

    wait->pauses = paused ? wait->pauses + 1 : 0;
    if (!paused || client_execute(client, "query-block-jobs", NULL, &jobs, NULL) < 0) {
        return g_strdup(status);
    }
    const char *io = json_string_value(json_object_get(find_by(jobs, "device", wait->id), "io-status"));

    if (!g_strcmp0(io, "nospace")) {
        return g_strdup("paused: no space left");
    }
    if (!g_strcmp0(io, "failed")) {
        return g_strdup_printf("paused: a %s failed", wait->operation ? wait->operation : "request");
    }
    return g_strdup(status);
}

static int act_on_ready(const struct waits *waits, struct wait *wait, struct client *client, struct error **err)
{
    wait->ready = true;
    if (waits->at_ready == PROGRESS_LEAVE) {
        wait->ended = true;
        return 0;
    }
    if (wait->told || (waits->at_ready != PROGRESS_COMPLETE && waits->at_ready != PROGRESS_END)) {
        return 0;
    }
    wait->told = true;
    if (waits->at_ready == PROGRESS_COMPLETE) {
        return client_execute(client, "job-complete", json_pack("{s:s}", "id", wait->id), NULL, err);
    }
    return client_execute(client, "block-job-cancel", json_pack("{s:s}", "device", wait->id), NULL, err);
}

static int look_at_job(struct waits *waits, struct wait *wait, struct client *client, json_t *job, struct error **err)
{
    const char *status = json_string_value(json_object_get(job, "status"));
    const char *error = json_string_value(json_object_get(job, "error"));

    wait->found = wait->seen = true;
    if (error && !wait->failure) {
        wait->failure = g_strdup(error);
    }
    if (wait->ended) {
        return 0;
    }
    g_autofree char *state = state_of(wait, client, status);

    /* Every job is paused for moments, for a change of the graph: not worth a word. */
    if (waits->at_ready != PROGRESS_QUIET && wait->pauses != 1 && strcmp(status, "concluded") != 0) {
        note_progress(wait, waits->terminal, json_string_value(json_object_get(job, "type")), state,
                      (uint64_t)json_integer_value(json_object_get(job, "current-progress")),
                      (uint64_t)json_integer_value(json_object_get(job, "total-progress")));
    }
    wait->ended = wait->ended || !strcmp(status, "concluded");
    return strcmp(status, "ready") ? 0 : act_on_ready(waits, wait, client, err);
}

/* Looks at every job; one that is not there any more has `found` false. */
static int poll_jobs(struct waits *waits, struct client *client, struct error **err)
{
    auto_json jobs = NULL;
    int code = client_execute(client, "query-jobs", NULL, &jobs, err);

    for (unsigned i = 0; i < waits->count && !code; i++) {
        struct wait *wait = &waits->jobs[i];
        json_t *job = find_by(jobs, "id", wait->id);

        wait->found = job;
        if (job) {
            code = look_at_job(waits, wait, client, job, err);
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

/* How one job ended, into its line. */
static void conclude(const struct waits *waits, struct wait *wait)
{
    const char *end = wait->cancelled ? "cancelled" : wait->failure ? "failed" : "done";

    if (waits->at_ready == PROGRESS_LEAVE && wait->ready && !wait->failure && !wait->cancelled) {
        end = "ready";
    }
    if (waits->at_ready != PROGRESS_QUIET && (wait->seen || wait->ended)) {
        bool told = wait->target && (wait->cancelled || wait->failure);

        g_free(wait->line);
        wait->line = g_strdup_printf("%s: %s%s%s", wait->id, end, told ? "; what it wrote to is " : "",
                                     told ? wait->target : "");
        if (!waits->terminal) {
            printf("%s\n", wait->line);
        }
    }
}

/* The failure of all. Of a group whose jobs end together the one that failed counts, and not those that were cancelled
 * for its sake. */
static int verdict(const struct waits *waits, struct error **err)
{
    const struct wait *cancelled = NULL;

    for (unsigned i = 0; i < waits->count; i++) {
        const struct wait *wait = &waits->jobs[i];

        if (wait->failure && !wait->cancelled) {
            return error_set(err, -EIO, "Job '%s' failed: %s", wait->id, wait->failure);
        }
        cancelled = cancelled || !wait->cancelled ? cancelled : wait;
    }
    return cancelled ? error_set(err, -ECANCELED, "Job '%s' was cancelled", cancelled->id) : 0;
}

/* Polls and listens until every job has ended. */
static int wait_all(struct waits *waits, struct client *client, struct error **err)
{
    bool gone = false;
    int code = 0;

    while (!all_ended(waits) && !gone && !code) {
        bool some_missing = false;

        if (progress_interrupted()) {
            return error_set(err, -EINTR, "Interrupted");
        }
        code = poll_jobs(waits, client, err);
        draw(waits);
        for (unsigned i = 0; i < waits->count; i++) {
            some_missing = some_missing || (!waits->jobs[i].found && !waits->jobs[i].ended);
        }
        drain_events(waits, client, some_missing || all_ended(waits) ? 0 : LOOK_MS, &gone);
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
        return error_set(err, -ECONNRESET, "The daemon went away while a job was running");
    }
    return code || gone ? code : poll_jobs(waits, client, err); /* one that is not dismissed has its error there */
}

int progress_wait_jobs(struct client *client, char *const *ids, unsigned count, enum progress_at_ready at_ready,
                       struct error **err)
{
    g_autofree struct wait *jobs = g_new0(struct wait, count);
    struct waits waits = {.jobs = jobs, .count = count, .terminal = isatty(STDOUT_FILENO), .at_ready = at_ready};

    for (unsigned i = 0; i < count; i++) {
        jobs[i].id = ids[i];
        jobs[i].last_tenth = -1;
    }
    int code = wait_all(&waits, client, err);

    if (!code) {
        for (unsigned i = 0; i < count; i++) {
            conclude(&waits, &jobs[i]);
        }
        draw(&waits);
        code = verdict(&waits, err);
    }
    fflush(stdout);
    for (unsigned i = 0; i < count; i++) {
        g_free(jobs[i].last_state);
        g_free(jobs[i].operation);
        g_free(jobs[i].target);
        g_free(jobs[i].failure);
        g_free(jobs[i].line);
    }
    return code;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A process for each schedule, forked from this one, which has everything in memory already: so a crash, an assertion,
 * a sanitizer's report, a hang or a leak of one run is that run's finding and nobody else's trouble. Results come back
 * through memory that is shared; what a child says on stderr is kept for its last words.
 */
#include "test/explore/runner.h"
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

struct slot {
    pid_t process; /* 0: free */
    struct schedule schedule;
    runner_done *done;
    void *argument;
    int errors; /* a file without a name */
};
struct runner {
    unsigned count, busy;
    struct totals totals;
    struct slot *slots;
    struct result *results; /* shared, one for each slot */
};

struct runner *runner_create(unsigned at_once)
{
    struct runner *runner = g_new0(struct runner, 1);
    struct rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    runner->count = at_once;
    runner->slots = g_new0(struct slot, at_once);
    runner->results =
        mmap(NULL, at_once * sizeof(struct result), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    g_assert(runner->results != MAP_FAILED);
    for (unsigned i = 0; i < at_once; i++) {
        runner->slots[i].errors = memfd_create("stderr", MFD_CLOEXEC);
        g_assert(runner->slots[i].errors >= 0);
    }
    return runner;
}

void runner_destroy(struct runner *runner)
{
    g_assert(runner->busy == 0);
    for (unsigned i = 0; i < runner->count; i++) {
        close(runner->slots[i].errors);
    }
    munmap(runner->results, runner->count * sizeof(struct result));
    g_free(runner->slots);
    g_free(runner);
}

const struct totals *runner_totals(const struct runner *runner)
{
    return &runner->totals;
}

static void add_to_totals(struct totals *totals, const struct result *result)
{
    totals->schedules++;
    totals->ended_well += result->ended_well;
    totals->cancelled += result->cancelled;
    totals->failed += result->failed;
    totals->cuts += result->cut;
    totals->requests += result->requests;
}

/* The end of what the child said, and how it ended. */
static void add_last_words(struct slot *slot, struct result *result, int status)
{
    char words[1200] = "";
    off_t end = lseek(slot->errors, 0, SEEK_END);
    off_t from = MAX(0, end - (off_t)sizeof(words) + 1);
    ssize_t bytes = pread(slot->errors, words, sizeof(words) - 1, from);
    words[MAX(bytes, 0)] = '\0';
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM) {
        g_snprintf(result->text, sizeof(result->text), "it hangs\n%s", words);
    } else if (WIFSIGNALED(status)) {
        g_snprintf(result->text, sizeof(result->text), "it dies of %s\n%s", strsignal(WTERMSIG(status)), words);
    } else {
        g_snprintf(result->text, sizeof(result->text), "it ends with status %d\n%s", WEXITSTATUS(status), words);
    }
    g_strchomp(result->text);
    result->outcome = OUTCOME_VIOLATION;
}

static void reap_one(struct runner *runner)
{
    int status;
    pid_t process = waitpid(-1, &status, 0);
    g_assert(process > 0);
    for (unsigned i = 0; i < runner->count; i++) {
        struct slot *slot = &runner->slots[i];
        if (slot->process == process) {
            struct result result = runner->results[i];
            struct schedule schedule = slot->schedule;
            if (result.outcome == OUTCOME_DIED || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
                add_last_words(slot, &result, status);
            }
            slot->process = 0;
            runner->busy--;
            add_to_totals(&runner->totals, &result);
            slot->done(&schedule, &result, slot->argument);
            return;
        }
    }
}

static void child(struct slot *slot, struct result *result)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(slot->errors, STDERR_FILENO);
    dup2(slot->errors, STDOUT_FILENO);
    schedule_run(&slot->schedule, result);
}

void runner_submit(struct runner *runner, const struct schedule *schedule, runner_done *done, void *argument)
{
    while (runner->busy == runner->count) {
        reap_one(runner);
    }
    unsigned index = 0;
    while (runner->slots[index].process) {
        index++;
    }
    struct slot *slot = &runner->slots[index];
    slot->schedule = *schedule;
    slot->done = done;
    slot->argument = argument;
    memset(&runner->results[index], 0, sizeof(struct result));
    g_assert(ftruncate(slot->errors, 0) == 0);
    lseek(slot->errors, 0, SEEK_SET);
    fflush(NULL);
    slot->process = fork();
    g_assert(slot->process >= 0);
    if (slot->process == 0) {
        child(slot, &runner->results[index]);
    }
    runner->busy++;
}

void runner_drain(struct runner *runner)
{
    while (runner->busy) {
        reap_one(runner);
    }
}

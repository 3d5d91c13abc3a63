/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The laws of the job tables, over all states and verbs. */
#include "job/state.h"
#include <glib.h>

#define FOR_STATUS(name) for (enum job_status name = 0; name < JOB_STATUS_COUNT; name++)

static bool reaches(enum job_status from, enum job_status to, unsigned seen)
{
    if (from == to) {
        return true;
    }
    FOR_STATUS(next)
    {
        if (job_state_leads_to(from, next) && !(seen & 1u << next) && reaches(next, to, seen | 1u << next)) {
            return true;
        }
    }
    return false;
}

static void every_life_can_begin_and_ends(void)
{
    FOR_STATUS(status)
    {
        g_assert_true(reaches(JOB_STATUS_UNDEFINED, status, 0));
        g_assert_true(reaches(status, JOB_STATUS_NULL, 0));
        g_assert_false(job_state_leads_to(JOB_STATUS_NULL, status));
        g_assert_false(job_state_leads_to(status, JOB_STATUS_UNDEFINED));
        g_assert_false(job_state_leads_to(status, status));
    }
}

/* The only circles are pauses. */
static void nothing_goes_back(void)
{
    FOR_STATUS(from)
    {
        FOR_STATUS(to)
        {
            bool pause = (from == JOB_STATUS_RUNNING && to == JOB_STATUS_PAUSED) ||
                         (from == JOB_STATUS_PAUSED && to == JOB_STATUS_RUNNING) ||
                         (from == JOB_STATUS_READY && to == JOB_STATUS_STANDBY) ||
                         (from == JOB_STATUS_STANDBY && to == JOB_STATUS_READY);
            if (job_state_leads_to(from, to) && !pause) {
                g_assert_false(reaches(to, from, 0));
            }
        }
    }
}

static void cancel_leads_to_aborting(void)
{
    FOR_STATUS(status)
    {
        if (job_state_takes(status, JOB_VERB_CANCEL)) {
            g_assert_true(reaches(status, JOB_STATUS_ABORTING, 0));
        }
        bool alive = status >= JOB_STATUS_CREATED && status <= JOB_STATUS_PENDING;
        g_assert_true(job_state_takes(status, JOB_VERB_CANCEL) == alive);
    }
}

static void verbs_are_where_they_make_sense(void)
{
    FOR_STATUS(status)
    {
        bool running = job_state_takes(status, JOB_VERB_PAUSE);
        g_assert_true(job_state_takes(status, JOB_VERB_RESUME) == running);
        g_assert_true(job_state_takes(status, JOB_VERB_SET_SPEED) == running);
        g_assert_true(job_state_takes(status, JOB_VERB_CHANGE) == running);
        g_assert_true(job_state_takes(status, JOB_VERB_COMPLETE) ==
                      (status == JOB_STATUS_READY || status == JOB_STATUS_STANDBY));
        g_assert_true(job_state_takes(status, JOB_VERB_FINALIZE) == (status == JOB_STATUS_PENDING));
        g_assert_true(job_state_takes(status, JOB_VERB_DISMISS) == (status == JOB_STATUS_CONCLUDED));
        /* Success and failure both come to concluded, through pending and aborting alone. */
        g_assert_true(job_state_leads_to(status, JOB_STATUS_CONCLUDED) ==
                      (status == JOB_STATUS_PENDING || status == JOB_STATUS_ABORTING));
    }
    for (enum job_verb verb = 0; verb < JOB_VERB_COUNT; verb++) {
        g_assert_nonnull(job_verb_name(verb));
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/job-state/every-life-can-begin-and-ends", every_life_can_begin_and_ends);
    g_test_add_func("/job-state/nothing-goes-back", nothing_goes_back);
    g_test_add_func("/job-state/cancel-leads-to-aborting", cancel_leads_to_aborting);
    g_test_add_func("/job-state/verbs-are-where-they-make-sense", verbs_are_where_they_make_sense);
    return g_test_run();
}

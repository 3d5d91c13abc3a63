/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_RUNNER_H
#define INTERLOCK_TEST_EXPLORE_RUNNER_H

#include "test/explore/schedule.h"

/* Runs schedules, each in a process of its own, several at a time. One thread; callbacks come from submit and drain. */
struct runner;

/* OUTCOME_GOOD or OUTCOME_VIOLATION: who died is a violation with its last words. */
typedef void runner_done(const struct schedule *schedule, const struct result *result, void *argument);

struct runner *runner_create(unsigned at_once);
void runner_destroy(struct runner *runner);
void runner_submit(struct runner *runner, const struct schedule *schedule, runner_done *done, void *argument);
/* Until all that was submitted is done. */
void runner_drain(struct runner *runner);

/* What all schedules came to. */
struct totals {
    uint64_t schedules;
    uint64_t ended_well, cancelled, failed; /* jobs and commands */
    uint64_t cuts, requests;                /* of power; of clients */
};
const struct totals *runner_totals(const struct runner *runner);

#endif

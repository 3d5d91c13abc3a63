/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The states of a job's life, which lead to which, and which verbs each takes: those of QMP's job API.
 *
 *   undefined -> created -> running <-> paused
 *                   |         |  \
 *                   |         |   `--> ready <-> standby
 *                   |         v          |
 *                   |      waiting <-----'
 *                   |         v
 *                   |      pending --------> concluded -> null
 *                   |                           ^
 *                   `---> aborting -------------'        (from every state up to pending, but paused and standby,
 *                                                         which are left first)
 * 1. From undefined every state is reached; from every state null is. No state but running and ready (by a pause) is
 *    entered twice.
 * 2. After concluded nothing but dismiss is taken; before pending everything can be cancelled.
 *
 * Who moves jobs along these edges is job.c.
 */
#include "job/state.h"
#include <glib.h>

#define S(status) (1u << JOB_STATUS_##status)
#define V(verb) (1u << JOB_VERB_##verb)

static const unsigned leads_to[JOB_STATUS_COUNT] = {
    [JOB_STATUS_UNDEFINED] = S(CREATED),
    [JOB_STATUS_CREATED] = S(RUNNING) | S(ABORTING) | S(NULL),
    [JOB_STATUS_RUNNING] = S(PAUSED) | S(READY) | S(WAITING) | S(ABORTING),
    [JOB_STATUS_PAUSED] = S(RUNNING),
    [JOB_STATUS_READY] = S(STANDBY) | S(WAITING) | S(ABORTING),
    [JOB_STATUS_STANDBY] = S(READY),
    [JOB_STATUS_WAITING] = S(PENDING) | S(ABORTING),
    [JOB_STATUS_PENDING] = S(CONCLUDED) | S(ABORTING),
    [JOB_STATUS_ABORTING] = S(CONCLUDED),
    [JOB_STATUS_CONCLUDED] = S(NULL),
    [JOB_STATUS_NULL] = 0,
};

#define WHILE_RUNNING (V(CANCEL) | V(PAUSE) | V(RESUME) | V(SET_SPEED) | V(CHANGE))
static const unsigned takes[JOB_STATUS_COUNT] = {
    [JOB_STATUS_UNDEFINED] = 0,
    [JOB_STATUS_CREATED] = WHILE_RUNNING,
    [JOB_STATUS_RUNNING] = WHILE_RUNNING,
    [JOB_STATUS_PAUSED] = WHILE_RUNNING,
    [JOB_STATUS_READY] = WHILE_RUNNING | V(COMPLETE),
    [JOB_STATUS_STANDBY] = WHILE_RUNNING | V(COMPLETE),
    [JOB_STATUS_WAITING] = V(CANCEL),
    [JOB_STATUS_PENDING] = V(CANCEL) | V(FINALIZE),
    [JOB_STATUS_ABORTING] = 0,
    [JOB_STATUS_CONCLUDED] = V(DISMISS),
    [JOB_STATUS_NULL] = 0,
};

static const char *const verb_names[] = {
    [JOB_VERB_CANCEL] = "cancel",       [JOB_VERB_PAUSE] = "pause",       [JOB_VERB_RESUME] = "resume",
    [JOB_VERB_SET_SPEED] = "set-speed", [JOB_VERB_COMPLETE] = "complete", [JOB_VERB_FINALIZE] = "finalize",
    [JOB_VERB_DISMISS] = "dismiss",     [JOB_VERB_CHANGE] = "change",
};
G_STATIC_ASSERT(G_N_ELEMENTS(leads_to) == JOB_STATUS_COUNT && G_N_ELEMENTS(takes) == JOB_STATUS_COUNT);
G_STATIC_ASSERT(G_N_ELEMENTS(verb_names) == JOB_VERB_COUNT);

bool job_state_leads_to(enum job_status from, enum job_status to)
{
    return leads_to[from] >> to & 1;
}

bool job_state_takes(enum job_status status, enum job_verb verb)
{
    return takes[status] >> verb & 1;
}

const char *job_verb_name(enum job_verb verb)
{
    return verb_names[verb];
}

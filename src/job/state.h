/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_STATE_H
#define INTERLOCK_JOB_STATE_H

#include "schema/types.h"
#include <stdbool.h>

/* The life of a job, as tables. Pure; any thread. */
enum job_verb {
    JOB_VERB_CANCEL,
    JOB_VERB_PAUSE,
    JOB_VERB_RESUME,
    JOB_VERB_SET_SPEED,
    JOB_VERB_COMPLETE,
    JOB_VERB_FINALIZE,
    JOB_VERB_DISMISS,
    JOB_VERB_CHANGE,
    JOB_VERB_COUNT
};
/* May a job go from one state to the other? */
bool job_state_leads_to(enum job_status from, enum job_status to);
/* Does a job in this state take the verb? */
bool job_state_takes(enum job_status status, enum job_verb verb);
const char *job_verb_name(enum job_verb verb);

#endif

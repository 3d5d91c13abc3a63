/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_PROGRESS_H
#define INTERLOCK_TOOL_PROGRESS_H

#include "tool/client.h"

/* What is done about a job that has become ready: both sides are the same, and stay so until it is told to end. */
enum progress_at_ready {
    PROGRESS_WAIT,     /* nothing: others will */
    PROGRESS_QUIET,    /* the same, and nothing is shown of it */
    PROGRESS_COMPLETE, /* its last step: the users move */
    PROGRESS_END,      /* it ends without that step */
    PROGRESS_LEAVE,    /* that is what was waited for */
};

/*
 * Waits for jobs to end and shows how far each is, and why if it does not go on: a bar with rate and time left on a
 * terminal, else a line per tenth. Returns 0 when all ended well, else the first failure: -ECANCELED when a job was
 * cancelled, -EINTR when the user does not want to wait any more (nothing has been done about the jobs), another
 * negative errno when one failed or does not exist.
 */
int progress_wait_jobs(struct client *client, char *const *ids, unsigned count, enum progress_at_ready at_ready,
                       struct error **err);

/* From now on SIGINT ends waiting (-EINTR), and not the program. */
void progress_catch_interrupt(void);
/* Has it come? */
bool progress_interrupted(void);

#endif

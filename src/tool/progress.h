/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_PROGRESS_H
#define INTERLOCK_TOOL_PROGRESS_H

#include "tool/client.h"

/*
 * Waits for jobs to end and shows how far each is: a bar with rate and time left on a terminal, else a line per tenth.
 * `complete_when_ready`: a job that becomes ready (active commit) is told to complete. Returns 0 when all ended well,
 * else the first failure: -ECANCELED when it was cancelled, another negative errno when it failed or does not exist.
 */
int progress_wait_jobs(struct client *client, char *const *ids, unsigned count, bool complete_when_ready,
                       struct error **err);

#endif

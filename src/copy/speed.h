/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_COPY_SPEED_H
#define INTERLOCK_COPY_SPEED_H

#include <stdint.h>

/*
 * The one speed limiter: pure arithmetic on (bytes, time). It never sleeps: it says how long to wait, and its user
 * sleeps in a way that a cancel or a new limit ends at once. One loop only; times are loop_now_ns()'s.
 */
struct speed_limit {
    uint64_t rate;   /* bytes per second, 0: no limit */
    int64_t paid_ns; /* the time at which all admitted bytes will have been paid for */
};

/* Changes the limit. What has been admitted and not been paid for is owed at the new rate. */
void speed_set(struct speed_limit *limit, uint64_t rate, int64_t now_ns);
/* 0: `bytes` are admitted now. Else: nanoseconds until asking again is worth it. */
int64_t speed_ask(struct speed_limit *limit, uint64_t bytes, int64_t now_ns);
/* A piece size that keeps a copy at this limit steady: a tenth of a second's bytes, within [smallest, largest]. */
uint64_t speed_piece(const struct speed_limit *limit, uint64_t smallest, uint64_t largest);

#endif

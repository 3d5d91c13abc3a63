/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_CRASH_REPLAY_H
#define INTERLOCK_TEST_CRASH_REPLAY_H

#include "test/crash/scene.h"

struct replay_counts {
    uint64_t points, crashes, leaky; /* leaky: of the crashes */
    uint64_t sectors;                /* compared with a promise */
    uint64_t bitmaps;                /* that a crash left usable */
    uint64_t moved, caught;          /* deliberate breakages */
};
struct replay_config {
    unsigned mixed; /* LOSS_MIXED crashes at each point, besides the four others */
    unsigned every; /* look at every so many points only; 1: at all */
    unsigned peer;  /* every so many crashes the peer's check has a look too; 0: never */
    uint64_t seed;
};

/*
 * In a coroutine of a world of its own, in which nobody else is: after each crash, opens and checks every image that a
 * view needs, and compares the views with their promises. The first crash that left something wrong ends it: false, and
 * *ret_problem says what and where (g_free() it).
 */
bool coroutine_fn replay_all(struct scene *scene, struct sim *sim, const struct replay_config *config,
                             struct replay_counts *counts, char **ret_problem);
/* Writes each of some metadata writes too early, one after the other, and counts how many of them are found out. */
void coroutine_fn replay_moved(struct scene *scene, struct sim *sim, unsigned most, uint64_t seed,
                               struct replay_counts *counts);

#endif

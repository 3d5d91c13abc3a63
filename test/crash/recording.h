/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_CRASH_RECORDING_H
#define INTERLOCK_TEST_CRASH_RECORDING_H

#include "loop/sim.h"
#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * Everything that reached the disks of a simulated world, in order, so that it can be played again up to any point and
 * with any of its unsettled parts missing. A point is a number of records: 0 is the beginning.
 */
struct recording;

/* Begins with what the disks of these names hold now; from here on everything is recorded. */
struct recording *recording_begin(struct sim *sim, const char *const *paths, unsigned count);
/* Recording is over; the world may go. */
void recording_end(struct recording *recording);
void recording_destroy(struct recording *recording);

unsigned recording_disks(const struct recording *recording);
const char *recording_path(const struct recording *recording, unsigned disk);
uint64_t recording_points(const struct recording *recording); /* the last one */
/* Whether the record before that point is one that makes things durable. */
bool recording_is_settlement(const struct recording *recording, uint64_t point);
/* Whether it is a write of what no guest wrote (guest_sector() in promise.h tells). */
bool recording_is_metadata(const struct recording *recording, uint64_t point);

/*
 * A deliberate breakage: the record before `point` is taken as done, and lasting, before the settlement that preceded
 * it on its disk, as if it had been written too early. False: there is no settlement before it. Points stay the same:
 * what was done early is in the disks from point *ret_from on.
 */
bool recording_move_early(struct recording *recording, uint64_t point, uint64_t *ret_from);
void recording_move_back(struct recording *recording);

/* How a crash leaves what is not settled. */
enum loss {
    LOSS_NOTHING, /* the program died, or the disk was quick */
    LOSS_ALL,     /* the disk had kept everything in its memory */
    LOSS_OLDER,   /* only the last change arrived */
    LOSS_LAST,    /* only the last change did not */
    LOSS_MIXED,   /* each sector is as after one of its changes; drawn by the seed */
};
/* What the disk holds after a crash at the point; g_byte_array_unref(). */
GByteArray *recording_crash(const struct recording *recording, unsigned disk, uint64_t point, enum loss loss,
                            uint64_t seed);

#endif

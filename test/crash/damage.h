/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_CRASH_DAMAGE_H
#define INTERLOCK_TEST_CRASH_DAMAGE_H

#include "loop/sim.h"
#include <stdint.h>

/* Makes some refcounts of the qcow2 image on that disk wrong, and sometimes loses a whole block of them: everything
 * that a check can mend without losing what a guest wrote. Nobody has it open. */
void damage_refcounts(struct sim *sim, const char *path, uint64_t seed);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BASE_SEEDED_H
#define INTERLOCK_BASE_SEEDED_H

#include <stdint.h>

/*
 * Chance that a seed decides, for tests and simulated worlds: the same state gives the same numbers on every machine.
 * Not for secrets. The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
 */

/* Spreads every bit of `value` over all of the result. */
static inline uint64_t seeded_mix(uint64_t value)
{
    value = (value ^ value >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    value = (value ^ value >> 27) * UINT64_C(0x94d049bb133111eb);
    return value ^ value >> 31;
}
/* The next number; any state is a good one to begin with. */
static inline uint64_t seeded_next(uint64_t *state)
{
    return seeded_mix(*state += UINT64_C(0x9e3779b97f4a7c15));
}

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_SCENARIOS_H
#define INTERLOCK_TEST_EXPLORE_SCENARIOS_H

#include "test/explore/exploration.h"

/* Compares the verdicts with the list of named scenarios (test/data/access-scenarios.json), as far as their moves are
 * known on this topology. Prints what differs; how many do. The verdicts have been explored. */
unsigned scenarios_check(const struct exploration *exploration, const char *path);

#endif

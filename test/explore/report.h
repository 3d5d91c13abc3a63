/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_REPORT_H
#define INTERLOCK_TEST_EXPLORE_REPORT_H

#include "test/explore/exploration.h"
#include <jansson.h>

/*
 * What was found, for people and for programs: how many moves and pairs were admitted and refused, and what is refused
 * without any harm having been seen, by kind, with the reason why it is refused nevertheless.
 */
/* Prints it; how many kinds of safe refusals have no reason in the table. `figures` (may be NULL) gets the numbers. */
unsigned report_print(const struct exploration *exploration, json_t *figures);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_MUTATIONS_H
#define INTERLOCK_TEST_EXPLORE_MUTATIONS_H

#include <stdbool.h>

/*
 * Breakages of the rule table, one bit each, as data. The explorer must notice each: that is the test of the explorer.
 */
struct access_claim;
struct access_holder;
struct exploration;

struct mutation {
    const char *command, *path; /* whose claim, and by which role */
    unsigned require, deny;     /* ACCESS_ bits that are dropped; one bit in one of them */
    const char *survives;       /* why nothing shows it, if so: what keeps the harm away, or which move is missing */
};
extern const struct mutation mutations[];
extern const unsigned mutation_count;

/* "block-commit: base does not require attributes"; g_free() */
char *mutation_describe(int mutation);
/* The claim as the ledger is to see it. NO_MUTATION: as it is. */
void mutation_apply(int mutation, const struct access_holder *holder, struct access_claim *claim);
/* Tries every breakage against what `before` found, so many schedules of each pair that it lets in. Prints a line for
 * each; how many were noticed, on this topology. known_only: without those of which the table says that they survive.
 */
unsigned mutations_try(const struct exploration *before, unsigned rounds, bool known_only);
/* Prints each breakage that no topology has noticed in this process and that the table does not expect to survive; how
 * many. */
unsigned mutations_missed(void);

#endif

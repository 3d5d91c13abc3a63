/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_EXPLORATION_H
#define INTERLOCK_TEST_EXPLORE_EXPLORATION_H

#include "test/explore/runner.h"
#include "test/explore/schedule.h"

/*
 * One topology explored: what the ledger says of every move and every pair of moves, what happens when those that it
 * admits run, and what would happen if those that it refuses did.
 */
struct cell {
    enum verdict verdict, reversed; /* of a pair: the first then the second, and the other way round */
    uint64_t changes;               /* places where the power can be cut; 0: not known yet */
    unsigned runs;                  /* of schedules, without or with override */
    char *finding;                  /* the first violation, with the word that replays it */
};

struct exploration {
    const struct topology *topology;
    struct runner *runner;
    uint64_t seed;
    int mutation; /* or NO_MUTATION */
    const struct move *moves;
    unsigned count;
    struct cell *singles; /* [count] */
    struct cell *pairs;   /* [count * count]; first <= second */
    unsigned failures;    /* findings that must not be */
    char *first;          /* of them, with the word that replays it; or NULL */
    bool quiet;           /* failures are counted, not printed */
    uint64_t triples_run, triples_admitted;
};

struct exploration *exploration_create(const struct topology *topology, struct runner *runner, uint64_t seed,
                                       int mutation);
void exploration_free(struct exploration *exploration);
struct cell *exploration_pair(const struct exploration *exploration, unsigned first, unsigned second);
/* Is the pair explored at all? Both moves are admitted alone, and one at least outlasts its command. */
bool exploration_has_pair(const struct exploration *exploration, unsigned first, unsigned second);

/* What the ledger says; finds verdicts that depend on the order. */
void explore_verdicts(struct exploration *exploration);
/* What it says now of what `before` found refused, and has to do with claims of this command (NULL: all); the rest is
 * left out of the exploration. */
void explore_verdicts_again(struct exploration *exploration, const struct exploration *before, const char *command);
/* So many schedules of each single move and of each admitted pair; a violation is a failure. */
void explore_singles(struct exploration *exploration, unsigned rounds);
void explore_admitted(struct exploration *exploration, unsigned rounds);
/* The same of what is admitted, until a round has a violation. */
void explore_until_failure(struct exploration *exploration, unsigned rounds);
/* Every place where the power can be cut, and every request that can fail, of each single move. */
void explore_everywhere(struct exploration *exploration);
/* Up to so many schedules of each refused move and pair, with the ledger overridden, until one shows why. */
void explore_refused(struct exploration *exploration, unsigned rounds);
/* Three moves at random, begun one after the other as far as they are admitted. */
void explore_triples(struct exploration *exploration, uint64_t count);

#endif

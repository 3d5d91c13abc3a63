/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_SCHEDULE_H
#define INTERLOCK_TEST_EXPLORE_SCHEDULE_H

#include "test/explore/moves.h"
#include "test/explore/topology.h"
#include <stdbool.h>
#include <stdint.h>

/*
 * One schedule: everything that decides how one run goes. It is written as one word, which replays the run exactly:
 *
 *   chain/commit c>a/export-ro b/mode=cut/at=17/seed=12
 */
#define SCHEDULE_MOVES_MAX 4

enum mode {
    MODE_VERDICT, /* the moves are begun one after the other, before any has got anywhere; then all are called off */
    MODE_PLAIN,
    MODE_CANCEL, /* one job is cancelled at a seeded moment */
    MODE_FAULT,  /* a request to a disk fails, at a seeded place or the place `at` */
    MODE_ROOM,   /* a disk is full */
    MODE_CUT,    /* the power is cut at the change number `at` */
    MODE_COUNT,
};

struct schedule {
    const struct topology *topology;
    const struct move *moves[SCHEDULE_MOVES_MAX];
    unsigned count;
    enum mode mode;
    uint64_t at;
    uint64_t seed;
    bool override;       /* the ledger lets everything pass once the first move has begun */
    unsigned companions; /* with override: bits of the clients (companion_moves()) that may be there */
    int mutation;        /* index into mutations[], or NO_MUTATION */
};
#define NO_MUTATION (-1)
#define ALL_COMPANIONS (~0u)

const char *mode_name(enum mode mode);
char *schedule_format(const struct schedule *schedule); /* g_free() */
/* False, with a sentence in *ret_problem, when it is not one. */
bool schedule_parse(const char *text, struct schedule *ret, char **ret_problem);

/* What came of it. Lies in memory that parent and child share. */
enum verdict { VERDICT_NONE, VERDICT_ADMITTED, VERDICT_REFUSED, VERDICT_INVALID };
enum outcome { OUTCOME_DIED, OUTCOME_GOOD, OUTCOME_VIOLATION };
struct result {
    enum outcome outcome;
    enum verdict verdicts[SCHEDULE_MOVES_MAX];
    char reasons[SCHEDULE_MOVES_MAX][200]; /* why a move was not admitted */
    char text[2048];                       /* of a violation */
    uint64_t changes;
    uint64_t requests;
    unsigned ended_well, cancelled, failed; /* moves that had begun */
    bool cut;                               /* the power was */
};

/* In a process of its own: runs it, fills *result, and ends the process. */
void schedule_run(const struct schedule *schedule, struct result *result) __attribute__((noreturn));

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_MOVES_H
#define INTERLOCK_TEST_EXPLORE_MOVES_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "test/explore/topology.h"

/*
 * What is explored: operations, each at its places on a topology ("commit c>a"). A kind is one entry in the table in
 * moves.c; the names are those of test/data/access-scenarios.json.
 */
struct actor;
struct claim_table;

/* What a move needs besides the topology's images: an empty image that leans on nothing, or one whose header names the
 * upper image. */
enum move_target { TARGET_NONE, TARGET_EMPTY, TARGET_OVERLAY };

struct move_kind {
    const char *name;
    const char *command; /* as the ledger calls who claims for it; NULL: it claims nothing */
    enum { MOVE_JOB, MOVE_CLIENT, MOVE_COMMAND } sort;
    /* Is there such a move with these images? `lower` is NO_IMAGE where the kind has only one. */
    bool (*fits)(const struct topology *topology, int upper, int lower);
    bool pair;         /* has a lower image, */
    char separator[3]; /* written so between the two */
    /* 0: it has begun. The same way in as the command's. */
    int coroutine_fn (*start)(struct actor *actor, struct error **err);
    /* Called by those whose beginning is an action, in that step, under the graph's lock. */
    void (*on_begin)(struct actor *actor);
    /* Until its end. NULL: starting was all of it. */
    void coroutine_fn (*live)(struct actor *actor);
    /* What a good end means for the model. May be NULL. */
    void (*done)(struct actor *actor);
    /* Is what a good end left right, in the running graph, when all have come to their ends? May be NULL. */
    void (*check)(struct actor *actor);
    /* What an end that was not good means for the model. May be NULL. */
    void (*failed)(struct actor *actor);
    /* Does the graph show that it has moved those who use its images, whatever it has said yet? May be NULL. */
    bool (*moved)(const struct actor *actor);
    enum move_target target;
    bool large;    /* copies in units of 64 KiB: small images would have one only */
    bool replaces; /* what leans on its image leans on its target at the end */
    /* Of a command: what it claims while it lasts, on its one image, so that it can be held in mid-course. */
    const struct claim_table *claims;
    unsigned conditions; /* CLAIM_IF_ bits */
};
struct move {
    const struct move_kind *kind;
    int upper, lower;
    unsigned index; /* among the moves of its topology */
    char name[48];
};

/* Every move that there is on a topology; made once. */
const struct move *moves_on(const struct topology *topology, unsigned *ret_count);
const struct move *move_find(const struct topology *topology, const char *name); /* NULL: none */

/* The clients that are there besides the moves of a schedule: a writer and a reader of every leaf. */
#define COMPANIONS_MAX 4
unsigned companion_moves(const struct topology *topology, const struct move *ret[COMPANIONS_MAX]);

#endif

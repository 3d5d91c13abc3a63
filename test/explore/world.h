/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_WORLD_H
#define INTERLOCK_TEST_EXPLORE_WORLD_H

#include "loop/coroutine.h"
#include "loop/loop.h"
#include "loop/sim.h"
#include "loop/sync.h"
#include "schema/types.h"
#include "test/explore/schedule.h"
#include "test/explore/view.h"

/*
 * The world of one schedule: simulated disks and loops, the graph of the real code above them, and beside it the model
 * of what is true: which image shows what, leans on what, and is stale.
 */
#define ANY_IMAGE (-2)
struct graph;
struct jobs;
struct node;

/* An image, as it ought to be. */
struct picture {
    const char *name; /* of its node */
    char path[16];    /* of its disk */
    struct view *view;
    int below;      /* what it leans on, or NO_IMAGE */
    int named;      /* what its header names; or ANY_IMAGE: nobody knows */
    int moved_to;   /* when stale: where its content is now */
    bool idle;      /* a target that nobody has asked anything of yet */
    bool stale;     /* its file may be deleted */
    bool forgotten; /* nobody had it open any more when what it leant on changed: nobody could stand up for it */
    bool may_grow, may_shrink; /* somebody has begun to change its size, and may not have got further */
    uint64_t shrinks_to;       /* what lies behind is nobody's from the beginning of a shrink on */
};

enum actor_end { ACTOR_RUNS, ACTOR_DONE, ACTOR_FAILED, ACTOR_CANCELLED };

/* Who makes a move. */
struct actor {
    struct world *world;
    const struct move *move;
    unsigned number;
    bool companion;
    char id[16];                              /* of its job or export */
    int64_t start_ns, linger_ns[2], leave_ns; /* moments and pauses, drawn from the seed */
    enum verdict verdict;
    bool begun, started; /* about to start; admitted or refused */
    enum actor_end end;
    bool stays;        /* an active commit that is ready ends there, and its users stay where they are */
    bool rests;        /* a job is paused for a while */
    bool asked;        /* job-complete, or the end of an active commit that stays */
    unsigned moved_at; /* the place among those whose claims a step of the graph has ended; 0: not yet */
    bool settled;      /* the model has followed it */
    bool cancelled;    /* a cancel was taken */
    bool aborts;       /* a job that has said so */
    int64_t cancel_ns; /* or 0: is not cancelled */
    char *error;
    uint64_t size;              /* of a resize */
    int target;                 /* image of its own, or NO_IMAGE */
    enum mirror_sync_mode sync; /* of a mirror */
    int subject;                /* of a mirror: the image that it mirrors */
    int bottom;                 /* of a stream: the lowest image of its range */
    uint64_t since;             /* view_clock() before what decides which moment a copy or snapshot shows */
    struct view *moment;        /* of a backup: what its target is to show */
    struct client *client;
};
#define ACTORS_MAX (SCHEDULE_MOVES_MAX + COMPANIONS_MAX)

struct world {
    const struct schedule *schedule;
    const struct topology *topology;
    struct result *result;
    uint64_t random;
    struct sim *sim;
    struct loop *control, *io[2];
    unsigned io_count;
    struct graph *graph;
    struct jobs *jobs;
    struct picture pictures[TOPOLOGY_IMAGES_MAX + SCHEDULE_MOVES_MAX]; /* the topology's images, then targets */
    unsigned picture_count;
    uint64_t cluster;
    unsigned cluster_bits, clusters_max;
    bool nested; /* opened by the leaf, images below read-only until somebody needs them */
    struct actor actors[ACTORS_MAX];
    unsigned actor_count;
    unsigned moved_count;
    struct co_group alive; /* actors */
};

/* The first violation ends the process. */
void world_violation(struct world *world, const char *format, ...) __attribute__((format(printf, 2, 3), noreturn));
void world_good(struct world *world) __attribute__((noreturn));

uint64_t world_random(struct world *world);
/* Evenly below `limit`; true in so many of a hundred. */
uint64_t world_below(struct world *world, uint64_t limit);
bool world_chance(struct world *world, unsigned percent);
void coroutine_fn world_sleep(int64_t duration_ns);
/* Of a job: mostly as fast as it goes; else so slow that it takes some milliseconds. */
int64_t world_speed(struct world *world);
#define MICROSECOND ((int64_t)1000)

/* Disks with seeded images, and the model of them; then a target for each move that needs one. */
void world_make_images(struct world *world);
void world_make_targets(struct world *world);
void coroutine_fn world_open_graph(struct world *world);
void coroutine_fn world_close_graph(struct world *world);
struct node *world_node(struct world *world, int image); /* NULL: is not in the graph any more */
/* A move is followed by the model when it says that it has ended; whoever begins something just before that, but
 * after the graph has changed, calls this first. */
void world_catch_up(struct world *world);
/* Of an actor's job or command, as long as it has its claims; else NULL. */
struct operation;
const struct operation *world_operation(const struct actor *actor);
/* In the model, the image leans on `below` from now on: a stream whose bottom is cut off by that has a new one. */
void world_link(struct world *world, int image, int below);
/* Does `upper` lean on `lower`, directly or not, or is it the same? */
bool world_leans_on(const struct world *world, int upper, int lower);
/* Whatever leans on the image and is not open any more is forgotten: the image is about to change. */
void world_forget_above(struct world *world, int image);
/* May requests fail in this schedule, so that what was not flushed may be lost? */
bool world_has_faults(const struct world *world);
/* Have all moves that are no clients come to their ends? */
bool world_is_quiet(const struct world *world);
bool world_all_begun(const struct world *world);
/* Does one move begin after the other, and no job end before all have begun? Where rules are broken on purpose. */
bool world_in_turn(const struct world *world);

/* Everything that a refusal must leave alone, as text; g_free(). */
char *world_fingerprint(struct world *world);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_ACTION_H
#define INTERLOCK_BLOCK_ACTION_H

#include "base/error.h"
#include "block/graph.h"
#include "loop/coroutine.h"
#include <glib.h>

/*
 * What a command does to the graph, or begins on it, cut into the steps that let several of them be one: all or
 * nothing, at one point in time. A command by itself is a run of one action. Control thread, in a coroutine.
 */
struct action;

/*
 * One kind of action. Each member may be NULL, and may yield. actions_run() calls them in this order:
 *
 * - prepare: what is slow and nobody sees: creates and opens files. graph->lock is not held. A failure ends the run.
 *
 * Then, graph->lock held, for one action after the other, so that each finds what those before it did:
 *
 * - plan: finds out what the arguments mean in this graph; gives the nodes to be drained, action_drain(). Changes
 *   nothing.
 * - apply: these nodes are drained, and stay so until the end of the run: takes the claims and makes every change that
 *   can fail. Quick: users wait. When it fails it has taken back what it did itself.
 *
 * When one has failed, those before it, in reverse order, still locked and drained:
 *
 * - revert: takes back what apply did.
 *
 * Else, when all have been applied, in order, locked and drained:
 *
 * - commit: what cannot fail; job_start(). The point in time of all of them lies between the last apply and this.
 *
 * At the end always, for each action, in order, the lock given back and nothing drained:
 *
 * - clean: frees action->state, whatever has been called before (also if nothing was).
 *
 * The dry run calls plan and preview, graph->lock held, then clean.
 *
 * - preview: the decision alone, as operation_preview().
 */
struct action_kind {
    const char *name;
    int coroutine_fn (*prepare)(struct action *action, struct error **err);
    int coroutine_fn (*plan)(struct action *action, struct error **err);
    int coroutine_fn (*apply)(struct action *action, struct error **err);
    void coroutine_fn (*revert)(struct action *action);
    void coroutine_fn (*commit)(struct action *action);
    void coroutine_fn (*clean)(struct action *action);
    int coroutine_fn (*preview)(struct action *action, json_t **ret_claims, struct error **err);
};

struct action {
    const struct action_kind *kind;
    struct graph *graph;
    void *state;        /* the kind's; made by whoever makes the action */
    GPtrArray *touched; /* struct node, references; actions_run()'s */
    /* Names of nodes that it will probably touch, ended by NULL; or NULL. Where there are several actions these are
     * drained all at once before the first: so the waits for requests in flight do not add up. No promise: names that
     * nobody has are passed over, and plan() says what is needed. Borrowed. */
    const char *const *near;
};

/* In plan: `node` will be drained for apply, with everything from which requests reach it. */
void action_drain(struct action *action, struct node *node);

/* Runs them all, or none: 0, or the first error, with everything as it was. Takes graph->lock. */
int coroutine_fn actions_run(struct graph *graph, struct action *actions, unsigned count, struct error **err);
/* The dry run. *ret_claims: a new array of what all of them would claim, whatever the decision; actions that lean on
 * the effect of an earlier one cannot be foreseen and are errors. */
int coroutine_fn actions_check(struct graph *graph, struct action *actions, unsigned count, json_t **ret_claims,
                               struct error **err);

#endif

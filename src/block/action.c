/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Runs actions: several changes of the graph as one. Owns the order of their steps, the lock and the drains; what an
 * action does is its kind's.
 *
 * 1. graph->lock is held from the first plan to the end of the last commit or revert: no other operation sees, or gets
 *    its claims in, the middle.
 * 2. What has been drained for one action stays drained until the end. A write that was acknowledged before the end is
 *    in what every action sees; one that was not may be in none: the cut over all nodes is one point in time, though
 *    they are drained one after the other.
 * 3. Every action whose apply succeeded gets exactly one of commit and revert, and each action its clean.
 */
#include "block/action.h"
#include <errno.h>
#include <glib.h>

void action_drain(struct action *action, struct node *node)
{
    g_ptr_array_add(action->touched, node_ref(node));
}

static int coroutine_fn action_step(struct action *action,
                                    int coroutine_fn (*step)(struct action *action, struct error **err),
                                    struct error **err)
{
    return step ? step(action, err) : 0;
}

static int coroutine_fn action_apply(struct action *action, struct drain *drain, struct error **err)
{
    int result = action_step(action, action->kind->plan, err);
    if (result < 0) {
        return result;
    }
    graph_drain_begin(action->graph, (struct node *const *)action->touched->pdata, action->touched->len, NULL, drain);
    return action_step(action, action->kind->apply, err);
}

/* graph->lock is held. */
static int coroutine_fn actions_apply(struct graph *graph, struct action *actions, unsigned count, struct error **err)
{
    g_autofree struct drain *drains = g_new0(struct drain, count);
    unsigned applied = 0;
    int result = 0;
    while (result == 0 && applied < count) {
        result = action_apply(&actions[applied], &drains[applied], err);
        applied += result == 0;
    }
    if (result == 0) {
        for (unsigned i = 0; i < count; i++) {
            if (actions[i].kind->commit) {
                actions[i].kind->commit(&actions[i]);
            }
        }
    } else {
        while (applied-- > 0) {
            if (actions[applied].kind->revert) {
                actions[applied].kind->revert(&actions[applied]);
            }
        }
    }
    for (unsigned i = count; i-- > 0;) {
        graph_drain_end(&drains[i]);
    }
    return result;
}

static void actions_begin(struct graph *graph, struct action *actions, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        actions[i].graph = graph;
        actions[i].touched = g_ptr_array_new();
    }
}

static void coroutine_fn actions_clean(struct action *actions, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        for (guint n = 0; n < actions[i].touched->len; n++) {
            node_release(actions[i].touched->pdata[n]);
        }
        g_ptr_array_free(actions[i].touched, TRUE);
        actions[i].touched = NULL;
        if (actions[i].kind->clean) {
            actions[i].kind->clean(&actions[i]);
        }
    }
}

int coroutine_fn actions_run(struct graph *graph, struct action *actions, unsigned count, struct error **err)
{
    int result = 0;
    actions_begin(graph, actions, count);
    for (unsigned i = 0; i < count && result == 0; i++) {
        result = action_step(&actions[i], actions[i].kind->prepare, err);
    }
    if (result == 0) {
        graph_lock(graph);
        result = actions_apply(graph, actions, count, err);
        graph_unlock(graph);
    }
    actions_clean(actions, count);
    return result;
}

int coroutine_fn actions_check(struct graph *graph, struct action *actions, unsigned count, json_t **ret_claims,
                               struct error **err)
{
    int result = 0;
    actions_begin(graph, actions, count);
    *ret_claims = json_array();
    graph_lock(graph);
    for (unsigned i = 0; i < count && result == 0; i++) {
        json_t *claims = NULL;
        result = action_step(&actions[i], actions[i].kind->plan, err);
        if (result == 0 && actions[i].kind->preview) {
            result = actions[i].kind->preview(&actions[i], &claims, err);
        }
        if (claims) {
            json_array_extend(*ret_claims, claims);
            json_decref(claims);
        }
    }
    graph_unlock(graph);
    actions_clean(actions, count);
    return result;
}

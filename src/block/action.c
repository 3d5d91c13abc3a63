/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Runs actions: several changes of the graph as one. Owns the order of their steps, the lock and the drains; what an
 * action does is its kind's.
 *
 * 1. graph->lock is held from the first plan to the end of the last commit or revert: no other operation sees, or gets
 *    its claims in, the middle.
 * 2. What has been drained for one action stays drained until the end. So the cut over all nodes is one point in time,
 *    though they are drained one after the other: a write that came after another was acknowledged is not in what one
 *    action finds if that other is missing in what another action finds.
 * 3. All gates that can be foreseen are closed before the first request in flight is waited for: users of several
 *    disks are held up for as long as the slowest request takes, not for all of them together.
 * 4. Who waits for its claims waits for those of all actions, in one place of the queue, and holds none meanwhile.
 * 5. Every action whose apply succeeded gets exactly one of commit and revert, and each action its clean.
 */
#include "block/action.h"
#include "access/queue.h"
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
    if (result == 0) {
        graph_drain_begin(action->graph, (struct node *const *)action->touched->pdata, action->touched->len, NULL,
                          drain);
        result = action_step(action, action->kind->apply, err);
    }
    if (result < 0) {
        graph_drain_end(drain);
    }
    return result;
}

/* What is near to the actions, all at once. One action alone drains what it needs by itself. */
static void coroutine_fn actions_drain(struct graph *graph, const struct action *actions, unsigned count,
                                       struct drain *drain)
{
    g_autoptr(GPtrArray) nodes = g_ptr_array_new();
    for (unsigned i = 0; count > 1 && i < count; i++) {
        for (const char *const *name = actions[i].near; name && *name; name++) {
            struct node *node = graph_find(graph, *name);
            if (node) {
                g_ptr_array_add(nodes, node);
            }
        }
    }
    graph_drain_begin(graph, (struct node *const *)nodes->pdata, nodes->len, NULL, drain);
}

static void coroutine_fn actions_commit(struct action *actions, unsigned count, struct drain *drains)
{
    for (unsigned i = 0; i < count; i++) {
        if (actions[i].kind->commit) {
            actions[i].kind->commit(&actions[i]);
        }
    }
    for (unsigned i = count; i-- > 0;) {
        graph_drain_end(&drains[i]);
    }
}

/* The drain of an action, which may have found backends that one before it has made, ends before that one is reverted.
 */
static void coroutine_fn actions_revert(struct action *actions, unsigned applied, struct drain *drains)
{
    while (applied-- > 0) {
        if (actions[applied].kind->revert) {
            actions[applied].kind->revert(&actions[applied]);
        }
        graph_drain_end(&drains[applied]);
    }
}

static int coroutine_fn actions_run_locked(struct graph *graph, struct action *actions, unsigned count,
                                           struct error **err)
{
    g_autofree struct drain *drains = g_new0(struct drain, count);
    struct drain near;
    unsigned applied = 0;
    int result = 0;
    actions_drain(graph, actions, count, &near);
    while (result == 0 && applied < count) {
        result = action_apply(&actions[applied], &drains[applied], err);
        applied += result == 0;
    }
    if (result == 0) {
        result = access_asker_keep(graph->ledger, err);
    }
    if (result == 0) {
        actions_commit(actions, count, drains);
    } else {
        actions_revert(actions, applied, drains);
    }
    graph_drain_end(&near);
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
    access_asker_begin(graph->ledger);
    actions_begin(graph, actions, count);
    for (unsigned i = 0; i < count && result == 0; i++) {
        result = action_step(&actions[i], actions[i].kind->prepare, err);
    }
    if (result == 0) {
        graph_lock(graph);
        result = actions_run_locked(graph, actions, count, err);
        graph_unlock(graph);
    }
    actions_clean(actions, count);
    access_asker_end(graph->ledger);
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

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Successions: an image's overlays and users go over to another image that shows the same. Owns who counts as an
 * overlay and as a user, and opening the overlays for writing while their headers are to be changed.
 *
 * 1. The set of overlays is found again under the lock each time: it is a role, no list.
 * 2. Between an image and its users stand filters: of jobs, and of users. The edge of the lowest one moves, so all of
 *    them come along in their order; the job's own filter is taken out on the way, wherever it stands among them.
 * 3. A backend moves if its owner follows it. A job's backends do not: its claims are on the image, and there they
 *    stay, also when the filter of another job that was put below them goes over. What a job's filter shows may be
 *    followed by its operation (graph_filter_follow()), and then the job's own backends go with it; a job that cannot
 *    go on with another image does not follow, and its claims refuse the step.
 *
 * Strings in headers are relink.c's; whether the two images show the same is the job's affair.
 */
#include "job/succession.h"
#include "block/graph.h"
#include "block/node.h"
#include "block/user.h"

/* --- overlays --- */

typedef int coroutine_fn (*overlay_visit)(struct node *overlay, void *argument, struct error **err);

static bool is_overlay(const struct edge *edge)
{
    return edge->role == EDGE_BACKING && !edge->parent->stale;
}

void overlays_init(struct overlays *overlays, struct graph *graph, struct node *image)
{
    *overlays = (struct overlays){.graph = graph, .image = image, .writable = g_ptr_array_new()};
}

static struct node *fresh_above(const struct overlays *overlays, const struct node *node)
{
    struct node *found = NULL;
    list_for_each (link, &node->parents) {
        const struct edge *edge = container_of(link, struct edge, child_link);
        if (!found && edge->role == EDGE_FILTERED) {
            found = fresh_above(overlays, edge->parent);
        } else if (!found && is_overlay(edge) && !g_ptr_array_find(overlays->writable, edge->parent, NULL)) {
            found = edge->parent;
        }
    }
    return found;
}

struct node *overlays_fresh(const struct overlays *overlays)
{
    return fresh_above(overlays, overlays->image);
}

static int coroutine_fn each_above(const struct node *node, overlay_visit visit, void *argument, struct error **err)
{
    int result = 0;
    list_for_each (link, &node->parents) {
        const struct edge *edge = container_of(link, struct edge, child_link);
        if (result == 0 && edge->role == EDGE_FILTERED) {
            result = each_above(edge->parent, visit, argument, err);
        } else if (result == 0 && is_overlay(edge)) {
            result = visit(edge->parent, argument, err);
        }
    }
    return result;
}

int coroutine_fn overlays_each(const struct overlays *overlays, overlay_visit visit, void *argument, struct error **err)
{
    return each_above(overlays->image, visit, argument, err);
}

int coroutine_fn overlays_open_locked(struct overlays *overlays, overlay_visit check, void *argument,
                                      struct error **err)
{
    for (struct node *fresh; (fresh = overlays_fresh(overlays));) {
        int result = check(fresh, argument, err);
        if (result == 0) {
            result = node_writable_begin_locked(fresh, err);
        }
        if (result < 0) {
            return result;
        }
        g_ptr_array_add(overlays->writable, node_ref(fresh));
    }
    return 0;
}

int coroutine_fn overlays_lock(struct overlays *overlays, overlay_visit check, void *argument, struct error **err)
{
    struct graph *graph = overlays->graph;
    while (true) {
        graph_lock(graph);
        struct node *fresh = overlays_fresh(overlays);
        if (!fresh) {
            return 0;
        }
        int result = check(fresh, argument, err);
        node_ref(fresh);
        graph_unlock(graph);
        if (result == 0) {
            result = node_writable_begin(fresh, err);
        }
        if (result < 0) {
            node_release(fresh);
            return result;
        }
        g_ptr_array_add(overlays->writable, fresh);
    }
}

void coroutine_fn overlays_close_locked(struct overlays *overlays)
{
    if (!overlays->writable) {
        return;
    }
    struct drain drain;
    struct node *const *nodes = (struct node *const *)overlays->writable->pdata;
    graph_drain_begin(overlays->graph, nodes, overlays->writable->len, NULL, &drain);
    for (guint i = 0; i < overlays->writable->len; i++) {
        node_writable_end_locked(nodes[i]);
    }
    graph_drain_end(&drain);
    for (guint i = 0; i < overlays->writable->len; i++) {
        node_unref(nodes[i]);
    }
    g_clear_pointer(&overlays->writable, g_ptr_array_unref);
}

/* --- moving --- */

static bool carries_overlay(const struct node *filter)
{
    list_for_each (link, &filter->parents) {
        const struct edge *edge = container_of(link, struct edge, child_link);
        if (is_overlay(edge) || (edge->role == EDGE_FILTERED && carries_overlay(edge->parent))) {
            return true;
        }
    }
    return false;
}

static bool goes_over(const struct edge *edge, enum succession who)
{
    switch (edge->role) {
    case EDGE_ROOT:
        return backend_follows(edge->backend);
    case EDGE_FILE: /* a format in the image uses it as clients do */
    case EDGE_DATA:
        return true;
    case EDGE_BACKING:
        return who == SUCCESSION_ALL;
    case EDGE_FILTERED:
        return who == SUCCESSION_ALL || !carries_overlay(edge->parent);
    default:
        return false;
    }
}

/* The recording of one succession. */
struct recording {
    struct transaction *transaction;
    struct node *image, *own;
    enum succession who;
    bool met_own;
};

static void record_parents(struct recording *recording, struct node *node, struct node *to, struct node *stays);

/* Is it a backend of a job whose filter, somewhere over `node`, goes over? */
static bool goes_with_filter(const struct recording *recording, const struct node *node, const struct backend *backend)
{
    list_for_each (link, &node->parents) {
        const struct edge *edge = container_of(link, struct edge, child_link);
        const struct node *filter = edge->role == EDGE_FILTERED ? edge->parent : NULL;
        if (filter && filter->job_filter && filter->operation && filter != recording->own &&
            goes_over(edge, recording->who) && backend_is_of(backend, filter->operation)) {
            return true;
        }
        if (filter && goes_with_filter(recording, filter, backend)) {
            return true;
        }
    }
    return false;
}

static bool edge_goes(const struct recording *recording, const struct edge *edge)
{
    return goes_over(edge, recording->who) ||
           (edge->role == EDGE_ROOT && goes_with_filter(recording, recording->image, edge->backend));
}

/* A job's filter goes over with what stands on it, but for other jobs that are about the image: they only came to stand
 * there when the filter was put below them. `stays`: where those go. */
static void record_left(struct recording *recording, struct node *filter, struct node *stays)
{
    list_for_each (link, &filter->parents) {
        struct edge *edge = container_of(link, struct edge, child_link);
        struct node *above = edge->role == EDGE_FILTERED && edge->parent->job_filter ? edge->parent : NULL;
        if (above && above == recording->own) {
            recording->met_own = true;
            record_parents(recording, above, filter, stays);
        } else if (above && !above->operation) {
            transaction_move_edge(recording->transaction, edge, stays);
            record_parents(recording, above, filter, NULL);
        } else if (above) {
            record_left(recording, above, stays);
        } else if (edge->role == EDGE_ROOT && !edge_goes(recording, edge)) {
            transaction_move_edge(recording->transaction, edge, stays);
        }
    }
}

/* Who stands on `node`, which stays or ends: who goes over goes to `to`, who does not to `stays`, or NULL: nowhere. */
static void record_parents(struct recording *recording, struct node *node, struct node *to, struct node *stays)
{
    list_for_each (link, &node->parents) {
        struct edge *edge = container_of(link, struct edge, child_link);
        struct node *filter = edge->role == EDGE_FILTERED ? edge->parent : NULL;
        if (filter && filter == recording->own) {
            recording->met_own = true;
            record_parents(recording, filter, to, stays ? stays : node);
        } else if (filter && filter->job_filter && !filter->operation) {
            if (stays) { /* its job is about the image */
                transaction_move_edge(recording->transaction, edge, stays);
            }
            record_parents(recording, filter, to, NULL);
        } else if (edge_goes(recording, edge)) {
            transaction_move_edge(recording->transaction, edge, to);
            if (filter && filter->job_filter) {
                record_left(recording, filter, stays ? stays : node);
            }
        } else if (stays) {
            transaction_move_edge(recording->transaction, edge, stays);
        }
    }
}

void succession_record(struct transaction *transaction, struct node *image, struct node *own, struct node *to,
                       enum succession who)
{
    struct recording recording = {.transaction = transaction, .image = image, .own = own, .who = who};
    record_parents(&recording, image, to, NULL);
    if (own && !recording.met_own) { /* it stands on a filter that goes over, and leaves that to those above it */
        list_for_each (link, &own->parents) {
            transaction_move_edge(transaction, container_of(link, struct edge, child_link), own->filtered->child);
        }
    }
    if (own) {
        transaction_detach(transaction, own->filtered);
    }
}

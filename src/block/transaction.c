/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Transactions: changes of the graph's shape, with every claim that follows from them, in one step or not at all.
 *
 *   graph_begin --> record steps --> graph_commit: do the steps in memory --> follow --> derive --> ledger
 *                                                                              refused: undo the steps in reverse
 *                                                                              accepted: settle
 *
 * 1. The caller holds graph->lock and has drained every node whose edges change: until the commit returns nobody but
 *    this file looks at the shape.
 * 2. The ledger is asked once, with the claims of every operation and every touched edge in the new shape. A refusal
 *    leaves shape, ledger, bindings and stale marks as they were.
 * 3. Roles follow the graph: a backend that moves takes its operation's variable with it; a bottom that leaves its
 *    chain hands the role to the overlay whose edge changed; edges that come into an operation's chain are adopted, and
 *    adopted edges, moved or not, keep their adopter until it ends.
 * 4. References are dropped, and nodes closed by it, only after everything else is done.
 */
#include "block/enforce.h"
#include "block/private.h"
#include <errno.h>

enum step_kind { STEP_MOVE, STEP_DETACH, STEP_ATTACH, STEP_REBIND, STEP_STALE, STEP_END, STEP_ADOPT };

struct step {
    enum step_kind kind;
    struct edge *edge; /* move, detach, attach, adopt */
    struct node *to;   /* move, attach: child; rebind: node; stale: the node */
    struct node *from; /* as it was before: filled when the step is done */
    struct operation *operation;
    unsigned variable;
    char *reason;
    struct edge **ret;
    /* What the commit needs to go back or to settle. */
    struct access_holder *old_holder;
    struct operation *old_adopter;
    bool ended_before;
};

struct transaction {
    struct graph *graph;
    char *subject;
    const struct operation *operation; /* on whose behalf, or NULL */
    bool takes_back;
    GArray *steps; /* struct step */
    unsigned done; /* of steps */
};

struct transaction *graph_begin(struct graph *graph, const char *subject)
{
    struct transaction *transaction = g_new0(struct transaction, 1);
    transaction->graph = graph;
    transaction->subject = g_strdup(subject);
    transaction->steps = g_array_new(FALSE, TRUE, sizeof(struct step));
    return transaction;
}

void transaction_by(struct transaction *transaction, const struct operation *operation)
{
    transaction->operation = operation;
}

void transaction_takes_back(struct transaction *transaction)
{
    transaction->takes_back = true;
}

static void record(struct transaction *transaction, struct step step)
{
    g_array_append_val(transaction->steps, step);
}

static struct step *step_at(struct transaction *transaction, unsigned index)
{
    return &g_array_index(transaction->steps, struct step, index);
}

/* --- recording --- */

void transaction_move_edge(struct transaction *transaction, struct edge *edge, struct node *to)
{
    record(transaction, (struct step){.kind = STEP_MOVE, .edge = edge, .to = to});
}

void transaction_move_parents(struct transaction *transaction, struct node *from, struct node *to,
                              struct node *except_parent)
{
    list_for_each (link, &from->parents) {
        struct edge *edge = container_of(link, struct edge, child_link);
        if (!except_parent || edge->parent != except_parent) {
            transaction_move_edge(transaction, edge, to);
        }
    }
}

void transaction_move_users(struct transaction *transaction, struct node *from, struct node *to)
{
    list_for_each (link, &from->parents) {
        struct edge *edge = container_of(link, struct edge, child_link);
        bool jobs_own = edge->role == EDGE_ROOT ? !edge->backend->operation : edge->role == EDGE_TARGET;
        if (!jobs_own) {
            transaction_move_edge(transaction, edge, to);
        }
    }
}

void transaction_detach(struct transaction *transaction, struct edge *edge)
{
    g_assert(edge->role != EDGE_ROOT);
    record(transaction, (struct step){.kind = STEP_DETACH, .edge = edge});
}

void transaction_attach(struct transaction *transaction, struct node *parent, enum edge_role role, struct node *child,
                        struct edge **ret)
{
    record(transaction, (struct step){.kind = STEP_ATTACH, .edge = edge_create(parent, role), .to = child, .ret = ret});
}

void transaction_rebind(struct transaction *transaction, struct operation *operation, unsigned variable,
                        struct node *to)
{
    g_assert(variable < CLAIM_VARIABLE_COUNT);
    record(transaction, (struct step){.kind = STEP_REBIND, .operation = operation, .variable = variable, .to = to});
}

void transaction_adopt(struct transaction *transaction, struct edge *edge, struct operation *adopter)
{
    record(transaction, (struct step){.kind = STEP_ADOPT, .edge = edge, .operation = adopter});
}

void transaction_mark_stale(struct transaction *transaction, struct node *node, const char *reason)
{
    record(transaction, (struct step){.kind = STEP_STALE, .to = node, .reason = g_strdup(reason)});
}

void transaction_end_operation(struct transaction *transaction, struct operation *operation)
{
    record(transaction, (struct step){.kind = STEP_END, .operation = operation});
}

/* --- enforcement, in the old shape --- */

/* Edges of which nobody relies on what they show: a job filter's are its job's own. */
static bool is_nobodys(const struct edge *edge)
{
    const struct node *parent = edge->parent;
    return !parent || parent->stale ||
           ((edge->role == EDGE_FILTERED || edge->role == EDGE_TARGET) && parent->job_filter) ||
           list_is_empty(&parent->parents);
}

/* The node that a stack of filters will show; one of them may be attached by this transaction. */
static const struct node *will_show(const struct transaction *transaction, const struct node *node)
{
    bool found = true;
    while (found && node->driver->kind == DRIVER_FILTER) {
        found = node->filtered != NULL;
        if (found) {
            node = node->filtered->child;
        }
        for (unsigned i = 0; !found && i < transaction->steps->len; i++) {
            const struct step *step = step_at((struct transaction *)transaction, i);
            if (step->kind == STEP_ATTACH && step->edge->parent == node && step->edge->role == EDGE_FILTERED) {
                node = step->to;
                found = true;
            }
        }
    }
    return node;
}

/* Onto a job filter, or off it, with the same image beneath. */
static bool steps_over_job_filter(const struct transaction *transaction, const struct step *step)
{
    const struct node *from = step->edge->child, *to = step->to;
    return step->kind == STEP_MOVE && (from->job_filter || to->job_filter) &&
           will_show(transaction, from) == will_show(transaction, to);
}

static int enforce_step(const struct transaction *transaction, const struct step *step, struct error **err)
{
    const struct operation *operation = transaction->operation;
    int r = 0;
    switch (step->kind) {
    case STEP_MOVE:
    case STEP_ATTACH:
    case STEP_DETACH:
        if (!is_nobodys(step->edge) && !steps_over_job_filter(transaction, step)) {
            if (step->edge->role != EDGE_FILTERED) { /* a filter has no header: its edge goes along like a user's */
                r = enforce_claim(operation, step->edge->parent, ACCESS_GRAPH, "changing an edge", err);
            }
            if (r == 0 && step->to && !step->to->job_filter) {
                r = enforce_claim(operation, step->to, ACCESS_ALL, "linking to an image", err);
            }
        }
        break;
    case STEP_STALE:
        if (!step->to->job_filter) {
            r = enforce_claim(operation, step->to, ACCESS_ALL, "making an image stale", err);
        }
        break;
    default:
        break;
    }
    return r;
}

static int enforce_steps(const struct transaction *transaction, struct error **err)
{
    int r = 0;
    for (unsigned i = 0; r == 0 && i < transaction->steps->len; i++) {
        r = enforce_step(transaction, step_at((struct transaction *)transaction, i), err);
    }
    return r;
}

/* --- doing and undoing, in memory --- */

static void edge_relink(struct edge *edge, struct node *to)
{
    if (edge->child) {
        edge_unlink(edge);
    }
    if (to) {
        edge_link(edge, to);
    }
}

static void step_do(struct step *step)
{
    switch (step->kind) {
    case STEP_MOVE:
    case STEP_DETACH:
    case STEP_ATTACH:
        step->from = step->edge->child;
        step->old_holder = step->edge->holder;
        step->old_adopter = step->edge->adopter;
        edge_relink(step->edge, step->to);
        if (step->edge->parent) {
            step->edge->holder = step->to ? edge_holder_create(step->edge) : NULL;
            if (step->edge->holder && step->old_holder) {
                access_holder_inherit(step->edge->holder, step->old_holder);
            }
        }
        break;
    case STEP_REBIND:
        step->from = step->operation->bound[step->variable];
        step->operation->bound[step->variable] = step->to;
        break;
    case STEP_STALE:
        if (!step->to->stale) {
            step->to->stale = g_steal_pointer(&step->reason);
            access_mark_stale(step->to->graph->ledger, step->to->name, step->to->stale);
        }
        break;
    case STEP_ADOPT:
        step->old_adopter = step->edge->adopter;
        edge_set_adopter(step->edge, step->operation);
        break;
    case STEP_END:
        step->ended_before = step->operation->ended;
        step->operation->ended = true;
        break;
    }
}

static void step_undo(struct step *step)
{
    switch (step->kind) {
    case STEP_MOVE:
    case STEP_DETACH:
    case STEP_ATTACH:
        edge_relink(step->edge, step->from);
        access_holder_destroy(step->edge->parent ? step->edge->holder : NULL);
        step->edge->holder = step->old_holder;
        edge_set_adopter(step->edge, step->old_adopter);
        break;
    case STEP_REBIND:
        step->operation->bound[step->variable] = step->from;
        break;
    case STEP_STALE:
        if (!step->reason) {
            access_clear_stale(step->to->graph->ledger, step->to->name);
            step->reason = g_steal_pointer(&step->to->stale);
        }
        break;
    case STEP_ADOPT:
        edge_set_adopter(step->edge, step->old_adopter);
        break;
    case STEP_END:
        step->operation->ended = step->ended_before;
        break;
    }
}

static void do_recorded(struct transaction *transaction)
{
    while (transaction->done < transaction->steps->len) {
        step_do(step_at(transaction, transaction->done++));
    }
}

static void undo_all(struct transaction *transaction)
{
    while (transaction->done > 0) {
        step_undo(step_at(transaction, --transaction->done));
    }
}

/* --- roles follow --- */

/* What follows `root` sees another image now: it is bound to that one. */
static void rebind_follower(struct transaction *transaction, struct operation *operation, unsigned variable,
                            struct node *root)
{
    if (operation && !operation->ended) {
        struct node *seen = node_beneath_filters(root), *bound = operation->bound[variable];
        if (!bound || node_beneath_filters(bound) != seen) {
            transaction_rebind(transaction, operation, variable, seen);
        }
    }
}

/* This edge has moved: backends and job filters above it, also through other filters, may see another image now. */
static void follow_edge(struct transaction *transaction, const struct edge *edge)
{
    const struct backend *backend = edge->backend;
    if (backend) {
        rebind_follower(transaction, backend->operation, backend->variable, backend->root.child);
    }
    if (edge->parent && edge->role == EDGE_FILTERED) {
        rebind_follower(transaction, edge->parent->operation, edge->parent->variable, edge->parent);
        list_for_each (link, &edge->parent->parents) {
            follow_edge(transaction, container_of(link, struct edge, child_link));
        }
    }
}

static void follow_backends(struct transaction *transaction)
{
    unsigned count = transaction->steps->len;
    for (unsigned i = 0; i < count; i++) {
        if (step_at(transaction, i)->kind == STEP_MOVE) {
            follow_edge(transaction, step_at(transaction, i)->edge);
        }
    }
    do_recorded(transaction);
}

static bool leans_through(const struct node *overlay, const struct node *filter)
{
    const struct node *node = overlay->backing ? overlay->backing->child : NULL;
    while (node && node != filter && node->driver->kind == DRIVER_FILTER) {
        node = node->filtered ? node->filtered->child : NULL;
    }
    return node == filter;
}

/* The overlay in the chain of `first` whose backing edge this transaction moved, or that of a filter on which it leans;
 * or NULL. */
static struct node *moved_overlay(struct transaction *transaction, struct node *first)
{
    for (unsigned i = 0; i < transaction->steps->len; i++) {
        const struct step *step = step_at(transaction, i);
        if (step->kind != STEP_MOVE && step->kind != STEP_DETACH) {
            continue;
        }
        for (struct node *overlay = first; overlay; overlay = node_backing(overlay)) {
            if (step->edge->role == EDGE_BACKING ? step->edge->parent == overlay
                                                 : step->edge->role == EDGE_FILTERED && step->edge->parent &&
                                                       leans_through(overlay, step->edge->parent)) {
                return overlay;
            }
        }
    }
    return NULL;
}

static int follow_bottom(struct transaction *transaction, struct operation *operation, struct error **err)
{
    struct node *bottom = operation->bound[CLAIM_BOTTOM];
    for (unsigned i = 0; bottom && i < operation->table->count; i++) {
        const struct claim_clause *clause = &operation->table->clauses[i];
        struct node *first = operation->bound[clause->first];
        if (clause->role != CLAIM_ROLE_RANGE || clause->second != CLAIM_BOTTOM || !first) {
            continue;
        }
        first = node_beneath_filters(first);
        if (first == node_beneath_filters(bottom) || node_is_above(first, bottom)) {
            continue;
        }
        struct node *overlay = moved_overlay(transaction, first);
        if (!overlay) {
            return error_set(err, -EBUSY, "%s takes node '%s' out of the chain that %s %s works on",
                             transaction->subject, bottom->name, operation->table->operation,
                             access_holder_id(operation->holder));
        }
        /* What leans on the same as the bottom did has taken its place, and its part. */
        struct node *successor = node_backing(overlay);
        bool same = successor && node_backing(successor) == node_backing(bottom);
        bottom = same ? successor : overlay;
        transaction_rebind(transaction, operation, CLAIM_BOTTOM, bottom);
    }
    return 0;
}

static int follow(struct transaction *transaction, struct error **err)
{
    follow_backends(transaction);
    list_for_each (link, &transaction->graph->operations) {
        struct operation *operation = container_of(link, struct operation, link);
        int r = operation->ended ? 0 : follow_bottom(transaction, operation, err);
        if (r < 0) {
            return r;
        }
    }
    do_recorded(transaction);
    return 0;
}

/* --- the ledger --- */

/* Everything that is handed to the ledger; lives until it has answered. */
struct derived {
    GHashTable *adopters; /* edge -> operation, in the new shape */
    GHashTable *touched;  /* the set of `edges` */
    GPtrArray *edges;     /* struct edge: those whose claims are derived again, in the order in which they were met */
    GPtrArray *old_adopters; /* struct operation or NULL: what they had before, in the same order */
    GArray *changes;         /* struct access_change */
    GArray *sets;            /* struct claim_set, per operation */
    GPtrArray *claims;       /* struct access_claim, one each, owned */
    struct operation *operation;
};

static void touch_edge(struct derived *derived, struct edge *edge);

static void note_adopter(struct edge *edge, void *argument)
{
    struct derived *derived = argument;
    if (!g_hash_table_contains(derived->adopters, edge)) {
        g_hash_table_insert(derived->adopters, edge, derived->operation);
        touch_edge(derived, edge);
    }
}

static void derive_operation(struct derived *derived, struct operation *operation)
{
    struct claim_set set = {.claims = g_array_new(FALSE, FALSE, sizeof(struct access_claim)),
                            .sources = g_ptr_array_new()};
    if (!operation->ended) {
        struct node *base, *top = operation_adopts(operation->table, operation->bound, &base);
        claim_set_clear(&set);
        set = operation_derive(operation->table, operation->bound, operation->conditions);
        derived->operation = operation;
        if (top) {
            chain_for_each_edge(top, base, note_adopter, derived);
        }
    }
    operation_set_sources(operation, &set);
    g_array_append_val(derived->sets, set);
    struct access_change change = {.holder = operation->holder,
                                   .claims = (const struct access_claim *)(void *)set.claims->data,
                                   .count = set.claims->len};
    g_array_append_val(derived->changes, change);
}

/* The edge's claims and adopter in the new shape. */
static void derive_edge(struct derived *derived, struct edge *edge)
{
    struct operation *adopter = g_hash_table_lookup(derived->adopters, edge);
    if (!adopter && edge->adopter && !edge->adopter->ended) {
        adopter = edge->adopter;
    }
    struct access_claim *claim = g_new0(struct access_claim, 1);
    struct access_change change = {.holder = edge->holder,
                                   .claims = claim,
                                   .count = edge_standing_claim(edge, claim),
                                   .set_adopter = true,
                                   .adopter = adopter ? adopter->holder : NULL};
    g_ptr_array_add(derived->claims, claim);
    g_array_append_val(derived->changes, change);
    g_ptr_array_add(derived->old_adopters, edge->adopter);
    edge_set_adopter(edge, adopter);
}

static void release_holder(struct derived *derived, struct access_holder *holder)
{
    struct access_change change = {.holder = holder, .set_adopter = true};
    g_array_append_val(derived->changes, change);
}

/* Each edge once. */
static void touch_edge(struct derived *derived, struct edge *edge)
{
    if (edge->child && edge->parent && g_hash_table_add(derived->touched, edge)) {
        g_ptr_array_add(derived->edges, edge);
    }
}

static void touch_children(struct derived *derived, struct node *node)
{
    list_for_each (link, &node->children) {
        touch_edge(derived, container_of(link, struct edge, parent_link));
    }
}

/* What leans on a node through filters claims on the node that they show. */
static void touch_users(struct derived *derived, struct node *filter)
{
    list_for_each (link, &filter->parents) {
        struct edge *edge = container_of(link, struct edge, child_link);
        touch_edge(derived, edge);
        if (edge->role == EDGE_FILTERED) {
            touch_users(derived, edge->parent);
        }
    }
}

static void touch_step(struct derived *derived, struct step *step)
{
    switch (step->kind) {
    case STEP_MOVE:
    case STEP_DETACH:
    case STEP_ATTACH:
        touch_edge(derived, step->edge);
        if (step->edge->role == EDGE_FILTERED) {
            touch_users(derived, step->edge->parent);
        }
        break;
    case STEP_STALE:
        touch_children(derived, step->to);
        break;
    case STEP_END:
        list_for_each (link, &step->operation->adopted) {
            touch_edge(derived, container_of(link, struct edge, adopter_link));
        }
        break;
    case STEP_ADOPT:
        touch_edge(derived, step->edge);
        break;
    case STEP_REBIND:
        break;
    }
}

/* The edges whose claims or adopter follow from the steps, and those that came into an operation's chain. */
static void derive_edges(struct transaction *transaction, struct derived *derived)
{
    for (unsigned i = 0; i < transaction->steps->len; i++) {
        struct step *step = step_at(transaction, i);
        touch_step(derived, step);
        if (step->kind <= STEP_ATTACH && step->edge->parent && step->old_holder) {
            release_holder(derived, step->old_holder);
        }
    }
    for (unsigned i = 0; i < derived->edges->len; i++) {
        derive_edge(derived, derived->edges->pdata[i]);
    }
}

static int ask_ledger(struct transaction *transaction, struct error **err)
{
    struct derived derived = {.adopters = g_hash_table_new(NULL, NULL),
                              .touched = g_hash_table_new(NULL, NULL),
                              .edges = g_ptr_array_new(),
                              .old_adopters = g_ptr_array_new(),
                              .changes = g_array_new(FALSE, FALSE, sizeof(struct access_change)),
                              .sets = g_array_new(FALSE, FALSE, sizeof(struct claim_set)),
                              .claims = g_ptr_array_new_with_free_func(g_free)};
    list_for_each (link, &transaction->graph->operations) {
        derive_operation(&derived, container_of(link, struct operation, link));
    }
    derive_edges(transaction, &derived);
    int r = access_apply(transaction->graph->ledger, transaction->subject,
                         (const struct access_change *)(void *)derived.changes->data, derived.changes->len, err);
    if (r < 0) {
        for (unsigned i = 0; i < derived.edges->len; i++) {
            edge_set_adopter(derived.edges->pdata[i], derived.old_adopters->pdata[i]);
        }
    }
    for (unsigned i = 0; i < derived.sets->len; i++) {
        claim_set_clear(&g_array_index(derived.sets, struct claim_set, i));
    }
    g_hash_table_unref(derived.adopters);
    g_hash_table_unref(derived.touched);
    g_ptr_array_free(derived.edges, TRUE);
    g_ptr_array_free(derived.old_adopters, TRUE);
    g_array_free(derived.changes, TRUE);
    g_array_free(derived.sets, TRUE);
    g_ptr_array_free(derived.claims, TRUE);
    return r;
}

/* Sources are no claims and are set outside the ledger's step: after a refusal they are what the old shape says. */
static void restore_sources(struct graph *graph)
{
    list_for_each (link, &graph->operations) {
        struct operation *operation = container_of(link, struct operation, link);
        struct claim_set set = operation_derive(operation->table, operation->bound, operation->conditions);
        operation_set_sources(operation, &set);
        claim_set_clear(&set);
    }
}

/* --- settling --- */

/* What the new shape means for the edge; the reference that went is put on `dropped`. */
static void settle_edge(struct step *step, GPtrArray *dropped)
{
    struct edge *edge = step->edge;
    if (step->to) {
        node_ref(step->to);
    }
    if (step->from) {
        g_ptr_array_add(dropped, step->from);
    }
    access_holder_destroy(edge->parent ? step->old_holder : NULL);
    if (step->kind == STEP_DETACH) {
        edge_set_adopter(edge, NULL);
        g_free(edge);
        return;
    }
    edge_update_granted(edge);
    if (step->ret) {
        *step->ret = edge;
    }
}

static void settle(struct transaction *transaction, GPtrArray *dropped)
{
    for (unsigned i = 0; i < transaction->steps->len; i++) {
        struct step *step = step_at(transaction, i);
        if (step->kind <= STEP_ATTACH) {
            settle_edge(step, dropped);
        } else if (step->kind == STEP_REBIND) {
            if (step->to) {
                node_ref(step->to);
            }
            if (step->from) {
                g_ptr_array_add(dropped, step->from);
            }
        }
    }
    /* Filters follow what they show now, those nearest to it first. */
    for (unsigned i = transaction->steps->len; i > 0; i--) {
        const struct step *step = step_at(transaction, i - 1);
        if ((step->kind == STEP_MOVE || step->kind == STEP_ATTACH) && step->edge->role == EDGE_FILTERED) {
            node_follow_child(step->edge->parent);
            node_size_changed(step->edge->parent);
        }
    }
    for (unsigned i = 0; i < transaction->steps->len; i++) {
        const struct step *step = step_at(transaction, i);
        if (step->kind == STEP_MOVE && step->edge->backend) {
            backend_tell_changed(step->edge->backend);
        }
    }
}

static void transaction_free(struct transaction *transaction, bool committed)
{
    for (unsigned i = 0; i < transaction->steps->len; i++) {
        struct step *step = step_at(transaction, i);
        if (step->kind == STEP_ATTACH && !committed) {
            g_free(step->edge);
        }
        g_free(step->reason);
    }
    g_array_free(transaction->steps, TRUE);
    g_free(transaction->subject);
    g_free(transaction);
}

int graph_commit(struct transaction *transaction, struct error **err)
{
    struct graph *graph = transaction->graph;
    g_autoptr(GPtrArray) dropped = g_ptr_array_new();
    int r = transaction->takes_back ? 0 : enforce_steps(transaction, err);
    if (r == 0) {
        do_recorded(transaction);
        r = follow(transaction, err);
    }
    if (r == 0) {
        r = ask_ledger(transaction, err);
    }
    if (r < 0) {
        undo_all(transaction);
        restore_sources(graph);
    } else {
        settle(transaction, dropped);
    }
    transaction_free(transaction, r == 0);
    for (unsigned i = 0; i < dropped->len; i++) {
        node_unref(dropped->pdata[i]);
    }
    return r;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Operations: from roles to claims. Owns the reading of claim tables over the graph: which nodes are "between top and
 * base", which overlays, which range, and which edges an operation adopts. The decision is the ledger's.
 *
 * 1. Roles are derived from the graph as it is at that moment, through filters: when an operation begins, and for every
 *    operation again in every commit of a transaction (transaction.c) and whenever an edge is attached or detached
 *    (edge.c). No list of nodes is kept.
 * 2. All claims of an operation and all its adoptions are taken in one call of the ledger, or none.
 * 3. An operation holds a reference on each node that it is bound to.
 *
 * Control thread. Beginning and ending take no lock: they change no shape, and the ledger decides in one step.
 */
#include "block/operation.h"
#include "block/private.h"
#include <errno.h>

/* --- roles --- */

struct derivation {
    const struct claim_table *table;
    struct node *const *bound;
    struct claim_set set;
};

static void claim_add(struct derivation *derivation, const struct claim_clause *clause, const struct node *node)
{
    struct access_claim claim = {.node = node->name,
                                 .require = clause->require,
                                 .deny = clause->deny,
                                 .modifiers = clause->modifiers,
                                 .path = clause->path};
    g_array_append_val(derivation->set.claims, claim);
}

static struct node *variable(const struct derivation *derivation, enum claim_variable which)
{
    struct node *node = derivation->bound[which];
    return node ? node_beneath_filters(node) : NULL;
}

static void derive_between(struct derivation *derivation, const struct claim_clause *clause, struct node *first,
                           struct node *second)
{
    for (struct node *node = node_backing(first); node && node != second; node = node_backing(node)) {
        claim_add(derivation, clause, node);
    }
}

/* Parents through backing edges, also those that lean on a filter over the node; but for stale ones, whose link nobody
 * relies on. A format in the image (through a file edge) is one as well: its edge moves with the others. */
static void derive_overlays(struct derivation *derivation, const struct claim_clause *clause, struct node *first)
{
    list_for_each (link, &first->parents) {
        const struct edge *edge = container_of(link, struct edge, child_link);
        if (edge->role == EDGE_BACKING || edge_is_container(edge)) {
            if (!edge->parent->stale) {
                claim_add(derivation, clause, edge->parent);
            }
        } else if (edge->role == EDGE_FILTERED) {
            derive_overlays(derivation, clause, edge->parent);
        }
    }
}

static bool claim_is_there(const struct derivation *derivation, const struct claim_clause *clause,
                           const struct node *node)
{
    for (guint i = 0; i < derivation->set.claims->len; i++) {
        const struct access_claim *claim = &g_array_index(derivation->set.claims, struct access_claim, i);
        if (claim->path == clause->path && claim->require == clause->require && g_str_equal(claim->node, node->name)) {
            return true;
        }
    }
    return false;
}

/* All overlays, and theirs; each once, however many ways lead there. Chains have a limit (open.c). */
static void derive_above(struct derivation *derivation, const struct claim_clause *clause, struct node *first)
{
    list_for_each (link, &first->parents) {
        const struct edge *edge = container_of(link, struct edge, child_link);
        if (edge->role == EDGE_FILTERED) {
            derive_above(derivation, clause, edge->parent);
        } else if ((edge->role == EDGE_BACKING || edge_is_container(edge)) && !edge->parent->stale &&
                   !claim_is_there(derivation, clause, edge->parent)) {
            claim_add(derivation, clause, edge->parent);
            derive_above(derivation, clause, edge->parent);
        }
    }
}

static void derive_range(struct derivation *derivation, const struct claim_clause *clause, struct node *first,
                         struct node *second)
{
    for (struct node *node = first; node != second && (node = node_backing(node));) {
        claim_add(derivation, clause, node);
        g_ptr_array_add(derivation->set.sources, node->name);
    }
}

static void derive_clause(struct derivation *derivation, const struct claim_clause *clause)
{
    struct node *first = variable(derivation, clause->first), *below;
    if (!first) {
        return;
    }
    switch (clause->role) {
    case CLAIM_ROLE_NODE:
        claim_add(derivation, clause, first);
        break;
    case CLAIM_ROLE_BETWEEN:
        derive_between(derivation, clause, first, variable(derivation, clause->second));
        break;
    case CLAIM_ROLE_OVERLAYS:
        derive_overlays(derivation, clause, first);
        break;
    case CLAIM_ROLE_RANGE:
        derive_range(derivation, clause, first, variable(derivation, clause->second));
        break;
    case CLAIM_ROLE_ABOVE:
        derive_above(derivation, clause, first);
        break;
    case CLAIM_ROLE_BELOW:
        below = node_backing(first);
        if (below) {
            claim_add(derivation, clause, below);
        }
        break;
    }
}

struct claim_set operation_derive(const struct claim_table *table, struct node *const *bound, unsigned conditions)
{
    struct derivation derivation = {.table = table, .bound = bound};
    derivation.set.claims = g_array_new(FALSE, FALSE, sizeof(struct access_claim));
    derivation.set.sources = g_ptr_array_new();
    for (unsigned i = 0; i < table->count; i++) {
        const struct claim_clause *clause = &table->clauses[i];
        if ((conditions & clause->condition) == clause->condition && !(conditions & clause->unless)) {
            derive_clause(&derivation, clause);
        }
    }
    return derivation.set;
}

void claim_set_clear(struct claim_set *set)
{
    g_array_free(set->claims, TRUE);
    g_ptr_array_free(set->sources, TRUE);
}

void operation_set_sources(struct operation *operation, const struct claim_set *set)
{
    static const char *const none[] = {NULL}; /* an empty array has no memory, and NULL would mean something else */
    if (operation->table->sources) {
        access_holder_set_sources(
            operation->holder, set->sources->len ? (const char *const *)set->sources->pdata : none, set->sources->len);
    }
}

int operations_derive_again(struct graph *graph, const char *subject, const struct access_change *change,
                            struct error **err)
{
    g_autoptr(GArray) changes = g_array_new(FALSE, FALSE, sizeof(struct access_change));
    g_autoptr(GArray) sets = g_array_new(FALSE, FALSE, sizeof(struct claim_set));
    if (change) {
        g_array_append_val(changes, *change);
    }
    list_for_each (link, &graph->operations) {
        struct operation *operation = container_of(link, struct operation, link);
        if (operation->ended) {
            continue;
        }
        struct claim_set set = operation_derive(operation->table, operation->bound, operation->conditions);
        struct access_change own = {.holder = operation->holder,
                                    .claims = (const struct access_claim *)(void *)set.claims->data,
                                    .count = set.claims->len};
        g_array_append_val(sets, set);
        g_array_append_val(changes, own);
    }
    int r =
        access_apply(graph->ledger, subject, (const struct access_change *)(void *)changes->data, changes->len, err);
    for (unsigned i = 0; i < sets->len; i++) {
        claim_set_clear(&g_array_index(sets, struct claim_set, i));
    }
    return r;
}

struct node *operation_adopts(const struct claim_table *table, struct node *const *bound, struct node **ret_base)
{
    if (table->adopt != CLAIM_ADOPT_CHAIN || !bound[CLAIM_TOP] || !bound[CLAIM_BASE]) {
        return NULL;
    }
    *ret_base = node_beneath_filters(bound[CLAIM_BASE]);
    return node_beneath_filters(bound[CLAIM_TOP]);
}

/* --- beginning and ending --- */

struct adoption {
    struct access_holder *adopter;
    GArray *changes;             /* struct access_change */
    GPtrArray *edges;            /* struct edge */
    struct access_claim *claims; /* one per edge */
};

static void adopt_edge(struct edge *edge, void *argument)
{
    struct adoption *adoption = argument;
    g_ptr_array_add(adoption->edges, edge);
}

/* The changes by which `operation` takes all that it needs; operation->holder exists. */
static void adoption_collect(struct adoption *adoption, const struct operation *operation)
{
    struct node *base, *top = operation_adopts(operation->table, operation->bound, &base);
    if (top) {
        chain_for_each_edge(top, base, adopt_edge, adoption);
    }
    adoption->claims = g_new0(struct access_claim, adoption->edges->len + 1);
    for (unsigned i = 0; i < adoption->edges->len; i++) {
        const struct edge *edge = adoption->edges->pdata[i];
        struct access_change change = {.holder = edge->holder,
                                       .claims = &adoption->claims[i],
                                       .count = edge_standing_claim(edge, &adoption->claims[i]),
                                       .set_adopter = true,
                                       .adopter = adoption->adopter};
        g_array_append_val(adoption->changes, change);
    }
}

static int operation_take(struct operation *operation, const struct operation_config *config, bool keep,
                          struct error **err)
{
    g_autofree char *subject = g_strdup_printf("%s %s", config->table->operation, config->id);
    struct claim_set set = operation_derive(operation->table, operation->bound, config->conditions);
    struct adoption adoption = {.adopter = operation->holder,
                                .changes = g_array_new(FALSE, FALSE, sizeof(struct access_change)),
                                .edges = g_ptr_array_new()};
    struct access_change own = {.holder = operation->holder,
                                .claims = (const struct access_claim *)(void *)set.claims->data,
                                .count = set.claims->len,
                                .arrives = true};
    g_array_append_val(adoption.changes, own);
    adoption_collect(&adoption, operation);
    operation_set_sources(operation, &set);
    const struct access_change *changes = (const struct access_change *)(void *)adoption.changes->data;
    int r = (keep ? access_apply : access_test)(operation->graph->ledger, subject, changes, adoption.changes->len, err);
    for (unsigned i = 0; r == 0 && keep && i < adoption.edges->len; i++) {
        struct edge *edge = adoption.edges->pdata[i];
        if (access_holder_adopter(edge->holder) == operation->holder) { /* not if another's is tolerated there */
            edge_set_adopter(edge, operation);
        }
    }
    g_array_free(adoption.changes, TRUE);
    g_ptr_array_free(adoption.edges, TRUE);
    g_free(adoption.claims);
    claim_set_clear(&set);
    return r;
}

static struct operation *operation_create(struct graph *graph, const struct operation_config *config)
{
    struct operation *operation = g_new0(struct operation, 1);
    operation->graph = graph;
    operation->table = graph->substitute ? graph->substitute(config->table) : config->table;
    operation->conditions = config->conditions;
    operation->holder = access_holder_create(graph->ledger, config->kind, config->id, config->table->operation,
                                             config->progress, config->argument);
    memcpy(operation->bound, config->bound, sizeof(operation->bound));
    list_init(&operation->link);
    list_init(&operation->adopted);
    return operation;
}

static void operation_free(struct operation *operation)
{
    access_holder_destroy(operation->holder);
    g_free(operation);
}

int operation_begin(struct graph *graph, const struct operation_config *config, struct operation **ret,
                    struct error **err)
{
    struct operation *operation = operation_create(graph, config);
    int r = operation_take(operation, config, true, err);
    if (r < 0) {
        operation_free(operation);
        return r;
    }
    for (unsigned i = 0; i < CLAIM_VARIABLE_COUNT; i++) {
        if (operation->bound[i]) {
            node_ref(operation->bound[i]);
        }
    }
    list_append(&graph->operations, &operation->link);
    *ret = operation;
    return 0;
}

int operation_check(struct graph *graph, const struct operation_config *config, struct error **err)
{
    struct operation *operation = operation_create(graph, config);
    int r = operation_take(operation, config, false, err);
    operation_free(operation);
    return r;
}

int operation_preview(struct graph *graph, const struct operation_config *config, json_t **ret_claims,
                      struct error **err)
{
    struct claim_set set = operation_derive(config->table, config->bound, config->conditions);
    json_t *claims = json_array();
    for (unsigned i = 0; i < set.claims->len; i++) {
        json_array_append_new(claims, access_claim_describe(&g_array_index(set.claims, struct access_claim, i)));
    }
    claim_set_clear(&set);
    *ret_claims = claims;
    return operation_check(graph, config, err);
}

/* Its claims are gone; the references to the nodes that it was about go to the caller. */
static void operation_give_back(struct operation *operation, struct node *ret_bound[CLAIM_VARIABLE_COUNT])
{
    list_for_each (link, &operation->graph->backends) {
        const struct backend *backend = container_of(link, struct backend, graph_link);
        g_assert(backend->operation != operation);
    }
    list_for_each_safe (link, &operation->adopted) {
        edge_set_adopter(container_of(link, struct edge, adopter_link), NULL);
    }
    list_remove(&operation->link);
    memcpy(ret_bound, operation->bound, sizeof(operation->bound));
    operation_free(operation);
}

void coroutine_fn operation_end(struct operation *operation)
{
    if (operation) {
        struct node *bound[CLAIM_VARIABLE_COUNT];
        operation_give_back(operation, bound);
        for (unsigned i = 0; i < CLAIM_VARIABLE_COUNT; i++) {
            node_release(bound[i]);
        }
    }
}

void coroutine_fn operation_end_locked(struct operation *operation)
{
    if (operation) {
        struct node *bound[CLAIM_VARIABLE_COUNT];
        operation_give_back(operation, bound);
        for (unsigned i = 0; i < CLAIM_VARIABLE_COUNT; i++) {
            node_unref(bound[i]);
        }
    }
}

unsigned operation_granted(const struct operation *operation, const struct node *node)
{
    if (operation->ended) {
        return 0;
    }
    struct claim_set set = operation_derive(operation->table, operation->bound, operation->conditions);
    const struct node *image = node_beneath_filters((struct node *)node);
    unsigned granted = 0;
    for (unsigned i = 0; i < set.claims->len; i++) {
        const struct access_claim *claim = &g_array_index(set.claims, struct access_claim, i);
        granted |= g_str_equal(claim->node, image->name) ? claim->require : 0;
    }
    claim_set_clear(&set);
    return granted;
}

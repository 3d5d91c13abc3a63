/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Edges: one parent's use of a child. Owns the lists and shortcuts that make the shape, and the one table of what an
 * edge claims on its child by its role while nobody uses it (standing claims; doc/access.md).
 *
 * 1. An edge that is linked holds a reference on its child.
 * 2. A linked edge with a parent has a holder of its own in the ledger, whose claims are its role's; an edge of a stale
 *    parent claims nothing, but for its file edge: as long as it is open it may write its metadata. Root edges have
 * none: what they may do is claimed by their operation.
 * 3. An edge that comes or goes may give operations a role more or less (a new overlay): their claims follow in the
 *    same step.
 * 4. edge->granted never exceeds what was claimed, but for two cases with their reason in the table.
 * 5. A job filter's target edge is like a root edge: what it may do, its job's operation has claimed there.
 *
 * Changes of shape that can be refused or undone are transaction.c's; it uses edge_link() and edge_unlink() alone.
 */
#include "block/private.h"

struct standing_claim {
    const char *path;
    unsigned require, deny; /* on the child */
    unsigned granted;
};

#define READ_BOTH (ACCESS_READ_DATA | ACCESS_READ_METADATA)
#define WRITE_FILE (READ_BOTH | ACCESS_WRITE_DATA | ACCESS_WRITE_METADATA | ACCESS_ATTRIBUTES)
#define CHANGES (ACCESS_WRITE_DATA | ACCESS_WRITE_BENEATH)

/* [role][parent is writable] */
static const struct standing_claim standing_claims[][2] = {
    /* The container of an image is its format's alone. Shrinking it is granted too: who shrinks the image has claimed
     * write-beneath on the image, where others can see it. */
    [EDGE_FILE] = {{"file edge", READ_BOTH, CHANGES, READ_BOTH},
                   {"file edge", WRITE_FILE, CHANGES | ACCESS_ATTRIBUTES | ACCESS_GRAPH,
                    WRITE_FILE | ACCESS_WRITE_BENEATH}},
    [EDGE_DATA] = {{"data edge", READ_BOTH, CHANGES, READ_BOTH},
                   {"data edge", WRITE_FILE, CHANGES | ACCESS_ATTRIBUTES | ACCESS_GRAPH,
                    WRITE_FILE | ACCESS_WRITE_BENEATH}},
    /* The parent shows the child's data wherever it has none. */
    [EDGE_BACKING] = {{"backing edge", READ_BOTH, CHANGES, ACCESS_READ_DATA},
                      {"backing edge", READ_BOTH, CHANGES, ACCESS_READ_DATA}},
    /* A filter passes requests on; what they may do was checked at the edge that they entered by. What it does of its
     * own, if it may write, its driver says (filtered_claim). */
    [EDGE_FILTERED] = {{"filtered edge", ACCESS_READ_METADATA, 0, ACCESS_ALL},
                       {"filtered edge", ACCESS_READ_METADATA, 0, ACCESS_ALL}},
    /* Its job's operation claims for it, and graph_attach_target_locked() grants it that. */
    [EDGE_TARGET] = {{"target edge", 0, 0, 0}, {"target edge", 0, 0, 0}},
};

const char *edge_role_name(enum edge_role role)
{
    static const char *const names[] = {
        [EDGE_FILE] = "file",         [EDGE_DATA] = "data",     [EDGE_BACKING] = "backing",
        [EDGE_FILTERED] = "filtered", [EDGE_TARGET] = "target", [EDGE_ROOT] = "root"};
    return names[role];
}

struct edge *edge_create(struct node *parent, enum edge_role role)
{
    g_assert(role != EDGE_ROOT);
    struct edge *edge = g_new0(struct edge, 1);
    edge->parent = parent;
    edge->role = role;
    list_init(&edge->parent_link);
    list_init(&edge->child_link);
    list_init(&edge->adopter_link);
    return edge;
}

void edge_set_adopter(struct edge *edge, struct operation *adopter)
{
    list_remove(&edge->adopter_link);
    edge->adopter = adopter;
    if (adopter) {
        list_append(&adopter->adopted, &edge->adopter_link);
    }
}

/* Where the parent keeps a pointer to edges of this role. */
static struct edge **edge_shortcut(const struct edge *edge)
{
    switch (edge->role) {
    case EDGE_FILE:
        return &edge->parent->file;
    case EDGE_DATA:
        return &edge->parent->data;
    case EDGE_BACKING:
        return &edge->parent->backing;
    case EDGE_FILTERED:
        return &edge->parent->filtered;
    case EDGE_TARGET:
        return &edge->parent->target;
    case EDGE_ROOT:
        break;
    }
    g_assert_not_reached();
}

void edge_link(struct edge *edge, struct node *child)
{
    g_assert(!edge->child);
    node_catch_up(child);
    edge->child = child;
    list_append(&child->parents, &edge->child_link);
    if (edge->parent) {
        struct edge **shortcut = edge_shortcut(edge);
        g_assert(!*shortcut);
        *shortcut = edge;
        list_append(&edge->parent->children, &edge->parent_link);
    }
}

void edge_unlink(struct edge *edge)
{
    g_assert(edge->child);
    list_remove(&edge->child_link);
    edge->child = NULL;
    if (edge->parent) {
        *edge_shortcut(edge) = NULL;
        list_remove(&edge->parent_link);
    }
}

static const struct standing_claim *edge_standing(const struct edge *edge)
{
    return &standing_claims[edge->role][edge->parent->writable];
}

/* The node whose data the parent relies on. Like an operation, it claims on the image itself and not on the job filters
 * over it: else who writes to the image and who leans on it through a filter would not meet. */
static const struct node *edge_shown(const struct edge *edge)
{
    return edge->role == EDGE_FILTERED ? node_beneath_job_filters(edge->child) : node_beneath_filters(edge->child);
}

bool edge_is_container(const struct edge *edge)
{
    return edge->role == EDGE_FILE || edge->role == EDGE_DATA;
}

static unsigned edge_claim(const struct edge *edge, const struct standing_claim *standing, struct access_claim *ret)
{
    if (edge->role == EDGE_ROOT || edge->role == EDGE_TARGET || !edge->child ||
        (edge->parent->stale && !edge_is_container(edge))) {
        return 0;
    }
    const struct node *shown = edge_shown(edge);
    unsigned own = standing == &standing_claims[EDGE_FILTERED][true] ? edge->parent->driver->filtered_claim : 0;
    *ret = (struct access_claim){
        .node = shown->name, .require = standing->require | own, .deny = standing->deny, .path = standing->path};
    return 1;
}

unsigned edge_standing_claim(const struct edge *edge, struct access_claim *ret)
{
    return edge_claim(edge, edge_standing(edge), ret);
}

/* A job's filter is known by its job: its own name is made up, or known to nobody but whoever gave it. */
struct access_holder *edge_holder_create(const struct edge *edge)
{
    const struct node *parent = edge->parent;
    bool is_job = parent->job_filter && parent->opened_for;
    g_autofree char *id =
        g_strdup_printf("%s%s -> %s (%s)", is_job ? "the " : "", is_job ? parent->opened_for : parent->name,
                        edge_shown(edge)->name, edge_role_name(edge->role));
    return access_holder_create(edge->parent->graph->ledger, "edge", id, edge_role_name(edge->role), NULL, NULL);
}

void edge_update_granted(struct edge *edge)
{
    if (edge->role != EDGE_ROOT && edge->role != EDGE_TARGET) {
        edge->granted = edge_standing(edge)->granted;
    }
}

int edge_claim_again(struct edge *edge, const char *subject, struct error **err)
{
    struct access_claim claim;
    struct access_change change = {.holder = edge->holder, .claims = &claim};
    change.count = edge_standing_claim(edge, &claim);
    int r = access_apply(edge->parent->graph->ledger, subject, &change, 1, err);
    if (r == 0) {
        edge_update_granted(edge);
    }
    return r;
}

int edge_writable_check(struct edge *edge, const char *subject, struct error **err)
{
    struct access_claim claim;
    struct access_change change = {.holder = edge->holder, .claims = &claim};
    change.count = edge_claim(edge, &standing_claims[edge->role][true], &claim);
    return access_test(edge->parent->graph->ledger, subject, &change, 1, err);
}

int edge_attach(struct node *parent, enum edge_role role, struct node *child, struct edge **ret, struct error **err)
{
    g_autofree char *subject = g_strdup_printf("opening node '%s' with '%s' as its %s", parent->name,
                                               node_beneath_filters(child)->name, edge_role_name(role));
    struct edge *edge = edge_create(parent, role);
    edge_link(edge, child);
    edge->holder = edge_holder_create(edge);
    struct access_claim claim;
    struct access_change change = {.holder = edge->holder, .claims = &claim, .arrives = true};
    change.count = edge_standing_claim(edge, &claim);
    int r = operations_derive_again(parent->graph, subject, &change, err);
    if (r < 0) {
        access_holder_destroy(edge->holder);
        edge_unlink(edge);
        g_free(edge);
        return r;
    }
    edge_update_granted(edge);
    node_ref(child);
    if (role == EDGE_FILTERED) {
        node_follow_child(parent);
    }
    if (ret) {
        *ret = edge;
    }
    return 0;
}

struct node *edge_detach(struct edge *edge)
{
    struct node *child = edge->child;
    g_assert(edge->role != EDGE_ROOT);
    struct graph *graph = child->graph;
    edge_unlink(edge);
    edge_set_adopter(edge, NULL);
    access_holder_destroy(edge->holder);
    g_free(edge);
    operations_derive_again(graph, child->name, NULL, NULL); /* fewer claims: cannot be refused */
    return child;
}

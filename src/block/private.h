/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_PRIVATE_H
#define INTERLOCK_BLOCK_PRIVATE_H

#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "loop/gate.h"
#include "loop/sync.h"
#include <glib.h>

/* What the files of this folder share, and nobody else includes. Control thread unless said. */

/* --- node.c --- */

/* A node without children, one reference (the caller's), not in graph->nodes yet; `name` is copied. */
struct node *node_create(struct graph *graph, const struct driver *driver, const char *name);
/* From here on it is found by its name. */
void node_publish(struct node *node);
void node_follow_child(struct node *filter); /* a filter takes size and limits of what it shows */
/* A filter over a node that grew by writes which did not go through it takes its size; those below it first. Filters
 * that keep a size of their own (driver->truncate) do not. */
void node_catch_up(struct node *node);
/* After node->size changed: filters above take it, and the backends above are told. */
void node_size_changed(struct node *node);
/* Printable list of who uses the node, with an operation's claims behind it: "'a' (backing) and export e0"; g_free().
 */
char *node_users(struct node *node);

/* --- edge.c --- */

/* Does the parent keep its own bytes there (file, data)? */
bool edge_is_container(const struct edge *edge);
/* An edge that is linked nowhere and has no holder. */
struct edge *edge_create(struct node *parent, enum edge_role role);
/* The shape alone: lists and the parent's shortcuts. No reference, no claim. */
void edge_link(struct edge *edge, struct node *child);
void edge_unlink(struct edge *edge);
/* What the edge claims on `child` by its role; returns 0 or 1 claims. */
unsigned edge_standing_claim(const struct edge *edge, struct access_claim *ret);
/* A ledger holder named for parent, child and role; without claims. */
struct access_holder *edge_holder_create(const struct edge *edge);
void edge_update_granted(struct edge *edge);
/* Whose claims the edge's count as (NULL: its own); the ledger is told by the caller. */
void edge_set_adopter(struct edge *edge, struct operation *adopter);
/* Links, takes a reference on child, and takes the standing claims, or does nothing. */
int edge_attach(struct node *parent, enum edge_role role, struct node *child, struct edge **ret, struct error **err);
/* Unlinks, releases the claims, frees; the caller gets the reference on the returned child. */
struct node *edge_detach(struct edge *edge);
/* Applies the standing claims again after the parent's state changed. */
int edge_claim_again(struct edge *edge, const char *subject, struct error **err);
/* Could the parent become writable, as far as this edge's claims go? Changes nothing. */
int edge_writable_check(struct edge *edge, const char *subject, struct error **err);
const char *edge_role_name(enum edge_role role);

/* --- backend.c --- */

struct backend {
    struct list graph_link; /* graph->backends */
    struct graph *graph;
    char *owner;
    struct edge root;            /* root.child NULL: empty */
    struct gate gate;            /* requests are inside; closed while it is drained */
    struct operation *operation; /* follows the root edge, or NULL */
    unsigned variable;
    bool client;
    void (*changed)(void *argument);
    void *argument;
};
void backend_tell_changed(struct backend *backend);

/* --- chain.c --- */

/* Calls visit for each edge on the way from `top` (through filters and backing edges) to `base`, or to the end when
 * base is NULL or not below. */
void chain_for_each_edge(struct node *top, struct node *base, void (*visit)(struct edge *edge, void *argument),
                         void *argument);

/* --- open.c --- */

/* The children that options describe, besides backing: at most two. */
struct option_child {
    enum edge_role role;
    const struct blockdev_ref *ref;
};
struct option_children {
    struct option_child list[2];
    unsigned count;
    const struct blockdev_ref_or_null *backing; /* NULL: not given */
};
struct option_children options_children(const struct blockdev_options *options);
/* Where exactly the edge to a child leads that options name. */
struct node *place_of_child(const struct node *parent, enum edge_role role, struct node *child);
#define CHAIN_LIMIT 200 /* images in a backing chain */

/* Opens a node and all that its options and headers name; graph->lock is held. `flags`: enum graph_open_flags. One
 * reference, the caller's. */
int coroutine_fn open_node(struct graph *graph, const struct blockdev_options *options, unsigned flags,
                           struct node **ret, struct error **err);
/* A name that no node has: `wanted`, or with a number behind it; g_free(). */
char *node_name_unused(struct graph *graph, const char *wanted);
/* Where the backing string of the node's header leads: against the directory of its own file, without "file:". NULL
 * with an error when it cannot be followed. g_free(). */
char *node_backing_path(const struct node *node, struct error **err);

/* --- operation.c --- */

struct claim_set {
    GArray *claims;     /* struct access_claim */
    GPtrArray *sources; /* node names, borrowed */
};
struct claim_set operation_derive(const struct claim_table *table, struct node *const *bound, unsigned conditions);
void claim_set_clear(struct claim_set *set);
/* The claims of every operation as they follow from the present shape, together with `change` (may be NULL): all or
 * none. */
int operations_derive_again(struct graph *graph, const char *subject, const struct access_change *change,
                            struct error **err);
void operation_set_sources(struct operation *operation, const struct claim_set *set);
/* The node that `operation` adopts from, or NULL when it adopts nothing; *ret_base: where the path ends. */
struct node *operation_adopts(const struct claim_table *table, struct node *const *bound, struct node **ret_base);

/* --- request.c --- */

/* edge_truncate() that says why not. Control thread; the child is drained. Filters above and backends are told. */
int coroutine_fn edge_resize(struct edge *edge, uint64_t size, struct error **err);
/* May this edge ask for block status? */
int edge_block_status_check(struct edge *edge);
/* Without a grant: for the chain walk, whose caller is inside a request already. */
int coroutine_fn node_block_status(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret);

#endif

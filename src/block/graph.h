/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_GRAPH_H
#define INTERLOCK_BLOCK_GRAPH_H

#include "base/error.h"
#include "block/node.h"
#include "block/operation.h"
#include "schema/types.h"

/*
 * The graph as a whole: opening, closing, changing its shape. Control thread, in coroutines. Functions that change
 * the shape take graph->lock themselves unless their comment says that the caller holds it (graph_lock()).
 */
struct graph {
    struct list nodes; /* struct node by graph_link, in order of creation */
    struct list backends;
    struct list operations; /* struct operation by link */
    struct access_ledger *ledger;
    atomic_int_least64_t client_ns; /* backend_client_ns() */
    struct co_mutex lock;           /* held while the shape changes, across its drains */
    /* For tests that withhold a claim from an operation: the table that it begins with in place of its own, or NULL. */
    const struct claim_table *(*substitute)(const struct claim_table *table);
};
struct graph *graph_create(void);
void graph_destroy(struct graph *graph); /* asserts: no nodes, backends, operations */
void coroutine_fn graph_lock(struct graph *graph);
void coroutine_fn graph_unlock(struct graph *graph);

struct node *graph_find(struct graph *graph, const char *name); /* NULL: none */
/* May a user give this name to a new node? -EINVAL: not a node-name; -EEXIST: taken. */
int graph_check_name(struct graph *graph, const char *name, struct error **err);
/* The same with a DeviceNotFound-like GenericError that names it ("Cannot find node 'x'"). */
struct node *graph_find_or_error(struct graph *graph, const char *name, struct error **err);

/* blockdev-add: opens the node and everything that its options or headers name; the monitor's reference. The top-level
 * options must have a node-name. */
int coroutine_fn graph_add(struct graph *graph, const struct blockdev_options *options, struct node **ret,
                           struct error **err);
/* Opens an image for a program without a monitor. Without a node-name it is given one. The caller's reference:
 * node_release(). */
enum graph_open_flags {
    GRAPH_OPEN_CHECK = 1 << 0,      /* the top node is to be checked or repaired (node->check_only): nothing is repaired
                                     * on the way */
    GRAPH_OPEN_NO_DATA = 1 << 1,    /* to be looked at (node->no_data, of all nodes): data are not read, so no key is
                                     * asked for and what a header names as data file is not opened */
    GRAPH_OPEN_NO_BACKING = 1 << 2, /* what headers name as backing files is not opened */
};
int coroutine_fn graph_open(struct graph *graph, const struct blockdev_options *options, unsigned flags,
                            struct node **ret, struct error **err);
/* What names of images mean. The length of the protocol in front of one ("nbd:...", "json:..."), or 0: it is a path. */
size_t image_name_protocol(const char *name);
/* Where a name leads that stands in the image at path `image` (NULL: unknown): against its folder, without "file:".
 * NULL: it names a protocol. g_free(). */
char *image_name_path(const char *image, const char *name);
/* blockdev-del: refused (-EBUSY) while used, naming by whom. */
int coroutine_fn graph_delete(struct graph *graph, const char *name, struct error **err);
/* Drops every monitor reference (shutdown: parents first). */
void coroutine_fn graph_delete_all(struct graph *graph);

struct node *node_ref(struct node *node);
/* Closes with the last, which takes it out of the shape: graph->lock is held. Accepts NULL; returns NULL. */
struct node *coroutine_fn node_unref(struct node *node);
struct node *coroutine_fn node_release(struct node *node); /* the same, taking the lock if it has to */

/* Counted: makes a node that was opened read-only (a backing file) writable while a job needs it, with its children. */
int coroutine_fn node_writable_begin(struct node *node, struct error **err);
void coroutine_fn node_writable_end(struct node *node);
/* Would it be refused? Changes nothing. What the host says to opening the file is not foreseen. graph->lock is held. */
int node_writable_check(struct node *node, struct error **err);
/* The same for a caller who holds graph->lock and has drained the node, which is no filter. */
int coroutine_fn node_writable_begin_locked(struct node *node, struct error **err);
void coroutine_fn node_writable_end_locked(struct node *node);

/* Changes what the node's options want (blockdev-reopen): it becomes writable, or read-only if no job needs it
 * writable. The caller holds graph->lock and has drained the node, and holds claims that say so. */
int coroutine_fn node_want_writable_locked(struct node *node, bool wanted, struct error **err);

/* The node, which the caller has made writable for himself, and the containers that are its alone, are not to be
 * writable any longer than somebody needs that, whatever their options said. graph->lock is held; drained. */
void node_renounce_writing(struct node *node);

/* Writes the backing string and format (NULL: none) into the image's header, and notes them in the node. `operation`
 * must hold `graph` on it. Drained and writable; graph->lock is held. */
int coroutine_fn node_change_backing(struct node *node, const struct operation *operation, const char *file,
                                     const char *format, struct error **err);

/* Chains. Backing edges, looking through filters. */
struct node *node_backing(const struct node *node);                     /* next image below, or NULL */
bool node_is_above(const struct node *above, const struct node *below); /* by backing edges, strictly */
bool node_reaches(const struct node *from, const struct node *to);      /* by any edges; itself too */
struct node *node_head(struct node *node);                              /* top of the job filters over it */
struct node *node_beneath_filters(struct node *node); /* the named node that a stack of filters shows */
/* Job filters come and go, so what concerns the node that they show (its claims, who writes it) is not said of them. */
struct node *node_beneath_job_filters(struct node *node);
unsigned node_backing_depth(const struct node *node);

/* Drain: requests stop at the backends above any of `nodes`; those inside are waited for. Nests. graph->lock is held.
 * Requests of `except` (may be NULL) go on: the drainer's own. */
struct drain {
    struct backend **backends;
    unsigned count;
};
void coroutine_fn graph_drain_begin(struct graph *graph, struct node *const *nodes, unsigned count,
                                    struct backend *except, struct drain *drain);
void graph_drain_end(struct drain *drain);

/*
 * A transaction of shape changes: graph->lock is held and the touched nodes are drained. Steps are recorded, then
 * graph_commit() derives every operation's and edge's claims in the new shape and applies shape and ledger together,
 * or refuses and leaves both as they were.
 */
struct transaction;
struct transaction *graph_begin(struct graph *graph, const char *subject);
/* Whose transaction it is. graph_commit() tests what it holds in the old shape: `graph` on a node whose edge changes,
 * some claim on the node that an edge will lead to, and on a node that becomes stale. No claim is needed for edges of
 * job filters, of stale images and of images that nobody stands on; nor for root edges, which are their users'.
 * A user's filter goes along with what it shows: `graph` is not asked for. Nor is it for an edge that moves between an
 * image and a job filter over that same image: neither view nor header changes. */
void transaction_by(struct transaction *transaction, const struct operation *operation);
/* It takes back what a transaction of the same operation did, with the lock held and drained since: that was tested. */
void transaction_takes_back(struct transaction *transaction);
/* edge->child becomes `to`. */
void transaction_move_edge(struct transaction *transaction, struct edge *edge, struct node *to);
/* Moves every parent edge of `from` (but for edges of `except_parent`) to `to`: root edges and overlays. */
void transaction_move_parents(struct transaction *transaction, struct node *from, struct node *to,
                              struct node *except_parent);
/* The same, but what is a job's own stays: root edges whose owner does not follow them (backend_follow()), and edges of
 * filters to their job's target. A job goes on with the node that it was asked for. */
void transaction_move_users(struct transaction *transaction, struct node *from, struct node *to);
/* Takes the edge away. */
void transaction_detach(struct transaction *transaction, struct edge *edge);
/* Gives `parent` a new child edge; *ret (may be NULL) is valid after the commit. */
void transaction_attach(struct transaction *transaction, struct node *parent, enum edge_role role, struct node *child,
                        struct edge **ret);
/* Rebinds a variable of an operation (claims follow). */
void transaction_rebind(struct transaction *transaction, struct operation *operation, unsigned variable,
                        struct node *to);
/* The claims of an edge (which this transaction moves or attaches) count as its adopter's from now on, as long as that
 * operation lives. NULL: as nobody's. For a step after which the edge shows what an adopted edge showed before. */
void transaction_adopt(struct transaction *transaction, struct edge *edge, struct operation *adopter);
/* Marks a node stale with a reason: its standing claims (as a parent) end. */
void transaction_mark_stale(struct transaction *transaction, struct node *node, const char *reason);
/* The operation's claims are dropped in the same step. */
void transaction_end_operation(struct transaction *transaction, struct operation *operation);
int graph_commit(struct transaction *transaction, struct error **err); /* frees it either way; drops references after */

/* Inserts `filter` (opened, not attached anywhere) over node: all parents move to it. Takes the lock and drains.
 * `operation`: see transaction_by(); NULL if there are root edges only. */
int coroutine_fn graph_insert_filter(struct graph *graph, const struct operation *operation, struct node *filter,
                                     struct node *over, struct error **err);
int coroutine_fn graph_remove_filter(struct graph *graph, const struct operation *operation, struct node *filter,
                                     struct error **err);
/* The same for a caller who holds graph->lock. */
int coroutine_fn graph_insert_filter_locked(struct graph *graph, const struct operation *operation, struct node *filter,
                                            struct node *over, struct error **err);
int coroutine_fn graph_remove_filter_locked(struct graph *graph, const struct operation *operation, struct node *filter,
                                            struct error **err);
/* A user's filter that guards (driver.guards), and shows an image already, becomes part of its head: all other users of
 * the image go through it, until it leaves. From inside its driver's open(); the image is drained. Refused where
 * somebody does not allow the edges that lead there to change. graph->lock is held. */
int coroutine_fn graph_enter_filter_locked(struct node *filter, struct error **err);
/* Gives a job's filter its second edge, to `target`'s head, where its job's data go; it may do there what `operation`
 * holds. It goes when the filter closes. graph->lock is held, and nobody uses the filter yet. */
int graph_attach_target_locked(const struct operation *operation, struct node *filter, struct node *target,
                               struct error **err);
/* When a graph change moves what a job's filter stands on, `variable` of the job's operation follows in the same step;
 * until the operation ends, or NULL is given. Else the claims stay where they are. */
void graph_filter_follow(struct node *filter, struct operation *operation, unsigned variable);
/* Makes a node of a job's own (a filter): state and driver given, no options. One reference, the caller's. */
int coroutine_fn graph_create_node(struct graph *graph, const struct driver *driver, const char *name,
                                   const char *opened_for, struct node **ret, struct error **err);

/* Where a node comes from that no user named ("backing of top, base.qcow2", "filter of block-commit j1"); NULL: a user
 * did. g_free(). */
char *node_describe_origin(const struct node *node);
/* query-named-block-nodes, and the picture. */
struct block_device_info_list;
json_t *coroutine_fn graph_describe_node(struct node *node);
json_t *coroutine_fn graph_describe_node_flat(struct node *node); /* without the images below it */
json_t *graph_describe(struct graph *graph);                      /* query-graph's answer */

#endif

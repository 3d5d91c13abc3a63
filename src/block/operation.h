/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_OPERATION_H
#define INTERLOCK_BLOCK_OPERATION_H

#include "access/access.h"
#include "base/list.h"
#include "loop/coroutine.h"

/*
 * An operation: anything that takes claims (a job, an export, a command while it runs). Its claims stand in the
 * schema as clauses over roles; here the roles are derived from the graph: when it begins, and again in the same
 * atomic step as every graph change. Control thread only.
 */
struct graph;
struct node;

enum claim_variable { /* bound to nodes by whoever begins the operation */
                      CLAIM_NODE,
                      CLAIM_TOP,
                      CLAIM_BASE,
                      CLAIM_TARGET,
                      CLAIM_BOTTOM,
                      CLAIM_OVERLAY,
                      CLAIM_DATA, /* where an image keeps its data */
                      CLAIM_VARIABLE_COUNT
};
enum claim_role {
    CLAIM_ROLE_NODE,     /* the variable itself */
    CLAIM_ROLE_BETWEEN,  /* (first, second): strictly between, along backing edges */
    CLAIM_ROLE_OVERLAYS, /* (first): parents through backing edges, and formats in the image */
    CLAIM_ROLE_RANGE,    /* (first, second): below first, down to and with second; up to the end if second is unbound */
    CLAIM_ROLE_BELOW,    /* (first): the node that first's backing edge leads to, if any */
    CLAIM_ROLE_ABOVE,    /* (first): everything that sees first's view through backing edges, formats and filters */
};
enum claim_condition {
    CLAIM_IF_ACTIVE = 1 << 0,
    CLAIM_IF_WRITABLE = 1 << 1,
    CLAIM_IF_EXCLUSIVE = 1 << 2,
    CLAIM_IF_SHRINK = 1 << 3,
    CLAIM_IF_REPLACE = 1 << 4, /* at its end the target takes the node's place */
    CLAIM_IF_DISCARD = 1 << 5, /* what has been copied is discarded in the node */
    CLAIM_IF_SHALLOW = 1 << 6, /* at its end the target leans on what the node leans on, or on the node */
    CLAIM_IF_RELINK = 1 << 7,  /* an edge of the node moves */
    CLAIM_IF_DIFFER = 1 << 8,  /* to other data */
    CLAIM_IF_DEMOTE = 1 << 9,  /* the node becomes read-only */
    CLAIM_IF_LONGER = 1 << 10, /* its base is longer than its top, whose users will find that */
};
enum claim_adopt {
    CLAIM_ADOPT_NONE,
    CLAIM_ADOPT_CHAIN, /* the backing edges from `top` down to `base` */
};
struct claim_clause {
    enum claim_role role;
    enum claim_variable first, second;
    unsigned require, deny;
    unsigned modifiers; /* enum access_modifier */
    unsigned condition; /* CLAIM_IF_ bits that must be set */
    unsigned unless;    /* CLAIM_IF_ bits that must not be set */
    const char *path;   /* the role as the schema writes it */
};
struct claim_table {
    const char *operation; /* the command's name */
    const struct claim_clause *clauses;
    unsigned count;
    enum claim_adopt adopt;
    bool sources; /* the nodes of its ranges are where its write-metadata takes data from */
};

struct operation {
    struct list link; /* graph->operations */
    struct graph *graph;
    const struct claim_table *table;
    struct access_holder *holder;
    struct node *bound[CLAIM_VARIABLE_COUNT];
    struct list adopted; /* struct edge by adopter_link */
    unsigned conditions; /* CLAIM_IF_ bits, fixed at the start */
    bool ended;          /* by a transaction: claims nothing any more; operation_end() is still to come */
};

struct operation_config {
    const char *kind; /* "job", "export", "command" */
    const char *id;   /* what a user knows it by */
    const struct claim_table *table;
    struct node *bound[CLAIM_VARIABLE_COUNT];
    unsigned conditions;
    int (*progress)(void *argument); /* see access_holder_create() */
    void *argument;
};
/* Takes every claim or none (-EBUSY, explained). */
int operation_begin(struct graph *graph, const struct operation_config *config, struct operation **ret,
                    struct error **err);
/* The decision alone. */
int operation_check(struct graph *graph, const struct operation_config *config, struct error **err);
/* The same, with what the operation would claim: *ret_claims becomes a new reference to an array of
 * access_claim_describe(), whatever the decision. */
int operation_preview(struct graph *graph, const struct operation_config *config, json_t **ret_claims,
                      struct error **err);
/* graph->lock is not held. Accepts NULL. */
void coroutine_fn operation_end(struct operation *operation);
/* The same for a caller who holds graph->lock. */
void coroutine_fn operation_end_locked(struct operation *operation);
/* ACCESS_ bits that the operation holds on `node`: what its backends there may be granted. None once it has ended. */
unsigned operation_granted(const struct operation *operation, const struct node *node);

#endif

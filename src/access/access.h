/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_ACCESS_ACCESS_H
#define INTERLOCK_ACCESS_ACCESS_H

#include "base/error.h"
#include <stdbool.h>
#include <stdint.h>

/*
 * Node Access Control: the ledger. Knows no graph, names only. doc/access.md has the model and the rules.
 * Control thread only, but for access_is_granted().
 *
 * A holder has one set of claims; the set is taken, replaced and released whole. Two holders conflict on a
 * node when one requires what the other denies, either way round. A holder does not conflict with itself
 * nor with the holders that it has adopted (nor these among themselves).
 */
enum access_action {
    ACCESS_READ_DATA = 1 << 0,      /* needs a whole image here */
    ACCESS_READ_METADATA = 1 << 1,  /* relies on the node staying a valid image that can be linked to */
    ACCESS_WRITE_DATA = 1 << 2,     /* a visible change that enters through the head */
    ACCESS_WRITE_BENEATH = 1 << 3,  /* a visible change that the head does not see */
    ACCESS_WRITE_METADATA = 1 << 4, /* no visible change: allocation, copy-up, refcounts */
    ACCESS_ATTRIBUTES = 1 << 5,     /* size grows; other settings that a reader relies on */
    ACCESS_GRAPH = 1 << 6,          /* the node's own child edge changes, with the string in its header */
    ACCESS_ALL = (1 << 7) - 1,
};
#define ACCESS_ACTION_COUNT 7

enum access_modifier {
    /* With require write-data: these writes come from clients of an export. */
    ACCESS_BY_EXPORT = 1 << 0,
    /* With deny write-data: but allowed to exports. */
    ACCESS_EXCEPT_EXPORTS = 1 << 1,
    /* With deny write-metadata: but allowed to a holder all of whose sources (access_holder_set_sources)
     * are nodes on which this holder has a claim with this modifier. */
    ACCESS_EXCEPT_INSIDE = 1 << 2,
};

struct access_claim {
    const char *node; /* node-name; copied by the ledger */
    unsigned require; /* ACCESS_ bits */
    unsigned deny;    /* ACCESS_ bits that others may not require */
    unsigned modifiers;
    const char *path; /* how it came: "top", "between(top, base)", "backing edge"; a static string */
};

struct access_ledger;
struct access_holder;

struct access_ledger *access_ledger_create(void);
void access_ledger_destroy(struct access_ledger *ledger); /* asserts: no holder left */

/*
 * A holder without claims. kind: "job", "export", "edge", "command"; id: what a user knows it by; command: the
 * operation ("block-commit"). `progress` (may be NULL) is asked for refusals: percent, or -1.
 */
struct access_holder *access_holder_create(struct access_ledger *ledger, const char *kind, const char *id,
                                           const char *command, int (*progress)(void *argument), void *argument);
/* Releases all its claims and its adoptions. NULL is accepted. */
void access_holder_destroy(struct access_holder *holder);
const char *access_holder_id(const struct access_holder *holder);
/* Nodes that this holder's write-metadata pulls data from; copied. An empty list (a stream whose range has been
 * committed away) is not the same as NULL (data from outside the graph). */
void access_holder_set_sources(struct access_holder *holder, const char *const *nodes, unsigned count);

/* One atomic change of the ledger: new claim sets for any number of holders, new adopters, all or none. */
struct access_change {
    struct access_holder *holder;
    const struct access_claim *claims; /* the whole new set */
    unsigned count;
    bool set_adopter;
    struct access_holder *adopter; /* with set_adopter: who adopts `holder` (an edge) from now on, or NULL */
    bool arrives; /* somebody new, who does not overtake those that wait (queue.h). One change of a call at most. */
};
/* -EBUSY and a refusal (error->data has every conflict) when the result would clash; then nothing has changed.
 * `subject` names what is refused ("block-commit j2"). An edge that has another adopter is a conflict too. */
int access_apply(struct access_ledger *ledger, const char *subject, const struct access_change *changes, unsigned count,
                 struct error **err);
/* The same decision, changing nothing. */
int access_test(struct access_ledger *ledger, const char *subject, const struct access_change *changes, unsigned count,
                struct error **err);

/* Who may let a refused change pass: asked by access_apply() with the sentence of the refusal; true: it is applied
 * nevertheless. NULL, as at the beginning: nobody. For a human's emergency, and for tests that show why a rule is
 * there. What was overridden stays tolerated between the holders that it was about, as long as both live: no later
 * change is refused because of these two. An edge keeps the adopter that it has. */
void access_set_override(struct access_ledger *ledger, bool (*override)(const char *sentence, void *argument),
                         void *argument);

/* For tests that break the rules on purpose: every claim passes through `filter` (which may change require, deny and
 * modifiers) before it is counted. NULL, as at the beginning and in the daemon: claims are what they are. */
void access_set_filter(struct access_ledger *ledger,
                       void (*filter)(const struct access_holder *holder, struct access_claim *claim, void *argument),
                       void *argument);
const char *access_holder_command(const struct access_holder *holder);
/* `heir`, which takes the place of `holder` (an edge that moved), tolerates whom that one does. */
void access_holder_inherit(struct access_holder *heir, const struct access_holder *holder);
/* Who has adopted it, or NULL. */
const struct access_holder *access_holder_adopter(const struct access_holder *holder);

/* Called after each change of what is claimed, adopted, waiting or stale; not after a refused one. It is called in the
 * midst of other things: it takes note and does no more. NULL: nobody. */
void access_set_changed(struct access_ledger *ledger, void (*changed)(void *argument), void *argument);
/* What to say about a node besides its name ("backing of top, base.qcow2"), for refusals; g_free(), or NULL: nothing.
 */
void access_set_describe_node(struct access_ledger *ledger, char *(*describe)(const char *node, void *argument),
                              void *argument);

/* A stale node: requiring read-data, write-data or read-metadata on it is refused with `reason`. Cleared by name. */
void access_mark_stale(struct access_ledger *ledger, const char *node, const char *reason);
void access_clear_stale(struct access_ledger *ledger, const char *node);
const char *access_stale_reason(struct access_ledger *ledger, const char *node); /* or NULL */

/* What all holders together require / deny on a node (the image locks are derived from it). */
void access_node_masks(struct access_ledger *ledger, const char *node, unsigned *ret_require, unsigned *ret_deny);

/* {"holders": [{id, kind, command, since, state, claims: [{node, require: [], allow: [], path}]}], "stale": [...],
 * "waiting": [{id, kind, command, since, timeout, behind: [], claims}]} */
json_t *access_describe(struct access_ledger *ledger);
/* {node, require: [], allow: [], path}: a claim as it stands there. */
json_t *access_claim_describe(const struct access_claim *claim);
const char *access_action_name(enum access_action one_bit);
/* "read-data, graph" ; g_free() */
char *access_actions_format(unsigned actions);

#endif

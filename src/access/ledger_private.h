/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_ACCESS_LEDGER_PRIVATE_H
#define INTERLOCK_ACCESS_LEDGER_PRIVATE_H

#include "access/access.h"
#include "base/list.h"
#include <glib.h>

/*
 * What ledger.c and refusal.c share. Actions are counted on *tracks*: one per action, and one more for each modifier
 * that splits an action, so that a decision stays a few ANDs.
 *
 *   track                     required by                          denied by
 *   the seven actions         require of the action                deny of it
 *     write-data                (but not BY_EXPORT)
 *     write-metadata                                                 (but not EXCEPT_INSIDE)
 *   write-data by export      require write-data, BY_EXPORT        deny write-data without EXCEPT_EXPORTS
 *   write-metadata outside    require write-metadata               deny write-metadata, EXCEPT_INSIDE: then the two
 *                                                                  holders are compared (ledger_inside())
 */
enum access_track { TRACK_WRITE_DATA_BY_EXPORT = ACCESS_ACTION_COUNT, TRACK_WRITE_METADATA_OUTSIDE, TRACK_COUNT };

struct ledger_node {
    char *name;
    char *stale_reason;
    unsigned required[TRACK_COUNT], denied[TRACK_COUNT]; /* how many entries */
    unsigned required_mask, denied_mask;                 /* tracks with a count */
    struct list entries;                                 /* struct ledger_entry by node_link */
    unsigned uses; /* entries that point here, attached or set aside for an undo */
};

struct ledger_entry {
    struct list node_link, holder_link;
    struct ledger_node *node;
    struct access_holder *holder;
    unsigned require, deny, modifiers; /* as claimed */
    unsigned required, denied;         /* tracks */
    const char *path;
};

struct access_holder {
    struct list ledger_link;
    struct list entries; /* struct ledger_entry by holder_link */
    struct list adopted; /* holders adopted by this one, by adopter_link */
    struct list adopter_link;
    struct access_ledger *ledger;
    struct access_holder *adopter;
    char *kind, *id, *command;
    int64_t since_ns;
    GHashTable *sources; /* set of node names, or NULL */
    int (*progress)(void *argument);
    void *argument;
};

struct access_ledger {
    GHashTable *nodes; /* name -> struct ledger_node */
    struct list holders;
    bool (*override)(const char *sentence, void *argument);
    void *override_argument;
    void (*filter)(const struct access_holder *holder, struct access_claim *claim, void *argument);
    void *filter_argument;
};

/* Who answers for a holder's claims: its adopter, or itself. */
static inline struct access_holder *holder_owner(struct access_holder *holder)
{
    return holder->adopter ? holder->adopter : holder;
}
/* The actions of `require` by one entry that another holder's entry does not allow; 0: no conflict that way round. */
unsigned ledger_clash(const struct ledger_entry *requiring, const struct ledger_entry *denying);

/* One explained reason why a change is refused. */
struct refusal;
struct refusal *refusal_create(const char *subject);
/* Adds every conflict of `entry` with the other holders on its node. */
void refusal_add_entry(struct refusal *refusal, const struct ledger_entry *entry);
void refusal_add_stale(struct refusal *refusal, const struct ledger_entry *entry);
void refusal_add_adopter(struct refusal *refusal, const struct access_holder *edge,
                         const struct access_holder *adopter);
unsigned refusal_count(const struct refusal *refusal);
const char *refusal_sentence(const struct refusal *refusal); /* the first conflict; NULL without one */
/* Turns it into an error (-EBUSY), or drops it when err is NULL. Frees it. */
int refusal_finish(struct refusal *refusal, struct error **err);

#endif

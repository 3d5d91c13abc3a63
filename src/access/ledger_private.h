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
    GHashTable *sources;         /* set of node names, or NULL */
    GHashTable *tolerated;       /* set of holders that a human let it stand beside, or NULL; symmetric */
    GHashTable *tolerated_stale; /* set of names of nodes that it uses though they are stale, or NULL */
    bool waiting;                /* a ticket's: it holds nothing, and its entries are attached nowhere */
    bool contested;              /* during a change: an edge that its adopter does not give away */
    int (*progress)(void *argument);
    void *argument;
};

struct access_ledger {
    GHashTable *nodes; /* name -> struct ledger_node */
    struct list holders;
    struct list waiting;    /* struct access_ticket by link, in order of arrival */
    unsigned long refusals; /* so far */
    unsigned waiting_count;
    unsigned tolerances; /* how many holders tolerate somebody or something */
    bool (*override)(const char *sentence, void *argument);
    void *override_argument;
    void (*filter)(const struct access_holder *holder, struct access_claim *claim, void *argument);
    void *filter_argument;
    void (*changed)(void *argument);
    void *changed_argument;
    char *(*describe_node)(const char *node, void *argument);
    void *describe_argument;
    struct access_ticket *(*asker)(void *argument);
    void *asker_argument;
};

/* A place in the queue, or on the way there (queue.h). */
struct access_ticket {
    struct list link; /* ledger->waiting, while it waits */
    struct access_ledger *ledger;
    struct access_holder *shadow; /* what it asked for when it was last refused; NULL: it has not asked */
    GHashTable *edges;            /* set of ids of edges that it wants to adopt */
    char *note;                   /* access_asker_note(), or NULL */
    double timeout_s;             /* shown only; 0: none */
    bool may_wait, waiting, granted, refused, closed;
    bool joint;             /* between access_asker_begin() and _end() */
    bool asked;             /* since the begin */
    bool changed;           /* the ledger, since the begin */
    bool was_waiting;       /* at the begin */
    unsigned long refusals; /* of others, before the begin */
};

/* Who answers for a holder's claims: its adopter, or itself. */
static inline struct access_holder *holder_owner(struct access_holder *holder)
{
    return holder->adopter ? holder->adopter : holder;
}
/* May these two stand side by side whatever they claim? */
bool ledger_tolerates(const struct access_holder *a, const struct access_holder *b);
bool ledger_tolerates_stale(const struct ledger_entry *entry);
void ledger_tolerate(struct access_holder *a, struct access_holder *b);
void ledger_tolerate_stale(struct access_holder *holder, const char *node);
void ledger_forget_tolerances(struct access_holder *holder); /* it ends */
void ledger_changed(struct access_ledger *ledger);
/* A holder that is in no list; and an entry of it that is attached to no node. */
struct access_holder *holder_create_shadow(struct access_ledger *ledger, const struct access_holder *like);
void holder_destroy_shadow(struct access_holder *holder); /* accepts NULL */
void holder_add_shadow_entry(struct access_holder *holder, const struct access_claim *claim);
/* The actions of `require` by one entry that another holder's entry does not allow; 0: no conflict that way round. */
unsigned ledger_clash(const struct ledger_entry *requiring, const struct ledger_entry *denying);

/* One explained reason why a change is refused. `holder`: whose change it is, if it is one's; `arrives`: who is new.
 * Borrows `subject`. */
struct refusal;
struct refusal *refusal_create(const char *subject, const struct access_holder *holder, bool arrives);
/* Adds every conflict of `entry` with the other holders on its node. */
void refusal_add_entry(struct refusal *refusal, const struct ledger_entry *entry);
/* Adds the conflict of two entries, if there is one; nothing twice. */
void refusal_add_pair(struct refusal *refusal, const struct ledger_entry *ours, const struct ledger_entry *theirs);
void refusal_add_stale(struct refusal *refusal, const struct ledger_entry *entry);
/* `wanting` is to adopt `edge`, but `adopter` has done so, or waits to do so. */
void refusal_add_adopter(struct refusal *refusal, struct access_holder *edge, struct access_holder *wanting,
                         struct access_holder *adopter);
/* The refused is going to wait, or does, so the remedy does not speak of it. `brief`: one conflict of two entries is
 * enough, for nobody reads them all. */
void refusal_set_waits(struct refusal *refusal, bool brief);
bool refusal_is_enough(const struct refusal *refusal);
/* Nobody asks why: conflicts are counted, not explained. */
void refusal_set_silent(struct refusal *refusal);
unsigned refusal_count(const struct refusal *refusal);
bool refusal_is_for_good(const struct refusal *refusal);     /* no waiting would help */
const char *refusal_sentence(const struct refusal *refusal); /* the first conflict; NULL without one */
/* What was refused is made nevertheless: both sides of each conflict tolerate each other from now on. */
void refusal_tolerate(const struct refusal *refusal);
/* Turns it into an error (-EBUSY), or drops it when err is NULL. Frees it. */
int refusal_finish(struct refusal *refusal, struct error **err);
/* {id, kind, command, since, state, ...} and a holder's claims, as query-access shows them. */
json_t *holder_describe(const struct access_holder *holder);
json_t *holder_describe_claims(const struct access_holder *holder);

/* queue.c, for the ledger. Who asks just now, or NULL. */
struct access_ticket *queue_asker(struct access_ledger *ledger);
/* Adds the conflicts of what `holder` wants (its entries are there) with those that wait before `asker`. */
void queue_check(struct access_ledger *ledger, const struct access_ticket *asker, const struct access_change *changes,
                 unsigned count, struct refusal *refusal);
/* The asker asks: its ticket remembers what for. */
void queue_asked(struct access_ticket *asker, const struct access_change *changes, unsigned count,
                 struct refusal *refusal);
/* The asker was refused: it joins the queue or stays there, unless that is for nothing. */
void queue_refused(struct access_ticket *asker, bool for_good);
/* A change by who takes several sets as one: it is noted. */
bool queue_hides_change(struct access_ledger *ledger);
/* The asker has what it asked for. */
void queue_granted(struct access_ticket *asker);
json_t *queue_describe(struct access_ledger *ledger);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_ACCESS_QUEUE_H
#define INTERLOCK_ACCESS_QUEUE_H

#include "access/access.h"

/*
 * The queue of operations that wait for their claims. Names and claims only: who runs what, and when it is tried again,
 * is src/control's. Control thread only.
 *
 * A ticket stands for one operation from the moment it is asked for. While its owner runs the operation's beginning,
 * the ledger learns the ticket from access_set_asker(). A change that `arrives` is refused, too, when it clashes with
 * what an operation waits for that came before; so first come is first served on every node, and nobody waits for
 * somebody with whom it has no quarrel. A waiting operation holds nothing.
 *
 *   created --refused--> waiting --tried again, admitted--> granted
 *      `----admitted----------------------------------------^
 *   each of them --> closed: it may not be admitted any more
 */
struct access_ticket;

#define ACCESS_WAITING_MAX 256 /* operations that wait at one time; one more is refused as if it did not want to */

/* may_wait: being refused makes it wait (unless that is for nothing: a stale node never becomes good again). */
struct access_ticket *access_ticket_create(struct access_ledger *ledger, bool may_wait);
/* Leaves the queue. Accepts NULL. */
void access_ticket_destroy(struct access_ticket *ticket);
/* For query-access. */
void access_ticket_set_timeout(struct access_ticket *ticket, double seconds);
/* Before each try: forgets that an earlier one was refused; its place in the queue stays. */
void access_ticket_try(struct access_ticket *ticket);
/* Leaves the queue; whatever is still on its way to ask in its name is refused with -ECANCELED. */
void access_ticket_close(struct access_ticket *ticket);

bool access_ticket_waits(const struct access_ticket *ticket);
bool access_ticket_was_refused(const struct access_ticket *ticket); /* by the ledger, in this try */
bool access_ticket_was_granted(const struct access_ticket *ticket);
/* What it asked for last: "j2", "block-commit"; NULL before it has asked. */
const char *access_ticket_id(const struct access_ticket *ticket);
const char *access_ticket_operation(const struct access_ticket *ticket);
const char *access_ticket_kind(const struct access_ticket *ticket);
double access_ticket_age_s(const struct access_ticket *ticket); /* seconds since it first asked */
/* What the arguments of the operation that asks just now stand for, for one that runs again from its beginning: the
 * first `note` of its ticket (copied), whatever it says later; without a ticket the given one. Borrowed. */
const char *access_asker_note(struct access_ledger *ledger, const char *note);

/*
 * Several sets of claims as one, for who takes them back if one is refused (block/action.c). Between begin and end the
 * ticket of the operation that asks just now (without one nothing happens) keeps its place in the queue, with all that
 * it has asked for, while sets are granted, and what changes in the ledger by its doing wakes nobody. At most one
 * access_asker_keep() between: nothing is taken back any more. The ticket is granted and leaves; -ECANCELED if it was
 * closed meanwhile. Without it all is as it was before, and the end forgets it, or tells of changes if somebody else
 * was refused meanwhile.
 */
void access_asker_begin(struct access_ledger *ledger);
int access_asker_keep(struct access_ledger *ledger, struct error **err);
void access_asker_end(struct access_ledger *ledger);

/* Whose ticket it is that asks just now, or NULL: somebody without one, who may not wait and comes last. */
void access_set_asker(struct access_ledger *ledger, struct access_ticket *(*asker)(void *argument), void *argument);
/* Does somebody wait under this id, other than who asks just now? Then the id is taken. */
bool access_id_waits(struct access_ledger *ledger, const char *id);

#endif

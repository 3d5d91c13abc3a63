/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The queue of those that wait for their claims (queue.h). Owns the order, and what each waiting operation asked for
 * when it was last refused: as a holder of its own, the shadow, that stands in no list and counts on no node.
 *
 * 1. ledger->waiting is in order of arrival; who has joined stays in its place, however often it is tried in vain.
 * 2. Who asks is compared with those before it only, and somebody new with all of them: so no one is overtaken by one
 *    that it clashes with, and two that do not clash never wait for each other.
 * 3. Since sets are taken whole and who waits holds nothing, "waits behind" has no circles: each edge of it leads to a
 *    holder, which waits for nobody, or to an earlier place.
 * 4. Being granted and leaving the queue are one step. Who takes several sets as one is granted when it has them all;
 * its shadow has what it asked for so far.
 *
 * The decision against the holders is ledger.c's. Waking and trying again is src/control's.
 */
#include "access/queue.h"
#include "access/ledger_private.h"
#include "loop/loop.h"
#include <errno.h>

/* --- tickets --- */

struct access_ticket *access_ticket_create(struct access_ledger *ledger, bool may_wait)
{
    struct access_ticket *ticket = g_new0(struct access_ticket, 1);

    ticket->ledger = ledger;
    ticket->may_wait = may_wait;
    list_init(&ticket->link);
    return ticket;
}

/* Those behind it may have waited for it alone. */
static void ticket_leave(struct access_ticket *ticket)
{
    if (ticket->waiting) {
        ticket->waiting = false;
        list_remove(&ticket->link);
        ticket->ledger->waiting_count--;
        ledger_changed(ticket->ledger);
    }
}

void access_ticket_destroy(struct access_ticket *ticket)
{
    if (ticket) {
        ticket_leave(ticket);
        holder_destroy_shadow(ticket->shadow);
        g_clear_pointer(&ticket->edges, g_hash_table_destroy);
        g_free(ticket->note);
        g_free(ticket);
    }
}

void access_ticket_set_timeout(struct access_ticket *ticket, double seconds)
{
    ticket->timeout_s = seconds;
}

void access_ticket_try(struct access_ticket *ticket)
{
    ticket->refused = false;
}

void access_ticket_close(struct access_ticket *ticket)
{
    ticket->closed = true;
    ticket_leave(ticket);
}

bool access_ticket_waits(const struct access_ticket *ticket)
{
    return ticket->waiting;
}

bool access_ticket_was_refused(const struct access_ticket *ticket)
{
    return ticket->refused;
}

bool access_ticket_was_granted(const struct access_ticket *ticket)
{
    return ticket->granted;
}

const char *access_ticket_id(const struct access_ticket *ticket)
{
    return ticket->shadow ? ticket->shadow->id : NULL;
}

const char *access_ticket_operation(const struct access_ticket *ticket)
{
    return ticket->shadow ? ticket->shadow->command : NULL;
}

const char *access_ticket_kind(const struct access_ticket *ticket)
{
    return ticket->shadow ? ticket->shadow->kind : NULL;
}

double access_ticket_age_s(const struct access_ticket *ticket)
{
    return ticket->shadow ? (double)((loop_clock_ns() - ticket->shadow->since_ns) / 1000000) / 1e3 : 0;
}

void access_set_asker(struct access_ledger *ledger, struct access_ticket *(*asker)(void *argument), void *argument)
{
    ledger->asker = asker;
    ledger->asker_argument = argument;
}

struct access_ticket *queue_asker(struct access_ledger *ledger)
{
    return ledger->asker ? ledger->asker(ledger->asker_argument) : NULL;
}

const char *access_asker_note(struct access_ledger *ledger, const char *note)
{
    struct access_ticket *asker = queue_asker(ledger);

    if (!asker) {
        return note;
    }
    if (!asker->note) {
        asker->note = g_strdup(note);
    }
    return asker->note;
}

bool access_id_waits(struct access_ledger *ledger, const char *id)
{
    const struct access_ticket *asker = queue_asker(ledger);

    list_for_each (link, &ledger->waiting) {
        const struct access_ticket *ticket = container_of(link, struct access_ticket, link);

        if (ticket != asker && !strcmp(ticket->shadow->id, id)) {
            return true;
        }
    }
    return false;
}

/* --- the order --- */

/* What an arriving holder wants against what a waiting one wants. */
static void check_entries(const struct access_holder *arriving, const struct access_holder *shadow,
                          struct refusal *refusal)
{
    list_for_each (link, &arriving->entries) {
        const struct ledger_entry *ours = container_of(link, struct ledger_entry, holder_link);

        list_for_each (other_link, &shadow->entries) {
            const struct ledger_entry *theirs = container_of(other_link, struct ledger_entry, holder_link);

            if (ours->node == theirs->node) {
                refusal_add_pair(refusal, ours, theirs);
            }
        }
    }
}

void queue_check(struct access_ledger *ledger, const struct access_ticket *asker, const struct access_change *changes,
                 unsigned count, struct refusal *refusal)
{
    list_for_each (link, &ledger->waiting) {
        const struct access_ticket *ticket = container_of(link, struct access_ticket, link);

        if (ticket == asker || refusal_is_enough(refusal)) {
            return;
        }
        for (unsigned i = 0; i < count; i++) {
            if (changes[i].arrives) {
                check_entries(changes[i].holder, ticket->shadow, refusal);
            }
            if (changes[i].set_adopter && changes[i].adopter &&
                g_hash_table_contains(ticket->edges, changes[i].holder->id)) {
                refusal_add_adopter(refusal, changes[i].holder, changes[i].adopter, ticket->shadow);
            }
        }
    }
}

/* A command has no id of its own, but the name of the node that it is about: one is made up, for access-cancel. */
static void name_command(struct access_ticket *ticket, const struct access_holder *before)
{
    struct access_holder *shadow = ticket->shadow;
    char *id;

    if (strcmp(shadow->kind, "command") != 0) {
        return;
    }
    id = before ? g_strdup(before->id) : g_strdup_printf("%s-%s", shadow->command, shadow->id);
    for (unsigned i = 2; !before && access_id_waits(ticket->ledger, id); i++) {
        g_free(id);
        id = g_strdup_printf("%s-%s-%u", shadow->command, shadow->id, i);
    }
    g_free(shadow->id);
    shadow->id = id;
}

static void add_claims(struct access_ticket *asker, const struct access_change *change)
{
    for (unsigned i = 0; i < change->count; i++) {
        holder_add_shadow_entry(asker->shadow, &change->claims[i]);
    }
}

/* One more set of several: the first gave the name. */
static void asked_more(struct access_ticket *asker, const struct access_change *changes, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        if (changes[i].arrives) {
            add_claims(asker, &changes[i]);
        } else if (changes[i].set_adopter && changes[i].adopter) {
            g_hash_table_add(asker->edges, g_strdup(changes[i].holder->id));
        }
    }
}

/* How long it has been asking stays. */
static void asked_anew(struct access_ticket *asker, const struct access_change *changes, unsigned count)
{
    struct access_holder *before = g_steal_pointer(&asker->shadow);

    g_clear_pointer(&asker->edges, g_hash_table_destroy);
    asker->edges = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    for (unsigned i = 0; i < count; i++) {
        if (changes[i].arrives) {
            asker->shadow = holder_create_shadow(asker->ledger, changes[i].holder);
            add_claims(asker, &changes[i]);
            name_command(asker, before);
        } else if (changes[i].set_adopter && changes[i].adopter) {
            g_hash_table_add(asker->edges, g_strdup(changes[i].holder->id));
        }
    }
    if (before) {
        asker->shadow->since_ns = before->since_ns;
        holder_destroy_shadow(before);
    }
}

void queue_asked(struct access_ticket *asker, const struct access_change *changes, unsigned count,
                 struct refusal *refusal)
{
    if (asker->joint && asker->asked) {
        asked_more(asker, changes, count);
    } else {
        asked_anew(asker, changes, count);
    }
    asker->asked = true;
    if (asker->may_wait) {
        refusal_set_waits(refusal, asker->waiting);
    }
}

void queue_refused(struct access_ticket *asker, bool for_good)
{
    struct access_ledger *ledger = asker->ledger;

    asker->refused = true;
    if (for_good) {
        ticket_leave(asker);
    } else if (asker->may_wait && !asker->waiting && ledger->waiting_count < ACCESS_WAITING_MAX) {
        asker->waiting = true;
        ledger->waiting_count++;
        list_append(&ledger->waiting, &asker->link);
    }
}

void queue_granted(struct access_ticket *asker)
{
    if (!asker->joint) {
        asker->granted = true;
        ticket_leave(asker);
    }
}

/* --- several sets as one --- */

void access_asker_begin(struct access_ledger *ledger)
{
    struct access_ticket *asker = queue_asker(ledger);

    if (asker) {
        g_assert(!asker->joint);
        asker->joint = true;
        asker->asked = false;
        asker->changed = false;
        asker->was_waiting = asker->waiting;
        asker->refusals = ledger->refusals;
    }
}

int access_asker_keep(struct access_ledger *ledger, struct error **err)
{
    struct access_ticket *asker = queue_asker(ledger);

    if (asker && asker->closed) {
        return error_set(err, -ECANCELED, "%s was cancelled while it waited",
                         asker->shadow ? asker->shadow->id : "The operation");
    }
    if (asker && asker->asked) {
        asker->granted = true;
        ticket_leave(asker);
    }
    return 0;
}

bool queue_hides_change(struct access_ledger *ledger)
{
    struct access_ticket *asker = queue_asker(ledger);

    if (!asker || !asker->joint) {
        return false;
    }
    asker->changed = true;
    return true;
}

/* A refusal of its own is one that it ends with: it asks for nothing more. */
void access_asker_end(struct access_ledger *ledger)
{
    struct access_ticket *asker = queue_asker(ledger);

    if (asker) {
        unsigned long own = asker->refused;
        bool left = asker->was_waiting && !asker->waiting;

        asker->joint = false;
        if (asker->changed && (asker->granted || left || ledger->refusals - asker->refusals > own)) {
            ledger_changed(ledger);
        }
    }
}

/* --- query-access --- */

static void add_behind(json_t *behind, const char *id)
{
    size_t index;
    json_t *value;

    json_array_foreach(behind, index, value)
    {
        if (!strcmp(json_string_value(value), id)) {
            return;
        }
    }
    json_array_append_new(behind, json_string(id));
}

static bool clashes(const struct ledger_entry *a, const struct ledger_entry *b)
{
    return ledger_clash(a, b) || ledger_clash(b, a);
}

/* Holders that have what it asked for. An edge that it wants to adopt is in its way only by its adopter. */
static void describe_holders(const struct access_ticket *ticket, json_t *behind)
{
    list_for_each (link, &ticket->shadow->entries) {
        const struct ledger_entry *entry = container_of(link, struct ledger_entry, holder_link);

        list_for_each (other_link, &entry->node->entries) {
            const struct ledger_entry *other = container_of(other_link, struct ledger_entry, node_link);
            bool wanted = g_hash_table_contains(ticket->edges, other->holder->id);

            if (wanted ? other->holder->adopter != NULL : clashes(entry, other)) {
                add_behind(behind, holder_owner(other->holder)->id);
            }
        }
    }
}

static bool shadows_clash(const struct access_ticket *a, const struct access_ticket *b)
{
    GHashTableIter iter;
    const char *edge;

    list_for_each (link, &a->shadow->entries) {
        const struct ledger_entry *ours = container_of(link, struct ledger_entry, holder_link);

        list_for_each (other_link, &b->shadow->entries) {
            const struct ledger_entry *theirs = container_of(other_link, struct ledger_entry, holder_link);

            if (ours->node == theirs->node && clashes(ours, theirs)) {
                return true;
            }
        }
    }
    g_hash_table_iter_init(&iter, a->edges);
    while (g_hash_table_iter_next(&iter, (void **)&edge, NULL)) {
        if (g_hash_table_contains(b->edges, edge)) {
            return true;
        }
    }
    return false;
}

json_t *queue_describe(struct access_ledger *ledger)
{
    json_t *array = json_array();

    list_for_each (link, &ledger->waiting) {
        const struct access_ticket *ticket = container_of(link, struct access_ticket, link);
        const struct access_holder *shadow = ticket->shadow;
        json_t *behind = json_array();
        json_t *json = json_pack("{s:s, s:s, s:s, s:f}", "id", shadow->id, "kind", shadow->kind, "command",
                                 shadow->command, "since", access_ticket_age_s(ticket));

        if (ticket->timeout_s > 0) {
            json_object_set_new(json, "timeout", json_real(ticket->timeout_s));
        }
        describe_holders(ticket, behind);
        for (struct list *at = ledger->waiting.next; at != link; at = at->next) {
            const struct access_ticket *earlier = container_of(at, struct access_ticket, link);

            if (shadows_clash(ticket, earlier)) {
                add_behind(behind, earlier->shadow->id);
            }
        }
        json_object_set_new(json, "behind", behind);
        json_object_set_new(json, "claims", holder_describe_claims(shadow));
        json_array_append_new(array, json);
    }
    return array;
}

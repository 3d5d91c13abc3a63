/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Refusals and descriptions: what the ledger says to people and programs. A refusal names the node, the action, both
 * parties and what would resolve it, once as data (every conflict) and once as a sentence (the first conflict, and how
 * many more). access_describe() is the ledger as data for query-access.
 *
 * 1. A clash of two holders stands in a refusal once, seen from the one that is refused, however often the decision
 *    meets it.
 * 2. Nobody is anonymous: a holder is called by its id, an edge by its nodes, and one with an adopter by him, too.
 *
 * It decides nothing: ledger.c found the clash before it came here.
 */
#include "access/ledger_private.h"
#include "loop/loop.h"
#include <errno.h>

struct refusal {
    const char *subject;                /* the caller's */
    const struct access_holder *holder; /* the subject, or NULL: a change of several holders */
    bool arrives;                       /* it is somebody new */
    char *sentence;                     /* the first conflict that is clear, or the first */
    char *remedy;                       /* for that conflict */
    json_t *conflicts;   /* NULL: none; whatever costs something waits for the first, for most changes have none */
    GHashTable *seen;    /* set of texts: a clash is met from both sides */
    GPtrArray *pairs;    /* struct access_holder, two by two, for refusal_tolerate() */
    GPtrArray *on_stale; /* struct ledger_entry, for the same */
    bool waits, brief, for_good, clear;
    bool silent;       /* nobody will read it: conflicts are counted only */
    unsigned unspoken; /* that many */
};

struct refusal *refusal_create(const char *subject, const struct access_holder *holder, bool arrives)
{
    struct refusal *refusal = g_new0(struct refusal, 1);

    refusal->subject = subject;
    refusal->holder = holder;
    refusal->arrives = arrives;
    return refusal;
}

unsigned refusal_count(const struct refusal *refusal)
{
    return refusal->unspoken + (refusal->conflicts ? (unsigned)json_array_size(refusal->conflicts) : 0);
}

void refusal_set_silent(struct refusal *refusal)
{
    refusal->silent = true;
}

/* True: the conflict has been counted, and that is all. */
static bool refusal_count_only(struct refusal *refusal)
{
    refusal->unspoken += refusal->silent;
    return refusal->silent;
}

bool refusal_is_for_good(const struct refusal *refusal)
{
    return refusal->for_good;
}

void refusal_set_waits(struct refusal *refusal, bool brief)
{
    refusal->waits = true;
    refusal->brief = brief;
}

bool refusal_is_enough(const struct refusal *refusal)
{
    return refusal->brief && refusal_count(refusal);
}

const char *refusal_sentence(const struct refusal *refusal)
{
    return refusal->sentence;
}

static double holder_age_s(const struct access_holder *holder)
{
    return (double)((loop_clock_ns() - holder->since_ns) / 1000000) / 1e3;
}

static int holder_progress(const struct access_holder *holder)
{
    return holder->progress ? holder->progress(holder->argument) : -1;
}

static bool holder_is(const struct access_holder *holder, const char *kind)
{
    return !strcmp(holder->kind, kind);
}

/* "block-commit j1", "export e0", "the edge a -> base (backing)" */
static char *holder_name(const struct access_holder *holder)
{
    if (holder_is(holder, "edge")) {
        return g_strdup_printf("the edge %s", holder->id);
    }
    if (holder->waiting && holder_is(holder, "command")) {
        return g_strdup(holder->id);
    }
    return g_strdup_printf("%s %s", holder_is(holder, "export") ? holder->kind : holder->command, holder->id);
}

/* The same, with what a reader asks next: "block-commit j1 (running since 12 s, 40 %)", "export e0 (since 3 s)",
 * "the edge a -> base (backing), in the hands of block-commit j1 (running since 12 s, 40 %)". */
static char *holder_format(const struct access_holder *holder)
{
    g_autofree char *name = holder_name(holder);
    g_autofree char *progress = NULL;
    const char *state = holder->waiting ? "waits since" : holder_is(holder, "job") ? "running since" : "since";

    if (holder->adopter) {
        g_autofree char *adopter = holder_format(holder->adopter);

        return g_strdup_printf("%s, in the hands of %s,", name, adopter);
    }
    if (holder_is(holder, "edge")) {
        return g_steal_pointer(&name);
    }
    if (holder_progress(holder) >= 0) {
        progress = g_strdup_printf(", %d %%", holder_progress(holder));
    }
    return g_strdup_printf("%s (%s %.0f s%s)", name, state, holder_age_s(holder), progress ? progress : "");
}

/* Could whoever is refused say on-conflict=wait instead? */
static bool refusal_could_wait(const struct refusal *refusal)
{
    return refusal->arrives && !refusal->waits && !holder_is(refusal->holder, "edge");
}

static char *holder_remedy(const struct refusal *refusal, const struct access_holder *holder)
{
    const char *or_wait = refusal_could_wait(refusal) ? ", or pass on-conflict=wait" : "";

    if (holder->waiting) {
        return g_strdup_printf("wait for it, or end its waiting with access-cancel%s", or_wait);
    }
    if (holder_is(holder, "job")) {
        return g_strdup_printf("wait for it%s cancel it%s", *or_wait ? "," : ", or", or_wait);
    }
    if (holder_is(holder, "export")) {
        return g_strdup_printf("delete export '%s' first%s", holder->id, or_wait);
    }
    if (holder_is(holder, "edge")) {
        return g_strdup("another image leans on this node: name the node above it, or detach that image first");
    }
    return g_strdup_printf("wait for it to end%s", or_wait);
}

json_t *holder_describe(const struct access_holder *holder)
{
    const char *state = holder->waiting ? "waiting" : holder->adopter ? "adopted" : "held";
    json_t *json = json_pack("{s:s, s:s, s:s, s:f, s:s}", "id", holder->id, "kind", holder->kind, "command",
                             holder->command, "since", holder_age_s(holder), "state", state);

    if (holder_progress(holder) >= 0) {
        json_object_set_new(json, "progress", json_integer(holder_progress(holder)));
    }
    if (holder->adopter) {
        json_object_set_new(json, "adopted-by", json_string(holder->adopter->id));
    }
    return json;
}

/* "node 'base'", "node '#top.backing' (backing of top, base.qcow2)" */
static char *node_format(const struct ledger_node *node, const struct access_ledger *ledger)
{
    g_autofree char *more = ledger->describe_node ? ledger->describe_node(node->name, ledger->describe_argument) : NULL;

    return more ? g_strdup_printf("node '%s' (%s)", node->name, more) : g_strdup_printf("node '%s'", node->name);
}

/* File names may hold any bytes; what is not UTF-8 is shown as replacement characters. */
static json_t *text_describe(const char *text)
{
    json_t *json = json_string(text);

    if (!json) {
        g_autofree char *valid = g_utf8_make_valid(text, -1);
        json = json_string(valid);
    }
    return json;
}

/* Takes sentence and remedy. What the subject needs and may not do is `clear`er than what it would forbid others, and
 * is said first. */
static void refusal_add(struct refusal *refusal, json_t *conflict, bool clear, char *sentence, char *remedy)
{
    json_object_set_new(conflict, "remedy", text_describe(remedy));
    json_object_set_new(conflict, "sentence", text_describe(sentence));
    if (!refusal->conflicts) {
        refusal->conflicts = json_array();
    }
    json_array_append_new(refusal->conflicts, conflict);
    if (!refusal->sentence || (clear && !refusal->clear)) {
        g_free(refusal->sentence);
        g_free(refusal->remedy);
        refusal->sentence = sentence;
        refusal->remedy = remedy;
        refusal->clear = clear;
    } else {
        g_free(sentence);
        g_free(remedy);
    }
}

/* Is this the first time that the two meet over this? Names, not addresses: an edge that moves has two holders. */
static bool refusal_is_new(struct refusal *refusal, const struct ledger_entry *requiring,
                           const struct ledger_entry *denying, unsigned actions)
{
    if (!refusal->seen) {
        refusal->seen = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    }
    return g_hash_table_add(refusal->seen, g_strdup_printf("%s|%p|%p|%x", requiring->node->name, requiring->holder,
                                                           denying->holder, actions));
}

/* For refusal_tolerate(): each with its adopter. A waiting one has nothing to be tolerated yet. */
static void refusal_note_pair(struct refusal *refusal, struct access_holder *a, struct access_holder *b)
{
    if (a->waiting || b->waiting) {
        return;
    }
    if (!refusal->pairs) {
        refusal->pairs = g_ptr_array_new();
    }
    g_ptr_array_add(refusal->pairs, a);
    g_ptr_array_add(refusal->pairs, b);
}

/* Who it is that needs or forbids: the one that is refused, or in its change somebody else. */
static char *refusal_who(const struct refusal *refusal, const struct ledger_entry *ours)
{
    const struct access_holder *holder = ours->holder;
    g_autofree char *name = NULL;

    if (holder == refusal->holder) {
        return g_strdup(refusal->subject);
    }
    if (refusal->holder && holder->adopter == refusal->holder) {
        return g_strdup_printf("%s (by the edge %s)", refusal->subject, holder->id);
    }
    name = holder_format(holder);
    return g_strdup_printf("%s: %s", refusal->subject, name);
}

/* One conflict per action; the sentence names them all. `ours` requires and `theirs` denies, or the other way round. */
static void refusal_add_clash(struct refusal *refusal, const struct ledger_entry *ours,
                              const struct ledger_entry *theirs, unsigned actions, bool we_require)
{
    if (refusal_count_only(refusal)) {
        return;
    }
    g_autofree char *names = access_actions_format(actions);
    g_autofree char *node = node_format(ours->node, ours->holder->ledger);
    g_autofree char *holder = holder_format(theirs->holder);
    g_autofree char *who = refusal_who(refusal, ours);

    refusal_note_pair(refusal, ours->holder, theirs->holder);
    if (!refusal_is_new(refusal, we_require ? ours : theirs, we_require ? theirs : ours, actions)) {
        return;
    }
    for (unsigned left = actions; left; left &= left - 1) {
        json_t *conflict =
            json_pack("{s:s, s:s, s:s, s:s, s:o, s:s}", "node", ours->node->name, "action",
                      access_action_name(left & -left), "direction", we_require ? "required" : "denied", "path",
                      ours->path, "holder", holder_describe(theirs->holder), "holder-path", theirs->path);

        refusal_add(refusal, conflict, we_require,
                    we_require ? g_strdup_printf("%s needs %s on %s, which %s does not allow", who, names, node, holder)
                               : g_strdup_printf("%s does not allow %s on %s, which %s %s", who, names, node, holder,
                                                 theirs->holder->waiting ? "is to have" : "needs"),
                    holder_remedy(refusal, theirs->holder->adopter ? theirs->holder->adopter : theirs->holder));
    }
}

void refusal_add_pair(struct refusal *refusal, const struct ledger_entry *ours, const struct ledger_entry *theirs)
{
    unsigned actions = refusal_is_enough(refusal) ? 0 : ledger_clash(ours, theirs);

    if (actions) {
        refusal_add_clash(refusal, ours, theirs, actions, true);
    }
    actions = refusal_is_enough(refusal) ? 0 : ledger_clash(theirs, ours);
    if (actions) {
        refusal_add_clash(refusal, ours, theirs, actions, false);
    }
}

void refusal_add_entry(struct refusal *refusal, const struct ledger_entry *entry)
{
    list_for_each (link, &entry->node->entries) {
        const struct ledger_entry *other = container_of(link, struct ledger_entry, node_link);

        if (!ledger_tolerates(other->holder, entry->holder)) {
            refusal_add_pair(refusal, entry, other);
        }
    }
}

void refusal_add_stale(struct refusal *refusal, const struct ledger_entry *entry)
{
    if (refusal_count_only(refusal)) {
        return;
    }
    unsigned needs = entry->require & (ACCESS_READ_DATA | ACCESS_READ_METADATA | ACCESS_WRITE_DATA);
    g_autofree char *names = access_actions_format(needs);
    g_autofree char *node = node_format(entry->node, entry->holder->ledger);
    g_autofree char *who = refusal_who(refusal, entry);
    json_t *conflict = json_pack("{s:s, s:s, s:s, s:s}", "node", entry->node->name, "action",
                                 access_action_name(needs & -needs), "direction", "stale", "path", entry->path);

    refusal->for_good = true;
    if (!refusal->on_stale) {
        refusal->on_stale = g_ptr_array_new();
    }
    g_ptr_array_add(refusal->on_stale, (void *)entry);
    refusal_add(refusal, conflict, true,
                g_strdup_printf("%s needs %s on %s, which is stale: %s", who, names, node, entry->node->stale_reason),
                g_strdup_printf("remove '%s' with blockdev-del; its data live on in the image it was committed to",
                                entry->node->name));
}

void refusal_add_adopter(struct refusal *refusal, struct access_holder *edge, struct access_holder *wanting,
                         struct access_holder *adopter)
{
    if (refusal_count_only(refusal)) {
        return;
    }
    g_autofree char *holder = holder_format(adopter);
    const struct ledger_entry *entry =
        list_is_empty(&edge->entries) ? NULL : container_of(edge->entries.next, struct ledger_entry, holder_link);
    json_t *conflict = json_pack("{s:s, s:s, s:s, s:s, s:o}", "node", entry ? entry->node->name : edge->id, "action",
                                 "graph", "direction", "adopted", "path", edge->id, "holder", holder_describe(adopter));

    refusal_note_pair(refusal, wanting, edge);
    refusal_note_pair(refusal, wanting, adopter);
    refusal_add(refusal, conflict, false,
                g_strdup_printf("%s needs the edge %s, which %s %s", refusal->subject, edge->id, holder,
                                adopter->waiting ? "is to have" : "has in its hands"),
                holder_remedy(refusal, adopter));
}

void refusal_tolerate(const struct refusal *refusal)
{
    for (unsigned i = 0; refusal->pairs && i < refusal->pairs->len; i += 2) {
        struct access_holder *a = refusal->pairs->pdata[i], *b = refusal->pairs->pdata[i + 1];

        ledger_tolerate(a, b);
        ledger_tolerate(holder_owner(a), holder_owner(b));
        ledger_tolerate(a, holder_owner(b));
        ledger_tolerate(holder_owner(a), b);
    }
    for (unsigned i = 0; refusal->on_stale && i < refusal->on_stale->len; i++) {
        const struct ledger_entry *entry = refusal->on_stale->pdata[i];

        ledger_tolerate_stale(entry->holder, entry->node->name);
    }
}

/* {operation, id, conflicts}: who was refused is known here if it is an operation; else whoever runs it adds it. */
static json_t *refusal_data(const struct refusal *refusal)
{
    json_t *data = json_pack("{s:O}", "conflicts", refusal->conflicts);

    if (refusal->arrives && !holder_is(refusal->holder, "edge")) {
        json_object_set_new(data, "operation", json_string(refusal->holder->command));
        json_object_set_new(data, "id", json_string(refusal->holder->id));
    }
    return data;
}

int refusal_finish(struct refusal *refusal, struct error **err)
{
    unsigned count = refusal_count(refusal);
    struct error *error = NULL;
    int r = count ? -EBUSY : 0;

    if (count && err) {
        g_autofree char *more = count > 1 ? g_strdup_printf(" (and %u more)", count - 1) : g_strdup("");

        error_set(&error, -EBUSY, "%s%s", refusal->sentence, more);
        error_hint(&error, "%s", refusal->remedy);
        error->data = refusal_data(refusal);
    }
    json_decref(refusal->conflicts);
    g_clear_pointer(&refusal->seen, g_hash_table_destroy);
    g_clear_pointer(&refusal->pairs, g_ptr_array_unref);
    g_clear_pointer(&refusal->on_stale, g_ptr_array_unref);
    g_free(refusal->sentence);
    g_free(refusal->remedy);
    g_free(refusal);
    if (error) {
        error_move(err, error);
    }
    return r;
}

/* --- query-access --- */

static json_t *actions_describe(unsigned actions)
{
    json_t *array = json_array();

    for (unsigned left = actions; left; left &= left - 1) {
        json_array_append_new(array, json_string(access_action_name(left & -left)));
    }
    return array;
}

json_t *access_claim_describe(const struct access_claim *claim)
{
    return json_pack("{s:s, s:o, s:o, s:s}", "node", claim->node, "require", actions_describe(claim->require), "allow",
                     actions_describe(ACCESS_ALL & ~claim->deny), "path", claim->path);
}

json_t *holder_describe_claims(const struct access_holder *holder)
{
    json_t *claims = json_array();

    list_for_each (link, &holder->entries) {
        const struct ledger_entry *entry = container_of(link, struct ledger_entry, holder_link);
        const struct access_claim claim = {
            .node = entry->node->name, .require = entry->require, .deny = entry->deny, .path = entry->path};

        json_array_append_new(claims, access_claim_describe(&claim));
    }
    return claims;
}

json_t *access_describe(struct access_ledger *ledger)
{
    json_t *holders = json_array();
    json_t *stale = json_array();
    GHashTableIter iter;
    struct ledger_node *node;

    list_for_each (link, &ledger->holders) {
        const struct access_holder *holder = container_of(link, struct access_holder, ledger_link);
        json_t *json = holder_describe(holder);

        json_object_set_new(json, "claims", holder_describe_claims(holder));
        json_array_append_new(holders, json);
    }
    g_hash_table_iter_init(&iter, ledger->nodes);
    while (g_hash_table_iter_next(&iter, NULL, (void **)&node)) {
        if (node->stale_reason) {
            json_array_append_new(stale, json_pack("{s:s, s:s}", "node", node->name, "reason", node->stale_reason));
        }
    }
    return json_pack("{s:o, s:o, s:o}", "holders", holders, "stale", stale, "waiting", queue_describe(ledger));
}

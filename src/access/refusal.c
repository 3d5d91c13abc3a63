/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Refusals and descriptions: what the ledger says to people and programs. A refusal names the node, the action, both
 * parties and what would resolve it, once as data (every conflict) and once as a sentence (the first conflict, and how
 * many more). access_describe() is the ledger as data for query-access.
 *
 * It decides nothing: ledger.c found the clash before it came here.
 */
#include "access/ledger_private.h"
#include "loop/loop.h"
#include <errno.h>

struct refusal {
    char *subject;
    char *sentence; /* the first conflict */
    char *remedy;   /* for the first conflict */
    json_t *conflicts;
};

struct refusal *refusal_create(const char *subject)
{
    struct refusal *refusal = g_new0(struct refusal, 1);

    refusal->subject = g_strdup(subject);
    refusal->conflicts = json_array();
    return refusal;
}

unsigned refusal_count(const struct refusal *refusal)
{
    return (unsigned)json_array_size(refusal->conflicts);
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

/* "block-commit j1 (running since 12 s, 40 %)", "export e0 (since 3 s)", "the edge a -> base (backing)" */
static char *holder_format(const struct access_holder *holder)
{
    g_autofree char *progress = NULL;

    if (holder_is(holder, "edge")) {
        return g_strdup_printf("the edge %s", holder->id);
    }
    if (holder_progress(holder) >= 0) {
        progress = g_strdup_printf(", %d %%", holder_progress(holder));
    }
    return g_strdup_printf("%s %s (%s %.0f s%s)", holder_is(holder, "job") ? holder->command : holder->kind, holder->id,
                           holder_is(holder, "job") ? "running since" : "since", holder_age_s(holder),
                           progress ? progress : "");
}

static char *holder_remedy(const struct access_holder *holder)
{
    if (holder_is(holder, "job")) {
        return g_strdup_printf("wait for job '%s' to end, or cancel it", holder->id);
    }
    if (holder_is(holder, "export")) {
        return g_strdup_printf("delete export '%s' first", holder->id);
    }
    if (holder_is(holder, "edge")) {
        return g_strdup("another image leans on this node: name the node above it, or detach that image first");
    }
    return g_strdup_printf("wait for %s '%s' to end", holder->kind, holder->id);
}

static json_t *holder_describe(const struct access_holder *holder)
{
    json_t *json =
        json_pack("{s:s, s:s, s:s, s:f, s:s}", "id", holder->id, "kind", holder->kind, "command", holder->command,
                  "since", holder_age_s(holder), "state", holder->adopter ? "adopted" : "held");

    if (holder_progress(holder) >= 0) {
        json_object_set_new(json, "progress", json_integer(holder_progress(holder)));
    }
    if (holder->adopter) {
        json_object_set_new(json, "adopted-by", json_string(holder->adopter->id));
    }
    return json;
}

/* Takes sentence and remedy. */
static void refusal_add(struct refusal *refusal, json_t *conflict, char *sentence, char *remedy)
{
    json_object_set_new(conflict, "remedy", json_string(remedy));
    json_object_set_new(conflict, "sentence", json_string(sentence));
    json_array_append_new(refusal->conflicts, conflict);
    if (!refusal->sentence) {
        refusal->sentence = sentence;
        refusal->remedy = remedy;
    } else {
        g_free(sentence);
        g_free(remedy);
    }
}

/* One conflict per action; the sentence names them all. `ours` requires and `theirs` denies, or the other way round. */
static void refusal_add_clash(struct refusal *refusal, const struct ledger_entry *ours,
                              const struct ledger_entry *theirs, unsigned actions, bool we_require)
{
    g_autofree char *names = access_actions_format(actions);
    g_autofree char *holder = holder_format(theirs->holder);
    g_autofree char *who = ours->holder->adopter || holder_is(ours->holder, "edge")
                               ? g_strdup_printf("%s (by the edge %s)", refusal->subject, ours->holder->id)
                               : g_strdup(refusal->subject);

    for (unsigned left = actions; left; left &= left - 1) {
        json_t *conflict =
            json_pack("{s:s, s:s, s:s, s:s, s:o, s:s}", "node", ours->node->name, "action",
                      access_action_name(left & -left), "direction", we_require ? "required" : "denied", "path",
                      ours->path, "holder", holder_describe(theirs->holder), "holder-path", theirs->path);

        refusal_add(refusal, conflict,
                    we_require ? g_strdup_printf("%s needs %s on node '%s', which %s does not allow", who, names,
                                                 ours->node->name, holder)
                               : g_strdup_printf("%s does not allow %s on node '%s', which %s needs", who, names,
                                                 ours->node->name, holder),
                    holder_remedy(theirs->holder->adopter ? theirs->holder->adopter : theirs->holder));
    }
}

void refusal_add_entry(struct refusal *refusal, const struct ledger_entry *entry)
{
    list_for_each (link, &entry->node->entries) {
        const struct ledger_entry *other = container_of(link, struct ledger_entry, node_link);
        unsigned actions;

        if (holder_owner(other->holder) == holder_owner(entry->holder)) {
            continue;
        }
        actions = ledger_clash(entry, other);
        if (actions) {
            refusal_add_clash(refusal, entry, other, actions, true);
        }
        actions = ledger_clash(other, entry);
        if (actions) {
            refusal_add_clash(refusal, entry, other, actions, false);
        }
    }
}

void refusal_add_stale(struct refusal *refusal, const struct ledger_entry *entry)
{
    unsigned needs = entry->require & (ACCESS_READ_DATA | ACCESS_READ_METADATA | ACCESS_WRITE_DATA);
    g_autofree char *names = access_actions_format(needs);
    json_t *conflict = json_pack("{s:s, s:s, s:s, s:s}", "node", entry->node->name, "action",
                                 access_action_name(needs & -needs), "direction", "stale", "path", entry->path);

    refusal_add(refusal, conflict,
                g_strdup_printf("%s needs %s on node '%s', which is stale: %s", refusal->subject, names,
                                entry->node->name, entry->node->stale_reason),
                g_strdup_printf("remove '%s' with blockdev-del; its data live on in the image it was committed to",
                                entry->node->name));
}

void refusal_add_adopter(struct refusal *refusal, const struct access_holder *edge, const struct access_holder *adopter)
{
    g_autofree char *holder = holder_format(adopter);
    json_t *conflict = json_pack("{s:s, s:s, s:s, s:o}", "node", edge->id, "action", "graph", "direction", "adopted",
                                 "holder", holder_describe(adopter));

    refusal_add(refusal, conflict,
                g_strdup_printf("%s needs the edge %s, which %s has in its hands", refusal->subject, edge->id, holder),
                holder_remedy(adopter));
}

int refusal_finish(struct refusal *refusal, struct error **err)
{
    unsigned count = refusal_count(refusal);
    struct error *error = NULL;

    if (count) {
        g_autofree char *more = count > 1 ? g_strdup_printf(" (and %u more)", count - 1) : g_strdup("");

        error_set(&error, -EBUSY, "%s%s", refusal->sentence, more);
        error_hint(&error, "%s", refusal->remedy);
        error->data = json_pack("{s:s, s:O}", "operation", refusal->subject, "conflicts", refusal->conflicts);
    }
    json_decref(refusal->conflicts);
    g_free(refusal->subject);
    g_free(refusal->sentence);
    g_free(refusal->remedy);
    g_free(refusal);
    return error ? error_move(err, error) : 0;
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

json_t *access_describe(struct access_ledger *ledger)
{
    json_t *holders = json_array();
    json_t *stale = json_array();
    GHashTableIter iter;
    struct ledger_node *node;

    list_for_each (link, &ledger->holders) {
        const struct access_holder *holder = container_of(link, struct access_holder, ledger_link);
        json_t *json = holder_describe(holder);
        json_t *claims = json_array();

        list_for_each (entry_link, &holder->entries) {
            const struct ledger_entry *entry = container_of(entry_link, struct ledger_entry, holder_link);

            const struct access_claim claim = {
                .node = entry->node->name, .require = entry->require, .deny = entry->deny, .path = entry->path};

            json_array_append_new(claims, access_claim_describe(&claim));
        }
        json_object_set_new(json, "claims", claims);
        json_array_append_new(holders, json);
    }
    g_hash_table_iter_init(&iter, ledger->nodes);
    while (g_hash_table_iter_next(&iter, NULL, (void **)&node)) {
        if (node->stale_reason) {
            json_array_append_new(stale, json_pack("{s:s, s:s}", "node", node->name, "reason", node->stale_reason));
        }
    }
    return json_pack("{s:o, s:o}", "holders", holders, "stale", stale);
}

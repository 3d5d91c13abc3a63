/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The ledger of Node Access Control: who claims what on which node, and the one decision whether a new set of claims
 * may stand beside the others. Called on the control thread, from src/block (operations and edges) only.
 *
 * 1. Per node and track, required[] and denied[] equal the number of entries there that have the bit; the masks have
 *    exactly the tracks with a count.
 * 2. No two entries on a node clash unless their holders have the same owner.
 * 3. access_apply() changes everything or nothing; a refused change leaves counts, entries and adopters as they were.
 * 4. What a human has overridden is tolerated between the two holders until one of them ends; an edge that moves hands
 *    its tolerances on. While there are any, decisions look at the entries behind a mask.
 * 5. A decision takes the own group's share out of the counts and tests masks: it never walks the other holders of a
 *    node (only the refusal's explanation and the two-holder test of "from inside" do), and never other nodes.
 *
 * It knows no graph: which nodes a role means is worked out by src/block/operation.c.
 */
#include "access/ledger_private.h"
#include "loop/loop.h"
#include <errno.h>

struct access_ledger *access_ledger_create(void)
{
    struct access_ledger *ledger = g_new0(struct access_ledger, 1);

    ledger->nodes = g_hash_table_new(g_str_hash, g_str_equal);
    list_init(&ledger->holders);
    list_init(&ledger->waiting);
    return ledger;
}

void access_ledger_destroy(struct access_ledger *ledger)
{
    GHashTableIter iter;
    struct ledger_node *node;

    if (!ledger) {
        return;
    }
    g_assert(list_is_empty(&ledger->holders) && list_is_empty(&ledger->waiting));
    g_hash_table_iter_init(&iter, ledger->nodes);
    while (g_hash_table_iter_next(&iter, NULL, (void **)&node)) {
        g_assert(list_is_empty(&node->entries));
        g_free(node->name);
        g_free(node->stale_reason);
        g_free(node);
    }
    g_hash_table_destroy(ledger->nodes);
    g_free(ledger);
}

static struct ledger_node *node_get(struct access_ledger *ledger, const char *name)
{
    struct ledger_node *node = g_hash_table_lookup(ledger->nodes, name);

    if (!node) {
        node = g_new0(struct ledger_node, 1);
        node->name = g_strdup(name);
        list_init(&node->entries);
        g_hash_table_insert(ledger->nodes, node->name, node);
    }
    return node;
}

/* Forgets a node that nobody claims anything on. */
static void node_put(struct access_ledger *ledger, struct ledger_node *node)
{
    if (!node->uses && !node->stale_reason) {
        g_hash_table_remove(ledger->nodes, node->name);
        g_free(node->name);
        g_free(node);
    }
}

/* --- entries and counts --- */

static unsigned required_tracks(const struct access_claim *claim)
{
    unsigned tracks = claim->require;

    if ((tracks & ACCESS_WRITE_DATA) && (claim->modifiers & ACCESS_BY_EXPORT)) {
        tracks ^= ACCESS_WRITE_DATA | 1u << TRACK_WRITE_DATA_BY_EXPORT;
    }
    if (tracks & ACCESS_WRITE_METADATA) {
        tracks |= 1u << TRACK_WRITE_METADATA_OUTSIDE;
    }
    return tracks;
}

static unsigned denied_tracks(const struct access_claim *claim)
{
    unsigned tracks = claim->deny;

    if ((tracks & ACCESS_WRITE_DATA) && !(claim->modifiers & ACCESS_EXCEPT_EXPORTS)) {
        tracks |= 1u << TRACK_WRITE_DATA_BY_EXPORT;
    }
    if ((tracks & ACCESS_WRITE_METADATA) && (claim->modifiers & ACCESS_EXCEPT_INSIDE)) {
        tracks ^= ACCESS_WRITE_METADATA | 1u << TRACK_WRITE_METADATA_OUTSIDE;
    }
    return tracks;
}

static void count_tracks(unsigned counts[TRACK_COUNT], unsigned *mask, unsigned tracks, int step)
{
    for (unsigned left = tracks; left; left &= left - 1) {
        unsigned track = (unsigned)__builtin_ctz(left);

        g_assert(step > 0 || counts[track] > 0);
        counts[track] += (unsigned)step;
        *mask = counts[track] ? *mask | 1u << track : *mask & ~(1u << track);
    }
}

static void entry_count(struct ledger_entry *entry, int step)
{
    count_tracks(entry->node->required, &entry->node->required_mask, entry->required, step);
    count_tracks(entry->node->denied, &entry->node->denied_mask, entry->denied, step);
}

static struct ledger_entry *entry_create(struct access_holder *holder, const struct access_claim *made)
{
    struct ledger_entry *entry = g_new0(struct ledger_entry, 1);
    struct access_claim own = *made, *claim = &own;

    if (holder->ledger->filter) {
        holder->ledger->filter(holder, claim, holder->ledger->filter_argument);
    }
    g_assert(!((claim->require | claim->deny) & ~(unsigned)ACCESS_ALL));
    entry->node = node_get(holder->ledger, claim->node);
    entry->node->uses++;
    entry->holder = holder;
    entry->require = claim->require;
    entry->deny = claim->deny;
    entry->modifiers = claim->modifiers;
    entry->required = required_tracks(claim);
    entry->denied = denied_tracks(claim);
    entry->path = claim->path ? claim->path : "";
    list_init(&entry->node_link);
    list_init(&entry->holder_link);
    return entry;
}

static void entry_attach(struct ledger_entry *entry)
{
    list_append(&entry->node->entries, &entry->node_link);
    list_append(&entry->holder->entries, &entry->holder_link);
    entry_count(entry, 1);
}

static void entry_detach(struct ledger_entry *entry)
{
    entry_count(entry, -1);
    list_remove(&entry->node_link);
    list_remove(&entry->holder_link);
}

static void entries_free(struct list *entries, struct access_ledger *ledger)
{
    list_for_each_safe (link, entries) {
        struct ledger_entry *entry = container_of(link, struct ledger_entry, holder_link);
        struct ledger_node *node = entry->node;

        list_remove(&entry->holder_link);
        g_free(entry);
        node->uses--;
        node_put(ledger, node);
    }
}

void holder_add_shadow_entry(struct access_holder *holder, const struct access_claim *claim)
{
    struct ledger_entry *entry = entry_create(holder, claim);

    list_append(&holder->entries, &entry->holder_link);
}

/* Detaches all entries of a holder into `to` (by holder_link). */
static void holder_take_entries(struct access_holder *holder, struct list *to)
{
    list_for_each_safe (link, &holder->entries) {
        struct ledger_entry *entry = container_of(link, struct ledger_entry, holder_link);

        entry_detach(entry);
        list_append(to, &entry->holder_link);
    }
}

/* --- holders --- */

void ledger_changed(struct access_ledger *ledger)
{
    if (ledger->changed && !queue_hides_change(ledger)) {
        ledger->changed(ledger->changed_argument);
    }
}

static struct access_holder *holder_create(struct access_ledger *ledger, const char *kind, const char *id,
                                           const char *command)
{
    struct access_holder *holder = g_new0(struct access_holder, 1);

    holder->ledger = ledger;
    holder->kind = g_strdup(kind);
    holder->id = g_strdup(id);
    holder->command = g_strdup(command);
    holder->since_ns = loop_clock_ns();
    list_init(&holder->ledger_link);
    list_init(&holder->entries);
    list_init(&holder->adopted);
    list_init(&holder->adopter_link);
    return holder;
}

struct access_holder *access_holder_create(struct access_ledger *ledger, const char *kind, const char *id,
                                           const char *command, int (*progress)(void *argument), void *argument)
{
    struct access_holder *holder = holder_create(ledger, kind, id, command);

    holder->progress = progress;
    holder->argument = argument;
    list_append(&ledger->holders, &holder->ledger_link);
    return holder;
}

/* `progress` stays away: its argument may be gone before the shadow is. */
struct access_holder *holder_create_shadow(struct access_ledger *ledger, const struct access_holder *like)
{
    struct access_holder *holder = holder_create(ledger, like->kind, like->id, like->command);

    holder->waiting = true;
    if (like->sources) {
        GHashTableIter iter;
        const char *source;

        holder->sources = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
        g_hash_table_iter_init(&iter, like->sources);
        while (g_hash_table_iter_next(&iter, (void **)&source, NULL)) {
            g_hash_table_add(holder->sources, g_strdup(source));
        }
    }
    return holder;
}

/* What an adopter leaves behind stands where it stood: it tolerates whom the adopter did, or a later change would find
 * them at odds. */
static void holder_set_adopter(struct access_holder *holder, struct access_holder *adopter)
{
    if (holder->adopter && holder->adopter != adopter) {
        access_holder_inherit(holder, holder->adopter);
    }
    list_remove(&holder->adopter_link);
    holder->adopter = adopter;
    if (adopter) {
        g_assert(!adopter->adopter && list_is_empty(&holder->adopted));
        list_append(&adopter->adopted, &holder->adopter_link);
    }
}

static void holder_free(struct access_holder *holder)
{
    list_remove(&holder->ledger_link);
    ledger_forget_tolerances(holder);
    g_clear_pointer(&holder->sources, g_hash_table_destroy);
    g_free(holder->kind);
    g_free(holder->id);
    g_free(holder->command);
    g_free(holder);
}

void holder_destroy_shadow(struct access_holder *holder)
{
    if (holder) {
        entries_free(&holder->entries, holder->ledger);
        holder_free(holder);
    }
}

void access_holder_destroy(struct access_holder *holder)
{
    struct list entries = LIST_INIT(entries);
    struct access_ledger *ledger;
    bool changed;

    if (!holder) {
        return;
    }
    ledger = holder->ledger;
    changed = !list_is_empty(&holder->entries) || !list_is_empty(&holder->adopted);
    list_for_each_safe (link, &holder->adopted) {
        holder_set_adopter(container_of(link, struct access_holder, adopter_link), NULL);
    }
    holder_set_adopter(holder, NULL);
    holder_take_entries(holder, &entries);
    entries_free(&entries, ledger);
    holder_free(holder);
    if (changed) {
        ledger_changed(ledger);
    }
}

const struct access_holder *access_holder_adopter(const struct access_holder *holder)
{
    return holder->adopter;
}

const char *access_holder_command(const struct access_holder *holder)
{
    return holder->command;
}

const char *access_holder_id(const struct access_holder *holder)
{
    return holder->id;
}

void access_holder_set_sources(struct access_holder *holder, const char *const *nodes, unsigned count)
{
    g_clear_pointer(&holder->sources, g_hash_table_destroy);
    holder->sources = nodes ? g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL) : NULL;
    for (unsigned i = 0; i < count; i++) {
        g_hash_table_add(holder->sources, g_strdup(nodes[i]));
    }
}

/* --- the decision --- */

/* Are all of `writer`'s sources nodes that `guard` has in its own range? A writer that has never set
 * its sources makes its data up (a guest's allocation): it is never from inside. One whose range has become empty
 * brings nothing in. */
static bool ledger_inside(const struct access_holder *writer, const struct access_holder *guard)
{
    GHashTableIter iter;
    const char *source;

    if (!writer->sources) {
        return false;
    }
    g_hash_table_iter_init(&iter, writer->sources);
    while (g_hash_table_iter_next(&iter, (void **)&source, NULL)) {
        bool found = false;

        list_for_each (link, &guard->entries) {
            const struct ledger_entry *entry = container_of(link, struct ledger_entry, holder_link);

            found = found || ((entry->modifiers & ACCESS_EXCEPT_INSIDE) && !strcmp(entry->node->name, source));
        }
        if (!found) {
            return false;
        }
    }
    return true;
}

unsigned ledger_clash(const struct ledger_entry *requiring, const struct ledger_entry *denying)
{
    unsigned tracks = requiring->required & denying->denied;
    unsigned actions = tracks & ACCESS_ALL;

    if (tracks & 1u << TRACK_WRITE_DATA_BY_EXPORT) {
        actions |= ACCESS_WRITE_DATA;
    }
    if ((tracks & 1u << TRACK_WRITE_METADATA_OUTSIDE) && !ledger_inside(requiring->holder, denying->holder)) {
        actions |= ACCESS_WRITE_METADATA;
    }
    return actions;
}

/* The slow half, only where a mask has spoken: is there really somebody, or only writes from inside, or somebody that a
 * human lets stand there? */
static bool entry_really_clashes(const struct ledger_entry *entry)
{
    list_for_each (link, &entry->node->entries) {
        const struct ledger_entry *other = container_of(link, struct ledger_entry, node_link);

        if (!ledger_tolerates(other->holder, entry->holder) &&
            (ledger_clash(entry, other) || ledger_clash(other, entry))) {
            return true;
        }
    }
    return false;
}

static bool entry_clashes(const struct ledger_entry *entry)
{
    unsigned both = (entry->required & entry->node->denied_mask) | (entry->denied & entry->node->required_mask);

    bool exact = both != 1u << TRACK_WRITE_METADATA_OUTSIDE && !entry->holder->ledger->tolerances;

    return both && (exact || entry_really_clashes(entry));
}

static bool entry_is_stale(const struct ledger_entry *entry)
{
    return entry->node->stale_reason &&
           (entry->require & (ACCESS_READ_DATA | ACCESS_READ_METADATA | ACCESS_WRITE_DATA)) &&
           !ledger_tolerates_stale(entry);
}

static void group_count(struct access_holder *owner, int step)
{
    list_for_each (link, &owner->entries) {
        entry_count(container_of(link, struct ledger_entry, holder_link), step);
    }
    list_for_each (adopted, &owner->adopted) {
        struct access_holder *holder = container_of(adopted, struct access_holder, adopter_link);

        list_for_each (link, &holder->entries) {
            entry_count(container_of(link, struct ledger_entry, holder_link), step);
        }
    }
}

static bool holder_clashes(struct access_holder *holder, struct refusal *refusal)
{
    bool clashes = false;

    list_for_each (link, &holder->entries) {
        struct ledger_entry *entry = container_of(link, struct ledger_entry, holder_link);

        if (entry_is_stale(entry)) {
            refusal_add_stale(refusal, entry);
            clashes = true;
        } else if (entry_clashes(entry)) {
            refusal_add_entry(refusal, entry);
            clashes = true;
        }
    }
    return clashes;
}

/* Tests all claims of an owner, its adopted holders' included, against everybody else's. */
static bool group_clashes(struct access_holder *owner, struct refusal *refusal)
{
    bool clashes;

    group_count(owner, -1);
    clashes = holder_clashes(owner, refusal);
    list_for_each (link, &owner->adopted) {
        clashes |= holder_clashes(container_of(link, struct access_holder, adopter_link), refusal);
    }
    group_count(owner, 1);
    return clashes;
}

/* --- changes --- */

struct change_undo {
    struct list entries; /* what the holder had */
    struct access_holder *adopter;
};

static void changes_make(const struct access_change *changes, unsigned count, struct change_undo *undo)
{
    for (unsigned i = 0; i < count; i++) {
        struct access_holder *holder = changes[i].holder;

        list_init(&undo[i].entries);
        undo[i].adopter = holder->adopter;
        holder_take_entries(holder, &undo[i].entries);
        for (unsigned j = 0; j < changes[i].count; j++) {
            entry_attach(entry_create(holder, &changes[i].claims[j]));
        }
        if (changes[i].set_adopter && !holder->contested) {
            holder_set_adopter(holder, changes[i].adopter);
        }
    }
}

static void changes_undo(struct access_ledger *ledger, const struct access_change *changes, unsigned count,
                         struct change_undo *undo)
{
    for (unsigned i = count; i-- > 0;) {
        struct access_holder *holder = changes[i].holder;
        struct list made = LIST_INIT(made);

        holder_take_entries(holder, &made);
        list_for_each_safe (link, &undo[i].entries) {
            struct ledger_entry *entry = container_of(link, struct ledger_entry, holder_link);

            list_remove(link);
            entry_attach(entry);
        }
        entries_free(&made, ledger);
        if (changes[i].set_adopter) {
            holder_set_adopter(holder, undo[i].adopter);
        }
    }
}

/* An edge has one adopter at most: a change may take it over only from nobody or from its own adopter. One that it may
 * not is marked, and stays where it is. */
static void changes_contest(const struct access_change *changes, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        const struct access_change *change = &changes[i];

        change->holder->contested = change->set_adopter && change->adopter && change->holder->adopter &&
                                    change->holder->adopter != change->adopter;
    }
}

static void changes_check(const struct access_change *changes, unsigned count, struct refusal *refusal)
{
    g_autoptr(GHashTable) seen = count > 1 ? g_hash_table_new(NULL, NULL) : NULL;

    for (unsigned i = 0; i < count; i++) {
        struct access_holder *owner = holder_owner(changes[i].holder);

        if (!changes[i].holder->contested && (!seen || g_hash_table_add(seen, owner))) {
            group_clashes(owner, refusal);
        }
    }
    for (unsigned i = 0; i < count; i++) {
        if (changes[i].holder->contested) {
            refusal_add_adopter(refusal, changes[i].holder, changes[i].adopter, changes[i].holder->adopter);
            changes[i].holder->contested = false;
        }
    }
}

static bool ledger_overridden(struct access_ledger *ledger, const struct refusal *refusal)
{
    return ledger->override && ledger->override(refusal_sentence(refusal), ledger->override_argument);
}

static const struct access_change *changes_arriving(const struct access_change *changes, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        if (changes[i].arrives) {
            return &changes[i];
        }
    }
    return NULL;
}

/* Makes the changes; keeps them only if `keep` and nothing clashes. */
static int changes_try(struct access_ledger *ledger, const char *subject, const struct access_change *changes,
                       unsigned count, bool keep, struct error **err)
{
    g_autofree struct change_undo *undo = g_new0(struct change_undo, count + 1);
    const struct access_change *arriving = changes_arriving(changes, count);
    struct access_ticket *asker = arriving ? queue_asker(ledger) : NULL;
    struct refusal *refusal;
    bool refused;

    if (asker && asker->closed) {
        return error_set(err, -ECANCELED, "%s was cancelled while it waited", subject);
    }
    refusal = refusal_create(subject,
                             arriving     ? arriving->holder
                             : count == 1 ? changes->holder
                                          : NULL,
                             arriving != NULL);
    if (!err && !asker && !(keep && ledger->override)) {
        refusal_set_silent(refusal);
    }
    if (asker && keep) {
        queue_asked(asker, changes, count, refusal);
    }
    changes_contest(changes, count);
    changes_make(changes, count, undo);
    changes_check(changes, count, refusal);
    if (arriving) {
        queue_check(ledger, asker, changes, count, refusal);
    }
    refused = refusal_count(refusal) && !(keep && ledger_overridden(ledger, refusal));
    if (!keep || refused) {
        changes_undo(ledger, changes, count, undo);
        ledger->refusals += refused && keep;
        if (refused && keep && asker) {
            queue_refused(asker, refusal_is_for_good(refusal));
        }
        return refusal_finish(refusal, err);
    }
    refusal_tolerate(refusal);
    for (unsigned i = 0; i < count; i++) {
        entries_free(&undo[i].entries, ledger);
    }
    refusal_finish(refusal, NULL);
    if (asker) {
        queue_granted(asker);
    }
    ledger_changed(ledger);
    return 0;
}

void access_set_filter(struct access_ledger *ledger,
                       void (*filter)(const struct access_holder *holder, struct access_claim *claim, void *argument),
                       void *argument)
{
    ledger->filter = filter;
    ledger->filter_argument = argument;
}

void access_set_changed(struct access_ledger *ledger, void (*changed)(void *argument), void *argument)
{
    ledger->changed = changed;
    ledger->changed_argument = argument;
}

void access_set_describe_node(struct access_ledger *ledger, char *(*describe)(const char *node, void *argument),
                              void *argument)
{
    ledger->describe_node = describe;
    ledger->describe_argument = argument;
}

void access_set_override(struct access_ledger *ledger, bool (*override)(const char *sentence, void *argument),
                         void *argument)
{
    ledger->override = override;
    ledger->override_argument = argument;
}

int access_apply(struct access_ledger *ledger, const char *subject, const struct access_change *changes, unsigned count,
                 struct error **err)
{
    return changes_try(ledger, subject, changes, count, true, err);
}

int access_test(struct access_ledger *ledger, const char *subject, const struct access_change *changes, unsigned count,
                struct error **err)
{
    return changes_try(ledger, subject, changes, count, false, err);
}

/* --- stale nodes, masks --- */

void access_mark_stale(struct access_ledger *ledger, const char *name, const char *reason)
{
    struct ledger_node *node = node_get(ledger, name);

    g_free(node->stale_reason);
    node->stale_reason = g_strdup(reason);
    ledger_changed(ledger);
}

void access_clear_stale(struct access_ledger *ledger, const char *name)
{
    struct ledger_node *node = g_hash_table_lookup(ledger->nodes, name);

    if (node) {
        g_clear_pointer(&node->stale_reason, g_free);
        node_put(ledger, node);
        ledger_changed(ledger);
    }
}

const char *access_stale_reason(struct access_ledger *ledger, const char *name)
{
    struct ledger_node *node = g_hash_table_lookup(ledger->nodes, name);

    return node ? node->stale_reason : NULL;
}

void access_node_masks(struct access_ledger *ledger, const char *name, unsigned *ret_require, unsigned *ret_deny)
{
    struct ledger_node *node = g_hash_table_lookup(ledger->nodes, name);

    *ret_require = node ? node->required_mask & ACCESS_ALL : 0;
    *ret_deny = node ? node->denied_mask & ACCESS_ALL : 0;
    if (node && (node->required_mask & 1u << TRACK_WRITE_DATA_BY_EXPORT)) {
        *ret_require |= ACCESS_WRITE_DATA;
    }
    if (node && (node->denied_mask & 1u << TRACK_WRITE_METADATA_OUTSIDE)) {
        *ret_deny |= ACCESS_WRITE_METADATA;
    }
}

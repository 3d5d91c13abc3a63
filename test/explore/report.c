/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The report. A refusal without a seen harm is not an accident but a price, and each kind of them has its reason here:
 * a kind is the two operations and how their images lie to each other, four signs:
 *
 *   upper image of the first to the upper of the second, upper to lower, lower to upper, lower to lower;
 *   '=' the same, '>' above, '<' below, '|' beside, '.' there is no such image, '?' in a reason: whatever
 *
 * 1. A kind that was found without a reason fails the run: either the rule is too strict, or somebody has to say why.
 */
#include "test/explore/report.h"
#include <glib.h>
#include <stdio.h>
#include <string.h>

struct reason {
    const char *first, *second; /* kinds of moves, "active commit" for one of a leaf */
    const char *relation;
    const char *text;
};

static const struct reason reasons[] = {
    {"commit", "commit",
     "=><=", "the same commit twice: the second would find its work done; its user is told at once"},
    {"commit", "commit", "<><>",
     "one commit inside the other's range: the outer one moves the same data and makes the inner one's base stale"},
    {"commit", "commit", "><<>", "the same, seen from the outer one"},
    {"commit", "active commit", "<><>",
     "one commit inside the other's range: the outer one moves the same data and makes the inner one's base stale"},
    {"active commit", "commit", "><<>", "the same, seen from the outer one"},
    {"active commit", "active commit",
     "=><=", "the same commit twice: the second would find its work done; its user is told at once"},
    {"stream", "stream", "<><<",
     "the lower one cuts off what the upper one is to lean on: few schedules show the harm, for it takes data there "
     "that "
     "zeroes between hide"},
    {"commit", "stream", "=><>",
     "the stream would cut the commit's base off under it: that is harmless only with nothing between, or when all is "
     "copied"},
    {"active commit", "stream", "=><>",
     "the stream would cut the commit's base off under it: that is harmless only with nothing between, or when all is "
     "copied"},
    {"commit", "stream", ">><>",
     "the stream would cut the commit's base off under it: what the commit has not copied yet is copied whole only by "
     "luck"},
    {"active commit", "stream", ">><>",
     "the stream would cut the commit's base off under it: what the commit has not copied yet is copied whole only by "
     "luck"},
    {"commit", "resize", ">.=.",
     "base gets top's size once, and then top's content: a size asked for in between would be that of an image that is "
     "half-written"},
    {"active commit", "resize", ">.=.",
     "base gets top's size once, and then top's content: a size asked for in between would be that of an image that is "
     "half-written"},
    {"commit", "resize", ">.<.",
     "an image between ends stale: what is done to it is lost, and whoever asks for it should know"},
    {"active commit", "resize", ">.<.",
     "an image between ends stale: what is done to it is lost, and whoever asks for it should know"},
    {"commit", "cbf", "<.<.",
     "the commit will write this header at its end, and what the name was chosen for will be stale"},
    {"commit", "cbf", "=.<.", "the header of top or of an image between is that of an image that ends stale"},
    {"commit", "cbf", ">.<.", "the header of top or of an image between is that of an image that ends stale"},
    {"active commit", "cbf", "=.<.", "the header of top or of an image between is that of an image that ends stale"},
    {"active commit", "cbf", ">.<.", "the header of top or of an image between is that of an image that ends stale"},
    {"commit", "snapshot", ">.<.", "an image between ends stale, and so would the overlay over it"},
    {"active commit", "snapshot", ">.<.", "an image between ends stale, and so would the overlay over it"},
    {"commit", "snapshot", ">.=.",
     "base is half-written until the commit's end: what a snapshot is to keep is not there, and the overlay would end "
     "stale"},
    {"active commit", "snapshot", ">.=.",
     "base is half-written until the commit's end: what a snapshot is to keep is not there, and the overlay would end "
     "stale"},
    {"replace", "cbf", "<...",
     "the mirror will write this header at its end, and what the name was chosen for will be left"},
    {"stream", "cbf", "=.<.", "the stream will write this header at its end: the name would not last"},
    {"stream", "cbf", "=...", "the stream will write this header at its end: the name would not last"},
};

/* --- kinds --- */

static char sign_of(const struct topology *topology, int one, int other)
{
    if (one == other) {
        return '=';
    }
    if (topology_is_above(topology, one, other)) {
        return '>';
    }
    return topology_is_above(topology, other, one) ? '<' : '|';
}

static void relation_of(const struct topology *topology, const struct move *one, const struct move *other,
                        char relation[5])
{
    bool one_pair = one->kind->pair, other_pair = other->kind->pair;
    relation[0] = sign_of(topology, one->upper, other->upper);
    relation[1] = other_pair ? sign_of(topology, one->upper, other->lower) : '.';
    relation[2] = one_pair ? sign_of(topology, one->lower, other->upper) : '.';
    relation[3] = one_pair && other_pair ? sign_of(topology, one->lower, other->lower) : '.';
    relation[4] = '\0';
}

static char *kind_name(const struct topology *topology, const struct move *move)
{
    bool active = strcmp(move->kind->name, "commit") == 0 && topology_is_leaf(topology, move->upper);
    return g_strdup_printf("%s%s", active ? "active " : "", move->kind->name);
}

static char *kind_of(const struct exploration *exploration, unsigned first, unsigned second)
{
    const struct topology *topology = exploration->topology;
    const struct move *one = &exploration->moves[first], *other = &exploration->moves[second];
    g_autofree char *one_name = kind_name(topology, one), *other_name = kind_name(topology, other);
    char relation[5];
    relation_of(topology, one, other, relation);
    return g_strdup_printf("%s|%s|%s", one_name, other_name, relation);
}

static bool fits(const char *pattern, const char *relation)
{
    for (unsigned i = 0; i < 4; i++) {
        if (pattern[i] != '?' && pattern[i] != relation[i]) {
            return false;
        }
    }
    return true;
}

static const char *reason_for(const char *kind)
{
    g_auto(GStrv) parts = g_strsplit(kind, "|", 3);
    for (unsigned i = 0; i < G_N_ELEMENTS(reasons); i++) {
        const struct reason *reason = &reasons[i];
        if (strcmp(reason->first, parts[0]) == 0 && strcmp(reason->second, parts[1]) == 0 &&
            fits(reason->relation, parts[2])) {
            return reason->text;
        }
    }
    return NULL;
}

/* --- the report --- */

struct tally {
    unsigned admitted, refused, explained, safe, other;
    uint64_t runs;
};

static void tally_add(struct tally *tally, const struct cell *cell)
{
    tally->admitted += cell->verdict == VERDICT_ADMITTED;
    tally->refused += cell->verdict == VERDICT_REFUSED;
    tally->explained += cell->verdict == VERDICT_REFUSED && cell->finding;
    tally->safe += cell->verdict == VERDICT_REFUSED && !cell->finding && cell->runs;
    tally->other += cell->verdict == VERDICT_INVALID;
    tally->runs += cell->runs;
}

static void tally_print(const struct tally *tally, const char *what, json_t *figures)
{
    printf("  %-8s %4u admitted, %4u refused: %4u justified, %3u without harm seen; %u schedules\n", what,
           tally->admitted, tally->refused, tally->explained, tally->safe, (unsigned)tally->runs);
    if (figures) {
        json_object_set_new(figures, what,
                            json_pack("{s:i, s:i, s:i, s:i, s:I}", "admitted", (int)tally->admitted, "refused",
                                      (int)tally->refused, "justified", (int)tally->explained, "safe-but-refused",
                                      (int)tally->safe, "schedules", (json_int_t)tally->runs));
    }
}

/* kind -> the pairs of it, as text */
static GHashTable *collect_kinds(const struct exploration *exploration, struct tally *tally)
{
    GHashTable *kinds = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
    for (unsigned i = 0; i < exploration->count; i++) {
        for (unsigned j = i; j < exploration->count; j++) {
            const struct cell *cell = exploration_pair(exploration, i, j);
            tally_add(tally, cell);
            if (cell->verdict == VERDICT_REFUSED && !cell->finding && cell->runs) {
                char *kind = kind_of(exploration, i, j);
                const char *before = g_hash_table_lookup(kinds, kind);
                char *pairs = g_strdup_printf("%s%s%s + %s", before ? before : "", before ? "; " : "",
                                              exploration->moves[i].name, exploration->moves[j].name);
                g_hash_table_replace(kinds, kind, pairs);
            }
        }
    }
    return kinds;
}

static unsigned print_kinds(GHashTable *kinds)
{
    GList *names = g_list_sort(g_hash_table_get_keys(kinds), (GCompareFunc)strcmp);
    unsigned unknown = 0;
    for (GList *name = names; name; name = name->next) {
        const char *reason = reason_for(name->data);
        printf("  %s  %s\n      %s\n", (const char *)name->data, (const char *)g_hash_table_lookup(kinds, name->data),
               reason ? reason : "NO REASON IS WRITTEN");
        unknown += reason == NULL;
    }
    g_list_free(names);
    return unknown;
}

unsigned report_print(const struct exploration *exploration, json_t *figures)
{
    struct tally singles = {0}, pairs = {0};
    GHashTable *kinds = collect_kinds(exploration, &pairs);
    for (unsigned i = 0; i < exploration->count; i++) {
        tally_add(&singles, &exploration->singles[i]);
    }
    printf("%s: %s\n", exploration->topology->name, exploration->topology->picture);
    tally_print(&singles, "singles", figures);
    tally_print(&pairs, "pairs", figures);
    if (exploration->triples_run) {
        printf("  triples  %u run, %u of them with all three admitted\n", (unsigned)exploration->triples_run,
               (unsigned)exploration->triples_admitted);
    }
    unsigned unknown = print_kinds(kinds);
    g_hash_table_destroy(kinds);
    return unknown;
}

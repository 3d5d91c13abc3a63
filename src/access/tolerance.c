/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Tolerance: which holders may stand side by side although their claims clash, because a human has overridden the
 * refusal (access_set_override()). Without it a later derivation of claims would find the old clash again and refuse
 * whatever change it came with, even the one that ends the overlap.
 *
 * 1. Tolerance is between two holders, symmetric, and lasts until one of them ends; it covers every claim of the two.
 * 2. What an adopter is tolerated for its adopted edges are, and the other way round; when it lets an edge go, the edge
 *    keeps its tolerances. An edge that moves hands its own on.
 * 3. ledger->tolerances counts the sets that exist: 0 (always, without --allow-override) keeps decisions on the masks.
 *
 * It decides nothing: ledger.c asks, and refusal.c knows the pairs.
 */
#include "access/ledger_private.h"

static void holder_tolerate(struct access_holder *holder, struct access_holder *other)
{
    if (!holder->tolerated) {
        holder->tolerated = g_hash_table_new(NULL, NULL);
        holder->ledger->tolerances++;
    }
    g_hash_table_add(holder->tolerated, other);
}

void ledger_tolerate(struct access_holder *a, struct access_holder *b)
{
    if (a != b) {
        holder_tolerate(a, b);
        holder_tolerate(b, a);
    }
}

void ledger_tolerate_stale(struct access_holder *holder, const char *node)
{
    if (!holder->tolerated_stale) {
        holder->tolerated_stale = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
        holder->ledger->tolerances++;
    }
    g_hash_table_add(holder->tolerated_stale, g_strdup(node));
}

static bool holder_tolerates(const struct access_holder *a, const struct access_holder *b)
{
    return a->tolerated && g_hash_table_contains(a->tolerated, b);
}

bool ledger_tolerates(const struct access_holder *a, const struct access_holder *b)
{
    const struct access_holder *a_owner = a->adopter ? a->adopter : a, *b_owner = b->adopter ? b->adopter : b;

    if (a_owner == b_owner || a->contested || b->contested) {
        return true;
    }
    return a->ledger->tolerances && (holder_tolerates(a, b) || holder_tolerates(a_owner, b) ||
                                     holder_tolerates(a, b_owner) || holder_tolerates(a_owner, b_owner));
}

bool ledger_tolerates_stale(const struct ledger_entry *entry)
{
    const struct access_holder *holder = entry->holder;

    return holder->tolerated_stale && g_hash_table_contains(holder->tolerated_stale, entry->node->name);
}

void access_holder_inherit(struct access_holder *heir, const struct access_holder *holder)
{
    GHashTableIter iter;
    void *key;

    if (holder->tolerated) {
        g_hash_table_iter_init(&iter, holder->tolerated);
        while (g_hash_table_iter_next(&iter, &key, NULL)) {
            ledger_tolerate(heir, key);
        }
    }
    if (holder->tolerated_stale) {
        g_hash_table_iter_init(&iter, holder->tolerated_stale);
        while (g_hash_table_iter_next(&iter, &key, NULL)) {
            ledger_tolerate_stale(heir, key);
        }
    }
}

void ledger_forget_tolerances(struct access_holder *holder)
{
    GHashTableIter iter;
    void *key;

    if (holder->tolerated) {
        g_hash_table_iter_init(&iter, holder->tolerated);
        while (g_hash_table_iter_next(&iter, &key, NULL)) {
            g_hash_table_remove(((struct access_holder *)key)->tolerated, holder);
        }
        g_hash_table_destroy(holder->tolerated);
        holder->ledger->tolerances--;
    }
    if (holder->tolerated_stale) {
        g_hash_table_destroy(holder->tolerated_stale);
        holder->ledger->tolerances--;
    }
}

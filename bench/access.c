/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a decision of Node Access Control costs: nanoseconds per decision, one line each, in a ledger of N nodes (chains
 * of ten images, each edge a holder with its standing claims) and M operations (exports and commits) that hold claims.
 *
 *   bench-access [NODES [OPERATIONS]]      1000 and 100 if not said
 *
 * 1. "export": one claim on one node. "commit": top, what is between, base and the overlay, and three edges adopted
 *    from their own standing claims, all in one step. "refused": the same export where a job denies it; explained: with
 * its sentences and data, which is what a client gets.
 * 2. taken: the claims are taken and given back; asked: the verdict alone.
 * Not a test; the figure to look at is that it does not grow with the ledger.
 */
#include "access/access.h"
#include "loop/loop.h"
#include <glib.h>
#include <stdio.h>
#include <stdlib.h>

#define CHAIN 10
#define ROUNDS 200000

static struct access_ledger *ledger;
static char **names;
static struct access_holder **edges; /* [i]: node i+1 -> node i, or NULL at the top of a chain */
static struct access_claim *edge_claims;

static struct access_holder *holder(const char *kind, const char *command, unsigned number)
{
    g_autofree char *id = g_strdup_printf("%s%u", kind, number);
    return access_holder_create(ledger, kind, id, command, NULL, NULL);
}

static void make_nodes(unsigned count)
{
    names = g_new0(char *, count + 1);
    edges = g_new0(struct access_holder *, count + 1);
    edge_claims = g_new0(struct access_claim, count + 1);
    for (unsigned i = 0; i < count; i++) {
        names[i] = g_strdup_printf("disk%u-layer%u", i / CHAIN, i % CHAIN);
    }
    for (unsigned i = 0; i + 1 < count; i++) {
        if ((i + 1) % CHAIN == 0) {
            continue;
        }
        edges[i] = holder("edge", "backing", i);
        edge_claims[i] = (struct access_claim){.node = names[i],
                                               .require = ACCESS_READ_DATA | ACCESS_READ_METADATA,
                                               .deny = ACCESS_WRITE_DATA | ACCESS_WRITE_BENEATH,
                                               .path = "backing edge"};
        struct access_change change = {.holder = edges[i], .claims = &edge_claims[i], .count = 1};
        g_assert(access_apply(ledger, "edge", &change, 1, NULL) == 0);
    }
}

static struct access_claim export_claim(unsigned node)
{
    return (struct access_claim){.node = names[node],
                                 .require = ACCESS_READ_DATA | ACCESS_WRITE_DATA,
                                 .deny = ACCESS_WRITE_BENEATH | ACCESS_WRITE_DATA,
                                 .modifiers = ACCESS_BY_EXPORT | ACCESS_EXCEPT_EXPORTS,
                                 .path = "node"};
}

/* commit of layer 3 into layer 0 of the chain that begins at `first`: 5 claims, 3 adopted edges. */
struct commit_set {
    struct access_claim claims[5];
    struct access_change changes[4];
};

static void commit_fill(struct commit_set *set, struct access_holder *job, unsigned first)
{
    const unsigned frozen = ACCESS_WRITE_BENEATH | ACCESS_ATTRIBUTES | ACCESS_GRAPH | ACCESS_WRITE_DATA;
    set->claims[0] = (struct access_claim){
        names[first], ACCESS_WRITE_DATA | ACCESS_ATTRIBUTES,
        ACCESS_READ_DATA | ACCESS_WRITE_DATA | ACCESS_WRITE_BENEATH | ACCESS_ATTRIBUTES, 0, "base"};
    set->claims[1] = (struct access_claim){names[first + 1], ACCESS_WRITE_BENEATH, ACCESS_ALL, 0, "between"};
    set->claims[2] = (struct access_claim){names[first + 2], ACCESS_WRITE_BENEATH, ACCESS_ALL, 0, "between"};
    set->claims[3] = (struct access_claim){names[first + 3], ACCESS_READ_DATA, frozen, 0, "top"};
    set->claims[4] = (struct access_claim){names[first + 4], ACCESS_GRAPH, 0, 0, "overlays"};
    set->changes[0] = (struct access_change){.holder = job, .claims = set->claims, .count = 5};
    for (unsigned i = 0; i < 3; i++) {
        set->changes[i + 1] = (struct access_change){.holder = edges[first + i],
                                                     .claims = &edge_claims[first + i],
                                                     .count = 1,
                                                     .set_adopter = true,
                                                     .adopter = job};
    }
}

static void report(const char *what, int64_t start_ns, unsigned rounds)
{
    printf("%-36s %8.0f ns\n", what, (double)(loop_clock_ns() - start_ns) / rounds);
}

static void measure_export(unsigned node)
{
    struct access_holder *export = holder("export", "block-export-add", 999999);
    struct access_claim claim = export_claim(node);
    struct access_change take = {.holder = export, .claims = &claim, .count = 1}, give = {.holder = export};
    int64_t start = loop_clock_ns();

    for (unsigned i = 0; i < ROUNDS; i++) {
        g_assert(access_test(ledger, "export", &take, 1, NULL) == 0);
    }
    report("export, asked", start, ROUNDS);
    start = loop_clock_ns();
    for (unsigned i = 0; i < ROUNDS; i++) {
        g_assert(access_apply(ledger, "export", &take, 1, NULL) == 0);
        g_assert(access_apply(ledger, "export", &give, 1, NULL) == 0);
    }
    report("export, taken and given back", start, ROUNDS);
    access_holder_destroy(export);
}

static void measure_commit(unsigned first)
{
    struct access_holder *job = holder("job", "block-commit", 999999);
    struct commit_set take, give;
    int64_t start = loop_clock_ns();

    commit_fill(&take, job, first);
    give = take;
    give.changes[0].count = 0;
    for (unsigned i = 1; i < 4; i++) {
        give.changes[i].adopter = NULL;
    }
    for (unsigned i = 0; i < ROUNDS; i++) {
        g_assert(access_test(ledger, "commit", take.changes, 4, NULL) == 0);
    }
    report("commit, asked", start, ROUNDS);
    start = loop_clock_ns();
    for (unsigned i = 0; i < ROUNDS; i++) {
        g_assert(access_apply(ledger, "commit", take.changes, 4, NULL) == 0);
        g_assert(access_apply(ledger, "commit", give.changes, 4, NULL) == 0);
    }
    report("commit, taken and given back", start, ROUNDS);
    g_assert(access_apply(ledger, "commit", take.changes, 4, NULL) == 0);
    struct access_holder *export = holder("export", "block-export-add", 999998);
    struct access_claim claim = export_claim(first);
    struct access_change refused = {.holder = export, .claims = &claim, .count = 1};
    start = loop_clock_ns();
    for (unsigned i = 0; i < ROUNDS / 10; i++) {
        auto_error error = NULL;
        g_assert(access_test(ledger, "export", &refused, 1, &error) < 0);
    }
    report("export, refused and explained", start, ROUNDS / 10);
    start = loop_clock_ns();
    for (unsigned i = 0; i < ROUNDS; i++) {
        g_assert(access_test(ledger, "export", &refused, 1, NULL) < 0);
    }
    report("export, refused, not explained", start, ROUNDS);
    access_holder_destroy(export);
    access_holder_destroy(job);
}

/* Half of the operations are exports of the top of a chain, half commits in the middle of one. */
static struct access_holder **hold(unsigned operations, unsigned nodes)
{
    struct access_holder **held = g_new0(struct access_holder *, operations);
    unsigned chains = nodes / CHAIN - 1;

    for (unsigned i = 0; i < operations; i++) {
        unsigned first = i / 2 % chains * CHAIN;
        if (i % 2 == 0) {
            held[i] = holder("export", "block-export-add", i);
            struct access_claim claim = export_claim(first + CHAIN - 1);
            struct access_change change = {.holder = held[i], .claims = &claim, .count = 1};
            g_assert(access_apply(ledger, "export", &change, 1, NULL) == 0);
        } else if (i / 2 < chains) {
            held[i] = holder("job", "block-commit", i);
            struct commit_set set;
            commit_fill(&set, held[i], first + 2);
            g_assert(access_apply(ledger, "commit", set.changes, 4, NULL) == 0);
        }
    }
    return held;
}

int main(int argc, char **argv)
{
    unsigned nodes = argc > 1 ? (unsigned)atoi(argv[1]) : 1000, operations = argc > 2 ? (unsigned)atoi(argv[2]) : 100;

    if (nodes < 2 * CHAIN || nodes % CHAIN) {
        fprintf(stderr, "NODES: a multiple of %u, at least %u\n", CHAIN, 2 * CHAIN);
        return 2;
    }
    printf("%u nodes, %u operations\n", nodes, operations);
    ledger = access_ledger_create();
    make_nodes(nodes);
    struct access_holder **held = hold(operations, nodes);
    measure_export(nodes - 1);
    measure_commit(nodes - CHAIN);
    for (unsigned i = 0; i < operations; i++) {
        access_holder_destroy(held[i]);
    }
    for (unsigned i = 0; i < nodes; i++) {
        access_holder_destroy(edges[i]);
        g_free(names[i]);
    }
    g_free(held);
    g_free(edges);
    g_free(edge_claims);
    g_free(names);
    access_ledger_destroy(ledger);
    return 0;
}

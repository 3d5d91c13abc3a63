/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The laws of the ledger: symmetric verdicts, all or nothing, adoption, the modifiers, stale nodes, and refusals that
 * name both parties. The random test compares every verdict with a plain pairwise definition of conflict.
 */
#include "access/access.h"
#include <glib.h>
#include <string.h>

#define R ACCESS_READ_DATA
#define W ACCESS_WRITE_DATA
#define M ACCESS_WRITE_METADATA

static struct access_holder *holder(struct access_ledger *ledger, const char *kind, const char *id)
{
    return access_holder_create(ledger, kind, id, "test-command", NULL, NULL);
}

static int claim_one(struct access_holder *holder, struct access_ledger *ledger, struct access_claim claim,
                     struct error **err)
{
    struct access_change change = {.holder = holder, .claims = &claim, .count = 1, .arrives = true};

    return access_apply(ledger, access_holder_id(holder), &change, 1, err);
}

static void test_conflict_explained(void)
{
    struct access_ledger *ledger = access_ledger_create();
    struct access_holder *backup = holder(ledger, "job", "j1"), *commit = holder(ledger, "job", "j2");
    auto_error err = NULL;

    g_assert_cmpint(claim_one(backup, ledger, (struct access_claim){"base", R, W, 0, "node"}, &err), ==, 0);
    g_assert_cmpint(claim_one(commit, ledger, (struct access_claim){"base", W, 0, 0, "base"}, &err), <, 0);
    g_assert_nonnull(strstr(err->message, "j2 needs write-data on node 'base', which test-command j1"));
    g_assert_cmpstr(err->hint, ==, "wait for it, cancel it, or pass on-conflict=wait");
    g_assert_cmpstr(json_string_value(json_object_get(err->data, "operation")), ==, "test-command");
    g_assert_cmpstr(json_string_value(json_object_get(err->data, "id")), ==, "j2");
    g_assert_cmpint((int)json_array_size(json_object_get(err->data, "conflicts")), ==, 1);
    access_holder_destroy(backup);
    g_assert_cmpint(claim_one(commit, ledger, (struct access_claim){"base", W, 0, 0, "base"}, NULL), ==, 0);
    access_holder_destroy(commit);
    access_ledger_destroy(ledger);
}

static void test_refused_changes_nothing(void)
{
    struct access_ledger *ledger = access_ledger_create();
    struct access_holder *a = holder(ledger, "job", "a"), *b = holder(ledger, "job", "b");
    struct access_claim two[] = {{"x", R, 0, 0, ""}, {"y", W, 0, 0, ""}};
    struct access_change change = {.holder = b, .claims = two, .count = 2};
    unsigned require, deny;

    g_assert_cmpint(claim_one(a, ledger, (struct access_claim){"y", R, W, 0, ""}, NULL), ==, 0);
    g_assert_cmpint(claim_one(b, ledger, (struct access_claim){"z", M, R, 0, ""}, NULL), ==, 0);
    g_assert_cmpint(access_apply(ledger, "b", &change, 1, NULL), ==, -16);
    access_node_masks(ledger, "x", &require, &deny);
    g_assert_cmpuint(require | deny, ==, 0);
    access_node_masks(ledger, "z", &require, &deny);
    g_assert_cmpuint(require, ==, M);
    g_assert_cmpuint(deny, ==, R);
    access_holder_destroy(a);
    g_assert_cmpint(access_test(ledger, "b", &change, 1, NULL), ==, 0);
    access_node_masks(ledger, "x", &require, &deny);
    g_assert_cmpuint(require | deny, ==, 0);
    access_holder_destroy(b);
    access_ledger_destroy(ledger);
}

static void test_adoption(void)
{
    struct access_ledger *ledger = access_ledger_create();
    struct access_holder *edge = holder(ledger, "edge", "a -> base (backing)");
    struct access_holder *sibling = holder(ledger, "edge", "s -> base (backing)");
    struct access_holder *commit = holder(ledger, "job", "j"), *other = holder(ledger, "job", "k");
    struct access_claim standing = {"base", R, W, 0, "backing"}, write = {"base", W, R, 0, "base"};
    struct access_change adopt[] = {
        {.holder = commit, .claims = &write, .count = 1},
        {.holder = edge, .claims = &standing, .count = 1, .set_adopter = true, .adopter = commit}};
    auto_error err = NULL;

    g_assert_cmpint(claim_one(edge, ledger, standing, NULL), ==, 0);
    g_assert_cmpint(claim_one(commit, ledger, write, NULL), <, 0);
    g_assert_cmpint(claim_one(sibling, ledger, standing, NULL), ==, 0);
    g_assert_cmpint(access_apply(ledger, "j", adopt, 2, &err), <, 0);
    g_assert_nonnull(strstr(err->message, "s -> base"));
    g_clear_pointer(&err, error_free);
    access_holder_destroy(sibling);
    g_assert_cmpint(access_apply(ledger, "j", adopt, 2, NULL), ==, 0);
    adopt[0].holder = other;
    adopt[0].count = 0;
    adopt[1].adopter = other;
    g_assert_cmpint(access_apply(ledger, "k", adopt, 2, &err), <, 0);
    g_assert_nonnull(strstr(err->message, "needs the edge a -> base (backing), which test-command j (running since"));
    g_clear_pointer(&err, error_free);
    /* Who stumbles over an adopted edge hears of its adopter. */
    g_assert_cmpint(claim_one(other, ledger, (struct access_claim){"base", W, 0, 0, "node"}, &err), <, 0);
    g_assert_nonnull(strstr(err->message, "the edge a -> base (backing), in the hands of test-command j (running"));
    access_holder_destroy(other);
    access_holder_destroy(commit);
    access_holder_destroy(edge);
    access_ledger_destroy(ledger);
}

static void test_exports_share(void)
{
    struct access_ledger *ledger = access_ledger_create();
    struct access_holder *e1 = holder(ledger, "export", "e1"), *e2 = holder(ledger, "export", "e2");
    struct access_holder *job = holder(ledger, "job", "j");
    struct access_claim share = {"n", R | W, W, ACCESS_BY_EXPORT | ACCESS_EXCEPT_EXPORTS, ""};
    struct access_claim exclusive = {"n", R | W, W, ACCESS_BY_EXPORT, ""};

    g_assert_cmpint(claim_one(e1, ledger, share, NULL), ==, 0);
    g_assert_cmpint(claim_one(e2, ledger, share, NULL), ==, 0);
    g_assert_cmpint(claim_one(e2, ledger, exclusive, NULL), <, 0);
    g_assert_cmpint(claim_one(job, ledger, (struct access_claim){"n", W, 0, 0, ""}, NULL), <, 0);
    g_assert_cmpint(claim_one(job, ledger, (struct access_claim){"n", R, 0, 0, ""}, NULL), ==, 0);
    access_holder_destroy(job);
    access_holder_destroy(e1);
    access_holder_destroy(e2);
    access_ledger_destroy(ledger);
}

static void test_from_inside(void)
{
    struct access_ledger *ledger = access_ledger_create();
    struct access_holder *outer = holder(ledger, "job", "outer"), *inner = holder(ledger, "job", "inner");
    struct access_claim range[] = {{"c", 0, M, ACCESS_EXCEPT_INSIDE, "range"},
                                   {"b", 0, M, ACCESS_EXCEPT_INSIDE, "range"}};
    struct access_change change = {.holder = outer, .claims = range, .count = 2};
    const char *inside[] = {"b"}, *outside[] = {"b", "a"};

    g_assert_cmpint(access_apply(ledger, "outer", &change, 1, NULL), ==, 0);
    access_holder_set_sources(inner, outside, 2);
    g_assert_cmpint(claim_one(inner, ledger, (struct access_claim){"c", M, 0, 0, "top"}, NULL), <, 0);
    access_holder_set_sources(inner, inside, 1);
    g_assert_cmpint(claim_one(inner, ledger, (struct access_claim){"c", M, 0, 0, "top"}, NULL), ==, 0);
    access_holder_set_sources(inner, NULL, 0);
    g_assert_cmpint(claim_one(inner, ledger, (struct access_claim){"c", M, 0, 0, "top"}, NULL), <, 0);
    access_holder_set_sources(inner, inside, 0); /* its range has become empty: nothing comes from anywhere */
    g_assert_cmpint(claim_one(inner, ledger, (struct access_claim){"c", M, 0, 0, "top"}, NULL), ==, 0);
    access_holder_destroy(inner);
    access_holder_destroy(outer);
    access_ledger_destroy(ledger);
}

static bool count_and_allow(const char *sentence, void *argument)
{
    g_assert_nonnull(strstr(sentence, "node 'n'"));
    return ++*(unsigned *)argument > 1;
}

/* What was let pass stays: the two may claim again, whoever asks, and nobody else profits. */
static void test_override(void)
{
    struct access_ledger *ledger = access_ledger_create();
    struct access_holder *first = holder(ledger, "job", "first"), *second = holder(ledger, "job", "second");
    struct access_holder *third = holder(ledger, "job", "third");
    struct access_claim write = {"n", W, 0, 0, ""};
    unsigned asked = 0;

    g_assert_cmpint(claim_one(first, ledger, (struct access_claim){"n", R, W, 0, ""}, NULL), ==, 0);
    access_set_override(ledger, count_and_allow, &asked);
    g_assert_cmpint(claim_one(second, ledger, write, NULL), <, 0);
    g_assert_cmpint(claim_one(second, ledger, write, NULL), ==, 0);
    g_assert_cmpuint(asked, ==, 2);
    access_set_override(ledger, NULL, NULL);
    g_assert_cmpint(claim_one(second, ledger, write, NULL), ==, 0);
    g_assert_cmpint(claim_one(first, ledger, (struct access_claim){"n", R, W, 0, ""}, NULL), ==, 0);
    g_assert_cmpint(claim_one(third, ledger, write, NULL), <, 0);
    access_holder_destroy(second);
    second = holder(ledger, "job", "second");
    g_assert_cmpint(claim_one(second, ledger, write, NULL), <, 0);
    access_holder_destroy(third);
    access_holder_destroy(second);
    access_holder_destroy(first);
    access_ledger_destroy(ledger);
}

static void drop_denials(const struct access_holder *holder, struct access_claim *claim, void *argument)
{
    g_assert_cmpstr(access_holder_command(holder), ==, "test-command");
    claim->deny = 0;
}

/* A rule that a test breaks on purpose is broken for whoever claims from then on. */
static void test_filter(void)
{
    struct access_ledger *ledger = access_ledger_create();
    struct access_holder *first = holder(ledger, "job", "first"), *second = holder(ledger, "job", "second");

    access_set_filter(ledger, drop_denials, NULL);
    g_assert_cmpint(claim_one(first, ledger, (struct access_claim){"n", R, W, 0, ""}, NULL), ==, 0);
    g_assert_cmpint(claim_one(second, ledger, (struct access_claim){"n", W, 0, 0, ""}, NULL), ==, 0);
    access_set_filter(ledger, NULL, NULL);
    g_assert_cmpint(claim_one(first, ledger, (struct access_claim){"n", R, W, 0, ""}, NULL), <, 0);
    access_holder_destroy(second);
    access_holder_destroy(first);
    access_ledger_destroy(ledger);
}

static bool allow(const char *sentence, void *argument)
{
    return true;
}

/* An edge whose adopter does not let go of it keeps him, and the one that was let in stands beside both. */
static void test_override_of_an_adopter(void)
{
    struct access_ledger *ledger = access_ledger_create();
    struct access_holder *edge = holder(ledger, "edge", "a -> base (backing)"), *moved;
    struct access_holder *one = holder(ledger, "job", "one"), *two = holder(ledger, "job", "two");
    struct access_claim standing = {"base", R, W, 0, "backing"}, write = {"base", W, W, 0, "base"};
    struct access_change adopt[] = {
        {.holder = one, .claims = &write, .count = 1, .arrives = true},
        {.holder = edge, .claims = &standing, .count = 1, .set_adopter = true, .adopter = one}};

    g_assert_cmpint(access_apply(ledger, "one", adopt, 2, NULL), ==, 0);
    adopt[0].holder = adopt[1].adopter = two;
    g_assert_cmpint(access_apply(ledger, "two", adopt, 2, NULL), <, 0);
    access_set_override(ledger, allow, NULL);
    g_assert_cmpint(access_apply(ledger, "two", adopt, 2, NULL), ==, 0);
    access_set_override(ledger, NULL, NULL);
    g_assert_true(access_holder_adopter(edge) == one);
    access_holder_destroy(one);
    g_assert_null(access_holder_adopter(edge));
    g_assert_cmpint(claim_one(two, ledger, write, NULL), ==, 0);
    moved = holder(ledger, "edge", "a -> base (backing)");
    access_holder_inherit(moved, edge);
    access_holder_destroy(edge);
    g_assert_cmpint(claim_one(moved, ledger, standing, NULL), ==, 0);
    access_holder_destroy(two);
    access_holder_destroy(moved);
    access_ledger_destroy(ledger);
}

/* An edge that was adopted by somebody tolerated stands beside the other when the adopter has gone. */
static void test_override_outlives_an_adopter(void)
{
    struct access_ledger *ledger = access_ledger_create();
    struct access_holder *edge = holder(ledger, "edge", "a -> base (backing)");
    struct access_holder *adopter = holder(ledger, "job", "adopter"), *writer = holder(ledger, "job", "writer");
    struct access_claim standing = {"base", R, W, 0, "backing"}, write = {"base", W, 0, 0, "base"};
    struct access_claim own = {"x", R, W, 0, "top"}, clash = {"x", W, 0, 0, "top"}, both[] = {write, clash};
    struct access_change adopt[] = {
        {.holder = adopter, .claims = &own, .count = 1, .arrives = true},
        {.holder = edge, .claims = &standing, .count = 1, .set_adopter = true, .adopter = adopter}};
    struct access_change more = {.holder = writer, .claims = both, .count = 2};

    g_assert_cmpint(access_apply(ledger, "adopter", adopt, 1, NULL), ==, 0);
    access_set_override(ledger, allow, NULL);
    g_assert_cmpint(claim_one(writer, ledger, clash, NULL), ==, 0);
    access_set_override(ledger, NULL, NULL);
    g_assert_cmpint(access_apply(ledger, "adopter", adopt, 2, NULL), ==, 0);
    g_assert_cmpint(access_apply(ledger, "writer", &more, 1, NULL), ==,
                    0); /* against the edge, in its adopter's name */
    access_holder_destroy(adopter);
    g_assert_cmpint(access_apply(ledger, "writer", &more, 1, NULL), ==, 0);
    access_holder_destroy(writer);
    access_holder_destroy(edge);
    access_ledger_destroy(ledger);
}

static void test_override_of_staleness(void)
{
    struct access_ledger *ledger = access_ledger_create();
    struct access_holder *reader = holder(ledger, "export", "e");
    struct access_claim read = {"t", R, 0, 0, "node"};

    access_mark_stale(ledger, "t", "it was committed to base by j");
    access_set_override(ledger, allow, NULL);
    g_assert_cmpint(claim_one(reader, ledger, read, NULL), ==, 0);
    access_set_override(ledger, NULL, NULL);
    g_assert_cmpint(claim_one(reader, ledger, read, NULL), ==, 0);
    access_holder_destroy(reader);
    access_clear_stale(ledger, "t");
    access_ledger_destroy(ledger);
}

/* Several claims of one holder on one node: taken, replaced and given back as one set. */
static void test_claims_on_one_node(void)
{
    struct access_ledger *ledger = access_ledger_create();
    struct access_holder *one = holder(ledger, "export", "e");
    struct access_claim claims[] = {{"n", R, 0, 0, "node"}, {"n", 0, W, 0, "node"}, {"n", M, 0, 0, "node"}};
    struct access_change change = {.holder = one, .claims = claims, .count = 3};
    unsigned require, deny;

    g_assert_cmpint(access_apply(ledger, "e", &change, 1, NULL), ==, 0);
    change.count = 2;
    g_assert_cmpint(access_apply(ledger, "e", &change, 1, NULL), ==, 0);
    access_node_masks(ledger, "n", &require, &deny);
    g_assert_cmpuint(require, ==, R);
    g_assert_cmpuint(deny, ==, W);
    access_holder_destroy(one);
    access_ledger_destroy(ledger);
}

static void test_stale(void)
{
    struct access_ledger *ledger = access_ledger_create();
    struct access_holder *reader = holder(ledger, "export", "e");
    auto_error err = NULL;

    access_mark_stale(ledger, "t", "it was committed to base by j");
    g_assert_cmpint(claim_one(reader, ledger, (struct access_claim){"t", R, 0, 0, "node"}, &err), <, 0);
    g_assert_nonnull(strstr(err->message, "committed to base by j"));
    g_assert_cmpint(claim_one(reader, ledger, (struct access_claim){"t", ACCESS_GRAPH, 0, 0, ""}, NULL), ==, 0);
    access_clear_stale(ledger, "t");
    g_assert_cmpint(claim_one(reader, ledger, (struct access_claim){"t", R, 0, 0, "node"}, NULL), ==, 0);
    access_holder_destroy(reader);
    access_ledger_destroy(ledger);
}

/* Random claim sets: the verdict is the pairwise definition's, and does not depend on the order. */
static void test_symmetric(void)
{
    static const char *const names[] = {"n0", "n1", "n2"};
    g_autoptr(GRand) random = g_rand_new_with_seed(20261121);

    for (unsigned round = 0; round < 20000; round++) {
        struct access_ledger *ledger = access_ledger_create();
        struct access_holder *one = holder(ledger, "job", "one"), *two = holder(ledger, "job", "two");
        struct access_claim a[3], b[3];
        bool clash = false, first;

        for (unsigned i = 0; i < 3; i++) {
            unsigned bits = g_rand_int(random) & g_rand_int(random) & g_rand_int(random);

            a[i] = (struct access_claim){names[i], bits & ACCESS_ALL, bits >> 7 & ACCESS_ALL, 0, ""};
            bits = g_rand_int(random) & g_rand_int(random) & g_rand_int(random);
            b[i] = (struct access_claim){names[i], bits & ACCESS_ALL, bits >> 7 & ACCESS_ALL, 0, ""};
            clash = clash || (a[i].require & b[i].deny) || (a[i].deny & b[i].require);
        }
        struct access_change ca = {.holder = one, .claims = a, .count = 3},
                             cb = {.holder = two, .claims = b, .count = 3};
        g_assert_cmpint(access_apply(ledger, "one", &ca, 1, NULL), ==, 0);
        first = access_apply(ledger, "two", &cb, 1, NULL) < 0;
        g_assert_cmpint(first, ==, clash);
        cb.count = 0;
        ca.count = 0;
        g_assert_cmpint(access_apply(ledger, "two", &cb, 1, NULL), ==, 0);
        g_assert_cmpint(access_apply(ledger, "one", &ca, 1, NULL), ==, 0);
        ca.count = cb.count = 3;
        g_assert_cmpint(access_apply(ledger, "two", &cb, 1, NULL), ==, 0);
        g_assert_cmpint(access_apply(ledger, "one", &ca, 1, NULL) < 0, ==, clash);
        access_holder_destroy(one);
        access_holder_destroy(two);
        access_ledger_destroy(ledger);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/access/conflict-is-explained", test_conflict_explained);
    g_test_add_func("/access/refused-changes-nothing", test_refused_changes_nothing);
    g_test_add_func("/access/adoption", test_adoption);
    g_test_add_func("/access/exports-share-among-themselves", test_exports_share);
    g_test_add_func("/access/from-inside", test_from_inside);
    g_test_add_func("/access/override", test_override);
    g_test_add_func("/access/filter", test_filter);
    g_test_add_func("/access/override-of-an-adopter", test_override_of_an_adopter);
    g_test_add_func("/access/override-outlives-an-adopter", test_override_outlives_an_adopter);
    g_test_add_func("/access/override-of-staleness", test_override_of_staleness);
    g_test_add_func("/access/claims-on-one-node", test_claims_on_one_node);
    g_test_add_func("/access/stale", test_stale);
    g_test_add_func("/access/verdict-is-symmetric", test_symmetric);
    return g_test_run();
}

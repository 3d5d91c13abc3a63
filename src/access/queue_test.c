/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The queue: order, fairness, whole sets, and who is behind whom. The last test runs random operations against a plain
 * model (an array of claim sets and an array of those that wait) and compares every verdict and every grant with it.
 */
#include "access/queue.h"
#include "base/list.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

#define R ACCESS_READ_DATA
#define W ACCESS_WRITE_DATA

static struct access_ticket *asking; /* whose turn it is to ask; NULL: somebody without a ticket */
static unsigned changes;

static struct access_ticket *who_asks(void *argument)
{
    return asking;
}

static void count_change(void *argument)
{
    changes++;
}

static struct access_ledger *ledger_open(void)
{
    struct access_ledger *ledger = access_ledger_create();

    access_set_asker(ledger, who_asks, NULL);
    access_set_changed(ledger, count_change, NULL);
    return ledger;
}

/* One operation that begins: a holder, if it is admitted. */
static struct access_holder *begin(struct access_ledger *ledger, struct access_ticket *ticket, const char *id,
                                   const struct access_claim *claims, unsigned count, struct error **err)
{
    struct access_holder *holder = access_holder_create(ledger, "job", id, "test-command", NULL, NULL);
    struct access_change change = {.holder = holder, .claims = claims, .count = count, .arrives = true};
    g_autofree char *subject = g_strdup_printf("test-command %s", id);

    asking = ticket;
    if (ticket) {
        access_ticket_try(ticket);
    }
    int code = access_apply(ledger, subject, &change, 1, err);
    asking = NULL;
    if (code < 0) {
        access_holder_destroy(holder);
        return NULL;
    }
    return holder;
}

static struct access_holder *begin_one(struct access_ledger *ledger, struct access_ticket *ticket, const char *id,
                                       const char *node, unsigned require, unsigned deny)
{
    struct access_claim claim = {node, require, deny, 0, "node"};

    return begin(ledger, ticket, id, &claim, 1, NULL);
}

/* "b: a; c: a b": who waits, in order, and behind whom. */
static char *queue_text(struct access_ledger *ledger)
{
    json_t *access = access_describe(ledger), *waiting, *id;
    GString *text = g_string_new(NULL);
    size_t index, other;

    json_array_foreach(json_object_get(access, "waiting"), index, waiting)
    {
        g_string_append_printf(text, "%s%s:", index ? "; " : "", json_string_value(json_object_get(waiting, "id")));
        json_array_foreach(json_object_get(waiting, "behind"), other, id)
        {
            g_string_append_printf(text, " %s", json_string_value(id));
        }
    }
    json_decref(access);
    return g_string_free(text, FALSE);
}

static void assert_queue(struct access_ledger *ledger, const char *expected)
{
    g_autofree char *text = queue_text(ledger);

    g_assert_cmpstr(text, ==, expected);
}

static void test_order(void)
{
    struct access_ledger *ledger = ledger_open();
    struct access_ticket *second = access_ticket_create(ledger, true), *third = access_ticket_create(ledger, true);
    struct access_holder *a = begin_one(ledger, NULL, "a", "n", W, W), *b, *c;

    g_assert_null(begin_one(ledger, second, "b", "n", W, W));
    g_assert_null(begin_one(ledger, third, "c", "n", W, W));
    g_assert_true(access_ticket_waits(second) && access_ticket_was_refused(second));
    assert_queue(ledger, "b: a; c: a b");
    access_holder_destroy(a);
    assert_queue(ledger, "b:; c: b");
    g_assert_null(begin_one(ledger, third, "c", "n", W, W)); /* whoever wakes first: b was there before */
    assert_queue(ledger, "b:; c: b");
    b = begin_one(ledger, second, "b", "n", W, W);
    g_assert_nonnull(b);
    g_assert_true(access_ticket_was_granted(second) && !access_ticket_waits(second));
    assert_queue(ledger, "c: b");
    access_holder_destroy(b);
    c = begin_one(ledger, third, "c", "n", W, W);
    g_assert_nonnull(c);
    assert_queue(ledger, "");
    access_holder_destroy(c);
    access_ticket_destroy(second);
    access_ticket_destroy(third);
    access_ledger_destroy(ledger);
}

/* Readers come and go; a writer waits. The next reader does not pass it, but somebody elsewhere does. */
static void test_no_overtaking(void)
{
    struct access_ledger *ledger = ledger_open();
    struct access_ticket *writer = access_ticket_create(ledger, true);
    struct access_holder *reader = begin_one(ledger, NULL, "reader", "n", R, W), *elsewhere;
    struct access_claim claim = {"n", R, W, 0, "node"};
    auto_error err = NULL;

    g_assert_null(begin_one(ledger, writer, "writer", "n", W, R));
    g_assert_null(begin(ledger, NULL, "late", &claim, 1, &err));
    g_assert_nonnull(strstr(err->message, "late needs read-data on node 'n', which test-command writer (waits since"));
    json_t *holder = json_object_get(json_array_get(json_object_get(err->data, "conflicts"), 0), "holder");
    g_assert_cmpstr(json_string_value(json_object_get(holder, "state")), ==, "waiting");
    elsewhere = begin_one(ledger, NULL, "elsewhere", "m", W, R | W);
    g_assert_nonnull(elsewhere);
    /* Who is there already may claim again, and more: he does not arrive. */
    struct access_change change = {.holder = reader, .claims = &claim, .count = 1};
    g_assert_cmpint(access_apply(ledger, "reader", &change, 1, NULL), ==, 0);
    access_ticket_close(writer);
    g_assert_null(begin_one(ledger, writer, "writer", "n", W, R));
    g_clear_pointer(&err, error_free);
    struct access_holder *late = begin(ledger, NULL, "late", &claim, 1, &err);
    g_assert_nonnull(late);
    access_ticket_destroy(writer);
    access_holder_destroy(late);
    access_holder_destroy(reader);
    access_holder_destroy(elsewhere);
    access_ledger_destroy(ledger);
}

/* A set is taken whole or not at all, and who waits for half of it holds nothing of the other. */
static void test_whole_sets(void)
{
    struct access_ledger *ledger = ledger_open();
    struct access_ticket *both = access_ticket_create(ledger, true);
    struct access_claim claims[] = {{"n", W, R, 0, "node"}, {"m", W, R, 0, "node"}};
    struct access_holder *one = begin_one(ledger, NULL, "one", "n", R, W), *two;
    unsigned require, deny;

    g_assert_null(begin(ledger, both, "both", claims, 2, NULL));
    access_node_masks(ledger, "m", &require, &deny);
    g_assert_cmpuint(require | deny, ==, 0);
    g_assert_true(access_id_waits(ledger, "both"));
    asking = both;
    g_assert_false(access_id_waits(ledger, "both"));
    asking = NULL;
    changes = 0;
    g_assert_null(begin(ledger, both, "both", claims, 2, NULL));
    g_assert_cmpuint(changes, ==, 0); /* a refused try wakes nobody, or trying would never come to rest */
    access_holder_destroy(one);
    g_assert_cmpuint(changes, >, 0);
    two = begin(ledger, both, "both", claims, 2, NULL);
    g_assert_nonnull(two);
    access_holder_destroy(two);
    access_ticket_destroy(both);
    access_ledger_destroy(ledger);
}

static void test_not_for_nothing(void)
{
    struct access_ledger *ledger = ledger_open();
    struct access_ticket *hopeless = access_ticket_create(ledger, true), *proud = access_ticket_create(ledger, false);
    struct access_holder *holder = begin_one(ledger, NULL, "a", "n", W, W);

    g_assert_null(begin_one(ledger, hopeless, "h", "n", W, 0));
    g_assert_true(access_ticket_waits(hopeless));
    access_mark_stale(ledger, "n", "it was committed");
    g_assert_null(begin_one(ledger, hopeless, "h", "n", W, 0));
    g_assert_true(access_ticket_was_refused(hopeless) && !access_ticket_waits(hopeless));
    access_clear_stale(ledger, "n");
    g_assert_null(begin_one(ledger, proud, "p", "n", W, 0));
    g_assert_true(access_ticket_was_refused(proud) && !access_ticket_waits(proud));
    assert_queue(ledger, "");
    access_ticket_destroy(hopeless);
    access_ticket_destroy(proud);
    access_holder_destroy(holder);
    access_ledger_destroy(ledger);
}

static void test_note(void)
{
    struct access_ledger *ledger = ledger_open();
    struct access_ticket *ticket = access_ticket_create(ledger, true);

    g_assert_cmpstr(access_asker_note(ledger, "a"), ==, "a");
    g_assert_cmpstr(access_asker_note(ledger, "b"), ==, "b"); /* nobody's */
    asking = ticket;
    g_assert_cmpstr(access_asker_note(ledger, "c"), ==, "c");
    g_assert_cmpstr(access_asker_note(ledger, "d"), ==, "c");
    asking = NULL;
    access_ticket_destroy(ticket);
    access_ledger_destroy(ledger);
}

/* Two that want to adopt one edge are in each other's way, even where their own claims are not. */
static void test_adopters(void)
{
    struct access_ledger *ledger = ledger_open();
    struct access_holder *edge = access_holder_create(ledger, "edge", "a -> base (backing)", "backing", NULL, NULL);
    struct access_holder *block = begin_one(ledger, NULL, "block", "a", R, ACCESS_GRAPH);
    struct access_ticket *ticket = access_ticket_create(ledger, true);
    struct access_holder *first = access_holder_create(ledger, "job", "first", "test-command", NULL, NULL);
    struct access_holder *second = access_holder_create(ledger, "job", "second", "test-command", NULL, NULL);
    struct access_claim standing = {"base", R, W, 0, "backing"}, graph = {"a", ACCESS_GRAPH, 0, 0, "top"};
    struct access_change adopt[] = {
        {.holder = first, .claims = &graph, .count = 1, .arrives = true},
        {.holder = edge, .claims = &standing, .count = 1, .set_adopter = true, .adopter = first}};

    asking = ticket;
    g_assert_cmpint(access_apply(ledger, "first", adopt, 2, NULL), <, 0);
    asking = NULL;
    assert_queue(ledger, "first: block");
    adopt[0].holder = adopt[1].adopter = second;
    adopt[0].count = 0;
    g_assert_cmpint(access_apply(ledger, "second", adopt, 2, NULL), <, 0);
    access_ticket_close(ticket);
    g_assert_cmpint(access_apply(ledger, "second", adopt, 2, NULL), ==, 0);
    access_ticket_destroy(ticket);
    access_holder_destroy(first);
    access_holder_destroy(second);
    access_holder_destroy(block);
    access_holder_destroy(edge);
    access_ledger_destroy(ledger);
}

/* A command has no id of its own; each that waits gets one. */
static void test_commands(void)
{
    struct access_ledger *ledger = ledger_open();
    struct access_holder *holder = begin_one(ledger, NULL, "a", "n", W, W);
    struct access_ticket *tickets[2];
    struct access_claim claim = {"n", W, 0, 0, "node"};

    for (unsigned i = 0; i < 2; i++) {
        struct access_holder *command = access_holder_create(ledger, "command", "n", "block_resize", NULL, NULL);
        struct access_change change = {.holder = command, .claims = &claim, .count = 1, .arrives = true};

        tickets[i] = asking = access_ticket_create(ledger, true);
        g_assert_cmpint(access_apply(ledger, "block_resize n", &change, 1, NULL), <, 0);
        access_holder_destroy(command);
    }
    asking = NULL;
    assert_queue(ledger, "block_resize-n: a; block_resize-n-2: a");
    g_assert_cmpstr(access_ticket_operation(tickets[1]), ==, "block_resize");
    access_ticket_destroy(tickets[0]);
    access_ticket_destroy(tickets[1]);
    access_holder_destroy(holder);
    access_ledger_destroy(ledger);
}

/* --- against a plain model --- */

#define NODES 4
#define OPERATIONS 12

struct operation {
    unsigned require[NODES], deny[NODES];
    char id[8];
    enum { IDLE, WAITS, HOLDS } state;
    unsigned arrived; /* when it began to wait */
    struct access_ticket *ticket;
    struct access_holder *holder;
};

static bool model_clash(const struct operation *a, const struct operation *b)
{
    bool clash = false;

    for (unsigned i = 0; i < NODES; i++) {
        clash = clash || (a->require[i] & b->deny[i]) || (a->deny[i] & b->require[i]);
    }
    return clash;
}

/* May `operation` begin, with all that hold and all that wait before it? */
static bool model_admits(const struct operation *all, const struct operation *operation)
{
    for (unsigned i = 0; i < OPERATIONS; i++) {
        const struct operation *other = &all[i];
        bool before = other->state == WAITS && (operation->state != WAITS || other->arrived < operation->arrived);

        if (other != operation && (other->state == HOLDS || before) && model_clash(operation, other)) {
            return false;
        }
    }
    return true;
}

static void operation_try(struct access_ledger *ledger, struct operation *all, struct operation *operation)
{
    static const char *const names[NODES] = {"n0", "n1", "n2", "n3"};
    struct access_claim claims[NODES];
    bool admitted = model_admits(all, operation);

    for (unsigned i = 0; i < NODES; i++) {
        claims[i] = (struct access_claim){names[i], operation->require[i], operation->deny[i], 0, ""};
    }
    operation->holder = begin(ledger, operation->ticket, operation->id, claims, NODES, NULL);
    g_assert_cmpint(operation->holder != NULL, ==, admitted);
    if (operation->holder) {
        operation->state = HOLDS;
    }
}

/* Everybody who waits tries once more, in an arbitrary order, until nobody gets any further. */
static void try_all(struct access_ledger *ledger, struct operation *all, GRand *random)
{
    unsigned start = (unsigned)g_rand_int_range(random, 0, OPERATIONS);

    for (unsigned before = changes - 1; before != changes;) {
        before = changes;
        for (unsigned i = 0; i < OPERATIONS; i++) {
            struct operation *operation = &all[(start + i) % OPERATIONS];

            if (operation->state == WAITS) {
                operation_try(ledger, all, operation);
            }
        }
    }
}

static void operation_end(struct operation *operation)
{
    g_clear_pointer(&operation->ticket, access_ticket_destroy);
    g_clear_pointer(&operation->holder, access_holder_destroy);
    operation->state = IDLE;
}

static void operation_choose(struct operation *operation, GRand *random)
{
    for (unsigned i = 0; i < NODES; i++) {
        bool touches = g_rand_boolean(random);

        operation->require[i] = touches ? g_rand_int(random) & g_rand_int(random) & ACCESS_ALL : 0;
        operation->deny[i] = touches ? g_rand_int(random) & g_rand_int(random) & ACCESS_ALL : 0;
    }
}

static void test_model(void)
{
    unsigned waited = 0, granted_late = 0;

    for (unsigned seed = 0; seed < 40; seed++) {
        g_autoptr(GRand) random = g_rand_new_with_seed(seed);
        struct access_ledger *ledger = ledger_open();
        struct operation all[OPERATIONS] = {0};

        for (unsigned step = 1; step <= 400; step++) {
            struct operation *operation = &all[g_rand_int_range(random, 0, OPERATIONS)];

            if (operation->state != IDLE) {
                operation_end(operation); /* it ends, or is cancelled */
            } else {
                bool may_wait = g_rand_int_range(random, 0, 3) > 0;

                operation_choose(operation, random);
                g_snprintf(operation->id, sizeof(operation->id), "o%d", (int)(operation - all));
                operation->ticket = access_ticket_create(ledger, may_wait);
                operation_try(ledger, all, operation);
                if (!operation->holder && may_wait) {
                    operation->state = WAITS;
                    operation->arrived = step;
                    waited++;
                }
                g_assert_cmpint(access_ticket_waits(operation->ticket), ==, operation->state == WAITS);
                if (operation->state == IDLE) {
                    g_clear_pointer(&operation->ticket, access_ticket_destroy);
                }
            }
            try_all(ledger, all, random);
        }
        /* No starving: as holders end and nobody new comes, everyone who waits gets his turn. */
        for (unsigned round = 0; round <= OPERATIONS; round++) {
            for (unsigned i = 0; i < OPERATIONS; i++) {
                if (all[i].state == HOLDS) {
                    operation_end(&all[i]);
                }
            }
            for (unsigned i = 0; i < OPERATIONS; i++) {
                granted_late += all[i].state == WAITS;
            }
            try_all(ledger, all, random);
        }
        for (unsigned i = 0; i < OPERATIONS; i++) {
            g_assert_cmpint(all[i].state, ==, IDLE);
        }
        assert_queue(ledger, "");
        access_ledger_destroy(ledger);
    }
    g_assert_cmpuint(waited, >, 1000);
    g_assert_cmpuint(granted_late, >, 50);
}

/* --- several sets as one --- */

/* As begin_one(), inside of a joint try, which the caller begins and ends. */
static struct access_holder *begin_more(struct access_ledger *ledger, struct access_ticket *ticket, const char *id,
                                        const char *node, unsigned require, unsigned deny)
{
    struct access_claim claim = {node, require, deny, 0, "node"};
    struct access_change change = {.claims = &claim, .count = 1, .arrives = true};

    asking = ticket;
    change.holder = access_holder_create(ledger, "job", id, "test-command", NULL, NULL);
    if (access_apply(ledger, id, &change, 1, NULL) < 0) {
        access_holder_destroy(change.holder);
        return NULL;
    }
    return change.holder;
}

static void joint_begin(struct access_ledger *ledger, struct access_ticket *ticket)
{
    asking = ticket;
    access_ticket_try(ticket);
    access_asker_begin(ledger);
}

static void joint_end(struct access_ledger *ledger)
{
    access_asker_end(ledger);
    asking = NULL;
}

static void test_joint(void)
{
    struct access_ledger *ledger = ledger_open();
    struct access_ticket *both = access_ticket_create(ledger, true), *late = access_ticket_create(ledger, true);
    struct access_holder *held = begin_one(ledger, NULL, "held", "b", R, W), *one, *two;
    unsigned before = changes;

    /* The first set is granted, the second refused: what was taken goes back, the place stays, and nobody is woken. */
    for (unsigned i = 0; i < 2; i++) {
        joint_begin(ledger, both);
        one = begin_more(ledger, both, "one", "a", W, W);
        g_assert(one && !access_ticket_was_granted(both));
        g_assert_null(begin_more(ledger, both, "two", "b", W, 0));
        access_holder_destroy(one);
        joint_end(ledger);
        g_assert_true(access_ticket_waits(both) && access_ticket_was_refused(both));
        g_assert_cmpstr(access_ticket_id(both), ==, "one");
        g_assert_cmpuint(changes, ==, before);
    }
    /* Its place is that of both sets. */
    g_assert_null(begin_one(ledger, late, "late", "a", W, 0));
    g_assert_null(begin_one(ledger, NULL, "later", "b", W, 0));

    /* Somebody who was refused by what it held for a moment has to be told. */
    before = changes;
    joint_begin(ledger, both);
    one = begin_more(ledger, both, "one", "a", W, W);
    g_assert_null(begin_one(ledger, late, "late", "a", W, 0));
    asking = both;
    g_assert_null(begin_more(ledger, both, "two", "b", W, 0));
    access_holder_destroy(one);
    joint_end(ledger);
    g_assert_cmpuint(changes, >, before);

    /* All granted: it leaves in one step, and those behind it are told. */
    access_holder_destroy(held);
    before = changes;
    joint_begin(ledger, both);
    one = begin_more(ledger, both, "one", "a", W, W);
    two = begin_more(ledger, both, "two", "b", W, 0);
    g_assert(one && two && access_ticket_waits(both));
    g_assert_cmpint(access_asker_keep(ledger, NULL), ==, 0);
    g_assert_true(access_ticket_was_granted(both) && !access_ticket_waits(both));
    g_assert_cmpuint(changes, ==, before);
    joint_end(ledger);
    g_assert_cmpuint(changes, >, before);
    g_assert_null(begin_one(ledger, late, "late", "a", W, 0));

    /* Closed in the midst of it: no more is granted, and it does not keep what it has. */
    access_holder_destroy(one);
    access_holder_destroy(two);
    joint_begin(ledger, late);
    one = begin_more(ledger, late, "late", "a", W, W);
    access_ticket_close(late);
    g_assert_null(begin_more(ledger, late, "more", "b", W, 0));
    g_assert_cmpint(access_asker_keep(ledger, NULL), ==, -ECANCELED);
    access_holder_destroy(one);
    joint_end(ledger);
    access_ticket_destroy(both);
    access_ticket_destroy(late);
    access_ledger_destroy(ledger);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/queue/first-come-first-served", test_order);
    g_test_add_func("/queue/nobody-overtakes", test_no_overtaking);
    g_test_add_func("/queue/sets-are-taken-whole", test_whole_sets);
    g_test_add_func("/queue/not-for-nothing", test_not_for_nothing);
    g_test_add_func("/queue/note", test_note);
    g_test_add_func("/queue/adopters", test_adopters);
    g_test_add_func("/queue/commands", test_commands);
    g_test_add_func("/queue/several-sets-as-one", test_joint);
    g_test_add_func("/queue/model", test_model);
    return g_test_run();
}

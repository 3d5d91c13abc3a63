/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Runs of actions: the order of their steps, that a failure at any place leaves graph and ledger as they were, that
 * drains last to the end and the lock is given back on every path, and that what several actions find is one point in
 * time for a client of several disks.
 */
#include "block/action.h"
#include "block/memory_node.h"
#include "loop/sim.h"

/* --- steps, written down --- */

enum where { NOWHERE, IN_PREPARE, IN_PLAN, IN_APPLY };

struct noted {
    GString *log;
    const char *name;
    struct node *node; /* to be drained, or NULL */
    enum where fails;
    struct backend *made; /* over the node */
};

static int note(const struct action *action, const char *step, enum where where, struct error **err)
{
    const struct noted *noted = action->state;
    g_string_append_printf(noted->log, "%s %s; ", step, noted->name);
    return where != NOWHERE && noted->fails == where ? error_set(err, -EIO, "%s failed to %s", noted->name, step) : 0;
}

static bool is_locked(struct graph *graph)
{
    bool locked = !co_mutex_try_lock(&graph->lock);
    if (!locked) {
        co_mutex_unlock(&graph->lock);
    }
    return locked;
}

static int coroutine_fn noted_prepare(struct action *action, struct error **err)
{
    coroutine_pause();
    g_assert(!is_locked(action->graph));
    return note(action, "prepare", IN_PREPARE, err);
}

static int coroutine_fn noted_plan(struct action *action, struct error **err)
{
    struct noted *noted = action->state;
    g_assert(is_locked(action->graph));
    if (noted->node) {
        action_drain(action, noted->node);
    }
    return note(action, "plan", IN_PLAN, err);
}

/* Makes a backend, which drains of later actions find. */
static int coroutine_fn noted_apply(struct action *action, struct error **err)
{
    struct noted *noted = action->state;
    coroutine_pause();
    g_assert(is_locked(action->graph));
    int result = note(action, "apply", IN_APPLY, err);
    if (result == 0 && noted->node) {
        noted->made = backend_create(action->graph, noted->name);
        g_assert_cmpint(backend_attach_locked(noted->made, noted->node, ACCESS_READ_DATA, NULL), ==, 0);
    }
    return result;
}

static void coroutine_fn noted_drop(struct noted *noted)
{
    backend_destroy_locked(noted->made);
    noted->made = NULL;
}

static void coroutine_fn noted_revert(struct action *action)
{
    g_assert(is_locked(action->graph));
    note(action, "revert", NOWHERE, NULL);
    noted_drop(action->state);
}

static void coroutine_fn noted_commit(struct action *action)
{
    g_assert(is_locked(action->graph));
    note(action, "commit", NOWHERE, NULL);
}

static void coroutine_fn noted_clean(struct action *action)
{
    struct noted *noted = action->state;
    g_assert(!is_locked(action->graph));
    note(action, "clean", NOWHERE, NULL);
    backend_destroy(noted->made);
    noted->made = NULL;
}

static int coroutine_fn noted_preview(struct action *action, json_t **ret_claims, struct error **err)
{
    g_assert(is_locked(action->graph));
    *ret_claims = json_pack("[s]", ((struct noted *)action->state)->name);
    return note(action, "preview", NOWHERE, err);
}

static const struct action_kind noted_kind = {
    .name = "noted",
    .prepare = noted_prepare,
    .plan = noted_plan,
    .apply = noted_apply,
    .revert = noted_revert,
    .commit = noted_commit,
    .clean = noted_clean,
    .preview = noted_preview,
};
static const struct action_kind empty_kind = {.name = "empty"};

/* Three actions and one that does nothing; `c` fails, if anybody. */
static void coroutine_fn expect_steps(struct graph *graph, struct node *node, enum where fails, const char *expected)
{
    g_autoptr(GString) log = g_string_new(NULL);
    struct noted noted[] = {{log, "a", node}, {log, "b", NULL}, {log, "c", node, fails}};
    struct action actions[] = {{&noted_kind, .state = &noted[0]},
                               {&empty_kind},
                               {&noted_kind, .state = &noted[1]},
                               {&noted_kind, .state = &noted[2]}};
    auto_error error = NULL;
    int result = actions_run(graph, actions, G_N_ELEMENTS(actions), &error);
    g_assert_cmpint(result, ==, fails == NOWHERE ? 0 : -EIO);
    g_assert((error != NULL) == (result < 0));
    g_assert_cmpstr(log->str, ==, expected);
    g_assert(!is_locked(graph));
}

static void coroutine_fn steps_body(void *argument)
{
    struct graph *graph = graph_create();
    struct node *node = memory_node(graph, "n", NULL);
    expect_steps(graph, node, NOWHERE,
                 "prepare a; prepare b; prepare c; plan a; apply a; plan b; apply b; plan c; apply c; "
                 "commit a; commit b; commit c; clean a; clean b; clean c; ");
    expect_steps(graph, node, IN_PREPARE, "prepare a; prepare b; prepare c; clean a; clean b; clean c; ");
    expect_steps(graph, node, IN_PLAN,
                 "prepare a; prepare b; prepare c; plan a; apply a; plan b; apply b; plan c; "
                 "revert b; revert a; clean a; clean b; clean c; ");
    expect_steps(graph, node, IN_APPLY,
                 "prepare a; prepare b; prepare c; plan a; apply a; plan b; apply b; plan c; apply c; "
                 "revert b; revert a; clean a; clean b; clean c; ");
    g_assert_cmpint(actions_run(graph, NULL, 0, NULL), ==, 0);
    memory_end(graph);
}

static void test_steps(void)
{
    in_coroutine(steps_body);
}

static void coroutine_fn check_body(void *argument)
{
    struct graph *graph = graph_create();
    g_autoptr(GString) log = g_string_new(NULL);
    struct noted noted[] = {{log, "a"}, {log, "b", NULL, IN_PLAN}, {log, "c"}};
    struct action actions[] = {
        {&noted_kind, .state = &noted[0]}, {&noted_kind, .state = &noted[1]}, {&noted_kind, .state = &noted[2]}};
    json_t *claims = NULL;
    g_assert_cmpint(actions_check(graph, actions, 1, &claims, NULL), ==, 0);
    g_assert_cmpuint(json_array_size(claims), ==, 1);
    json_decref(claims);
    g_assert_cmpstr(log->str, ==, "plan a; preview a; clean a; ");
    g_string_truncate(log, 0);
    g_assert_cmpint(actions_check(graph, actions, 3, &claims, NULL), ==, -EIO);
    g_assert_cmpuint(json_array_size(claims), ==, 1);
    json_decref(claims);
    g_assert_cmpstr(log->str, ==, "plan a; preview a; plan b; clean a; clean b; clean c; ");
    g_assert(!is_locked(graph));
    memory_end(graph);
}

static void test_check(void)
{
    in_coroutine(check_body);
}

/* --- nothing changed --- */

static const struct claim_clause move_clauses[] = {
    {.role = CLAIM_ROLE_NODE, .first = CLAIM_NODE, .require = ACCESS_GRAPH, .deny = ACCESS_GRAPH, .path = "node"},
    {.role = CLAIM_ROLE_NODE, .first = CLAIM_TARGET, .require = ACCESS_READ_METADATA, .path = "target"}};
static const struct claim_table move_table = {.operation = "move", .clauses = move_clauses, .count = 2};

/* Claims, and moves the backing edge of a node. */
struct move {
    struct node *node, *to, *from;
    struct operation *operation;
};

static int coroutine_fn move_plan(struct action *action, struct error **err)
{
    action_drain(action, ((struct move *)action->state)->node);
    return 0;
}

static int coroutine_fn move_edge(struct move *move, struct node *to, struct error **err)
{
    struct transaction *transaction = graph_begin(move->node->graph, "move");
    transaction_by(transaction, move->operation);
    transaction_move_edge(transaction, move->node->backing, to);
    return graph_commit(transaction, err);
}

static int coroutine_fn move_apply(struct action *action, struct error **err)
{
    struct move *move = action->state;
    struct operation_config config = {.kind = "command",
                                      .id = move->node->name,
                                      .table = &move_table,
                                      .bound = {[CLAIM_NODE] = move->node, [CLAIM_TARGET] = move->to}};
    int result = operation_begin(action->graph, &config, &move->operation, err);
    if (result == 0) {
        move->from = move->node->backing->child;
        result = move_edge(move, move->to, err);
        if (result < 0) {
            operation_end_locked(move->operation);
        }
    }
    return result;
}

static void coroutine_fn move_revert(struct action *action)
{
    struct move *move = action->state;
    struct operation *there = move->operation;
    /* Back to where nobody has claimed anything any more: an operation of its own. */
    operation_end_locked(there);
    move->operation = memory_surgery(action->graph, move->node, move->from, move->to);
    g_assert_cmpint(move_edge(move, move->from, NULL), ==, 0);
    operation_end_locked(move->operation);
    move->operation = NULL;
}

static void coroutine_fn move_commit(struct action *action)
{
    struct move *move = action->state;
    operation_end_locked(move->operation);
}

static const struct action_kind move_kind = {
    .name = "move", .plan = move_plan, .apply = move_apply, .revert = move_revert, .commit = move_commit};

static int by_text(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* In an order of its own: an edge that has been away holds again, behind others. */
static void add_sorted(GString *text, json_t *array)
{
    g_autoptr(GPtrArray) lines = g_ptr_array_new_with_free_func(free);
    json_t *value;
    size_t index;
    json_array_foreach(array, index, value)
    {
        json_object_del(value, "since");
        g_ptr_array_add(lines, json_dumps(value, JSON_SORT_KEYS));
    }
    g_ptr_array_sort(lines, by_text);
    for (unsigned i = 0; i < lines->len; i++) {
        g_string_append_printf(text, "%s\n", (char *)lines->pdata[i]);
    }
    json_decref(array);
}

static char *everything(struct graph *graph)
{
    GString *text = g_string_new(NULL);
    json_t *ledger = access_describe(graph->ledger), *shape = graph_describe(graph);
    add_sorted(text, json_incref(json_object_get(ledger, "holders")));
    add_sorted(text, json_incref(json_object_get(shape, "nodes")));
    add_sorted(text, json_incref(json_object_get(shape, "edges")));
    json_decref(ledger);
    json_decref(shape);
    return g_string_free(text, FALSE);
}

static void coroutine_fn refusal_body(void *argument)
{
    struct graph *graph = graph_create();
    struct node *chain[CHAIN_LENGTH];
    memory_chain(graph, chain);
    struct node *other = memory_node(graph, "other", NULL);
    g_autofree char *before = everything(graph);
    struct move moves[] = {{chain[A], other}, {chain[C], chain[A]}, {chain[A], chain[BASE]}};
    struct action actions[] = {
        {&move_kind, .state = &moves[0]}, {&move_kind, .state = &moves[1]}, {&move_kind, .state = &moves[2]}};
    auto_error error = NULL;
    /* The third clashes with the first, which still holds its claims. */
    g_assert_cmpint(actions_run(graph, actions, 3, &error), ==, -EBUSY);
    g_assert_nonnull(strstr(error->message, "'a'"));
    g_autofree char *after = everything(graph);
    g_assert_cmpstr(after, ==, before);
    g_assert(chain[A]->backing->child == chain[BASE] && chain[C]->backing->child == chain[B]);
    /* Without it they pass, and each finds what the one before it has done. */
    g_assert_cmpint(actions_run(graph, actions, 2, NULL), ==, 0);
    g_assert(chain[A]->backing->child == other && chain[C]->backing->child == chain[A]);
    g_assert(list_is_empty(&graph->operations) && !is_locked(graph));
    memory_end(graph);
}

static void test_refusal(void)
{
    in_coroutine(refusal_body);
}

/* --- one point in time --- */

#define DISKS 3
#define ROUNDS 60

struct disks {
    struct node *nodes[DISKS];
    struct backend *backends[DISKS];
    atomic_bool stop;
    atomic_uint written;
    struct co_group group;
};

/* The same number to every disk, one after the other: a later disk never has one that an earlier one has not. */
static void coroutine_fn disks_write(void *argument)
{
    struct disks *disks = argument;
    for (unsigned number = 1; !atomic_load(&disks->stop); number++) {
        for (unsigned i = 0; i < DISKS; i++) {
            struct iovec iov = {&number, sizeof(number)};
            g_assert_cmpint(backend_write(disks->backends[i], 0, sizeof(number), buffers_one(&iov), 0), ==, 0);
        }
        atomic_store(&disks->written, number);
        coroutine_pause();
    }
    co_group_leave(&disks->group);
}

struct cut {
    struct node *node;
    unsigned found, late; /* when applied, and when all had been */
};

static unsigned number_on(const struct node *node)
{
    unsigned number;
    memcpy(&number, memory_of(node)->data, sizeof(number));
    return number;
}

static int coroutine_fn cut_plan(struct action *action, struct error **err)
{
    action_drain(action, ((struct cut *)action->state)->node);
    return 0;
}

static int coroutine_fn cut_apply(struct action *action, struct error **err)
{
    struct cut *cut = action->state;
    g_assert_cmpuint(atomic_load(&memory_of(cut->node)->inside), ==, 0);
    cut->found = number_on(cut->node);
    struct loop_sleep sleep = {0};
    loop_sleep_ns(&sleep, 300 * 1000); /* time in which others would get on if they could */
    return 0;
}

static void coroutine_fn cut_commit(struct action *action)
{
    struct cut *cut = action->state;
    coroutine_pause();
    g_assert_cmpuint(atomic_load(&memory_of(cut->node)->inside), ==, 0);
    cut->late = number_on(cut->node);
}

static const struct action_kind cut_kind = {.name = "cut", .plan = cut_plan, .apply = cut_apply, .commit = cut_commit};

/* In both orders: from the first disk on and from the last. */
static void coroutine_fn disks_cut(struct graph *graph, struct disks *disks, bool near)
{
    static const char *const names[DISKS][2] = {{"disk0"}, {"disk1"}, {"disk2"}};
    struct cut cuts[DISKS];
    struct action actions[DISKS];
    for (unsigned i = 0; i < DISKS; i++) {
        unsigned disk = near ? DISKS - 1 - i : i;
        cuts[i] = (struct cut){.node = disks->nodes[disk]};
        actions[i] = (struct action){.kind = &cut_kind, .state = &cuts[i], .near = near ? names[disk] : NULL};
    }
    g_assert_cmpint(actions_run(graph, actions, DISKS, NULL), ==, 0);
    unsigned found[DISKS] = {0};
    for (unsigned i = 0; i < DISKS; i++) {
        g_assert_cmpuint(cuts[i].found, ==, cuts[i].late);
        found[near ? DISKS - 1 - i : i] = cuts[i].found;
    }
    for (unsigned i = 1; i < DISKS; i++) {
        g_assert_cmpuint(found[i], <=, found[i - 1]);
    }
    g_assert_cmpuint(found[0] - found[DISKS - 1], <=, 1);
}

static void coroutine_fn cut_body(void *argument)
{
    struct graph *graph = graph_create();
    struct disks disks = {.stop = false};
    struct loop *io;
    co_group_init(&disks.group);
    for (unsigned i = 0; i < DISKS; i++) {
        g_autofree char *name = g_strdup_printf("disk%u", i);
        disks.nodes[i] = memory_node(graph, name, NULL);
        memory_of(disks.nodes[i])->pauses = true;
        disks.backends[i] = memory_backend(graph, name, disks.nodes[i], ACCESS_WRITE_DATA);
    }
    g_assert_cmpint(loop_thread_start("io", ENGINE_AUTO, &io, NULL), ==, 0);
    co_group_enter(&disks.group);
    loop_spawn(io, disks_write, &disks);
    for (unsigned round = 0; round < ROUNDS || atomic_load(&disks.written) < ROUNDS; round++) {
        disks_cut(graph, &disks, round % 2);
        coroutine_pause();
    }
    atomic_store(&disks.stop, true);
    co_group_wait(&disks.group);
    for (unsigned i = 0; i < DISKS; i++) {
        backend_destroy(disks.backends[i]);
    }
    loop_thread_join(io);
    co_group_destroy(&disks.group);
    memory_end(graph);
}

static void test_cut(void)
{
    in_coroutine(cut_body);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    sim_create_if_asked();
    g_test_add_func("/action/order-of-steps", test_steps);
    g_test_add_func("/action/dry-run", test_check);
    g_test_add_func("/action/refusal-changes-nothing", test_refusal);
    g_test_add_func("/action/one-point-in-time-over-disks", test_cut);
    return g_test_run();
}

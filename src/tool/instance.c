/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Instances of operations: which nodes an operation can be about in a graph, and in which relation two of them stand.
 * Owns three small tables: how variables are chosen (by the set of them that a claim table uses), how relations are
 * called, and the short names of operations. It knows no rule of access control: what is claimed stands in the claim
 * tables, and is derived and decided elsewhere.
 *
 * 1. `active` is no choice: a commit is active where nothing leans on its top. Nor is `longer`: these images are all of
 *    one size. All other conditions are tried both ways.
 * 2. What a command makes or fills (a target, an overlay) is a node that nobody else uses: it is no part of the
 *    relations, and who holds has another one than who asks.
 * 3. A command that claims what an earlier one claims, word for word, has no variants of its own, but is named with
 *    those.
 */
#include "tool/instance.h"
#include "base/size.h"
#include "schema/claims.h"
#include <errno.h>
#include <string.h>

/* --- variants --- */

#define USES(variable) (1u << (variable))

static const struct {
    unsigned variables; /* that the table uses */
    enum claim_variable high, low;
    bool on_range;
} patterns[] = {
    {USES(CLAIM_NODE), CLAIM_NODE, CLAIM_NODE, false},
    {USES(CLAIM_NODE) | USES(CLAIM_TARGET), CLAIM_NODE, CLAIM_NODE, false}, /* the target is a node of its own */
    {USES(CLAIM_TOP) | USES(CLAIM_BASE), CLAIM_TOP, CLAIM_BASE, true},
    {USES(CLAIM_TOP) | USES(CLAIM_BOTTOM), CLAIM_TOP, CLAIM_BOTTOM, true},
};
#define SPARE_VARIABLES (USES(CLAIM_TARGET) | USES(CLAIM_OVERLAY) | USES(CLAIM_DATA))

static unsigned table_variables(const struct claim_table *table)
{
    unsigned variables = 0;

    for (unsigned i = 0; i < table->count; i++) {
        const struct claim_clause *clause = &table->clauses[i];
        bool takes_two = clause->role == CLAIM_ROLE_BETWEEN || clause->role == CLAIM_ROLE_RANGE;

        variables |= USES(clause->first) | (takes_two ? USES(clause->second) : 0);
    }
    return variables;
}

static int table_pattern(const struct claim_table *table)
{
    for (unsigned i = 0; i < array_size(patterns); i++) {
        if (patterns[i].variables == (table_variables(table) & ~SPARE_VARIABLES)) {
            return (int)i;
        }
    }
    return -1;
}

static unsigned table_conditions(const struct claim_table *table)
{
    unsigned conditions = 0;

    for (unsigned i = 0; i < table->count; i++) {
        conditions |= table->clauses[i].condition | table->clauses[i].unless;
    }
    return conditions & ~(unsigned)CLAIM_IF_LONGER;
}

static char *variant_name(const struct claim_table *table, unsigned conditions)
{
    GString *name = g_string_new(table->operation);
    const char *before = " (";

    for (unsigned i = 0; i < claim_condition_count; i++) {
        if (conditions & claim_condition_words[i].condition) {
            g_string_append_printf(name, "%s%s", before, claim_condition_words[i].word);
            before = ", ";
        }
    }
    if (conditions) {
        g_string_append_c(name, ')');
    }
    return g_string_free(name, FALSE);
}

static void variant_free(void *argument)
{
    struct variant *variant = argument;

    g_free(variant->name);
    g_ptr_array_unref(variant->also);
    g_free(variant);
}

static bool clauses_equal(const struct claim_clause *a, const struct claim_clause *b)
{
    return a->role == b->role && a->first == b->first && a->second == b->second && a->require == b->require &&
           a->deny == b->deny && a->modifiers == b->modifiers && a->condition == b->condition && a->unless == b->unless;
}

static bool tables_equal(const struct claim_table *a, const struct claim_table *b)
{
    bool equal = a->count == b->count && a->adopt == b->adopt && a->sources == b->sources;

    for (unsigned i = 0; equal && i < a->count; i++) {
        equal = clauses_equal(&a->clauses[i], &b->clauses[i]);
    }
    return equal;
}

/* The first table that says the same. */
static const struct claim_table *table_stands_for(const struct claim_table *table)
{
    unsigned i = 0;

    while (!tables_equal(claim_tables[i], table)) {
        i++;
    }
    return claim_tables[i];
}

static GPtrArray *commands_also(const struct claim_table *table)
{
    GPtrArray *commands = g_ptr_array_new();

    for (unsigned i = 0; i < claim_table_count; i++) {
        if (claim_tables[i] != table && tables_equal(claim_tables[i], table)) {
            g_ptr_array_add(commands, (void *)claim_tables[i]->operation);
        }
    }
    return commands;
}

/* Every subset of the conditions that the table mentions. */
static void variants_add(GPtrArray *variants, const struct claim_table *table, bool on_range)
{
    unsigned all = table_conditions(table);

    for (unsigned conditions = 0; conditions <= all; conditions++) {
        if (!(conditions & ~all)) {
            struct variant *variant = g_new0(struct variant, 1);

            *variant =
                (struct variant){table, conditions, on_range, variant_name(table, conditions), commands_also(table)};
            g_ptr_array_add(variants, variant);
        }
    }
}

int variants_make(GPtrArray **ret, struct error **err)
{
    g_autoptr(GPtrArray) variants = g_ptr_array_new_with_free_func(variant_free);

    for (int on_range = 1; on_range >= 0; on_range--) {
        for (unsigned i = 0; i < claim_table_count; i++) {
            int pattern = table_pattern(claim_tables[i]);

            if (pattern < 0) {
                return error_set(err, -ENOTSUP, "Which nodes %s can be about is not known: src/tool/instance.c",
                                 claim_tables[i]->operation);
            }
            if (patterns[pattern].on_range == on_range && table_stands_for(claim_tables[i]) == claim_tables[i]) {
                variants_add(variants, claim_tables[i], on_range);
            }
        }
    }
    *ret = g_steal_pointer(&variants);
    return 0;
}

/* --- instances --- */

static const struct {
    const char *operation, *word;
    unsigned conditions; /* of those in `mask` */
    unsigned mask;
} short_names[] = {
    {"block-commit", "commit", 0, 0},
    {"block-stream", "stream", 0, 0},
    {"block-export-add", "export-ro-sh", 0, CLAIM_IF_WRITABLE | CLAIM_IF_EXCLUSIVE},
    {"block-export-add", "export-rw-sh", CLAIM_IF_WRITABLE, CLAIM_IF_WRITABLE | CLAIM_IF_EXCLUSIVE},
    {"block-export-add", "export-ro", CLAIM_IF_EXCLUSIVE, CLAIM_IF_WRITABLE | CLAIM_IF_EXCLUSIVE},
    {"block-export-add", "export-rw", CLAIM_IF_WRITABLE | CLAIM_IF_EXCLUSIVE, CLAIM_IF_WRITABLE | CLAIM_IF_EXCLUSIVE},
    {"block_resize", "resize", 0, CLAIM_IF_SHRINK},
    {"block_resize", "shrink", CLAIM_IF_SHRINK, CLAIM_IF_SHRINK},
    {"change-backing-file", "cbf", 0, 0},
    {"blockdev-mirror", "mirror", 0, ~0u},
    {"blockdev-mirror", "replace", CLAIM_IF_REPLACE, ~0u},
    {"blockdev-backup", "backup", 0, ~0u},
    {"blockdev-snapshot", "snapshot", 0, ~0u},
    {"blockdev-snapshot-internal-sync", "snapshot-inside", 0, ~0u},
};

static const char *variant_short_name(const struct variant *variant)
{
    for (unsigned i = 0; i < array_size(short_names); i++) {
        if (!strcmp(short_names[i].operation, variant->table->operation) &&
            (variant->conditions & short_names[i].mask) == short_names[i].conditions) {
            return short_names[i].word;
        }
    }
    return variant->name;
}

static char *instance_text(const struct instance *instance, enum claim_variable low)
{
    const char *word = variant_short_name(instance->variant);

    if (!instance->variant->on_range) {
        return g_strdup_printf("%s %s", word, instance->high->name);
    }
    return g_strdup_printf("%s %s%s%s", word, instance->high->name, low == CLAIM_BASE ? ">" : "..",
                           instance->low ? instance->low->name : "none");
}

static void instance_free(void *argument)
{
    struct instance *instance = argument;

    g_free(instance->text);
    g_free(instance);
}

static bool has_overlay(const struct node *node)
{
    list_for_each (link, &node->parents) {
        if (container_of(link, struct edge, child_link)->role == EDGE_BACKING) {
            return true;
        }
    }
    return false;
}

/* `graph` is about the node's own edge to what is below it: a node that has none cannot be meant. */
static bool needs_backing(const struct claim_table *table)
{
    for (unsigned i = 0; i < table->count; i++) {
        const struct claim_clause *clause = &table->clauses[i];

        if (clause->role == CLAIM_ROLE_NODE && !(USES(clause->first) & SPARE_VARIABLES) &&
            (clause->require & ACCESS_GRAPH)) {
            return true;
        }
    }
    return false;
}

static void instance_add(GPtrArray *instances, const struct variant *variant, struct node *high, struct node *low)
{
    int pattern = table_pattern(variant->table);
    enum claim_variable low_variable = patterns[pattern].low;
    bool active = variant->conditions & CLAIM_IF_ACTIVE;

    if ((table_conditions(variant->table) & CLAIM_IF_ACTIVE) && active == has_overlay(high)) {
        return;
    }
    if (needs_backing(variant->table) && !node_backing(high)) {
        return;
    }
    struct instance *instance = g_new0(struct instance, 1);

    instance->variant = variant;
    instance->bound[patterns[pattern].high] = high;
    instance->bound[low_variable] = low;
    instance->high = high;
    instance->low = low_variable == CLAIM_BOTTOM ? node_backing(low) : low;
    instance->text = instance_text(instance, low_variable);
    g_ptr_array_add(instances, instance);
}

GPtrArray *instances_make(const GPtrArray *variants, struct node *const *nodes, unsigned count)
{
    GPtrArray *instances = g_ptr_array_new_with_free_func(instance_free);

    for (unsigned v = 0; v < variants->len; v++) {
        const struct variant *variant = variants->pdata[v];

        for (unsigned high = 0; high < count; high++) {
            for (unsigned low = 0; low < count; low++) {
                if (variant->on_range ? node_is_above(nodes[high], nodes[low]) : high == low) {
                    instance_add(instances, variant, nodes[high], nodes[low]);
                }
            }
        }
    }
    return instances;
}

struct operation_config instance_config(const struct instance *instance, const char *id, struct node *spare)
{
    struct operation_config config = {
        .kind = "job", .id = id, .table = instance->variant->table, .conditions = instance->variant->conditions};

    memcpy(config.bound, instance->bound, sizeof(config.bound));
    for (unsigned variable = 0; variable < CLAIM_VARIABLE_COUNT; variable++) {
        if (table_variables(instance->variant->table) & SPARE_VARIABLES & USES(variable)) {
            config.bound[variable] = spare;
        }
    }
    return config;
}

/* --- relations --- */

enum order { SAME, ABOVE, BELOW, BESIDE };

/* NULL is below everything. */
static enum order order_of(const struct node *a, const struct node *b)
{
    if (a == b) {
        return SAME;
    }
    if (!b || (a && node_is_above(a, b))) {
        return ABOVE;
    }
    return !a || node_is_above(b, a) ? BELOW : BESIDE;
}

enum range_relation {
    RANGE_ABOVE,
    RANGE_TOUCHES,
    RANGE_REACHES,
    RANGE_HIGHER,
    RANGE_AROUND,
    RANGE_LOWER,
    RANGE_EQUAL,
    RANGE_BRANCHES,
    RANGE_INSIDE,
    RANGE_NOT_LOWER,
    RANGE_NOT_HIGHER,
    RANGE_REACHED,
    RANGE_TOUCHED,
    RANGE_BELOW,
};
static const struct relation range_relations[] = {
    [RANGE_ABOVE] = {0, "A above B", false},
    [RANGE_TOUCHES] = {1, "A's base is B's top", false},
    [RANGE_REACHES] = {2, "A reaches into B from above", false},
    [RANGE_HIGHER] = {3, "same base, A's top is higher", false},
    [RANGE_AROUND] = {4, "B inside A", false},
    [RANGE_LOWER] = {5, "same top, A's base is lower", false},
    [RANGE_EQUAL] = {6, "same top, same base", false},
    [RANGE_BRANCHES] = {7, "different branches", false},
    [RANGE_INSIDE] = {8, "A inside B", true},
    [RANGE_NOT_LOWER] = {9, "same top, B's base is lower", true},
    [RANGE_NOT_HIGHER] = {10, "same base, B's top is higher", true},
    [RANGE_REACHED] = {11, "B reaches into A from above", true},
    [RANGE_TOUCHED] = {12, "B's base is A's top", true},
    [RANGE_BELOW] = {13, "B above A", true},
};

/* The top of the one lies above the other's. */
static enum range_relation range_from_above(const struct instance *upper, const struct instance *lower)
{
    static const enum range_relation by_ends[] = {
        [SAME] = RANGE_HIGHER, [ABOVE] = RANGE_REACHES, [BELOW] = RANGE_AROUND, [BESIDE] = RANGE_BRANCHES};

    switch (order_of(upper->low, lower->high)) {
    case SAME:
        return RANGE_TOUCHES;
    case ABOVE:
        return RANGE_ABOVE;
    default:
        return by_ends[order_of(upper->low, lower->low)];
    }
}

static enum range_relation range_mirror(enum range_relation relation)
{
    static const enum range_relation mirrored[] = {
        [RANGE_ABOVE] = RANGE_BELOW,       [RANGE_TOUCHES] = RANGE_TOUCHED,   [RANGE_REACHES] = RANGE_REACHED,
        [RANGE_HIGHER] = RANGE_NOT_HIGHER, [RANGE_AROUND] = RANGE_INSIDE,     [RANGE_LOWER] = RANGE_NOT_LOWER,
        [RANGE_EQUAL] = RANGE_EQUAL,       [RANGE_BRANCHES] = RANGE_BRANCHES,
    };
    return mirrored[relation];
}

static const struct relation *relation_of_ranges(const struct instance *a, const struct instance *b)
{
    static const enum range_relation by_base[] = {
        [SAME] = RANGE_EQUAL, [ABOVE] = RANGE_NOT_LOWER, [BELOW] = RANGE_LOWER, [BESIDE] = RANGE_BRANCHES};

    switch (order_of(a->high, b->high)) {
    case SAME:
        return &range_relations[by_base[order_of(a->low, b->low)]];
    case ABOVE:
        return &range_relations[range_from_above(a, b)];
    case BELOW:
        return &range_relations[range_mirror(range_from_above(b, a))];
    default:
        return &range_relations[RANGE_BRANCHES];
    }
}

static const struct relation *relation_to_node(const struct instance *a, const struct node *node)
{
    static const struct relation by_top[] = {[SAME] = {1, "B is A's top", false},
                                             [BELOW] = {0, "B above A", false},
                                             [BESIDE] = {5, "B on another branch", false}};
    static const struct relation by_base[] = {[SAME] = {3, "B is A's base", false},
                                              [ABOVE] = {4, "B below A", false},
                                              [BELOW] = {2, "B between A's top and base", false}};
    enum order top = order_of(a->high, node);

    return top == ABOVE ? &by_base[order_of(a->low, node)] : &by_top[top];
}

static const struct relation *relation_of_nodes(const struct node *a, const struct node *b)
{
    static const struct relation relations[] = {[ABOVE] = {0, "A above B", false},
                                                [SAME] = {1, "same node", false},
                                                [BESIDE] = {2, "different branches", false},
                                                [BELOW] = {3, "B above A", true}};
    return &relations[order_of(a, b)];
}

const struct relation *relation_find(const struct instance *first, const struct instance *second)
{
    if (!first->variant->on_range) {
        g_assert(!second->variant->on_range);
        return relation_of_nodes(first->high, second->high);
    }
    return second->variant->on_range ? relation_of_ranges(first, second) : relation_to_node(first, second->high);
}

/* Does `upper` lean on `lower`? */
static bool leans_on(const struct node *upper, const struct node *lower)
{
    return upper && lower && node_backing(upper) == lower;
}

char *relation_neighbours(const struct instance *first, const struct instance *second)
{
    const struct instance *both[] = {first, second};
    GString *text = g_string_new(NULL);

    for (unsigned i = 0; i < 8; i++) {
        const struct instance *upper = both[i & 1], *lower = both[!(i & 1)];
        bool from_low = i & 2, to_low = i & 4;

        if ((from_low && !upper->variant->on_range) || (to_low && !lower->variant->on_range)) {
            continue; /* its only node is its high one */
        }
        if (leans_on(from_low ? upper->low : upper->high, to_low ? lower->low : lower->high)) {
            g_string_append_printf(text, "%s%c%s leans on %c%s", text->len ? ", " : "", i & 1 ? 'B' : 'A',
                                   !upper->variant->on_range ? ""
                                   : from_low                ? "'s base"
                                                             : "'s top",
                                   i & 1 ? 'A' : 'B',
                                   !lower->variant->on_range ? ""
                                   : to_low                  ? "'s base"
                                                             : "'s top");
        }
    }
    return g_string_free(text, FALSE);
}

/* Does an image lean on `node` that is not `above`, which is the way that we came? */
static bool has_stranger(const struct node *node, const struct node *above)
{
    list_for_each (link, &node->parents) {
        const struct edge *edge = container_of(link, struct edge, child_link);

        if (edge->role == EDGE_BACKING && edge->parent != above) {
            return true;
        }
    }
    return false;
}

static const char *range_place(const struct instance *instance)
{
    const struct node *above = instance->high;

    for (const struct node *node = node_backing(above); node; above = node, node = node_backing(node)) {
        if (has_stranger(node, above) && node == instance->low) {
            return "an image of another branch leans on its base";
        }
        if (has_stranger(node, above)) {
            return "an image of another branch leans on one between";
        }
        if (node == instance->low) {
            break;
        }
    }
    return "no other branch leans on its base, or between";
}

const char *instance_place(const struct instance *instance)
{
    if (instance->variant->on_range) {
        return range_place(instance);
    }
    return has_overlay(instance->high) ? "another image leans on it" : "nothing leans on it";
}

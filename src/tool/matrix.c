/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The operation matrix. Every instance of every operation that has a claim table is begun on graphs without storage
 * (shape.h), every other one is asked about beside it, and the verdicts are folded by the relation of their nodes. So
 * the matrix shows what the code decides: the schema's claim tables and the edges' standing claims, through the real
 * derivation of roles and the real ledger. It knows no rule itself.
 *
 * 1. Each pair is asked in both orders; verdict and reasons must be the same.
 * 2. All pairs in one row have the same verdict. Where the relation alone does not decide it, the row is split by which
 *    ends lean on each other; if that does not decide it either, there is no matrix but an error.
 * 3. A row's rules are the reasons that all of its pairs have in common, and a refused row has one.
 */
#include "tool/matrix.h"
#include "tool/instance.h"
#include "tool/shape.h"
#include <errno.h>
#include <string.h>

/* A pair, or one operation alone, with its verdict. */
struct finding {
    char *key; /* which row it belongs to: sorts them as well */
    const char *first, *second;
    char *relation, *neighbours;
    bool admitted;
    json_t *rules;
    json_t *instance;
    json_t *also; /* alone: other commands of which the same is true */
};

struct making {
    GPtrArray *variants;
    GPtrArray *alone, *pairs; /* struct finding */
    json_t *graphs;
};

static void finding_free(void *argument)
{
    struct finding *finding = argument;

    g_free(finding->key);
    g_free(finding->relation);
    g_free(finding->neighbours);
    json_decref(finding->rules);
    json_decref(finding->instance);
    json_decref(finding->also);
    g_free(finding);
}

/* --- asking --- */

static bool rules_have(json_t *rules, json_t *wanted)
{
    size_t index;
    json_t *rule;

    json_array_foreach(rules, index, rule)
    {
        if (json_equal(rule, wanted)) {
            return true;
        }
    }
    return false;
}

static json_t *rules_common(json_t *rules, json_t *others)
{
    json_t *common = json_array(), *rule;
    size_t index;

    json_array_foreach(rules, index, rule)
    {
        if (rules_have(others, rule)) {
            json_array_append(common, rule);
        }
    }
    return common;
}

static bool rules_equal(json_t *rules, json_t *others)
{
    json_t *common = rules_common(rules, others);
    bool equal =
        json_array_size(common) == json_array_size(rules) && json_array_size(common) == json_array_size(others);

    json_decref(common);
    return equal;
}

/* `asked` and `held` are the letters of who asks and who holds. */
static json_t *rule_make(json_t *conflict, const char *asked, const char *held)
{
    const char *action = "", *direction = "", *path = "", *holder_path = "";

    json_unpack(conflict, "{s:s, s:s, s?s, s?s}", "action", &action, "direction", &direction, "path", &path,
                "holder-path", &holder_path);
    if (!strcmp(direction, "adopted")) {
        return json_pack("{s:s}", "action", "adopt");
    }
    bool asked_requires = !strcmp(direction, "required");

    return json_pack("{s:s, s:s, s:s, s:s, s:s}", "action", action, "required-by", asked_requires ? asked : held,
                     "required-as", asked_requires ? path : holder_path, "denied-by", asked_requires ? held : asked,
                     "denied-as", asked_requires ? holder_path : path);
}

/* Would it be admitted now? *ret_rules: why not. */
static bool ask(struct graph *graph, const struct instance *instance, struct node *spare, const char *asked,
                const char *held, json_t **ret_rules)
{
    struct operation_config config = instance_config(instance, "asked", spare);
    auto_error error = NULL;
    size_t index;
    json_t *conflict;
    bool admitted = operation_check(graph, &config, &error) == 0;

    *ret_rules = json_array();
    json_array_foreach(error ? json_object_get(error->data, "conflicts") : NULL, index, conflict)
    {
        json_t *rule = rule_make(conflict, asked, held);

        if (!rules_have(*ret_rules, rule)) {
            json_array_append(*ret_rules, rule);
        }
        json_decref(rule);
    }
    return admitted;
}

/* --- all instances of one graph --- */

/* What was said of `asked` beside `held`: of instances[asked * count + held]. */
struct answer {
    bool admitted;
    json_t *rules;
};

static unsigned variant_index(const struct making *making, const struct variant *variant)
{
    guint index = 0;
    bool found = g_ptr_array_find(making->variants, variant, &index);

    g_assert(found);
    return index;
}

static json_t *names_also(const struct variant *variant)
{
    json_t *names = json_array();

    for (unsigned i = 0; i < variant->also->len; i++) {
        json_array_append_new(names, json_string(variant->also->pdata[i]));
    }
    return names;
}

static bool ask_alone(struct making *making, struct graph *graph, const struct shape *shape, struct node *spare,
                      const struct instance *instance)
{
    struct finding *finding = g_new0(struct finding, 1);

    finding->first = instance->variant->name;
    finding->relation = g_strdup(instance_place(instance));
    finding->neighbours = g_strdup("");
    finding->key = g_strdup_printf("%03u %s", variant_index(making, instance->variant), finding->relation);
    finding->also = names_also(instance->variant);
    finding->admitted = ask(graph, instance, spare, "A", "graph", &finding->rules);
    finding->instance = json_pack("{s:s, s:s}", "graph", shape->name, "operation", instance->text);
    g_ptr_array_add(making->alone, finding);
    return finding->admitted;
}

/* Holds each in turn and asks about all. */
static void coroutine_fn ask_beside(struct graph *graph, struct node *const spares[SHAPE_SPARES],
                                    const GPtrArray *possible, struct answer *answers)
{
    for (unsigned held = 0; held < possible->len; held++) {
        struct operation_config config = instance_config(possible->pdata[held], "held", spares[0]);
        struct operation *operation;
        int code = operation_begin(graph, &config, &operation, NULL);

        g_assert(code == 0);
        for (unsigned asked = 0; asked < possible->len; asked++) {
            struct answer *answer = &answers[asked * possible->len + held];
            bool asked_is_first = asked < held;

            answer->admitted = ask(graph, possible->pdata[asked], spares[1], asked_is_first ? "A" : "B",
                                   asked_is_first ? "B" : "A", &answer->rules);
        }
        operation_end(operation);
    }
}

/* Instances are in the order of their variants, so `first` is never of a later variant than `second`. */
static void pair_add(struct making *making, const struct shape *shape, const struct instance *first,
                     const struct instance *second, const struct answer *answer)
{
    const struct relation *relation = relation_find(first, second);
    struct finding *finding = g_new0(struct finding, 1);

    finding->first = first->variant->name;
    finding->second = second->variant->name;
    finding->relation = g_strdup(relation->words);
    finding->neighbours = relation_neighbours(first, second);
    finding->key = g_strdup_printf("%03u %03u %02u", variant_index(making, first->variant),
                                   variant_index(making, second->variant), relation->rank);
    finding->admitted = answer->admitted;
    finding->rules = json_incref(answer->rules);
    finding->instance =
        json_pack("{s:s, s:s, s:s}", "graph", shape->name, "first", first->text, "second", second->text);
    g_ptr_array_add(making->pairs, finding);
}

static json_t *rules_exchanged(json_t *rules)
{
    json_t *exchanged = json_deep_copy(rules), *rule;
    size_t index;

    json_array_foreach(exchanged, index, rule)
    {
        static const char *const keys[] = {"required-by", "denied-by"};

        for (unsigned i = 0; i < 2 && json_object_get(rule, keys[i]); i++) {
            bool was_first = !strcmp(json_string_value(json_object_get(rule, keys[i])), "A");

            json_object_set_new(rule, keys[i], json_string(was_first ? "B" : "A"));
        }
    }
    return exchanged;
}

/* A pair of one variant may lie either way round: it goes to the row that is named first. */
static void pair_add_in_order(struct making *making, const struct shape *shape, const struct instance *first,
                              const struct instance *second, const struct answer *answer)
{
    if (first->variant == second->variant && relation_find(first, second)->inverse) {
        struct answer exchanged = {answer->admitted, rules_exchanged(answer->rules)};

        pair_add(making, shape, second, first, &exchanged);
        json_decref(exchanged.rules);
    } else {
        pair_add(making, shape, first, second, answer);
    }
}

static int pairs_add(struct making *making, const struct shape *shape, const GPtrArray *possible,
                     const struct answer *answers, struct error **err)
{
    for (unsigned i = 0; i < possible->len; i++) {
        for (unsigned j = i; j < possible->len; j++) {
            const struct instance *first = possible->pdata[i], *second = possible->pdata[j];
            const struct answer *answer = &answers[i * possible->len + j], *other = &answers[j * possible->len + i];

            if (answer->admitted != other->admitted || !rules_equal(answer->rules, other->rules)) {
                return error_set(err, -EINVAL, "The verdict on '%s' and '%s' (%s) depends on their order", first->text,
                                 second->text, shape->name);
            }
            pair_add_in_order(making, shape, first, second, answer);
        }
    }
    return 0;
}

static void shape_describe(struct making *making, const struct shape *shape)
{
    json_t *images = json_object();

    for (unsigned i = 0; i < shape_size(shape); i++) {
        json_object_set_new(images, shape->images[i].node, json_pack("s?", shape->images[i].backing));
    }
    json_object_set_new(making->graphs, shape->name, images);
}

static int coroutine_fn ask_shape(struct making *making, const struct shape *shape, struct error **err)
{
    struct node *nodes[G_N_ELEMENTS(shape->images) + SHAPE_SPARES];
    unsigned count = shape_size(shape);
    struct graph *graph = shape_open(shape, nodes);
    g_autoptr(GPtrArray) instances = instances_make(making->variants, nodes, count);
    g_autoptr(GPtrArray) possible = g_ptr_array_new();

    shape_describe(making, shape);
    for (unsigned i = 0; i < instances->len; i++) {
        if (ask_alone(making, graph, shape, nodes[count], instances->pdata[i])) {
            g_ptr_array_add(possible, instances->pdata[i]);
        }
    }
    size_t answer_count = (size_t)possible->len * possible->len;
    g_autofree struct answer *answers = g_new0(struct answer, answer_count);

    ask_beside(graph, &nodes[count], possible, answers);
    int code = pairs_add(making, shape, possible, answers, err);

    for (size_t i = 0; i < answer_count; i++) {
        json_decref(answers[i].rules);
    }
    shape_close(graph, shape, nodes);
    return code;
}

/* --- folding --- */

static int finding_compare(const void *a, const void *b)
{
    return strcmp((*(struct finding *const *)a)->key, (*(struct finding *const *)b)->key);
}

static json_t *row_make(const struct finding *finding, const char *relation)
{
    json_t *row = json_pack("{s:b, s:O, s:[O]}", "admitted", finding->admitted, "rules", finding->rules, "instances",
                            finding->instance);

    if (finding->second) {
        json_object_set_new(row, "first", json_string(finding->first));
        json_object_set_new(row, "second", json_string(finding->second));
        json_object_set_new(row, "relation", json_string(relation));
    } else {
        json_object_set_new(row, "operation", json_string(finding->first));
        json_object_set(row, "also", finding->also);
        json_object_set_new(row, "place", json_string(relation));
    }
    return row;
}

/* Into the row of its relation. */
static int row_add(GHashTable *rows, json_t *out, const struct finding *finding, bool by_neighbours, struct error **err)
{
    const char *more = *finding->neighbours ? finding->neighbours : "no end leans on the other";
    g_autofree char *relation =
        by_neighbours ? g_strdup_printf("%s: %s", finding->relation, more) : g_strdup(finding->relation);
    json_t *row = g_hash_table_lookup(rows, relation);

    if (!row) {
        row = row_make(finding, relation);
        g_hash_table_insert(rows, g_steal_pointer(&relation), row);
        json_array_append_new(out, row);
        return 0;
    }
    if (json_is_true(json_object_get(row, "admitted")) != finding->admitted) {
        g_autofree char *instance = json_dumps(finding->instance, 0);
        g_autofree char *example = json_dumps(json_array_get(json_object_get(row, "instances"), 0), 0);

        return error_set(err, -EINVAL, "'%s' does not decide: %s and %s have different verdicts", relation, example,
                         instance);
    }
    json_object_set_new(row, "rules", rules_common(json_object_get(row, "rules"), finding->rules));
    if (!finding->admitted && !json_array_size(json_object_get(row, "rules"))) {
        return error_set(err, -EINVAL, "'%s' of %s is refused for different reasons", relation, finding->first);
    }
    json_array_append(json_object_get(row, "instances"), finding->instance);
    return 0;
}

/* findings[from..to) have the same operations and relation. */
static int fold(GPtrArray *findings, unsigned from, unsigned to, json_t *out, struct error **err)
{
    g_autoptr(GHashTable) rows = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    const struct finding *first = findings->pdata[from];
    bool mixed = false;
    int code = 0;

    json_t *rules = json_incref(first->rules);

    for (unsigned i = from; i < to; i++) {
        const struct finding *finding = findings->pdata[i];
        json_t *common = rules_common(rules, finding->rules);

        json_decref(rules);
        rules = common;
        mixed = mixed || finding->admitted != first->admitted || (!finding->admitted && !json_array_size(rules));
    }
    json_decref(rules);
    for (unsigned i = from; i < to && !code; i++) {
        code = row_add(rows, out, findings->pdata[i], mixed, err);
    }
    return code;
}

static int fold_all(GPtrArray *findings, json_t *out, struct error **err)
{
    int code = 0;

    g_ptr_array_sort(findings, finding_compare);
    for (unsigned from = 0, to = 0; from < findings->len && !code; from = to) {
        while (to < findings->len && finding_compare(&findings->pdata[from], &findings->pdata[to]) == 0) {
            to++;
        }
        code = fold(findings, from, to, out, err);
    }
    return code;
}

int coroutine_fn matrix_make(json_t **ret, struct error **err)
{
    struct making making = {.alone = g_ptr_array_new_with_free_func(finding_free),
                            .pairs = g_ptr_array_new_with_free_func(finding_free),
                            .graphs = json_object()};
    json_t *alone = json_array(), *pairs = json_array();
    int code = variants_make(&making.variants, err);

    for (unsigned i = 0; i < shape_count && !code; i++) {
        code = ask_shape(&making, &shapes[i], err);
    }
    if (!code) {
        code = fold_all(making.alone, alone, err);
    }
    if (!code) {
        code = fold_all(making.pairs, pairs, err);
    }
    json_t *matrix = json_pack("{s:o, s:o, s:o}", "graphs", making.graphs, "alone", alone, "pairs", pairs);

    g_ptr_array_free(making.alone, TRUE);
    g_ptr_array_free(making.pairs, TRUE);
    g_clear_pointer(&making.variants, g_ptr_array_unref);
    if (code) {
        json_decref(matrix);
        return code;
    }
    *ret = matrix;
    return 0;
}

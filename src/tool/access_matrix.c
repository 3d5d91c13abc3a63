/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock access matrix`: prints the operation matrix as text, as tables for the manual, or as data. Owns the words
 * in which a rule is said; what is said is matrix.c's finding.
 *
 * It asks no daemon: the graphs are made here, on a loop of its own, which ends before anything is printed. When the
 * matrix cannot be made (verdicts that contradict each other) it prints none and says why.
 */
#include "loop/loop.h"
#include "tool/access.h"
#include "tool/matrix.h"
#include <stdio.h>
#include <string.h>

struct run {
    json_t *matrix;
    int code;
    struct error **err;
};

static void coroutine_fn run_matrix(void *argument)
{
    struct run *run = argument;

    run->code = matrix_make(&run->matrix, run->err);
}

/* --- rules in words --- */

static const char *member(json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));

    return text ? text : "";
}

/* Do two rules differ in the action alone? */
static bool same_roles(json_t *a, json_t *b)
{
    static const char *const keys[] = {"required-by", "required-as", "denied-by", "denied-as"};

    for (unsigned i = 0; i < G_N_ELEMENTS(keys); i++) {
        if (strcmp(member(a, keys[i]), member(b, keys[i])) != 0) {
            return false;
        }
    }
    return true;
}

static char *actions_join(json_t *rules, json_t *like)
{
    GString *text = g_string_new(NULL);
    size_t index;
    json_t *rule;

    json_array_foreach(rules, index, rule)
    {
        if (same_roles(rule, like)) {
            g_string_append_printf(text, "%s%s", text->len ? ", " : "", member(rule, "action"));
        }
    }
    return g_string_free(text, FALSE);
}

/* "A as between(top, base) denies read-data, which B as node requires"; of one alone: "the graph (a backing edge)
 * denies write-data, which it requires as node" */
static char *rule_format(json_t *rules, json_t *rule)
{
    g_autofree char *actions = actions_join(rules, rule);

    if (!strcmp(member(rule, "action"), "adopt")) {
        return g_strdup("both would adopt the same edge");
    }
    if (!strcmp(member(rule, "denied-by"), "graph")) {
        return g_strdup_printf("a %s denies %s, which it requires as %s", member(rule, "denied-as"), actions,
                               member(rule, "required-as"));
    }
    if (!strcmp(member(rule, "required-by"), "graph")) {
        return g_strdup_printf("a %s requires %s, which it denies as %s", member(rule, "required-as"), actions,
                               member(rule, "denied-as"));
    }
    return g_strdup_printf("%s as %s denies %s, which %s as %s requires", member(rule, "denied-by"),
                           member(rule, "denied-as"), actions, member(rule, "required-by"),
                           member(rule, "required-as"));
}

static bool is_first_of_its_roles(json_t *rules, size_t index)
{
    for (size_t i = 0; i < index; i++) {
        if (same_roles(json_array_get(rules, i), json_array_get(rules, index))) {
            return false;
        }
    }
    return true;
}

/* Every rule of a row; g_strfreev(). */
static char **rules_format(json_t *row)
{
    g_autoptr(GPtrArray) words = g_ptr_array_new();
    json_t *rules = json_object_get(row, "rules"), *rule;
    size_t index;

    json_array_foreach(rules, index, rule)
    {
        if (is_first_of_its_roles(rules, index)) {
            g_ptr_array_add(words, rule_format(rules, rule));
        }
    }
    g_ptr_array_add(words, NULL);
    return (char **)g_ptr_array_free(g_steal_pointer(&words), FALSE);
}

static char *example_format(json_t *row)
{
    json_t *instance = json_array_get(json_object_get(row, "instances"), 0);

    return json_object_get(instance, "second")
               ? g_strdup_printf("%s, %s", member(instance, "first"), member(instance, "second"))
               : g_strdup(member(instance, "operation"));
}

/* --- printing --- */

struct format {
    const char *introduction;
    const char *section, *head, *table, *row, *row_end, *separator;
    const char *admitted, *refused;
};
static const struct format text_format = {
    .introduction =
        "Which operations access control admits, by the relation of their nodes. commit T>B: T into B;\n"
        "stream X..Y: into X, down to Y, which is not included; resize: longer; cbf: change-backing-file;\n"
        "mirror, backup, snapshot N: of N; replace N: a mirror whose target takes N's place; -ro: read-only,\n"
        "-rw: writable, -sh: not exclusive.\n",
    .section = "\n%s\n",
    .head = "\n%s%s%s\n",
    .table = "",
    .row = "  %-58s %-8s e.g. %s",
    .row_end = "\n",
    .separator = "\n      ",
    .admitted = "admitted",
    .refused = "REFUSED",
};
static const struct format markdown_format = {
    .introduction =
        "\n## The operation matrix\n\n"
        "Which operations access control admits, by the relation of their nodes. Each was begun, and every other one "
        "asked about, in\nboth orders, on small graphs, with the claims above: the table is made by the program "
        "(`interlock access matrix`), not by\nhand. A is the operation that is named first. `commit T>B` commits T "
        "into "
        "B; `stream X..Y` streams into X, down to Y, which\nis not included; `resize` makes a node longer; `cbf` is "
        "change-backing-file; exports are `-ro` (read-only) or `-rw` (writable),\nand `-sh` unless exclusive; "
        "`mirror`, "
        "`backup` and `snapshot` are of a node, and `replace` is a mirror whose target takes the\nnode's place. "
        "Targets "
        "are nodes that nobody else uses. A command that claims what another one claims stands with it in the\nfirst "
        "list only.\n",
    .section = "\n### %s\n",
    .head = "\n**%s%s%s**\n\n",
    .table = "| relation | verdict | for example | because |\n|---|---|---|---|\n",
    .row = "| %s | %s | %s |",
    .row_end = " |\n",
    .separator = " ",
    .admitted = "admitted",
    .refused = "refused",
};

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
static void print_row(const struct format *format, const char *relation, json_t *row)
{
    g_autofree char *example = example_format(row);
    g_auto(GStrv) words = rules_format(row);

    printf(format->row, relation, json_is_true(json_object_get(row, "admitted")) ? format->admitted : format->refused,
           example);
    for (unsigned i = 0; words[i]; i++) {
        printf("%s%s%s", format->separator, words[i], words[i + 1] ? ";" : "");
    }
    printf("%s", format->row_end);
}

/* An operation and the others that claim the same; g_free(). */
static char *operation_format(json_t *row)
{
    GString *text = g_string_new(member(row, "operation"));
    size_t index;
    json_t *name;

    json_array_foreach(json_object_get(row, "also"), index, name)
    {
        g_string_append_printf(text, ", %s", json_string_value(name));
    }
    return g_string_free(text, FALSE);
}

static void print_rows(const struct format *format, json_t *rows, const char *first_key, const char *second_key,
                       const char *relation_key)
{
    json_t *row, *before = NULL;
    size_t index;

    json_array_foreach(rows, index, row)
    {
        const char *first = member(row, first_key), *second = second_key ? member(row, second_key) : "";

        if (!before || strcmp(first, member(before, first_key)) != 0 ||
            (second_key && strcmp(second, member(before, second_key)) != 0)) {
            g_autofree char *named = second_key ? g_strdup_printf("A: %s", first) : operation_format(row);

            printf(format->head, named, second_key ? ", B: " : "", second);
            printf("%s", format->table);
        }
        print_row(format, member(row, relation_key), row);
        before = row;
    }
}

static void print_matrix(const struct format *format, json_t *matrix)
{
    printf("%s", format->introduction);
    printf(format->section, "One operation alone");
    print_rows(format, json_object_get(matrix, "alone"), "operation", NULL, "place");
    printf(format->section, "Two operations side by side");
    print_rows(format, json_object_get(matrix, "pairs"), "first", "second", "relation");
}
#pragma GCC diagnostic pop

int access_matrix(const struct access_options *options, int *ret_status, struct error **err)
{
    struct run run = {.err = err};
    struct loop *loop;
    int code = loop_create(ENGINE_AUTO, &loop, err);

    if (code) {
        return code;
    }
    loop_run_coroutine(loop, run_matrix, &run);
    loop_destroy(loop);
    if (run.code) {
        return run.code;
    }
    if (options->json) {
        access_print_json(run.matrix);
    } else {
        print_matrix(options->markdown ? &markdown_format : &text_format, run.matrix);
    }
    json_decref(run.matrix);
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock access [show|check|matrix]`. This file has the verbs and `show`: who holds what on which node, from
 * query-access. A client of the monitor: it knows no graph and decides nothing. Claims are shown as what a holder needs
 * and what it does not allow others, which is shorter than what it allows; edges' standing claims only on demand.
 * The list of action names below is only for that turn-about.
 */
#include "tool/access.h"
#include "tool/tool.h"
#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char *join_words(json_t *words, const char *between, const char *none)
{
    g_autoptr(GString) text = g_string_new(NULL);
    size_t index;
    json_t *word;

    json_array_foreach(words, index, word)
    {
        g_string_append_printf(text, "%s%s", index ? between : "", json_string_value(word));
    }
    return g_strdup(text->len ? text->str : none);
}

/* "read-data read-metadata", or "-" */
static char *join_actions(json_t *actions)
{
    return join_words(actions, " ", "-");
}

/* What is not in `allow`: easier to read than what is. */
static char *join_denied(json_t *allow)
{
    static const char *const all[] = {"read-data",      "read-metadata", "write-data", "write-beneath",
                                      "write-metadata", "attributes",    "graph"};
    auto_json denied = json_array();

    for (unsigned i = 0; i < G_N_ELEMENTS(all); i++) {
        bool allowed = false;
        size_t index;
        json_t *action;

        json_array_foreach(allow, index, action)
        {
            allowed = allowed || !strcmp(json_string_value(action), all[i]);
        }
        if (!allowed) {
            json_array_append_new(denied, json_string(all[i]));
        }
    }
    return json_array_size(denied) == G_N_ELEMENTS(all) ? g_strdup("everything") : join_actions(denied);
}

/* Takes `more` into `claim`: what either needs, and what both allow. */
static void merge_claim(json_t *claim, json_t *more)
{
    json_t *require = json_object_get(claim, "require"), *allow = json_object_get(claim, "allow"), *action;
    auto_json both = json_array();
    size_t i, j;

    json_array_extend(require, json_object_get(more, "require"));
    json_array_foreach(allow, i, action)
    {
        for (j = 0; j < json_array_size(json_object_get(more, "allow")); j++) {
            if (json_equal(action, json_array_get(json_object_get(more, "allow"), j))) {
                json_array_append(both, action);
            }
        }
    }
    json_object_set(claim, "allow", both);
}

/* One role may have several clauses on a node; people want to see their sum. */
static void merge_claims(json_t *claims)
{
    for (size_t i = 1; i < json_array_size(claims);) {
        json_t *claim = json_array_get(claims, i - 1), *next = json_array_get(claims, i);

        if (json_equal(json_object_get(claim, "node"), json_object_get(next, "node")) &&
            json_equal(json_object_get(claim, "path"), json_object_get(next, "path"))) {
            merge_claim(claim, next);
            json_array_remove(claims, i);
        } else {
            i++;
        }
    }
}

void access_print_claims(json_t *claims)
{
    size_t index;
    json_t *claim;

    merge_claims(claims);
    json_array_foreach(claims, index, claim)
    {
        const char *node = json_string_value(json_object_get(claim, "node"));
        const char *path = json_string_value(json_object_get(claim, "path"));
        g_autofree char *needs = join_actions(json_object_get(claim, "require"));
        g_autofree char *denies = join_denied(json_object_get(claim, "allow"));

        printf("    %-16s needs %-40s does not allow %-40s (as %s)\n", node, needs, denies, path ? path : "");
    }
}

static void print_holder(json_t *holder, bool edges)
{
    const char *id = "", *kind = "", *command = "", *adopter = NULL;
    double since = 0;
    json_t *claims = NULL;

    json_unpack(holder, "{s:s, s:s, s:s, s:F, s?s, s:o}", "id", &id, "kind", &kind, "command", &command, "since",
                &since, "adopted-by", &adopter, "claims", &claims);
    if (!strcmp(kind, "edge") && !edges) {
        return;
    }
    printf("%s %s", strcmp(kind, "job") ? kind : command, id);
    if (strcmp(kind, "edge")) {
        printf("  (since %.0f s)", since);
    }
    if (adopter) {
        printf("  (in the hands of %s)", adopter);
    }
    printf("\n");
    access_print_claims(claims);
}

static int access_show(const struct access_options *options, int *ret_status, struct error **err)
{
    auto_client client = NULL;
    auto_json access = NULL;
    int code = client_connect(options->qmp, &client, err);
    size_t index;
    json_t *item;

    if (!code) {
        code = client_execute(client, "query-access", NULL, &access, err);
    }
    if (code) {
        return code;
    }
    if (options->json) {
        access_print_json(access);
        return 0;
    }
    json_array_foreach(json_object_get(access, "holders"), index, item)
    {
        print_holder(item, options->edges);
    }
    json_array_foreach(json_object_get(access, "waiting"), index, item)
    {
        g_autofree char *behind = join_words(json_object_get(item, "behind"), ", ", "its turn");

        printf("%s %s waits since %.0f s for %s\n", json_string_value(json_object_get(item, "command")),
               json_string_value(json_object_get(item, "id")), json_number_value(json_object_get(item, "since")),
               behind);
    }
    json_array_foreach(json_object_get(access, "stale"), index, item)
    {
        printf("stale: %s (%s)\n", json_string_value(json_object_get(item, "node")),
               json_string_value(json_object_get(item, "reason")));
    }
    return 0;
}

void access_print_json(const json_t *json)
{
    char *text = json_dumps(json, JSON_INDENT(2));

    puts(text);
    free(text);
}

static int access_cancel(const struct access_options *options, int *ret_status, struct error **err)
{
    auto_client client = NULL;
    int code = options->words[1] ? client_connect(options->qmp, &client, err)
                                 : error_set(err, -EINVAL, "Say who is not to wait any more: access cancel ID");

    return code ? code
                : client_execute(client, "access-cancel", json_pack("{s:s}", "id", options->words[1]), NULL, err);
}

static const struct access_verb {
    const char *name, *parameters, *help;
    int (*run)(const struct access_options *options, int *ret_status, struct error **err);
} verbs[] = {
    {"show", "", "who holds what on which node (what no verb means, too)", access_show},
    {"check", " COMMAND [KEY=VALUE...]",
     "would this command be admitted now? 0: yes, 1: refused, 2: it cannot be asked", access_check},
    {"cancel", " ID", "let an operation that waits for its turn not wait any more", access_cancel},
    {"matrix", "", "which operations may run side by side, by the relation of their nodes (asks no daemon)",
     access_matrix},
};

static int run(const struct access_options *options, int *ret_status, struct error **err)
{
    const char *name = options->words ? options->words[0] : "show";

    for (unsigned i = 0; i < G_N_ELEMENTS(verbs); i++) {
        if (!strcmp(verbs[i].name, name)) {
            return verbs[i].run(options, ret_status, err);
        }
    }
    return error_set(err, -EINVAL, "There is no 'access %s'; see 'interlock access --help'", name);
}

int tool_access(int argc, char **argv)
{
    struct access_options options = {0};
    const GOptionEntry own[] = {
        {"edges", 0, 0, G_OPTION_ARG_NONE, &options.edges, "with show: also the standing claims of edges", NULL},
        {"markdown", 0, 0, G_OPTION_ARG_NONE, &options.markdown, "with matrix: tables for the manual", NULL},
        {"json", 0, 0, G_OPTION_ARG_NONE, &options.json, "print data for programs", NULL},
        {G_OPTION_REMAINING, 0, 0, G_OPTION_ARG_STRING_ARRAY, &options.words, NULL, NULL},
        {NULL, 0, 0, 0, NULL, NULL, NULL}};
    g_autoptr(GString) summary = g_string_new("Node Access Control: what it holds, and what it would decide. Verbs:");
    struct error *err = NULL;
    int status = 0, code;

    for (unsigned i = 0; i < G_N_ELEMENTS(verbs); i++) {
        g_autofree char *usage = g_strconcat(verbs[i].name, verbs[i].parameters, NULL);

        g_string_append_printf(summary, "\n  %-30s %s", usage, verbs[i].help);
    }
    code = tool_parse(&argc, &argv, own, "[VERB]", summary->str, NULL, &options.qmp, &err);
    code = code ? code : run(&options, &status, &err);
    g_free(options.qmp);
    g_strfreev(options.words);
    if (code) {
        tool_fail("interlock access", err);
        return status ? status : 1;
    }
    return status;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock access check COMMAND [KEY=VALUE...]`: asks a running daemon what a command would meet (access-check), and
 * says it in words. The arguments stand on the command line as one JSON object, or one by one: a dot in a key descends,
 * and a value that is JSON (a number, true, [...], {...}, "...") is that, all else is a string.
 *
 * The exit status is the verdict: 0 admitted, 1 refused; 2 when the question could not be answered.
 */
#include "tool/access.h"
#include "tool/arguments.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

static int arguments_read(char **words, json_t **ret, struct error **err)
{
    bool whole = words[0] && words[0][0] == '{' && !words[1];
    json_t *arguments = whole ? json_loads(words[0], 0, NULL) : json_object();
    int code = 0;

    if (!arguments) {
        return error_set(err, -EINVAL, "The arguments are not a JSON object");
    }
    if (!whole) {
        code = arguments_add(arguments, words, err);
    }
    if (code) {
        json_decref(arguments);
        return code;
    }
    *ret = arguments;
    return 0;
}

static void print_refusal(json_t *check)
{
    size_t index;
    json_t *conflict;

    printf("refused\n");
    json_array_foreach(json_object_get(check, "conflicts"), index, conflict)
    {
        const char *sentence = "", *remedy = NULL;

        json_unpack(conflict, "{s?s, s?s}", "sentence", &sentence, "remedy", &remedy);
        printf("  %s%s%s\n", sentence, remedy ? ": " : "", remedy ? remedy : "");
    }
}

static void print_admitted(json_t *check)
{
    const char *reason = json_string_value(json_object_get(check, "reason"));

    if (reason) {
        printf("admitted: it claims nothing, because %s\n", reason);
        return;
    }
    printf("admitted; it would claim\n");
    access_print_claims(json_object_get(check, "claims"));
}

void access_print_check(json_t *check)
{
    if (json_is_true(json_object_get(check, "admitted"))) {
        print_admitted(check);
    } else {
        print_refusal(check);
    }
}

int access_check(const struct access_options *options, int *ret_status, struct error **err)
{
    auto_client client = NULL;
    auto_json arguments = NULL;
    auto_json check = NULL;
    const char *command = options->words ? options->words[1] : NULL;
    int code;

    *ret_status = 2;
    if (!command) {
        return error_set(err, -EINVAL, "'access check' needs a command: check COMMAND [KEY=VALUE...]");
    }
    code = arguments_read(options->words + 2, &arguments, err);
    if (!code) {
        code = client_connect(options->qmp, &client, err);
    }
    if (!code) {
        code = client_execute(client, "access-check",
                              json_pack("{s:s, s:O}", "command", command, "arguments", arguments), &check, err);
    }
    if (code) {
        return code;
    }
    bool admitted = json_is_true(json_object_get(check, "admitted"));

    *ret_status = admitted ? 0 : 1;
    if (options->json) {
        access_print_json(check);
    } else {
        access_print_check(check);
    }
    return 0;
}

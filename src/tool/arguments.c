/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * KEY=VALUE words as arguments of QMP commands (see arguments.h). What keys there are, and of which type, is the
 * daemon's knowledge: a wrong one is refused there, by name.
 */
#include "tool/arguments.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

static json_t *value_read(const char *text)
{
    json_t *json = json_loads(text, JSON_DECODE_ANY, NULL);

    return json ? json : json_string(text);
}

int argument_add(json_t *arguments, const char *word, struct error **err)
{
    const char *equals = strchr(word, '=');

    if (!equals || equals == word) {
        return error_set(err, -EINVAL, "'%s' is not KEY=VALUE", word);
    }
    json_t *value = value_read(equals + 1);
    g_autofree char *key = g_strndup(word, (size_t)(equals - word));
    g_auto(GStrv) parts = g_strsplit(key, ".", -1);
    unsigned count = g_strv_length(parts);

    if (!value) {
        return error_set(err, -EINVAL, "The value of '%s' is not UTF-8", key);
    }
    for (unsigned i = 0; i + 1 < count; i++) {
        json_t *inner = json_object_get(arguments, parts[i]);

        if (!inner) {
            inner = json_object();
            json_object_set_new(arguments, parts[i], inner);
        }
        arguments = inner;
    }
    if (!json_is_object(arguments) || json_object_get(arguments, parts[count - 1]) ||
        json_object_set(arguments, parts[count - 1], value) < 0) {
        json_decref(value);
        return error_set(err, -EINVAL, "'%s' does not go with the arguments before it", word);
    }
    json_decref(value);
    return 0;
}

int arguments_add(json_t *arguments, char *const *words, struct error **err)
{
    int code = 0;

    for (unsigned i = 0; words && words[i] && !code; i++) {
        code = argument_add(arguments, words[i], err);
    }
    return code;
}

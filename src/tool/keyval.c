/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * KEY=VALUE option arguments (see keyval.h). A pure function of its text: any thread, no state.
 *
 * 1. A key is set once: a second value, or a value where another key descends, is an error that names the key.
 * 2. Limits: 64 KiB of text, 32 levels of dots.
 */
#include "tool/keyval.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

#define TEXT_MAX (64 * 1024)
#define DEPTH_MAX 32

char *keyval_next(const char **text)
{
    const char *at = *text;

    if (!*at) {
        return NULL;
    }
    GString *item = g_string_new(NULL);

    for (; *at; at++) {
        if (*at == ',' && at[1] != ',') {
            break;
        }
        at += *at == ',';
        g_string_append_c(item, *at);
    }
    *text = *at ? at + 1 : at;
    return g_string_free(item, FALSE);
}

static bool key_part_is_valid(const char *part)
{
    if (!*part) {
        return false;
    }
    for (const char *at = part; *at; at++) {
        if (!g_ascii_isalnum(*at) && *at != '-' && *at != '_') {
            return false;
        }
    }
    return true;
}

static int set_key(json_t *root, const char *key, const char *value, struct error **err)
{
    g_auto(GStrv) parts = g_strsplit(key, ".", DEPTH_MAX + 1);
    unsigned count = g_strv_length(parts);
    json_t *at = root;

    if (!count) {
        return error_set(err, -EINVAL, "A value stands without a key: '=%s'", value);
    }
    if (count > DEPTH_MAX) {
        return error_set(err, -EINVAL, "The key '%s' descends too deep", key);
    }
    for (unsigned i = 0; i < count; i++) {
        json_t *next = json_object_get(at, parts[i]);

        if (!key_part_is_valid(parts[i])) {
            return error_set(err, -EINVAL, "'%s' is not a valid key", key);
        }
        if (i + 1 == count) {
            if (next) {
                return error_set(err, -EINVAL, "The key '%s' is given twice", key);
            }
            if (json_object_set_new(at, parts[i], json_string(value)) < 0) {
                return error_set(err, -EINVAL, "The value of '%s' is not valid UTF-8", key);
            }
        } else if (next && !json_is_object(next)) {
            return error_set(err, -EINVAL, "'%s' goes below a key that has a value already", key);
        } else if (!next) {
            next = json_object();
            json_object_set_new(at, parts[i], next);
        }
        at = next;
    }
    return 0;
}

/* Turns {"0": a, "1": b} into [a, b], everywhere below. Returns a new reference. */
static json_t *make_lists(json_t *value)
{
    json_t *list, *object, *member;
    const char *key;
    size_t size = json_object_size(value);

    if (!json_is_object(value)) {
        return json_incref(value);
    }
    list = json_array();
    for (size_t i = 0; i < size; i++) {
        g_autofree char *name = g_strdup_printf("%zu", i);

        member = json_object_get(value, name);
        if (!member) {
            break;
        }
        json_array_append_new(list, make_lists(member));
    }
    if (size && json_array_size(list) == size) {
        return list;
    }
    json_decref(list);
    object = json_object();
    json_object_foreach(value, key, member)
    {
        json_object_set_new(object, key, make_lists(member));
    }
    return object;
}

static int parse_pairs(const char *text, const char *implied, json_t *root, struct error **err)
{
    bool first = true;

    for (; *text; first = false) {
        g_autofree char *item = keyval_next(&text);
        char *equals = strchr(item, '=');
        int code;

        if (equals) {
            *equals = 0;
            code = set_key(root, item, equals + 1, err);
        } else if (first && implied) {
            code = set_key(root, implied, item, err);
        } else {
            code = error_set(err, -EINVAL, "Expected KEY=VALUE where '%s' stands", item);
        }
        if (code) {
            return code;
        }
    }
    return 0;
}

int keyval_parse(const char *text, const char *implied, json_t **ret, bool *ret_text, struct error **err)
{
    json_error_t error;
    json_t *root, *made;
    int code;

    if (strlen(text) > TEXT_MAX) {
        return error_set(err, -EINVAL, "The option is longer than %d bytes", TEXT_MAX);
    }
    if (*text == '{') {
        made = json_loads(text, JSON_REJECT_DUPLICATES, &error);
        if (!made) {
            return error_set(err, -EINVAL, "Invalid JSON: %s (at column %d)", error.text, error.column);
        }
        *ret = made;
        *ret_text = false;
        return 0;
    }
    root = json_object();
    code = parse_pairs(text, implied, root, err);
    if (!code) {
        *ret = make_lists(root);
        *ret_text = true;
    }
    json_decref(root);
    return code;
}

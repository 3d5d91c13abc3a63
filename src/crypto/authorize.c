/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Authorizations: lists of rules, the first that matches decides. Owns the list of them.
 *
 * 1. Whatever is in doubt is refused: an identity that nobody knows, an authorization that has been removed.
 * 2. A file of rules is read when the object is added; to read it again, remove and add it.
 *
 * Control thread only.
 */
#include "crypto/authorize.h"
#include "loop/file.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

#define RULES_FILE_MAX (1 << 20)

struct rule {
    char *match;
    bool glob, allow;
};
struct authorization {
    char *id;
    GArray *rules; /* struct rule */
    bool allow;    /* whom no rule matches */
};
static GPtrArray *all; /* NULL: none yet */

static void rule_clear(void *argument)
{
    struct rule *rule = argument;
    g_free(rule->match);
}

static void authorization_free(struct authorization *authorization)
{
    g_array_free(authorization->rules, TRUE);
    g_free(authorization->id);
    g_free(authorization);
}

static struct authorization *find(const char *id)
{
    for (unsigned i = 0; all && i < all->len; i++) {
        struct authorization *authorization = all->pdata[i];
        if (!strcmp(authorization->id, id)) {
            return authorization;
        }
    }
    return NULL;
}

static void take_list(struct authorization *authorization, const struct object_options_authz_list *list)
{
    authorization->allow = list->policy == AUTHZ_POLICY_ALLOW;
    for (size_t i = 0; i < list->rules.count; i++) {
        const struct authz_rule *given = list->rules.items[i];
        struct rule rule = {g_strdup(given->match), given->format == AUTHZ_FORMAT_GLOB,
                            given->policy == AUTHZ_POLICY_ALLOW};
        g_array_append_val(authorization->rules, rule);
    }
}

static int coroutine_fn take_file(struct authorization *authorization, const char *path, struct error **err)
{
    g_autofree char *text = NULL;
    size_t bytes;
    struct object_options_authz_list *list;
    json_error_t problem;
    int code = file_slurp(path, RULES_FILE_MAX, &text, &bytes);
    if (code < 0) {
        return error_set_errno(err, code, "Cannot read the rules in '%s'", path);
    }
    json_t *json = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &problem);
    if (!json) {
        return error_set(err, -EINVAL, "'%s' is no JSON: line %d: %s", path, problem.line, problem.text);
    }
    code = object_options_authz_list_from_json(json, path, &list, err);
    json_decref(json);
    if (code == 0) {
        take_list(authorization, list);
        object_options_authz_list_free(list);
    }
    return code;
}

int coroutine_fn authorization_add(const struct object_options *options, struct error **err)
{
    struct authorization *authorization = g_new0(struct authorization, 1);
    int code = find(options->id) ? error_set(err, -EEXIST, "There is an object '%s' already", options->id) : 0;
    authorization->id = g_strdup(options->id);
    authorization->rules = g_array_new(FALSE, FALSE, sizeof(struct rule));
    g_array_set_clear_func(authorization->rules, rule_clear);
    if (code == 0 && options->qom_type == OBJECT_TYPE_AUTHZ_SIMPLE) {
        struct rule rule = {g_strdup(options->u.authz_simple.identity), false, true};
        g_array_append_val(authorization->rules, rule);
    } else if (code == 0 && options->qom_type == OBJECT_TYPE_AUTHZ_LIST) {
        take_list(authorization, &options->u.authz_list);
    } else if (code == 0) {
        code = take_file(authorization, options->u.authz_list_file.filename, err);
    }
    if (code == 0 && find(options->id)) { /* reading took its time */
        code = error_set(err, -EEXIST, "There is an object '%s' already", options->id);
    }
    if (code < 0) {
        authorization_free(authorization);
        return code;
    }
    all = all ? all : g_ptr_array_new();
    g_ptr_array_add(all, authorization);
    return 0;
}

bool authorization_exists(const char *id)
{
    return find(id);
}

int authorization_remove(const char *id, struct error **err)
{
    struct authorization *authorization = find(id);
    if (!authorization) {
        return error_set(err, -ENOENT, "There is no object '%s'", id);
    }
    g_ptr_array_remove(all, authorization);
    authorization_free(authorization);
    return 0;
}

void authorization_remove_all(void)
{
    for (unsigned i = 0; all && i < all->len; i++) {
        authorization_free(all->pdata[i]);
    }
    g_clear_pointer(&all, g_ptr_array_unref);
}

bool authorization_allows(const char *id, const char *identity)
{
    const struct authorization *authorization = find(id);
    if (!authorization || !identity) {
        return false;
    }
    for (unsigned i = 0; i < authorization->rules->len; i++) {
        const struct rule *rule = &g_array_index(authorization->rules, struct rule, i);
        bool matches = rule->glob ? g_pattern_match_simple(rule->match, identity) : !strcmp(rule->match, identity);
        if (matches) {
            return rule->allow;
        }
    }
    return authorization->allow;
}

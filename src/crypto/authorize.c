/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Authorizations: lists of rules, the first that matches decides. Owns the list of them.
 *
 * Whatever is in doubt is refused: an identity that nobody knows, an authorization that has been removed.
 *
 * Control thread only.
 */
#include "crypto/authorize.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

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

int authorization_add(const char *id, const struct authorization_rule *rules, unsigned count, bool allow,
                      struct error **err)
{
    if (find(id)) {
        return error_set(err, -EEXIST, "There is an object '%s' already", id);
    }
    struct authorization *authorization = g_new0(struct authorization, 1);
    authorization->id = g_strdup(id);
    authorization->allow = allow;
    authorization->rules = g_array_new(FALSE, FALSE, sizeof(struct rule));
    g_array_set_clear_func(authorization->rules, rule_clear);
    for (unsigned i = 0; i < count; i++) {
        struct rule rule = {g_strdup(rules[i].match), rules[i].glob, rules[i].allow};
        g_array_append_val(authorization->rules, rule);
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

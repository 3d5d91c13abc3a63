/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the verbs know of the daemon's nodes: one answer to query-named-block-nodes per verb, asked for when it is first
 * needed. Only what both Interlock and its peer tell is used. A name that is in no answer may still be one that a
 * command takes; so nothing is refused here but what cannot be done without knowing the node.
 */
#include "tool/verb/verb.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define NODE_NAME_MAX 31

static const char *text_of(const json_t *object, const char *key)
{
    return json_string_value(json_object_get(object, key));
}

int nodes_load(struct plan *plan, struct error **err)
{
    return plan->nodes ? 0
                       : client_execute(plan->client, "query-named-block-nodes", json_pack("{s:b}", "flat", 1),
                                        &plan->nodes, err);
}

static const json_t *nodes_search(const struct plan *plan, const char *name)
{
    size_t index;
    json_t *node;

    json_array_foreach(plan->nodes, index, node)
    {
        if (!g_strcmp0(text_of(node, "node-name"), name)) {
            return node;
        }
    }
    return NULL;
}

int nodes_find(struct plan *plan, const char *name, const json_t **ret, struct error **err)
{
    int code = nodes_load(plan, err);

    if (code) {
        return code;
    }
    *ret = nodes_search(plan, name);
    if (!*ret) {
        error_set(err, -ENOENT, "There is no node '%s'", name);
        return error_hint(err, "'interlock status' lists them"), -ENOENT;
    }
    return 0;
}

bool nodes_exists(struct plan *plan, const char *name)
{
    return nodes_load(plan, NULL) == 0 && nodes_search(plan, name);
}

uint64_t nodes_size(const json_t *node)
{
    return (uint64_t)json_integer_value(json_object_get(json_object_get(node, "image"), "virtual-size"));
}

const char *nodes_driver(const json_t *node)
{
    const char *driver = text_of(node, "drv");

    return driver ? driver : "";
}

/* By the picture of the graph, which Interlock has and its peer does not. */
static const char *backing_in_graph(const struct plan *plan, const char *name)
{
    auto_json graph = NULL;
    size_t index;
    json_t *edge;

    if (client_execute(plan->client, "query-graph", NULL, &graph, NULL) < 0) {
        return NULL;
    }
    json_array_foreach(json_object_get(graph, "edges"), index, edge)
    {
        if (!g_strcmp0(text_of(edge, "parent"), name) && !g_strcmp0(text_of(edge, "role"), "backing")) {
            const json_t *child = nodes_search(plan, text_of(edge, "child"));

            return child ? text_of(child, "node-name") : NULL;
        }
    }
    return NULL;
}

const char *nodes_backing(struct plan *plan, const json_t *node)
{
    const char *file = text_of(node, "backing_file"), *found;
    size_t index;
    json_t *other;

    if (!file) {
        return NULL;
    }
    found = backing_in_graph(plan, text_of(node, "node-name"));
    if (found) {
        return found;
    }
    /* Of the nodes with that file, the image and not the file itself. */
    json_array_foreach(plan->nodes, index, other)
    {
        const char *driver = nodes_driver(other);

        if (!g_strcmp0(text_of(other, "file"), file) && strcmp(driver, "file") != 0 &&
            strcmp(driver, "host_device") != 0) {
            return text_of(other, "node-name");
        }
    }
    return NULL;
}

int nodes_path(struct plan *plan, const json_t *node, char **ret, struct error **err)
{
    const char *file = text_of(node, "file");
    g_autofree char *folder = NULL;

    if (file && file[0] == '/') {
        *ret = g_strdup(file);
        return 0;
    }
    if (file && *file && !g_str_has_prefix(file, "json:") && !strchr(file, ':')) {
        folder = client_folder(plan->client);
    }
    g_autofree char *path = folder ? g_canonicalize_filename(file, folder) : NULL;

    if (!path || !g_file_test(path, G_FILE_TEST_EXISTS)) {
        return error_set(err, -EINVAL,
                         "Cannot tell by which path another image finds '%s' ('%s'); give it with --backing FILE",
                         text_of(node, "node-name"), file ? file : "");
    }
    *ret = g_steal_pointer(&path);
    return 0;
}

char *nodes_name_for(struct plan *plan, const char *path)
{
    g_autofree char *base = g_path_get_basename(path);
    char *dot = strchr(base + 1, '.');
    g_autofree char *stem = NULL;

    if (dot) {
        *dot = 0;
    }
    g_strcanon(base, G_CSET_A_2_Z G_CSET_a_2_z G_CSET_DIGITS "-._", '-');
    stem = g_ascii_isalpha(base[0]) ? g_strdup(base) : g_strconcat("n", base, NULL);
    for (unsigned i = 1;; i++) {
        g_autofree char *tail = i > 1 ? g_strdup_printf("-%u", i) : g_strdup("");
        char *name = g_strdup_printf("%.*s%s", (int)(NODE_NAME_MAX - strlen(tail)), stem, tail);
        bool taken = nodes_exists(plan, name);

        for (unsigned j = 0; j < plan->targets->len && !taken; j++) {
            taken = !g_strcmp0(((struct target *)plan->targets->pdata[j])->node, name);
        }
        if (!taken) {
            return name;
        }
        g_free(name);
    }
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock graph`: the picture of a running daemon's nodes, from query-graph: as indented text (an image above what
 * it leans on), as dot, or as SVG through graphviz's `dot`. Protocol nodes are folded into the image that they hold.
 * A client of the monitor: the text is made from data alone, and a node that several lean on is printed once whole.
 * It draws what it was told, in the order in which the daemon tells it.
 */
#include "base/size.h"
#include "tool/client.h"
#include "tool/tool.h"
#include <errno.h>
#include <glib.h>
#include <glib/gstdio.h>
#include <stdio.h>
#include <string.h>

static const char *text_of(json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));

    return text ? text : "";
}

static json_t *find_node(json_t *graph, const char *name)
{
    size_t index;
    json_t *node;

    json_array_foreach(json_object_get(graph, "nodes"), index, node)
    {
        if (!strcmp(text_of(node, "node-name"), name)) {
            return node;
        }
    }
    return NULL;
}

/* The child of `name` by an edge of that role, or NULL. */
static const char *child_by(json_t *graph, const char *name, const char *role)
{
    size_t index;
    json_t *edge;

    json_array_foreach(json_object_get(graph, "edges"), index, edge)
    {
        if (!strcmp(text_of(edge, "parent"), name) && !strcmp(text_of(edge, "role"), role)) {
            return text_of(edge, "child");
        }
    }
    return NULL;
}

static const char *child_below(json_t *graph, const char *name)
{
    const char *child = child_by(graph, name, "backing");

    return child ? child : child_by(graph, name, "filtered");
}

static bool has_parent(json_t *graph, const char *name)
{
    size_t index;
    json_t *edge;

    json_array_foreach(json_object_get(graph, "edges"), index, edge)
    {
        if (!strcmp(text_of(edge, "child"), name)) {
            return true;
        }
    }
    return false;
}

/* The users of a node: "export e0", joined. */
static char *users_of(json_t *graph, const char *name)
{
    g_autoptr(GString) text = g_string_new(NULL);
    size_t index;
    json_t *user;

    json_array_foreach(json_object_get(graph, "users"), index, user)
    {
        if (!strcmp(text_of(user, "node"), name)) {
            g_string_append_printf(text, "%s%s", text->len ? ", " : "", text_of(user, "owner"));
        }
    }
    return g_strdup(text->str);
}

static char *node_label(json_t *graph, json_t *node)
{
    const char *name = text_of(node, "node-name");
    g_autofree char *users = users_of(graph, name);
    const char *file = text_of(node, "filename");
    g_autofree char *base = *file ? g_path_get_basename(file) : g_strdup("");
    char size[32];

    size_format((uint64_t)json_integer_value(json_object_get(node, "size")), size, sizeof(size));
    return g_strdup_printf("%s  [%s, %s, %s]%s%s%s%s%s%s", name, text_of(node, "driver"), size,
                           json_is_true(json_object_get(node, "writable")) ? "rw" : "ro", *base ? "  " : "", base,
                           *users ? "  <= " : "", users, *text_of(node, "stale") ? "  STALE: " : "",
                           text_of(node, "stale"));
}

static void print_from(json_t *graph, const char *name, unsigned depth, GHashTable *seen)
{
    for (; name; name = child_below(graph, name), depth++) {
        json_t *node = find_node(graph, name);
        g_autofree char *label = node ? node_label(graph, node) : g_strdup(name);
        bool again = !g_hash_table_add(seen, g_strdup(name));

        printf("%*s%s%s%s\n", (int)(depth ? 4 * (depth - 1) : 0), "", depth ? "└── " : "", label,
               again ? "  (see above)" : "");
        if (again) {
            return;
        }
    }
}

static void print_text(json_t *graph)
{
    g_autoptr(GHashTable) seen = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    size_t index;
    json_t *node;

    json_array_foreach(json_object_get(graph, "nodes"), index, node)
    {
        if (!has_parent(graph, text_of(node, "node-name"))) {
            print_from(graph, text_of(node, "node-name"), 0, seen);
        }
    }
    if (!json_array_size(json_object_get(graph, "nodes"))) {
        printf("no nodes\n");
    }
}

static void dot_quoted(GString *dot, const char *text)
{
    g_string_append_c(dot, '"');
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') {
            g_string_append_c(dot, '\\');
        }
        g_string_append_c(dot, *text);
    }
    g_string_append_c(dot, '"');
}

static char *make_dot(json_t *graph)
{
    GString *dot = g_string_new("digraph interlock {\n  rankdir=TB;\n  node [shape=box, fontname=\"sans-serif\"];\n"
                                "  edge [fontname=\"sans-serif\", fontsize=10];\n");
    size_t index;
    json_t *item;

    json_array_foreach(json_object_get(graph, "nodes"), index, item)
    {
        g_autofree char *label = g_strdup_printf("%s\n%s %s", text_of(item, "node-name"), text_of(item, "driver"),
                                                 json_is_true(json_object_get(item, "writable")) ? "rw" : "ro");

        dot_quoted(dot, text_of(item, "node-name"));
        g_string_append(dot, " [label=");
        dot_quoted(dot, label);
        g_string_append(dot, *text_of(item, "stale") ? ", style=dashed, color=gray];\n" : "];\n");
    }
    json_array_foreach(json_object_get(graph, "edges"), index, item)
    {
        dot_quoted(dot, text_of(item, "parent"));
        g_string_append(dot, " -> ");
        dot_quoted(dot, text_of(item, "child"));
        g_string_append(dot, " [label=");
        dot_quoted(dot, text_of(item, "role"));
        g_string_append(dot, strcmp(text_of(item, "role"), "file") ? "];\n" : ", style=dotted];\n");
    }
    json_array_foreach(json_object_get(graph, "users"), index, item)
    {
        dot_quoted(dot, text_of(item, "owner"));
        g_string_append(dot, " [shape=ellipse];\n");
        if (*text_of(item, "node")) {
            dot_quoted(dot, text_of(item, "owner"));
            g_string_append(dot, " -> ");
            dot_quoted(dot, text_of(item, "node"));
            g_string_append(dot, ";\n");
        }
    }
    g_string_append(dot, "}\n");
    return g_string_free(dot, FALSE);
}

static int write_svg(const char *dot, const char *path, struct error **err)
{
    g_autofree char *quoted = g_shell_quote(path);
    g_autofree char *command = g_strdup_printf("dot -Tsvg -o %s", quoted);
    FILE *pipe = popen(command, "w");
    bool written = pipe && fputs(dot, pipe) >= 0;

    if (!pipe || pclose(pipe) != 0 || !written) {
        return error_set(err, -EIO, "Cannot draw '%s': the program 'dot' (package graphviz) failed or is missing",
                         path);
    }
    return 0;
}

static int show(const char *qmp, bool as_dot, const char *svg, struct error **err)
{
    auto_client client = NULL;
    auto_json graph = NULL;
    g_autofree char *dot = NULL;
    int code = client_connect(qmp, &client, err);

    if (!code) {
        code = client_execute(client, "query-graph", NULL, &graph, err);
    }
    if (code) {
        return code;
    }
    if (as_dot || svg) {
        dot = make_dot(graph);
    }
    if (svg) {
        return write_svg(dot, svg, err);
    }
    if (dot) {
        fputs(dot, stdout);
    } else {
        print_text(graph);
    }
    return 0;
}

int tool_graph(int argc, char **argv)
{
    g_autofree char *qmp = NULL;
    g_autofree char *svg = NULL;
    gboolean as_dot = FALSE;
    const GOptionEntry own[] = {{"dot", 0, 0, G_OPTION_ARG_NONE, &as_dot, "print it for graphviz", NULL},
                                {"svg", 0, 0, G_OPTION_ARG_FILENAME, &svg, "draw it to FILE (needs graphviz)", "FILE"},
                                {NULL, 0, 0, 0, NULL, NULL, NULL}};
    struct error *err = NULL;
    int code = tool_parse(&argc, &argv, own, NULL, "The picture of a running daemon's nodes.", NULL, &qmp, &err);

    code = code ? code : show(qmp, as_dot, svg, &err);
    return code ? tool_fail("interlock graph", err) : 0;
}

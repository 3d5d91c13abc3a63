/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The picture of the graph, as text for Graphviz. Owns no state. Control thread.
 *
 * Edges carry their role and what was granted in one short notation, a letter per action in the order of access.h:
 * r read-data, R read-metadata, w write-data, b write-beneath, m write-metadata, a attributes, g graph; '-' when not.
 */
#include "base/size.h"
#include "block/private.h"

static void quote(GString *out, const char *text)
{
    g_string_append_c(out, '"');
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') {
            g_string_append_c(out, '\\');
        }
        if (*text == '\n') {
            g_string_append(out, "\\n");
        } else {
            g_string_append_c(out, *text);
        }
    }
    g_string_append_c(out, '"');
}

static void granted_format(unsigned granted, char out[ACCESS_ACTION_COUNT + 1])
{
    static const char letters[ACCESS_ACTION_COUNT + 1] = "rRwbmag";
    for (unsigned i = 0; i < ACCESS_ACTION_COUNT; i++) {
        out[i] = granted & (1U << i) ? letters[i] : '-';
    }
    out[ACCESS_ACTION_COUNT] = 0;
}

static void draw_node(GString *out, const struct node *node)
{
    char size[32];
    g_autofree char *label = g_strdup_printf("%s\n%s, %s%s%s", node->name, node->driver->name,
                                             size_format(atomic_load(&node->size), size, sizeof(size)),
                                             node->writable ? "" : ", read-only", node->stale ? ", stale" : "");
    g_string_append(out, "  ");
    quote(out, node->name);
    g_string_append(out, " [shape=box, label=");
    quote(out, label);
    g_string_append(out, node->stale ? ", style=dashed];\n" : "];\n");
}

static void draw_edge(GString *out, const char *from, const struct edge *edge)
{
    char granted[ACCESS_ACTION_COUNT + 1];
    granted_format(edge->granted, granted);
    g_autofree char *label = edge->adopter ? g_strdup_printf("%s\n%s\nadopted by %s", edge_role_name(edge->role),
                                                             granted, access_holder_id(edge->adopter->holder))
                                           : g_strdup_printf("%s\n%s", edge_role_name(edge->role), granted);
    g_string_append(out, "  ");
    quote(out, from);
    g_string_append(out, " -> ");
    quote(out, edge->child->name);
    g_string_append(out, " [label=");
    quote(out, label);
    g_string_append(out, edge->role == EDGE_BACKING ? ", style=bold];\n" : "];\n");
}

char *graph_to_dot(struct graph *graph)
{
    GString *out = g_string_new("digraph graph_of_nodes {\n  rankdir=TB;\n  node [fontname=\"sans\"];\n");
    list_for_each (node_link, &graph->nodes) {
        const struct node *node = container_of(node_link, struct node, graph_link);
        draw_node(out, node);
        list_for_each (link, &node->children) {
            draw_edge(out, node->name, container_of(link, struct edge, parent_link));
        }
    }
    list_for_each (link, &graph->backends) {
        const struct backend *backend = container_of(link, struct backend, graph_link);
        g_autofree char *name = g_strdup_printf("user: %s", backend->owner);
        if (backend->root.child) {
            g_string_append(out, "  ");
            quote(out, name);
            g_string_append(out, " [shape=ellipse, label=");
            quote(out, backend->owner);
            g_string_append(out, "];\n");
            draw_edge(out, name, &backend->root);
        }
    }
    g_string_append(out, "}\n");
    return g_string_free(out, FALSE);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Relinking: what a commit and a stream do to overlays at their ends. The steps on disk come first, the step in memory
 * (a graph transaction, which may be refused) after them; so the strings can be put back.
 *
 * 1. A string is written only when the image that it names holds everything that the overlay needs, flushed. A crash
 *    between two overlays leaves one with the new string and one with the old, and both read the same data.
 * 2. node->header_backing and header_backing_format agree with the disk.
 * 3. What was written first is put back last, and a foundation only when nobody on disk can be leaning on it any more:
 *    a header whose change failed may have been changed.
 *
 * It takes no locks and drains nothing: its callers hold the graph still.
 */
#include "job/relink.h"
#include "access/queue.h"
#include "block/driver.h"
#include "block/graph.h"
#include <errno.h>
#include <string.h>

struct relink_change {
    struct node *overlay;
    struct backing_name old;
};

/* --- finding --- */

/* A name as it would be opened from `overlay`'s directory. */
static char *resolve_beside(const struct node *overlay, const char *name)
{
    if (g_path_is_absolute(name) || strchr(name, ':') || !overlay->filename) {
        return g_strdup(name);
    }
    g_autofree char *directory = g_path_get_dirname(overlay->filename);
    return strcmp(directory, ".") == 0 ? g_strdup(name) : g_build_filename(directory, name, NULL);
}

static bool node_is_called(const struct node *node, const struct node *overlay, const char *name)
{
    if (g_strcmp0(node->filename, name) == 0) {
        return true;
    }
    if (!overlay) {
        return false;
    }
    g_autofree char *resolved = resolve_beside(overlay, name);
    return g_strcmp0(overlay->header_backing, name) == 0 || g_strcmp0(node->filename, resolved) == 0;
}

struct node *relink_find_file(struct node *from, const char *name)
{
    struct node *overlay = NULL;
    for (struct node *node = node_beneath_filters(from); node; node = node_backing(node)) {
        if (node_is_called(node, overlay, name)) {
            return node;
        }
        overlay = node;
    }
    return NULL;
}

struct node *relink_find_node(struct graph *graph, const char *name, struct error **err)
{
    struct node *node = graph_find_or_error(graph, name, err);
    return node ? node_beneath_filters(node) : NULL;
}

/* --- strings --- */

void backing_name_clear(struct backing_name *name)
{
    g_clear_pointer(&name->file, g_free);
    g_clear_pointer(&name->format, g_free);
}

/* A relative name is relative to the daemon's directory in memory, but to the overlay's in a header; and there, what
 * stands before a colon would be taken for a protocol. */
static char *name_from(const struct node *overlay, const char *filename)
{
    if (g_path_is_absolute(filename) || strstr(filename, "://")) {
        return g_strdup(filename);
    }
    g_autofree char *there = g_path_get_dirname(filename);
    g_autofree char *here = g_path_get_dirname(overlay->filename ? overlay->filename : "");
    g_autofree char *alone = g_path_get_basename(filename);
    if (strcmp(here, there) == 0 && !strchr(alone, ':')) {
        return g_steal_pointer(&alone);
    }
    return g_canonicalize_filename(filename, NULL);
}

int relink_name(const struct node *overlay, const struct node *base, const char *given, bool mask_protocol,
                struct backing_name *ret, struct error **err)
{
    struct backing_name name = {0};
    if (base) {
        if (!given && !base->filename) {
            return error_set(err, -EINVAL,
                             "Node '%s' has no file name that the header of '%s' could hold; give backing-file",
                             base->name, overlay->name);
        }
        bool masked = mask_protocol && base->driver->kind == DRIVER_PROTOCOL;
        name.file = given ? g_strdup(given) : name_from(overlay, base->filename);
        name.format = g_strdup(masked ? "raw" : base->driver->name);
    }
    *ret = name;
    return 0;
}

int relink_check_chosen(struct graph *graph, const struct node *base, const char *before, struct error **err)
{
    const char *name = base ? base->name : "";
    const char *chosen = access_asker_note(graph->ledger, before ? before : name);
    if (strcmp(chosen, name) == 0) {
        return 0;
    }
    error_set(err, -EBUSY,
              "'backing-file' was given for node '%s', but while the command waited '%s' came in its place", chosen,
              name);
    error_hint(err, "Look at the graph again, and give the name of the image that is there now");
    return -EBUSY;
}

int coroutine_fn relink_write(struct relink *relink, struct node *overlay, const struct backing_name *name,
                              struct error **err)
{
    struct relink_change change = {
        .overlay = overlay,
        .old = {g_strdup(overlay->header_backing), g_strdup(overlay->header_backing_format)},
    };
    if (!relink->changed) {
        relink->changed = g_array_new(FALSE, FALSE, sizeof(struct relink_change));
    }
    g_array_append_val(relink->changed, change); /* first: what failed may be on disk all the same */
    int result = node_change_backing(overlay, relink->operation, name->file, name->format, err);
    if (result < 0) {
        error_prepend(err, "Cannot change the backing file of node '%s'", overlay->name);
    }
    return result;
}

void coroutine_fn relink_undo(struct relink *relink)
{
    bool stuck = false;
    for (guint i = relink->changed ? relink->changed->len : 0; i > 0; i--) {
        struct relink_change *change = &g_array_index(relink->changed, struct relink_change, i - 1);
        auto_error error = NULL;
        const struct backing_name *old = &change->old;
        if (stuck && change->overlay == relink->foundation) {
            g_warning("The header of node '%s' keeps its backing file: others may still name that node",
                      change->overlay->name);
        } else if (node_change_backing(change->overlay, relink->operation, old->file, old->format, &error) < 0) {
            g_warning("The header of node '%s' may keep its new backing file: %s", change->overlay->name,
                      error ? error->message : "unknown error");
            stuck = true;
        }
    }
    relink_clear(relink);
}

void relink_clear(struct relink *relink)
{
    for (guint i = 0; relink->changed && i < relink->changed->len; i++) {
        backing_name_clear(&g_array_index(relink->changed, struct relink_change, i).old);
    }
    g_clear_pointer(&relink->changed, g_array_unref);
}

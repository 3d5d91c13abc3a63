/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Images as `-s` and `-l` show them: through a temporary overlay, or as they were at an internal snapshot.
 *
 * 1. An overlay's file is unlinked as soon as it is open: nothing is left of it, however the program ends.
 * 2. A snapshot is loaded while nobody reads the image.
 */
#include "tool/image_view.h"
#include "block/driver.h"
#include "block/graph.h"
#include "loop/file.h"
#include "schema/types.h"
#include "tool/img/img.h"
#include <errno.h>
#include <glib.h>
#include <string.h>
#include <unistd.h>

static int coroutine_fn make_overlay(struct graph *graph, const char *path, uint64_t size, struct error **err)
{
    struct img img = {.graph = graph};
    struct blockdev_create_options *options = NULL;
    json_t *json =
        json_pack("{s:s, s:s, s:I}", "driver", "qcow2", "file", "none", "size", (json_int_t)((size + 511) / 512 * 512));
    int code = blockdev_create_options_from_json(json, NULL, &options, err);
    code = code < 0 ? code : img_make(&img, path, options, err);
    img_keep(&img);
    blockdev_create_options_free(options);
    json_decref(json);
    return code;
}

int coroutine_fn image_open_overlay(struct graph *graph, struct node *base, bool read_only, struct node **ret,
                                    struct error **err)
{
    g_autofree char *path = g_build_filename(g_get_tmp_dir(), "interlock-io-XXXXXX", NULL);
    struct blockdev_options *options = NULL;
    int fd = g_mkstemp(path);
    if (fd < 0) {
        return error_set_errno(err, -errno, "Cannot make a temporary file in '%s'", g_get_tmp_dir());
    }
    close(fd);
    int code = make_overlay(graph, path, atomic_load(&base->size), err);
    if (code == 0) {
        json_t *json = json_pack("{s:s, s:s, s:{s:s, s:s}, s:s, s:b, s:s, s:{s:b}}", "driver", "qcow2", "node-name",
                                 "overlay", "file", "driver", "file", "filename", path, "backing", base->name,
                                 "read-only", read_only, "discard", "unmap", "cache", "no-flush", true);
        code = blockdev_options_from_json(json, NULL, &options, err);
        code = code < 0 ? code : graph_open(graph, options, 0, ret, err);
        blockdev_options_free(options);
        json_decref(json);
    }
    (void)file_unlink(path);
    return code;
}

int coroutine_fn image_show_snapshot(struct graph *graph, struct node *image, const char *snapshot, struct error **err)
{
    const struct driver *driver = image->driver;
    g_autofree char *given = NULL;
    struct drain drain;
    if (!driver->image || !driver->image->snapshot_load) {
        return error_set(err, -ENOTSUP, "Failed to load snapshot: Format '%s' has no snapshots", driver->name);
    }
    if (g_str_has_prefix(snapshot, "snapshot.")) {
        const char *id = strstr(snapshot, "snapshot.id="), *value = strchr(id ? id : snapshot, '=');
        given = value ? g_strndup(value + 1, strcspn(value + 1, ",")) : g_strdup("");
        snapshot = given;
    }
    graph_lock(graph);
    graph_drain_begin(graph, &image, 1, NULL, &drain);
    int code = driver->image->snapshot_load(image, snapshot, err);
    graph_drain_end(&drain);
    graph_unlock(graph);
    if (code < 0) {
        error_prepend(err, "Failed to load snapshot");
    }
    return code;
}

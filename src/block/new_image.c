/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * New images of commands that have a file name and a format, and no node. Owns the translation of these into what the
 * format's `create` and graph_open() take.
 *
 * 1. What can be refused without touching the disk (format, name, options) is refused first.
 * 2. The image is opened without its backing file: its place in the graph is the command's business.
 *
 * How an image is written is its format's; where a command's arguments come from is the command's.
 */
#include "block/new_image.h"
#include "block/driver.h"
#include "block/graph.h"
#include <errno.h>
#include <glib.h>

static const struct driver *new_image_driver(const struct new_image *image, struct error **err)
{
    const char *name = image->format ? image->format : "qcow2";
    const struct driver *driver = driver_find(name);
    if (!driver || driver->kind != DRIVER_FORMAT) {
        error_set(err, -EINVAL, "Unknown file format '%s'", name);
        return NULL;
    }
    if (image->mode != NEW_IMAGE_MODE_EXISTING && image->backing && !driver->backing) {
        error_set(err, -EINVAL, "Backing file not supported for file format '%s'", name);
        return NULL;
    }
    return driver;
}

/* {"driver": "file", "filename": PATH, ...} */
static json_t *file_json(const struct new_image *image, const char *path)
{
    return json_pack("{s:s, s:s, s:{s:b, s:b}, s:s}", "driver", "file", "filename", path, "cache", "direct",
                     image->direct, "no-flush", image->no_flush, "discard", image->discard ? "unmap" : "ignore");
}

static int coroutine_fn create_from_json(struct graph *graph, const struct driver *driver, json_t *json,
                                         bool only_check, struct error **err)
{
    struct blockdev_create_options *options = NULL;
    struct block_measure_info ignored;
    int code = blockdev_create_options_from_json(json, NULL, &options, err);
    if (code == 0 && only_check) {
        code = driver->image->measure ? driver->image->measure(options, NULL, &ignored, err) : 0;
    } else if (code == 0) {
        code = driver->image->create(graph, options, err);
    }
    blockdev_create_options_free(options);
    return code;
}

static int coroutine_fn make_file(struct graph *graph, const char *path, uint64_t size, struct error **err)
{
    json_t *json = json_pack("{s:s, s:s, s:I}", "driver", "file", "filename", path, "size", (json_int_t)size);
    int code = create_from_json(graph, driver_find("file"), json, false, err);
    json_decref(json);
    return code;
}

/* In a file that is made as well. */
static int coroutine_fn make_format(struct graph *graph, const struct driver *driver, const struct new_image *image,
                                    const char *path, struct error **err)
{
    json_t *json = json_pack("{s:s, s:o, s:I}", "driver", driver->name, "file", file_json(image, path), "size",
                             (json_int_t)image->size);
    if (image->backing) {
        json_object_set_new(json, "backing-file", json_string(image->backing));
    }
    if (image->backing && image->backing_format) {
        json_object_set_new(json, "backing-fmt", json_string(image->backing_format));
    }
    int code = create_from_json(graph, driver, json, true, err);
    if (code == 0) {
        code = make_file(graph, path, 0, err);
    }
    if (code == 0) {
        code = create_from_json(graph, driver, json, false, err);
    }
    json_decref(json);
    return code;
}

static int coroutine_fn new_image_make(struct graph *graph, const struct driver *driver, const struct new_image *image,
                                       const char *path, struct error **err)
{
    const struct driver *file = driver_find("file");
    int code;
    if (image->size > G_MAXINT64) {
        return error_set(err, -EFBIG, "An image of %" G_GUINT64_FORMAT " bytes is too large", image->size);
    }
    if (!file || !file->image || !file->image->create) {
        return error_set(err, -ENOTSUP, "Files cannot be created by this build");
    }
    if (driver->image && driver->image->create) {
        code = make_format(graph, driver, image, path, err);
    } else if (g_str_equal(driver->name, "raw")) {
        code = make_file(graph, path, image->size, err);
    } else {
        code = error_set(err, -ENOTSUP, "Format driver '%s' does not support image creation", driver->name);
    }
    return code;
}

static int coroutine_fn new_image_open_made(struct graph *graph, const struct driver *driver,
                                            const struct new_image *image, const char *path, struct node **ret,
                                            struct error **err)
{
    struct blockdev_options *options = NULL;
    json_t *json =
        json_pack("{s:s, s:o, s:{s:b, s:b}, s:s}", "driver", driver->name, "file", file_json(image, path), "cache",
                  "direct", image->direct, "no-flush", image->no_flush, "discard", image->discard ? "unmap" : "ignore");
    if (image->node_name) {
        json_object_set_new(json, "node-name", json_string(image->node_name));
    }
    int code = blockdev_options_from_json(json, NULL, &options, err);
    if (code == 0) {
        code = graph_open(graph, options, GRAPH_OPEN_NO_BACKING, ret, err);
    }
    blockdev_options_free(options);
    json_decref(json);
    return code;
}

int coroutine_fn new_image_open(struct graph *graph, const struct new_image *image, struct node **ret,
                                struct error **err)
{
    const struct driver *driver = new_image_driver(image, err);
    g_autofree char *path = image_name_path(NULL, image->filename);
    int code = 0;
    if (!driver) {
        return -EINVAL;
    }
    if (!path) {
        error_set(err, -ENOTSUP, "'%s' is no path of a file", image->filename);
        error_hint(err,
                   "Make the image with blockdev-create, open it with blockdev-add, and use the command that takes "
                   "its node-name");
        return -ENOTSUP;
    }
    if (image->node_name) {
        graph_lock(graph);
        code = graph_check_name(graph, image->node_name, err);
        graph_unlock(graph);
    }
    if (code == 0 && image->mode != NEW_IMAGE_MODE_EXISTING) {
        code = new_image_make(graph, driver, image, path, err);
    }
    return code < 0 ? code : new_image_open_made(graph, driver, image, path, ret, err);
}

int coroutine_fn new_image_open_copy(struct graph *graph, const struct node *image, enum mirror_sync_mode sync,
                                     const struct new_image *wanted, struct node **ret, struct error **err)
{
    const struct node *below = sync == MIRROR_SYNC_MODE_TOP    ? node_backing(image)
                               : sync == MIRROR_SYNC_MODE_NONE ? image
                                                               : NULL;
    if (below && !below->filename) {
        return error_set(err, -EINVAL, "Node '%s' has no file name that the header of '%s' could hold", below->name,
                         wanted->filename);
    }
    g_autofree char *backing = !below                                 ? NULL
                               : image_name_protocol(below->filename) ? g_strdup(below->filename)
                                                                      : g_canonicalize_filename(below->filename, NULL);
    bool is_protocol = below && below->driver->kind == DRIVER_PROTOCOL;
    struct new_image made = *wanted;
    made.format = wanted->format ? wanted->format : image->driver->name;
    made.size = atomic_load(&image->size);
    made.backing = backing;
    made.backing_format = is_protocol ? "raw" : below ? below->driver->name : NULL;
    made.no_flush = image->no_flush;
    made.direct = image->direct;
    made.discard = true;
    return new_image_open(graph, &made, ret, err);
}

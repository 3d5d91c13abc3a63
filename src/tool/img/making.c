/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The one way to make a new image on a command line: the file, a second one for the data if the options describe one,
 * and the format in it.
 *
 * 1. Options that no image can be made with are refused while what lies at the path is still whole.
 * 2. What a command has made is removed when the command fails, for it is not the image that was asked for; what was
 *    there before is emptied by then, and stays. So whoever makes an image ends with img_keep() or img_unmake().
 */
#include "block/driver.h"
#include "block/graph.h"
#include "block/image.h"
#include "loop/file.h"
#include "schema/types.h"
#include "tool/img/img.h"
#include <errno.h>
#include <glib.h>

/* Takes the name if nothing has it, so that what has been made can be told from what was there. That it cannot be had
 * is for the making itself to say. */
static void coroutine_fn note_new(struct img *img, const char *path)
{
    struct file *file;

    if (file_open(path, FILE_WRITABLE | FILE_CREATE | FILE_EXCLUSIVE, &file, NULL) == 0) {
        file_close(file);
        img->made = img->made ? img->made : g_ptr_array_new_with_free_func(g_free);
        g_ptr_array_add(img->made, g_strdup(path));
    }
}

void coroutine_fn img_unmake(struct img *img)
{
    for (unsigned i = 0; img->made && i < img->made->len; i++) {
        file_unlink(img->made->pdata[i]);
    }
    img_keep(img);
}

void img_keep(struct img *img)
{
    g_clear_pointer(&img->made, g_ptr_array_unref);
}

static int coroutine_fn make_file(struct img *img, const char *path, struct error **err)
{
    const struct driver *driver = driver_find("file");
    struct blockdev_create_options options = {.driver = BLOCKDEV_DRIVER_FILE, .u.file.filename = (char *)path};
    if (!driver->image || !driver->image->create) {
        return error_set(err, -ENOTSUP, "Files cannot be created by this build");
    }
    note_new(img, path);
    return driver->image->create(img->graph, &options, err);
}

/* Refuses options that no image can be made with while what lies at the path is still whole. */
static int coroutine_fn check_options(const struct driver *driver, const struct blockdev_create_options *options,
                                      struct error **err)
{
    struct block_measure_info ignored;
    return driver->image->measure ? driver->image->measure(options, NULL, &ignored, err) : 0;
}

/* What the options describe as a second file is made as well. */
static int coroutine_fn make_data_file(struct img *img, const struct blockdev_create_options *options,
                                       struct error **err)
{
    const struct blockdev_ref *data = options->driver == BLOCKDEV_DRIVER_QCOW2 ? options->u.qcow2.data_file : NULL;
    if (!data || data->kind != BLOCKDEV_REF_DEFINITION || data->u.definition->driver != BLOCKDEV_DRIVER_FILE) {
        return 0;
    }
    return make_file(img, data->u.definition->u.file.filename, err);
}

static int coroutine_fn make_image(struct img *img, const char *path, struct blockdev_create_options *options,
                                   struct error **err)
{
    const struct driver *driver = driver_find(blockdev_driver_name(options->driver));
    struct blockdev_ref **file = img_options_file(options);
    if (!file) {
        g_assert(options->driver == BLOCKDEV_DRIVER_FILE);
        g_free(options->u.file.filename);
        options->u.file.filename = g_strdup(path);
        note_new(img, path);
        return driver->image->create(img->graph, options, err);
    }
    int r = check_options(driver, options, err);
    if (r == 0) {
        r = make_file(img, path, err);
    }
    if (r == 0) {
        r = make_data_file(img, options, err);
    }
    if (r < 0) {
        return r;
    }
    blockdev_ref_free(*file);
    *file = g_new0(struct blockdev_ref, 1);
    (*file)->kind = BLOCKDEV_REF_DEFINITION;
    (*file)->u.definition = g_new0(struct blockdev_options, 1);
    *(*file)->u.definition =
        (struct blockdev_options){.driver = BLOCKDEV_DRIVER_FILE, .u.file.filename = g_strdup(path)};
    return driver->image->create(img->graph, options, err);
}

int coroutine_fn img_make(struct img *img, const char *path, struct blockdev_create_options *options,
                          struct error **err)
{
    int r = make_image(img, path, options, err);

    if (r < 0) {
        img_unmake(img);
    }
    return r;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `img measure`: how large a file will be that an image is converted to, or that is made for a disk of some size. Owns
 * the command line and the words; the numbers are the target's driver to say (block/image.h), which looks at the source
 * through a backend that can only read.
 *
 * 1. Nothing is made and nothing is changed.
 * 2. The size is that of the source, or the one that was given; the options of the target do not change it.
 */
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "tool/img/img.h"
#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

struct measure {
    struct img_common common;
    const char *target, *snapshot;
    GPtrArray *given;
    bool has_size;
    uint64_t size;
};

static int coroutine_fn measure_target(const struct measure *measure, struct backend *source, uint64_t size,
                                       struct block_measure_info *ret, struct error **err)
{
    struct blockdev_create_options *options = NULL;
    int r = img_create_options(measure->target, (char *const *)measure->given->pdata, measure->given->len, size, false,
                               &options, err);
    if (r < 0) {
        return r;
    }
    const struct driver *driver = driver_find(blockdev_driver_name(options->driver));
    if (driver->image->measure) {
        r = driver->image->measure(options, source, ret, err);
    } else {
        r = error_set(err, -ENOTSUP, "Block driver '%s' does not support size measurement", measure->target);
    }
    blockdev_create_options_free(options);
    return r;
}

static int coroutine_fn measure_image(struct img *img, const struct measure *measure, struct block_measure_info *ret,
                                      struct error **err)
{
    struct node *node = NULL;
    struct backend *backend = NULL;
    int r = image_open(img->graph, &measure->common.name, &node, err);
    if (r == 0 && measure->snapshot) {
        r = img_load_snapshot(img, node, measure->snapshot, err);
    }
    if (r == 0) {
        r = image_backend(img->graph, node, false, &backend, err);
    }
    if (r == 0) {
        r = measure_target(measure, backend, backend_size(backend), ret, err);
    }
    image_backend_destroy(backend);
    node_release(node);
    return r;
}

static void print_result(const struct measure *measure, const struct block_measure_info *info)
{
    if (measure->common.json) {
        img_print_json(block_measure_info_to_json(info));
        return;
    }
    printf("required size: %" G_GINT64_FORMAT "\nfully allocated size: %" G_GINT64_FORMAT "\n", info->required,
           info->fully_allocated);
    if (info->has_bitmaps) {
        printf("bitmaps size: %" G_GINT64_FORMAT "\n", info->bitmaps);
    }
}

static int check_arguments(struct measure *measure, int argc, char **argv)
{
    const struct image_name *name = &measure->common.name;
    if (measure->has_size ? optind + 1 == argc : optind + 1 != argc) {
        return img_usage("measure", measure->has_size ? "--size N cannot be used together with a filename."
                                                      : "Either --size N or one filename must be specified.");
    }
    if (optind + 1 < argc) {
        return img_usage("measure", "Expecting one image file name");
    }
    if (measure->has_size) {
        return name->image_opts || name->format || measure->snapshot
                   ? img_usage("measure", "--image-opts, -f, and -l require a filename argument.")
                   : 0;
    }
    return img_common_name("measure", &measure->common, argc, argv);
}

static int coroutine_fn measure_run(struct img *img, struct measure *measure)
{
    struct block_measure_info info = {0};
    struct error *error = NULL;
    int r = measure->has_size ? measure_target(measure, NULL, measure->size, &info, &error)
                              : measure_image(img, measure, &info, &error);
    if (r < 0) {
        return img_fail("measure", error);
    }
    print_result(measure, &info);
    return 0;
}

static const char measure_help[] =
    "[-f FORMAT | --image-opts] [-O FORMAT] [-o OPTIONS] [-U]\n"
    "        [--output human|json] [--object OBJECT] [-l SNAPSHOT] FILENAME\n"
    "    or: measure [-O FORMAT] [-o OPTIONS] --size SIZE\n\n"
    "  -O, --target-format FORMAT  of the new image; raw if not given\n"
    "  -o, --options OPTIONS       of the new image, as for create\n"
    "  -s, --size SIZE             of the disk, if there is no image yet\n"
    "  -l, --snapshot SNAPSHOT     a snapshot inside FILENAME, instead of its content\n" IMG_HELP_OUTPUT IMG_HELP_SHARE
        IMG_HELP_SOURCE;

int coroutine_fn img_measure(struct img *img, int argc, char **argv)
{
    static const struct option options[] = {{"target-format", required_argument, NULL, 'O'},
                                            {"options", required_argument, NULL, 'o'},
                                            {"size", required_argument, NULL, 's'},
                                            {"snapshot", required_argument, NULL, 'l'},
                                            IMG_OUTPUT_OPTION,
                                            IMG_SHARE_OPTION,
                                            IMG_COMMON_OPTIONS,
                                            {0}};
    g_autoptr(GPtrArray) given = g_ptr_array_new();
    struct measure measure = {.target = "raw", .given = given};
    struct error *error = NULL;
    int status = 0;
    for (int option; !status && (option = getopt_long(argc, argv, "hf:l:o:O:s:U", options, NULL)) != -1;) {
        switch (option) {
        case 'h':
            return img_help("measure", measure_help);
        case 'O':
            measure.target = optarg;
            break;
        case 'o':
            g_ptr_array_add(given, optarg);
            break;
        case 'l':
            measure.snapshot = optarg;
            break;
        case 's':
            measure.has_size = true;
            status = img_size("image size", optarg, &measure.size, &error) < 0 ? img_fail("measure", error) : 0;
            break;
        default:
            status = img_common_option("measure", &measure.common, option);
        }
    }
    if (!status) {
        status = check_arguments(&measure, argc, argv);
    }
    return status ? status : measure_run(img, &measure);
}

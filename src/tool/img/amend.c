/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `img amend`: changes options of an image that exists. Owns the command line alone: which ones can be changed stands
 * in the table of its format, how is the driver's (block/image.h).
 *
 * 1. The image is open for writing, under a drain, while its options change; nobody else has it.
 * 2. Only what was given is changed: options that were not given are not set to what is usual.
 */
#include "block/driver.h"
#include "block/graph.h"
#include "schema/types.h"
#include "tool/img/img.h"
#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

struct amend {
    struct img_common common;
    GPtrArray *given;
    bool force, progress;
};

static int coroutine_fn amend_node(struct img *img, const struct amend *amend, struct node *node, struct error **err)
{
    struct blockdev_create_options *options = NULL;
    struct blockdev_amend_options *keys = NULL;
    struct img_progress shown;
    struct drain drain;
    int r = img_create_options(node->driver->name, (char *const *)amend->given->pdata, amend->given->len, 0, true,
                               &options, err);
    if (r == 0) {
        r = img_amend_keys(node->driver->name, (char *const *)amend->given->pdata, amend->given->len, &keys, err);
    }
    if (r < 0) {
        blockdev_create_options_free(options);
        return r;
    }
    struct image_amendment amendment = {.options = options, .keys = keys, .force = amend->force};
    struct image_progress progress = {.report = img_progress_report, .argument = &shown};
    img_progress_begin(&shown, amend->progress && !amend->common.quiet);
    graph_lock(img->graph);
    graph_drain_begin(img->graph, &node, 1, NULL, &drain);
    r = node->driver->image->amend(node, &amendment, &progress, err);
    graph_drain_end(&drain);
    graph_unlock(img->graph);
    if (r == 0) {
        img_progress_end(&shown);
    } else {
        img_progress_abandon(&shown);
    }
    blockdev_amend_options_free(keys);
    blockdev_create_options_free(options);
    return r;
}

static int coroutine_fn amend_run(struct img *img, struct amend *amend)
{
    struct node *node = NULL;
    struct error *error = NULL;
    int r = image_open(img->graph, &amend->common.name, &node, &error);
    if (r == 0) {
        r = amend_node(img, amend, node, &error);
    }
    node_release(node);
    return r < 0 ? img_fail("amend", error) : 0;
}

/* "-o help": of the format that is given, or that the image shows. */
static int coroutine_fn amend_options_help(struct img *img, const struct amend *amend, int argc, char **argv)
{
    struct error *error = NULL;
    const char *format = amend->common.name.format;
    if (!format && optind != argc - 1) {
        return img_usage("amend", "Expecting one image file name, or -f FORMAT");
    }
    int r = format ? 0 : image_probe(img->graph, argv[optind], &format, &error);
    if (r == 0) {
        r = img_amend_check(format, &error);
    }
    if (r < 0) {
        return img_fail("amend", error);
    }
    img_print_options(format, true);
    return 0;
}

static const char amend_help[] =
    "(-f FORMAT | --image-opts) -o OPTIONS [-p] [-q] [-t CACHE] [--force]\n"
    "        [--object OBJECT] FILENAME\n\n"
    "  -o, --options OPTIONS  NAME=VALUE,... ('-o help' lists them)\n"
    "  -t, --cache MODE       none, writeback (if not given), unsafe, ...\n"
    "  -p, --progress         show how far it is\n"
    "  --force                also what may make the data unreadable, such as erasing the last key\n" IMG_HELP_QUIET
        IMG_HELP_SOURCE;

int coroutine_fn img_amend(struct img *img, int argc, char **argv)
{
    static const struct option options[] = {{"options", required_argument, NULL, 'o'},
                                            {"cache", required_argument, NULL, 't'},
                                            {"progress", no_argument, NULL, 'p'},
                                            {"force", no_argument, NULL, IMG_OWN},
                                            IMG_QUIET_OPTION,
                                            IMG_COMMON_OPTIONS,
                                            {0}};
    g_autoptr(GPtrArray) given = g_ptr_array_new();
    struct amend amend = {.common.name.writable = true, .given = given};
    bool help = false;
    int status = 0;
    for (int option; !status && (option = getopt_long(argc, argv, "hf:o:t:pq", options, NULL)) != -1;) {
        switch (option) {
        case 'h':
            return img_help("amend", amend_help);
        case 'o':
            help = help || img_asks_for_help(optarg);
            g_ptr_array_add(given, optarg);
            break;
        case 't':
            amend.common.name.cache = optarg;
            break;
        case 'p':
            amend.progress = true;
            break;
        case IMG_OWN:
            amend.force = true;
            break;
        default:
            status = img_common_option("amend", &amend.common, option);
        }
    }
    if (status) {
        return status;
    }
    if (!given->len) {
        return img_usage("amend", "Must specify options (-o)");
    }
    if (help) {
        return amend_options_help(img, &amend, argc, argv);
    }
    status = img_common_name("amend", &amend.common, argc, argv);
    return status ? status : amend_run(img, &amend);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `img resize`: makes an image longer or shorter. Owns what "+1G" means and what may be done; how a size changes is the
 * driver's.
 *
 * 1. What is added reads as zeroes, whatever an image below has there.
 * 2. What is cut off is gone, so that needs --shrink.
 * 3. The new size is on stable storage when the command ends.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "schema/types.h"
#include "tool/img/img.h"
#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

struct resize {
    struct img_common common;
    bool shrink;
    enum preallocation_mode preallocation;
    int relative; /* 1: grow by, -1: shrink by, 0: to */
    uint64_t size;
};

/* "[+-]SIZE". */
static int parse_size(struct resize *resize, const char *text, struct error **err)
{
    resize->relative = *text == '+' ? 1 : *text == '-' ? -1 : 0;
    return img_size("image size", text + (resize->relative ? 1 : 0), &resize->size, err);
}

/* What the size will be. */
static int find_size(const struct resize *resize, uint64_t now, uint64_t *ret, struct error **err)
{
    uint64_t size = resize->size;
    if (resize->relative > 0) {
        size += now;
    } else if (resize->relative < 0) {
        size = size < now ? now - size : 0;
    }
    if (!size || size > INT64_MAX) {
        return error_set(err, -EINVAL, "New image size must be positive");
    }
    if (size <= now && resize->preallocation != PREALLOCATION_MODE_OFF) {
        return error_set(err, -EINVAL, "Preallocation can only be used for growing images");
    }
    if (size < now && !resize->shrink) {
        int r = error_set(err, -EINVAL, "Use the --shrink option to perform a shrink operation");
        error_hint(err,
                   "Shrinking an image deletes all data beyond its new end: make sure that nothing there is needed");
        return r;
    }
    *ret = size;
    return 0;
}

static int coroutine_fn grow_preallocated(struct img *img, struct node *node, struct backend *backend, uint64_t size,
                                          enum preallocation_mode mode, struct error **err)
{
    struct drain drain;
    int r;
    graph_lock(img->graph);
    graph_drain_begin(img->graph, &node, 1, NULL, &drain);
    r = edge_grow(backend_edge(backend), size, mode, err);
    graph_drain_end(&drain);
    graph_unlock(img->graph);
    return r;
}

static int coroutine_fn resize_image(struct img *img, const struct resize *resize, struct node *node,
                                     struct error **err)
{
    struct backend *backend = NULL;
    uint64_t size = 0;
    int r = find_size(resize, atomic_load(&node->size), &size, err);
    if (r == 0) {
        r = image_backend(img->graph, node, true, &backend, err);
    }
    if (r < 0) {
        return r;
    }
    if (resize->preallocation != PREALLOCATION_MODE_OFF) {
        r = grow_preallocated(img, node, backend, size, resize->preallocation, err);
    } else {
        r = backend_truncate(backend, size, err);
    }
    if (r == 0) {
        r = backend_flush(backend);
        if (r < 0) {
            error_set_errno(err, r, "The image has its new size, which may not be on stable storage");
        }
    }
    image_backend_destroy(backend);
    return r;
}

static int coroutine_fn resize_run(struct img *img, struct resize *resize)
{
    struct node *node = NULL;
    struct error *error = NULL;
    int r = image_open(img->graph, &resize->common.name, &node, &error);
    if (r == 0) {
        r = resize_image(img, resize, node, &error);
    }
    node_release(node);
    if (r < 0) {
        return img_fail("resize", error);
    }
    if (!resize->common.quiet) {
        printf("Image resized.\n");
    }
    return 0;
}

static const char resize_help[] =
    "(-f FORMAT | --image-opts) [-q] [--shrink] [--preallocation MODE]\n"
    "        [--object OBJECT] FILENAME [+|-]SIZE\n\n"
    "  --shrink               allow that data are cut off\n"
    "  --preallocation MODE   of what is added: off, metadata, falloc or full\n" IMG_HELP_QUIET IMG_HELP_SOURCE
    "  [+|-]SIZE              the new size, or by how much it changes; k, M, G, T, P, E\n";

static int set_preallocation(struct resize *resize, const char *text)
{
    if (preallocation_mode_parse(text, &resize->preallocation, NULL) < 0) {
        return img_usage("resize", "Invalid preallocation mode '%s'", text);
    }
    return 0;
}

int coroutine_fn img_resize(struct img *img, int argc, char **argv)
{
    enum { OPTION_SHRINK = IMG_OWN, OPTION_PREALLOCATION };
    static const struct option options[] = {{"shrink", no_argument, NULL, OPTION_SHRINK},
                                            {"preallocation", required_argument, NULL, OPTION_PREALLOCATION},
                                            IMG_QUIET_OPTION,
                                            IMG_COMMON_OPTIONS,
                                            {0}};
    struct resize resize = {.common.name.writable = true};
    struct error *error = NULL;
    const char *size = argv[argc - 1];
    int status = 0;
    if (argc > 2) { /* the last one is the size: "-1G" is no option */
        argc--;
    }
    for (int option; !status && (option = getopt_long(argc, argv, "hf:q", options, NULL)) != -1;) {
        switch (option) {
        case 'h':
            return img_help("resize", resize_help);
        case OPTION_SHRINK:
            resize.shrink = true;
            break;
        case OPTION_PREALLOCATION:
            status = set_preallocation(&resize, optarg);
            break;
        default:
            status = img_common_option("resize", &resize.common, option);
        }
    }
    if (status) {
        return status;
    }
    if (optind != argc - 1 || argv[optind] == size) {
        return img_usage("resize", "Expecting image file name and size");
    }
    if (parse_size(&resize, size, &error) < 0) {
        return img_fail("resize", error);
    }
    status = img_common_name("resize", &resize.common, argc, argv);
    return status ? status : resize_run(img, &resize);
}

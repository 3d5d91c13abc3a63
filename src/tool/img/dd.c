/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock img dd`: blocks of one image into a new one. Operands have the form NAME=VALUE, as those of dd(1).
 *
 * 1. The new image has what is left of the input behind `skip`, `count` blocks at most, in whole sectors.
 * 2. Everything is written, zeroes too: no holes are looked for, and none are left.
 */
#include "base/size.h"
#include "block/graph.h"
#include "block/user.h"
#include "tool/image_open.h"
#include "tool/img/copying.h"
#include "tool/img/img.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

#define SECTOR 512

struct dd {
    struct img_copying copying; /* first */
    struct image_name input, output;
    uint64_t block, count, skip; /* count and skip in blocks */
    bool counted;
    /* while it runs */
    struct img_sources sources;
    struct node *node;
    struct backend *backend;
    uint64_t from, bytes; /* of the input */
};

static int coroutine_fn dd_extent(void *argument, uint64_t offset, uint64_t bytes, struct copy_extent *ret)
{
    *ret = (struct copy_extent){bytes, COPY_DATA};
    return 0;
}

static int coroutine_fn dd_read(void *argument, uint64_t offset, uint64_t bytes, struct buffers to)
{
    struct dd *dd = argument;
    return img_sources_read(&dd->sources, dd->from + offset, bytes, to);
}

/* a * b, or as much as there can be. */
static uint64_t multiply(uint64_t a, uint64_t b)
{
    uint64_t product;
    return __builtin_mul_overflow(a, b, &product) ? UINT64_MAX : product;
}

static void find_range(struct dd *dd)
{
    uint64_t size = dd->sources.size;
    dd->from = multiply(dd->skip, dd->block);
    if (dd->from > size) {
        img_warn("%s: cannot skip to specified offset", dd->input.name);
    }
    dd->from = min_u64(dd->from, size);
    uint64_t asked = dd->counted ? multiply(dd->count, dd->block) : UINT64_MAX;
    dd->bytes = min_u64(size - dd->from, asked);
}

static int coroutine_fn make_output(struct img *img, struct dd *dd, struct error **err)
{
    struct blockdev_create_options *options = NULL;
    int result = img_create_options(dd->output.format, NULL, 0, align_up(dd->bytes, SECTOR), false, &options, err);
    if (result == 0) {
        result = img_make(img, dd->output.name, options, err);
        if (result < 0) {
            error_prepend(err, "%s: error while creating output image of type %s", dd->output.name, dd->output.format);
        }
    }
    blockdev_create_options_free(options);
    if (result == 0) {
        result = image_open(img->graph, &dd->output, &dd->node, err);
    }
    return result < 0 ? result : image_backend(img->graph, dd->node, true, &dd->backend, err);
}

static int coroutine_fn dd_run(struct img *img, struct dd *dd, struct error **err)
{
    int result = img_sources_add(img, &dd->sources, &dd->input, err);
    if (result < 0) {
        return result;
    }
    find_range(dd);
    result = make_output(img, dd, err);
    if (result < 0) {
        return result;
    }
    dd->copying.config = (struct copy_config){
        .target = dd->backend,
        .alignment = 1,
        .extent = dd_extent,
        .read = dd_read,
        .ordered = true,
    };
    result = img_copying_run_or_error(&dd->copying, dd->bytes, err);
    if (result == 0) {
        result = backend_flush(dd->backend);
        if (result < 0) {
            error_set_errno(err, result, "error while writing");
        }
    }
    return result;
}

/* --- operands --- */

static int read_operand(struct dd *dd, char *text, struct error **err)
{
    char *value = strchr(text, '=');
    size_t length = value ? (size_t)(value - text) : strlen(text);
    static const char *const names[] = {"if", "of", "bs", "count", "skip"};
    unsigned which = 0;
    while (which < G_N_ELEMENTS(names) && (strlen(names[which]) != length || strncmp(names[which], text, length))) {
        which++;
    }
    if (which == G_N_ELEMENTS(names) || !value) {
        return error_set(err, -EINVAL, "unrecognized operand %.*s", (int)length, text);
    }
    value++;
    switch (which) {
    case 0:
        dd->input.name = value;
        return 0;
    case 1:
        dd->output.name = value;
        return 0;
    case 2:
        return img_number("bs", value, 1, INT32_MAX, &dd->block, err);
    case 3:
        dd->counted = true;
        return img_number("count", value, 0, INT64_MAX, &dd->count, err);
    default:
        return img_number("skip", value, 0, INT64_MAX, &dd->skip, err);
    }
}

static const char dd_help[] = "[-f FORMAT | --image-opts] [-O FORMAT] [-U] [bs=SIZE] [count=BLOCKS]\n"
                              "        [skip=BLOCKS] if=INPUT of=OUTPUT\n\n"
                              "  bs=SIZE                     bytes in a block (512)\n"
                              "  count=BLOCKS                how many are copied (all)\n"
                              "  skip=BLOCKS                 how many of the input are passed over first\n"
                              "  if=INPUT                    what is copied\n"
                              "  of=OUTPUT                   the image that is made\n"
                              "  -f, --format FORMAT         the format of INPUT\n"
                              "  --image-opts                INPUT is a list of options\n"
                              "  -O, --output-format FORMAT  the format of OUTPUT (raw)\n"
                              "  --object OBJECT             a key: secret,id=ID,...\n" IMG_HELP_SHARE
                              "  -h, --help                  show this help and exit\n";

/* 0, or the exit status plus 1. */
static int read_options(struct dd *dd, int argc, char **argv)
{
    static const struct option options[] = {
        {"output-format", required_argument, NULL, 'O'}, IMG_SHARE_OPTION, IMG_COMMON_OPTIONS, {0}};
    struct img_common common = {0};
    struct error *error = NULL;
    dd->output.format = "raw";
    for (int option; (option = getopt_long(argc, argv, "hf:O:U", options, NULL)) != -1;) {
        if (option == 'h') {
            return 1 + img_help("dd", dd_help);
        }
        if (option == 'O') {
            dd->output.format = optarg;
            continue;
        }
        int status = img_common_option("dd", &common, option);
        if (status) {
            return 1 + status;
        }
    }
    dd->input = common.name;
    for (int i = optind; i < argc && !error; i++) {
        read_operand(dd, argv[i], &error);
    }
    if (!error && (!dd->input.name || !dd->output.name)) {
        error_set(&error, -EINVAL, "Must specify both input and output files");
    } else if (!error && dd->input.image_opts && dd->input.format) {
        error_set(&error, -EINVAL, "--image-opts and --format are mutually exclusive");
    }
    dd->output.writable = true;
    dd->output.force_share = false;
    return error ? 1 + img_fail("dd", error) : 0;
}

int coroutine_fn img_dd(struct img *img, int argc, char **argv)
{
    struct dd dd = {.block = SECTOR};
    struct error *error = NULL;
    int status = read_options(&dd, argc, argv);
    if (status) {
        return status - 1;
    }
    int result = dd_run(img, &dd, &error);
    image_backend_destroy(dd.backend);
    node_release(dd.node);
    img_sources_clear(&dd.sources);
    if (result < 0) {
        img_unmake(img);
    }
    img_keep(img);
    return result < 0 ? img_fail("dd", error) : 0;
}

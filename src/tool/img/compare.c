/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock img compare`: the copy engine without a target. Both images are read where one of them may hold something;
 * the first difference is what counts, whichever piece is looked at first.
 *
 * 1. Places are given as sectors, as the peer says them. What lies behind the end of the shorter image is zero.
 * 2. Strict: sizes agree, and so does what each image has decided at a place; who differs there first differs.
 * 3. The status: 0 the same, 1 different (or wrong options), 2 an image cannot be opened, 3 or 4 block status or data
 *    cannot be read.
 */
#include "base/size.h"
#include "block/user.h"
#include "tool/image_open.h"
#include "tool/img/copying.h"
#include "tool/img/img.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>
#include <stdio.h>

#define SECTOR 512

enum { STATUS_SAME = 0, STATUS_DIFFERENT = 1, STATUS_OPEN = 2, STATUS_EXTENT = 3, STATUS_READ = 4 };

struct compare {
    struct img_copying copying; /* first */
    struct image_name names[2];
    struct img_sources images[2];
    bool strict, quiet, progress;
    /* what was found */
    bool differs;
    uint64_t place;      /* the first difference */
    bool by_status;      /* the block status differs there, not the data */
    bool status_failed;  /* the last error was of a block status */
    unsigned unreadable; /* the image that it was of */
};

static void found(struct compare *compare, uint64_t offset, bool by_status)
{
    if (!compare->differs || offset < compare->place) {
        compare->differs = true;
        compare->place = align_down(offset, SECTOR);
        compare->by_status = by_status;
    }
}

static void compare_differs(void *argument, uint64_t offset)
{
    found(argument, offset, false);
}

/* The status of one image, also behind its end. */
static int coroutine_fn status_of(struct compare *compare, unsigned which, uint64_t offset, uint64_t bytes,
                                  struct extent *ret)
{
    const struct img_sources *image = &compare->images[which];
    if (offset >= image->size) {
        *ret = (struct extent){.bytes = bytes, .flags = EXTENT_ZERO};
        return 0;
    }
    int result = img_sources_status(image, offset, bytes, ret);
    if (result < 0) {
        compare->status_failed = true;
        compare->unreadable = which;
    }
    return result;
}

static int coroutine_fn compare_extent(void *argument, uint64_t offset, uint64_t bytes, struct copy_extent *ret)
{
    struct compare *compare = argument;
    struct extent extents[2];
    for (unsigned i = 0; i < 2; i++) {
        int result = status_of(compare, i, offset, bytes, &extents[i]);
        if (result < 0) {
            return result;
        }
        bytes = extents[i].bytes;
    }
    const unsigned what = EXTENT_DATA | EXTENT_ZERO | EXTENT_ALLOCATED | EXTENT_COMPRESSED;
    if (compare->strict && ((extents[0].flags ^ extents[1].flags) & what)) {
        found(compare, offset, true);
        return -ECANCELED;
    }
    ret->bytes = bytes;
    ret->kind = extents[0].flags & extents[1].flags & EXTENT_ZERO ? COPY_SKIP : COPY_DATA;
    return 0;
}

static int coroutine_fn read_one(struct compare *compare, unsigned which, uint64_t offset, uint64_t bytes,
                                 struct buffers to)
{
    int result = img_sources_read(&compare->images[which], offset, bytes, to);
    if (result < 0) {
        compare->status_failed = false;
        compare->unreadable = which;
    }
    return result;
}

static int coroutine_fn compare_first(void *argument, uint64_t offset, uint64_t bytes, struct buffers to)
{
    return read_one(argument, 0, offset, bytes, to);
}

static int coroutine_fn compare_second(void *argument, uint64_t offset, uint64_t bytes, struct buffers to)
{
    return read_one(argument, 1, offset, bytes, to);
}

/* Prints what came out of it; the status. */
static int report(struct compare *compare, int result)
{
    uint64_t shorter = min_u64(compare->images[0].size, compare->images[1].size);
    bool as_far = result == 0 || compare->copying.failed_offset >= shorter;
    if (as_far && shorter != compare->copying.of && !compare->quiet) {
        printf("Warning: Image size mismatch!\n");
    }
    if (result == 0) {
        if (!compare->quiet) {
            printf("Images are identical.\n");
        }
        return STATUS_SAME;
    }
    if (compare->differs && compare->place <= compare->copying.failed_offset) {
        if (!compare->quiet) {
            printf(compare->by_status ? "Strict mode: Offset %" G_GUINT64_FORMAT " block status mismatch!\n"
                                      : "Content mismatch at offset %" G_GUINT64_FORMAT "!\n",
                   compare->place);
        }
        return STATUS_DIFFERENT;
    }
    struct error *error = NULL;
    const char *name = compare->names[compare->unreadable].name;
    error_set_errno(&error, result, "Error while reading %s at offset %" G_GUINT64_FORMAT " of %s",
                    compare->status_failed ? "block status" : "data", compare->copying.failed_offset, name);
    img_fail("compare", error);
    return compare->status_failed ? STATUS_EXTENT : STATUS_READ;
}

static int coroutine_fn compare_images(struct compare *compare)
{
    uint64_t size = max_u64(compare->images[0].size, compare->images[1].size);
    if (compare->strict && compare->images[0].size != compare->images[1].size) {
        if (!compare->quiet) {
            printf("Strict mode: Image size mismatch!\n");
        }
        return STATUS_DIFFERENT;
    }
    compare->copying.config = (struct copy_config){
        .alignment = 1,
        .memory = 8 * MiB,
        .extent = compare_extent,
        .read = compare_first,
        .shown = compare_second,
        .differs = compare_differs,
    };
    compare->copying.of = size;
    return report(compare, img_copying_run(&compare->copying, size));
}

static int coroutine_fn compare_execute(struct img *img, struct compare *compare)
{
    struct error *error = NULL;
    struct img_progress progress;
    int status, result = 0;
    img_progress_begin(&progress, compare->progress && !compare->quiet);
    compare->copying.progress = &progress;
    for (unsigned i = 0; i < 2 && result == 0; i++) {
        result = img_sources_add(img, &compare->images[i], &compare->names[i], &error);
    }
    if (result < 0) {
        img_fail("compare", error);
        status = STATUS_OPEN;
    } else {
        status = compare_images(compare);
    }
    for (unsigned i = 0; i < 2; i++) {
        img_sources_clear(&compare->images[i]);
    }
    img_progress_end(&progress);
    return status;
}

static const char compare_help[] =
    "[-f FORMAT] [-F FORMAT | --image-opts] [-s] [-p | -q]\n"
    "        [-T MODE] [-U] [--object OBJECT] FILENAME1 FILENAME2\n\n"
    "  -f, --a-format FORMAT  the format of FILENAME1\n"
    "  -F, --b-format FORMAT  the format of FILENAME2\n"
    "  --image-opts           both are lists of options: driver=...,file.filename=...\n"
    "  -s, --strict           sizes and holes are to be the same too\n"
    "  -T, --cache MODE       of both (writeback)\n"
    "  -p, --progress         show how far it is\n" IMG_HELP_QUIET IMG_HELP_SHARE
    "  --object OBJECT        a key: secret,id=ID,...\n"
    "  -h, --help             show this help and exit\n\n"
    "The status is 0 if they are the same, 1 if not, and more than that if something went wrong.\n";

/* 0, or the exit status plus 1. */
static int read_options(struct compare *compare, int argc, char **argv)
{
    static const struct option options[] = {{"a-format", required_argument, NULL, 'f'},
                                            {"b-format", required_argument, NULL, 'F'},
                                            {"strict", no_argument, NULL, 's'},
                                            {"cache", required_argument, NULL, 'T'},
                                            {"progress", no_argument, NULL, 'p'},
                                            IMG_QUIET_OPTION,
                                            IMG_SHARE_OPTION,
                                            IMG_COMMON_OPTIONS,
                                            {0}};
    struct img_common common = {0};
    const char *second_format = NULL, *cache = NULL;
    for (int option; (option = getopt_long(argc, argv, "hf:F:T:pqsU", options, NULL)) != -1;) {
        int status = 0;
        switch (option) {
        case 'h':
            return 1 + img_help("compare", compare_help);
        case 'F':
            second_format = optarg;
            break;
        case 's':
            compare->strict = true;
            break;
        case 'T':
            cache = optarg;
            break;
        case 'p':
            compare->progress = true;
            break;
        default:
            status = img_common_option("compare", &common, option);
        }
        if (status) {
            return 1 + status;
        }
    }
    if (argc - optind != 2) {
        return 1 + img_usage("compare", "Expecting two image file names");
    }
    struct error *error = NULL;
    if (common.name.image_opts && (common.name.format || second_format)) {
        error_set(&error, -EINVAL, "--image-opts and --format are mutually exclusive");
    } else if (cache && image_cache_mode(cache, &(bool){0}, &(bool){0}, NULL) < 0) {
        error_set(&error, -EINVAL, "Invalid source cache option: %s", cache);
    }
    if (error) {
        img_fail("compare", error);
        return 1 + STATUS_OPEN;
    }
    compare->quiet = common.quiet;
    for (unsigned i = 0; i < 2; i++) {
        compare->names[i] = common.name;
        compare->names[i].name = argv[optind + i];
        compare->names[i].cache = cache;
    }
    compare->names[1].format = second_format;
    return 0;
}

int coroutine_fn img_compare(struct img *img, int argc, char **argv)
{
    struct compare compare = {0};
    int status = read_options(&compare, argc, argv);
    return status ? status - 1 : compare_execute(img, &compare);
}

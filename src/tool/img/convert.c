/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock img convert`: images, end to end, into one that is made for it or exists. The moving is the copy engine's;
 * this file decides what lies where:
 *
 * 1. What the target shows already is not written: zeroes of a target that is known to be zero, and what the source's
 *    top image leaves to its backing file when the target leans on one with the same content (-B).
 * 2. -S 0 writes everything, holes and zeroes too. Else aligned runs of zeroes inside data count as zeroes from the
 *    given length on, in units of the power of two below it, or of what the target can leave out if that is more.
 * 3. Writes begin in order of offset unless -W allows otherwise: a target that grows is laid out in order.
 * 4. The target is flushed before the command says that all went well. A new one that could not be written whole is
 *    removed; one that was there is left as it is then.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "tool/image_open.h"
#include "tool/image_view.h"
#include "tool/img/convert_bitmaps.h"
#include "tool/img/copying.h"
#include "tool/img/img.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

#define SECTOR 512
#define SPARSE_DEFAULT 4096
#define SPARSE_MAX (16 * MiB)
#define WORKERS_DEFAULT 8
#define WORKERS_MAX 16
#define PIECE (2 * MiB) /* as the peer's: with -S, where a piece ends can be seen in what is left out */

struct convert {
    struct img_copying copying; /* first */
    struct img *img;
    /* options */
    struct image_name source, target;
    char *const *names; /* of the sources */
    unsigned name_count;
    const char *backing, *backing_format, *snapshot;
    GPtrArray *options; /* of -o and -B */
    bool compress, no_create, target_is_zero, salvage, quiet, progress, offload, out_of_order, sparse_given;
    bool bitmaps, skip_broken_bitmaps;
    uint64_t sparse, workers, rate;
    /* while it runs */
    struct img_sources sources;
    struct node *node; /* the target */
    struct backend *backend;
    uint64_t backing_size; /* up to where the target leans on a backing file */
};

/* --- what lies where --- */

/* What the source's top image leaves to its backing file, the target leaves to its own. */
static int coroutine_fn extent_above(struct convert *convert, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    const struct img_source *source = img_sources_at(&convert->sources, offset);
    uint64_t at = offset - source->start;
    bytes = min_u64(bytes, min_u64(source->size - at, convert->backing_size - offset));
    return backend_block_status(source->backend, node_backing(source->node), at, bytes, ret);
}

static int coroutine_fn convert_extent(void *argument, uint64_t offset, uint64_t bytes, struct copy_extent *ret)
{
    struct convert *convert = argument;
    struct extent extent;
    bool leans = offset < convert->backing_size;
    int result = leans ? extent_above(convert, offset, bytes, &extent)
                       : img_sources_status(&convert->sources, offset, bytes, &extent);
    if (result < 0) {
        return result;
    }
    ret->bytes = extent.bytes;
    if (extent.flags & EXTENT_ZERO) {
        bool shown = convert->copying.config.target_is_zero || (convert->backing_size && !leans);
        ret->kind = !convert->sparse ? COPY_DATA : shown ? COPY_SKIP : COPY_ZERO;
    } else {
        ret->kind = leans && !(extent.flags & EXTENT_ALLOCATED) ? COPY_SKIP : COPY_DATA;
    }
    return 0;
}

static int coroutine_fn convert_read(void *argument, uint64_t offset, uint64_t bytes, struct buffers to)
{
    struct convert *convert = argument;
    return img_sources_read(&convert->sources, offset, bytes, to);
}

/* What cannot be read is zero: sector by sector where a longer read fails. */
static int coroutine_fn salvage_read(void *argument, uint64_t offset, uint64_t bytes, struct buffers to)
{
    struct convert *convert = argument;
    int result = img_sources_read(&convert->sources, offset, bytes, to);
    while (result < 0 && bytes) {
        uint64_t some = min_u64(bytes, SECTOR - offset % SECTOR);
        int code = img_sources_read(&convert->sources, offset, some, to);
        if (code < 0) {
            if (!convert->quiet) {
                img_warn("error while reading offset %" G_GUINT64_FORMAT ": %s", offset, g_strerror(-code));
            }
            buffers_fill(to, 0, some);
        }
        offset += some;
        bytes -= some;
        to = buffers_advance(to, some);
    }
    return 0;
}

/* --- the sources --- */

static int coroutine_fn open_sources(struct convert *convert, struct error **err)
{
    if (convert->snapshot && convert->name_count > 1) {
        return error_set(err, -ENOTSUP, "No support for concatenating multiple snapshot");
    }
    int result = 0;
    for (unsigned i = 0; i < convert->name_count && result == 0; i++) {
        convert->source.name = convert->names[i];
        result = img_sources_add(convert->img, &convert->sources, &convert->source, err);
    }
    if (result == 0 && convert->snapshot) {
        result = image_show_snapshot(convert->img->graph, node_beneath_filters(convert->sources.list[0].node),
                                     convert->snapshot, err);
        convert->sources.size = convert->sources.list[0].size = backend_size(convert->sources.list[0].backend);
    }
    if (result == 0 && convert->bitmaps) {
        result = convert_bitmaps_check(node_beneath_filters(convert->sources.list[0].node),
                                       convert->skip_broken_bitmaps, err);
    }
    return result;
}

/* --- the target --- */

static void add_option(struct convert *convert, const char *name, const char *value)
{
    g_auto(GStrv) parts = g_strsplit(value, ",", -1);
    g_autofree char *escaped = g_strjoinv(",,", parts); /* as lists of options have it */
    g_ptr_array_add(convert->options, g_strdup_printf("%s=%s", name, escaped));
}

/* What a format cannot do, before anything is made. */
static int check_format(const struct convert *convert, struct error **err)
{
    const char *format = convert->target.format;
    const struct driver *driver = driver_find(format);
    if (!driver || driver->kind == DRIVER_FILTER) {
        return error_set(err, -EINVAL, "Unknown file format '%s'", format);
    }
    if (convert->backing && !driver->backing) {
        return error_set(err, -ENOTSUP, "Backing file not supported for file format '%s'", format);
    }
    if (convert->backing_format && !driver->backing) {
        return error_set(err, -ENOTSUP, "Backing file format not supported for file format '%s'", format);
    }
    if (convert->compress && !driver->compresses) {
        return error_set(err, -ENOTSUP, "Compression not supported for this file format");
    }
    if (convert->bitmaps && !(driver->image && driver->image->bitmap_may_add)) {
        return error_set(err, -ENOTSUP, "Format driver '%s' does not support bitmaps", format);
    }
    return 0;
}

static int check_options(const struct convert *convert, const struct blockdev_create_options *options,
                         struct error **err)
{
    if (options->driver != BLOCKDEV_DRIVER_QCOW2) {
        return 0;
    }
    const struct blockdev_create_options_qcow2 *own = &options->u.qcow2;
    if (convert->compress && own->has_preallocation && own->preallocation != PREALLOCATION_MODE_OFF) {
        return error_set(err, -EINVAL, "Compression and preallocation not supported at the same time");
    }
    if (own->backing_file && *own->backing_file && !own->has_backing_fmt) {
        return error_set(err, -EINVAL, "Use of backing file requires explicit backing format");
    }
    return 0;
}

static int coroutine_fn create_target(struct convert *convert, struct error **err)
{
    struct blockdev_create_options *options = NULL;
    int result = check_format(convert, err);
    if (result < 0) {
        return result;
    }
    if (convert->backing) {
        add_option(convert, "backing_file", convert->backing);
    }
    if (convert->backing_format) {
        add_option(convert, "backing_fmt", convert->backing_format);
    }
    result = img_create_options(convert->target.format, (char *const *)convert->options->pdata, convert->options->len,
                                convert->sources.size, false, &options, err);
    if (result == 0) {
        result = check_options(convert, options, err);
    }
    if (result == 0) {
        result = img_make(convert->img, convert->target.name, options, err);
        if (result < 0) {
            error_prepend(err, "%s: error while converting %s", convert->target.name, convert->target.format);
        }
        convert->target.key_secret =
            g_intern_string(img_created_secret(options)); /* the image's own options end here */
    }
    blockdev_create_options_free(options);
    return result;
}

static int coroutine_fn open_target(struct convert *convert, struct error **err)
{
    struct image_name *name = &convert->target;
    name->writable = true;
    name->discard = "unmap";
    name->cache = name->cache ? name->cache : "unsafe";
    int result = convert->no_create ? 0 : create_target(convert, err);
    if (result == 0) {
        result = image_open(convert->img->graph, name, &convert->node, err);
    }
    if (result == 0) {
        result = image_backend(convert->img->graph, convert->node, true, &convert->backend, err);
    }
    if (result < 0) {
        return result;
    }
    struct node *node = node_beneath_filters(convert->node), *backing = node_backing(node);
    if (convert->compress && !node->driver->compresses) {
        return error_set(err, -ENOTSUP, "Compression not supported for this file format");
    }
    if (convert->compress && node->encrypted) {
        return error_set(err, -ENOTSUP, "Compression and encryption not supported at the same time");
    }
    if (backend_size(convert->backend) < convert->sources.size) {
        return error_set(err, -ENOSPC, "output file is smaller than input file");
    }
    bool leans = backing && !convert->no_create;
    convert->backing_size = leans ? atomic_load(&backing->size) : 0;
    /* What was never written to an encrypted image reads as noise. */
    bool fresh = !convert->no_create && !backing && strcmp(node->driver->name, "luks") != 0;
    convert->copying.config.target_is_zero = (fresh || convert->target_is_zero) && convert->sparse;
    return 0;
}

/* --- the command --- */

static void configure(struct convert *convert)
{
    const struct node *node = node_beneath_filters(convert->node);
    struct copy_config *config = &convert->copying.config;
    config->pin_zeroes = convert->backing_size > 0; /* what lies below may be another image later */
    bool one = convert->sources.count == 1 && !convert->salvage;
    config->source = one ? convert->sources.list[0].backend : NULL;
    config->read = one ? NULL : convert->salvage ? salvage_read : convert_read;
    config->target = convert->backend;
    config->alignment = convert->compress ? max_u64(node->limits.cluster_size, SECTOR) : 1;
    config->extent = convert_extent;
    config->ordered = !convert->out_of_order;
    config->order_unit = node->limits.cluster_size; /* who allocates a cluster is not left to chance */
    config->workers = convert->workers;
    config->piece = PIECE;
    if (convert->compress) {
        config->write_flags = REQUEST_COMPRESSED;
    }
    if (convert->sparse) {
        config->zero_alignment = max_u64(SECTOR, node->limits.cluster_size ? node->limits.zero_alignment : 0);
        while (config->zero_alignment * 2 <= convert->sparse) {
            config->zero_alignment *= 2;
        }
        config->zero_minimum = convert->sparse;
        config->piece = max_u64(PIECE, config->zero_alignment * 2);
    }
    config->memory = config->workers * config->piece;
}

static int coroutine_fn convert_run(struct convert *convert, struct error **err)
{
    int result = open_sources(convert, err);
    if (result == 0) {
        result = open_target(convert, err);
    }
    if (result < 0) {
        return result;
    }
    configure(convert);
    img_copying_set_rate(&convert->copying, convert->rate);
    convert->copying.of = convert->sources.size;
    result = img_copying_run_or_error(&convert->copying, convert->sources.size, err);
    if (result == 0 && convert->bitmaps) {
        result = convert_bitmaps_copy(convert->img->graph, node_beneath_filters(convert->sources.list[0].node),
                                      node_beneath_filters(convert->node), err);
    }
    if (result == 0) {
        result = backend_flush(convert->backend);
        if (result < 0) {
            error_set_errno(err, result, "error while writing");
        }
    }
    return result;
}

static int coroutine_fn convert_execute(struct convert *convert)
{
    struct error *error = NULL;
    struct img_progress progress;
    img_progress_begin(&progress, convert->progress && !convert->quiet);
    convert->copying.progress = &progress;
    int result = convert_run(convert, &error);
    image_backend_destroy(convert->backend);
    node_release(convert->node);
    img_sources_clear(&convert->sources);
    img_progress_end(&progress);
    if (result < 0) {
        img_unmake(convert->img);
    }
    img_keep(convert->img);
    return result < 0 ? img_fail("convert", error) : 0;
}

/* --- its options --- */

enum {
    OPTION_TARGET_IMAGE_OPTS = 1000,
    OPTION_TARGET_IS_ZERO,
    OPTION_BITMAPS,
    OPTION_SKIP_BROKEN_BITMAPS,
    OPTION_SALVAGE,
};

static const struct option convert_options[] = {
    {"quiet", no_argument, NULL, 'q'},
    {"progress", no_argument, NULL, 'p'},
    {"source-format", required_argument, NULL, 'f'},
    {"source-image-opts", no_argument, NULL, IMG_IMAGE_OPTS},
    {"source-snapshot", required_argument, NULL, 'l'},
    {"source-cache", required_argument, NULL, 'T'},
    {"target-format", required_argument, NULL, 'O'},
    {"target-image-opts", no_argument, NULL, OPTION_TARGET_IMAGE_OPTS},
    {"target-options", required_argument, NULL, 'o'},
    {"compress", no_argument, NULL, 'c'},
    {"target-cache", required_argument, NULL, 't'},
    {"backing", required_argument, NULL, 'B'},
    {"backing-format", required_argument, NULL, 'F'},
    {"no-create", no_argument, NULL, 'n'},
    {"target-is-zero", no_argument, NULL, OPTION_TARGET_IS_ZERO},
    {"sparse-size", required_argument, NULL, 'S'},
    {"bitmaps", no_argument, NULL, OPTION_BITMAPS},
    {"skip-broken-bitmaps", no_argument, NULL, OPTION_SKIP_BROKEN_BITMAPS},
    {"rate", required_argument, NULL, 'r'},
    {"parallel", required_argument, NULL, 'm'},
    {"copy-range-offloading", no_argument, NULL, 'C'},
    {"salvage", no_argument, NULL, OPTION_SALVAGE},
    {"oob-writes", no_argument, NULL, 'W'},
    IMG_SHARE_OPTION,
    IMG_COMMON_OPTIONS,
    {0},
};

static const char convert_help[] =
    "[-f FORMAT | --image-opts] [-O FORMAT | --target-image-opts]\n"
    "        [-o OPTIONS] [-B BACKING -F FORMAT] [-n] [-c] [-S SIZE] [-l SNAPSHOT] [-p | -q]\n"
    "        [OPTION...] SOURCE... TARGET\n\n"
    "  -f, --source-format FORMAT   the format of the sources, which are read end to end\n"
    "  --image-opts                 the sources are lists of options: driver=...,file.filename=...\n"
    "  -O, --target-format FORMAT   the format of TARGET (raw)\n"
    "  --target-image-opts          TARGET is a list of options (with -n)\n"
    "  -o, --target-options OPTIONS options of the new image; '-o help' lists them\n"
    "  -c, --compress               write compressed clusters\n"
    "  -B, --backing FILE           TARGET is an overlay of FILE, which shows what the source's backing file shows\n"
    "  -F, --backing-format FORMAT  the format of FILE\n"
    "  -l, --source-snapshot NAME   the content at a snapshot inside the source\n"
    "  -n, --no-create              TARGET exists\n"
    "  --target-is-zero             and reads as zeroes\n"
    "  -S, --sparse-size SIZE       so many zero bytes become a hole (4k); 0: everything is written\n"
    "  --bitmaps                    copy the persistent bitmaps of the source too\n"
    "  --skip-broken-bitmaps        but for those that cannot be relied on\n"
    "  -m, --parallel NUMBER        pieces in flight (8)\n"
    "  -W, --oob-writes             write them in any order\n"
    "  -C, --copy-range-offloading  refused: the kernel is not asked to copy\n"
    "  -r, --rate RATE              bytes per second at most\n"
    "  --salvage                    what cannot be read becomes zeroes\n"
    "  -t, --target-cache MODE      of TARGET (unsafe)\n"
    "  -T, --source-cache MODE      of the sources (writeback)\n"
    "  -p, --progress               show how far it is\n" IMG_HELP_QUIET IMG_HELP_SHARE
    "  --object OBJECT              a key: secret,id=ID,...\n"
    "  -h, --help                   show this help and exit\n";

static int set_sparse(struct convert *convert, const char *text, struct error **err)
{
    if (size_parse(text, &convert->sparse) < 0) {
        return error_set(err, -EINVAL, "Invalid buffer size for sparse output specified: '%s'.", text);
    }
    if (convert->sparse % SECTOR || convert->sparse > SPARSE_MAX) {
        return error_set(err, -EINVAL,
                         "Invalid buffer size for sparse output specified. Valid sizes are multiples of %u up to "
                         "%" G_GUINT64_FORMAT ". Select 0 to disable sparse detection (fully allocates output).",
                         SECTOR, (uint64_t)SPARSE_MAX);
    }
    convert->sparse_given = true;
    return 0;
}

static int set_workers(struct convert *convert, const char *text, struct error **err)
{
    return img_number("number of coroutines", text, 1, WORKERS_MAX, &convert->workers, err);
}

/* Those with a value; -ENOENT: it is none of them. */
static int set_value(struct convert *convert, int option, struct error **err)
{
    switch (option) {
    case 'O':
        convert->target.format = optarg;
        return 0;
    case 'B':
        convert->backing = optarg;
        return 0;
    case 'F':
        convert->backing_format = optarg;
        return 0;
    case 'o':
        g_ptr_array_add(convert->options, g_strdup(optarg));
        return 0;
    case 'l':
        convert->snapshot = optarg;
        return 0;
    case 'S':
        return set_sparse(convert, optarg, err);
    case 'm':
        return set_workers(convert, optarg, err);
    case 'r':
        return img_size("rate limit", optarg, &convert->rate, err);
    case 't':
        convert->target.cache = optarg;
        return image_cache_mode(optarg, &(bool){0}, &(bool){0}, err);
    case 'T':
        convert->source.cache = optarg;
        if (image_cache_mode(optarg, &(bool){0}, &(bool){0}, NULL) < 0) {
            return error_set(err, -EINVAL, "Invalid source cache option: %s", optarg);
        }
        return 0;
    default:
        return -ENOENT;
    }
}

/* Those without. */
static bool set_flag(struct convert *convert, int option)
{
    const struct {
        int option;
        bool *flag;
    } flags[] = {
        {'c', &convert->compress},
        {'n', &convert->no_create},
        {'p', &convert->progress},
        {'C', &convert->offload},
        {'W', &convert->out_of_order},
        {OPTION_TARGET_IMAGE_OPTS, &convert->target.image_opts},
        {OPTION_TARGET_IS_ZERO, &convert->target_is_zero},
        {OPTION_BITMAPS, &convert->bitmaps},
        {OPTION_SKIP_BROKEN_BITMAPS, &convert->skip_broken_bitmaps},
        {OPTION_SALVAGE, &convert->salvage},
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(flags); i++) {
        if (flags[i].option == option) {
            *flags[i].flag = true;
            return true;
        }
    }
    return false;
}

/* What excludes or needs each other. */
static int check_combination(struct convert *convert, struct error **err)
{
    const struct {
        bool wrong;
        const char *message;
    } rules[] = {
        {convert->skip_broken_bitmaps && !convert->bitmaps, "Use of --skip-broken-bitmaps requires --bitmaps"},
        {convert->bitmaps && convert->name_count > 1, "Copying bitmaps only possible with single source"},
        {convert->offload && convert->sparse_given, "Cannot enable copy offloading when -S is used"},
        {convert->offload && convert->compress, "Cannot enable copy offloading when -c is used"},
        {convert->offload && convert->salvage, "Cannot use copy offloading in salvaging mode"},
        {convert->source.image_opts && convert->source.format, "--image-opts and --format are mutually exclusive"},
        {convert->target.image_opts && convert->target.format,
         "--target-format and --target-image-opts are mutually exclusive"},
        {convert->target.image_opts && !convert->no_create, "--target-image-opts requires use of -n flag"},
        {convert->target_is_zero && !convert->no_create, "--target-is-zero requires use of -n flag"},
        {convert->no_create && convert->options->len, "-o has no effect when skipping image creation"},
        {convert->no_create && convert->backing, "-B has no effect when skipping image creation"},
        {convert->name_count < 1, "Must specify image file name"},
        {convert->offload, "Copy offloading (-C) is not supported"},
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(rules); i++) {
        if (rules[i].wrong) {
            return error_set(err, -EINVAL, "%s", rules[i].message);
        }
    }
    return 0;
}

static bool wants_help(const struct convert *convert)
{
    for (guint i = 0; i < convert->options->len; i++) {
        if (!strcmp(convert->options->pdata[i], "help") || !strcmp(convert->options->pdata[i], "?")) {
            return true;
        }
    }
    return false;
}

/* Reads the command line. 0, the exit status plus 1 when there is nothing more to do, or an error. */
static int read_options(struct convert *convert, int argc, char **argv, struct error **err)
{
    struct img_common common = {0};
    for (int option;
         (option = getopt_long(argc, argv, "hf:O:B:CcF:o:l:S:pt:T:qnm:WUr:", convert_options, NULL)) != -1;) {
        if (option == 'h') {
            return 1 + img_help("convert", convert_help);
        }
        int result = set_flag(convert, option) ? 0 : set_value(convert, option, err);
        if (result == -ENOENT) {
            int status = img_common_option("convert", &common, option);
            if (status) {
                return 1 + status;
            }
        } else if (result < 0) {
            return result;
        }
    }
    convert->quiet = common.quiet;
    convert->source.format = common.name.format;
    convert->source.image_opts = common.name.image_opts;
    convert->source.force_share = common.name.force_share;
    if (wants_help(convert)) {
        img_print_options(convert->target.format ? convert->target.format : "raw", false);
        return 1;
    }
    convert->names = argv + optind;
    convert->name_count = argc - optind > 0 ? argc - optind - 1 : 0;
    int result = check_combination(convert, err);
    if (result == 0) {
        convert->target.name = argv[argc - 1];
        if (!convert->target.image_opts && !convert->target.format) {
            convert->target.format = "raw";
        }
    }
    return result;
}

int coroutine_fn img_convert(struct img *img, int argc, char **argv)
{
    struct convert convert = {
        .img = img,
        .options = g_ptr_array_new_with_free_func(g_free),
        .sparse = SPARSE_DEFAULT,
        .workers = WORKERS_DEFAULT,
    };
    struct error *error = NULL;
    int result = read_options(&convert, argc, argv, &error);
    int status;
    if (result < 0) {
        status = img_fail("convert", error);
    } else {
        status = result > 0 ? result - 1 : convert_execute(&convert);
    }
    g_ptr_array_free(convert.options, TRUE);
    return status;
}

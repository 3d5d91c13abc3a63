/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `img create`: a new, empty image. Owns what belongs to the command line alone: the backing file, which lends its
 * size, and the line that says what is made. The making is img_make()'s.
 *
 * 1. The format of a backing file is given, never guessed: it will be believed whenever the image is opened.
 * 2. A backing file is open while the new image is made, so that the new one cannot be made over it, by whatever name.
 * 3. Of an option that is given twice the last one counts; -b, -F and SIZE come after all of -o.
 */
#include "base/size.h"
#include "block/graph.h"
#include "schema/types.h"
#include "tool/image_open.h"
#include "tool/img/img.h"
#include "tool/keyval.h"
#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

#define SECTOR 512

struct create {
    const char *path, *format;
    GPtrArray *given; /* char *, the options as text */
    bool unsafe, quiet;
};

/* --- the options as text --- */

/* The value that counts of an option in all of -o, or NULL. g_free(). */
static char *given_value(const struct create *create, const char *name)
{
    char *value = NULL;
    size_t length = strlen(name);
    for (unsigned i = 0; i < create->given->len; i++) {
        const char *text = create->given->pdata[i];
        for (char *item; (item = keyval_next(&text)); g_free(item)) {
            if (!strncmp(item, name, length) && (item[length] == '=' || !item[length])) {
                g_free(value);
                value = g_strdup(item[length] ? item + length + 1 : "on");
            }
        }
    }
    return value;
}

static char *escape_commas(const char *value)
{
    g_auto(GStrv) parts = g_strsplit(value, ",", -1);
    return g_strjoinv(",,", parts);
}

static void give(struct create *create, const char *name, const char *value)
{
    g_autofree char *escaped = escape_commas(value);
    g_ptr_array_add(create->given, g_strdup_printf("%s=%s", name, escaped));
}

/* What the line shows, in its order, with what is shown even if it was not given. */
struct shown_option {
    const char *name, *standard;
};
static const struct shown_option shown_qcow2[] = {{"encryption", NULL},
                                                  {"encrypt.format", NULL},
                                                  {"encrypt.key-secret", NULL},
                                                  {"encrypt.cipher-alg", NULL},
                                                  {"encrypt.cipher-mode", NULL},
                                                  {"encrypt.ivgen-alg", NULL},
                                                  {"encrypt.ivgen-hash-alg", NULL},
                                                  {"encrypt.hash-alg", NULL},
                                                  {"encrypt.iter-time", NULL},
                                                  {"cluster_size", "65536"},
                                                  {"extended_l2", "off"},
                                                  {"preallocation", NULL},
                                                  {"compression_type", "zlib"},
                                                  {"size", NULL},
                                                  {"compat", NULL},
                                                  {"backing_file", NULL},
                                                  {"backing_fmt", NULL},
                                                  {"data_file", NULL},
                                                  {"data_file_raw", NULL},
                                                  {"lazy_refcounts", "off"},
                                                  {"refcount_bits", "16"},
                                                  {NULL, NULL}};
static const struct shown_option shown_others[] = {
    {"size", NULL},        {"nocow", NULL},         {"key-secret", NULL},       {"cipher-alg", NULL},
    {"cipher-mode", NULL}, {"ivgen-alg", NULL},     {"ivgen-hash-alg", NULL},   {"hash-alg", NULL},
    {"iter-time", NULL},   {"preallocation", NULL}, {"extent_size_hint", NULL}, {NULL, NULL}};

static void print_line(const struct create *create)
{
    static const char *const sizes[] = {"size", "cluster_size", "extent_size_hint"};
    GString *line = g_string_new(NULL);
    const struct shown_option *shown = !strcmp(create->format, "qcow2") ? shown_qcow2 : shown_others;
    for (; shown->name; shown++) {
        g_autofree char *value = given_value(create, shown->name);
        uint64_t bytes;
        bool is_size = false;
        if (!value && !shown->standard) {
            continue;
        }
        g_autofree char *escaped = escape_commas(value ? value : shown->standard);
        for (unsigned i = 0; i < G_N_ELEMENTS(sizes); i++) {
            is_size = is_size || !strcmp(sizes[i], shown->name);
        }
        if (is_size && size_parse(escaped, &bytes) == 0) {
            g_string_append_printf(line, " %s=%" G_GUINT64_FORMAT, shown->name, bytes);
        } else {
            g_string_append_printf(line, " %s=%s", shown->name, escaped);
        }
    }
    printf("Formatting '%s', fmt=%s%s\n", create->path, create->format, line->str);
    fflush(stdout);
    g_string_free(line, TRUE);
}

/* --- the backing file --- */

static int coroutine_fn backing_open(struct img *img, const struct create *create, const char *name, const char *format,
                                     struct node **ret, struct error **err)
{
    g_autofree char *found = image_name_path(create->path, name);
    const char *path = found ? found : name;
    if (!format) {
        const char *looks = NULL;
        int r = error_set(err, -EINVAL, "Backing file specified without backing format");
        if (!create->unsafe && image_probe(img->graph, path, &looks, NULL) == 0) {
            error_hint(err, "Give -F FORMAT (its content looks like %s)", looks);
        } else {
            error_hint(err, "Give -F FORMAT");
        }
        return r;
    }
    if (create->unsafe) {
        return 0;
    }
    g_autofree char *here = g_canonicalize_filename(create->path, NULL);
    g_autofree char *there = g_canonicalize_filename(path, NULL);
    if (!strcmp(here, there)) {
        return error_set(err, -EINVAL, "Trying to create an image with the same filename as the backing file");
    }
    struct image_name image = {.name = path, .format = format, .no_backing = true, .no_data = true};
    int r = image_open(img->graph, &image, ret, err);
    if (r < 0) {
        error_prepend(err, "Could not open backing image");
        error_hint(err, "With -u and a size the image is made without looking at its backing file");
    }
    return r;
}

/* --- the size --- */

/* Settles the size, from SIZE, -o size, or the backing file, as the last word in `given`. */
static int settle_size(struct create *create, const char *size, const struct node *backing, struct error **err)
{
    g_autofree char *option = given_value(create, "size");
    uint64_t bytes;
    int r = 0;
    if (size && option) {
        return error_set(err, -EINVAL, "The image size must be specified only once");
    }
    if (size || option) {
        r = img_size("image size", size ? size : option, &bytes, err);
    } else if (backing) {
        bytes = atomic_load(&backing->size);
    } else {
        return error_set(err, -EINVAL, "Image creation needs a size parameter");
    }
    if (r == 0) {
        g_autofree char *text = g_strdup_printf("%" G_GUINT64_FORMAT, bytes);
        give(create, "size", text);
    }
    return r;
}

static int coroutine_fn create_image(struct img *img, struct create *create, struct error **err)
{
    struct blockdev_create_options *options = NULL;
    g_autofree char *size = given_value(create, "size");
    uint64_t bytes = 0;
    size_parse(size, &bytes); /* settle_size() has read it */
    if (bytes > INT64_MAX - SECTOR) {
        return error_set(err, -EFBIG, "The image size is too large");
    }
    int r = img_create_options(create->format, (char *const *)create->given->pdata, create->given->len,
                               align_up(bytes, SECTOR), false, &options, err);
    if (r == 0) {
        if (!create->quiet) {
            print_line(create);
        }
        r = img_make(img, create->path, options, err);
        img_keep(img);
    }
    blockdev_create_options_free(options);
    return r;
}

static int coroutine_fn create_run(struct img *img, struct create *create, const char *size, struct error **err)
{
    g_autofree char *backing = given_value(create, "backing_file");
    g_autofree char *format = given_value(create, "backing_fmt");
    struct node *node = NULL;
    int r = img_create_check(create->format, backing != NULL, err);
    if (r == 0 && backing && *backing) {
        r = backing_open(img, create, backing, format, &node, err);
    }
    if (r == 0) {
        r = settle_size(create, size, node, err);
    }
    if (r == 0) {
        r = create_image(img, create, err);
    }
    if (r < 0) {
        error_prepend(err, "%s", create->path);
    }
    node_release(node);
    return r;
}

/* --- the command --- */

static const char create_help[] =
    "[-q] [-f FORMAT] [-o OPTIONS] [-b BACKING -F FORMAT] [-u]\n"
    "        [--object OBJECT] FILENAME [SIZE]\n\n"
    "  -f, --format FORMAT          of the new image; raw if not given\n"
    "  -o, --options OPTIONS        NAME=VALUE,... of the format ('-o help' lists them)\n"
    "  -b, --backing BACKING        the image that it shows where it has no data of its own\n"
    "  -F, --backing-format FORMAT  the format of BACKING\n"
    "  -u, --backing-unsafe         BACKING is not looked at, and SIZE must be given\n"
    "  --object OBJECT              a key: secret,id=ID,...\n"
    "  -q, --quiet                  print nothing but errors\n"
    "  -h, --help                   show this help and exit\n"
    "  SIZE                         bytes, or with k, M, G, T, P, E behind the number\n";

static int coroutine_fn create_arguments(struct img *img, struct create *create, int argc, char **argv)
{
    struct error *error = NULL;
    for (unsigned i = 0; i < create->given->len; i++) {
        const char *text = create->given->pdata[i];
        if (img_asks_for_help(text)) {
            img_print_options(create->format, false);
            return 0;
        }
    }
    if (optind >= argc) {
        return img_usage("create", "Expecting image file name");
    }
    if (optind + 2 < argc) {
        return img_usage("create", "Unexpected argument: %s", argv[optind + 2]);
    }
    create->path = image_path(argv[optind], &error);
    if (!create->path || create_run(img, create, optind + 1 < argc ? argv[optind + 1] : NULL, &error) < 0) {
        return img_fail("create", error);
    }
    return 0;
}

int coroutine_fn img_create(struct img *img, int argc, char **argv)
{
    static const struct option options[] = {{"options", required_argument, NULL, 'o'},
                                            {"backing", required_argument, NULL, 'b'},
                                            {"backing-format", required_argument, NULL, 'F'},
                                            {"backing-unsafe", no_argument, NULL, 'u'},
                                            IMG_QUIET_OPTION,
                                            {"help", no_argument, NULL, 'h'},
                                            {"format", required_argument, NULL, 'f'},
                                            {"object", required_argument, NULL, IMG_OBJECT},
                                            {0}};
    g_autoptr(GPtrArray) given = g_ptr_array_new_with_free_func(g_free);
    struct create create = {.given = given};
    struct img_common common = {.name.format = "raw"};
    const char *backing = NULL, *backing_format = NULL;
    for (int option; (option = getopt_long(argc, argv, "hf:o:b:F:uq", options, NULL)) != -1;) {
        int status = 0;
        switch (option) {
        case 'h':
            return img_help("create", create_help);
        case 'o':
            g_ptr_array_add(given, g_strdup(optarg));
            break;
        case 'b':
            backing = optarg;
            break;
        case 'F':
            backing_format = optarg;
            break;
        case 'u':
            create.unsafe = true;
            break;
        default:
            status = img_common_option("create", &common, option);
        }
        if (status) {
            return status;
        }
    }
    create.format = common.name.format;
    create.quiet = common.quiet;
    if (backing) {
        give(&create, "backing_file", backing);
    }
    if (backing_format) {
        give(&create, "backing_fmt", backing_format);
    }
    return create_arguments(img, &create, argc, argv);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the options of several sub-commands mean: sizes, and `-o`, whose names are those of the format's table
 * (block/image.h) and whose values become members of blockdev-create-options.
 *
 * 1. A name that the table of the format does not have is refused; given twice, the last one counts, as with the peer.
 * 2. The members that are children of the new image's node are nobody's until img_make() fills them in: `file`.
 *
 * Types and limits of values are the schema's and the driver's to check, not this file's.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "schema/marshal.h"
#include "schema/types.h"
#include "tool/img/img.h"
#include "tool/keyval.h"
#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

int img_number(const char *option, const char *text, uint64_t minimum, uint64_t maximum, uint64_t *ret,
               struct error **err)
{
    bool negative = text[0] == '-' && g_ascii_isdigit(text[1]);
    int r = negative ? -ERANGE : size_parse(text, ret);
    if (r == -ERANGE || (r == 0 && (*ret < minimum || *ret > maximum))) {
        return error_set(err, -EINVAL,
                         "Invalid %s specified. Must be between %" G_GUINT64_FORMAT " and %" G_GUINT64_FORMAT ".",
                         option, minimum, maximum);
    }
    return r < 0 ? error_set(err, -EINVAL, "Invalid %s specified: '%s'.", option, text) : 0;
}

int img_size(const char *option, const char *text, uint64_t *ret, struct error **err)
{
    int r = img_number(option, text, 0, INT64_MAX, ret, err);
    if (r < 0) {
        error_hint(err, "A size is a number of bytes, or one with k, M, G, T, P or E behind it (kibibytes, ...)");
    }
    return r;
}

/* --- options of most sub-commands --- */

static int set_output(struct img_common *common, const char *text, struct error **err)
{
    if (strcmp(text, "json") != 0 && strcmp(text, "human") != 0) {
        return error_set(err, -EINVAL, "--output expects 'human' or 'json' not '%s'", text);
    }
    common->json = !strcmp(text, "json");
    return 0;
}

int img_common_option(const char *command, struct img_common *common, int option)
{
    struct error *error = NULL;
    int r = 0;
    switch (option) {
    case 'f':
        common->name.format = optarg;
        break;
    case 'U':
        common->name.force_share = true;
        break;
    case 'q':
        common->quiet = true;
        break;
    case IMG_IMAGE_OPTS:
        common->name.image_opts = true;
        break;
    case IMG_OUTPUT:
        r = set_output(common, optarg, &error);
        break;
    case IMG_OBJECT:
        r = image_object_add(optarg, &error);
        break;
    default:
        return img_usage(command, NULL);
    }
    return r < 0 ? img_fail(command, error) : 0;
}

int img_common_name(const char *command, struct img_common *common, int argc, char **argv)
{
    if (optind != argc - 1) {
        return img_usage(command, "Expecting one image file name");
    }
    if (common->name.image_opts && common->name.format) {
        return img_usage(command, "--image-opts and --format are mutually exclusive");
    }
    common->name.name = argv[optind];
    return 0;
}

/* --- the options of a format --- */

/* A raw image is its file. */
static const struct driver *driver_of_format(const char *format)
{
    return driver_find(!strcmp(format, "raw") ? "file" : format);
}

static const struct image_option *option_find(const struct driver *driver, const char *name, bool amend)
{
    const struct image_option *option = driver->image ? driver->image->options : NULL;
    for (; option && option->name; option++) {
        if (!strcmp(option->name, name) && (amend ? option->amendable || option->amend_only : !option->amend_only)) {
            return option;
        }
    }
    return NULL;
}

/* The value as the member's type wants it. A new reference. */
static json_t *option_value(const struct image_option *option, const char *member, const char *value)
{
    if (!strcmp(member, "version")) {
        value = !strcmp(value, "0.10") ? "v2" : !strcmp(value, "1.1") ? "v3" : value;
    }
    if (!strcmp(member, "encrypt.format")) { /* its name in QMP; "encryption=on" is the oldest way to say it */
        value = !strcmp(value, "aes") || (!strcmp(option->name, "encryption") && !strcmp(value, "on")) ? "qcow" : value;
    }
    if (!strcmp(member, "data-file")) {
        return json_pack("{s:s, s:s}", "driver", "file", "filename", value);
    }
    return json_string(value);
}

static int option_set(json_t *root, const struct image_option *option, const char *value, struct error **err)
{
    g_autofree char *member = g_strdelimit(g_strdup(option->member ? option->member : option->name), "_", '-');
    json_t *json = option_value(option, member, value), *at = root;
    if (!json) {
        return error_set(err, -EINVAL, "The value of '%s' is not valid UTF-8", option->name);
    }
    g_auto(GStrv) parts = g_strsplit(member, ".", -1);
    unsigned last = g_strv_length(parts) - 1;
    for (unsigned i = 0; i < last; i++) {
        json_t *next = json_object_get(at, parts[i]);
        if (!next) {
            next = json_object();
            json_object_set_new(at, parts[i], next);
        }
        at = next;
    }
    json_object_set_new(at, parts[last], json);
    return 0;
}

bool img_asks_for_help(const char *given)
{
    for (char *item; (item = keyval_next(&given)); g_free(item)) {
        if (!strcmp(item, "help") || !strcmp(item, "?")) {
            g_free(item);
            return true;
        }
    }
    return false;
}

/* One "-o": NAME=VALUE,...; a NAME alone is NAME=on. What changes keys goes to `keys`, if that is not NULL. */
static int options_read(const struct driver *driver, const char *format, const char *text, bool amend, json_t *root,
                        json_t *keys, struct error **err)
{
    for (char *next; (next = keyval_next(&text));) {
        g_autofree char *item = next;
        char *equals = strchr(item, '=');
        if (equals) {
            *equals = 0;
        }
        const struct image_option *option = option_find(driver, item, amend);
        if (!option) {
            int r = error_set(err, -EINVAL, "Invalid parameter '%s'", item);
            error_hint(err, "Give '-f %s -o help' for a list of those that there are", format);
            return r;
        }
        json_t *into = option->keys ? keys : root; /* NULL: the caller has no use for it */
        int r = into ? option_set(into, option, equals ? equals + 1 : "on", err) : 0;
        if (r < 0) {
            return r;
        }
    }
    return 0;
}

/* The member of that name of what the options hold for their driver, or NULL when there is none. */
static void *options_member(struct blockdev_create_options *options, const char *name)
{
    const struct marshal_type *type = &blockdev_create_options_type, *branch = type->branches[options->driver];
    for (unsigned i = 0; branch && i < branch->count; i++) {
        const struct marshal_member *member = &branch->members[i];
        if (!strcmp(member->name, name)) {
            return (char *)options + type->branch_offset + member->offset;
        }
    }
    return NULL;
}

struct blockdev_ref **img_options_file(struct blockdev_create_options *options)
{
    return options_member(options, "file");
}

/* Has the type of `driver` a required member that is only known when the image is made? */
static void options_placeholders(enum blockdev_driver driver, json_t *root)
{
    struct blockdev_create_options probe = {.driver = driver};
    if (img_options_file(&probe)) {
        json_object_set_new(root, "file", json_string("file"));
    } else {
        json_object_set_new(root, "filename", json_string(""));
    }
}

int img_create_check(const char *format, bool with_backing, struct error **err)
{
    const struct driver *driver = driver_of_format(format);
    if (!driver) {
        return error_set(err, -EINVAL, "Unknown file format '%s'", format);
    }
    if (!driver->image || !driver->image->create) {
        return error_set(err, -ENOTSUP, "Format driver '%s' does not support image creation", format);
    }
    struct blockdev_create_options probe = {.driver = driver->id};
    if (with_backing && !options_member(&probe, "backing-file")) {
        return error_set(err, -EINVAL, "Backing file not supported for file format '%s'", format);
    }
    return 0;
}

int img_amend_check(const char *format, struct error **err)
{
    const struct driver *driver = driver_find(format);
    if (!driver) {
        return error_set(err, -EINVAL, "Unknown file format '%s'", format);
    }
    if (!driver->image || !driver->image->amend) {
        return error_set(err, -ENOTSUP, "Format driver '%s' does not support option amendment", format);
    }
    return 0;
}

int img_create_options(const char *format, char *const *given, unsigned count, uint64_t size, bool amend,
                       struct blockdev_create_options **ret, struct error **err)
{
    const struct driver *driver = driver_of_format(format);
    int r = amend ? img_amend_check(format, err) : img_create_check(format, false, err);
    if (r < 0) {
        return r;
    }
    json_t *root = json_object();
    json_object_set_new(root, "driver", json_string(driver->name));
    options_placeholders(driver->id, root);
    for (unsigned i = 0; i < count && r == 0; i++) {
        r = options_read(driver, format, given[i], amend, root, NULL, err);
    }
    if (r == 0 && (size || !json_object_get(root, "size"))) {
        json_object_set_new(root, "size", json_integer((json_int_t)size));
    }
    if (r == 0) {
        r = blockdev_create_options_from_text(root, NULL, ret, err);
    }
    json_decref(root);
    if (r == 0) {
        struct blockdev_ref **file = img_options_file(*ret);
        if (file) {
            blockdev_ref_free(*file);
            *file = NULL;
        }
    }
    return r;
}

const char *img_created_secret(const struct blockdev_create_options *options)
{
    if (options->driver == BLOCKDEV_DRIVER_LUKS) {
        return options->u.luks.key_secret;
    }
    const struct crypto_create_options *encrypt =
        options->driver == BLOCKDEV_DRIVER_QCOW2 ? options->u.qcow2.encrypt : NULL;
    if (!encrypt) {
        return NULL;
    }
    return encrypt->format == CRYPTO_FORMAT_LUKS ? encrypt->u.luks.key_secret : encrypt->u.qcow.key_secret;
}

int img_amend_keys(const char *format, char *const *given, unsigned count, struct blockdev_amend_options **ret,
                   struct error **err)
{
    const struct driver *driver = driver_of_format(format);
    json_t *root = json_object();
    int r = 0;
    for (unsigned i = 0; i < count && r == 0; i++) {
        r = options_read(driver, format, given[i], true, NULL, root, err);
    }
    if (r == 0 && json_object_size(root)) {
        json_t *encrypt = json_object_get(root, "encrypt");
        if (encrypt) { /* only LUKS has keys to change */
            json_object_set_new(encrypt, "format", json_string("luks"));
        }
        json_object_set_new(root, "driver", json_string(driver->name));
        r = blockdev_amend_options_from_text(root, NULL, ret, err);
    }
    json_decref(root);
    return r;
}

void img_print_options(const char *format, bool amend)
{
    const struct driver *driver = driver_of_format(format);
    const struct image_option *option = driver && driver->image ? driver->image->options : NULL;
    if (amend) {
        printf("Amend options for '%s':\n", format);
    } else {
        printf("Supported %s options:\n", format);
    }
    for (; option && option->name; option++) {
        if (amend ? option->amendable || option->amend_only : !option->amend_only) {
            g_autofree char *name = g_strdup_printf("%s=<%s>", option->name, option->type);
            printf("  %-22s - %s\n", name, option->help);
        }
    }
}

/* --- snapshots --- */

int coroutine_fn img_load_snapshot(struct img *img, struct node *node, const char *snapshot, struct error **err)
{
    const struct image_driver *image = node->driver->image;
    struct drain drain;
    if (!image || !image->snapshot_load) {
        return error_set(err, -ENOTSUP, "Images of format '%s' have no snapshots inside", node->driver->name);
    }
    const char *name = g_str_has_prefix(snapshot, "snapshot.id=")     ? snapshot + strlen("snapshot.id=")
                       : g_str_has_prefix(snapshot, "snapshot.name=") ? snapshot + strlen("snapshot.name=")
                                                                      : snapshot;
    graph_lock(img->graph);
    graph_drain_begin(img->graph, &node, 1, NULL, &drain);
    int r = image->snapshot_load(node, name, err);
    graph_drain_end(&drain);
    graph_unlock(img->graph);
    if (r < 0) {
        error_prepend(err, "Failed to load snapshot");
    }
    return r;
}

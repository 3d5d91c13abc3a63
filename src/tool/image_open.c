/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Images by the names that a command line has for them (see image_open.h). Owns what a name means, which protocols are
 * known by it, and finding out the format by the content.
 *
 * 1. The format is found out for reading only: what a guest may have written never decides how an image is written to.
 *    It takes the first bytes of the named file, and nothing that they say is followed.
 * 2. A format that is recognised and not known to this program is not read as raw; who wants that says -f raw.
 * 3. A name becomes the options of blockdev-add; opening, and what an image names itself, is open.c's.
 */
#include "tool/image_open.h"
#include "base/size.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/protocol/nbd/nbd_name.h"
#include "loop/file.h"
#include "tool/keyval.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

/* --- the format, by the content --- */

#define PROBE_SIZE 512

static const struct magic {
    const char *format;
    unsigned offset, length;
    const char *bytes;
    bool known;
} magics[] = {
    {"luks", 0, 6, "LUKS\xba\xbe", true},
    {"qcow", 0, 8, "QFI\xfb\0\0\0\1", false},
    {"qcow2", 0, 4, "QFI\xfb", true},
    {"qed", 0, 4, "QED\0", false},
    {"vmdk", 0, 4, "KDMV", false},
    {"vmdk", 0, 4, "COWD", false},
    {"vmdk", 0, 21, "# Disk DescriptorFile", false},
    {"vhdx", 0, 8, "vhdxfile", false},
    {"vpc", 0, 8, "conectix", false},
    {"vdi", 64, 4, "\x7f\x10\xda\xbe", false},
    {"parallels", 0, 16, "WithoutFreeSpace", false},
    {"parallels", 0, 16, "WithouFreSpacExt", false},
};

static const struct magic *magic_find(const uint8_t *content)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(magics); i++) {
        if (!memcmp(content + magics[i].offset, magics[i].bytes, magics[i].length)) {
            return &magics[i];
        }
    }
    return NULL;
}

/* What the first bytes of `name` say. */
static int magic_answer(const char *name, const uint8_t *content, const char **ret, struct error **err)
{
    const struct magic *magic = magic_find(content);
    if (magic && !magic->known) {
        int r = error_set(err, -ENOTSUP, "'%s' looks like an image of format '%s', which is not supported", name,
                          magic->format);
        error_hint(err, "Give -f raw to take its bytes as they are");
        return r;
    }
    *ret = magic ? magic->format : "raw";
    return 0;
}

int coroutine_fn image_probe(struct graph *graph, const char *path, const char **ret, struct error **err)
{
    uint8_t content[PROBE_SIZE] = {0};
    struct iovec iov = {content, sizeof(content)};
    struct file *file;
    int r = file_open(path, 0, &file, err);
    if (r < 0) {
        return r;
    }
    r = file_read(file, 0, sizeof(content), buffers_one(&iov));
    file_close(file);
    if (r < 0) {
        return error_set_errno(err, r, "Cannot read '%s'", path);
    }
    return magic_answer(path, content, ret, err);
}

/* The same of what `description` (options of a node, without a name) opens. */
static int coroutine_fn description_probe(struct graph *graph, json_t *description, const char *name, const char **ret,
                                          struct error **err)
{
    uint8_t content[PROBE_SIZE] = {0};
    struct iovec iov = {content, sizeof(content)};
    struct blockdev_options *parsed = NULL;
    struct backend *backend = NULL;
    struct node *node = NULL;
    json_t *options = json_copy(description);
    json_object_set_new(options, "node-name", json_string("probe"));
    json_object_set_new(options, "read-only", json_true());
    int r = blockdev_options_from_text(options, NULL, &parsed, err);
    r = r < 0 ? r : graph_open(graph, parsed, 0, &node, err);
    r = r < 0 ? r : image_backend(graph, node, false, &backend, err);
    if (r == 0) {
        r = backend_read(backend, 0, min_u64(PROBE_SIZE, backend_size(backend)), buffers_one(&iov), 0);
        r = r < 0 ? error_set_errno(err, r, "Cannot read '%s'", name) : magic_answer(name, content, ret, err);
    }
    image_backend_destroy(backend);
    if (node) {
        node_release(node);
    }
    blockdev_options_free(parsed);
    json_decref(options);
    return r;
}

/* --- cache modes --- */

int image_cache_mode(const char *name, bool *ret_direct, bool *ret_no_flush, struct error **err)
{
    /* These programs flush what they wrote before they end; so writing through is what writing back comes to. */
    static const struct {
        const char *name;
        bool direct, no_flush;
    } modes[] = {{"none", true, false},       {"off", true, false},           {"directsync", true, false},
                 {"writeback", false, false}, {"writethrough", false, false}, {"unsafe", false, true}};
    for (unsigned i = 0; i < G_N_ELEMENTS(modes); i++) {
        if (!strcmp(name, modes[i].name)) {
            *ret_direct = modes[i].direct;
            *ret_no_flush = modes[i].no_flush;
            return 0;
        }
    }
    int r = error_set(err, -EINVAL, "Invalid cache option: %s", name);
    error_hint(err, "There are none, writeback, writethrough, directsync and unsafe");
    return r;
}

/* --- what a name means --- */

const char *image_path(const char *name, struct error **err)
{
    size_t length = image_name_protocol(name);
    if (g_str_has_prefix(name, "file:")) {
        return name + strlen("file:");
    }
    if (!length) {
        return name;
    }
    error_set(err, -ENOTSUP, "Protocol '%.*s' is not supported", (int)length, name);
    error_hint(
        err,
        nbd_name_is(name)
            ? "An NBD export is not made by this command, but used by others"
            : "There are paths, 'file:PATH', 'nbd://...' and 'json:{...}'; a path with a colon in it is written './%s'",
        name);
    return NULL;
}

/* "file.filename" becomes a member of a member, as in an option list. A new reference. */
static json_t *members_unfold(json_t *flat)
{
    json_t *object = json_object(), *value;
    const char *key;
    json_object_foreach(flat, key, value)
    {
        json_t *at = object;
        g_auto(GStrv) parts = g_strsplit(key, ".", 16);
        unsigned last = MAX(g_strv_length(parts), 1) - 1;
        for (unsigned i = 0; i < last; i++) {
            json_t *next = json_object_get(at, parts[i]);
            if (!json_is_object(next)) {
                next = json_object();
                json_object_set_new(at, parts[i], next);
            }
            at = next;
        }
        json_t *made = json_is_object(value) ? members_unfold(value) : json_incref(value);
        json_t *there = last || parts[0] ? json_object_get(at, parts[0] ? parts[last] : key) : NULL;
        if (json_is_object(there) && json_is_object(made)) {
            json_object_update(there, made);
            json_decref(made);
        } else {
            json_object_set_new(at, parts[0] ? parts[last] : key, made);
        }
    }
    return object;
}

/* A description without a driver that has a file name is of a file. A key opens whatever encryption the image has. */
static void members_complete(json_t *object)
{
    json_t *value;
    const char *key;
    json_object_foreach(object, key, value)
    {
        if (json_is_object(value)) {
            members_complete(value);
            if (!json_object_get(value, "driver") && json_object_get(value, "filename")) {
                json_object_set_new(value, "driver", json_string("file"));
            }
            if (!strcmp(key, "encrypt") && !json_object_get(value, "format")) {
                json_object_set_new(value, "format", json_string("auto"));
            }
        }
    }
}

/* The description that "json:" or --image-opts gives. A new reference. */
static int name_describes(const struct image_name *name, json_t **ret, struct error **err)
{
    json_t *flat = NULL;
    bool text;
    int r = keyval_parse(name->image_opts ? name->name : name->name + strlen("json:"), NULL, &flat, &text, err);
    if (r < 0) {
        return r;
    }
    if (!json_is_object(flat)) {
        json_decref(flat);
        return error_set(err, -EINVAL, "A JSON object was expected");
    }
    *ret = members_unfold(flat);
    members_complete(*ret);
    json_decref(flat);
    return 0;
}

/* Where the file that `file` describes lies, or NULL. */
static const char *file_path(json_t *file)
{
    json_t *image = json_object_get(file, "image"); /* blkdebug's */
    return json_string_value(json_object_get(image ? image : file, "filename"));
}

/* The format of what `file` describes, by its content. */
static int coroutine_fn file_probe(struct graph *graph, json_t *file, const char *name, const char **ret,
                                   struct error **err)
{
    const char *path = file_path(file);
    return path ? image_probe(graph, path, ret, err) : description_probe(graph, file, name, ret, err);
}

/* Finds that out, if it is allowed. */
static int coroutine_fn name_probe(struct graph *graph, const struct image_name *name, json_t *file, const char **ret,
                                   struct error **err)
{
    const char *path = file_path(file) ? file_path(file) : name->name;
    int r = file_probe(graph, file, path, ret, name->writable ? NULL : err);
    if (!name->writable) {
        return r;
    }
    struct error *error = NULL;
    if (r < 0 && r != -ENOTSUP) {
        return file_probe(graph, file, path, ret, err) < 0 ? r : -EIO;
    }
    error_set(&error, -EINVAL, "The format of '%s' is not given, and it is not guessed for writing", path);
    if (r == 0) {
        error_hint(&error,
                   name->image_opts ? "Give driver=FORMAT (its content looks like %s)"
                                    : "Give -f FORMAT (its content looks like %s)",
                   *ret);
    } else {
        error_hint(&error, "Give -f FORMAT");
    }
    return error_move(err, error);
}

/* "PATH", the name of an NBD export, or "blkdebug:CONFIG:PATH" where CONFIG may be empty: the description of the file.
 * A new reference. */
static int file_describe(const char *name, json_t **ret, struct error **err)
{
    if (nbd_name_is(name)) {
        return nbd_name_parse(name, ret, err);
    }
    bool debug = g_str_has_prefix(name, "blkdebug:");
    const char *config = debug ? name + strlen("blkdebug:") : NULL, *colon = debug ? strchr(config, ':') : NULL;
    if (debug && !colon) {
        return error_set(err, -EINVAL, "'%s' is not of the form blkdebug:CONFIG:PATH", name);
    }
    const char *path = image_path(debug ? colon + 1 : name, err);
    if (!path) {
        return -ENOTSUP;
    }
    json_t *file = json_pack("{s:s, s:s}", "driver", "file", "filename", path);
    if (file && debug) {
        file = json_pack("{s:s, s:o}", "driver", "blkdebug", "image", file);
        if (file && colon > config) {
            (void)json_object_set_new(file, "config", json_stringn(config, (size_t)(colon - config)));
        }
    }
    if (!file) {
        return error_set(err, -EINVAL, "The name is not valid UTF-8");
    }
    *ret = file;
    return 0;
}

/* The options of blockdev-add for the name. A new reference. */
static int coroutine_fn name_options(struct graph *graph, const struct image_name *name, json_t **ret,
                                     struct error **err)
{
    const char *format = name->format;
    json_t *options = NULL;
    int r = 0;
    if (name->image_opts || g_str_has_prefix(name->name, "json:")) {
        r = name_describes(name, &options, err);
        if (r < 0) {
            return r;
        }
        if (!json_object_get(options, "driver")) {
            json_t *file = json_object_get(options, "file");
            if (!json_object_get(file, "driver")) {
                r = error_set(err, -EINVAL, "Must specify either driver or file");
            } else if (!format) {
                r = name_probe(graph, name, file, &format, err);
            }
        }
    } else {
        json_t *file = NULL;
        r = file_describe(name->name, &file, err);
        if (r == 0 && !format) {
            r = name_probe(graph, name, file, &format, err);
        }
        if (r == 0) {
            const char *own = json_string_value(json_object_get(file, "driver"));
            options = !strcmp(format, own) ? json_incref(file) : json_pack("{s:O}", "file", file);
        }
        json_decref(file);
    }
    if (r == 0 && format) {
        if (blockdev_driver_parse(format, &(enum blockdev_driver){0}, NULL) < 0) {
            r = error_set(err, -EINVAL, "Unknown driver '%s'", format);
        } else {
            json_object_set_new(options, "driver", json_string(format));
        }
    }
    if (r == 0 && name->key_secret && format && !strcmp(format, "luks")) {
        json_object_set_new(options, "key-secret", json_string(name->key_secret));
    } else if (r == 0 && name->key_secret) {
        json_object_set_new(options, "encrypt",
                            json_pack("{s:s, s:s}", "format", "auto", "key-secret", name->key_secret));
    }
    if (r < 0) {
        json_decref(options);
        return r;
    }
    *ret = options;
    return 0;
}

static void option_default(json_t *options, const char *key, json_t *value)
{
    if (json_object_get(options, key)) {
        json_decref(value);
    } else {
        json_object_set_new(options, key, value);
    }
}

/* What the command adds to the description. */
static int options_settle(struct graph *graph, const struct image_name *name, json_t *options, struct error **err)
{
    bool direct, no_flush;
    int r = image_cache_mode(name->cache ? name->cache : "writeback", &direct, &no_flush, err);
    if (r < 0) {
        return r;
    }
    g_autofree char *node_name = g_strdup("image");
    for (unsigned i = 2; graph_find(graph, node_name); i++) {
        g_free(node_name);
        node_name = g_strdup_printf("image-%u", i);
    }
    option_default(options, "node-name", json_string(node_name));
    option_default(options, "cache", json_pack("{s:b, s:b}", "direct", direct, "no-flush", no_flush));
    json_object_set_new(options, "read-only", json_boolean(!name->writable));
    if (name->force_share) {
        json_object_set_new(options, "force-share", json_true());
    }
    if (name->discard) {
        json_object_set_new(options, "discard", json_string(name->discard));
    }
    if (name->detect_zeroes) {
        json_object_set_new(options, "detect-zeroes", json_string(name->detect_zeroes));
    }
    return 0;
}

int coroutine_fn image_open(struct graph *graph, const struct image_name *name, struct node **ret, struct error **err)
{
    struct blockdev_options *parsed = NULL;
    json_t *options = NULL;
    unsigned flags = (name->check_only ? GRAPH_OPEN_CHECK : 0) | (name->no_data ? GRAPH_OPEN_NO_DATA : 0) |
                     (name->no_backing ? GRAPH_OPEN_NO_BACKING : 0);
    int r = name_options(graph, name, &options, err);
    if (r == 0) {
        r = options_settle(graph, name, options, err);
    }
    if (r == 0) {
        r = blockdev_options_from_text(options, NULL, &parsed, err);
    }
    if (r == 0) {
        r = graph_open(graph, parsed, flags, ret, err);
    }
    if (r < 0 && err && *err && !g_str_has_prefix((*err)->message, "Could not open '")) {
        error_prepend(err, "Could not open '%s'", name->name);
    }
    blockdev_options_free(parsed);
    json_decref(options);
    return r;
}

/* --- backends --- */

int coroutine_fn image_backend(struct graph *graph, struct node *node, bool writable, struct backend **ret,
                               struct error **err)
{
    struct backend *backend = backend_create(graph, "command");
    int r = backend_attach(backend, node, writable ? ACCESS_ALL : ACCESS_READ_DATA | ACCESS_READ_METADATA, err);
    if (r < 0) {
        backend_destroy(backend);
        return r;
    }
    *ret = backend;
    return 0;
}

void coroutine_fn image_backend_destroy(struct backend *backend)
{
    backend_destroy(backend);
}

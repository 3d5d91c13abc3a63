/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * open, close and reopen: the one image that the commands work on, and what -s and -C put over it.
 *
 * 1. io->backend and io->nodes are all there, or none.
 * 2. The format of an image that is opened for writing is given, never guessed; so "open PATH" alone is for reading.
 * 3. A temporary overlay (-s) has lost its name before the first command runs: it goes with the program, however that
 *    ends.
 * 4. reopen closes and opens again, since nobody else uses the graph; when that fails, the image is opened as it was.
 */
#include "block/graph.h"
#include "block/user.h"
#include "driver/filter/blkdebug.h"
#include "loop/file.h"
#include "schema/types.h"
#include "tool/image_open.h"
#include "tool/image_view.h"
#include "tool/img/img.h"
#include "tool/io/io.h"
#include "tool/keyval.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>
#include <string.h>
#include <unistd.h>

void io_opening_clear(struct io_opening *opening)
{
    g_free(opening->name);
    g_free(opening->format);
    g_free(opening->options);
    g_free(opening->cache);
    g_free(opening->discard);
    json_decref(opening->changes);
    *opening = (struct io_opening){0};
}

static struct io_opening opening_copy(const struct io_opening *from)
{
    struct io_opening copy = *from;
    copy.name = g_strdup(from->name);
    copy.format = g_strdup(from->format);
    copy.options = g_strdup(from->options);
    copy.cache = g_strdup(from->cache);
    copy.discard = g_strdup(from->discard);
    copy.changes = json_deep_copy(from->changes);
    return copy;
}

/* --- modes --- */

int io_check_cache(struct io *io, const char *mode)
{
    struct error *error = NULL;
    bool direct, no_flush;
    int code = image_cache_mode(mode, &direct, &no_flush, &error);
    if (code < 0) {
        io_tell_error(io, error);
    }
    return code;
}

static int check_word(struct io *io, const char *what, const char *const *words, const char *word)
{
    struct error *error = NULL;
    if (g_strv_contains(words, word)) {
        return 0;
    }
    error_set(&error, -EINVAL, "Invalid %s option: %s", what, word);
    io_tell_error(io, error);
    return -EINVAL;
}

int io_check_aio(struct io *io, const char *mode)
{
    static const char *const modes[] = {"threads", "native", "io_uring", NULL};
    return check_word(io, "aio", modes, mode); /* the engine is chosen at start; a hint without effect */
}

int io_check_discard(struct io *io, const char *mode)
{
    static const char *const modes[] = {"ignore", "off", "unmap", "on", NULL};
    return check_word(io, "discard", modes, mode);
}

static const char *discard_mode(const struct io_opening *how)
{
    bool off = how->discard && (!strcmp(how->discard, "ignore") || !strcmp(how->discard, "off"));
    return off ? "ignore" : "unmap";
}

/* --- opening --- */

/* The name for image_open() when there are options besides it; g_free(). */
static int describe(const struct io_opening *how, char **ret, struct error **err)
{
    json_t *object = NULL;
    bool text;
    int code = 0;
    if (how->options) {
        code = keyval_parse(how->options, NULL, &object, &text, err);
    } else if (how->name && g_str_has_prefix(how->name, "json:")) {
        code = keyval_parse(how->name + strlen("json:"), NULL, &object, &text, err);
    } else {
        object = json_object();
    }
    if (code == 0 && !json_is_object(object)) {
        json_decref(object);
        code = error_set(err, -EINVAL, "A list of options was expected");
    }
    if (code < 0) {
        return code;
    }
    if (how->name && !g_str_has_prefix(how->name, "json:")) {
        json_object_set_new(object, "file.filename", json_string(how->name));
    }
    if (how->format && !json_object_get(object, "driver")) {
        json_object_set_new(object, "driver", json_string(how->format));
    }
    json_object_update(object, how->changes);
    g_autofree char *dump = json_dumps(object, 0);
    json_decref(object);
    *ret = g_strconcat("json:", dump, NULL);
    return 0;
}

static int coroutine_fn open_image(struct io *io, const struct io_opening *how, struct node **ret, struct error **err)
{
    g_autofree char *described = NULL;
    struct image_name name = {.name = how->name,
                              .format = how->format,
                              .writable = !how->read_only && !how->snapshot,
                              .force_share = how->force_share,
                              .cache = how->cache,
                              .discard = discard_mode(how)};
    if (how->options && !how->name && !how->changes) {
        name.name = how->options;
        name.image_opts = true;
    } else if (how->options || how->changes) {
        int code = describe(how, &described, err);
        if (code < 0) {
            return code;
        }
        name.name = described;
        name.format = NULL;
    }
    return image_open(io->graph, &name, ret, err);
}

/* A node over others that are open, by its options. */
static int coroutine_fn open_over(struct io *io, json_t *json, struct node **ret, struct error **err)
{
    struct blockdev_options *options = NULL;
    int code = blockdev_options_from_json(json, NULL, &options, err);
    code = code < 0 ? code : graph_open(io->graph, options, 0, ret, err);
    blockdev_options_free(options);
    json_decref(json);
    return code;
}

static void coroutine_fn release_nodes(struct io *io)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(io->nodes); i++) {
        node_release(io->nodes[i]);
        io->nodes[i] = NULL;
    }
}

/* `node` becomes the top. */
static void push_node(struct io *io, struct node *node)
{
    g_assert(!io->nodes[G_N_ELEMENTS(io->nodes) - 1]);
    memmove(&io->nodes[1], &io->nodes[0], sizeof(io->nodes) - sizeof(io->nodes[0]));
    io->nodes[0] = node;
}

static int coroutine_fn open_nodes(struct io *io, const struct io_opening *how, struct error **err)
{
    struct node *node;
    if (how->copy_on_read && how->read_only) {
        return error_set(err, -EINVAL, "Can't use copy-on-read on read-only device");
    }
    int code = open_image(io, how, &node, err);
    if (code == 0) {
        push_node(io, node);
    }
    if (code == 0 && how->snapshot) {
        code = image_open_overlay(io->graph, io->nodes[0], how->read_only, &node, err);
        if (code == 0) {
            push_node(io, node);
        }
    }
    if (code == 0 && how->copy_on_read) {
        code = open_over(io,
                         json_pack("{s:s, s:s, s:s, s:s}", "driver", "copy-on-read", "node-name", "copy-on-read",
                                   "discard", "unmap", "file", io->nodes[0]->name),
                         &node, err);
        if (code == 0) {
            push_node(io, node);
        }
    }
    if (code == 0) {
        code = image_backend(io->graph, io->nodes[0], !how->read_only, &io->backend, err);
    }
    if (code < 0) {
        release_nodes(io);
    }
    return code;
}

int coroutine_fn io_open(struct io *io, struct io_opening *how)
{
    struct error *error = NULL;
    int code = open_nodes(io, how, &error);
    if (code < 0) {
        if (how->name) {
            error_prepend(&error, "can't open device %s", how->name);
        } else {
            error_prepend(&error, "can't open");
        }
        io_tell_error(io, error);
        io_opening_clear(how);
        return code;
    }
    io->how = *how;
    *how = (struct io_opening){0};
    return 0;
}

struct node *io_image_node(const struct io *io)
{
    return io->nodes[io->how.copy_on_read ? 1 : 0];
}

/* --- closing --- */

static void coroutine_fn close_nodes(struct io *io)
{
    struct node *debug = blkdebug_find(io->nodes[0]);
    if (debug) {
        blkdebug_release(debug);
    }
    co_group_wait(&io->requests);
    image_backend_destroy(io->backend);
    io->backend = NULL;
    release_nodes(io);
}

void coroutine_fn io_close(struct io *io)
{
    if (io->backend) {
        close_nodes(io);
        io_opening_clear(&io->how);
    }
}

/* --- the commands --- */

int coroutine_fn io_command_close(struct io *io, int argc, char **argv)
{
    io_close(io);
    return 0;
}

static void set_text(char **text, const char *to)
{
    g_free(*text);
    *text = g_strdup(to);
}

static int open_option(struct io *io, struct io_opening *how, int option, const char *name)
{
    switch (option) {
    case 's':
        how->snapshot = true;
        return 0;
    case 'n':
        set_text(&how->cache, "none");
        return 0;
    case 'C':
        how->copy_on_read = true;
        return 0;
    case 'r':
        how->read_only = true;
        return 0;
    case 'k':
        return 0;
    case 'U':
        how->force_share = true;
        return 0;
    case 't':
        set_text(&how->cache, optarg);
        return io_check_cache(io, optarg);
    case 'd':
        set_text(&how->discard, optarg);
        return io_check_discard(io, optarg);
    case 'i':
        return io_check_aio(io, optarg);
    case 'o':
        set_text(&how->options, optarg);
        return 0;
    default:
        return io_usage(name);
    }
}

int coroutine_fn io_command_open(struct io *io, int argc, char **argv)
{
    struct io_opening how = {0};
    int code = 0;
    for (int option; code == 0 && (option = getopt(argc, argv, "snCro:ki:t:d:U")) != -1;) {
        code = open_option(io, &how, option, argv[0]);
    }
    if (code == 0 && (optind < argc - 1 || (optind == argc && !how.options))) {
        code = io_usage(argv[0]);
    }
    if (code < 0) {
        io_opening_clear(&how);
        return code;
    }
    if (io->backend) {
        struct error *error = NULL;
        error_set(&error, -EBUSY, "file open already, try 'help close'");
        io_tell_error(io, error);
        io_opening_clear(&how);
        return -EBUSY;
    }
    how.name = optind < argc ? g_strdup(argv[optind]) : NULL;
    return io_open(io, &how);
}

struct reopening {
    bool read_only, writable;
    const char *cache;
    json_t *changes;
};

/* What an image is does not change by being opened again, and -r, -w, -c are not said twice. */
static int check_changes(const struct reopening *reopening, struct error **err)
{
    static const char *const fixed[] = {"driver", "file", "filename", "backing", "data-file", "node-name", NULL};
    const char *key;
    json_t *value;
    json_object_foreach(reopening->changes, key, value)
    {
        if (g_strv_contains(fixed, key)) {
            return error_set(err, -EINVAL, "Cannot change the option '%s'", key);
        }
        if (!strcmp(key, "read-only") && (reopening->read_only || reopening->writable)) {
            return error_set(err, -EINVAL, "Cannot set both -r/-w and 'read-only'");
        }
        if (!strcmp(key, "cache") && reopening->cache) {
            return error_set(err, -EINVAL, "Cannot set both -c and the cache options");
        }
    }
    return 0;
}

/* "read-only" among them is -r or -w. */
static int settle_read_only(struct io_opening *how, struct error **err)
{
    json_t *value = json_object_get(how->changes, "read-only");
    const char *text = json_string_value(value);
    if (!value) {
        return 0;
    }
    how->read_only = json_is_true(value) || (text && !strcmp(text, "on"));
    if (!how->read_only && !json_is_false(value) && !(text && !strcmp(text, "off"))) {
        return error_set(err, -EINVAL, "Parameter 'read-only' expects 'on' or 'off'");
    }
    json_object_del(how->changes, "read-only");
    return 0;
}

static int coroutine_fn reopen(struct io *io, const struct reopening *reopening, struct error **err)
{
    struct io_opening how = opening_copy(&io->how);
    int code = check_changes(reopening, err);
    if (code == 0 && io->how.snapshot) {
        code = error_set(err, -ENOTSUP, "The temporary overlay of -s cannot be opened a second time");
    }
    if (reopening->changes) {
        how.changes = how.changes ? how.changes : json_object();
        json_object_update(how.changes, reopening->changes);
        code = code < 0 ? code : settle_read_only(&how, err);
    }
    if (reopening->read_only || reopening->writable) {
        how.read_only = reopening->read_only;
    }
    if (reopening->cache) {
        set_text(&how.cache, reopening->cache);
    }
    if (code < 0) {
        io_opening_clear(&how);
        return code;
    }
    code = backend_flush(io->backend);
    close_nodes(io);
    if (code < 0) {
        error_set_errno(err, code, "Cannot flush the image");
    } else {
        code = open_nodes(io, &how, err);
    }
    if (code < 0) {
        io_opening_clear(&how);
        how = opening_copy(&io->how);
        if (open_nodes(io, &how, NULL) < 0) {
            error_hint(err, "It could not be opened again as it was either, and is closed");
            io_opening_clear(&how);
        }
    }
    io_opening_clear(&io->how);
    io->how = how;
    return code;
}

static int reopen_option(struct io *io, struct reopening *reopening, int option, const char *name)
{
    struct error *error = NULL;
    bool text;
    int code;
    switch (option) {
    case 'c':
        reopening->cache = optarg;
        return io_check_cache(io, optarg);
    case 'o':
        json_decref(reopening->changes);
        reopening->changes = NULL;
        code = keyval_parse(optarg, NULL, &reopening->changes, &text, &error);
        break;
    case 'r':
    case 'w':
        if (reopening->read_only || reopening->writable) {
            code = error_set(&error, -EINVAL, "Only one -r/-w option may be given");
            break;
        }
        reopening->read_only = option == 'r';
        reopening->writable = option == 'w';
        return 0;
    default:
        return io_usage(name);
    }
    if (code < 0) {
        io_tell_error(io, error);
    }
    return code;
}

int coroutine_fn io_command_reopen(struct io *io, int argc, char **argv)
{
    struct reopening reopening = {0};
    struct error *error = NULL;
    int code = 0;
    for (int option; code == 0 && (option = getopt(argc, argv, "c:o:rw")) != -1;) {
        code = reopen_option(io, &reopening, option, argv[0]);
    }
    if (code == 0 && optind != argc) {
        code = io_usage(argv[0]);
    } else if (code == 0) {
        code = reopen(io, &reopening, &error);
        if (code < 0) {
            io_tell_error(io, error);
        }
    }
    json_decref(reopening.changes);
    return code;
}

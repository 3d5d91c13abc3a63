/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Opening nodes: from options, and from what an image's header says about its backing image. Owns names, what children
 * inherit from their parent, and the limits of a chain. Nothing is guessed: driver and format come from the options or
 * from the header, never from the content of a file.
 *
 * 1. graph->lock is held throughout; nothing that exists is changed but by a new parent edge, so nothing is drained.
 * 2. A node is published (found by its name) when it is open whole; what fails half-way closes what it opened.
 * 3. Images opened because a header names them are read-only, until somebody needs them writable (node_writable_begin).
 * 4. A data file that a header names is a plain file, beside the image unless its path says else: no protocol, no
 *    format, no options come from a header. It is not the image's own file.
 * 5. A chain is at most CHAIN_LIMIT images deep and does not lead back to a file that it has gone through.
 *
 * Inherited by children that are described inline: cache, force-share; by a `file` child read-only and auto-read-only
 * as well, and it passes discards on unless told otherwise (the format above decides about them).
 */
#include "base/size.h"
#include "block/private.h"
#include "loop/file.h"
#include <errno.h>
#include <string.h>

#define NAME_LIMIT 31
#define NESTING_LIMIT 8

/* One call of open_node(): what it has opened so far. */
struct opening {
    struct graph *graph;
    GPtrArray *nodes; /* not published yet, in order of creation */
    unsigned flags;   /* enum graph_open_flags */
};

/* How a child is to be opened where its options do not say. */
struct inheritance {
    struct node *parent; /* NULL: named by a user */
    enum edge_role role;
    unsigned nesting; /* formats within formats */
    bool read_only, auto_read_only, direct, no_flush, force_share, discard;
};

static int coroutine_fn open_chain(struct opening *opening, const struct blockdev_options *options,
                                   const struct inheritance *from, struct node **ret, struct error **err);

/* --- names --- */

static bool name_is_valid(const char *name)
{
    if (!g_ascii_isalpha(name[0])) {
        return false;
    }
    for (const char *c = name; *c; c++) {
        if (!g_ascii_isalnum(*c) && !strchr("-._", *c)) {
            return false;
        }
    }
    return true;
}

static bool name_is_taken(const struct opening *opening, const char *name)
{
    for (unsigned i = 0; i < opening->nodes->len; i++) {
        const struct node *node = opening->nodes->pdata[i];
        if (g_str_equal(node->name, name)) {
            return true;
        }
    }
    return graph_find(opening->graph, name) != NULL;
}

int graph_check_name(struct graph *graph, const char *name, struct error **err)
{
    if (!name_is_valid(name)) {
        int r = error_set(err, -EINVAL, "Invalid node-name: '%s'", name);
        error_hint(err, "A node-name begins with a letter and goes on with letters, digits, '-', '.' and '_'");
        return r;
    }
    if (strlen(name) > NAME_LIMIT) {
        return error_set(err, -EINVAL, "Node-name '%s' is longer than %d characters", name, NAME_LIMIT);
    }
    return graph_find(graph, name) ? error_set(err, -EEXIST, "Duplicate nodes with node-name='%s'", name) : 0;
}

static int name_check(const struct opening *opening, const char *name, struct error **err)
{
    int r = graph_check_name(opening->graph, name, err);
    if (r == 0 && name_is_taken(opening, name)) {
        r = error_set(err, -EEXIST, "Duplicate nodes with node-name='%s'", name);
    }
    return r;
}

char *node_name_unused(struct graph *graph, const char *wanted)
{
    char *name = g_strdup(wanted);
    for (unsigned i = 2; graph_find(graph, name); i++) {
        g_free(name);
        name = g_strdup_printf("%s-%u", wanted, i);
    }
    return name;
}

static char *implicit_name(const struct opening *opening, const struct inheritance *from)
{
    const char *parent = from->parent->name;
    g_autofree char *wanted =
        g_strdup_printf("#%s.%s", parent[0] == '#' ? parent + 1 : parent, edge_role_name(from->role));
    char *name = g_strdup(wanted);
    for (unsigned i = 2; name_is_taken(opening, name); i++) {
        g_free(name);
        name = g_strdup_printf("%s-%u", wanted, i);
    }
    return name;
}

/* --- what options say --- */

static void option_children_add(struct option_children *children, enum edge_role role, const struct blockdev_ref *ref)
{
    if (ref) {
        children->list[children->count++] = (struct option_child){role, ref};
    }
}

struct option_children options_children(const struct blockdev_options *options)
{
    struct option_children children = {0};
    switch (options->driver) {
    case BLOCKDEV_DRIVER_LUKS:
        option_children_add(&children, EDGE_FILE, options->u.luks.file);
        option_children_add(&children, EDGE_DATA, options->u.luks.header);
        break;
    case BLOCKDEV_DRIVER_RAW:
        option_children_add(&children, EDGE_FILE, options->u.raw.file);
        break;
    case BLOCKDEV_DRIVER_QCOW2:
        option_children_add(&children, EDGE_FILE, options->u.qcow2.file);
        option_children_add(&children, EDGE_DATA, options->u.qcow2.data_file);
        children.backing = options->u.qcow2.backing;
        break;
    case BLOCKDEV_DRIVER_BLKDEBUG:
        option_children_add(&children, EDGE_FILTERED, options->u.blkdebug.image);
        break;
    case BLOCKDEV_DRIVER_BLKVERIFY:
        option_children_add(&children, EDGE_FILTERED, options->u.blkverify.test);
        option_children_add(&children, EDGE_DATA, options->u.blkverify.raw);
        break;
    case BLOCKDEV_DRIVER_BLKLOGWRITES:
        option_children_add(&children, EDGE_FILTERED, options->u.blklogwrites.file);
        option_children_add(&children, EDGE_DATA, options->u.blklogwrites.log);
        break;
    case BLOCKDEV_DRIVER_COPY_ON_READ:
        option_children_add(&children, EDGE_FILTERED, options->u.copy_on_read.file);
        break;
    case BLOCKDEV_DRIVER_COPY_BEFORE_WRITE:
        option_children_add(&children, EDGE_FILTERED, options->u.copy_before_write.file);
        option_children_add(&children, EDGE_TARGET, options->u.copy_before_write.target);
        break;
    case BLOCKDEV_DRIVER_SNAPSHOT_ACCESS:
        option_children_add(&children, EDGE_TARGET, options->u.snapshot_access.file);
        break;
    case BLOCKDEV_DRIVER_COMPRESS:
        option_children_add(&children, EDGE_FILTERED, options->u.compress.file);
        break;
    case BLOCKDEV_DRIVER_PREALLOCATE:
        option_children_add(&children, EDGE_FILTERED, options->u.preallocate.file);
        break;
    default:
        break;
    }
    return children;
}

/* Options for an image of format `driver` in a file; false when that format takes no file. */
static bool options_for_image(enum blockdev_driver driver, struct blockdev_ref *file, struct blockdev_options *ret)
{
    *ret = (struct blockdev_options){.driver = driver};
    switch (driver) {
    case BLOCKDEV_DRIVER_LUKS:
        ret->u.luks.file = file;
        return true;
    case BLOCKDEV_DRIVER_RAW:
        ret->u.raw.file = file;
        return true;
    case BLOCKDEV_DRIVER_QCOW2:
        ret->u.qcow2.file = file;
        return true;
    default:
        return false;
    }
}

static int apply_options(struct node *node, const struct blockdev_options *options, const struct inheritance *from,
                         struct error **err)
{
    const struct blockdev_cache_options *cache = options->cache;
    bool read_only = options->has_read_only ? options->read_only : from->read_only;
    node->wants_writable = node->writable = !read_only;
    node->never_writable = options->has_read_only && options->read_only;
    node->force_share = options->has_force_share ? options->force_share : from->force_share;
    node->direct = cache && cache->has_direct ? cache->direct : from->direct;
    node->no_flush = cache && cache->has_no_flush ? cache->no_flush : from->no_flush;
    node->discard = options->has_discard ? options->discard == BLOCKDEV_DISCARD_OPTIONS_UNMAP : from->discard;
    if (options->has_detect_zeroes) {
        node->detect_zeroes = options->detect_zeroes != BLOCKDEV_DETECT_ZEROES_OPTIONS_OFF;
        node->detect_zeroes_unmap = options->detect_zeroes == BLOCKDEV_DETECT_ZEROES_OPTIONS_UNMAP;
    }
    if (node->force_share && node->writable) {
        return error_set(err, -EINVAL, "Node '%s': force-share=on can only be used with read-only images", node->name);
    }
    if (node->detect_zeroes_unmap && !node->discard) {
        return error_set(err, -EINVAL, "Node '%s': detect-zeroes=unmap is not allowed without discard=unmap",
                         node->name);
    }
    if (from->parent) {
        node->opened_for = g_strdup_printf("%s of %s", edge_role_name(from->role), from->parent->name);
    }
    return 0;
}

/* --- what headers say --- */

size_t image_name_protocol(const char *name)
{
    size_t length = strcspn(name, ":/");
    return length > 1 && name[length] == ':' && g_ascii_isalpha(name[0]) ? length : 0;
}

char *image_name_path(const char *image, const char *name)
{
    if (g_str_has_prefix(name, "file:")) {
        name += strlen("file:");
    } else if (image_name_protocol(name)) {
        return NULL;
    }
    if (g_path_is_absolute(name) || !image) {
        return g_strdup(name);
    }
    g_autofree char *folder = g_path_get_dirname(image);
    return g_str_equal(folder, ".") && !g_str_has_prefix(image, "./") ? g_strdup(name)
                                                                      : g_build_filename(folder, name, NULL);
}

/* Where `name` in the header of `node` leads. what: "backing"; hint: how else the user may say it. */
static char *header_path(const struct node *node, const char *name, const char *what, const char *hint,
                         struct error **err)
{
    char *path = image_name_path(node->filename, name);
    if (!path) {
        error_set(err, -ENOTSUP, "Image '%s' names the %s file '%s', whose protocol '%.*s' is not supported here",
                  node->name, what, name, (int)image_name_protocol(name), name);
        error_hint(err, "Give the option '%s", hint);
    }
    return path;
}

char *node_backing_path(const struct node *node, struct error **err)
{
    g_autofree char *hint = g_strdup_printf("backing' of node '%s': a node, or null for none", node->name);
    return header_path(node, node->header_backing, "backing", hint, err);
}

static const struct node *node_container(const struct node *node)
{
    while (node->file) {
        node = node_beneath_filters(node->file->child);
    }
    return node;
}

/* --- a node with its container --- */

static struct inheritance inherit(struct node *parent, enum edge_role role, const struct inheritance *from)
{
    return (struct inheritance){.parent = parent,
                                .role = role,
                                .nesting = role == EDGE_BACKING ? from->nesting : from->nesting + 1,
                                .read_only = role == EDGE_BACKING || !parent->writable,
                                .direct = parent->direct,
                                .no_flush = parent->no_flush,
                                .force_share = parent->force_share,
                                .discard = role != EDGE_BACKING};
}

struct node *place_of_child(const struct node *parent, enum edge_role role, struct node *child)
{
    if (parent->driver->guards && role == EDGE_FILTERED) {
        return node_beneath_filters(child); /* nothing that is written gets past it */
    }
    return role == EDGE_TARGET && parent->driver->kind != DRIVER_FILTER ? child : node_head(child);
}

static int coroutine_fn open_child(struct opening *opening, struct node *parent, const struct option_child *option,
                                   const struct inheritance *from, struct error **err)
{
    const struct blockdev_ref *ref = option->ref;
    struct inheritance how = inherit(parent, option->role, from);
    struct node *child;
    int r = 0;
    if (how.nesting > NESTING_LIMIT) {
        return error_set(err, -EINVAL, "More than %d formats within each other at node '%s'", NESTING_LIMIT,
                         parent->name);
    }
    if (ref->kind == BLOCKDEV_REF_REFERENCE) {
        child = graph_find_or_error(opening->graph, ref->u.reference, err);
        if (!child) {
            return -ENOENT;
        }
        node_ref(child);
    } else {
        r = open_chain(opening, ref->u.definition, &how, &child, err);
        if (r < 0) {
            return r;
        }
    }
    bool guarded = parent->driver->guards && option->role == EDGE_FILTERED;
    if (parent->writable && !child->writable && !guarded) {
        r = error_set(err, -EROFS, "Node '%s' is read-only, but '%s' is to write to it", child->name, parent->name);
        error_hint(err, "Open '%s' with read-only=on as well", parent->name);
    }
    if (r == 0) {
        r = edge_attach(parent, option->role, place_of_child(parent, option->role, child), NULL, err);
    }
    node_unref(child);
    return r;
}

static bool is_refusal_to_write(int code)
{
    return code == -EACCES || code == -EPERM || code == -EROFS;
}

/* Where the data file is: beside the image; or, if there is no such file, where this process stands, for that is how
 * others take the name. */
static char *coroutine_fn data_path(const struct node *node, struct error **err)
{
    g_autofree char *hint = g_strdup_printf("data-file' of node '%s'", node->name);
    g_autofree char *path = header_path(node, node->header_data, "data", hint, err);
    const char *name = node->header_data;
    name += g_str_has_prefix(name, "file:") ? strlen("file:") : 0;
    struct file *file;
    int code = path && !g_str_equal(path, name) ? file_open(path, 0, &file, NULL) : 1;
    if (code == 0) {
        file_close(file);
    }
    return code == -ENOENT ? g_strdup(name) : g_steal_pointer(&path);
}

/* Opens the data file that the header of `node`, which is open, names, and attaches it. */
static int coroutine_fn open_header_data(struct opening *opening, struct node *node, const struct inheritance *from,
                                         struct error **err)
{
    g_autofree char *path = data_path(node, err);
    if (!path) {
        return -ENOTSUP;
    }
    struct blockdev_options file = {.driver = BLOCKDEV_DRIVER_FILE, .u.file.filename = path};
    struct blockdev_ref ref = {.kind = BLOCKDEV_REF_DEFINITION, .u.definition = &file};
    struct option_child option = {EDGE_DATA, &ref};
    const struct node *container = node_container(node);
    int r = open_child(opening, node, &option, from, err);
    if (r < 0) {
        error_prepend(err, "Could not open the data file of '%s'", node->filename ? node->filename : node->name);
        return r;
    }
    const struct node *data = node->data->child;
    if (data->inode && data->inode == container->inode && data->device == container->device) {
        return error_set(err, -EINVAL, "Image '%s' names itself as its data file",
                         node->filename ? node->filename : node->name);
    }
    return 0;
}

/* Opens a node with its children, without its backing images. On success it is the last of opening->nodes. */
static int coroutine_fn open_image(struct opening *opening, const struct blockdev_options *options,
                                   const struct inheritance *from, struct node **ret, struct error **err)
{
    const char *driver_name = blockdev_driver_name(options->driver);
    const struct driver *driver = driver_find(driver_name);
    if (!driver) {
        return error_set(err, -ENOTSUP, "Driver '%s' is not in this build", driver_name);
    }
    int r = options->node_name ? name_check(opening, options->node_name, err) : 0;
    if (r < 0) {
        return r;
    }
    g_autofree char *name = options->node_name ? g_strdup(options->node_name) : implicit_name(opening, from);
    struct node *node = node_create(opening->graph, driver, name);
    unsigned before = opening->nodes->len;
    g_ptr_array_add(opening->nodes, node);
    node->check_only = (opening->flags & GRAPH_OPEN_CHECK) && !from->parent;
    node->no_data = opening->flags & GRAPH_OPEN_NO_DATA;
    node->options = blockdev_options_to_json(options);
    r = apply_options(node, options, from, err);
    struct option_children children = options_children(options);
    for (unsigned i = 0; i < children.count && r == 0; i++) {
        r = open_child(opening, node, &children.list[i], from, err);
    }
    if (r == 0) {
        r = driver->open(node, options, err);
        node->open = r == 0;
    }
    if (r == 0 && node->header_data && !node->data && !node->no_data) {
        r = open_header_data(opening, node, from, err);
    }
    if (r < 0) {
        g_ptr_array_set_size(opening->nodes, before);
        node_unref(node);
        return r;
    }
    *ret = node;
    return 0;
}

/* The same; where writing turns out to be impossible and auto-read-only allows it, read-only. */
static int coroutine_fn open_image_or_read_only(struct opening *opening, const struct blockdev_options *options,
                                                const struct inheritance *from, struct node **ret, struct error **err)
{
    auto_error error = NULL;
    bool wants_writable = options->has_read_only ? !options->read_only : !from->read_only;
    bool falls_back = options->has_auto_read_only ? options->auto_read_only : from->auto_read_only;
    int r = open_image(opening, options, from, ret, &error);
    if (r < 0 && wants_writable && falls_back && is_refusal_to_write(r)) {
        struct blockdev_options read_only = *options; /* borrows everything */
        read_only.has_read_only = read_only.read_only = true;
        return open_image(opening, &read_only, from, ret, err);
    }
    return r < 0 ? error_move(err, g_steal_pointer(&error)) : 0;
}

/* --- backing images --- */

/* Is this file one that the chain from `top` to its present end has gone through? */
static int check_loop(const char *path, uint64_t device, uint64_t inode, struct node *top, struct error **err)
{
    for (const struct node *node = top; node; node = node->backing ? node->backing->child : NULL) {
        const struct node *container = node_container(node);
        if (container->inode && container->inode == inode && container->device == device) {
            return error_set(err, -ELOOP, "The backing chain leads back to '%s', the file of node '%s'", path,
                             node->name);
        }
    }
    return 0;
}

/* A file that could not be opened: because it is one of the chain's own, and locked by it? 0: no, or nobody knows. */
static int coroutine_fn explain_by_loop(const char *path, struct node *top, struct error **err)
{
    struct file *file;
    struct file_info info;
    if (file_open(path, 0, &file, NULL) < 0) {
        return 0;
    }
    int r = file_info(file, &info);
    file_close(file);
    return r < 0 ? 0 : check_loop(path, info.device, info.inode, top, err);
}

static int format_of_header(const struct node *node, enum blockdev_driver *ret, struct error **err)
{
    const char *format = node->header_backing_format;
    const char *image = node->filename ? node->filename : node->name;
    if (!format || !*format) {
        int r = error_set(err, -EINVAL, "Image '%s' names the backing file '%s' without its format", image,
                          node->header_backing);
        error_hint(err,
                   "Give the option 'backing' of node '%s', or write the format into the image: "
                   "qemu-img rebase -u -b BACKING -F FORMAT",
                   node->name);
        return r;
    }
    if (!driver_find(format) || blockdev_driver_parse(format, ret, NULL) < 0) {
        return error_set(err, -ENOTSUP,
                         "Image '%s' names the backing file '%s' of format '%s', which is not known here", image,
                         node->header_backing, format);
    }
    return 0;
}

/* The image that the header of `node` (the end of the chain from `top`) names. */
static int coroutine_fn open_header_backing(struct opening *opening, struct node *top, struct node *node,
                                            const struct inheritance *how, struct node **ret, struct error **err)
{
    enum blockdev_driver format;
    int r = format_of_header(node, &format, err);
    if (r < 0) {
        return r;
    }
    g_autofree char *path = node_backing_path(node, err);
    if (!path) {
        return -ENOTSUP;
    }
    struct blockdev_options file = {.driver = BLOCKDEV_DRIVER_FILE, .u.file.filename = path};
    struct blockdev_ref file_ref = {.kind = BLOCKDEV_REF_DEFINITION, .u.definition = &file};
    struct blockdev_options image;
    if (!options_for_image(format, &file_ref, &image)) {
        return error_set(err, -EINVAL,
                         "Image '%s' names the backing file '%s' of format '%s', which is no image format", node->name,
                         node->header_backing, node->header_backing_format);
    }
    unsigned before = opening->nodes->len;
    auto_error error = NULL;
    r = open_image(opening, &image, how, ret, &error);
    if (r < 0) {
        int loop = explain_by_loop(path, top, err);
        r = loop < 0 ? loop : error_move(err, g_steal_pointer(&error));
    } else {
        const struct node *container = node_container(*ret);
        r = check_loop(path, container->device, container->inode, top, err);
        if (r < 0) {
            g_ptr_array_set_size(opening->nodes, before);
            node_unref(*ret);
        }
    }
    if (r < 0) {
        error_prepend(err, "Could not open the backing file of '%s'", node->filename ? node->filename : node->name);
    }
    return r;
}

/* Opens and attaches what `node` has as backing, by `option` or by its header. *ret: NULL when there is none, or when
 * it was there already. */
static int coroutine_fn open_backing(struct opening *opening, struct node *top, struct node *node, unsigned depth,
                                     const struct blockdev_ref_or_null *option, const struct inheritance *from,
                                     struct node **ret, struct error **err)
{
    bool by_header =
        !option && !(opening->flags & GRAPH_OPEN_NO_BACKING) && node->header_backing && *node->header_backing;
    struct inheritance how = inherit(node, EDGE_BACKING, from);
    struct node *child = NULL;
    int r = 0;
    *ret = NULL;
    if (!node->driver->backing || (!option && !by_header) || (option && option->kind == BLOCKDEV_REF_OR_NULL_NULL)) {
        return 0;
    }
    if (depth >= CHAIN_LIMIT) {
        return error_set(err, -ELOOP, "The backing chain is more than %d images deep at '%s'", CHAIN_LIMIT,
                         node->filename ? node->filename : node->name);
    }
    if (by_header) {
        r = open_header_backing(opening, top, node, &how, &child, err);
    } else if (option->kind == BLOCKDEV_REF_OR_NULL_REFERENCE) {
        child = graph_find_or_error(opening->graph, option->u.reference, err);
        r = child ? 0 : -ENOENT;
        if (child && depth + node_backing_depth(child) >= CHAIN_LIMIT) {
            return error_set(err, -ELOOP, "The backing chain of '%s' would be more than %d images deep", top->name,
                             CHAIN_LIMIT);
        }
    } else {
        r = open_image_or_read_only(opening, option->u.definition, &how, &child, err);
    }
    if (r < 0) {
        return r;
    }
    bool opened = by_header || option->kind == BLOCKDEV_REF_OR_NULL_DEFINITION;
    r = edge_attach(node, EDGE_BACKING, opened ? child : node_head(child), NULL, err);
    if (opened) {
        if (r < 0) {
            g_ptr_array_remove(opening->nodes, child);
        } else {
            *ret = child;
        }
        node_unref(child); /* the edge's reference keeps it */
    }
    return r;
}

static int coroutine_fn open_chain(struct opening *opening, const struct blockdev_options *options,
                                   const struct inheritance *from, struct node **ret, struct error **err)
{
    const struct blockdev_ref_or_null *option = options_children(options).backing;
    unsigned before = opening->nodes->len;
    struct node *top, *next;
    int r = open_image_or_read_only(opening, options, from, &top, err);
    if (r < 0) {
        return r;
    }
    unsigned depth = 1;
    for (struct node *node = top; node && r == 0; node = next, depth++) {
        r = open_backing(opening, top, node, depth, option, from, &next, err);
        if (option && option->kind == BLOCKDEV_REF_OR_NULL_DEFINITION) {
            option = options_children(option->u.definition).backing;
        } else {
            option = NULL;
        }
    }
    if (r < 0) {
        g_ptr_array_set_size(opening->nodes, before);
        node_unref(top);
        return r;
    }
    *ret = top;
    return 0;
}

int coroutine_fn open_node(struct graph *graph, const struct blockdev_options *options, unsigned flags,
                           struct node **ret, struct error **err)
{
    struct inheritance from = {0};
    g_autoptr(GPtrArray) nodes = g_ptr_array_new();
    struct opening opening = {graph, nodes, flags};
    if (!options->node_name) {
        return error_set(err, -EINVAL, "'node-name' must be specified for the root node");
    }
    int r = open_chain(&opening, options, &from, ret, err);
    for (unsigned i = nodes->len; r == 0 && i > 0; i--) {
        node_publish(nodes->pdata[i - 1]); /* children first */
    }
    return r;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock img rebase`: an image leans on another backing file. Safe: first the copy engine writes into the image,
 * from itself to itself, the clusters that would show something else then; unsafe (-u): the header alone.
 *
 * 1. Where the image has something of its own, nothing changes. Elsewhere a cluster is written if what it shows differs
 *    from what the new backing file shows there; behind the new one's end that is zeroes.
 * 2. If the new backing file is in the present chain, only what the images above it decide is looked at.
 * 3. All that was written is on stable storage before the header changes, and the header changes in one step: a crash
 *    leaves an image that shows the same as before, over the old file or the new one.
 * 4. A wish that the header cannot express is refused before anything is written.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "schema/claims.h"
#include "tool/image_open.h"
#include "tool/img/copying.h"
#include "tool/img/img.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>
#include <string.h>

#define SECTOR 512

struct rebase {
    struct img_copying copying; /* first */
    struct img *img;
    struct img_common common;
    const char *backing, *backing_format, *backing_cache;
    bool progress, unsafe, compress;
    /* while it runs */
    struct node *node;
    struct backend *backend;
    struct img_sources fresh; /* the new backing file, or none */
    struct node *shared;      /* the image of the chain that is the same file as it, or NULL */
};

/* --- what differs --- */

/* Does the image itself decide what is at `offset`? */
static int coroutine_fn own_status(struct rebase *rebase, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    return backend_block_status(rebase->backend, node_backing(rebase->node), offset, bytes, ret);
}

static int coroutine_fn fresh_status(struct rebase *rebase, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    if (offset >= rebase->fresh.size) {
        *ret = (struct extent){.bytes = bytes, .flags = EXTENT_ZERO};
        return 0;
    }
    return img_sources_status(&rebase->fresh, offset, bytes, ret);
}

static int coroutine_fn rebase_extent(void *argument, uint64_t offset, uint64_t bytes, struct copy_extent *ret)
{
    struct rebase *rebase = argument;
    struct extent extent, fresh;
    int result = own_status(rebase, offset, bytes, &extent);
    if (result < 0) {
        return result;
    }
    *ret = (struct copy_extent){extent.bytes, COPY_SKIP};
    if (extent.flags & EXTENT_ALLOCATED) {
        return 0;
    }
    if (rebase->shared) {
        result = backend_block_status(rebase->backend, rebase->shared, offset, ret->bytes, &extent);
        if (result < 0) {
            return result;
        }
        ret->bytes = extent.bytes;
        ret->kind = extent.flags & EXTENT_ALLOCATED ? COPY_DATA : COPY_SKIP;
        return 0;
    }
    result = backend_block_status(rebase->backend, NULL, offset, ret->bytes, &extent);
    if (result == 0) {
        result = fresh_status(rebase, offset, extent.bytes, &fresh);
    }
    if (result < 0) {
        return result;
    }
    ret->bytes = fresh.bytes;
    ret->kind = extent.flags & fresh.flags & EXTENT_ZERO ? COPY_SKIP : COPY_DATA;
    return 0;
}

/* What the image will show over its new backing file, without more being written. */
static int coroutine_fn rebase_shown(void *argument, uint64_t offset, uint64_t bytes, struct buffers to)
{
    struct rebase *rebase = argument;
    while (bytes) {
        struct extent extent;
        int result = own_status(rebase, offset, bytes, &extent);
        if (result < 0) {
            return result;
        }
        result = extent.flags & EXTENT_ALLOCATED ? backend_read(rebase->backend, offset, extent.bytes, to, 0)
                                                 : img_sources_read(&rebase->fresh, offset, extent.bytes, to);
        if (result < 0) {
            return result;
        }
        offset += extent.bytes;
        bytes -= extent.bytes;
        to = buffers_advance(to, extent.bytes);
    }
    return 0;
}

static int coroutine_fn move_data(struct rebase *rebase, struct error **err)
{
    const struct node *node = rebase->node;
    uint64_t size = backend_size(rebase->backend);
    uint64_t cluster = max_u64(node->limits.cluster_size, SECTOR);
    rebase->copying.config = (struct copy_config){
        .source = rebase->backend,
        .target = rebase->backend,
        .alignment = cluster,
        .zero_alignment = cluster,
        .extent = rebase_extent,
        .shown = rebase_shown,
        .ordered = true,
        .pin_zeroes = true,
        .write_flags = rebase->compress ? REQUEST_COMPRESSED : 0,
        .memory = 16 * MiB,
    };
    rebase->copying.of = size;
    int result = img_copying_run_or_error(&rebase->copying, size, err);
    if (result == 0) {
        result = backend_flush(rebase->backend);
        if (result < 0) {
            error_set_errno(err, result, "error while writing");
        }
    }
    return result;
}

/* --- the new backing file --- */

static bool same_file(const struct node *one, const struct node *other)
{
    const struct node *a = one->file ? one->file->child : NULL, *b = other->file ? other->file->child : NULL;
    return a && b && one->driver == other->driver && a->inode && a->device == b->device && a->inode == b->inode;
}

/* It is looked up beside the image, as the image's header will say. */
static char *fresh_path(const struct rebase *rebase)
{
    const char *name = rebase->backing;
    if (g_path_is_absolute(name) || g_str_has_prefix(name, "json:") || g_str_has_prefix(name, "file:") ||
        rebase->common.name.image_opts) {
        return g_strdup(name);
    }
    g_autofree char *folder = g_path_get_dirname(rebase->common.name.name);
    return strcmp(folder, ".") == 0 ? g_strdup(name) : g_build_filename(folder, name, NULL);
}

static int coroutine_fn open_fresh(struct rebase *rebase, struct error **err)
{
    if (!*rebase->backing) {
        return 0;
    }
    g_autofree char *path = fresh_path(rebase);
    struct image_name name = {
        .name = path,
        .format = rebase->backing_format,
        .cache = rebase->backing_cache,
        .force_share = rebase->common.name.force_share,
    };
    int result = img_sources_add(rebase->img, &rebase->fresh, &name, err);
    if (result < 0) {
        error_prepend(err, "Could not open new backing file '%s'", rebase->backing);
        return result;
    }
    const struct node *fresh = node_beneath_filters(rebase->fresh.list[0].node);
    for (struct node *node = node_backing(rebase->node); node && !rebase->shared; node = node_backing(node)) {
        rebase->shared = same_file(node, fresh) ? node : NULL;
    }
    return 0;
}

/* --- the header --- */

static int check_header(const struct rebase *rebase, struct error **err)
{
    if (!rebase->node->driver->change_backing) {
        return error_set(err, -ENOTSUP, "Could not change the backing file to '%s': Operation not supported",
                         rebase->backing ? rebase->backing : "");
    }
    if (rebase->backing && *rebase->backing && !rebase->backing_format) {
        return error_set(err, -EINVAL, "Could not change the backing file to '%s': backing format must be specified",
                         rebase->backing);
    }
    if (rebase->compress && !rebase->node->driver->compresses) {
        return error_set(err, -ENOTSUP, "Compression not supported for this file format");
    }
    return 0;
}

static int coroutine_fn change_header(struct rebase *rebase, struct error **err)
{
    struct graph *graph = rebase->img->graph;
    bool some = rebase->backing && *rebase->backing;
    struct operation_config config = {
        .kind = "command",
        .id = "rebase",
        .table = &change_backing_file_claims,
        .bound = {[CLAIM_NODE] = rebase->node},
    };
    struct operation *operation = NULL;
    struct drain drain;
    graph_lock(graph);
    int result = operation_begin(graph, &config, &operation, err);
    if (result == 0) {
        graph_drain_begin(graph, &rebase->node, 1, NULL, &drain);
        result = node_change_backing(rebase->node, operation, some ? rebase->backing : NULL,
                                     some ? rebase->backing_format : NULL, err);
        graph_drain_end(&drain);
    }
    graph_unlock(graph);
    operation_end(operation);
    if (result < 0) {
        error_prepend(err, "Could not change the backing file to '%s'", rebase->backing ? rebase->backing : "");
    }
    return result;
}

/* --- the command --- */

static int coroutine_fn rebase_open(struct rebase *rebase, struct error **err)
{
    struct image_name *name = &rebase->common.name;
    struct node *node;
    name->writable = true;
    name->no_backing = rebase->unsafe;
    int result = image_open(rebase->img->graph, name, &node, err);
    if (result < 0) {
        return result;
    }
    rebase->node = node_beneath_filters(node);
    if (rebase->node != node) {
        node_ref(rebase->node);
        node_release(node);
    }
    result = image_backend(rebase->img->graph, rebase->node, true, &rebase->backend, err);
    return result < 0 ? result : check_header(rebase, err);
}

static int coroutine_fn rebase_run(struct rebase *rebase, struct error **err)
{
    int result = rebase_open(rebase, err);
    if (result == 0 && !rebase->unsafe) {
        result = open_fresh(rebase, err);
        if (result == 0) {
            result = move_data(rebase, err);
        }
    }
    return result < 0 ? result : change_header(rebase, err);
}

static int coroutine_fn rebase_execute(struct rebase *rebase)
{
    struct error *error = NULL;
    struct img_progress progress;
    img_progress_begin(&progress, rebase->progress && !rebase->common.quiet);
    rebase->copying.progress = &progress;
    int result = rebase_run(rebase, &error);
    image_backend_destroy(rebase->backend);
    node_release(rebase->node);
    img_sources_clear(&rebase->fresh);
    img_progress_end(&progress);
    return result < 0 ? img_fail("rebase", error) : 0;
}

/* --- options --- */

static const char rebase_help[] =
    "-f FORMAT [-b BACKING -F FORMAT] [-u] [-c] [-p | -q]\n"
    "        [-t MODE] [-T MODE] [-U] FILENAME\n\n"
    "  -b, --backing BACKING        the new backing file, found from where FILENAME is; \"\": none\n"
    "  -F, --backing-format FORMAT  its format\n"
    "  -T, --backing-cache MODE     its cache mode (writeback)\n"
    "  -u, --backing-unsafe         change the header alone: what FILENAME shows may change with it\n"
    "  -c, --compress               clusters that are written are compressed\n"
    "  -t, --cache MODE             of FILENAME (writeback)\n"
    "  -p, --progress               show how far it is\n" IMG_HELP_QUIET IMG_HELP_SHARE IMG_HELP_SOURCE;

static int set_cache(const char **where, const char *what, struct error **err)
{
    *where = optarg;
    return image_cache_mode(optarg, &(bool){0}, &(bool){0}, NULL) < 0
               ? error_set(err, -EINVAL, "Invalid %s option: %s", what, optarg)
               : 0;
}

/* -ENOENT: none of these. */
static int set_option(struct rebase *rebase, int option, struct error **err)
{
    switch (option) {
    case 'b':
        rebase->backing = optarg;
        return 0;
    case 'F':
        rebase->backing_format = optarg;
        if (!driver_find(optarg)) {
            return error_set(err, -EINVAL, "Invalid format name: '%s'", optarg);
        }
        return 0;
    case 't':
        return set_cache(&rebase->common.name.cache, "cache", err);
    case 'T':
        return set_cache(&rebase->backing_cache, "source cache", err);
    case 'p':
        rebase->progress = true;
        return 0;
    case 'u':
        rebase->unsafe = true;
        return 0;
    case 'c':
        rebase->compress = true;
        return 0;
    default:
        return -ENOENT;
    }
}

/* 0, or the exit status plus 1. */
static int read_options(struct rebase *rebase, int argc, char **argv)
{
    static const struct option options[] = {{"backing", required_argument, NULL, 'b'},
                                            {"backing-format", required_argument, NULL, 'F'},
                                            {"backing-cache", required_argument, NULL, 'T'},
                                            {"backing-unsafe", no_argument, NULL, 'u'},
                                            {"compress", no_argument, NULL, 'c'},
                                            {"cache", required_argument, NULL, 't'},
                                            {"progress", no_argument, NULL, 'p'},
                                            IMG_QUIET_OPTION,
                                            IMG_SHARE_OPTION,
                                            IMG_COMMON_OPTIONS,
                                            {0}};
    struct error *error = NULL;
    for (int option; (option = getopt_long(argc, argv, "hf:F:b:upt:T:qUc", options, NULL)) != -1;) {
        if (option == 'h') {
            return 1 + img_help("rebase", rebase_help);
        }
        int result = set_option(rebase, option, &error);
        int status = result == -ENOENT ? img_common_option("rebase", &rebase->common, option) : 0;
        if (status || error) {
            return 1 + (status ? status : img_fail("rebase", error));
        }
    }
    int status = img_common_name("rebase", &rebase->common, argc, argv);
    if (!status && !rebase->unsafe && !rebase->backing) {
        status = img_usage("rebase", "Must specify backing file (-b) or use unsafe mode (-u)");
    }
    return status ? 1 + status : 0;
}

int coroutine_fn img_rebase(struct img *img, int argc, char **argv)
{
    struct rebase rebase = {.img = img};
    int status = read_options(&rebase, argc, argv);
    return status ? status - 1 : rebase_execute(&rebase);
}

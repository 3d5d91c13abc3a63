/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `img map`: where the data of an image and of those below it lie.
 *
 * 1. Entries follow each other without a gap, from the start that was asked for to the end of the image or of the
 *    length, and two that follow each other differ in something that is shown.
 * 2. For people only what has data is shown; data without a place in a file (compressed, encrypted) are an error there,
 *    because the table would be read as if it were all.
 */
#include "base/size.h"
#include "block/graph.h"
#include "block/user.h"
#include "schema/types.h"
#include "tool/img/img.h"
#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

struct map {
    struct node *node;
    struct backend *backend;
    bool json;
    GPtrArray *layers;     /* struct node, from the image down */
    struct map_entry last; /* not printed yet, if `pending` */
    bool pending, any;
};

static bool shows_data(const struct map_entry *entry)
{
    return entry->data && !entry->zero;
}

/* The file that the layer keeps its data in. */
static const char *layer_file(const struct map *map, unsigned depth)
{
    const struct node *node = map->layers->pdata[depth];
    const struct edge *edge = node->data ? node->data : node->file;
    const struct node *file = edge ? node_beneath_filters(edge->child) : node;
    return file->filename ? file->filename : "";
}

static int print_entry(struct map *map, const struct map_entry *entry, struct error **err)
{
    if (!map->json) {
        if (!shows_data(entry)) {
            return 0;
        }
        if (!entry->has_offset) {
            return error_set(err, -ENOTSUP, "File contains external, encrypted or compressed clusters.");
        }
        printf("%#-16" G_GINT64_MODIFIER "x%#-16" G_GINT64_MODIFIER "x%#-16" G_GINT64_MODIFIER "x%s\n",
               (uint64_t)entry->start, (uint64_t)entry->length, (uint64_t)entry->offset,
               layer_file(map, (unsigned)entry->depth));
        return 0;
    }
    printf("%s{ \"start\": %" G_GINT64_FORMAT ", \"length\": %" G_GINT64_FORMAT ", \"depth\": %" G_GINT64_FORMAT
           ", \"present\": %s, \"zero\": %s, \"data\": %s, \"compressed\": %s",
           map->any ? ",\n" : "[", entry->start, entry->length, entry->depth, entry->present ? "true" : "false",
           entry->zero ? "true" : "false", entry->data ? "true" : "false", entry->compressed ? "true" : "false");
    if (entry->has_offset) {
        printf(", \"offset\": %" G_GINT64_FORMAT, entry->offset);
    }
    printf("}");
    map->any = true;
    return 0;
}

static bool continues(const struct map_entry *last, const struct map_entry *entry)
{
    return last->depth == entry->depth && last->present == entry->present && last->zero == entry->zero &&
           last->data == entry->data && last->compressed == entry->compressed &&
           last->has_offset == entry->has_offset && (!last->has_offset || last->offset + last->length == entry->offset);
}

static int add_entry(struct map *map, const struct map_entry *entry, struct error **err)
{
    int r = 0;
    if (map->pending && continues(&map->last, entry)) {
        map->last.length += entry->length;
        return 0;
    }
    if (map->pending) {
        r = print_entry(map, &map->last, err);
    }
    map->last = *entry;
    map->pending = true;
    return r;
}

/* An extent of the chain as an entry. */
static struct map_entry entry_of(const struct map *map, uint64_t start, const struct extent *extent)
{
    unsigned lowest = map->layers->len - 1;
    struct map_entry entry = {.start = (int64_t)start,
                              .length = (int64_t)extent->bytes,
                              .depth = MIN(extent->depth, lowest),
                              .present = extent->flags & EXTENT_ALLOCATED,
                              .zero = extent->flags & EXTENT_ZERO,
                              .data = extent->flags & EXTENT_DATA,
                              .compressed = extent->flags & EXTENT_COMPRESSED,
                              .has_offset = extent->flags & EXTENT_MAPPED && !(extent->flags & EXTENT_COMPRESSED),
                              .offset = (int64_t)extent->host_offset};
    const struct node *layer = map->layers->pdata[entry.depth];
    if (entry.present && start >= atomic_load(&layer->size)) { /* nobody has it: the layer above is longer than that */
        entry.present = entry.data = false;
        entry.zero = true;
        entry.depth--;
    }
    return entry;
}

static int coroutine_fn map_range(struct map *map, uint64_t start, uint64_t end, struct error **err)
{
    int r = 0;
    if (start >= end) {
        struct map_entry nothing = {.start = (int64_t)start};
        r = add_entry(map, &nothing, err);
    }
    while (start < end && r == 0) {
        struct extent extent;
        r = backend_block_status(map->backend, NULL, start, end - start, &extent);
        if (r < 0) {
            return error_set_errno(err, r, "Failed to read image metadata");
        }
        struct map_entry entry = entry_of(map, start, &extent);
        r = add_entry(map, &entry, err);
        start += extent.bytes;
    }
    return r == 0 ? print_entry(map, &map->last, err) : r;
}

static int coroutine_fn map_image(struct map *map, uint64_t start, uint64_t length, struct error **err)
{
    uint64_t size = backend_size(map->backend);
    if (!map->json) {
        printf("%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File");
    }
    int r = map_range(map, start, start + min_u64(length, start < size ? size - start : 0), err);
    if (map->json && map->any) {
        printf("]\n");
    }
    return r;
}

static int coroutine_fn map_show(struct img *img, const struct img_common *common, uint64_t start, uint64_t length)
{
    g_autoptr(GPtrArray) layers = g_ptr_array_new();
    struct map map = {.json = common->json, .layers = layers};
    struct error *error = NULL;
    int r = image_open(img->graph, &common->name, &map.node, &error);
    if (r < 0) {
        return img_fail("map", error);
    }
    for (struct node *node = node_beneath_filters(map.node); node; node = node_backing(node)) {
        g_ptr_array_add(layers, node);
    }
    r = image_backend(img->graph, map.node, false, &map.backend, &error);
    if (r == 0) {
        r = map_image(&map, start, length, &error);
    }
    image_backend_destroy(map.backend);
    node_release(map.node);
    return r < 0 ? img_fail("map", error) : 0;
}

static const char map_help[] =
    "[-f FORMAT | --image-opts] [-U] [-s OFFSET] [-l LENGTH]\n"
    "        [--output human|json] [--object OBJECT] FILENAME\n\n"
    "  -s, --start-offset OFFSET  where to begin\n"
    "  -l, --max-length LENGTH    how far to go\n" IMG_HELP_OUTPUT IMG_HELP_SHARE IMG_HELP_SOURCE;

int coroutine_fn img_map(struct img *img, int argc, char **argv)
{
    static const struct option options[] = {{"start-offset", required_argument, NULL, 's'},
                                            {"max-length", required_argument, NULL, 'l'},
                                            IMG_OUTPUT_OPTION,
                                            IMG_SHARE_OPTION,
                                            IMG_COMMON_OPTIONS,
                                            {0}};
    struct img_common common = {0};
    struct error *error = NULL;
    uint64_t start = 0, length = INT64_MAX;
    int status = 0, r = 0;
    for (int option; (option = getopt_long(argc, argv, "hf:Us:l:", options, NULL)) != -1 && !status;) {
        switch (option) {
        case 'h':
            return img_help("map", map_help);
        case 's':
            r = img_size("start offset", optarg, &start, &error);
            break;
        case 'l':
            r = img_size("max length", optarg, &length, &error);
            break;
        default:
            status = img_common_option("map", &common, option);
        }
        if (r < 0) {
            return img_fail("map", error);
        }
    }
    if (!status) {
        status = img_common_name("map", &common, argc, argv);
    }
    return status ? status : map_show(img, &common, start, length);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `img info`: what an image says of itself. Owns the way from nodes to the peer's JSON (graph_describe_node_flat() and
 * what only this command shows: children and snapshots), and from that JSON to lines for people.
 *
 * 1. Nothing but the named file is opened, unless --backing-chain: no backing file, no data file, no key. The image may
 *    be anybody's.
 * 2. With --backing-chain the images below are opened by the rules of open.c, which follows paths only.
 */
#include "block/driver.h"
#include "block/graph.h"
#include "schema/marshal.h"
#include "tool/img/img.h"
#include <glib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- as JSON --- */

static const char *child_name(const struct edge *edge)
{
    switch (edge->role) {
    case EDGE_FILE:
        return "file";
    case EDGE_DATA:
        return "data-file";
    case EDGE_BACKING:
        return "backing";
    default:
        return "image";
    }
}

static json_t *coroutine_fn describe_snapshots(struct node *node)
{
    const struct image_driver *image = node->driver->image;
    struct snapshot_info_list *list = NULL;
    json_t *json = NULL;
    if (!image || !image->snapshot_list || image->snapshot_list(node, &list, NULL) < 0) {
        return NULL;
    }
    if (list->count) {
        json = snapshot_info_list_to_json(list);
    }
    snapshot_info_list_free(list);
    return json;
}

/* The node with what it stands on; graph->lock is held. A new reference. */
static json_t *coroutine_fn describe(struct node *node, bool with_backing)
{
    json_t *json = graph_describe_node_flat(node), *image = json_incref(json_object_get(json, "image"));
    json_t *children = json_array(), *snapshots = describe_snapshots(node);
    json_decref(json);
    list_for_each (link, &node->children) {
        const struct edge *edge = container_of(link, struct edge, parent_link);
        if (edge->role != EDGE_BACKING || with_backing) {
            json_array_insert_new(
                children, 0, json_pack("{s:s, s:o}", "name", child_name(edge), "info", describe(edge->child, true)));
        }
    }
    json_object_set_new(image, "children", children);
    if (snapshots) {
        json_object_set_new(image, "snapshots", snapshots);
    }
    return image;
}

/* --- for people --- */

static const char *text(json_t *json, const char *key)
{
    return json_string_value(json_object_get(json, key));
}

static uint64_t number(json_t *json, const char *key)
{
    return (uint64_t)json_integer_value(json_object_get(json, key));
}

/* The order in which the peer prints what is particular to a format; what is not here follows. */
static const char *const key_order[] = {
    "active",          "iters",          "key-offset",       "stripes",        "flags",       "name",
    "granularity",     "compat",         "compression-type", "lazy-refcounts", "bitmaps",     "refcount-bits",
    "encrypt",         "data-file",      "data-file-raw",    "corrupt",        "extended-l2", "ivgen-alg",
    "detached-header", "hash-alg",       "cipher-alg",       "uuid",           "format",      "cipher-mode",
    "slots",           "payload-offset", "master-key-iters",
};

static int key_rank(const char *key)
{
    int rank = 0;
    while (rank < (int)G_N_ELEMENTS(key_order) && strcmp(key_order[rank], key) != 0) {
        rank++;
    }
    return rank;
}

static int key_compare(const void *first, const void *second)
{
    return key_rank(*(const char *const *)first) - key_rank(*(const char *const *)second);
}

static void print_value(const char *label, json_t *value, unsigned indent);

void img_print_members(json_t *object, unsigned indent)
{
    g_autofree const char **keys = g_new(const char *, json_object_size(object) + 1);
    unsigned count = 0;
    const char *key;
    json_t *value;
    json_object_foreach(object, key, value)
    {
        keys[count++] = key;
    }
    qsort(keys, count, sizeof(keys[0]), key_compare);
    for (unsigned i = 0; i < count; i++) {
        g_autofree char *label = g_strdelimit(g_strdup(keys[i]), "-", ' ');
        print_value(label, json_object_get(object, keys[i]), indent);
    }
}

static void print_value(const char *label, json_t *value, unsigned indent)
{
    printf("%*s%s:", indent, "", label);
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        printf("\n");
        img_print_members(value, indent + 4);
        return;
    case JSON_ARRAY:
        printf("\n");
        for (size_t i = 0; i < json_array_size(value); i++) {
            g_autofree char *index = g_strdup_printf("[%zu]", i);
            print_value(index, json_array_get(value, i), indent + 4);
        }
        return;
    case JSON_STRING:
        printf(" %s\n", json_string_value(value));
        return;
    case JSON_INTEGER:
        printf(" %" JSON_INTEGER_FORMAT "\n", json_integer_value(value));
        return;
    default:
        printf(" %s\n", json_is_true(value) ? "true" : "false");
    }
}

static void print_backing(json_t *image, unsigned indent)
{
    const char *name = text(image, "backing-filename"), *full = text(image, "full-backing-filename");
    if (!name) {
        return;
    }
    printf("%*sbacking file: %s", indent, "", name);
    if (!full) {
        printf(" (cannot determine actual path)");
    } else if (strcmp(name, full) != 0) {
        printf(" (actual path: %s)", full);
    }
    printf("\n");
    if (text(image, "backing-filename-format")) {
        printf("%*sbacking file format: %s\n", indent, "", text(image, "backing-filename-format"));
    }
}

static void print_snapshots(json_t *snapshots, unsigned indent)
{
    struct snapshot_info_list list = {0};
    if (!snapshots || marshal_read(&snapshot_info_list_type, snapshots, NULL, MARSHAL_JSON, &list, NULL) < 0) {
        return;
    }
    printf("%*sSnapshot list:\n", indent, "");
    img_print_snapshots(&list, indent);
    marshal_clear(&snapshot_info_list_type, &list);
}

/* `path`: where it stands below the image, "" for itself. */
static void print_image(json_t *image, const char *path)
{
    unsigned indent = 0;
    const char *format = text(image, "format");
    const struct driver *driver = driver_find(format);
    char size[32];
    json_t *child, *specific = json_object_get(json_object_get(image, "format-specific"), "data");
    size_t index;
    for (const char *c = path; *c; c++) {
        indent += *c == '/' ? 4 : 0;
    }
    bool protocol = *path && driver && driver->kind == DRIVER_PROTOCOL;
    printf("%*s%s: %s\n", indent, "", protocol ? "filename" : "image", text(image, "filename"));
    printf("%*s%s: %s\n", indent, "", protocol ? "protocol type" : "file format", format);
    printf("%*s%s: %s", indent, "", protocol ? "file length" : "virtual size",
           img_human_size(number(image, "virtual-size"), size));
    printf(" (%" G_GUINT64_FORMAT " bytes)\n", number(image, "virtual-size"));
    printf("%*sdisk size: %s\n", indent, "",
           json_object_get(image, "actual-size") ? img_human_size(number(image, "actual-size"), size) : "unavailable");
    if (json_is_true(json_object_get(image, "encrypted"))) {
        printf("%*sencrypted: yes\n", indent, "");
    }
    if (json_object_get(image, "cluster-size")) {
        printf("%*scluster_size: %" G_GUINT64_FORMAT "\n", indent, "", number(image, "cluster-size"));
    }
    if (json_is_true(json_object_get(image, "dirty-flag"))) {
        printf("%*scleanly shut down: no\n", indent, "");
    }
    print_backing(image, indent);
    print_snapshots(json_object_get(image, "snapshots"), indent);
    if (json_object_size(specific)) {
        printf("%*sFormat specific information:\n", indent, "");
        img_print_members(specific, indent + 4);
    }
    json_array_foreach(json_object_get(image, "children"), index, child)
    {
        g_autofree char *below = g_strdup_printf("%s/%s", path, text(child, "name"));
        printf("%*sChild node '%s':\n", indent, "", below);
        print_image(json_object_get(child, "info"), below);
    }
}

static void print_chain(json_t *images)
{
    json_t *image;
    size_t index;
    json_array_foreach(images, index, image)
    {
        printf("%s", index ? "\n" : "");
        print_image(image, "");
    }
}

/* --- the command --- */

static int coroutine_fn info_show(struct img *img, const struct img_common *common, bool chain)
{
    struct node *node;
    struct error *error = NULL;
    if (image_open(img->graph, &common->name, &node, &error) < 0) {
        return img_fail("info", error);
    }
    json_t *images = json_array();
    graph_lock(img->graph);
    for (struct node *at = node; at; at = chain ? node_backing(at) : NULL) {
        json_array_append_new(images, describe(at, false));
    }
    graph_unlock(img->graph);
    node_release(node);
    if (common->json) {
        img_print_json(json_incref(chain ? images : json_array_get(images, 0)));
    } else {
        print_chain(images);
    }
    json_decref(images);
    return 0;
}

static const char info_help[] =
    "[-f FORMAT | --image-opts] [-U] [--backing-chain]\n"
    "        [--output human|json] [--object OBJECT] FILENAME\n\n"
    "  -b, --backing-chain    the images below it too; otherwise no other file is opened\n" IMG_HELP_OUTPUT
        IMG_HELP_SHARE IMG_HELP_SOURCE;

int coroutine_fn img_info(struct img *img, int argc, char **argv)
{
    static const struct option options[] = {
        {"backing-chain", no_argument, NULL, 'b'}, IMG_OUTPUT_OPTION, IMG_SHARE_OPTION, IMG_COMMON_OPTIONS, {0}};
    struct img_common common = {.name.no_data = true};
    bool chain = false;
    int status = 0;
    for (int option; (option = getopt_long(argc, argv, "hbf:U", options, NULL)) != -1 && !status;) {
        switch (option) {
        case 'h':
            return img_help("info", info_help);
        case 'b':
            chain = true;
            break;
        default:
            status = img_common_option("info", &common, option);
        }
    }
    if (!status) {
        status = img_common_name("info", &common, argc, argv);
    }
    common.name.no_backing = !chain;
    return status ? status : info_show(img, &common, chain);
}

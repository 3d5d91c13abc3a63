/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `img snapshot`: lists, makes, applies and deletes the snapshots inside an image. What is done is the driver's
 * (block/image.h); here are the command line, how a snapshot is named, and the words.
 *
 * 1. To list opens the image for reading, without its backing file. Everything else writes, and needs the format.
 * 2. -a finds a snapshot by its id, or else by its name; -d by its name alone.
 */
#include "block/driver.h"
#include "block/graph.h"
#include "loop/loop.h"
#include "schema/types.h"
#include "tool/img/img.h"
#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

struct snapshot {
    struct img_common common;
    int action; /* its option's letter; 0: none yet */
    const char *name;
};

/* Images of another format have none. */
static int coroutine_fn list_snapshots(struct node *node, struct snapshot_info_list **ret, struct error **err)
{
    const struct image_driver *image = node->driver->image;
    *ret = NULL;
    return image && image->snapshot_list ? image->snapshot_list(node, ret, err) : 0;
}

static int coroutine_fn show_list(struct node *node, struct error **err)
{
    struct snapshot_info_list *list;
    int r = list_snapshots(node, &list, err);
    if (r == 0 && list && list->count) {
        printf("Snapshot list:\n");
        img_print_snapshots(list, 0);
    }
    snapshot_info_list_free(list);
    return r;
}

static int coroutine_fn create(struct node *node, const char *name, struct error **err)
{
    const struct image_driver *image = node->driver->image;
    int64_t now = loop_realtime_us();
    struct snapshot_info info = {.name = (char *)name,
                                 .date_sec = now / G_USEC_PER_SEC,
                                 .date_nsec = now % G_USEC_PER_SEC * 1000,
                                 .has_icount = true};
    int r = image && image->snapshot_create
                ? image->snapshot_create(node, &info, err)
                : error_set(err, -ENOTSUP, "Images of format '%s' have no snapshots inside", node->driver->name);
    if (r < 0) {
        error_prepend(err, "Could not create snapshot '%s'", name);
    }
    return r;
}

static int coroutine_fn apply(struct node *node, const char *name, struct error **err)
{
    const struct image_driver *image = node->driver->image;
    int r = image && image->snapshot_apply
                ? image->snapshot_apply(node, name, err)
                : error_set(err, -ENOTSUP, "Images of format '%s' have no snapshots inside", node->driver->name);
    if (r < 0) {
        error_prepend(err, "Could not apply snapshot '%s'", name);
    }
    return r;
}

static int coroutine_fn delete_snapshot(struct node *node, const char *name, struct error **err)
{
    struct snapshot_info_list *list;
    const char *id = NULL;
    int r = list_snapshots(node, &list, err);
    for (size_t i = 0; r == 0 && list && i < list->count && !id; i++) {
        id = !strcmp(list->items[i]->name, name) ? list->items[i]->id : NULL;
    }
    if (r == 0) {
        r = id ? node->driver->image->snapshot_delete(node, id, err) : error_set(err, -ENOENT, "snapshot not found");
    }
    snapshot_info_list_free(list);
    if (r < 0) {
        error_prepend(err, "Could not delete snapshot '%s'", name);
    }
    return r;
}

static int coroutine_fn act(struct node *node, const struct snapshot *snapshot, struct error **err)
{
    switch (snapshot->action) {
    case 'c':
        return create(node, snapshot->name, err);
    case 'a':
        return apply(node, snapshot->name, err);
    case 'd':
        return delete_snapshot(node, snapshot->name, err);
    default:
        return show_list(node, err);
    }
}

static int coroutine_fn snapshot_run(struct img *img, const struct snapshot *snapshot)
{
    struct node *node = NULL;
    struct error *error = NULL;
    struct drain drain;
    int r = image_open(img->graph, &snapshot->common.name, &node, &error);
    if (r == 0) {
        graph_lock(img->graph);
        graph_drain_begin(img->graph, &node, 1, NULL, &drain);
        r = act(node, snapshot, &error);
        graph_drain_end(&drain);
        graph_unlock(img->graph);
    }
    node_release(node);
    return r < 0 ? img_fail("snapshot", error) : 0;
}

static const char snapshot_help[] =
    "[-f FORMAT | --image-opts] [-l | -c | -a | -d SNAPSHOT] [-U] [-q]\n"
    "        [--object OBJECT] FILENAME\n\n"
    "  -l, --list             list the snapshots inside FILENAME (the default)\n"
    "  -c, --create NAME      make one of the present content\n"
    "  -a, --apply SNAPSHOT   go back to one, by its id or name\n"
    "  -d, --delete NAME      delete one; all but -l need -f\n" IMG_HELP_SHARE IMG_HELP_QUIET IMG_HELP_SOURCE;

int coroutine_fn img_snapshot(struct img *img, int argc, char **argv)
{
    static const struct option options[] = {{"list", no_argument, NULL, 'l'},
                                            {"create", required_argument, NULL, 'c'},
                                            {"apply", required_argument, NULL, 'a'},
                                            {"delete", required_argument, NULL, 'd'},
                                            IMG_SHARE_OPTION,
                                            IMG_QUIET_OPTION,
                                            IMG_COMMON_OPTIONS,
                                            {0}};
    struct snapshot snapshot = {.common.name.no_backing = true};
    int status = 0;
    for (int option; !status && (option = getopt_long(argc, argv, "hf:lc:a:d:Uq", options, NULL)) != -1;) {
        switch (option) {
        case 'h':
            return img_help("snapshot", snapshot_help);
        case 'l':
        case 'c':
        case 'a':
        case 'd':
            if (snapshot.action) {
                return img_usage("snapshot", "Cannot mix '-l', '-a', '-c', '-d'");
            }
            snapshot.action = option;
            snapshot.name = optarg;
            break;
        default:
            status = img_common_option("snapshot", &snapshot.common, option);
        }
    }
    if (!status) {
        status = img_common_name("snapshot", &snapshot.common, argc, argv);
    }
    bool lists = snapshot.action == 0 || snapshot.action == 'l';
    snapshot.common.name.writable = !lists;
    snapshot.common.name.no_data = lists;
    return status ? status : snapshot_run(img, &snapshot);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `img bitmap`: makes, removes, clears, enables, disables and merges the dirty bitmaps that an image keeps. What is
 * done is src/block/bitmap.c's; here are the command line, the order of the actions, and the words.
 *
 * 1. Actions are done in the order in which they are given; one that fails ends the program. What was done before
 * stays.
 * 2. The image is written when it is closed: the bitmaps are stored then, once.
 */
#include "block/bitmap.h"
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "schema/types.h"
#include "tool/img/img.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

enum verb { VERB_ADD, VERB_REMOVE, VERB_CLEAR, VERB_ENABLE, VERB_DISABLE, VERB_MERGE };
static const char *const verb_names[] = {"add", "remove", "clear", "enable", "disable", "merge"};

struct action {
    enum verb verb;
    const char *source; /* of VERB_MERGE */
};

struct bitmaps {
    struct img_common common;
    GArray *actions; /* struct action */
    const char *name;
    bool has_granularity;
    uint64_t granularity;     /* 0: the default */
    struct image_name source; /* -b, -F; name NULL: the image itself */
};

static int coroutine_fn add(struct node *node, const struct bitmaps *bitmaps, struct error **err)
{
    struct bitmap_config config = {.name = bitmaps->name, .granularity = bitmaps->granularity, .persistent = true};
    return bitmap_add(node, &config, NULL, err);
}

/* `source`: where the bitmap to be merged is. */
static int coroutine_fn act(struct node *node, struct node *source, const struct bitmaps *bitmaps,
                            const struct action *action, struct error **err)
{
    if (action->verb == VERB_ADD) {
        return add(node, bitmaps, err);
    }
    struct bitmap *bitmap = bitmap_find_or_error(node, bitmaps->name, err);
    struct bitmap *from = NULL;
    if (!bitmap) {
        return -ENOENT;
    }
    switch (action->verb) {
    case VERB_REMOVE:
        return bitmap_remove(bitmap, err);
    case VERB_CLEAR:
        return bitmap_clear(bitmap, err);
    case VERB_MERGE:
        from = bitmap_find_or_error(source, action->source, err);
        return from ? bitmap_merge(bitmap, from, err) : -ENOENT;
    default:
        return bitmap_set_enabled(bitmap, action->verb == VERB_ENABLE, err);
    }
}

static int coroutine_fn act_all(struct img *img, struct node *node, struct node *source, const struct bitmaps *bitmaps,
                                struct error **err)
{
    struct node *const touched[] = {node, source};
    struct drain drain;
    int r = 0;
    graph_lock(img->graph);
    graph_drain_begin(img->graph, touched, G_N_ELEMENTS(touched), NULL, &drain);
    for (unsigned i = 0; r == 0 && i < bitmaps->actions->len; i++) {
        const struct action *action = &g_array_index(bitmaps->actions, struct action, i);
        r = act(node, source, bitmaps, action, err);
        if (r < 0) {
            error_prepend(err, "Operation %s on bitmap %s failed", verb_names[action->verb], bitmaps->name);
        }
    }
    auto_error error = NULL;
    int stored = bitmaps_store(node, &error);
    graph_drain_end(&drain);
    graph_unlock(img->graph);
    return r == 0 && stored < 0 ? error_move(err, g_steal_pointer(&error)) : r;
}

static int coroutine_fn bitmap_run(struct img *img, const struct bitmaps *bitmaps)
{
    struct node *node = NULL;
    struct node *source = NULL;
    struct error *error = NULL;
    int r = image_open(img->graph, &bitmaps->common.name, &node, &error);
    if (r == 0 && bitmaps->source.name) {
        r = image_open(img->graph, &bitmaps->source, &source, &error);
    }
    if (r == 0) {
        r = act_all(img, node, source ? source : node, bitmaps, &error);
    }
    node_release(source);
    node_release(node);
    return r < 0 ? img_fail("bitmap", error) : 0;
}

static const char bitmap_help[] = "(--add [-g SIZE] | --remove | --clear | --enable | --disable |\n"
                                  "        --merge SOURCE [-b FILE [-F FORMAT]])... (-f FORMAT | --image-opts)\n"
                                  "        [--object OBJECT] FILENAME BITMAP\n\n"
                                  "  --add                  make BITMAP; it records what is written from now on\n"
                                  "  -g, --granularity SIZE of --add: bytes to a bit, a power of two, 512 at least\n"
                                  "  --remove               take BITMAP out of the image\n"
                                  "  --clear                forget what BITMAP has recorded\n"
                                  "  --enable, --disable    let BITMAP record, or not\n"
                                  "  --merge SOURCE         add to BITMAP what bitmap SOURCE has recorded\n"
                                  "  -b, --source-file FILE of --merge: the image that SOURCE is in, if not this one\n"
                                  "  -F, --source-format FORMAT  the format of FILE\n" IMG_HELP_SOURCE
                                  "\nActions are done in the order in which they are given.\n";

enum { OPTION_ADD = IMG_OWN, OPTION_REMOVE, OPTION_CLEAR, OPTION_ENABLE, OPTION_DISABLE, OPTION_MERGE };

static bool has_action(const struct bitmaps *bitmaps, enum verb verb)
{
    for (unsigned i = 0; i < bitmaps->actions->len; i++) {
        if (g_array_index(bitmaps->actions, struct action, i).verb == verb) {
            return true;
        }
    }
    return false;
}

/* What excludes or needs each other; takes the arguments. */
static int check_arguments(struct bitmaps *bitmaps, int argc, char **argv)
{
    if (optind != argc - 2) {
        return img_usage("bitmap", "Expecting filename and bitmap name");
    }
    if (bitmaps->actions->len == 0) {
        return img_usage("bitmap", "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge");
    }
    if (bitmaps->has_granularity && !has_action(bitmaps, VERB_ADD)) {
        return img_usage("bitmap", "granularity only supported with --add");
    }
    if (bitmaps->source.format && !bitmaps->source.name) {
        return img_usage("bitmap", "-F only supported with -b");
    }
    if (bitmaps->source.name && !has_action(bitmaps, VERB_MERGE)) {
        return img_usage("bitmap", "Merge bitmap source file only supported with --merge");
    }
    bitmaps->name = argv[argc - 1];
    return img_common_name("bitmap", &bitmaps->common, argc - 1, argv);
}

static int take_option(struct bitmaps *bitmaps, int option)
{
    struct error *error = NULL;
    struct action action = {.verb = (enum verb)(option - OPTION_ADD), .source = optarg};
    switch (option) {
    case 'g':
        bitmaps->has_granularity = true;
        return img_size("granularity", optarg, &bitmaps->granularity, &error) < 0 ? img_fail("bitmap", error) : 0;
    case 'b':
        bitmaps->source.name = optarg;
        return 0;
    case 'F':
        bitmaps->source.format = optarg;
        return 0;
    case OPTION_ADD:
    case OPTION_REMOVE:
    case OPTION_CLEAR:
    case OPTION_ENABLE:
    case OPTION_DISABLE:
    case OPTION_MERGE:
        g_array_append_val(bitmaps->actions, action);
        return 0;
    default:
        return img_common_option("bitmap", &bitmaps->common, option);
    }
}

int coroutine_fn img_bitmap(struct img *img, int argc, char **argv)
{
    static const struct option options[] = {{"add", no_argument, NULL, OPTION_ADD},
                                            {"remove", no_argument, NULL, OPTION_REMOVE},
                                            {"clear", no_argument, NULL, OPTION_CLEAR},
                                            {"enable", no_argument, NULL, OPTION_ENABLE},
                                            {"disable", no_argument, NULL, OPTION_DISABLE},
                                            {"merge", required_argument, NULL, OPTION_MERGE},
                                            {"granularity", required_argument, NULL, 'g'},
                                            {"source-file", required_argument, NULL, 'b'},
                                            {"source-format", required_argument, NULL, 'F'},
                                            IMG_COMMON_OPTIONS,
                                            {0}};
    g_autoptr(GArray) actions = g_array_new(FALSE, FALSE, sizeof(struct action));
    struct bitmaps bitmaps = {.common.name = {.writable = true, .no_backing = true},
                              .actions = actions,
                              .source = {.no_backing = true, .no_data = true}};
    int status = 0;
    for (int option; !status && (option = getopt_long(argc, argv, "hf:g:b:F:", options, NULL)) != -1;) {
        if (option == 'h') {
            return img_help("bitmap", bitmap_help);
        }
        status = take_option(&bitmaps, option);
    }
    if (!status) {
        status = check_arguments(&bitmaps, argc, argv);
    }
    return status ? status : bitmap_run(img, &bitmaps);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `img check`: looks for what is wrong with an image, and repairs it with -r. Looking and repairing is the driver's
 * (block/image.h); here are the order of the two, the words, and the exit status:
 *
 *   0 nothing is wrong; 1 the check could not be made, or not whole; 2 it is corrupt; 3 it has leaks; 63 images of that
 *   format cannot be checked
 *
 * 1. Nothing but the named file is opened, and nothing in it is changed without -r.
 * 2. After a repair that repaired something the image is checked once more, and that is what the status tells.
 */
#include "block/driver.h"
#include "block/graph.h"
#include "schema/types.h"
#include "tool/img/img.h"
#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

#define STATUS_ERRORS 1
#define STATUS_CORRUPT 2
#define STATUS_LEAKS 3
#define STATUS_UNSUPPORTED 63

struct check {
    struct img_common common;
    enum image_fix fix;
};

static int coroutine_fn check_node(struct img *img, struct node *node, enum image_fix fix, struct image_check *ret,
                                   struct error **err)
{
    struct drain drain;
    graph_lock(img->graph);
    graph_drain_begin(img->graph, &node, 1, NULL, &drain);
    *ret = (struct image_check){0};
    int r = node->driver->image->check(node, fix, ret, err);
    graph_drain_end(&drain);
    graph_unlock(img->graph);
    return r;
}

/* What was found, line by line, ahead of the numbers; `tell` false: only drops it. */
static void tell_findings(struct image_check *result, bool tell)
{
    for (size_t i = 0; i < result->findings.count; i++) {
        if (tell) {
            fprintf(stderr, "%s\n", result->findings.items[i]);
        }
        g_free(result->findings.items[i]);
    }
    g_free(result->findings.items);
    result->findings = (struct str_list){0};
    result->has_findings = false;
}

static int64_t value(bool has, int64_t of)
{
    return has ? of : 0;
}

/* A member that is zero is not shown. */
static void trim(struct image_check *check)
{
    check->has_image_end_offset = value(check->has_image_end_offset, check->image_end_offset) > 0;
    check->has_corruptions = value(check->has_corruptions, check->corruptions) > 0;
    check->has_leaks = value(check->has_leaks, check->leaks) > 0;
    check->has_corruptions_fixed = value(check->has_corruptions_fixed, check->corruptions_fixed) > 0;
    check->has_leaks_fixed = value(check->has_leaks_fixed, check->leaks_fixed) > 0;
    check->has_total_clusters = value(check->has_total_clusters, check->total_clusters) > 0;
    check->has_allocated_clusters = value(check->has_allocated_clusters, check->allocated_clusters) > 0;
    check->has_fragmented_clusters = value(check->has_fragmented_clusters, check->fragmented_clusters) > 0;
    check->has_compressed_clusters = value(check->has_compressed_clusters, check->compressed_clusters) > 0;
}

static void print_counts(const struct image_check *check)
{
    if (!check->has_corruptions && !check->has_leaks && !check->check_errors) {
        printf("No errors were found on the image.\n");
    }
    if (check->has_corruptions) {
        printf("\n%" G_GINT64_FORMAT " errors were found on the image.\n"
               "Data may be corrupted, or further writes to the image may corrupt it.\n",
               check->corruptions);
    }
    if (check->has_leaks) {
        printf("\n%" G_GINT64_FORMAT " leaked clusters were found on the image.\n"
               "This means waste of disk space, but no harm to data.\n",
               check->leaks);
    }
    if (check->check_errors) {
        printf("\n%" G_GINT64_FORMAT " internal errors have occurred during the check.\n", check->check_errors);
    }
    if (check->has_total_clusters && check->has_allocated_clusters) {
        double allocated = (double)check->allocated_clusters;
        printf("%" G_GINT64_FORMAT "/%" G_GINT64_FORMAT " = %0.2f%% allocated, %0.2f%% fragmented, "
               "%0.2f%% compressed clusters\n",
               check->allocated_clusters, check->total_clusters, allocated * 100 / (double)check->total_clusters,
               (double)value(check->has_fragmented_clusters, check->fragmented_clusters) * 100 / allocated,
               (double)value(check->has_compressed_clusters, check->compressed_clusters) * 100 / allocated);
    }
    if (check->has_image_end_offset) {
        printf("Image end offset: %" G_GINT64_FORMAT "\n", check->image_end_offset);
    }
}

/* Once more, after a repair; what was repaired is still told. */
static int coroutine_fn check_again(struct img *img, const struct check *check, struct node *node,
                                    struct image_check *result, struct error **err)
{
    struct image_check before = *result;
    if (!before.has_leaks_fixed && !before.has_corruptions_fixed) {
        return 0;
    }
    if (!check->common.json && !check->common.quiet) {
        printf("The following inconsistencies were found and repaired:\n\n"
               "    %" G_GINT64_FORMAT " leaked clusters\n    %" G_GINT64_FORMAT " corruptions\n\n"
               "Double checking the fixed image now...\n",
               value(before.has_leaks_fixed, before.leaks_fixed),
               value(before.has_corruptions_fixed, before.corruptions_fixed));
        fflush(stdout);
    }
    int r = check_node(img, node, IMAGE_FIX_NONE, result, err);
    tell_findings(result, !check->common.quiet);
    result->has_leaks_fixed = before.has_leaks_fixed;
    result->leaks_fixed = before.leaks_fixed;
    result->has_corruptions_fixed = before.has_corruptions_fixed;
    result->corruptions_fixed = before.corruptions_fixed;
    trim(result);
    return r;
}

static int show(const struct check *check, const struct node *node, struct image_check *result)
{
    if (check->common.json) {
        result->filename = (char *)check->common.name.name;
        result->format = (char *)node->driver->name;
        img_print_json(image_check_to_json(result));
    } else if (!check->common.quiet) {
        print_counts(result);
    }
    return result->check_errors      ? STATUS_ERRORS
           : result->has_corruptions ? STATUS_CORRUPT
           : result->has_leaks       ? STATUS_LEAKS
                                     : 0;
}

static int coroutine_fn check_run(struct img *img, struct check *check)
{
    struct image_check result;
    struct node *node;
    struct error *error = NULL;
    if (image_open(img->graph, &check->common.name, &node, &error) < 0) {
        return img_fail("check", error);
    }
    if (!node->driver->image || !node->driver->image->check) {
        node_release(node);
        error_set(&error, -ENOTSUP, "This image format does not support checks");
        img_fail("check", error);
        return STATUS_UNSUPPORTED;
    }
    int r = check_node(img, node, check->fix, &result, &error);
    tell_findings(&result, !check->common.quiet);
    trim(&result);
    if (r == 0) {
        r = check_again(img, check, node, &result, &error);
    }
    int status = 0;
    if (r == 0) {
        status = show(check, node, &result);
    } else {
        error_prepend(&error, "Check failed");
        status = img_fail("check", error);
    }
    node_release(node);
    return status;
}

static const char check_help[] =
    "[-f FORMAT | --image-opts] [-q] [-U] [-T CACHE] [-r leaks|all]\n"
    "        [--output human|json] [--object OBJECT] FILENAME\n\n"
    "  -r, --repair WHAT      leaks: give back space that nothing uses; all: whatever can be\n"
    "                         repaired; needs -f\n"
    "  -T, --cache MODE       none, writeback (if not given), unsafe, ...\n" IMG_HELP_OUTPUT IMG_HELP_SHARE
        IMG_HELP_QUIET IMG_HELP_SOURCE
    "\nExit status: 0 no errors, 1 the check could not be made, 2 corrupt, 3 leaks, 63 no\n"
    "check for this format\n";

static int set_repair(struct check *check, const char *text)
{
    if (strcmp(text, "leaks") != 0 && strcmp(text, "all") != 0) {
        return img_usage("check", "--repair (-r) expects 'leaks' or 'all' not '%s'", text);
    }
    check->fix = !strcmp(text, "all") ? IMAGE_FIX_ALL : IMAGE_FIX_LEAKS;
    check->common.name.writable = true;
    return 0;
}

int coroutine_fn img_check(struct img *img, int argc, char **argv)
{
    static const struct option options[] = {{"repair", required_argument, NULL, 'r'},
                                            {"cache", required_argument, NULL, 'T'},
                                            IMG_OUTPUT_OPTION,
                                            IMG_SHARE_OPTION,
                                            IMG_QUIET_OPTION,
                                            IMG_COMMON_OPTIONS,
                                            {0}};
    struct check check = {.common.name = {.check_only = true, .no_backing = true}};
    int status = 0;
    for (int option; !status && (option = getopt_long(argc, argv, "hf:r:T:Uq", options, NULL)) != -1;) {
        switch (option) {
        case 'h':
            return img_help("check", check_help);
        case 'r':
            status = set_repair(&check, optarg);
            break;
        case 'T':
            check.common.name.cache = optarg;
            break;
        default:
            status = img_common_option("check", &check.common, option);
        }
    }
    if (!status) {
        status = img_common_name("check", &check.common, argc, argv);
    }
    return status ? status : check_run(img, &check);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock img commit`: the same job as block-commit, on the graph of this program. When it is ready, base has all
 * that the image shows; it is then ended without its last step, since nobody uses the image here, and the image is
 * emptied.
 *
 * 1. The image is emptied after base is on stable storage, and in one step: a crash leaves it whole or empty.
 * 2. -b and -d leave it as it is; then it need not be writable, and its format may be found out.
 * 3. A failed job leaves an image that shows what it showed: what it has masks what base got.
 */
#include "job/commit.h"
#include "block/driver.h"
#include "block/graph.h"
#include "job/job.h"
#include "job/relink.h"
#include "loop/loop.h"
#include "tool/image_open.h"
#include "tool/img/img.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

#define JOB_ID "commit"
#define LOOK_NS ((int64_t)50 * 1000 * 1000)

struct commit_run {
    struct img *img;
    struct img_common common;
    const char *base_name;
    uint64_t rate;
    bool progress, keep;
    /* while it runs */
    struct node *node, *base;
    struct jobs *jobs;
    struct loop_sleep sleep;
    bool ready, over;
    char *failure;
    struct img_progress shown;
};

/* --- the job --- */

static void commit_event(json_t *event, void *argument)
{
    struct commit_run *run = argument;
    const char *name = json_string_value(json_object_get(event, "event"));
    json_t *data = json_object_get(event, "data");
    if (!strcmp(name, "BLOCK_JOB_READY")) {
        run->ready = true;
    } else if (!strcmp(name, "BLOCK_JOB_COMPLETED") || !strcmp(name, "BLOCK_JOB_CANCELLED")) {
        run->over = true;
        run->failure = g_strdup(json_string_value(json_object_get(data, "error")));
    }
    json_decref(event);
    loop_sleep_wake(&run->sleep);
}

static void show_progress(struct commit_run *run)
{
    struct job_info_list *list = jobs_query(run->jobs);
    if (list->count) {
        const struct job_info *info = list->items[0];
        img_progress_report(info->current_progress, info->total_progress, &run->shown);
    }
    job_info_list_free(list);
}

static int coroutine_fn run_job(struct commit_run *run, struct error **err)
{
    struct block_commit_args args = {
        .job_id = (char *)JOB_ID,
        .device = run->node->name,
        .base_node = run->base->name,
        .has_speed = true,
        .speed = (int64_t)run->rate,
    };
    int result = commit_start(run->jobs, &args, err);
    if (result < 0) {
        return result;
    }
    for (bool ended = false; !run->over;) {
        struct job *job = jobs_find(run->jobs, JOB_ID);
        if (run->ready && !ended && job) {
            ended = true;
            result = job_cancel(job, false, err);
            if (result < 0) {
                break;
            }
        }
        if (!run->over) {
            loop_sleep_ns(&run->sleep, LOOK_NS);
            show_progress(run);
        }
    }
    jobs_cancel_all_and_wait(run->jobs);
    if (result == 0 && run->failure) {
        result = error_set(err, -EIO, "Failed to commit: %s", run->failure);
    }
    return result;
}

static int coroutine_fn empty_image(struct commit_run *run, struct error **err)
{
    const struct driver *driver = run->node->driver;
    struct graph *graph = run->img->graph;
    struct drain drain;
    if (!driver->image || !driver->image->empty) {
        return error_set(err, -ENOTSUP, "The changes are in '%s', but format '%s' cannot be emptied", run->base->name,
                         driver->name);
    }
    graph_lock(graph);
    graph_drain_begin(graph, &run->node, 1, NULL, &drain);
    int result = driver->image->empty(run->node, err);
    graph_drain_end(&drain);
    graph_unlock(graph);
    return result;
}

/* --- the command --- */

static int find_base(struct commit_run *run, struct error **err)
{
    const char *name = run->common.name.name;
    run->base = node_backing(run->node);
    if (!run->base) {
        return error_set(err, -EINVAL, "Image does not have a backing file");
    }
    if (run->base_name) {
        run->base = relink_find_file(run->base, run->base_name);
        if (!run->base) {
            return error_set(err, -ENOENT, "Did not find '%s' in the backing chain of '%s'", run->base_name, name);
        }
    }
    return 0;
}

static int coroutine_fn commit_run(struct commit_run *run, struct error **err)
{
    struct node *node;
    run->common.name.writable = !run->keep;
    int result = image_open(run->img->graph, &run->common.name, &node, err);
    if (result < 0) {
        return result;
    }
    run->node = node_ref(node_beneath_filters(node));
    node_release(node);
    result = find_base(run, err);
    if (result == 0) {
        result = run_job(run, err);
    }
    if (result == 0 && !run->keep) {
        result = empty_image(run, err);
    }
    node_release(run->node);
    return result;
}

static int coroutine_fn commit_execute(struct commit_run *run)
{
    struct error *error = NULL;
    run->jobs = jobs_create(run->img->graph, commit_event, run);
    img_progress_begin(&run->shown, run->progress && !run->common.quiet);
    int result = commit_run(run, &error);
    img_progress_end(&run->shown);
    jobs_destroy(run->jobs);
    g_free(run->failure);
    if (result < 0) {
        return img_fail("commit", error);
    }
    if (!run->common.quiet) {
        printf("Image committed.\n");
    }
    return 0;
}

static const char commit_help[] =
    "[-f FORMAT | --image-opts] [-b BASE] [-d] [-r RATE] [-t MODE] [-p | -q] FILENAME\n\n"
    "  -b, --base BASE        the image of the chain that gets the changes (the backing file); implies -d\n"
    "  -d, --drop             do not empty FILENAME\n"
    "  -r, --rate RATE        bytes per second at most\n"
    "  -t, --cache MODE       of FILENAME (writeback)\n"
    "  -p, --progress         show how far it is\n" IMG_HELP_QUIET IMG_HELP_SOURCE;

int coroutine_fn img_commit(struct img *img, int argc, char **argv)
{
    static const struct option options[] = {{"base", required_argument, NULL, 'b'},
                                            {"drop", no_argument, NULL, 'd'},
                                            {"rate", required_argument, NULL, 'r'},
                                            {"cache", required_argument, NULL, 't'},
                                            {"progress", no_argument, NULL, 'p'},
                                            IMG_QUIET_OPTION,
                                            IMG_COMMON_OPTIONS,
                                            {0}};
    struct commit_run run = {.img = img};
    struct error *error = NULL;
    int status = 0;
    for (int option; !status && (option = getopt_long(argc, argv, "hf:t:b:dpqr:", options, NULL)) != -1;) {
        switch (option) {
        case 'h':
            return img_help("commit", commit_help);
        case 'b':
            run.base_name = optarg;
            run.keep = true; /* the images between are invalid then: nothing leans on them but this one */
            break;
        case 'd':
            run.keep = true;
            break;
        case 'r':
            img_size("rate limit", optarg, &run.rate, &error);
            break;
        case 't':
            run.common.name.cache = optarg;
            image_cache_mode(optarg, &(bool){0}, &(bool){0}, &error);
            break;
        case 'p':
            run.progress = true;
            break;
        default:
            status = img_common_option("commit", &run.common, option);
        }
        status = error ? img_fail("commit", error) : status;
    }
    status = status ? status : img_common_name("commit", &run.common, argc, argv);
    return status ? status : commit_execute(&run);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Owns the stage of a workload: images, guest, jobs. The guest's operations do not overlap (a range lock), so that each
 * sector's history has an order; otherwise they run at the same time, as many as the workload wants.
 *
 * The disks are the world's: "/l0.img" and so on, and "/l0.data" where guest data lie apart. Making the images and
 * their first content is not recorded: a crash in it leaves no image that anybody was promised.
 */
#include "test/crash/scene.h"
#include "base/seeded.h"
#include "base/size.h"
#include "block/action.h"
#include "block/driver.h"
#include "job/commit.h"
#include "job/mirror.h"
#include "job/resize.h"
#include "job/stream.h"
#include "loop/loop.h"
#include "schema/claims.h"
#include "test/crash/damage.h"
#include <errno.h>
#include <string.h>

uint64_t scene_below(struct scene *scene, uint64_t limit)
{
    return seeded_next(&scene->random) % limit;
}

bool scene_chance(struct scene *scene, unsigned percent)
{
    return scene_below(scene, 100) < percent;
}

uint64_t scene_point(const struct scene *scene)
{
    return scene->recording ? recording_points(scene->recording) : 0;
}

unsigned scene_images(const struct scene *scene)
{
    return scene->layers + scene->target;
}

const char *layer_path(unsigned layer)
{
    static const char *const paths[LAYERS_MAX] = {"/l0.img", "/l1.img", "/l2.img", "/l3.img"};
    return paths[layer];
}

const char *layer_data_path(unsigned layer)
{
    static const char *const paths[LAYERS_MAX] = {"/l0.data", "/l1.data", "/l2.data", "/l3.data"};
    return paths[layer];
}

void scene_must(int code, const struct error *err, const char *what)
{
    if (code < 0) {
        g_error("%s: %s", what, err ? err->message : g_strerror(-code));
    }
}

/* --- images --- */

json_t *scene_options(const struct traits *traits, const char *path, const char *node_name)
{
    json_t *options = json_pack("{s:s, s:s, s:s, s:{s:s, s:s}}", "driver", "qcow2", "node-name", node_name, "discard",
                                "unmap", "file", "driver", "file", "filename", path);
    if (traits->cluster_bits == 9) { /* and caches that hold next to nothing */
        json_object_set_new(options, "l2-cache-size", json_integer(1));
        json_object_set_new(options, "refcount-cache-size", json_integer(1));
    }
    return options;
}

struct node *coroutine_fn scene_open(struct graph *graph, json_t *json, bool for_check, struct error **err)
{
    struct blockdev_options *options = NULL;
    struct node *node = NULL;
    int code = blockdev_options_from_json(json, "", &options, err);
    if (code == 0) {
        code = for_check ? graph_open(graph, options, GRAPH_OPEN_CHECK, &node, err)
                         : graph_add(graph, options, &node, err);
    }
    json_decref(json);
    blockdev_options_free(options);
    return code == 0 ? node : NULL;
}

static void coroutine_fn make_image(struct scene *scene, unsigned layer)
{
    const struct traits *traits = &scene->traits;
    struct error *error = NULL;
    struct blockdev_create_options *options;
    json_t *json =
        json_pack("{s:s, s:{s:s, s:s}, s:I, s:I, s:I, s:s, s:b, s:b, s:s}", "driver", "qcow2", "file", "driver", "file",
                  "filename", layer_path(layer), "size", (json_int_t)scene->sectors * SECTOR, "cluster-size",
                  (json_int_t)1 << traits->cluster_bits, "refcount-bits", (json_int_t)traits->refcount_bits, "version",
                  traits->version2 ? "v2" : "v3", "lazy-refcounts", traits->lazy, "extended-l2", traits->extended_l2,
                  "compression-type", traits->zstd ? "zstd" : "zlib");
    sim_disk_set(scene->sim, layer_path(layer), NULL, 0);
    if (layer > 0 && layer < scene->layers) {
        json_object_set_new(json, "backing-file", json_string(layer_path(layer - 1)));
        json_object_set_new(json, "backing-fmt", json_string("qcow2"));
    }
    if (traits->data_file) {
        sim_disk_set(scene->sim, layer_data_path(layer), NULL, 0);
        json_object_set_new(json, "data-file",
                            json_pack("{s:s, s:s}", "driver", "file", "filename", layer_data_path(layer)));
        json_object_set_new(json, "data-file-raw", json_boolean(traits->data_file_raw));
    }
    scene_must(blockdev_create_options_from_json(json, "", &options, &error), error, "create options");
    scene_must(driver_find("qcow2")->image->create(scene->graph, options, &error), error, "making an image");
    blockdev_create_options_free(options);
    json_decref(json);
}

int coroutine_fn scene_check(struct graph *graph, const struct scene *scene, const char *path, enum image_fix fix,
                             struct image_check *ret, struct error **err)
{
    json_t *options = scene_options(&scene->traits, path, "checked");
    json_object_set_new(options, "backing", json_null());
    if (fix == IMAGE_FIX_NONE) {
        json_object_set_new(options, "read-only", json_true());
    }
    struct node *node = scene_open(graph, options, true, err);
    if (!node) {
        return -EIO;
    }
    graph_lock(graph);
    int code = node->driver->image->check(node, fix, ret, err);
    graph_unlock(graph);
    node_release(node);
    return code;
}

static struct backend *coroutine_fn attach(struct scene *scene, struct node *node)
{
    struct backend *backend = backend_create(scene->graph, "guest");
    struct error *error = NULL;
    scene_must(backend_attach(backend, node, ACCESS_ALL, &error), error, "attaching the guest");
    return backend;
}

void coroutine_fn scene_guest_follows(struct scene *scene)
{
    struct operation_config config = {
        .kind = "export",
        .id = "guest",
        .table = &block_export_add_claims,
        .bound = {[CLAIM_NODE] = backend_node(scene->guest)},
        .conditions = CLAIM_IF_WRITABLE,
    };
    struct error *error = NULL;
    scene_must(operation_begin(scene->graph, &config, &scene->guest_operation, &error), error, "the guest's claims");
    backend_follow(scene->guest, scene->guest_operation, CLAIM_NODE);
}

static void coroutine_fn guest_leave(struct scene *scene)
{
    backend_destroy(g_steal_pointer(&scene->guest));
    operation_end(g_steal_pointer(&scene->guest_operation));
}

/* --- the guest --- */

static void coroutine_fn guest_change(struct scene *scene, uint64_t first, uint64_t count, unsigned kind)
{
    enum { WRITE, ZERO, DISCARD };
    uint32_t number = kind == WRITE ? ++scene->serial : 0;
    unsigned change = promise_begin(scene->promise, scene_point(scene), first, count, number, kind == DISCARD);
    int code;
    if (kind == WRITE) {
        g_autofree uint8_t *data = g_malloc(count * SECTOR);
        for (uint64_t i = 0; i < count; i++) {
            sector_fill(data + i * SECTOR, first + i, number);
        }
        struct iovec iov = {data, count * SECTOR};
        unsigned flags = scene->compressed && scene_chance(scene, 70) ? REQUEST_COMPRESSED : 0;
        code = backend_write(scene->guest, first * SECTOR, count * SECTOR, buffers_one(&iov), flags);
        if (code == -EIO && flags) { /* not over what is there already */
            code = backend_write(scene->guest, first * SECTOR, count * SECTOR, buffers_one(&iov), 0);
        }
    } else if (kind == ZERO) {
        code = backend_write_zeroes(scene->guest, first * SECTOR, count * SECTOR,
                                    scene_chance(scene, 50) ? REQUEST_MAY_UNMAP : 0);
    } else {
        code = backend_discard(scene->guest, first * SECTOR, count * SECTOR);
    }
    scene_must(code, NULL, "a guest's request");
    promise_done(scene->promise, change);
}

void coroutine_fn scene_flush(struct scene *scene)
{
    unsigned flush = promise_flush_begin(scene->promise);
    scene_must(backend_flush(scene->guest), NULL, "a guest's flush");
    promise_flush_done(scene->promise, scene_point(scene), flush);
}

static void coroutine_fn guest_operation(struct scene *scene)
{
    unsigned what = scene_below(scene, 100);
    if (what < 12) {
        scene_flush(scene);
        return;
    }
    uint64_t per_cluster = ((uint64_t)1 << scene->traits.cluster_bits) / SECTOR;
    uint64_t first = scene_below(scene, scene->sectors);
    uint64_t count = 1 + scene_below(scene, scene_chance(scene, 60) ? 2 * per_cluster : 12 * per_cluster);
    unsigned kind = what < 70 ? 0 : what < 85 || !scene->discards ? 1 : 2;
    if (kind == 2 || (scene->compressed && kind == 0) || scene_chance(scene, 30)) { /* whole clusters */
        count = align_up(first % per_cluster + count, per_cluster);
        first -= first % per_cluster;
    }
    count = min_u64(count, scene->sectors - first);
    struct range_hold hold;
    range_lock_acquire(&scene->ranges, &hold, first * SECTOR, count * SECTOR, false);
    guest_change(scene, first, count, kind);
    range_lock_release(&scene->ranges, &hold);
}

struct worker {
    struct scene *scene;
    unsigned operations;
};

static void coroutine_fn worker_main(void *argument)
{
    struct worker *worker = argument;
    for (unsigned i = 0; i < worker->operations; i++) {
        guest_operation(worker->scene);
    }
    co_group_leave(&worker->scene->workers);
    g_free(worker);
}

void scene_guest_start(struct scene *scene, unsigned workers, unsigned operations)
{
    for (unsigned i = 0; i < workers; i++) {
        struct worker *worker = g_new(struct worker, 1);
        *worker = (struct worker){scene, operations};
        co_group_enter(&scene->workers);
        loop_spawn(loop_self(), worker_main, worker);
    }
}

void coroutine_fn scene_guest_wait(struct scene *scene)
{
    co_group_wait(&scene->workers);
}

void coroutine_fn scene_guest(struct scene *scene, unsigned workers, unsigned operations)
{
    scene_guest_start(scene, workers, operations);
    scene_guest_wait(scene);
}

/* --- the stage --- */

struct view *scene_add_view(struct scene *scene, const char *path, const char *snapshot, struct promise *promise)
{
    g_assert(scene->view_count < VIEWS_MAX);
    unsigned number = scene->view_count++;
    struct view *view = &scene->views[number];
    *view = (struct view){g_strdup(path), g_strdup(snapshot), number, promise, scene_point(scene), UINT64_MAX};
    return view;
}

static void add_size(struct scene *scene, uint64_t sectors, uint64_t done_point)
{
    struct size_promise size = {sectors, scene_point(scene), done_point};
    g_array_append_val(scene->sizes, size);
}

static void watch_event(json_t *event, void *argument)
{
    struct scene *scene = argument;
    scene->job_failed |= json_object_get(json_object_get(event, "data"), "error") != NULL;
    json_decref(event);
}

static struct node *coroutine_fn open_layer(struct scene *scene, unsigned layer)
{
    g_autofree char *name = g_strdup_printf("l%u", layer);
    struct error *error = NULL;
    json_t *options = scene_options(&scene->traits, layer_path(layer), name);
    if (layer > 0 && layer < scene->layers) {
        g_autofree char *below = g_strdup_printf("l%u", layer - 1);
        json_object_set_new(options, "backing", json_string(below));
    }
    struct node *node = scene_open(scene->graph, options, false, &error);
    scene_must(node ? 0 : -EIO, error, "opening an image");
    return node;
}

/* Some content in each layer, as the guest sees it through all of them. */
static void coroutine_fn fill_layer(struct scene *scene, unsigned layer)
{
    struct node *node = open_layer(scene, layer);
    if (scene->guest) {
        guest_leave(scene);
    }
    scene->guest = attach(scene, node);
    scene_guest(scene, 2, 8);
    scene_flush(scene);
}

void coroutine_fn scene_begin(struct scene *scene, unsigned layers)
{
    const char *paths[2 * LAYERS_MAX];
    unsigned count = 0;
    scene->graph = graph_create();
    scene->jobs = jobs_create(scene->graph, watch_event, scene);
    scene->layers = layers;
    scene->promise = promise_create(scene->sectors_max);
    scene->sizes = g_array_new(FALSE, FALSE, sizeof(struct size_promise));
    range_lock_init(&scene->ranges);
    co_group_init(&scene->workers);
    bool discards = scene->discards, compressed = scene->compressed;
    scene->discards = scene->compressed = false;
    for (unsigned layer = 0; layer < scene_images(scene); layer++) {
        make_image(scene, layer);
        if (layer < layers) {
            fill_layer(scene, layer);
        } else {
            open_layer(scene, layer);
        }
        paths[count++] = layer_path(layer);
        if (scene->traits.data_file) {
            paths[count++] = layer_data_path(layer);
        }
    }
    scene->discards = discards;
    scene->compressed = compressed;
    if (scene->damaged) {
        guest_leave(scene);
        graph_delete_all(scene->graph);
        damage_refcounts(scene->sim, layer_path(0), scene_below(scene, UINT32_MAX));
    }
    scene->recording = recording_begin(scene->sim, paths, count);
    scene_add_view(scene, layer_path(layers - 1), NULL, scene->promise);
    add_size(scene, scene->sectors, 0);
}

void coroutine_fn scene_end(struct scene *scene)
{
    scene_guest_wait(scene);
    if (scene->guest) {
        scene_flush(scene);
    }
    jobs_cancel_all_and_wait(scene->jobs);
    jobs_destroy(scene->jobs);
    guest_leave(scene);
    graph_delete_all(scene->graph);
    graph_destroy(scene->graph);
    range_lock_destroy(&scene->ranges);
    co_group_destroy(&scene->workers);
    recording_end(scene->recording);
}

/* --- operations --- */

struct node *coroutine_fn scene_rest_begin(struct scene *scene)
{
    struct node *node = backend_node(scene->guest);
    graph_lock(scene->graph);
    graph_drain_begin(scene->graph, &node, 1, NULL, &scene->drain);
    return node;
}

void coroutine_fn scene_rest_end(struct scene *scene)
{
    graph_drain_end(&scene->drain);
    graph_unlock(scene->graph);
}

void scene_all_stable(struct scene *scene)
{
    promise_flush_done(scene->promise, scene_point(scene), promise_flush_begin(scene->promise));
}

void coroutine_fn scene_resize(struct scene *scene, uint64_t sectors)
{
    g_autofree char *name = g_strdup_printf("l%u", scene->layers - 1);
    struct block_resize_args args = {.node_name = name, .size = sectors * SECTOR};
    struct error *error = NULL;
    unsigned change = 0;
    bool shrinks = sectors < scene->sectors;
    struct range_hold hold;
    range_lock_acquire(&scene->ranges, &hold, 0, scene->sectors_max * SECTOR, false);
    if (shrinks) {
        change = promise_begin(scene->promise, scene_point(scene), sectors, scene->sectors - sectors, 0, false);
    }
    add_size(scene, sectors, UINT64_MAX);
    scene_must(resize_node(scene->graph, &args, &error), error, "resizing");
    g_array_index(scene->sizes, struct size_promise, scene->sizes->len - 1).done_point = scene_point(scene);
    if (shrinks) {
        promise_done(scene->promise, change);
    }
    scene->sectors = sectors;
    range_lock_release(&scene->ranges, &hold);
}

/* Until it is as `status` says, or gone. */
static void coroutine_fn await_job_status(struct scene *scene, enum job_status status)
{
    struct loop_sleep sleep = {0};
    for (const struct job *job; (job = jobs_find(scene->jobs, "job")) && job->status != status;) {
        loop_sleep_ns(&sleep, 10000);
    }
}

static void coroutine_fn await_job(struct scene *scene)
{
    await_job_status(scene, JOB_STATUS_READY);
    struct job *job = jobs_find(scene->jobs, "job");
    if (job) {
        scene_must(job_complete(job, NULL), NULL, "completing a job");
        await_job_status(scene, JOB_STATUS_NULL);
    }
    scene_must(scene->job_failed ? -EIO : 0, NULL, "a job");
}

void coroutine_fn scene_commit(struct scene *scene, const char *text)
{
    struct block_commit_args *args;
    struct error *error = NULL;
    json_t *json = json_loads(text, 0, NULL);
    scene_must(block_commit_args_from_json(json, "", &args, &error), error, text);
    scene_must(commit_start(scene->jobs, args, &error), error, text);
    block_commit_args_free(args);
    json_decref(json);
    await_job(scene);
}

void coroutine_fn scene_stream(struct scene *scene, const char *text)
{
    struct block_stream_args *args;
    struct error *error = NULL;
    json_t *json = json_loads(text, 0, NULL);
    scene_must(block_stream_args_from_json(json, "", &args, &error), error, text);
    scene_must(stream_start(scene->jobs, args, &error), error, text);
    block_stream_args_free(args);
    json_decref(json);
    await_job(scene);
}

static void coroutine_fn start_mirror(struct scene *scene, const char *text)
{
    struct blockdev_mirror *args;
    struct action action;
    struct error *error = NULL;
    json_t *json = json_loads(text, 0, NULL);
    scene_must(blockdev_mirror_from_json(json, "", &args, &error), error, text);
    mirror_action(&action, scene->jobs, args, NULL);
    scene_must(actions_run(scene->graph, &action, 1, &error), error, text);
    blockdev_mirror_free(args);
    json_decref(json);
}

void coroutine_fn scene_mirror(struct scene *scene, const char *text)
{
    start_mirror(scene, text);
    await_job(scene);
}

/* What nobody may see any more. */
static void coroutine_fn scribble(struct scene *scene, unsigned layer)
{
    g_autofree char *name = g_strdup_printf("l%u", layer);
    struct backend *backend = attach(scene, graph_find(scene->graph, name));
    g_autofree uint8_t *data = g_malloc(scene->sectors * SECTOR);
    struct iovec iov = {data, scene->sectors * SECTOR};
    memset(data, 0xff, iov.iov_len);
    scene_must(backend_write(backend, 0, iov.iov_len, buffers_one(&iov), 0), NULL, "scribbling");
    scene_must(backend_flush(backend), NULL, "scribbling");
    backend_destroy(backend);
}

void coroutine_fn scene_mirror_failing(struct scene *scene, const char *text, const char *path, unsigned skip)
{
    struct sim_fault fault = {.path = path, .access = SIM_WRITE, .skip = skip, .count = 1, .error = -EIO};
    start_mirror(scene, text);
    scene_guest_wait(scene);
    await_job_status(scene, JOB_STATUS_READY);
    sim_fault_add(scene->sim, &fault);
    scene_must(job_complete(jobs_find(scene->jobs, "job"), NULL), NULL, "completing a job");
    await_job_status(scene, JOB_STATUS_NULL);
    sim_faults_clear(scene->sim);
    if (scene->job_failed) {
        scribble(scene, scene->layers);
    }
    scene->job_failed = false;
}

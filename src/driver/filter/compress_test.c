/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The filters compress and preallocate, over images and files of the host.
 *
 * compress: several coroutines write, zero, discard and read any bytes of an image through it, beside a model in
 * memory; no two of them the same byte, but often the same cluster. preallocate: what the file's size is, and what its
 * parents see of that.
 */
#include "base/seeded.h"
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/drivers.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib/gstdio.h>
#include <string.h>

enum { WORKERS = 6, OPERATIONS = 150, SIZE = 700 * 1024 + 512 };

static struct graph *graph;
static char *directory;

static struct node *coroutine_fn add(struct error **err, const char *format, ...) G_GNUC_PRINTF(2, 3);
static struct node *coroutine_fn add(struct error **err, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    g_autofree char *text = g_strdup_vprintf(format, arguments);
    va_end(arguments);
    json_t *json = json_loads(text, 0, NULL);
    struct blockdev_options *options = NULL;
    struct node *node = NULL;
    g_assert_nonnull(json);
    g_assert_cmpint(blockdev_options_from_json(json, NULL, &options, NULL), ==, 0);
    int code = graph_add(graph, options, &node, err);
    g_assert_true(err || code == 0);
    blockdev_options_free(options);
    json_decref(json);
    return node;
}

static struct backend *coroutine_fn backend_on(struct node *node)
{
    struct backend *backend = backend_create(graph, "test");
    g_assert_cmpint(backend_attach(backend, node, ACCESS_ALL, NULL), ==, 0);
    return backend;
}

static void coroutine_fn begin(void)
{
    graph = graph_create();
    directory = g_dir_make_tmp("filter-test-XXXXXX", NULL);
    g_assert_nonnull(directory);
}

static void coroutine_fn end(struct backend *backend, const char *path)
{
    backend_destroy(backend);
    graph_delete_all(graph);
    graph_destroy(graph);
    g_unlink(path);
    g_rmdir(directory);
    g_clear_pointer(&directory, g_free);
}

static void coroutine_fn create(const struct driver *driver, const char *format, ...) G_GNUC_PRINTF(2, 3);
static void coroutine_fn create(const struct driver *driver, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    g_autofree char *text = g_strdup_vprintf(format, arguments);
    va_end(arguments);
    struct blockdev_create_options *options = NULL;
    json_t *json = json_loads(text, 0, NULL);
    g_assert_nonnull(json);
    g_assert_cmpint(blockdev_create_options_from_json(json, NULL, &options, NULL), ==, 0);
    json_decref(json);
    g_assert_cmpint(driver->image->create(graph, options, NULL), ==, 0);
    blockdev_create_options_free(options);
}

/* --- compress --- */

struct world {
    struct backend *backend;
    struct range_lock ranges;
    struct co_group workers;
    uint64_t random;
    uint8_t *model;
};

static void coroutine_fn operate(struct world *world, uint64_t offset, uint64_t bytes, unsigned what)
{
    g_autofree uint8_t *data = g_malloc(bytes);
    struct iovec iov = {data, bytes};
    if (what < 5) {
        memset(data, what == 4 ? 0 : 1 + seeded_next(&world->random) % 255, bytes);
        g_assert_cmpint(backend_write(world->backend, offset, bytes, buffers_one(&iov), 0), ==, 0);
        memcpy(world->model + offset, data, bytes);
    } else if (what < 8) {
        g_assert_cmpint(backend_read(world->backend, offset, bytes, buffers_one(&iov), 0), ==, 0);
        g_assert_true(memcmp(data, world->model + offset, bytes) == 0);
    } else {
        g_assert_cmpint(backend_write_zeroes(world->backend, offset, bytes, what == 8 ? REQUEST_MAY_UNMAP : 0), ==, 0);
        memset(world->model + offset, 0, bytes);
    }
}

static void coroutine_fn worker_main(void *argument)
{
    struct world *world = argument;
    for (unsigned i = 0; i < OPERATIONS; i++) {
        struct range_hold hold;
        uint64_t offset = seeded_next(&world->random) % SIZE;
        uint64_t most = seeded_next(&world->random) % 4 ? 9000 : 70000;
        uint64_t bytes = 1 + seeded_next(&world->random) % min_u64(most, SIZE - offset);
        unsigned what = seeded_next(&world->random) % 10;
        range_lock_acquire(&world->ranges, &hold, offset, bytes, false);
        operate(world, offset, bytes, what);
        range_lock_release(&world->ranges, &hold);
    }
    co_group_leave(&world->workers);
}

static uint64_t coroutine_fn count_compressed(struct backend *backend)
{
    uint64_t bytes = 0;
    for (uint64_t offset = 0; offset < SIZE;) {
        struct extent extent;
        g_assert_cmpint(backend_block_status(backend, NULL, offset, SIZE - offset, &extent), ==, 0);
        bytes += extent.flags & EXTENT_COMPRESSED ? extent.bytes : 0;
        offset += extent.bytes;
    }
    return bytes;
}

static void coroutine_fn run_workers(struct world *world)
{
    range_lock_init(&world->ranges);
    co_group_init(&world->workers);
    for (unsigned i = 0; i < WORKERS; i++) {
        co_group_enter(&world->workers);
        loop_spawn(loop_self(), worker_main, world);
    }
    co_group_wait(&world->workers);
    co_group_destroy(&world->workers);
    range_lock_destroy(&world->ranges);
    operate(world, 0, SIZE, 7);
}

static void coroutine_fn compress_case(const char *options, uint64_t seed)
{
    begin();
    struct world world = {.random = seed, .model = g_malloc0(SIZE)};
    g_autofree char *path = g_build_filename(directory, "image", NULL);
    create(&driver_file, "{\"driver\":\"file\",\"filename\":\"%s\",\"size\":0}", path);
    create(&driver_qcow2, "{\"driver\":\"qcow2\",\"size\":%u,\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}%s}",
           SIZE, path, options);
    world.backend = backend_on(add(NULL,
                                   "{\"driver\":\"compress\",\"node-name\":\"c\",\"file\":{\"driver\":\"qcow2\","
                                   "\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}}",
                                   path));
    /* Whole clusters and parts of new ones come to be compressed; what is there is written plain. */
    operate(&world, 0, 65536, 0);
    operate(&world, 80000, 10, 0);
    uint64_t compressed = count_compressed(world.backend);
    g_assert_cmpuint(compressed, >, 65536);
    operate(&world, 100, 10, 1);
    g_assert_cmpuint(count_compressed(world.backend), <, compressed);
    operate(&world, 0, SIZE, 7);
    run_workers(&world);
    g_free(world.model);
    end(world.backend, path);
}

/* Somebody else stores in the image meanwhile what it shows: a cluster may get its place between the filter's look and
 * its write. */
static void coroutine_fn compress_under_copy_on_read(uint64_t seed)
{
    begin();
    struct world world = {.random = seed, .model = g_malloc(SIZE)};
    g_autofree char *path = g_build_filename(directory, "image", NULL);
    g_autofree char *below = g_build_filename(directory, "below", NULL);
    memset(world.model, 77, SIZE);
    g_assert_true(g_file_set_contents(below, (char *)world.model, SIZE, NULL));
    create(&driver_file, "{\"driver\":\"file\",\"filename\":\"%s\",\"size\":0}", path);
    create(&driver_qcow2, "{\"driver\":\"qcow2\",\"size\":%u,\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}", SIZE,
           path);
    world.backend =
        backend_on(add(NULL,
                       "{\"driver\":\"copy-on-read\",\"node-name\":\"r\",\"file\":{\"driver\":\"compress\",\"file\":"
                       "{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"%s\"},\"backing\":"
                       "{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}}}}",
                       path, below));
    run_workers(&world);
    g_free(world.model);
    g_unlink(below);
    end(world.backend, path);
}

static void coroutine_fn compressing(void *unused)
{
    compress_case("", 1);
    compress_case(",\"cluster-size\":4096,\"compression-type\":\"zstd\"", 2);
    compress_case(",\"cluster-size\":512", 3);
}

static void coroutine_fn compressing_beside_others(void *unused)
{
    for (uint64_t seed = 1; seed <= 5; seed++) {
        compress_under_copy_on_read(seed);
    }
}

static void coroutine_fn compressing_what_cannot(void *unused)
{
    auto_error error = NULL;
    begin();
    g_autofree char *path = g_build_filename(directory, "image", NULL);
    create(&driver_file, "{\"driver\":\"file\",\"filename\":\"%s\",\"size\":65536}", path);
    g_assert_null(add(&error,
                      "{\"driver\":\"compress\",\"node-name\":\"c\",\"file\":{\"driver\":\"raw\",\"file\":"
                      "{\"driver\":\"file\",\"filename\":\"%s\"}}}",
                      path));
    g_assert_nonnull(strstr(error->message, "the format 'raw' of"));
    end(NULL, path);
}

/* --- preallocate --- */

static uint64_t size_of(const char *path)
{
    GStatBuf status;
    g_assert_cmpint(g_stat(path, &status), ==, 0);
    return status.st_size;
}

static void coroutine_fn put(struct backend *backend, uint64_t offset, int value)
{
    char data[100];
    struct iovec iov = {data, sizeof(data)};
    memset(data, value, sizeof(data));
    g_assert_cmpint(edge_write(backend_edge(backend), offset, sizeof(data), buffers_one(&iov), 0), ==, 0);
}

static void coroutine_fn reserving(void *unused)
{
    begin();
    g_autofree char *path = g_build_filename(directory, "file", NULL);
    create(&driver_file, "{\"driver\":\"file\",\"filename\":\"%s\",\"size\":1000}", path);
    struct backend *backend =
        backend_on(add(NULL,
                       "{\"driver\":\"preallocate\",\"node-name\":\"p\",\"prealloc-size\":50000,"
                       "\"prealloc-align\":4096,\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}",
                       path));
    g_assert_cmpuint(backend_size(backend), ==, 1000);
    put(backend, 900, 1); /* inside: nothing is reserved */
    g_assert_cmpuint(size_of(path), ==, 1000);
    put(backend, 1000, 2);
    g_assert_cmpuint(backend_size(backend), ==, 1100);
    g_assert_cmpuint(size_of(path), ==, align_up(51100, 4096));
    put(backend, 20000, 3); /* into what is reserved */
    g_assert_cmpuint(backend_size(backend), ==, 20100);
    g_assert_cmpuint(size_of(path), ==, align_up(51100, 4096));
    char data[30000];
    g_assert_cmpint(edge_read_memory(backend_edge(backend), 1000, data, sizeof(data)), ==, 0);
    for (unsigned i = 0; i < sizeof(data); i++) {
        g_assert_cmpint(data[i], ==, i < 100 ? 2 : i >= 19000 && i < 19100 ? 3 : 0);
    }
    g_assert_cmpint(backend_write_zeroes(backend, 0, 10, 0), ==, 0);
    g_assert_cmpint(backend_truncate(backend, 30000, NULL), ==, 0); /* into the surplus, too */
    g_assert_cmpuint(backend_size(backend), ==, 30000);
    g_assert_cmpint(backend_truncate(backend, 5000, NULL), ==, 0);
    g_assert_cmpuint(size_of(path), ==, 5000);
    put(backend, 70000, 4);
    g_assert_cmpuint(size_of(path), >, 70100);
    g_assert_cmpint(edge_grow(backend_edge(backend), 200000, PREALLOCATION_MODE_FALLOC, NULL), ==, 0);
    g_assert_cmpuint(size_of(path), ==, 200000);
    put(backend, 200000, 5);
    g_assert_cmpuint(size_of(path), >, 200100);
    backend_destroy(backend);
    g_assert_cmpint(graph_delete(graph, "p", NULL), ==, 0);
    g_assert_cmpuint(size_of(path), ==, 200100); /* the surplus is gone */
    end(NULL, path);
}

/* Under a format, and with a file that cannot be reserved for. */
static void coroutine_fn reserving_for_images(void *unused)
{
    auto_error error = NULL;
    begin();
    g_autofree char *path = g_build_filename(directory, "image", NULL);
    create(&driver_file, "{\"driver\":\"file\",\"filename\":\"%s\",\"size\":0}", path);
    create(&driver_qcow2, "{\"driver\":\"qcow2\",\"size\":1048576,\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}",
           path);
    uint64_t empty = size_of(path);
    struct backend *backend =
        backend_on(add(NULL,
                       "{\"driver\":\"qcow2\",\"node-name\":\"q\",\"file\":{\"driver\":\"preallocate\","
                       "\"prealloc-size\":10485760,\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}}",
                       path));
    put(backend, 0, 1);
    g_assert_cmpuint(size_of(path), >=, empty + 10485760);
    g_assert_cmpuint(size_of(path) % 1048576, ==, 0);
    backend_destroy(backend);
    g_assert_cmpint(graph_delete(graph, "q", NULL), ==, 0);
    g_assert_cmpuint(size_of(path), <, empty + 200000);
    g_assert_null(add(&error,
                      "{\"driver\":\"preallocate\",\"node-name\":\"p\",\"prealloc-align\":1000,"
                      "\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}",
                      path));
    g_assert_nonnull(strstr(error->message, "prealloc-align"));
    end(NULL, path);
}

static void run(gconstpointer test)
{
    struct loop *loop;
    g_assert_no_errno(loop_create(ENGINE_AUTO, &loop, NULL));
    loop_run_coroutine(loop, (void (*)(void *))test, NULL);
    loop_destroy(loop);
}

int main(int argc, char **argv)
{
    static const struct driver *const drivers[] = {&driver_file,     &driver_raw,          &driver_qcow2,
                                                   &driver_compress, &driver_copy_on_read, &driver_preallocate};
    g_test_init(&argc, &argv, NULL);
    for (unsigned i = 0; i < G_N_ELEMENTS(drivers); i++) {
        driver_register(drivers[i]);
    }
    g_test_add_data_func("/filter/compress/random", compressing, run);
    g_test_add_data_func("/filter/compress/beside-copy-on-read", compressing_beside_others, run);
    g_test_add_data_func("/filter/compress/refused", compressing_what_cannot, run);
    g_test_add_data_func("/filter/preallocate/file", reserving, run);
    g_test_add_data_func("/filter/preallocate/image", reserving_for_images, run);
    return g_test_run();
}

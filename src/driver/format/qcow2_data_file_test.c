/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * External data files: which ones are opened and which refused, that a raw one is right for who knows nothing of qcow2
 * after every single request, that tables which point elsewhere are not believed; and growth with preallocation, beside
 * the peer's, for images with and without a data file. Random operations and power cuts are in qcow2_interop_test.c and
 * qcow2_crash_test.c.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_create.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib/gstdio.h>
#include <string.h>

enum { CLUSTER = 64 << 10, SIZE = 32 * CLUSTER };

struct bench {
    struct memory_disk *disk, *data;
    struct graph *graph;
    struct node *disk_node, *data_node, *node;
    struct backend *backend;
};

static void coroutine_fn bench_create(struct bench *bench, bool raw, const char *name)
{
    *bench = (struct bench){.graph = graph_create(),
                            .disk = memory_disk_create(NULL, 0, 64 * MiB),
                            .data = memory_disk_create(NULL, 0, 64 * MiB)};
    bench->data->zeroes = true;
    bench->disk_node = memory_disk_open(bench->disk, bench->graph, "disk");
    bench->data_node = memory_disk_open(bench->data, bench->graph, "data");
    struct backend *disk = testing_backend(bench->graph, bench->disk_node);
    struct backend *data = testing_backend(bench->graph, bench->data_node);
    struct qcow2_create_options options = {.size = SIZE, .cluster_bits = 16, .data_raw = raw, .data_name = name};
    options.data = name ? backend_edge(data) : NULL;
    g_assert_no_errno(qcow2_create(backend_edge(disk), &options, NULL));
    backend_destroy(data);
    backend_destroy(disk);
}

static void coroutine_fn bench_open(struct bench *bench, const char *options)
{
    bench->node =
        testing_add(bench->graph, NULL,
                    "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"file\":\"disk\",\"data-file\":\"data\"%s}", options);
    bench->backend = testing_backend(bench->graph, bench->node);
}

static void coroutine_fn bench_close(struct bench *bench)
{
    backend_destroy(bench->backend);
    g_assert_no_errno(graph_delete(bench->graph, "top", NULL));
}

static void coroutine_fn bench_destroy(struct bench *bench)
{
    node_release(bench->data_node);
    node_release(bench->disk_node);
    graph_destroy(bench->graph);
    memory_disk_destroy(bench->disk);
    memory_disk_destroy(bench->data);
}

static void coroutine_fn assert_refused(struct bench *bench, const char *words, const char *options)
{
    auto_error error = NULL;
    struct node *node =
        testing_add(bench->graph, &error, "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"file\":\"disk\"%s}", options);
    g_assert_null(node);
    if (!strstr(error->message, words)) {
        g_error("'%s' says nothing of '%s'", error->message, words);
    }
}

/* --- which files are opened --- */

static void coroutine_fn run_refusals(void *argument)
{
    struct bench bench;
    bench_create(&bench, false, NULL);
    assert_refused(&bench, "can only be set for images with an external data file", ",\"data-file\":\"data\"");
    bench_destroy(&bench);
    static const struct {
        const char *name, *words;
    } names[] = {
        {"nbd://somewhere/x", "protocol 'nbd'"},
        {"json:{\"driver\":\"null-co\"}", "protocol 'json'"},
        {"/nonexistent/data", "/nonexistent/data"},
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(names); i++) {
        bench_create(&bench, false, names[i].name);
        assert_refused(&bench, names[i].words, "");
        bench_open(&bench, ""); /* what the user says counts, not what the header says */
        bench_close(&bench);
        bench_destroy(&bench);
    }
    /* Without a name: the bit, and no extension. */
    bench_create(&bench, false, NULL);
    bench.disk->now->data[offsetof(struct qcow2_disk_header, incompatible_features) + 7] |=
        QCOW2_INCOMPATIBLE_DATA_FILE;
    assert_refused(&bench, "'data-file' is required", "");
    bench_destroy(&bench);
}

static void coroutine_fn run_itself(void *argument)
{
    const char *folder = testing_directory();
    struct bench bench;
    bench_create(&bench, false, "image.qcow2");
    g_autofree char *path = g_strdup_printf("%s/image.qcow2", folder);
    gboolean good = g_file_set_contents(path, (char *)bench.disk->now->data, bench.disk->now->len, NULL);
    g_assert_true(good);
    bench_destroy(&bench);
    struct graph *graph = graph_create();
    for (unsigned writable = 0; writable < 2; writable++) {
        auto_error error = NULL;
        struct node *node = testing_add(graph, &error,
                                        "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"read-only\":%s,\"file\":{"
                                        "\"driver\":\"file\",\"filename\":\"%s\",\"locking\":\"off\"}}",
                                        writable ? "false" : "true", path);
        g_assert_null(node);
        g_assert_true(writable || strstr(error->message, "names itself as its data file"));
    }
    graph_destroy(graph);
    testing_remove_directory();
}

/* --- a raw data file --- */

static void assert_raw(const struct bench *bench, const uint8_t *model, uint64_t size)
{
    g_assert_cmpuint(bench->data->now->len, >=, size);
    g_assert_cmpint(memcmp(bench->data->now->data, model, size), ==, 0);
}

static void coroutine_fn random_request(struct bench *bench, uint8_t *model, uint64_t size)
{
    uint64_t offset = g_test_rand_int_range(0, size);
    uint64_t bytes = min_u64(g_test_rand_int_range(1, 3 * CLUSTER), size - offset);
    uint8_t value = g_test_rand_int_range(1, 256);
    int code;
    switch (g_test_rand_int_range(0, 4)) {
    case 0:
        memset(model + offset, 0, bytes);
        code = backend_write_zeroes(bench->backend, offset, bytes, g_test_rand_bit() ? REQUEST_MAY_UNMAP : 0);
        break;
    case 1:
        memset(model + offset, 0, bytes); /* the disk's holes read so */
        code = backend_discard(bench->backend, offset, bytes);
        break;
    default: {
        memset(model + offset, value, bytes);
        struct iovec iov = {model + offset, bytes};
        code = backend_write(bench->backend, offset, bytes, buffers_one(&iov), 0);
        break;
    }
    }
    g_assert_cmpint(code, ==, 0);
}

static void coroutine_fn run_raw(void *argument)
{
    struct bench bench;
    g_autofree uint8_t *model = g_malloc0(SIZE);
    g_autofree uint8_t *data = g_malloc(SIZE);
    bench_create(&bench, true, "data");
    bench_open(&bench, ",\"discard\":\"unmap\"");
    assert_raw(&bench, model, SIZE);
    for (unsigned i = 0; i < 300; i++) {
        random_request(&bench, model, SIZE);
        assert_raw(&bench, model, SIZE);
    }
    struct iovec iov = {data, SIZE};
    g_assert_no_errno(backend_read(bench.backend, 0, SIZE, buffers_one(&iov), 0));
    g_assert_cmpint(memcmp(data, model, SIZE), ==, 0);
    bench_close(&bench);
    /* What a raw writer did shows, for every cluster has its place; and the bit that promises it is still there. */
    memset(bench.data->now->data, 0x5a, SIZE);
    bench_open(&bench, "");
    g_assert_no_errno(backend_read(bench.backend, 0, SIZE, buffers_one(&iov), 0));
    memset(model, 0x5a, SIZE);
    g_assert_cmpint(memcmp(data, model, SIZE), ==, 0);
    const struct qcow2 *image = bench.node->state;
    g_assert_true(image->header.autoclear & QCOW2_AUTOCLEAR_RAW_DATA_FILE);
    bench_close(&bench);
    bench_destroy(&bench);
}

/* --- tables that point elsewhere --- */

static void coroutine_fn run_hostile(void *argument)
{
    static const uint64_t entries[] = {
        QCOW2_COPIED | 5 * CLUSTER,     /* of cluster 1: another one's place */
        QCOW2_COMPRESSED | 0x50123,     /* nothing is compressed there */
        QCOW2_COPIED | (CLUSTER + 512), /* no cluster's place */
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(entries); i++) {
        struct bench bench;
        uint8_t byte = 1;
        struct iovec iov = {&byte, 1};
        bench_create(&bench, false, "data");
        bench_open(&bench, "");
        g_assert_no_errno(backend_write(bench.backend, CLUSTER, 1, buffers_one(&iov), REQUEST_FUA));
        const struct qcow2 *image = bench.node->state;
        uint64_t table = image->l1[0] & QCOW2_OFFSET_MASK;
        bench_close(&bench);
        uint64_t disk = htobe64(entries[i]);
        memcpy(bench.disk->now->data + table + 8, &disk, 8);
        bench_open(&bench, "");
        g_assert_cmpint(backend_read(bench.backend, CLUSTER, 1, buffers_one(&iov), 0), ==, -EIO);
        g_assert_cmpint(backend_write(bench.backend, CLUSTER, 1, buffers_one(&iov), 0), ==, -EIO);
        bench_close(&bench);
        bench_destroy(&bench);
    }
}

/* --- growth --- */

struct growth {
    const char *path, *mode;
    uint64_t size;
};

static void coroutine_fn run_growth(void *argument)
{
    const struct growth *growth = argument;
    enum preallocation_mode mode;
    struct graph *graph = graph_create();
    g_assert_no_errno(preallocation_mode_parse(growth->mode, &mode, NULL));
    struct node *node = testing_add(
        graph, NULL, "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}",
        growth->path);
    graph_lock(graph);
    g_assert_no_errno(node->driver->image->grow(node, growth->size, mode, NULL));
    graph_unlock(graph);
    g_assert_no_errno(graph_delete(graph, "top", NULL));
    graph_destroy(graph);
}

static struct loop *loop;

static void grow_beside_peer(const char *options, const char *mode)
{
    const char *folder = testing_directory();
    g_autofree char *path = g_strdup_printf("%s/a.qcow2", folder);
    g_autofree char *raw = g_strdup_printf("%s/a.raw", folder);
    struct growth growth = {path, mode, 40 * MiB + 512};
    g_test_message("%s, grown with %s", *options ? options : "no options", mode);
    testing_run(true, "qemu-img create -q -f qcow2 -o cluster_size=64k%s %s 1000k", options, path);
    testing_run(true, "qemu-io -f qcow2 -c \"write -P 3 0 1000k\" %s", path);
    loop_run_coroutine(loop, run_growth, &growth);
    testing_run(true, "qemu-img check -q -f qcow2 %s", path);
    testing_run(true, "qemu-io -r -f qcow2 -c \"read -P 3 0 1000k\" -c \"read -P 0 1000k 39960k\" %s", path);
    /* Every cluster of the new area has a place: writing there takes no more room. */
    GStatBuf before;
    GStatBuf after;
    g_assert_no_errno(g_stat(path, &before));
    testing_run(true, "qemu-io -f qcow2 -c \"write -P 4 20M 4M\" %s", path);
    g_assert_no_errno(g_stat(path, &after));
    g_assert_cmpint(before.st_size, ==, after.st_size);
    if (g_str_equal(mode, "full") && !*options) {
        g_assert_cmpint(before.st_blocks * 512, >=, growth.size - 1 * MiB);
    }
    testing_remove_directory();
}

static void test_growth(void)
{
    if (!testing_have_peer()) {
        return;
    }
    grow_beside_peer("", "metadata");
    grow_beside_peer("", "falloc");
    grow_beside_peer("", "full");
    grow_beside_peer(",extended_l2=on", "metadata");
    g_autofree char *data = g_strdup_printf(",data_file=%s/a.raw", testing_directory());
    grow_beside_peer(data, "metadata");
    g_autofree char *raw = g_strdup_printf(",data_file_raw=on,data_file=%s/a.raw", testing_directory());
    grow_beside_peer(raw, "off");
    testing_remove_directory();
}

static void test_refusals(void)
{
    loop_run_coroutine(loop, run_refusals, NULL);
}

static void test_itself(void)
{
    loop_run_coroutine(loop, run_itself, NULL);
}

static void test_raw(void)
{
    loop_run_coroutine(loop, run_raw, NULL);
}

static void test_hostile(void)
{
    loop_run_coroutine(loop, run_hostile, NULL);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    testing_register_drivers();
    g_assert_no_errno(loop_create(ENGINE_AUTO, &loop, NULL));
    g_test_add_func("/qcow2-data-file/refusals", test_refusals);
    g_test_add_func("/qcow2-data-file/itself", test_itself);
    g_test_add_func("/qcow2-data-file/raw", test_raw);
    g_test_add_func("/qcow2-data-file/hostile", test_hostile);
    g_test_add_func("/qcow2-data-file/growth", test_growth);
    int code = g_test_run();
    loop_destroy(loop);
    return code;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Unit tests of the qcow2 driver that need no peer: refcount packing, the header parser against a table of bad
 * headers, what L2 entries mean, and, over a memory disk, what an image does when it is grown, given another backing
 * string, found corrupt, left dirty, or made writable and read-only again.
 */
#include "base/size.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_create.h"
#include "driver/format/qcow2_map.h"
#include "driver/format/qcow2_refcount.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include <endian.h>
#include <errno.h>
#include <string.h>

static void test_refcount_packing(void)
{
    for (unsigned order = 0; order <= 6; order++) {
        unsigned width = 1u << order;
        uint64_t most = width == 64 ? UINT64_MAX : (UINT64_C(1) << width) - 1;
        uint8_t block[512];
        uint64_t count = sizeof(block) * 8 / width;
        uint64_t random = order;
        g_autofree uint64_t *model = g_new0(uint64_t, count);
        memset(block, 0, sizeof(block));
        for (unsigned i = 0; i < 4000; i++) {
            uint64_t index = testing_random(&random) % count;
            model[index] = testing_random(&random) & most;
            qcow2_refcount_store(block, order, index, model[index]);
        }
        for (uint64_t i = 0; i < count; i++) {
            g_assert_cmpuint(qcow2_refcount_load(block, order, i), ==, model[i]);
        }
    }
    uint8_t block[8] = {0};
    qcow2_refcount_store(block, 0, 0, 1); /* the first of a byte is its least significant bit */
    qcow2_refcount_store(block, 1, 5, 2);
    qcow2_refcount_store(block, 4, 1, 0x1234);
    g_assert_cmphex(block[0], ==, 1);
    g_assert_cmphex(block[2], ==, 0x12);
    g_assert_cmphex(block[3], ==, 0x34);
}

static void test_entries(void)
{
    static const struct {
        uint64_t entry;
        unsigned version;
        enum qcow2_kind kind;
    } cases[] = {
        {0, 3, QCOW2_UNALLOCATED},
        {0, 2, QCOW2_UNALLOCATED},
        {1, 3, QCOW2_PLAIN_ZERO},
        {1, 2, QCOW2_INVALID},
        {QCOW2_COPIED | 0x50000, 3, QCOW2_DATA},
        {0x50000, 2, QCOW2_DATA},
        {QCOW2_COPIED | 0x50001, 3, QCOW2_ALLOCATED_ZERO},
        {QCOW2_COPIED | 0x50001, 2, QCOW2_INVALID},
        {QCOW2_COPIED | 0x50200, 3, QCOW2_INVALID},
        {QCOW2_COPIED | 0x50002, 3, QCOW2_INVALID},
        {QCOW2_COPIED | UINT64_C(1) << 56 | 0x50000, 3, QCOW2_INVALID},
        {QCOW2_COMPRESSED | 0x50123, 3, QCOW2_COMPRESSED_DATA},
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        struct node node = {0};
        struct qcow2 image = {.node = &node,
                              .cluster_bits = 16,
                              .subcluster_bits = 16,
                              .cluster_size = 64 << 10,
                              .entry_bits = 3,
                              .header.version = cases[i].version};
        g_assert_cmpint(qcow2_entry_kind(&image, (struct qcow2_entry){cases[i].entry, 0}), ==, cases[i].kind);
    }
    uint64_t offset;
    uint64_t bytes;
    qcow2_compressed_place(16, QCOW2_COMPRESSED | UINT64_C(3) << 54 | 0x12345, &offset, &bytes);
    g_assert_cmphex(offset, ==, 0x12345);
    g_assert_cmpuint(bytes, ==, 4 * 512 - 0x145);
}

/* --- headers --- */

struct patch {
    unsigned at, width; /* bytes */
    uint64_t value;
};
struct bad_header {
    const char *why; /* must be in the message; NULL: must be accepted */
    struct patch patches[4];
    uint64_t file_size; /* 0: 1 MiB */
};

#define PATCH(member, value)                                                                               \
    {                                                                                                      \
        offsetof(struct qcow2_disk_header, member), sizeof(((struct qcow2_disk_header *)0)->member), value \
    }

static const struct bad_header bad_headers[] = {
    {NULL, {{0}}},
    {"not in qcow2 format", {PATCH(magic, 0x514649fa)}},
    {"not in qcow2 format", {{0}}, 40},
    {"version 1", {PATCH(version, 1)}},
    {"version 4", {PATCH(version, 4)}},
    {"truncated", {{0}}, 90},
    {"cluster size", {PATCH(cluster_bits, 8)}},
    {"cluster size", {PATCH(cluster_bits, 22)}},
    {"cluster size", {PATCH(cluster_bits, 0xffffffff)}},
    {NULL, {PATCH(crypt_method, 1)}},
    {NULL, {PATCH(crypt_method, 2)}},
    {"unknown method", {PATCH(crypt_method, 7)}},
    {"header length", {PATCH(header_length, 96)}},
    {"header length", {PATCH(header_length, 107)}},
    {"exceeds the cluster", {PATCH(header_length, 0x10008)}},
    {"entry width", {PATCH(refcount_order, 7)}},
    {"entry width", {PATCH(refcount_order, 0x80000000)}},
    {"does not contain a reference count table", {PATCH(refcount_table_clusters, 0)}},
    {"reference count table is too large", {PATCH(refcount_table_clusters, 129)}},
    {"reference count table is too large", {PATCH(refcount_table_clusters, 0xffffffff)}},
    {"reference count table offset", {PATCH(refcount_table_offset, 0x10200)}},
    {"overlaps the header", {PATCH(refcount_table_offset, 0)}},
    {"behind the end", {PATCH(refcount_table_offset, 0x7fffffffffff0000)}},
    {"behind the end", {PATCH(refcount_table_offset, 0x100000)}},
    {"virtual size", {PATCH(size, UINT64_MAX)}},
    {"virtual size", {PATCH(size, INT64_MAX)}},
    {"too large for clusters", {PATCH(size, UINT64_C(1) << 62)}},
    {"too small", {PATCH(size, UINT64_C(1) << 40)}},
    {"active L1 table is too large", {PATCH(l1_size, 0xffffffff)}},
    {"active L1 table is too large", {PATCH(l1_size, 4194305)}},
    {"behind the end", {PATCH(l1_size, 4194304)}},
    {"too small", {PATCH(l1_size, 0)}},
    {"L1 table offset", {PATCH(l1_table_offset, 0x30008)}},
    {"overlaps the header", {PATCH(l1_table_offset, 0)}},
    {"behind the end", {PATCH(l1_table_offset, UINT64_C(1) << 50)}},
    {"behind the end", {PATCH(l1_table_offset, 0xffffffffffff0000)}},
    {"L1 table overlaps", {PATCH(l1_table_offset, 0x10000)}},
    {"snapshot table is too large", {PATCH(snapshot_count, 65537), PATCH(snapshots_offset, 0x40000)}},
    {"snapshot table offset", {PATCH(snapshot_count, 1), PATCH(snapshots_offset, 0x40001)}},
    {"snapshot table", {PATCH(snapshot_count, 60000), PATCH(snapshots_offset, 0x40000)}},
    {"backing file name is too long", {PATCH(backing_file_offset, 0x200), PATCH(backing_file_size, 1024)}},
    {"outside of the header", {PATCH(backing_file_offset, 0xffff), PATCH(backing_file_size, 2)}},
    {"outside of the header", {PATCH(backing_file_offset, UINT64_MAX), PATCH(backing_file_size, 8)}},
    {"outside of the header", {PATCH(backing_file_offset, 8), PATCH(backing_file_size, 8)}},
    {NULL, {PATCH(backing_file_offset, 0x200), PATCH(backing_file_size, 3)}},
    /* A name right behind the fixed part: there are no extensions. */
    {NULL, {PATCH(backing_file_offset, 112), PATCH(backing_file_size, 8), {112, 4, 0x2f612f62}, {116, 4, 0x2f632f64}}},
    {NULL, {PATCH(incompatible_features, 4)}},
    {NULL, {PATCH(incompatible_features, 16)}},
    {"16 KiB at least", {PATCH(incompatible_features, 16), PATCH(cluster_bits, 13)}},
    {"a feature from the future", {PATCH(incompatible_features, 64)}},
    {"unknown incompatible feature (bit 63)", {PATCH(incompatible_features, UINT64_C(1) << 63)}},
    {NULL, {PATCH(incompatible_features, 8), PATCH(compression_type, 1)}},
    {"compression type 9", {PATCH(incompatible_features, 8), PATCH(compression_type, 9)}},
    {"contradicts", {PATCH(incompatible_features, 8)}},
    {"contradicts", {PATCH(compression_type, 1)}},
    {NULL, {PATCH(incompatible_features, 3)}},
    {NULL, {PATCH(compatible_features, UINT64_MAX), PATCH(autoclear_features, UINT64_MAX)}},
    {"too long", {{112, 4, 0x12345678}, {116, 4, 0xfffffff0}}},
    {"too long", {{112, 4, 0x12345678}, {116, 4, 0x10000}}},
    {"backing format name is too long", {{112, 4, QCOW2_EXTENSION_BACKING_FORMAT}, {116, 4, 16}}},
    {"bitmaps extension", {{112, 4, QCOW2_EXTENSION_BITMAPS}, {116, 4, 16}}},
    {NULL, {{112, 4, QCOW2_EXTENSION_ENCRYPTION}, {116, 4, 16}, {136, 4, 0}, {140, 4, 0}}},
    {"encryption header extension", {{112, 4, QCOW2_EXTENSION_ENCRYPTION}, {116, 4, 8}}},
};

static void patch(uint8_t *data, const struct patch *patch)
{
    for (unsigned i = 0; i < patch->width; i++) {
        data[patch->at + i] = patch->value >> (patch->width - 1 - i) * 8;
    }
}

static void good_header(uint8_t *data)
{
    static const struct patch good[] = {
        PATCH(magic, QCOW2_MAGIC),
        PATCH(version, 3),
        PATCH(cluster_bits, 16),
        PATCH(size, 64 << 20),
        PATCH(l1_size, 1),
        PATCH(l1_table_offset, 0x30000),
        PATCH(refcount_table_offset, 0x10000),
        PATCH(refcount_table_clusters, 1),
        PATCH(refcount_order, 4),
        PATCH(header_length, 112),
        {112, 4, QCOW2_EXTENSION_FEATURE_NAMES},
        {116, 4, 48},
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(good); i++) {
        patch(data, &good[i]);
    }
    data[121] = 6; /* an incompatible feature, bit 6 */
    memcpy(data + 122, "a feature from the future", 25);
}

static void test_headers(void)
{
    g_autofree uint8_t *data = g_malloc(65536);
    for (unsigned i = 0; i < G_N_ELEMENTS(bad_headers); i++) {
        const struct bad_header *bad = &bad_headers[i];
        struct qcow2_header header;
        auto_error error = NULL;
        memset(data, 0, 65536);
        good_header(data);
        for (unsigned n = 0; n < G_N_ELEMENTS(bad->patches) && bad->patches[n].width; n++) {
            patch(data, &bad->patches[n]);
        }
        int code = qcow2_header_parse(data, 65536, bad->file_size ? bad->file_size : 1 * MiB, &header, &error);
        if (bad->why && (code == 0 || !strstr(error->message, bad->why))) {
            g_error("header %u: expected '%s', got '%s'", i, bad->why, error ? error->message : "success");
        }
        if (!bad->why) {
            g_assert_no_errno(code);
            qcow2_header_clear(&header);
        }
    }
}

/* The header of every cluster size takes every length of backing string that has room, and reads it back. */
static void test_header_building(void)
{
    for (unsigned cluster_bits = 9; cluster_bits <= 16; cluster_bits++) {
        uint64_t cluster_size = (uint64_t)1 << cluster_bits;
        for (unsigned length = 1; length <= QCOW2_BACKING_NAME_MAX; length += 17) {
            g_autofree uint8_t *data = g_malloc0(65536);
            g_autofree char *name = g_strnfill(length, 'n');
            struct qcow2_header header;
            struct qcow2_header again;
            uint64_t offset;
            good_header(data);
            struct patch bits = PATCH(cluster_bits, cluster_bits);
            struct patch size = PATCH(size, cluster_size * 8);
            patch(data, &bits);
            patch(data, &size);
            g_assert_no_errno(qcow2_header_parse(data, 65536, 1 * MiB, &header, NULL));
            memset(data, 0, 65536);
            int code = qcow2_header_build(&header, name, "qcow2", data, &offset);
            qcow2_header_clear(&header);
            if (code == -ENOSPC && length + 112 + 16 + 8 > cluster_size) {
                continue;
            }
            g_assert_no_errno(code);
            g_assert_no_errno(qcow2_header_parse(data, cluster_size, 1 * MiB, &again, NULL));
            g_assert_cmpstr(again.backing_file, ==, name);
            g_assert_cmpstr(again.backing_format, ==, "qcow2");
            qcow2_header_clear(&again);
        }
    }
}

/* --- images on a memory disk --- */

struct bench {
    struct memory_disk *disk;
    struct graph *graph;
    struct node *disk_node, *node;
    struct backend *backend;
};

static void coroutine_fn bench_open(struct bench *bench, const char *options)
{
    bench->node =
        testing_add(bench->graph, NULL, "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"file\":\"disk\"%s}", options);
    bench->backend = testing_backend(bench->graph, bench->node);
}

static void coroutine_fn bench_close(struct bench *bench)
{
    backend_destroy(bench->backend);
    g_assert_no_errno(graph_delete(bench->graph, "top", NULL));
}

static void coroutine_fn bench_create(struct bench *bench, const struct qcow2_create_options *options)
{
    bench->disk = memory_disk_create(NULL, 0, 64 * MiB);
    bench->graph = graph_create();
    bench->disk_node = memory_disk_open(bench->disk, bench->graph, "disk");
    struct backend *backend = testing_backend(bench->graph, bench->disk_node);
    g_assert_no_errno(qcow2_create(backend_edge(backend), options, NULL));
    backend_destroy(backend);
}

static void coroutine_fn bench_destroy(struct bench *bench)
{
    node_release(bench->disk_node);
    graph_destroy(bench->graph);
    memory_disk_destroy(bench->disk);
}

static int coroutine_fn put(struct bench *bench, uint64_t offset, uint8_t value, uint64_t bytes)
{
    g_autofree uint8_t *data = g_malloc(bytes);
    memset(data, value, bytes);
    struct iovec iov = {data, bytes};
    return backend_write(bench->backend, offset, bytes, buffers_one(&iov), 0);
}

/* The value that all `bytes` have, or a negative errno; aborts when they differ. */
static int coroutine_fn get(struct bench *bench, uint64_t offset, uint64_t bytes)
{
    g_autofree uint8_t *data = g_malloc(bytes);
    struct iovec iov = {data, bytes};
    int code = backend_read(bench->backend, offset, bytes, buffers_one(&iov), 0);
    for (uint64_t i = 1; code == 0 && i < bytes; i++) {
        g_assert_cmphex(data[i], ==, data[0]);
    }
    return code < 0 ? code : data[0];
}

static uint64_t disk_word(const struct bench *bench, uint64_t offset)
{
    uint64_t word;
    memcpy(&word, bench->disk->now->data + offset, 8);
    return be64toh(word);
}

/* If there is a peer. */
static void check_with_peer(const struct bench *bench)
{
    g_autofree char *tool = g_find_program_in_path("qemu-img");
    if (tool) {
        g_autofree char *path = g_strdup_printf("%s/image.qcow2", testing_directory());
        g_file_set_contents(path, (char *)bench->disk->now->data, bench->disk->now->len, NULL);
        testing_run(true, "%s check -q -f qcow2 %s", tool, path);
        testing_remove_directory();
    }
}

/* Grows through several sizes, so that the L1 table moves and the refcount table grows with small clusters. */
static void coroutine_fn try_growing(void *argument)
{
    struct bench bench;
    struct qcow2_create_options options = {.size = 64 * KiB, .cluster_bits = 9, .refcount_bits = 64};
    bench_create(&bench, &options);
    bench_open(&bench, "");
    g_assert_no_errno(put(&bench, 0, 1, 64 * KiB));
    uint64_t size = 64 * KiB;
    while (size < 16 * MiB) {
        size = size * 2 + 512;
        g_assert_no_errno(backend_truncate(bench.backend, size, NULL));
        g_assert_cmpuint(backend_size(bench.backend), ==, size);
        g_assert_no_errno(put(&bench, size - 4096, 2, 4096));
    }
    g_assert_no_errno(put(&bench, 1 * MiB, 3, 4 * MiB));
    bench_close(&bench);
    bench_open(&bench, "");
    g_assert_cmpuint(backend_size(bench.backend), ==, size);
    g_assert_cmpint(get(&bench, 0, 64 * KiB), ==, 1);
    g_assert_cmpint(get(&bench, 1 * MiB, 4 * MiB), ==, 3);
    g_assert_cmpint(get(&bench, size - 4096, 4096), ==, 2);
    g_assert_cmpint(get(&bench, 6 * MiB, 4096), ==, 0);
    /* Shrunk and grown again: what was cut off does not come back. */
    g_assert_no_errno(backend_truncate(bench.backend, 1 * MiB + 512 * 3, NULL));
    g_assert_no_errno(backend_truncate(bench.backend, 8 * MiB, NULL));
    g_assert_cmpint(get(&bench, 1 * MiB, 512 * 3), ==, 3);
    g_assert_cmpint(get(&bench, 1 * MiB + 512 * 3, 7 * MiB - 512 * 3), ==, 0);
    g_assert_cmpint(backend_truncate(bench.backend, UINT64_C(1) << 60, NULL), ==, -EFBIG);
    bench_close(&bench);
    check_with_peer(&bench);
    bench_destroy(&bench);
}

static void coroutine_fn try_backing_strings(void *argument)
{
    struct bench bench;
    struct qcow2_create_options options = {.size = 1 * MiB, .backing_file = "/old", .backing_format = "raw"};
    static const char *const names[] = {"/a/rather/longer/name/of/an/image.qcow2", "x", NULL, "/again"};
    bench_create(&bench, &options);
    for (unsigned i = 0; i < G_N_ELEMENTS(names); i++) {
        bench_open(&bench, ",\"backing\":null");
        g_assert_cmpstr(bench.node->header_backing, ==, i ? names[i - 1] : "/old");
        bench.disk->keeps_log = true;
        const struct driver *driver = bench.node->driver;
        const char *format = names[i] ? "qcow2" : NULL;
        g_assert_no_errno(driver->change_backing(bench.node, names[i], format, NULL));
        g_assert_cmpuint(bench.disk->log->len, ==, 0); /* flushed */
        bench.disk->keeps_log = false;
        bench_close(&bench);
    }
    bench_open(&bench, ",\"backing\":null");
    g_autofree char *long_name = g_strnfill(1024, 'n');
    g_assert_cmpint(bench.node->driver->change_backing(bench.node, long_name, "raw", NULL), ==, -EINVAL);
    bench_close(&bench);
    bench_destroy(&bench);
}

/* Whatever of a change of the names fails, writing or flushing: then what was there is there. */
static void coroutine_fn try_failing_backing_strings(void *argument)
{
    struct bench bench;
    struct qcow2_create_options options = {.size = 1 * MiB, .backing_file = "/old", .backing_format = "raw"};
    int code = -EIO;
    unsigned rounds = 0;
    bench_create(&bench, &options);
    for (; code < 0; rounds++) {
        bench_open(&bench, ",\"backing\":null");
        bench.disk->fail_first = bench.disk->changes + rounds;
        bench.disk->fail_end = bench.disk->fail_first + 1;
        bench.disk->fail_code = -EIO;
        code = bench.node->driver->change_backing(bench.node, "/a/longer/new/name", "qcow2", NULL);
        bench.disk->fail_end = 0;
        bench_close(&bench);
        bench_open(&bench, ",\"backing\":null");
        g_assert_cmpstr(bench.node->header_backing, ==, code == 0 ? "/a/longer/new/name" : "/old");
        bench_close(&bench);
    }
    g_assert_cmpuint(rounds, >, 3);
    bench_destroy(&bench);
}

/* A bad L2 entry: reads of it fail, others go on, writes are refused, and the image is marked. */
static void coroutine_fn try_corruption(void *argument)
{
    struct bench bench;
    struct qcow2_create_options options = {.size = 1 * MiB};
    bench_create(&bench, &options);
    bench_open(&bench, "");
    g_assert_no_errno(put(&bench, 0, 1, 256 * KiB));
    bench_close(&bench);
    uint64_t l1 = disk_word(&bench, offsetof(struct qcow2_disk_header, l1_table_offset));
    uint64_t l2 = disk_word(&bench, l1) & QCOW2_OFFSET_MASK;
    bench.disk->now->data[l2 + 8 + 6] ^= 2; /* the second entry, off its cluster */
    bench_open(&bench, "");
    g_assert_cmpint(get(&bench, 64 * KiB, 4096), ==, -EIO);
    g_assert_cmpint(get(&bench, 0, 4096), ==, 1);
    g_assert_cmpint(get(&bench, 128 * KiB, 128 * KiB), ==, 1);
    g_assert_cmpint(put(&bench, 0, 2, 4096), ==, -EIO);
    bench_close(&bench);
    g_assert_cmphex(disk_word(&bench, offsetof(struct qcow2_disk_header, incompatible_features)), ==, 2);
    struct error *error = NULL;
    struct node *refused =
        testing_add(bench.graph, &error, "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"file\":\"disk\"}");
    g_assert_null(refused);
    g_assert_nonnull(strstr(error->message, "corrupt"));
    error_free(error);
    bench_open(&bench, ",\"read-only\":true");
    g_assert_cmpint(get(&bench, 0, 4096), ==, 1);
    bench_close(&bench);
    bench_destroy(&bench);
}

/* An entry that points at metadata is not written through. */
static void coroutine_fn try_overlap(void *argument)
{
    struct bench bench;
    struct qcow2_create_options options = {.size = 1 * MiB};
    bench_create(&bench, &options);
    bench_open(&bench, "");
    g_assert_no_errno(put(&bench, 0, 1, 64 * KiB));
    bench_close(&bench);
    uint64_t l1 = disk_word(&bench, offsetof(struct qcow2_disk_header, l1_table_offset));
    uint64_t l2 = disk_word(&bench, l1) & QCOW2_OFFSET_MASK;
    uint64_t hostile = htobe64(QCOW2_COPIED | l1);
    memcpy(bench.disk->now->data + l2, &hostile, 8);
    bench_open(&bench, "");
    g_assert_cmpint(put(&bench, 0, 0xff, 4096), ==, -EIO);
    bench_close(&bench);
    g_assert_cmphex(disk_word(&bench, l1) & QCOW2_OFFSET_MASK, ==, l2);
    bench_destroy(&bench);
}

/* Refcounts that are too low, in an image that says nothing of it: no table in use is given out. */
static void coroutine_fn try_low_refcounts(void *argument)
{
    struct bench bench;
    struct qcow2_create_options options = {.size = 4 * MiB, .cluster_bits = 12};
    bench_create(&bench, &options);
    bench_open(&bench, "");
    g_assert_no_errno(put(&bench, 0, 1, 64 * KiB));
    bench_close(&bench);
    uint64_t l1 = disk_word(&bench, offsetof(struct qcow2_disk_header, l1_table_offset));
    uint64_t l2 = disk_word(&bench, l1) & QCOW2_OFFSET_MASK;
    uint64_t table = disk_word(&bench, offsetof(struct qcow2_disk_header, refcount_table_offset));
    memset(bench.disk->now->data + disk_word(&bench, table) + l2 / 4096 * 2, 0, 2);
    bench_open(&bench, "");
    g_assert_cmpint(put(&bench, 1 * MiB, 2, 64 * KiB), ==, -EIO);
    g_assert_cmpint(get(&bench, 0, 64 * KiB), ==, 1);
    bench_close(&bench);
    g_assert_cmphex(disk_word(&bench, offsetof(struct qcow2_disk_header, incompatible_features)), ==, 2);
    bench_destroy(&bench);
}

/* A refcount table that points at the L1 table, at itself, or off its clusters: nothing is overwritten. */
static void coroutine_fn try_hostile_refcount_table(void *argument)
{
    for (unsigned i = 0; i < 3; i++) {
        struct bench bench;
        struct qcow2_create_options options = {.size = 4 * MiB, .cluster_bits = 12};
        bench_create(&bench, &options);
        uint64_t l1 = disk_word(&bench, offsetof(struct qcow2_disk_header, l1_table_offset));
        uint64_t table = disk_word(&bench, offsetof(struct qcow2_disk_header, refcount_table_offset));
        uint64_t hostile = htobe64(i == 0 ? l1 : i == 1 ? table : l1 + 4096 - 512);
        memcpy(bench.disk->now->data + table, &hostile, 8);
        bench_open(&bench, "");
        g_autofree uint8_t *before = g_memdup2(bench.disk->now->data, bench.disk->now->len);
        uint64_t bytes = bench.disk->now->len;
        g_assert_cmpint(put(&bench, 0, 1, 64 * KiB), ==, -EIO);
        bench_close(&bench);
        before[offsetof(struct qcow2_disk_header, incompatible_features) + 7] = QCOW2_INCOMPATIBLE_CORRUPT;
        g_assert_cmpmem(before, bytes, bench.disk->now->data, bytes);
        bench_destroy(&bench);
    }
}

/* Header fields that are unknown here stay when the header is rewritten. */
static void coroutine_fn try_unknown_fields(void *argument)
{
    struct bench bench;
    struct qcow2_create_options options = {.size = 4 * MiB};
    bench_create(&bench, &options);
    uint8_t *header = bench.disk->now->data;
    header[offsetof(struct qcow2_disk_header, header_length) + 3] = 128;
    memset(header + 112, 0, 512);
    memcpy(header + 112, "unknown to us...", 16);
    bench_open(&bench, "");
    g_assert_no_errno(bench.node->driver->change_backing(bench.node, "/some/where", "raw", NULL));
    bench_close(&bench);
    g_assert_cmpmem(bench.disk->now->data + 112, 16, "unknown to us...", 16);
    bench_open(&bench, ",\"backing\":null");
    g_assert_cmpstr(bench.node->header_backing, ==, "/some/where");
    bench_close(&bench);
    bench_destroy(&bench);
}

/* Reads go on when no metadata can be written any more, and writes when they can again. */
static void coroutine_fn try_full_disk(void *argument)
{
    struct bench bench;
    struct qcow2_create_options options = {.size = 16 * MiB, .cluster_bits = 9};
    bench_create(&bench, &options);
    bench_open(&bench, ",\"discard\":\"unmap\",\"l2-cache-size\":1,\"refcount-cache-size\":1");
    g_assert_no_errno(put(&bench, 0, 1, 4 * MiB));
    g_assert_no_errno(backend_flush(bench.backend));
    bench.disk->fail_end = UINT64_MAX;
    bench.disk->fail_code = -ENOSPC;
    for (uint64_t at = 0; at < 2 * MiB; at += 256 * KiB) {
        g_assert_no_errno(backend_write_zeroes(bench.backend, at, 512, 0));
    }
    for (uint64_t at = 2 * MiB; at < 4 * MiB; at += 32 * KiB) {
        g_assert_cmpint(get(&bench, at, 32 * KiB), ==, 1);
    }
    g_assert_cmpint(backend_flush(bench.backend), ==, -ENOSPC);
    bench.disk->fail_end = 0;
    g_assert_no_errno(backend_flush(bench.backend));
    g_assert_cmpint(get(&bench, 0, 512), ==, 0);
    bench_close(&bench);
    check_with_peer(&bench);
    bench_destroy(&bench);
}

/* Shrinking fails at each of its changes in turn: what is written behind the new end afterwards is not lost. */
static void coroutine_fn try_failed_shrink(void *argument)
{
    for (unsigned at = 0, fails = 1; fails; at++) {
        struct bench bench;
        struct qcow2_create_options options = {.size = 4 * MiB};
        bench_create(&bench, &options);
        bench_open(&bench, "");
        g_assert_no_errno(put(&bench, 0, 1, 4 * MiB));
        bench.disk->changes = 0;
        bench.disk->fail_first = at;
        bench.disk->fail_end = at + 1;
        bench.disk->fail_code = -EIO;
        fails = backend_truncate(bench.backend, 1 * MiB, NULL) < 0;
        bench.disk->fail_end = 0;
        g_assert_cmpuint(backend_size(bench.backend), ==, fails ? 4 * MiB : 1 * MiB);
        bool acknowledged = fails && put(&bench, 3 * MiB, 2, 1 * MiB) == 0 && backend_flush(bench.backend) == 0;
        g_assert_true(acknowledged || !fails);
        bench_close(&bench);
        bench_open(&bench, "");
        g_assert_true(!fails || get(&bench, 3 * MiB, 1 * MiB) == 2);
        bench_close(&bench);
        check_with_peer(&bench);
        bench_destroy(&bench);
    }
}

/* Refcounts of a dirty image are rebuilt: here they are all zero. */
static void coroutine_fn try_dirty(void *argument)
{
    struct bench bench;
    struct qcow2_create_options options = {.size = 4 * MiB, .cluster_bits = 12, .lazy_refcounts = true};
    bench_create(&bench, &options);
    bench_open(&bench, "");
    g_assert_no_errno(put(&bench, 0, 1, 1 * MiB));
    bench_close(&bench);
    uint64_t table = disk_word(&bench, offsetof(struct qcow2_disk_header, refcount_table_offset));
    memset(bench.disk->now->data + (disk_word(&bench, table) & QCOW2_REFCOUNT_TABLE_MASK), 0, 4096);
    bench.disk->now->data[offsetof(struct qcow2_disk_header, incompatible_features) + 7] = 1;
    static const struct patch void_bitmaps[] = {
        {112, 4, QCOW2_EXTENSION_BITMAPS}, {116, 4, 24}, {120, 4, 1}, {128, 8, 64}, {136, 8, UINT64_C(1) << 40}};
    for (unsigned i = 0; i < G_N_ELEMENTS(void_bitmaps); i++) { /* the autoclear bit is off: nobody believes them */
        patch(bench.disk->now->data, &void_bitmaps[i]);
    }
    bench_open(&bench, ",\"read-only\":true"); /* only read: stays as it is */
    g_assert_cmpint(get(&bench, 0, 1 * MiB), ==, 1);
    bench_close(&bench);
    g_assert_cmphex(disk_word(&bench, offsetof(struct qcow2_disk_header, incompatible_features)), ==, 1);
    bench_open(&bench, "");
    g_assert_cmphex(disk_word(&bench, offsetof(struct qcow2_disk_header, incompatible_features)), ==, 0);
    g_assert_no_errno(put(&bench, 1 * MiB, 2, 2 * MiB));
    g_assert_cmpint(get(&bench, 0, 1 * MiB), ==, 1);
    g_assert_cmpint(get(&bench, 1 * MiB, 2 * MiB), ==, 2);
    bench_close(&bench);
    check_with_peer(&bench);
    bench_destroy(&bench);
}

static void coroutine_fn try_writable(void *argument)
{
    struct bench bench;
    struct qcow2_create_options options = {.size = 1 * MiB};
    bench_create(&bench, &options);
    uint64_t autoclear = offsetof(struct qcow2_disk_header, autoclear_features);
    bench.disk->now->data[autoclear + 7] = 0x81;
    bench_open(&bench, "");
    g_assert_no_errno(backend_flush(bench.backend));
    g_assert_cmphex(disk_word(&bench, autoclear), ==, 0x81); /* nothing was written yet */
    g_assert_no_errno(put(&bench, 0, 1, 4096));
    g_assert_cmphex(disk_word(&bench, autoclear), ==, 0);
    const struct driver *driver = bench.node->driver;
    for (unsigned i = 0; i < 3; i++) {
        bench.disk->keeps_log = true;
        g_assert_no_errno(driver->set_writable(bench.node, false, NULL));
        bench.node->writable = false;
        g_assert_cmpuint(bench.disk->log->len, ==, 0);
        bench.disk->keeps_log = false;
        g_assert_cmpint(put(&bench, 0, 9, 4096), ==, -EROFS);
        g_assert_cmpint(get(&bench, 0, 4096), ==, 1 + (int)i);
        g_assert_no_errno(driver->set_writable(bench.node, true, NULL));
        bench.node->writable = true;
        g_assert_no_errno(put(&bench, 0, 2 + i, 4096));
    }
    bench_close(&bench);
    bench_destroy(&bench);
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
    g_test_init(&argc, &argv, NULL);
    testing_register_drivers();
    g_test_add_func("/qcow2/refcount-packing", test_refcount_packing);
    g_test_add_func("/qcow2/entries", test_entries);
    g_test_add_func("/qcow2/bad-headers", test_headers);
    g_test_add_func("/qcow2/header-building", test_header_building);
    g_test_add_data_func("/qcow2/growing", try_growing, run);
    g_test_add_data_func("/qcow2/backing-strings", try_backing_strings, run);
    g_test_add_data_func("/qcow2/failing-backing-strings", try_failing_backing_strings, run);
    g_test_add_data_func("/qcow2/corruption", try_corruption, run);
    g_test_add_data_func("/qcow2/overlap", try_overlap, run);
    g_test_add_data_func("/qcow2/low-refcounts", try_low_refcounts, run);
    g_test_add_data_func("/qcow2/hostile-refcount-table", try_hostile_refcount_table, run);
    g_test_add_data_func("/qcow2/unknown-header-fields", try_unknown_fields, run);
    g_test_add_data_func("/qcow2/full-disk", try_full_disk, run);
    g_test_add_data_func("/qcow2/failed-shrink", try_failed_shrink, run);
    g_test_add_data_func("/qcow2/dirty", try_dirty, run);
    g_test_add_data_func("/qcow2/writable", try_writable, run);
    return g_test_run();
}

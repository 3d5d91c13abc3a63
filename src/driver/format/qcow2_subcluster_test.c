/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Extended L2 entries, bit by bit: what entries say, what each kind of request makes of them, and that hostile ones
 * cost no more than what they claim to describe. Random operations, power cuts and the peer's view of such images are
 * in qcow2_interop_test.c and qcow2_crash_test.c, which draw images with and without subclusters.
 */
#include "base/size.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/format/qcow2_create.h"
#include "driver/format/qcow2_map.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include <errno.h>
#include <string.h>

enum { CLUSTER = 64 << 10, SUB = CLUSTER / QCOW2_SUBCLUSTERS };
#define BIT(n) (UINT64_C(1) << (n))
#define ZERO(n) (UINT64_C(1) << (QCOW2_SUBCLUSTERS + (n)))

/* --- what entries say --- */

static void test_kinds(void)
{
    static const struct {
        struct qcow2_entry entry;
        unsigned index;
        enum qcow2_kind kind;
        unsigned run;
    } cases[] = {
        {{0, 0}, 0, QCOW2_UNALLOCATED, 32},
        {{0, 0}, 31, QCOW2_UNALLOCATED, 1},
        {{0, ZERO(3) | ZERO(4)}, 3, QCOW2_PLAIN_ZERO, 2},
        {{0, ZERO(3) | ZERO(4)}, 0, QCOW2_UNALLOCATED, 3},
        {{QCOW2_COPIED | 0x50000, 0}, 7, QCOW2_UNALLOCATED, 25},
        {{QCOW2_COPIED | 0x50000, BIT(0) | BIT(1) | ZERO(2)}, 0, QCOW2_DATA, 2},
        {{QCOW2_COPIED | 0x50000, BIT(0) | BIT(1) | ZERO(2)}, 2, QCOW2_ALLOCATED_ZERO, 1},
        {{QCOW2_COPIED | 0x50000, QCOW2_ALL_ALLOCATED}, 0, QCOW2_DATA, 32},
        {{QCOW2_COPIED | 0x50000, QCOW2_ALL_ZERO}, 1, QCOW2_ALLOCATED_ZERO, 31},
        {{QCOW2_COPIED | 0x50000, BIT(5) | ZERO(5) | BIT(6)}, 5, QCOW2_INVALID, 1},
        {{QCOW2_COPIED | 0x50000, BIT(5) | ZERO(5) | BIT(6)}, 6, QCOW2_DATA, 1},
        {{0, BIT(1)}, 1, QCOW2_INVALID, 1},
        {{QCOW2_COPIED | 0x50001, BIT(0)}, 0, QCOW2_INVALID, 1}, /* the zero flag of others */
        {{QCOW2_COPIED | 0x50800, BIT(0)}, 0, QCOW2_INVALID, 1},
        {{QCOW2_COMPRESSED | 0x50123, 0}, 4, QCOW2_COMPRESSED_DATA, 28},
    };
    struct node node = {0};
    struct qcow2 image = {.node = &node,
                          .cluster_bits = 16,
                          .cluster_size = CLUSTER,
                          .subcluster_bits = 11,
                          .subcluster_size = SUB,
                          .entry_bits = 4,
                          .header.version = 3};
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_assert_cmpint(qcow2_subcluster_kind(&image, cases[i].entry, cases[i].index), ==, cases[i].kind);
        g_assert_cmpuint(qcow2_subcluster_run(&image, cases[i].entry, cases[i].index), ==, cases[i].run);
    }
    g_assert_cmphex(qcow2_subcluster_mask(&image, 0, CLUSTER), ==, QCOW2_ALL_ALLOCATED);
    g_assert_cmphex(qcow2_subcluster_mask(&image, SUB, SUB + 1), ==, BIT(1));
    g_assert_cmphex(qcow2_subcluster_mask(&image, 31 * SUB, CLUSTER), ==, BIT(31));
}

/* --- images --- */

struct bench {
    struct memory_disk *disk, *below;
    struct graph *graph;
    struct node *disk_node, *below_node, *node;
    struct backend *backend;
};

static void coroutine_fn bench_open(struct bench *bench, const char *options)
{
    bench->node = testing_add(
        bench->graph, NULL, "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"file\":\"disk\",\"discard\":\"unmap\"%s%s}",
        bench->below ? ",\"backing\":{\"driver\":\"raw\",\"file\":\"below\"}" : "", options);
    bench->backend = testing_backend(bench->graph, bench->node);
}

static void coroutine_fn bench_close(struct bench *bench)
{
    backend_destroy(bench->backend);
    g_assert_no_errno(graph_delete(bench->graph, "top", NULL));
}

static void coroutine_fn bench_create(struct bench *bench, bool backing)
{
    struct qcow2_create_options options = {.size = 16 * CLUSTER, .cluster_bits = 16, .extended_l2 = true};
    *bench = (struct bench){.graph = graph_create(), .disk = memory_disk_create(NULL, 0, 64 * MiB)};
    bench->disk_node = memory_disk_open(bench->disk, bench->graph, "disk");
    struct backend *backend = testing_backend(bench->graph, bench->disk_node);
    g_assert_no_errno(qcow2_create(backend_edge(backend), &options, NULL));
    backend_destroy(backend);
    if (backing) {
        g_autofree uint8_t *data = g_malloc(16 * CLUSTER);
        memset(data, 0xbb, 16 * CLUSTER);
        bench->below = memory_disk_create(data, 16 * CLUSTER, 64 * MiB);
        bench->below_node = memory_disk_open(bench->below, bench->graph, "below");
    }
    bench_open(bench, "");
}

static void coroutine_fn bench_destroy(struct bench *bench)
{
    node_release(bench->disk_node);
    if (bench->below) {
        node_release(bench->below_node);
        memory_disk_destroy(bench->below);
    }
    graph_destroy(bench->graph);
    memory_disk_destroy(bench->disk);
}

static int coroutine_fn put(struct bench *bench, uint64_t offset, uint8_t value, uint64_t bytes, unsigned flags)
{
    g_autofree uint8_t *data = g_malloc(bytes);
    memset(data, value, bytes);
    struct iovec iov = {data, bytes};
    return backend_write(bench->backend, offset, bytes, buffers_one(&iov), flags);
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

/* The entry of a guest cluster, as the driver has it now. */
static struct qcow2_entry coroutine_fn entry_of(struct bench *bench, uint64_t cluster)
{
    struct qcow2 *image = bench->node->state;
    struct qcow2_run run;
    co_mutex_lock(&image->lock);
    g_assert_no_errno(qcow2_lookup(image, cluster * CLUSTER, 1, &run));
    co_mutex_unlock(&image->lock);
    return run.entry;
}

static void coroutine_fn assert_entry(struct bench *bench, uint64_t cluster, bool placed, uint64_t subclusters)
{
    struct qcow2_entry entry = entry_of(bench, cluster);
    g_assert_cmpint(entry.descriptor != 0, ==, placed);
    g_assert_cmphex(entry.subclusters, ==, subclusters);
}

/* --- what requests make of entries --- */

static void coroutine_fn run_writes(void *argument)
{
    struct bench bench;
    bench_create(&bench, true);
    /* A write fills its subclusters and no more; the rest of them comes from below. */
    g_assert_no_errno(put(&bench, 3 * SUB + 100, 0x11, 200, 0));
    assert_entry(&bench, 0, true, BIT(3));
    g_assert_cmphex(get(&bench, 0, 3 * SUB + 100), ==, 0xbb);
    g_assert_cmphex(get(&bench, 3 * SUB + 100, 200), ==, 0x11);
    g_assert_cmphex(get(&bench, 3 * SUB + 300, CLUSTER - 3 * SUB - 300), ==, 0xbb);
    /* One more, into the place that is there. */
    uint64_t place = entry_of(&bench, 0).descriptor;
    g_assert_no_errno(put(&bench, 5 * SUB, 0x22, 2 * SUB, 0));
    assert_entry(&bench, 0, true, BIT(3) | BIT(5) | BIT(6));
    g_assert_cmphex(entry_of(&bench, 0).descriptor, ==, place);
    /* Across clusters: the last subcluster of one, the first of the next. */
    g_assert_no_errno(put(&bench, CLUSTER - 10, 0x33, 20, 0));
    assert_entry(&bench, 0, true, BIT(3) | BIT(5) | BIT(6) | BIT(31));
    assert_entry(&bench, 1, true, BIT(0));
    /* Only where there is nothing, subcluster by subcluster. */
    g_assert_no_errno(put(&bench, 0, 0xbb, CLUSTER, REQUEST_IF_UNALLOCATED));
    assert_entry(&bench, 0, true, QCOW2_ALL_ALLOCATED);
    g_assert_cmphex(get(&bench, 5 * SUB, 2 * SUB), ==, 0x22);
    g_assert_cmphex(get(&bench, 3 * SUB + 100, 200), ==, 0x11);
    bench_close(&bench);
    bench_destroy(&bench);
}

/* A compressed write of a cluster that has data in part: it is written as it is, none is refused and nothing is left
 * out. */
static void coroutine_fn run_compressed_writes(void *argument)
{
    struct bench bench;
    bench_create(&bench, true);
    g_assert_no_errno(put(&bench, 3 * SUB, 0x11, SUB, 0));
    g_assert_no_errno(put(&bench, 0, 0xbb, CLUSTER, REQUEST_COMPRESSED | REQUEST_IF_UNALLOCATED));
    assert_entry(&bench, 0, true, QCOW2_ALL_ALLOCATED);
    g_assert_cmphex(get(&bench, 3 * SUB, SUB), ==, 0x11);
    g_assert_no_errno(put(&bench, CLUSTER, 0x22, SUB, 0));
    g_assert_no_errno(put(&bench, CLUSTER, 0x33, CLUSTER, REQUEST_COMPRESSED));
    g_assert_cmphex(get(&bench, CLUSTER, CLUSTER), ==, 0x33);
    g_assert_cmpint(put(&bench, CLUSTER, 0x44, CLUSTER, REQUEST_COMPRESSED), ==, -EIO);
    /* Zeroes alone are in no way, but for one that must not change what is shown. */
    g_assert_no_errno(backend_write_zeroes(bench.backend, 2 * CLUSTER, 3 * SUB, 0));
    g_assert_no_errno(put(&bench, 2 * CLUSTER, 0x55, CLUSTER, REQUEST_COMPRESSED | REQUEST_IF_UNALLOCATED));
    g_assert_cmphex(get(&bench, 2 * CLUSTER, 3 * SUB), ==, 0);
    g_assert_cmphex(get(&bench, 2 * CLUSTER + 3 * SUB, CLUSTER - 3 * SUB), ==, 0x55);
    bench_close(&bench);
    bench_destroy(&bench);
}

static void coroutine_fn run_zeroes(void *argument)
{
    struct bench bench;
    bench_create(&bench, true);
    g_assert_cmpuint(bench.node->limits.zero_alignment, ==, SUB);
    /* Zeroes need no place; parts of a subcluster do. */
    g_assert_no_errno(backend_write_zeroes(bench.backend, 2 * SUB, 3 * SUB, 0));
    assert_entry(&bench, 0, false, ZERO(2) | ZERO(3) | ZERO(4));
    g_assert_no_errno(backend_write_zeroes(bench.backend, 8 * SUB, SUB + 1, 0));
    assert_entry(&bench, 0, true, ZERO(2) | ZERO(3) | ZERO(4) | ZERO(8) | BIT(9));
    g_assert_cmphex(get(&bench, 9 * SUB + 1, SUB - 1), ==, 0xbb);
    g_assert_cmphex(get(&bench, 8 * SUB, SUB + 1), ==, 0);
    /* Data over zeroes; a place without data stays, unless it may go. */
    g_assert_no_errno(put(&bench, 3 * SUB, 0x44, SUB, 0));
    assert_entry(&bench, 0, true, ZERO(2) | BIT(3) | ZERO(4) | ZERO(8) | BIT(9));
    g_assert_no_errno(backend_write_zeroes(bench.backend, 3 * SUB, SUB, 0));
    g_assert_no_errno(backend_write_zeroes(bench.backend, 9 * SUB, SUB, 0));
    assert_entry(&bench, 0, true, ZERO(2) | ZERO(3) | ZERO(4) | ZERO(8) | ZERO(9));
    g_assert_no_errno(backend_write_zeroes(bench.backend, 0, SUB, REQUEST_MAY_UNMAP));
    assert_entry(&bench, 0, false, ZERO(0) | ZERO(2) | ZERO(3) | ZERO(4) | ZERO(8) | ZERO(9));
    /* A discard is of whole subclusters, and lets nothing from below show. */
    g_assert_no_errno(put(&bench, CLUSTER, 0x55, CLUSTER, 0));
    g_assert_no_errno(backend_discard(bench.backend, CLUSTER + SUB / 2, 2 * SUB));
    assert_entry(&bench, 1, true, (QCOW2_ALL_ALLOCATED & ~BIT(1)) | ZERO(1));
    g_assert_cmphex(get(&bench, CLUSTER, SUB), ==, 0x55);
    g_assert_cmphex(get(&bench, CLUSTER + SUB, SUB), ==, 0);
    g_assert_no_errno(backend_discard(bench.backend, CLUSTER, CLUSTER));
    assert_entry(&bench, 1, false, QCOW2_ALL_ZERO);
    bench_close(&bench);
    /* With discard-no-unref the place stays. */
    bench_open(&bench, ",\"discard-no-unref\":true");
    g_assert_no_errno(put(&bench, 2 * CLUSTER, 0x66, CLUSTER, 0));
    g_assert_no_errno(backend_discard(bench.backend, 2 * CLUSTER, CLUSTER));
    assert_entry(&bench, 2, true, QCOW2_ALL_ZERO);
    bench_close(&bench);
    bench_destroy(&bench);
}

static void coroutine_fn run_hostile(void *argument)
{
    struct bench bench;
    bench_create(&bench, false);
    g_assert_no_errno(put(&bench, 0, 0x77, 2 * CLUSTER, 0));
    g_assert_no_errno(backend_flush(bench.backend));
    const struct qcow2 *image = bench.node->state;
    uint64_t table = image->l1[0] & QCOW2_OFFSET_MASK;
    bench_close(&bench);
    uint64_t *words = (uint64_t *)(bench.disk->now->data + table);
    words[1] = htobe64(QCOW2_ALL_ALLOCATED | ZERO(4)); /* of cluster 0: both data and zero */
    words[5] = htobe64(BIT(0));                        /* of cluster 2: data without a place */
    bench_open(&bench, ",\"read-only\":true");
    g_assert_cmpint(get(&bench, 4 * SUB, SUB), ==, -EIO);
    g_assert_cmpint(get(&bench, 0, CLUSTER), ==, -EIO);
    g_assert_cmphex(get(&bench, 0, 4 * SUB), ==, 0x77);
    g_assert_cmphex(get(&bench, 5 * SUB, CLUSTER - 5 * SUB), ==, 0x77);
    g_assert_cmphex(get(&bench, CLUSTER, CLUSTER), ==, 0x77);
    g_assert_cmpint(get(&bench, 2 * CLUSTER, SUB), ==, -EIO);
    g_assert_cmphex(get(&bench, 2 * CLUSTER + SUB, SUB), ==, 0);
    bench_close(&bench);
    bench_open(&bench, "");
    g_assert_cmpint(put(&bench, 4 * SUB, 1, SUB, 0), ==, -EIO);
    g_assert_cmpint(put(&bench, 8 * CLUSTER, 1, SUB, 0), ==, -EIO); /* no writes at all any more */
    bench_close(&bench);
    bench_destroy(&bench);
}

static struct loop *loop;

static void test_writes(void)
{
    loop_run_coroutine(loop, run_writes, NULL);
}

static void test_compressed_writes(void)
{
    loop_run_coroutine(loop, run_compressed_writes, NULL);
}

static void test_zeroes(void)
{
    loop_run_coroutine(loop, run_zeroes, NULL);
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
    g_test_add_func("/qcow2-subcluster/kinds", test_kinds);
    g_test_add_func("/qcow2-subcluster/writes", test_writes);
    g_test_add_func("/qcow2-subcluster/compressed-writes", test_compressed_writes);
    g_test_add_func("/qcow2-subcluster/zeroes", test_zeroes);
    g_test_add_func("/qcow2-subcluster/hostile", test_hostile);
    int code = g_test_run();
    loop_destroy(loop);
    return code;
}

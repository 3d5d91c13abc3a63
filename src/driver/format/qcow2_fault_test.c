/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Disks that fail. One script of writes, zeroes, discards, flushes, growth and a new backing string runs over a memory
 * disk on which some changes fail: one of them (EIO), or all for a while (ENOSPC). Clusters are small and refcounts
 * wide, so that every table grows and every kind of metadata write is met.
 *
 * 1. What succeeded is there, what failed is there or not, sector by sector; as we read it and as the peer does.
 * 2. The image is whole by the peer's check: it may leak, no more.
 * 3. After the fault every request works again; only a header that may or may not have been written stops the image.
 *
 * QCOW2_STRIDE chooses how many changes lie between the faults of two runs.
 */
#include "base/size.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_create.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include "loop/sim.h"
#include <errno.h>
#include <glib/gstdio.h>
#include <string.h>

enum { SECTOR = 512, SIZE_MAX_BYTES = 6 << 20, SECTORS = SIZE_MAX_BYTES / SECTOR, OPERATIONS = 150 };

struct fault {
    struct memory_disk *disk;
    struct graph *graph;
    struct node *node;
    struct backend *backend;
    uint64_t size, random;
    uint64_t first, count;   /* changes that fail */
    uint64_t changes;        /* of the whole script */
    unsigned table_clusters; /* of refcounts, at the end */
    bool small_cache;
    /* What a sector may hold: a bit for each byte value. */
    uint64_t (*may)[4];
};

static uint64_t below(struct fault *fault, uint64_t limit)
{
    return testing_random(&fault->random) % limit;
}

static void note(struct fault *fault, uint64_t offset, uint64_t bytes, uint8_t value, int code)
{
    for (uint64_t i = offset / SECTOR; i < (offset + bytes) / SECTOR; i++) {
        if (code == 0) {
            memset(fault->may[i], 0, sizeof(fault->may[i]));
        }
        fault->may[i][value / 64] |= UINT64_C(1) << (value % 64);
    }
}

static void coroutine_fn do_write(struct fault *fault, uint64_t offset, uint64_t bytes, uint8_t value)
{
    g_autofree uint8_t *data = g_malloc(bytes);
    struct iovec iov = {data, bytes};
    memset(data, value, bytes);
    note(fault, offset, bytes, value, backend_write(fault->backend, offset, bytes, buffers_one(&iov), 0));
}

static void coroutine_fn do_grow(struct fault *fault)
{
    uint64_t size = MIN(fault->size + below(fault, 1500) * SECTOR, (uint64_t)SIZE_MAX_BYTES);
    if (backend_truncate(fault->backend, size, NULL) == 0) {
        fault->size = size;
    }
}

static void coroutine_fn do_backing(struct fault *fault)
{
    g_autofree char *slashes = g_strnfill(1 + below(fault, 200), '/');
    g_autofree char *name = g_strconcat(slashes, "dev/null", NULL); /* may stay, after a fault */
    (void)fault->node->driver->change_backing(fault->node, name, "raw", NULL);
    (void)fault->node->driver->change_backing(fault->node, NULL, NULL, NULL);
}

static void coroutine_fn do_operation(struct fault *fault, unsigned serial)
{
    uint64_t offset = below(fault, fault->size / SECTOR) * SECTOR;
    uint64_t bytes = (1 + below(fault, below(fault, 3) ? 40 : 400)) * SECTOR;
    unsigned what = below(fault, 100);
    unsigned flags = below(fault, 2) ? REQUEST_MAY_UNMAP : 0;
    bytes = MIN(bytes, fault->size - offset);
    if (what < 60) {
        do_write(fault, offset, bytes, 1 + serial % 255);
    } else if (what < 75) {
        note(fault, offset, bytes, 0, backend_write_zeroes(fault->backend, offset, bytes, flags));
    } else if (what < 85) {
        note(fault, offset, bytes, 0, backend_discard(fault->backend, offset, bytes));
    } else if (what < 92) {
        (void)backend_flush(fault->backend);
    } else if (what < 98) {
        do_grow(fault);
    } else {
        do_backing(fault);
    }
}

static void check_content(const struct fault *fault, const char *who, const uint8_t *content, uint64_t size)
{
    for (uint64_t i = 0; i < size; i++) {
        uint8_t value = content[i];
        if (!(fault->may[i / SECTOR][value / 64] >> (value % 64) & 1)) {
            g_error("faults from %" G_GUINT64_FORMAT " on (%" G_GUINT64_FORMAT "): byte %" G_GUINT64_FORMAT
                    " is %u for %s, which was not written there",
                    fault->first, fault->count, i, value, who);
        }
    }
}

static void check_with_peer(struct fault *fault, bool content_known)
{
    g_autofree char *path = g_strdup_printf("%s/fault.qcow2", testing_directory());
    g_autofree char *raw = g_strdup_printf("%s/fault.raw", testing_directory());
    g_autofree char *content = NULL;
    gsize bytes;
    gboolean good = g_file_set_contents(path, (char *)fault->disk->now->data, fault->disk->now->len, NULL);
    g_assert_true(good);
    int code = testing_run(false, "qemu-img check -q -f qcow2 %s", path);
    if (code != 0 && code != 3) {
        g_message("faults from %" G_GUINT64_FORMAT " on (%" G_GUINT64_FORMAT ")", fault->first, fault->count);
        testing_run(true, "qemu-img check -f qcow2 %s", path);
    }
    if (content_known) {
        testing_run(true, "qemu-img convert -f qcow2 -O raw %s %s", path, raw);
        good = g_file_get_contents(raw, &content, &bytes, NULL);
        g_assert_true(good && bytes >= fault->size); /* a growth that failed may have reached the disk */
        check_content(fault, "the peer", (uint8_t *)content, fault->size);
    }
}

static void coroutine_fn finish(struct fault *fault)
{
    bool frozen = ((struct qcow2 *)fault->node->state)->frozen;
    g_autofree uint8_t *content = g_malloc(fault->size);
    struct iovec iov = {content, fault->size};
    fault->changes = fault->disk->changes;
    fault->table_clusters = ((struct qcow2 *)fault->node->state)->header.refcount_table_clusters;
    fault->disk->fail_end = 0;
    if (!frozen) {
        g_assert_no_errno(backend_flush(fault->backend));
        do_write(fault, 0, 64 * KiB, 77);
        g_assert_true(fault->may[0][1] == UINT64_C(1) << (77 - 64) && fault->may[0][0] == 0);
        g_assert_no_errno(backend_flush(fault->backend));
    }
    g_assert_no_errno(backend_read(fault->backend, 0, fault->size, buffers_one(&iov), 0));
    check_content(fault, "us", content, fault->size);
    backend_destroy(fault->backend);
    g_assert_no_errno(graph_delete(fault->graph, "top", NULL));
    check_with_peer(fault, !frozen);
}

static void coroutine_fn run_script(void *argument)
{
    struct fault *fault = argument;
    struct qcow2_create_options options = {.size = 1 * MiB, .cluster_bits = 9, .refcount_bits = 64};
    fault->size = options.size;
    fault->random = 7;
    fault->disk = memory_disk_create(NULL, 0, 64 * MiB);
    fault->may = g_malloc0_n(SECTORS, sizeof(*fault->may));
    for (unsigned i = 0; i < SECTORS; i++) {
        fault->may[i][0] = 1;
    }
    fault->graph = graph_create();
    struct node *disk = memory_disk_open(fault->disk, fault->graph, "disk");
    struct backend *backend = testing_backend(fault->graph, disk);
    g_assert_no_errno(qcow2_create(backend_edge(backend), &options, NULL));
    backend_destroy(backend);
    fault->node = testing_add(fault->graph, NULL,
                              "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"discard\":\"unmap\",%s\"file\":\"disk\"}",
                              fault->small_cache ? "\"l2-cache-size\":1,\"refcount-cache-size\":1," : "");
    fault->backend = testing_backend(fault->graph, fault->node);
    fault->disk->changes = 0;
    fault->disk->fail_first = fault->first;
    fault->disk->fail_end = fault->first + fault->count;
    fault->disk->fail_code = fault->count == 1 ? -EIO : -ENOSPC;
    for (unsigned i = 0; i < OPERATIONS; i++) {
        do_operation(fault, i);
    }
    finish(fault);
    node_release(disk);
    graph_destroy(fault->graph);
    memory_disk_destroy(fault->disk);
    g_free(fault->may);
    testing_remove_directory();
}

static void test_faults(void)
{
    struct loop *loop;
    struct fault whole = {0};
    const char *stride_text = g_getenv("QCOW2_STRIDE");
    if (!testing_have_peer()) {
        return;
    }
    g_assert_no_errno(loop_create(ENGINE_AUTO, &loop, NULL));
    loop_run_coroutine(loop, run_script, &whole);
    g_test_message("%" G_GUINT64_FORMAT " changes", whole.changes);
    g_assert_cmpuint(whole.table_clusters, >, 1); /* the refcount table grew */
    uint64_t stride = stride_text ? g_ascii_strtoull(stride_text, NULL, 10) : MAX(whole.changes / 16, 1);
    for (uint64_t first = 0; first < whole.changes; first += stride) {
        struct fault fault = {.first = first, .count = 1, .small_cache = first % 2};
        loop_run_coroutine(loop, run_script, &fault);
        if (first / stride % 4 == 0) {
            struct fault full = {.first = first, .count = 200, .small_cache = first / stride % 8 == 0};
            loop_run_coroutine(loop, run_script, &full);
        }
    }
    loop_destroy(loop);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    sim_create_if_asked();
    testing_register_drivers();
    g_test_add_func("/qcow2/faults", test_faults);
    return g_test_run();
}

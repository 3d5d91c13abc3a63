/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Compressed clusters: packing and unpacking by themselves; images that are written here, compressed and otherwise, by
 * several coroutines, beside a model in memory, and checked and read by the peer at the end; images that the peer
 * compressed, read here in pieces of all sizes; and writes that fail, each in turn. Power cuts are
 * qcow2_crash_test.c's.
 *
 * QCOW2_SEED and QCOW2_CASES choose other runs than the short slice.
 */
#include "base/size.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/format/qcow2_codec.h"
#include "driver/format/qcow2_create.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib/gstdio.h>
#include <stdlib.h>
#include <string.h>

enum { WORKERS = 6, OPERATIONS = 60 };

static uint64_t below(uint64_t *random, uint64_t limit)
{
    return testing_random(random) % limit;
}

/* Data that can be made smaller more or less, or not at all. */
static void fill(uint64_t *random, uint8_t *to, size_t bytes)
{
    unsigned kind = below(random, 4);
    for (size_t i = 0; i < bytes;) {
        size_t run = min_u64(bytes - i, kind == 0 ? bytes : 1 + below(random, kind == 1 ? 3 : 700));
        if (kind == 3) {
            for (size_t n = 0; n < run; n++) {
                to[i + n] = testing_random(random);
            }
        } else {
            memset(to + i, below(random, kind == 1 ? 4 : 256), run);
        }
        i += run;
    }
}

/* --- the codec --- */

static void coroutine_fn try_codec(struct qcow2_codecs *codecs, size_t size, uint64_t *random)
{
    g_autofree uint8_t *data = g_malloc(size);
    g_autofree uint8_t *back = g_malloc(size);
    struct qcow2_codec *codec = qcow2_codec_take(codecs, 0);
    size_t bytes = 0;
    fill(random, data, size);
    int code = qcow2_codec_pack(codec, data, &bytes);
    g_assert_true(code == 0 || code == -ENOSPC);
    if (code == 0) {
        g_assert_cmpuint(bytes, <, size);
        size_t behind = below(random, QCOW2_SECTOR);
        memset(qcow2_codec_packed(codec) + bytes, testing_random(random), behind);
        g_assert_cmpint(qcow2_codec_unpack(codec, bytes + behind, back), ==, 0);
        g_assert_cmpmem(data, size, back, size);
        g_assert_cmpint(qcow2_codec_unpack(codec, bytes / 2, back), ==, -EIO);
    }
    fill(random, qcow2_codec_packed(codec), qcow2_codec_packed_max(codec)); /* garbage: anything but a crash */
    (void)qcow2_codec_unpack(codec, qcow2_codec_packed_max(codec), back);
    qcow2_codec_give(codecs, codec);
}

static void coroutine_fn test_codec(void *unused)
{
    uint64_t random = 7;
    for (unsigned type = QCOW2_COMPRESSION_ZLIB; type <= QCOW2_COMPRESSION_ZSTD; type++) {
        for (unsigned bits = QCOW2_CLUSTER_BITS_MIN; bits <= 18; bits += 3) {
            struct qcow2_codecs *codecs = qcow2_codecs_create(type, (size_t)1 << bits);
            for (unsigned i = 0; i < 12; i++) {
                try_codec(codecs, (size_t)1 << bits, &random);
            }
            qcow2_codecs_destroy(codecs);
        }
    }
}

/* What is kept is found again by its key, until it is forgotten. */
static void coroutine_fn test_kept(void *unused)
{
    struct qcow2_codecs *codecs = qcow2_codecs_create(QCOW2_COMPRESSION_ZLIB, 65536);
    struct qcow2_codec *a = qcow2_codec_take(codecs, 0), *b = qcow2_codec_take(codecs, 0);
    g_assert_true(a != b);
    qcow2_codec_keep(a, 11);
    qcow2_codec_keep(b, 12);
    qcow2_codec_give(codecs, a);
    qcow2_codec_give(codecs, b);
    g_assert_true(qcow2_codec_take(codecs, 12) == b);
    g_assert_true(qcow2_codec_take(codecs, 11) == a);
    qcow2_codec_give(codecs, a);
    qcow2_codecs_forget(codecs, 11);
    g_assert_cmpuint(qcow2_codec_kept(a), ==, 0);
    g_assert_cmpuint(qcow2_codec_kept(b), ==, 12);
    qcow2_codec_give(codecs, b);
    qcow2_codecs_destroy(codecs);
}

/* --- a world --- */

struct world {
    struct graph *graph;
    struct backend *backend;
    struct range_lock ranges;
    struct co_group workers;
    uint64_t size, cluster, random;
    uint8_t *model;
    unsigned compressed, refused, plain;
};

static void coroutine_fn world_open(struct world *world, const char *path)
{
    world->graph = graph_create();
    struct node *node = testing_add(world->graph, NULL,
                                    "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"discard\":\"unmap\","
                                    "\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}",
                                    path);
    world->backend = testing_backend(world->graph, node);
    world->size = backend_size(world->backend);
}

static void coroutine_fn world_close(struct world *world)
{
    backend_destroy(world->backend);
    graph_delete_all(world->graph);
    graph_destroy(world->graph);
}

/* Is the cluster at `offset` one that nothing can be stored in compressed: it has a place, and decides on all it shows?
 * (Where it leaves something open, it has subclusters, and is written as it is.) */
static bool coroutine_fn is_taken(struct world *world, uint64_t offset)
{
    uint64_t end = min_u64(offset + world->cluster, world->size);
    bool placed = false;
    while (offset < end) {
        struct extent extent;
        int code = backend_block_status(world->backend, NULL, offset, end - offset, &extent);
        g_assert_cmpint(code, ==, 0);
        if (!(extent.flags & EXTENT_ALLOCATED)) {
            return false;
        }
        placed = placed || extent.flags & (EXTENT_DATA | EXTENT_MAPPED);
        offset += extent.bytes;
    }
    return placed;
}

static bool coroutine_fn is_some_taken(struct world *world, uint64_t offset, uint64_t bytes)
{
    for (uint64_t at = offset; at < offset + bytes; at += world->cluster) {
        if (is_taken(world, at)) {
            return true;
        }
    }
    return false;
}

static void coroutine_fn do_write(struct world *world, uint64_t offset, uint64_t bytes, bool compressed)
{
    g_autofree uint8_t *data = g_malloc(bytes);
    fill(&world->random, data, bytes);
    /* In two pieces, so that clusters are not always in one. */
    size_t first = below(&world->random, 2) ? bytes : 1 + below(&world->random, bytes);
    struct iovec iov[] = {{data, first}, {data + first, bytes - first}};
    struct buffers from = {iov, first < bytes ? 2 : 1, 0};
    bool refused = compressed && is_some_taken(world, offset, bytes);
    int code = backend_write(world->backend, offset, bytes, from, compressed ? REQUEST_COMPRESSED : 0);
    g_assert_cmpint(code, ==, refused ? -EIO : 0);
    if (refused) { /* the clusters that had no place are written perhaps */
        world->refused++;
        code = backend_write(world->backend, offset, bytes, from, 0);
        g_assert_cmpint(code, ==, 0);
    }
    world->compressed += compressed && !refused;
    world->plain += !compressed;
    memcpy(world->model + offset, data, bytes);
}

static void coroutine_fn do_read(struct world *world, uint64_t offset, uint64_t bytes)
{
    g_autofree uint8_t *data = g_malloc(bytes);
    size_t first = below(&world->random, 2) ? bytes : 1 + below(&world->random, bytes);
    struct iovec iov[] = {{data, first}, {data + first, bytes - first}};
    g_assert_cmpint(backend_read(world->backend, offset, bytes, (struct buffers){iov, first < bytes ? 2 : 1, 0}, 0), ==,
                    0);
    if (memcmp(data, world->model + offset, bytes) != 0) {
        g_error("wrong content in %" G_GUINT64_FORMAT " + %" G_GUINT64_FORMAT, offset, bytes);
    }
}

static void coroutine_fn do_zero(struct world *world, uint64_t offset, uint64_t bytes, bool discard)
{
    int code =
        discard ? backend_discard(world->backend, offset, bytes)
                : backend_write_zeroes(world->backend, offset, bytes, below(&world->random, 2) ? REQUEST_MAY_UNMAP : 0);
    g_assert_cmpint(code, ==, 0);
    memset(world->model + offset, 0, bytes);
}

static void coroutine_fn do_operation(struct world *world)
{
    uint64_t *random = &world->random;
    uint64_t cluster = world->cluster;
    uint64_t clusters = div_up(world->size, cluster);
    uint64_t first = below(random, clusters);
    uint64_t offset = first * cluster;
    uint64_t bytes = min_u64((1 + below(random, below(random, 4) ? 3 : 40)) * cluster, world->size - offset);
    unsigned what = below(random, 100);
    struct range_hold hold;
    if (what >= 50 && what < 85) { /* of any bytes */
        offset += below(random, bytes);
        bytes = 1 + below(random, min_u64(bytes, world->size - offset));
    }
    uint64_t start = align_down(offset, cluster);
    range_lock_acquire(&world->ranges, &hold, start, align_up(offset + bytes, cluster) - start, false);
    if (what < 42) {
        do_write(world, offset, bytes, true);
    } else if (what < 50) {
        do_zero(world, offset, bytes, what < 47);
    } else if (what < 80) {
        do_read(world, offset, bytes);
    } else if (what < 85) {
        do_write(world, offset, bytes, false);
    } else if (what < 97) {
        do_zero(world, offset, bytes, true);
    } else {
        g_assert_cmpint(backend_flush(world->backend), ==, 0);
    }
    range_lock_release(&world->ranges, &hold);
}

static void coroutine_fn worker_main(void *argument)
{
    struct world *world = argument;
    for (unsigned i = 0; i < OPERATIONS; i++) {
        do_operation(world);
    }
    co_group_leave(&world->workers);
}

static uint8_t *peer_content(const char *path, uint64_t size)
{
    char *content;
    gsize bytes;
    g_autofree char *raw = g_strdup_printf("%s.raw", path);
    testing_run(true, "qemu-img convert -f qcow2 -O raw %s %s", path, raw);
    g_assert_true(g_file_get_contents(raw, &content, &bytes, NULL));
    g_assert_cmpuint(bytes, ==, size);
    return (uint8_t *)content;
}

/* --- written here, read by the peer --- */

static void coroutine_fn random_case(uint64_t seed)
{
    struct world world = {.random = seed};
    g_autofree char *path = g_strdup_printf("%s/ours.qcow2", testing_directory());
    unsigned bits = 9 + below(&world.random, 10);
    unsigned refcount_bits = 1u << below(&world.random, 7);
    bool zstd = below(&world.random, 2);
    world.cluster = (uint64_t)1 << bits;
    uint64_t size = min_u64(world.cluster * 70, 4 * MiB) - 512 * below(&world.random, 2);
    g_test_message("seed %" G_GUINT64_FORMAT ": clusters 2^%u, refcounts %u bits, %s", seed, bits, refcount_bits,
                   zstd ? "zstd" : "zlib");
    bool extended = bits >= 14 && below(&world.random, 2);
    testing_run(true,
                "qemu-img create -q -f qcow2 -o cluster_size=%u,refcount_bits=%u,compression_type=%s,extended_l2=%s "
                "%s %u",
                1u << bits, refcount_bits, zstd ? "zstd" : "zlib", extended ? "on" : "off", path, (unsigned)size);
    world_open(&world, path);
    world.model = g_malloc0(world.size);
    range_lock_init(&world.ranges);
    co_group_init(&world.workers);
    for (unsigned i = 0; i < WORKERS; i++) {
        co_group_enter(&world.workers);
        loop_spawn(loop_self(), worker_main, &world);
    }
    co_group_wait(&world.workers);
    co_group_destroy(&world.workers);
    range_lock_destroy(&world.ranges);
    do_read(&world, 0, world.size);
    g_assert_cmpuint(world.compressed, >, 0);
    world_close(&world);
    testing_run(true, "qemu-img check -q %s", path);
    g_autofree uint8_t *content = peer_content(path, world.size);
    g_assert_cmpmem(content, world.size, world.model, world.size);
    world_open(&world, path); /* and nothing of it was in memory only */
    do_read(&world, 0, world.size);
    world_close(&world);
    g_free(world.model);
}

static uint64_t number(const char *variable, uint64_t otherwise)
{
    const char *text = g_getenv(variable);
    return text ? g_ascii_strtoull(text, NULL, 10) : otherwise;
}

static void coroutine_fn test_random(void *unused)
{
    uint64_t seed = number("QCOW2_SEED", 1), cases = number("QCOW2_CASES", 8);
    for (uint64_t i = 0; i < cases; i++) {
        random_case(seed + i);
    }
    testing_remove_directory();
}

/* --- written by the peer, read here --- */

static void coroutine_fn read_theirs(const char *type, unsigned bits, uint64_t *random)
{
    struct world world = {.random = testing_random(random)};
    g_autofree char *path = g_strdup_printf("%s/theirs.qcow2", testing_directory());
    g_autofree char *raw = g_strdup_printf("%s/theirs.raw", testing_directory());
    uint64_t size = min_u64(((uint64_t)30 << bits) + 512, 3 * MiB);
    world.model = g_malloc(size);
    for (uint64_t at = 0; at < size;) {
        uint64_t some = min_u64(size - at, (uint64_t)1 << bits);
        fill(&world.random, world.model + at, some);
        at += some;
    }
    g_assert_true(g_file_set_contents(raw, (char *)world.model, size, NULL));
    testing_run(true, "qemu-img convert -c -f raw -O qcow2 -o cluster_size=%u,compression_type=%s %s %s", 1u << bits,
                type, raw, path);
    world_open(&world, path);
    do_read(&world, 0, size);
    for (uint64_t at = 0; at < size; at += 4096) { /* as a guest reads on */
        do_read(&world, at, min_u64(4096, size - at));
    }
    for (unsigned i = 0; i < 20; i++) {
        uint64_t offset = below(&world.random, size);
        do_read(&world, offset, 1 + below(&world.random, size - offset));
    }
    world_close(&world);
    g_free(world.model);
}

static void coroutine_fn test_theirs(void *unused)
{
    static const unsigned bits[] = {9, 12, 16, 21};
    uint64_t random = 5;
    for (unsigned i = 0; i < G_N_ELEMENTS(bits); i++) {
        read_theirs("zlib", bits[i], &random);
        read_theirs("zstd", bits[i], &random);
    }
    testing_remove_directory();
}

/* --- what cannot be --- */

static void coroutine_fn expect_write(struct world *world, uint64_t offset, uint64_t bytes, int expected)
{
    g_autofree uint8_t *data = g_malloc0(bytes);
    struct iovec iov = {data, bytes};
    g_assert_cmpint(backend_write(world->backend, offset, bytes, buffers_one(&iov), REQUEST_COMPRESSED), ==, expected);
}

static void coroutine_fn test_refusals(void *unused)
{
    struct world world = {.random = 3};
    g_autofree char *path = g_strdup_printf("%s/refused.qcow2", testing_directory());
    g_autofree char *raw = g_strdup_printf("%s/refused.raw", testing_directory());
    testing_run(true, "qemu-img create -q -f qcow2 %s 1000448", path);
    world_open(&world, path);
    expect_write(&world, 512, 65536, -EINVAL);
    expect_write(&world, 0, 512, -EINVAL);
    expect_write(&world, 983040, 17408, 0); /* up to the end */
    expect_write(&world, 983040, 17408, -EIO);
    expect_write(&world, 0, 65536, 0);
    expect_write(&world, 0, 131072, -EIO);
    g_assert_cmpint(backend_write_zeroes(world.backend, 0, 131072, 0), ==, 0);
    expect_write(&world, 0, 131072, 0); /* zeroes have no place */
    world_close(&world);
    testing_run(true, "qemu-img check -q %s", path);
    g_assert_true(g_file_set_contents(raw, "", 0, NULL));
    testing_run(true, "qemu-img resize -q -f raw %s 1M", raw);
    world.graph = graph_create();
    world.backend = testing_backend(
        world.graph,
        testing_add(world.graph, NULL, "{\"driver\":\"file\",\"node-name\":\"top\",\"filename\":\"%s\"}", raw));
    expect_write(&world, 0, 65536, -ENOTSUP);
    world_close(&world);
    testing_remove_directory();
}

/* Every change of the file fails in turn: what is left is a clean image or one that leaks, and what was written before
 * is there. */
static void coroutine_fn fail_at(uint64_t at, bool *ret_done)
{
    struct world world = {.graph = graph_create(), .random = 9, .size = 65536, .cluster = 4096};
    struct memory_disk *disk = memory_disk_create(NULL, 0, 64 * MiB);
    g_autofree char *path = g_strdup_printf("%s/failed.qcow2", testing_directory());
    struct node *node = memory_disk_open(disk, world.graph, "disk");
    struct qcow2_create_options options = {.size = world.size, .cluster_bits = 12};
    world.backend = testing_backend(world.graph, node);
    g_assert_cmpint(qcow2_create(backend_edge(world.backend), &options, NULL), ==, 0);
    backend_destroy(world.backend);
    struct node *top = testing_add(world.graph, NULL, "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"file\":\"disk\"}");
    world.backend = testing_backend(world.graph, top);
    world.model = g_malloc0(world.size);
    do_write(&world, 0, 5 * 4096, true);
    g_assert_cmpint(backend_flush(world.backend), ==, 0);
    disk->changes = 0;
    disk->fail_first = at;
    disk->fail_end = at + 1;
    disk->fail_code = -EIO;
    g_autofree uint8_t *data = g_malloc0(4096);
    struct iovec iov = {data, 4096};
    bool failed = false;
    for (uint64_t i = 5; i < 16; i++) {
        memset(data, i, 4096);
        if (backend_write(world.backend, i * 4096, 4096, buffers_one(&iov), REQUEST_COMPRESSED) == 0) {
            memset(world.model + i * 4096, i, 4096);
        } else {
            failed = true;
        }
    }
    failed |= backend_flush(world.backend) < 0;
    *ret_done = disk->changes <= at;
    g_assert_true(*ret_done || failed);
    do_read(&world, 0, world.size);
    backend_destroy(world.backend);
    g_assert_cmpint(graph_delete(world.graph, "top", NULL), ==, 0);
    g_assert_true(g_file_set_contents(path, (char *)disk->now->data, disk->now->len, NULL));
    int code = testing_run(false, "qemu-img check -q -f qcow2 %s", path);
    g_assert_true(code == 0 || code == 3);
    g_autofree uint8_t *content = peer_content(path, world.size);
    g_assert_cmpmem(content, world.size, world.model, world.size);
    g_free(world.model);
    node_release(node);
    graph_destroy(world.graph);
    memory_disk_destroy(disk);
}

static void coroutine_fn test_faults(void *unused)
{
    bool done = false;
    for (uint64_t at = 0; !done; at++) {
        g_assert_cmpuint(at, <, 200);
        fail_at(at, &done);
    }
    testing_remove_directory();
}

static void run(gconstpointer test)
{
    struct loop *loop;
    g_assert_no_errno(loop_create(ENGINE_AUTO, &loop, NULL));
    loop_run_coroutine(loop, (void (*)(void *))test, NULL);
    loop_destroy(loop);
}

static void run_with_peer(gconstpointer test)
{
    if (testing_have_peer()) {
        run(test);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    testing_register_drivers();
    g_test_add_data_func("/qcow2/compressed/codec", test_codec, run);
    g_test_add_data_func("/qcow2/compressed/kept", test_kept, run);
    g_test_add_data_func("/qcow2/compressed/random", test_random, run_with_peer);
    g_test_add_data_func("/qcow2/compressed/theirs", test_theirs, run_with_peer);
    g_test_add_data_func("/qcow2/compressed/refusals", test_refusals, run_with_peer);
    g_test_add_data_func("/qcow2/compressed/faults", test_faults, run_with_peer);
    return g_test_run();
}

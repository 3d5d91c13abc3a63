/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Growing and shrinking qcow2 overlays. What a growth adds reads as zeroes: over a backing file that is longer, over
 * one that is not open, over clusters that stand behind the end already; as we read it and as the peer does, and after
 * a power cut at any moment of it. A model of bytes says what must be there.
 *
 * QCOW2_SEED and QCOW2_CASES choose other runs than the short slice.
 */
#include "base/size.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_create.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include "loop/sim.h"
#include <endian.h>
#include <errno.h>
#include <string.h>

enum { SECTOR = 512, BACKING_BYTE = 0x55, SIZE_LIMIT = 3 << 20 };

struct world {
    struct memory_disk *disk, *base; /* base NULL: no backing file */
    struct graph *graph;
    struct node *disk_node, *base_node, *node;
    struct backend *backend;
    uint64_t random, size;
    unsigned version, cluster_bits;
    uint8_t *model; /* SIZE_LIMIT bytes */
};

static uint64_t below(struct world *world, uint64_t limit)
{
    return testing_random(&world->random) % limit;
}

static void coroutine_fn world_open(struct world *world, bool with_backing)
{
    const char *backing = with_backing && world->base ? "\"base\"" : "null";
    world->graph = graph_create();
    world->disk_node = memory_disk_open(world->disk, world->graph, "disk");
    if (world->base) {
        world->base_node = memory_disk_open(world->base, world->graph, "base");
    }
    world->node = testing_add(world->graph, NULL,
                              "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"discard\":\"unmap\",\"file\":\"disk\","
                              "\"backing\":%s}",
                              backing);
    world->backend = testing_backend(world->graph, world->node);
}

static void coroutine_fn world_close(struct world *world)
{
    backend_destroy(world->backend);
    g_assert_no_errno(graph_delete(world->graph, "top", NULL));
    node_release(world->disk_node);
    if (world->base) {
        node_release(world->base_node);
    }
    graph_destroy(world->graph);
}

static void coroutine_fn world_create(struct world *world, uint64_t base_bytes)
{
    struct qcow2_create_options options = {
        .size = world->size, .version = world->version, .cluster_bits = world->cluster_bits};
    world->disk = memory_disk_create(NULL, 0, 64 * MiB);
    world->model = g_malloc0(SIZE_LIMIT);
    if (base_bytes) {
        g_autofree uint8_t *content = g_malloc(base_bytes);
        memset(content, BACKING_BYTE, base_bytes);
        memset(world->model, BACKING_BYTE, MIN(base_bytes, world->size));
        world->base = memory_disk_create(content, base_bytes, 64 * MiB);
        options.backing_file = "base.raw";
        options.backing_format = "raw";
    }
    world->graph = graph_create();
    struct node *node = memory_disk_open(world->disk, world->graph, "disk");
    struct backend *backend = testing_backend(world->graph, node);
    g_assert_no_errno(qcow2_create(backend_edge(backend), &options, NULL));
    backend_destroy(backend);
    node_release(node);
    graph_destroy(world->graph);
}

static void world_destroy(struct world *world)
{
    memory_disk_destroy(world->disk);
    if (world->base) {
        memory_disk_destroy(world->base);
    }
    g_free(world->model);
}

static void coroutine_fn put(struct world *world, uint64_t offset, uint64_t bytes, uint8_t value)
{
    struct iovec iov = {world->model + offset, bytes};
    memset(world->model + offset, value, bytes);
    g_assert_cmpint(backend_write(world->backend, offset, bytes, buffers_one(&iov), 0), ==, 0);
}

static void compare(const struct world *world, const char *who, const uint8_t *content, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++) {
        if (content[i] != world->model[i]) {
            g_error("%s: byte %" G_GUINT64_FORMAT " of %" G_GUINT64_FORMAT " is 0x%02x, not 0x%02x", who, i, bytes,
                    content[i], world->model[i]);
        }
    }
}

static void coroutine_fn verify(struct world *world, uint64_t bytes)
{
    g_autofree uint8_t *content = g_malloc(bytes);
    struct iovec iov = {content, bytes};
    g_assert_cmpuint(backend_size(world->backend), ==, world->size);
    g_assert_no_errno(backend_read(world->backend, 0, bytes, buffers_one(&iov), 0));
    compare(world, "us", content, bytes);
}

/* The image is clean (or leaks, after a cut) and shows the model, by the peer. */
static void verify_with_peer(const struct world *world, const GByteArray *image, uint64_t size, bool may_leak)
{
    g_autofree char *tool = g_find_program_in_path("qemu-img");
    g_autofree char *path = g_strdup_printf("%s/top.qcow2", testing_directory());
    g_autofree char *base = g_strdup_printf("%s/base.raw", testing_directory());
    g_autofree char *raw = g_strdup_printf("%s/top.raw", testing_directory());
    g_autofree char *content = NULL;
    gsize bytes;
    if (!tool) {
        return;
    }
    g_file_set_contents(path, (char *)image->data, image->len, NULL);
    if (world->base) {
        g_file_set_contents(base, (char *)world->base->now->data, world->base->now->len, NULL);
    }
    int code = testing_run(!may_leak, "%s check -q -f qcow2 %s", tool, path);
    g_assert_true(code == 0 || code == 3);
    testing_run(true, "%s convert -f qcow2 -O raw %s %s", tool, path, raw);
    gboolean good = g_file_get_contents(raw, &content, &bytes, NULL);
    g_assert_true(good && bytes == size);
    compare(world, "the peer", (uint8_t *)content, size);
}

/* Another size; the model follows. */
static void coroutine_fn resize(struct world *world, uint64_t size)
{
    struct error *error = NULL;
    if (backend_truncate(world->backend, size, &error) < 0) {
        g_error("%s", error->message);
    }
    if (size > world->size) {
        memset(world->model + world->size, 0, size - world->size);
    }
    world->size = size;
}

/* Random images with backing files of random lengths: written, grown, shrunk, opened again. */
static void coroutine_fn random_case(void *argument)
{
    struct world *world = argument;
    static const unsigned cluster_bits[] = {9, 12, 16};
    world->version = 2 + below(world, 2);
    world->cluster_bits = cluster_bits[below(world, G_N_ELEMENTS(cluster_bits))];
    world->size = (1 + below(world, 1024)) * SECTOR;
    world_create(world, below(world, 4) ? (1 + below(world, SIZE_LIMIT / SECTOR)) * SECTOR - below(world, SECTOR) : 0);
    world_open(world, true);
    for (unsigned i = 0; i < 40; i++) {
        uint64_t offset = below(world, world->size / SECTOR) * SECTOR;
        uint64_t bytes = (1 + below(world, 300)) * SECTOR;
        uint64_t more = (1 + below(world, below(world, 3) ? 40 : 1000)) * SECTOR;
        switch (below(world, 8)) {
        case 0:
        case 1:
            resize(world, MIN(world->size + more, (uint64_t)SIZE_LIMIT));
            break;
        case 2:
            if (world->version == 3 || !world->base) {
                resize(world, MAX(world->size - MIN(more, world->size), (uint64_t)SECTOR));
            }
            break;
        case 3:
            world_close(world);
            world_open(world, true);
            break;
        default:
            put(world, offset, MIN(bytes, world->size - offset), 1 + below(world, 250));
        }
        verify(world, world->size);
    }
    world_close(world);
    verify_with_peer(world, world->disk->now, world->size, false);
    world_destroy(world);
}

static void test_random(void)
{
    struct loop *loop;
    const char *seed = g_getenv("QCOW2_SEED"), *cases = g_getenv("QCOW2_CASES");
    uint64_t first = seed ? g_ascii_strtoull(seed, NULL, 10) : 1;
    uint64_t count = cases ? g_ascii_strtoull(cases, NULL, 10) : 24;
    g_assert_no_errno(loop_create(ENGINE_AUTO, &loop, NULL));
    for (uint64_t i = first; i < first + count; i++) {
        struct world world = {.random = i};
        g_test_message("QCOW2_SEED=%" G_GUINT64_FORMAT " QCOW2_CASES=1", i);
        loop_run_coroutine(loop, random_case, &world);
    }
    loop_destroy(loop);
    testing_remove_directory();
}

/* Clusters behind the end, as somebody leaves them who shortens an image by its header alone. */
static void coroutine_fn leftovers(void *argument)
{
    for (unsigned version = 2; version <= 3; version++) {
        for (unsigned backing = 0; backing < 2; backing++) {
            struct world world = {.size = 2 * MiB, .version = version, .cluster_bits = 12};
            world_create(&world, backing ? 1 * MiB : 0);
            world_open(&world, true);
            put(&world, 0, 2 * MiB, 7);
            world_close(&world);
            world.size = 512 * KiB + SECTOR;
            uint64_t word = htobe64(world.size);
            memcpy(world.disk->now->data + offsetof(struct qcow2_disk_header, size), &word, 8);
            world_open(&world, true);
            verify(&world, world.size);
            resize(&world, 2 * MiB);
            verify(&world, 2 * MiB);
            world_close(&world);
            verify_with_peer(&world, world.disk->now, world.size, false);
            world_destroy(&world);
        }
    }
    testing_remove_directory();
}

/* The header names a backing file that is not open now: it does not show later either. */
static void coroutine_fn absent_backing(void *argument)
{
    for (unsigned version = 2; version <= 3; version++) {
        struct world world = {.size = 64 * KiB, .version = version, .cluster_bits = 12};
        world_create(&world, 1 * MiB);
        world_open(&world, false);
        resize(&world, 512 * KiB + SECTOR);
        world_close(&world);
        world_open(&world, true);
        verify(&world, world.size);
        world_close(&world);
        world_destroy(&world);

        /* What the last cluster shows is in that file alone. */
        struct world part = {.size = 64 * KiB + SECTOR, .version = version, .cluster_bits = 12};
        world_create(&part, 1 * MiB);
        world_open(&part, false);
        struct error *error = NULL;
        g_assert_cmpint(backend_truncate(part.backend, 512 * KiB, &error), ==, -ENOTSUP);
        g_assert_nonnull(strstr(error->message, "base.raw"));
        error_free(error);
        g_assert_cmpuint(backend_size(part.backend), ==, part.size);
        world_close(&part);
        world_open(&part, true);
        verify(&part, part.size);
        resize(&part, 512 * KiB);
        verify(&part, part.size);
        world_close(&part);
        world_destroy(&part);
    }
}

/* What a cut leaves has the old size or the new one, shows what it must, and can be grown (again). */
static void coroutine_fn verify_cut(const struct world *before, uint64_t size, uint64_t seed)
{
    GByteArray *left = memory_disk_cut(before->disk, seed);
    struct world world = {.random = seed, .base = before->base};
    world.disk = memory_disk_create(left->data, left->len, 64 * MiB);
    world.model = g_memdup2(before->model, SIZE_LIMIT);
    world_open(&world, true);
    world.size = backend_size(world.backend);
    g_assert_true(world.size == before->size || world.size == size);
    verify(&world, world.size);
    if (world.size < size) {
        resize(&world, size);
        verify(&world, size);
    }
    world_close(&world);
    if (seed % 16 == 0) {
        verify_with_peer(&world, world.disk->now, size, true);
    }
    world.base = NULL;
    world_destroy(&world);
    g_byte_array_unref(left);
}

/* The power goes at each change of a growth in turn. */
static void coroutine_fn cuts(void *argument)
{
    static const struct {
        unsigned version, cluster_bits;
        uint64_t size, base, grown;
    } rows[] = {
        {3, 16, 100 * SECTOR, 1 * MiB, 700 * SECTOR},
        {3, 9, 33 * SECTOR, 256 * KiB, 300 * SECTOR}, /* the L1 table moves */
        {2, 12, 101 * SECTOR, 1 * MiB, 300 * SECTOR},
    };
    uint64_t seed = 1;
    for (unsigned i = 0; i < G_N_ELEMENTS(rows); i++) {
        bool fails = true;
        for (unsigned at = 0; fails; at++) {
            struct world world = {
                .size = rows[i].size, .version = rows[i].version, .cluster_bits = rows[i].cluster_bits};
            world_create(&world, rows[i].base);
            world_open(&world, true);
            put(&world, 10 * SECTOR, 20 * SECTOR, 9);
            g_assert_no_errno(backend_flush(world.backend));
            world.disk->keeps_log = true;
            world.disk->changes = 0;
            world.disk->fail_first = at;
            world.disk->fail_end = UINT64_MAX;
            world.disk->fail_code = -EIO;
            fails = backend_truncate(world.backend, rows[i].grown, NULL) < 0;
            memset(world.model + world.size, 0, rows[i].grown - world.size);
            for (unsigned cut = 0; cut < 6; cut++) {
                verify_cut(&world, rows[i].grown, seed++);
            }
            world.disk->fail_end = 0;
            world_close(&world);
            world_destroy(&world);
        }
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

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    sim_create_if_asked();
    testing_register_drivers();
    g_test_add_func("/qcow2/resize/random", test_random);
    g_test_add_data_func("/qcow2/resize/leftovers", leftovers, run);
    g_test_add_data_func("/qcow2/resize/absent-backing", absent_backing, run);
    g_test_add_data_func("/qcow2/resize/cuts", cuts, run);
    return g_test_run();
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Interoperability with the peer's tools, randomized: an image (and its backing chain) is made by the peer, opened
 * here, written, zeroed, discarded and read by several coroutines on two loops, closed, and then checked and compared
 * by the peer. A model in memory says what each byte must be; a range lock of the test's own keeps two requests from
 * the same byte, but not from the same cluster.
 *
 * A seed says all but the interleaving. QCOW2_SEED and QCOW2_CASES choose other ones than the short slice.
 */
#include "base/size.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib/gstdio.h>
#include <stdlib.h>
#include <string.h>

enum { WORKERS = 8, OPERATIONS = 120, DEPTH_MAX = 3 };

struct shape {
    unsigned cluster_bits, refcount_bits, version, depth;
    const char *preallocation;
    bool compressed, snapshot, bitmap, small_cache, second_loop, lazy, extended, external, raw, no_unref;
    uint64_t size;
};

struct stress {
    struct shape shape;
    uint64_t seed;
    struct graph *graph;
    struct backend *backend;
    struct range_lock ranges;
    struct co_group workers;
    uint8_t *model;
    uint8_t *original; /* content before anything was written here */
    uint8_t *below;    /* content of the backing chain */
    char *top;
    uint64_t unit; /* what tables tell apart: a cluster or a subcluster */
};

struct worker {
    struct stress *stress;
    uint64_t random;
};

static uint64_t below(uint64_t *random, uint64_t limit)
{
    return testing_random(random) % limit;
}

static void choose_range(struct worker *worker, uint64_t *ret_offset, uint64_t *ret_bytes)
{
    const struct shape *shape = &worker->stress->shape;
    uint64_t cluster = below(&worker->random, 2) ? worker->stress->unit : (uint64_t)1 << shape->cluster_bits;
    uint64_t *random = &worker->random;
    uint64_t offset = below(random, shape->size);
    uint64_t most = below(random, 4) ? cluster : cluster * 6;
    uint64_t bytes = 1 + below(random, most);
    switch (below(random, 4)) {
    case 0:
        offset = align_down(offset, cluster);
        bytes = align_up(bytes, cluster);
        break;
    case 1:
        offset = align_down(offset, 512);
        bytes = align_up(bytes, 512);
        break;
    default:
        break;
    }
    *ret_offset = offset;
    *ret_bytes = min_u64(bytes, shape->size - offset);
}

static void coroutine_fn check_read(struct stress *stress, uint64_t offset, uint64_t bytes)
{
    g_autofree uint8_t *data = g_malloc(bytes);
    memset(data, 0xa5, bytes);
    /* In two pieces of memory, so that views are split. */
    struct iovec iov[] = {{data, bytes / 3}, {data + bytes / 3, bytes - bytes / 3}};
    int code = backend_read(stress->backend, offset, bytes, (struct buffers){iov, 2, 0}, 0);
    g_assert_cmpint(code, ==, 0);
    for (uint64_t i = 0; i < bytes; i++) {
        if (data[i] != stress->model[offset + i]) {
            g_error("seed %" G_GUINT64_FORMAT ": byte %" G_GUINT64_FORMAT " is %02x, not %02x", stress->seed,
                    offset + i, data[i], stress->model[offset + i]);
        }
    }
}

static void coroutine_fn do_write(struct worker *worker, uint64_t offset, uint64_t bytes)
{
    struct stress *stress = worker->stress;
    uint8_t *model = stress->model + offset;
    uint64_t pattern = testing_random(&worker->random);
    for (uint64_t i = 0; i < bytes; i++) {
        model[i] = pattern >> (i % 8 * 8);
    }
    g_autofree struct iovec *iov = g_new(struct iovec, 1200);
    unsigned count = 1;
    iov[0] = (struct iovec){model, bytes};
    if (bytes > 8192 && below(&worker->random, 4) == 0) {
        count = 1 + below(&worker->random, 1200);
        for (unsigned i = 0; i < count; i++) {
            uint64_t part = bytes / count;
            iov[i] = (struct iovec){model + i * part, i + 1 < count ? part : bytes - i * part};
        }
    }
    unsigned flags = below(&worker->random, 16) ? 0 : REQUEST_FUA;
    int code = backend_write(stress->backend, offset, bytes, (struct buffers){iov, count, 0}, flags);
    g_assert_cmpint(code, ==, 0);
}

static void coroutine_fn do_zero(struct worker *worker, uint64_t offset, uint64_t bytes)
{
    unsigned flags = below(&worker->random, 2) ? REQUEST_MAY_UNMAP : 0;
    memset(worker->stress->model + offset, 0, bytes);
    int code = backend_write_zeroes(worker->stress->backend, offset, bytes, flags);
    g_assert_cmpint(code, ==, 0);
}

static void coroutine_fn do_discard(struct worker *worker, uint64_t offset, uint64_t bytes)
{
    struct stress *stress = worker->stress;
    uint64_t unit = stress->shape.raw ? 1 : stress->unit;
    int code = backend_discard(stress->backend, offset, bytes);
    g_assert_cmpint(code, ==, 0);
    uint64_t first = align_up(offset, unit);
    uint64_t end = offset + bytes;
    if (end < stress->shape.size) {
        end = align_down(end, unit);
    }
    if (first < end && (stress->shape.version == 3 || stress->shape.depth == 0)) {
        memset(stress->model + first, 0, end - first);
    }
}

/* What stream does, with no lock at all against the other workers: it must change nothing that shows. */
static void coroutine_fn do_copy_up(struct worker *worker, uint64_t offset, uint64_t bytes)
{
    struct stress *stress = worker->stress;
    uint64_t cluster = stress->unit;
    uint64_t end = min_u64(align_up(offset + bytes, cluster), stress->shape.size);
    offset = align_down(offset, cluster);
    struct iovec iov = {stress->below + offset, end - offset};
    int code = backend_write(stress->backend, offset, end - offset, buffers_one(&iov), REQUEST_IF_UNALLOCATED);
    g_assert_cmpint(code, ==, 0);
}

static void coroutine_fn check_status(struct worker *worker, uint64_t offset, uint64_t bytes)
{
    struct extent extent;
    struct stress *stress = worker->stress;
    int code = backend_block_status(stress->backend, NULL, offset, bytes, &extent);
    g_assert_cmpint(code, ==, 0);
    if (extent.flags & EXTENT_ZERO) {
        g_assert_true(memory_is_zero(stress->model + offset, min_u64(bytes, extent.bytes)));
    }
}

static void coroutine_fn do_operation(struct worker *worker)
{
    struct stress *stress = worker->stress;
    struct range_hold hold;
    uint64_t offset;
    uint64_t bytes;
    unsigned what = below(&worker->random, 100);
    choose_range(worker, &offset, &bytes);
    if (what < 3) {
        int code = backend_flush(stress->backend);
        g_assert_cmpint(code, ==, 0);
        return;
    }
    if (what < 13) {
        do_copy_up(worker, offset, bytes);
        return;
    }
    if (what >= 62 && what < 75 && stress->shape.compressed) { /* parts of a compressed cluster are not discarded */
        uint64_t cluster = (uint64_t)1 << stress->shape.cluster_bits;
        uint64_t end = min_u64(align_up(offset + bytes, cluster), stress->shape.size);
        offset = align_down(offset, cluster);
        bytes = end - offset;
    }
    range_lock_acquire(&stress->ranges, &hold, offset, bytes, false);
    if (what < 50) {
        do_write(worker, offset, bytes);
    } else if (what < 62) {
        do_zero(worker, offset, bytes);
    } else if (what < 75) {
        do_discard(worker, offset, bytes);
    } else if (what < 80) {
        check_status(worker, offset, bytes);
    } else {
        check_read(stress, offset, bytes);
    }
    range_lock_release(&stress->ranges, &hold);
}

static void coroutine_fn worker_main(void *argument)
{
    struct worker *worker = argument;
    for (unsigned i = 0; i < OPERATIONS; i++) {
        do_operation(worker);
    }
    co_group_leave(&worker->stress->workers);
}

/* --- what the peer makes --- */

static void choose_shape(uint64_t *random, struct shape *shape)
{
    static const char *const preallocations[] = {"off", "off", "metadata", "falloc", "full"};
    uint64_t cluster;
    memset(shape, 0, sizeof(*shape));
    shape->cluster_bits = 9 + below(random, 13);
    shape->version = below(random, 4) ? 3 : 2;
    shape->refcount_bits = shape->version == 3 ? 1u << below(random, 7) : 16;
    shape->depth = below(random, DEPTH_MAX + 1);
    shape->preallocation = shape->depth ? "off" : preallocations[below(random, G_N_ELEMENTS(preallocations))];
    shape->compressed = shape->depth == 0 && below(random, 3) == 0;
    shape->snapshot = shape->refcount_bits > 1 && below(random, 4) == 0;
    shape->bitmap = shape->version == 3 && below(random, 4) == 0;
    shape->lazy = shape->version == 3 && below(random, 4) == 0;
    shape->extended = shape->version == 3 && shape->cluster_bits >= 14 && below(random, 2);
    shape->external = shape->version == 3 && !shape->snapshot && !shape->compressed && below(random, 4) == 0;
    shape->raw = shape->external && shape->depth == 0 && below(random, 2);
    shape->no_unref = shape->version == 3 && below(random, 4) == 0;
    shape->small_cache = below(random, 2);
    shape->second_loop = below(random, 2);
    cluster = (uint64_t)1 << shape->cluster_bits;
    shape->size = min_u64(max_u64(cluster * 40, 300 * KiB), 16 * MiB);
    shape->size = align_down(shape->size + below(random, cluster * 2), 512);
}

/* Some writes by the peer into an image. */
static void scribble(uint64_t *random, const char *path, uint64_t size, unsigned cluster_bits)
{
    g_autoptr(GString) command = g_string_new(NULL);
    g_string_append_printf(command, "qemu-io -f qcow2 %s", path);
    for (unsigned i = 0; i < 12; i++) {
        uint64_t offset = align_down(below(random, size), 512);
        uint64_t bytes = align_up(1 + below(random, (uint64_t)2 << cluster_bits), 512);
        bytes = min_u64(bytes, size - offset);
        const char *verb = below(random, 5) ? "" : "-z ";
        g_autofree char *pattern = *verb ? g_strdup("") : g_strdup_printf("-P %u ", 1 + (unsigned)below(random, 255));
        g_string_append_printf(command, " -c \"write %s%s%" G_GUINT64_FORMAT " %" G_GUINT64_FORMAT "\"", verb, pattern,
                               offset, bytes);
    }
    testing_run(true, "%s", command->str);
}

static uint8_t *content_of(struct stress *stress, const char *path, const char *options)
{
    g_autofree char *raw = g_strdup_printf("%s/content.raw", testing_directory());
    char *data;
    gsize bytes;
    testing_run(true, "qemu-img convert %s -f qcow2 -O raw %s %s", options, path, raw);
    gboolean read = g_file_get_contents(raw, &data, &bytes, NULL);
    g_assert_true(read);
    if (bytes < stress->shape.size) {
        data = g_realloc(data, stress->shape.size);
        memset(data + bytes, 0, stress->shape.size - bytes);
    }
    g_unlink(raw);
    return (uint8_t *)data;
}

/* Only the top has one: those below are of its kind otherwise. */
static char *data_file_options(const struct shape *shape, unsigned layer)
{
    return shape->external && layer == shape->depth
               ? g_strdup_printf(",data_file=%s/data,data_file_raw=%s", testing_directory(), shape->raw ? "on" : "off")
               : g_strdup("");
}

static void make_images(struct stress *stress, uint64_t *random)
{
    const struct shape *shape = &stress->shape;
    g_autofree char *options = g_strdup_printf("cluster_size=%u,compat=%s,preallocation=%s%s",
                                               1u << shape->cluster_bits, shape->version == 3 ? "1.1" : "0.10",
                                               shape->preallocation, shape->lazy ? ",lazy_refcounts=on" : "");
    const char *extended = shape->extended ? ",extended_l2=on" : "";
    g_autofree char *width = shape->version == 3 ? g_strdup_printf(",refcount_bits=%u", shape->refcount_bits) : NULL;
    g_autofree char *previous = NULL;
    for (unsigned i = 0; i <= shape->depth; i++) {
        /* Layers below may be shorter or longer. */
        uint64_t size = shape->size;
        if (i < shape->depth && below(random, 2)) {
            size = align_down(size / 2 + below(random, size), 512);
        }
        g_autofree char *path = g_strdup_printf("%s/layer%u.qcow2", testing_directory(), i);
        g_autofree char *backing = previous ? g_strdup_printf("-F qcow2 -b %s", previous) : g_strdup("");
        g_autofree char *data = data_file_options(shape, i);
        testing_run(true, "qemu-img create -f qcow2 -o %s%s%s%s %s %s %" G_GUINT64_FORMAT, options, width ? width : "",
                    extended, data, backing, path, size);
        if (i < shape->depth || below(random, 2)) {
            scribble(random, path, size, shape->cluster_bits);
        }
        if (i == 0 && shape->compressed) {
            g_autofree char *plain = g_strdup_printf("%s/plain.qcow2", testing_directory());
            g_rename(path, plain);
            testing_run(true, "qemu-img convert -c -O qcow2 -o cluster_size=%u,compat=%s%s %s %s",
                        1u << shape->cluster_bits, shape->version == 3 ? "1.1" : "0.10", extended, plain, path);
        }
        g_free(previous);
        previous = g_steal_pointer(&path);
    }
    stress->top = g_steal_pointer(&previous);
    if (shape->snapshot) {
        testing_run(true, "qemu-img snapshot -c s1 %s", stress->top);
    }
    if (shape->bitmap) {
        testing_run(true, "qemu-img bitmap --add %s b0", stress->top);
    }
    stress->original = content_of(stress, stress->top, "");
    stress->model = g_memdup2(stress->original, shape->size);
    if (shape->depth) {
        g_autofree char *path = g_strdup_printf("%s/layer%u.qcow2", testing_directory(), shape->depth - 1);
        stress->below = content_of(stress, path, "");
    } else {
        stress->below = g_malloc0(shape->size);
    }
}

/* --- a case --- */

static void coroutine_fn run_workers(struct stress *stress, struct loop *second)
{
    struct worker workers[WORKERS];
    co_group_init(&stress->workers);
    range_lock_init(&stress->ranges);
    for (unsigned i = 0; i < WORKERS; i++) {
        workers[i] = (struct worker){stress, stress->seed * 1000 + i};
        co_group_enter(&stress->workers);
        loop_spawn(second && i % 2 ? second : loop_self(), worker_main, &workers[i]);
    }
    co_group_wait(&stress->workers);
    co_group_destroy(&stress->workers);
    range_lock_destroy(&stress->ranges);
}

static void coroutine_fn run_case(void *argument)
{
    struct stress *stress = argument;
    struct loop *second = NULL;
    stress->graph = graph_create();
    struct node *node =
        testing_add(stress->graph, NULL,
                    "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"discard\":\"unmap\",%s%s"
                    "\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}",
                    stress->shape.no_unref ? "\"discard-no-unref\":true," : "",
                    stress->shape.small_cache ? "\"l2-cache-size\":1,\"refcount-cache-size\":1," : "", stress->top);
    stress->backend = testing_backend(stress->graph, node);
    g_assert_cmpuint(backend_size(stress->backend), ==, stress->shape.size);
    if (stress->shape.second_loop) {
        int code = loop_thread_start("second", ENGINE_AUTO, &second, NULL);
        g_assert_cmpint(code, ==, 0);
    }
    run_workers(stress, second);
    check_read(stress, 0, stress->shape.size);
    if (second) {
        loop_thread_join(second);
    }
    backend_destroy(stress->backend);
    int code = graph_delete(stress->graph, "top", NULL);
    g_assert_cmpint(code, ==, 0);
    graph_destroy(stress->graph);
}

static void verify_with_peer(struct stress *stress)
{
    testing_run(true, "qemu-img check -q %s", stress->top);
    g_autofree uint8_t *content = content_of(stress, stress->top, "");
    for (uint64_t i = 0; i < stress->shape.size; i++) {
        if (content[i] != stress->model[i]) {
            g_error("seed %" G_GUINT64_FORMAT ": the peer reads byte %" G_GUINT64_FORMAT " as %02x, not %02x",
                    stress->seed, i, content[i], stress->model[i]);
        }
    }
    if (stress->shape.raw) { /* the same, for who knows nothing of qcow2 */
        g_autofree char *path = g_strdup_printf("%s/data", testing_directory());
        g_autofree char *data = NULL;
        gsize bytes = 0;
        gboolean good = g_file_get_contents(path, &data, &bytes, NULL);
        g_assert_true(good && bytes >= stress->shape.size && memcmp(data, stress->model, stress->shape.size) == 0);
    }
    if (stress->shape.snapshot) {
        g_autofree uint8_t *old = content_of(stress, stress->top, "-l s1");
        g_assert_true(memcmp(old, stress->original, stress->shape.size) == 0);
    }
}

static void one_case(struct loop *loop, uint64_t seed)
{
    struct stress stress = {.seed = seed};
    uint64_t random = seed;
    choose_shape(&random, &stress.shape);
    stress.unit = (uint64_t)1 << (stress.shape.cluster_bits - (stress.shape.extended ? 5 : 0));
    g_test_message("seed %" G_GUINT64_FORMAT
                   ": clusters 2^%u, refcounts %u bits, v%u, depth %u, preallocation %s%s%s%s%s%s%s",
                   seed, stress.shape.cluster_bits, stress.shape.refcount_bits, stress.shape.version,
                   stress.shape.depth, stress.shape.preallocation, stress.shape.compressed ? ", compressed" : "",
                   stress.shape.snapshot ? ", snapshot" : "", stress.shape.bitmap ? ", bitmap" : "",
                   stress.shape.extended ? ", subclusters" : "",
                   stress.shape.raw        ? ", raw data file"
                   : stress.shape.external ? ", data file"
                                           : "",
                   stress.shape.no_unref ? ", discard-no-unref" : "");
    make_images(&stress, &random);
    loop_run_coroutine(loop, run_case, &stress);
    verify_with_peer(&stress);
    g_free(stress.model);
    g_free(stress.original);
    g_free(stress.below);
    g_free(stress.top);
    testing_remove_directory();
}

static uint64_t number(const char *variable, uint64_t otherwise)
{
    const char *text = g_getenv(variable);
    return text ? g_ascii_strtoull(text, NULL, 10) : otherwise;
}

static void test_interop(void)
{
    struct loop *loop;
    if (!testing_have_peer()) {
        return;
    }
    int code = loop_create(ENGINE_AUTO, &loop, NULL);
    g_assert_cmpint(code, ==, 0);
    uint64_t seed = number("QCOW2_SEED", 1);
    uint64_t cases = number("QCOW2_CASES", 16);
    for (uint64_t i = 0; i < cases; i++) {
        one_case(loop, seed + i);
    }
    loop_destroy(loop);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    testing_register_drivers();
    g_test_add_func("/qcow2/interop", test_interop);
    return g_test_run();
}

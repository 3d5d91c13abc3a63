/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Power cuts. An image on a memory disk is written, zeroed, discarded and flushed by several coroutines whose requests
 * interleave; at random moments the power is cut, and any subset of the sectors that were not flushed survives (all of
 * them: that is a kill -9). What is left must be an image that leaks at most, by the peer's check, and that holds
 * each block as it was at some moment between its last acknowledged flush and now.
 *
 * Every block has a sequence of versions; version 0 is what was there before the test. QCOW2_SEED and QCOW2_CASES
 * choose other runs than the short slice.
 */
#include "base/size.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_create.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib/gstdio.h>
#include <string.h>

enum { BLOCK = 4096, WORKERS = 6, OPERATIONS = 120, CUTS = 6, VERSIONS_MAX = 4096 };

struct block {
    uint16_t issued, completed, stable; /* versions */
    uint8_t zero[VERSIONS_MAX / 8];     /* a bit per version */
};

struct crash {
    uint64_t seed, size, blocks;
    unsigned cluster_bits;
    uint8_t *initial;
    struct block *block;
    struct memory_disk *disk, *data; /* data: of the external data file, or NULL */
    char *data_path;                 /* where its content goes */
    bool extended, raw, no_unref;
    struct graph *graph;
    struct backend *backend;
    struct range_lock ranges;
    struct co_group workers;
    unsigned running;
    uint64_t random;
    unsigned serial;
};

static uint64_t below(uint64_t *random, uint64_t limit)
{
    return testing_random(random) % limit;
}

static void fill(uint8_t *to, uint64_t block, unsigned version)
{
    uint64_t word = (block + 1) << 32 | version;
    for (unsigned i = 0; i < BLOCK; i += 8) {
        memcpy(to + i, &word, 8);
    }
}

static void expected(const struct crash *crash, uint64_t index, unsigned version, uint8_t *to)
{
    const struct block *block = &crash->block[index];
    if (version == 0) {
        memcpy(to, crash->initial + index * BLOCK, BLOCK);
    } else if (block->zero[version / 8] >> (version % 8) & 1) {
        memset(to, 0, BLOCK);
    } else {
        fill(to, index, version);
    }
}

/* --- the writers --- */

static void issue(struct crash *crash, uint64_t first, uint64_t count, bool zero)
{
    for (uint64_t i = first; i < first + count; i++) {
        struct block *block = &crash->block[i];
        block->issued++;
        g_assert_cmpuint(block->issued, <, VERSIONS_MAX);
        if (zero) {
            block->zero[block->issued / 8] |= 1u << (block->issued % 8);
        }
    }
}

static void complete(struct crash *crash, uint64_t first, uint64_t count, bool stable)
{
    for (uint64_t i = first; i < first + count; i++) {
        struct block *block = &crash->block[i];
        block->completed = block->issued;
        if (stable) {
            block->stable = block->completed;
        }
    }
}

static void coroutine_fn do_flush(struct crash *crash)
{
    g_autofree uint16_t *before = g_new(uint16_t, crash->blocks);
    for (uint64_t i = 0; i < crash->blocks; i++) {
        before[i] = crash->block[i].completed;
    }
    int code = backend_flush(crash->backend);
    g_assert_cmpint(code, ==, 0);
    for (uint64_t i = 0; i < crash->blocks; i++) {
        crash->block[i].stable = MAX(crash->block[i].stable, before[i]);
    }
}

/* A bit for each sector that is as it was in one of the versions. */
static unsigned match(const struct crash *crash, uint64_t index, unsigned first, unsigned last, const uint8_t *content)
{
    unsigned good = 0;
    for (unsigned version = first; version <= last; version++) {
        uint8_t wanted[BLOCK];
        expected(crash, index, version, wanted);
        for (unsigned sector = 0; sector < BLOCK / 512; sector++) {
            if (memcmp(wanted + sector * 512, content + sector * 512, 512) == 0) {
                good |= 1u << sector;
            }
        }
    }
    return good;
}

/* Without a lock against writers: what is read is of some moment between the beginning and the end. */
static void coroutine_fn do_read(struct crash *crash, uint64_t first, uint64_t count)
{
    g_autofree uint8_t *data = g_malloc(count * BLOCK);
    g_autofree uint16_t *before = g_new(uint16_t, count);
    struct iovec iov = {data, count * BLOCK};
    for (uint64_t i = 0; i < count; i++) {
        before[i] = crash->block[first + i].completed;
    }
    int code = backend_read(crash->backend, first * BLOCK, count * BLOCK, buffers_one(&iov), 0);
    g_assert_cmpint(code, ==, 0);
    for (uint64_t i = 0; i < count; i++) {
        unsigned issued = crash->block[first + i].issued;
        g_assert_cmphex(match(crash, first + i, before[i], issued, data + i * BLOCK), ==, 0xff);
    }
}

static void coroutine_fn do_write(struct crash *crash, uint64_t first, uint64_t count, bool compressed)
{
    g_autofree uint8_t *data = g_malloc(count * BLOCK);
    bool stable = below(&crash->random, 16) == 0;
    int code = -EIO;
    issue(crash, first, count, false);
    for (uint64_t i = 0; i < count; i++) {
        fill(data + i * BLOCK, first + i, crash->block[first + i].issued);
    }
    struct iovec iov = {data, count * BLOCK};
    unsigned flags = stable ? REQUEST_FUA : 0;
    if (compressed) {
        code =
            backend_write(crash->backend, first * BLOCK, count * BLOCK, buffers_one(&iov), flags | REQUEST_COMPRESSED);
    }
    if (code == -EIO) { /* never compressed over what has a place */
        code = backend_write(crash->backend, first * BLOCK, count * BLOCK, buffers_one(&iov), flags);
    }
    g_assert_cmpint(code, ==, 0);
    complete(crash, first, count, stable);
}

static void coroutine_fn do_zero(struct crash *crash, uint64_t first, uint64_t count, bool discard)
{
    int code;
    issue(crash, first, count, true);
    if (discard) {
        code = backend_discard(crash->backend, first * BLOCK, count * BLOCK);
    } else {
        unsigned flags = below(&crash->random, 2) ? REQUEST_MAY_UNMAP : 0;
        code = backend_write_zeroes(crash->backend, first * BLOCK, count * BLOCK, flags);
    }
    g_assert_cmpint(code, ==, 0);
    complete(crash, first, count, false);
}

static void coroutine_fn do_operation(struct crash *crash)
{
    uint64_t first = below(&crash->random, crash->blocks);
    uint64_t count = min_u64(1 + below(&crash->random, below(&crash->random, 4) ? 4 : 40), crash->blocks - first);
    unsigned what = below(&crash->random, 100);
    struct range_hold hold;
    if (what < 8) {
        do_flush(crash);
        return;
    }
    if (what >= 82) {
        do_read(crash, first, count);
        return;
    }
    bool compressed = what < 25 && !crash->data;
    /* Those are of whole clusters here, or discards of whole subclusters where nothing is compressed. */
    if (what >= 70 || compressed) {
        bool split = crash->extended && crash->data;
        unsigned unit_bits = crash->cluster_bits - (split ? 5 : 0);
        uint64_t per_cluster = MAX(((uint64_t)1 << unit_bits) / BLOCK, 1);
        first = first / per_cluster * per_cluster;
        count = MIN((count + per_cluster - 1) / per_cluster * per_cluster, crash->blocks - first);
    }
    range_lock_acquire(&crash->ranges, &hold, first * BLOCK, count * BLOCK, false);
    if (what < 55) {
        do_write(crash, first, count, compressed);
    } else {
        do_zero(crash, first, count, what >= 70);
    }
    range_lock_release(&crash->ranges, &hold);
}

static void coroutine_fn worker_main(void *argument)
{
    struct crash *crash = argument;
    for (unsigned i = 0; i < OPERATIONS; i++) {
        do_operation(crash);
    }
    crash->running--;
    co_group_leave(&crash->workers);
}

/* --- the cuts --- */

static void verify_block(const struct crash *crash, uint64_t index, const uint8_t *content)
{
    const struct block *block = &crash->block[index];
    unsigned sectors_good = match(crash, index, block->stable, block->issued, content);
    if (sectors_good != 0xff) {
        g_error("seed %" G_GUINT64_FORMAT ", cut %u: block %" G_GUINT64_FORMAT " (stable %u, issued %u) holds neither "
                "of its versions: %02x; begins with %02x%02x%02x%02x%02x%02x%02x%02x",
                crash->seed, crash->serial, index, block->stable, block->issued, sectors_good, content[0], content[1],
                content[2], content[3], content[4], content[5], content[6], content[7]);
    }
}

/* What is left of a disk goes to a file; to be freed by the caller. */
static GByteArray *cut_disk(struct crash *crash, struct memory_disk *disk, const char *path)
{
    GByteArray *left = memory_disk_cut(disk, testing_random(&crash->random));
    gboolean good = g_file_set_contents(path, (const char *)left->data, left->len, NULL);
    g_assert_true(good);
    return left;
}

/* The data file of a raw one is an image without the tables. */
static void verify_raw(struct crash *crash, const GByteArray *data)
{
    g_assert_cmpuint(data->len, >=, crash->size);
    for (uint64_t i = 0; i < crash->blocks; i++) {
        verify_block(crash, i, data->data + i * BLOCK);
    }
}

static void cut_and_verify(struct crash *crash)
{
    g_autofree char *path = g_strdup_printf("%s/cut.qcow2", testing_directory());
    g_autofree char *raw = g_strdup_printf("%s/cut.raw", testing_directory());
    char *content;
    gsize bytes;
    crash->serial++;
    g_byte_array_unref(cut_disk(crash, crash->disk, path));
    if (crash->data) {
        GByteArray *left = cut_disk(crash, crash->data, crash->data_path);
        if (crash->raw) {
            verify_raw(crash, left);
        }
        g_byte_array_unref(left);
    }
    int code = testing_run(false, "qemu-img check -q -f qcow2 %s", path);
    if (code != 0 && code != 3) {
        testing_run(true, "qemu-img check -f qcow2 %s", path);
    }
    testing_run(true, "qemu-img convert -f qcow2 -O raw %s %s", path, raw);
    gboolean good = g_file_get_contents(raw, &content, &bytes, NULL);
    g_assert_true(good && bytes == crash->size);
    for (uint64_t i = 0; i < crash->blocks; i++) {
        verify_block(crash, i, (uint8_t *)content + i * BLOCK);
    }
    g_free(content);
    g_unlink(path);
    g_unlink(raw);
}

/* --- a case --- */

static void coroutine_fn create_image(struct crash *crash, struct node *disk, struct node *data, unsigned refcount_bits)
{
    struct backend *backend = testing_backend(crash->graph, disk);
    struct qcow2_create_options options = {
        .size = crash->size, .cluster_bits = crash->cluster_bits, .refcount_bits = refcount_bits};
    struct backend *data_backend = data ? testing_backend(crash->graph, data) : NULL;
    options.extended_l2 = crash->extended;
    if (data) {
        options.data = backend_edge(data_backend);
        options.data_name = crash->data_path;
        options.data_raw = crash->raw;
    }
    int code = qcow2_create(backend_edge(backend), &options, NULL);
    g_assert_cmpint(code, ==, 0);
    backend_destroy(backend);
    if (data) {
        backend_destroy(data_backend);
    }
}

/* An image by the peer, full of data that a snapshot shares. */
static void load_shared_image(struct crash *crash)
{
    g_autofree char *path = g_strdup_printf("%s/shared.qcow2", testing_directory());
    g_autofree char *raw = g_strdup_printf("%s/shared.raw", testing_directory());
    char *content;
    gsize bytes;
    for (uint64_t i = 0; i < crash->size; i++) {
        crash->initial[i] = i / 700 * 13 + 1;
    }
    g_file_set_contents(raw, (char *)crash->initial, crash->size, NULL);
    testing_run(true, "qemu-img convert -O qcow2 -f raw %s -o cluster_size=%u%s %s %s", crash->seed % 2 ? "-c" : "",
                1u << crash->cluster_bits, crash->extended ? ",extended_l2=on" : "", raw, path);
    testing_run(true, "qemu-img snapshot -c s1 %s", path);
    gboolean good = g_file_get_contents(path, &content, &bytes, NULL);
    g_assert_true(good);
    g_byte_array_append(crash->disk->now, (guint8 *)content, bytes);
    g_byte_array_append(crash->disk->stable, (guint8 *)content, bytes);
    g_free(content);
}

static void coroutine_fn run_case(void *argument)
{
    struct crash *crash = argument;
    crash->graph = graph_create();
    struct node *disk = memory_disk_open(crash->disk, crash->graph, "disk");
    struct node *data = crash->data ? memory_disk_open(crash->data, crash->graph, "data") : NULL;
    if (crash->disk->now->len == 0) {
        create_image(crash, disk, data, 1u << (crash->seed % 7));
    }
    crash->disk->yields = crash->disk->keeps_log = true;
    if (data) {
        crash->data->yields = crash->data->keeps_log = true;
    }
    struct node *node =
        testing_add(crash->graph, NULL,
                    "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"discard\":\"unmap\",%s%s%s"
                    "\"file\":\"disk\"}",
                    data ? "\"data-file\":\"data\"," : "", crash->no_unref ? "\"discard-no-unref\":true," : "",
                    crash->seed % 3 ? "" : "\"l2-cache-size\":1,\"refcount-cache-size\":1,");
    if (crash->seed % 2) { /* caches are trimmed at every flush */
        ((struct qcow2 *)node->state)->options.trim_interval_ns = 1;
    }
    crash->backend = testing_backend(crash->graph, node);
    co_group_init(&crash->workers);
    range_lock_init(&crash->ranges);
    crash->running = WORKERS;
    for (unsigned i = 0; i < WORKERS; i++) {
        co_group_enter(&crash->workers);
        loop_spawn(loop_self(), worker_main, crash);
    }
    for (unsigned cuts = 0; crash->running;) {
        coroutine_pause();
        if (cuts < CUTS && below(&crash->random, 60) == 0) {
            cut_and_verify(crash);
            cuts++;
        }
    }
    co_group_wait(&crash->workers);
    co_group_destroy(&crash->workers);
    range_lock_destroy(&crash->ranges);
    do_flush(crash);
    cut_and_verify(crash);
    backend_destroy(crash->backend);
    int code = graph_delete(crash->graph, "top", NULL);
    g_assert_cmpint(code, ==, 0);
    cut_and_verify(crash);
    node_release(disk);
    if (data) {
        node_release(data);
    }
    graph_destroy(crash->graph);
}

static void one_case(struct loop *loop, uint64_t seed)
{
    struct crash crash = {.seed = seed, .random = seed};
    bool shared = seed % 4 == 3;
    crash.cluster_bits = 9 + below(&crash.random, 9);
    crash.size = align_up(min_u64(max_u64((uint64_t)40 << crash.cluster_bits, 256 * KiB), 2 * MiB), BLOCK);
    crash.blocks = crash.size / BLOCK;
    crash.block = g_new0(struct block, crash.blocks);
    crash.initial = g_malloc0(crash.size);
    crash.disk = memory_disk_create(NULL, 0, 256 * MiB);
    crash.disk->random = seed;
    /* Places that are kept are discarded before the tables say so. */
    crash.no_unref = seed % 5 == 0;
    crash.disk->zeroes = crash.no_unref;
    crash.extended = crash.cluster_bits >= 14 && seed / 4 % 2 == 0;
    if (!shared && seed % 4 == 1) {
        crash.raw = seed % 8 == 1;
        crash.data = memory_disk_create(NULL, 0, 256 * MiB);
        crash.data->random = seed;
        crash.data_path = g_strdup_printf("%s/cut.data", testing_directory());
        crash.data->zeroes = true;
    }
    if (shared) {
        load_shared_image(&crash);
    }
    g_test_message("seed %" G_GUINT64_FORMAT ": clusters 2^%u, %s%s%s%s", seed, crash.cluster_bits,
                   shared ? "shared with a snapshot" : "new", crash.extended ? ", subclusters" : "",
                   crash.raw    ? ", raw data file"
                   : crash.data ? ", data file"
                                : "",
                   crash.no_unref ? ", discard-no-unref" : "");
    loop_run_coroutine(loop, run_case, &crash);
    memory_disk_destroy(crash.disk);
    if (crash.data) {
        memory_disk_destroy(crash.data);
    }
    g_free(crash.data_path);
    g_free(crash.block);
    g_free(crash.initial);
    testing_remove_directory();
}

static uint64_t number(const char *variable, uint64_t otherwise)
{
    const char *text = g_getenv(variable);
    return text ? g_ascii_strtoull(text, NULL, 10) : otherwise;
}

static void test_crash(void)
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
    g_test_add_func("/qcow2/power-cuts", test_crash);
    return g_test_run();
}

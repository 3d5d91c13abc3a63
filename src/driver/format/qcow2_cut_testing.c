/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the tests of repair and of amend share. It owns the making of the images that they begin with, the reading of
 * what is left, and one operation on an image whose power goes at a chosen change.
 *
 * A memory disk plays the power cut: changes from the chosen one on fail, and of what was not flushed any sectors
 * survive. It judges nothing.
 */
#include "driver/format/qcow2_cut_testing.h"
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/format/qcow2_create.h"
#include "driver/format/qcow2_format.h"
#include "driver/format/qcow2_image.h"
#include <errno.h>
#include <string.h>

enum { PIECE = 4096, DISK_LIMIT = 64 << 20 };
#define SIZE (UINT64_C(1) << 20)

uint64_t cut_load(const GByteArray *image, uint64_t offset)
{
    uint64_t value;
    g_assert_cmpuint(offset + 8, <=, image->len);
    memcpy(&value, image->data + offset, sizeof(value));
    return GUINT64_FROM_BE(value);
}

void cut_store(GByteArray *image, uint64_t offset, uint64_t value)
{
    uint64_t disk = GUINT64_TO_BE(value);
    g_assert_cmpuint(offset + 8, <=, image->len);
    memcpy(image->data + offset, &disk, sizeof(disk));
}

uint64_t cut_entry(const GByteArray *image, uint64_t guest)
{
    unsigned cluster_bits = cut_load(image, 16) & 0xff;
    unsigned entry_bits = cut_load(image, 72) & QCOW2_INCOMPATIBLE_EXTENDED_L2 ? 4 : 3;
    uint64_t cluster = guest >> cluster_bits;
    unsigned l2_bits = cluster_bits - entry_bits;
    uint64_t table = cut_load(image, cut_load(image, 40) + (cluster >> l2_bits) * 8) & QCOW2_OFFSET_MASK;
    return table ? table + ((cluster & ((1u << l2_bits) - 1)) << entry_bits) : 0;
}

static GByteArray *copy_of(const GByteArray *image)
{
    GByteArray *copy = g_byte_array_new();
    g_byte_array_append(copy, image->data, image->len);
    return copy;
}

/* --- making --- */

static void coroutine_fn write_some(struct backend *backend, uint64_t *random, unsigned count, unsigned flags)
{
    uint8_t data[3 * PIECE];
    struct iovec iov = {data, 0};
    for (unsigned i = 0; i < count; i++) {
        uint64_t offset = testing_random(random) % (SIZE / PIECE - 3) * PIECE;
        iov.iov_len = (1 + testing_random(random) % 3) * PIECE;
        memset(data, 1 + (int)(testing_random(random) % 255), sizeof(data));
        int code = testing_random(random) % 5 ? backend_write(backend, offset, iov.iov_len, buffers_one(&iov), flags)
                                              : backend_write_zeroes(backend, offset, iov.iov_len, REQUEST_MAY_UNMAP);
        g_assert_true(code == 0 || code == -ENOTSUP);
    }
}

static void coroutine_fn write_compressed(struct backend *backend, uint64_t cluster_size)
{
    g_autofree uint8_t *data = g_malloc(cluster_size);
    struct iovec iov = {data, cluster_size};
    for (uint64_t i = 0; i < 4; i++) {
        memset(data, 0x41 + (int)i, cluster_size);
        int code =
            backend_write(backend, SIZE - (4 - i) * cluster_size, cluster_size, buffers_one(&iov), REQUEST_COMPRESSED);
        g_assert_cmpint(code, ==, 0);
    }
}

static void coroutine_fn take_snapshot(struct graph *graph, struct node *node, const char *name)
{
    struct snapshot_info info = {.id = (char *)"", .name = (char *)name};
    graph_lock(graph);
    int code = node->driver->image->snapshot_create(node, &info, NULL);
    graph_unlock(graph);
    g_assert_cmpint(code, ==, 0);
}

GByteArray *coroutine_fn cut_make(const struct cut_shape *shape, uint64_t seed)
{
    struct graph *graph = graph_create();
    struct memory_disk *disk = memory_disk_create(NULL, 0, DISK_LIMIT);
    struct node *disk_node = memory_disk_open(disk, graph, "disk");
    struct qcow2_create_options options = {.size = SIZE,
                                           .version = shape->version,
                                           .cluster_bits = shape->cluster_bits,
                                           .refcount_bits = shape->refcount_bits,
                                           .extended_l2 = shape->extended,
                                           .backing_file = shape->backing ? "nowhere" : NULL,
                                           .backing_format = shape->backing ? "raw" : NULL};
    struct backend *backend = testing_backend(graph, disk_node);
    int code = qcow2_create(backend_edge(backend), &options, NULL);
    g_assert_cmpint(code, ==, 0);
    backend_destroy(backend);
    struct node *node = testing_add(graph, NULL,
                                    "{\"driver\":\"qcow2\",\"node-name\":\"image\",\"file\":\"disk\","
                                    "\"backing\":null}");
    backend = testing_backend(graph, node);
    if (shape->compressed) {
        write_compressed(backend, UINT64_C(1) << shape->cluster_bits);
    }
    write_some(backend, &seed, 12, 0);
    backend_destroy(backend);
    for (unsigned i = 0; shape->snapshots && i < 2; i++) {
        take_snapshot(graph, node, i ? "second" : "first");
        backend = testing_backend(graph, node);
        write_some(backend, &seed, 5, 0);
        backend_destroy(backend);
    }
    code = graph_delete(graph, "image", NULL);
    g_assert_cmpint(code, ==, 0);
    node_release(disk_node);
    graph_destroy(graph);
    GByteArray *made = copy_of(disk->now);
    memory_disk_destroy(disk);
    return made;
}

/* --- reading --- */

static uint64_t hash_of(const uint8_t *data)
{
    uint64_t hash = 1469598103934665603u;
    for (unsigned i = 0; i < PIECE; i++) {
        hash = (hash ^ data[i]) * 1099511628211u;
    }
    return hash ? hash : 1;
}

GArray *coroutine_fn cut_read(const GByteArray *image, const char *snapshot)
{
    GArray *hashes = g_array_new(FALSE, FALSE, sizeof(uint64_t));
    struct graph *graph = graph_create();
    struct memory_disk *disk = memory_disk_create(image->data, image->len, DISK_LIMIT);
    struct node *disk_node = memory_disk_open(disk, graph, "disk");
    struct error *error = NULL;
    struct node *node = testing_add(graph, &error,
                                    "{\"driver\":\"qcow2\",\"node-name\":\"image\",\"file\":\"disk\","
                                    "\"backing\":null,\"read-only\":true}");
    if (node && snapshot) {
        graph_lock(graph);
        int code = node->driver->image->snapshot_load(node, snapshot, NULL);
        graph_unlock(graph);
        g_assert_cmpint(code, ==, 0);
    }
    struct backend *backend = node ? testing_backend(graph, node) : NULL;
    for (uint64_t at = 0; node && at < SIZE; at += PIECE) {
        uint8_t data[PIECE];
        struct iovec iov = {data, PIECE};
        uint64_t hash = backend_read(backend, at, PIECE, buffers_one(&iov), 0) == 0 ? hash_of(data) : 0;
        g_array_append_val(hashes, hash);
    }
    backend_destroy(backend);
    error_free(error);
    if (node) {
        int code = graph_delete(graph, "image", NULL);
        g_assert_cmpint(code, ==, 0);
    }
    node_release(disk_node);
    graph_destroy(graph);
    memory_disk_destroy(disk);
    return hashes;
}

unsigned cut_same(const GArray *a, const GArray *b)
{
    unsigned same = 0;
    for (unsigned i = 0; i < MIN(a->len, b->len); i++) {
        uint64_t hash = g_array_index(a, uint64_t, i);
        same += hash && hash == g_array_index(b, uint64_t, i);
    }
    return same;
}

/* --- changing --- */

static struct node *coroutine_fn open_image(struct graph *graph, bool for_check, struct error **err)
{
    json_t *json = json_pack("{s:s,s:s,s:s,s:n}", "driver", "qcow2", "node-name", "image", "file", "disk", "backing");
    struct blockdev_options *options = NULL;
    struct node *node = NULL;
    int code = blockdev_options_from_json(json, "", &options, err);
    if (code == 0) {
        code = graph_open(graph, options, for_check ? GRAPH_OPEN_CHECK | GRAPH_OPEN_NO_BACKING : 0, &node, err);
    }
    json_decref(json);
    blockdev_options_free(options);
    return code == 0 ? node : NULL;
}

int coroutine_fn cut_run(const GByteArray *image, bool for_check, uint64_t cut_at, uint64_t seed,
                         int coroutine_fn (*work)(struct node *node, void *argument), void *argument,
                         GByteArray **ret_image, uint64_t *ret_changes)
{
    struct graph *graph = graph_create();
    struct memory_disk *disk = memory_disk_create(image->data, image->len, DISK_LIMIT);
    struct node *disk_node = memory_disk_open(disk, graph, "disk");
    struct error *error = NULL;
    disk->keeps_log = true;
    disk->zeroes = true;
    disk->fail_first = cut_at;
    disk->fail_end = UINT64_MAX;
    disk->fail_code = -EIO;
    int code = -EINVAL;
    struct node *node = open_image(graph, for_check, &error);
    if (node) {
        graph_lock(graph);
        code = work(node, argument);
        graph_unlock(graph);
        node_release(node);
    } else {
        code = error->code;
    }
    error_free(error);
    *ret_changes = disk->changes;
    *ret_image = cut_at == UINT64_MAX ? copy_of(disk->now) : memory_disk_cut(disk, seed);
    node_release(disk_node);
    graph_destroy(graph);
    memory_disk_destroy(disk);
    return code;
}

struct counts {
    uint64_t errors, leaks;
};

static int coroutine_fn look(struct node *node, void *argument)
{
    struct counts *counts = argument;
    struct image_check *result = g_new0(struct image_check, 1);
    int code = node->driver->image->check(node, IMAGE_FIX_NONE, result, NULL);
    *counts = (struct counts){result->check_errors + result->corruptions, result->leaks};
    result->filename = g_strdup("");
    result->format = g_strdup("");
    image_check_free(result);
    return code;
}

int coroutine_fn cut_check(const GByteArray *image, uint64_t *ret_errors, uint64_t *ret_leaks)
{
    struct counts counts = {0};
    GByteArray *after;
    uint64_t changes;
    int code = cut_run(image, true, UINT64_MAX, 0, look, &counts, &after, &changes);
    g_byte_array_unref(after);
    *ret_errors = counts.errors;
    *ret_leaks = counts.leaks;
    return code;
}

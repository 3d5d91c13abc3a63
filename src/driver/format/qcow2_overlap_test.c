/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Overlap checks by option: an image in which a guest cluster lies over metadata of each kind, opened with each mode
 * and each flag alone, is written there. Where the kind is checked the write fails, the metadata are as they were, and
 * the image has its corrupt bit; where it is not, the write goes through. What costs nothing is checked in every mode.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/format/qcow2_cut_testing.h"
#include "driver/format/qcow2_format.h"
#include "loop/loop.h"
#include <errno.h>
#include <string.h>

enum kind { L1, REFCOUNT_TABLE, L2, REFCOUNT_BLOCK, SNAPSHOT_TABLE, SNAPSHOT_L1, SNAPSHOT_L2, KINDS };

struct option {
    const char *json;
    unsigned checked; /* a bit per kind */
};

#define ALWAYS (1u << L1 | 1u << REFCOUNT_TABLE)
#define CONSTANT (ALWAYS | 1u << SNAPSHOT_TABLE)
#define CACHED (CONSTANT | 1u << L2 | 1u << REFCOUNT_BLOCK | 1u << SNAPSHOT_L1)

static const struct option options[] = {
    {"\"none\"", ALWAYS},
    {"\"constant\"", CONSTANT},
    {"\"cached\"", CACHED},
    {"\"all\"", CACHED | 1u << SNAPSHOT_L2},
    {"{\"template\":\"none\",\"active-l2\":true}", ALWAYS | 1u << L2},
    {"{\"template\":\"none\",\"refcount-block\":true}", ALWAYS | 1u << REFCOUNT_BLOCK},
    {"{\"template\":\"none\",\"inactive-l2\":true}", ALWAYS | 1u << SNAPSHOT_L2},
    {"{\"template\":\"all\",\"inactive-l1\":false}", (CACHED | 1u << SNAPSHOT_L2) & ~(1u << SNAPSHOT_L1)},
    {"{}", CACHED},
};

#define GUEST (UINT64_C(512) << 10)

/* An L2 table that only the first snapshot has. */
static uint64_t snapshot_l2(const GByteArray *image)
{
    uint64_t l1 = cut_load(image, cut_load(image, 64));
    uint64_t table = cut_load(image, l1) & QCOW2_OFFSET_MASK;
    g_assert_cmphex(table, !=, 0);
    g_assert_cmphex(table, !=, cut_load(image, cut_load(image, 40)) & QCOW2_OFFSET_MASK);
    return table;
}

static uint64_t place_of(const GByteArray *image, enum kind kind)
{
    switch (kind) {
    case L1:
        return cut_load(image, 40);
    case REFCOUNT_TABLE:
        return cut_load(image, 48);
    case L2:
        return cut_load(image, cut_load(image, 40)) & QCOW2_OFFSET_MASK;
    case REFCOUNT_BLOCK:
        return cut_load(image, cut_load(image, 48));
    case SNAPSHOT_TABLE:
        return cut_load(image, 64);
    case SNAPSHOT_L1:
        return cut_load(image, cut_load(image, 64));
    case SNAPSHOT_L2:
        return snapshot_l2(image);
    case KINDS:
        break;
    }
    g_assert_not_reached();
}

static void coroutine_fn write_over(const GByteArray *good, enum kind kind, const struct option *option)
{
    struct graph *graph = graph_create();
    GByteArray *image = g_byte_array_new();
    g_byte_array_append(image, good->data, good->len);
    uint64_t place = place_of(image, kind);
    cut_store(image, cut_entry(image, GUEST), place | QCOW2_COPIED);
    struct memory_disk *disk = memory_disk_create(image->data, image->len, 64 * MiB);
    struct node *disk_node = memory_disk_open(disk, graph, "disk");
    struct node *node = testing_add(graph, NULL,
                                    "{\"driver\":\"qcow2\",\"node-name\":\"image\",\"file\":\"disk\",\"backing\":null,"
                                    "\"overlap-check\":%s}",
                                    option->json);
    struct backend *backend = testing_backend(graph, node);
    uint8_t data[4096];
    struct iovec iov = {data, sizeof(data)};
    memset(data, 0x5a, sizeof(data));
    int code = backend_write(backend, GUEST, sizeof(data), buffers_one(&iov), 0);
    bool checked = option->checked >> kind & 1;
    bool kept = memcmp(disk->now->data + place, image->data + place, sizeof(data)) == 0;
    bool corrupt = disk->now->data[79] & QCOW2_INCOMPATIBLE_CORRUPT;
    if (code != (checked ? -EIO : 0) || kept != checked || corrupt != checked) {
        g_error("kind %d, %s: %d, %s, %s", kind, option->json, code, kept ? "kept" : "overwritten",
                corrupt ? "corrupt" : "not marked");
    }
    backend_destroy(backend);
    code = graph_delete(graph, "image", NULL);
    g_assert_cmpint(code, ==, 0);
    node_release(disk_node);
    graph_destroy(graph);
    memory_disk_destroy(disk);
    g_byte_array_unref(image);
}

static void coroutine_fn run_all(void *argument)
{
    struct cut_shape shape = {.version = 3, .cluster_bits = 12, .refcount_bits = 16, .snapshots = true};
    GByteArray *good = cut_make(&shape, 3);
    for (enum kind kind = 0; kind < KINDS; kind++) {
        for (unsigned i = 0; i < G_N_ELEMENTS(options); i++) {
            write_over(good, kind, &options[i]);
        }
    }
    g_byte_array_unref(good);
}

static struct loop *loop;

static void test_kinds(void)
{
    loop_run_coroutine(loop, run_all, NULL);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    testing_register_drivers();
    int code = loop_create(ENGINE_EPOLL, &loop, NULL);
    g_assert_cmpint(code, ==, 0);
    g_test_add_func("/qcow2/overlap/kinds-and-options", test_kinds);
    int status = g_test_run();
    loop_destroy(loop);
    return status;
}

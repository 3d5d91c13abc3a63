/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fuzz target: the input is a qcow2 image. It is opened from a memory disk, read and asked for its block status all
 * over, and, if it opens for writing, written, zeroed, discarded, resized, flushed and closed.
 *
 * 1. Nothing that an image says may crash, hang, or cost memory beyond what the image's own size allows.
 * 2. After a write that was acknowledged, and no corruption found, the same bytes are read back.
 * 3. A copy is checked and repaired: what was called whole then is whole in a second check.
 *
 * The last byte of the input chooses how the image is opened. Backing files are not followed.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerInitialize(int *argc, char ***argv);

enum { PIECE = 32 << 10, DISK_LIMIT = 4 << 20, INPUT_MAX = 256 << 10, PLACES = 24 };

struct input {
    const uint8_t *data;
    size_t bytes;
};

static struct loop *loop;
static uint8_t *scratch;

static void drop_message(const char *domain, GLogLevelFlags level, const char *message, void *argument)
{
    if (level & (G_LOG_LEVEL_ERROR | G_LOG_LEVEL_CRITICAL)) {
        abort();
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    g_log_set_default_handler(drop_message, NULL);
    testing_register_drivers();
    if (loop_create(ENGINE_EPOLL, &loop, NULL) < 0) {
        abort();
    }
    scratch = malloc(PIECE);
    return 0;
}

/* A few places spread over the image, both ends among them. */
static uint64_t place(uint64_t size, unsigned index)
{
    uint64_t last = size > PIECE ? size - PIECE : 0;
    return index == 0 ? 0 : index == PLACES - 1 ? last : last / PLACES * index;
}

static void coroutine_fn read_all_over(struct backend *backend)
{
    uint64_t size = backend_size(backend);
    for (unsigned i = 0; i < PLACES && size; i++) {
        struct iovec iov = {scratch, min_u64(size, PIECE)};
        struct extent extent;
        (void)backend_read(backend, place(size, i), iov.iov_len, buffers_one(&iov), 0);
        (void)backend_block_status(backend, NULL, place(size, i), size - place(size, i), &extent);
    }
}

static void coroutine_fn write_and_check(struct backend *backend, uint64_t offset, uint64_t bytes)
{
    struct iovec iov = {scratch, bytes};
    memset(scratch, 0x5a, bytes);
    if (bytes && backend_write(backend, offset, bytes, buffers_one(&iov), 0) == 0) {
        memset(scratch, 0, bytes);
        int code = backend_read(backend, offset, bytes, buffers_one(&iov), 0);
        for (uint64_t i = 0; code == 0 && i < bytes; i++) {
            g_assert_cmphex(scratch[i], ==, 0x5a);
        }
    }
}

static void coroutine_fn write_a_bit(struct backend *backend)
{
    uint64_t size = backend_size(backend);
    write_and_check(backend, 0, min_u64(size, 700));
    write_and_check(backend, size / 2, min_u64(size - size / 2, 5000));
    write_and_check(backend, place(size, PLACES - 1), min_u64(size, PIECE));
    (void)backend_write_zeroes(backend, size / 3, min_u64(size - size / 3, 3000), REQUEST_MAY_UNMAP);
    (void)backend_write_zeroes(backend, 0, min_u64(size, 1500), 0);
    (void)backend_discard(backend, size / 4, min_u64(size - size / 4, 64 * KiB));
    (void)backend_flush(backend);
    write_and_check(backend, size / 4, min_u64(size - size / 4, 9000));
    (void)backend_truncate(backend, size + 128 * KiB, NULL);
    write_and_check(backend, size, min_u64(backend_size(backend) - size, 2000));
    (void)backend_truncate(backend, size / 2 / 512 * 512, NULL);
    (void)backend_flush(backend);
}

/* Snapshots and bitmaps are asked for; what an image says of them may be anything. */
static void coroutine_fn list_all(struct graph *graph, struct node *node)
{
    struct snapshot_info_list *list = NULL;
    graph_lock(graph);
    (void)node->driver->image->snapshot_list(node, &list, NULL);
    graph_unlock(graph);
    image_info_specific_free(node->driver->specific_info(node));
    snapshot_info_list_free(list);
}

/* Corruptions, leaks and errors that are left, or -1 where there is no check to be made. */
static int64_t coroutine_fn check_disk(struct graph *graph, struct memory_disk *disk, enum image_fix fix)
{
    struct node *disk_node = memory_disk_open(disk, graph, "disk");
    json_t *json = json_pack("{s:s,s:s,s:s,s:n}", "driver", "qcow2", "node-name", "image", "file", "disk", "backing");
    struct blockdev_options *options = NULL;
    struct node *node = NULL;
    int64_t left = -1;
    if (blockdev_options_from_json(json, "", &options, NULL) < 0) {
        abort();
    }
    if (graph_open(graph, options, GRAPH_OPEN_CHECK | GRAPH_OPEN_NO_BACKING | GRAPH_OPEN_NO_DATA, &node, NULL) == 0) {
        struct image_check *result = g_new0(struct image_check, 1);
        graph_lock(graph);
        if (node->driver->image->check(node, fix, result, NULL) == 0) {
            left = result->corruptions + result->leaks + result->check_errors;
        }
        graph_unlock(graph);
        result->filename = g_strdup("");
        result->format = g_strdup("");
        image_check_free(result);
        node_release(node);
    }
    blockdev_options_free(options);
    json_decref(json);
    node_release(disk_node);
    return left;
}

static void coroutine_fn check_and_repair(const struct input *input)
{
    struct graph *graph = graph_create();
    struct memory_disk *disk = memory_disk_create(input->data, input->bytes, DISK_LIMIT);
    (void)check_disk(graph, disk, IMAGE_FIX_NONE);
    (void)check_disk(graph, disk, IMAGE_FIX_LEAKS);
    if (check_disk(graph, disk, IMAGE_FIX_ALL) == 0 && check_disk(graph, disk, IMAGE_FIX_NONE) != 0) {
        abort();
    }
    graph_destroy(graph);
    memory_disk_destroy(disk);
}

static void coroutine_fn run_input(void *argument)
{
    const struct input *input = argument;
    struct graph *graph = graph_create();
    struct memory_disk *disk = memory_disk_create(input->data, input->bytes, DISK_LIMIT);
    struct node *disk_node = memory_disk_open(disk, graph, "disk");
    bool writable = input->data[input->bytes - 1] & 1;
    auto_error error = NULL;
    struct node *node = testing_add(graph, &error,
                                    "{\"driver\":\"qcow2\",\"node-name\":\"image\",\"file\":\"disk\","
                                    "\"backing\":null,\"discard\":\"unmap\",\"read-only\":%s}",
                                    writable ? "false" : "true");
    if (node) {
        struct backend *backend = testing_backend(graph, node);
        read_all_over(backend);
        list_all(graph, node);
        if (writable) {
            write_a_bit(backend);
            read_all_over(backend);
            (void)node->driver->change_backing(node, "/a/backing/file", "raw", NULL);
        }
        backend_destroy(backend);
        if (graph_delete(graph, "image", NULL) < 0) {
            abort();
        }
    }
    node_release(disk_node);
    graph_destroy(graph);
    memory_disk_destroy(disk);
    check_and_repair(input);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct input input = {data, bytes};
    if (bytes > 0 && bytes <= INPUT_MAX) {
        loop_run_coroutine(loop, run_input, &input);
    }
    return 0;
}

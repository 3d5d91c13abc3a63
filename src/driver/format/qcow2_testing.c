/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the qcow2 tests share. The memory disk is a protocol driver over a byte array.
 *
 * 1. It keeps a copy of what was flushed and a log of what was written since, so that a power cut can be played: any
 *    subset of the unflushed sectors may have reached the disk.
 * 2. It can make requests take several turns of the loop, a few of them very many, so that others overtake them.
 * 3. What is discarded becomes garbage, so that whoever still reads it is found out (zeroes, if asked for).
 *
 * The rest runs the peer's tools and opens images in a graph without a program around it.
 */
#include "driver/format/qcow2_testing.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/drivers.h"
#include <errno.h>
#include <glib/gstdio.h>
#include <string.h>

struct logged {
    uint64_t offset, bytes;
    uint8_t data[];
};

struct memory_disk *memory_disk_create(const void *content, uint64_t bytes, uint64_t limit)
{
    struct memory_disk *disk = g_new0(struct memory_disk, 1);
    g_mutex_init(&disk->lock);
    disk->now = g_byte_array_new();
    disk->stable = g_byte_array_new();
    disk->log = g_ptr_array_new_with_free_func(g_free);
    disk->limit = limit;
    if (bytes) {
        g_byte_array_append(disk->now, content, bytes);
        g_byte_array_append(disk->stable, content, bytes);
    }
    return disk;
}

void memory_disk_destroy(struct memory_disk *disk)
{
    g_byte_array_unref(disk->now);
    g_byte_array_unref(disk->stable);
    g_ptr_array_unref(disk->log);
    g_mutex_clear(&disk->lock);
    g_free(disk);
}

static void array_write(GByteArray *array, uint64_t offset, const void *data, uint64_t bytes)
{
    if (offset + bytes > array->len) {
        uint64_t old = array->len;
        g_byte_array_set_size(array, offset + bytes);
        memset(array->data + old, 0, offset + bytes - old);
    }
    memcpy(array->data + offset, data, bytes);
}

static void coroutine_fn linger(struct memory_disk *disk)
{
    if (!disk->yields) {
        return;
    }
    g_mutex_lock(&disk->lock);
    unsigned most = testing_random(&disk->random) % 8 ? 4 : 120; /* some are overtaken by many others */
    unsigned turns = testing_random(&disk->random) % most;
    g_mutex_unlock(&disk->lock);
    for (unsigned i = 0; i < turns; i++) {
        coroutine_pause();
    }
}

static struct memory_disk *disk_of(struct node *node)
{
    return *(struct memory_disk **)node->state;
}

static int coroutine_fn disk_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to, unsigned flags)
{
    struct memory_disk *disk = disk_of(node);
    linger(disk);
    g_mutex_lock(&disk->lock);
    uint64_t inside = offset < disk->now->len ? MIN(bytes, disk->now->len - offset) : 0;
    buffers_copy_in(to, disk->now->data + (inside ? offset : 0), inside);
    buffers_fill(buffers_advance(to, inside), 0, bytes - inside);
    g_mutex_unlock(&disk->lock);
    linger(disk);
    return 0;
}

/* Counts a change; whether it is one that fails. */
static bool disk_fails(struct memory_disk *disk)
{
    g_mutex_lock(&disk->lock);
    uint64_t number = disk->changes++;
    g_mutex_unlock(&disk->lock);
    return number >= disk->fail_first && number < disk->fail_end;
}

static int coroutine_fn disk_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                   unsigned flags)
{
    struct memory_disk *disk = disk_of(node);
    if (offset > disk->limit || bytes > disk->limit - offset) {
        return -ENOSPC;
    }
    int code = disk_fails(disk) ? disk->fail_code : 0;
    bytes = code < 0 ? bytes / 2 / 512 * 512 : bytes;
    linger(disk);
    struct logged *logged = g_malloc(sizeof(*logged) + bytes);
    *logged = (struct logged){offset, bytes};
    buffers_copy_out(from, logged->data, bytes);
    g_mutex_lock(&disk->lock);
    array_write(disk->now, offset, logged->data, bytes);
    if (disk->keeps_log) {
        g_ptr_array_add(disk->log, logged);
        logged = NULL;
    } else {
        array_write(disk->stable, offset, logged->data, bytes);
    }
    g_mutex_unlock(&disk->lock);
    g_free(logged);
    linger(disk);
    return code;
}

/* What is discarded must not matter to anybody: it becomes garbage. */
static int coroutine_fn disk_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    g_autofree uint8_t *garbage = g_malloc(bytes);
    memset(garbage, disk_of(node)->zeroes ? 0 : 0xdd, bytes);
    struct iovec iov = {garbage, bytes};
    return disk_write(node, offset, bytes, buffers_one(&iov), 0);
}

static int coroutine_fn disk_flush(struct node *node)
{
    struct memory_disk *disk = disk_of(node);
    if (disk_fails(disk)) {
        return disk->fail_code;
    }
    linger(disk);
    g_mutex_lock(&disk->lock);
    for (unsigned i = 0; i < disk->log->len; i++) {
        const struct logged *logged = disk->log->pdata[i];
        array_write(disk->stable, logged->offset, logged->data, logged->bytes);
    }
    g_ptr_array_set_size(disk->log, 0);
    g_mutex_unlock(&disk->lock);
    linger(disk);
    return 0;
}

static int coroutine_fn disk_set_writable(struct node *node, bool writable, struct error **err)
{
    return 0;
}

/* Settled at once, for what is not flushed is logged as writes only. Shortening is not needed by anybody here. */
static int coroutine_fn disk_truncate(struct node *node, uint64_t size, struct error **err)
{
    struct memory_disk *disk = disk_of(node);
    GByteArray *arrays[] = {disk->now, disk->stable};
    if (size > disk->limit || size < disk->now->len) {
        return error_set(err, -ENOSPC, "A memory disk is lengthened only, up to its limit");
    }
    g_mutex_lock(&disk->lock);
    for (unsigned i = 0; i < G_N_ELEMENTS(arrays); i++) {
        uint64_t old = arrays[i]->len;
        g_byte_array_set_size(arrays[i], size);
        memset(arrays[i]->data + old, 0, size - old);
    }
    g_mutex_unlock(&disk->lock);
    return 0;
}

static const struct driver disk_driver = {
    .name = "memory-disk",
    .kind = DRIVER_PROTOCOL,
    .state_size = sizeof(struct memory_disk *),
    .grows_on_write = true,
    .read = disk_read,
    .write = disk_write,
    .discard = disk_discard,
    .flush = disk_flush,
    .truncate = disk_truncate,
    .set_writable = disk_set_writable,
};

struct node *coroutine_fn memory_disk_open(struct memory_disk *disk, struct graph *graph, const char *name)
{
    struct node *node;
    int code = graph_create_node(graph, &disk_driver, name, NULL, &node, NULL);
    g_assert_cmpint(code, ==, 0);
    *(struct memory_disk **)node->state = disk;
    atomic_store(&node->size, disk->now->len);
    return node;
}

GByteArray *memory_disk_cut(struct memory_disk *disk, uint64_t seed)
{
    GByteArray *left = g_byte_array_new();
    g_mutex_lock(&disk->lock);
    g_byte_array_append(left, disk->stable->data, disk->stable->len);
    unsigned keep = testing_random(&seed) % 5; /* of four sectors; so all and none happen too */
    for (unsigned i = 0; i < disk->log->len; i++) {
        const struct logged *logged = disk->log->pdata[i];
        for (uint64_t at = logged->offset; at < logged->offset + logged->bytes;) {
            uint64_t next = MIN((at | 511) + 1, logged->offset + logged->bytes);
            if (testing_random(&seed) % 4 < keep) {
                array_write(left, at, logged->data + (at - logged->offset), next - at);
            }
            at = next;
        }
    }
    g_mutex_unlock(&disk->lock);
    return left;
}

void testing_register_drivers(void)
{
    driver_register(&driver_file);
    driver_register(&driver_raw);
    driver_register(&driver_qcow2);
}

struct node *coroutine_fn testing_add(struct graph *graph, struct error **err, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    g_autofree char *text = g_strdup_vprintf(format, arguments);
    va_end(arguments);
    struct blockdev_options *options = NULL;
    struct node *node = NULL;
    struct error *error = NULL;
    json_t *json = json_loads(text, 0, NULL);
    g_assert_nonnull(json);
    int code = blockdev_options_from_json(json, "", &options, &error);
    if (code == 0) {
        code = graph_add(graph, options, &node, &error);
    }
    json_decref(json);
    blockdev_options_free(options);
    if (code < 0 && !err) {
        g_error("%s: %s", text, error->message);
    }
    if (code < 0) {
        error_move(err, error);
        return NULL;
    }
    return node;
}

struct backend *coroutine_fn testing_backend(struct graph *graph, struct node *node)
{
    struct backend *backend = backend_create(graph, "test");
    int code = backend_attach(backend, node, ACCESS_ALL, NULL);
    g_assert_cmpint(code, ==, 0);
    return backend;
}

bool testing_have_peer(void)
{
    g_autofree char *image_tool = g_find_program_in_path("qemu-img");
    g_autofree char *io_tool = g_find_program_in_path("qemu-io");
    if (!image_tool || !io_tool) {
        g_test_skip("qemu-img and qemu-io are not installed: NOTHING was tested against the peer");
        return false;
    }
    return true;
}

int testing_run(bool must, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    g_autofree char *command = g_strdup_vprintf(format, arguments);
    va_end(arguments);
    g_autofree char *output = NULL;
    g_autofree char *errors = NULL;
    int status = 0;
    gboolean ran = g_spawn_command_line_sync(command, &output, &errors, &status, NULL);
    g_assert_true(ran);
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128;
    if (must && code != 0) {
        g_error("exit status %d of: %s\n%s%s", code, command, output, errors);
    }
    return code;
}

static char *directory;

const char *testing_directory(void)
{
    if (!directory) {
        directory = g_dir_make_tmp("qcow2-test-XXXXXX", NULL);
        g_assert_nonnull(directory);
    }
    return directory;
}

void testing_remove_directory(void)
{
    if (!directory) {
        return;
    }
    GDir *list = g_dir_open(directory, 0, NULL);
    for (const char *name = g_dir_read_name(list); name; name = g_dir_read_name(list)) {
        g_autofree char *path = g_build_filename(directory, name, NULL);
        g_unlink(path);
    }
    g_dir_close(list);
    g_rmdir(directory);
    g_clear_pointer(&directory, g_free);
}

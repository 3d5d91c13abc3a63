/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Exports of a file in tmpfs for tests of the front end's side; see the header. The daemon's side runs on the calling
 * thread (and two I/O threads), the client on another. One bed at a time.
 * What a client does is its own; it must have closed its connections, or be on the way, when it ends.
 */
#include "export/vhost_user/bed_testing.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/operation.h"
#include "block/user.h"
#include "driver/drivers.h"
#include "export/export.h"
#include "loop/loop.h"
#include "schema/claims.h"
#include <glib.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

struct bed {
    struct loop *loop, *iothreads[2]; /* they serve the exports if not NULL */
    struct graph *graph;
    struct exports *exports;
    char *directory;
    struct coroutine *waiter;
    void (*client)(void *argument);
    void *argument;
};
static struct bed bed;

static void bed_assert(int r, struct error *err)
{
    if (r < 0) {
        g_error("%s", err ? err->message : "no message");
    }
}

static struct loop *bed_find_iothread(void *argument, const char *name)
{
    return bed.iothreads[name[0] - '0'];
}

static char *bed_path(const char *name)
{
    return g_strdup_printf("%s/%s", bed.directory, name);
}

int bed_connect(const char *name)
{
    g_autofree char *path = bed_path(name);
    int fd = front_connect(path);

    g_assert_cmpint(fd, >=, 0);
    return fd;
}

struct bed_resizing {
    uint64_t size;
    pthread_mutex_t guard; /* not GLib's, which TSan does not know */
    pthread_cond_t done;
    bool is_done;
};

static void bed_resize_run(void *argument)
{
    struct bed_resizing *resizing = argument;
    struct node *node = graph_find(bed.graph, "n0");

    graph_lock(bed.graph);
    struct operation_config config = {
        .kind = "command", .id = "resize", .table = &block_resize_claims, .bound = {[CLAIM_NODE] = node}};
    struct operation *operation;
    struct error *err = NULL;
    bed_assert(operation_begin(bed.graph, &config, &operation, &err), err);
    struct backend *backend = backend_create(bed.graph, "resize");
    bed_assert(backend_attach_locked(backend, node, operation_granted(operation, node), &err), err);
    bed_assert(backend_truncate_locked(backend, resizing->size, &err), err);
    backend_destroy_locked(backend);
    operation_end_locked(operation);
    graph_unlock(bed.graph);
    pthread_mutex_lock(&resizing->guard);
    resizing->is_done = true;
    pthread_cond_signal(&resizing->done);
    pthread_mutex_unlock(&resizing->guard);
}

void bed_resize(uint64_t size)
{
    struct bed_resizing resizing = {.size = size};

    pthread_mutex_init(&resizing.guard, NULL);
    pthread_cond_init(&resizing.done, NULL);
    loop_spawn(bed.loop, bed_resize_run, &resizing);
    pthread_mutex_lock(&resizing.guard);
    while (!resizing.is_done) {
        pthread_cond_wait(&resizing.done, &resizing.guard);
    }
    pthread_mutex_unlock(&resizing.guard);
}

static void bed_add_export(char *id, bool writable, int queues, int block)
{
    struct socket_address address = {.type = SOCKET_ADDRESS_TYPE_UNIX};
    char *names[] = {"0", "1"};
    struct block_export_iothreads iothreads = {.kind = BLOCK_EXPORT_IOTHREADS_MULTI,
                                               .u.multi = {.count = 2, .items = names}};
    struct block_export_options options = {.type = BLOCK_EXPORT_TYPE_VHOST_USER_BLK,
                                           .id = id,
                                           .node_name = "n0",
                                           .writable = writable,
                                           .iothread = bed.iothreads[0] ? &iothreads : NULL};
    g_autofree char *path = bed_path(id);
    struct error *err = NULL;

    address.u.unix_.path = path;
    options.u.vhost_user_blk.addr = &address;
    options.u.vhost_user_blk.num_queues = queues;
    options.u.vhost_user_blk.logical_block_size = block;
    bed_assert(exports_add(bed.exports, &options, &err), err);
}

static void bed_start_run(void *argument)
{
    struct exports_config config = {.graph = bed.graph, .find_iothread = bed_find_iothread};
    g_autofree char *path = bed_path("disk");
    struct blockdev_options options = {.driver = BLOCKDEV_DRIVER_FILE, .node_name = "n0"};
    struct error *err = NULL;
    struct node *node;

    options.u.file.filename = path;
    bed_assert(graph_add(bed.graph, &options, &node, &err), err);
    bed.exports = exports_create(&config);
    bed_add_export("rw", true, 4, 512);
    bed_add_export("ro", false, 1, 4096);
}

static void bed_stop_run(void *argument)
{
    exports_shutdown(bed.exports);
    graph_delete_all(bed.graph);
}

static void *bed_client_main(void *argument)
{
    bed.client(bed.argument);
    coroutine_wake(bed.waiter);
    return NULL;
}

static void bed_client_run(void *argument)
{
    bed.waiter = coroutine_self();
    GThread *thread = g_thread_new("client", bed_client_main, NULL);
    coroutine_yield();
    g_thread_join(thread);
}

void bed_run(void (*client)(void *argument), void *argument, bool with_iothreads)
{
    struct error *err = NULL;

    bed = (struct bed){.client = client, .argument = argument};
    if (!driver_find("file")) {
        driver_register(&driver_file);
    }
    bed.directory =
        g_strdup(g_file_test("/dev/shm", G_FILE_TEST_IS_DIR) ? "/dev/shm/il-vhost-XXXXXX" : "/tmp/il-vhost-XXXXXX");
    g_assert_nonnull(g_mkdtemp(bed.directory));
    g_autofree char *disk = bed_path("disk"), *zeroes = g_malloc0(BED_SIZE);
    g_assert_true(g_file_set_contents(disk, zeroes, BED_SIZE, NULL));
    bed_assert(loop_create(ENGINE_AUTO, &bed.loop, &err), err);
    for (unsigned i = 0; with_iothreads && i < 2; i++) {
        bed_assert(loop_thread_start("io", ENGINE_AUTO, &bed.iothreads[i], &err), err);
    }
    bed.graph = graph_create();
    loop_run_coroutine(bed.loop, bed_start_run, NULL);
    loop_run_coroutine(bed.loop, bed_client_run, NULL);
    loop_run_coroutine(bed.loop, bed_stop_run, NULL);
    exports_destroy(bed.exports);
    graph_destroy(bed.graph);
    for (unsigned i = 0; with_iothreads && i < 2; i++) {
        loop_thread_join(bed.iothreads[i]);
    }
    loop_destroy(bed.loop);
    unlink(disk);
    g_assert_cmpint(rmdir(bed.directory), ==, 0);
    g_free(bed.directory);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_NBD_TEST_BED_H
#define INTERLOCK_EXPORT_NBD_TEST_BED_H

#include "block/bitmap.h"
#include "block/dirty.h"
#include "block/driver.h"
#include "block/graph.h"
#include "driver/drivers.h"
#include "export/export.h"
#include "export/nbd/nbd_format.h"
#include "export/nbd/server.h"
#include "loop/connection.h"
#include "loop/loop.h"
#include <glib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/*
 * For tests and fuzzing only: a whole NBD server over null-co nodes, fed with streams of bytes over socket pairs.
 * Exports: "n0" (writable, 1 MiB), "ro" (read-only, the same node, with a description), "bm" (read-only, another node
 * of that size, with allocation depth and bitmaps "b", dirty from 0 to 64 KiB and from 512 KiB to 640 KiB, and "c",
 * clean).
 */
#define BED_SIZE (1024u * 1024)

struct bed {
    struct loop *loop;
    struct loop *iothread; /* serves "io" if not NULL */
    struct graph *graph;
    struct exports *exports;
};

static inline void bed_assert(int r, struct error *err)
{
    if (r < 0) {
        g_error("%s", err ? err->message : "no message");
    }
}

static inline struct loop *bed_find_iothread(void *argument, const char *name)
{
    return ((struct bed *)argument)->iothread;
}

static inline void bed_add_export(struct bed *bed, char *id, char *name, bool writable, char *iothread)
{
    struct block_export_iothreads iothreads = {.kind = BLOCK_EXPORT_IOTHREADS_SINGLE, .u.single = iothread};
    struct block_export_options options = {.type = BLOCK_EXPORT_TYPE_NBD,
                                           .id = id,
                                           .node_name = "n0",
                                           .writable = writable,
                                           .iothread = iothread ? &iothreads : NULL};
    struct error *err = NULL;

    options.u.nbd.name = name;
    options.u.nbd.description = writable ? NULL : "a description";
    bed_assert(exports_add(bed->exports, &options, &err), err);
}

static inline struct node *bed_add_node(struct bed *bed, char *name)
{
    struct blockdev_options options = {.driver = BLOCKDEV_DRIVER_NULL_CO, .node_name = name};
    struct error *err = NULL;
    struct node *node;

    options.u.null_co.has_size = true;
    options.u.null_co.size = BED_SIZE;
    options.u.null_co.has_read_zeroes = options.u.null_co.read_zeroes = true;
    bed_assert(graph_add(bed->graph, &options, &node, &err), err);
    return node;
}

static inline void bed_add_bitmaps(struct bed *bed)
{
    struct node *node = bed_add_node(bed, "n1");
    struct bitmap_config config = {.name = "b", .granularity = 65536, .disabled = true};
    struct block_dirty_bitmap_or_str items[2] = {{.kind = BLOCK_DIRTY_BITMAP_OR_STR_LOCAL, .u.local = "b"},
                                                 {.kind = BLOCK_DIRTY_BITMAP_OR_STR_LOCAL, .u.local = "c"}};
    struct block_dirty_bitmap_or_str *list[2] = {&items[0], &items[1]};
    struct block_export_options options = {.type = BLOCK_EXPORT_TYPE_NBD, .id = "e3", .node_name = "n1"};
    struct bitmap *bitmap;
    struct error *err = NULL;

    graph_lock(bed->graph);
    bed_assert(bitmap_add(node, &config, &bitmap, &err), err);
    dirty_mark(bitmap->dirty, 0, 1);
    dirty_mark(bitmap->dirty, 524288, 131072);
    config.name = "c";
    bed_assert(bitmap_add(node, &config, NULL, &err), err);
    graph_unlock(bed->graph);
    options.u.nbd.name = "bm";
    options.u.nbd.allocation_depth = true;
    options.u.nbd.has_bitmaps = true;
    options.u.nbd.bitmaps.count = 2;
    options.u.nbd.bitmaps.items = list;
    bed_assert(exports_add(bed->exports, &options, &err), err);
}

static inline void bed_start_run(void *argument)
{
    struct bed *bed = argument;
    struct exports_config config = {.graph = bed->graph, .find_iothread = bed_find_iothread, .argument = bed};
    g_autofree char *path = g_strdup_printf("/tmp/interlock-nbd-test-%d", (int)getpid());
    struct address address = {.kind = ADDRESS_UNIX, .path = path};
    struct nbd_server_config server = {.address = &address};
    struct error *err = NULL;

    bed_add_node(bed, "n0");
    bed->exports = exports_create(&config);
    bed_assert(nbd_server_start(bed->exports, &server, &err), err);
    bed_add_export(bed, "e0", NULL, true, NULL);
    bed_add_export(bed, "e1", "ro", false, NULL);
    bed_add_bitmaps(bed);
    if (bed->iothread) {
        bed_add_export(bed, "e2", "io", true, "thread");
    }
}

static inline void bed_start(struct bed *bed, bool with_iothread)
{
    struct error *err = NULL;

    *bed = (struct bed){0};
    if (!driver_find("null-co")) {
        driver_register(&driver_null_co);
    }
    bed_assert(loop_create(ENGINE_AUTO, &bed->loop, &err), err);
    if (with_iothread) {
        bed_assert(loop_thread_start("io", ENGINE_AUTO, &bed->iothread, &err), err);
    }
    bed->graph = graph_create();
    loop_run_coroutine(bed->loop, bed_start_run, bed);
}

static inline void bed_stop_run(void *argument)
{
    struct bed *bed = argument;

    exports_shutdown(bed->exports);
    graph_delete_all(bed->graph);
}

static inline void bed_stop(struct bed *bed)
{
    loop_run_coroutine(bed->loop, bed_stop_run, bed);
    exports_destroy(bed->exports);
    graph_destroy(bed->graph);
    if (bed->iothread) {
        loop_thread_join(bed->iothread);
    }
    loop_destroy(bed->loop);
}

/* One client that sends a stream, then nothing more, and takes all that comes back. */
struct bed_client {
    struct bed *bed;
    const uint8_t *stream;
    size_t bytes;
    GByteArray *answer; /* NULL: forget it */
};

/* The stream's own coroutine: a server that reads no further must not stop us from reading its answer. */
static inline void bed_send_run(void *argument)
{
    void **pair = argument;
    struct bed_client *client = pair[0];
    struct iovec iov = {(void *)client->stream, client->bytes};

    if (iov.iov_len) {
        connection_send(pair[1], buffers_one(&iov), iov.iov_len);
    }
    shutdown(connection_fd(pair[1]), SHUT_WR);
    co_group_leave(pair[2]);
}

static inline void bed_client_run(void *argument)
{
    struct bed_client *client = argument;
    struct co_group sending;
    int fds[2];
    uint8_t answer[4096];
    ssize_t n;

    g_assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    struct connection *connection = connection_from_fds(fds[0], fds[0]);
    void *pair[3] = {client, connection, &sending};

    nbd_server_adopt(client->bed->exports->nbd_server, connection_from_fds(fds[1], fds[1]));
    co_group_init(&sending);
    co_group_enter(&sending);
    coroutine_enter(coroutine_create(bed_send_run, pair));
    while ((n = connection_receive(connection, answer, sizeof(answer))) > 0) {
        if (client->answer) {
            g_byte_array_append(client->answer, answer, (guint)n);
        }
    }
    co_group_wait(&sending);
    co_group_destroy(&sending);
    connection_close(connection);
}

/* Returns when the server has closed the connection. */
static inline void bed_feed(struct bed *bed, const void *stream, size_t bytes, GByteArray *answer)
{
    struct bed_client client = {bed, stream, bytes, answer};

    loop_run_coroutine(bed->loop, bed_client_run, &client);
}

#endif

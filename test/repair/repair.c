/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * For test/repair_test.py: the image operations of the qcow2 driver on one file, without a program around them.
 *
 *     repair check none|leaks|all FILE    prints the result as JSON; exit 1 and a message if it could not be checked
 *     repair read FILE [SNAPSHOT]         a line for each 4 KiB of the disk: a hash, or "error"
 *
 * It owns a loop and a graph for one command and decides nothing.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/drivers.h"
#include "loop/loop.h"
#include <glib.h>
#include <stdio.h>
#include <string.h>

enum { PIECE = 4096, PIECES_MAX = 65536 };

struct command {
    int argc;
    char **argv;
    int status;
};

static struct node *coroutine_fn open_image(struct graph *graph, const char *path, bool writable, unsigned flags,
                                            struct error **err)
{
    json_t *json = json_pack("{s:s,s:b,s:{s:s,s:s,s:s}}", "driver", "qcow2", "read-only", !writable, "file", "driver",
                             "file", "filename", path, "locking", "off");
    struct blockdev_options *options = NULL;
    struct node *node = NULL;
    int code = blockdev_options_from_json(json, "", &options, err);
    if (code == 0) {
        code = graph_open(graph, options, flags, &node, err);
    }
    blockdev_options_free(options);
    json_decref(json);
    return code == 0 ? node : NULL;
}

static int fail(struct error *error)
{
    fprintf(stderr, "%s\n", error->message);
    error_free(error);
    return 1;
}

static int coroutine_fn run_check(struct graph *graph, const char *how, const char *path)
{
    struct error *error = NULL;
    enum image_fix fix = strcmp(how, "all") == 0     ? IMAGE_FIX_ALL
                         : strcmp(how, "leaks") == 0 ? IMAGE_FIX_LEAKS
                                                     : IMAGE_FIX_NONE;
    struct node *node =
        open_image(graph, path, fix != IMAGE_FIX_NONE, GRAPH_OPEN_CHECK | GRAPH_OPEN_NO_BACKING, &error);
    if (!node) {
        return fail(error);
    }
    struct image_check *result = g_new0(struct image_check, 1);
    result->filename = g_strdup(path);
    result->format = g_strdup(node->driver->name);
    graph_lock(graph);
    int code = node->driver->image->check(node, fix, result, &error);
    graph_unlock(graph);
    if (code == 0) {
        json_t *json = image_check_to_json(result);
        json_dumpf(json, stdout, JSON_INDENT(1));
        putchar('\n');
        json_decref(json);
    }
    image_check_free(result);
    node_release(node);
    return code < 0 ? fail(error) : 0;
}

static int coroutine_fn run_read(struct graph *graph, const char *path, const char *snapshot)
{
    struct error *error = NULL;
    struct node *node = open_image(graph, path, false, 0, &error);
    if (!node) {
        return fail(error);
    }
    if (snapshot && node->driver->image->snapshot_load(node, snapshot, &error) < 0) {
        node_release(node);
        return fail(error);
    }
    struct backend *backend = backend_create(graph, "repair");
    int code = backend_attach(backend, node, ACCESS_READ_DATA | ACCESS_READ_METADATA, &error);
    uint64_t size = backend_size(backend);
    for (uint64_t i = 0; code == 0 && i < min_u64(div_up(size, PIECE), PIECES_MAX); i++) {
        uint8_t data[PIECE] = {0};
        struct iovec iov = {data, min_u64(PIECE, size - i * PIECE)};
        if (backend_read(backend, i * PIECE, iov.iov_len, buffers_one(&iov), 0) < 0) {
            puts("error");
            continue;
        }
        uint64_t hash = 1469598103934665603u;
        for (unsigned n = 0; n < PIECE; n++) {
            hash = (hash ^ data[n]) * 1099511628211u;
        }
        printf("%016" G_GINT64_MODIFIER "x\n", hash);
    }
    backend_destroy(backend);
    node_release(node);
    return code < 0 ? fail(error) : 0;
}

static void coroutine_fn run_command(void *argument)
{
    struct command *command = argument;
    struct graph *graph = graph_create();
    command->status = strcmp(command->argv[1], "check") == 0
                          ? run_check(graph, command->argv[2], command->argv[3])
                          : run_read(graph, command->argv[2], command->argc > 3 ? command->argv[3] : NULL);
    graph_destroy(graph);
}

int main(int argc, char **argv)
{
    struct loop *loop;
    struct command command = {argc, argv, 2};
    if (argc < 3 || (strcmp(argv[1], "check") == 0) != (argc == 4 && strcmp(argv[1], "read") != 0)) {
        fprintf(stderr, "usage: repair check none|leaks|all FILE | repair read FILE [SNAPSHOT]\n");
        return 2;
    }
    if (loop_create(ENGINE_EPOLL, &loop, NULL) < 0) {
        return 2;
    }
    driver_register(&driver_file);
    driver_register(&driver_raw);
    driver_register(&driver_qcow2);
    loop_run_coroutine(loop, run_command, &command);
    loop_destroy(loop);
    return command.status;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Serving one image: a daemon without a monitor (control/service.h), with one node, its export and the NBD server.
 *
 * 1. --fork forks before any loop or thread exists; the parent leaves when clients can connect.
 * 2. The server ends when the last client that had chosen the export has gone (unless -t is given), and by SIGTERM,
 *    SIGINT and SIGHUP; both in order: what was written is flushed and the image closed.
 * 3. What was opened until something failed is closed, and the exit status is 1.
 */
#include "block/graph.h"
#include "control/service.h"
#include "export/export.h"
#include "loop/activation.h"
#include "schema/types.h"
#include "tool/background.h"
#include "tool/image_view.h"
#include "tool/nbd/nbd.h"
#include "tool/registry.h"
#include "tool/tool.h"
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#define NODES_MAX 3

struct server {
    const struct nbd_options *options;
    struct control *control;
    struct node *nodes[NODES_MAX]; /* held, from the image up */
    unsigned node_count;
    bool ending;
    int parent; /* pipe to the waiting parent of --fork, or -1 */
    int code;
    struct error *err;
};

/* --- what is served --- */

static struct node *top(const struct server *server)
{
    return server->nodes[server->node_count - 1];
}

static int coroutine_fn open_window(struct server *server, struct error **err)
{
    struct blockdev_options *options = NULL;
    uint64_t size = atomic_load(&top(server)->size), offset = server->options->offset;
    if (offset > size) {
        return error_set(err, -EINVAL,
                         "The offset (%" G_GUINT64_FORMAT ") lies behind the end of the image (%" G_GUINT64_FORMAT
                         " bytes)",
                         offset, size);
    }
    json_t *json =
        json_pack("{s:s, s:s, s:s, s:b, s:I, s:s}", "driver", "raw", "node-name", "window", "file", top(server)->name,
                  "read-only", !top(server)->writable, "offset", (json_int_t)offset, "discard", "unmap");
    int code = blockdev_options_from_json(json, NULL, &options, err);
    code = code < 0 ? code : graph_open(server->control->graph, options, 0, &server->nodes[server->node_count], err);
    server->node_count += code == 0;
    blockdev_options_free(options);
    json_decref(json);
    return code;
}

static int coroutine_fn open_image(struct server *server, struct error **err)
{
    const struct nbd_options *options = server->options;
    struct graph *graph = server->control->graph;
    int code = image_open(graph, &options->image, &server->nodes[0], err);
    server->node_count = code == 0;
    if (code == 0 && options->load_snapshot) {
        code = image_show_snapshot(graph, node_beneath_filters(server->nodes[0]), options->load_snapshot, err);
    }
    if (code == 0 && options->snapshot) {
        code = image_open_overlay(graph, server->nodes[0], options->read_only, &server->nodes[1], err);
        server->node_count += code == 0;
    }
    if (code == 0 && options->offset) {
        code = open_window(server, err);
    }
    return code;
}

static int coroutine_fn add_export(struct server *server, struct error **err)
{
    const struct nbd_options *options = server->options;
    struct block_export_options *parsed = NULL;
    json_t *json = json_pack("{s:s, s:s, s:s, s:s, s:s*, s:b, s:b, s:b}", "type", "nbd", "id", "export", "node-name",
                             top(server)->name, "name", options->export_name ? options->export_name : "", "description",
                             options->description, "writable", !options->read_only, "writethrough",
                             options->writethrough, "allocation-depth", options->allocation_depth);
    if (!json) {
        return error_set(err, -EINVAL, "The name or the description of the export is not valid UTF-8");
    }
    if (options->bitmap) {
        json_object_set_new(json, "bitmaps", json_pack("[s]", options->bitmap));
    }
    int code = block_export_options_from_json(json, NULL, &parsed, err);
    code = code < 0 ? code : exports_add(server->control->exports, parsed, err);
    block_export_options_free(parsed);
    json_decref(json);
    return code;
}

/* --- where --- */

static void client_left(void *argument, unsigned remaining)
{
    struct server *server = argument;
    if (!remaining && !server->options->persistent) {
        loop_stop(server->control->loop);
    }
}

static int coroutine_fn listen_to_clients(struct server *server, struct error **err)
{
    const struct nbd_options *options = server->options;
    struct address address =
        options->inherited ? (struct address){.kind = ADDRESS_FD, .fd = ACTIVATION_FIRST}
        : options->socket
            ? (struct address){.kind = ADDRESS_UNIX, .path = (char *)options->socket}
            : (struct address){.kind = ADDRESS_INET, .host = (char *)options->host, .port = (char *)options->port};
    struct nbd_server_config config = {.address = &address,
                                       .handshake_max_seconds = options->handshake_seconds,
                                       .max_connections = options->shared,
                                       .tls_credentials = options->tls_creds,
                                       .tls_authorization = options->tls_authz,
                                       .left = client_left,
                                       .argument = server,
                                       .held = true};
    int code = nbd_server_start(server->control->exports, &config, err);
    if (code == 0 && options->verbose) {
        g_autofree char *where = options->inherited ? g_strdup("the socket that was passed") : address_format(&address);
        fprintf(stderr, "%s: serving '%s' on %s\n", options->program, options->image.name, where);
    }
    return code;
}

/* --- the program --- */

static void handle_signal(int number, void *argument)
{
    struct server *server = argument;
    server->ending = true;
    loop_stop(server->control->loop);
}

static void coroutine_fn start(void *argument)
{
    struct server *server = argument;
    for (unsigned i = 0; i < server->options->objects->len && server->code == 0; i++) {
        server->code = image_object_add(g_ptr_array_index(server->options->objects, i), &server->err);
    }
    if (server->code == 0) {
        server->code = open_image(server, &server->err);
    }
    if (server->code == 0) {
        server->code = listen_to_clients(server, &server->err);
    }
    if (server->code == 0) {
        server->code = add_export(server, &server->err);
    }
    if (server->code == 0) {
        nbd_server_admit(server->control->exports);
    }
}

static void coroutine_fn stop(void *argument)
{
    struct server *server = argument;
    exports_shutdown(server->control->exports);
    while (server->node_count > 0) {
        node_release(server->nodes[--server->node_count]);
    }
    service_shutdown(server->control);
}

static int run(struct server *server, struct loop *loop)
{
    static const int signals[] = {SIGTERM, SIGINT, SIGHUP};
    server->control = service_create(loop, ENGINE_AUTO);
    for (unsigned i = 0; i < G_N_ELEMENTS(signals); i++) {
        loop_watch_signal(signals[i], handle_signal, server);
    }
    loop_run_coroutine(loop, start, server);
    if (server->code == 0 && server->options->pidfile) {
        server->code = background_write_pidfile(server->options->pidfile, &server->err);
    }
    if (server->code == 0 && server->parent >= 0) {
        server->code = background_release_parent(&server->parent, &server->err);
    }
    if (server->code == 0 && !server->ending) {
        loop_run(loop);
    }
    loop_run_coroutine(loop, stop, server);
    service_destroy(server->control);
    return server->code;
}

int nbd_serve(const struct nbd_options *options)
{
    struct server server = {.options = options, .parent = -1};
    struct loop *loop = NULL;
    register_all();
    if (options->fork) {
        server.code = background_fork(&server.parent, &server.err);
    }
    if (server.code == 0) {
        server.code = loop_create(ENGINE_AUTO, &loop, &server.err);
    }
    if (server.code == 0) {
        run(&server, loop);
        loop_destroy(loop);
    }
    return server.code < 0 ? tool_fail(options->program, server.err) : 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Clients. Each has two coroutines on one of the world's I/O loops, which read, write, write zeroes and flush at
 * seeded moments. What is read is compared with the view (view.h) of the image that the client was given; a commit that
 * moves the client elsewhere does not change what it may see.
 *
 * 1. A client that was promised to be alone (exclusive) takes other clients' writes for wrong content.
 * 2. An error is a violation, but in a world where requests to disks fail; there a failed write may show or not.
 */
#include "test/explore/clients.h"
#include "block/graph.h"
#include "block/operation.h"
#include "block/user.h"
#include "schema/claims.h"
#include "test/explore/world.h"
#include <errno.h>

#define WORKERS 2
#define REST_NS (60 * MICROSECOND)

struct client {
    struct actor *actor;
    struct backend *backend;
    struct operation *operation;
    struct view *view;
    struct loop *loop;
    bool writable, exclusive, stop;
    uint64_t since; /* view_clock() */
    unsigned writes;
    struct co_group workers;
};

static struct view_look client_look(const struct client *client)
{
    struct view_look look = view_look_now();
    if (client->exclusive) {
        look.alone = client->actor->number;
        look.alone_since = client->since;
    }
    return look;
}

static void client_failed(const struct client *client, const char *what, int code)
{
    struct world *world = client->actor->world;
    if (!world_has_faults(world)) {
        world_violation(world, "%s: a %s fails: %s", client->actor->move->name, what, g_strerror(-code));
    }
}

static void coroutine_fn client_read(struct client *client, uint64_t offset, uint64_t bytes)
{
    struct world *world = client->actor->world;
    g_autofree unsigned char *seen = g_malloc(bytes);
    struct iovec iov = {seen, bytes};
    struct view_look look = client_look(client);
    int code = backend_read(client->backend, offset, bytes, buffers_one(&iov), 0);
    if (code < 0) {
        client_failed(client, "read", code);
        return;
    }
    const struct picture *picture = &world->pictures[client->actor->move->upper];
    if (picture->may_shrink) { /* what is to be cut off is nobody's, even if the shrink failed */
        bytes = offset < picture->shrinks_to ? MIN(bytes, picture->shrinks_to - offset) : 0;
    }
    g_autofree char *difference = client->view->unknown ? NULL : view_compare(client->view, &look, offset, bytes, seen);
    if (difference) {
        world_violation(world, "%s: %s (at %u us)", client->actor->move->name, difference,
                        (unsigned)(sim_now_ns(world->sim) / MICROSECOND));
    }
}

static void coroutine_fn client_write(struct client *client, uint64_t offset, uint64_t bytes, bool zeroes)
{
    g_autofree unsigned char *data = zeroes ? NULL : g_malloc(bytes);
    if (data) {
        content_fill(data, offset, bytes, content_write_tag(client->actor->number, ++client->writes));
    }
    struct view_write *write = view_write_begin(client->view, client->actor->number, offset, bytes, data);
    if (!write) {
        return;
    }
    struct iovec iov = {data, bytes};
    int code = zeroes ? backend_write_zeroes(client->backend, offset, bytes, REQUEST_MAY_UNMAP)
                      : backend_write(client->backend, offset, bytes, buffers_one(&iov), 0);
    view_write_end(client->view, write, code == 0);
    if (code < 0) {
        client_failed(client, "write", code);
    }
}

static void coroutine_fn client_flush(struct client *client)
{
    uint64_t mark = view_flush_mark();
    int code = backend_flush(client->backend);
    world_catch_up(client->actor->world); /* it may have flushed what took the image's place, and that alone */
    if (code < 0) {
        client_failed(client, "flush", code);
    } else {
        view_flushed(client->view, mark);
    }
}

static void coroutine_fn client_request(struct client *client)
{
    struct world *world = client->actor->world;
    uint64_t size = MIN(backend_size(client->backend), client->view->size);
    if (size == 0) {
        return;
    }
    uint64_t offset = world_below(world, size);
    uint64_t bytes = 1 + world_below(world, MIN(2 * world->cluster, size - offset));
    unsigned luck = (unsigned)world_below(world, 16);
    world->result->requests++;
    if (luck < 7 || !client->writable) {
        client_read(client, offset, bytes);
    } else if (luck < 15) {
        client_write(client, offset, bytes, luck >= 12);
    } else {
        client_flush(client);
    }
}

static void client_entry(void *argument)
{
    struct client *client = argument;
    while (!client->stop) {
        world_sleep((int64_t)world_below(client->actor->world, (uint64_t)REST_NS));
        client_request(client);
    }
    co_group_leave(&client->workers);
}

/* --- coming and going --- */

/* graph->lock is held: the last step of a job sees neither or both. */
static int coroutine_fn client_attach(struct client *client, struct node *node, struct error **err)
{
    struct actor *actor = client->actor;
    struct graph *graph = actor->world->graph;
    struct operation_config config = {
        .kind = "export",
        .id = actor->id,
        .table = &block_export_add_claims,
        .bound = {[CLAIM_NODE] = node},
        .conditions = (client->writable ? CLAIM_IF_WRITABLE : 0) | (client->exclusive ? CLAIM_IF_EXCLUSIVE : 0),
    };
    if (!node) {
        return error_set(err, -ENOENT, "there is no such node any more");
    }
    if (client->writable && (!node->wants_writable || node->never_writable)) {
        return error_set(err, -EROFS, "the node is read-only");
    }
    int code = operation_begin(graph, &config, &client->operation, err);
    if (code < 0) {
        return code;
    }
    client->backend = backend_create(graph, actor->id);
    code = backend_attach_locked(client->backend, node, operation_granted(client->operation, node), err);
    if (code == 0) {
        backend_follow(client->backend, client->operation, CLAIM_NODE);
    }
    return code;
}

static void coroutine_fn client_destroy(struct client *client)
{
    backend_destroy(client->backend);
    operation_end(client->operation);
    view_unref(client->view);
    co_group_destroy(&client->workers);
    g_free(client);
}

int coroutine_fn client_start(struct actor *actor, bool writable, bool exclusive, struct error **err)
{
    struct world *world = actor->world;
    struct client *client = g_new0(struct client, 1);
    client->actor = actor;
    client->writable = writable;
    client->exclusive = exclusive;
    client->loop = world->io[actor->number % world->io_count];
    co_group_init(&client->workers);
    graph_lock(world->graph);
    int code = client_attach(client, world_node(world, actor->move->upper), err);
    world_catch_up(world);
    graph_unlock(world->graph);
    if (code < 0) {
        client_destroy(client);
        return code;
    }
    if (writable) {
        world_forget_above(world, actor->move->upper);
    }
    client->view = view_ref(world->pictures[actor->move->upper].view);
    client->since = view_clock();
    actor->client = client;
    for (unsigned i = 0; i < WORKERS && world->schedule->mode != MODE_VERDICT; i++) {
        co_group_enter(&client->workers);
        loop_spawn(client->loop, client_entry, client);
    }
    return 0;
}

void coroutine_fn client_finish(struct actor *actor)
{
    struct client *client = actor->client;
    client->stop = true;
    co_group_wait(&client->workers);
    client_read(client, 0, backend_size(client->backend));
    if (client->writable && world_chance(actor->world, 50)) {
        client_flush(client);
    }
    client_destroy(client);
    actor->client = NULL;
}

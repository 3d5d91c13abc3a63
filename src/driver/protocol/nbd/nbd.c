/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The `nbd` driver: an export of an NBD server as a node, over libnbd.
 *
 * A request issues its command on the connection of its loop, at once and under that connection's lock, and waits; of
 * the commands that wait there one has its coroutine watch the socket on its own loop, lets libnbd take in what came,
 * wakes those whose answers were in it, and hands the watch over when its own was. If the connection breaks, the node's
 * home loop makes another one meanwhile, and what had no answer is issued again, for as long as reconnect-delay says
 * (nbd_link.c has what that means for writes and flushes).
 *
 * 1. Limits of the server (block sizes, 32 MiB at once) are the node's limits: the request path pads and splits.
 * 2. What the server says of extents is clipped to what was asked for; what it does not say is data.
 * 3. FUA is passed on, or made of a flush where the server has none of its own.
 * 4. The size is the server's at opening, and a server that has another one later is not connected to again.
 *
 * What it does not do: grow the export, lock it against other clients, guess a format.
 */
#include "base/size.h"
#include "block/driver.h"
#include "crypto/tls.h"
#include "driver/drivers.h"
#include "driver/protocol/nbd/nbd_client.h"
#include "driver/protocol/nbd/nbd_name.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib.h>

#define SECOND_NS INT64_C(1000000000)
#define ATTEMPT_NS (30 * SECOND_NS) /* of opening without open-timeout */
#define PAUSE_NS (SECOND_NS / 4)    /* between attempts with it */
#define STATUS_BYTES_MAX (1 * GiB)  /* lengths have 32 bits */
enum { EXPORT_NAME_MAX = 4096 };    /* the protocol's limit of any text */

static struct nbd_client *nbd_client(const struct node *node)
{
    return node->state;
}

/* --- options --- */

static void server_clear(struct nbd_server *server)
{
    address_clear(&server->address);
    g_free(server->export);
    g_free(server->context);
    g_free(server->host_name);
    tls_credentials_put(server->credentials);
}

static int server_take_address(const struct socket_address *from, struct address *ret, struct error **err)
{
    switch (from->type) {
    case SOCKET_ADDRESS_TYPE_INET:
        *ret = (struct address){
            .kind = ADDRESS_INET, .host = g_strdup(from->u.inet.host), .port = g_strdup(from->u.inet.port)};
        return 0;
    case SOCKET_ADDRESS_TYPE_UNIX:
        *ret = (struct address){.kind = ADDRESS_UNIX,
                                .path = g_strdup(from->u.unix_.path),
                                .abstract = from->u.unix_.has_abstract && from->u.unix_.abstract};
        return 0;
    default:
        return error_set(err, -ENOTSUP, "An NBD server is connected to by an address of type 'inet' or 'unix'");
    }
}

static int server_take(struct nbd_server *server, const struct blockdev_options_nbd *options, struct error **err)
{
    int r = server_take_address(options->server, &server->address, err);
    if (r < 0) {
        return r;
    }
    server->export = g_strdup(options->export ? options->export : "");
    server->context_is_must = options->x_dirty_bitmap != NULL;
    server->context = g_strdup(options->x_dirty_bitmap ? options->x_dirty_bitmap : LIBNBD_CONTEXT_BASE_ALLOCATION);
    if (strlen(server->export) > EXPORT_NAME_MAX || strlen(server->context) > EXPORT_NAME_MAX) {
        return error_set(err, -EINVAL, "Names of exports and contexts have %d bytes at most", EXPORT_NAME_MAX);
    }
    if (options->tls_hostname && !options->tls_creds) {
        return error_set(err, -EINVAL, "'tls-hostname' has no meaning without 'tls-creds'");
    }
    if (options->tls_creds) {
        server->host_name = g_strdup(options->tls_hostname                  ? options->tls_hostname
                                     : server->address.kind == ADDRESS_INET ? server->address.host
                                                                            : NULL);
        server->credentials = tls_credentials_get(options->tls_creds, true, err);
        if (!server->credentials) {
            return -ENOENT;
        }
    }
    if (server->credentials && !server->host_name && tls_credentials_need_host_name(server->credentials)) {
        r = error_set(err, -EINVAL, "There is no host name that the server's certificate could be compared with");
        error_hint(err, "Give tls-hostname=NAME");
    }
    return r;
}

/* --- opening and closing --- */

struct open_timer {
    struct loop_timer timer;
    struct nbd_attempt *attempt;
};

static void open_is_late(struct loop_timer *timer)
{
    nbd_attempt_cancel(container_of(timer, struct open_timer, timer)->attempt);
}

static int coroutine_fn open_attempt(struct nbd_client *client, int64_t limit_ns, struct nbd_handle **ret,
                                     struct error **err)
{
    struct nbd_attempt attempt = {0};
    struct open_timer late = {.attempt = &attempt};
    loop_timer_init(&late.timer, open_is_late);
    loop_timer_arm(&late.timer, limit_ns);
    int r = nbd_dial(&client->server, &attempt, ret, &client->facts, err);
    loop_timer_cancel(&late.timer);
    return r;
}

/* Once, or again and again until open-timeout has passed. */
static int coroutine_fn open_connection(struct nbd_client *client, int64_t timeout_ns, struct nbd_handle **ret,
                                        struct error **err)
{
    int64_t deadline_ns = loop_clock_ns() + timeout_ns;
    for (;;) {
        auto_error error = NULL;
        int r = open_attempt(client, timeout_ns ? deadline_ns : loop_clock_ns() + ATTEMPT_NS, ret, &error);
        if (r == 0) {
            return 0;
        }
        if (loop_clock_ns() + PAUSE_NS >= deadline_ns) {
            return error_move(err, g_steal_pointer(&error));
        }
        loop_sleep_ns(NULL, PAUSE_NS);
    }
}

static int nbd_check_writable(const struct node *node, struct error **err)
{
    if (!nbd_client(node)->facts.read_only) {
        return 0;
    }
    int r = error_set(err, -EACCES, "Node '%s': the NBD server offers export '%s' read-only", node->name,
                      nbd_client(node)->server.export);
    error_hint(err, "Open it with read-only=on, or auto-read-only=on");
    return r;
}

static int coroutine_fn nbd_driver_open(struct node *node, const struct blockdev_options *options, struct error **err)
{
    const struct blockdev_options_nbd *own = &options->u.nbd;
    struct nbd_client *client = nbd_client(node);
    struct nbd_handle *handle = NULL;
    client->name = node->name;
    client->reconnect_delay_ns = own->has_reconnect_delay ? own->reconnect_delay * SECOND_NS : 0;
    client->server.tunnels = &client->tunnels;
    co_group_init(&client->tunnels);
    int r = server_take(&client->server, own, err);
    if (r == 0) {
        r = open_connection(client, own->has_open_timeout ? own->open_timeout * SECOND_NS : 0, &handle, err);
        if (r < 0) {
            error_prepend(err, "Node '%s'", node->name);
        }
    }
    if (r == 0 && node->writable) {
        r = nbd_check_writable(node, err);
    }
    if (r < 0) {
        if (handle) {
            nbd_aio_disconnect(handle, 0);
        }
        nbd_close(handle);
        co_group_wait(&client->tunnels);
        co_group_destroy(&client->tunnels);
        server_clear(&client->server);
        return r;
    }
    nbd_links_init(client, handle);
    atomic_store(&node->size, client->facts.size);
    node->limits.alignment = client->facts.minimum;
    node->limits.max_transfer = client->facts.maximum;
    node->filename = nbd_name_format(own);
    return 0;
}

static void coroutine_fn nbd_driver_close(struct node *node)
{
    struct nbd_client *client = nbd_client(node);
    nbd_links_close(client);
    co_group_wait(&client->tunnels);
    co_group_destroy(&client->tunnels);
    server_clear(&client->server);
}

static int coroutine_fn nbd_driver_set_writable(struct node *node, bool writable, struct error **err)
{
    return writable ? nbd_check_writable(node, err) : 0;
}

/* Coroutines on I/O threads end with the requests that they helped. */
static void coroutine_fn nbd_driver_settle(struct node *node)
{
    co_group_wait(&nbd_client(node)->wakes);
}

/* --- data --- */

static int coroutine_fn nbd_driver_flush(struct node *node)
{
    struct nbd_client *client = nbd_client(node);
    struct nbd_command command = {.kind = NBD_FLUSH};
    return client->facts.flush ? nbd_client_run(client, &command) : 0;
}

/* The flags of a command that changes something, and what has to follow it. */
static uint32_t flags_of_change(const struct nbd_client *client, unsigned flags, bool *ret_flush)
{
    bool fua = flags & REQUEST_FUA;
    *ret_flush = fua && !client->facts.fua;
    return fua && client->facts.fua ? LIBNBD_CMD_FLAG_FUA : 0;
}

/* libnbd wants one piece of memory. NULL: there is none. */
static void *memory_of(struct buffers view, uint64_t bytes, void **ret_own)
{
    void *memory = buffers_contiguous(view, bytes);
    *ret_own = memory ? NULL : g_try_malloc(bytes);
    return memory ? memory : *ret_own;
}

static int coroutine_fn nbd_driver_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to,
                                        unsigned flags)
{
    void *own;
    struct nbd_command command = {
        .kind = NBD_READ, .offset = offset, .bytes = bytes, .memory = memory_of(to, bytes, &own)};
    if (!command.memory) {
        return -ENOMEM;
    }
    int r = nbd_client_run(nbd_client(node), &command);
    if (r == 0 && own) {
        buffers_copy_in(to, own, bytes);
    }
    g_free(own);
    return r;
}

static int coroutine_fn nbd_driver_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                         unsigned flags)
{
    struct nbd_client *client = nbd_client(node);
    void *own;
    bool flush;
    struct nbd_command command = {.kind = NBD_WRITE,
                                  .offset = offset,
                                  .bytes = bytes,
                                  .memory = memory_of(from, bytes, &own),
                                  .flags = flags_of_change(client, flags, &flush)};
    if (!command.memory) {
        return -ENOMEM;
    }
    if (own) {
        buffers_copy_out(from, own, bytes);
    }
    int r = nbd_client_run(client, &command);
    g_free(own);
    return r == 0 && flush ? nbd_driver_flush(node) : r;
}

static int coroutine_fn nbd_driver_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    struct nbd_client *client = nbd_client(node);
    bool flush, fast = flags & REQUEST_NO_FALLBACK;
    struct nbd_command command = {
        .kind = NBD_ZERO, .offset = offset, .bytes = bytes, .flags = flags_of_change(client, flags, &flush)};
    if (!client->facts.zero || (fast && !client->facts.fast_zero)) {
        return -ENOTSUP;
    }
    command.flags |= flags & REQUEST_MAY_UNMAP ? 0 : LIBNBD_CMD_FLAG_NO_HOLE;
    command.flags |= fast ? LIBNBD_CMD_FLAG_FAST_ZERO : 0;
    int r = nbd_client_run(client, &command);
    return r == 0 && flush ? nbd_driver_flush(node) : r;
}

static int coroutine_fn nbd_driver_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    struct nbd_client *client = nbd_client(node);
    if (!client->facts.trim) {
        return -ENOTSUP;
    }
    while (bytes) {
        struct nbd_command command = {.kind = NBD_TRIM, .offset = offset, .bytes = min_u64(bytes, STATUS_BYTES_MAX)};
        int r = nbd_client_run(client, &command);
        if (r < 0) {
            return r;
        }
        offset += command.bytes;
        bytes -= command.bytes;
    }
    return 0;
}

static int coroutine_fn nbd_driver_block_status(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    struct nbd_client *client = nbd_client(node);
    struct nbd_command command = {.kind = NBD_STATUS,
                                  .offset = offset,
                                  .bytes = min_u64(bytes, STATUS_BYTES_MAX),
                                  .context = client->server.context,
                                  .flags = LIBNBD_CMD_FLAG_REQ_ONE};
    uint64_t found = 0;
    if (client->facts.context) {
        int r = nbd_client_run(client, &command);
        if (r < 0) {
            return r;
        }
        found = align_down(min_u64(command.extent_bytes, command.bytes), client->facts.minimum);
    }
    bool hole = found && command.extent_flags & LIBNBD_STATE_HOLE;
    bool zero = found && command.extent_flags & LIBNBD_STATE_ZERO;
    *ret = (struct extent){.bytes = found ? found : command.bytes,
                           .host_offset = offset,
                           .flags = EXTENT_ALLOCATED | EXTENT_MAPPED | (zero ? EXTENT_ZERO : 0) |
                                    (hole && (zero || client->server.context_is_must) ? 0 : EXTENT_DATA)};
    return 0;
}

const struct driver driver_nbd = {
    .name = "nbd",
    .id = BLOCKDEV_DRIVER_NBD,
    .kind = DRIVER_PROTOCOL,
    .state_size = sizeof(struct nbd_client),
    .open = nbd_driver_open,
    .close = nbd_driver_close,
    .read = nbd_driver_read,
    .write = nbd_driver_write,
    .write_zeroes = nbd_driver_write_zeroes,
    .discard = nbd_driver_discard,
    .flush = nbd_driver_flush,
    .block_status = nbd_driver_block_status,
    .set_writable = nbd_driver_set_writable,
    .settle = nbd_driver_settle,
};

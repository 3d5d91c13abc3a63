/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * TLS beneath libnbd. libnbd can speak TLS itself, but reads certificates from files while a loop waits, and knows
 * neither the name that the server's certificate must have (over a socket that we connected), nor priorities, nor keys
 * with a password, nor our objects. So the first words up to STARTTLS are said here, crypto/tls.h does the rest, and
 * libnbd gets one end of a socket pair on which the server seems to begin just then, without TLS.
 *
 * 1. Nothing of what was said in plain text gets to libnbd but the server's greeting, of which its flags alone are
 * free.
 * 2. A server that does not begin TLS is refused: there is no way without.
 * 3. Two coroutines per connection move bytes, one in each direction; when either ends, both do, and what they move
 *    between is closed.
 *
 * The price is a copy through the kernel each way, which encrypting outweighs. Home only. The protocol's section is
 * "SelectTLS / NBD_OPT_STARTTLS".
 */
#include "base/size.h"
#include "crypto/tls.h"
#include "driver/protocol/nbd/nbd_client.h"
#include "loop/descriptor.h"
#include "loop/loop.h"
#include <endian.h>
#include <errno.h>
#include <glib.h>
#include <string.h>

#define MAGIC_GREETING UINT64_C(0x4e42444d41474943) /* "NBDMAGIC" */
#define MAGIC_OPTION UINT64_C(0x49484156454f5054)   /* "IHAVEOPT" */
#define MAGIC_REPLY UINT64_C(0x0003e889045565a9)
enum { FLAG_FIXED = 1, FLAG_NO_ZEROES = 2, OPTION_STARTTLS = 5, REPLY_ACK = 1, TEXT_MAX = 4096 };
#define PIECE (128 * KiB)

struct greeting {
    uint64_t magic, options;
    uint16_t flags;
} __attribute__((packed));
struct start {
    uint32_t flags;
    uint64_t magic;
    uint32_t option, bytes;
} __attribute__((packed));
struct reply {
    uint64_t magic;
    uint32_t option, type, bytes;
} __attribute__((packed));
G_STATIC_ASSERT(sizeof(struct greeting) == 18 && sizeof(struct start) == 20 && sizeof(struct reply) == 20);

static int coroutine_fn send_all(struct connection *connection, const void *from, size_t bytes)
{
    struct iovec iov = {(void *)from, bytes};
    return connection_send(connection, buffers_one(&iov), bytes);
}

/* --- in plain text --- */

static int coroutine_fn refused(struct connection *plain, const struct reply *reply, struct error **err)
{
    char text[TEXT_MAX + 1];
    uint32_t bytes = be32toh(reply->bytes);
    bool spoken = bytes > 0 && bytes <= TEXT_MAX && connection_receive_all(plain, text, bytes) == 0;
    text[spoken ? bytes : 0] = 0;
    g_autofree char *valid = g_utf8_make_valid(text, -1);
    int r = error_set(err, -ENOTSUP, "The server does not do TLS%s%s", spoken ? ": " : "", valid);
    error_hint(err, "Leave out tls-creds, or give the server credentials");
    return r;
}

static int coroutine_fn start_tls(struct connection *plain, struct greeting *greeting, struct error **err)
{
    struct reply reply;
    int r = connection_receive_all(plain, greeting, sizeof(*greeting));
    if (r < 0) {
        return error_set_errno(err, r, "The server did not greet");
    }
    if (be64toh(greeting->magic) != MAGIC_GREETING || be64toh(greeting->options) != MAGIC_OPTION ||
        !(be16toh(greeting->flags) & FLAG_FIXED)) {
        return error_set(err, -EPROTO, "What listens there is no NBD server that could do TLS");
    }
    struct start start = {.flags = htobe32(be16toh(greeting->flags) & (FLAG_FIXED | FLAG_NO_ZEROES)),
                          .magic = htobe64(MAGIC_OPTION),
                          .option = htobe32(OPTION_STARTTLS)};
    r = send_all(plain, &start, sizeof(start));
    r = r < 0 ? r : connection_receive_all(plain, &reply, sizeof(reply));
    if (r < 0) {
        return error_set_errno(err, r, "The server ended the connection when asked for TLS");
    }
    if (be64toh(reply.magic) != MAGIC_REPLY || be32toh(reply.option) != OPTION_STARTTLS) {
        return error_set(err, -EPROTO, "The server's answer to a request for TLS makes no sense");
    }
    if (be32toh(reply.type) != REPLY_ACK || reply.bytes) {
        return refused(plain, &reply, err);
    }
    return 0;
}

/* --- moving bytes --- */

struct tunnel {
    struct connection *outer, *inner; /* the server, with TLS; libnbd */
    struct co_group *group;
    unsigned running;
};

static void coroutine_fn tunnel_move(struct tunnel *tunnel, struct connection *from, struct connection *to)
{
    char *piece = g_malloc(PIECE);
    ssize_t got;
    do {
        got = connection_receive(from, piece, PIECE);
    } while (got > 0 && send_all(to, piece, (size_t)got) == 0);
    explicit_bzero(piece, PIECE);
    g_free(piece);
    connection_shutdown(from);
    connection_shutdown(to);
    if (--tunnel->running == 0) {
        struct co_group *group = tunnel->group;
        connection_close(tunnel->outer);
        connection_close(tunnel->inner);
        g_free(tunnel);
        co_group_leave(group);
    }
}

static void coroutine_fn tunnel_down(void *argument)
{
    struct tunnel *tunnel = argument;
    tunnel_move(tunnel, tunnel->outer, tunnel->inner);
}

static void coroutine_fn tunnel_up(void *argument)
{
    struct tunnel *tunnel = argument;
    uint32_t flags; /* libnbd's answer to the greeting: the server has had one */
    if (connection_receive_all(tunnel->inner, &flags, sizeof(flags)) < 0) {
        connection_shutdown(tunnel->inner);
    }
    tunnel_move(tunnel, tunnel->inner, tunnel->outer);
}

int coroutine_fn nbd_tls_open(const struct nbd_server *server, struct connection *plain, int *ret_fd,
                              struct error **err)
{
    struct greeting greeting;
    struct connection *outer, *inner;
    int r = start_tls(plain, &greeting, err);
    if (r == 0) {
        r = tls_connection_open(plain, server->credentials, server->host_name, &outer, NULL, err);
    }
    if (r < 0) {
        connection_close(plain);
        return r;
    }
    r = connection_pair(&inner, ret_fd);
    if (r < 0) {
        connection_close(outer);
        return error_set_errno(err, r, "Cannot make a pair of sockets");
    }
    r = send_all(inner, &greeting, sizeof(greeting));
    g_assert(r == 0); /* a fresh pair has room for it */
    struct tunnel *tunnel = g_new(struct tunnel, 1);
    *tunnel = (struct tunnel){outer, inner, server->tunnels, 2};
    co_group_enter(server->tunnels);
    loop_spawn(loop_self(), tunnel_down, tunnel);
    loop_spawn(loop_self(), tunnel_up, tunnel);
    return 0;
}

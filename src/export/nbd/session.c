/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The receiving side of a client in the transmission phase. One coroutine receives as much as the socket has, takes
 * the requests apart and starts a coroutine for each, which often is done before it yields. Invariants:
 * 1. everything of a session happens on one loop; nothing in it is locked;
 * 2. a request counts as in flight from its header until its reply was sent; when the limits are reached nothing more
 *    is received, so a client that does not read its replies stops itself;
 * 3. [at, end) of the arena is what was received and not yet parsed; a write's payload is used where it lies if it
 *    came whole with its header, and goes straight into its own memory if it is big;
 * 4. the session ends when nothing is received any more and nothing is in flight: nobody is cancelled.
 * Anything that cannot be a request (a wrong magic number, a payload above the limit) ends the connection, since
 * where the next request begins is unknown. It does not know what requests do (request.c) nor how replies go out
 * (reply.c).
 */
#include "export/nbd/session.h"
#include "base/size.h"
#include "export/nbd/nbd_format.h"
#include "loop/connection.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

/* Payloads of this size and above that did not come whole are received into memory of their own. */
#define PAYLOAD_BIG (32 * KiB)
/* An arena with less room than this behind `end` is not received into while writes still use it. */
#define ARENA_ROOM_MIN (64 * KiB)

static struct nbd_request *session_begin_request(struct nbd_session *session, const struct nbd_request_header *header)
{
    struct nbd_request *request = session->free_requests;

    if (request) {
        session->free_requests = request->next_free;
    } else {
        request = g_new(struct nbd_request, 1);
    }
    *request = (struct nbd_request){
        .session = session,
        .cookie = be64toh(header->cookie),
        .offset = be64toh(header->offset),
        .bytes = be32toh(header->bytes),
        .flags = be16toh(header->flags),
        .type = be16toh(header->type),
    };
    if (request->type == NBD_CMD_READ || request->type == NBD_CMD_WRITE) {
        request->charged = min_u64(request->bytes, NBD_PAYLOAD_MAX);
    }
    session->in_flight++;
    session->in_flight_bytes += request->charged;
    return request;
}

void nbd_request_release(struct nbd_request *request)
{
    struct nbd_session *session = request->session;

    if (request->memory) {
        nbd_pool_give(session->config.pool, request->memory, request->room);
    }
    nbd_arena_unref(request->arena);
    session->in_flight--;
    session->in_flight_bytes -= request->charged;
    request->next_free = session->free_requests;
    session->free_requests = request;
    if (session->receiver_waits) {
        session->receiver_waits = false;
        coroutine_wake(session->receiver);
    }
}

/* Waits until at least one request has ended; there is one in flight. */
static void coroutine_fn session_wait(struct nbd_session *session)
{
    unsigned before = session->in_flight;

    nbd_sender_flush(session);
    if (session->in_flight == before) {
        session->receiver_waits = true;
        coroutine_yield();
    }
}

static void session_start(struct nbd_request *request)
{
    coroutine_enter(coroutine_create(nbd_request_run, request));
}

/* Makes room so that `need` bytes from `at` on fit, and receives more. 0, or a negative errno (-ECONNRESET at the end).
 */
static int coroutine_fn session_receive(struct nbd_session *session, size_t need)
{
    struct nbd_arena *arena = session->arena;
    size_t have = session->end - session->at;
    ssize_t n;

    if (arena->references == 1) {
        if (session->at && (!have || session->at + need > NBD_ARENA_ROOM - ARENA_ROOM_MIN)) {
            memmove(arena->bytes, arena->bytes + session->at, have);
            session->at = 0;
            session->end = have;
        }
    } else if (session->at + need > NBD_ARENA_ROOM || session->end > NBD_ARENA_ROOM - ARENA_ROOM_MIN) {
        struct nbd_arena *fresh = nbd_arena_create(session->config.pool);

        if (!fresh) {
            return -ENOMEM;
        }
        memcpy(fresh->bytes, arena->bytes + session->at, have);
        nbd_arena_unref(arena);
        session->arena = arena = fresh;
        session->at = 0;
        session->end = have;
    }
    g_assert(need > have && session->at + need <= NBD_ARENA_ROOM);
    if (session->in_flight == session->sender.filling->count) {
        /* All that could be done is done: nobody gains by waiting for the turn's end. */
        nbd_sender_flush(session);
    }
    n = connection_receive(session->config.connection, arena->bytes + session->end,
                           session->bulk ? need - have : NBD_ARENA_ROOM - session->end);
    if (n <= 0) {
        return n ? (int)n : -ECONNRESET;
    }
    session->end += (size_t)n;
    return 0;
}

/* Receives a payload that is in no memory, and forgets it. */
static int coroutine_fn session_skip(struct nbd_session *session, size_t bytes)
{
    session->bulk = false;
    while (bytes) {
        size_t have = MIN(session->end - session->at, bytes);

        session->at += have;
        bytes -= have;
        if (bytes) {
            int r = session_receive(session, 1);

            if (r < 0) {
                return r;
            }
        }
    }
    return 0;
}

/* Receives the payload of a big write into memory of its own; a part may have come with the header. */
static int coroutine_fn session_receive_payload(struct nbd_session *session, struct nbd_request *request)
{
    size_t have = MIN(session->end - session->at, request->bytes);

    request->memory = nbd_pool_take(session->config.pool, request->bytes, &request->room);
    if (!request->memory) {
        request->error = -ENOMEM;
        return session_skip(session, request->bytes);
    }
    memcpy(request->memory, session->arena->bytes + session->at, have);
    session->at += have;
    request->payload = (struct iovec){request->memory, request->bytes};
    if (have == request->bytes) {
        return 0;
    }
    if (session->in_flight == session->sender.filling->count + 1) {
        nbd_sender_flush(session);
    }
    return connection_receive_all(session->config.connection, (uint8_t *)request->memory + have, request->bytes - have);
}

/* The header is complete and the payload, if any, is not too long. */
static int coroutine_fn session_take_request(struct nbd_session *session, const struct nbd_request_header *header)
{
    struct nbd_request *request = session_begin_request(session, header);
    int r = 0;

    session->at += sizeof(*header);
    if (request->type == NBD_CMD_WRITE) {
        session->bulk = request->bytes >= PAYLOAD_BIG;
        if (session->end - session->at >= request->bytes && request->bytes < PAYLOAD_BIG) {
            request->payload = (struct iovec){session->arena->bytes + session->at, request->bytes};
            request->arena = session->arena;
            request->arena->references++;
            session->at += request->bytes;
        } else {
            r = session_receive_payload(session, request);
        }
    } else {
        session->bulk = false;
    }
    if (r < 0) {
        /* The stream broke inside the payload. */
        nbd_request_release(request);
        return r;
    }
    session_start(request);
    return 0;
}

/* May a request with this much payload be let in now? */
static bool session_has_room(const struct nbd_session *session, size_t bytes)
{
    return !session->in_flight ||
           (session->in_flight < NBD_IN_FLIGHT_MAX && session->in_flight_bytes + bytes <= NBD_IN_FLIGHT_BYTES_MAX);
}

/* Takes one request from the arena, or receives more for it. Negative: no more requests. */
static int coroutine_fn session_step(struct nbd_session *session)
{
    const struct nbd_request_header *header = (const void *)(session->arena->bytes + session->at);
    size_t have = session->end - session->at;

    if (have < sizeof(*header)) {
        return session_receive(session, sizeof(*header));
    }
    if (header->magic != htobe32(NBD_REQUEST_MAGIC)) {
        return -EPROTO;
    }
    uint16_t type = be16toh(header->type);
    uint32_t bytes = be32toh(header->bytes);

    if (type == NBD_CMD_DISC) {
        return -ESHUTDOWN;
    }
    if (!session_has_room(session, type == NBD_CMD_READ || type == NBD_CMD_WRITE ? bytes : 0)) {
        session_wait(session);
        return 0;
    }
    if (type == NBD_CMD_WRITE && bytes > NBD_PAYLOAD_MAX) {
        /* Says why, and ends: the payload is not worth reading. */
        session_start(session_begin_request(session, header));
        return -EPROTO;
    }
    if (type == NBD_CMD_WRITE && bytes < PAYLOAD_BIG && have < sizeof(*header) + bytes) {
        return session_receive(session, sizeof(*header) + bytes);
    }
    return session_take_request(session, header);
}

void coroutine_fn nbd_session_run(const struct nbd_session_config *config)
{
    g_autofree struct nbd_session *session = g_new0(struct nbd_session, 1);

    session->config = *config;
    session->receiver = coroutine_self();
    session->arena = nbd_arena_create(config->pool);
    nbd_sender_init(session);
    if (session->arena) {
        while (!session->sender.broken && session_step(session) == 0) {
        }
    }
    while (session->in_flight) {
        session_wait(session);
    }
    nbd_sender_finish(session);
    nbd_arena_unref(session->arena);
    while (session->free_requests) {
        struct nbd_request *request = session->free_requests;

        session->free_requests = request->next_free;
        g_free(request);
    }
}

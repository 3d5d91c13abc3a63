/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The receiving side of a client in the transmission phase. One coroutine receives as much as the socket has, takes
 * the requests apart and starts a coroutine for each, which often is done before it yields. Invariants:
 * 1. everything of a session happens on one loop; nothing in it is locked;
 * 2. a request counts as in flight from its header until its reply was sent; when the limits are reached nothing more
 *    is received, so a client that does not read its replies stops itself;
 * 3. [at, end) of the arena is what was received and not yet parsed; a payload is used where it lies if it came whole
 *    with its header, and goes straight into its own memory if it is big;
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
/* The longest payload of a request for block status that can be right: each context once. */
#define STATUS_PAYLOAD_MAX (sizeof(struct nbd_status_payload) + NBD_CONTEXTS_MAX * sizeof(uint32_t))
/* An arena with less room than this behind `end` is not received into while writes still use it. */
#define ARENA_ROOM_MIN (64 * KiB)

/* A request's header, taken apart. */
struct header {
    uint64_t cookie, offset;
    uint64_t bytes;   /* what it is about */
    uint64_t payload; /* what follows the header */
    uint16_t flags, type;
    int error; /* it is not as it must be: what it is answered with */
};

static inline size_t header_bytes(const struct nbd_session *session)
{
    return session->config.style >= NBD_EXTENDED ? sizeof(struct nbd_extended_request_header)
                                                 : sizeof(struct nbd_request_header);
}

/* An extended header's length is the payload's or the range's, as a flag says. A write has a payload with or without:
 * the protocol wants the flag there, but the peer's client (10.0) does not set it. */
static void header_take_length(struct header *header, uint64_t length)
{
    bool writes = header->type == NBD_CMD_WRITE;
    bool has_payload = writes || header->flags & NBD_CMD_FLAG_PAYLOAD_LEN;

    header->payload = has_payload ? length : 0;
    header->bytes = has_payload && !writes ? 0 : length;
    if (has_payload && !writes && (header->type != NBD_CMD_BLOCK_STATUS || length > STATUS_PAYLOAD_MAX)) {
        header->error = -EINVAL;
    }
}

/* False: it cannot be a header. */
static inline bool header_parse(const struct nbd_session *session, struct header *ret)
{
    const uint8_t *at = session->arena->bytes + session->at;

    if (session->config.style >= NBD_EXTENDED) {
        const struct nbd_extended_request_header *wire = (const void *)at;

        *ret = (struct header){.cookie = be64toh(wire->cookie),
                               .offset = be64toh(wire->offset),
                               .flags = be16toh(wire->flags),
                               .type = be16toh(wire->type)};
        header_take_length(ret, be64toh(wire->bytes));
        return wire->magic == htobe32(NBD_EXTENDED_REQUEST_MAGIC);
    }
    const struct nbd_request_header *wire = (const void *)at;
    uint32_t bytes = be32toh(wire->bytes);

    *ret = (struct header){.cookie = be64toh(wire->cookie),
                           .offset = be64toh(wire->offset),
                           .bytes = bytes,
                           .payload = wire->type == htobe16(NBD_CMD_WRITE) ? bytes : 0,
                           .flags = be16toh(wire->flags),
                           .type = be16toh(wire->type)};
    return wire->magic == htobe32(NBD_REQUEST_MAGIC);
}

/* What a request counts against the limit of bytes. */
static inline size_t header_charge(const struct header *header)
{
    return min_u64(header->type == NBD_CMD_READ ? max_u64(header->bytes, header->payload) : header->payload,
                   NBD_PAYLOAD_MAX);
}

static struct nbd_request *session_begin_request(struct nbd_session *session, const struct header *header)
{
    struct nbd_request *request = session->free_requests;

    if (request) {
        session->free_requests = request->next_free;
    } else {
        request = g_new(struct nbd_request, 1);
    }
    *request = (struct nbd_request){
        .session = session,
        .cookie = header->cookie,
        .offset = header->offset,
        .bytes = header->bytes,
        .flags = header->flags,
        .type = header->type,
        .error = header->error,
        .charged = header_charge(header),
    };
    session->in_flight++;
    session->in_flight_bytes += request->charged;
    nbd_count(&session->config.counters->requests, 1);
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

/* Receives a big payload into memory of its own; a part may have come with the header. */
static int coroutine_fn session_receive_payload(struct nbd_session *session, struct nbd_request *request, size_t bytes)
{
    size_t have = MIN(session->end - session->at, bytes);

    request->memory = nbd_pool_take(session->config.pool, bytes, &request->room);
    if (!request->memory) {
        request->error = -ENOMEM;
        return session_skip(session, bytes);
    }
    memcpy(request->memory, session->arena->bytes + session->at, have);
    session->at += have;
    request->payload = (struct iovec){request->memory, bytes};
    if (have == bytes) {
        return 0;
    }
    if (session->in_flight == session->sender.filling->count + 1) {
        nbd_sender_flush(session);
    }
    return connection_receive_all(session->config.connection, (uint8_t *)request->memory + have, bytes - have);
}

/* The header is complete and the payload, if any, is not too long. */
static int coroutine_fn session_take_request(struct nbd_session *session, const struct header *header)
{
    struct nbd_request *request = session_begin_request(session, header);
    size_t payload = header->payload;
    int r = 0;

    session->at += header_bytes(session);
    session->bulk = payload >= PAYLOAD_BIG;
    if (payload && header->error) {
        r = session_skip(session, payload);
    } else if (payload && session->end - session->at >= payload && payload < PAYLOAD_BIG) {
        request->payload = (struct iovec){session->arena->bytes + session->at, payload};
        request->arena = session->arena;
        request->arena->references++;
        session->at += payload;
    } else if (payload) {
        r = session_receive_payload(session, request, payload);
    }
    if (r < 0) {
        /* The stream broke inside the payload. */
        nbd_request_release(request);
        return r;
    }
    session_start(request);
    return 0;
}

/* May a request that counts so much be let in now? */
static bool session_has_room(const struct nbd_session *session, size_t charge)
{
    return !session->in_flight ||
           (session->in_flight < NBD_IN_FLIGHT_MAX && session->in_flight_bytes + charge <= NBD_IN_FLIGHT_BYTES_MAX);
}

/* Takes one request from the arena, or receives more for it. Negative: no more requests. */
static int coroutine_fn session_step(struct nbd_session *session)
{
    size_t have = session->end - session->at, head = header_bytes(session);
    struct header header;

    if (have < head) {
        return session_receive(session, head);
    }
    if (!header_parse(session, &header)) {
        return -EPROTO;
    }
    if (header.type == NBD_CMD_DISC) {
        return -ESHUTDOWN;
    }
    if (!session_has_room(session, header_charge(&header))) {
        session_wait(session);
        return 0;
    }
    if (header.payload > NBD_PAYLOAD_MAX) {
        /* Says why, and ends: the payload is not worth reading. */
        header.error = header.type == NBD_CMD_WRITE ? header.error : -EINVAL;
        session_start(session_begin_request(session, &header));
        return -EPROTO;
    }
    if (header.payload && header.payload < PAYLOAD_BIG && have < head + header.payload) {
        return session_receive(session, head + header.payload);
    }
    return session_take_request(session, &header);
}

void coroutine_fn nbd_session_run(const struct nbd_session_config *config)
{
    g_autofree struct nbd_session *session = g_new0(struct nbd_session, 1);

    session->config = *config;
    session->receiver = coroutine_self();
    session->arena = nbd_arena_create(config->pool);
    nbd_sender_init(session);
    if (session->arena) {
        int r = 0;

        while (!session->sender.broken && r == 0) {
            r = session_step(session);
        }
        session->abandoned = r != -ESHUTDOWN;
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

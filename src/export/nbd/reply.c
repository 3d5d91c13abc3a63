/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Replies on their way out. Finished requests add their reply to the batch that is filling; the sender coroutine takes
 * the whole batch and sends it with one call, while the next one fills. Invariants:
 * 1. a request is in at most one batch; there are never more of them than the session lets in (NBD_IN_FLIGHT_MAX), so
 *    a batch always has room for every request's ordinary reply;
 * 2. replies are headers in the batch and payloads in the requests' memory (or lent, see 3): nothing is copied, and a
 *    request lives until the batch with it was sent;
 * 3. the sender is idle (nbd_sender_flush() enters it), inside connection_send(), or taken by a request that sends its
 *    reply itself, from memory that is lent for a moment only (nbd_reply_straight());
 * 4. a connection that broke is shut down once, and from then on replies are dropped as if they had been sent.
 * When a batch goes: at the end of the loop's turn; at once when it is large, or when the receiver has nothing else to
 * do. It does not know what requests do (request.c).
 */
#include "export/nbd/reply.h"
#include "base/size.h"
#include "export/nbd/nbd_format.h"
#include "export/nbd/session.h"
#include "loop/connection.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

/* A batch of so many bytes does not wait for the turn's end: the client goes on meanwhile. */
#define BATCH_LARGE (16 * KiB)
/* The same where others want the processor in this turn: to wake them all at once costs less than one by one. */
#define BATCH_LARGE_AMONG_OTHERS (128 * KiB)
/* Zeroes are looked for in pieces of this size, in reads of at least two of them. */
#define HOLE_GRANULE (32 * KiB)
#define CHUNKS_MAX 16

static struct nbd_batch *sender_take_batch(struct nbd_sender *sender)
{
    struct nbd_batch *batch = sender->filling;

    sender->filling = sender->sending;
    sender->sending = batch;
    return batch;
}

static void sender_break(struct nbd_session *session)
{
    if (!session->sender.broken) {
        session->sender.broken = true;
        connection_shutdown(session->config.connection);
    }
}

static void batch_clear(struct nbd_batch *batch)
{
    batch->count = batch->iov_count = batch->header_bytes = 0;
    batch->bytes = 0;
}

/* Sends the batch from its byte `sent` on, and lets its requests go. */
static void batch_send(struct nbd_session *session, struct nbd_batch *batch, size_t sent)
{
    if (!session->sender.broken && sent < batch->bytes) {
        struct buffers view = buffers_advance((struct buffers){batch->iov, batch->iov_count, 0}, sent);

        if (connection_send(session->config.connection, view, batch->bytes - sent) < 0) {
            sender_break(session);
        }
    }
    for (unsigned i = 0; i < batch->count; i++) {
        nbd_request_release(batch->requests[i]);
    }
    batch_clear(batch);
}

static void sender_run(void *argument)
{
    struct nbd_session *session = argument;
    struct nbd_sender *sender = &session->sender;

    while (!sender->closing) {
        if (sender->filling->count) {
            batch_send(session, sender_take_batch(sender), 0);
        }
        if (sender->filling->count) {
            loop_at_turn_end(&session->flush);
        }
        sender->idle = true;
        coroutine_yield();
    }
}

static void session_turn_end(struct loop_task *task)
{
    nbd_sender_flush(container_of(task, struct nbd_session, flush));
}

void nbd_sender_init(struct nbd_session *session)
{
    struct nbd_sender *sender = &session->sender;

    sender->filling = g_new0(struct nbd_batch, 1);
    sender->sending = g_new0(struct nbd_batch, 1);
    session->flush.run = session_turn_end;
    sender->coroutine = coroutine_create(sender_run, session);
    coroutine_enter(sender->coroutine);
}

void coroutine_fn nbd_sender_finish(struct nbd_session *session)
{
    struct nbd_sender *sender = &session->sender;

    g_assert(sender->idle && !sender->filling->count);
    sender->closing = true;
    coroutine_enter(sender->coroutine);
    while (session->flush.queued) {
        coroutine_pause();
    }
    g_free(sender->filling);
    g_free(sender->sending);
}

void nbd_sender_flush(struct nbd_session *session)
{
    struct nbd_sender *sender = &session->sender;

    if (sender->idle && sender->filling->count) {
        sender->idle = false;
        coroutine_enter(sender->coroutine);
    }
}

/* Room for `bytes` more of headers in the batch, which are sent next. */
static void *batch_header(struct nbd_batch *batch, unsigned bytes)
{
    uint8_t *header = batch->headers + batch->header_bytes;
    struct iovec *last = batch->iov_count ? &batch->iov[batch->iov_count - 1] : NULL;

    g_assert(batch->header_bytes + bytes <= NBD_BATCH_HEADER_BYTES);
    batch->header_bytes += bytes;
    batch->bytes += bytes;
    if (last && (uint8_t *)last->iov_base + last->iov_len == header) {
        last->iov_len += bytes;
    } else {
        g_assert(batch->iov_count < NBD_BATCH_IOVECS);
        batch->iov[batch->iov_count++] = (struct iovec){header, bytes};
    }
    return header;
}

static void batch_payload(struct nbd_batch *batch, const void *payload, size_t bytes)
{
    g_assert(batch->iov_count < NBD_BATCH_IOVECS);
    batch->iov[batch->iov_count++] = (struct iovec){(void *)payload, bytes};
    batch->bytes += bytes;
}

static inline bool is_extended(const struct nbd_request *request)
{
    return request->session->config.style >= NBD_EXTENDED;
}

static inline unsigned chunk_head_bytes(const struct nbd_request *request)
{
    return is_extended(request) ? sizeof(struct nbd_extended_chunk) : sizeof(struct nbd_chunk);
}

/* Writes a chunk's head; `bytes` follow. Returns where. */
static void *chunk_begin(void *to, const struct nbd_request *request, enum nbd_chunk_type type, bool done, size_t bytes)
{
    uint16_t flags = htobe16(done ? NBD_CHUNK_DONE : 0);

    if (is_extended(request)) {
        struct nbd_extended_chunk *chunk = to;

        *chunk = (struct nbd_extended_chunk){
            htobe32(NBD_EXTENDED_CHUNK_MAGIC), flags,         htobe16(type), htobe64(request->cookie),
            htobe64(request->offset),          htobe64(bytes)};
        return chunk + 1;
    }
    struct nbd_chunk *chunk = to;

    *chunk = (struct nbd_chunk){htobe32(NBD_CHUNK_MAGIC), flags, htobe16(type), htobe64(request->cookie),
                                htobe32((uint32_t)bytes)};
    return chunk + 1;
}

/* A chunk with a body of `body_bytes` in the batch, to be filled in, and `payload_bytes` behind it. */
static void *batch_chunk(struct nbd_batch *batch, const struct nbd_request *request, enum nbd_chunk_type type,
                         bool done, unsigned body_bytes, size_t payload_bytes)
{
    return chunk_begin(batch_header(batch, chunk_head_bytes(request) + body_bytes), request, type, done,
                       body_bytes + payload_bytes);
}

static void batch_append(struct nbd_batch *batch, struct nbd_request *request)
{
    g_assert(batch->count < NBD_BATCH_REQUESTS);
    batch->requests[batch->count++] = request;
}

/* The request's reply is complete. */
static void batch_add(struct nbd_request *request)
{
    struct nbd_session *session = request->session;
    struct nbd_batch *batch = session->sender.filling;

    batch_append(batch, request);
    loop_at_turn_end(&session->flush);
    if (batch->bytes >= BATCH_LARGE_AMONG_OTHERS ||
        (batch->bytes >= BATCH_LARGE && !loop_has_others(&session->flush))) {
        nbd_sender_flush(session);
    }
}

static void batch_simple(struct nbd_batch *batch, const struct nbd_request *request, int error, const void *payload,
                         size_t bytes)
{
    struct nbd_simple_reply *reply = batch_header(batch, sizeof(*reply));

    reply->magic = htobe32(NBD_SIMPLE_REPLY_MAGIC);
    reply->error = htobe32(nbd_error_from_errno(error));
    reply->cookie = htobe64(request->cookie);
    if (bytes) {
        batch_payload(batch, payload, bytes);
    }
}

void nbd_reply_simple(struct nbd_request *request, int error, const void *payload, size_t bytes)
{
    batch_simple(request->session->sender.filling, request, error, payload, bytes);
    batch_add(request);
}

void nbd_reply_error(struct nbd_request *request, int error, const char *message)
{
    if (request->session->config.style < NBD_STRUCTURED) {
        nbd_reply_simple(request, error, NULL, 0);
        return;
    }
    struct nbd_batch *batch = request->session->sender.filling;
    size_t message_bytes = message ? strlen(message) : 0;
    struct nbd_body_error *body = batch_chunk(batch, request, NBD_CHUNK_ERROR, true, sizeof(*body), message_bytes);

    body->error = htobe32(nbd_error_from_errno(error));
    body->message_bytes = htobe16((uint16_t)message_bytes);
    if (message_bytes) {
        batch_payload(batch, message, message_bytes);
    }
    batch_add(request);
}

void nbd_reply_done(struct nbd_request *request)
{
    bool has_data = request->type == NBD_CMD_READ || request->type == NBD_CMD_BLOCK_STATUS;

    /* A simple reply is shorter; where it is legal. */
    if (is_extended(request) || (has_data && request->session->config.style == NBD_STRUCTURED)) {
        batch_chunk(request->session->sender.filling, request, NBD_CHUNK_NONE, true, 0, 0);
        batch_add(request);
    } else {
        nbd_reply_simple(request, 0, NULL, 0);
    }
}

static void batch_data(struct nbd_batch *batch, const struct nbd_request *request, const uint8_t *data, uint32_t from,
                       uint32_t bytes, bool done)
{
    struct nbd_body_data *body = batch_chunk(batch, request, NBD_CHUNK_OFFSET_DATA, done, sizeof(*body), bytes);

    body->offset = htobe64(request->offset + from);
    batch_payload(batch, data + from, bytes);
}

static void batch_hole(struct nbd_batch *batch, struct nbd_request *request, uint32_t from, uint32_t bytes, bool done)
{
    struct nbd_body_hole *body = batch_chunk(batch, request, NBD_CHUNK_OFFSET_HOLE, done, sizeof(*body), 0);

    body->offset = htobe64(request->offset + from);
    body->bytes = htobe32(bytes);
}

struct run {
    uint32_t from, bytes;
    bool hole;
};

/* Divides what was read into runs of zeroes and of data; the last run takes what does not fit into CHUNKS_MAX. */
static unsigned data_divide(const struct nbd_request *request, const uint8_t *data, struct run runs[CHUNKS_MAX])
{
    unsigned count = 0;

    for (uint32_t from = 0; from < request->bytes;) {
        uint64_t next = align_down(request->offset + from + HOLE_GRANULE, HOLE_GRANULE) - request->offset;
        uint32_t bytes = (uint32_t)min_u64(next, request->bytes) - from;
        bool hole = memory_is_zero(data + from, bytes);

        if (count && runs[count - 1].hole == hole) {
            runs[count - 1].bytes += bytes;
        } else if (count == CHUNKS_MAX) {
            runs[count - 1].hole = false;
            runs[count - 1].bytes = (uint32_t)request->bytes - runs[count - 1].from;
            break;
        } else {
            runs[count++] = (struct run){from, bytes, hole};
        }
        from += bytes;
    }
    return count;
}

/* Is there room for `chunks` of data or hole and, behind them, for all other requests' ordinary replies? */
static bool batch_has_room(const struct nbd_batch *batch, unsigned chunks)
{
    unsigned others = NBD_BATCH_REQUESTS - batch->count - 1;

    return batch->iov_count + 2 * chunks + others * NBD_REPLY_IOVECS <= NBD_BATCH_IOVECS &&
           batch->header_bytes + NBD_REPLY_HEADER_BYTES * (chunks + others) <= NBD_BATCH_HEADER_BYTES;
}

void nbd_reply_data(struct nbd_request *request, const void *data, bool may_split)
{
    struct nbd_batch *batch = request->session->sender.filling;
    struct run runs[CHUNKS_MAX];
    unsigned count = 0;

    if (may_split && request->bytes >= 2 * HOLE_GRANULE) {
        count = data_divide(request, data, runs);
    }
    if (!count || !batch_has_room(batch, count)) {
        batch_data(batch, request, data, 0, (uint32_t)request->bytes, true);
        count = 0;
    }
    for (unsigned i = 0; i < count; i++) {
        if (runs[i].hole) {
            batch_hole(batch, request, runs[i].from, runs[i].bytes, i + 1 == count);
        } else {
            batch_data(batch, request, data, runs[i].from, runs[i].bytes, i + 1 == count);
        }
    }
    batch_add(request);
}

/* ---- replies from memory that is lent ---- */

bool nbd_reply_has_hole(const struct nbd_request *request, const void *data)
{
    struct run runs[CHUNKS_MAX];

    if (request->session->config.style < NBD_STRUCTURED || (request->flags & NBD_CMD_FLAG_DF) ||
        request->bytes < 2 * HOLE_GRANULE) {
        return false;
    }
    return data_divide(request, data, runs) != 1 || runs[0].hole;
}

ssize_t coroutine_fn nbd_reply_straight(struct nbd_request *request, const void *data)
{
    struct nbd_session *session = request->session;
    struct nbd_sender *sender = &session->sender;

    nbd_sender_flush(session); /* what came before goes before */
    if (!sender->idle || sender->filling->count || sender->broken) {
        return -EAGAIN;
    }
    struct nbd_batch *batch = sender_take_batch(sender);

    sender->idle = false;
    if (session->config.style < NBD_STRUCTURED) {
        batch_simple(batch, request, 0, data, request->bytes);
    } else {
        batch_data(batch, request, data, 0, (uint32_t)request->bytes, true);
    }
    batch_append(batch, request);
    struct buffers view = {batch->iov, batch->iov_count, 0};
    ssize_t sent = connection_send_now(session->config.connection, view, batch->bytes - 1);

    if (sent <= 0) {
        batch_clear(batch);
        sender->idle = true;
        return sent == -ENOTSUP ? -ENOTSUP : -EAGAIN;
    }
    sender->sent = (size_t)sent;
    return sender->sent > batch->header_bytes ? sent - (ssize_t)batch->header_bytes : 0;
}

void coroutine_fn nbd_reply_straight_end(struct nbd_request *request, const void *data, int error)
{
    struct nbd_session *session = request->session;
    struct nbd_sender *sender = &session->sender;
    struct nbd_batch *batch = sender->sending;

    if (error < 0) {
        sender_break(session);
    }
    batch->iov[batch->iov_count - 1].iov_base = (void *)data;
    batch_send(session, batch, sender->sent);
    sender->idle = true;
    nbd_sender_flush(session);
}

void nbd_reply_status_chunk(const struct nbd_request *request, void *to, uint32_t context, unsigned count, bool last)
{
    if (is_extended(request)) {
        struct nbd_body_extended_status *body =
            chunk_begin(to, request, NBD_CHUNK_BLOCK_STATUS_EXT, last,
                        sizeof(*body) + count * sizeof(struct nbd_extended_status_extent));

        *body = (struct nbd_body_extended_status){htobe32(context), htobe32(count)};
    } else {
        struct nbd_body_status *body = chunk_begin(to, request, NBD_CHUNK_BLOCK_STATUS, last,
                                                   sizeof(*body) + count * sizeof(struct nbd_status_extent));

        body->context = htobe32(context);
    }
}

size_t nbd_reply_status_head(const struct nbd_request *request)
{
    return chunk_head_bytes(request) +
           (is_extended(request) ? sizeof(struct nbd_body_extended_status) : sizeof(struct nbd_body_status));
}

void nbd_reply_status(struct nbd_request *request, const void *chunks, size_t bytes)
{
    batch_payload(request->session->sender.filling, chunks, bytes);
    batch_add(request);
}

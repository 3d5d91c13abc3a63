/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_NBD_REPLY_H
#define INTERLOCK_EXPORT_NBD_REPLY_H

#include "loop/coroutine.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

/*
 * Replies on their way out: gathered in a batch, sent with one call. On the session's loop.
 */
struct nbd_request;
struct nbd_session;

#define NBD_BATCH_REQUESTS 128
/* What every request may use of a batch; a read that is split into chunks may use more while others leave it room. */
#define NBD_REPLY_IOVECS 3
#define NBD_REPLY_HEADER_BYTES 64
#define NBD_BATCH_IOVECS (NBD_BATCH_REQUESTS * NBD_REPLY_IOVECS + 128)
#define NBD_BATCH_HEADER_BYTES (NBD_BATCH_REQUESTS * NBD_REPLY_HEADER_BYTES + 2048)

struct nbd_batch {
    unsigned count; /* requests */
    unsigned iov_count;
    unsigned header_bytes;
    size_t bytes;
    struct nbd_request *requests[NBD_BATCH_REQUESTS];
    struct iovec iov[NBD_BATCH_IOVECS];
    uint8_t headers[NBD_BATCH_HEADER_BYTES];
};

struct nbd_sender {
    struct coroutine *coroutine;
    bool idle;    /* it waits to be entered by nbd_sender_flush() */
    bool closing; /* it ends when entered next */
    bool broken;  /* the connection is of no use any more */
    size_t sent;  /* of the batch that is being sent by the request in it (nbd_reply_straight()) */
    struct nbd_batch *filling, *sending;
};

void nbd_sender_init(struct nbd_session *session);
/* Nothing is in flight any more. */
void coroutine_fn nbd_sender_finish(struct nbd_session *session);
/* Sends what there is now, unless a batch is under way: then that goes first. */
void nbd_sender_flush(struct nbd_session *session);

/* Adds a request's reply. The request's payload memory is lent until nbd_request_release(). */
void nbd_reply_simple(struct nbd_request *request, int error, const void *payload, size_t bytes);
/* `message` is a static string or NULL. */
void nbd_reply_error(struct nbd_request *request, int error, const char *message);
/* NBD_CMD_READ with structured or extended replies: `data` may be split into data and holes. */
void nbd_reply_data(struct nbd_request *request, const void *data, bool may_split);
/* Would the reply to a read leave out zeroes among its data? */
bool nbd_reply_has_hole(const struct nbd_request *request, const void *data);
/*
 * The reply to a read whose data are lent for a moment only, and have no hole: what goes without waiting is sent from
 * there, but for the last byte, so that the client has no whole reply before its sender knows that it is right. Returns
 * how many bytes of `data` have gone, which may be 0; or a negative errno: nothing has gone, and an ordinary reply is
 * to be made (-EAGAIN: this time; -ENOTSUP: always). After 0 or more no other reply is sent until
 * nbd_reply_straight_end(): it sends the rest, which lies in `data` where it would with all of them; or, after an
 * `error`, ends the connection.
 */
ssize_t coroutine_fn nbd_reply_straight(struct nbd_request *request, const void *data);
void coroutine_fn nbd_reply_straight_end(struct nbd_request *request, const void *data, int error);
/* Block status: `chunks` were made one behind the other by nbd_reply_status_chunk(), `bytes` in all. */
void nbd_reply_status(struct nbd_request *request, const void *chunks, size_t bytes);
/* Writes the head of a chunk with `count` extents of a context to `to`; they follow, big-endian. `last`: no chunk
 * follows. The head has nbd_reply_status_head() bytes. */
void nbd_reply_status_chunk(const struct nbd_request *request, void *to, uint32_t context, unsigned count, bool last);
size_t nbd_reply_status_head(const struct nbd_request *request);
/* A request that succeeded and has nothing to say. */
void nbd_reply_done(struct nbd_request *request);

#endif

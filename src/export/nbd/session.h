/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_NBD_SESSION_H
#define INTERLOCK_EXPORT_NBD_SESSION_H

#include "export/nbd/contexts.h"
#include "export/nbd/memory.h"
#include "export/nbd/reply.h"
#include "loop/coroutine.h"
#include "loop/loop.h"
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

/*
 * The transmission phase of one client: requests come in, replies go out. All of it on one loop.
 */
struct backend;
struct connection;

/* Limits per client; behind them no more is received. */
#define NBD_IN_FLIGHT_MAX NBD_BATCH_REQUESTS
#define NBD_IN_FLIGHT_BYTES_MAX ((size_t)64 * 1024 * 1024)

/* What a client has asked for; written on its loop, read anywhere. */
struct nbd_counters {
    atomic_uint_fast64_t requests, read_bytes, written_bytes;
};
static inline void nbd_count(atomic_uint_fast64_t *counter, uint64_t more)
{
    /* Nobody else writes. */
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + more, memory_order_relaxed);
}

struct nbd_session_config {
    struct connection *connection;
    struct backend *backend;
    const atomic_uint_fast64_t *size; /* of the export, bytes; may change */
    struct nbd_counters *counters;
    struct nbd_pool *pool;
    enum nbd_style style;                /* negotiated */
    const struct nbd_contexts *contexts; /* the export's */
    struct nbd_choice choice;            /* those of them that were negotiated */
    const atomic_bool *ending; /* the export is, which is true for long before the connection is seen to end */
    bool read_only;
    bool writethrough; /* every write as if it had FUA */
};

/* One request, from its header's arrival until its reply was sent. */
struct nbd_request {
    struct nbd_session *session;
    struct nbd_request *next_free;
    uint64_t cookie, offset, bytes;
    uint16_t flags, type;
    int error;               /* set before it runs: it only answers with this (negative errno) */
    size_t charged;          /* bytes counted in session->in_flight_bytes */
    void *memory;            /* from the pool: a payload either way; or NULL */
    size_t room;             /* of memory */
    struct nbd_arena *arena; /* where a write's payload lies if not in memory; or NULL */
    struct iovec payload;    /* of a write; of a request for block status, or empty */
};

struct nbd_session {
    struct nbd_session_config config;
    struct loop_task flush; /* at the turn's end */

    /* Receiving. */
    struct coroutine *receiver;
    bool receiver_waits; /* for requests to end */
    struct nbd_arena *arena;
    size_t at, end; /* what is in the arena and not yet parsed */
    bool bulk;      /* big writes are coming: receive headers alone, and payloads where they belong */

    unsigned straight_rest, straight_pause; /* long reads that are not tried so; it was in vain of late (request.c) */
    unsigned in_flight;                     /* requests whose reply was not sent yet */
    size_t in_flight_bytes;
    bool abandoned; /* the client went without a word */
    struct nbd_request *free_requests;

    struct nbd_sender sender;
};

/* Serves until the client leaves or the connection breaks, and every request has ended. The connection stays open. */
void coroutine_fn nbd_session_run(const struct nbd_session_config *config);
/* The reply was sent (or there is nobody to send it to): for reply.c. */
void nbd_request_release(struct nbd_request *request);

/* request.c: a coroutine's entry; does what the request asks and adds its reply. The argument is the request. */
void nbd_request_run(void *argument);
/* The protocol's number for a negative errno. */
uint32_t nbd_error_from_errno(int error);

#endif

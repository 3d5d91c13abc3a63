/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Making a connection to an NBD server: connecting (loop/connection.h), TLS if asked for (nbd_tls.c), libnbd's
 * handshake, and what the server says of its export, checked.
 *
 * 1. Nothing here blocks: names are resolved by the loop layer on its workers, and libnbd only ever sees a connected
 *    socket and is told when that is ready.
 * 2. What comes out is sane: a size that fits, block sizes that are powers of two. A server that says anything else is
 *    refused, not corrected.
 *
 * Home only: one attempt is one coroutine, and is cancelled from the same loop. The protocol is
 * https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md.
 */
#include "base/size.h"
#include "driver/protocol/nbd/nbd_client.h"
#include "loop/descriptor.h"
#include <errno.h>
#include <glib.h>
#include <inttypes.h>

#define MINIMUM_LIMIT (64 * KiB) /* the protocol's, of block sizes */
#define MAXIMUM_USED (32 * MiB)  /* what every server takes that does not say otherwise */

/* --- handles --- */

unsigned nbd_handle_directions(struct nbd_handle *handle)
{
    unsigned direction = nbd_aio_get_direction(handle);
    unsigned wanted = (direction & LIBNBD_AIO_DIRECTION_READ ? DESCRIPTOR_READABLE : 0U) |
                      (direction & LIBNBD_AIO_DIRECTION_WRITE ? DESCRIPTOR_WRITABLE : 0U);
    return wanted ? wanted : DESCRIPTOR_READABLE;
}

int nbd_handle_notify(struct nbd_handle *handle, unsigned ready)
{
    unsigned direction = nbd_aio_get_direction(handle);
    if ((direction & LIBNBD_AIO_DIRECTION_READ) && (ready & DESCRIPTOR_READABLE)) {
        return nbd_aio_notify_read(handle);
    }
    if ((direction & LIBNBD_AIO_DIRECTION_WRITE) && (ready & DESCRIPTOR_WRITABLE)) {
        return nbd_aio_notify_write(handle);
    }
    return 0;
}

bool nbd_handle_is_lost(struct nbd_handle *handle)
{
    return nbd_aio_is_dead(handle) > 0 || nbd_aio_is_closed(handle) > 0;
}

/* --- what the server says --- */

static int facts_of_size(struct nbd_handle *handle, struct nbd_facts *facts, struct error **err)
{
    int64_t size = nbd_get_size(handle);
    int64_t minimum = nbd_get_block_size(handle, LIBNBD_SIZE_MINIMUM);
    int64_t maximum = nbd_get_block_size(handle, LIBNBD_SIZE_MAXIMUM);
    if (size < 0) {
        return error_set(err, -EFBIG, "The server's export has an impossible size");
    }
    minimum = minimum > 0 ? minimum : 1;
    maximum = maximum > 0 ? (int64_t)min_u64((uint64_t)maximum, MAXIMUM_USED) : (int64_t)MAXIMUM_USED;
    if (minimum > (int64_t)MINIMUM_LIMIT || !is_power_of_two((uint64_t)minimum) || maximum < minimum) {
        return error_set(err, -EPROTO, "The server gives impossible block sizes (%" PRId64 " to %" PRId64 " bytes)",
                         minimum, maximum);
    }
    if (!is_aligned((uint64_t)size, (uint64_t)minimum)) {
        return error_set(err, -EPROTO,
                         "The server's export has %" PRId64 " bytes, which is no multiple of its block size %" PRId64,
                         size, minimum);
    }
    facts->size = (uint64_t)size;
    facts->minimum = (uint32_t)minimum;
    facts->maximum = (uint32_t)align_down((uint64_t)maximum, (uint64_t)minimum);
    return 0;
}

static int facts_of(const struct nbd_server *server, struct nbd_handle *handle, struct nbd_facts *facts,
                    struct error **err)
{
    *facts = (struct nbd_facts){.read_only = nbd_is_read_only(handle) > 0,
                                .flush = nbd_can_flush(handle) > 0,
                                .fua = nbd_can_fua(handle) > 0,
                                .trim = nbd_can_trim(handle) > 0,
                                .zero = nbd_can_zero(handle) > 0,
                                .fast_zero = nbd_can_fast_zero(handle) > 0,
                                .multi = nbd_can_multi_conn(handle) > 0,
                                .context = nbd_can_meta_context(handle, server->context) > 0};
    if (server->context_is_must && !facts->context) {
        int r = error_set(err, -EINVAL, "The server has no metadata context '%s' for export '%s'", server->context,
                          server->export);
        error_hint(err, "x-dirty-bitmap names one of those that 'nbdinfo --list' shows");
        return r;
    }
    return facts_of_size(handle, facts, err);
}

/* --- the attempt --- */

void nbd_attempt_cancel(struct nbd_attempt *attempt)
{
    attempt->cancelled = true;
    connecting_cancel(&attempt->connecting);
    if (attempt->connection) {
        connection_shutdown(attempt->connection);
    }
    if (attempt->wait) {
        descriptor_wait_wake(attempt->wait);
    }
}

int nbd_library_error(struct error **err)
{
    int code = nbd_get_errno();
    const char *text = nbd_get_error();
    /* "nbd_aio_notify_read: ..." is of no use to anybody here. */
    const char *colon = text && g_str_has_prefix(text, "nbd_") ? strstr(text, ": ") : NULL;
    return error_set(err, code > 0 ? -code : -EPROTO, "%s", colon ? colon + 2 : text ? text : "unknown error");
}

static int handle_prepare(const struct nbd_server *server, struct nbd_handle *handle)
{
    return nbd_set_export_name(handle, server->export) < 0 || nbd_add_meta_context(handle, server->context) < 0 ? -1
                                                                                                                : 0;
}

/* Until the handle takes commands. */
static int coroutine_fn shake_hands(struct nbd_attempt *attempt, struct nbd_handle *handle, struct error **err)
{
    int r = descriptor_wait_create(nbd_aio_get_fd(handle), &attempt->wait);
    if (r < 0) {
        return error_set_errno(err, r, "Cannot wait for a socket");
    }
    while (r == 0 && nbd_aio_is_ready(handle) <= 0) {
        int ready = attempt->cancelled ? 0 : descriptor_wait_ready(attempt->wait, nbd_handle_directions(handle));
        if (attempt->cancelled) {
            r = error_set(err, -ECANCELED, "The server did not answer");
        } else if (ready < 0) {
            r = error_set_errno(err, ready, "Cannot wait for a socket");
        } else if (nbd_handle_notify(handle, (unsigned)ready) < 0) {
            r = nbd_library_error(err);
        } else if (nbd_handle_is_lost(handle)) {
            r = error_set(err, -ECONNRESET, "The server ended the connection");
        }
    }
    descriptor_wait_destroy(attempt->wait);
    attempt->wait = NULL;
    return r;
}

int coroutine_fn nbd_dial_socket(const struct nbd_server *server, struct nbd_attempt *attempt, struct error **err)
{
    struct connection *connection;
    int fd, r = connection_open_cancellable(&server->address, &attempt->connecting, &connection, err);
    if (r < 0) {
        return r;
    }
    if (server->credentials) {
        attempt->connection = connection;
        r = nbd_tls_open(server, connection, &fd, err);
        attempt->connection = NULL;
        return r < 0 ? r : fd;
    }
    fd = connection_take_descriptor(connection);
    if (fd < 0) {
        connection_close(connection);
        return error_set_errno(err, fd, "Cannot use the connection to the server");
    }
    return fd;
}

int coroutine_fn nbd_dial(const struct nbd_server *server, struct nbd_attempt *attempt, struct nbd_handle **ret,
                          struct nbd_facts *ret_facts, struct error **err)
{
    int fd = nbd_dial_socket(server, attempt, err);
    if (fd < 0) {
        return fd;
    }
    struct nbd_handle *handle = nbd_create();
    int r = 0;
    if (!handle || handle_prepare(server, handle) < 0 || nbd_aio_connect_socket(handle, fd) < 0) {
        r = nbd_library_error(err);
        descriptor_close(fd);
    }
    if (r == 0) {
        r = shake_hands(attempt, handle, err);
    }
    if (r == 0) {
        r = facts_of(server, handle, ret_facts, err);
    }
    if (r < 0) {
        nbd_close(handle);
        return r;
    }
    *ret = handle;
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What each request of a client does: the table `commands` has one row per command, with what is checked before it
 * runs. Called as a coroutine by the receiver (session.c); ends by adding the reply (reply.c). Invariants:
 * 1. a request that fails its checks touches no backend;
 * 2. after the reply was added the request may be gone: nothing follows it;
 * 3. nothing here is allocated but payload memory, from the pool, and its size was checked against NBD_PAYLOAD_MAX or
 *    is a constant.
 */
#include "block/request.h"
#include "base/size.h"
#include "block/user.h"
#include "export/nbd/nbd_format.h"
#include "export/nbd/session.h"
#include <errno.h>
#include <glib.h>

/* Extents in one block status reply, of all contexts. */
#define STATUS_EXTENTS_MAX 2048
/* NBD_CMD_CACHE is a hint: what it reads ahead at most, and in which pieces. */
#define CACHE_MAX (64 * MiB)
#define CACHE_PIECE (1 * MiB)

struct command {
    const char *name;
    /* Does it and adds the reply. */
    void coroutine_fn (*run)(struct nbd_request *request);
    uint16_t flags;     /* command flags that are legal */
    bool writes;        /* refused on a read-only export */
    bool has_range;     /* offset and length mean something (else both must be 0) */
    int beyond_end;     /* the answer to a range that is not inside the export */
    uint32_t bytes_max; /* longest range, 0: no limit */
};

uint32_t nbd_error_from_errno(int error)
{
    switch (-error) {
    case 0:
        return NBD_SUCCESS;
    case EPERM:
    case EROFS:
    case EACCES:
        return NBD_EPERM;
    case ENOMEM:
        return NBD_ENOMEM;
    case EINVAL:
        return NBD_EINVAL;
    case ENOSPC:
    case EFBIG:
    case EDQUOT:
        return NBD_ENOSPC;
    case EOVERFLOW:
        return NBD_EOVERFLOW;
    case EOPNOTSUPP:
        return NBD_ENOTSUP;
    case ESHUTDOWN:
    case ENOMEDIUM:
    case ECANCELED:
        return NBD_ESHUTDOWN;
    default:
        return NBD_EIO;
    }
}

static unsigned request_write_flags(const struct nbd_request *request)
{
    bool fua = (request->flags & NBD_CMD_FLAG_FUA) || request->session->config.writethrough;

    return fua ? REQUEST_FUA : 0;
}

static void request_finish(struct nbd_request *request, int error)
{
    if (error < 0) {
        nbd_reply_error(request, error, NULL);
    } else {
        nbd_reply_done(request);
    }
}

static int request_take_memory(struct nbd_request *request, size_t bytes)
{
    request->memory = nbd_pool_take(request->session->config.pool, bytes, &request->room);
    return request->memory ? 0 : -ENOMEM;
}

static void request_drop_memory(struct nbd_request *request)
{
    if (request->memory) {
        nbd_pool_give(request->session->config.pool, request->memory, request->room);
        request->memory = NULL;
    }
    request->arena = nbd_arena_unref(request->arena);
}

static void coroutine_fn run_read(struct nbd_request *request)
{
    const struct nbd_session_config *config = &request->session->config;
    int r = request_take_memory(request, request->bytes);

    if (r == 0) {
        request->payload = (struct iovec){request->memory, request->bytes};
        r = backend_read(config->backend, request->offset, request->bytes, buffers_one(&request->payload), 0);
    }
    if (r < 0) {
        nbd_reply_error(request, r, NULL);
    } else if (config->structured) {
        nbd_reply_data(request, request->memory, !(request->flags & NBD_CMD_FLAG_DF));
    } else {
        nbd_reply_simple(request, 0, request->memory, request->bytes);
    }
}

static void coroutine_fn run_write(struct nbd_request *request)
{
    int r = backend_write(request->session->config.backend, request->offset, request->bytes,
                          buffers_one(&request->payload), request_write_flags(request));

    request_drop_memory(request);
    request_finish(request, r);
}

static void coroutine_fn run_flush(struct nbd_request *request)
{
    request_finish(request, backend_flush(request->session->config.backend));
}

static void coroutine_fn run_trim(struct nbd_request *request)
{
    struct backend *backend = request->session->config.backend;
    int r = backend_discard(backend, request->offset, request->bytes);

    if (r == 0 && request_write_flags(request)) {
        r = backend_flush(backend);
    }
    request_finish(request, r);
}

static void coroutine_fn run_cache(struct nbd_request *request)
{
    uint32_t bytes = (uint32_t)min_u64(request->bytes, CACHE_MAX);
    size_t piece = min_u64(bytes, CACHE_PIECE);
    int r = request_take_memory(request, piece);

    for (uint32_t done = 0; r == 0 && done < bytes; done += piece) {
        struct iovec iov = {request->memory, min_u64(piece, bytes - done)};

        r = backend_read(request->session->config.backend, request->offset + done, iov.iov_len, buffers_one(&iov), 0);
    }
    request_drop_memory(request);
    request_finish(request, r);
}

static void coroutine_fn run_write_zeroes(struct nbd_request *request)
{
    unsigned flags = request_write_flags(request);

    if (!(request->flags & NBD_CMD_FLAG_NO_HOLE)) {
        flags |= REQUEST_MAY_UNMAP;
    }
    if (request->flags & NBD_CMD_FLAG_FAST_ZERO) {
        flags |= REQUEST_NO_FALLBACK;
    }
    request_finish(request,
                   backend_write_zeroes(request->session->config.backend, request->offset, request->bytes, flags));
}

/* All chosen contexts, a chunk each; returns how many bytes, or a negative errno. */
static ssize_t coroutine_fn status_chunks(struct nbd_request *request, uint8_t *out, unsigned contexts, unsigned max)
{
    const struct nbd_session_config *config = &request->session->config;
    uint8_t *to = out;

    for (unsigned i = 0; i < config->contexts->count; i++) {
        if (nbd_choice_has(&config->choice, i)) {
            const struct nbd_context *context = &config->contexts->items[i];
            struct nbd_status_extent *extents = (void *)(to + sizeof(struct nbd_chunk_status));
            int r = nbd_context_status(context, config->backend, request->offset, request->bytes, extents, max);

            if (r < 0) {
                return r;
            }
            nbd_reply_status_chunk(request, to, context->id, (unsigned)r, --contexts == 0);
            to = (uint8_t *)(extents + r);
        }
    }
    return to - out;
}

static void coroutine_fn run_block_status(struct nbd_request *request)
{
    unsigned contexts = nbd_choice_count(&request->session->config.choice);
    ssize_t r;

    if (!contexts) {
        nbd_reply_error(request, -EINVAL, "no metadata context was negotiated");
        return;
    }
    if (!request->bytes) {
        nbd_reply_error(request, -EINVAL, "block status of no bytes");
        return;
    }
    unsigned max = request->flags & NBD_CMD_FLAG_REQ_ONE ? 1 : MAX(STATUS_EXTENTS_MAX / contexts, 16);
    r = request_take_memory(request,
                            contexts * (sizeof(struct nbd_chunk_status) + max * sizeof(struct nbd_status_extent)));
    if (r == 0) {
        r = status_chunks(request, request->memory, contexts, max);
    }
    if (r < 0) {
        nbd_reply_error(request, (int)r, NULL);
    } else {
        nbd_reply_status(request, request->memory, (size_t)r);
    }
}

#define FUA NBD_CMD_FLAG_FUA
static const struct command commands[NBD_CMD_COUNT] = {
    [NBD_CMD_READ] = {"read", run_read, FUA | NBD_CMD_FLAG_DF, .has_range = true, .beyond_end = -EINVAL,
                      .bytes_max = NBD_PAYLOAD_MAX},
    [NBD_CMD_WRITE] = {"write", run_write, FUA, .writes = true, .has_range = true, .beyond_end = -ENOSPC,
                       .bytes_max = NBD_PAYLOAD_MAX},
    [NBD_CMD_FLUSH] = {"flush", run_flush, FUA},
    [NBD_CMD_TRIM] = {"trim", run_trim, FUA, .writes = true, .has_range = true, .beyond_end = -EINVAL},
    [NBD_CMD_CACHE] = {"cache", run_cache, FUA, .has_range = true, .beyond_end = -EINVAL},
    [NBD_CMD_WRITE_ZEROES] = {"write-zeroes", run_write_zeroes, FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
                              .writes = true, .has_range = true, .beyond_end = -ENOSPC},
    [NBD_CMD_BLOCK_STATUS] = {"block-status", run_block_status, FUA | NBD_CMD_FLAG_REQ_ONE, .has_range = true,
                              .beyond_end = -EINVAL},
};
#undef FUA

/* 0, or a negative errno and (maybe) a message. */
static int request_check(const struct nbd_request *request, const char **ret_message)
{
    const struct nbd_session_config *config = &request->session->config;
    const struct command *command = request->type < NBD_CMD_COUNT ? &commands[request->type] : NULL;
    uint16_t legal;

    if (!command || !command->run) {
        *ret_message = "unknown command";
        return -EINVAL;
    }
    legal = config->structured ? command->flags : command->flags & (uint16_t)~NBD_CMD_FLAG_DF;
    if (request->flags & ~legal) {
        *ret_message = "a flag that is unknown or not for this command";
        return -EINVAL;
    }
    if (command->writes && config->read_only) {
        *ret_message = "the export is read-only";
        return -EPERM;
    }
    if (!command->has_range) {
        *ret_message = "offset and length must be 0";
        return request->offset || request->bytes ? -EINVAL : 0;
    }
    if (command->bytes_max && request->bytes > command->bytes_max) {
        *ret_message = "longer than the maximum payload of 32 MiB";
        return -EINVAL;
    }
    uint64_t size = atomic_load_explicit(config->size, memory_order_acquire);
    if (request->offset > size || request->bytes > size - request->offset) {
        *ret_message = "beyond the end of the export";
        return command->beyond_end;
    }
    return 0;
}

void nbd_request_run(void *argument)
{
    struct nbd_request *request = argument;
    const char *message = NULL;
    int r = request->error ? request->error : request_check(request, &message);

    if (r < 0) {
        request_drop_memory(request);
        nbd_reply_error(request, r, message);
    } else if (!request->bytes && commands[request->type].has_range && request->type != NBD_CMD_BLOCK_STATUS) {
        nbd_reply_done(request);
    } else {
        commands[request->type].run(request);
    }
}

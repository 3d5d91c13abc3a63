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
#include "export/range.h"
#include "loop/file.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

/* Extents in one block status reply: of a context, and of all of them. */
#define CONTEXT_EXTENTS_MAX 2048
#define STATUS_EXTENTS_MAX 16384
/* NBD_CMD_CACHE is a hint: what it reads ahead at most, and in which pieces. */
#define CACHE_MAX (64 * MiB)
#define CACHE_PIECE (1 * MiB)
/* Reads of so many bytes may be sent straight from where the image has them: of fewer, several go with one call. */
#define STRAIGHT_LEAST (64 * KiB)
#define STRAIGHT_MOST (1 * MiB)
#define STRAIGHT_PAUSE_MAX 255

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

/* A read that learns where the image has the data, and is lent them for a moment. */
struct lent_read {
    struct buffers_elsewhere view;
    struct nbd_request *request;
    bool in_vain; /* such reads gain nothing here */
    bool sent;    /* of the reply, all but its end */
};

/* Sends what can be sent without waiting; the rest is read. Negative with lent->sent: what has gone is not right. */
static int coroutine_fn lent_send(struct lent_read *lent, struct file *file, uint64_t offset)
{
    struct nbd_request *request = lent->request;
    const void *data = file_peek(file, offset, request->bytes);

    if (!data || nbd_reply_has_hole(request, data) || !file_is_sound(file, data, request->bytes)) {
        return -ENOTSUP;
    }
    ssize_t sent = nbd_reply_straight(request, data);
    if (sent < 0) {
        return (int)sent;
    }
    lent->sent = true;
    struct iovec rest = {(char *)request->memory + sent, request->bytes - (size_t)sent};
    int r = file_read(file, offset + (size_t)sent, rest.iov_len, buffers_one(&rest));

    return r < 0 ? r : file_is_sound(file, data, request->bytes) ? 0 : -EIO;
}

static int coroutine_fn lent_found(struct buffers_elsewhere *view, struct file *file, uint64_t offset, size_t at,
                                   uint64_t bytes)
{
    struct lent_read *lent = container_of(view, struct lent_read, view);
    struct iovec piece = {(char *)lent->request->memory + at, bytes};
    int r = bytes == lent->request->bytes ? lent_send(lent, file, offset) : -ENOTSUP;

    if (r == 0 || lent->sent) {
        return r;
    }
    lent->in_vain |= r == -ENOTSUP;
    return file_read(file, offset, bytes, buffers_one(&piece));
}

/* The more often it was in vain, the more seldom. */
static bool lent_may(const struct nbd_request *request)
{
    struct nbd_session *session = request->session;

    if (request->bytes < STRAIGHT_LEAST || request->bytes > STRAIGHT_MOST) {
        return false;
    }
    if (session->straight_rest) {
        session->straight_rest--;
        return false;
    }
    return true;
}

/* As backend_read(), or true in *ret_sent. What is not in a file is read a second time: -ENOTSUP. */
static int coroutine_fn read_lent(struct nbd_request *request, bool *ret_sent)
{
    struct nbd_session *session = request->session;
    struct lent_read lent = {.view = {.found = lent_found}, .request = request};
    int r = backend_read(session->config.backend, request->offset, request->bytes, buffers_of_elsewhere(&lent.view), 0);

    *ret_sent = lent.sent;
    if (lent.sent) {
        session->straight_pause = 0;
        return r;
    }
    if (r == 0 && lent.view.missed) {
        r = -ENOTSUP;
    }
    if (lent.in_vain || r == -ENOTSUP) {
        session->straight_pause = MIN(2 * session->straight_pause + 1, STRAIGHT_PAUSE_MAX);
        session->straight_rest = session->straight_pause;
    }
    return r;
}

static void coroutine_fn run_read(struct nbd_request *request)
{
    const struct nbd_session_config *config = &request->session->config;
    bool sent = false;
    int r = request_take_memory(request, request->bytes);

    if (r == 0) {
        request->payload = (struct iovec){request->memory, request->bytes};
        r = lent_may(request) ? read_lent(request, &sent) : -ENOTSUP;
        if (r == -ENOTSUP && !sent) {
            r = backend_read(config->backend, request->offset, request->bytes, buffers_one(&request->payload), 0);
        }
    }
    if (r == 0) {
        nbd_count(&config->counters->read_bytes, request->bytes);
    }
    if (sent) {
        nbd_reply_straight_end(request, request->memory, r);
    } else if (r < 0) {
        nbd_reply_error(request, r, NULL);
    } else if (config->style >= NBD_STRUCTURED) {
        nbd_reply_data(request, request->memory, !(request->flags & NBD_CMD_FLAG_DF));
    } else {
        nbd_reply_simple(request, 0, request->memory, request->bytes);
    }
}

static void coroutine_fn run_write(struct nbd_request *request)
{
    int r = backend_write(request->session->config.backend, request->offset, request->bytes,
                          buffers_one(&request->payload), request_write_flags(request));

    if (r == 0) {
        nbd_count(&request->session->config.counters->written_bytes, request->bytes);
    }
    request_drop_memory(request);
    request_finish(request, r);
}

static void coroutine_fn run_flush(struct nbd_request *request)
{
    request_finish(request, backend_flush(request->session->config.backend));
}

static bool session_goes_on(const void *argument)
{
    const struct nbd_session *session = argument;

    return !session->abandoned && !atomic_load(session->config.ending);
}

static struct range_work range_of(const struct nbd_request *request, unsigned flags)
{
    return (struct range_work){.backend = request->session->config.backend,
                               .offset = request->offset,
                               .bytes = request->bytes,
                               .flags = flags,
                               .goes_on = session_goes_on,
                               .argument = request->session};
}

static void coroutine_fn run_trim(struct nbd_request *request)
{
    struct range_work work = range_of(request, request_write_flags(request));

    request_finish(request, range_discard(&work));
}

static void coroutine_fn run_cache(struct nbd_request *request)
{
    uint64_t bytes = min_u64(request->bytes, CACHE_MAX);
    size_t piece = min_u64(bytes, CACHE_PIECE);
    int r = request_take_memory(request, piece);

    for (uint64_t done = 0; r == 0 && done < bytes; done += piece) {
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
    struct range_work work = range_of(request, flags);

    request_finish(request, range_write_zeroes(&work));
}

/* Which contexts the request asks for: all that were negotiated or, with a payload, those that it names, and its range.
 * 0, or a negative errno with a message. */
static int take_status_payload(struct nbd_request *request, struct nbd_choice *ret, const char **ret_message)
{
    const struct nbd_session_config *config = &request->session->config;
    const uint8_t *at = request->payload.iov_base;
    const uint8_t *end = at + request->payload.iov_len;
    struct nbd_status_payload head;

    *ret = config->choice;
    if (!at) {
        return 0;
    }
    *ret = (struct nbd_choice){0};
    *ret_message = "a payload that does not name contexts, each once, of those that were negotiated";
    if ((size_t)(end - at) <= sizeof(head) || (size_t)(end - at) % sizeof(uint32_t)) {
        return -EINVAL;
    }
    memcpy(&head, at, sizeof(head));
    request->bytes = be64toh(head.bytes);
    for (at += sizeof(head); at < end; at += sizeof(uint32_t)) {
        uint32_t id;

        memcpy(&id, at, sizeof(id));
        if (!nbd_contexts_choose_id(config->contexts, &config->choice, be32toh(id), ret)) {
            return -EINVAL;
        }
    }
    return 0;
}

/* All chosen contexts, a chunk each; returns how many bytes, or a negative errno. */
static ssize_t coroutine_fn status_chunks(struct nbd_request *request, const struct nbd_choice *choice, uint8_t *out,
                                          unsigned max)
{
    const struct nbd_session_config *config = &request->session->config;
    bool extended = config->style >= NBD_EXTENDED;
    size_t extent_bytes = extended ? sizeof(struct nbd_extended_status_extent) : sizeof(struct nbd_status_extent);
    unsigned left = nbd_choice_count(choice);
    uint8_t *to = out;

    for (unsigned i = 0; left; i++) {
        if (nbd_choice_has(choice, i)) {
            const struct nbd_context *context = &config->contexts->items[i];
            uint8_t *extents = to + nbd_reply_status_head(request);
            int r =
                nbd_context_status(context, config->backend, request->offset, request->bytes, extended, extents, max);

            if (r < 0) {
                return r;
            }
            nbd_reply_status_chunk(request, to, context->id, (unsigned)r, --left == 0);
            to = extents + (unsigned)r * extent_bytes;
        }
    }
    return to - out;
}

static int check_range(const struct nbd_request *request, int beyond_end, const char **ret_message)
{
    uint64_t size = atomic_load_explicit(request->session->config.size, memory_order_acquire);

    if (request->offset > size || request->bytes > size - request->offset) {
        *ret_message = "beyond the end of the export";
        return beyond_end;
    }
    return 0;
}

static void coroutine_fn run_block_status(struct nbd_request *request)
{
    struct nbd_choice choice;
    const char *message = NULL;
    int checked = take_status_payload(request, &choice, &message);
    unsigned contexts = nbd_choice_count(&choice);

    if (checked == 0) {
        checked = check_range(request, -EINVAL, &message);
    }
    if (checked == 0 && (!contexts || !request->bytes)) {
        checked = -EINVAL;
        message = contexts ? "block status of no bytes" : "no metadata context was negotiated";
    }
    request_drop_memory(request);
    if (checked < 0) {
        nbd_reply_error(request, checked, message);
        return;
    }
    unsigned max = request->flags & NBD_CMD_FLAG_REQ_ONE ? 1 : MIN(STATUS_EXTENTS_MAX / contexts, CONTEXT_EXTENTS_MAX);
    ssize_t r = request_take_memory(
        request, contexts * (nbd_reply_status_head(request) + max * sizeof(struct nbd_extended_status_extent)));

    if (r == 0) {
        r = status_chunks(request, &choice, request->memory, max);
    }
    if (r < 0) {
        nbd_reply_error(request, (int)r, NULL);
    } else {
        nbd_reply_status(request, request->memory, (size_t)r);
    }
}

#define FUA NBD_CMD_FLAG_FUA
#define PAYLOAD NBD_CMD_FLAG_PAYLOAD_LEN
static const struct command commands[NBD_CMD_COUNT] = {
    [NBD_CMD_READ] = {"read", run_read, FUA | NBD_CMD_FLAG_DF, .has_range = true, .beyond_end = -EINVAL,
                      .bytes_max = NBD_PAYLOAD_MAX},
    [NBD_CMD_WRITE] = {"write", run_write, FUA | PAYLOAD, .writes = true, .has_range = true, .beyond_end = -ENOSPC,
                       .bytes_max = NBD_PAYLOAD_MAX},
    [NBD_CMD_FLUSH] = {"flush", run_flush, FUA},
    [NBD_CMD_TRIM] = {"trim", run_trim, FUA, .writes = true, .has_range = true, .beyond_end = -EINVAL},
    [NBD_CMD_CACHE] = {"cache", run_cache, FUA, .has_range = true, .beyond_end = -EINVAL},
    [NBD_CMD_WRITE_ZEROES] = {"write-zeroes", run_write_zeroes, FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
                              .writes = true, .has_range = true, .beyond_end = -ENOSPC},
    [NBD_CMD_BLOCK_STATUS] = {"block-status", run_block_status, FUA | PAYLOAD | NBD_CMD_FLAG_REQ_ONE, .has_range = true,
                              .beyond_end = -EINVAL},
};

/* Flags that mean nothing to a client that has not negotiated them. */
static const uint16_t illegal_flags[] = {
    [NBD_SIMPLE] = NBD_CMD_FLAG_DF | PAYLOAD,
    [NBD_STRUCTURED] = PAYLOAD,
    [NBD_EXTENDED] = 0,
};
#undef PAYLOAD
#undef FUA

/* 0, or a negative errno and (maybe) a message. */
static int request_check(const struct nbd_request *request, const char **ret_message)
{
    const struct nbd_session_config *config = &request->session->config;
    const struct command *command = request->type < NBD_CMD_COUNT ? &commands[request->type] : NULL;

    if (!command || !command->run) {
        *ret_message = "unknown command";
        return -EINVAL;
    }
    if (request->flags & (uint16_t)(~command->flags | illegal_flags[config->style])) {
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
    return check_range(request, command->beyond_end, ret_message);
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

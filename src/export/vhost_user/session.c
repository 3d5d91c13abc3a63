/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a front end says, one message after the other: the table `messages` has one row for each. Invariants:
 * 1. a message is received whole and its sizes and indices are checked before its handler changes anything;
 * 2. settings of a queue are changed while it does not run. Whatever takes a queue's memory or its settings away pauses
 *    it first, which waits for its requests; after each message, the queues that have all they need run again;
 * 3. a message that fails is answered so if the front end wants answers, and ends the session otherwise;
 * 4. descriptors that a handler has not taken over are closed;
 * 5. at its end every queue has been paused before memory is unmapped.
 * Facts: the vhost-user protocol's document. Not offered: migration (dirty logs, postcopy, device state), IOMMU,
 * notifications in messages, mapped notifiers.
 */
#include "export/vhost_user/session.h"
#include "export/vhost_user/config.h"
#include "loop/connection.h"
#include "loop/event.h"
#include "loop/shared_memory.h"
#include <errno.h>
#include <glib.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define STATUS_NEEDS_RESET VIRTIO_CONFIG_S_NEEDS_RESET

struct message {
    struct vhost_header header;
    union vhost_payload payload; /* what came of it; the rest is zeroes */
    int fds[VHOST_TABLE_REGIONS_MAX];
    unsigned fd_count;
    int reply_fd;         /* to be sent along, then closed; or -1 */
    uint32_t reply_bytes; /* of the payload, which is the reply */
    struct error *err;
};

struct message_kind {
    const char *name;
    /* 0; negative errno: it failed. */
    int coroutine_fn (*handle)(struct vhost_session *session, struct message *message);
    uint32_t bytes;   /* that it has at least */
    bool replies;     /* the handler sets reply_bytes */
    bool has_index;   /* the payload begins with the index of a queue */
    uint64_t feature; /* protocol feature bit that it needs, or 0 */
};

static bool has_protocol_feature(const struct vhost_session *session, unsigned bit)
{
    return session->protocol_features >> bit & 1;
}

static int reply_number(struct message *message, uint64_t number)
{
    message->payload.number = number;
    message->reply_bytes = sizeof(number);
    return 0;
}

static int take_fd(struct message *message)
{
    int fd = message->fds[0];

    g_assert(message->fd_count == 1);
    message->fd_count = 0;
    return fd;
}

/* --- the queues --- */

static void coroutine_fn pause_all(struct vhost_session *session)
{
    for (unsigned i = 0; i < session->config.queues; i++) {
        vhost_queue_pause(&session->queues[i]);
    }
}

static bool feature(const struct vhost_session *session, unsigned bit)
{
    return session->features >> bit & 1;
}

/* Starts what has all that it needs and is not running. */
static void start_all(struct vhost_session *session)
{
    for (unsigned i = 0; i < session->config.queues; i++) {
        struct vhost_queue *queue = &session->queues[i];
        bool enabled = queue->enabled || !feature(session, VHOST_F_PROTOCOL_FEATURES);
        bool tracked = session->inflight && i < session->inflight_queues;

        if (queue->running || !enabled || !queue->kick || !queue->has_addresses || !queue->config.size) {
            continue;
        }
        queue->config.memory = &session->memory;
        queue->config.packed = feature(session, VIRTIO_F_RING_PACKED);
        queue->config.event_index = feature(session, VIRTIO_RING_F_EVENT_IDX);
        queue->config.indirect = feature(session, VIRTIO_RING_F_INDIRECT_DESC);
        queue->config.inflight = tracked ? session->inflight->bytes + i * session->inflight_stride : NULL;
        if (tracked && queue->config.size != session->inflight_queue_size) {
            queue->config.inflight = NULL; /* it was made for another queue */
        }
        vhost_queue_start(queue);
    }
}

static void coroutine_fn stop_queue(struct vhost_queue *queue)
{
    vhost_queue_pause(queue);
    event_close(queue->kick);
    queue->kick = NULL;
}

/* --- features and status --- */

static int coroutine_fn on_get_features(struct vhost_session *session, struct message *message)
{
    return reply_number(message, vhost_features(session->config.writable));
}

static int coroutine_fn on_set_features(struct vhost_session *session, struct message *message)
{
    uint64_t wanted = message->payload.number;

    if (wanted & ~vhost_features(session->config.writable)) {
        return error_set(&message->err, -EINVAL, "features that were not offered");
    }
    if (wanted != session->features) {
        pause_all(session);
        session->features = wanted;
        /* Without the feature a driver cannot flush: then everything is flushed. */
        vhost_set_write_back(session, feature(session, VIRTIO_BLK_F_FLUSH));
    }
    return 0;
}

static int coroutine_fn on_get_protocol_features(struct vhost_session *session, struct message *message)
{
    return reply_number(message, VHOST_PROTOCOL_FEATURES);
}

static int coroutine_fn on_set_protocol_features(struct vhost_session *session, struct message *message)
{
    if (message->payload.number & ~VHOST_PROTOCOL_FEATURES) {
        return error_set(&message->err, -EINVAL, "protocol features that were not offered");
    }
    session->protocol_features = message->payload.number;
    return 0;
}

static int coroutine_fn on_set_owner(struct vhost_session *session, struct message *message)
{
    return 0;
}

static int coroutine_fn on_reset_owner(struct vhost_session *session, struct message *message)
{
    pause_all(session);
    for (unsigned i = 0; i < session->config.queues; i++) {
        session->queues[i].enabled = false;
    }
    return 0;
}

static void drop_inflight(struct vhost_session *session)
{
    shared_memory_unmap(session->inflight);
    session->inflight = NULL;
    session->note = NULL;
}

static int coroutine_fn on_reset_device(struct vhost_session *session, struct message *message)
{
    for (unsigned i = 0; i < session->config.queues; i++) {
        struct vhost_queue *queue = &session->queues[i];

        stop_queue(queue);
        queue->config = (struct ring_config){0};
        queue->has_addresses = queue->enabled = false;
        atomic_store(&queue->broken, NULL);
    }
    drop_inflight(session);
    session->features = 0;
    session->status = 0;
    vhost_set_write_back(session, true);
    return 0;
}

static int coroutine_fn on_set_status(struct vhost_session *session, struct message *message)
{
    if (message->payload.number > UINT8_MAX) {
        return error_set(&message->err, -EINVAL, "a status that does not exist");
    }
    session->status = (uint8_t)message->payload.number;
    if (!session->status) {
        for (unsigned i = 0; i < session->config.queues; i++) {
            stop_queue(&session->queues[i]);
            atomic_store(&session->queues[i].broken, NULL);
        }
    }
    return 0;
}

static int coroutine_fn on_get_status(struct vhost_session *session, struct message *message)
{
    uint8_t status = session->status;

    for (unsigned i = 0; i < session->config.queues; i++) {
        status |= atomic_load(&session->queues[i].broken) ? STATUS_NEEDS_RESET : 0;
    }
    return reply_number(message, status);
}

static int coroutine_fn on_get_queue_num(struct vhost_session *session, struct message *message)
{
    return reply_number(message, session->config.queues);
}

/* --- configuration space --- */

static int coroutine_fn on_get_config(struct vhost_session *session, struct message *message)
{
    struct vhost_config_message *config = &message->payload.config;
    uint8_t space[VHOST_CONFIG_BYTES_MAX];

    if (config->bytes > sizeof(space) || config->offset > sizeof(space) - config->bytes ||
        message->header.bytes < VHOST_CONFIG_HEAD + config->bytes) {
        config->bytes = 0; /* that is how an error is told */
    } else {
        vhost_config_read(session, space);
        memcpy(config->payload, space + config->offset, config->bytes);
    }
    message->reply_bytes = VHOST_CONFIG_HEAD + config->bytes;
    return 0;
}

static int coroutine_fn on_set_config(struct vhost_session *session, struct message *message)
{
    const struct vhost_config_message *config = &message->payload.config;

    if (config->bytes > VHOST_CONFIG_BYTES_MAX || message->header.bytes != VHOST_CONFIG_HEAD + config->bytes ||
        vhost_config_write(session, config) < 0) {
        return error_set(&message->err, -EINVAL, "a change of the configuration that is not the driver's to make");
    }
    return 0;
}

/* --- memory --- */

static int coroutine_fn on_set_mem_table(struct vhost_session *session, struct message *message)
{
    const struct vhost_memory_table *table = &message->payload.table;
    struct vhost_memory fresh = {0};
    int r = 0;

    if (table->count > VHOST_TABLE_REGIONS_MAX || table->count != message->fd_count ||
        message->header.bytes <
            offsetof(struct vhost_memory_table, regions) + table->count * sizeof(struct vhost_region)) {
        return error_set(&message->err, -EINVAL, "a memory table and descriptors that do not fit each other");
    }
    for (unsigned i = 0; i < table->count && r == 0; i++) {
        r = vhost_memory_add(&fresh, &table->regions[i], message->fds[i], &message->err);
    }
    if (r < 0) {
        vhost_memory_clear(&fresh);
        return r;
    }
    pause_all(session);
    vhost_memory_clear(&session->memory);
    session->memory = fresh;
    return 0;
}

static int coroutine_fn on_get_max_mem_slots(struct vhost_session *session, struct message *message)
{
    return reply_number(message, VHOST_REGIONS_MAX);
}

static int coroutine_fn on_add_mem_reg(struct vhost_session *session, struct message *message)
{
    if (message->fd_count != 1) {
        return error_set(&message->err, -EINVAL, "a region of memory without its descriptor");
    }
    pause_all(session);
    return vhost_memory_add(&session->memory, &message->payload.region.region, message->fds[0], &message->err);
}

static int coroutine_fn on_rem_mem_reg(struct vhost_session *session, struct message *message)
{
    pause_all(session);
    return vhost_memory_remove(&session->memory, &message->payload.region.region, &message->err);
}

/* --- rings --- */

static int coroutine_fn on_set_vring_num(struct vhost_session *session, struct message *message)
{
    struct vhost_queue *queue = &session->queues[message->payload.vring.index];
    uint32_t size = message->payload.vring.number;

    if (!size || size > RING_SIZE_MAX) {
        return error_set(&message->err, -EINVAL, "a queue of %u entries (at most %d)", size, RING_SIZE_MAX);
    }
    vhost_queue_pause(queue);
    queue->config.size = size;
    return 0;
}

static int coroutine_fn on_set_vring_addr(struct vhost_session *session, struct message *message)
{
    const struct vhost_vring_addresses *addresses = &message->payload.addresses;
    struct vhost_queue *queue = &session->queues[addresses->index];

    if (addresses->flags) {
        return error_set(&message->err, -ENOTSUP, "logs of what is written, which were not offered");
    }
    vhost_queue_pause(queue);
    queue->config.descriptors = addresses->descriptors;
    queue->config.available = addresses->available;
    queue->config.used = addresses->used;
    queue->has_addresses = true;
    return 0;
}

static int coroutine_fn on_set_vring_base(struct vhost_session *session, struct message *message)
{
    struct vhost_queue *queue = &session->queues[message->payload.vring.index];

    vhost_queue_pause(queue);
    queue->config.base = message->payload.vring.number;
    return 0;
}

static int coroutine_fn on_get_vring_base(struct vhost_session *session, struct message *message)
{
    struct vhost_queue *queue = &session->queues[message->payload.vring.index];

    stop_queue(queue);
    message->payload.vring.number = queue->config.base;
    message->reply_bytes = sizeof(message->payload.vring);
    return 0;
}

static int coroutine_fn on_set_vring_enable(struct vhost_session *session, struct message *message)
{
    struct vhost_queue *queue = &session->queues[message->payload.vring.index];

    if (message->payload.vring.number > 1) {
        return error_set(&message->err, -EINVAL, "neither on nor off");
    }
    queue->enabled = message->payload.vring.number;
    if (!queue->enabled && feature(session, VHOST_F_PROTOCOL_FEATURES)) {
        vhost_queue_pause(queue);
    }
    return 0;
}

/* The queue and the event (NULL: none, and polling is wanted) of a message about an event. */
static int vring_event(struct vhost_session *session, struct message *message, struct vhost_queue **ret,
                       struct event **ret_event)
{
    uint64_t number = message->payload.number;

    *ret = NULL;
    *ret_event = NULL;
    if ((number & VHOST_VRING_INDEX_MASK) >= session->config.queues ||
        number & ~(VHOST_VRING_INDEX_MASK | VHOST_VRING_NO_FD)) {
        return error_set(&message->err, -EINVAL, "there is no such queue");
    }
    *ret = &session->queues[number & VHOST_VRING_INDEX_MASK];
    if (number & VHOST_VRING_NO_FD) {
        return 0;
    }
    if (message->fd_count != 1) {
        return error_set(&message->err, -EINVAL, "an event without its descriptor");
    }
    int r = event_adopt(message->fds[0], ret_event, &message->err);
    if (r == 0) {
        take_fd(message);
    }
    return r;
}

static int coroutine_fn on_set_vring_kick(struct vhost_session *session, struct message *message)
{
    struct vhost_queue *queue;
    struct event *event;
    int r = vring_event(session, message, &queue, &event);

    if (r < 0) {
        return r;
    }
    if (!event) {
        return error_set(&message->err, -ENOTSUP, "a queue without kicks: rings are not polled");
    }
    stop_queue(queue);
    queue->kick = event;
    return 0;
}

static int coroutine_fn on_set_vring_call(struct vhost_session *session, struct message *message)
{
    struct vhost_queue *queue;
    struct event *event;
    int r = vring_event(session, message, &queue, &event);

    if (r == 0) {
        vhost_queue_set_call(queue, event);
    }
    return r;
}

static int coroutine_fn on_set_vring_err(struct vhost_session *session, struct message *message)
{
    struct vhost_queue *queue;
    struct event *event;
    int r = vring_event(session, message, &queue, &event);

    if (r == 0) {
        vhost_queue_set_error(queue, event);
    }
    return r;
}

/* --- what is in flight --- */

static int check_inflight(struct vhost_session *session, struct message *message)
{
    const struct vhost_inflight *wanted = &message->payload.inflight;

    if (!wanted->queues || wanted->queues > session->config.queues || !wanted->queue_size ||
        wanted->queue_size > RING_SIZE_MAX) {
        return error_set(&message->err, -EINVAL, "a record of %u queues of %u entries", wanted->queues,
                         wanted->queue_size);
    }
    return 0;
}

static void adopt_inflight(struct vhost_session *session, const struct vhost_inflight *what,
                           struct shared_memory *memory)
{
    drop_inflight(session);
    session->inflight = memory;
    session->inflight_queues = what->queues;
    session->inflight_queue_size = what->queue_size;
    session->inflight_stride = ring_inflight_bytes(what->queue_size);
    uint64_t regions = session->inflight_stride * what->queues;
    if (memory->size - regions < sizeof(*session->note)) {
        return; /* somebody else's */
    }
    struct inflight_note *note = (void *)(memory->bytes + regions);
    if (memcmp(note->magic, INFLIGHT_NOTE_MAGIC, sizeof(note->magic)) == 0) {
        vhost_set_write_back(session, !note->write_through);
    } else {
        memcpy(note->magic, INFLIGHT_NOTE_MAGIC, sizeof(note->magic));
        note->write_through = !atomic_load(&session->device.write_back);
    }
    session->note = note;
}

static int coroutine_fn on_get_inflight_fd(struct vhost_session *session, struct message *message)
{
    struct vhost_inflight *wanted = &message->payload.inflight;
    struct shared_memory *memory;
    int r = check_inflight(session, message);

    if (r < 0) {
        return r;
    }
    wanted->size = ring_inflight_bytes(wanted->queue_size) * wanted->queues + sizeof(struct inflight_note);
    wanted->offset = 0;
    r = shared_memory_create("vhost-user-blk-inflight", wanted->size, &memory, &message->reply_fd, &message->err);
    if (r == 0) {
        pause_all(session);
        adopt_inflight(session, wanted, memory);
        /* With or without padding: as it was asked. */
        message->reply_bytes = message->header.bytes < sizeof(*wanted) ? VHOST_INFLIGHT_BYTES : sizeof(*wanted);
    }
    return r;
}

static int coroutine_fn on_set_inflight_fd(struct vhost_session *session, struct message *message)
{
    const struct vhost_inflight *wanted = &message->payload.inflight;
    struct shared_memory *memory;
    int r = check_inflight(session, message);

    if (r < 0) {
        return r;
    }
    if (message->fd_count != 1 || wanted->offset % 64 ||
        wanted->size < ring_inflight_bytes(wanted->queue_size) * wanted->queues) {
        return error_set(&message->err, -EINVAL, "a record of what is in flight that is none of ours");
    }
    r = shared_memory_map(message->fds[0], wanted->offset, wanted->size, &memory, &message->err);
    if (r == 0) {
        pause_all(session);
        adopt_inflight(session, wanted, memory);
    }
    return r;
}

/* --- our own requests --- */

static void coroutine_fn close_channel(struct vhost_session *session)
{
    struct connection *channel = session->backend_channel;

    session->backend_channel = NULL; /* nobody begins to use it any more */
    if (channel) {
        connection_shutdown(channel);
        co_group_wait(&session->notifiers);
        connection_close(channel);
    }
}

static int coroutine_fn on_set_backend_req_fd(struct vhost_session *session, struct message *message)
{
    int type;
    socklen_t size = sizeof(type);

    if (message->fd_count != 1 || getsockopt(message->fds[0], SOL_SOCKET, SO_TYPE, &type, &size) < 0 ||
        type != SOCK_STREAM) {
        return error_set(&message->err, -EINVAL, "a channel without a socket");
    }
    close_channel(session);
    int fd = take_fd(message);
    session->backend_channel = connection_from_fds(fd, fd);
    return 0;
}

static void notify_run(void *argument)
{
    struct vhost_session *session = argument;
    struct connection *channel = session->backend_channel;
    int r = 0;

    while (session->resized && channel && r == 0) {
        struct vhost_header header = {.request = VHOST_BACKEND_CONFIG_CHANGE, .flags = VHOST_VERSION};
        struct iovec iov = {&header, sizeof(header)};

        session->resized = false;
        r = connection_send(channel, buffers_one(&iov), sizeof(header));
    }
    session->notifying = false;
    co_group_leave(&session->notifiers);
}

void vhost_session_resized(struct vhost_session *session)
{
    if (!session->backend_channel || !has_protocol_feature(session, VHOST_PROTOCOL_F_CONFIG)) {
        return;
    }
    session->resized = true;
    if (!session->notifying) {
        session->notifying = true;
        co_group_enter(&session->notifiers);
        loop_spawn(loop_self(), notify_run, session);
    }
}

/* --- messages --- */

#define NUMBER sizeof(uint64_t)
#define VRING sizeof(struct vhost_vring_number)
static const struct message_kind messages[VHOST_REQUEST_COUNT] = {
    [VHOST_GET_FEATURES] = {"GET_FEATURES", on_get_features, .replies = true},
    [VHOST_SET_FEATURES] = {"SET_FEATURES", on_set_features, NUMBER},
    [VHOST_SET_OWNER] = {"SET_OWNER", on_set_owner},
    [VHOST_RESET_OWNER] = {"RESET_OWNER", on_reset_owner},
    [VHOST_SET_MEM_TABLE] = {"SET_MEM_TABLE", on_set_mem_table, offsetof(struct vhost_memory_table, regions)},
    [VHOST_SET_VRING_NUM] = {"SET_VRING_NUM", on_set_vring_num, VRING, .has_index = true},
    [VHOST_SET_VRING_ADDR] = {"SET_VRING_ADDR", on_set_vring_addr, sizeof(struct vhost_vring_addresses),
                              .has_index = true},
    [VHOST_SET_VRING_BASE] = {"SET_VRING_BASE", on_set_vring_base, VRING, .has_index = true},
    [VHOST_GET_VRING_BASE] = {"GET_VRING_BASE", on_get_vring_base, VRING, .replies = true, .has_index = true},
    [VHOST_SET_VRING_KICK] = {"SET_VRING_KICK", on_set_vring_kick, NUMBER},
    [VHOST_SET_VRING_CALL] = {"SET_VRING_CALL", on_set_vring_call, NUMBER},
    [VHOST_SET_VRING_ERR] = {"SET_VRING_ERR", on_set_vring_err, NUMBER},
    [VHOST_GET_PROTOCOL_FEATURES] = {"GET_PROTOCOL_FEATURES", on_get_protocol_features, .replies = true},
    [VHOST_SET_PROTOCOL_FEATURES] = {"SET_PROTOCOL_FEATURES", on_set_protocol_features, NUMBER},
    [VHOST_GET_QUEUE_NUM] = {"GET_QUEUE_NUM", on_get_queue_num, .replies = true},
    [VHOST_SET_VRING_ENABLE] = {"SET_VRING_ENABLE", on_set_vring_enable, VRING, .has_index = true},
    [VHOST_SET_BACKEND_REQ_FD] = {"SET_BACKEND_REQ_FD", on_set_backend_req_fd,
                                  .feature = 1ULL << VHOST_PROTOCOL_F_BACKEND_REQ},
    [VHOST_GET_CONFIG] = {"GET_CONFIG", on_get_config, VHOST_CONFIG_HEAD, .replies = true,
                          .feature = 1ULL << VHOST_PROTOCOL_F_CONFIG},
    [VHOST_SET_CONFIG] = {"SET_CONFIG", on_set_config, VHOST_CONFIG_HEAD, .feature = 1ULL << VHOST_PROTOCOL_F_CONFIG},
    [VHOST_GET_INFLIGHT_FD] = {"GET_INFLIGHT_FD", on_get_inflight_fd, VHOST_INFLIGHT_BYTES, .replies = true,
                               .feature = 1ULL << VHOST_PROTOCOL_F_INFLIGHT_SHMFD},
    [VHOST_SET_INFLIGHT_FD] = {"SET_INFLIGHT_FD", on_set_inflight_fd, VHOST_INFLIGHT_BYTES,
                               .feature = 1ULL << VHOST_PROTOCOL_F_INFLIGHT_SHMFD},
    [VHOST_RESET_DEVICE] = {"RESET_DEVICE", on_reset_device, .feature = 1ULL << VHOST_PROTOCOL_F_RESET_DEVICE},
    [VHOST_GET_MAX_MEM_SLOTS] = {"GET_MAX_MEM_SLOTS", on_get_max_mem_slots, .replies = true,
                                 .feature = 1ULL << VHOST_PROTOCOL_F_CONFIGURE_MEM_SLOTS},
    [VHOST_ADD_MEM_REG] = {"ADD_MEM_REG", on_add_mem_reg, sizeof(struct vhost_single_region),
                           .feature = 1ULL << VHOST_PROTOCOL_F_CONFIGURE_MEM_SLOTS},
    [VHOST_REM_MEM_REG] = {"REM_MEM_REG", on_rem_mem_reg, sizeof(struct vhost_single_region),
                           .feature = 1ULL << VHOST_PROTOCOL_F_CONFIGURE_MEM_SLOTS},
    [VHOST_SET_STATUS] = {"SET_STATUS", on_set_status, NUMBER, .feature = 1ULL << VHOST_PROTOCOL_F_STATUS},
    [VHOST_GET_STATUS] = {"GET_STATUS", on_get_status, .replies = true, .feature = 1ULL << VHOST_PROTOCOL_F_STATUS},
};
#undef NUMBER
#undef VRING

static int coroutine_fn receive(struct vhost_session *session, struct message *message)
{
    struct connection *connection = session->config.connection;
    int r = connection_receive_with_fds(connection, &message->header, sizeof(message->header), message->fds,
                                        VHOST_TABLE_REGIONS_MAX, &message->fd_count);

    if (r < 0) {
        return r;
    }
    if ((message->header.flags & VHOST_VERSION_MASK) != VHOST_VERSION || message->header.flags & VHOST_FLAG_REPLY) {
        return error_set(&message->err, -EPROTO, "it is not a request of version 1");
    }
    if (message->header.bytes > sizeof(message->payload)) {
        return error_set(&message->err, -EPROTO, "it has %u bytes", message->header.bytes);
    }
    return message->header.bytes ? connection_receive_all(connection, &message->payload, message->header.bytes) : 0;
}

static int coroutine_fn reply(struct vhost_session *session, struct message *message)
{
    struct connection *connection = session->config.connection;
    struct {
        struct vhost_header header;
        union vhost_payload payload;
    } __attribute__((packed)) answer;
    size_t bytes = sizeof(answer.header) + message->reply_bytes;
    struct iovec iov = {&answer, bytes};

    answer.header =
        (struct vhost_header){message->header.request, VHOST_VERSION | VHOST_FLAG_REPLY, message->reply_bytes};
    memcpy(&answer.payload, &message->payload, message->reply_bytes);
    return message->reply_fd < 0 ? connection_send(connection, buffers_one(&iov), bytes)
                                 : connection_send_with_fd(connection, &answer, bytes, message->reply_fd);
}

/* 0, or what was wrong with it. */
static int check(const struct vhost_session *session, const struct message_kind *kind, struct message *message)
{
    if (!kind || !kind->handle) {
        return error_set(&message->err, -ENOTSUP, "it is not known");
    }
    if (message->header.bytes < kind->bytes) {
        return error_set(&message->err, -EPROTO, "it has only %u bytes", message->header.bytes);
    }
    if (kind->feature & ~session->protocol_features) {
        return error_set(&message->err, -EPROTO, "its protocol feature was not negotiated");
    }
    if (kind->has_index && message->payload.vring.index >= session->config.queues) {
        return error_set(&message->err, -EINVAL, "there is no queue %u", message->payload.vring.index);
    }
    return 0;
}

/* 0: there may be more messages. */
static int coroutine_fn handle(struct vhost_session *session, struct message *message)
{
    uint32_t request = message->header.request;
    const struct message_kind *kind = request < VHOST_REQUEST_COUNT ? &messages[request] : NULL;
    int r = check(session, kind, message);
    bool answered = message->header.flags & VHOST_FLAG_NEED_REPLY &&
                    has_protocol_feature(session, VHOST_PROTOCOL_F_REPLY_ACK) && kind && !kind->replies;

    if (r == 0) {
        r = kind->handle(session, message);
        start_all(session);
    }
    if (r < 0) {
        g_message("vhost-user-blk export '%.*s': message %u (%s): %s", VIRTIO_BLK_ID_BYTES, session->device.name,
                  request, kind && kind->name ? kind->name : "unknown",
                  message->err ? message->err->message : g_strerror(-r));
    }
    if (answered) {
        reply_number(message, r < 0 ? 1 : 0);
        r = 0;
    }
    return r == 0 && message->reply_bytes ? reply(session, message) : r;
}

static int coroutine_fn serve_one(struct vhost_session *session)
{
    struct message message = {.reply_fd = -1};
    int r = receive(session, &message);

    if (r == 0) {
        r = handle(session, &message);
    }
    while (message.fd_count) {
        close(message.fds[--message.fd_count]);
    }
    if (message.reply_fd >= 0) {
        close(message.reply_fd);
    }
    error_free(message.err);
    return r;
}

static void session_init(struct vhost_session *session, const struct vhost_session_config *config)
{
    *session = (struct vhost_session){.config = *config};
    session->device = (struct vhost_device){.backend = config->backend,
                                            .size = config->size,
                                            .block_bytes = config->block_bytes,
                                            .writable = config->writable,
                                            .write_back = !config->writethrough};
    memcpy(session->device.name, config->name, strnlen(config->name, sizeof(session->device.name)));
    session->queues = g_new(struct vhost_queue, config->queues);
    for (unsigned i = 0; i < config->queues; i++) {
        vhost_queue_init(&session->queues[i], i, &session->device, config->loops[i % config->loop_count]);
    }
    co_group_init(&session->notifiers);
}

void coroutine_fn vhost_session_run(struct vhost_session *session, const struct vhost_session_config *config)
{
    session_init(session, config);
    while (serve_one(session) == 0) {
    }
    pause_all(session);
    close_channel(session);
    for (unsigned i = 0; i < config->queues; i++) {
        vhost_queue_finish(&session->queues[i]);
    }
    vhost_memory_clear(&session->memory);
    drop_inflight(session);
    g_free(session->queues);
    co_group_destroy(&session->notifiers);
}

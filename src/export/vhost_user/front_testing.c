/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A front end and driver for tests and measurements; see the header. Its memory is one memfd, in two regions that meet
 * in the guest and in our address space, so that buffers and tables may lie across. One thread to a queue. It checks
 * nothing that a back end says but what keeps its own books right: what is expected is the caller's to compare.
 */
#include "export/vhost_user/front_testing.h"
#include <errno.h>
#include <glib.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define WAIT_MS 60000
#define LOAD(from) __atomic_load_n(&(from), __ATOMIC_ACQUIRE)
#define STORE(to, value) __atomic_store_n(&(to), (value), __ATOMIC_RELEASE)
#define WRAP_BIT (1u << VRING_PACKED_EVENT_F_WRAP_CTR)

int front_connect(const char *path)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    g_strlcpy(name.sun_path, path, sizeof(name.sun_path));
    if (connect(fd, (struct sockaddr *)&name, sizeof(name)) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* --- messages --- */

void front_send(struct front *front, uint32_t request, uint32_t flags, const void *payload, uint32_t bytes,
                const int *fds, unsigned fd_count)
{
    struct vhost_header header = {request, VHOST_VERSION | flags, bytes};
    struct iovec iov[2] = {{&header, sizeof(header)}, {(void *)payload, bytes}};
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(16 * sizeof(int))];
    } control = {
        .align = {.cmsg_len = CMSG_LEN(fd_count * sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = 2};

    if (fd_count) {
        memcpy(CMSG_DATA(&control.align), fds, fd_count * sizeof(int));
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
    }
    (void)!sendmsg(front->socket, &message, MSG_NOSIGNAL); /* a closed connection shows when a reply is read */
}

static bool receive_all(int fd, void *to, size_t bytes)
{
    while (bytes) {
        struct pollfd ready = {.fd = fd, .events = POLLIN};

        if (poll(&ready, 1, WAIT_MS) != 1) {
            g_error("no answer");
        }
        ssize_t r = read(fd, to, bytes);
        if (r <= 0) {
            return false;
        }
        to = (char *)to + r;
        bytes -= (size_t)r;
    }
    return true;
}

bool front_reply(struct front *front, uint32_t request, void *payload, uint32_t bytes, int *ret_fd)
{
    struct vhost_header header;
    struct iovec iov = {&header, sizeof(header)};
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    struct pollfd ready = {.fd = front->socket, .events = POLLIN};

    if (poll(&ready, 1, WAIT_MS) != 1) {
        g_error("no answer to message %u", request);
    }
    if (recvmsg(front->socket, &message, MSG_WAITALL) != sizeof(header)) {
        return false;
    }
    if (ret_fd) {
        *ret_fd = -1;
        if (message.msg_controllen) {
            memcpy(ret_fd, CMSG_DATA(&control.align), sizeof(int));
        }
    }
    g_assert_cmpuint(header.request, ==, request);
    g_assert_cmpuint(header.flags, ==, VHOST_VERSION | VHOST_FLAG_REPLY);
    g_assert_cmpuint(header.bytes, <=, bytes);
    return receive_all(front->socket, payload, header.bytes);
}

bool front_tell(struct front *front, uint32_t request, const void *payload, uint32_t bytes, const int *fds,
                unsigned fd_count)
{
    uint64_t answer = 0;

    front_send(front, request, VHOST_FLAG_NEED_REPLY, payload, bytes, fds, fd_count);
    return front_reply(front, request, &answer, sizeof(answer), NULL) && answer == 0;
}

static void tell(struct front *front, uint32_t request, const void *payload, uint32_t bytes, const int *fds,
                 unsigned fd_count)
{
    if (!front_tell(front, request, payload, bytes, fds, fd_count)) {
        g_error("message %u was refused", request);
    }
}

uint64_t front_ask(struct front *front, uint32_t request)
{
    uint64_t answer = 0;

    front_send(front, request, 0, NULL, 0, NULL, 0);
    if (!front_reply(front, request, &answer, sizeof(answer), NULL)) {
        g_error("message %u was not answered", request);
    }
    return answer;
}

/* --- memory --- */

uint64_t front_guest(const struct front *front, const void *at)
{
    return FRONT_GUEST + (uint64_t)((const uint8_t *)at - front->memory);
}

static void *take(struct front *front, size_t bytes, size_t alignment)
{
    size_t at = (front->memory_used + alignment - 1) & ~(alignment - 1);

    front->memory_used = at + bytes;
    g_assert(!front->memory || front->memory_used <= front->memory_bytes);
    return front->memory ? front->memory + at : NULL;
}

static void lay_out(struct front *front)
{
    const struct front_options *options = &front->options;

    front->memory_used = 0;
    for (unsigned i = 0; i < options->queues; i++) {
        struct front_queue *queue = &front->queue[i];
        unsigned size = queue->size;

        queue->descriptors = take(front, size * sizeof(struct vring_desc), 4096);
        queue->packed = (void *)queue->descriptors;
        queue->available = take(front, 8 + (size + 1) * sizeof(uint16_t), 4096);
        queue->driver = (void *)queue->available;
        queue->used = take(front, 8 + (size + 1) * sizeof(struct vring_used_elem), 4096);
        queue->device = (void *)queue->used;
        for (unsigned s = 0; s < queue->slots; s++) {
            queue->slot[s].header = take(front, sizeof(struct virtio_blk_outhdr), 16);
            queue->slot[s].status = take(front, 1, 1);
            queue->slot[s].table = take(front, 3 * sizeof(struct vring_desc), 16);
        }
        for (unsigned s = 0; s < queue->slots; s++) {
            queue->slot[s].buffer = take(front, options->buffer, 4096);
        }
    }
}

static void make_memory(struct front *front)
{
    const struct front_options *options = &front->options;

    for (unsigned i = 0; i < options->queues; i++) {
        struct front_queue *queue = &front->queue[i];
        unsigned most = options->indirect ? options->size : options->size / 3;

        *queue = (struct front_queue){.front = front, .index = i, .size = options->size};
        queue->slots = options->slots ? MIN(options->slots, most) : most;
        queue->slot = g_new0(struct front_slot, queue->slots);
        queue->kick = eventfd(0, EFD_CLOEXEC);
        queue->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        queue->error = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        queue->next_wrap = queue->taken_wrap = true;
    }
    front->memory = NULL;
    lay_out(front);
    front->memory_bytes = (front->memory_used + 8191) & ~(size_t)8191;
    front->memory_fd = memfd_create("guest", MFD_CLOEXEC);
    g_assert(ftruncate(front->memory_fd, (off_t)front->memory_bytes) == 0);
    front->memory = mmap(NULL, front->memory_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, front->memory_fd, 0);
    g_assert(front->memory != MAP_FAILED);
    lay_out(front);
}

static void share_memory(struct front *front)
{
    size_t half = front->memory_bytes / (front->options.one_region ? 1 : 2);
    unsigned count = front->options.one_region ? 1 : 2;
    struct vhost_memory_table table = {.count = count};
    int fds[2] = {front->memory_fd, front->memory_fd};

    for (unsigned i = 0; i < count; i++) {
        table.regions[i] =
            (struct vhost_region){FRONT_GUEST + i * half, half, (uintptr_t)front->memory + i * half, i * half};
    }
    if (!front->options.add_regions) {
        tell(front, VHOST_SET_MEM_TABLE, &table, 8 + count * (uint32_t)sizeof(struct vhost_region), fds, count);
        return;
    }
    for (unsigned i = 0; i < count; i++) {
        struct vhost_single_region single = {0, table.regions[i]};
        tell(front, VHOST_ADD_MEM_REG, &single, sizeof(single), fds, 1);
    }
}

/* --- life --- */

static void negotiate(struct front *front)
{
    const struct front_options *options = &front->options;
    uint64_t protocol, owner = 0;
    int ends[2];

    front->offered = front_ask(front, VHOST_GET_FEATURES);
    protocol = front_ask(front, VHOST_GET_PROTOCOL_FEATURES);
    if (!options->inflight) {
        protocol &= ~(1ULL << VHOST_PROTOCOL_F_INFLIGHT_SHMFD);
    }
    protocol &= 1ULL << VHOST_PROTOCOL_F_MQ | 1ULL << VHOST_PROTOCOL_F_REPLY_ACK | 1ULL << VHOST_PROTOCOL_F_CONFIG |
                1ULL << VHOST_PROTOCOL_F_BACKEND_REQ | 1ULL << VHOST_PROTOCOL_F_INFLIGHT_SHMFD |
                1ULL << VHOST_PROTOCOL_F_RESET_DEVICE | 1ULL << VHOST_PROTOCOL_F_CONFIGURE_MEM_SLOTS |
                1ULL << VHOST_PROTOCOL_F_STATUS;
    front_send(front, VHOST_SET_PROTOCOL_FEATURES, 0, &protocol, sizeof(protocol), NULL, 0);
    front_send(front, VHOST_SET_OWNER, 0, &owner, 0, NULL, 0);
    if (protocol >> VHOST_PROTOCOL_F_BACKEND_REQ & 1) {
        g_assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
        tell(front, VHOST_SET_BACKEND_REQ_FD, NULL, 0, &ends[1], 1);
        close(ends[1]);
        front->channel = ends[0];
    }
    struct vhost_config_message config = {.bytes = sizeof(front->config)};
    front_send(front, VHOST_GET_CONFIG, 0, &config, VHOST_CONFIG_HEAD + config.bytes, NULL, 0);
    g_assert(front_reply(front, VHOST_GET_CONFIG, &config, sizeof(config), NULL));
    memcpy(&front->config, config.payload, sizeof(front->config));

    uint64_t wanted = ~(1ULL << VIRTIO_F_RING_PACKED | 1ULL << VIRTIO_RING_F_EVENT_IDX |
                        1ULL << VIRTIO_RING_F_INDIRECT_DESC | 1ULL << VIRTIO_BLK_F_RO);
    front->features = (front->offered & wanted) | (uint64_t)options->packed << VIRTIO_F_RING_PACKED |
                      (uint64_t)options->event_index << VIRTIO_RING_F_EVENT_IDX |
                      (uint64_t)options->indirect << VIRTIO_RING_F_INDIRECT_DESC |
                      (front->offered & 1ULL << VIRTIO_BLK_F_RO);
    tell(front, VHOST_SET_FEATURES, &front->features, sizeof(front->features), NULL, 0);
}

static void share_inflight(struct front *front)
{
    if (!front->options.inflight) {
        return;
    }
    if (front->inflight_fd < 0) {
        front->inflight = (struct vhost_inflight){.queues = (uint16_t)front->options.queues,
                                                  .queue_size = (uint16_t)front->options.size};
        uint32_t bytes = front->options.packed ? VHOST_INFLIGHT_BYTES : sizeof(front->inflight); /* there are both */
        front_send(front, VHOST_GET_INFLIGHT_FD, 0, &front->inflight, bytes, NULL, 0);
        g_assert(
            front_reply(front, VHOST_GET_INFLIGHT_FD, &front->inflight, sizeof(front->inflight), &front->inflight_fd));
        g_assert(front->inflight_fd >= 0);
    }
    tell(front, VHOST_SET_INFLIGHT_FD, &front->inflight, VHOST_INFLIGHT_BYTES, &front->inflight_fd, 1);
}

void front_start(struct front_queue *queue, uint32_t base)
{
    struct front *front = queue->front;
    struct vhost_vring_number number = {queue->index, queue->size}, start = {queue->index, base},
                              on = {queue->index, 1};
    struct vhost_vring_addresses addresses = {.index = queue->index,
                                              .descriptors = (uintptr_t)queue->descriptors,
                                              .available = (uintptr_t)queue->available,
                                              .used = (uintptr_t)queue->used};
    uint64_t index = queue->index;

    tell(front, VHOST_SET_VRING_NUM, &number, sizeof(number), NULL, 0);
    tell(front, VHOST_SET_VRING_BASE, &start, sizeof(start), NULL, 0);
    tell(front, VHOST_SET_VRING_ADDR, &addresses, sizeof(addresses), NULL, 0);
    tell(front, VHOST_SET_VRING_KICK, &index, sizeof(index), &queue->kick, 1);
    tell(front, VHOST_SET_VRING_CALL, &index, sizeof(index), &queue->call, 1);
    tell(front, VHOST_SET_VRING_ERR, &index, sizeof(index), &queue->error, 1);
    tell(front, VHOST_SET_VRING_ENABLE, &on, sizeof(on), NULL, 0);
}

static void begin(struct front *front, int socket)
{
    front->socket = socket;
    front->channel = -1;
    negotiate(front);
    share_memory(front);
    share_inflight(front);
}

void front_prepare(struct front *front, const struct front_options *options)
{
    *front = (struct front){.options = *options, .socket = -1, .channel = -1, .inflight_fd = -1};
    make_memory(front);
}

void front_init(struct front *front, int socket, const struct front_options *options)
{
    front_prepare(front, options);
    begin(front, socket);
    for (unsigned i = 0; i < options->queues; i++) {
        front_start(&front->queue[i], options->packed ? 0x80008000u : 0);
    }
}

void front_reconnect(struct front *front, int socket)
{
    close(front->socket);
    if (front->channel >= 0) {
        close(front->channel);
    }
    begin(front, socket);
    for (unsigned i = 0; i < front->options.queues; i++) {
        struct front_queue *queue = &front->queue[i];
        /* What a machine monitor knows after a crash: the used ring's index, and of a packed ring nothing. */
        front_start(queue, front->options.packed ? 0x80008000u : LOAD(queue->used->idx));
    }
}

uint32_t front_stop(struct front_queue *queue)
{
    struct vhost_vring_number number = {queue->index, 0};

    front_send(queue->front, VHOST_GET_VRING_BASE, 0, &number, sizeof(number), NULL, 0);
    g_assert(front_reply(queue->front, VHOST_GET_VRING_BASE, &number, sizeof(number), NULL));
    return number.number;
}

void front_finish(struct front *front)
{
    for (unsigned i = 0; i < front->options.queues; i++) {
        g_free(front->queue[i].slot);
        close(front->queue[i].kick);
        close(front->queue[i].call);
        close(front->queue[i].error);
    }
    munmap(front->memory, front->memory_bytes);
    close(front->memory_fd);
    if (front->socket >= 0) {
        close(front->socket);
    }
    if (front->channel >= 0) {
        close(front->channel);
    }
    if (front->inflight_fd >= 0) {
        close(front->inflight_fd);
    }
}

/* --- driver --- */

/* header, buffer and status as descriptors; how many. */
static unsigned describe(struct front_queue *queue, struct front_slot *slot, uint32_t type, uint32_t bytes,
                         struct vring_desc ret[3])
{
    bool reads = type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_GET_ID;
    unsigned count = 0;

    ret[count++] = (struct vring_desc){.addr = front_guest(queue->front, slot->header), .len = sizeof(*slot->header)};
    if (bytes) {
        ret[count++] = (struct vring_desc){
            .addr = front_guest(queue->front, slot->buffer), .len = bytes, .flags = reads ? VRING_DESC_F_WRITE : 0};
    }
    ret[count++] =
        (struct vring_desc){.addr = front_guest(queue->front, slot->status), .len = 1, .flags = VRING_DESC_F_WRITE};
    return count;
}

static void submit_split(struct front_queue *queue, unsigned number, struct vring_desc *chain, unsigned count)
{
    bool indirect = queue->front->options.indirect;
    struct vring_desc *table = indirect ? queue->slot[number].table : queue->descriptors + 3 * number;
    unsigned base = indirect ? 0 : 3 * number;

    for (unsigned i = 0; i < count; i++) {
        chain[i].next = (uint16_t)(base + i + 1);
        chain[i].flags |= i + 1 < count ? VRING_DESC_F_NEXT : 0;
        table[i] = chain[i];
    }
    if (indirect) {
        queue->descriptors[number] = (struct vring_desc){.addr = front_guest(queue->front, table),
                                                         .len = count * (uint32_t)sizeof(*table),
                                                         .flags = VRING_DESC_F_INDIRECT};
    }
    queue->available->ring[queue->next % queue->size] = (uint16_t)(indirect ? number : base);
    queue->next++;
    STORE(queue->available->idx, queue->next);
    queue->unkicked++;
}

static void advance(const struct front_queue *queue, uint16_t *place, bool *wrap, unsigned by)
{
    *place += by;
    if (*place >= queue->size) {
        *place -= queue->size;
        *wrap = !*wrap;
    }
}

static void submit_packed(struct front_queue *queue, unsigned number, struct vring_desc *chain, unsigned count)
{
    struct vring_packed_desc *table = (void *)queue->slot[number].table;
    uint16_t first = queue->next, first_flags = 0;

    if (queue->front->options.indirect) {
        for (unsigned i = 0; i < count; i++) {
            table[i] = (struct vring_packed_desc){.addr = chain[i].addr, .len = chain[i].len, .flags = chain[i].flags};
        }
        chain[0] = (struct vring_desc){.addr = front_guest(queue->front, table),
                                       .len = count * (uint32_t)sizeof(*table),
                                       .flags = VRING_DESC_F_INDIRECT};
        count = 1;
    }
    for (unsigned i = 0; i < count; i++) {
        struct vring_packed_desc *place = &queue->packed[queue->next];
        uint16_t flags = chain[i].flags | (i + 1 < count ? VRING_DESC_F_NEXT : 0) |
                         (queue->next_wrap ? PACKED_AVAILABLE : PACKED_USED);

        place->addr = chain[i].addr;
        place->len = chain[i].len;
        place->id = (uint16_t)number;
        if (i) {
            place->flags = flags;
        } else {
            first_flags = flags;
        }
        advance(queue, &queue->next, &queue->next_wrap, 1);
    }
    queue->slot[number].descriptors = count;
    STORE(queue->packed[first].flags, first_flags);
    queue->unkicked += count;
}

void front_submit(struct front_queue *queue, unsigned number, uint32_t type, uint64_t sector, uint32_t bytes)
{
    struct front_slot *slot = &queue->slot[number];
    struct vring_desc chain[3];

    g_assert(!slot->busy && bytes <= queue->front->options.buffer);
    slot->busy = true;
    *slot->header = (struct virtio_blk_outhdr){.type = type, .sector = sector};
    *slot->status = 0xff;
    unsigned count = describe(queue, slot, type, bytes, chain);
    if (queue->front->options.packed) {
        submit_packed(queue, number, chain, count);
    } else {
        submit_split(queue, number, chain, count);
    }
}

static bool event_is_due(uint16_t event, uint16_t now, uint16_t before)
{
    return (uint16_t)(now - event - 1) < (uint16_t)(now - before);
}

static bool wants_kick(struct front_queue *queue)
{
    const struct front_options *options = &queue->front->options;
    uint16_t before = queue->next - queue->unkicked;

    atomic_thread_fence(memory_order_seq_cst);
    if (!options->packed) {
        return options->event_index ? event_is_due(*(uint16_t *)&queue->used->ring[queue->size], queue->next, before)
                                    : !(LOAD(queue->used->flags) & VRING_USED_F_NO_NOTIFY);
    }
    uint16_t flags = LOAD(queue->device->flags), event = LOAD(queue->device->off_wrap), place = event & ~WRAP_BIT;
    if (flags != VRING_PACKED_EVENT_FLAG_DESC) {
        return flags != VRING_PACKED_EVENT_FLAG_DISABLE;
    }
    if (!!(event & WRAP_BIT) != queue->next_wrap) {
        place -= queue->size;
    }
    return event_is_due(place, queue->next, before);
}

void front_kick(struct front_queue *queue)
{
    uint64_t one = 1;

    if (queue->unkicked && wants_kick(queue)) {
        g_assert(write(queue->kick, &one, sizeof(one)) == sizeof(one));
        queue->kicks++;
    }
    queue->unkicked = 0;
}

int front_reap(struct front_queue *queue)
{
    unsigned number;

    if (queue->front->options.packed) {
        const struct vring_packed_desc *place = &queue->packed[queue->taken];
        uint16_t flags = LOAD(place->flags);

        if (!!(flags & PACKED_AVAILABLE) != queue->taken_wrap || !!(flags & PACKED_USED) != queue->taken_wrap) {
            return -1;
        }
        number = place->id;
        g_assert_cmpuint(number, <, queue->slots);
        advance(queue, &queue->taken, &queue->taken_wrap, queue->slot[number].descriptors);
    } else {
        if (LOAD(queue->used->idx) == queue->taken) {
            return -1;
        }
        number = queue->used->ring[queue->taken % queue->size].id;
        number /= queue->front->options.indirect ? 1 : 3;
        g_assert_cmpuint(number, <, queue->slots);
        queue->taken++;
    }
    g_assert_true(queue->slot[number].busy);
    queue->slot[number].busy = false;
    return (int)number;
}

/* Asks to be called for the next request that ends. */
static void enable_calls(struct front_queue *queue)
{
    const struct front_options *options = &queue->front->options;

    if (options->packed && options->event_index) {
        STORE(queue->driver->off_wrap, (uint16_t)(queue->taken | (queue->taken_wrap ? WRAP_BIT : 0)));
        STORE(queue->driver->flags, VRING_PACKED_EVENT_FLAG_DESC);
    } else if (options->event_index) {
        STORE(queue->available->ring[queue->size], queue->taken);
    }
    atomic_thread_fence(memory_order_seq_cst);
}

int front_wait(struct front_queue *queue)
{
    for (;;) {
        int number = front_reap(queue);
        uint64_t count;

        if (number >= 0) {
            return number;
        }
        enable_calls(queue);
        number = front_reap(queue);
        if (number >= 0) {
            return number;
        }
        struct pollfd ready = {.fd = queue->call, .events = POLLIN};
        if (poll(&ready, 1, WAIT_MS) != 1) {
            g_error("queue %u: no call", queue->index);
        }
        queue->calls += read(queue->call, &count, sizeof(count)) == sizeof(count);
    }
}

unsigned front_run(struct front_queue *queue, uint32_t type, uint64_t sector, uint32_t bytes)
{
    front_submit(queue, 0, type, sector, bytes);
    front_kick(queue);
    g_assert_cmpint(front_wait(queue), ==, 0);
    return *queue->slot[0].status;
}

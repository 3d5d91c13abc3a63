/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fuzzes the messages of a vhost-user front end: a session over a socket pair with a null-co node. The input is a row
 * of messages (request, flags, length, payload, which descriptors come along); descriptors are of memory, events and a
 * socket. The first byte says whether a front end that has started a queue was there before, and how.
 */
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/drivers.h"
#include "export/vhost_user/session.h"
#include "loop/connection.h"
#include "loop/loop.h"
#include "schema/types.h"
#include <glib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MEMORY 65536
#define BASE UINT64_C(0x10000)

static struct loop *loop;
static struct graph *graph;
static struct backend *backend;
static atomic_uint_fast64_t disk_size = 1 << 20;
static uint8_t *memory;
static int fds[4]; /* memory, an event, a socket, something else */

struct input {
    const uint8_t *data;
    size_t size;
};

static void send_message(int fd, uint32_t request, uint32_t flags, const void *payload, uint32_t bytes, unsigned which,
                         unsigned count)
{
    struct vhost_header header = {request, flags, bytes};
    struct iovec iov[2] = {{&header, sizeof(header)}, {(void *)payload, bytes}};
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(2 * sizeof(int))];
    } control = {
        .align = {.cmsg_len = CMSG_LEN(count * sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = 2};
    int sent[2] = {fds[which % 4], fds[which / 4 % 4]};

    if (count) {
        memcpy(CMSG_DATA(&control.align), sent, count * sizeof(int));
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    }
    (void)!sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* What an honest front end says until its first queue runs. */
static void start_queue(int fd, uint8_t how)
{
    struct vhost_memory_table table = {.count = 1, .regions = {{BASE, MEMORY, BASE, 0}}};
    struct vhost_vring_number number = {0, 16}, base = {0, how & 1 ? 0x80008000u : 0}, on = {0, 1};
    struct vhost_vring_addresses addresses = {0, 0, BASE, BASE + 8192, BASE + 4096, 0};
    struct vhost_inflight inflight = {.queues = 2, .queue_size = 16};
    uint64_t protocol = 1 << VHOST_PROTOCOL_F_INFLIGHT_SHMFD | 1 << VHOST_PROTOCOL_F_CONFIG |
                        1 << VHOST_PROTOCOL_F_REPLY_ACK | 1 << VHOST_PROTOCOL_F_CONFIGURE_MEM_SLOTS |
                        1 << VHOST_PROTOCOL_F_BACKEND_REQ | 1 << VHOST_PROTOCOL_F_STATUS;
    uint64_t features =
        1ULL << VIRTIO_F_VERSION_1 | 1ULL << VHOST_F_PROTOCOL_FEATURES | (uint64_t)(how & 1) << VIRTIO_F_RING_PACKED |
        (uint64_t)(how >> 1 & 1) << VIRTIO_RING_F_INDIRECT_DESC | (uint64_t)(how >> 2 & 1) << VIRTIO_RING_F_EVENT_IDX;
    uint64_t index = 0;

    send_message(fd, VHOST_SET_PROTOCOL_FEATURES, 1, &protocol, 8, 0, 0);
    send_message(fd, VHOST_SET_FEATURES, 1, &features, 8, 0, 0);
    send_message(fd, VHOST_SET_MEM_TABLE, 1, &table, 40, 0, 1);
    if (how & 8) {
        send_message(fd, VHOST_GET_INFLIGHT_FD, 1, &inflight, sizeof(inflight), 0, 0);
    }
    send_message(fd, VHOST_SET_VRING_NUM, 1, &number, 8, 0, 0);
    send_message(fd, VHOST_SET_VRING_BASE, 1, &base, 8, 0, 0);
    send_message(fd, VHOST_SET_VRING_ADDR, 1, &addresses, 40, 0, 0);
    send_message(fd, VHOST_SET_VRING_KICK, 1, &index, 8, 1, 1);
    send_message(fd, VHOST_SET_VRING_CALL, 1, &index, 8, 1, 1);
    send_message(fd, VHOST_SET_VRING_ENABLE, 1, &on, 8, 0, 0);
}

static void client_run(void *argument)
{
    const struct input *input = argument;
    const uint8_t *data = input->data;
    size_t size = input->size, rings = MIN(size / 2, 1024);
    struct loop *loops[] = {loop};
    struct vhost_session session;
    int ends[2];

    memset(memory, 0, MEMORY);
    memcpy(memory, data + size - rings, rings); /* descriptors */
    memory[8194] = 3;                           /* and three of them are available */
    size -= rings;
    g_assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    uint8_t how = *data++;
    size--;
    if (how & 0x80) {
        start_queue(ends[1], how);
    }
    while (size >= 4) {
        uint32_t bytes = MIN(data[2], (uint32_t)(size - 4));

        send_message(ends[1], data[0] % (VHOST_REQUEST_COUNT + 1), 1 | (data[1] & 0xfc), data + 4, bytes, data[3] & 15,
                     data[3] >> 4 & 1 ? 1 + (data[3] >> 5 & 1) : 0);
        data += 4 + bytes;
        size -= 4 + bytes;
    }
    shutdown(ends[1], SHUT_WR);
    struct vhost_session_config config = {.connection = connection_from_fds(ends[0], ends[0]),
                                          .backend = backend,
                                          .size = &disk_size,
                                          .loops = loops,
                                          .loop_count = 1,
                                          .queues = 2,
                                          .block_bytes = 512,
                                          .writable = how & 0x40,
                                          .name = "fuzz"};
    vhost_session_run(&session, &config);
    connection_close(config.connection);
    close(ends[1]);
}

static void quiet(const gchar *domain, GLogLevelFlags level, const gchar *message, gpointer data)
{
}

static void start_run(void *argument)
{
    struct blockdev_options options = {.driver = BLOCKDEV_DRIVER_NULL_CO, .node_name = "n0"};
    struct node *node;

    options.u.null_co.has_size = true;
    options.u.null_co.size = 1 << 20;
    g_assert(graph_add(graph, &options, &node, NULL) == 0);
    backend = backend_create(graph, "fuzz");
    g_assert(backend_attach(backend, node, ACCESS_READ_DATA | ACCESS_WRITE_DATA, NULL) == 0);
}

static void start(void)
{
    int ends[2];

    g_log_set_handler(NULL, G_LOG_LEVEL_MESSAGE, quiet, NULL);
    driver_register(&driver_null_co);
    g_assert(loop_create(ENGINE_AUTO, &loop, NULL) == 0);
    graph = graph_create();
    loop_run_coroutine(loop, start_run, NULL);
    fds[0] = memfd_create("fuzz", MFD_CLOEXEC);
    g_assert(ftruncate(fds[0], MEMORY) == 0);
    memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    fds[1] = eventfd(0, EFD_CLOEXEC);
    g_assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    fds[2] = ends[0];
    fds[3] = memfd_create("other", MFD_CLOEXEC);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};

    if (!loop) {
        start();
    }
    if (size >= 4) {
        loop_run_coroutine(loop, client_run, &input);
    }
    return 0;
}

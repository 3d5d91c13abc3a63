/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The limit that the benchmark is compared with: an NBD server that does nothing but answer, from memory. One thread
 * per connection, blocking sockets, everything that was received is answered with one call, reads are sent straight
 * from the memory and writes copied to it. No option but GO, simple replies only, no checks worth the name: this is
 * what the sockets and the copying cost on this machine, not a server for anybody. With a file it asks the kernel for
 * every request's data, one call each, like any server of a file that others may truncate or have left holes in: the
 * limit of such servers.
 */
#include "export/nbd/nbd_format.h"
#include <fcntl.h>
#include <glib.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define RECEIVE_ROOM (1024u * 1024)
#define READ_ROOM (2u * 1024 * 1024) /* read from a file and not yet sent; half of it: the longest read */
#define BATCH 128u

static uint8_t *memory; /* the export; NULL: it is a file */
static int file = -1;
static uint64_t size;

static int receive_all(int fd, void *data, size_t bytes)
{
    return bytes && recv(fd, data, bytes, MSG_WAITALL) != (ssize_t)bytes ? -1 : 0;
}

static int send_vector(int fd, struct iovec *iov, unsigned count)
{
    while (count) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = count};
        ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL);

        if (n < 0) {
            return -1;
        }
        while (count && (size_t)n >= iov->iov_len) {
            n -= (ssize_t)iov->iov_len;
            iov++;
            count--;
        }
        if (count) {
            iov->iov_base = (char *)iov->iov_base + n;
            iov->iov_len -= (size_t)n;
        }
    }
    return 0;
}

static void option_reply(int fd, uint32_t option, uint32_t type, const void *data, uint32_t bytes)
{
    struct nbd_option_reply_header header = {htobe64(NBD_OPTION_REPLY_MAGIC), htobe32(option), htobe32(type),
                                             htobe32(bytes)};
    struct iovec iov[2] = {{&header, sizeof(header)}, {(void *)data, bytes}};

    send_vector(fd, iov, bytes ? 2 : 1);
}

static int handshake(int fd)
{
    struct nbd_greeting greeting = {htobe64(NBD_MAGIC), htobe64(NBD_OPTION_MAGIC),
                                    htobe16(NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES)};
    struct iovec iov = {&greeting, sizeof(greeting)};
    uint32_t flags;

    send_vector(fd, &iov, 1);
    if (receive_all(fd, &flags, sizeof(flags))) {
        return -1;
    }
    for (;;) {
        struct nbd_option_header header;
        struct nbd_info_export info = {htobe16(NBD_INFO_EXPORT), htobe64(size),
                                       htobe16(NBD_FLAG_HAS_FLAGS | NBD_FLAG_CAN_MULTI_CONN)};
        uint8_t data[65536];

        if (receive_all(fd, &header, sizeof(header)) || be32toh(header.bytes) > sizeof(data) ||
            receive_all(fd, data, be32toh(header.bytes))) {
            return -1;
        }
        if (be32toh(header.option) == NBD_OPT_GO) {
            option_reply(fd, NBD_OPT_GO, NBD_REP_INFO, &info, sizeof(info));
            option_reply(fd, NBD_OPT_GO, NBD_REP_ACK, NULL, 0);
            return 0;
        }
        option_reply(fd, be32toh(header.option), NBD_REP_ERR_UNSUP, NULL, 0);
    }
}

/* Where what a read asks for is: in the memory, or read from the file to `room`. NULL: it cannot be read. */
static const uint8_t *find(uint64_t offset, uint32_t length, uint8_t *room)
{
    if (memory) {
        return memory + offset;
    }
    return pread(file, room, length, (off_t)offset) == (ssize_t)length ? room : NULL;
}

static bool store(uint64_t offset, const uint8_t *from, size_t length)
{
    if (memory) {
        memcpy(memory + offset, from, length);
        return true;
    }
    return !length || pwrite(file, from, length, (off_t)offset) == (ssize_t)length;
}

/* Answers every whole request in the buffer; returns how many bytes of it were used, or -1. `room`: READ_ROOM bytes. */
static ssize_t answer(int fd, const uint8_t *bytes, size_t have, uint8_t *room)
{
    struct nbd_simple_reply replies[BATCH];
    struct iovec iov[2 * BATCH];
    unsigned count = 0, iovs = 0;
    size_t at = 0, read_at = 0;

    while (count < BATCH && read_at < READ_ROOM / 2 && have - at >= sizeof(struct nbd_request_header)) {
        const struct nbd_request_header *request = (const void *)(bytes + at);
        uint64_t offset = be64toh(request->offset);
        uint32_t length = be32toh(request->bytes);
        uint16_t type = be16toh(request->type);
        size_t payload = type == NBD_CMD_WRITE ? length : 0;

        if (request->magic != htobe32(NBD_REQUEST_MAGIC) || type == NBD_CMD_DISC || offset > size ||
            length > size - offset) {
            return -1;
        }
        if (have - at - sizeof(*request) < payload) {
            break;
        }
        if (!store(offset, bytes + at + sizeof(*request), payload)) {
            return -1;
        }
        at += sizeof(*request) + payload;
        replies[count] = (struct nbd_simple_reply){htobe32(NBD_SIMPLE_REPLY_MAGIC), 0, request->cookie};
        iov[iovs++] = (struct iovec){&replies[count++], sizeof(replies[0])};
        if (type == NBD_CMD_READ) {
            const uint8_t *data = length <= READ_ROOM / 2 ? find(offset, length, room + read_at) : NULL;

            if (!data) {
                return -1;
            }
            iov[iovs++] = (struct iovec){(void *)data, length};
            read_at += memory ? 0 : length;
        }
    }
    return send_vector(fd, iov, iovs) ? -1 : (ssize_t)at;
}

static void *serve(void *argument)
{
    int fd = (int)(intptr_t)argument, send_room = 4 * 1024 * 1024;
    uint8_t *buffer = g_malloc(RECEIVE_ROOM), *room = g_malloc(READ_ROOM);
    size_t have = 0;

    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &send_room, sizeof(send_room));
    if (handshake(fd) == 0) {
        for (;;) {
            ssize_t n = recv(fd, buffer + have, RECEIVE_ROOM - have, 0), used;

            if (n <= 0) {
                break;
            }
            have += (size_t)n;
            while ((used = answer(fd, buffer, have, room)) > 0) {
                have -= (size_t)used;
                memmove(buffer, buffer + used, have);
            }
            if (used < 0) {
                break;
            }
        }
    }
    g_free(buffer);
    g_free(room);
    close(fd);
    return NULL;
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);

    if (argc < 3 || argc > 4 || strlen(argv[1]) >= sizeof(address.sun_path)) {
        fputs("usage: nbd_limit SOCKET BYTES [FILE]\n", stderr);
        return 1;
    }
    g_strlcpy(address.sun_path, argv[1], sizeof(address.sun_path));
    size = g_ascii_strtoull(argv[2], NULL, 10);
    if (argc == 4) {
        file = open(argv[3], O_RDWR);
    } else {
        memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    }
    if ((argc == 4 && file < 0) || memory == MAP_FAILED ||
        bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(listener, 64) < 0) {
        perror("nbd_limit");
        return 1;
    }
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        pthread_t thread;

        if (fd >= 0 && pthread_create(&thread, NULL, serve, (void *)(intptr_t)fd) == 0) {
            pthread_detach(thread);
        }
    }
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The verifying client's NBD connection.
 *
 * 1. Bytes to send wait in `output`, bytes received in `input`; the socket is non-blocking after the handshake, and
 *    both directions move in one poll loop, so that a server which waits for us to read never waits in vain.
 * 2. The data of a write are copied into `output` when it is queued.
 * 3. Whatever the server says is checked: magic numbers, lengths, chunks inside their request. What breaks the
 *    protocol ends the program with status 5.
 *
 * Does not retry, reconnect or judge content.
 */
#include "connection.h"

#include <endian.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define OPTION_MAGIC 0x49484156454F5054ULL
#define OPTION_REPLY_MAGIC 0x0003e889045565a9ULL
#define REQUEST_MAGIC 0x25609513
#define SIMPLE_REPLY_MAGIC 0x67446698
#define STRUCTURED_REPLY_MAGIC 0x668e33ef
enum { OPTION_GO = 7, OPTION_STRUCTURED_REPLY = 8 };
enum { REPLY_ACK = 1, REPLY_INFO = 3, INFO_EXPORT = 0 };
enum { CHUNK_NONE = 0, CHUNK_DATA = 1, CHUNK_HOLE = 2 };
#define CHUNK_DONE 1
#define CHUNK_IS_ERROR 0x8000
#define MAX_REPLY (40u << 20)

struct connection {
    int fd;
    bool closed;
    uint64_t size;
    unsigned flags;
    GByteArray *output;
    GByteArray *input;
    size_t input_used;    /* bytes of `input` that are parsed */
    GHashTable *failures; /* cookie -> error of an earlier chunk of the same structured reply */
};

static uint16_t get_16(const uint8_t *data)
{
    uint16_t value;
    memcpy(&value, data, sizeof(value));
    return be16toh(value);
}

static uint32_t get_32(const uint8_t *data)
{
    uint32_t value;
    memcpy(&value, data, sizeof(value));
    return be32toh(value);
}

static uint64_t get_64(const uint8_t *data)
{
    uint64_t value;
    memcpy(&value, data, sizeof(value));
    return be64toh(value);
}

static void put(GByteArray *array, uint64_t value, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++) {
        uint8_t byte = value >> (8 * (bytes - 1 - i));
        g_byte_array_append(array, &byte, 1);
    }
}

/* The handshake is blocking. */
static bool receive_all(int fd, void *data, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t got = recv(fd, (char *)data + done, size - done, 0);
        if (got == 0 || (got < 0 && errno != EINTR)) {
            return false;
        }
        done += got > 0 ? got : 0;
    }
    return true;
}

static bool send_all(int fd, const void *data, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t sent = send(fd, (const char *)data + done, size - done, MSG_NOSIGNAL);
        if (sent < 0 && errno != EINTR) {
            return false;
        }
        done += sent > 0 ? sent : 0;
    }
    return true;
}

static bool send_option(int fd, uint32_t option, const GByteArray *data)
{
    g_autoptr(GByteArray) message = g_byte_array_new();
    put(message, OPTION_MAGIC, 8);
    put(message, option, 4);
    put(message, data ? data->len : 0, 4);
    if (data) {
        g_byte_array_append(message, data->data, data->len);
    }
    return send_all(fd, message->data, message->len);
}

/* One reply to an option: its type, or -1; INFO_EXPORT fills in the connection. */
static int64_t receive_option_reply(struct connection *connection, uint32_t option)
{
    uint8_t head[20], data[4096];
    if (!receive_all(connection->fd, head, sizeof(head)) || get_64(head) != OPTION_REPLY_MAGIC ||
        get_32(head + 8) != option) {
        return -1;
    }
    uint32_t type = get_32(head + 12), length = get_32(head + 16);
    if (length > sizeof(data) || !receive_all(connection->fd, data, length)) {
        return -1;
    }
    if (type == REPLY_INFO && length >= 12 && get_16(data) == INFO_EXPORT) {
        connection->size = get_64(data + 2);
        connection->flags = get_16(data + 10);
    }
    if (type & 0x80000000) {
        fprintf(stderr, "verify: the server refused option %u: %.*s\n", option, (int)length, data);
    }
    return type;
}

static bool negotiate(struct connection *connection, const char *export, bool structured)
{
    uint8_t head[18];
    if (!receive_all(connection->fd, head, sizeof(head)) || memcmp(head, "NBDMAGICIHAVEOPT", 16) != 0) {
        return false;
    }
    uint32_t client_flags = htobe32(get_16(head + 16) & 3);
    if (!send_all(connection->fd, &client_flags, sizeof(client_flags))) {
        return false;
    }
    if (structured) {
        if (!send_option(connection->fd, OPTION_STRUCTURED_REPLY, NULL) ||
            receive_option_reply(connection, OPTION_STRUCTURED_REPLY) != REPLY_ACK) {
            return false;
        }
    }
    g_autoptr(GByteArray) data = g_byte_array_new();
    put(data, strlen(export), 4);
    g_byte_array_append(data, (const guint8 *)export, strlen(export));
    put(data, 0, 2);
    if (!send_option(connection->fd, OPTION_GO, data)) {
        return false;
    }
    int64_t type;
    do {
        type = receive_option_reply(connection, OPTION_GO);
    } while (type == REPLY_INFO);
    return type == REPLY_ACK;
}

struct connection *connection_open(const char *socket_path, const char *export, bool structured)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(socket_path) >= sizeof(address.sun_path)) {
        errx(4, "%s: too long for a socket", socket_path);
    }
    g_strlcpy(address.sun_path, socket_path, sizeof(address.sun_path));
    struct connection *connection = g_new0(struct connection, 1);
    connection->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    connection->output = g_byte_array_new();
    connection->input = g_byte_array_new();
    connection->failures = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free, NULL);
    if (connect(connection->fd, (struct sockaddr *)&address, sizeof(address)) < 0 ||
        !negotiate(connection, export, structured)) {
        fprintf(stderr, "verify: %s: no connection to export '%s'\n", socket_path, export);
        connection_close(connection, false);
        return NULL;
    }
    fcntl(connection->fd, F_SETFL, O_NONBLOCK);
    return connection;
}

void connection_close(struct connection *connection, bool clean)
{
    if (clean) {
        connection_send(connection, NBD_DISCONNECT, 0, 0, 0, 0, NULL);
        fcntl(connection->fd, F_SETFL, 0);
        send_all(connection->fd, connection->output->data, connection->output->len);
    }
    close(connection->fd);
    g_byte_array_unref(connection->output);
    g_byte_array_unref(connection->input);
    g_hash_table_unref(connection->failures);
    g_free(connection);
}

uint64_t connection_size(const struct connection *connection)
{
    return connection->size;
}

unsigned connection_flags(const struct connection *connection)
{
    return connection->flags;
}

void connection_send(struct connection *connection, unsigned command, unsigned flags, uint64_t cookie, uint64_t offset,
                     uint32_t length, void *data)
{
    put(connection->output, REQUEST_MAGIC, 4);
    put(connection->output, flags, 2);
    put(connection->output, command, 2);
    put(connection->output, cookie, 8);
    put(connection->output, offset, 8);
    put(connection->output, length, 4);
    if (command == NBD_WRITE) {
        g_byte_array_append(connection->output, data, length);
    }
}

static void push_output(struct connection *connection)
{
    while (connection->output->len > 0) {
        ssize_t sent = send(connection->fd, connection->output->data, connection->output->len, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno != EAGAIN && errno != EINTR) {
                connection->closed = true;
            }
            return;
        }
        g_byte_array_remove_range(connection->output, 0, sent);
    }
}

static void pull_input(struct connection *connection)
{
    static uint8_t buffer[1 << 18];
    for (;;) {
        ssize_t got = recv(connection->fd, buffer, sizeof(buffer), 0);
        if (got > 0) {
            g_byte_array_append(connection->input, buffer, got);
        } else {
            if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
                connection->closed = true;
            }
            return;
        }
    }
}

/* The data or the hole of one chunk into the buffer of its read. */
static void place_chunk(unsigned type, const uint8_t *payload, uint32_t length, const struct connection_read *read)
{
    if (length < 8 || (type == CHUNK_HOLE && length != 12)) {
        errx(5, "the server sent a chunk of the wrong length");
    }
    uint64_t offset = get_64(payload);
    uint32_t size = type == CHUNK_HOLE ? get_32(payload + 8) : length - 8;
    if (offset < read->offset || offset - read->offset > read->length ||
        size > read->length - (offset - read->offset)) {
        errx(5, "the server sent a chunk outside its request");
    }
    uint8_t *to = read->data + (offset - read->offset);
    if (type == CHUNK_HOLE) {
        memset(to, 0, size);
    } else {
        memcpy(to, payload + 8, size);
    }
}

/* Parses one message if it is whole: 1 a reply is complete, 0 a chunk of one, -1 more bytes are needed. */
static int parse(struct connection *connection, uint64_t *ret_cookie, uint32_t *ret_error,
                 bool (*find)(void *argument, uint64_t cookie, struct connection_read *ret), void *argument)
{
    const uint8_t *data = connection->input->data + connection->input_used;
    size_t left = connection->input->len - connection->input_used;
    struct connection_read read;
    if (left < 16) {
        return -1;
    }
    uint64_t cookie = *ret_cookie = get_64(data + 8);
    if (get_32(data) == SIMPLE_REPLY_MAGIC) {
        *ret_error = get_32(data + 4);
        size_t need = 16;
        if (*ret_error == 0 && find(argument, cookie, &read)) {
            need += read.length;
            if (left < need) {
                return -1;
            }
            memcpy(read.data, data + 16, read.length);
        }
        connection->input_used += need;
        return 1;
    }
    if (get_32(data) != STRUCTURED_REPLY_MAGIC) {
        errx(5, "the server sent a reply with the magic number 0x%x", get_32(data));
    }
    if (left < 20) {
        return -1;
    }
    unsigned flags = get_16(data + 4), type = get_16(data + 6);
    uint32_t length = get_32(data + 16);
    if (length > MAX_REPLY) {
        errx(5, "the server sent a chunk of %u bytes", length);
    }
    if (left < 20 + (size_t)length) {
        return -1;
    }
    if (type & CHUNK_IS_ERROR) {
        uint64_t *key = g_memdup2(&cookie, sizeof(cookie));
        g_hash_table_insert(connection->failures, key, GUINT_TO_POINTER(length >= 4 ? get_32(data + 20) : EIO));
    } else if (type == CHUNK_DATA || type == CHUNK_HOLE) {
        if (!find(argument, cookie, &read)) {
            errx(5, "the server sent data for a request that is no read");
        }
        place_chunk(type, data + 20, length, &read);
    } else if (type != CHUNK_NONE) {
        errx(5, "the server sent a chunk of type %u", type);
    }
    connection->input_used += 20 + length;
    if (!(flags & CHUNK_DONE)) {
        return 0;
    }
    *ret_error = GPOINTER_TO_UINT(g_hash_table_lookup(connection->failures, &cookie));
    g_hash_table_remove(connection->failures, &cookie);
    return 1;
}

int connection_receive(struct connection *connection, int timeout_ms, uint64_t *ret_cookie, uint32_t *ret_error,
                       bool (*find)(void *argument, uint64_t cookie, struct connection_read *ret), void *argument)
{
    for (;;) {
        int result;
        do {
            result = parse(connection, ret_cookie, ret_error, find, argument);
        } while (result == 0);
        if (result > 0) {
            return 1;
        }
        g_byte_array_remove_range(connection->input, 0, connection->input_used);
        connection->input_used = 0;
        if (connection->closed) {
            return -1;
        }
        push_output(connection);
        struct pollfd poll_fd = {connection->fd, POLLIN | (connection->output->len ? POLLOUT : 0), 0};
        int ready = poll(&poll_fd, 1, timeout_ms);
        if (ready == 0 || (ready < 0 && errno == EINTR)) {
            return 0;
        }
        push_output(connection);
        pull_input(connection);
    }
}

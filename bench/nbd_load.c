/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A load generator for NBD servers: keeps `depth` requests in flight on each of some connections, one thread per
 * connection, and checks what it reads. Knows nothing of Interlock; plain blocking sockets. Invariants:
 * 1. the image is made of blocks of 4 KiB, each of which says at both ends which block it is and which run wrote it,
 *    and between them repeats one pattern: a reply that is mixed up, torn or stale is seen;
 * 2. one send and one receive move as many requests and replies as there are, so that the client is not what is
 *    measured;
 * 3. offsets come from a generator with a fixed seed: every server gets the same ones.
 * Prints one line of JSON. It is no test of the protocol: it asks for what a well-behaved client asks for.
 */
#include "export/nbd/nbd_format.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096u
#define DEPTH_MAX 128u
#define REQUEST_BYTES_MAX (1024u * 1024)
#define RECEIVE_ROOM (4u * 1024 * 1024)
#define CONNECTIONS_MAX 64u

enum mode { MODE_FILL, MODE_READ, MODE_WRITE, MODE_MIXED };

static struct {
    const char *socket_path, *host, *port, *export;
    enum mode mode;
    bool random, structured, verify, until_input_ends;
    uint32_t bytes, depth, connections;
    double seconds;
    uint64_t seed;
    uint64_t size; /* of the export, as the server says */
} config = {.export = "", .structured = true, .bytes = BLOCK, .depth = 1, .connections = 1, .seconds = 1, .seed = 1};

struct slot {
    uint64_t offset;
    double sent;
    uint8_t *payload; /* writes */
    bool busy, write;
};

struct connection {
    pthread_t thread;
    int fd;
    unsigned index;
    uint64_t random_state, next; /* next: sequential offset */
    uint64_t begin, end;         /* of a sequential walk */
    bool exhausted;              /* a fill that has reached its end */
    struct slot slots[DEPTH_MAX];
    unsigned free_slots[DEPTH_MAX], free_count;
    struct nbd_request_header headers[DEPTH_MAX];
    struct iovec iov[2 * DEPTH_MAX];
    uint8_t *buffer;
    size_t at, filled;
    uint64_t done;
    uint32_t *latencies_us; /* histogram */
};
#define LATENCY_BUCKETS 100000u

static uint8_t pattern[BLOCK];
static atomic_uchar *written; /* one per block: this run wrote it */
static atomic_bool stop;

static void die(const char *what)
{
    fprintf(stderr, "nbd_load: %s%s%s\n", what, errno ? ": " : "", errno ? strerror(errno) : "");
    exit(1);
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static uint64_t mix(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* ---- content ---- */

static void block_stamp(uint8_t *block, uint64_t offset, uint64_t seed)
{
    uint64_t stamp[2] = {offset, seed};

    memcpy(block, stamp, sizeof(stamp));
    memcpy(block + BLOCK - sizeof(stamp), stamp, sizeof(stamp));
}

static void block_complain(const uint8_t *block, uint64_t offset, const char *what)
{
    uint64_t stamps[4];

    memcpy(stamps, block, 16);
    memcpy(stamps + 2, block + BLOCK - 16, 16);
    fprintf(stderr,
            "nbd_load: wrong content at %llu (%s): begins as block %llu of run %llu, ends as block %llu of run %llu\n",
            (unsigned long long)offset, what, (unsigned long long)stamps[0], (unsigned long long)stamps[1],
            (unsigned long long)stamps[2], (unsigned long long)stamps[3]);
    exit(2);
}

/* `seed` 0: the fill or this run's. Both ends, or every byte. */
static void block_check(const uint8_t *block, uint64_t offset, const uint64_t *seed, bool whole)
{
    uint64_t head[2], tail[2];

    memcpy(head, block, sizeof(head));
    memcpy(tail, block + BLOCK - sizeof(tail), sizeof(tail));
    if (head[0] != offset || tail[0] != offset || head[1] != tail[1] || (seed && head[1] != *seed)) {
        block_complain(block, offset, seed ? "not what was written last" : "not this block");
    }
    if (whole && memcmp(block + 16, pattern + 16, BLOCK - 32)) {
        block_complain(block, offset, "damaged inside");
    }
}

/* ---- handshake ---- */

static void send_all(int fd, const void *data, size_t bytes)
{
    while (bytes) {
        ssize_t n = send(fd, data, bytes, MSG_NOSIGNAL);

        if (n <= 0) {
            die("send");
        }
        data = (const char *)data + n;
        bytes -= (size_t)n;
    }
}

static void receive_all(int fd, void *data, size_t bytes)
{
    while (bytes) {
        ssize_t n = recv(fd, data, bytes, MSG_WAITALL);

        if (n <= 0) {
            errno = n ? errno : 0;
            die("the server closed the connection");
        }
        data = (char *)data + n;
        bytes -= (size_t)n;
    }
}

static int connect_socket(void)
{
    int fd, one = 1, room = 4 * 1024 * 1024;

    if (config.socket_path) {
        struct sockaddr_un address = {.sun_family = AF_UNIX};

        g_strlcpy(address.sun_path, config.socket_path, sizeof(address.sun_path));
        fd = socket(AF_UNIX, SOCK_STREAM, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
            die(config.socket_path);
        }
    } else {
        struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;

        if (getaddrinfo(config.host, config.port, &hints, &found)) {
            die("unknown host");
        }
        fd = socket(found->ai_family, SOCK_STREAM, 0);
        if (fd < 0 || connect(fd, found->ai_addr, found->ai_addrlen) < 0) {
            die(config.host);
        }
        freeaddrinfo(found);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    }
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
    return fd;
}

static void send_option(int fd, uint32_t option, const void *data, size_t bytes)
{
    struct nbd_option_header header = {htobe64(NBD_OPTION_MAGIC), htobe32(option), htobe32((uint32_t)bytes)};

    send_all(fd, &header, sizeof(header));
    send_all(fd, data, bytes);
}

/* Receives replies up to the last one; what INFO says goes to config. False: the server does not know the option. */
static bool receive_option_replies(int fd)
{
    for (;;) {
        struct nbd_option_reply_header reply;
        uint8_t data[8192];
        uint32_t type, bytes;

        receive_all(fd, &reply, sizeof(reply));
        type = be32toh(reply.type);
        bytes = be32toh(reply.bytes);
        errno = 0;
        if (be64toh(reply.magic) != NBD_OPTION_REPLY_MAGIC || bytes > sizeof(data)) {
            die("not an option reply");
        }
        receive_all(fd, data, bytes);
        if (type == NBD_REP_INFO && bytes == sizeof(struct nbd_info_export) && !data[0] && !data[1]) {
            struct nbd_info_export info;

            memcpy(&info, data, sizeof(info));
            config.size = be64toh(info.size);
        } else if (type == NBD_REP_ACK) {
            return true;
        } else if (type == NBD_REP_ERR_UNSUP) {
            return false;
        } else if (type & 0x80000000u) {
            fprintf(stderr, "nbd_load: the server says: %.*s\n", (int)bytes, data);
            exit(1);
        }
    }
}

static int connect_export(void)
{
    int fd = connect_socket();
    struct nbd_greeting greeting;
    uint32_t flags = htobe32(NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES);
    uint8_t go[NBD_STRING_MAX + 6] = {0};
    uint32_t name_bytes = (uint32_t)strlen(config.export);
    uint32_t length = htobe32(name_bytes);

    receive_all(fd, &greeting, sizeof(greeting));
    errno = 0;
    if (be64toh(greeting.magic) != NBD_MAGIC || be64toh(greeting.option_magic) != NBD_OPTION_MAGIC) {
        die("not an NBD server");
    }
    send_all(fd, &flags, sizeof(flags));
    if (config.structured) {
        send_option(fd, NBD_OPT_STRUCTURED_REPLY, "", 0);
        receive_option_replies(fd);
    }
    memcpy(go, &length, sizeof(length));
    memcpy(go + sizeof(length), config.export, name_bytes);
    send_option(fd, NBD_OPT_GO, go, name_bytes + 6);
    errno = 0;
    if (!receive_option_replies(fd)) {
        die("the server does not know NBD_OPT_GO");
    }
    return fd;
}

/* ---- load ---- */

static bool choose_offset(struct connection *connection, uint64_t *ret)
{
    if (config.random) {
        *ret = mix(&connection->random_state) % (config.size / config.bytes) * config.bytes;
        return true;
    }
    if (connection->next + config.bytes > connection->end) {
        if (config.mode == MODE_FILL) {
            return false;
        }
        connection->next = connection->begin;
    }
    *ret = connection->next;
    connection->next += config.bytes;
    return true;
}

/* Mixed: a toss for each request. */
static bool choose_write(struct connection *connection)
{
    return config.mode == MODE_MIXED ? mix(&connection->random_state) & 1 : config.mode != MODE_READ;
}

static void prepare_payload(struct slot *slot)
{
    uint64_t seed = config.mode == MODE_FILL ? 0 : config.seed;

    for (uint32_t at = 0; at < config.bytes; at += BLOCK) {
        block_stamp(slot->payload + at, slot->offset + at, seed);
        if (config.mode != MODE_FILL) {
            atomic_store_explicit(&written[(slot->offset + at) / BLOCK], 1, memory_order_relaxed);
        }
    }
}

static void send_vector(int fd, struct iovec *iov, unsigned count)
{
    while (count) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = count};
        ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL);

        if (n < 0) {
            die("sendmsg");
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
}

/* A request on every free slot, all of them with one call. */
static void send_requests(struct connection *connection)
{
    unsigned iovs = 0, headers = 0;
    double time = now();

    while (connection->free_count && !connection->exhausted) {
        unsigned index = connection->free_slots[connection->free_count - 1];
        struct slot *slot = &connection->slots[index];
        struct nbd_request_header *header = &connection->headers[headers];

        if (!choose_offset(connection, &slot->offset)) {
            connection->exhausted = true;
            break;
        }
        connection->free_count--;
        headers++;
        slot->sent = time;
        slot->busy = true;
        slot->write = choose_write(connection);
        *header = (struct nbd_request_header){htobe32(NBD_REQUEST_MAGIC),
                                              0,
                                              htobe16(slot->write ? NBD_CMD_WRITE : NBD_CMD_READ),
                                              htobe64(index),
                                              htobe64(slot->offset),
                                              htobe32(config.bytes)};
        connection->iov[iovs++] = (struct iovec){header, sizeof(*header)};
        if (slot->write) {
            prepare_payload(slot);
            connection->iov[iovs++] = (struct iovec){slot->payload, config.bytes};
        }
    }
    send_vector(connection->fd, connection->iov, iovs);
}

static struct slot *slot_of(struct connection *connection, uint64_t cookie)
{
    errno = 0;
    if (cookie >= config.depth || !connection->slots[cookie].busy) {
        die("a reply to nothing");
    }
    return &connection->slots[cookie];
}

static void slot_done(struct connection *connection, uint64_t cookie, double time)
{
    struct slot *slot = slot_of(connection, cookie);
    double us = (time - slot->sent) * 1e6;

    slot->busy = false;
    connection->free_slots[connection->free_count++] = (unsigned)cookie;
    connection->done++;
    connection->latencies_us[us < LATENCY_BUCKETS - 1 ? (unsigned)us : LATENCY_BUCKETS - 1]++;
}

static void check_data(const uint8_t *data, uint64_t offset, uint64_t bytes)
{
    for (uint64_t at = 0; at + BLOCK <= bytes; at += BLOCK) {
        /* Mixed: the image may hold anything that this run has not written. */
        if (config.mode != MODE_MIXED || atomic_load(&written[(offset + at) / BLOCK])) {
            block_check(data + at, offset + at, config.mode == MODE_MIXED ? &config.seed : NULL, false);
        }
    }
}

/* One whole reply or chunk from `have` bytes; returns its length, or 0 if it is not whole yet. */
static size_t take_simple(struct connection *connection, const uint8_t *bytes, size_t have, double time)
{
    const struct nbd_simple_reply *reply = (const void *)bytes;
    size_t whole = sizeof(*reply);

    errno = 0;
    if (have < whole) {
        return 0;
    }
    uint64_t cookie = be64toh(reply->cookie);
    bool write = slot_of(connection, cookie)->write;

    whole += write ? 0 : config.bytes;
    if (reply->error) {
        errno = (int)be32toh(reply->error);
        die("the server answered with an error");
    }
    if (have < whole) {
        return 0;
    }
    if (!write) {
        check_data(bytes + sizeof(*reply), slot_of(connection, cookie)->offset, config.bytes);
    }
    slot_done(connection, cookie, time);
    return whole;
}

static size_t take_chunk(struct connection *connection, const uint8_t *bytes, size_t have, double time)
{
    const struct nbd_chunk *chunk = (const void *)bytes;
    size_t whole;

    if (have < sizeof(*chunk) || have < (whole = sizeof(*chunk) + be32toh(chunk->bytes))) {
        return 0;
    }
    uint64_t cookie = be64toh(chunk->cookie);

    errno = 0;
    switch (be16toh(chunk->type)) {
    case NBD_CHUNK_NONE:
        break;
    case NBD_CHUNK_OFFSET_DATA:
        slot_of(connection, cookie);
        const struct nbd_body_data *body = (const void *)(chunk + 1);

        check_data((const uint8_t *)(body + 1), be64toh(body->offset), whole - sizeof(*chunk) - sizeof(*body));
        break;
    default:
        die("the server answered with an error or a hole where there is data");
    }
    if (be16toh(chunk->flags) & NBD_CHUNK_DONE) {
        slot_done(connection, cookie, time);
    }
    return whole;
}

/* Receives once, and takes every whole reply. */
static void receive_replies(struct connection *connection)
{
    size_t chunk_max = config.bytes + 64;

    if (connection->at == connection->filled) {
        connection->at = connection->filled = 0;
    } else if (RECEIVE_ROOM - connection->filled < chunk_max) {
        memmove(connection->buffer, connection->buffer + connection->at, connection->filled - connection->at);
        connection->filled -= connection->at;
        connection->at = 0;
    }
    ssize_t n = recv(connection->fd, connection->buffer + connection->filled, RECEIVE_ROOM - connection->filled, 0);

    if (n <= 0) {
        errno = n ? errno : 0;
        die("the server closed the connection");
    }
    connection->filled += (size_t)n;
    double time = now();

    for (;;) {
        const uint8_t *bytes = connection->buffer + connection->at;
        size_t have = connection->filled - connection->at, took;
        uint32_t magic = 0;

        if (have < sizeof(magic)) {
            return;
        }
        memcpy(&magic, bytes, sizeof(magic));
        errno = 0;
        if (magic == htobe32(NBD_SIMPLE_REPLY_MAGIC)) {
            took = take_simple(connection, bytes, have, time);
        } else if (magic == htobe32(NBD_CHUNK_MAGIC)) {
            took = take_chunk(connection, bytes, have, time);
        } else {
            die("not a reply");
        }
        if (!took) {
            return;
        }
        connection->at += took;
    }
}

static void disconnect(struct connection *connection)
{
    struct nbd_request_header header = {htobe32(NBD_REQUEST_MAGIC), 0, htobe16(NBD_CMD_DISC), 0, 0, 0};

    send_all(connection->fd, &header, sizeof(header));
    close(connection->fd);
}

static void *connection_run(void *argument)
{
    struct connection *connection = argument;

    while (!atomic_load_explicit(&stop, memory_order_relaxed) && !connection->exhausted) {
        send_requests(connection);
        if (connection->free_count < config.depth) {
            receive_replies(connection);
        }
    }
    while (connection->free_count < config.depth) {
        receive_replies(connection);
    }
    return NULL;
}

static void connection_prepare(struct connection *connection, unsigned index)
{
    uint64_t share = config.size / config.connections / REQUEST_BYTES_MAX * REQUEST_BYTES_MAX;

    connection->index = index;
    connection->random_state = config.seed * 1000 + index;
    connection->begin = connection->next = index * share;
    connection->end = index + 1 == config.connections ? config.size : connection->begin + share;
    connection->buffer = g_malloc(RECEIVE_ROOM);
    connection->latencies_us = g_malloc0_n(LATENCY_BUCKETS, sizeof(uint32_t));
    for (unsigned i = 0; i < config.depth; i++) {
        connection->free_slots[connection->free_count++] = config.depth - 1 - i;
        if (config.mode != MODE_READ) {
            connection->slots[i].payload = g_malloc(config.bytes);
            for (uint32_t at = 0; at < config.bytes; at += BLOCK) {
                memcpy(connection->slots[i].payload + at, pattern, BLOCK);
            }
        }
    }
}

/* Reads the whole export and compares every byte. */
static void verify_all(void)
{
    uint32_t piece = 256 * 1024;
    uint8_t *data = g_malloc(piece);
    bool structured = config.structured;

    config.structured = false;
    int fd = connect_export();
    config.structured = structured;
    for (uint64_t offset = 0; offset < config.size; offset += piece) {
        uint32_t bytes = (uint32_t)(config.size - offset < piece ? config.size - offset : piece);
        struct nbd_request_header header = {
            htobe32(NBD_REQUEST_MAGIC), 0, htobe16(NBD_CMD_READ), 0, htobe64(offset), htobe32(bytes)};
        struct nbd_simple_reply reply;

        send_all(fd, &header, sizeof(header));
        receive_all(fd, &reply, sizeof(reply));
        errno = (int)be32toh(reply.error);
        if (errno) {
            die("the server answered with an error");
        }
        receive_all(fd, data, bytes);
        for (uint32_t at = 0; at + BLOCK <= bytes; at += BLOCK) {
            uint64_t block = offset + at;
            bool ours = atomic_load(&written[block / BLOCK]);

            /* What this run did not write is of the fill or of an earlier run. */
            block_check(data + at, block, ours ? &config.seed : NULL, true);
        }
    }
    close(fd);
    g_free(data);
}

static double percentile_us(struct connection *connections, uint64_t total, double part)
{
    uint64_t seen = 0;

    for (unsigned us = 0; us < LATENCY_BUCKETS; us++) {
        for (unsigned i = 0; i < config.connections; i++) {
            seen += connections[i].latencies_us[us];
        }
        if (seen >= (uint64_t)((double)total * part)) {
            return us;
        }
    }
    return LATENCY_BUCKETS;
}

static void usage(void)
{
    fputs(
        "usage: nbd_load --unix PATH | --tcp HOST:PORT  --export NAME  --mode fill|read|write|mixed\n"
        "                [--random] [--block BYTES] [--depth N] [--connections N] [--seconds S | --until-input-ends]\n"
        "                [--seed N] [--simple] [--verify]\n"
        "fill writes the whole export once; mixed reads and writes one at a time, whatever the export holds;\n"
        "--until-input-ends says `connected` first; --verify reads all of it back after a run and compares every "
        "byte\n",
        stderr);
    exit(1);
}

static void parse_mode(const char *name)
{
    static const char *const names[] = {"fill", "read", "write", "mixed"};

    for (unsigned i = 0; i < G_N_ELEMENTS(names); i++) {
        if (strcmp(names[i], name) == 0) {
            config.mode = (enum mode)i;
            return;
        }
    }
    usage();
}

static void parse_options(int argc, char **argv)
{
    static const struct option options[] = {
        {"unix", 1, 0, 'u'},
        {"tcp", 1, 0, 't'},
        {"export", 1, 0, 'e'},
        {"mode", 1, 0, 'm'},
        {"random", 0, 0, 'r'},
        {"block", 1, 0, 'b'},
        {"depth", 1, 0, 'd'},
        {"connections", 1, 0, 'c'},
        {"seconds", 1, 0, 's'},
        {"seed", 1, 0, 'S'},
        {"simple", 0, 0, 'p'},
        {"verify", 0, 0, 'v'},
        {"until-input-ends", 0, 0, 'i'},
        {0, 0, 0, 0},
    };
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case 'u':
            config.socket_path = optarg;
            break;
        case 't':
            config.host = optarg;
            config.port = strrchr(optarg, ':');
            if (!config.port) {
                usage();
            }
            *(char *)config.port++ = 0;
            break;
        case 'e':
            config.export = optarg;
            break;
        case 'm':
            parse_mode(optarg);
            break;
        case 'r':
            config.random = true;
            break;
        case 'b':
            config.bytes = (uint32_t)g_ascii_strtoull(optarg, NULL, 10);
            break;
        case 'd':
            config.depth = (uint32_t)g_ascii_strtoull(optarg, NULL, 10);
            break;
        case 'c':
            config.connections = (uint32_t)g_ascii_strtoull(optarg, NULL, 10);
            break;
        case 's':
            config.seconds = g_ascii_strtod(optarg, NULL);
            break;
        case 'S':
            config.seed = g_ascii_strtoull(optarg, NULL, 10);
            break;
        case 'p':
            config.structured = false;
            break;
        case 'v':
            config.verify = true;
            break;
        case 'i':
            config.until_input_ends = true;
            break;
        default:
            usage();
        }
    }
    if ((!config.socket_path && !config.host) || config.bytes % BLOCK || !config.bytes ||
        config.bytes > REQUEST_BYTES_MAX || !config.depth || config.depth > DEPTH_MAX || !config.connections ||
        config.connections > CONNECTIONS_MAX || !config.seed ||
        (config.mode == MODE_MIXED && (config.depth > 1 || config.connections > 1 || config.verify)) ||
        strlen(config.export) > NBD_STRING_MAX) {
        usage();
    }
}

int main(int argc, char **argv)
{
    uint64_t total = 0, state = 42;
    double begin, end;

    parse_options(argc, argv);
    for (unsigned i = 0; i < BLOCK; i++) {
        pattern[i] = (uint8_t)(mix(&state) | 1);
    }
    struct connection *connections = g_malloc0_n(config.connections, sizeof(*connections));

    for (unsigned i = 0; i < config.connections; i++) {
        connections[i].fd = connect_export();
    }
    errno = 0;
    if (config.size < (uint64_t)config.bytes * config.connections) {
        die("the export is too small");
    }
    written = g_malloc0_n(config.size / BLOCK + 1, 1);
    for (unsigned i = 0; i < config.connections; i++) {
        connection_prepare(&connections[i], i);
    }
    begin = now();
    for (unsigned i = 0; i < config.connections; i++) {
        pthread_create(&connections[i].thread, NULL, connection_run, &connections[i]);
    }
    if (config.until_input_ends) {
        printf("connected\n");
        fflush(stdout);
        while (getchar() != EOF) {
        }
        atomic_store(&stop, true);
    } else if (config.mode != MODE_FILL) {
        struct timespec time = {(time_t)config.seconds,
                                (long)((config.seconds - (double)(time_t)config.seconds) * 1e9)};

        nanosleep(&time, NULL);
        atomic_store(&stop, true);
    }
    for (unsigned i = 0; i < config.connections; i++) {
        pthread_join(connections[i].thread, NULL);
        total += connections[i].done;
    }
    end = now();
    for (unsigned i = 0; i < config.connections; i++) {
        disconnect(&connections[i]);
    }
    if (config.verify) {
        verify_all();
    }
    printf("{\"requests\": %llu, \"seconds\": %.6f, \"per_second\": %.1f, \"mib_per_second\": %.2f, "
           "\"p50_us\": %.0f, \"p99_us\": %.0f, \"verified\": %s}\n",
           (unsigned long long)total, end - begin, (double)total / (end - begin),
           (double)total * config.bytes / (end - begin) / (1 << 20), percentile_us(connections, total, 0.5),
           percentile_us(connections, total, 0.99), config.verify ? "true" : "false");
    return 0;
}

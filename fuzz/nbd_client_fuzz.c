/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fuzzes the `nbd` driver: the input is what a server does. A node is opened on it, several requests are under way at a
 * time, and it is closed; the server is a coroutine of the same loop.
 *
 * 1. Nothing that a server says, and no moment at which it goes, may crash, hang or leave a request without an end.
 * 2. An extent that the driver reports is inside what was asked for.
 *
 * The first byte chooses how the server begins (enum mode), the rest is taken as it goes on: what it says of its
 * export, and for each request one byte of how that is answered (server_answer()), with what follows as material. A
 * server whose input has ended hangs up; one that is connected to again is honest.
 */
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/drivers.h"
#include "driver/format/qcow2_testing.h"
#include "export/nbd/nbd_format.h"
#include "loop/connection.h"
#include "loop/loop.h"
#include "loop/sync.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerInitialize(int *argc, char ***argv);

enum {
    DISK = 1 << 20,
    INPUT_MAX = 64 << 10,
    PATIENCE = 200, /* turns without a request after which the client waits for something that will not come */
    USERS = 4,
    CONTEXT = 7, /* its number */
};

enum mode {
    MODE_RAW = 1 << 0,        /* all is the input, the greeting too */
    MODE_STRUCTURED = 1 << 1, /* structured replies are accepted, */
    MODE_CONTEXT = 1 << 2,    /* and base:allocation */
    MODE_ODD_EXPORT = 1 << 3, /* size, flags and block sizes are the input's */
    MODE_ODD_OPTIONS = 1 << 4,
    MODE_RECONNECT = 1 << 5,
};

struct server {
    const uint8_t *at, *end; /* what is left of the input */
    unsigned mode;
    bool honest;
    unsigned clients;
    struct co_group serving;
    uint8_t facts[22]; /* of an odd export: what was said of it first */
};

struct reply {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie;
    uint32_t bytes;
} NBD_WIRE;

static struct loop *loop;
static struct server *server; /* of the input that runs */
static char *listener_name;
static uint8_t disk[DISK];

/* --- the input --- */

static bool input_is_over(void)
{
    return server->at == server->end;
}

static uint8_t input_byte(void)
{
    return input_is_over() ? 0 : *server->at++;
}

static void input_bytes(void *to, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        ((uint8_t *)to)[i] = input_byte();
    }
}

/* --- the server --- */

static bool coroutine_fn say(struct connection *connection, const void *data, size_t bytes)
{
    struct iovec iov = {(void *)data, bytes};
    return bytes == 0 || connection_send(connection, buffers_one(&iov), bytes) == 0;
}

/* As much of the input as its next byte says. */
static bool coroutine_fn say_input(struct connection *connection)
{
    uint8_t memory[255], bytes = input_byte();
    input_bytes(memory, bytes);
    return say(connection, memory, bytes);
}

/* Receives all of it, unless the client waits. */
static bool coroutine_fn hear(struct connection *connection, void *to, size_t bytes)
{
    uint8_t peek;
    for (unsigned i = 0;
         bytes && recv(connection_fd(connection), &peek, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN; i++) {
        if (i == PATIENCE) {
            return false;
        }
        coroutine_pause();
    }
    return connection_receive_all(connection, to, bytes) == 0;
}

static bool coroutine_fn say_option(struct connection *connection, uint32_t option, uint32_t type, const void *data,
                                    uint32_t bytes)
{
    struct {
        uint64_t magic;
        uint32_t option, type, bytes;
    } NBD_WIRE head = {htobe64(NBD_OPTION_REPLY_MAGIC), htobe32(option), htobe32(type), htobe32(bytes)};
    return say(connection, &head, sizeof(head)) && say(connection, data, bytes);
}

static bool coroutine_fn say_export(struct connection *connection)
{
    bool odd = server->mode & MODE_ODD_EXPORT;
    struct {
        uint16_t type;
        uint64_t size;
        uint16_t flags;
    } NBD_WIRE info = {htobe16(NBD_INFO_EXPORT), htobe64(DISK), htobe16(0x0dff & ~NBD_FLAG_READ_ONLY)};
    struct {
        uint16_t type;
        uint32_t minimum, preferred, maximum;
    } NBD_WIRE blocks = {htobe16(NBD_INFO_BLOCK_SIZE), htobe32(1), htobe32(4096), htobe32(32 << 20)};
    if (odd) {
        if (!server->honest) {
            input_bytes(server->facts, sizeof(server->facts));
        }
        memcpy(&info.size, server->facts, sizeof(info.size) + sizeof(info.flags));
        memcpy(&blocks.minimum, server->facts + 10, 3 * sizeof(blocks.minimum));
    }
    return say_option(connection, NBD_OPT_GO, NBD_REP_INFO, &info, sizeof(info)) &&
           (!odd || say_option(connection, NBD_OPT_GO, NBD_REP_INFO, &blocks, sizeof(blocks))) &&
           say_option(connection, NBD_OPT_GO, NBD_REP_ACK, NULL, 0);
}

static bool coroutine_fn say_context(struct connection *connection)
{
    struct {
        uint32_t id;
        char name[sizeof(NBD_CONTEXT_ALLOCATION) - 1];
    } NBD_WIRE context = {.id = htobe32(CONTEXT)};
    memcpy(context.name, NBD_CONTEXT_ALLOCATION, sizeof(context.name));
    return say_option(connection, NBD_OPT_SET_META_CONTEXT, NBD_REP_META_CONTEXT, &context, sizeof(context)) &&
           say_option(connection, NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, NULL, 0);
}

static bool coroutine_fn shake_hands(struct connection *connection)
{
    struct nbd_greeting greeting = {htobe64(NBD_MAGIC), htobe64(NBD_OPTION_MAGIC),
                                    htobe16(NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES)};
    uint8_t data[512];
    uint32_t flags;
    if (!say(connection, &greeting, sizeof(greeting)) || !hear(connection, &flags, sizeof(flags))) {
        return false;
    }
    for (;;) {
        struct nbd_option_header option;
        if (!hear(connection, &option, sizeof(option)) || be32toh(option.bytes) > sizeof(data) ||
            !hear(connection, data, be32toh(option.bytes))) {
            return false;
        }
        uint32_t number = be32toh(option.option);
        bool ok = true;
        if (server->mode & MODE_ODD_OPTIONS && !server->honest && input_byte() % 4 == 0) {
            ok = say_input(connection);
        } else if (number == NBD_OPT_GO) {
            return say_export(connection);
        } else if (number == NBD_OPT_STRUCTURED_REPLY && server->mode & MODE_STRUCTURED) {
            ok = say_option(connection, number, NBD_REP_ACK, NULL, 0);
        } else if (number == NBD_OPT_SET_META_CONTEXT && server->mode & MODE_CONTEXT) {
            ok = say_context(connection);
        } else {
            ok = say_option(connection, number, NBD_REP_ERR_UNSUP, NULL, 0);
        }
        if (!ok) {
            return false;
        }
    }
}

static bool coroutine_fn say_simple(struct connection *connection, uint64_t cookie, uint32_t error)
{
    struct nbd_simple_reply reply = {htobe32(NBD_SIMPLE_REPLY_MAGIC), htobe32(error), cookie};
    return say(connection, &reply, sizeof(reply));
}

static bool coroutine_fn say_chunk(struct connection *connection, uint64_t cookie, unsigned type, unsigned flags,
                                   const void *data, uint32_t bytes)
{
    struct reply chunk = {htobe32(NBD_CHUNK_MAGIC), htobe16((uint16_t)flags), htobe16((uint16_t)type), cookie,
                          htobe32(bytes)};
    return say(connection, &chunk, sizeof(chunk)) && say(connection, data, bytes);
}

static bool coroutine_fn answer_honestly(struct connection *connection, const struct nbd_request_header *request)
{
    uint64_t offset = be64toh(request->offset);
    uint32_t bytes = be32toh(request->bytes);
    bool inside = offset <= DISK && bytes <= DISK - offset;
    if (be16toh(request->type) == NBD_CMD_READ && !inside) {
        struct {
            uint32_t error;
            uint16_t bytes;
        } NBD_WIRE body = {htobe32(NBD_EINVAL), 0};
        return server->mode & MODE_STRUCTURED
                   ? say_chunk(connection, request->cookie, NBD_CHUNK_ERROR, NBD_CHUNK_DONE, &body, sizeof(body))
                   : say_simple(connection, request->cookie, NBD_EINVAL);
    }
    switch (be16toh(request->type)) {
    case NBD_CMD_READ:
        if (server->mode & MODE_STRUCTURED) {
            uint64_t wire = request->offset;
            struct reply chunk = {htobe32(NBD_CHUNK_MAGIC), htobe16(NBD_CHUNK_DONE), htobe16(NBD_CHUNK_OFFSET_DATA),
                                  request->cookie, htobe32(8 + bytes)};
            return say(connection, &chunk, sizeof(chunk)) && say(connection, &wire, sizeof(wire)) &&
                   say(connection, disk + offset, bytes);
        }
        return say_simple(connection, request->cookie, 0) && say(connection, disk + offset, bytes);
    case NBD_CMD_BLOCK_STATUS: {
        uint32_t body[3] = {htobe32(CONTEXT), htobe32(bytes), 0};
        return say_chunk(connection, request->cookie, NBD_CHUNK_BLOCK_STATUS, NBD_CHUNK_DONE, body, sizeof(body));
    }
    default:
        return say_simple(connection, request->cookie, 0);
    }
}

/* Up to four chunks; of any type, length and content. */
static bool coroutine_fn answer_in_chunks(struct connection *connection, uint64_t cookie)
{
    static const uint16_t types[] = {NBD_CHUNK_NONE,         NBD_CHUNK_OFFSET_DATA, NBD_CHUNK_OFFSET_HOLE,
                                     NBD_CHUNK_BLOCK_STATUS, NBD_CHUNK_ERROR,       NBD_CHUNK_ERROR_OFFSET};
    bool ok = true;
    for (unsigned i = input_byte() % 4 + 1; ok && i; i--) {
        uint8_t data[255], kind = input_byte(), bytes = input_byte();
        unsigned type = kind % 8 < G_N_ELEMENTS(types) ? types[kind % 8] : kind << 8 | bytes;
        input_bytes(data, bytes);
        ok = say_chunk(connection, cookie, type, kind >> 7, data, bytes);
    }
    return ok;
}

static bool coroutine_fn answer_extents(struct connection *connection, uint64_t cookie)
{
    uint32_t body[1 + 2 * 16] = {htobe32(CONTEXT)};
    unsigned words = input_byte() % (G_N_ELEMENTS(body) - 1);
    input_bytes(body + 1, words * sizeof(body[0]));
    return say_chunk(connection, cookie, NBD_CHUNK_BLOCK_STATUS, NBD_CHUNK_DONE, body, (1 + words) * sizeof(body[0]));
}

/* False: it hangs up. */
static bool coroutine_fn server_answer(struct connection *connection, const struct nbd_request_header *request)
{
    if (server->honest) {
        return answer_honestly(connection, request);
    }
    if (input_is_over()) {
        return false;
    }
    switch (input_byte() % 16) {
    case 0:
        return false;
    case 1:
        return say_simple(connection, request->cookie, input_byte());
    case 2:
        return say_simple(connection, htobe64(input_byte()), 0);
    case 3:
        return say_input(connection);
    case 4:
    case 5:
        return answer_in_chunks(connection, request->cookie);
    case 6:
        return answer_extents(connection, request->cookie);
    case 7:
        return true; /* no answer */
    case 8:
        return answer_honestly(connection, request) && say_input(connection);
    default:
        return answer_honestly(connection, request);
    }
}

static void coroutine_fn serve_requests(struct connection *connection)
{
    g_autofree uint8_t *payload = g_malloc(DISK);
    struct nbd_request_header request;
    do {
        if (!hear(connection, &request, sizeof(request)) || be16toh(request.type) == NBD_CMD_DISC) {
            return;
        }
        /* Whatever it was told of sizes, the driver's requests are the users' and no longer. */
        if (be16toh(request.type) == NBD_CMD_WRITE) {
            g_assert_cmpuint(be32toh(request.bytes), <=, DISK);
            if (!hear(connection, payload, be32toh(request.bytes))) {
                return;
            }
        }
    } while (server_answer(connection, &request));
}

static void serve_entry(void *argument)
{
    struct connection *connection = argument;
    server->honest = server->clients++ > 0;
    if (server->mode & MODE_RAW && !server->honest) {
        say(connection, server->at, (size_t)(server->end - server->at));
        server->at = server->end;
    } else if (shake_hands(connection)) {
        serve_requests(connection);
    }
    connection_close(connection);
    co_group_leave(&server->serving);
}

static void accept_entry(void *argument)
{
    struct listener *listener = argument;
    struct connection *connection;
    while (listener_accept(listener, &connection) == 0) {
        if (server) {
            co_group_enter(&server->serving);
            coroutine_enter(coroutine_create(serve_entry, connection));
        } else {
            connection_close(connection);
        }
    }
}

/* --- the client --- */

struct user {
    struct backend *backend;
    unsigned number;
    struct co_group *group;
};

static void user_entry(void *argument)
{
    const struct user *user = argument;
    struct backend *backend = user->backend;
    uint64_t size = backend_size(backend), place = size / USERS * user->number;
    uint64_t bytes = MIN(size - place, 700 + 5000 * (uint64_t)user->number);
    g_autofree uint8_t *memory = g_malloc0(bytes + 1);
    struct iovec iov = {memory, bytes};
    struct extent extent;
    for (unsigned round = 0; round < 2; round++) {
        (void)backend_read(backend, place, bytes, buffers_one(&iov), 0);
        (void)backend_write(backend, place, bytes, buffers_one(&iov), round ? REQUEST_FUA : 0);
        if (bytes && backend_block_status(backend, NULL, place, size - place, &extent) == 0) {
            g_assert_true(extent.bytes > 0 && extent.bytes <= size - place);
        }
        (void)backend_write_zeroes(backend, place, bytes, round ? REQUEST_MAY_UNMAP : REQUEST_NO_FALLBACK);
        (void)backend_discard(backend, place, bytes);
        (void)backend_flush(backend);
    }
    co_group_leave(user->group);
}

static void coroutine_fn use(struct backend *backend)
{
    struct user users[USERS];
    struct co_group group;
    co_group_init(&group);
    for (unsigned i = 0; i < USERS; i++) {
        users[i] = (struct user){backend, i, &group};
        co_group_enter(&group);
        coroutine_enter(coroutine_create(user_entry, &users[i]));
    }
    co_group_wait(&group);
    co_group_destroy(&group);
}

static void run_input(void *argument)
{
    struct server *current = argument;
    struct graph *graph = graph_create();
    auto_error error = NULL;
    co_group_init(&current->serving);
    server = current;
    struct node *node =
        testing_add(graph, &error,
                    "{\"driver\":\"nbd\",\"node-name\":\"n\",\"discard\":\"unmap\",\"reconnect-delay\":%d,"
                    "\"server\":{\"type\":\"unix\",\"abstract\":true,\"path\":\"%s\"}}",
                    current->mode & MODE_RECONNECT ? 1 : 0, listener_name);
    if (node) {
        struct backend *backend = testing_backend(graph, node);
        use(backend);
        backend_destroy(backend);
        if (graph_delete(graph, "n", NULL) < 0) {
            abort();
        }
    }
    graph_destroy(graph);
    co_group_wait(&current->serving);
    co_group_destroy(&current->serving);
    server = NULL;
}

static void drop_message(const char *domain, GLogLevelFlags level, const char *message, void *argument)
{
    if (level & (G_LOG_LEVEL_ERROR | G_LOG_LEVEL_CRITICAL)) {
        abort();
    }
}

static void listen_entry(void *argument)
{
    struct address address = {.kind = ADDRESS_UNIX, .path = listener_name, .abstract = true};
    struct listener *listener;
    if (listener_open(&address, &listener, NULL) < 0) {
        abort();
    }
    coroutine_enter(coroutine_create(accept_entry, listener));
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    g_log_set_default_handler(drop_message, NULL);
    testing_register_drivers();
    driver_register(&driver_nbd);
    if (loop_create(ENGINE_EPOLL, &loop, NULL) < 0) {
        abort();
    }
    listener_name = g_strdup_printf("interlock-nbd-client-fuzz-%d", (int)getpid());
    loop_run_coroutine(loop, listen_entry, NULL);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (bytes > 0 && bytes <= INPUT_MAX) {
        struct server current = {.at = data + 1, .end = data + bytes, .mode = data[0]};
        loop_run_coroutine(loop, run_input, &current);
    }
    return 0;
}

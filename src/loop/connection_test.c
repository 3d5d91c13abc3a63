/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Connections and listeners: addresses, echo over unix and internet sockets and pipes, big transfers,
 * shutdown from everywhere, stale socket files, moving to another loop; on both engines.
 */
#include "base/size.h"
#include "loop/connection.h"
#include "loop/sync.h"
#include "loop/test_support.h"
#include "loop/worker.h"
#include <errno.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static void test_address(void)
{
    static const struct {
        const char *text, *formatted;
    } good[] = {
        {"unix:/a/b", "unix:/a/b"},   {"/a/b", "unix:/a/b"},
        {"unix:@name", "unix:@name"}, {"localhost:10809", "localhost:10809"},
        {"[::1]:80", "[::1]:80"},     {":80", ":80"},
    };
    static const char *const bad[] = {"", "unix:", "unix:@", "host", "host:", "::1:80", "[::1:80", "[]:80"};

    for (size_t i = 0; i < array_size(good); i++) {
        struct address address;

        g_assert_cmpint(address_parse(good[i].text, &address, NULL), ==, 0);
        g_autofree char *formatted = address_format(&address);
        g_assert_cmpstr(formatted, ==, good[i].formatted);
        address_clear(&address);
    }
    for (size_t i = 0; i < array_size(bad); i++) {
        struct address address;
        struct error *err = NULL;

        g_assert_cmpint(address_parse(bad[i], &address, &err), <, 0);
        g_assert_nonnull(err);
        error_free(err);
    }
    g_autofree char *long_path = g_strnfill(200, 'x');
    g_autofree char *long_text = g_strdup_printf("unix:/%s", long_path);
    struct address address;
    g_assert_cmpint(address_parse(long_text, &address, NULL), ==, -ENAMETOOLONG);
}

/* A server on another loop that sends everything back. */
struct server {
    struct listener *listener;
    struct loop *loop;
    struct co_group group;
    struct address address;
};

struct serve {
    struct server *server;
    struct connection *connection;
};

static void echo_entry(void *argument)
{
    struct serve *serve = argument;
    char buffer[65536];
    ssize_t r;

    while ((r = connection_receive(serve->connection, buffer, sizeof(buffer))) > 0) {
        struct iovec iov[2] = {{buffer, (size_t)r / 2}, {buffer + r / 2, (size_t)(r - r / 2)}};

        if (connection_send(serve->connection, (struct buffers){iov, 2, 0}, (size_t)r) < 0) {
            break;
        }
    }
    connection_close(serve->connection);
    co_group_leave(&serve->server->group);
    g_free(serve);
}

static void accept_entry(void *argument)
{
    struct server *server = argument;
    struct connection *connection;
    int r;

    while ((r = listener_accept(server->listener, &connection)) == 0) {
        struct serve *serve = g_new(struct serve, 1);

        *serve = (struct serve){server, connection};
        co_group_enter(&server->group);
        coroutine_enter(coroutine_create(echo_entry, serve));
    }
    g_assert_cmpint(r, ==, -ECANCELED);
    listener_close(server->listener);
    co_group_leave(&server->group);
}

struct start {
    struct server *server;
    struct co_group *group;
};

static void server_start_entry(void *argument)
{
    struct start *start = argument;
    struct error *err = NULL;
    struct server *server = start->server;

    g_assert_cmpint(listener_open(&server->address, &server->listener, &err), ==, 0);
    co_group_leave(start->group);
    accept_entry(server);
}

static void server_start(struct server *server, const char *text)
{
    struct co_group started;
    struct start start = {server, &started};

    g_assert_cmpint(address_parse(text, &server->address, NULL), ==, 0);
    g_assert_cmpint(loop_thread_start("server", test_kind, &server->loop, NULL), ==, 0);
    co_group_init(&server->group);
    co_group_init(&started);
    co_group_enter(&server->group);
    co_group_enter(&started);
    loop_spawn(server->loop, server_start_entry, &start);
    co_group_wait(&started);
    co_group_destroy(&started);
    g_autofree char *where = listener_address(server->listener);
    address_clear(&server->address);
    g_assert_cmpint(address_parse(where, &server->address, NULL), ==, 0);
}

static void server_stop(struct server *server)
{
    listener_shutdown(server->listener);
    co_group_wait(&server->group);
    co_group_destroy(&server->group);
    loop_thread_join(server->loop);
    address_clear(&server->address);
}

static char *test_path(const char *name)
{
    return g_strdup_printf("%s/interlock-%d-%s.sock", g_get_tmp_dir(), (int)getpid(), name);
}

#define BIG_BYTES (3 * MiB + 17)

struct sender {
    struct connection *connection;
    char *data;
    struct co_group group;
};

static void sender_entry(void *argument)
{
    struct sender *sender = argument;
    struct iovec iov = {sender->data, BIG_BYTES};

    g_assert_cmpint(connection_send(sender->connection, buffers_one(&iov), BIG_BYTES), ==, 0);
    co_group_leave(&sender->group);
}

static void echo_check(struct server *server)
{
    struct sender sender = {NULL, g_malloc(BIG_BYTES), {0}};
    g_autofree char *back = g_malloc(BIG_BYTES);
    struct iovec ping = {"ping", 4};
    char pong[4];

    g_assert_cmpint(connection_open(&server->address, &sender.connection, NULL), ==, 0);
    g_autofree char *peer = connection_peer(sender.connection);
    g_assert_cmpuint(strlen(peer), >, 3);
    for (int i = 0; i < 500; i++) {
        g_assert_cmpint(connection_send(sender.connection, buffers_one(&ping), 4), ==, 0);
        memset(pong, 0, 4);
        g_assert_cmpint(connection_receive_all(sender.connection, pong, 4), ==, 0);
        g_assert_cmpmem(pong, 4, "ping", 4);
    }
    for (size_t i = 0; i < BIG_BYTES; i++) {
        sender.data[i] = (char)(i * 7 + i / 4096);
    }
    co_group_init(&sender.group);
    co_group_enter(&sender.group);
    coroutine_enter(coroutine_create(sender_entry, &sender));
    g_assert_cmpint(connection_receive_all(sender.connection, back, BIG_BYTES), ==, 0);
    co_group_wait(&sender.group);
    co_group_destroy(&sender.group);
    g_assert_true(!memcmp(back, sender.data, BIG_BYTES));
    connection_close(sender.connection);
    g_free(sender.data);
}

static void echo_unix(void *argument)
{
    struct server server;
    g_autofree char *path = test_path("echo");

    server_start(&server, path);
    echo_check(&server);
    server_stop(&server);
    g_assert_cmpint(access(path, F_OK), <, 0);
}

static void echo_abstract(void *argument)
{
    struct server server;
    g_autofree char *name = g_strdup_printf("unix:@interlock-test-%d", (int)getpid());

    server_start(&server, name);
    echo_check(&server);
    server_stop(&server);
}

static void echo_inet(void *argument)
{
    struct server server;

    server_start(&server, "127.0.0.1:0");
    echo_check(&server);
    server_stop(&server);
}

static void connect_refused(void *argument)
{
    struct connection *connection;
    struct error *err = NULL;
    g_autofree char *path = test_path("nobody");
    struct address address = {.kind = ADDRESS_UNIX, .path = path};

    g_assert_cmpint(connection_open(&address, &connection, &err), ==, -ENOENT);
    g_assert_nonnull(strstr(err->message, path));
    error_free(err);
    err = NULL;
    struct address inet;
    g_assert_cmpint(address_parse("127.0.0.1:1", &inet, NULL), ==, 0);
    g_assert_cmpint(connection_open(&inet, &connection, &err), ==, -ECONNREFUSED);
    error_free(err);
    address_clear(&inet);
}

static void stale_socket(void *argument)
{
    g_autofree char *path = test_path("stale");
    struct address address = {.kind = ADDRESS_UNIX, .path = path};
    struct listener *first, *second;
    struct error *err = NULL;

    g_assert_cmpint(listener_open(&address, &first, NULL), ==, 0);
    g_assert_cmpint(listener_open(&address, &second, &err), ==, -EADDRINUSE);
    g_assert_nonnull(err->hint);
    error_free(err);
    listener_shutdown(first);
    /* Nobody accepts on it any more, though the file is still there. */
    g_assert_cmpint(access(path, F_OK), ==, 0);
    g_assert_cmpint(listener_open(&address, &second, NULL), ==, 0);
    listener_close(first);
    g_assert_cmpint(access(path, F_OK), ==, 0); /* the second one's */
    listener_close(second);
    g_assert_cmpint(access(path, F_OK), <, 0);
    listener_close(NULL);
    connection_close(NULL);
    /* A plain file is nobody's stale socket. */
    g_assert_true(g_file_set_contents(path, "x", 1, NULL));
    g_assert_cmpint(listener_open(&address, &first, NULL), ==, -EEXIST);
    unlink(path);
}

static void inherited_listener(void *argument)
{
    g_autofree char *path = test_path("inherited");
    struct address address = {.kind = ADDRESS_UNIX, .path = path}, inherited = {.kind = ADDRESS_FD};
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    struct listener *listener;
    struct connection *client, *accepted;
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    g_strlcpy(name.sun_path, path, sizeof(name.sun_path));
    inherited.fd = fd;
    g_assert_cmpint(bind(fd, (struct sockaddr *)&name, sizeof(name)), ==, 0);
    g_assert_cmpint(listener_open(&inherited, &listener, NULL), ==, -EINVAL);
    g_assert_cmpint(listen(fd, 1), ==, 0);
    g_assert_cmpint(listener_open(&inherited, &listener, NULL), ==, 0);
    g_assert_cmpint(connection_open(&address, &client, NULL), ==, 0);
    g_assert_cmpint(listener_accept(listener, &accepted), ==, 0);
    connection_close(client);
    connection_close(accepted);
    listener_close(listener);
    g_assert_cmpint(unlink(path), ==, 0);
}

/* ---- shutdown ---- */

struct victim {
    struct connection *connection;
    struct co_group group;
    ssize_t received;
    int sent;
};

static void victim_receive(void *argument)
{
    struct victim *victim = argument;
    char byte;

    victim->received = connection_receive(victim->connection, &byte, 1);
    co_group_leave(&victim->group);
}

static void victim_send(void *argument)
{
    struct victim *victim = argument;
    g_autofree char *data = g_malloc0(BIG_BYTES);
    struct iovec iov = {data, BIG_BYTES};

    victim->sent = connection_send(victim->connection, buffers_one(&iov), BIG_BYTES);
    co_group_leave(&victim->group);
}

static int shutdown_work(void *argument)
{
    usleep(2000);
    connection_shutdown(argument);
    connection_shutdown(argument);
    return 0;
}

static void shutdown_check(int input, int output, bool from_worker)
{
    struct victim victim = {.connection = connection_from_fds(input, output)};
    char byte;

    co_group_init(&victim.group);
    co_group_enter(&victim.group);
    co_group_enter(&victim.group);
    coroutine_enter(coroutine_create(victim_receive, &victim));
    coroutine_enter(coroutine_create(victim_send, &victim));
    loop_sleep_ns(NULL, 2000000);
    if (from_worker) {
        worker_run(shutdown_work, victim.connection);
    } else {
        connection_shutdown(victim.connection);
    }
    co_group_wait(&victim.group);
    co_group_destroy(&victim.group);
    g_assert_cmpint(victim.received, ==, -ECANCELED);
    g_assert_cmpint(victim.sent, ==, -ECANCELED);
    g_assert_cmpint(connection_receive(victim.connection, &byte, 1), ==, -ECANCELED);
    connection_close(victim.connection);
}

static void shutdown_wakes(void *argument)
{
    for (int i = 0; i < 20; i++) {
        int pair[2], there[2], back[2];

        g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), ==, 0);
        shutdown_check(pair[0], pair[0], i % 2);
        close(pair[1]);
        g_assert_cmpint(pipe(there), ==, 0);
        g_assert_cmpint(pipe(back), ==, 0);
        shutdown_check(there[0], back[1], i % 2);
        close(there[1]);
        close(back[0]);
    }
}

/* A shutdown whose task is still on its way when the connection is closed. */
static void shutdown_then_close(void *argument)
{
    for (int i = 0; i < 50; i++) {
        int pair[2];

        g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), ==, 0);
        struct connection *connection = connection_from_fds(pair[0], pair[0]);
        connection_shutdown(connection);
        connection_close(connection);
        close(pair[1]);
    }
}

static void end_of_stream(void *argument)
{
    int pair[2];
    char bytes[4];
    struct iovec iov = {bytes, 4};

    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), ==, 0);
    struct connection *connection = connection_from_fds(pair[0], pair[0]);
    g_assert_cmpint(write(pair[1], "ab", 2), ==, 2);
    close(pair[1]);
    g_assert_cmpint(connection_receive_all(connection, bytes, 4), ==, -ECONNRESET);
    g_assert_cmpint(connection_receive(connection, bytes, 4), ==, 0);
    g_assert_cmpint(connection_send(connection, buffers_one(&iov), 4), ==, -EPIPE);
    connection_close(connection);
}

static int slow_write_work(void *argument)
{
    usleep(3000);
    g_assert_cmpint(write(*(int *)argument, "hello", 5), ==, 5);
    return 0;
}

struct slow_write {
    int fd;
    struct co_group group;
};

static void slow_write_entry(void *argument)
{
    struct slow_write *slow = argument;

    worker_run(slow_write_work, &slow->fd);
    co_group_leave(&slow->group);
}

static void slow_write_start(struct slow_write *slow, int fd)
{
    slow->fd = fd;
    co_group_init(&slow->group);
    co_group_enter(&slow->group);
    coroutine_enter(coroutine_create(slow_write_entry, slow));
}

static void slow_write_finish(struct slow_write *slow)
{
    co_group_wait(&slow->group);
    co_group_destroy(&slow->group);
}

static void pipes(void *argument)
{
    int there[2], back[2];
    char bytes[5];
    struct iovec iov = {"olleh", 5};
    struct slow_write slow;

    g_assert_cmpint(pipe(there), ==, 0);
    g_assert_cmpint(pipe(back), ==, 0);
    struct connection *connection = connection_from_fds(there[0], back[1]);
    slow_write_start(&slow, there[1]);
    g_assert_cmpint(connection_receive_all(connection, bytes, 5), ==, 0);
    slow_write_finish(&slow);
    g_assert_cmpmem(bytes, 5, "hello", 5);
    g_assert_cmpint(connection_send(connection, buffers_one(&iov), 5), ==, 0);
    g_assert_cmpint(read(back[0], bytes, 5), ==, 5);
    close(there[1]);
    g_assert_cmpint(connection_receive(connection, bytes, 5), ==, 0);
    connection_close(connection);
    close(back[0]);
}

/* ---- moving ---- */

static void moved_entry(void *argument)
{
    struct serve *serve = argument;
    struct iovec iov = {"moved", 5};
    char byte;

    g_assert_cmpint(connection_receive(serve->connection, &byte, 1), ==, 1);
    g_assert_cmpint(connection_send(serve->connection, buffers_one(&iov), 5), ==, 0);
    g_assert_cmpint(connection_receive(serve->connection, &byte, 1), ==, -ECANCELED);
    connection_close(serve->connection);
    co_group_leave(&serve->server->group);
}

static void moving(void *argument)
{
    struct server server;
    struct slow_write slow;
    int pair[2];
    char bytes[5];

    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), ==, 0);
    g_assert_cmpint(loop_thread_start("other", test_kind, &server.loop, NULL), ==, 0);
    co_group_init(&server.group);
    co_group_enter(&server.group);
    struct serve serve = {&server, connection_from_fds(pair[0], pair[0])};
    struct connection *client = connection_from_fds(pair[1], pair[1]);
    struct iovec iov = {"x", 1};
    /* The engine knows it already when it moves. */
    slow_write_start(&slow, pair[1]);
    g_assert_cmpint(connection_receive_all(serve.connection, bytes, 5), ==, 0);
    slow_write_finish(&slow);
    connection_move(serve.connection, server.loop);
    loop_spawn(server.loop, moved_entry, &serve);
    loop_sleep_ns(NULL, 2000000);
    g_assert_cmpint(connection_send(client, buffers_one(&iov), 1), ==, 0);
    g_assert_cmpint(connection_receive_all(client, bytes, 5), ==, 0);
    g_assert_cmpmem(bytes, 5, "moved", 5);
    loop_sleep_ns(NULL, 2000000);
    connection_shutdown(serve.connection);
    co_group_wait(&server.group);
    co_group_destroy(&server.group);
    connection_close(client);
    loop_thread_join(server.loop);
}

/* ---- no descriptors left ---- */

struct starved {
    struct listener *listener;
    struct connection *accepted;
    struct co_group group;
};

static void starved_entry(void *argument)
{
    struct starved *starved = argument;

    g_assert_cmpint(listener_accept(starved->listener, &starved->accepted), ==, 0);
    co_group_leave(&starved->group);
}

static void accept_starved(void *argument)
{
    g_autofree char *path = test_path("starved");
    struct address address = {.kind = ADDRESS_UNIX, .path = path};
    struct starved starved;
    struct connection *client;
    struct rlimit saved, none;

    g_assert_cmpint(listener_open(&address, &starved.listener, NULL), ==, 0);
    g_assert_cmpint(connection_open(&address, &client, NULL), ==, 0);
    getrlimit(RLIMIT_NOFILE, &saved);
    none = saved;
    none.rlim_cur = 3;
    setrlimit(RLIMIT_NOFILE, &none);
    co_group_init(&starved.group);
    co_group_enter(&starved.group);
    int64_t start = loop_clock_ns();
    coroutine_enter(coroutine_create(starved_entry, &starved));
    loop_sleep_ns(NULL, 20000000);
    setrlimit(RLIMIT_NOFILE, &saved);
    co_group_wait(&starved.group);
    co_group_destroy(&starved.group);
    g_assert_cmpint(loop_clock_ns() - start, >=, 90000000);
    connection_close(starved.accepted);
    connection_close(client);
    listener_close(starved.listener);
}

/* Descriptors travel with the first byte; more than are wanted end nothing but the call, and none stays open. */
static void descriptors(void *argument)
{
    int ends[2], pipe_ends[2], got[2];
    char text[8];
    unsigned count;

    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), ==, 0);
    g_assert_cmpint(pipe(pipe_ends), ==, 0);
    struct connection *one = connection_from_fds(ends[0], ends[0]), *other = connection_from_fds(ends[1], ends[1]);

    g_assert_cmpint(connection_send_with_fd(one, "abcd", 4, pipe_ends[1]), ==, 0);
    g_assert_cmpint(connection_send_with_fd(one, "efgh", 4, pipe_ends[1]), ==, 0);
    g_assert_cmpint(connection_send_with_fd(one, "ijkl", 4, pipe_ends[1]), ==, 0);
    close(pipe_ends[1]);
    g_assert_cmpint(connection_receive_with_fds(other, text, 4, got, 2, &count), ==, 0);
    g_assert_cmpmem(text, 4, "abcd", 4);
    g_assert_cmpuint(count, ==, 1);
    g_assert_cmpint(write(got[0], "x", 1), ==, 1);
    close(got[0]);
    g_assert_cmpint(connection_receive_with_fds(other, text, 4, got, 0, &count), ==, -EPROTO);
    g_assert_cmpuint(count, ==, 0);
    g_assert_cmpint(connection_receive_all(other, text, 4), ==, 0); /* without asking for what came along */
    g_assert_cmpmem(text, 4, "ijkl", 4);
    g_assert_cmpint(read(pipe_ends[0], text, 8), ==, 1);
    g_assert_cmpint(read(pipe_ends[0], text, 8), ==, 0); /* the last descriptor of its other end is closed */
    connection_close(one);
    g_assert_cmpint(connection_receive_with_fds(other, text, 4, got, 2, &count), ==, -ECONNRESET);
    connection_close(other);
    struct connection *pipes_have_none = connection_from_fds(pipe_ends[0], pipe_ends[0]);
    g_assert_cmpint(connection_receive_with_fds(pipes_have_none, text, 4, got, 2, &count), ==, -ENOTSUP);
    connection_close(pipes_have_none);
}

/* ---- peers that answer soon: before the loop would sleep, while it looks for them, and just after ---- */

#define PEERS 12 /* more than are looked for */
#define QUESTIONS 400

struct soon {
    int fd; /* the peer's, blocking */
    unsigned seed;
    struct connection *connection;
    struct co_group *group;
    uint64_t answers;
};

static void pause_us(unsigned us)
{
    for (int64_t end_ns = loop_clock_ns() + us * 1000; loop_clock_ns() < end_ns;) {
    }
}

static void *answer_soon(void *argument)
{
    struct soon *peer = argument;
    g_autoptr(GRand) chance = g_rand_new_with_seed(peer->seed);
    uint64_t question;

    while (recv(peer->fd, &question, sizeof(question), MSG_WAITALL) == sizeof(question)) {
        pause_us((unsigned)g_rand_int_range(chance, 0, 60));
        question++;
        g_assert_cmpint(send(peer->fd, &question, sizeof(question), 0), ==, sizeof(question));
    }
    return NULL;
}

static void ask_entry(void *argument)
{
    struct soon *peer = argument;
    char answer[64];

    for (uint64_t i = 0; i < QUESTIONS; i++) {
        struct iovec iov = {&i, sizeof(i)};
        uint64_t received;

        g_assert_cmpint(connection_send(peer->connection, buffers_one(&iov), sizeof(i)), ==, 0);
        g_assert_cmpint(connection_receive(peer->connection, answer, sizeof(answer)), ==, sizeof(received));
        memcpy(&received, answer, sizeof(received));
        g_assert_cmpuint(received, ==, i + 1);
        peer->answers++;
    }
    co_group_leave(peer->group);
}

static int short_work(void *argument)
{
    pause_us(20);
    return 0;
}

static void answers_come_soon(void *argument)
{
    struct soon peers[PEERS];
    GThread *threads[PEERS];
    struct co_group group;

    co_group_init(&group);
    for (unsigned i = 0; i < PEERS; i++) {
        int ends[2];

        g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), ==, 0);
        peers[i] = (struct soon){ends[1], i, connection_from_fds(ends[0], ends[0]), &group, 0};
        threads[i] = g_thread_new("peer", answer_soon, &peers[i]);
        co_group_enter(&group);
        coroutine_enter(coroutine_create(ask_entry, &peers[i]));
    }
    for (int i = 0; i < 200; i++) { /* others have something to do meanwhile */
        g_assert_cmpint(worker_run(short_work, NULL), ==, 0);
    }
    co_group_wait(&group);
    co_group_destroy(&group);
    for (unsigned i = 0; i < PEERS; i++) {
        g_assert_cmpuint(peers[i].answers, ==, QUESTIONS);
        connection_close(peers[i].connection);
        g_thread_join(threads[i]);
        close(peers[i].fd);
    }
}

struct cut_off {
    struct connection *connection;
    unsigned us;
};

static void *cut_off_soon(void *argument)
{
    const struct cut_off *cut = argument;

    pause_us(cut->us);
    connection_shutdown(cut->connection);
    return NULL;
}

static void shutdown_comes_soon(void *argument)
{
    for (unsigned i = 0; i < 300; i++) {
        int ends[2];
        char byte;

        g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), ==, 0);
        struct cut_off cut = {connection_from_fds(ends[0], ends[0]), i % 60};
        GThread *thread = g_thread_new("cut", cut_off_soon, &cut);

        g_assert_cmpint(connection_receive(cut.connection, &byte, 1), ==, -ECANCELED);
        g_thread_join(thread);
        connection_close(cut.connection);
        close(ends[1]);
    }
}

static int64_t cpu_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int talk_slowly(void *argument)
{
    for (int i = 0; i < 50; i++) {
        usleep(2000);
        g_assert_cmpint(write(*(int *)argument, "x", 1), ==, 1);
    }
    return 0;
}

struct talk {
    int fd;
    struct co_group group;
};

static void talk_entry(void *argument)
{
    struct talk *talk = argument;

    worker_run(talk_slowly, &talk->fd);
    co_group_leave(&talk->group);
}

static void who_comes_rarely_costs_little(void *argument)
{
    int ends[2];
    char byte[2];

    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), ==, 0);
    struct connection *connection = connection_from_fds(ends[0], ends[0]);
    int64_t start_ns = cpu_ns();

    struct talk talk = {.fd = ends[1]};
    co_group_init(&talk.group);
    co_group_enter(&talk.group);
    coroutine_enter(coroutine_create(talk_entry, &talk));
    for (ssize_t bytes = 0, r; bytes < 50; bytes += r) {
        r = connection_receive(connection, byte, sizeof(byte));
        g_assert_cmpint(r, >, 0);
    }
    co_group_wait(&talk.group);
    co_group_destroy(&talk.group);
    g_assert_cmpint(cpu_ns() - start_ns, <, 20000000); /* of 100 ms */
    close(ends[1]);
    g_assert_cmpint(connection_receive(connection, byte, sizeof(byte)), ==, 0);
    connection_close(connection);
}

int main(int argc, char **argv)
{
    static const struct loop_case cases[] = {
        {"echo-unix", echo_unix},
        {"echo-abstract", echo_abstract},
        {"echo-inet", echo_inet},
        {"connect-refused", connect_refused},
        {"stale-socket", stale_socket},
        {"inherited-listener", inherited_listener},
        {"shutdown-wakes", shutdown_wakes},
        {"shutdown-then-close", shutdown_then_close},
        {"end-of-stream", end_of_stream},
        {"pipes", pipes},
        {"moving", moving},
        {"accept-starved", accept_starved},
        {"descriptors", descriptors},
        {"answers-come-soon", answers_come_soon},
        {"shutdown-comes-soon", shutdown_comes_soon},
        {"who-comes-rarely-costs-little", who_comes_rarely_costs_little},
    };

    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/connection/address", test_address);
    test_add_loop_cases("connection", cases, array_size(cases));
    return g_test_run();
}

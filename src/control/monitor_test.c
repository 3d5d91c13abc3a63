/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Tests of monitor.c and session.c: a monitor on one end of a socket pair, a client coroutine on the other, and a small
 * command table of the test's own. Everything runs on one loop, the client being one more coroutine.
 */
#include "control/json_stream.h"
#include "control/monitor.h"
#include "control/session.h"
#include "loop/loop.h"
#include "schema/commands.h"
#include "schema/events.h"

#include <errno.h>
#include <glib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define SECOND_NS ((int64_t)1000000000)
#define GREETING "QMP"
#define NEGOTIATE "{\"execute\":\"qmp_capabilities\"}"
#define NEGOTIATE_OOB "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\"]}}"

/* The client's side. */
struct client {
    struct control control;
    struct monitor *monitor;
    struct connection *connection;
    struct json_stream *stream;
    char bytes[4096];
};

static struct loop *loop;

/* Commands of the test */

static struct coroutine *blocked; /* the one that test-block has put to sleep */
static unsigned blocks_begun;

static int coroutine_fn dispatch_block(struct control *control, json_t *arguments, json_t **ret, struct error **err)
{
    g_assert(!blocked);
    blocks_begun++;
    blocked = coroutine_self();
    coroutine_yield();
    *ret = json_string("unblocked");
    return 0;
}

/* Turns of the loop in which everything that can happen without us does. */
static void coroutine_fn settle(void)
{
    struct loop_sleep sleep = {NULL};
    loop_sleep_ns(&sleep, SECOND_NS / 50);
}

static void coroutine_fn wait_blocked(void)
{
    while (!blocked) {
        settle();
    }
}

static void coroutine_fn unblock(void)
{
    wait_blocked();
    coroutine_wake(g_steal_pointer(&blocked));
}

static int coroutine_fn dispatch_echo(struct control *control, json_t *arguments, json_t **ret, struct error **err)
{
    *ret = json_incref(arguments);
    return 0;
}

static int coroutine_fn dispatch_fail(struct control *control, json_t *arguments, json_t **ret, struct error **err)
{
    struct error *error = NULL;
    error_set_class(&error, ERROR_DEVICE_NOT_FOUND, -ENOENT, "no \xff here");
    error_hint(&error, "look there");
    error->data = json_pack("{s:i}", "n", 1);
    return error_move(err, error);
}

static int coroutine_fn dispatch_big(struct control *control, json_t *arguments, json_t **ret, struct error **err)
{
    g_autofree char *text = g_strnfill(256 * 1024, 'x');
    *ret = json_string(text);
    return 0;
}

static int coroutine_fn dispatch_schema(struct control *control, json_t *arguments, json_t **ret, struct error **err)
{
    return command_query_qmp_schema(control, ret, err);
}

static const struct command commands[] = {
    {.name = "qmp_capabilities"},
    {.name = "query-qmp-schema", .dispatch = dispatch_schema},
    {.name = "test-big", .dispatch = dispatch_big},
    {.name = "test-block", .dispatch = dispatch_block},
    {.name = "test-echo", .dispatch = dispatch_echo, .allow_oob = true},
    {.name = "test-fail", .dispatch = dispatch_fail},
};

/* The client */

static void coroutine_fn client_connect(struct client *client)
{
    int fds[2];
    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds), ==, 0);
    client->connection = connection_from_fds(fds[0], fds[0]);
    client->stream = json_stream_create();
    struct monitor_config config = {.id = "test", .connection = connection_from_fds(fds[1], fds[1])};
    struct error *error = NULL;
    g_assert_cmpint(monitor_open(&client->control, &config, &client->monitor, &error), ==, 0);
}

static void coroutine_fn client_close(struct client *client)
{
    monitor_close(client->monitor);
    g_assert_true(list_is_empty(&client->control.monitors));
    connection_close(client->connection);
    json_stream_destroy(client->stream);
}

static void coroutine_fn client_send_bytes(struct client *client, const char *bytes, size_t size)
{
    struct iovec iov = {(void *)bytes, size};
    g_assert_cmpint(connection_send(client->connection, buffers_one(&iov), size), ==, 0);
}

static void coroutine_fn client_send(struct client *client, const char *text)
{
    client_send_bytes(client, text, strlen(text));
}

/* The next thing that the monitor says, or NULL at the end of the stream. */
static json_t *coroutine_fn client_receive(struct client *client)
{
    while (true) {
        json_t *json = NULL;
        enum json_stream_result result = json_stream_next(client->stream, &json, NULL);
        g_assert_cmpint(result, !=, JSON_STREAM_ERROR);
        if (result == JSON_STREAM_VALUE) {
            return json;
        }
        ssize_t size = connection_receive(client->connection, client->bytes, sizeof(client->bytes));
        if (size <= 0) {
            return NULL;
        }
        json_stream_feed(client->stream, client->bytes, (size_t)size);
    }
}

/* Asserts that the next thing has the member `kind`, with this JSON text inside of it. */
static void coroutine_fn expect(struct client *client, const char *kind, const char *part)
{
    json_t *json = client_receive(client);
    g_assert_nonnull(json);
    char *text = json_dumps(json, JSON_COMPACT | JSON_SORT_KEYS);
    if (!json_object_get(json, kind) || !strstr(text, part)) {
        g_error("expected %s with %s, got %s", kind, part, text);
    }
    free(text);
    json_decref(json);
}

static void coroutine_fn exchange(struct client *client, const char *text, const char *kind, const char *part)
{
    client_send(client, text);
    expect(client, kind, part);
}

static void run(void (*test)(void *argument), enum engine_kind engine)
{
    struct error *error = NULL;
    g_assert_cmpint(loop_create(engine, &loop, &error), ==, 0);
    struct client *client = g_new0(struct client, 1);
    control_init(&client->control, loop, commands, G_N_ELEMENTS(commands));
    blocks_begun = 0;
    loop_run_coroutine(loop, test, client);
    g_free(client);
    loop_destroy(loop);
}

/* Tests */

static void coroutine_fn talk(void *argument)
{
    struct client *client = argument;
    client_connect(client);
    expect(client, GREETING, "\"capabilities\":[\"oob\"]");
    exchange(client, "{\"execute\":\"test-echo\"}", "error", "\"CommandNotFound\"");
    exchange(client, "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"x\"]}}", "error",
             "enable[0]: 'x' is not one of oob");
    exchange(client, NEGOTIATE, "return", "{\"return\":{}}");
    exchange(client, NEGOTIATE, "error", "already complete");
    exchange(client, "{\"execute\":\"test-echo\",\"arguments\":{\"a\":1},\"id\":[1,{}]}\n", "return",
             "{\"id\":[1,{}],\"return\":{\"a\":1}}");
    exchange(client, "{'execute':'test-echo','id':null}", "return", "{\"id\":null,\"return\":{}}");
    exchange(client, "{\"execute\":\"nonesuch\",\"id\":7}", "error", "\"id\":7");
    exchange(client, "{\"execute\":\"test-fail\"}", "error", "\"class\":\"DeviceNotFound\",\"data\":{\"n\":1}");
    exchange(client, "{\"exec-oob\":\"test-echo\"}", "error", "'exec-oob' is unexpected");
    exchange(client, "{\"execute\":\"query-qmp-schema\"}", "return", "\"block-commit\"");
    client_close(client);
}

static void coroutine_fn hostile(void *argument)
{
    static const char *const bad[] = {
        "[1]",
        "12 ",
        "\"x\"",
        "null ",
        "}",
        "{\"execute\":12}",
        "{\"arguments\":{}}",
        "{\"execute\":\"test-echo\",\"arguments\":[]}",
        "{\"execute\":\"test-echo\",\"x\":1}",
        "{\"execute\":\"test-echo\",\"exec-oob\":\"test-echo\"}",
        "{\"execute\":\"test-echo\",\"execute\":\"test-echo\"}",
        "{\"execute\":\"test-\n",
        "{\"execute\":\"test\\u0000\"}",
        "{\"execute\":\"\xc3\x28\"}",
        "{\"execute\":[[\xff",
        "{}",
        "{\"execute\":\"\"}",
        "{\"execute\":\"%s%n\"}",
    };
    struct client *client = argument;
    client_connect(client);
    expect(client, GREETING, "version");
    exchange(client, NEGOTIATE, "return", "{}");
    for (unsigned i = 0; i < G_N_ELEMENTS(bad); i++) {
        exchange(client, bad[i], "error", "\"class\":");
        exchange(client, "{\"execute\":\"test-echo\",\"id\":1}", "return", "\"id\":1");
    }
    g_autofree char *deep = g_strnfill(100000, '[');
    client_send(client, deep);
    exchange(client, "\xff", "error", "0xFF");
    exchange(client, "{\"execute\":\"test-echo\",\"id\":2}", "return", "\"id\":2");
    client_close(client);
}

static void coroutine_fn ordered(void *argument)
{
    struct client *client = argument;
    client_connect(client);
    expect(client, GREETING, "version");
    exchange(client, NEGOTIATE_OOB, "return", "{}");
    exchange(client, "{\"exec-oob\":\"test-fail\"}", "error", "cannot be run out of band");
    client_send(client, "{\"execute\":\"test-block\",\"id\":1}{\"execute\":\"test-echo\",\"id\":2}}");
    client_send(client, "{\"exec-oob\":\"test-echo\",\"id\":3}");
    expect(client, "return", "\"id\":3");
    control_emit(&client->control, event_job_status_change("j", JOB_STATUS_RUNNING));
    expect(client, "event", "\"timestamp\":{\"microseconds\":");
    unblock();
    expect(client, "return", "{\"id\":1,\"return\":\"unblocked\"}");
    expect(client, "return", "\"id\":2");
    expect(client, "error", "JSON parse error");
    client_close(client);
}

/* Far more commands than the queue takes, behind one that blocks: all are answered, in order. */
static void coroutine_fn bounded_queue(void *argument)
{
    struct client *client = argument;
    client_connect(client);
    expect(client, GREETING, "version");
    exchange(client, NEGOTIATE_OOB, "return", "{}");
    client_send(client, "{\"execute\":\"test-block\",\"id\":-1}");
    for (int i = 0; i < 300; i++) {
        g_autofree char *text = g_strdup_printf("{\"execute\":\"test-echo\",\"id\":%d}", i);
        client_send(client, text);
    }
    settle();
    /* The reader has stopped: even an out-of-band command has to wait. */
    client_send(client, "{\"exec-oob\":\"test-echo\",\"id\":1000}");
    settle();
    unblock();
    expect(client, "return", "\"id\":-1");
    for (int i = 0, answered = 0; answered < 301; answered++) {
        json_t *json = client_receive(client);
        json_int_t id = json_integer_value(json_object_get(json, "id"));
        g_assert_true(id == 1000 || id == i);
        i += id != 1000;
        json_decref(json);
    }
    client_close(client);
}

/* A client that asks and asks without reading: the executor stops; what is there is delivered when it reads. */
static void coroutine_fn lazy_reader(void *argument)
{
    struct client *client = argument;
    client_connect(client);
    client_send(client, NEGOTIATE);
    for (unsigned i = 0; i < 40; i++) {
        client_send(client, "{\"execute\":\"test-big\"}");
    }
    settle();
    expect(client, GREETING, "version");
    expect(client, "return", "{}");
    for (unsigned i = 0; i < 40; i++) {
        expect(client, "return", "xxx");
    }
    client_close(client);
}

/* A client that does not read events is cut off at a limit, and nobody waits for it. */
static void coroutine_fn deaf_client(void *argument)
{
    struct client *client = argument;
    client_connect(client);
    expect(client, GREETING, "version");
    exchange(client, NEGOTIATE, "return", "{}");
    g_autofree char *reason = g_strnfill(1 << 20, 'x');
    for (unsigned i = 0; i < 20; i++) {
        control_emit(&client->control, event_block_export_deleted(reason));
        settle();
    }
    json_t *json;
    unsigned seen = 0;
    while ((json = client_receive(client))) {
        json_decref(json);
        seen++;
    }
    g_assert_cmpuint(seen, <, 20);
    client_close(client);
}

/* A client that ends its direction is answered; one that vanishes in the middle of a command does no harm. */
static void coroutine_fn half_closed(void *argument)
{
    struct client *client = argument;
    client_connect(client);
    client_send(client, NEGOTIATE "{\"execute\":\"test-block\"}{\"execute\":\"test-echo\",\"id\":1}");
    wait_blocked();
    g_assert_cmpint(shutdown(connection_fd(client->connection), SHUT_WR), ==, 0);
    settle();
    unblock();
    expect(client, GREETING, "version");
    expect(client, "return", "{}");
    expect(client, "return", "unblocked");
    expect(client, "return", "\"id\":1");
    g_assert_null(client_receive(client));
    client_close(client);
}

static void coroutine_fn vanished(void *argument)
{
    struct client *client = argument;
    client_connect(client);
    client_send(client, NEGOTIATE "{\"execute\":\"test-block\"}{\"execute\":\"test-big\"}{\"execute\":\"test-bl");
    wait_blocked();
    g_assert_cmpuint(blocks_begun, ==, 1);
    connection_close(g_steal_pointer(&client->connection));
    settle();
    unblock();
    settle();
    client_close(client);
}

/* Closing lets the running command end and be answered, and begins no other. */
static void unblock_soon(void *argument)
{
    settle();
    unblock();
}

static void coroutine_fn closing(void *argument)
{
    struct client *client = argument;
    client_connect(client);
    expect(client, GREETING, "version");
    exchange(client, NEGOTIATE, "return", "{}");
    client_send(client, "{\"execute\":\"test-block\"}{\"execute\":\"test-block\"}");
    wait_blocked();
    coroutine_enter(coroutine_create(unblock_soon, NULL));
    monitor_close(g_steal_pointer(&client->monitor));
    expect(client, "return", "unblocked");
    g_assert_null(client_receive(client));
    g_assert_cmpuint(blocks_begun, ==, 1);
    client_close(client);
}

/* On a listening socket: clients one after the other, the second waiting for the first. */
static void coroutine_fn listening(void *argument)
{
    struct client *client = argument;
    g_autofree char *directory = g_dir_make_tmp("monitor-test-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(directory, "socket", NULL);
    struct address address = {.kind = ADDRESS_UNIX, .path = path};
    struct monitor_config config = {.id = "test", .address = &address};
    struct error *error = NULL;
    g_assert_cmpint(monitor_open(&client->control, &config, &client->monitor, &error), ==, 0);
    client->stream = json_stream_create();
    g_assert_cmpint(connection_open(&address, &client->connection, &error), ==, 0);
    g_assert_true(monitor_wait_client(client->monitor));
    expect(client, GREETING, "version");
    struct connection *second = NULL;
    g_assert_cmpint(connection_open(&address, &second, &error), ==, 0);
    exchange(client, NEGOTIATE, "return", "{}");
    connection_close(client->connection);
    client->connection = second;
    expect(client, GREETING, "version");
    exchange(client, "{\"execute\":\"test-echo\"}", "error", "CommandNotFound");
    exchange(client, NEGOTIATE, "return", "{}");
    client_close(client);
    g_assert_cmpint(access(path, F_OK), ==, -1);
    rmdir(directory);
}

/* Random bytes around valid commands, in random pieces: the session survives and says something about each. */
static void coroutine_fn noise(void *argument)
{
    static const char alphabet[] = "{}[]\"'\\:, \n1tn\xff\xc3";
    struct client *client = argument;
    client_connect(client);
    expect(client, GREETING, "version");
    exchange(client, NEGOTIATE, "return", "{}");
    for (unsigned round = 0; round < 200; round++) {
        char text[30];
        for (unsigned i = 0; i < sizeof(text); i++) {
            text[i] = alphabet[g_test_rand_int_range(0, sizeof(alphabet))];
        }
        client_send_bytes(client, text, sizeof(text));
        client_send(client, "\xff{\"execute\":\"test-echo\",\"id\":\"end\"}");
        json_t *json;
        bool ended = false;
        while (!ended && (json = client_receive(client))) {
            ended = json_object_get(json, "return") != NULL;
            json_decref(json);
        }
        g_assert_true(ended);
    }
    client_close(client);
}

static const struct {
    const char *name;
    void (*run)(void *argument);
} tests[] = {
    {"talk", talk},
    {"hostile", hostile},
    {"ordered", ordered},
    {"bounded-queue", bounded_queue},
    {"lazy-reader", lazy_reader},
    {"deaf-client", deaf_client},
    {"half-closed", half_closed},
    {"vanished", vanished},
    {"closing", closing},
    {"listening", listening},
    {"noise", noise},
};

/* On the engine that this kernel allows, and on the one that works everywhere. */
static void test_auto(const void *data)
{
    run(tests[GPOINTER_TO_SIZE(data)].run, ENGINE_AUTO);
}

static void test_epoll(const void *data)
{
    run(tests[GPOINTER_TO_SIZE(data)].run, ENGINE_EPOLL);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    for (size_t i = 0; i < G_N_ELEMENTS(tests); i++) {
        g_autofree char *on_auto = g_strdup_printf("/monitor/auto/%s", tests[i].name);
        g_autofree char *on_epoll = g_strdup_printf("/monitor/epoll/%s", tests[i].name);
        g_test_add_data_func(on_auto, GSIZE_TO_POINTER(i), test_auto);
        g_test_add_data_func(on_epoll, GSIZE_TO_POINTER(i), test_epoll);
    }
    return g_test_run();
}

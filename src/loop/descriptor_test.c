/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Waiting for descriptors: each direction, both at once, ends, wakes, many rounds of traffic between two coroutines,
 * and the ways from a connection to a descriptor and back; on both engines. The simulated world says that it has none.
 */
#include "base/size.h"
#include "loop/connection.h"
#include "loop/descriptor.h"
#include "loop/sim.h"
#include "loop/test_support.h"
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define BOTH (DESCRIPTOR_READABLE | DESCRIPTOR_WRITABLE)

static void pair_open(int ends[2])
{
    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends), ==, 0);
}

/* What somebody else does a little later. */
struct later {
    int fd;
    char *to;
    size_t bytes; /* 0: closes fd */
    struct descriptor_wait *wake;
    bool done;
};

static void later_entry(void *argument)
{
    struct later *later = argument;

    loop_sleep_ns(NULL, 2000000);
    later->done = true;
    if (later->wake) {
        descriptor_wait_wake(later->wake);
    } else if (later->to) {
        g_assert_cmpint(read(later->fd, later->to, later->bytes), >, 0);
    } else if (later->bytes) {
        g_assert_cmpint(write(later->fd, "x", 1), ==, 1);
    } else {
        close(later->fd);
    }
}

static void start_later(struct later *later)
{
    loop_spawn(loop_self(), later_entry, later);
}

static void test_directions(void *argument)
{
    struct descriptor_wait *wait;
    char filler[4096] = {0}, *rest = g_malloc(MiB);
    int ends[2];

    pair_open(ends);
    g_assert_cmpint(descriptor_wait_create(ends[0], &wait), ==, 0);
    g_assert_cmpint(descriptor_wait_ready(wait, BOTH), ==, DESCRIPTOR_WRITABLE);

    struct later input = {.fd = ends[1], .bytes = 1};
    start_later(&input);
    g_assert_cmpint(descriptor_wait_ready(wait, DESCRIPTOR_READABLE), ==, DESCRIPTOR_READABLE);
    g_assert_true(input.done);
    g_assert_cmpint(descriptor_wait_ready(wait, BOTH), ==, BOTH); /* it was not read: still so */
    g_assert_cmpint(read(ends[0], filler, 1), ==, 1);

    while (write(ends[0], filler, sizeof(filler)) > 0) {
    }
    struct later output = {.fd = ends[1], .to = rest, .bytes = MiB};
    start_later(&output);
    g_assert_cmpint(descriptor_wait_ready(wait, BOTH), ==, DESCRIPTOR_WRITABLE);
    g_assert_true(output.done);
    descriptor_wait_destroy(wait);
    close(ends[0]);
    close(ends[1]);
    g_free(rest);
}

static void test_end(void *argument)
{
    struct descriptor_wait *wait;
    int ends[2];

    pair_open(ends);
    g_assert_cmpint(descriptor_wait_create(ends[0], &wait), ==, 0);
    struct later later = {.fd = ends[1]};
    start_later(&later);
    g_assert_cmpint(descriptor_wait_ready(wait, DESCRIPTOR_READABLE), ==, DESCRIPTOR_READABLE);
    g_assert_true(later.done);
    g_assert_cmpint(descriptor_wait_ready(wait, BOTH), ==, BOTH);
    descriptor_wait_destroy(wait);
    close(ends[0]);
}

static void test_wake(void *argument)
{
    struct descriptor_wait *wait;
    int ends[2];

    pair_open(ends);
    g_assert_cmpint(descriptor_wait_create(ends[0], &wait), ==, 0);
    descriptor_wait_wake(wait); /* nobody */
    for (int i = 0; i < 3; i++) {
        struct later later = {.wake = wait};
        start_later(&later);
        g_assert_cmpint(descriptor_wait_ready(wait, DESCRIPTOR_READABLE), ==, 0);
        g_assert_true(later.done);
    }
    /* A wake is no end: what comes is seen. */
    struct later input = {.fd = ends[1], .bytes = 1};
    start_later(&input);
    while (descriptor_wait_ready(wait, DESCRIPTOR_READABLE) == 0) {
    }
    g_assert_true(input.done);
    descriptor_wait_destroy(wait);
    close(ends[0]);
    close(ends[1]);
}

/* Bytes pass through as much as the socket takes, in both directions at once: no change of its state is missed. */
struct pump {
    int fd;
    size_t to_send, to_receive;
    bool done;
};

static void pump_entry(void *argument)
{
    struct pump *pump = argument;
    struct descriptor_wait *wait;
    char block[3000];

    memset(block, 'p', sizeof(block));
    g_assert_cmpint(descriptor_wait_create(pump->fd, &wait), ==, 0);
    while (pump->to_send || pump->to_receive) {
        unsigned directions =
            (pump->to_send ? DESCRIPTOR_WRITABLE : 0U) | (pump->to_receive ? DESCRIPTOR_READABLE : 0U);
        int ready = descriptor_wait_ready(wait, directions);

        g_assert_cmpint(ready, >, 0);
        g_assert_cmpint((unsigned)ready & ~directions, ==, 0);
        if (ready & DESCRIPTOR_WRITABLE) {
            ssize_t r = write(pump->fd, block, min_u64(pump->to_send, sizeof(block)));
            pump->to_send -= r > 0 ? (size_t)r : 0;
        }
        if (ready & DESCRIPTOR_READABLE) {
            ssize_t r = read(pump->fd, block, min_u64(pump->to_receive, 1000));
            g_assert_cmpint(r, >, 0);
            pump->to_receive -= (size_t)r;
        }
    }
    descriptor_wait_destroy(wait);
    pump->done = true;
}

static void test_traffic(void *argument)
{
    int ends[2];

    pair_open(ends);
    struct pump pumps[] = {{ends[0], 2 * MiB, MiB, false}, {ends[1], MiB, 2 * MiB, false}};
    loop_spawn(loop_self(), pump_entry, &pumps[0]);
    pump_entry(&pumps[1]);
    while (!pumps[0].done) {
        loop_sleep_ns(NULL, 100000);
    }
    close(ends[0]);
    close(ends[1]);
}

static void test_take(void *argument)
{
    struct connection *connection;
    struct descriptor_wait *wait;
    struct iovec iov = {(char *)"abc", 3};
    char got[4] = "";
    int other, fd;

    g_assert_cmpint(connection_pair(&connection, &other), ==, 0);
    g_assert_cmpint(connection_send(connection, buffers_one(&iov), 3), ==, 0);
    g_assert_cmpint(read(other, got, 3), ==, 3);
    g_assert_cmpstr(got, ==, "abc");
    fd = connection_take_descriptor(connection);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(write(other, "def", 3), ==, 3);
    g_assert_cmpint(descriptor_wait_create(fd, &wait), ==, 0);
    g_assert_cmpint(descriptor_wait_ready(wait, DESCRIPTOR_READABLE), ==, DESCRIPTOR_READABLE);
    g_assert_cmpint(read(fd, got, 3), ==, 3);
    g_assert_cmpstr(got, ==, "def");
    descriptor_wait_destroy(wait);
    g_assert_cmpuint(descriptor_is_ready(fd, BOTH), ==, DESCRIPTOR_WRITABLE);
    close(other);
    g_assert_cmpuint(descriptor_is_ready(fd, DESCRIPTOR_READABLE), ==, DESCRIPTOR_READABLE);
    descriptor_close(fd);
}

/* Where nobody answers: a listening socket whose queue is full. */
struct silence {
    int listener, queued[4];
    struct address address;
};

static void silence_begin(struct silence *silence, bool internet)
{
    struct sockaddr_in inet = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_un unix_name = {.sun_family = AF_UNIX};
    struct sockaddr *name = internet ? (struct sockaddr *)&inet : (struct sockaddr *)&unix_name;
    socklen_t size = internet ? sizeof(inet) : sizeof(sa_family_t); /* the kernel chooses the name of both */

    silence->listener = socket(name->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    g_assert_cmpint(bind(silence->listener, name, size), ==, 0);
    g_assert_cmpint(listen(silence->listener, 0), ==, 0);
    size = internet ? sizeof(inet) : sizeof(unix_name);
    g_assert_cmpint(getsockname(silence->listener, name, &size), ==, 0);
    for (size_t i = 0; i < array_size(silence->queued); i++) {
        silence->queued[i] = socket(name->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        (void)!connect(silence->queued[i], name, size);
    }
    if (internet) {
        silence->address = (struct address){
            .kind = ADDRESS_INET, .host = g_strdup("127.0.0.1"), .port = g_strdup_printf("%d", ntohs(inet.sin_port))};
    } else {
        silence->address = (struct address){.kind = ADDRESS_UNIX,
                                            .abstract = true,
                                            .path = g_strndup(unix_name.sun_path + 1, size - sizeof(sa_family_t) - 1)};
    }
}

static void silence_end(struct silence *silence)
{
    for (size_t i = 0; i < array_size(silence->queued); i++) {
        close(silence->queued[i]);
    }
    close(silence->listener);
    address_clear(&silence->address);
}

static void cancel_entry(void *argument)
{
    loop_sleep_ns(NULL, 5000000);
    connecting_cancel(argument);
}

static void test_cancel_connecting(void *argument)
{
    for (int internet = 0; internet < 2; internet++) {
        struct silence silence;
        struct connecting connecting = {0};
        struct connection *connection;

        silence_begin(&silence, internet);
        loop_spawn(loop_self(), cancel_entry, &connecting);
        int64_t start = loop_clock_ns();
        g_assert_cmpint(connection_open_cancellable(&silence.address, &connecting, &connection, NULL), ==, -ECANCELED);
        g_assert_cmpint(loop_clock_ns() - start, <, 1000000000);
        silence_end(&silence);
    }
}

static void simulated_entry(void *argument)
{
    struct descriptor_wait *wait;
    struct connection *connection;
    int fd;

    g_assert_cmpint(descriptor_wait_create(0, &wait), ==, -ENOTSUP);
    g_assert_cmpint(connection_pair(&connection, &fd), ==, -ENOTSUP);
}

static void test_simulated(void)
{
    struct sim_config config = {.seed = 1};
    struct sim *sim = sim_create(&config);
    struct loop *loop;

    g_assert_cmpint(loop_create(ENGINE_SIM, &loop, NULL), ==, 0);
    loop_run_coroutine(loop, simulated_entry, NULL);
    loop_destroy(loop);
    sim_destroy(sim);
}

int main(int argc, char **argv)
{
    static const struct loop_case cases[] = {
        {"directions", test_directions}, {"end", test_end},   {"wake", test_wake},
        {"traffic", test_traffic},       {"take", test_take}, {"cancel-connecting", test_cancel_connecting},
    };

    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/descriptor/simulated", test_simulated);
    test_add_loop_cases("descriptor", cases, G_N_ELEMENTS(cases));
    return g_test_run();
}

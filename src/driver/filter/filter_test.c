/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The filters that users add by options, over nodes in memory: what each passes on, changes, and refuses.
 */
#include "block/memory_node.h"
#include "driver/drivers.h"
#include "driver/filter/blkdebug.h"
#include "driver/filter/log_writes_format.h"
#include <endian.h>

static struct graph *graph;
static GString *told;

static struct node *coroutine_fn add(struct error **err, const char *format, ...) G_GNUC_PRINTF(2, 3);
static struct node *coroutine_fn add(struct error **err, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    g_autofree char *text = g_strdup_vprintf(format, arguments);
    va_end(arguments);
    json_t *json = json_loads(text, 0, NULL);
    struct blockdev_options *options = NULL;
    struct node *node = NULL;
    g_assert_nonnull(json);
    if (blockdev_options_from_json(json, NULL, &options, err) == 0) {
        (void)graph_add(graph, options, &node, err);
    }
    blockdev_options_free(options);
    json_decref(json);
    return node;
}

static struct backend *coroutine_fn backend_on(struct node *node)
{
    return memory_backend(graph, "test", node, ACCESS_ALL);
}

static int coroutine_fn write_byte(struct backend *backend, uint64_t offset, uint64_t bytes, int value, unsigned flags)
{
    g_autofree char *data = g_malloc(bytes);
    struct iovec iov = {data, bytes};
    memset(data, value, bytes);
    return backend_write(backend, offset, bytes, buffers_one(&iov), flags);
}

/* The value of all these bytes, -1000 if they differ, or a negative errno. */
static int coroutine_fn read_byte(struct backend *backend, uint64_t offset, uint64_t bytes)
{
    g_autofree unsigned char *data = g_malloc(bytes);
    struct iovec iov = {data, bytes};
    int code = backend_read(backend, offset, bytes, buffers_one(&iov), 0);
    for (uint64_t i = 0; code == 0 && i < bytes; i++) {
        if (data[i] != data[0]) {
            return -1000;
        }
    }
    return code < 0 ? code : data[0];
}

static void coroutine_fn assert_refused(const char *pattern, const char *options)
{
    auto_error error = NULL;
    g_assert_null(add(&error, "%s", options));
    if (!g_pattern_match_simple(pattern, error->message)) {
        g_error("'%s' is not '%s'", error->message, pattern);
    }
}

/* --- blkdebug --- */

static void coroutine_fn errors_by_rule(void)
{
    graph = graph_create();
    struct node *base = memory_node(graph, "base", NULL);
    struct node *node = add(NULL, "{\"driver\":\"blkdebug\",\"node-name\":\"d\",\"image\":\"base\",\"inject-error\":["
                                  "{\"event\":\"write_aio\",\"errno\":28,\"once\":true},"
                                  "{\"event\":\"read_aio\",\"state\":2,\"iotype\":\"read\",\"sector\":3},"
                                  "{\"event\":\"l2_load\",\"iotype\":\"flush\",\"immediately\":true},"
                                  "{\"event\":\"l2_update\",\"errno\":0}],"
                                  "\"set-state\":[{\"event\":\"cow_read\",\"new_state\":2},"
                                  "{\"event\":\"cow_read\",\"state\":2,\"new_state\":5}]}");
    struct backend *backend = backend_on(node);
    struct edge *edge = backend_edge(backend);
    g_assert_cmpint(write_byte(backend, 0, 4096, 1, 0), ==, 0);
    edge_event(edge, BLKDEBUG_EVENT_WRITE_AIO);
    g_assert_cmpint(write_byte(backend, 0, 4096, 2, 0), ==, -ENOSPC);
    g_assert_cmpint(write_byte(backend, 0, 4096, 3, 0), ==, 0); /* once */
    edge_event(edge, BLKDEBUG_EVENT_READ_AIO);                  /* not in this state */
    g_assert_cmpint(read_byte(backend, 0, 4096), ==, 3);
    edge_event(edge, BLKDEBUG_EVENT_COW_READ); /* 1 -> 2: the second rule still sees 1 */
    g_assert_cmpint(read_byte(backend, 0, 4096), ==, 3);
    edge_event(edge, BLKDEBUG_EVENT_READ_AIO);
    g_assert_cmpint(read_byte(backend, 0, 1536), ==, 3);
    g_assert_cmpint(read_byte(backend, 1535, 2), ==, -EIO);
    g_assert_cmpint(read_byte(backend, 2048, 1), ==, 3);
    g_assert_cmpint(backend_flush(backend), ==, 0);
    edge_event(edge, BLKDEBUG_EVENT_L2_LOAD); /* another event with an error puts the first out */
    g_assert_cmpint(read_byte(backend, 1535, 2), ==, 3);
    g_assert_cmpint(backend_flush(backend), ==, -EIO);
    g_assert_cmpint(backend_flush(backend), ==, -EIO);
    edge_event(edge, BLKDEBUG_EVENT_L2_UPDATE);
    g_assert_cmpint(backend_flush(backend), ==, 0);
    g_assert_cmpuint(memory_of(base)->writes, ==, 2);
    backend_destroy(backend);
    memory_end(graph);
}

static void coroutine_fn every_kind_of_request_fails(void)
{
    static const char *const kinds[] = {"read", "write", "write-zeroes", "discard", "flush", "block-status"};
    for (unsigned i = 0; i < G_N_ELEMENTS(kinds) + 1; i++) {
        graph = graph_create();
        (void)memory_node(graph, "base", NULL);
        g_autofree char *kind =
            i < G_N_ELEMENTS(kinds) ? g_strdup_printf(",\"iotype\":\"%s\"", kinds[i]) : g_strdup("");
        struct node *node = add(NULL,
                                "{\"driver\":\"blkdebug\",\"node-name\":\"d\",\"image\":\"base\",\"discard\":\"unmap\","
                                "\"inject-error\":[{\"event\":\"none\"%s}]}",
                                kind);
        struct backend *backend = backend_on(node);
        struct extent extent;
        int got[] = {read_byte(backend, 0, 1),
                     write_byte(backend, 0, 1, 0, 0),
                     backend_write_zeroes(backend, 0, 1, 0),
                     backend_discard(backend, 0, 1),
                     backend_flush(backend),
                     backend_block_status(backend, NULL, 0, 1, &extent)};
        for (unsigned k = 0; k < G_N_ELEMENTS(got); k++) {
            bool fails = i == G_N_ELEMENTS(kinds) ? k != 5 : k == i;
            if (k == 5) { /* the chain is walked through filters: its status is the image's */
                g_assert_cmpint(got[k], ==, 0);
            } else {
                g_assert_cmpint(got[k], ==, fails ? -EIO : 0);
            }
        }
        g_assert_cmpint(edge_block_status(backend_edge(backend), 0, 1, &extent), ==, i == 5 ? -EIO : 0);
        backend_destroy(backend);
        memory_end(graph);
    }
}

static void tell(const char *tag, bool stopped)
{
    g_string_append_printf(told, "%s%s ", stopped ? "+" : "-", tag);
}

struct writing {
    struct backend *backend;
    int value, code;
    bool done;
};

static void coroutine_fn write_beside(void *argument)
{
    struct writing *writing = argument;
    writing->code = write_byte(writing->backend, 0, 512, writing->value, 0);
    writing->done = true;
}

static void coroutine_fn breakpoints(void)
{
    graph = graph_create();
    told = g_string_new(NULL);
    (void)memory_node(graph, "base", NULL);
    (void)add(NULL, "{\"driver\":\"blkdebug\",\"node-name\":\"d\",\"image\":\"base\"}");
    struct node *node = add(NULL, "{\"driver\":\"copy-on-read\",\"node-name\":\"above\",\"file\":\"d\"}");
    struct backend *backend = backend_on(node);
    struct node *debug = blkdebug_find(node);
    g_assert_cmpstr(debug->name, ==, "d");
    g_assert_cmpint(blkdebug_break(debug, "bogus", "a", tell, NULL), ==, -ENOENT);
    g_assert_cmpint(blkdebug_break(debug, "pwritev", "a", tell, NULL), ==, 0);
    struct writing first = {backend, 1}, second = {backend, 2}, third = {backend, 3};
    loop_spawn(loop_self(), write_beside, &first);
    blkdebug_wait(debug, "a");
    g_assert_true(blkdebug_is_stopped(debug, "a") && !first.done);
    write_beside(&second); /* a breakpoint stops one */
    g_assert_true(second.done);
    g_assert_cmpint(blkdebug_resume(debug, "b"), ==, -ENOENT);
    g_assert_cmpint(blkdebug_resume(debug, "a"), ==, 0);
    while (!first.done) {
        coroutine_pause();
    }
    g_assert_cmpint(read_byte(backend, 0, 512), ==, 1); /* the one that came first was written last */
    g_assert_cmpint(blkdebug_remove_break(debug, "a"), ==, -ENOENT);
    /* Two breakpoints hold one request until both let it go. */
    g_assert_cmpint(blkdebug_break(debug, "pwritev", "x", tell, NULL), ==, 0);
    g_assert_cmpint(blkdebug_break(debug, "pwritev", "y", tell, NULL), ==, 0);
    loop_spawn(loop_self(), write_beside, &third);
    blkdebug_wait(debug, "x");
    g_assert_cmpint(blkdebug_remove_break(debug, "y"), ==, -ENOENT); /* it has hit */
    coroutine_pause();
    g_assert_false(third.done);
    blkdebug_release(debug);
    while (!third.done) {
        coroutine_pause();
    }
    g_assert_cmpstr(told->str, ==, "+a -a +y +x -y -x ");
    g_string_free(told, TRUE);
    backend_destroy(backend);
    memory_end(graph);
}

static void coroutine_fn narrower_limits(void)
{
    graph = graph_create();
    struct node *base = memory_node(graph, "base", NULL);
    struct memory_state *state = memory_of(base);
    struct node *node = add(NULL, "{\"driver\":\"blkdebug\",\"node-name\":\"d\",\"image\":\"base\",\"align\":512,"
                                  "\"max-transfer\":4096}");
    struct backend *backend = backend_on(node);
    g_assert_cmpint(write_byte(backend, 100, 10, 7, 0), ==, 0); /* padded: a whole sector is read and written */
    g_assert_cmpint(read_byte(backend, 100, 10), ==, 7);
    g_assert_cmpint(read_byte(backend, 0, 100), ==, 0);
    unsigned writes = state->writes;
    g_assert_cmpint(write_byte(backend, 0, 16384, 9, 0), ==, 0);
    g_assert_cmpuint(state->writes - writes, ==, 4);
    backend_destroy(backend);
    node = add(NULL, "{\"driver\":\"blkdebug\",\"node-name\":\"z\",\"image\":\"base\",\"align\":512,"
                     "\"opt-write-zero\":4096,\"max-write-zero\":8192,"
                     "\"opt-discard\":4096,\"max-discard\":4096,\"discard\":\"unmap\"}");
    backend = backend_on(node);
    writes = state->writes;
    g_assert_cmpint(backend_write_zeroes(backend, 512, 32768, 0), ==, 0);
    g_assert_cmpuint(state->zeroes, ==, 4);          /* 4096 to 32768 by 8192 */
    g_assert_cmpuint(state->writes - writes, ==, 2); /* the ends, as data */
    g_assert_cmpint(read_byte(backend, 0, 512), ==, 9);
    g_assert_cmpint(read_byte(backend, 512, 32768), ==, 0);
    g_assert_cmpint(backend_write_zeroes(backend, 512, 4096, REQUEST_NO_FALLBACK), ==, -ENOTSUP);
    g_assert_cmpint(backend_discard(backend, 512, 16384), ==, 0);
    g_assert_cmpuint(state->discards, ==, 3); /* 4096 to 16384 */
    backend_destroy(backend);
    assert_refused("Cannot meet constraints with align 3",
                   "{\"driver\":\"blkdebug\",\"node-name\":\"e\",\"image\":\"base\",\"align\":3}");
    assert_refused("Cannot meet constraints with max-transfer 5000",
                   "{\"driver\":\"blkdebug\",\"node-name\":\"e\",\"image\":\"base\",\"align\":4096,"
                   "\"max-transfer\":5000}");
    assert_refused("Cannot meet constraints with align *",
                   "{\"driver\":\"blkdebug\",\"node-name\":\"e\",\"image\":\"base\",\"align\":4294967296}");
    assert_refused("*not a multiple of the alignment",
                   "{\"driver\":\"blkdebug\",\"node-name\":\"e\",\"image\":\"base\",\"align\":131072}");
    memory_end(graph);
}

/* --- blkverify --- */

static void coroutine_fn verification(void)
{
    graph = graph_create();
    struct node *raw = memory_node(graph, "raw", NULL), *test = memory_node(graph, "test", NULL);
    struct node *node = add(NULL, "{\"driver\":\"blkverify\",\"node-name\":\"v\",\"test\":\"test\",\"raw\":\"raw\","
                                  "\"discard\":\"unmap\"}");
    struct backend *backend = backend_on(node);
    g_assert_cmpint(write_byte(backend, 1000, 5000, 6, 0), ==, 0);
    g_assert_cmpint(backend_write_zeroes(backend, 2000, 3000, REQUEST_MAY_UNMAP), ==, 0);
    g_assert_cmpint(memcmp(memory_of(raw)->data, memory_of(test)->data, MEMORY_SIZE), ==, 0);
    g_assert_cmpint(read_byte(backend, 2000, 3000), ==, 0);
    g_assert_cmpint(backend_discard(backend, 0, 4096), ==, 0);
    g_assert_cmpuint(memory_of(test)->discards + memory_of(raw)->discards, ==, 0);
    g_assert_cmpint(backend_flush(backend), ==, 0);
    g_assert_cmpuint(memory_of(test)->flushes, ==, 1);
    g_assert_cmpuint(memory_of(raw)->flushes, ==, 1);
    memory_of(raw)->data[1500] ^= 1;
    g_test_expect_message(NULL, G_LOG_LEVEL_WARNING, "*read offset=1400 bytes=200 contents mismatch at offset 1500");
    g_assert_cmpint(read_byte(backend, 1400, 200), ==, -EIO);
    g_test_assert_expected_messages();
    g_assert_cmpint(read_byte(backend, 1400, 100), ==, 6);
    backend_destroy(backend);
    memory_end(graph);
}

/* --- blklogwrites --- */

static uint64_t entry_word(const struct node *log, uint64_t sector, unsigned word)
{
    uint64_t value;
    memcpy(&value, memory_of(log)->data + sector * 512 + word * 8, sizeof(value));
    return le64toh(value);
}

static void assert_entry(const struct node *log, uint64_t at, uint64_t sector, uint64_t sectors, uint64_t flags)
{
    g_assert_cmpuint(entry_word(log, at, 0), ==, sector);
    g_assert_cmpuint(entry_word(log, at, 1), ==, sectors);
    g_assert_cmpuint(entry_word(log, at, 2), ==, flags);
    g_assert_cmpuint(entry_word(log, at, 3), ==, 0);
}

static void coroutine_fn logging(void)
{
    graph = graph_create();
    (void)memory_node(graph, "base", NULL);
    struct node *log = memory_node(graph, "log", NULL);
    struct node *node = add(NULL, "{\"driver\":\"blklogwrites\",\"node-name\":\"l\",\"file\":\"base\",\"log\":\"log\","
                                  "\"log-super-update-interval\":3,\"discard\":\"unmap\"}");
    struct backend *backend = backend_on(node);
    g_assert_cmpuint(entry_word(log, 0, 0), ==, LOG_WRITES_MAGIC);
    g_assert_cmpint(write_byte(backend, 4096, 1024, 5, 0), ==, 0);
    g_assert_cmpint(write_byte(backend, 100, 10, 8, REQUEST_FUA), ==, 0);
    g_assert_cmpuint(entry_word(log, 0, 2), ==, 0); /* not counted yet */
    g_assert_cmpint(backend_discard(backend, 8192, 512), ==, 0);
    g_assert_cmpuint(entry_word(log, 0, 2), ==, 3);
    g_assert_cmpint(backend_write_zeroes(backend, 512, 512, 0), ==, 0);
    g_assert_cmpint(backend_flush(backend), ==, 0);
    g_assert_cmpuint(entry_word(log, 0, 2), ==, 5);
    assert_entry(log, 1, 8, 2, 0);
    g_assert_cmpuint(memory_of(log)->data[2 * 512], ==, 5);
    assert_entry(log, 4, 0, 1, LOG_WRITES_FUA);
    g_assert_cmpuint(memory_of(log)->data[5 * 512 + 99], ==, 0);
    g_assert_cmpuint(memory_of(log)->data[5 * 512 + 100], ==, 8);
    assert_entry(log, 6, 16, 1, LOG_WRITES_DISCARD);
    assert_entry(log, 7, 1, 1, 0);
    assert_entry(log, 9, 0, 0, LOG_WRITES_FLUSH);
    g_assert_cmpint(write_byte(backend, 0, 512, 1, 0), ==, 0);
    backend_destroy(backend);
    g_assert_cmpint(graph_delete(graph, "l", NULL), ==, 0);
    g_assert_cmpuint(entry_word(log, 0, 2), ==, 6); /* at the end */
    /* Going on with it, until the log is full: then nothing is changed any more. */
    assert_refused("*exclusive", "{\"driver\":\"blklogwrites\",\"node-name\":\"l\",\"file\":\"base\",\"log\":\"log\","
                                 "\"log-append\":true,\"log-sector-size\":512}");
    assert_refused("Invalid log superblock magic",
                   "{\"driver\":\"blklogwrites\",\"node-name\":\"l\",\"file\":\"log\",\"log\":\"base\","
                   "\"log-append\":true}");
    assert_refused("Invalid log sector size 768",
                   "{\"driver\":\"blklogwrites\",\"node-name\":\"l\",\"file\":\"base\",\"log\":\"log\","
                   "\"log-sector-size\":768}");
    node = add(NULL, "{\"driver\":\"blklogwrites\",\"node-name\":\"l\",\"file\":\"base\",\"log\":\"log\","
                     "\"log-append\":true}");
    backend = backend_on(node);
    g_assert_cmpint(write_byte(backend, 0, 32768, 4, 0), ==, 0);
    assert_entry(log, 12, 0, 64, 0);
    g_test_expect_message(NULL, G_LOG_LEVEL_WARNING, "*could not be written*");
    g_assert_cmpint(write_byte(backend, 0, 32768, 3, 0), ==, -ENOSPC);
    g_test_assert_expected_messages();
    g_assert_cmpint(write_byte(backend, 0, 512, 2, 0), ==, -ENOSPC);
    g_assert_cmpint(read_byte(backend, 0, 512), ==, 3);
    backend_destroy(backend);
    memory_end(graph);
}

/* --- copy-on-read --- */

static void coroutine_fn chain_with_data(struct node *chain[3])
{
    static const char *const names[] = {"base", "mid", "top"};
    for (unsigned i = 0; i < 3; i++) {
        chain[i] = memory_node(graph, names[i], i ? chain[i - 1] : NULL);
        if (i < 2) {
            memory_of(chain[i])->allocated[i] = true;
            memset(memory_of(chain[i])->data + i * MEMORY_CLUSTER, 10 + (int)i, MEMORY_CLUSTER);
        }
        chain[i]->limits.cluster_size = MEMORY_CLUSTER;
    }
}

static void coroutine_fn copying_on_read(void)
{
    struct node *chain[3];
    graph = graph_create();
    chain_with_data(chain);
    struct memory_state *top = memory_of(chain[2]);
    struct node *node = add(NULL, "{\"driver\":\"copy-on-read\",\"node-name\":\"c\",\"file\":\"top\"}");
    struct backend *backend = backend_on(node);
    g_assert_cmpint(write_byte(backend, 3 * MEMORY_CLUSTER, 100, 77, 0), ==, 0);
    g_assert_cmpint(read_byte(backend, 100, 10), ==, 10);
    g_assert_true(top->allocated[0] && !top->allocated[1]);
    g_assert_cmpuint(top->last_flags, ==, REQUEST_IF_UNALLOCATED);
    g_assert_cmpint(top->data[4095], ==, 10); /* the whole cluster */
    g_assert_cmpint(read_byte(backend, MEMORY_CLUSTER - 1, 2), ==, -1000);
    g_assert_true(top->allocated[1] && !top->allocated[2]);
    unsigned writes = top->writes;
    g_assert_cmpint(read_byte(backend, 0, MEMORY_CLUSTER), ==, 10); /* its own by now */
    g_assert_cmpint(read_byte(backend, 3 * MEMORY_CLUSTER, 100), ==, 77);
    g_assert_cmpuint(top->writes, ==, writes);
    backend_destroy(backend);
    memory_end(graph);
}

static void coroutine_fn copying_ends_at_the_bottom(void)
{
    struct node *chain[3];
    graph = graph_create();
    chain_with_data(chain);
    struct memory_state *top = memory_of(chain[2]);
    assert_refused("*no image 'nowhere'*",
                   "{\"driver\":\"copy-on-read\",\"node-name\":\"c\",\"file\":\"top\",\"bottom\":\"nowhere\"}");
    struct node *node =
        add(NULL, "{\"driver\":\"copy-on-read\",\"node-name\":\"c\",\"file\":\"top\",\"bottom\":\"mid\"}");
    struct backend *backend = backend_on(node);
    g_assert_cmpint(read_byte(backend, 0, MEMORY_CLUSTER), ==, 10);
    g_assert_cmpint(read_byte(backend, MEMORY_CLUSTER, MEMORY_CLUSTER), ==, 11);
    g_assert_true(!top->allocated[0] && top->allocated[1]);
    backend_destroy(backend);
    memory_end(graph);
}

/* One that does not allow that the image is changed without notice, and a filter that would. */
static void coroutine_fn copying_is_claimed(void)
{
    static const struct claim_clause clauses[] = {
        {.role = CLAIM_ROLE_NODE, .first = CLAIM_NODE, .deny = ACCESS_WRITE_METADATA, .path = "node"}};
    static const struct claim_table table = {.operation = "watch", .clauses = clauses, .count = 1};
    struct node *chain[3];
    graph = graph_create();
    chain_with_data(chain);
    struct operation_config config = {
        .kind = "command", .id = "test", .table = &table, .bound = {[CLAIM_NODE] = chain[2]}};
    struct operation *operation;
    g_assert_cmpint(operation_begin(graph, &config, &operation, NULL), ==, 0);
    assert_refused("*write-metadata*", "{\"driver\":\"copy-on-read\",\"node-name\":\"c\",\"file\":\"top\"}");
    struct node *node =
        add(NULL, "{\"driver\":\"copy-on-read\",\"node-name\":\"c\",\"file\":\"top\",\"read-only\":true}");
    struct backend *backend = backend_on(node);
    g_assert_cmpint(read_byte(backend, 0, 10), ==, 10);
    g_assert_false(memory_of(chain[2])->allocated[0]);
    backend_destroy(backend);
    operation_end(operation);
    memory_end(graph);
}

#define TEST(function)                    \
    static void test_##function(void)     \
    {                                     \
        in_coroutine((void *)(function)); \
    }
TEST(errors_by_rule)
TEST(every_kind_of_request_fails)
TEST(breakpoints)
TEST(narrower_limits)
TEST(verification)
TEST(logging)
TEST(copying_on_read)
TEST(copying_ends_at_the_bottom)
TEST(copying_is_claimed)

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    driver_register(&driver_blkdebug);
    driver_register(&driver_blkverify);
    driver_register(&driver_blklogwrites);
    driver_register(&driver_copy_on_read);
    g_test_add_func("/blkdebug/errors-by-rule", test_errors_by_rule);
    g_test_add_func("/blkdebug/every-kind-of-request-fails", test_every_kind_of_request_fails);
    g_test_add_func("/blkdebug/breakpoints", test_breakpoints);
    g_test_add_func("/blkdebug/narrower-limits", test_narrower_limits);
    g_test_add_func("/blkverify/verification", test_verification);
    g_test_add_func("/blklogwrites/logging", test_logging);
    g_test_add_func("/copy-on-read/copying", test_copying_on_read);
    g_test_add_func("/copy-on-read/ends-at-the-bottom", test_copying_ends_at_the_bottom);
    g_test_add_func("/copy-on-read/is-claimed", test_copying_is_claimed);
    return g_test_run();
}

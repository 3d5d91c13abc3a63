/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Encrypted images beside the peer: made by either, filled by either, read by both. LUKS volumes with every cipher,
 * mode, vector and hash that the peer has; qcow2 images with LUKS and AES, with small, large and divided clusters, over
 * a backing file, through random writes, zeroes and discards. A model in memory says what each byte must be.
 *
 * The peer measures for seconds how fast the machine is before it makes a LUKS header: it makes two of them only.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "crypto/secret.h"
#include "driver/drivers.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include <errno.h>
#include <fcntl.h>
#include <glib/gstdio.h>
#include <string.h>

enum { SIZE = 1 << 20, OPERATIONS = 60 };
#define SECRETS "--object secret,id=s,data=hunter2 --object secret,id=n,data=hunter3 "

struct test {
    const char *options; /* of creation, with commas, as both take them; NULL: that is all */
    const char *json;    /* the same for us */
    bool backing;
};

struct world {
    const char *format;
    const struct test *test;
    char *path;
    bool ours; /* made here, not by the peer */
    uint64_t random;
    uint8_t *model;
};

static void run(void (*entry)(void *argument), void *argument)
{
    struct loop *loop;
    int code = loop_create(ENGINE_AUTO, &loop, NULL);
    g_assert_cmpint(code, ==, 0);
    loop_run_coroutine(loop, entry, argument);
    loop_destroy(loop);
}

static void coroutine_fn add_secrets(void)
{
    static const char *const secrets[][2] = {{"s", "hunter2"}, {"n", "hunter3"}, {"wrong", "hunter4"}};
    for (unsigned i = 0; i < G_N_ELEMENTS(secrets); i++) {
        int code = secret_add(&(struct secret_options){.id = secrets[i][0], .data = secrets[i][1]}, NULL);
        g_assert_cmpint(code, ==, 0);
    }
}

static bool is_luks(const struct world *world)
{
    return !strcmp(world->format, "luks");
}

/* --- making --- */

static int coroutine_fn create_here(const char *format, const char *path, const char *members, struct error **err)
{
    struct graph *graph = graph_create();
    struct blockdev_create_options *options = NULL;
    int fd = g_creat(path, 0644);
    g_assert_cmpint(fd, >=, 0);
    g_close(fd, NULL);
    g_autofree char *text =
        g_strdup_printf("{\"driver\":\"%s\",\"file\":{\"driver\":\"file\",\"filename\":\"%s\"},\"size\":%u,%s}", format,
                        path, SIZE, members);
    json_t *json = json_loads(text, 0, NULL);
    g_assert_nonnull(json);
    int code = blockdev_create_options_from_json(json, NULL, &options, err);
    if (code == 0) {
        code = driver_find(format)->image->create(graph, options, err);
    }
    blockdev_create_options_free(options);
    json_decref(json);
    graph_destroy(graph);
    return code;
}

static void coroutine_fn make(struct world *world)
{
    const struct test *test = world->test;
    g_autofree char *below = g_strdup_printf("%s/below.raw", testing_directory());
    g_autofree char *backing = test->backing ? g_strdup_printf("-F raw -b %s ", below) : g_strdup("");
    if (test->backing) {
        for (unsigned i = 0; i < SIZE; i++) {
            world->model[i] = (uint8_t)(i / 777);
        }
        g_assert_true(g_file_set_contents(below, (const char *)world->model, SIZE, NULL));
    }
    if (world->ours) {
        g_autofree char *members =
            test->backing ? g_strdup_printf("%s,\"backing-file\":\"%s\",\"backing-fmt\":\"raw\"", test->json, below)
                          : g_strdup(test->json);
        auto_error error = NULL;
        int code = create_here(world->format, world->path, members, &error);
        if (code < 0) {
            g_error("%s: %s", members, error->message);
        }
    } else {
        testing_run(true, "qemu-img create -q " SECRETS "-f %s -o %s %s%s %u", world->format, test->options, backing,
                    world->path, SIZE);
    }
}

/* How the peer opens it. */
static char *peer_options(const struct world *world)
{
    return g_strdup_printf("--image-opts driver=%s,%skey-secret=s,file.filename=%s", world->format,
                           is_luks(world) ? "" : "encrypt.", world->path);
}

static struct node *coroutine_fn open_here(struct graph *graph, const struct world *world, const char *secret,
                                           struct error **err)
{
    g_autofree char *key = g_strdup_printf(
        is_luks(world) ? "\"key-secret\":\"%s\"" : "\"encrypt\":{\"format\":\"auto\",\"key-secret\":\"%s\"}", secret);
    return testing_add(graph, err,
                       "{\"driver\":\"%s\",\"node-name\":\"top\",\"discard\":\"unmap\",%s,"
                       "\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}",
                       world->format, key, world->path);
}

/* --- using --- */

static void coroutine_fn check_content(struct world *world, struct backend *backend)
{
    g_autofree uint8_t *data = g_malloc(SIZE);
    struct iovec iov[] = {{data, 1000}, {data + 1000, SIZE - 1000}};
    int code = backend_read(backend, 0, SIZE, (struct buffers){iov, 2, 0}, 0);
    g_assert_cmpint(code, ==, 0);
    for (unsigned i = 0; i < SIZE; i++) {
        if (data[i] != world->model[i]) {
            g_error("%s %s: byte %u is %02x, not %02x", world->format, world->test->options, i, data[i],
                    world->model[i]);
        }
    }
}

static void coroutine_fn operate(struct world *world, struct backend *backend)
{
    uint64_t offset = testing_random(&world->random) % SIZE;
    uint64_t most = testing_random(&world->random) % 5 ? 5000 : 300000;
    uint64_t bytes = min_u64(1 + testing_random(&world->random) % most, SIZE - offset);
    unsigned what = testing_random(&world->random) % 8;
    int code;
    if (what == 0 && !is_luks(world)) {
        memset(world->model + offset, 0, bytes);
        code = backend_write_zeroes(backend, offset, bytes, testing_random(&world->random) % 2 ? REQUEST_MAY_UNMAP : 0);
    } else if (what == 1) {
        /* Whatever a discard does, it does to whole large blocks. */
        offset = align_down(offset, 256 * KiB);
        code = backend_discard(backend, offset, 256 * KiB);
        struct iovec iov = {world->model + offset, 256 * KiB};
        if (code == 0) {
            code = backend_read(backend, offset, 256 * KiB, buffers_one(&iov), 0);
        }
    } else {
        uint64_t pattern = testing_random(&world->random);
        for (uint64_t i = 0; i < bytes; i++) {
            world->model[offset + i] = (uint8_t)(pattern >> i % 8 * 8);
        }
        g_autofree uint8_t *before = g_memdup2(world->model + offset, bytes);
        struct iovec iov[] = {{world->model + offset, bytes / 2},
                              {world->model + offset + bytes / 2, bytes - bytes / 2}};
        code = backend_write(backend, offset, bytes, (struct buffers){iov, 2, 0}, what == 2 ? REQUEST_FUA : 0);
        g_assert_cmpmem(before, bytes, world->model + offset, bytes); /* the guest's memory is as it was */
    }
    g_assert_cmpint(code, ==, 0);
}

/* What writes parts of the header leaves the encryption in it. */
static void coroutine_fn change_header(struct world *world, struct graph *graph, struct node *node,
                                       struct backend *backend)
{
    const struct image_driver *image = node->driver->image;
    struct drain drain;
    bool old = strstr(world->test->options, "compat=0.10") != NULL; /* cannot shrink over a backing file */
    int code = old ? 0 : backend_truncate(backend, SIZE + 300 * KiB, NULL);
    g_assert_cmpint(code, ==, 0);
    code = old ? 0 : backend_truncate(backend, SIZE, NULL);
    g_assert_cmpint(code, ==, 0);
    if (is_luks(world)) {
        return;
    }
    graph_lock(graph);
    graph_drain_begin(graph, &node, 1, NULL, &drain);
    code = image->snapshot_create(node, &(struct snapshot_info){.name = "before"}, NULL);
    g_assert_cmpint(code, ==, 0);
    graph_drain_end(&drain);
    graph_unlock(graph);
    g_autofree uint8_t *before = g_memdup2(world->model, SIZE);
    for (unsigned i = 0; i < 10; i++) { /* clusters that are shared now move */
        operate(world, backend);
    }
    check_content(world, backend);
    graph_lock(graph);
    graph_drain_begin(graph, &node, 1, NULL, &drain);
    code = image->snapshot_apply(node, "before", NULL);
    g_assert_cmpint(code, ==, 0);
    code = image->snapshot_delete(node, "before", NULL);
    g_assert_cmpint(code, ==, 0);
    graph_drain_end(&drain);
    graph_unlock(graph);
    memcpy(world->model, before, SIZE);
    check_content(world, backend);
}

static void coroutine_fn use(void *argument)
{
    struct world *world = argument;
    auto_error error = NULL;
    struct graph *graph = graph_create();
    add_secrets();
    make(world);
    if (!is_luks(world) || !world->ours) { /* a new volume has noise */
        g_autofree char *options = peer_options(world);
        testing_run(true, "qemu-io " SECRETS "%s -c 'write -P 0x5a 3k 70k' -c 'write -P 0x5b 800001 999'", options);
        memset(world->model + 3 * KiB, 0x5a, 70 * KiB);
        memset(world->model + 800001, 0x5b, 999);
    }
    bool has_check = strstr(world->test->options, "format=aes") == NULL; /* the old way cannot tell */
    struct node *node = has_check ? open_here(graph, world, "wrong", &error) : NULL;
    g_assert_true(node == NULL && (error != NULL) == has_check);
    node = open_here(graph, world, "s", NULL);
    struct backend *backend = testing_backend(graph, node);
    if (is_luks(world)) {
        struct iovec iov = {world->model, SIZE};
        int code = world->ours ? backend_write(backend, 0, SIZE, buffers_one(&iov), 0) : 0;
        g_assert_cmpint(code, ==, 0);
        if (!world->ours) { /* what was never written is noise that both must see alike: checked at the end */
            g_autofree uint8_t *data = g_malloc(SIZE);
            iov = (struct iovec){data, SIZE};
            code = backend_read(backend, 0, SIZE, buffers_one(&iov), 0);
            g_assert_cmpint(code, ==, 0);
            g_assert_cmpmem(data + 3 * KiB, 70 * KiB, world->model + 3 * KiB, 70 * KiB);
            memcpy(world->model, data, SIZE);
        }
    }
    check_content(world, backend);
    for (unsigned i = 0; i < OPERATIONS; i++) {
        operate(world, backend);
    }
    check_content(world, backend);
    change_header(world, graph, node, backend);
    backend_destroy(backend);
    int code = graph_delete(graph, "top", NULL);
    g_assert_cmpint(code, ==, 0);
    graph_destroy(graph);
    secret_remove_all();
}

static void verify_with_peer(struct world *world)
{
    g_autofree char *options = peer_options(world), *raw = g_strdup_printf("%s/content.raw", testing_directory());
    char *content;
    gsize bytes;
    testing_run(true, "qemu-img convert " SECRETS "%s -O raw %s", options, raw);
    if (!is_luks(world)) {
        testing_run(true, "qemu-img check -q " SECRETS "%s", options);
    }
    g_assert_true(g_file_get_contents(raw, &content, &bytes, NULL));
    g_assert_cmpmem(content, bytes, world->model, SIZE);
    g_free(content);
    g_unlink(raw);
}

static void one_test(const char *format, const struct test *test, bool ours, uint64_t seed)
{
    struct world world = {.format = format, .test = test, .ours = ours, .random = seed};
    world.path = g_strdup_printf("%s/image", testing_directory());
    world.model = g_malloc0(SIZE);
    run(use, &world);
    verify_with_peer(&world);
    g_unlink(world.path);
    g_free(world.path);
    g_free(world.model);
}

/* --- LUKS volumes --- */

static void test_luks(void)
{
    static const char *const choices[][5] = {
        /* cipher, mode, ivgen, its hash, hash */
        {"aes-256", "xts", "plain64", NULL, "sha256"},       {"aes-128", "xts", "plain", NULL, "sha1"},
        {"aes-192", "xts", "plain64", NULL, "sha224"},       {"aes-128", "cbc", "essiv", "md5", "sha512"},
        {"aes-256", "cbc", "essiv", "sha256", "ripemd160"},  {"aes-256", "xts", "essiv", "sm3", "sm3"},
        {"aes-256", "ctr", "plain64", NULL, "md5"},          {"aes-128", "ecb", "plain64", NULL, "sha384"},
        {"serpent-128", "cbc", "essiv", "sha256", "sha256"}, {"serpent-192", "xts", "plain64", NULL, "sha256"},
        {"serpent-256", "ctr", "essiv", "sha256", "sha256"}, {"twofish-128", "ecb", "essiv", "sha256", "sha256"},
        {"twofish-192", "xts", "essiv", "sha256", "sha256"}, {"twofish-256", "cbc", "plain", NULL, "sha256"},
        {"cast5-128", "cbc", "plain64", NULL, "sha256"},     {"cast5-128", "ctr", "plain", NULL, "sha256"},
    };
    if (!testing_have_peer()) {
        return;
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(choices); i++) {
        const char *const *choice = choices[i];
        g_autofree char *iv_hash = choice[3] ? g_strdup_printf(",ivgen-hash-alg=%s", choice[3]) : g_strdup("");
        g_autofree char *iv_hash_json =
            choice[3] ? g_strdup_printf(",\"ivgen-hash-alg\":\"%s\"", choice[3]) : g_strdup("");
        g_autofree char *options =
            g_strdup_printf("key-secret=s,iter-time=1,cipher-alg=%s,cipher-mode=%s,ivgen-alg=%s,hash-alg=%s%s",
                            choice[0], choice[1], choice[2], choice[4], iv_hash);
        g_autofree char *json = g_strdup_printf(
            "\"key-secret\":\"s\",\"iter-time\":1,\"cipher-alg\":\"%s\",\"cipher-mode\":\"%s\",\"ivgen-alg\":\"%s\","
            "\"hash-alg\":\"%s\"%s",
            choice[0], choice[1], choice[2], choice[4], iv_hash_json);
        struct test test = {options, json, false};
        one_test("luks", &test, true, i);
        if (i == 0) {
            one_test("luks", &test, false, i);
        }
    }
}

/* --- qcow2 --- */

#define LUKS_JSON "\"encrypt\":{\"format\":\"luks\",\"key-secret\":\"s\",\"iter-time\":1}"
#define LUKS_OPTIONS "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1"
#define AES_JSON "\"encrypt\":{\"format\":\"qcow\",\"key-secret\":\"s\"}"
#define AES_OPTIONS "encrypt.format=aes,encrypt.key-secret=s"

static const struct test qcow2_tests[] = {
    {LUKS_OPTIONS, LUKS_JSON, false},
    {LUKS_OPTIONS ",cluster_size=512", LUKS_JSON ",\"cluster-size\":512", true},
    {LUKS_OPTIONS ",cluster_size=2M,extended_l2=on", LUKS_JSON ",\"cluster-size\":2097152,\"extended-l2\":true", true},
    {LUKS_OPTIONS ",cluster_size=16k,extended_l2=on", LUKS_JSON ",\"cluster-size\":16384,\"extended-l2\":true", true},
    {LUKS_OPTIONS ",compat=0.10", LUKS_JSON ",\"version\":\"v2\"", false},
    {AES_OPTIONS, AES_JSON, true},
    {AES_OPTIONS ",compat=0.10,cluster_size=4k", AES_JSON ",\"version\":\"v2\",\"cluster-size\":4096", true},
    {AES_OPTIONS ",cluster_size=32k,extended_l2=on", AES_JSON ",\"cluster-size\":32768,\"extended-l2\":true", false},
};

static void test_qcow2(void)
{
    if (!testing_have_peer()) {
        return;
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(qcow2_tests); i++) {
        one_test("qcow2", &qcow2_tests[i], true, i);
        if (i == 0 || strstr(qcow2_tests[i].options, "aes")) {
            one_test("qcow2", &qcow2_tests[i], false, 100 + i);
        }
    }
}

/* Places that were made ahead of the data read as zeroes, which never went through the cipher. */
static void test_preallocated(void)
{
    static const struct test tests[] = {
        {LUKS_OPTIONS, LUKS_JSON ",\"preallocation\":\"metadata\"", false},
        {AES_OPTIONS, AES_JSON ",\"preallocation\":\"falloc\"", false},
        {LUKS_OPTIONS, LUKS_JSON ",\"preallocation\":\"full\",\"extended-l2\":true", false},
    };
    if (!testing_have_peer()) {
        return;
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(tests); i++) {
        one_test("qcow2", &tests[i], true, i);
    }
}

/* --- what is refused, and what opens without a key --- */

static void coroutine_fn refuse(const char *format, const char *members, const char *why)
{
    auto_error error = NULL;
    g_autofree char *path = g_strdup_printf("%s/refused", testing_directory());
    int code = create_here(format, path, members, &error);
    g_assert_cmpint(code, <, 0);
    if (!strstr(error->message, why)) {
        g_error("%s: expected '%s', got '%s'", members, why, error->message);
    }
    g_unlink(path);
}

static void coroutine_fn refuse_open(const char *path, const char *options, const char *why)
{
    auto_error error = NULL;
    struct graph *graph = graph_create();
    struct node *node = testing_add(graph, &error,
                                    "{\"driver\":\"qcow2\",\"node-name\":\"top\",%s"
                                    "\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}",
                                    options, path);
    g_assert_null(node);
    if (!strstr(error->message, why)) {
        g_error("%s: expected '%s', got '%s'", options, why, error->message);
    }
    graph_destroy(graph);
}

static void coroutine_fn refusals(void *argument)
{
    g_autofree char *path = g_strdup_printf("%s/image", testing_directory());
    add_secrets();
    refuse("luks", "\"iter-time\":1", "'key-secret' is required");
    refuse("luks", "\"key-secret\":\"nobody\"", "'nobody'");
    refuse("luks", "\"key-secret\":\"s\",\"cipher-alg\":\"des\"", "'des' is not supported");
    refuse("luks", "\"key-secret\":\"s\",\"cipher-alg\":\"cast5-128\"", "cannot be used in mode xts");
    refuse("luks", "\"key-secret\":\"s\",\"ivgen-alg\":\"essiv\",\"ivgen-hash-alg\":\"sha1\"", "20 bytes");
    refuse("qcow2", "\"encrypt\":{\"format\":\"luks\"}", "'encrypt.key-secret' is required");
    refuse("qcow2", "\"encrypt\":{\"format\":\"qcow\"}", "'encrypt.key-secret' is required");
    refuse("qcow2", AES_JSON ",\"version\":\"v2\",\"preallocation\":\"metadata\"", "version 3");
    int code = create_here("qcow2", path, LUKS_JSON, NULL);
    g_assert_cmpint(code, ==, 0);
    refuse_open(path, "", "'encrypt.key-secret' is required");
    refuse_open(path, "\"encrypt\":{\"format\":\"luks\"},", "'encrypt.key-secret' is required");
    refuse_open(path, "\"encrypt\":{\"format\":\"aes\",\"key-secret\":\"s\"},", "encrypted with 'luks', not 'aes'");
    refuse_open(path, "\"encrypt\":{\"format\":\"luks\",\"key-secret\":\"nobody\"},", "'nobody'");
    refuse_open(path, "\"encrypt\":{\"format\":\"luks\",\"key-secret\":\"wrong\"},", "Invalid password");
    code = create_here("qcow2", path, "\"version\":\"v3\"", NULL);
    g_assert_cmpint(code, ==, 0);
    refuse_open(path, "\"encrypt\":{\"format\":\"luks\",\"key-secret\":\"s\"},", "is not encrypted");
    g_unlink(path);
    secret_remove_all();
}

static void test_refusals(void)
{
    run(refusals, NULL);
}

/* The header in a file of its own: the data begin where the other file does. */
static void coroutine_fn detached(void *argument)
{
    g_autofree char *path = g_strdup_printf("%s/image", testing_directory());
    g_autofree char *header = g_strdup_printf("%s/header", testing_directory());
    g_autofree char *members = g_strdup_printf(
        "\"key-secret\":\"s\",\"iter-time\":1,\"header\":{\"driver\":\"file\",\"filename\":\"%s\"}", header);
    g_autofree uint8_t *data = g_malloc(SIZE);
    struct iovec iov = {data, SIZE};
    struct graph *graph = graph_create();
    add_secrets();
    g_assert_true(g_file_set_contents(header, "", 0, NULL));
    int code = create_here("luks", path, members, NULL);
    g_assert_cmpint(code, ==, 0);
    struct node *node = testing_add(graph, NULL,
                                    "{\"driver\":\"luks\",\"node-name\":\"top\",\"key-secret\":\"s\","
                                    "\"file\":{\"driver\":\"file\",\"filename\":\"%s\"},"
                                    "\"header\":{\"driver\":\"file\",\"filename\":\"%s\"}}",
                                    path, header);
    struct backend *backend = testing_backend(graph, node);
    g_assert_cmpuint(backend_size(backend), ==, SIZE);
    memset(data, 0x42, SIZE);
    code = backend_write(backend, 0, SIZE, buffers_one(&iov), 0);
    g_assert_cmpint(code, ==, 0);
    backend_destroy(backend);
    code = graph_delete(graph, "top", NULL);
    g_assert_cmpint(code, ==, 0);
    graph_destroy(graph);
    testing_run(true,
                "qemu-io " SECRETS "--image-opts driver=luks,key-secret=s,file.filename=%s,header.filename=%s "
                "-c 'read -P 0x42 0 %u'",
                path, header, SIZE);
    g_unlink(path);
    g_unlink(header);
    secret_remove_all();
}

static void test_detached(void)
{
    if (testing_have_peer()) {
        run(detached, NULL);
    }
}

static void coroutine_fn without_key(void *argument)
{
    g_autofree char *path = g_strdup_printf("%s/image", testing_directory());
    struct graph *graph = graph_create();
    add_secrets();
    int code = create_here("luks", path, "\"key-secret\":\"s\",\"iter-time\":1", NULL);
    g_assert_cmpint(code, ==, 0);
    secret_remove_all();
    struct blockdev_options file = {.driver = BLOCKDEV_DRIVER_FILE, .u.file.filename = path};
    struct blockdev_ref ref = {.kind = BLOCKDEV_REF_DEFINITION, .u.definition = &file};
    struct blockdev_options options = {.driver = BLOCKDEV_DRIVER_LUKS, .u.luks.file = &ref};
    struct node *node;
    code = graph_open(graph, &options, 0, &node, NULL);
    g_assert_cmpint(code, ==, -EINVAL);
    code = graph_open(graph, &options, GRAPH_OPEN_NO_DATA, &node, NULL);
    g_assert_cmpint(code, ==, 0);
    g_assert_true(node->encrypted);
    struct image_info_specific *info = node->driver->specific_info(node);
    g_assert_cmpuint(info->u.luks.data->slots.count, ==, 8);
    g_assert_true(info->u.luks.data->slots.items[0]->active && !info->u.luks.data->slots.items[1]->active);
    image_info_specific_free(info);
    struct backend *backend = testing_backend(graph, node);
    uint8_t data[512];
    struct iovec iov = {data, sizeof(data)};
    code = backend_read(backend, 0, sizeof(data), buffers_one(&iov), 0);
    g_assert_cmpint(code, ==, -EACCES);
    backend_destroy(backend);
    node_release(node);
    graph_destroy(graph);
    g_unlink(path);
}

static void test_without_key(void)
{
    run(without_key, NULL);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    testing_register_drivers();
    driver_register(&driver_luks);
    g_test_add_func("/encryption/luks", test_luks);
    g_test_add_func("/encryption/qcow2", test_qcow2);
    g_test_add_func("/encryption/preallocated", test_preallocated);
    g_test_add_func("/encryption/refusals", test_refusals);
    g_test_add_func("/encryption/detached", test_detached);
    g_test_add_func("/encryption/without-key", test_without_key);
    int status = g_test_run();
    testing_remove_directory();
    return status;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Images that are made here beside images that the peer makes with the same options: each option alone, and random
 * pairs and triples of them. Both refuse or both make one; the headers say the same, byte for byte where no offset is
 * concerned; the peer finds ours clean, describes both alike, and reads the same from them. What has to be refused is
 * refused with nothing made.
 *
 * QCOW2_SEED and QCOW2_CASES choose other combinations than the short slice.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "driver/drivers.h"
#include "driver/format/qcow2_format.h"
#include "driver/format/qcow2_image.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib/gstdio.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define DISK_SIZE 1000448 /* no multiple of a cluster */
#define IMAGE "t.qcow2"
#define DATA "t.data"
#define BASE "base.raw"

/* One choice: as the peer's -o has it, and as QMP. */
struct choice {
    const char *text, *json;
};
static const struct choice choices[] = {
    {"compat=0.10", "\"version\": \"v2\""},
    {"compat=1.1", "\"version\": \"v3\""},
    {"cluster_size=512", "\"cluster-size\": 512"},
    {"cluster_size=4k", "\"cluster-size\": 4096"},
    {"cluster_size=8k", "\"cluster-size\": 8192"},
    {"cluster_size=16k", "\"cluster-size\": 16384"},
    {"cluster_size=2M", "\"cluster-size\": 2097152"},
    {"refcount_bits=1", "\"refcount-bits\": 1"},
    {"refcount_bits=8", "\"refcount-bits\": 8"},
    {"refcount_bits=64", "\"refcount-bits\": 64"},
    {"lazy_refcounts=on", "\"lazy-refcounts\": true"},
    {"extended_l2=on", "\"extended-l2\": true"},
    {"compression_type=zlib", "\"compression-type\": \"zlib\""},
    {"compression_type=zstd", "\"compression-type\": \"zstd\""},
    {"preallocation=metadata", "\"preallocation\": \"metadata\""},
    {"preallocation=falloc", "\"preallocation\": \"falloc\""},
    {"preallocation=full", "\"preallocation\": \"full\""},
    {"backing_file=" BASE ",backing_fmt=raw", "\"backing-file\": \"" BASE "\", \"backing-fmt\": \"raw\""},
    {"data_file=" DATA, "\"data-file\": {\"driver\": \"file\", \"filename\": \"" DATA "\"}"},
    {"data_file=" DATA ",data_file_raw=on",
     "\"data-file\": {\"driver\": \"file\", \"filename\": \"" DATA "\"}, \"data-file-raw\": true"},
    {"data_file_raw=on", "\"data-file-raw\": true"},
    {"cluster_size=1000", "\"cluster-size\": 1000"},
    {"refcount_bits=3", "\"refcount-bits\": 3"},
};

static struct blockdev_create_options *parse(const char *text)
{
    struct blockdev_create_options *options = NULL;
    struct error *error = NULL;
    json_t *json = json_loads(text, 0, NULL);
    g_assert_nonnull(json);
    if (blockdev_create_options_from_json(json, "", &options, &error) < 0) {
        g_error("%s: %s", text, error->message);
    }
    json_decref(json);
    return options;
}

/* As QMP would. */
static int coroutine_fn create(const struct image_driver *driver, const char *text)
{
    struct graph *graph = graph_create();
    struct blockdev_create_options *options = parse(text);
    auto_error error = NULL;
    int code = driver->create(graph, options, &error);
    if (code < 0) {
        g_assert_nonnull(error);
        g_test_message("%s: %s", text, error->message);
    }
    blockdev_create_options_free(options);
    g_assert_true(list_is_empty(&graph->nodes));
    graph_destroy(graph);
    return code;
}

static int coroutine_fn create_ours(const struct choice *const *chosen, unsigned count)
{
    g_autoptr(GString) text = g_string_new("");
    bool data = false;
    for (unsigned i = 0; i < count; i++) {
        g_string_append_printf(text, ", %s", chosen[i]->json);
        data |= strstr(chosen[i]->json, "data-file\"") != NULL;
    }
    g_assert_cmpint(create(driver_file.image, "{\"driver\": \"file\", \"filename\": \"" IMAGE "\", \"size\": 0}"), ==,
                    0);
    if (data) {
        g_autofree char *file = g_strdup_printf("{\"driver\": \"file\", \"filename\": \"" DATA "\", \"size\": %u}",
                                                strstr(text->str, "raw") ? DISK_SIZE : 0);
        g_assert_cmpint(create(driver_file.image, file), ==, 0);
    }
    g_autofree char *all = g_strdup_printf(
        "{\"driver\": \"qcow2\", \"size\": %u, \"file\": {\"driver\": \"file\", \"filename\": \"" IMAGE "\"}%s}",
        DISK_SIZE, text->str);
    return create(&qcow2_image, all);
}

static int create_theirs(const struct choice *const *chosen, unsigned count)
{
    g_autoptr(GString) text = g_string_new("");
    for (unsigned i = 0; i < count; i++) {
        g_string_append_printf(text, ",%s", chosen[i]->text);
    }
    return testing_run(false, "qemu-img create -q -f qcow2 -o size=%u%s " IMAGE, DISK_SIZE, text->str);
}

static json_t *describe(void)
{
    g_autofree char *output = NULL;
    int status = 0;
    g_assert_true(g_spawn_command_line_sync("qemu-img info --output=json " IMAGE, &output, NULL, &status, NULL));
    g_assert_cmpint(status, ==, 0);
    json_t *json = json_loads(output, 0, NULL);
    g_assert_nonnull(json);
    json_object_del(json, "actual-size");
    json_object_del(json, "children"); /* the file's length */
    return json;
}

/* The header cluster without the offsets of tables. */
static GBytes *header_of(void)
{
    char *content = NULL;
    size_t bytes = 0;
    g_assert_true(g_file_get_contents(IMAGE, &content, &bytes, NULL));
    struct qcow2_disk_header *header = (struct qcow2_disk_header *)content;
    header->l1_table_offset = header->refcount_table_offset = 0;
    header->refcount_table_clusters = 0;
    return g_bytes_new_take(content, MIN(bytes, 512 + 512));
}

struct result {
    int code;
    json_t *info;
    GBytes *header;
};

static struct result look(int code)
{
    return code == 0 ? (struct result){0, describe(), header_of()} : (struct result){code};
}

static void result_clear(struct result *result)
{
    json_decref(result->info);
    g_bytes_unref(result->header);
}

/* Only as far as neither is a table: clusters of 512 bytes have some in that range. */
static bool same_header(const struct result *a, const struct result *b)
{
    size_t bytes, other;
    const struct qcow2_disk_header *x = g_bytes_get_data(a->header, &bytes);
    const void *y = g_bytes_get_data(b->header, &other);
    size_t cluster = (size_t)1 << GUINT32_FROM_BE(x->cluster_bits);
    size_t some = MIN(cluster, MIN(bytes, other));
    return memcmp(x, y, some) == 0;
}

static void coroutine_fn try(const struct choice *const *chosen, unsigned count)
{
    g_autoptr(GString) name = g_string_new("");
    for (unsigned i = 0; i < count; i++) {
        g_string_append_printf(name, " %s", chosen[i]->text);
    }
    g_unlink(DATA);
    g_unlink(IMAGE);
    struct result theirs = look(create_theirs(chosen, count));
    bool data = g_file_test(DATA, G_FILE_TEST_EXISTS);
    g_rename(IMAGE, "peer.qcow2");
    g_unlink(DATA);
    struct result ours = look(create_ours(chosen, count));
    if ((ours.code == 0) != (theirs.code == 0)) {
        g_error("%s: we %s, the peer does%s", name->str, ours.code ? "refuse" : "make it", ours.code ? "" : " not");
    }
    if (ours.code == 0) {
        testing_run(true, "qemu-img check -q " IMAGE);
        if (!json_equal(ours.info, theirs.info)) {
            g_error("%s: ours %s, the peer's %s", name->str, json_dumps(ours.info, 0), json_dumps(theirs.info, 0));
        }
        if (!same_header(&ours, &theirs)) {
            g_error("%s: the headers differ", name->str);
        }
        if (data) { /* both images would name it */
            testing_run(true, "qemu-img compare -q -f qcow2 -F raw " IMAGE " %s",
                        strstr(name->str, "backing") ? BASE : "zero.raw");
        } else {
            testing_run(true, "qemu-img compare -q " IMAGE " peer.qcow2");
        }
    }
    result_clear(&ours);
    result_clear(&theirs);
}

static bool alike(const struct choice *a, const struct choice *b)
{
    size_t length = strcspn(a->text, "=");
    return strncmp(a->text, b->text, MIN(length, 9)) == 0;
}

static void begin(void)
{
    g_assert_cmpint(g_chdir(testing_directory()), ==, 0);
    g_autofree char *noise = g_malloc(DISK_SIZE);
    memset(noise, 0x5a, DISK_SIZE);
    g_assert_true(g_file_set_contents(BASE, noise, DISK_SIZE, NULL));
    memset(noise, 0, DISK_SIZE);
    g_assert_true(g_file_set_contents("zero.raw", noise, DISK_SIZE, NULL));
}

static void end(void)
{
    g_assert_cmpint(g_chdir("/"), ==, 0);
    testing_remove_directory();
}

static unsigned number_from(const char *variable, unsigned otherwise)
{
    const char *text = g_getenv(variable);
    return text ? strtoul(text, NULL, 0) : otherwise;
}

static void coroutine_fn test_matrix(void *unused)
{
    uint64_t random = number_from("QCOW2_SEED", 4);
    unsigned cases = number_from("QCOW2_CASES", 24);
    begin();
    for (unsigned i = 0; i < G_N_ELEMENTS(choices); i++) {
        const struct choice *one = &choices[i];
        try(&one, 1);
    }
    for (unsigned i = 0; i < cases; i++) {
        const struct choice *chosen[3];
        unsigned count = 0;
        for (unsigned tries = 0; tries < (i % 3 ? 2 : 3); tries++) {
            const struct choice *next = &choices[testing_random(&random) % G_N_ELEMENTS(choices)];
            bool fits = true;
            for (unsigned n = 0; n < count; n++) {
                fits = fits && !alike(chosen[n], next);
            }
            if (fits) {
                chosen[count++] = next;
            }
        }
        try(chosen, count);
    }
    end();
}

/* What is in a file whose image cannot be made stays; what was there otherwise, goes. */
static void coroutine_fn test_refusals(void *unused)
{
    static const char *const refused[] = {
        "{\"driver\": \"qcow2\", \"size\": 513, \"file\": {\"driver\": \"file\", \"filename\": \"" IMAGE "\"}}",
        "{\"driver\": \"qcow2\", \"size\": 9223372036854774784, \"file\": {\"driver\": \"file\", \"filename\": \"" IMAGE
        "\"}}",
        "{\"driver\": \"qcow2\", \"size\": 1024, \"file\": \"nobody\"}",
        "{\"driver\": \"qcow2\", \"size\": 1024, \"file\": {\"driver\": \"file\", \"read-only\": true, \"filename\": "
        "\"" IMAGE "\"}}",
        "{\"driver\": \"qcow2\", \"size\": 1024, \"file\": {\"driver\": \"file\", \"filename\": \"" IMAGE
        "\"}, \"backing-fmt\": \"raw\"}",
    };
    begin();
    for (unsigned i = 0; i < G_N_ELEMENTS(refused); i++) {
        g_autofree char *left = NULL;
        g_assert_true(g_file_set_contents(IMAGE, "precious", -1, NULL));
        g_assert_cmpint(create(&qcow2_image, refused[i]), <, 0);
        g_assert_true(g_file_get_contents(IMAGE, &left, NULL, NULL));
        g_assert_cmpstr(left, ==, "precious");
    }
    end();
}

static void expect_file(const char *name, uint64_t size, bool allocated)
{
    GStatBuf status;
    g_assert_cmpint(g_stat(name, &status), ==, 0);
    g_assert_cmpuint(status.st_size, ==, size);
    if (allocated) {
        g_assert_cmpuint(status.st_blocks * UINT64_C(512), >=, size);
    } else {
        g_assert_cmpuint(status.st_blocks, ==, 0);
    }
}

static void coroutine_fn test_file(void *unused)
{
    begin();
    g_assert_true(g_file_set_contents("f", "precious", -1, NULL));
    g_assert_cmpint(create(driver_file.image, "{\"driver\": \"file\", \"filename\": \"f\", \"size\": 1000000}"), ==, 0);
    expect_file("f", 1000000, false);
    static const char *const modes[] = {"falloc", "full"};
    for (unsigned i = 0; i < G_N_ELEMENTS(modes); i++) {
        g_autofree char *text = g_strdup_printf("{\"driver\": \"file\", \"filename\": \"f\", \"size\": 3000001, "
                                                "\"preallocation\": \"%s\", \"nocow\": true}",
                                                modes[i]);
        g_assert_cmpint(create(driver_file.image, text), ==, 0);
        expect_file("f", 3000001, true);
    }
    /* Refused: nothing is left of what was not there. */
    g_assert_cmpint(create(driver_file.image, "{\"driver\": \"file\", \"filename\": \"g\", \"size\": 10, "
                                              "\"preallocation\": \"metadata\"}"),
                    ==, -ENOTSUP);
    g_assert_false(g_file_test("g", G_FILE_TEST_EXISTS));
    g_assert_cmpint(create(driver_file.image, "{\"driver\": \"file\", \"filename\": \"\", \"size\": 10}"), ==, -EINVAL);
    end();
}

static void run(gconstpointer test)
{
    struct loop *loop;
    g_assert_no_errno(loop_create(ENGINE_AUTO, &loop, NULL));
    loop_run_coroutine(loop, (void (*)(void *))test, NULL);
    loop_destroy(loop);
}

static void run_with_peer(gconstpointer test)
{
    if (testing_have_peer()) {
        run(test);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    testing_register_drivers();
    g_test_add_data_func("/qcow2/create/matrix", test_matrix, run_with_peer);
    g_test_add_data_func("/qcow2/create/refusals", test_refusals, run);
    g_test_add_data_func("/qcow2/create/file", test_file, run);
    return g_test_run();
}

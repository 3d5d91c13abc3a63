/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What an image will take, beside what the peer says: random options and sizes without a source, and sources of random
 * content: raw ones with holes, qcow2 images with a backing file, zeroes and bitmaps.
 *
 * QCOW2_SEED and QCOW2_CASES choose others than the short slice.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/drivers.h"
#include "driver/format/qcow2_image.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include <glib/gstdio.h>
#include <jansson.h>

static uint64_t below(uint64_t *random, uint64_t limit)
{
    return testing_random(random) % limit;
}

/* Options as the peer and as QMP have them. */
struct asked {
    GString *text, *json;
    unsigned cluster_bits;
};

static void ask(struct asked *asked, const char *name, const char *member, const char *value, bool quoted)
{
    g_string_append_printf(asked->text, "%s%s=%s", asked->text->len ? "," : "", name, value);
    g_string_append_printf(asked->json, quoted ? ", \"%s\": \"%s\"" : ", \"%s\": %s", member, value);
}

static void choose_options(struct asked *asked, uint64_t *random, bool may_have_backing)
{
    static const char *const modes[] = {"off", "metadata", "falloc", "full"};
    bool extended = below(random, 4) == 0;
    bool v2 = !extended && below(random, 5) == 0;
    g_autofree char *cluster = NULL;
    *asked = (struct asked){g_string_new(NULL), g_string_new(NULL),
                            extended ? 14 + below(random, 8) : 9 + below(random, 13)};
    cluster = g_strdup_printf("%u", 1u << asked->cluster_bits);
    ask(asked, "cluster_size", "cluster-size", cluster, false);
    if (extended) {
        g_string_append(asked->text, ",extended_l2=on");
        g_string_append(asked->json, ", \"extended-l2\": true");
    }
    if (v2) {
        g_string_append(asked->text, ",compat=0.10");
        g_string_append(asked->json, ", \"version\": \"v2\"");
    } else {
        g_autofree char *bits = g_strdup_printf("%u", 1u << below(random, 7));
        ask(asked, "refcount_bits", "refcount-bits", bits, false);
    }
    if (may_have_backing && below(random, 3) == 0) {
        ask(asked, "backing_file", "backing-file", "nobody", true);
        ask(asked, "backing_fmt", "backing-fmt", "raw", true);
    }
    ask(asked, "preallocation", "preallocation", modes[below(random, 2) ? 0 : below(random, G_N_ELEMENTS(modes))],
        true);
}

static void asked_clear(struct asked *asked)
{
    g_string_free(asked->text, TRUE);
    g_string_free(asked->json, TRUE);
}

static json_t *ask_peer(const char *arguments)
{
    g_autofree char *command = g_strdup_printf("qemu-img measure --output=json -O %s", arguments);
    g_autofree char *output = NULL;
    int status = 0;
    g_assert_true(g_spawn_command_line_sync(command, &output, NULL, &status, NULL));
    if (status != 0) {
        return NULL;
    }
    json_t *json = json_loads(output, 0, NULL);
    g_assert_nonnull(json);
    return json;
}

static json_t *coroutine_fn ask_ours(const struct image_driver *driver, const char *text, struct backend *source)
{
    struct blockdev_create_options *options = NULL;
    struct block_measure_info info = {0};
    json_t *json = json_loads(text, 0, NULL);
    g_assert_nonnull(json);
    g_assert_cmpint(blockdev_create_options_from_json(json, "", &options, NULL), ==, 0);
    json_decref(json);
    int code = driver->measure(options, source, &info, NULL);
    blockdev_create_options_free(options);
    return code == 0 ? block_measure_info_to_json(&info) : NULL;
}

/* Takes both. */
static void expect_same(json_t *ours, json_t *theirs, const char *what)
{
    if (!ours != !theirs || (ours && !json_equal(ours, theirs))) {
        g_error("%s: ours %s, the peer's %s", what, ours ? json_dumps(ours, 0) : "none",
                theirs ? json_dumps(theirs, 0) : "none");
    }
    json_decref(ours);
    json_decref(theirs);
}

static void coroutine_fn measure_size(uint64_t *random)
{
    struct asked asked;
    uint64_t size = testing_random(random) >> (10 + below(random, 44));
    choose_options(&asked, random, true);
    g_autofree char *theirs = g_strdup_printf("qcow2 -o %s --size %" G_GUINT64_FORMAT, asked.text->str, size);
    g_autofree char *ours = g_strdup_printf(
        "{\"driver\": \"qcow2\", \"file\": \"none\", \"size\": %" G_GUINT64_FORMAT "%s}", size, asked.json->str);
    expect_same(ask_ours(&qcow2_image, ours, NULL), ask_peer(theirs), theirs);
    asked_clear(&asked);
}

static void coroutine_fn measure_source(uint64_t *random, const char *path, const char *format)
{
    struct asked asked;
    struct graph *graph = graph_create();
    struct node *node = testing_add(graph, NULL,
                                    "{\"driver\":\"%s\",\"node-name\":\"top\",\"read-only\":true,"
                                    "\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}",
                                    format, path);
    struct backend *source = testing_backend(graph, node);
    for (unsigned i = 0; i < 3; i++) {
        choose_options(&asked, random, true);
        g_autofree char *theirs = g_strdup_printf("qcow2 -f %s -o %s %s", format, asked.text->str, path);
        g_autofree char *ours =
            g_strdup_printf("{\"driver\": \"qcow2\", \"file\": \"none\", \"size\": %" G_GUINT64_FORMAT "%s}",
                            backend_size(source), asked.json->str);
        expect_same(ask_ours(&qcow2_image, ours, source), ask_peer(theirs), theirs);
        asked_clear(&asked);
    }
    g_autofree char *raw = g_strdup_printf("raw -f %s %s", format, path);
    expect_same(ask_ours(driver_file.image, "{\"driver\": \"file\", \"filename\": \"x\", \"size\": 0}", source),
                ask_peer(raw), raw);
    backend_destroy(source);
    graph_delete_all(graph);
    graph_destroy(graph);
}

/* A chain of two by the peer. */
static void make_images(uint64_t *random, const char *base, const char *top)
{
    unsigned size = 512 * (1 + below(random, 8000));
    unsigned bits = 9 + below(random, 9);
    testing_run(true, "qemu-img create -q -f qcow2 -o cluster_size=%u,lazy_refcounts=off %s %u", 1u << bits, base,
                size);
    testing_run(true, "qemu-img create -q -f qcow2 -b %s -F qcow2 %s %u", base, top,
                size + 512 * (unsigned)below(random, 3000));
    for (unsigned i = 0; i < 2; i++) {
        g_autoptr(GString) commands = g_string_new("qemu-io");
        uint64_t limit = size;
        for (unsigned n = 0; n < 6; n++) {
            uint64_t offset = below(random, limit), bytes = 1 + below(random, limit - offset);
            g_string_append_printf(commands, " -c \"%s %" G_GUINT64_FORMAT " %" G_GUINT64_FORMAT "\"",
                                   below(random, 3) ? "write" : "write -z", offset / 512 * 512,
                                   align_up(bytes / (1 + below(random, 20)) + 1, 512));
        }
        g_string_append_printf(commands, " %s", i ? top : base);
        testing_run(false, "%s", commands->str);
    }
    for (unsigned i = below(random, 3); i > 0; i--) {
        testing_run(true, "qemu-img bitmap --add -g %u %s %sbitmap%u", 512u << below(random, 12), top,
                    below(random, 2) ? "" : "a-bitmap-with-a-longer-name-", i);
    }
}

static void make_raw(uint64_t *random, const char *path)
{
    int size = 1 + (int)below(random, 4000000);
    g_autofree char *data = g_malloc(100000);
    memset(data, 1, 100000);
    FILE *file = fopen(path, "w");
    g_assert_nonnull(file);
    for (unsigned i = 0; i < 5; i++) {
        fseek(file, (long)below(random, size), SEEK_SET);
        fwrite(data, 1, below(random, 100000), file);
    }
    fclose(file);
}

static uint64_t number(const char *variable, uint64_t otherwise)
{
    const char *text = g_getenv(variable);
    return text ? g_ascii_strtoull(text, NULL, 10) : otherwise;
}

static void coroutine_fn test_sizes(void *unused)
{
    uint64_t random = number("QCOW2_SEED", 1);
    for (uint64_t i = 0; i < number("QCOW2_CASES", 30); i++) {
        measure_size(&random);
    }
}

static void coroutine_fn test_sources(void *unused)
{
    uint64_t random = number("QCOW2_SEED", 1);
    g_autofree char *base = g_strdup_printf("%s/base.qcow2", testing_directory());
    g_autofree char *top = g_strdup_printf("%s/top.qcow2", testing_directory());
    g_autofree char *raw = g_strdup_printf("%s/raw", testing_directory());
    for (uint64_t i = 0; i < number("QCOW2_CASES", 30) / 5; i++) {
        make_images(&random, base, top);
        measure_source(&random, top, "qcow2");
        make_raw(&random, raw);
        measure_source(&random, raw, "raw");
    }
    testing_remove_directory();
}

static void run(gconstpointer test)
{
    struct loop *loop;
    if (!testing_have_peer()) {
        return;
    }
    g_assert_no_errno(loop_create(ENGINE_AUTO, &loop, NULL));
    loop_run_coroutine(loop, (void (*)(void *))test, NULL);
    loop_destroy(loop);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    testing_register_drivers();
    g_test_add_data_func("/qcow2/measure/sizes", test_sizes, run);
    g_test_add_data_func("/qcow2/measure/sources", test_sources, run);
    return g_test_run();
}

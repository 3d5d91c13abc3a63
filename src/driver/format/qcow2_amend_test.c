/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Amend. Each change of options leaves an image that reads the same, snapshots too, in which a check finds nothing.
 * With the power cut at any change that it makes, what is left reads the same and has leaks at most, and the amendment
 * can be tried again. What cannot be is refused with nothing written.
 */
#include "base/size.h"
#include "block/driver.h"
#include "driver/format/qcow2_cut_testing.h"
#include "driver/format/qcow2_format.h"
#include "driver/format/qcow2_image.h"
#include "loop/loop.h"
#include <errno.h>
#include <string.h>

struct change {
    const char *options; /* JSON, as blockdev-create-options without `file` and `size` */
    struct cut_shape shape;
    uint64_t size;    /* 0: it stays */
    int refused;      /* negative errno */
    unsigned version; /* what it is to be */
    unsigned order;
};

#define SHAPE(v, bits, width, back, snap)                                                                         \
    {                                                                                                             \
        .version = (v), .cluster_bits = (bits), .refcount_bits = (width), .backing = (back), .snapshots = (snap), \
        .compressed = true                                                                                        \
    }

static const struct change changes[] = {
    {"{\"version\":\"v2\"}", SHAPE(3, 12, 16, false, true), 0, 0, 2, 4},
    {"{\"version\":\"v2\"}", SHAPE(3, 12, 16, true, true), 0, 0, 2, 4},
    {"{\"version\":\"v2\",\"refcount-bits\":16}", SHAPE(3, 9, 64, true, false), 0, 0, 2, 4},
    {"{\"version\":\"v3\"}", SHAPE(2, 12, 16, true, true), 0, 0, 3, 4},
    {"{\"version\":\"v3\",\"refcount-bits\":8,\"lazy-refcounts\":true}", SHAPE(2, 12, 16, false, false), 0, 0, 3, 3},
    {"{\"refcount-bits\":64}", SHAPE(3, 9, 8, false, true), 0, 0, 3, 6},
    {"{\"refcount-bits\":2}", SHAPE(3, 12, 16, false, false), 0, -ERANGE, 3, 4},
    {"{\"lazy-refcounts\":true}", SHAPE(3, 12, 16, false, true), 0, 0, 3, 4},
    {"{\"refcount-bits\":32}", SHAPE(3, 12, 16, false, false), 3 << 20, 0, 3, 5},
    {"{\"lazy-refcounts\":true}", SHAPE(2, 12, 16, false, false), 0, -EINVAL, 2, 4},
    {"{\"refcount-bits\":32}", SHAPE(2, 12, 16, false, false), 0, -EINVAL, 2, 4},
    {"{\"version\":\"v2\"}", SHAPE(3, 12, 32, false, false), 0, -EINVAL, 3, 5},
    {"{\"version\":\"v2\"}",
     {.version = 3, .cluster_bits = 14, .refcount_bits = 16, .extended = true},
     0,
     -ENOTSUP,
     3,
     4},
    {"{\"cluster-size\":65536}", SHAPE(3, 12, 16, false, false), 0, -ENOTSUP, 3, 4},
    {"{\"preallocation\":\"full\"}", SHAPE(3, 12, 16, false, false), 0, -ENOTSUP, 3, 4},
    {"{\"extended-l2\":true}", SHAPE(3, 14, 16, false, false), 0, -ENOTSUP, 3, 4},
    {"{\"compression-type\":\"zstd\"}", SHAPE(3, 12, 16, false, false), 0, -ENOTSUP, 3, 4},
    {"{\"backing-file\":\"x\"}", SHAPE(3, 12, 16, true, false), 0, -ENOTSUP, 3, 4},
    {"{\"backing-file\":\"nowhere\",\"cluster-size\":4096}", SHAPE(3, 12, 16, true, false), 0, 0, 3, 4},
    {"{\"data-file-raw\":true}", SHAPE(3, 12, 16, false, false), 0, -EINVAL, 3, 4},
    {"{\"refcount-bits\":3}", SHAPE(3, 12, 16, false, false), 0, -EINVAL, 3, 4},
    {"{}", SHAPE(3, 12, 16, false, false), 1000, -EINVAL, 3, 4},
};

struct reports {
    unsigned count;
    uint64_t done, of;
};

static void note_progress(uint64_t done, uint64_t of, void *argument)
{
    struct reports *reports = argument;
    g_assert_cmpuint(done, >=, reports->done);
    g_assert_cmpuint(done, <=, of);
    *reports = (struct reports){reports->count + 1, done, of};
}

static int coroutine_fn amend(struct node *node, void *argument)
{
    const struct change *change = argument;
    json_t *json = json_loads(change->options, 0, NULL);
    g_assert_nonnull(json);
    json_object_set_new(json, "driver", json_string("qcow2"));
    json_object_set_new(json, "file", json_string("disk"));
    json_object_set_new(json, "size", json_integer((json_int_t)change->size));
    struct blockdev_create_options *options = NULL;
    struct error *error = NULL;
    int code = blockdev_create_options_from_json(json, "", &options, &error);
    g_assert_cmpint(code, ==, 0);
    struct reports reports = {0};
    struct image_progress progress = {note_progress, &reports};
    struct image_amendment amendment = {.options = options};
    code = node->driver->image->amend(node, &amendment, &progress, &error);
    g_assert_true((code < 0) == (error != NULL));
    g_assert_true(code < 0 || reports.done == reports.of);
    error_free(error);
    blockdev_create_options_free(options);
    json_decref(json);
    return code;
}

struct views {
    GArray *active, *first, *second;
};

static void coroutine_fn read_views(const GByteArray *image, bool snapshots, struct views *ret)
{
    ret->active = cut_read(image, NULL);
    ret->first = snapshots ? cut_read(image, "first") : g_array_new(FALSE, FALSE, 8);
    ret->second = snapshots ? cut_read(image, "second") : g_array_new(FALSE, FALSE, 8);
}

static void free_views(struct views *views)
{
    g_array_unref(views->active);
    g_array_unref(views->first);
    g_array_unref(views->second);
}

/* The image reads as `wanted` and has leaks at most, or not even those. */
static void coroutine_fn assert_whole(const GByteArray *image, const struct change *change, const struct views *wanted,
                                      bool leaks_allowed, uint64_t cut)
{
    uint64_t errors;
    uint64_t leaks;
    struct views now;
    int code = cut_check(image, &errors, &leaks);
    if (code < 0 || errors || (leaks && !leaks_allowed)) {
        g_error("%s, cut %" G_GINT64_FORMAT ": %d, %" G_GUINT64_FORMAT " errors, %" G_GUINT64_FORMAT " leaks",
                change->options, (int64_t)cut, code, errors, leaks);
    }
    read_views(image, change->shape.snapshots, &now);
    if (cut_same(now.active, wanted->active) != wanted->active->len ||
        cut_same(now.first, wanted->first) != wanted->first->len ||
        cut_same(now.second, wanted->second) != wanted->second->len) {
        g_error("%s, cut %" G_GINT64_FORMAT ": it does not read as before", change->options, (int64_t)cut);
    }
    free_views(&now);
}

static void coroutine_fn assert_changed(const GByteArray *image, const struct change *change)
{
    g_assert_cmpuint(image->data[7], ==, change->version);
    if (change->version >= 3) {
        g_assert_cmpuint(image->data[99], ==, change->order);
    }
    if (change->size) {
        g_assert_cmpuint(cut_load(image, 24), ==, change->size);
    }
    if (strstr(change->options, "lazy-refcounts")) {
        g_assert_cmpuint(image->data[87] & QCOW2_COMPATIBLE_LAZY_REFCOUNTS, ==, 1);
    }
}

static void coroutine_fn one_change(const struct change *change, uint64_t seed)
{
    GByteArray *good = cut_make(&change->shape, seed);
    GByteArray *after;
    uint64_t count;
    uint64_t ignored;
    struct views views;
    read_views(good, change->shape.snapshots, &views);
    int code = cut_run(good, false, UINT64_MAX, 0, amend, (void *)change, &after, &count);
    g_assert_cmpint(code, ==, change->refused);
    assert_whole(after, change, &views, false, UINT64_MAX);
    if (change->refused) {
        g_assert_cmpuint(after->len, ==, good->len);
        g_assert_true(memcmp(after->data, good->data, good->len) == 0);
    } else {
        assert_changed(after, change);
    }
    g_byte_array_unref(after);
    for (uint64_t cut = 0; !change->refused && cut < count; cut++) {
        GByteArray *left;
        (void)cut_run(good, false, cut, cut * 31 + seed, amend, (void *)change, &left, &ignored);
        assert_whole(left, change, &views, true, cut);
        code = cut_run(left, false, UINT64_MAX, 0, amend, (void *)change, &after, &ignored);
        g_assert_cmpint(code, ==, 0);
        assert_whole(after, change, &views, true, cut);
        assert_changed(after, change);
        g_byte_array_unref(after);
        g_byte_array_unref(left);
    }
    free_views(&views);
    g_byte_array_unref(good);
}

static void coroutine_fn run_changes(void *argument)
{
    const char *text = g_getenv("QCOW2_SEED");
    uint64_t seed = text ? g_ascii_strtoull(text, NULL, 10) : 1;
    for (unsigned i = 0; i < G_N_ELEMENTS(changes); i++) {
        one_change(&changes[i], seed + i);
    }
}

static struct loop *loop;

static void test_changes(void)
{
    loop_run_coroutine(loop, run_changes, NULL);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    testing_register_drivers();
    int code = loop_create(ENGINE_EPOLL, &loop, NULL);
    g_assert_cmpint(code, ==, 0);
    g_test_add_func("/qcow2/amend/changes-refusals-and-power-cuts", test_changes);
    int status = g_test_run();
    loop_destroy(loop);
    return status;
}

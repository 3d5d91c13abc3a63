/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Check and repair. Each kind of damage is found; a repair of everything leaves an image in which nothing is found and
 * in which all is read that was read before, and it does so too when the power is cut at any change of it and it is
 * tried again. Damage and cuts come from seeds; QCOW2_SEED chooses others.
 *
 * What the numbers are beside the peer's is tested in test/repair_test.py.
 */
#include "base/size.h"
#include "block/driver.h"
#include "driver/format/qcow2_cut_testing.h"
#include "driver/format/qcow2_format.h"
#include "driver/format/qcow2_image.h"
#include "driver/format/qcow2_tally.h"
#include "loop/loop.h"
#include <string.h>

struct damage {
    const char *name;
    void (*apply)(GByteArray *image, uint64_t *random);
    bool harmless; /* everything is read as before, once it is repaired */
};

static unsigned cluster_bits_of(const GByteArray *image)
{
    return cut_load(image, 16) & 0xff;
}

static uint64_t refcount_block(const GByteArray *image)
{
    return cut_load(image, cut_load(image, 48));
}

/* The entry of some guest cluster that has data. */
static uint64_t some_entry(const GByteArray *image, uint64_t *random)
{
    for (;;) {
        uint64_t at = cut_entry(image, testing_random(random) % (1 << 20));
        uint64_t entry = at ? cut_load(image, at) : 0;
        if (entry & QCOW2_OFFSET_MASK && !(entry & (QCOW2_COMPRESSED | QCOW2_ZERO))) {
            return at;
        }
    }
}

static void refcounts_low(GByteArray *image, uint64_t *random)
{
    memset(image->data + refcount_block(image), 0, 64);
}

static void refcounts_high(GByteArray *image, uint64_t *random)
{
    memset(image->data + refcount_block(image) + image->len / 2 / (1u << cluster_bits_of(image)), 3, 8);
}

static void no_refcounts(GByteArray *image, uint64_t *random)
{
    cut_store(image, cut_load(image, 48), 0);
}

static void bad_refcount_table(GByteArray *image, uint64_t *random)
{
    cut_store(image, cut_load(image, 48) + 8, 0x123456789);
}

static void lost_refcount_table(GByteArray *image, uint64_t *random)
{
    cut_store(image, 48, UINT64_C(1) << 40);
}

static void data_over_refcounts(GByteArray *image, uint64_t *random)
{
    cut_store(image, some_entry(image, random), refcount_block(image) | QCOW2_COPIED);
}

static void data_over_l1(GByteArray *image, uint64_t *random)
{
    cut_store(image, some_entry(image, random), cut_load(image, 40) | QCOW2_COPIED);
}

static void data_over_l2(GByteArray *image, uint64_t *random)
{
    uint64_t at = some_entry(image, random);
    cut_store(image, at, (at & ~((UINT64_C(1) << cluster_bits_of(image)) - 1)) | QCOW2_COPIED);
}

static void data_twice(GByteArray *image, uint64_t *random)
{
    cut_store(image, some_entry(image, random), cut_load(image, some_entry(image, random)));
}

static void data_behind_end(GByteArray *image, uint64_t *random)
{
    cut_store(image, some_entry(image, random), UINT64_C(1) << 40 | QCOW2_COPIED);
}

static void reserved_bits(GByteArray *image, uint64_t *random)
{
    uint64_t at = some_entry(image, random);
    cut_store(image, at, cut_load(image, at) | UINT64_C(1) << 58 | 2);
    uint64_t l1 = cut_load(image, 40);
    cut_store(image, l1, cut_load(image, l1) | UINT64_C(1) << 57);
}

static void data_beside_cluster(GByteArray *image, uint64_t *random)
{
    uint64_t at = some_entry(image, random);
    cut_store(image, at, cut_load(image, at) + 512);
}

static void flags(GByteArray *image, uint64_t *random)
{
    for (unsigned i = 0; i < 3; i++) {
        uint64_t at = some_entry(image, random);
        cut_store(image, at, cut_load(image, at) ^ QCOW2_COPIED);
    }
    uint64_t l1 = cut_load(image, 40);
    cut_store(image, l1, cut_load(image, l1) ^ QCOW2_COPIED);
}

static void l1_over_l2(GByteArray *image, uint64_t *random)
{
    uint64_t l1 = cut_load(image, 40);
    cut_store(image, l1, l1 | QCOW2_COPIED);
}

static void snapshot_without_extra(GByteArray *image, uint64_t *random)
{
    uint64_t at = cut_load(image, 64);
    if (at) {
        memset(image->data + at + 36, 0, 4);
    }
}

static void snapshot_lost(GByteArray *image, uint64_t *random)
{
    uint64_t at = cut_load(image, 64);
    if (at) {
        cut_store(image, at, cut_load(image, at) + 512);
    }
}

static void dirty(GByteArray *image, uint64_t *random)
{
    if (image->data[7] >= 3) {
        image->data[79] |= QCOW2_INCOMPATIBLE_DIRTY | QCOW2_INCOMPATIBLE_CORRUPT;
    }
    refcounts_low(image, random);
}

static const struct damage damages[] = {
    {"refcounts too low", refcounts_low, true},
    {"refcounts too high", refcounts_high, true},
    {"no refcounts", no_refcounts, true},
    {"a bad refcount table", bad_refcount_table, true},
    {"a lost refcount table", lost_refcount_table, true},
    {"data over refcounts", data_over_refcounts, false},
    {"data over the L1 table", data_over_l1, false},
    {"data over an L2 table", data_over_l2, false},
    {"data used twice", data_twice, false},
    {"data behind the end", data_behind_end, false},
    {"reserved bits", reserved_bits, true},
    {"data beside a cluster", data_beside_cluster, false},
    {"flags", flags, true},
    {"an L1 entry that shows the L1 table", l1_over_l2, false},
    {"a snapshot without extra data", snapshot_without_extra, true},
    {"a snapshot that is lost", snapshot_lost, true},
    {"a dirty image", dirty, true},
};

static int coroutine_fn repair_all(struct node *node, void *argument)
{
    struct image_check *result = g_new0(struct image_check, 1);
    int code = node->driver->image->check(node, IMAGE_FIX_ALL, result, NULL);
    if (code == 0) {
        g_assert_cmpint(result->check_errors, ==, 0);
        g_assert_cmpint(result->corruptions, ==, 0);
        g_assert_cmpint(result->leaks, ==, 0);
    }
    result->filename = g_strdup("");
    result->format = g_strdup("");
    image_check_free(result);
    return code;
}

static void coroutine_fn assert_clean(const GByteArray *image, const char *name)
{
    uint64_t errors;
    uint64_t leaks;
    int code = cut_check(image, &errors, &leaks);
    if (code < 0 || errors || leaks) {
        g_error("%s: not clean after a repair: %d, %" G_GUINT64_FORMAT " errors, %" G_GUINT64_FORMAT " leaks", name,
                code, errors, leaks);
    }
    if (image->data[7] >= 3) {
        g_assert_cmpuint(image->data[79] & 3, ==, 0);
    }
}

/* The power is cut at `cut`; the repair is tried again. `original`: how the good image reads; `before`: how much of
 * that the damaged one does, `kept`: how much a repair without a cut leaves. */
static void coroutine_fn cut_once(const GByteArray *damaged, const char *name, uint64_t cut, const GArray *original,
                                  unsigned before, unsigned kept)
{
    GByteArray *left;
    GByteArray *after;
    uint64_t changes;
    (void)cut_run(damaged, true, cut, cut * 7919 + 1, repair_all, NULL, &left, &changes);
    g_autoptr(GArray) between = cut_read(left, NULL);
    if (cut_same(original, between) < before) {
        g_error("%s: a cut at change %" G_GUINT64_FORMAT " leaves less than there was", name, cut);
    }
    int code = cut_run(left, true, UINT64_MAX, 0, repair_all, NULL, &after, &changes);
    g_assert_cmpint(code, ==, 0);
    assert_clean(after, name);
    g_autoptr(GArray) now = cut_read(after, NULL);
    if (cut_same(original, now) < kept) {
        g_error("%s: after a cut at change %" G_GUINT64_FORMAT " only %u of %u pieces are left", name, cut,
                cut_same(original, now), kept);
    }
    g_byte_array_unref(left);
    g_byte_array_unref(after);
}

static void coroutine_fn one_damage(const GByteArray *good, const GArray *original, const struct damage *damage,
                                    uint64_t *random)
{
    GByteArray *damaged = g_byte_array_new();
    GByteArray *after;
    uint64_t changes;
    uint64_t errors;
    uint64_t leaks;
    g_byte_array_append(damaged, good->data, good->len);
    damage->apply(damaged, random);
    bool touched = memcmp(damaged->data, good->data, good->len) != 0;
    int code = cut_check(damaged, &errors, &leaks);
    g_assert_cmpint(code, ==, 0);
    g_assert_true(!touched || errors || leaks || damaged->data[79] & 3);
    g_autoptr(GArray) before = cut_read(damaged, NULL);
    code = cut_run(damaged, true, UINT64_MAX, 0, repair_all, NULL, &after, &changes);
    g_assert_cmpint(code, ==, 0);
    assert_clean(after, damage->name);
    g_autoptr(GArray) now = cut_read(after, NULL);
    g_assert_cmpuint(cut_same(original, now), >=, cut_same(original, before));
    g_assert_cmpuint(cut_same(before, now), >=, cut_same(before, before));
    if (damage->harmless) {
        g_assert_cmpuint(cut_same(original, now), ==, original->len);
    }
    for (uint64_t cut = 0; cut < changes; cut++) {
        cut_once(damaged, damage->name, cut, original, cut_same(original, before), cut_same(original, now));
    }
    g_byte_array_unref(damaged);
    g_byte_array_unref(after);
}

static const struct cut_shape shapes[] = {
    {.version = 3, .cluster_bits = 12, .refcount_bits = 16, .snapshots = true, .compressed = true},
    {.version = 2, .cluster_bits = 9, .snapshots = true},
    {.version = 3, .cluster_bits = 14, .refcount_bits = 64, .extended = true, .backing = true},
};

static void coroutine_fn run_damages(void *argument)
{
    uint64_t random = *(uint64_t *)argument;
    for (unsigned i = 0; i < G_N_ELEMENTS(shapes); i++) {
        GByteArray *good = cut_make(&shapes[i], testing_random(&random));
        assert_clean(good, "a new image");
        g_autoptr(GArray) original = cut_read(good, NULL);
        for (unsigned n = 0; n < G_N_ELEMENTS(damages); n++) {
            one_damage(good, original, &damages[n], &random);
        }
        g_byte_array_unref(good);
    }
}

static struct loop *loop;

static void test_damages(void)
{
    const char *text = g_getenv("QCOW2_SEED");
    uint64_t seed = text ? g_ascii_strtoull(text, NULL, 10) : 1;
    loop_run_coroutine(loop, run_damages, &seed);
}

/* Numbers of every size, over the borders of chunks, and what happens when the memory is spent. */
static void test_tally(void)
{
    uint64_t left = 1 << 20;
    struct qcow2_tally tally;
    g_assert_true(qcow2_tally_init(&tally, 20000, &left));
    for (uint64_t i = 4000; i < 4200; i++) {
        qcow2_tally_add(&tally, i, 1);
        qcow2_tally_add(&tally, i, i % 7 == 0 ? 100000 : 1);
    }
    for (uint64_t i = 4000; i < 4200; i++) {
        g_assert_cmpuint(qcow2_tally_get(&tally, i), ==, i % 7 == 0 ? 100001 : 2);
    }
    g_assert_cmpuint(qcow2_tally_get(&tally, 3999), ==, 0);
    g_assert_cmpuint(qcow2_tally_get(&tally, 1 << 30), ==, 0);
    g_assert_cmpuint(qcow2_tally_skip(&tally, NULL, 5000, 20000), ==, 5000);
    g_assert_cmpuint(qcow2_tally_skip(&tally, NULL, 8192, 20000), ==, 20000);
    g_assert_cmpuint(qcow2_tally_skip(&tally, NULL, 8192, 9000), ==, 9000);
    g_assert_cmpuint(qcow2_tally_skip(&tally, NULL, 30000, 40000), ==, 40000);
    g_assert_cmpuint(qcow2_tally_skip(&tally, &tally, 0, 20000), ==, 0);
    qcow2_tally_set(&tally, 5, UINT64_MAX);
    qcow2_tally_add(&tally, 5, 1);
    g_assert_cmpuint(qcow2_tally_get(&tally, 5), ==, UINT32_MAX);
    g_assert_false(tally.out_of_memory);
    left = 10;
    qcow2_tally_add(&tally, 19999, 1);
    g_assert_true(tally.out_of_memory);
    left = 0;
    qcow2_tally_finish(&tally);
    g_assert_false(qcow2_tally_init(&tally, UINT64_C(1) << 40, &left));
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    testing_register_drivers();
    int code = loop_create(ENGINE_EPOLL, &loop, NULL);
    g_assert_cmpint(code, ==, 0);
    g_test_add_func("/qcow2/check/tally", test_tally);
    g_test_add_func("/qcow2/check/damages-and-power-cuts", test_damages);
    int status = g_test_run();
    loop_destroy(loop);
    return status;
}

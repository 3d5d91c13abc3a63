/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Dirty bitmaps kept in a qcow2 image. Random sequences of writes and of commands on bitmaps, with the image closed and
 * opened between, here and by the peer, which stores all bitmaps again; power cuts at every write, after which a bitmap
 * says that it is not to be believed, or tells at least all that has changed; and directories of rubbish, which must
 * not keep an image from being used.
 *
 * QCOW2_SEED and QCOW2_CASES choose other runs than the short slice.
 */
#include "base/size.h"
#include "block/bitmap.h"
#include "block/dirty.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_bitmap_directory.h"
#include "driver/format/qcow2_image.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib/gstdio.h>
#include <string.h>

enum { CASES = 5, ROUNDS = 4, STEPS = 20, BITMAPS_MAX = 5, CUT_CASES = 2, CUTS_PER_PEER = 23, RUBBISH = 120 };

/* What a bitmap is to be. */
struct model {
    char *name;
    uint64_t granularity;
    bool enabled;
    GByteArray *bits; /* dirty_save() */
};

struct scene {
    uint64_t seed, random, size;
    unsigned cluster_bits;
    bool backing;
    char *path;
    struct graph *graph;
    struct node *node;
    struct backend *backend;
    GPtrArray *models; /* of what was there when the image was closed */
    unsigned serial;
    uint8_t *content; /* scratch */
};

static uint64_t below(struct scene *scene, uint64_t limit)
{
    return testing_random(&scene->random) % limit;
}

static void model_free(void *item)
{
    struct model *model = item;
    g_free(model->name);
    g_byte_array_unref(model->bits);
    g_free(model);
}

/* --- the image --- */

static void coroutine_fn open_image(struct scene *scene, struct memory_disk *disk)
{
    scene->graph = graph_create();
    if (disk) {
        memory_disk_open(disk, scene->graph, "disk");
    }
    g_autofree char *file =
        disk ? g_strdup("\"disk\"") : g_strdup_printf("{\"driver\":\"file\",\"filename\":\"%s\"}", scene->path);
    scene->node = testing_add(scene->graph, NULL,
                              "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"discard\":\"unmap\","
                              "\"cache\":{\"no-flush\":%s},\"file\":%s%s}",
                              disk ? "false" : "true", file,
                              /* the memory disk has no directory to find a backing file from */
                              disk ? ",\"backing\":null" : "");
    scene->backend = testing_backend(scene->graph, scene->node);
}

static void coroutine_fn close_image(struct scene *scene)
{
    backend_destroy(scene->backend);
    g_assert(graph_delete(scene->graph, "top", NULL) == 0);
    struct node *disk = graph_find(scene->graph, "disk");
    if (disk) {
        node_release(disk);
    }
    graph_destroy(scene->graph);
}

static struct bitmap *nth_bitmap(struct scene *scene, unsigned n)
{
    struct list *link = scene->node->bitmaps.next;
    while (n-- > 0) {
        link = link->next;
    }
    return container_of(link, struct bitmap, link);
}

static unsigned bitmap_total(const struct scene *scene)
{
    unsigned count = 0;
    list_for_each (link, &scene->node->bitmaps) {
        count++;
    }
    return count;
}

static GByteArray *bits_of(const struct bitmap *bitmap)
{
    GByteArray *bits = g_byte_array_new();
    g_byte_array_set_size(bits, dirty_saved_bytes(bitmap->dirty));
    dirty_save(bitmap->dirty, 0, bits->len, bits->data);
    return bits;
}

static void remember(struct scene *scene)
{
    g_ptr_array_set_size(scene->models, 0);
    list_for_each (link, &scene->node->bitmaps) {
        const struct bitmap *bitmap = container_of(link, struct bitmap, link);
        struct model *model = g_new(struct model, 1);
        *model = (struct model){g_strdup(bitmap->name), bitmap->granularity, bitmap->enabled, bits_of(bitmap)};
        g_ptr_array_add(scene->models, model);
    }
}

static struct model *find_model(const struct scene *scene, const char *name)
{
    for (unsigned i = 0; i < scene->models->len; i++) {
        struct model *model = scene->models->pdata[i];
        if (g_str_equal(model->name, name)) {
            return model;
        }
    }
    return NULL;
}

/* The bitmaps are those that were remembered. */
static void compare(struct scene *scene, const char *when)
{
    g_assert_cmpuint(bitmap_total(scene), ==, scene->models->len);
    list_for_each (link, &scene->node->bitmaps) {
        const struct bitmap *bitmap = container_of(link, struct bitmap, link);
        const struct model *model = find_model(scene, bitmap->name);
        g_assert_nonnull(model);
        g_assert_true(bitmap->persistent && !bitmap_is_inconsistent(bitmap));
        g_assert_cmpint(bitmap->enabled, ==, model->enabled);
        g_assert_cmpuint(bitmap->granularity, ==, model->granularity);
        g_autoptr(GByteArray) bits = bits_of(bitmap);
        g_assert_cmpuint(bits->len, ==, model->bits->len);
        if (memcmp(bits->data, model->bits->data, bits->len) != 0) {
            g_error("seed %" G_GUINT64_FORMAT ": bitmap '%s' is another one %s", scene->seed, bitmap->name, when);
        }
    }
}

/* --- steps --- */

static void coroutine_fn guest_step(struct scene *scene, struct backend *backend)
{
    uint64_t size = backend_size(backend);
    uint64_t offset = below(scene, size);
    uint64_t bytes = 1 + below(scene, min_u64(size - offset, 100 * KiB));
    struct iovec iov = {scene->content, bytes};
    memset(scene->content, 1 + below(scene, 255), bytes);
    switch (below(scene, 6)) {
    case 0:
        g_assert(backend_write_zeroes(backend, offset, bytes, REQUEST_MAY_UNMAP) >= -EIO);
        break;
    case 1:
        g_assert(backend_discard(backend, offset, bytes) >= -EIO);
        break;
    default:
        g_assert(backend_write(backend, offset, bytes, buffers_one(&iov), 0) >= -EIO);
    }
}

static int coroutine_fn add_bitmap(struct scene *scene)
{
    g_autofree char *name = g_strdup_printf("bitmap %u", ++scene->serial);
    struct bitmap_config config = {.name = name,
                                   .granularity = below(scene, 3) ? UINT64_C(512) << below(scene, 12) : 0,
                                   .persistent = true,
                                   .disabled = below(scene, 4) == 0};
    return bitmap_add(scene->node, &config, NULL, NULL);
}

/* One of `which` (or any) on some bitmap; graph->lock is held, the node is drained. */
enum command { ADD, REMOVE, CLEAR, ENABLE, DISABLE, MERGE, STORE, COMMANDS };

static int coroutine_fn command(struct scene *scene, enum command which)
{
    unsigned count = bitmap_total(scene);
    if (which == STORE) {
        return bitmaps_store(scene->node, NULL);
    }
    if (count == 0 || which == ADD) {
        return count < BITMAPS_MAX ? add_bitmap(scene) : 0;
    }
    struct bitmap *bitmap = nth_bitmap(scene, below(scene, count));
    switch (which) {
    case REMOVE:
        return bitmap_remove(bitmap, NULL);
    case CLEAR:
        return bitmap_clear(bitmap, NULL);
    case MERGE:
        return bitmap_merge(bitmap, nth_bitmap(scene, below(scene, count)), NULL);
    default:
        return bitmap_set_enabled(bitmap, which == ENABLE, NULL);
    }
}

static int coroutine_fn locked_command(struct scene *scene, enum command which)
{
    struct drain drain;
    graph_lock(scene->graph);
    graph_drain_begin(scene->graph, &scene->node, 1, NULL, &drain);
    int code = command(scene, which);
    graph_drain_end(&drain);
    graph_unlock(scene->graph);
    return code;
}

static int coroutine_fn make_snapshot(struct scene *scene)
{
    struct snapshot_info info = {.name = (char *)"snapshot"};
    struct drain drain;
    graph_lock(scene->graph);
    graph_drain_begin(scene->graph, &scene->node, 1, NULL, &drain);
    int code = qcow2_image.snapshot_create(scene->node, &info, NULL);
    if (!list_is_empty(&scene->node->bitmaps) && code == 0) {
        g_assert_cmpint(qcow2_image.snapshot_apply(scene->node, "snapshot", NULL), ==, -EBUSY);
    }
    graph_drain_end(&drain);
    graph_unlock(scene->graph);
    return code;
}

static void coroutine_fn random_steps(void *argument)
{
    struct scene *scene = argument;
    open_image(scene, NULL);
    if (scene->models->len) {
        compare(scene, "after closing and opening");
    }
    for (unsigned step = 0; step < STEPS; step++) {
        uint64_t what = below(scene, 20);
        if (what < 7) {
            g_assert(locked_command(scene, below(scene, COMMANDS)) == 0);
        } else if (what == 7) {
            uint64_t size = align_down(KiB + below(scene, scene->size), 512);
            g_assert(backend_truncate(scene->backend, size, NULL) == 0 || size < backend_size(scene->backend));
        } else if (what == 8 && below(scene, 4) == 0) {
            g_assert(make_snapshot(scene) == 0);
        } else {
            guest_step(scene, scene->backend);
        }
    }
    remember(scene);
    close_image(scene);
}

/* The peer writes, and stores all that there is again. */
static void coroutine_fn after_peer(void *argument)
{
    struct scene *scene = argument;
    open_image(scene, NULL);
    compare(scene, "after the peer had it");
    close_image(scene);
}

static void peer_step(struct loop *loop, struct scene *scene)
{
    /* What the peer writes here is marked in the models as well. */
    for (unsigned i = 0; i < scene->models->len; i++) {
        struct model *model = scene->models->pdata[i];
        model->bits->data[0] |= model->enabled;
    }
    testing_run(true, "qemu-io -f qcow2 -c \"write -P 9 100 50\" %s", scene->path);
    loop_run_coroutine(loop, after_peer, scene);
}

static void make_image(struct scene *scene)
{
    scene->cluster_bits = 9 + below(scene, 8);
    uint64_t clusters = 20 + below(scene, 3000);
    scene->size = align_down(min_u64(clusters << scene->cluster_bits, 4 * MiB), 512);
    scene->path = g_build_filename(testing_directory(), "image.qcow2", NULL);
    scene->content = g_malloc(128 * KiB);
    scene->models = g_ptr_array_new_with_free_func(model_free);
    /* A backing string makes the header's list of extensions longer, and stands in its way. */
    scene->backing = below(scene, 2);
    if (scene->backing) {
        g_autofree char *below_path = g_build_filename(testing_directory(), "below.raw", NULL);
        testing_run(true, "qemu-img create -q -f raw %s 1M", below_path);
        testing_run(true, "qemu-img create -q -f qcow2 -b %s -F raw -o cluster_size=%u %s %" G_GUINT64_FORMAT,
                    below_path, 1u << scene->cluster_bits, scene->path, scene->size);
    } else {
        testing_run(true, "qemu-img create -q -f qcow2 -o cluster_size=%u %s %" G_GUINT64_FORMAT,
                    1u << scene->cluster_bits, scene->path, scene->size);
    }
}

static void random_case(struct loop *loop, struct scene *scene)
{
    for (unsigned round = 0; round < ROUNDS; round++) {
        loop_run_coroutine(loop, random_steps, scene);
        if (round % 2) {
            testing_run(true, "qemu-img check -q %s", scene->path);
            peer_step(loop, scene);
        }
    }
}

/* --- power cuts --- */

/* A case: what is done between opening and closing. */
enum { CUT_GUEST = COMMANDS, CUT_RESIZE, CUT_SNAPSHOT, CUT_NOTHING, CUT_KINDS };

static int coroutine_fn cut_action(struct scene *scene, unsigned kind)
{
    switch (kind) {
    case CUT_GUEST:
        for (unsigned i = 0; i < 5; i++) {
            guest_step(scene, scene->backend);
        }
        return backend_flush(scene->backend);
    case CUT_RESIZE:
        return backend_truncate(scene->backend, backend_size(scene->backend) + 64 * KiB, NULL);
    case CUT_SNAPSHOT:
        return make_snapshot(scene);
    case CUT_NOTHING:
        return 0;
    default:
        return locked_command(scene, kind);
    }
}

static uint8_t *coroutine_fn read_all(struct scene *scene, uint64_t *ret_size)
{
    *ret_size = backend_size(scene->backend);
    uint8_t *bytes = g_malloc(*ret_size);
    struct iovec iov = {bytes, *ret_size};
    g_assert(backend_read(scene->backend, 0, *ret_size, buffers_one(&iov), 0) == 0);
    return bytes;
}

static bool is_marked(const struct bitmap *bitmap, uint64_t offset)
{
    uint64_t at;
    uint64_t bytes;
    return dirty_next(bitmap->dirty, offset, &at, &bytes) && at == offset;
}

/* Those that recorded since `before` was the content tell of each sector that is another one now. */
static void coroutine_fn check_truth(struct scene *scene, const uint8_t *before, uint64_t before_size)
{
    uint64_t size;
    g_autofree uint8_t *now = read_all(scene, &size);
    list_for_each (link, &scene->node->bitmaps) {
        const struct bitmap *bitmap = container_of(link, struct bitmap, link);
        const struct model *model = find_model(scene, bitmap->name);
        if (bitmap_is_inconsistent(bitmap) || !bitmap->enabled || !model || !model->enabled) {
            continue;
        }
        for (uint64_t at = 0; at + 512 <= min_u64(size, before_size); at += 512) {
            if (memcmp(now + at, before + at, 512) != 0 && !is_marked(bitmap, at)) {
                g_error("seed %" G_GUINT64_FORMAT ": bitmap '%s' does not tell of %" G_GUINT64_FORMAT, scene->seed,
                        bitmap->name, at);
            }
        }
    }
}

/* An unchanged one is what it was: nobody wrote, and no command was for it. */
static void check_unchanged(struct scene *scene, bool *ret_all)
{
    *ret_all = bitmap_total(scene) == scene->models->len;
    list_for_each (link, &scene->node->bitmaps) {
        const struct bitmap *bitmap = container_of(link, struct bitmap, link);
        const struct model *model = find_model(scene, bitmap->name);
        if (bitmap_is_inconsistent(bitmap) || !model) {
            *ret_all = false;
            continue;
        }
        g_autoptr(GByteArray) bits = bits_of(bitmap);
        *ret_all &= bits->len == model->bits->len && memcmp(bits->data, model->bits->data, bits->len) == 0;
    }
}

static void coroutine_fn check_leaks_only(struct memory_disk *disk)
{
    struct graph *graph = graph_create();
    struct node *node = NULL;
    struct image_check result = {0};
    json_t *json =
        json_pack("{s:s, s:s, s:s, s:b}", "driver", "qcow2", "node-name", "top", "file", "disk", "read-only", 1);
    struct blockdev_options *options = NULL;
    memory_disk_open(disk, graph, "disk");
    g_assert(blockdev_options_from_json(json, "", &options, NULL) == 0);
    g_assert(graph_open(graph, options, GRAPH_OPEN_CHECK, &node, NULL) == 0);
    graph_lock(graph);
    g_assert(qcow2_image.check(node, IMAGE_FIX_NONE, &result, NULL) == 0);
    graph_unlock(graph);
    g_assert_cmpint(result.check_errors, ==, 0);
    g_assert_cmpint(result.has_corruptions ? result.corruptions : 0, ==, 0);
    for (size_t i = 0; i < result.findings.count; i++) {
        g_free(result.findings.items[i]);
    }
    g_free(result.findings.items);
    blockdev_options_free(options);
    json_decref(json);
    node_release(node);
    node_release(graph_find(graph, "disk"));
    graph_destroy(graph);
}

/* True: nothing failed. */
static bool coroutine_fn cut_at(struct scene *scene, const GByteArray *start, unsigned kind, uint64_t at)
{
    struct memory_disk *disk = memory_disk_create(start->data, start->len, UINT64_C(1) << 40);
    uint64_t random = scene->random;
    uint64_t before_size;
    disk->keeps_log = true;
    open_image(scene, disk);
    remember(scene);
    g_autofree uint8_t *before = read_all(scene, &before_size);
    disk->fail_first = disk->changes + at;
    disk->fail_end = UINT64_MAX;
    disk->fail_code = -EIO;
    (void)cut_action(scene, kind);
    close_image(scene);
    bool whole = disk->changes <= disk->fail_first;
    GByteArray *left = memory_disk_cut(disk, scene->seed + at);
    memory_disk_destroy(disk);

    disk = memory_disk_create(left->data, left->len, UINT64_C(1) << 40);
    check_leaks_only(disk);
    open_image(scene, disk);
    bool unchanged;
    check_truth(scene, before, before_size);
    check_unchanged(scene, &unchanged);
    list_for_each (link, &scene->node->bitmaps) {
        const struct bitmap *bitmap = container_of(link, struct bitmap, link);
        g_assert_true(!whole || !bitmap_is_inconsistent(bitmap));
        /* What does not record is not touched by a guest. */
        const struct model *model = find_model(scene, bitmap->name);
        g_assert_true(kind != CUT_GUEST || model->enabled || !bitmap_is_inconsistent(bitmap));
    }
    g_assert_true(unchanged || kind != CUT_NOTHING);
    close_image(scene);
    memory_disk_destroy(disk);
    if (at % CUTS_PER_PEER == scene->seed % CUTS_PER_PEER) {
        g_autofree char *path = g_build_filename(testing_directory(), "cut.qcow2", NULL);
        g_assert_true(g_file_set_contents(path, (char *)left->data, left->len, NULL));
        int status = testing_run(false, "qemu-img check -q %s", path);
        g_assert_true(status == 0 || status == 3);
    }
    g_byte_array_unref(left);
    scene->random = random; /* the next cut does the same */
    return whole;
}

static void coroutine_fn cut_everywhere(void *argument)
{
    struct scene *scene = argument;
    char *content = NULL;
    gsize length = 0;
    g_assert_true(g_file_get_contents(scene->path, &content, &length, NULL));
    GByteArray *start = g_byte_array_new_take((guint8 *)content, length);
    for (unsigned kind = 0; kind < CUT_KINDS; kind++) {
        uint64_t at = 0;
        while (!cut_at(scene, start, kind, at)) {
            at++;
        }
        testing_random(&scene->random);
    }
    g_byte_array_unref(start);
}

static void cut_case(struct loop *loop, struct scene *scene)
{
    do {
        loop_run_coroutine(loop, random_steps, scene);
    } while (scene->models->len < 2);
    loop_run_coroutine(loop, cut_everywhere, scene);
}

/* --- rubbish --- */

static void coroutine_fn spoil(struct scene *scene, GByteArray *image, uint64_t directory, uint64_t bytes)
{
    static const uint64_t words[] = {0, 1, 2, 3, 512, 65536, UINT32_MAX, UINT64_MAX, UINT64_C(1) << 63, 0x10000};
    unsigned count = 1 + below(scene, 4);
    for (unsigned i = 0; i < count; i++) {
        uint64_t at = directory + below(scene, bytes);
        uint64_t word = GUINT64_TO_BE(words[below(scene, G_N_ELEMENTS(words))]);
        if (below(scene, 2)) {
            memcpy(image->data + align_down(at, 8), &word, 8);
        } else {
            image->data[at] = below(scene, 256);
        }
    }
}

/* Whatever it has become, it can be looked at. */
static void coroutine_fn read_only_again(struct memory_disk *disk)
{
    struct graph *graph = graph_create();
    memory_disk_open(disk, graph, "disk");
    (void)testing_add(
        graph, NULL,
        "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"read-only\":true,\"file\":\"disk\",\"backing\":null}");
    g_assert(graph_delete(graph, "top", NULL) == 0);
    node_release(graph_find(graph, "disk"));
    graph_destroy(graph);
}

static void coroutine_fn rubbish_everywhere(void *argument)
{
    struct scene *scene = argument;
    char *content = NULL;
    gsize length = 0;
    g_assert_true(g_file_get_contents(scene->path, &content, &length, NULL));
    open_image(scene, NULL);
    struct qcow2 *image = scene->node->state;
    uint64_t directory = image->header.bitmaps.directory_offset;
    uint64_t bytes = image->header.bitmaps.directory_size;
    const struct qcow2_bitmap_record *record = image->bitmaps->pdata[0];
    uint64_t table = record->table_offset;
    close_image(scene);
    for (unsigned i = 0; i < RUBBISH; i++) {
        GByteArray *spoilt = g_byte_array_new();
        g_byte_array_append(spoilt, (guint8 *)content, length);
        if (below(scene, 4)) {
            spoil(scene, spoilt, directory, align_down(bytes, 8));
        } else {
            spoil(scene, spoilt, table, 8);
        }
        struct memory_disk *disk = memory_disk_create(spoilt->data, spoilt->len, UINT64_C(1) << 40);
        open_image(scene, disk);
        guest_step(scene, scene->backend);
        for (unsigned n = 0; n < 3; n++) {
            (void)locked_command(scene, below(scene, COMMANDS));
        }
        close_image(scene);
        read_only_again(disk);
        memory_disk_destroy(disk);
        g_byte_array_unref(spoilt);
    }
    g_free(content);
}

static void rubbish_case(struct loop *loop, struct scene *scene)
{
    do {
        loop_run_coroutine(loop, random_steps, scene);
    } while (scene->models->len < 2);
    loop_run_coroutine(loop, rubbish_everywhere, scene);
}

/* --- tables that lie --- */

/* What the table of bitmap "p" says instead of where its bits are. */
enum lie { LIE_GUEST_DATA, LIE_L2_TABLE, LIE_OTHER_BITS, LIE_OTHER_TABLE, LIE_TABLE_ITSELF, LIE_DIRECTORY, LIES };

struct lying {
    struct scene *scene;
    GByteArray *content; /* of the image's file, honest */
    uint64_t entry;      /* of the table that lies */
    uint64_t directory, directory_bytes;
    uint64_t places[LIES];
};

static uint64_t table_entry(const struct lying *lying, uint64_t at)
{
    uint64_t word;
    memcpy(&word, lying->content->data + at, sizeof(word));
    return GUINT64_FROM_BE(word) & QCOW2_OFFSET_MASK;
}

/* Guest data in the first cluster, and two bitmaps with bits on disk. */
static void coroutine_fn lies_prepare(struct lying *lying)
{
    struct scene *scene = lying->scene;
    struct bitmap_config config = {.name = "p", .persistent = true};
    struct iovec iov = {scene->content, 512};
    struct extent extent;
    char *content = NULL;
    gsize length = 0;
    open_image(scene, NULL);
    graph_lock(scene->graph);
    g_assert(bitmap_add(scene->node, &config, NULL, NULL) == 0);
    config.name = "q";
    g_assert(bitmap_add(scene->node, &config, NULL, NULL) == 0);
    graph_unlock(scene->graph);
    g_assert(backend_write(scene->backend, 0, 512, buffers_one(&iov), 0) == 0);
    g_assert(backend_block_status(scene->backend, NULL, 0, 512, &extent) == 0 && extent.flags & EXTENT_MAPPED);
    g_assert(locked_command(scene, STORE) == 0);
    const struct qcow2 *image = scene->node->state;
    const struct qcow2_bitmap_record *p = image->bitmaps->pdata[0], *q = image->bitmaps->pdata[1];
    lying->entry = p->table_offset;
    lying->directory = image->header.bitmaps.directory_offset;
    lying->directory_bytes = image->header.bitmaps.directory_size;
    lying->places[LIE_TABLE_ITSELF] = p->table_offset;
    lying->places[LIE_OTHER_TABLE] = q->table_offset;
    lying->places[LIE_GUEST_DATA] = align_down(extent.host_offset, image->cluster_size);
    lying->places[LIE_L2_TABLE] = image->l1[0] & QCOW2_OFFSET_MASK;
    close_image(scene);
    g_assert_true(g_file_get_contents(scene->path, &content, &length, NULL));
    lying->content = g_byte_array_new_take((guint8 *)content, length);
    lying->places[LIE_OTHER_BITS] = table_entry(lying, lying->places[LIE_OTHER_TABLE]);
    g_assert_true(table_entry(lying, lying->entry) && lying->places[LIE_OTHER_BITS]);
}

/* The header says that the directory is elsewhere. */
static void lie_in_header(const struct lying *lying, GByteArray *content, uint64_t where)
{
    uint64_t honest = GUINT64_TO_BE(lying->directory), word = GUINT64_TO_BE(where);
    uint8_t *place = memmem(content->data, 1u << lying->scene->cluster_bits, &honest, sizeof(honest));
    g_assert_nonnull(place);
    memcpy(place, &word, sizeof(word));
}

static struct memory_disk *lie_on_disk(const struct lying *lying, enum lie lie)
{
    g_autoptr(GByteArray) content = g_byte_array_new();
    g_byte_array_append(content, lying->content->data, lying->content->len);
    if (lie == LIE_DIRECTORY) {
        lie_in_header(lying, content, lying->places[LIE_GUEST_DATA]);
        memcpy(content->data + lying->places[LIE_GUEST_DATA], content->data + lying->directory, lying->directory_bytes);
    } else {
        uint64_t word = GUINT64_TO_BE(lying->places[lie]);
        memcpy(content->data + lying->entry, &word, sizeof(word));
    }
    return memory_disk_create(content->data, content->len, UINT64_C(1) << 40);
}

/* The bits that the table named honestly are leaked, and nothing of anybody else's is lost. */
static void coroutine_fn lies_case(struct lying *lying, enum lie lie, bool by_removal)
{
    struct scene *scene = lying->scene;
    struct memory_disk *disk = lie_on_disk(lying, lie);
    open_image(scene, disk);
    struct bitmap *bitmap = bitmap_find(scene->node, "p");
    g_assert_nonnull(bitmap);
    if (by_removal) {
        struct drain drain;
        graph_lock(scene->graph);
        graph_drain_begin(scene->graph, &scene->node, 1, NULL, &drain);
        g_assert(bitmap_remove(bitmap, NULL) == 0);
        graph_drain_end(&drain);
        graph_unlock(scene->graph);
    } else {
        struct iovec iov = {scene->content, 512};
        g_assert(backend_write(scene->backend, 512, 512, buffers_one(&iov), 0) == 0); /* stored again by closing */
    }
    close_image(scene);
    check_leaks_only(disk);
    memory_disk_destroy(disk);
}

/* The header is no directory: nothing of it is marked. */
static void coroutine_fn lies_header(const struct lying *lying)
{
    struct scene *scene = lying->scene;
    struct iovec iov = {scene->content, 512};
    g_autoptr(GByteArray) content = g_byte_array_new();
    g_byte_array_append(content, lying->content->data, lying->content->len);
    lie_in_header(lying, content, 0);
    struct memory_disk *disk = memory_disk_create(content->data, content->len, UINT64_C(1) << 40);
    open_image(scene, disk);
    g_assert_cmpuint(bitmap_total(scene), ==, 0);
    g_assert(backend_write(scene->backend, 512, 512, buffers_one(&iov), 0) == 0);
    close_image(scene);
    check_leaks_only(disk);
    memory_disk_destroy(disk);
}

static void coroutine_fn lies_everywhere(void *argument)
{
    struct lying lying = {.scene = argument};
    lies_prepare(&lying);
    for (unsigned lie = 0; lie < LIES; lie++) {
        lies_case(&lying, lie, true);
        lies_case(&lying, lie, false);
    }
    lies_header(&lying);
    g_byte_array_unref(lying.content);
}

static void lies_run(struct loop *loop, struct scene *scene)
{
    loop_run_coroutine(loop, lies_everywhere, scene);
}

/* --- rules --- */

static void coroutine_fn rules_body(void *argument)
{
    struct scene *scene = argument;
    struct bitmap_config config = {.name = "b", .persistent = true};
    open_image(scene, NULL);
    graph_lock(scene->graph);
    g_assert(bitmap_add(scene->node, &config, NULL, NULL) == 0);
    graph_unlock(scene->graph);
    close_image(scene);

    /* Read-only: it is there, and cannot be changed. */
    scene->graph = graph_create();
    scene->node = testing_add(scene->graph, NULL,
                              "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"read-only\":true,"
                              "\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}",
                              scene->path);
    graph_lock(scene->graph);
    struct bitmap *bitmap = bitmap_find(scene->node, "b");
    g_assert_true(bitmap && bitmap->persistent && bitmap->enabled);
    g_assert_cmpint(bitmap_clear(bitmap, NULL), ==, -EROFS);
    g_assert_cmpint(bitmap_remove(bitmap, NULL), ==, -EROFS);
    config.name = "c";
    g_assert_cmpint(bitmap_add(scene->node, &config, NULL, NULL), ==, -EROFS);
    graph_unlock(scene->graph);
    g_assert(graph_delete(scene->graph, "top", NULL) == 0);
    graph_destroy(scene->graph);

    /* Opened for writing, and nothing written: nothing changes on disk. */
    g_autofree char *before = NULL, *after = NULL;
    gsize length, length_after;
    g_assert_true(g_file_get_contents(scene->path, &before, &length, NULL));
    open_image(scene, NULL);
    close_image(scene);
    g_assert_true(g_file_get_contents(scene->path, &after, &length_after, NULL));
    g_assert_true(length == length_after && memcmp(before, after, length) == 0);

    /* Asked for, they are stored at once, and recorded on. */
    open_image(scene, NULL);
    struct qcow2 *image = scene->node->state;
    const struct qcow2_bitmap_record *record = image->bitmaps->pdata[0];
    guest_step(scene, scene->backend);
    g_assert_true(record->flags & QCOW2_BITMAP_IN_USE);
    g_assert(locked_command(scene, STORE) == 0);
    record = image->bitmaps->pdata[0];
    g_assert_false(record->flags & QCOW2_BITMAP_IN_USE);
    struct iovec iov = {scene->content, 1};
    g_assert(backend_write(scene->backend, 0, 1, buffers_one(&iov), 0) == 0);
    g_assert_true(record->flags & QCOW2_BITMAP_IN_USE);
    remember(scene);
    close_image(scene);
    open_image(scene, NULL);
    compare(scene, "after storing and writing");
    close_image(scene);
}

static void rules_case(struct loop *loop, struct scene *scene)
{
    loop_run_coroutine(loop, rules_body, scene);
    testing_run(true, "qemu-img check -q %s", scene->path);
}

/* --- the rest --- */

static uint64_t number(const char *variable, uint64_t otherwise)
{
    const char *text = g_getenv(variable);
    return text ? g_ascii_strtoull(text, NULL, 10) : otherwise;
}

static void run_cases(uint64_t cases, void (*entry)(struct loop *, struct scene *))
{
    struct loop *loop;
    if (!testing_have_peer()) {
        return;
    }
    g_assert(loop_create(ENGINE_AUTO, &loop, NULL) == 0);
    uint64_t seed = number("QCOW2_SEED", 1);
    for (uint64_t i = 0; i < number("QCOW2_CASES", cases); i++) {
        struct scene scene = {.seed = seed + i, .random = seed + i};
        make_image(&scene);
        g_test_message("seed %" G_GUINT64_FORMAT ": clusters 2^%u, size %" G_GUINT64_FORMAT "%s", scene.seed,
                       scene.cluster_bits, scene.size, scene.backing ? ", backing file" : "");
        entry(loop, &scene);
        g_ptr_array_unref(scene.models);
        g_free(scene.content);
        g_free(scene.path);
        testing_remove_directory();
    }
    loop_destroy(loop);
}

static void test_rules(void)
{
    run_cases(2, rules_case);
}

static void test_random(void)
{
    run_cases(CASES, random_case);
}

static void test_cuts(void)
{
    run_cases(CUT_CASES, cut_case);
}

static void test_lies(void)
{
    run_cases(CUT_CASES, lies_run);
}

static void test_rubbish(void)
{
    run_cases(CUT_CASES, rubbish_case);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    testing_register_drivers();
    g_test_add_func("/qcow2/bitmap/rules", test_rules);
    g_test_add_func("/qcow2/bitmap/random", test_random);
    g_test_add_func("/qcow2/bitmap/cuts", test_cuts);
    g_test_add_func("/qcow2/bitmap/rubbish", test_rubbish);
    g_test_add_func("/qcow2/bitmap/lies", test_lies);
    return g_test_run();
}

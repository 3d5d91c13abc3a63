/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Snapshots inside an image. Random sequences of writes, zeroes, discards, changes of size and of snapshots, by us and
 * by the peer, against a model that keeps the content of the disk and of each snapshot; the peer's check must find
 * nothing at all. And power cuts: each change of snapshots is repeated with the power going at every write in turn;
 * what is left must be the image before or after, whole, for the peer's check too.
 *
 * QCOW2_SEED and QCOW2_CASES choose other runs than the short slice.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/format/qcow2_image.h"
#include "driver/format/qcow2_testing.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib/gstdio.h>
#include <string.h>

enum { CASES = 6, ROUNDS = 2, STEPS = 20, SNAPSHOTS_MAX = 6, CUT_CASES = 2, CUTS_PER_PEER = 17 };

struct shape {
    unsigned cluster_bits, version, refcount_bits;
    bool extended, compressed;
    uint64_t size;
};

struct content {
    char *name; /* of a snapshot */
    uint64_t size;
    uint8_t *bytes;
};

struct scene {
    uint64_t seed, random;
    struct shape shape;
    char *path;
    struct graph *graph;
    struct node *node;
    struct backend *backend;
    struct content active;
    GPtrArray *snapshots; /* struct content, in the order of the table */
    unsigned serial;
};

static uint64_t below(struct scene *scene, uint64_t limit)
{
    return testing_random(&scene->random) % limit;
}

static struct content *content_copy(const struct content *content, const char *name)
{
    struct content *copy = g_new(struct content, 1);
    *copy = (struct content){g_strdup(name), content->size, g_memdup2(content->bytes, content->size)};
    return copy;
}

static void content_free(void *item)
{
    struct content *content = item;
    g_free(content->name);
    g_free(content->bytes);
    g_free(content);
}

static void content_resize(struct content *content, uint64_t size)
{
    content->bytes = g_realloc(content->bytes, size);
    if (size > content->size) {
        memset(content->bytes + content->size, 0, size - content->size);
    }
    content->size = size;
}

/* --- the image --- */

static void choose_shape(struct scene *scene)
{
    static const unsigned widths[] = {16, 2, 4, 8, 32, 64};
    struct shape *shape = &scene->shape;
    shape->version = below(scene, 4) ? 3 : 2;
    shape->extended = shape->version == 3 && below(scene, 3) == 0;
    shape->cluster_bits = shape->extended ? 14 + below(scene, 3) : 9 + below(scene, 8);
    shape->refcount_bits = shape->version == 3 ? widths[below(scene, G_N_ELEMENTS(widths))] : 16;
    shape->compressed = below(scene, 3) == 0;
    uint64_t clusters = 20 + below(scene, 300);
    shape->size = align_down(min_u64(clusters << shape->cluster_bits, 2 * MiB), 512);
}

static void fill(struct scene *scene, uint8_t *to, uint64_t bytes)
{
    uint64_t word = ++scene->serial * UINT64_C(0x0101010101010101);
    for (uint64_t i = 0; i < bytes; i++) {
        to[i] = word >> (i % 8 * 8);
    }
}

static void make_image(struct scene *scene)
{
    const struct shape *shape = &scene->shape;
    scene->path = g_build_filename(testing_directory(), "image.qcow2", NULL);
    g_autofree char *raw = g_build_filename(testing_directory(), "raw", NULL);
    g_autofree char *options = g_strdup_printf("compat=%s,cluster_size=%u%s", shape->version == 3 ? "1.1" : "0.10",
                                               1u << shape->cluster_bits, shape->extended ? ",extended_l2=on" : "");
    g_autofree char *width = g_strdup_printf(",refcount_bits=%u", shape->refcount_bits);
    scene->active = (struct content){NULL, shape->size, g_malloc0(shape->size)};
    if (shape->compressed) {
        fill(scene, scene->active.bytes, shape->size / 2);
        g_assert_true(g_file_set_contents(raw, (char *)scene->active.bytes, shape->size, NULL));
        testing_run(true, "qemu-img convert -c -f raw -O qcow2 -o %s%s %s %s", options,
                    shape->version == 3 ? width : "", raw, scene->path);
    } else {
        testing_run(true, "qemu-img create -q -f qcow2 -o %s%s %s %" G_GUINT64_FORMAT, options,
                    shape->version == 3 ? width : "", scene->path, shape->size);
    }
}

static void coroutine_fn open_image(struct scene *scene, struct memory_disk *disk)
{
    scene->graph = graph_create();
    if (disk) {
        memory_disk_open(disk, scene->graph, "disk");
        scene->node = testing_add(scene->graph, NULL,
                                  "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"discard\":\"unmap\","
                                  "\"file\":\"disk\"}");
    } else {
        scene->node = testing_add(scene->graph, NULL,
                                  "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"discard\":\"unmap\","
                                  "\"cache\":{\"no-flush\":true},\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}",
                                  scene->path);
    }
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

/* --- changes of snapshots, by name --- */

enum verb { CREATE, APPLY, DELETE };

static int coroutine_fn change_snapshots(struct scene *scene, enum verb verb, const char *name, struct error **err)
{
    struct snapshot_info info = {
        .id = (char *)"ignored", .name = (char *)name, .date_sec = 1234567890, .has_icount = true};
    struct drain drain;
    int code = 0;
    graph_lock(scene->graph);
    graph_drain_begin(scene->graph, &scene->node, 1, NULL, &drain);
    switch (verb) {
    case CREATE:
        code = qcow2_image.snapshot_create(scene->node, &info, err);
        break;
    case APPLY:
        code = qcow2_image.snapshot_apply(scene->node, name, err);
        break;
    case DELETE:
        code = qcow2_image.snapshot_delete(scene->node, name, err);
        break;
    }
    graph_drain_end(&drain);
    graph_unlock(scene->graph);
    return code;
}

static void model_change(struct scene *scene, enum verb verb, const char *name)
{
    if (verb == CREATE) {
        g_ptr_array_add(scene->snapshots, content_copy(&scene->active, name));
        return;
    }
    for (unsigned i = 0; i < scene->snapshots->len; i++) {
        struct content *snapshot = scene->snapshots->pdata[i];
        if (!g_str_equal(snapshot->name, name)) {
            continue;
        }
        if (verb == APPLY) {
            g_free(scene->active.bytes);
            scene->active = (struct content){NULL, snapshot->size, g_memdup2(snapshot->bytes, snapshot->size)};
        } else {
            g_ptr_array_remove_index(scene->snapshots, i);
        }
        return;
    }
    g_assert_not_reached();
}

static char *choose_change(struct scene *scene, enum verb *ret)
{
    bool full = scene->snapshots->len >= SNAPSHOTS_MAX;
    *ret = scene->snapshots->len == 0 ? CREATE : full ? 1 + below(scene, 2) : below(scene, 3);
    if (*ret == CREATE) {
        return g_strdup_printf("s%u", ++scene->serial);
    }
    struct content *snapshot = scene->snapshots->pdata[below(scene, scene->snapshots->len)];
    return g_strdup(snapshot->name);
}

/* --- what is there --- */

static void coroutine_fn check_content(struct scene *scene, const struct content *wanted, const char *what)
{
    g_assert_cmpuint(backend_size(scene->backend), ==, wanted->size);
    g_autofree uint8_t *bytes = g_malloc(wanted->size);
    struct iovec iov = {bytes, wanted->size};
    g_assert(backend_read(scene->backend, 0, wanted->size, buffers_one(&iov), 0) == 0);
    for (uint64_t i = 0; i < wanted->size; i++) {
        if (bytes[i] != wanted->bytes[i]) {
            g_error("seed %" G_GUINT64_FORMAT ": %s: byte %" G_GUINT64_FORMAT " is %02x, not %02x", scene->seed, what,
                    i, bytes[i], wanted->bytes[i]);
        }
    }
}

static void coroutine_fn check_list(struct scene *scene)
{
    struct snapshot_info_list *list = NULL;
    g_assert(qcow2_image.snapshot_list(scene->node, &list, NULL) == 0);
    g_assert_cmpuint(list->count, ==, scene->snapshots->len);
    for (unsigned i = 0; i < list->count; i++) {
        const struct content *snapshot = scene->snapshots->pdata[i];
        g_assert_cmpstr(list->items[i]->name, ==, snapshot->name);
    }
    snapshot_info_list_free(list);
}

/* Opened at a snapshot, through a read-only node. */
static void coroutine_fn check_snapshot(struct scene *scene, const struct content *wanted, struct memory_disk *disk)
{
    struct scene other = {.seed = scene->seed, .graph = graph_create()};
    if (disk) {
        memory_disk_open(disk, other.graph, "disk");
    }
    g_autofree char *file =
        disk ? g_strdup("\"disk\"") : g_strdup_printf("{\"driver\":\"file\",\"filename\":\"%s\"}", scene->path);
    other.node = testing_add(other.graph, NULL,
                             "{\"driver\":\"qcow2\",\"node-name\":\"top\",\"read-only\":true,\"file\":%s}", file);
    g_assert(qcow2_image.snapshot_load(other.node, "no such", NULL) == -ENOENT);
    g_assert(qcow2_image.snapshot_load(other.node, wanted->name, NULL) == 0);
    g_assert(node_writable_begin(other.node, NULL) < 0);
    other.backend = backend_create(other.graph, "test");
    g_assert(backend_attach(other.backend, other.node, ACCESS_READ_DATA, NULL) == 0);
    check_content(&other, wanted, wanted->name);
    close_image(&other);
}

/* The image is closed. */
static void coroutine_fn check_all(struct scene *scene, struct memory_disk *disk)
{
    open_image(scene, disk);
    check_list(scene);
    check_content(scene, &scene->active, "the disk");
    close_image(scene);
    for (unsigned i = 0; i < scene->snapshots->len; i++) {
        check_snapshot(scene, scene->snapshots->pdata[i], disk);
    }
}

static void peer_check_content(struct scene *scene, const struct content *wanted)
{
    g_autofree char *raw = g_build_filename(testing_directory(), "raw", NULL);
    g_autofree char *option = wanted->name ? g_strdup_printf("-l snapshot.name=%s", wanted->name) : g_strdup("");
    testing_run(true, "qemu-img convert -f qcow2 -O raw %s %s %s", option, scene->path, raw);
    g_autofree char *bytes = NULL;
    gsize length = 0;
    g_assert_true(g_file_get_contents(raw, &bytes, &length, NULL));
    /* It shows a snapshot with the size of the disk as it is now. */
    g_assert_cmpuint(length, >=, min_u64(wanted->size, scene->active.size));
    g_assert_true(memcmp(bytes, wanted->bytes, min_u64(wanted->size, length)) == 0);
}

/* --- one step of a random sequence --- */

static void coroutine_fn guest_step(struct scene *scene)
{
    uint64_t offset = below(scene, scene->active.size);
    uint64_t bytes = 1 + below(scene, min_u64(scene->active.size - offset, 64 * KiB));
    uint8_t *to = scene->active.bytes + offset;
    struct iovec iov = {to, bytes};
    switch (below(scene, 8)) {
    case 0:
        memset(to, 0, bytes);
        g_assert(backend_write_zeroes(scene->backend, offset, bytes, below(scene, 2) ? REQUEST_MAY_UNMAP : 0) == 0);
        break;
    case 1:
        g_assert(backend_discard(scene->backend, offset, bytes) == 0);
        /* Whole clusters read as zeroes, or (version 2) may stay: see what it has become. */
        g_assert(backend_read(scene->backend, 0, scene->active.size,
                              buffers_one(&(struct iovec){scene->active.bytes, scene->active.size}), 0) == 0);
        break;
    default:
        fill(scene, to, bytes);
        g_assert(backend_write(scene->backend, offset, bytes, buffers_one(&iov), 0) == 0);
    }
}

static void coroutine_fn resize_step(struct scene *scene)
{
    uint64_t size = align_down(64 * KiB + below(scene, 2 * MiB), 512);
    auto_error error = NULL;
    bool may = scene->snapshots->len == 0 || (scene->shape.version == 3 && size > scene->active.size);
    int code = backend_truncate(scene->backend, size, &error);
    g_assert_true(code == 0 || !may);
    if (code == 0) {
        content_resize(&scene->active, size);
    }
}

static void coroutine_fn snapshot_step(struct scene *scene)
{
    enum verb verb;
    auto_error error = NULL;
    g_autofree char *name = choose_change(scene, &verb);
    int code = change_snapshots(scene, verb, name, &error);
    if (code == -EINVAL && scene->shape.refcount_bits <= 8) {
        return; /* too many uses for the width; nothing has changed */
    }
    if (code == -ERANGE || (code == 0) == (error != NULL) || code < 0) {
        g_error("seed %" G_GUINT64_FORMAT ": %s", scene->seed, error ? error->message : "no message");
    }
    model_change(scene, verb, name);
}

static void peer_step(struct scene *scene)
{
    static const char *const options[] = {"-c", "-a", "-d"};
    enum verb verb;
    g_autofree char *name = choose_change(scene, &verb);
    bool fits = scene->shape.refcount_bits > 8;
    if (fits && testing_run(true, "qemu-img snapshot -q %s %s %s", options[verb], name, scene->path) == 0) {
        model_change(scene, verb, name);
    }
}

static void coroutine_fn random_steps(void *argument)
{
    struct scene *scene = argument;
    open_image(scene, NULL);
    for (unsigned step = 0; step < STEPS; step++) {
        switch (below(scene, 8)) {
        case 0:
        case 1:
        case 2:
            snapshot_step(scene);
            check_list(scene);
            break;
        case 3:
            resize_step(scene);
            break;
        default:
            guest_step(scene);
        }
    }
    check_content(scene, &scene->active, "the disk, while open");
    close_image(scene);
}

static void random_sequence(struct loop *loop, struct scene *scene)
{
    for (unsigned round = 0; round < ROUNDS; round++) {
        loop_run_coroutine(loop, random_steps, scene);
        testing_run(true, "qemu-img check -q %s", scene->path);
        peer_step(scene);
    }
}

static void coroutine_fn check_file(void *argument)
{
    check_all(argument, NULL);
}

static void random_case(struct loop *loop, struct scene *scene)
{
    random_sequence(loop, scene);
    loop_run_coroutine(loop, check_file, scene);
    peer_check_content(scene, &scene->active);
    for (unsigned i = 0; i < scene->snapshots->len && i < 2; i++) {
        peer_check_content(scene, scene->snapshots->pdata[i]);
    }
}

/* --- power cuts --- */

static bool same_table(const struct scene *scene, const GPtrArray *names)
{
    if (names->len != scene->snapshots->len) {
        return false;
    }
    for (unsigned i = 0; i < names->len; i++) {
        const struct content *snapshot = scene->snapshots->pdata[i];
        if (!g_str_equal(snapshot->name, names->pdata[i])) {
            return false;
        }
    }
    return true;
}

/* What a cut at `at` has left: the state before, or after. True: the change went through undisturbed. */
static bool coroutine_fn cut_at(struct scene *scene, const GByteArray *start, enum verb verb, const char *name,
                                uint64_t at, bool ask_peer)
{
    struct memory_disk *disk = memory_disk_create(start->data, start->len, UINT64_C(1) << 40);
    disk->keeps_log = true;
    open_image(scene, disk);
    uint64_t before = disk->changes;
    disk->fail_first = before + at;
    disk->fail_end = UINT64_MAX;
    disk->fail_code = -EIO;
    int code = change_snapshots(scene, verb, name, NULL);
    bool whole = disk->changes <= disk->fail_first;
    g_assert_true(code == 0 || !whole);
    close_image(scene);
    GByteArray *left = memory_disk_cut(disk, scene->seed + at);
    memory_disk_destroy(disk);

    disk = memory_disk_create(left->data, left->len, UINT64_C(1) << 40);
    struct content active = scene->active;
    GPtrArray *snapshots = scene->snapshots;
    scene->active.bytes = g_memdup2(active.bytes, active.size);
    scene->snapshots = g_ptr_array_new_with_free_func(content_free);
    for (unsigned i = 0; i < snapshots->len; i++) {
        const struct content *snapshot = snapshots->pdata[i];
        g_ptr_array_add(scene->snapshots, content_copy(snapshot, snapshot->name));
    }
    /* The table tells which; an apply leaves it as it was, and the content tells. */
    open_image(scene, disk);
    struct snapshot_info_list *list = NULL;
    g_autoptr(GPtrArray) names = g_ptr_array_new();
    g_assert(qcow2_image.snapshot_list(scene->node, &list, NULL) == 0);
    for (unsigned i = 0; i < list->count; i++) {
        g_ptr_array_add(names, list->items[i]->name);
    }
    bool changed = !same_table(scene, names);
    if (verb == APPLY) {
        uint64_t size = backend_size(scene->backend);
        g_autofree uint8_t *bytes = g_malloc(size);
        struct iovec iov = {bytes, size};
        g_assert(backend_read(scene->backend, 0, size, buffers_one(&iov), 0) == 0);
        changed = size != active.size || memcmp(bytes, active.bytes, size) != 0;
    }
    snapshot_info_list_free(list);
    close_image(scene);
    if (changed || code == 0) {
        model_change(scene, verb, name);
    }
    check_all(scene, disk);
    if (ask_peer) {
        g_autofree char *path = g_build_filename(testing_directory(), "cut.qcow2", NULL);
        g_assert_true(g_file_set_contents(path, (char *)left->data, left->len, NULL));
        testing_run(true, "qemu-img check -q %s", path); /* not even leaks */
    }
    memory_disk_destroy(disk);
    g_byte_array_unref(left);
    g_free(scene->active.bytes);
    g_ptr_array_unref(scene->snapshots);
    scene->active = active;
    scene->snapshots = snapshots;
    return whole;
}

static void coroutine_fn cut_everywhere(void *argument)
{
    struct scene *scene = argument;
    char *content = NULL;
    gsize length = 0;
    g_assert_true(g_file_get_contents(scene->path, &content, &length, NULL));
    GByteArray *start = g_byte_array_new_take((guint8 *)content, length);
    for (enum verb verb = CREATE; verb <= DELETE; verb++) {
        if (verb != CREATE && scene->snapshots->len == 0) {
            continue;
        }
        const struct content *some = scene->snapshots->len ? scene->snapshots->pdata[scene->snapshots->len / 2] : NULL;
        g_autofree char *name = g_strdup(verb == CREATE ? "new" : some->name);
        bool whole = false;
        uint64_t at = 0;
        for (; !whole; at++) {
            whole = cut_at(scene, start, verb, name, at, at % CUTS_PER_PEER == scene->seed % CUTS_PER_PEER);
        }
        g_assert_cmpuint(at, >, 5);
    }
    g_byte_array_unref(start);
}

static void cut_case(struct loop *loop, struct scene *scene)
{
    random_sequence(loop, scene);
    loop_run_coroutine(loop, cut_everywhere, scene);
}

/* --- the rest --- */

static void run_case(struct loop *loop, uint64_t seed, void (*entry)(struct loop *, struct scene *), unsigned narrowest)
{
    struct scene scene = {.seed = seed, .random = seed};
    scene.snapshots = g_ptr_array_new_with_free_func(content_free);
    choose_shape(&scene);
    scene.shape.refcount_bits = MAX(scene.shape.refcount_bits, narrowest);
    const struct shape *shape = &scene.shape;
    g_test_message("seed %" G_GUINT64_FORMAT ": clusters 2^%u, version %u, refcounts %u, size %" G_GUINT64_FORMAT
                   "%s%s",
                   seed, shape->cluster_bits, shape->version, shape->refcount_bits, shape->size,
                   shape->extended ? ", extended" : "", shape->compressed ? ", compressed" : "");
    make_image(&scene);
    entry(loop, &scene);
    g_ptr_array_unref(scene.snapshots);
    g_free(scene.active.bytes);
    g_free(scene.path);
    testing_remove_directory();
}

static uint64_t number(const char *variable, uint64_t otherwise)
{
    const char *text = g_getenv(variable);
    return text ? g_ascii_strtoull(text, NULL, 10) : otherwise;
}

static void run_cases(uint64_t cases, void (*entry)(struct loop *, struct scene *), unsigned narrowest)
{
    struct loop *loop;
    if (!testing_have_peer()) {
        return;
    }
    g_assert(loop_create(ENGINE_AUTO, &loop, NULL) == 0);
    uint64_t seed = number("QCOW2_SEED", 1);
    for (uint64_t i = 0; i < number("QCOW2_CASES", cases); i++) {
        run_case(loop, seed + i, entry, narrowest);
    }
    loop_destroy(loop);
}

static void test_random(void)
{
    run_cases(CASES, random_case, 0);
}

static void test_cuts(void)
{
    run_cases(CUT_CASES, cut_case, 16);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    testing_register_drivers();
    g_test_add_func("/qcow2/snapshot/random", test_random);
    g_test_add_func("/qcow2/snapshot/cuts", test_cuts);
    return g_test_run();
}

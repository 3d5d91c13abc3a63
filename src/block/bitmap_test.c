/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Dirty bitmaps of nodes: what may be done when, what requests record, and a random walk against a model. */
#include "base/seeded.h"
#include "block/bitmap.h"
#include "block/bitmap_action.h"
#include "block/dirty.h"
#include "block/memory_node.h"

static struct bitmap *add(struct node *node, const char *name, uint64_t granularity, bool disabled)
{
    struct bitmap_config config = {.name = name, .granularity = granularity, .disabled = disabled};
    struct bitmap *bitmap = NULL;
    g_assert(bitmap_add(node, &config, &bitmap, NULL) == 0);
    return bitmap;
}

static int add_code(struct node *node, const char *name, uint64_t granularity, bool persistent)
{
    struct bitmap_config config = {.name = name, .granularity = granularity, .persistent = persistent};
    auto_error error = NULL;
    int code = bitmap_add(node, &config, NULL, &error);
    g_assert((code < 0) == (error != NULL));
    return code;
}

static void coroutine_fn rules_body(void *unused)
{
    struct graph *graph = graph_create();
    struct node *node = memory_node(graph, "n", NULL);
    graph_lock(graph);
    struct bitmap *a = add(node, "a", 512, false);
    g_assert(add_code(node, "a", 0, false) == -EEXIST);
    g_assert(add_code(node, "", 0, false) == -EINVAL);
    g_assert(add_code(node, "b", 256, false) == -EINVAL);
    g_assert(add_code(node, "b", 3000, false) == -EINVAL);
    g_assert(add_code(node, "b", BITMAP_GRANULARITY_MAX * 2, false) == -EINVAL);
    g_assert(add_code(node, "b", 0, true) == -ENOTSUP);
    g_autofree char *longest = g_strnfill(BITMAP_NAME_MAX, 'x');
    g_autofree char *too_long = g_strnfill(BITMAP_NAME_MAX + 1, 'x');
    g_assert(add_code(node, longest, BITMAP_GRANULARITY_MAX, false) == 0);
    g_assert(add_code(node, too_long, 0, false) == -EINVAL);
    g_assert(bitmap_find(node, "a") == a && !bitmap_find(node, "zz"));
    g_assert(!bitmap_find_or_error(node, "zz", NULL));

    bitmap_busy_begin(a);
    g_assert(bitmap_clear(a, NULL) == -EBUSY && bitmap_remove(a, NULL) == -EBUSY);
    g_assert(bitmap_set_enabled(a, false, NULL) == -EBUSY && bitmap_check(a, BITMAP_ALLOW_BUSY, NULL) == 0);
    g_assert(bitmaps_resize_begin(node, 4096, NULL) == -EBUSY);
    bitmap_busy_end(a);
    g_assert(bitmap_set_enabled(a, false, NULL) == 0 && bitmap_clear(a, NULL) == 0);

    struct bitmap *lost = NULL;
    g_assert(bitmap_restore(node, "lost", 4096, true, true, &lost) == 0);
    lost->persistent = false;
    g_assert(bitmap_is_inconsistent(lost) && bitmap_count(lost) == 0);
    g_assert(bitmap_clear(lost, NULL) == -EINVAL && bitmap_merge(a, lost, NULL) == -EINVAL);
    g_assert(bitmap_merge(lost, a, NULL) == -EINVAL);
    bitmaps_record(node, 0, 512);
    struct block_dirty_info_list *list = bitmaps_describe(node);
    g_assert(list->count == 3 && g_str_equal(list->items[0]->name, "lost") && list->items[0]->inconsistent);
    g_assert(g_str_equal(list->items[2]->name, "a") && !list->items[2]->recording && list->items[2]->count == 0);
    block_dirty_info_list_free(list);
    g_assert(bitmap_remove(lost, NULL) == 0 && !bitmap_find(node, "lost"));
    graph_unlock(graph);
    memory_end(graph);
}

static void test_rules(void)
{
    in_coroutine(rules_body);
}

static void check_runs(struct bitmap *bitmap, const char *wanted)
{
    g_autoptr(GString) text = g_string_new(NULL);
    uint64_t offset;
    uint64_t bytes;
    for (uint64_t at = 0; bitmap_next(bitmap, at, &offset, &bytes); at = offset + bytes) {
        g_string_append_printf(text, "%u+%u ", (unsigned)offset, (unsigned)bytes);
    }
    g_assert_cmpstr(text->str, ==, wanted);
}

static void coroutine_fn requests_body(void *unused)
{
    static char data[8192];
    struct graph *graph = graph_create();
    struct node *base = memory_node(graph, "base", NULL);
    struct node *node = memory_node(graph, "n", base);
    graph_lock(graph);
    struct bitmap *fine = add(node, "fine", 512, false);
    struct bitmap *coarse = add(node, "coarse", 8192, false);
    struct bitmap *off = add(node, "off", 512, true);
    struct bitmap *below = add(base, "below", 512, false);
    graph_unlock(graph);
    struct backend *backend = memory_backend(graph, "test", node, ACCESS_ALL);
    struct iovec iov = {data, 1000};
    g_assert(backend_write(backend, 600, 1000, buffers_one(&iov), 0) == 0);
    g_assert(backend_write_zeroes(backend, 20000, 512, 0) == 0);
    g_assert(backend_discard(backend, 40960, 4096) == 0);
    iov.iov_len = 4096;
    g_assert(backend_write(backend, 57344, 4096, buffers_one(&iov), REQUEST_IF_UNALLOCATED) == 0);
    check_runs(fine, "512+1536 19968+1024 40960+4096 ");
    check_runs(coarse, "0+8192 16384+8192 40960+8192 ");
    check_runs(off, "");
    check_runs(below, "");
    g_assert_cmpuint(bitmap_count(fine), ==, 1536 + 1024 + 4096);
    g_assert_cmpuint(bitmap_count(coarse), ==, 3 * 8192);
    /* One that fails is marked too: nobody knows how much of it was done. */
    memory_of(node)->no_zeroes = true;
    g_assert(backend_write_zeroes(backend, 61440, 512, REQUEST_NO_FALLBACK) == -ENOTSUP);
    g_assert_cmpuint(bitmap_count(fine), ==, 1536 + 1024 + 4096 + 512);
    backend_destroy(backend);
    memory_end(graph);
}

static void test_requests(void)
{
    in_coroutine(requests_body);
}

/* --- random --- */

enum { MODEL_SECTORS = MEMORY_SIZE / 512, MODELS = 4, STEPS = 4000 };

struct model {
    struct bitmap *bitmap;
    bool dirty[MODEL_SECTORS];
};

static void model_mark(struct model *model, uint64_t offset, uint64_t bytes)
{
    uint64_t first = align_down(offset, model->bitmap->granularity);
    uint64_t size = atomic_load(&model->bitmap->node->size);
    uint64_t end = min_u64(align_up(offset + bytes, model->bitmap->granularity), align_up(size, 512));
    for (uint64_t at = first; at < end; at += 512) {
        model->dirty[at / 512] = true;
    }
}

static void model_check(const struct model *model, uint64_t from)
{
    uint64_t size = atomic_load(&model->bitmap->node->size);
    uint64_t at = from;
    uint64_t end;
    while (at < size && !model->dirty[at / 512]) {
        at = (at / 512 + 1) * 512;
    }
    for (end = at; end < size && model->dirty[end / 512]; end = (end / 512 + 1) * 512) {
    }
    uint64_t offset;
    uint64_t bytes;
    bool found = bitmap_next(model->bitmap, from, &offset, &bytes);
    g_assert_cmpint(found, ==, at < size);
    if (found) {
        g_assert_cmpuint(offset, ==, at);
        g_assert_cmpuint(offset + bytes, ==, min_u64(end, size));
    }
}

/* To another size and back, as edge_resize() does; what is cut off is forgotten. */
static void model_resize(struct node *node, struct model *models, uint64_t size)
{
    g_assert(bitmaps_resize_begin(node, size, NULL) == 0);
    uint64_t old = atomic_load(&node->size);
    atomic_store(&node->size, size);
    bitmaps_resize_end(node, true);
    for (unsigned i = 0; i < MODELS; i++) {
        uint64_t granularity = models[i].bitmap->granularity;
        for (uint64_t at = align_up(size, granularity); at < MEMORY_SIZE; at += 512) {
            models[i].dirty[at / 512] = false;
        }
        /* A region that was cut by the old end is longer now. */
        uint64_t last = align_down(old, granularity);
        for (uint64_t at = last; size > old && old > last && at < min_u64(last + granularity, size); at += 512) {
            models[i].dirty[at / 512] = models[i].dirty[last / 512];
        }
    }
}

static void random_step(struct node *node, struct model *models, uint64_t *seed)
{
    uint64_t size = atomic_load(&node->size);
    struct model *model = &models[seeded_next(seed) % MODELS];
    struct model *other = &models[seeded_next(seed) % MODELS];
    uint64_t offset = seeded_next(seed) % size;
    uint64_t bytes = 1 + seeded_next(seed) % min_u64(size - offset, seeded_next(seed) % 4 ? 2000 : size);
    switch (seeded_next(seed) % 16) {
    case 0:
        g_assert(bitmap_clear(model->bitmap, NULL) == 0);
        memset(model->dirty, 0, sizeof(model->dirty));
        break;
    case 1:
        g_assert(bitmap_set_enabled(model->bitmap, !model->bitmap->enabled, NULL) == 0);
        break;
    case 2:
        g_assert(bitmap_merge(model->bitmap, other->bitmap, NULL) == 0);
        for (uint64_t at = 0; at < size && model != other; at += 512) {
            if (other->dirty[at / 512]) {
                model_mark(model, at, min_u64(512, size - at));
            }
        }
        break;
    case 3:
        model_resize(node, models, MEMORY_SIZE - seeded_next(seed) % 40 * 100);
        break;
    default:
        bitmaps_mark(node, offset, bytes);
        for (unsigned i = 0; i < MODELS; i++) {
            if (models[i].bitmap->enabled) {
                model_mark(&models[i], offset, bytes);
            }
        }
    }
}

/* What saving and loading leaves is the same bitmap. */
static void check_saved(const struct bitmap *bitmap, uint64_t *seed)
{
    struct dirty *copy;
    uint64_t bytes = dirty_saved_bytes(bitmap->dirty);
    g_autofree uint8_t *bits = g_malloc(bytes + 64);
    g_assert(dirty_create(dirty_size(bitmap->dirty), bitmap->granularity, &copy) == 0);
    bool any = false;
    for (uint64_t at = 0; at < bytes;) {
        uint64_t part = (1 + seeded_next(seed) % 4) * 8;
        any |= dirty_save(bitmap->dirty, at, part, bits);
        memset(bits + part, 0xff, 8); /* not of this part */
        dirty_load(copy, at, part, bits);
        at += part;
    }
    uint64_t offset, length, copy_offset, copy_length;
    g_assert_cmpint(any, ==, dirty_bytes(bitmap->dirty) > 0);
    g_assert_cmpuint(dirty_bytes(copy), ==, dirty_bytes(bitmap->dirty));
    for (uint64_t at = 0; dirty_next(bitmap->dirty, at, &offset, &length); at = offset + length) {
        g_assert(dirty_next(copy, at, &copy_offset, &copy_length));
        g_assert(offset == copy_offset && length == copy_length);
    }
    dirty_destroy(copy);
}

static void coroutine_fn random_body(void *unused)
{
    static const uint64_t granularities[MODELS] = {512, 1024, 4096, 32768};
    struct graph *graph = graph_create();
    struct node *node = memory_node(graph, "n", NULL);
    static struct model models[MODELS];
    uint64_t seed = 1;
    graph_lock(graph);
    for (unsigned i = 0; i < MODELS; i++) {
        g_autofree char *name = g_strdup_printf("b%u", i);
        models[i].bitmap = add(node, name, granularities[i], i == 1);
    }
    for (unsigned step = 0; step < STEPS; step++) {
        random_step(node, models, &seed);
        for (unsigned i = 0; i < MODELS; i++) {
            model_check(&models[i], seeded_next(&seed) % atomic_load(&node->size));
        }
        if (step % 50 == 0) {
            check_saved(models[step / 50 % MODELS].bitmap, &seed);
        }
    }
    graph_unlock(graph);
    memory_end(graph);
}

static void test_random(void)
{
    in_coroutine(random_body);
}

/* Writes behind the end of a node that grows by them. */
static void coroutine_fn growing_body(void *unused)
{
    struct graph *graph = graph_create();
    struct node *node = memory_node(graph, "n", NULL);
    graph_lock(graph);
    atomic_store(&node->size, 1000);
    struct bitmap *on = add(node, "on", 512, false);
    struct bitmap *off = add(node, "off", 512, true);
    atomic_store(&node->size, 5000);
    bitmaps_mark(node, 4000, 1000);
    g_assert_cmpuint(bitmap_count(on), >=, 4000);
    check_runs(on, "1000+4000 ");
    check_runs(off, "");
    g_assert(bitmap_set_enabled(on, false, NULL) == 0 && bitmap_set_enabled(off, true, NULL) == 0);
    check_runs(on, "512+4488 ");
    check_runs(off, "");
    graph_unlock(graph);
    memory_end(graph);
}

static void test_growing(void)
{
    in_coroutine(growing_body);
}

/* --- actions --- */

static char *describe(const struct node *node)
{
    GString *text = g_string_new(NULL);
    list_for_each (link, &node->bitmaps) {
        const struct bitmap *bitmap = container_of(link, struct bitmap, link);
        uint64_t offset, bytes;
        g_string_append_printf(text, "%s%s:", bitmap->name, bitmap->enabled ? "" : "(off)");
        for (uint64_t at = 0; bitmap_next(bitmap, at, &offset, &bytes); at = offset + bytes) {
            g_string_append_printf(text, "%" G_GUINT64_FORMAT "+%" G_GUINT64_FORMAT ",", offset, bytes);
        }
        g_string_append_c(text, ' ');
    }
    return g_string_free(text, FALSE);
}

/* One of each kind, each leaning on those before it; the last one fails if `last` names no bitmap. */
static int coroutine_fn run_all(struct graph *graph, const char *last)
{
    struct block_dirty_bitmap_add make = {.node = "n", .name = "made", .has_granularity = true, .granularity = 512};
    struct block_dirty_bitmap a = {.node = "n", .name = "a"}, b = {.node = "n", .name = "b"};
    struct block_dirty_bitmap made = {.node = "n", .name = "made"}, other = {.node = "m", .name = "other"};
    struct block_dirty_bitmap final = {.node = "n", .name = (char *)last};
    struct block_dirty_bitmap_or_str local = {.kind = BLOCK_DIRTY_BITMAP_OR_STR_LOCAL, .u.local = "a"};
    struct block_dirty_bitmap_or_str external = {.kind = BLOCK_DIRTY_BITMAP_OR_STR_EXTERNAL, .u.external = &other};
    struct block_dirty_bitmap_or_str *sources[] = {&local, &external};
    struct block_dirty_bitmap_merge merge = {
        .node = "n", .target = "made", .bitmaps = {.count = G_N_ELEMENTS(sources), .items = sources}};
    struct action actions[7];
    auto_error error = NULL;
    bitmap_add_action(&actions[0], &make);
    bitmap_merge_action(&actions[1], &merge);
    bitmap_clear_action(&actions[2], &a);
    bitmap_remove_action(&actions[3], &b);
    bitmap_disable_action(&actions[4], &made);
    bitmap_enable_action(&actions[5], &other);
    bitmap_clear_action(&actions[6], &final);
    int code = actions_run(graph, actions, G_N_ELEMENTS(actions), &error);
    g_assert((code < 0) == (error != NULL));
    return code;
}

static void coroutine_fn actions_body(void *unused)
{
    struct graph *graph = graph_create();
    struct node *n = memory_node(graph, "n", NULL);
    struct node *m = memory_node(graph, "m", NULL);
    graph_lock(graph);
    add(n, "a", 512, false);
    add(n, "b", 4096, false);
    struct bitmap *c = add(n, "c", 1024, false);
    add(m, "other", 2048, true);
    bitmaps_mark(n, 1000, 100);
    dirty_mark(bitmap_find(m, "other")->dirty, 8192, 1);
    graph_unlock(graph);

    g_autofree char *before_n = describe(n), *before_m = describe(m);
    g_assert_cmpint(run_all(graph, "none"), ==, -ENOENT);
    g_autofree char *after_n = describe(n), *after_m = describe(m);
    g_assert_cmpstr(before_n, ==, after_n);
    g_assert_cmpstr(before_m, ==, after_m);

    bitmap_busy_begin(c);
    g_assert_cmpint(run_all(graph, "c"), ==, -EBUSY);
    bitmap_busy_end(c);
    g_autofree char *again_n = describe(n);
    g_assert_cmpstr(before_n, ==, again_n);

    g_assert_cmpint(run_all(graph, "c"), ==, 0);
    g_autofree char *done_n = describe(n), *done_m = describe(m);
    g_assert_cmpstr(done_n, ==, "a: c: made(off):512+1024,8192+2048, ");
    g_assert_cmpstr(done_m, ==, "other:8192+2048, ");
    memory_end(graph);
}

static void test_actions(void)
{
    in_coroutine(actions_body);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/block/bitmap/rules", test_rules);
    g_test_add_func("/block/bitmap/requests", test_requests);
    g_test_add_func("/block/bitmap/random", test_random);
    g_test_add_func("/block/bitmap/growing", test_growing);
    g_test_add_func("/block/bitmap/actions", test_actions);
    return g_test_run();
}

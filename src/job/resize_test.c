/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* block_resize and change-backing-file on chains in memory: who may, who is told, what a refusal leaves. */
#include "base/size.h"
#include "block/driver.h"
#include "job/chain_testing.h"
#include "job/change_backing.h"
#include "job/commit.h"
#include "job/resize.h"
#include "job/stream.h"
#include "loop/sim.h"
#include "schema/claims.h"
#include <errno.h>

#define SIZE (20 * TEST_CLUSTER - 512)

static struct loop *control_loop;

enum { BASE, A, B, C };

static int coroutine_fn resize(struct test_bench *bench, unsigned node, uint64_t size, struct error **err)
{
    struct block_resize_args args = {.node_name = bench->nodes[node]->name, .size = (int64_t)size};
    return resize_node(bench->graph, &args, err);
}

static int coroutine_fn rename_backing(struct test_bench *bench, unsigned node, const char *file, struct error **err)
{
    struct change_backing_file_args args = {.device = bench->nodes[bench->count - 1]->name,
                                            .image_node_name = bench->nodes[node]->name,
                                            .backing_file = (char *)file};
    return change_backing_file(bench->graph, &args, err);
}

/* A refusal or an error whose sentence has `text`. */
static void expect_error(int result, struct error *error, int code, const char *text)
{
    g_assert_cmpint(result, ==, code);
    g_assert_nonnull(error);
    if (!strstr(error->message, text)) {
        g_error("'%s' does not say '%s'", error->message, text);
    }
    error_free(error);
}
#define EXPECT_ERROR(call, code, text)           \
    do {                                         \
        struct error *error = NULL;              \
        int result = (call);                     \
        expect_error(result, error, code, text); \
    } while (0)

static unsigned count_operations(const struct test_bench *bench)
{
    unsigned count = 0;
    list_for_each (link, &bench->graph->operations) {
        count++;
    }
    return count;
}

static void note_change(void *argument)
{
    ++*(unsigned *)argument;
}

/* Guests go on while everything below and under them grows; whoever reads behind the old end finds zeroes. */
static void every_image_of_a_chain_grows_under_guests(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 4, SIZE);
    struct guest *writer = guest_start(&bench, bench.nodes[C], control_loop, false);
    struct guest *reader = guest_start(&bench, bench.nodes[B], control_loop, true);
    for (unsigned round = 1; round <= 3; round++) {
        for (unsigned i = BASE; i <= C; i++) {
            bool writable = bench.nodes[i]->writable;
            g_assert_cmpint(resize(&bench, i, SIZE + round * 3 * TEST_CLUSTER, NULL), ==, 0);
            g_assert_cmpuint(atomic_load(&bench.nodes[i]->size), ==, SIZE + round * 3 * TEST_CLUSTER);
            g_assert_true(bench.nodes[i]->writable == writable);
            bench_sleep_ms(2);
        }
    }
    g_assert_cmpuint(backend_size(writer->backend), ==, SIZE + 9 * TEST_CLUSTER);
    guest_finish(reader);
    guest_finish(writer);
    g_autofree unsigned char *view = g_malloc(SIZE + 9 * TEST_CLUSTER);
    bench_view(bench.nodes[C], view, SIZE + 9 * TEST_CLUSTER);
    for (uint64_t at = SIZE; at < SIZE + 9 * TEST_CLUSTER; at++) {
        g_assert_cmpint(view[at], ==, 0);
    }
    g_assert_cmpuint(count_operations(&bench), ==, 0);
    bench_close(&bench);
}

/* Whoever stands on it, through a job filter too, is told; and the claims are gone afterwards. */
static void who_stands_on_it_is_told(void *unused)
{
    struct test_bench bench;
    unsigned changes = 0;
    struct node *filter;
    static const struct driver pass = {.name = "pass", .kind = DRIVER_FILTER};
    bench_open(&bench, 2, SIZE);
    g_assert_cmpint(graph_create_node(bench.graph, &pass, "filter", "test", &filter, NULL), ==, 0);
    struct backend *backend = backend_create(bench.graph, "test");
    g_assert_cmpint(backend_attach(backend, bench.nodes[A], ACCESS_READ_DATA, NULL), ==, 0);
    backend_set_changed(backend, note_change, &changes);
    g_assert_cmpint(graph_insert_filter(bench.graph, NULL, filter, bench.nodes[A], NULL), ==, 0);
    changes = 0;
    g_assert_cmpint(resize(&bench, A, SIZE + 512, NULL), ==, 0);
    g_assert_cmpuint(changes, ==, 1);
    g_assert_cmpuint(atomic_load(&filter->size), ==, SIZE + 512);
    /* The filter's name means the image. */
    struct block_resize_args args = {.device = "filter", .size = SIZE + 1024};
    g_assert_cmpint(resize_node(bench.graph, &args, NULL), ==, 0);
    g_assert_cmpuint(backend_size(backend), ==, SIZE + 1024);
    /* A size that it has: nobody is told. */
    g_assert_cmpint(resize(&bench, A, SIZE + 1024, NULL), ==, 0);
    g_assert_cmpuint(changes, ==, 2);
    g_assert_cmpint(graph_remove_filter(bench.graph, NULL, filter, NULL), ==, 0);
    backend_destroy(backend);
    node_release(filter);
    g_assert_cmpuint(count_operations(&bench), ==, 0);
    bench_close(&bench);
}

static void what_leans_on_it_does_not_let_it_shrink(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 3, SIZE);
    EXPECT_ERROR(resize(&bench, A, SIZE - 512, &error), -EBUSY, "b -> a (backing)");
    EXPECT_ERROR(resize(&bench, BASE, 0, &error), -EBUSY, "write-beneath");
    g_assert_false(bench.nodes[A]->writable);
    g_assert_cmpuint(atomic_load(&bench.nodes[A]->size), ==, SIZE);
    struct guest *reader = guest_start(&bench, bench.nodes[B], control_loop, true);
    EXPECT_ERROR(resize(&bench, B, SIZE - 512, &error), -EBUSY, "export b");
    guest_finish(reader);
    g_assert_cmpint(resize(&bench, B, SIZE - 512, NULL), ==, 0);
    g_assert_cmpuint(atomic_load(&bench.nodes[B]->size), ==, SIZE - 512);
    g_assert_cmpuint(count_operations(&bench), ==, 0);
    bench_close(&bench);
}

static void sizes_and_names_that_make_no_sense_are_refused(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 2, SIZE);
    struct block_resize_args none = {.size = 512}, both = {.device = "a", .node_name = "a", .size = 512};
    struct block_resize_args unknown = {.node_name = "x", .size = 512}, negative = {.node_name = "a", .size = -1};
    EXPECT_ERROR(resize_node(bench.graph, &none, &error), -EINVAL, "'device'");
    EXPECT_ERROR(resize_node(bench.graph, &both, &error), -EINVAL, "'node-name'");
    EXPECT_ERROR(resize_node(bench.graph, &unknown, &error), -ENODEV, "node-name='x'");
    EXPECT_ERROR(resize_node(bench.graph, &negative, &error), -EINVAL, "non-negative");
    bench.nodes[BASE]->never_writable = true;
    EXPECT_ERROR(resize(&bench, BASE, SIZE + 512, &error), -EROFS, "read-only");
    g_assert_cmpuint(count_operations(&bench), ==, 0);
    bench_close(&bench);
}

/* What the rule table says of growing beside the jobs: only those refuse it whose table denies attributes. */
static void jobs_refuse_what_they_cannot_bear(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 4, SIZE);
    struct block_commit_args commit = {.job_id = "j", .device = "c", .top_node = "b", .base_node = "base"};
    commit.has_speed = true;
    commit.speed = 1;
    g_assert_cmpint(commit_start(bench.jobs, &commit, NULL), ==, 0);
    EXPECT_ERROR(resize(&bench, B, SIZE + 512, &error), -EBUSY, "block-commit j");
    EXPECT_ERROR(resize(&bench, A, SIZE + 512, &error), -EBUSY, "block-commit j");
    EXPECT_ERROR(resize(&bench, BASE, SIZE + 512, &error), -EBUSY, "block-commit j");
    g_assert_cmpint(resize(&bench, C, SIZE + 512, NULL), ==, 0);
    EXPECT_ERROR(rename_backing(&bench, C, "x", &error), -EBUSY, "block-commit j");
    EXPECT_ERROR(rename_backing(&bench, B, "x", &error), -EBUSY, "block-commit j");
    g_assert_cmpstr(bench_disk_backing(bench.nodes[C]), ==, "b.img");
    jobs_cancel_all_and_wait(bench.jobs);
    g_assert_cmpint(resize(&bench, B, SIZE + 512, NULL), ==, 0);
    g_assert_cmpint(rename_backing(&bench, C, "x", NULL), ==, 0);
    bench_close(&bench);
}

/* A stream goes on while its node and the images below grow; what it makes shows the same. */
static void a_stream_bears_growth_of_all_its_images(void *unused)
{
    struct test_bench bench;
    const uint64_t grown = SIZE + 5 * TEST_CLUSTER;
    bench_open(&bench, 4, SIZE);
    bench_resize(bench.nodes[BASE], grown);
    bench_fill(bench.nodes[BASE], 21 * TEST_CLUSTER, TEST_CLUSTER, 0x99); /* what no overlay ever showed */
    bench_fill(bench.nodes[B], 0, 20 * TEST_CLUSTER - 512, 0x33);         /* enough for a second of streaming */
    struct block_stream_args stream = {.job_id = "j", .device = "c", .base_node = "base"};
    stream.has_speed = true;
    stream.speed = 4 * TEST_CLUSTER;
    g_assert_cmpint(stream_start(bench.jobs, &stream, NULL), ==, 0);
    g_autofree unsigned char *before = g_malloc0(grown), *after = g_malloc0(grown);
    bench_view(bench.nodes[C], before, SIZE);
    static const unsigned order[] = {B, C, A};
    for (unsigned i = 0; i < G_N_ELEMENTS(order); i++) {
        bench_sleep_ms(1);
        g_assert_cmpint(resize(&bench, order[i], grown, NULL), ==, 0);
    }
    EXPECT_ERROR(rename_backing(&bench, C, "x", &error), -EBUSY, "block-stream j");
    g_assert_cmpint(rename_backing(&bench, B, "x", NULL), ==, 0);
    job_set_speed(jobs_find(bench.jobs, "j"), 0, NULL);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    g_assert_cmpstr(bench_disk_backing(bench.nodes[C]), ==, "base.img");
    bench_view(bench.nodes[C], after, grown);
    g_assert_cmpint(memcmp(before, after, grown), ==, 0);
    bench_close(&bench);
}

static void only_the_name_in_the_header_changes(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 3, SIZE);
    struct guest *writer = guest_start(&bench, bench.nodes[B], control_loop, false);
    g_assert_cmpint(rename_backing(&bench, A, "elsewhere/base.img", NULL), ==, 0);
    g_assert_cmpint(rename_backing(&bench, B, "/b.img", NULL), ==, 0);
    guest_finish(writer);
    g_assert_cmpstr(bench_disk_backing(bench.nodes[A]), ==, "elsewhere/base.img");
    g_assert_cmpstr(bench.nodes[A]->header_backing, ==, "elsewhere/base.img");
    g_assert_cmpstr(bench.nodes[A]->header_backing_format, ==, "memory");
    g_assert_true(node_backing(bench.nodes[A]) == bench.nodes[BASE]);
    g_assert_false(bench.nodes[A]->writable);
    EXPECT_ERROR(rename_backing(&bench, BASE, "x", &error), -EINVAL, "no backing image");
    EXPECT_ERROR(rename_backing(&bench, A, "", &error), -EINVAL, "is empty");
    struct change_backing_file_args other = {.device = "a", .image_node_name = "b", .backing_file = "x"};
    EXPECT_ERROR(change_backing_file(bench.graph, &other, &error), -EINVAL, "not in the backing chain");
    bench_faults(bench.nodes[A])->header_error = -EIO;
    EXPECT_ERROR(rename_backing(&bench, A, "x", &error), -EIO, "'a'");
    g_assert_cmpstr(bench.nodes[A]->header_backing, ==, "elsewhere/base.img");
    g_assert_cmpuint(count_operations(&bench), ==, 0);
    bench_close(&bench);
}

/* The dry run says what the command would, and changes nothing. */
static void a_check_changes_nothing(void *unused)
{
    struct test_bench bench;
    bench_open(&bench, 2, SIZE);
    struct block_resize_args grow = {.node_name = "base", .size = SIZE + 512};
    struct block_resize_args shrink = {.node_name = "base", .size = 512};
    struct change_backing_file_args name = {.device = "a", .image_node_name = "a", .backing_file = (char *)"x"};
    json_t *claims = NULL;
    g_assert_cmpint(resize_check(bench.graph, &grow, &claims, NULL), ==, 0);
    g_assert_cmpuint(json_array_size(claims), ==, 1);
    json_decref(claims);
    EXPECT_ERROR(resize_check(bench.graph, &shrink, &claims, &error), -EBUSY, "write-beneath");
    g_assert_cmpuint(json_array_size(claims), ==, 2);
    json_decref(claims);
    g_assert_cmpint(change_backing_file_check(bench.graph, &name, &claims, NULL), ==, 0);
    json_decref(claims);
    g_assert_cmpuint(atomic_load(&bench.nodes[BASE]->size), ==, SIZE);
    g_assert_cmpstr(bench_disk_backing(bench.nodes[A]), ==, "base.img");
    g_assert_cmpuint(count_operations(&bench), ==, 0);
    bench_close(&bench);
}

static void run(gconstpointer test)
{
    loop_run_coroutine(control_loop, (void (*)(void *))test, NULL);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    sim_create_if_asked();
    g_assert_cmpint(loop_create(ENGINE_AUTO, &control_loop, NULL), ==, 0);
    g_test_add_data_func("/resize/every-image-grows", every_image_of_a_chain_grows_under_guests, run);
    g_test_add_data_func("/resize/told", who_stands_on_it_is_told, run);
    g_test_add_data_func("/resize/shrink-refused", what_leans_on_it_does_not_let_it_shrink, run);
    g_test_add_data_func("/resize/nonsense", sizes_and_names_that_make_no_sense_are_refused, run);
    g_test_add_data_func("/resize/beside-commit", jobs_refuse_what_they_cannot_bear, run);
    g_test_add_data_func("/resize/beside-stream", a_stream_bears_growth_of_all_its_images, run);
    g_test_add_data_func("/resize/backing-name", only_the_name_in_the_header_changes, run);
    g_test_add_data_func("/resize/check", a_check_changes_nothing, run);
    int result = g_test_run();
    loop_destroy(control_loop);
    return result;
}

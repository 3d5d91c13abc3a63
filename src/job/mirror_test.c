/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Mirrors of nodes that guests on several loops write and verify: every sync and copy mode, changed live; successions
 * anywhere in a chain; bitmaps; errors; convergence; and what is on disk at each moment of the last step.
 */
#include "base/size.h"
#include "block/bitmap.h"
#include "job/chain_testing.h"
#include "job/commit.h"
#include "job/mirror.h"
#include "job/stream.h"
#include "loop/sim.h"
#include <errno.h>
#include <string.h>

#define SIZE (48 * TEST_CLUSTER - 512)
#define ROUNDS_DEFAULT 12

static struct loop *control_loop, *guest_loops[2];

static void run(gconstpointer body)
{
    loop_run_coroutine(control_loop, (void (*)(void *))body, NULL);
}

static unsigned rounds(void)
{
    const char *asked = g_getenv("INTERLOCK_ROUNDS");
    return asked ? (unsigned)g_ascii_strtoull(asked, NULL, 10) : ROUNDS_DEFAULT;
}

static int coroutine_fn try_mirror(struct test_bench *bench, struct blockdev_mirror args, struct error **err)
{
    struct action action;
    args.job_id = args.job_id ? args.job_id : "j";
    args.target = args.target ? args.target : "d";
    mirror_action(&action, bench->jobs, &args, NULL);
    return actions_run(bench->graph, &action, 1, err);
}

static struct job *coroutine_fn start_mirror(struct test_bench *bench, struct blockdev_mirror args)
{
    auto_error error = NULL;
    if (try_mirror(bench, args, &error) < 0) {
        g_error("%s", error->message);
    }
    return jobs_find(bench->jobs, args.job_id ? args.job_id : "j");
}

/* base <- a <- b <- c, and d alone, the target. */
static struct node *coroutine_fn open_chain(struct test_bench *bench)
{
    bench_open(bench, 4, SIZE);
    return bench_add(bench, SIZE);
}

static void expect_end(struct test_bench *bench, const char *text)
{
    g_autofree char *events = bench_events(bench);
    if (!strstr(events, text)) {
        g_error("'%s' is not in '%s'", text, events);
    }
}

static void coroutine_fn complete(struct test_bench *bench, const char *id)
{
    bench_await(bench, id, JOB_STATUS_READY);
    struct job *job = jobs_find(bench->jobs, id);
    g_assert_nonnull(job);
    g_assert_cmpint(job_complete(job, NULL), ==, 0);
    bench_await(bench, id, JOB_STATUS_NULL);
}

static void same_view(struct node *one, struct node *other)
{
    g_autofree unsigned char *a = g_malloc(SIZE), *b = g_malloc(SIZE);
    bench_view(one, a, SIZE);
    bench_view(other, b, SIZE);
    for (uint64_t at = 0; at < SIZE; at++) {
        if (a[at] != b[at]) {
            g_error("'%s' and '%s' differ at %#" G_GINT64_MODIFIER "x (cluster %u): %#x, %#x", one->name, other->name,
                    at, (unsigned)(at / TEST_CLUSTER), a[at], b[at]);
        }
    }
}

static void change_mode(struct job *job, enum mirror_copy_mode mode)
{
    struct block_job_change_options options = {.id = job->id, .type = JOB_TYPE_MIRROR, .u.mirror.copy_mode = mode};
    struct error *error = NULL;
    if (job_change(job, &options, &error) < 0) { /* the job may have gone past it meanwhile */
        g_assert_nonnull(strstr(error->message, "cannot accept command verb 'change'"));
        error_free(error);
    }
}

/* --- exactness --- */

static const enum mirror_sync_mode syncs[] = {MIRROR_SYNC_MODE_FULL, MIRROR_SYNC_MODE_TOP, MIRROR_SYNC_MODE_NONE};

/* Guests write through the start, the copying, READY and the pivot, and go on with the target. */
static void coroutine_fn pivot_round(unsigned round)
{
    struct test_bench bench;
    struct node *target = open_chain(&bench), *top = bench.nodes[3];
    enum mirror_sync_mode sync = syncs[round % 3];
    struct blockdev_mirror args = {.device = "c", .sync = sync, .has_copy_mode = true};
    args.copy_mode = g_test_rand_int_range(0, 2) ? MIRROR_COPY_MODE_WRITE_BLOCKING : MIRROR_COPY_MODE_BACKGROUND;
    args.has_granularity = true;
    args.granularity = (int64_t)512 << g_test_rand_int_range(0, 12);
    if (g_test_rand_int_range(0, 2)) { /* it has something already, that must not stay */
        bench_fill(target, 0, 20 * TEST_CLUSTER, 0xee);
        args.sync = sync = MIRROR_SYNC_MODE_FULL;
    }
    g_test_message("round %u: sync %s, %s, granularity %d", round, mirror_sync_mode_name(sync),
                   mirror_copy_mode_name(args.copy_mode), (int)args.granularity);
    struct guest *guest = guest_start_on(&bench, top, guest_loops, G_N_ELEMENTS(guest_loops));
    struct job *job = start_mirror(&bench, args);
    for (int changes = g_test_rand_int_range(0, 4); changes > 0 && job->status == JOB_STATUS_RUNNING; changes--) {
        bench_sleep_ms((unsigned)g_test_rand_int_range(0, 3));
        change_mode(job, changes % 2 ? MIRROR_COPY_MODE_WRITE_BLOCKING : MIRROR_COPY_MODE_BACKGROUND);
    }
    bench_await(&bench, "j", JOB_STATUS_READY);
    bench_sleep_ms((unsigned)g_test_rand_int_range(0, 5));
    change_mode(job, g_test_rand_int_range(0, 2) ? MIRROR_COPY_MODE_WRITE_BLOCKING : MIRROR_COPY_MODE_BACKGROUND);
    bench_sleep_ms((unsigned)g_test_rand_int_range(0, 5));
    complete(&bench, "j");
    expect_end(&bench, "BLOCK_JOB_COMPLETED j complete; ");
    g_assert_true(backend_node(guest->backend) == target);
    g_assert_true(guest->operation->bound[CLAIM_NODE] == target);
    struct node *below = sync == MIRROR_SYNC_MODE_TOP ? bench.nodes[2] : sync == MIRROR_SYNC_MODE_NONE ? top : NULL;
    g_assert_true(node_backing(target) == below);
    g_assert_cmpstr(bench_disk_backing(target), ==, below == top ? "c.img" : below ? "b.img" : NULL);
    g_assert_null(top->stale);
    bench_sleep_ms(2);
    guest_finish(guest);
    bench_close(&bench);
}

static void guests_never_see_the_pivot(void *unused)
{
    for (unsigned round = 0; round < rounds(); round++) {
        pivot_round(round);
    }
}

/* Both sides are written: once guests rest, both are the same, though the job has done nothing since READY. */
static void both_sides_are_the_same(void *unused)
{
    for (unsigned round = 0; round < rounds() / 2 + 1; round++) {
        struct test_bench bench;
        struct node *target = open_chain(&bench);
        struct blockdev_mirror args = {.device = "c",
                                       .sync = MIRROR_SYNC_MODE_FULL,
                                       .has_copy_mode = true,
                                       .copy_mode = MIRROR_COPY_MODE_WRITE_BLOCKING,
                                       .has_granularity = true,
                                       .granularity = (int64_t)4096 << g_test_rand_int_range(0, 8)};
        struct guest *guest = guest_start_on(&bench, bench.nodes[3], guest_loops, G_N_ELEMENTS(guest_loops));
        struct job *job = start_mirror(&bench, args);
        bench_await(&bench, "j", JOB_STATUS_READY);
        bench_sleep_ms(5);
        guest_stop(guest);
        struct block_job_info_list *list = jobs_query_block(bench.jobs);
        g_assert_true(list->items[0]->has_actively_synced && list->items[0]->actively_synced);
        block_job_info_list_free(list);
        same_view(bench.nodes[3], target);
        g_assert_cmpint(job_cancel(job, false, NULL), ==, 0);
        bench_await(&bench, "j", JOB_STATUS_NULL);
        expect_end(&bench, "BLOCK_JOB_COMPLETED j complete; ");
        g_assert_true(backend_node(guest->backend) == bench.nodes[3]);
        same_view(bench.nodes[3], target);
        guest_leave(guest);
        bench_close(&bench);
    }
}

/* What a failed write has left is copied at once: a guest that goes on trying does not hold the job up. */
static void a_failed_write_leaves_no_mark(void *unused)
{
    struct test_bench bench;
    struct node *target = open_chain(&bench);
    struct guest *guest = guest_start(&bench, bench.nodes[3], control_loop, false);
    struct blockdev_mirror args = {.device = "c",
                                   .sync = MIRROR_SYNC_MODE_FULL,
                                   .has_copy_mode = true,
                                   .copy_mode = MIRROR_COPY_MODE_WRITE_BLOCKING};
    start_mirror(&bench, args);
    bench_await(&bench, "j", JOB_STATUS_READY);
    guest_stop(guest);
    bench_faults(bench.nodes[3])->write_error = -ENOSPC;
    bench_faults(bench.nodes[3])->at = 3 * TEST_CLUSTER;
    bench_fill(bench.nodes[3], 3 * TEST_CLUSTER, TEST_CLUSTER, 0x77); /* as far as it got */
    char data[900] = "";
    struct iovec iov = {data, sizeof(data)};
    g_assert_cmpint(backend_write(guest->backend, 3 * TEST_CLUSTER + 700, sizeof(data), buffers_one(&iov), 0), ==,
                    -ENOSPC);
    struct block_job_info_list *list = jobs_query_block(bench.jobs);
    g_assert_true(list->items[0]->actively_synced);
    block_job_info_list_free(list);
    g_assert_cmpint(bench_byte(target, 3 * TEST_CLUSTER + 700), ==, 0x77);
    bench_faults(bench.nodes[3])->write_error = 0;
    memset(guest->model + 3 * TEST_CLUSTER, 0x77, TEST_CLUSTER);
    guest_leave(guest);
    bench_close(&bench);
}

/* Cancelled while ready and being written: the copy is what the node was at one moment, so it has every write that had
 * been acknowledged by then, and nothing is written to it any more. */
static void a_cancel_when_ready_leaves_a_copy(void *unused)
{
    for (unsigned round = 0; round < 8; round++) {
        struct test_bench bench;
        struct node *target = open_chain(&bench);
        struct guest *guest = guest_start_on(&bench, bench.nodes[3], guest_loops, G_N_ELEMENTS(guest_loops));
        struct blockdev_mirror args = {
            .device = "c", .sync = MIRROR_SYNC_MODE_FULL, .has_copy_mode = true, .copy_mode = round % 2};
        struct job *job = start_mirror(&bench, args);
        bench_await(&bench, "j", JOB_STATUS_READY);
        bool rests = round & 2;
        if (rests) {
            guest_stop(guest);
        }
        g_assert_cmpint(job_cancel(job, false, NULL), ==, 0);
        bench_await(&bench, "j", JOB_STATUS_NULL);
        expect_end(&bench, "BLOCK_JOB_COMPLETED j complete; ");
        g_autofree unsigned char *then = g_malloc(SIZE), *now = g_malloc(SIZE);
        bench_view(target, then, SIZE);
        if (rests) {
            same_view(bench.nodes[3], target);
            guest_leave(guest);
        } else {
            bench_sleep_ms(3);
            bench_view(target, now, SIZE);
            g_assert_cmpmem(then, SIZE, now, SIZE);
            guest_finish(guest);
        }
        g_assert_null(node_backing(target));
        bench_close(&bench);
    }
}

static void a_forced_cancel_changes_nothing(void *unused)
{
    struct test_bench bench;
    open_chain(&bench);
    struct guest *guest = guest_start(&bench, bench.nodes[3], guest_loops[0], false);
    struct job *job = start_mirror(
        &bench,
        (struct blockdev_mirror){.device = "c", .sync = MIRROR_SYNC_MODE_FULL, .has_speed = true, .speed = 100000});
    while (job->done == 0) {
        bench_sleep_ms(1);
        job_info_list_free(jobs_query(bench.jobs));
    }
    g_assert_cmpint(job_cancel(job, true, NULL), ==, 0);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    expect_end(&bench, "aborting; BLOCK_JOB_CANCELLED j partial; ");
    g_assert_true(backend_node(guest->backend) == bench.nodes[3]);
    guest_finish(guest);
    bench_close(&bench);
}

/* --- in the middle of a chain --- */

/* The view of an image by what stands in the headers on disk. */
struct on_disk {
    struct test_bench *bench;
    unsigned char *expected;
    unsigned looks;
};

static struct node *node_of_file(struct test_bench *bench, const char *file)
{
    for (unsigned i = 0; file && i < bench->count; i++) {
        if (g_str_has_suffix(bench->nodes[i]->filename, file)) {
            return bench->nodes[i];
        }
    }
    return NULL;
}

/* As a program would find it that opens the top now. Headers change under a drain. */
static void check_disk(struct node *changing, void *argument)
{
    struct on_disk *disk = argument;
    for (uint64_t at = 0; at < SIZE; at += 512) {
        struct node *node = disk->bench->nodes[3];
        while (node && !bench_allocated(node, at)) {
            node = node_of_file(disk->bench, bench_disk_backing(node));
        }
        unsigned char byte = 0;
        if (node) {
            byte = bench_byte(node, at);
        }
        if (byte != disk->expected[at]) {
            g_error("%#x at %" G_GUINT64_FORMAT " in place of %#x after a crash while the header of '%s' changes", byte,
                    at, disk->expected[at], changing->name);
        }
    }
    disk->looks++;
}

static void watch_headers(struct test_bench *bench, struct on_disk *disk)
{
    for (unsigned i = 0; i < bench->count; i++) {
        bench_faults(bench->nodes[i])->header = check_disk;
        bench_faults(bench->nodes[i])->argument = disk;
    }
}

/* Mirrors `a` or `b` into d, in its place, while a guest writes at the top. */
static void coroutine_fn replace_round(unsigned round)
{
    static const char *const names[] = {"given.img", "b.img"};
    struct test_bench bench;
    struct node *target = open_chain(&bench);
    unsigned which = 1 + round % 2; /* a or b */
    struct node *overlay = bench.nodes[which + 1], *replaced = bench.nodes[which];
    enum mirror_sync_mode sync = syncs[round / 2 % 3];
    unsigned how = round % 5; /* 3: a name is given; 4: names stay */
    struct blockdev_mirror args = {
        .device = replaced->name, .replaces = replaced->name, .sync = sync, .keep_backing = how == 4};
    args.backing_file = how == 3 ? (char *)"given.img" : NULL;
    struct guest *guest = guest_start_on(&bench, bench.nodes[3], guest_loops, G_N_ELEMENTS(guest_loops));
    start_mirror(&bench, args);
    bench_await(&bench, "j", JOB_STATUS_READY);
    bench_sleep_ms(2);
    complete(&bench, "j");
    expect_end(&bench, "BLOCK_JOB_COMPLETED j complete; ");
    g_assert_true(node_backing(overlay) == target);
    struct node *below = sync == MIRROR_SYNC_MODE_TOP    ? bench.nodes[which - 1]
                         : sync == MIRROR_SYNC_MODE_NONE ? replaced
                                                         : NULL;
    g_assert_true(node_backing(target) == below);
    g_autofree char *old = g_strdup_printf("%s.img", replaced->name);
    g_assert_cmpstr(bench_disk_backing(overlay), ==, how == 3 ? names[0] : how == 4 ? old : "d.img");
    g_assert_true(backend_node(guest->backend) == bench.nodes[3]);
    g_assert_null(replaced->stale);
    guest_finish(guest);
    bench_close(&bench);
}

static void any_node_is_replaced(void *unused)
{
    for (unsigned round = 0; round < 10; round++) {
        replace_round(round);
    }
}

static void a_crash_in_the_last_step_leaves_one_of_two_states(void *unused)
{
    for (unsigned round = 0; round < 3; round++) {
        struct test_bench bench;
        struct on_disk disk = {.bench = &bench, .expected = g_malloc(SIZE)};
        open_chain(&bench);
        bench_view(bench.nodes[3], disk.expected, SIZE);
        watch_headers(&bench, &disk);
        start_mirror(&bench, (struct blockdev_mirror){.device = "a", .replaces = "a", .sync = syncs[round]});
        complete(&bench, "j");
        g_assert_cmpuint(disk.looks, ==, syncs[round] == MIRROR_SYNC_MODE_FULL ? 2 : 4);
        check_disk(bench.nodes[3], &disk);
        g_free(disk.expected);
        bench_close(&bench);
    }
}

/* Whether the overlay's header was changed before the error, and can be put back or not: what is on disk leads to the
 * same data as before, the target's header only goes when nobody can be naming it. */
static void coroutine_fn header_error_round(unsigned round)
{
    struct test_bench bench;
    struct on_disk disk = {.bench = &bench, .expected = g_malloc(SIZE)};
    struct node *target = open_chain(&bench), *overlay = bench.nodes[2];
    bool written = round & 1, once = round & 2;
    bench_view(bench.nodes[3], disk.expected, SIZE);
    start_mirror(&bench, (struct blockdev_mirror){.device = "a", .replaces = "a", .sync = MIRROR_SYNC_MODE_TOP});
    bench_await(&bench, "j", JOB_STATUS_READY);
    bench_faults(overlay)->header_error = -EIO;
    bench_faults(overlay)->header_written = written;
    bench_faults(overlay)->header_once = once;
    if (!once) {
        g_test_expect_message(G_LOG_DOMAIN, G_LOG_LEVEL_WARNING, "*'b' may keep its new backing file*");
        g_test_expect_message(G_LOG_DOMAIN, G_LOG_LEVEL_WARNING, "*'d' keeps its backing file*");
    }
    g_assert_cmpint(job_complete(jobs_find(bench.jobs, "j"), NULL), ==, 0);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    g_test_assert_expected_messages();
    expect_end(&bench, written ? "a header, and an error" : "no header today");
    g_assert_true(node_backing(overlay) == bench.nodes[1]);
    g_assert_null(node_backing(target));
    g_assert_cmpstr(bench_disk_backing(target), ==, once ? NULL : "base.img");
    g_assert_cmpstr(bench_disk_backing(overlay), ==, written && !once ? "d.img" : "a.img");
    check_disk(overlay, &disk);
    g_free(disk.expected);
    bench_close(&bench);
}

static void a_header_that_cannot_be_written_changes_nothing(void *unused)
{
    for (unsigned round = 0; round < 4; round++) {
        header_error_round(round);
    }
}

/* Without replaces the overlay stays where it is, and so does a job of the node's own. */
static void overlays_stay_without_replaces(void *unused)
{
    struct test_bench bench;
    struct node *target = open_chain(&bench);
    struct guest *guest = guest_start(&bench, bench.nodes[3], guest_loops[0], false);
    struct guest *reader = guest_start(&bench, bench.nodes[1], guest_loops[1], true);
    start_mirror(&bench, (struct blockdev_mirror){.device = "a", .sync = MIRROR_SYNC_MODE_FULL});
    complete(&bench, "j");
    g_assert_true(node_backing(bench.nodes[2]) == bench.nodes[1]);
    g_assert_true(backend_node(reader->backend) == target);
    guest_finish(reader);
    guest_finish(guest);
    bench_close(&bench);
}

/* --- several at once --- */

/* Two mirrors of one node; when one has ended, the other one goes on with what took the node's place. */
static void two_mirrors_of_one_node(void *unused)
{
    for (unsigned round = 0; round < 6; round++) {
        struct test_bench bench;
        struct node *first = open_chain(&bench), *second = bench_add(&bench, SIZE);
        struct guest *guest = guest_start_on(&bench, bench.nodes[3], guest_loops, G_N_ELEMENTS(guest_loops));
        enum mirror_copy_mode modes[] = {round & 1, round >> 1 & 1};
        const char *ids[] = {"one", "two"};
        start_mirror(&bench, (struct blockdev_mirror){.job_id = "one",
                                                      .device = "c",
                                                      .sync = MIRROR_SYNC_MODE_FULL,
                                                      .has_copy_mode = true,
                                                      .copy_mode = modes[0]});
        start_mirror(&bench, (struct blockdev_mirror){.job_id = "two",
                                                      .device = "c",
                                                      .sync = MIRROR_SYNC_MODE_FULL,
                                                      .target = "e",
                                                      .has_copy_mode = true,
                                                      .copy_mode = modes[1]});
        bench_await(&bench, "one", JOB_STATUS_READY);
        bench_await(&bench, "two", JOB_STATUS_READY);
        bool swapped = round % 3 == 1;
        complete(&bench, ids[swapped]);
        g_assert_true(backend_node(guest->backend) == node_head(swapped ? second : first));
        bench_sleep_ms(3);
        complete(&bench, ids[!swapped]);
        g_assert_true(backend_node(guest->backend) == (swapped ? first : second));
        guest_finish(guest);
        bench_close(&bench);
    }
}

/* A mirror takes the place of b, together with a second one of b, whose filter was put between b and a stream into b.
 * The stream goes on with b, and the second mirror with what b's users have now. */
static void a_stream_stays_with_its_image(void *unused)
{
    struct test_bench bench;
    struct node *first = open_chain(&bench), *second = bench_add(&bench, SIZE), *node = bench.nodes[2];
    g_autofree unsigned char *before = g_malloc(SIZE), *after = g_malloc(SIZE);
    struct block_stream_args stream = {
        .job_id = "stream", .device = "b", .base_node = "base", .has_speed = true, .speed = 1};
    bench_view(node, before, SIZE);
    start_mirror(&bench, (struct blockdev_mirror){
                             .job_id = "one", .device = "b", .replaces = "b", .sync = MIRROR_SYNC_MODE_FULL});
    bench_await(&bench, "one", JOB_STATUS_READY);
    g_assert_cmpint(stream_start(bench.jobs, &stream, NULL), ==, 0);
    start_mirror(
        &bench, (struct blockdev_mirror){.job_id = "two", .device = "b", .target = "e", .sync = MIRROR_SYNC_MODE_FULL});
    complete(&bench, "one");
    g_assert_cmpint(job_set_speed(jobs_find(bench.jobs, "stream"), 0, NULL), ==, 0);
    bench_await(&bench, "stream", JOB_STATUS_NULL);
    bench_view(node, after, SIZE);
    g_assert_true(!memcmp(before, after, SIZE));
    bench_await(&bench, "two", JOB_STATUS_READY);
    g_assert_cmpint(job_cancel(jobs_find(bench.jobs, "two"), false, NULL), ==, 0);
    bench_await(&bench, "two", JOB_STATUS_NULL);
    same_view(first, second);
    bench_close(&bench);
}

/* --- bitmaps --- */

static void coroutine_fn add_bitmap(struct test_bench *bench, struct node *node)
{
    struct bitmap_config config = {.name = "m", .granularity = TEST_CLUSTER};
    struct drain drain;
    graph_lock(bench->graph);
    graph_drain_begin(bench->graph, &node, 1, NULL, &drain);
    g_assert_cmpint(bitmap_add(node, &config, NULL, NULL), ==, 0);
    graph_drain_end(&drain);
    graph_unlock(bench->graph);
}

static void increments(void *unused)
{
    struct test_bench bench;
    struct node *target = open_chain(&bench), *top = bench.nodes[3];
    struct blockdev_mirror args = {.device = "c", .sync = MIRROR_SYNC_MODE_FULL};
    start_mirror(&bench, args);
    bench_await(&bench, "j", JOB_STATUS_READY);
    add_bitmap(&bench, top);
    g_assert_cmpint(job_cancel(jobs_find(bench.jobs, "j"), false, NULL), ==, 0);
    bench_await(&bench, "j", JOB_STATUS_NULL);
    for (unsigned round = 0; round < 4; round++) {
        struct guest *guest = guest_start_on(&bench, top, guest_loops, G_N_ELEMENTS(guest_loops));
        do { /* until the guest has written something */
            bench_sleep_ms(3);
        } while (bitmap_count(bitmap_find(top, "m")) == 0);
        args.sync = round < 2 ? MIRROR_SYNC_MODE_INCREMENTAL : MIRROR_SYNC_MODE_BITMAP;
        args.bitmap = "m";
        args.has_bitmap_mode = round >= 2;
        args.bitmap_mode = round == 2 ? BITMAP_SYNC_MODE_NEVER : BITMAP_SYNC_MODE_ALWAYS;
        struct job *job = start_mirror(&bench, args);
        bench_await(&bench, "j", JOB_STATUS_READY);
        guest_stop(guest);
        g_assert_cmpuint(bitmap_find(top, "m")->busy, ==, 1);
        g_assert_cmpint(job_cancel(job, false, NULL), ==, 0);
        bench_await(&bench, "j", JOB_STATUS_NULL);
        expect_end(&bench, "BLOCK_JOB_COMPLETED j complete; ");
        same_view(top, target);
        g_assert_cmpuint(bitmap_find(top, "m")->busy, ==, 0);
        g_assert_cmpuint(bitmap_count(bitmap_find(top, "m")) > 0, ==, round == 2);
        guest_leave(guest);
    }
    bench_close(&bench);
}

/* A failed one: the bitmap says what the target has not got (always), or what it said (on-success). */
static void a_bitmap_survives_a_failure(void *unused)
{
    for (unsigned round = 0; round < 2; round++) {
        struct test_bench bench;
        struct node *target = open_chain(&bench), *top = bench.nodes[3];
        struct blockdev_mirror args = {.device = "c", .sync = MIRROR_SYNC_MODE_FULL};
        start_mirror(&bench, args);
        bench_await(&bench, "j", JOB_STATUS_READY);
        add_bitmap(&bench, top);
        g_assert_cmpint(job_cancel(jobs_find(bench.jobs, "j"), false, NULL), ==, 0);
        bench_await(&bench, "j", JOB_STATUS_NULL);
        struct guest *guest = guest_start_on(&bench, top, guest_loops, G_N_ELEMENTS(guest_loops));
        uint64_t at, bytes;
        do {
            bench_sleep_ms(3); /* long enough for the guest to have been there */
        } while (!bitmap_next(bitmap_find(top, "m"), SIZE / 2, &at, &bytes));
        guest_stop(guest);
        bench_await(&bench, "j", JOB_STATUS_NULL);
        uint64_t before = bitmap_count(bitmap_find(top, "m"));
        g_assert_true(bitmap_next(bitmap_find(top, "m"), SIZE / 2, &at, &bytes));
        /* Zeroes that are there already would not be written. */
        bench_fill(target, align_down(at, TEST_CLUSTER), TEST_CLUSTER, 0x11);
        *bench_faults(target) = (struct memory_faults){.write_error = -EIO, .at = at};
        args.sync = MIRROR_SYNC_MODE_BITMAP;
        args.bitmap = "m";
        args.has_bitmap_mode = true;
        args.bitmap_mode = round ? BITMAP_SYNC_MODE_ALWAYS : BITMAP_SYNC_MODE_ON_SUCCESS;
        start_mirror(&bench, args);
        bench_await(&bench, "j", JOB_STATUS_NULL);
        expect_end(&bench, "aborting");
        uint64_t after = bitmap_count(bitmap_find(top, "m"));
        g_assert_cmpuint(after, >, 0);
        g_assert_true(round ? after <= before : after == before);
        *bench_faults(target) = (struct memory_faults){0};
        args.sync = MIRROR_SYNC_MODE_INCREMENTAL;
        args.has_bitmap_mode = false;
        start_mirror(&bench, args);
        bench_await(&bench, "j", JOB_STATUS_READY);
        g_assert_cmpint(job_cancel(jobs_find(bench.jobs, "j"), false, NULL), ==, 0);
        bench_await(&bench, "j", JOB_STATUS_NULL);
        same_view(top, target);
        guest_leave(guest);
        bench_close(&bench);
    }
}

/* --- errors --- */

/* Both sides are written, and the target fails: the guest does not notice. */
static void coroutine_fn failing_target(enum blockdev_on_error policy)
{
    struct test_bench bench;
    struct node *target = open_chain(&bench);
    struct guest *guest = guest_start_on(&bench, bench.nodes[3], guest_loops, G_N_ELEMENTS(guest_loops));
    struct blockdev_mirror args = {.device = "c",
                                   .sync = MIRROR_SYNC_MODE_FULL,
                                   .has_copy_mode = true,
                                   .copy_mode = MIRROR_COPY_MODE_WRITE_BLOCKING,
                                   .has_on_target_error = true,
                                   .on_target_error = policy};
    struct job *job = start_mirror(&bench, args);
    bench_await(&bench, "j", JOB_STATUS_READY);
    bench_faults(target)->at = 20 * TEST_CLUSTER;
    bench_faults(target)->write_error = -EIO;
    if (policy == BLOCKDEV_ON_ERROR_REPORT) {
        bench_await(&bench, "j", JOB_STATUS_NULL);
        expect_end(&bench, "BLOCK_JOB_ERROR j write report");
    } else {
        if (policy == BLOCKDEV_ON_ERROR_STOP) {
            bench_await(&bench, "j", JOB_STATUS_STANDBY);
            bench_sleep_ms(3);
        } else {
            bench_sleep_ms(250);
        }
        bench_faults(target)->write_error = 0;
        if (policy == BLOCKDEV_ON_ERROR_STOP) {
            g_assert_cmpint(job_resume(job, NULL), ==, 0);
        }
        complete(&bench, "j");
        expect_end(&bench, policy == BLOCKDEV_ON_ERROR_STOP ? "BLOCK_JOB_ERROR j write stop"
                                                            : "BLOCK_JOB_ERROR j write ignore");
        g_assert_true(backend_node(guest->backend) == target);
    }
    guest_finish(guest);
    bench_close(&bench);
}

static void errors_of_the_target(void *unused)
{
    failing_target(BLOCKDEV_ON_ERROR_REPORT);
    failing_target(BLOCKDEV_ON_ERROR_STOP);
    failing_target(BLOCKDEV_ON_ERROR_IGNORE);
}

/* --- convergence --- */

/* Users write faster than the target takes it. */
static void coroutine_fn outrun(struct test_bench *bench, struct node *target, struct guest **ret,
                                struct blockdev_mirror args)
{
    *ret = guest_start_on(bench, bench->nodes[3], guest_loops, G_N_ELEMENTS(guest_loops));
    bench_faults(target)->write_ns = 8000000;
    args.device = "c";
    args.sync = MIRROR_SYNC_MODE_FULL;
    args.has_switch_after = args.has_switch_ratio = args.has_granularity = true;
    args.granularity = TEST_CLUSTER;
    start_mirror(bench, args);
}

static void who_is_outrun_becomes_ready(void *unused)
{
    for (unsigned round = 0; round < 3; round++) {
        struct test_bench bench;
        struct guest *guest;
        struct node *target = open_chain(&bench);
        struct blockdev_mirror args = {.switch_after = round == 0, .switch_ratio = round == 1 ? 20 : 0};
        outrun(&bench, target, &guest, args);
        struct job *job = jobs_find(bench.jobs, "j");
        if (round == 2) { /* nobody asked for a bound: shows that there is something to be bounded */
            bench_sleep_ms(1200);
            g_assert_cmpint(job->status, ==, JOB_STATUS_RUNNING);
            change_mode(job, MIRROR_COPY_MODE_WRITE_BLOCKING);
        }
        int64_t before = loop_clock_ns();
        bench_await(&bench, "j", JOB_STATUS_READY);
        g_assert_cmpint(loop_clock_ns() - before, <, 8LL * 1000000000);
        before = loop_clock_ns();
        complete(&bench, "j");
        g_assert_cmpint(loop_clock_ns() - before, <, 1000000000);
        g_assert_true(backend_node(guest->backend) == target);
        bench_faults(target)->write_ns = 0;
        guest_finish(guest);
        bench_close(&bench);
    }
}

/* The same for an active commit into a slow base; then with both sides written from the beginning. */
static void an_active_commit_becomes_ready(void *unused)
{
    for (unsigned round = 0; round < 2; round++) {
        struct test_bench bench;
        open_chain(&bench);
        struct node *base = bench.nodes[2];
        struct guest *guest = guest_start_on(&bench, bench.nodes[3], guest_loops, G_N_ELEMENTS(guest_loops));
        bench_faults(base)->write_ns = 8000000;
        struct block_commit_args args = {.job_id = "j", .device = "c", .base_node = "b", .has_switch_after = true};
        args.switch_after = 1;
        args.has_copy_mode = round == 1;
        args.copy_mode = MIRROR_COPY_MODE_WRITE_BLOCKING;
        auto_error error = NULL;
        if (commit_start(bench.jobs, &args, &error) < 0) {
            g_error("%s", error->message);
        }
        int64_t before = loop_clock_ns();
        bench_await(&bench, "j", JOB_STATUS_READY);
        g_assert_cmpint(loop_clock_ns() - before, <, 8LL * 1000000000);
        before = loop_clock_ns();
        complete(&bench, "j");
        g_assert_cmpint(loop_clock_ns() - before, <, 1000000000);
        g_assert_true(backend_node(guest->backend) == base);
        bench_faults(base)->write_ns = 0;
        guest_finish(guest);
        bench_close(&bench);
    }
}

/* --- arguments --- */

static void coroutine_fn expect_refusal(struct test_bench *bench, struct blockdev_mirror args, const char *text)
{
    struct error *error = NULL;
    g_assert_cmpint(try_mirror(bench, args, &error), <, 0);
    if (!strstr(error->message, text)) {
        g_error("'%s' does not say '%s'", error->message, text);
    }
    error_free(error);
}

static void bad_arguments(void *unused)
{
    struct test_bench bench;
    open_chain(&bench);
    struct node *small = bench_add(&bench, SIZE / 2);
    expect_refusal(&bench, (struct blockdev_mirror){.device = "zz"}, "Cannot find device='zz' nor node-name='zz'");
    expect_refusal(&bench, (struct blockdev_mirror){.device = "c", .target = "zz"}, "Cannot find device='zz'");
    expect_refusal(&bench, (struct blockdev_mirror){.device = "c", .target = "c"}, "Can't mirror node into itself");
    expect_refusal(&bench, (struct blockdev_mirror){.device = "c", .target = small->name}, "different sizes");
    expect_refusal(&bench, (struct blockdev_mirror){.device = "c", .target = "a"}, "needs write-data on node 'a'");
    expect_refusal(&bench, (struct blockdev_mirror){.device = "c", .granularity = 511}, "range [512B, 64MB]");
    expect_refusal(&bench, (struct blockdev_mirror){.device = "c", .granularity = 513}, "power of 2");
    expect_refusal(&bench, (struct blockdev_mirror){.device = "c", .buf_size = -1}, "Invalid parameter 'buf-size'");
    expect_refusal(&bench, (struct blockdev_mirror){.device = "c", .replaces = "zz"}, "Failed to find node");
    expect_refusal(&bench, (struct blockdev_mirror){.device = "c", .replaces = "b"}, "Cannot replace 'b' by a node");
    expect_refusal(&bench, (struct blockdev_mirror){.device = "b", .backing_file = "x"}, "without 'replaces'");
    expect_refusal(&bench, (struct blockdev_mirror){.device = "c", .filter_node_name = "b"}, "node-name='b'");
    expect_refusal(&bench, (struct blockdev_mirror){.device = "c", .bitmap = "m"}, "is for sync modes");
    expect_refusal(&bench, (struct blockdev_mirror){.device = "c", .sync = MIRROR_SYNC_MODE_INCREMENTAL},
                   "valid bitmap name");
    expect_refusal(&bench, (struct blockdev_mirror){.device = "c", .sync = MIRROR_SYNC_MODE_INCREMENTAL, .bitmap = "m"},
                   "'m' not found");
    g_autofree char *events = bench_events(&bench);
    g_assert_cmpstr(events, ==, "");
    bench_close(&bench);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*body)(void *);
    } tests[] = {
        {"/mirror/guests-never-see-the-pivot", guests_never_see_the_pivot},
        {"/mirror/both-sides-are-the-same", both_sides_are_the_same},
        {"/mirror/a-failed-write-leaves-no-mark", a_failed_write_leaves_no_mark},
        {"/mirror/a-cancel-when-ready-leaves-a-copy", a_cancel_when_ready_leaves_a_copy},
        {"/mirror/a-forced-cancel-changes-nothing", a_forced_cancel_changes_nothing},
        {"/mirror/any-node-is-replaced", any_node_is_replaced},
        {"/mirror/a-crash-in-the-last-step-leaves-one-of-two-states",
         a_crash_in_the_last_step_leaves_one_of_two_states},
        {"/mirror/a-header-that-cannot-be-written-changes-nothing", a_header_that_cannot_be_written_changes_nothing},
        {"/mirror/overlays-stay-without-replaces", overlays_stay_without_replaces},
        {"/mirror/two-mirrors-of-one-node", two_mirrors_of_one_node},
        {"/mirror/a-stream-stays-with-its-image", a_stream_stays_with_its_image},
        {"/mirror/increments", increments},
        {"/mirror/a-bitmap-survives-a-failure", a_bitmap_survives_a_failure},
        {"/mirror/errors-of-the-target", errors_of_the_target},
        {"/mirror/who-is-outrun-becomes-ready", who_is_outrun_becomes_ready},
        {"/mirror/an-active-commit-becomes-ready", an_active_commit_becomes_ready},
        {"/mirror/bad-arguments", bad_arguments},
    };
    g_test_init(&argc, &argv, NULL);
    sim_create_if_asked();
    g_assert_cmpint(loop_create(ENGINE_AUTO, &control_loop, NULL), ==, 0);
    g_assert_cmpint(loop_thread_start("guest-0", ENGINE_AUTO, &guest_loops[0], NULL), ==, 0);
    g_assert_cmpint(loop_thread_start("guest-1", ENGINE_AUTO, &guest_loops[1], NULL), ==, 0);
    for (unsigned i = 0; i < G_N_ELEMENTS(tests); i++) {
        g_test_add_data_func(tests[i].name, tests[i].body, run);
    }
    int result = g_test_run();
    loop_thread_join(guest_loops[0]);
    loop_thread_join(guest_loops[1]);
    loop_destroy(control_loop);
    return result;
}

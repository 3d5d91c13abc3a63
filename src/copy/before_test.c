/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Copies of a point in time between nodes in memory, under guests that write from several loops, with a background copy
 * and readers of the frozen view beside them; what a target that fails or hangs means. The order of everything is the
 * loops' (in simulated worlds: the seed's). The guests' regions meet inside units, so that they wait for each other.
 */
#include "block/memory_node.h"
#include "copy/before.h"
#include "copy/copy.h"
#include "loop/sim.h"

#define UNIT ((uint64_t)MEMORY_CLUSTER)
#define LOOPS 2
#define GUESTS 10
#define REGION (MEMORY_SIZE / GUESTS) /* no multiple of a unit */
#define ROUNDS 12

struct bed {
    struct graph *graph;
    struct node *source, *target, *filter;
    struct backend *guest, *own;
    struct before *before;
    struct copy_control control;
    struct co_group group;
    unsigned char frozen[MEMORY_SIZE];
    atomic_bool stop;
    atomic_uint writes;
};

/* --- a filter that guards, a view, and a target that can fail --- */

static int target_error;         /* of every write to the target */
static atomic_bool target_hangs; /* until it is false again */

struct guard_state {
    struct before *before;
};

static struct before_edges edges_of(struct node *node)
{
    return (struct before_edges){node->filtered, node->target};
}

static int coroutine_fn guard_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                    unsigned flags)
{
    const struct guard_state *state = node->state;
    struct before_edges edges = edges_of(node);
    int code = before_guard(state->before, &edges, offset, bytes);
    return code < 0 ? code : edge_write(node->filtered, offset, bytes, from, flags);
}

static int coroutine_fn guard_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    const struct guard_state *state = node->state;
    struct before_edges edges = edges_of(node);
    return before_discard(state->before, &edges, offset, bytes);
}

static const struct driver guard_driver = {
    .name = "guard",
    .kind = DRIVER_FILTER,
    .state_size = sizeof(struct guard_state),
    .write = guard_write,
    .discard = guard_discard,
};

static int coroutine_fn target_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                     unsigned flags)
{
    struct loop_sleep sleep = {0};
    while (atomic_load(&target_hangs)) {
        loop_sleep_ns(&sleep, 1000 * 1000);
    }
    return target_error ? target_error : memory_write(node, offset, bytes, from, flags);
}

static const struct driver target_driver = {
    .name = "target",
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct memory_state),
    .read = memory_read,
    .write = target_write,
    .discard = memory_discard,
};

static struct node *bed_node(struct bed *bed, const struct driver *driver, const char *name)
{
    struct node *node = node_create(bed->graph, driver, name);
    atomic_store(&node->size, MEMORY_SIZE);
    node->writable = node->wants_writable = node->open = node->monitor_owned = node->discard = true;
    node_publish(node);
    return node;
}

static struct bed *coroutine_fn bed_create(bool break_snapshot, unsigned timeout_s)
{
    struct bed *bed = g_new0(struct bed, 1);
    struct before_config config = {
        .size = MEMORY_SIZE, .unit = UNIT, .break_snapshot = break_snapshot, .timeout_s = timeout_s};
    target_error = 0;
    target_hangs = false;
    bed->graph = graph_create();
    bed->source = memory_node(bed->graph, "source", NULL);
    bed->target = bed_node(bed, &target_driver, "target");
    bed->filter = bed_node(bed, &guard_driver, "guard");
    bed->filter->job_filter = true;
    memory_of(bed->source)->pauses = memory_of(bed->target)->pauses = true;
    for (unsigned i = 0; i < MEMORY_SIZE; i++) {
        bed->frozen[i] = memory_of(bed->source)->data[i] = 1 + i % 251;
    }
    memset(bed->frozen + 3 * UNIT, 0, 2 * UNIT);
    memset(memory_of(bed->source)->data + 3 * UNIT, 0, 2 * UNIT);
    memset(memory_of(bed->target)->data, 0xee, MEMORY_SIZE);
    g_assert(edge_attach(bed->filter, EDGE_FILTERED, bed->source, NULL, NULL) == 0);
    g_assert(edge_attach(bed->filter, EDGE_TARGET, bed->target, NULL, NULL) == 0);
    bed->filter->target->granted = ACCESS_ALL;
    g_assert_cmpint(before_create(&config, &bed->before), ==, 0);
    before_keep(bed->before, 0, MEMORY_SIZE);
    ((struct guard_state *)bed->filter->state)->before = bed->before;
    bed->guest = memory_backend(bed->graph, "guest", bed->filter, ACCESS_ALL);
    bed->own = memory_backend(bed->graph, "own", bed->filter, ACCESS_ALL);
    co_group_init(&bed->group);
    return bed;
}

static void coroutine_fn bed_destroy(struct bed *bed)
{
    backend_destroy(bed->guest);
    backend_destroy(bed->own);
    before_settle(bed->before);
    memory_end(bed->graph);
    before_destroy(bed->before);
    co_group_destroy(&bed->group);
    g_free(bed);
}

/* --- who takes part --- */

struct guest {
    struct bed *bed;
    uint64_t start; /* of its region */
};

static uint64_t draw(uint64_t below)
{
    return loop_random() % below;
}

static void coroutine_fn guest_run(void *argument)
{
    struct guest *guest = argument;
    struct bed *bed = guest->bed;
    unsigned char data[REGION];
    while (!atomic_load(&bed->stop)) {
        uint64_t from = draw(REGION), bytes = 1 + draw(REGION - from);
        struct iovec iov = {data, bytes};
        memset(data, (int)draw(256), bytes);
        g_assert_cmpint(backend_write(bed->guest, guest->start + from, bytes, buffers_one(&iov), 0), ==, 0);
        atomic_fetch_add(&bed->writes, 1);
        coroutine_pause();
    }
    co_group_leave(&bed->group);
}

/* One look at the frozen view, as a node over the filter has it. */
static int coroutine_fn view_read(struct bed *bed, uint64_t offset, uint64_t bytes, unsigned char *to)
{
    struct before_edges edges = edges_of(bed->filter);
    struct iovec iov = {to, bytes};
    backend_enter(bed->own);
    int code = before_read(bed->before, &edges, offset, bytes, buffers_one(&iov));
    backend_leave(bed->own);
    return code;
}

static void coroutine_fn reader_run(void *argument)
{
    struct bed *bed = argument;
    g_autofree unsigned char *data = g_malloc(MEMORY_SIZE);
    while (!atomic_load(&bed->stop)) {
        uint64_t from = draw(MEMORY_SIZE), bytes = 1 + draw(MEMORY_SIZE - from);
        g_assert_cmpint(view_read(bed, from, bytes, data), ==, 0);
        g_assert(memcmp(data, bed->frozen + from, bytes) == 0);
        coroutine_pause();
    }
    co_group_leave(&bed->group);
}

static int coroutine_fn background_extent(void *argument, uint64_t offset, uint64_t bytes, struct copy_extent *ret)
{
    *ret = (struct copy_extent){bytes, COPY_DATA};
    return 0;
}

static bool background_wanted(void *argument, uint64_t *offset, uint64_t *bytes)
{
    return before_wanted(argument, offset, bytes);
}

static void background_moved(void *argument, uint64_t offset, uint64_t bytes)
{
    before_moved(argument, offset, bytes);
}

static enum copy_verdict background_failed(void *argument, bool reading, int error)
{
    return COPY_FAIL;
}

static int coroutine_fn background_copy(struct bed *bed)
{
    struct copy_config config = {
        .control = &bed->control,
        .source = bed->own,
        .target_edge = bed->filter->target,
        .alignment = UNIT,
        .piece = 3 * UNIT,
        .workers = 3,
        .extent = background_extent,
        .busy = before_lock(bed->before),
        .wanted = background_wanted,
        .moved = background_moved,
        .failed = background_failed,
        .argument = bed->before,
    };
    struct copy *copy = copy_create(&config);
    int code = copy_range(copy, 0, MEMORY_SIZE, false);
    copy_destroy(copy);
    return code;
}

static void coroutine_fn drainer_run(void *argument)
{
    struct bed *bed = argument;
    struct node *const nodes[] = {bed->source, bed->target};
    while (!atomic_load(&bed->stop)) {
        struct drain drain;
        graph_lock(bed->graph);
        graph_drain_begin(bed->graph, nodes + draw(2), 1, NULL, &drain);
        graph_drain_end(&drain);
        graph_unlock(bed->graph);
        coroutine_pause();
    }
    co_group_leave(&bed->group);
}

/* --- exactness --- */

static void bed_spawn(struct bed *bed, struct loop *loop, void (*entry)(void *argument), void *argument)
{
    co_group_enter(&bed->group);
    loop_spawn(loop, entry, argument);
}

static void coroutine_fn until_writes(struct bed *bed, unsigned more)
{
    struct loop_sleep sleep = {0};
    for (unsigned goal = atomic_load(&bed->writes) + more; atomic_load(&bed->writes) < goal;) {
        loop_sleep_ns(&sleep, 10000);
    }
}

static void coroutine_fn exact_round(struct loop *const *loops, bool background)
{
    struct bed *bed = bed_create(false, 0);
    struct guest guests[GUESTS];
    for (unsigned i = 0; i < GUESTS; i++) {
        guests[i] = (struct guest){.bed = bed, .start = i * REGION};
        bed_spawn(bed, loops[i % LOOPS], guest_run, &guests[i]);
    }
    for (unsigned i = 0; i < LOOPS; i++) {
        bed_spawn(bed, loops[i], reader_run, bed);
    }
    bed_spawn(bed, loop_self(), drainer_run, bed);
    if (background) {
        g_assert_cmpint(background_copy(bed), ==, 0);
        g_assert_cmpuint(before_left(bed->before), ==, 0);
    }
    until_writes(bed, GUESTS * 8);
    atomic_store(&bed->stop, true);
    co_group_wait(&bed->group);
    for (uint64_t at = 0; at < MEMORY_SIZE; at += UNIT) {
        uint64_t offset, bytes;
        bool left = before_next(bed->before, at, &offset, &bytes) && offset == at;
        const struct node *holds = left ? bed->source : bed->target;
        g_assert(memcmp(memory_of(holds)->data + at, bed->frozen + at, UNIT) == 0);
    }
    bed_destroy(bed);
}

static void coroutine_fn exact_body(void *argument)
{
    struct loop *loops[LOOPS];
    for (unsigned i = 0; i < LOOPS; i++) {
        g_assert_cmpint(loop_thread_start("io", ENGINE_AUTO, &loops[i], NULL), ==, 0);
    }
    for (unsigned round = 0; round < ROUNDS; round++) {
        exact_round(loops, round % 3 != 0);
    }
    for (unsigned i = 0; i < LOOPS; i++) {
        loop_thread_join(loops[i]);
    }
}

/* --- failing --- */

static int coroutine_fn guest_write(struct bed *bed, uint64_t offset, uint64_t bytes)
{
    unsigned char data[2 * UNIT];
    struct iovec iov = {data, bytes};
    memset(data, 0xaa, bytes);
    return backend_write(bed->guest, offset, bytes, buffers_one(&iov), 0);
}

static void coroutine_fn assert_view(struct bed *bed, uint64_t offset, uint64_t bytes)
{
    unsigned char data[4 * UNIT];
    g_assert_cmpint(view_read(bed, offset, bytes, data), ==, 0);
    g_assert(memcmp(data, bed->frozen + offset, bytes) == 0);
}

/* The write fails, the view stays. */
static void coroutine_fn breaks_writes(void *argument)
{
    struct bed *bed = bed_create(false, 0);
    g_assert_cmpint(guest_write(bed, 100, 100), ==, 0);
    target_error = -ENOSPC;
    g_assert_cmpint(guest_write(bed, UNIT - 10, 20), ==, -ENOSPC);
    g_assert_cmpint(guest_write(bed, 200, 10), ==, 0); /* that unit is there already */
    assert_view(bed, 0, 3 * UNIT);
    g_assert_cmpint(before_broken(bed->before), ==, 0);
    target_error = 0;
    g_assert_cmpint(guest_write(bed, UNIT - 10, 20), ==, 0);
    assert_view(bed, 0, 3 * UNIT);
    bed_destroy(bed);
}

/* The write passes, the view is gone. */
static void coroutine_fn breaks_the_view(void *argument)
{
    struct bed *bed = bed_create(true, 0);
    unsigned char byte;
    g_assert_cmpint(guest_write(bed, 100, 100), ==, 0);
    assert_view(bed, 0, 3 * UNIT);
    target_error = -ENOSPC;
    g_assert_cmpint(guest_write(bed, UNIT, 20), ==, 0);
    g_assert_cmpint(before_broken(bed->before), ==, -ENOSPC);
    target_error = 0;
    g_assert_cmpint(view_read(bed, 0, 1, &byte), ==, -EIO);
    g_assert_cmpint(guest_write(bed, 5 * UNIT, 20), ==, 0);
    g_assert_cmpuint(memory_of(bed->target)->data[5 * UNIT], ==, 0xee); /* nothing is copied any more */
    bed_destroy(bed);
}

static void coroutine_fn too_late(bool break_snapshot)
{
    struct bed *bed = bed_create(break_snapshot, 1);
    g_assert_cmpint(guest_write(bed, 0, 10), ==, 0);
    atomic_store(&target_hangs, true);
    g_assert_cmpint(guest_write(bed, UNIT, 10), ==, break_snapshot ? 0 : -ETIMEDOUT);
    g_assert_cmpint(before_broken(bed->before), ==, break_snapshot ? -ETIMEDOUT : 0);
    atomic_store(&target_hangs, false);
    before_settle(bed->before);
    if (!break_snapshot) {
        assert_view(bed, 0, 2 * UNIT);
        g_assert_cmpuint(before_left(bed->before), ==, MEMORY_SIZE - 2 * UNIT);
    }
    bed_destroy(bed);
}

static void coroutine_fn breaks_what_is_late(void *argument)
{
    too_late(false);
    too_late(true);
}

/* --- parts --- */

static void coroutine_fn given_up(void *argument)
{
    struct bed *bed = bed_create(false, 0);
    unsigned char byte;
    struct extent extent;
    struct before_edges edges = edges_of(bed->filter);
    g_assert_cmpint(guest_write(bed, UNIT, 10), ==, 0);
    g_assert_cmpint(backend_discard(bed->own, 10, 2 * UNIT), ==, 0); /* one whole unit, which was copied */
    g_assert_cmpuint(memory_of(bed->target)->discards, ==, 1);
    g_assert_cmpint(view_read(bed, UNIT, 1, &byte), ==, -EACCES);
    assert_view(bed, 0, UNIT);
    assert_view(bed, 2 * UNIT, UNIT);
    g_assert_cmpint(backend_discard(bed->own, 6 * UNIT, UNIT), ==, 0);
    g_assert_cmpint(guest_write(bed, 6 * UNIT, 10), ==, 0);
    g_assert_cmpuint(memory_of(bed->target)->data[6 * UNIT], ==, 0xee);
    g_assert_cmpint(before_block_status(bed->before, &edges, UNIT, 10, &extent), ==, -EACCES);
    g_assert_cmpint(before_block_status(bed->before, &edges, 2 * UNIT, 8 * UNIT, &extent), ==, 0);
    g_assert_cmpuint(extent.bytes, <=, 4 * UNIT);
    bed_destroy(bed);
}

static void run_in_coroutine(const void *entry)
{
    in_coroutine(entry);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    sim_create_if_asked();
    g_test_add_data_func("/before/exact-under-guests-of-several-loops", exact_body, run_in_coroutine);
    g_test_add_data_func("/before/a-failure-breaks-the-write", breaks_writes, run_in_coroutine);
    g_test_add_data_func("/before/a-failure-breaks-the-view", breaks_the_view, run_in_coroutine);
    g_test_add_data_func("/before/late-is-a-failure", breaks_what_is_late, run_in_coroutine);
    g_test_add_data_func("/before/parts-that-are-given-up", given_up, run_in_coroutine);
    return g_test_run();
}

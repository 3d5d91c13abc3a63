/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The copy engine between two nodes in memory: what is found zero or shown already, in which order pieces begin to be
 * written, comparing, what failures do to the order, what goes from file to file. Dirty copies are tested with the jobs
 * that use them.
 */
#include "block/memory_node.h"
#include "copy/copy.h"

#define PIECE ((uint64_t)MEMORY_CLUSTER)
#define PIECES (MEMORY_SIZE / PIECE)

struct bed {
    struct graph *graph;
    struct node *node;
    struct backend *target;
    struct copy_control control;
    struct copy_config config;
    unsigned char source[MEMORY_SIZE], shown[MEMORY_SIZE];
    unsigned delays[PIECES]; /* how long the read of each piece takes */
    int failures[PIECES];    /* how often it fails before it succeeds */
    uint64_t smallest;       /* told by differs() */
    unsigned told;
};

static struct {
    uint64_t offset, bytes;
    unsigned flags;
} log_of[256];
static unsigned logged, inside, most_inside;

static int coroutine_fn log_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                  unsigned flags)
{
    g_assert_cmpuint(logged, <, G_N_ELEMENTS(log_of));
    log_of[logged].offset = offset;
    log_of[logged].bytes = bytes;
    log_of[logged++].flags = flags;
    inside++;
    most_inside = MAX(most_inside, inside);
    coroutine_pause();
    inside--;
    return memory_write(node, offset, bytes, from, 0);
}

static const struct driver log_driver = {
    .name = "log",
    .compresses = true,
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct memory_state),
    .read = memory_read,
    .write = log_write,
    .write_zeroes = memory_write_zeroes,
};

static int coroutine_fn bed_extent(void *argument, uint64_t offset, uint64_t bytes, struct copy_extent *ret)
{
    *ret = (struct copy_extent){bytes, COPY_DATA};
    return 0;
}

static int coroutine_fn bed_read(void *argument, uint64_t offset, uint64_t bytes, struct buffers to)
{
    struct bed *bed = argument;
    for (unsigned i = 0; i < bed->delays[offset / PIECE]; i++) {
        coroutine_pause();
    }
    if (bed->failures[offset / PIECE] > 0) {
        bed->failures[offset / PIECE]--;
        return -EIO;
    }
    buffers_copy_in(to, bed->source + offset, bytes);
    return 0;
}

static int coroutine_fn bed_shown(void *argument, uint64_t offset, uint64_t bytes, struct buffers to)
{
    struct bed *bed = argument;
    buffers_copy_in(to, bed->shown + offset, bytes);
    return 0;
}

static void bed_differs(void *argument, uint64_t offset)
{
    struct bed *bed = argument;
    bed->smallest = bed->told++ ? min_u64(bed->smallest, offset) : offset;
}

static enum copy_verdict bed_failed(void *argument, bool reading, int error)
{
    g_assert(reading);
    return error == -EIO ? COPY_RETRY : COPY_FAIL;
}

static struct bed *coroutine_fn bed_create(void)
{
    struct bed *bed = g_new0(struct bed, 1);
    bed->graph = graph_create();
    bed->node = node_create(bed->graph, &log_driver, "target");
    atomic_store(&bed->node->size, MEMORY_SIZE);
    bed->node->writable = bed->node->wants_writable = bed->node->open = bed->node->monitor_owned = true;
    bed->node->discard = true;
    node_publish(bed->node);
    bed->target = memory_backend(bed->graph, "test", bed->node, ACCESS_ALL);
    logged = most_inside = 0;
    for (unsigned i = 0; i < MEMORY_SIZE; i++) {
        bed->source[i] = 1 + i % 251;
    }
    bed->config = (struct copy_config){
        .control = &bed->control,
        .target = bed->target,
        .alignment = 1,
        .piece = PIECE,
        .extent = bed_extent,
        .read = bed_read,
        .failed = bed_failed,
        .argument = bed,
    };
    return bed;
}

static int coroutine_fn bed_copy(struct bed *bed)
{
    struct copy *copy = copy_create(&bed->config);
    int result = copy_range(copy, 0, MEMORY_SIZE, false);
    g_assert(result < 0 || copy_done(copy) == MEMORY_SIZE);
    copy_destroy(copy);
    return result;
}

static void coroutine_fn bed_destroy(struct bed *bed)
{
    backend_destroy(bed->target);
    memory_end(bed->graph);
    g_free(bed);
}

static const unsigned char *bed_content(const struct bed *bed)
{
    return memory_of(bed->node)->data;
}

/* However long the reads take, writes begin in order. */
static void coroutine_fn in_order(void *argument)
{
    struct bed *bed = bed_create();
    for (unsigned i = 0; i < PIECES; i++) {
        bed->delays[i] = (PIECES - i) * 3;
    }
    bed->config.ordered = true;
    g_assert_cmpint(bed_copy(bed), ==, 0);
    g_assert_cmpuint(logged, ==, PIECES);
    for (unsigned i = 0; i < PIECES; i++) {
        g_assert_cmpuint(log_of[i].offset, ==, i * PIECE);
    }
    g_assert(!memcmp(bed_content(bed), bed->source, MEMORY_SIZE));
    /* Without it the one that was read first is first. */
    logged = 0;
    bed->config.ordered = false;
    g_assert_cmpint(bed_copy(bed), ==, 0);
    g_assert_cmpuint(log_of[0].offset, !=, 0);
    bed_destroy(bed);
}

/* Pieces that share a unit are written one after the other. */
static void coroutine_fn in_units(void *argument)
{
    struct bed *bed = bed_create();
    bed->config.ordered = true;
    g_assert_cmpint(bed_copy(bed), ==, 0);
    g_assert_cmpuint(most_inside, >, 1);
    most_inside = 0;
    bed->config.order_unit = 2 * PIECE;
    g_assert_cmpint(bed_copy(bed), ==, 0);
    g_assert_cmpuint(most_inside, ==, 2); /* an odd one and the even one behind it */
    most_inside = 0;
    bed->config.order_unit = MEMORY_SIZE;
    g_assert_cmpint(bed_copy(bed), ==, 0);
    g_assert_cmpuint(most_inside, ==, 1);
    bed_destroy(bed);
}

/* A piece that fails lets the next ones go, and comes later. */
static void coroutine_fn in_order_with_failures(void *argument)
{
    struct bed *bed = bed_create();
    bed->config.ordered = true;
    bed->config.workers = 4;
    bed->failures[2] = 1;
    bed->delays[2] = 20;
    bed->failures[7] = 2;
    g_assert_cmpint(bed_copy(bed), ==, 0);
    g_assert_cmpuint(logged, ==, PIECES);
    uint64_t last = 0;
    for (unsigned i = 0; i < PIECES; i++) {
        if (log_of[i].offset != 2 * PIECE && log_of[i].offset != 7 * PIECE) {
            g_assert_cmpuint(log_of[i].offset, >=, last);
            last = log_of[i].offset;
        }
    }
    g_assert(!memcmp(bed_content(bed), bed->source, MEMORY_SIZE));
    bed_destroy(bed);
}

/* Runs of zeroes: units, the least length, and who needs none written. */
static void coroutine_fn zero_runs(void *argument)
{
    struct bed *bed = bed_create();
    memset(bed->source + 512, 0, 512);          /* too short */
    memset(bed->source + 2048, 0, 1536);        /* long enough, and not to the end of its piece */
    memset(bed->source + 4096, 0, 4096);        /* a piece of nothing else */
    memset(bed->source + 12288 - 512, 0, 1024); /* at the end of one and the beginning of another */
    bed->config.zero_alignment = 512;
    bed->config.zero_minimum = 1024;
    bed->config.write_flags = REQUEST_COMPRESSED;
    g_assert_cmpint(bed_copy(bed), ==, 0);
    g_assert(!memcmp(bed_content(bed), bed->source, MEMORY_SIZE));
    g_assert_cmpuint(memory_of(bed->node)->zeroes, ==, 4);
    g_assert_cmpuint(memory_of(bed->node)->last_flags & REQUEST_COMPRESSED, ==, 0);
    g_assert_cmpuint(logged, ==, PIECES);
    g_assert_cmpuint(log_of[0].bytes, ==, 2048);
    g_assert_cmpuint(log_of[0].flags & REQUEST_COMPRESSED, !=, 0);
    uint64_t bytes = 0;
    for (unsigned i = 0; i < logged; i++) {
        bytes += log_of[i].bytes;
    }
    g_assert_cmpuint(bytes, ==, MEMORY_SIZE - 1536 - 4096 - 1024);
    /* A target that is zero. */
    memset(memory_of(bed->node)->data, 0, MEMORY_SIZE);
    logged = 0;
    bed->config.target_is_zero = true;
    g_assert_cmpint(bed_copy(bed), ==, 0);
    g_assert_cmpuint(memory_of(bed->node)->zeroes, ==, 4);
    g_assert_cmpuint(logged, ==, PIECES);
    g_assert(!memcmp(bed_content(bed), bed->source, MEMORY_SIZE));
    bed_destroy(bed);
}

/* What the target shows already is left alone. */
static void coroutine_fn shown_already(void *argument)
{
    struct bed *bed = bed_create();
    memcpy(bed->shown, bed->source, MEMORY_SIZE);
    bed->shown[2 * 512 + 7]++;
    bed->shown[9 * PIECE + 4095]++;
    memset(bed->source + 5 * PIECE, 0, 512); /* shown differently, and zero */
    memset(bed->source + 6 * PIECE, 0, PIECE);
    memset(bed->shown + 6 * PIECE, 0, PIECE);
    bed->config.alignment = 512;
    bed->config.zero_alignment = 512;
    bed->config.shown = bed_shown;
    g_assert_cmpint(bed_copy(bed), ==, 0);
    g_assert_cmpuint(logged, ==, 2);
    g_assert_cmpuint(log_of[0].offset, ==, 1024);
    g_assert_cmpuint(log_of[0].bytes, ==, 512);
    g_assert_cmpuint(log_of[1].offset, ==, 9 * PIECE + 4096 - 512);
    g_assert_cmpuint(memory_of(bed->node)->zeroes, ==, 1);
    bed_destroy(bed);
}

/* The first difference is found, whichever piece is looked at first. */
static void coroutine_fn comparing(void *argument)
{
    struct bed *bed = bed_create();
    memcpy(bed->shown, bed->source, MEMORY_SIZE);
    bed->config.target = NULL;
    bed->config.shown = bed_shown;
    bed->config.differs = bed_differs;
    g_assert_cmpint(bed_copy(bed), ==, 0);
    g_assert_cmpuint(bed->told, ==, 0);
    bed->shown[3 * PIECE + 17]++;
    bed->shown[3 * PIECE + 18]++;
    bed->shown[5 * PIECE]++;
    bed->delays[3] = 50;
    g_assert_cmpint(bed_copy(bed), ==, -ECANCELED);
    g_assert_cmpuint(bed->told, ==, 2);
    g_assert_cmpuint(bed->smallest, ==, 3 * PIECE + 17);
    bed_destroy(bed);
}

/* --- from file to file --- */

/* A node that has its data in a file, or takes them from one: the "file" is memory. */
static struct {
    struct node *source;
    unsigned found, offloaded, refused;
    int refuse; /* so many are refused, by the one or the other */
    bool source_refuses;
} files;

static int coroutine_fn place_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to,
                                   unsigned flags)
{
    struct buffers_elsewhere *elsewhere = buffers_elsewhere(to);
    if (!elsewhere) {
        return memory_read(node, offset, bytes, to, flags);
    }
    if (files.source_refuses) {
        return -ENOTSUP;
    }
    files.found++;
    files.source = node;
    /* In two parts: what is found comes as it is stored. */
    uint64_t half = bytes / 2;
    int result = half ? elsewhere->found(elsewhere, NULL, offset, to.skip, half) : 0;
    return result == 0 ? elsewhere->found(elsewhere, NULL, offset + half, to.skip + half, bytes - half) : result;
}

static int coroutine_fn place_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                    unsigned flags)
{
    const struct buffers_elsewhere *elsewhere = buffers_elsewhere(from);
    if (!elsewhere) {
        return log_write(node, offset, bytes, from, flags);
    }
    g_assert(elsewhere->aid.memory.iov_len > 0);
    inside++;
    most_inside = MAX(most_inside, inside);
    coroutine_pause();
    inside--;
    if (files.refuse > 0 && bytes < PIECE / 2 + 1 && offset % PIECE) { /* the second half */
        files.refuse--;
        files.refused++;
        return -ENOTSUP;
    }
    uint64_t at = elsewhere->offset + from.skip;
    const unsigned char *data = memory_of(files.source)->data + at;
    if (elsewhere->aid.zero_unit && memory_has_zero_unit(data, bytes, at, elsewhere->aid.zero_unit)) {
        files.refused++;
        return -ENOTSUP;
    }
    files.offloaded += bytes;
    memcpy(memory_of(node)->data + offset, data, bytes);
    return 0;
}

static const struct driver place_driver = {
    .name = "place",
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct memory_state),
    .offloads = true,
    .read = place_read,
    .write = place_write,
    .write_zeroes = memory_write_zeroes,
};

struct offload_bed {
    struct bed *bed;
    struct node *source, *target;
    struct backend *client;
};

static struct node *coroutine_fn place_node(struct graph *graph, const char *name)
{
    struct node *node = node_create(graph, &place_driver, name);
    atomic_store(&node->size, MEMORY_SIZE);
    node->writable = node->wants_writable = node->open = node->monitor_owned = node->discard = true;
    node_publish(node);
    return node;
}

static void coroutine_fn offload_begin(struct offload_bed *ret)
{
    struct bed *bed = bed_create();
    backend_destroy(bed->target);
    *ret = (struct offload_bed){
        .bed = bed, .source = place_node(bed->graph, "from"), .target = place_node(bed->graph, "to")};
    memcpy(memory_of(ret->source)->data, bed->source, MEMORY_SIZE);
    bed->config.source = memory_backend(bed->graph, "source", ret->source, ACCESS_ALL);
    bed->config.target = bed->target = memory_backend(bed->graph, "target", ret->target, ACCESS_ALL);
    bed->config.read = NULL;
    ret->client = memory_backend(bed->graph, "client", ret->source, ACCESS_ALL);
    memset(&files, 0, sizeof(files));
}

/* Copies, and looks at what came of it; a target of zeroes again afterwards. */
static void coroutine_fn offload_copy(struct offload_bed *bed, unsigned offloaded)
{
    files.offloaded = most_inside = logged = 0;
    g_assert_cmpint(bed_copy(bed->bed), ==, 0);
    g_assert(!memcmp(memory_of(bed->target)->data, memory_of(bed->source)->data, MEMORY_SIZE));
    g_assert_cmpuint(files.offloaded, ==, offloaded);
    memset(memory_of(bed->target)->data, 0, MEMORY_SIZE);
}

static void coroutine_fn offload_end(struct offload_bed *bed)
{
    backend_destroy(bed->client);
    backend_destroy(bed->bed->config.source);
    bed_destroy(bed->bed);
}

/* All that may be goes from file to file; what may not, or is refused half-way, is read and written. */
static void coroutine_fn offloading(void *argument)
{
    struct offload_bed bed;
    offload_begin(&bed);
    bed.bed->config.workers = 1;
    offload_copy(&bed, MEMORY_SIZE);
    g_assert_cmpuint(memory_of(bed.source)->reads, ==, 0);
    g_assert_cmpuint(logged, ==, 0);
    /* The first piece, half of which is there already: it and all within the rest after it are not tried. */
    files.refuse = 1;
    offload_copy(&bed, PIECE / 2);
    g_assert_cmpuint(files.refused, ==, 1);
    g_assert_cmpuint(logged, ==, PIECES);
    /* A source that cannot. */
    files.source_refuses = true;
    offload_copy(&bed, 0);
    g_assert_cmpuint(logged, ==, PIECES);
    files.source_refuses = false;
    /* Who wants to look at the data has to have them. */
    bed.target->detect_zeroes = true;
    offload_copy(&bed, 0);
    bed.target->detect_zeroes = false;
    offload_end(&bed);
}

/* After a rest it is tried again: in pieces of half the size there are enough. */
static void coroutine_fn offloading_again(void *argument)
{
    struct offload_bed bed;
    offload_begin(&bed);
    bed.bed->config.workers = 1;
    bed.bed->config.piece = PIECE / 2;
    files.refuse = 1;
    /* The first piece is refused with one half of it done, and the 16 after it are not tried. */
    offload_copy(&bed, MEMORY_SIZE - 17 * PIECE / 2 + PIECE / 4);
    g_assert_cmpuint(logged, ==, 17);
    offload_end(&bed);
}

/* Whole units of zeroes are written as such: a piece that begins with them is not tried, in any other who copies sees
 * them, and what comes after that rests. */
static void coroutine_fn offloading_zeroes(void *argument)
{
    struct offload_bed bed;
    offload_begin(&bed);
    unsigned char *data = memory_of(bed.source)->data;
    bed.bed->config.zero_alignment = 1024;
    bed.bed->config.workers = 1;
    memset(data + 7 * PIECE + 8, 0, 1000);
    memset(data + 9 * PIECE + 512, 0, 1023);
    offload_copy(&bed, MEMORY_SIZE);
    memset(data + 3 * PIECE, 0, 1024);
    offload_copy(&bed, MEMORY_SIZE - PIECE);
    g_assert_cmpuint(files.refused, ==, 0);
    g_assert_cmpuint(memory_of(bed.target)->zeroes, ==, 1);
    memset(data + 5 * PIECE + 1024, 0, 1024);
    offload_copy(&bed, 4 * PIECE);
    g_assert_cmpuint(files.refused, ==, 1);
    g_assert_cmpuint(memory_of(bed.target)->zeroes, ==, 3);
    offload_end(&bed);
}

/* While a client's requests come, one piece at a time is under way; else several. */
static void coroutine_fn offloading_in_company(void *argument)
{
    struct offload_bed bed;
    char byte;
    struct iovec iov = {&byte, 1};
    offload_begin(&bed);
    offload_copy(&bed, MEMORY_SIZE);
    g_assert_cmpuint(most_inside, >, 1);
    g_assert_cmpuint(most_inside, <, COPY_WORKERS);
    g_assert_cmpint(backend_read(bed.client, 0, 1, buffers_one(&iov), 0), ==, 0);
    offload_copy(&bed, MEMORY_SIZE);
    g_assert_cmpuint(most_inside, >, 1);
    backend_set_client(bed.client);
    g_assert_cmpint(backend_read(bed.client, 0, 1, buffers_one(&iov), 0), ==, 0);
    g_assert_cmpint(loop_now_ns() - backend_client_ns(bed.client), <, 1000000);
    offload_copy(&bed, MEMORY_SIZE);
    g_assert_cmpuint(most_inside, ==, 1);
    offload_end(&bed);
}

/* Whatever is long is copied in what memory there is; one piece is the least. */
static void coroutine_fn bounded_memory(void *argument)
{
    struct bed *bed = bed_create();
    for (unsigned i = 0; i < PIECES; i++) {
        bed->delays[i] = 3;
    }
    bed->config.memory = 3 * PIECE;
    g_assert_cmpint(bed_copy(bed), ==, 0);
    g_assert_cmpuint(most_inside, ==, 3);
    most_inside = 0;
    bed->config.memory = 1;
    g_assert_cmpint(bed_copy(bed), ==, 0);
    g_assert_cmpuint(most_inside, ==, 1);
    g_assert(!memcmp(bed_content(bed), bed->source, MEMORY_SIZE));
    bed_destroy(bed);
}

static void in_coroutine_of(const void *entry)
{
    in_coroutine(entry);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_data_func("/copy/in-order", in_order, in_coroutine_of);
    g_test_add_data_func("/copy/in-order-with-failures", in_order_with_failures, in_coroutine_of);
    g_test_add_data_func("/copy/in-units", in_units, in_coroutine_of);
    g_test_add_data_func("/copy/zero-runs", zero_runs, in_coroutine_of);
    g_test_add_data_func("/copy/shown-already", shown_already, in_coroutine_of);
    g_test_add_data_func("/copy/comparing", comparing, in_coroutine_of);
    g_test_add_data_func("/copy/offloading", offloading, in_coroutine_of);
    g_test_add_data_func("/copy/offloading-again", offloading_again, in_coroutine_of);
    g_test_add_data_func("/copy/offloading-zeroes", offloading_zeroes, in_coroutine_of);
    g_test_add_data_func("/copy/offloading-in-company", offloading_in_company, in_coroutine_of);
    g_test_add_data_func("/copy/bounded-memory", bounded_memory, in_coroutine_of);
    return g_test_run();
}

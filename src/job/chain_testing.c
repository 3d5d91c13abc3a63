/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A bench for tests of jobs. The memory driver keeps one byte array and one state per cluster, under one mutex per
 * image; copy-on-write reads the backing edge while it holds it, as a real format may. Every request yields at random,
 * so that the order of everything differs from run to run; the seed is GLib's test seed.
 */
#include "job/chain_testing.h"
#include "base/size.h"
#include "block/driver.h"
#include "schema/claims.h"
#include <errno.h>
#include <string.h>

enum cluster_state { CLUSTER_NONE, CLUSTER_DATA, CLUSTER_ZERO };

struct memory {
    unsigned char *data;
    unsigned char *states;
    uint64_t clusters;
    struct co_mutex mutex;
    struct memory_faults faults;
    struct co_mutex slow; /* faults.write_ns */
    char *file, *format;
    GPtrArray *snapshots; /* names */
};

static void coroutine_fn memory_dawdle(void)
{
    unsigned luck = (unsigned)(loop_random() % 8);
    if (luck < 3) {
        coroutine_pause();
    } else if (luck == 3) {
        struct loop_sleep sleep = {0};
        loop_sleep_ns(&sleep, 20000);
    }
}

static int memory_fault(int error, const struct memory *memory, uint64_t offset, uint64_t bytes)
{
    uint64_t at = align_down(memory->faults.at, TEST_CLUSTER);
    return error && offset < at + TEST_CLUSTER && offset + bytes > at ? error : 0;
}

static int coroutine_fn memory_read_cluster(struct node *node, uint64_t offset, uint64_t bytes, unsigned char *to)
{
    struct memory *memory = node->state;
    unsigned char state = memory->states[offset / TEST_CLUSTER];
    if (state == CLUSTER_DATA) {
        memcpy(to, memory->data + offset, bytes);
    } else if (state == CLUSTER_ZERO || !node->backing) {
        memset(to, 0, bytes);
    } else {
        return edge_read_memory(node->backing, offset, to, bytes);
    }
    return 0;
}

static int coroutine_fn memory_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to,
                                    unsigned flags)
{
    struct memory *memory = node->state;
    int result = memory_fault(memory->faults.read_error, memory, offset, bytes);
    g_autofree unsigned char *bounce = g_malloc(TEST_CLUSTER);
    memory_dawdle();
    while (result == 0 && bytes) {
        uint64_t piece = min_u64(bytes, TEST_CLUSTER - offset % TEST_CLUSTER);
        co_mutex_lock(&memory->mutex);
        bool backing = memory->states[offset / TEST_CLUSTER] == CLUSTER_NONE && node->backing;
        if (!backing) {
            result = memory_read_cluster(node, offset, piece, bounce);
        }
        co_mutex_unlock(&memory->mutex);
        if (backing) {
            result = edge_read_memory(node->backing, offset, bounce, piece);
        }
        buffers_copy_in(to, bounce, piece);
        to = buffers_advance(to, piece);
        offset += piece;
        bytes -= piece;
    }
    return result;
}

/* One cluster or a part of it, the mutex held. `from` NULL: zeroes. */
static int coroutine_fn memory_write_cluster(struct node *node, uint64_t offset, uint64_t bytes,
                                             const unsigned char *from, unsigned flags)
{
    struct memory *memory = node->state;
    uint64_t start = align_down(offset, TEST_CLUSTER);
    uint64_t length = min_u64(TEST_CLUSTER, atomic_load(&node->size) - start);
    unsigned char *state = &memory->states[start / TEST_CLUSTER];
    if ((flags & REQUEST_IF_UNALLOCATED)) {
        g_assert(offset == start); /* it ends where the node ended once, if not with the cluster */
        if (*state != CLUSTER_NONE) {
            return 0;
        }
    }
    if (!from && bytes == length) {
        /* Where it may, and nothing is below, it forgets that there was something. */
        *state = flags & REQUEST_MAY_UNMAP && !node->backing ? CLUSTER_NONE : CLUSTER_ZERO;
        return 0;
    }
    if (*state != CLUSTER_DATA && bytes < length) {
        int result = memory_read_cluster(node, start, length, memory->data + start);
        if (result < 0) {
            return result;
        }
        memory_dawdle();
    }
    if (from) {
        memcpy(memory->data + offset, from, bytes);
    } else {
        memset(memory->data + offset, 0, bytes);
    }
    *state = CLUSTER_DATA;
    return 0;
}

static int coroutine_fn memory_change(struct node *node, uint64_t offset, uint64_t bytes, const struct buffers *from,
                                      unsigned flags)
{
    struct memory *memory = node->state;
    int result = memory_fault(memory->faults.write_error, memory, offset, bytes);
    g_autofree unsigned char *bounce = g_malloc(TEST_CLUSTER);
    g_assert(node->writable);
    if (memory->faults.write_ns) {
        struct loop_sleep sleep = {0};
        co_mutex_lock(&memory->slow);
        loop_sleep_ns(&sleep, memory->faults.write_ns * (int64_t)div_up(bytes, TEST_CLUSTER));
        co_mutex_unlock(&memory->slow);
    }
    memory_dawdle();
    for (uint64_t done = 0; result == 0 && done < bytes;) {
        uint64_t at = offset + done;
        uint64_t piece = min_u64(bytes - done, TEST_CLUSTER - at % TEST_CLUSTER);
        if (from) {
            buffers_copy_out(buffers_advance(*from, done), bounce, piece);
        }
        co_mutex_lock(&memory->mutex);
        result = memory_write_cluster(node, at, piece, from ? bounce : NULL, flags);
        co_mutex_unlock(&memory->mutex);
        done += piece;
    }
    memory_dawdle();
    return result;
}

static int coroutine_fn memory_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                     unsigned flags)
{
    return memory_change(node, offset, bytes, &from, flags);
}

static int coroutine_fn memory_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    return memory_change(node, offset, bytes, NULL, flags);
}

/* Whole clusters come to be zero, parts of them stay. */
static int coroutine_fn memory_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    uint64_t first = align_up(offset, TEST_CLUSTER), last = align_down(offset + bytes, TEST_CLUSTER);
    return first < last ? memory_change(node, first, last - first, NULL, REQUEST_MAY_UNMAP) : 0;
}

static int coroutine_fn memory_block_status(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    static const unsigned flags[] = {0, EXTENT_DATA | EXTENT_ALLOCATED, EXTENT_ZERO | EXTENT_ALLOCATED};
    struct memory *memory = node->state;
    uint64_t at = offset / TEST_CLUSTER, end = offset + bytes;
    unsigned char state = memory->states[at];
    int result = memory_fault(memory->faults.status_error, memory, offset, bytes);
    memory_dawdle();
    if (result < 0) {
        return result;
    }
    co_mutex_lock(&memory->mutex);
    state = memory->states[at];
    while (at * TEST_CLUSTER < end && memory->states[at] == state) {
        at++;
    }
    co_mutex_unlock(&memory->mutex);
    *ret = (struct extent){.bytes = min_u64(at * TEST_CLUSTER, end) - offset, .flags = flags[state]};
    return 0;
}

static int coroutine_fn memory_truncate(struct node *node, uint64_t size, struct error **err)
{
    struct memory *memory = node->state;
    uint64_t clusters = div_up(size, TEST_CLUSTER), old = atomic_load(&node->size);
    memory->data = g_realloc(memory->data, clusters * TEST_CLUSTER + 1);
    memory->states = g_realloc(memory->states, clusters + 1);
    if (size > old) {
        memset(memory->data + old, 0, clusters * TEST_CLUSTER - old);
    }
    for (uint64_t at = memory->clusters; at < clusters; at++) {
        memory->states[at] = node->backing ? CLUSTER_ZERO : CLUSTER_NONE;
    }
    memory->clusters = clusters;
    /* What is behind the old end in its cluster must not show through. */
    unsigned char *last = old % TEST_CLUSTER ? &memory->states[old / TEST_CLUSTER] : NULL;
    if (last && *last == CLUSTER_NONE && node->backing && size > old) {
        uint64_t start = align_down(old, TEST_CLUSTER);
        int result = memory_read_cluster(node, start, old - start, memory->data + start);
        *last = CLUSTER_DATA;
        return result;
    }
    return 0;
}

static int coroutine_fn memory_change_backing(struct node *node, const char *file, const char *format,
                                              struct error **err)
{
    struct memory *memory = node->state;
    g_assert(node->writable);
    int error = memory->faults.header_error;
    memory->faults.header_error = memory->faults.header_once ? 0 : error;
    if (error && !memory->faults.header_written) {
        return error_set_errno(err, error, "no header today");
    }
    memory_dawdle();
    if (memory->faults.header) {
        memory->faults.header(node, memory->faults.argument);
    }
    g_free(memory->file);
    g_free(memory->format);
    memory->file = g_strdup(file);
    memory->format = g_strdup(format);
    if (memory->faults.header) {
        memory->faults.header(node, memory->faults.argument);
    }
    memory->faults.header_written = false;
    return error ? error_set_errno(err, error, "a header, and an error") : 0;
}

static int coroutine_fn memory_flush(struct node *node)
{
    struct memory *memory = node->state;
    memory_dawdle();
    return memory->faults.flush_error;
}

static void coroutine_fn memory_close(struct node *node)
{
    struct memory *memory = node->state;
    co_mutex_destroy(&memory->mutex);
    co_mutex_destroy(&memory->slow);
    g_free(memory->data);
    g_free(memory->states);
    g_free(memory->file);
    g_free(memory->format);
    g_ptr_array_free(memory->snapshots, TRUE);
}

/* Snapshots inside: their names, and no content. An id is the name. */
static int coroutine_fn memory_snapshot_list(struct node *node, struct snapshot_info_list **ret, struct error **err)
{
    struct memory *memory = node->state;
    *ret = g_new0(struct snapshot_info_list, 1);
    (*ret)->items = g_new0(struct snapshot_info *, memory->snapshots->len + 1);
    for (unsigned i = 0; i < memory->snapshots->len; i++) {
        struct snapshot_info *info = g_new0(struct snapshot_info, 1);
        info->id = g_strdup(memory->snapshots->pdata[i]);
        info->name = g_strdup(info->id);
        (*ret)->items[(*ret)->count++] = info;
    }
    return 0;
}

static int coroutine_fn memory_snapshot_create(struct node *node, const struct snapshot_info *snapshot,
                                               struct error **err)
{
    struct memory *memory = node->state;
    g_assert(node->writable);
    memory_dawdle();
    g_ptr_array_add(memory->snapshots, g_strdup(snapshot->name));
    return 0;
}

static int coroutine_fn memory_snapshot_delete(struct node *node, const char *name, struct error **err)
{
    struct memory *memory = node->state;
    guint index;
    g_assert(node->writable);
    g_assert_true(g_ptr_array_find_with_equal_func(memory->snapshots, name, g_str_equal, &index));
    g_ptr_array_remove_index(memory->snapshots, index);
    return 0;
}

static const struct image_driver memory_image = {.snapshot_list = memory_snapshot_list,
                                                 .snapshot_create = memory_snapshot_create,
                                                 .snapshot_delete = memory_snapshot_delete};

static const struct driver driver_memory = {
    .name = "memory",
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct memory),
    .backing = true,
    .write_if_unallocated = true,
    .close = memory_close,
    .read = memory_read,
    .write = memory_write,
    .write_zeroes = memory_write_zeroes,
    .discard = memory_discard,
    .block_status = memory_block_status,
    .flush = memory_flush,
    .truncate = memory_truncate,
    .change_backing = memory_change_backing,
    .image = &memory_image,
};

/* --- the bench --- */

static void record_event(json_t *event, void *argument)
{
    struct test_bench *bench = argument;
    const char *name = json_string_value(json_object_get(event, "event"));
    json_t *data = json_object_get(event, "data");
    const char *id = json_string_value(json_object_get(data, "id"));
    const char *device = json_string_value(json_object_get(data, "device"));
    GString *line = g_string_new(name);
    g_string_append_printf(line, " %s", id ? id : device);
    const char *const members[] = {"status", "operation", "action", "error", "target-state"};
    for (unsigned i = 0; i < G_N_ELEMENTS(members); i++) {
        const char *value = json_string_value(json_object_get(data, members[i]));
        if (value) {
            g_string_append_printf(line, " %s", value);
        }
    }
    g_ptr_array_add(bench->events, g_string_free(line, FALSE));
    json_decref(event);
}

static void coroutine_fn make_image(struct test_bench *bench, unsigned index, uint64_t size, struct node *below)
{
    static const char *const names[TEST_CHAIN_MAX] = {"base", "a", "b", "c", "d", "e", "f", "g"};
    struct node *node = NULL;
    auto_error error = NULL;
    g_assert_cmpint(graph_create_node(bench->graph, &driver_memory, names[index], "test", &node, &error), ==, 0);
    struct memory *memory = node->state;
    co_mutex_init(&memory->mutex);
    co_mutex_init(&memory->slow);
    memory_truncate(node, size, NULL);
    atomic_store(&node->size, size);
    node->limits.alignment = 1;
    node->limits.memory_alignment = 1;
    node->limits.cluster_size = TEST_CLUSTER;
    node->filename = g_strdup_printf("dir/%s.img", names[index]);
    node->wants_writable = node->writable = false;
    memory->snapshots = g_ptr_array_new_with_free_func(g_free);
    if (below) {
        graph_lock(bench->graph);
        struct transaction *transaction = graph_begin(bench->graph, "test");
        transaction_attach(transaction, node, EDGE_BACKING, below, NULL);
        g_assert_cmpint(graph_commit(transaction, &error), ==, 0);
        graph_unlock(bench->graph);
        memory->file = g_strdup_printf("%s.img", names[index - 1]);
        memory->format = g_strdup("memory");
        node->header_backing = g_strdup(memory->file);
        node->header_backing_format = g_strdup(memory->format);
    }
    bench->nodes[index] = node;
}

void coroutine_fn bench_open(struct test_bench *bench, unsigned count, uint64_t size)
{
    *bench = (struct test_bench){.graph = graph_create(), .count = count};
    bench->events = g_ptr_array_new_with_free_func(g_free);
    bench->jobs = jobs_create(bench->graph, record_event, bench);
    for (unsigned i = 0; i < count; i++) {
        make_image(bench, i, size, i ? bench->nodes[i - 1] : NULL);
        for (uint64_t at = 0; at < size; at += TEST_CLUSTER) {
            unsigned luck = (unsigned)g_test_rand_int_range(0, 10);
            if (luck < (i ? 3 : 7)) {
                bench_fill(bench->nodes[i], at, min_u64(TEST_CLUSTER, size - at), luck ? 16 * (i + 1) + luck : 0);
            }
        }
    }
    struct node *top = bench->nodes[count - 1];
    top->wants_writable = top->writable = true;
}

struct node *coroutine_fn bench_add(struct test_bench *bench, uint64_t size)
{
    g_assert_cmpuint(bench->count, <, TEST_CHAIN_MAX);
    make_image(bench, bench->count, size, NULL);
    struct node *node = bench->nodes[bench->count++];
    node->wants_writable = node->writable = true;
    return node;
}

struct node *coroutine_fn bench_add_overlay(struct test_bench *bench)
{
    return bench_add(bench, atomic_load(&bench->nodes[0]->size));
}

unsigned bench_snapshots(struct node *node)
{
    return ((struct memory *)node->state)->snapshots->len;
}

void coroutine_fn bench_close(struct test_bench *bench)
{
    jobs_cancel_all_and_wait(bench->jobs);
    for (unsigned i = bench->count; i > 0; i--) {
        node_release(bench->nodes[i - 1]);
    }
    jobs_destroy(bench->jobs);
    graph_destroy(bench->graph);
    g_ptr_array_free(bench->events, TRUE);
}

struct memory_faults *bench_faults(struct node *node)
{
    return &((struct memory *)node->state)->faults;
}

const char *bench_disk_backing(struct node *node)
{
    return ((struct memory *)node->state)->file;
}

void bench_resize(struct node *node, uint64_t size)
{
    struct memory *memory = node->state;
    uint64_t old = atomic_load(&node->size);
    if (size > old) {
        memory_truncate(node, size, NULL);
        for (uint64_t at = div_up(old, TEST_CLUSTER); at < memory->clusters; at++) {
            memory->states[at] = CLUSTER_NONE;
        }
    }
    memory->clusters = div_up(size, TEST_CLUSTER);
    atomic_store(&node->size, size);
}

void bench_forget(struct node *node, uint64_t offset, uint64_t bytes)
{
    struct memory *memory = node->state;
    memset(memory->states + offset / TEST_CLUSTER, CLUSTER_NONE, bytes / TEST_CLUSTER);
}

void bench_fill(struct node *node, uint64_t offset, uint64_t bytes, unsigned char value)
{
    struct memory *memory = node->state;
    memset(memory->data + offset, value, bytes);
    memset(memory->states + offset / TEST_CLUSTER, value ? CLUSTER_DATA : CLUSTER_ZERO, div_up(bytes, TEST_CLUSTER));
}

bool bench_allocated(struct node *node, uint64_t offset)
{
    return ((struct memory *)node->state)->states[offset / TEST_CLUSTER] != CLUSTER_NONE;
}

unsigned char bench_byte(struct node *node, uint64_t offset)
{
    const struct memory *memory = node->state;
    return memory->states[offset / TEST_CLUSTER] == CLUSTER_DATA ? memory->data[offset] : 0;
}

static unsigned char byte_of(struct node *node, uint64_t offset)
{
    for (node = node_beneath_filters(node); node; node = node_backing(node)) {
        const struct memory *memory = node->state;
        if (offset >= atomic_load(&node->size)) {
            return 0;
        }
        if (memory->states[offset / TEST_CLUSTER] != CLUSTER_NONE) {
            return memory->states[offset / TEST_CLUSTER] == CLUSTER_ZERO ? 0 : memory->data[offset];
        }
    }
    return 0;
}

void bench_view(struct node *node, unsigned char *to, uint64_t bytes)
{
    for (uint64_t at = 0; at < bytes; at++) {
        to[at] = byte_of(node, at);
    }
}

char *bench_events(struct test_bench *bench)
{
    GString *text = g_string_new(NULL);
    for (guint i = 0; i < bench->events->len; i++) {
        g_string_append_printf(text, "%s%s", i ? "; " : "", (const char *)bench->events->pdata[i]);
    }
    g_ptr_array_set_size(bench->events, 0);
    return g_string_free(text, FALSE);
}

void coroutine_fn bench_sleep_ms(unsigned ms)
{
    struct loop_sleep sleep = {0};
    loop_sleep_ns(&sleep, (int64_t)ms * 1000000);
}

static enum job_status status_of(struct test_bench *bench, const char *id)
{
    enum job_status status = JOB_STATUS_NULL;
    struct job_info_list *list = jobs_query(bench->jobs);
    for (size_t i = 0; i < list->count; i++) {
        if (strcmp(list->items[i]->id, id) == 0) {
            status = list->items[i]->status;
        }
    }
    job_info_list_free(list);
    return status;
}

void coroutine_fn bench_await(struct test_bench *bench, const char *job, enum job_status status)
{
    int64_t deadline = loop_clock_ns() + 20LL * 1000000000;
    for (enum job_status now; (now = status_of(bench, job)) != status && now != JOB_STATUS_NULL;) {
        g_assert_cmpint(loop_clock_ns(), <, deadline);
        bench_sleep_ms(1);
    }
}

/* --- guests --- */

struct guest_worker {
    struct guest *guest;
    uint64_t first, end; /* its part of the disk */
};

static void coroutine_fn guest_verify(struct guest *guest, uint64_t offset, uint64_t bytes)
{
    g_autofree unsigned char *read = g_malloc(bytes);
    struct iovec iov = {read, bytes};
    g_assert_cmpint(backend_read(guest->backend, offset, bytes, buffers_one(&iov), 0), ==, 0);
    for (uint64_t at = 0; at < bytes; at++) {
        if (read[at] != guest->model[offset + at]) {
            g_error("the guest reads %#x at %#" G_GINT64_MODIFIER "x (cluster %u), not %#x, on node '%s'", read[at],
                    offset + at, (unsigned)((offset + at) / TEST_CLUSTER), guest->model[offset + at],
                    backend_node(guest->backend)->name);
        }
    }
}

static void guest_entry(void *argument)
{
    struct guest_worker *worker = argument;
    struct guest *guest = worker->guest;
    g_autofree unsigned char *data = g_malloc(2 * TEST_CLUSTER);
    while (!atomic_load(&guest->stop)) {
        uint64_t offset = worker->first + loop_random() % (worker->end - worker->first);
        uint64_t bytes = 1 + loop_random() % min_u64(2 * TEST_CLUSTER, worker->end - offset);
        bytes = loop_random() % 4 ? bytes : min_u64(bytes, 512);
        unsigned what = (unsigned)(loop_random() % 8);
        if (what < 4 || guest->read_only) {
            guest_verify(guest, offset, bytes);
        } else if (what < 7) {
            memset(data, (int)(loop_random() & 255), bytes);
            struct iovec iov = {data, bytes};
            g_assert_cmpint(backend_write(guest->backend, offset, bytes, buffers_one(&iov), 0), ==, 0);
            memcpy(guest->model + offset, data, bytes);
        } else {
            g_assert_cmpint(backend_write_zeroes(guest->backend, offset, bytes, REQUEST_MAY_UNMAP), ==, 0);
            memset(guest->model + offset, 0, bytes);
        }
        atomic_fetch_add(&guest->requests, 1);
        coroutine_pause();
    }
    g_free(worker);
    atomic_fetch_sub(&guest->running, 1);
}

static struct guest *coroutine_fn guest_create(struct test_bench *bench, struct node *node, struct loop *const *loops,
                                               unsigned count, bool read_only)
{
    struct guest *guest = g_new0(struct guest, 1);
    auto_error error = NULL;
    struct operation_config config = {.kind = "export",
                                      .id = node->name,
                                      .table = &block_export_add_claims,
                                      .bound = {[CLAIM_NODE] = node},
                                      .conditions = read_only ? 0 : CLAIM_IF_WRITABLE};
    if (operation_begin(bench->graph, &config, &guest->operation, &error) < 0) {
        g_error("%s", error->message);
    }
    guest->read_only = read_only;
    guest->backend = backend_create(bench->graph, "guest");
    unsigned granted = operation_granted(guest->operation, node);
    g_assert_cmpint(backend_attach(guest->backend, node, granted, NULL), ==, 0);
    backend_follow(guest->backend, guest->operation, CLAIM_NODE);
    guest->size = backend_size(guest->backend);
    guest->model = g_malloc(guest->size);
    bench_view(node, guest->model, guest->size);
    for (unsigned i = 0; i < GUEST_WORKERS; i++) {
        struct guest_worker *worker = g_new0(struct guest_worker, 1);
        *worker = (struct guest_worker){guest, guest->size / GUEST_WORKERS * i, guest->size / GUEST_WORKERS * (i + 1)};
        atomic_fetch_add(&guest->running, 1);
        loop_spawn(loops[i % count], guest_entry, worker);
    }
    return guest;
}

struct guest *coroutine_fn guest_start(struct test_bench *bench, struct node *node, struct loop *loop, bool read_only)
{
    return guest_create(bench, node, &loop, 1, read_only);
}

struct guest *coroutine_fn guest_start_on(struct test_bench *bench, struct node *node, struct loop *const *loops,
                                          unsigned count)
{
    return guest_create(bench, node, loops, count, false);
}

void coroutine_fn guest_stop(struct guest *guest)
{
    atomic_store(&guest->stop, true);
    while (atomic_load(&guest->running)) {
        bench_sleep_ms(1);
    }
}

void coroutine_fn guest_finish(struct guest *guest)
{
    guest_stop(guest);
    guest_verify(guest, 0, guest->size);
    guest_leave(guest);
}

void coroutine_fn guest_leave(struct guest *guest)
{
    backend_destroy(guest->backend);
    operation_end(guest->operation);
    g_free(guest->model);
    g_free(guest);
}

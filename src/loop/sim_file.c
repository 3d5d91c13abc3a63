/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Files of the simulated engine: names of disks, and requests that take their time. A request is drawn its latency, its
 * fault, how short it is, and the moments between its beginning and its end at which it takes effect; so requests
 * overtake each other, and overlapping ones take effect in any order. Invariants:
 * 1. a request counts as begun (and the power may be cut by it) before it has any effect;
 * 2. a transfer touches the caller's memory at its moments only, and never after its end;
 * 3. a sync settles, at its end, what had taken effect when it began; one that fails settles nothing;
 * 4. a failing write or allocation takes effect in part, in whole, or not at all.
 * Names are durable at once: there are no directories to sync. What is on a disk is sim_disk.c's.
 */
#include "base/size.h"
#include "loop/sim_private.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

/* A transfer may take effect in two pieces. */
#define SPLIT_PERCENT 25

struct sim_file {
    struct file file;
    struct sim *sim;
    struct sim_disk *disk;
    bool writable, direct;
    unsigned in_flight;
};

struct sim_fault_entry {
    struct list link;
    char *path; /* NULL: any */
    unsigned access;
    uint64_t skip, count;
    int error;
};

static struct sim_file *sim_file(struct file *file)
{
    return container_of(file, struct sim_file, file);
}

/* ---- disks by name ---- */

void sim_files_init(struct sim *sim)
{
    list_init(&sim->disks);
    list_init(&sim->faults);
    list_init(&sim->writes);
}

static struct sim_disk *disk_find(const struct sim *sim, const char *path)
{
    list_for_each (link, &sim->disks) {
        struct sim_disk *disk = container_of(link, struct sim_disk, link);

        if (!strcmp(disk->path, path)) {
            return disk;
        }
    }
    return NULL;
}

static struct sim_disk *disk_add(struct sim *sim, const char *path)
{
    struct sim_disk *disk = disk_create(path, ++sim->disk_count);

    list_append(&sim->disks, &disk->link);
    return disk;
}

static void disk_forget(struct sim_disk *disk)
{
    list_remove(&disk->link);
    disk_unref(disk);
}

void sim_files_finish(struct sim *sim)
{
    g_assert(list_is_empty(&sim->writes));
    sim_faults_clear(sim);
    while (!list_is_empty(&sim->disks)) {
        struct sim_disk *disk = container_of(sim->disks.next, struct sim_disk, link);

        g_assert(disk->references == 1);
        disk_forget(disk);
    }
}

void sim_disk_set(struct sim *sim, const char *path, const void *data, uint64_t size)
{
    struct sim_disk *disk = disk_find(sim, path);

    g_assert(size <= SIM_DISK_MAX);
    if (!disk) {
        disk = disk_add(sim, path);
    }
    disk_resize(disk, 0);
    disk_write(disk, 0, data, size);
    disk_settle(disk, 0, UINT64_MAX, disk->change);
}

void *sim_disk_get(struct sim *sim, const char *path, uint64_t *ret_size)
{
    struct sim_disk *disk = disk_find(sim, path);

    if (!disk) {
        return NULL;
    }
    void *data = g_malloc(disk->size + 1);

    disk_read(disk, 0, data, disk->size);
    *ret_size = disk->size;
    return data;
}

void sim_disk_remove(struct sim *sim, const char *path)
{
    struct sim_disk *disk = disk_find(sim, path);

    if (disk) {
        disk_forget(disk);
    }
}

void sim_disk_set_room(struct sim *sim, const char *path, uint64_t size)
{
    struct sim_disk *disk = disk_find(sim, path);

    g_assert(disk);
    disk->room = size;
}

/* ---- faults, and what every request begins with ---- */

void sim_fault_add(struct sim *sim, const struct sim_fault *fault)
{
    struct sim_fault_entry *entry = g_new0(struct sim_fault_entry, 1);

    g_assert(fault->error < 0);
    *entry = (struct sim_fault_entry){
        .path = g_strdup(fault->path),
        .access = fault->access,
        .skip = fault->skip,
        .count = fault->count,
        .error = fault->error,
    };
    list_append(&sim->faults, &entry->link);
}

void sim_faults_clear(struct sim *sim)
{
    while (!list_is_empty(&sim->faults)) {
        struct sim_fault_entry *entry = container_of(sim->faults.next, struct sim_fault_entry, link);

        list_remove(&entry->link);
        g_free(entry->path);
        g_free(entry);
    }
}

/* 0, or how this access is to fail. */
static int fault_take(struct sim *sim, const char *path, unsigned access)
{
    list_for_each (link, &sim->faults) {
        struct sim_fault_entry *entry = container_of(link, struct sim_fault_entry, link);

        if (!(entry->access & access) || (entry->path && strcmp(entry->path, path))) {
            continue;
        }
        if (entry->skip) {
            entry->skip--;
        } else if (entry->count) {
            entry->count--;
            return entry->error;
        }
    }
    return 0;
}

/* A request's common part, on the stack of its coroutine. */
struct request {
    struct sim_event moment[2];
    struct sim_file *file;
    int error; /* how it will fail */
    int64_t end_ns;
    /* What takes effect at each moment. */
    void (*effect)(struct request *request, unsigned piece);
};

static void request_happen_first(struct sim_event *event)
{
    struct request *request = container_of(event, struct request, moment[0]);

    request->effect(request, 0);
}

static void request_happen_second(struct sim_event *event)
{
    struct request *request = container_of(event, struct request, moment[1]);

    request->effect(request, 1);
}

/* Draws the latency and the fault, and plans `moments` moments. */
static void request_begin(struct request *request, struct sim_file *file, unsigned access, uint64_t offset,
                          uint64_t bytes)
{
    struct sim *sim = file->sim;
    int64_t latency_ns = sim_draw_latency(sim);
    static const char *const names[] = {"reads", "writes", "syncs", "allocates"};

    g_assert(sim == sim_self());
    sim_note(sim, names[__builtin_ctz(access)], offset, bytes);
    file->in_flight++;
    request->file = file;
    request->error = fault_take(sim, file->disk->path, access);
    request->end_ns = sim->now_ns + latency_ns;
}

static void request_plan(struct request *request, unsigned moments)
{
    static void (*const happen[])(struct sim_event *) = {request_happen_first, request_happen_second};
    struct sim *sim = request->file->sim;

    for (unsigned i = 0; i < moments; i++) {
        uint64_t latency_ns = (uint64_t)(request->end_ns - sim->now_ns);
        /* One in four at the very end, as if there were no moment of its own. */
        int64_t at_ns = request->end_ns - (int64_t)(sim_chance(sim, 25) ? 0 : sim_below(sim, latency_ns + 1));

        request->moment[i].happen = happen[i];
        sim_event_add(sim, &request->moment[i], at_ns);
    }
}

static void coroutine_fn request_end(struct request *request)
{
    sim_sleep_until(request->file->sim, request->end_ns);
    request->file->in_flight--;
}

/* ---- transfers ---- */

struct transfer {
    struct request request;
    struct list link; /* sim->writes */
    struct buffers memory;
    uint64_t offset, bytes, split;
    uint64_t change[2];   /* which the pieces were; 0: none yet */
    uint64_t end_of_file; /* as a read's pieces saw it */
};

static uint64_t iov_bytes(const struct iovec *iov, unsigned count)
{
    uint64_t bytes = 0;

    for (unsigned i = 0; i < count; i++) {
        bytes += iov[i].iov_len;
    }
    return bytes;
}

static int check_alignment(const struct sim_file *file, uint64_t offset, const struct iovec *iov, unsigned count)
{
    if (!file->direct) {
        return 0;
    }
    for (unsigned i = 0; i < count; i++) {
        if (!is_aligned((uintptr_t)iov[i].iov_base | iov[i].iov_len, SIM_SECTOR)) {
            return -EINVAL;
        }
    }
    return is_aligned(offset, SIM_SECTOR) ? 0 : -EINVAL;
}

/* A part of the range: up to a sector's end. */
static uint64_t shorter(struct sim *sim, uint64_t offset, uint64_t bytes)
{
    uint64_t first = SIM_SECTOR - offset % SIM_SECTOR;

    if (bytes <= first) {
        return bytes;
    }
    return first + sim_below(sim, div_up(bytes - first, SIM_SECTOR)) * SIM_SECTOR;
}

static void transfer_piece(const struct transfer *transfer, unsigned piece, uint64_t *ret_from, uint64_t *ret_to)
{
    *ret_from = piece ? transfer->split : 0;
    *ret_to = piece ? transfer->bytes : transfer->split;
}

static unsigned transfer_split(struct transfer *transfer)
{
    struct sim *sim = transfer->request.file->sim;

    transfer->split = transfer->bytes;
    if (sim_chance(sim, SPLIT_PERCENT)) {
        transfer->split = shorter(sim, transfer->offset, transfer->bytes);
    }
    return transfer->split < transfer->bytes ? 2 : 1;
}

static void read_effect(struct request *request, unsigned piece)
{
    struct transfer *transfer = container_of(request, struct transfer, request);
    struct sim_disk *disk = request->file->disk;
    uint64_t from, to;

    transfer_piece(transfer, piece, &from, &to);
    if (request->error) {
        /* What a failing read leaves in memory nobody can rely on. */
        buffers_fill(buffers_advance(transfer->memory, from), 0xe5, to - from);
        return;
    }
    transfer->end_of_file = min_u64(transfer->end_of_file, disk->size);
    g_autofree uint8_t *data = g_malloc(to - from + 1);

    disk_read(disk, transfer->offset + from, data, to - from);
    buffers_copy_in(buffers_advance(transfer->memory, from), data, to - from);
}

static ssize_t coroutine_fn sim_file_read(struct file *base, uint64_t offset, const struct iovec *iov, unsigned count)
{
    struct sim_file *file = sim_file(base);
    struct sim *sim = file->sim;
    struct transfer transfer = {.request.effect = read_effect,
                                .memory = {iov, count, 0},
                                .offset = offset,
                                .bytes = iov_bytes(iov, count),
                                .end_of_file = UINT64_MAX};
    int r = check_alignment(file, offset, iov, count);

    if (r < 0) {
        return r;
    }
    request_begin(&transfer.request, file, SIM_READ, offset, transfer.bytes);
    if (sim_chance(sim, sim->config.short_percent)) {
        transfer.bytes = shorter(sim, offset, transfer.bytes);
    }
    request_plan(&transfer.request, transfer_split(&transfer));
    request_end(&transfer.request);
    if (transfer.request.error) {
        return transfer.request.error;
    }
    uint64_t moved = offset < transfer.end_of_file ? min_u64(transfer.bytes, transfer.end_of_file - offset) : 0;

    /* A direct file that ends inside a sector: the rest cannot be asked for, and is known. */
    return (ssize_t)(file->direct && moved ? min_u64(align_up(moved, SIM_SECTOR), transfer.bytes) : moved);
}

/* Any part, by sectors. */
static void write_part(struct sim_disk *disk, struct sim *sim, uint64_t offset, const uint8_t *data, uint64_t bytes)
{
    unsigned percent = (unsigned)sim_below(sim, 101);

    for (uint64_t done = 0; done < bytes;) {
        uint64_t step = min_u64(SIM_SECTOR - (offset + done) % SIM_SECTOR, bytes - done);

        if (sim_chance(sim, percent)) {
            disk_write(disk, offset + done, data + done, step);
        }
        done += step;
    }
}

static void write_effect(struct request *request, unsigned piece)
{
    struct transfer *transfer = container_of(request, struct transfer, request);
    struct sim_disk *disk = request->file->disk;
    uint64_t from, to;

    transfer_piece(transfer, piece, &from, &to);
    g_autofree uint8_t *data = g_malloc(to - from + 1);

    buffers_copy_out(buffers_advance(transfer->memory, from), data, to - from);
    if (request->error) {
        write_part(disk, request->file->sim, transfer->offset + from, data, to - from);
    } else {
        disk_write(disk, transfer->offset + from, data, to - from);
    }
    transfer->change[piece] = disk->change;
}

/* How much of the write finds room: its end, or an error. */
static void write_limit(struct transfer *transfer)
{
    struct request *request = &transfer->request;
    uint64_t room = request->file->disk->room, most = min_u64(room, SIM_DISK_MAX);

    if (transfer->bytes > most || transfer->offset > most - transfer->bytes) {
        uint64_t left = transfer->offset < most ? most - transfer->offset : 0;

        transfer->bytes = request->file->direct ? align_down(left, SIM_SECTOR) : left;
        if (!transfer->bytes && !request->error) {
            request->error = room <= SIM_DISK_MAX ? -ENOSPC : -EFBIG;
        }
    }
}

static ssize_t coroutine_fn sim_file_write(struct file *base, uint64_t offset, const struct iovec *iov, unsigned count,
                                           bool fua)
{
    struct sim_file *file = sim_file(base);
    struct sim *sim = file->sim;
    struct transfer transfer = {
        .request.effect = write_effect, .memory = {iov, count, 0}, .offset = offset, .bytes = iov_bytes(iov, count)};
    int r = check_alignment(file, offset, iov, count);

    if (!file->writable || r < 0) {
        return r < 0 ? r : -EBADF;
    }
    request_begin(&transfer.request, file, SIM_WRITE, offset, transfer.bytes);
    write_limit(&transfer);
    if (sim_chance(sim, sim->config.short_percent)) {
        transfer.bytes = shorter(sim, offset, transfer.bytes);
    }
    request_plan(&transfer.request, transfer.bytes ? transfer_split(&transfer) : 0);
    list_append(&sim->writes, &transfer.link);
    sim_change_begun(sim);
    request_end(&transfer.request);
    list_remove(&transfer.link);
    if (transfer.request.error) {
        return transfer.request.error;
    }
    if (fua) {
        disk_settle(file->disk, offset, transfer.split, transfer.change[0]);
        if (transfer.split < transfer.bytes) {
            disk_settle(file->disk, offset + transfer.split, transfer.bytes - transfer.split, transfer.change[1]);
        }
    }
    return (ssize_t)transfer.bytes;
}

/* ---- sync, allocation, size ---- */

static int coroutine_fn sim_file_sync(struct file *base)
{
    struct sim_file *file = sim_file(base);
    struct request request = {.effect = NULL};
    uint64_t change = file->disk->change;

    request_begin(&request, file, SIM_SYNC, 0, 0);
    sim_change_begun(file->sim);
    request_end(&request);
    if (!request.error) {
        disk_settle(file->disk, 0, UINT64_MAX, change);
    }
    return request.error;
}

struct allocation {
    struct request request;
    bool resize;
    enum file_allocate_mode mode;
    uint64_t offset, bytes;
};

static void allocation_effect(struct request *request, unsigned piece)
{
    struct allocation *allocation = container_of(request, struct allocation, request);

    if (allocation->resize) {
        disk_resize(request->file->disk, allocation->bytes);
    } else {
        disk_allocate(request->file->disk, allocation->mode, allocation->offset, allocation->bytes);
    }
}

static int coroutine_fn allocation_run(struct allocation *allocation, struct sim_file *file)
{
    struct request *request = &allocation->request;
    uint64_t most = min_u64(file->disk->room, SIM_DISK_MAX);
    bool grows = !allocation->resize && allocation->mode != FILE_PUNCH;

    if (!file->writable) {
        return allocation->resize ? -EINVAL : -EBADF;
    }
    request->effect = allocation_effect;
    request_begin(request, file, SIM_ALLOCATE, allocation->offset, allocation->bytes);
    bool effective = !request->error || sim_chance(file->sim, 50);

    if (grows && (allocation->bytes > most || allocation->offset > most - allocation->bytes)) {
        request->error = request->error ? request->error : -ENOSPC;
        effective = false;
    } else if (allocation->resize && allocation->bytes > SIM_DISK_MAX) {
        request->error = -EFBIG;
        effective = false;
    }
    request_plan(request, effective ? 1 : 0);
    sim_change_begun(file->sim);
    request_end(request);
    return request->error;
}

static int coroutine_fn sim_file_allocate(struct file *file, enum file_allocate_mode mode, uint64_t offset,
                                          uint64_t bytes)
{
    struct allocation allocation = {.mode = mode, .offset = offset, .bytes = bytes};

    return allocation_run(&allocation, sim_file(file));
}

static int coroutine_fn sim_file_truncate(struct file *file, uint64_t size)
{
    struct allocation allocation = {.resize = true, .bytes = size};

    return allocation_run(&allocation, sim_file(file));
}

/* ---- the rest ---- */

/* What has no moment of its own takes its time first. */
static void coroutine_fn pass_time(struct sim *sim)
{
    sim_sleep_until(sim, sim->now_ns + sim_draw_latency(sim));
}

static int coroutine_fn open_disk(struct sim *sim, const char *path, unsigned flags, struct sim_disk **ret)
{
    int r = fault_take(sim, path, SIM_OPEN);
    bool empties = flags & FILE_TRUNCATE;

    sim_note(sim, "opens", flags, 0);
    pass_time(sim);
    struct sim_disk *disk = disk_find(sim, path);

    if (r < 0) {
        return r;
    }
    if (!disk && !(flags & FILE_CREATE)) {
        return -ENOENT;
    }
    if (disk && (flags & FILE_CREATE) && (flags & FILE_EXCLUSIVE)) {
        return -EEXIST;
    }
    if (!disk) {
        disk = disk_add(sim, path);
    } else if (empties && disk->size) {
        disk_resize(disk, 0);
        sim_change_begun(sim);
    }
    *ret = disk;
    return 0;
}

static int coroutine_fn sim_file_open(const char *path, unsigned flags, struct file **ret, struct error **err)
{
    struct sim *sim = sim_self();
    struct sim_disk *disk = NULL;
    int r = open_disk(sim, path, flags, &disk);

    if (r < 0) {
        return error_set_errno(err, r, "Could not open '%s'", path);
    }
    struct sim_file *file = g_new0(struct sim_file, 1);

    *file = (struct sim_file){
        .file.ops = &sim_file_ops,
        .sim = sim,
        .disk = disk,
        .writable = flags & FILE_WRITABLE,
        .direct = flags & FILE_DIRECT,
    };
    disk->references++;
    *ret = &file->file;
    return 0;
}

static void coroutine_fn sim_file_close(struct file *base)
{
    struct sim_file *file = sim_file(base);

    g_assert(!file->in_flight);
    pass_time(file->sim);
    g_assert(!file->in_flight);
    disk_unref(file->disk);
    g_free(file);
}

static int coroutine_fn sim_file_info(struct file *base, struct file_info *ret)
{
    struct sim_file *file = sim_file(base);

    pass_time(file->sim);
    *ret = (struct file_info){
        .size = file->disk->size,
        .allocated = file->disk->allocated * SIM_PAGE,
        .alignment = file->direct ? SIM_SECTOR : 1,
        .memory_alignment = file->direct ? SIM_SECTOR : 1,
        .device = 1,
        .inode = file->disk->inode,
    };
    return 0;
}

static int coroutine_fn sim_file_extent(struct file *base, uint64_t offset, bool *ret_data, uint64_t *ret_end)
{
    struct sim_file *file = sim_file(base);

    pass_time(file->sim);
    return disk_extent(file->disk, offset, ret_data, ret_end);
}

static int coroutine_fn sim_file_lock(struct file *file, bool shared, uint64_t offset, uint64_t bytes)
{
    pass_time(sim_file(file)->sim);
    return 0;
}

static int coroutine_fn sim_file_lock_test(struct file *file, uint64_t offset, uint64_t bytes, uint64_t *ret_offset)
{
    pass_time(sim_file(file)->sim);
    return 0;
}

static int coroutine_fn sim_file_unlink(const char *path)
{
    struct sim *sim = sim_self();

    pass_time(sim);
    struct sim_disk *disk = disk_find(sim, path);

    if (!disk) {
        return -ENOENT;
    }
    disk_forget(disk);
    return 0;
}

static int coroutine_fn sim_file_slurp(const char *path, size_t max, char **ret, size_t *ret_size)
{
    struct sim *sim = sim_self();
    struct sim_disk *disk = NULL;
    int r = open_disk(sim, path, 0, &disk);

    if (r < 0) {
        return r;
    }
    if (disk->size > max) {
        return -EFBIG;
    }
    uint64_t size = disk->size;

    *ret = g_malloc(size + 1);
    disk_read(disk, 0, *ret, size);
    (*ret)[size] = 0;
    if (ret_size) {
        *ret_size = size;
    }
    return 0;
}

/* As the worker pool would: in its own time, with what it has read in `memory`. */
static int coroutine_fn sim_file_copy(struct file *from, uint64_t offset, struct file *to, uint64_t to_offset,
                                      uint64_t bytes, const struct copy_aid *aid)
{
    struct iovec memory = aid->memory;
    uint64_t have = 0, at = 0; /* what is in memory, and how much of it has been written */

    while (bytes) {
        struct iovec iov = {(char *)memory.iov_base + at, have ? have - at : min_u64(bytes, memory.iov_len)};
        ssize_t moved = have ? sim_file_write(to, to_offset, &iov, 1, false) : sim_file_read(from, offset, &iov, 1);

        if (moved <= 0) {
            return -ENOTSUP;
        }
        if (!have) {
            have = (uint64_t)moved;
            if (aid->zero_unit && memory_has_zero_unit(memory.iov_base, have, offset, aid->zero_unit)) {
                return -ENOTSUP;
            }
            offset += have;
            continue;
        }
        at += (uint64_t)moved;
        to_offset += (uint64_t)moved;
        bytes -= (uint64_t)moved;
        have = at < have ? have : 0;
        at = have ? at : 0;
    }
    return 0;
}

const struct file_ops sim_file_ops = {
    .open = sim_file_open,
    .close = sim_file_close,
    .info = sim_file_info,
    .read = sim_file_read,
    .write = sim_file_write,
    .copy = sim_file_copy,
    .sync = sim_file_sync,
    .allocate = sim_file_allocate,
    .truncate = sim_file_truncate,
    .extent = sim_file_extent,
    .lock = sim_file_lock,
    .lock_test = sim_file_lock_test,
    .unlink = sim_file_unlink,
    .slurp = sim_file_slurp,
};

/* ---- the power cut ---- */

static void write_what_is_left(struct transfer *transfer)
{
    struct sim *sim = transfer->request.file->sim;

    for (unsigned piece = 0; piece < 2; piece++) {
        uint64_t from, to;

        transfer_piece(transfer, piece, &from, &to);
        if (transfer->change[piece] || from >= to || sim_chance(sim, 50)) {
            continue;
        }
        g_autofree uint8_t *data = g_malloc(to - from);

        buffers_copy_out(buffers_advance(transfer->memory, from), data, to - from);
        write_part(transfer->request.file->disk, sim, transfer->offset + from, data, to - from);
    }
}

void sim_files_cut(struct sim *sim, struct sim *after)
{
    /* Of what was under way, some has reached the disk. */
    sim_happen_some(sim);
    list_for_each (link, &sim->writes) {
        write_what_is_left(container_of(link, struct transfer, link));
    }
    list_for_each (link, &sim->disks) {
        struct sim_disk *disk = container_of(link, struct sim_disk, link);
        struct sim_disk *left = disk_cut(disk, sim);

        list_append(&after->disks, &left->link);
    }
    after->disk_count = sim->disk_count;
}

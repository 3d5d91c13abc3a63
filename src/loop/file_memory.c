/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Files in memory (tmpfs, ramfs): no call ever waits for a device.
 * - Short transfers are made at once; long ones on the worker pool, in lanes. Reads need nothing but a processor, so no
 *   more are made at a time than there are processors. The kernel lets one writer at a time into such a file, and the
 *   others burn a processor meanwhile: one long write is made at a time, in steps, between which short ones get in.
 * - With mapped=on they are made through a mapping (loop/file_map.h), as far as that goes; writes of up to a MiB at
 *   once, as they take a quarter of the time so.
 * - From one memory file to another one worker reads and writes, step by step, while another one reads the next: so a
 *   step is in that processor's cache when it is written; into a new part of the target it reads at once, seen as
 *   memory (loop/huge_page.h). copy_file_range() takes as long as the first, and reads with the target locked.
 */
#include "base/size.h"
#include "loop/file_native.h"
#include <errno.h>
#include <glib.h>
#include <sched.h>

/* Longer transfers of a memory file are made by the worker pool: several at once use more than one processor, and the
 * loop serves others meanwhile. */
#define INLINE_TRANSFER_MAX (128 * KiB)
/* Through a mapping they take a fraction of the time, and a worker would have to be woken: up to this long at once. */
#define INLINE_MAPPED_WRITE_MAX (1 * MiB)
/* Long writes go on in steps of so many bytes: about what a short one waits that comes in between. */
#define LANE_STEP (128 * KiB)
/* A copy reads so much at a time, which stays in a processor's cache until it is written. */
#define COPY_STEP (512 * KiB)
/* So much of it is looked at first. */
#define COPY_PEEK (4 * KiB)
/* A file grows if so much is written behind its end. */
#define GROWTH_LEAST (1 * MiB)
/* For how many yields of its processor a long write lets a short one go first. */
#define LANE_YIELDS 64
/* Copies up to this long are made at once. */
#define INLINE_COPY_MAX (128 * KiB)

/* ---- transfers ---- */

struct transfer_job {
    struct native_file *file;
    bool write;
    const struct iovec *iov;
    unsigned count;
    uint64_t offset;
    ssize_t moved;
};

static int transfer_work(void *argument)
{
    struct transfer_job *job = argument;

    job->moved = native_transfer_now(job->file->fd, job->write, job->iov, job->count, job->offset, 0);
    return 0;
}

/* Between two steps of a long write: the kernel would let whoever writes already go on before who waits. */
static void lane_give_way(struct native_file *file)
{
    for (unsigned i = 0; i < LANE_YIELDS && atomic_load_explicit(&file->short_writes, memory_order_relaxed); i++) {
        sched_yield();
    }
}

static ssize_t write_at_once(struct native_file *file, const char *memory, size_t bytes, uint64_t offset)
{
    struct iovec step = {(char *)memory, bytes};

    return native_transfer_now(file->fd, true, &step, 1, offset, 0);
}

/* A long write. Returns how much of it was written, or a negative errno. */
static ssize_t write_in_steps(struct native_file *file, const char *memory, size_t bytes, uint64_t offset)
{
    size_t done = 0;
    ssize_t moved = 0;

    worker_turn_begin(&file->turn);
    while (done < bytes) {
        struct iovec step = {(char *)memory + done, MIN(bytes - done, LANE_STEP)};

        if (done + step.iov_len == bytes) {
            worker_turn_end_soon(&file->turn);
        }
        moved = native_transfer_now(file->fd, true, &step, 1, offset + done, 0);
        if (moved <= 0) {
            break;
        }
        done += (size_t)moved;
        lane_give_way(file);
    }
    worker_turn_end(&file->turn);
    return done ? (ssize_t)done : moved;
}

static int map_work(void *argument)
{
    struct transfer_job *job = argument;
    size_t bytes = iov_bytes(job->iov, job->count);
    bool done = (job->write ? file_map_write : file_map_read)(job->file->map, job->offset, job->iov, job->count, bytes);

    job->moved = done ? (ssize_t)bytes : -ENOTSUP;
    return 0;
}

static int lane_write_work(void *argument)
{
    struct transfer_job *job = argument;

    if (job->count > 1) {
        return transfer_work(job);
    }
    job->moved = write_in_steps(job->file, job->iov->iov_base, job->iov->iov_len, job->offset);
    return 0;
}

/* On the worker pool; `mapped`: through the mapping, as far as that goes. */
static ssize_t coroutine_fn transfer_long(struct transfer_job *job, bool mapped)
{
    struct worker_lane *lane = job->write ? job->file->writes : job->file->reads;

    job->moved = -ENOTSUP;
    if (mapped) {
        worker_lane_run(lane, map_work, job);
    }
    if (job->moved < 0) {
        worker_lane_run(lane, job->write ? lane_write_work : transfer_work, job);
    }
    return job->moved;
}

/* A transfer of a memory file. */
ssize_t coroutine_fn file_memory_transfer(struct native_file *file, bool write, uint64_t offset,
                                          const struct iovec *iov, unsigned count)
{
    size_t bytes = iov_bytes(iov, count);
    bool is_long = bytes > INLINE_TRANSFER_MAX, mapped = file->map && !file_map_is_over(file->map);
    bool mapped_at_once = mapped && (!is_long || (write && bytes <= INLINE_MAPPED_WRITE_MAX));
    ssize_t moved;

    if (mapped_at_once && (write ? file_map_write : file_map_read)(file->map, offset, iov, count, bytes)) {
        moved = (ssize_t)bytes;
    } else if (is_long) {
        struct transfer_job job = {.file = file, .write = write, .iov = iov, .count = count, .offset = offset};

        return transfer_long(&job, mapped && !mapped_at_once);
    } else if (write) {
        atomic_fetch_add_explicit(&file->short_writes, 1, memory_order_relaxed);
        moved = native_transfer_now(file->fd, true, iov, count, offset, 0);
        atomic_fetch_sub_explicit(&file->short_writes, 1, memory_order_relaxed);
    } else {
        moved = native_transfer_now(file->fd, false, iov, count, offset, 0);
    }
    loop_spend(1 + (moved > 0 ? (unsigned)((uint64_t)moved / BYTES_PER_UNIT) : 0));
    return moved;
}

const void *file_memory_peek(struct file *file, uint64_t offset, size_t bytes)
{
    struct file_map *map = native(file)->map;

    return map ? file_map_peek(map, offset, bytes) : NULL;
}

bool file_memory_is_sound(struct file *file, const void *at, size_t bytes)
{
    return file_map_is_sound(native(file)->map, at, bytes);
}

void file_memory_forget(struct native_file *file, uint64_t offset, uint64_t bytes)
{
    if (file->map) {
        file_map_forget(file->map, offset, bytes);
    }
}

/* ---- copies ---- */

struct copy_job {
    struct native_file *from, *to;
    uint64_t from_offset, to_offset, bytes;
    const struct copy_aid *aid;
};

/* Has what was read from where the job stands something that is left to others? */
static bool has_zero_unit(const struct copy_job *job, const struct iovec *step, size_t moved)
{
    return job->aid->zero_unit && memory_has_zero_unit(step->iov_base, moved, job->from_offset, job->aid->zero_unit);
}

static void copy_advance(struct copy_job *job, size_t moved)
{
    job->bytes -= moved;
    job->from_offset += moved;
    job->to_offset += moved;
}

/* Copies so much. What is wrong, also the end of the file, reading and writing finds out. */
static int copy_in_steps(struct copy_job *job, uint64_t bytes,
                         ssize_t (*write)(struct native_file *file, const char *memory, size_t bytes, uint64_t offset))
{
    const struct copy_aid *aid = job->aid;

    for (uint64_t end = job->to_offset + bytes; job->to_offset < end;) {
        struct iovec step = {aid->memory.iov_base, min_u64(end - job->to_offset, MIN(aid->memory.iov_len, COPY_STEP))};
        ssize_t moved = native_transfer_now(job->from->fd, false, &step, 1, job->from_offset, 0);

        if (moved > 0 && has_zero_unit(job, &step, (size_t)moved)) {
            return -ENOTSUP;
        }
        if (moved > 0) {
            moved = write(job->to, step.iov_base, (size_t)moved, job->to_offset);
        }
        if (moved <= 0) {
            return -ENOTSUP;
        }
        copy_advance(job, (size_t)moved);
    }
    return 0;
}

/* The same, into an extent of the target that is seen as memory. */
static int copy_to_page(struct copy_job *job, uint64_t bytes, const struct shared_memory *page)
{
    for (uint64_t end = job->to_offset + bytes; job->to_offset < end;) {
        struct iovec step = {page->bytes + job->to_offset % HUGE_PAGE_BYTES, min_u64(end - job->to_offset, COPY_STEP)};
        ssize_t moved = native_transfer_now(job->from->fd, false, &step, 1, job->from_offset, 0);

        if (moved <= 0 || has_zero_unit(job, &step, (size_t)moved)) {
            return -ENOTSUP;
        }
        copy_advance(job, (size_t)moved);
    }
    return shared_memory_is_lost(page) ? -ENOTSUP : 0;
}

/* Before anything is allocated for it: what is zero as a whole begins so. */
static bool begins_with_zeroes(const struct copy_job *job)
{
    uint64_t bytes = max_u64(COPY_PEEK, job->aid->zero_unit);
    struct iovec peek = {job->aid->memory.iov_base, min_u64(job->bytes, MIN(job->aid->memory.iov_len, bytes))};
    ssize_t moved = native_transfer_now(job->from->fd, false, &peek, 1, job->from_offset, 0);

    return moved > 0 && has_zero_unit(job, &peek, (size_t)moved);
}

static int copy_work(void *argument)
{
    struct copy_job *job = argument;
    bool grows = job->bytes >= GROWTH_LEAST;
    int r = begins_with_zeroes(job) ? -ENOTSUP : 0;

    while (r == 0 && job->bytes) {
        uint64_t offset = job->to_offset, bytes = min_u64(job->bytes, huge_page_room(offset));
        bool is_new;
        struct shared_memory *page = huge_page_open(&job->to->huge, offset, job->bytes, grows, &is_new);

        r = page ? copy_to_page(job, bytes, page) : copy_in_steps(job, bytes, write_in_steps);
        shared_memory_unmap(page);
        if (r < 0 && is_new) { /* a part of it may stay a hole */
            file_memory_forget(job->to, offset, bytes);
            huge_page_undo(&job->to->huge, offset, bytes);
            file_memory_forget(job->to, offset, bytes);
        }
    }
    return r;
}

int coroutine_fn file_memory_copy(struct file *from, uint64_t offset, struct file *to, uint64_t to_offset,
                                  uint64_t bytes, const struct copy_aid *aid)
{
    struct copy_job job = {native(from), native(to), offset, to_offset, bytes, aid};

    if (!job.from->memory || !job.to->memory) {
        return -ENOTSUP;
    }
    if (bytes > INLINE_COPY_MAX) {
        return worker_run(copy_work, &job);
    }
    atomic_fetch_add_explicit(&job.to->short_writes, 1, memory_order_relaxed);
    int r = copy_in_steps(&job, bytes, write_at_once);

    atomic_fetch_sub_explicit(&job.to->short_writes, 1, memory_order_relaxed);
    loop_spend(1 + 2 * (unsigned)(bytes / BYTES_PER_UNIT));
    return r;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Files of the real engines: a descriptor and what we know of the file system below it. Decides which
 * way a call goes:
 * - memory file systems (tmpfs, ramfs) never wait for a device: file_memory.c;
 * - cached files: a read first takes what the page cache has (RWF_NOWAIT); the rest, and all writes, wait
 *   through the loop's engine;
 * - direct files (O_DIRECT) and block devices: through the engine;
 * - everything that has no asynchronous call (open, stat, fallocate, lseek, locks) on the worker pool.
 * Invariants: the fields of a file do not change after open, but for `nowait` and `durable`, which only ever go from
 * true to false, and what has a lock of its own or counts; the descriptor's own position is never used.
 */
#include "loop/file_native.h"
#include "base/size.h"
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

/* Larger changes of a memory file's allocation go to the worker pool. */
#define INLINE_ALLOCATE_MAX (1 * MiB)

/* Runs work at once on a memory file, else on the worker pool. */
static int coroutine_fn native_work(struct native_file *file, int (*work)(void *argument), void *argument)
{
    if (!file->memory) {
        return worker_run(work, argument);
    }
    loop_spend(1);
    return work(argument);
}

/* ---- opening ---- */

struct open_job {
    const char *path;
    unsigned flags;
    struct native_file *file;
    struct error *err;
};

static bool direct_read_works(int fd, unsigned alignment)
{
    void *memory = NULL;
    ssize_t r;

    if (posix_memalign(&memory, alignment, alignment)) {
        return false;
    }
    r = pread(fd, memory, alignment, 0);
    free(memory);
    return r >= 0 || errno != EINVAL;
}

static void find_alignment(struct native_file *file)
{
    int sector = 0;

    file->alignment = file->memory_alignment = 1;
    if (!file->direct) {
        return;
    }
    file->memory_alignment = (unsigned)sysconf(_SC_PAGESIZE);
#ifdef STATX_DIOALIGN
    struct statx status;

    if (!statx(file->fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) && (status.stx_mask & STATX_DIOALIGN) &&
        is_power_of_two(status.stx_dio_offset_align) && is_power_of_two(status.stx_dio_mem_align)) {
        file->alignment = status.stx_dio_offset_align;
        file->memory_alignment = status.stx_dio_mem_align;
        return;
    }
#endif
    if (file->block_device && !ioctl(file->fd, BLKSSZGET, &sector) && sector > 0 && is_power_of_two((uint64_t)sector)) {
        file->alignment = (unsigned)sector;
        return;
    }
    for (file->alignment = 512; file->alignment < 4096; file->alignment *= 2) {
        if (direct_read_works(file->fd, file->alignment)) {
            return;
        }
    }
}

static int open_check(struct open_job *job, struct native_file *file)
{
    struct stat status;
    struct statfs system;

    if (fstat(file->fd, &status) < 0) {
        return error_set_errno(&job->err, -errno, "Could not examine '%s'", job->path);
    }
    if (S_ISDIR(status.st_mode)) {
        return error_set_errno(&job->err, -EISDIR, "Could not open '%s'", job->path);
    }
    if (!S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode)) {
        return error_set(&job->err, -EINVAL, "'%s' is neither a regular file nor a block device", job->path);
    }
    file->block_device = S_ISBLK(status.st_mode);
    /* O_NONBLOCK was for a FIFO's sake; io_uring would take it at its word. */
    if (fcntl(file->fd, F_SETFL, fcntl(file->fd, F_GETFL) & ~O_NONBLOCK) < 0) {
        return error_set_errno(&job->err, -errno, "Could not open '%s'", job->path);
    }
    if (!file->block_device && fstatfs(file->fd, &system) == 0) {
        if (system.f_type == PROC_SUPER_MAGIC || system.f_type == SYSFS_MAGIC) {
            /* Images name files themselves: none is to reach the memory of a process, or the kernel's settings. */
            return error_set(&job->err, -EINVAL, "'%s' is a file of the kernel and not an image", job->path);
        }
        file->memory = system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC;
    }
    if (job->flags & FILE_MAPPED && !file->memory) {
        error_set(&job->err, -EINVAL, "'%s' is not in memory (tmpfs): it cannot be written through a mapping",
                  job->path);
        error_hint(&job->err, "Leave mapped=on away");
        return -EINVAL;
    }
    atomic_init(&file->nowait, true);
    atomic_init(&file->durable, true);
    atomic_init(&file->locked, false);
    find_alignment(file);
    return 0;
}

static int open_work(void *argument)
{
    struct open_job *job = argument;
    struct native_file *file = g_new0(struct native_file, 1);
    int flags = O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
    int r;

    flags |= job->flags & FILE_WRITABLE ? O_RDWR : O_RDONLY;
    flags |= job->flags & FILE_DIRECT ? O_DIRECT : 0;
    flags |= job->flags & FILE_CREATE ? O_CREAT : 0;
    flags |= job->flags & FILE_EXCLUSIVE ? O_EXCL : 0;
    flags |= job->flags & FILE_TRUNCATE ? O_TRUNC : 0;
    file->file.ops = &file_native_ops;
    file->direct = (job->flags & FILE_DIRECT) != 0;
    do {
        file->fd = open(job->path, flags, 0644);
    } while (file->fd < 0 && errno == EINTR);
    if (file->fd < 0) {
        r = -errno;
        g_free(file);
        error_set_errno(&job->err, r, "Could not open '%s'", job->path);
        if (r == -EINVAL && (job->flags & FILE_DIRECT)) {
            error_hint(&job->err, "Its file system may not know direct I/O (O_DIRECT)");
        }
        return r;
    }
    r = open_check(job, file);
    if (r < 0) {
        close(file->fd);
        g_free(file);
        return r;
    }
    file->reads = file->memory ? worker_lane_create(CLAMP(g_get_num_processors(), 1, WORKER_LANE_MAX)) : NULL;
    file->writes = file->memory ? worker_lane_create(1) : NULL;
    worker_turn_init(&file->turn);
    huge_pages_init(&file->huge, file->fd);
    if (job->flags & FILE_MAPPED && job->flags & FILE_WRITABLE) {
        file->map = g_new(struct file_map, 1);
        file_map_init(file->map, file->fd, job->path);
    }
    job->file = file;
    return 0;
}

static int coroutine_fn native_open(const char *path, unsigned flags, struct file **ret, struct error **err)
{
    struct open_job job = {.path = path, .flags = flags};
    int r = worker_run(open_work, &job);

    if (r < 0) {
        return error_move(err, job.err);
    }
    *ret = &job.file->file;
    return 0;
}

static int close_work(void *argument)
{
    struct native_file *file = argument;
    struct flock all = {.l_type = F_UNLCK, .l_whence = SEEK_SET};

    if (file->map) {
        file_map_touch(file->map);
        file_map_destroy(file->map);
        g_free(file->map);
    }
    if (atomic_load_explicit(&file->locked, memory_order_relaxed)) {
        huge_pages_trim(&file->huge);
    }
    /* The kernel's ring may hold on to the description a moment longer than its last request: who opens the file next
     * must not find our locks. */
    fcntl(file->fd, F_OFD_SETLK, &all);
    close(file->fd);
    return 0;
}

static void coroutine_fn native_close(struct file *file)
{
    worker_run(close_work, native(file));
    worker_lane_destroy(native(file)->reads);
    worker_lane_destroy(native(file)->writes);
    worker_turn_destroy(&native(file)->turn);
    huge_pages_destroy(&native(file)->huge);
    g_free(native(file));
}

/* ---- transfers ---- */

ssize_t native_transfer_now(int fd, bool write, const struct iovec *iov, unsigned count, uint64_t offset, int flags)
{
    ssize_t moved;

    if (count == 1 && !flags) {
        /* The kernel need not copy a vector: a twentieth of what 4 KiB of a memory file cost. */
        moved = write ? pwrite(fd, iov->iov_base, iov->iov_len, (off_t)offset)
                      : pread(fd, iov->iov_base, iov->iov_len, (off_t)offset);
    } else if (flags) {
        moved = write ? pwritev2(fd, iov, (int)count, (off_t)offset, flags)
                      : preadv2(fd, iov, (int)count, (off_t)offset, flags);
    } else {
        moved = write ? pwritev(fd, iov, (int)count, (off_t)offset) : preadv(fd, iov, (int)count, (off_t)offset);
    }
    return moved < 0 ? -errno : moved;
}

static ssize_t coroutine_fn transfer_queued(struct native_file *file, bool write, uint64_t offset,
                                            const struct iovec *iov, unsigned count, int flags)
{
    struct engine *engine = engine_self();

    return engine->ops->native->transfer(engine, file->fd, write, iov, count, offset, flags);
}

static ssize_t coroutine_fn native_read(struct file *base, uint64_t offset, const struct iovec *iov, unsigned count)
{
    struct native_file *file = native(base);
    ssize_t moved;

    if (file->memory) {
        return file_memory_transfer(file, false, offset, iov, count);
    }
    if (!file->direct && atomic_load_explicit(&file->nowait, memory_order_relaxed)) {
        moved = native_transfer_now(file->fd, false, iov, count, offset, RWF_NOWAIT);
        if (moved > 0) {
            loop_spend(1 + (unsigned)((uint64_t)moved / BYTES_PER_UNIT));
            return moved;
        }
        if (moved == -EOPNOTSUPP || moved == -EINVAL) {
            atomic_store_explicit(&file->nowait, false, memory_order_relaxed);
        }
    }
    moved = transfer_queued(file, false, offset, iov, count, 0);
    if (moved > 0 && file->direct && !is_aligned((uint64_t)moved, file->alignment)) {
        /* The file ends inside a block. The rest cannot be asked for, and is known. */
        size_t wanted = iov_bytes(iov, count);

        if ((size_t)moved < wanted) {
            buffers_fill(buffers_advance((struct buffers){iov, count, 0}, (size_t)moved), 0, wanted - (size_t)moved);
            moved = (ssize_t)wanted;
        }
    }
    return moved;
}

static int coroutine_fn native_sync(struct file *base)
{
    struct native_file *file = native(base);
    struct engine *engine = engine_self();
    int r;

    if (file->map) {
        file_map_touch(file->map);
    }
    if (file->memory) {
        return 0;
    }
    do {
        r = engine->ops->native->sync(engine, file->fd);
    } while (r == -EINTR);
    return r;
}

static ssize_t coroutine_fn native_write(struct file *base, uint64_t offset, const struct iovec *iov, unsigned count,
                                         bool fua)
{
    struct native_file *file = native(base);
    ssize_t moved;

    if (file->memory) {
        return file_memory_transfer(file, true, offset, iov, count);
    }
    if (!fua) {
        return transfer_queued(file, true, offset, iov, count, 0);
    }
    if (atomic_load_explicit(&file->durable, memory_order_relaxed)) {
        moved = transfer_queued(file, true, offset, iov, count, RWF_DSYNC);
        if (moved != -EOPNOTSUPP) {
            return moved;
        }
        atomic_store_explicit(&file->durable, false, memory_order_relaxed);
    }
    moved = transfer_queued(file, true, offset, iov, count, 0);
    if (moved > 0) {
        int r = native_sync(base);

        return r < 0 ? r : moved;
    }
    return moved;
}

/* ---- size, allocation, extents ---- */

struct info_job {
    struct native_file *file;
    struct file_info *info;
};

static int info_work(void *argument)
{
    struct info_job *job = argument;
    struct native_file *file = job->file;
    struct stat status;
    uint64_t size;

    if (fstat(file->fd, &status) < 0) {
        return -errno;
    }
    size = (uint64_t)status.st_size;
    if (file->block_device && ioctl(file->fd, BLKGETSIZE64, &size) < 0) {
        return -errno;
    }
    *job->info = (struct file_info){
        .size = size,
        .allocated = file->block_device ? size : (uint64_t)status.st_blocks * 512,
        .is_block_device = file->block_device,
        .alignment = file->alignment,
        .memory_alignment = file->memory_alignment,
        /* A device is the same device under every name. */
        .device = file->block_device ? 0 : status.st_dev,
        .inode = file->block_device ? status.st_rdev : status.st_ino,
    };
    return 0;
}

static int coroutine_fn native_info(struct file *file, struct file_info *ret)
{
    struct info_job job = {native(file), ret};

    return native_work(native(file), info_work, &job);
}

struct range_job {
    struct native_file *file;
    enum file_allocate_mode mode;
    uint64_t offset, bytes;
};

static int allocate_now(int fd, int mode, uint64_t offset, uint64_t bytes)
{
    int r;

    do {
        r = fallocate(fd, mode, (off_t)offset, (off_t)bytes);
    } while (r < 0 && errno == EINTR);
    if (r < 0) {
        return errno == ENOSYS || errno == ENOTTY ? -EOPNOTSUPP : -errno;
    }
    return 0;
}

static int device_range(int fd, unsigned long request, uint64_t offset, uint64_t bytes)
{
    uint64_t range[2] = {offset, bytes};

    if (ioctl(fd, request, range) < 0) {
        return errno == ENOTTY || errno == ENOSYS ? -EOPNOTSUPP : -errno;
    }
    return 0;
}

static int change_allocation(const struct range_job *job)
{
    struct native_file *file = job->file;
    int r;

    switch (job->mode) {
    case FILE_PUNCH:
        if (file->block_device) {
            return device_range(file->fd, BLKDISCARD, job->offset, job->bytes);
        }
        return allocate_now(file->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, job->offset, job->bytes);
    case FILE_ZERO:
        if (file->block_device) {
            return device_range(file->fd, BLKZEROOUT, job->offset, job->bytes);
        }
        r = allocate_now(file->fd, FALLOC_FL_ZERO_RANGE, job->offset, job->bytes);
        if (r != -EOPNOTSUPP) {
            return r;
        }
        r = allocate_now(file->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, job->offset, job->bytes);
        return r < 0 ? r : allocate_now(file->fd, 0, job->offset, job->bytes);
    case FILE_PREALLOCATE:
        return file->block_device ? -EOPNOTSUPP : allocate_now(file->fd, 0, job->offset, job->bytes);
    }
    return -EINVAL;
}

static int allocate_work(void *argument)
{
    struct range_job *job = argument;

    file_memory_forget(job->file, job->offset, job->bytes);
    int r = change_allocation(job);

    file_memory_forget(job->file, job->offset, job->bytes);
    return r;
}

static int coroutine_fn native_allocate(struct file *base, enum file_allocate_mode mode, uint64_t offset,
                                        uint64_t bytes)
{
    struct native_file *file = native(base);
    struct range_job job = {file, mode, offset, bytes};

    if (bytes > INLINE_ALLOCATE_MAX) {
        return worker_run(allocate_work, &job);
    }
    return native_work(file, allocate_work, &job);
}

static int truncate_work(void *argument)
{
    struct range_job *job = argument;
    int r;

    if (job->file->map) {
        file_map_cut(job->file->map, job->bytes);
    }
    do {
        r = ftruncate(job->file->fd, (off_t)job->bytes);
    } while (r < 0 && errno == EINTR);
    r = r < 0 ? -errno : 0;
    if (job->file->map) { /* who looked in between saw the old size */
        file_map_cut(job->file->map, job->bytes);
    }
    return r;
}

static int coroutine_fn native_truncate(struct file *file, uint64_t size)
{
    struct range_job job = {.file = native(file), .bytes = size};
    struct stat status;

    /* Giving back much memory takes time. */
    if (native(file)->memory && fstat(native(file)->fd, &status) == 0 &&
        (uint64_t)status.st_size > size + INLINE_ALLOCATE_MAX) {
        return worker_run(truncate_work, &job);
    }
    return native_work(native(file), truncate_work, &job);
}

struct layout_job {
    int fd;
    bool no_cow;
    uint64_t extent_bytes;
};

static int layout_work(void *argument)
{
    const struct layout_job *job = argument;
    struct fsxattr attributes;
    int flags = 0, r = 0;

    if (job->no_cow) {
        if (ioctl(job->fd, FS_IOC_GETFLAGS, &flags) < 0 ||
            (flags |= FS_NOCOW_FL, ioctl(job->fd, FS_IOC_SETFLAGS, &flags) < 0)) {
            r = -EOPNOTSUPP;
        }
    }
    if (job->extent_bytes) {
        if (job->extent_bytes > UINT32_MAX || ioctl(job->fd, FS_IOC_FSGETXATTR, &attributes) < 0) {
            return -EOPNOTSUPP;
        }
        attributes.fsx_xflags |= FS_XFLAG_EXTSIZE;
        attributes.fsx_extsize = (uint32_t)job->extent_bytes;
        if (ioctl(job->fd, FS_IOC_FSSETXATTR, &attributes) < 0) {
            r = -EOPNOTSUPP;
        }
    }
    return r;
}

static int coroutine_fn native_set_layout(struct file *file, bool no_cow, uint64_t extent_bytes)
{
    struct layout_job job = {native(file)->fd, no_cow, extent_bytes};

    return native_work(native(file), layout_work, &job);
}

struct extent_job {
    struct native_file *file;
    uint64_t offset;
    bool data;
    uint64_t end;
};

static int extent_work(void *argument)
{
    struct extent_job *job = argument;
    int fd = job->file->fd;
    off_t offset = (off_t)job->offset, end = lseek(fd, 0, SEEK_END), next;

    if (end < 0) {
        return -errno;
    }
    if (offset >= end) {
        return -ENXIO;
    }
    next = lseek(fd, offset, SEEK_DATA);
    if (next < 0 && errno == ENXIO) {
        job->data = false;
        job->end = (uint64_t)end;
        return 0;
    }
    if (next > offset) {
        job->data = false;
        job->end = (uint64_t)next;
        return 0;
    }
    /* Data here, or a file system that cannot tell. */
    next = next < 0 ? end : lseek(fd, offset, SEEK_HOLE);
    job->data = true;
    job->end = next > offset ? (uint64_t)next : (uint64_t)end;
    return 0;
}

static int coroutine_fn native_extent(struct file *file, uint64_t offset, bool *ret_data, uint64_t *ret_end)
{
    struct extent_job job = {.file = native(file), .offset = offset};
    int r = native_work(native(file), extent_work, &job);

    if (r < 0) {
        return r;
    }
    *ret_data = job.data;
    *ret_end = job.end;
    return 0;
}

/* ---- locks ---- */

struct lock_job {
    struct native_file *file;
    int command;
    struct flock lock;
};

static int lock_work(void *argument)
{
    struct lock_job *job = argument;
    int r;

    do {
        r = fcntl(job->file->fd, job->command, &job->lock);
    } while (r < 0 && errno == EINTR);
    if (r < 0) {
        return errno == EACCES ? -EAGAIN : -errno;
    }
    return 0;
}

static struct lock_job lock_job_make(struct file *file, int command, short type, uint64_t offset, uint64_t bytes)
{
    return (struct lock_job){
        native(file),
        command,
        {.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)offset, .l_len = (off_t)bytes},
    };
}

static int coroutine_fn native_lock(struct file *file, bool shared, uint64_t offset, uint64_t bytes)
{
    struct lock_job job = lock_job_make(file, F_OFD_SETLK, shared ? F_RDLCK : F_UNLCK, offset, bytes);

    atomic_store_explicit(&native(file)->locked, true, memory_order_relaxed);
    return native_work(native(file), lock_work, &job);
}

static int coroutine_fn native_lock_test(struct file *file, uint64_t offset, uint64_t bytes, uint64_t *ret_offset)
{
    struct lock_job job = lock_job_make(file, F_OFD_GETLK, F_WRLCK, offset, bytes);
    int r = native_work(native(file), lock_work, &job);

    if (r < 0 || job.lock.l_type == F_UNLCK) {
        return r;
    }
    if (ret_offset) {
        *ret_offset = (uint64_t)job.lock.l_start;
    }
    return -EAGAIN;
}

/* ---- by path ---- */

static int unlink_work(void *argument)
{
    return unlink(argument) < 0 ? -errno : 0;
}

static int coroutine_fn native_unlink(const char *path)
{
    return worker_run(unlink_work, (void *)path);
}

struct slurp_job {
    const char *path;
    size_t max, size;
    char *data;
};

static int slurp_fd(struct slurp_job *job, int fd)
{
    size_t room = 4096;

    job->data = g_malloc(room);
    for (;;) {
        ssize_t r = read(fd, job->data + job->size, room - 1 - job->size);

        if (r < 0 && errno != EINTR) {
            return -errno;
        }
        if (r == 0) {
            job->data[job->size] = 0;
            return 0;
        }
        job->size += r > 0 ? (size_t)r : 0;
        if (job->size > job->max) {
            return -EFBIG;
        }
        if (job->size == room - 1) {
            char *more = g_try_realloc(job->data, room * 2);

            if (!more) {
                return -ENOMEM;
            }
            job->data = more;
            room *= 2;
        }
    }
}

static int slurp_work(void *argument)
{
    struct slurp_job *job = argument;
    int fd = open(job->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY), r;

    if (fd < 0) {
        return -errno;
    }
    r = slurp_fd(job, fd);
    close(fd);
    if (r < 0) {
        g_free(job->data);
    }
    return r;
}

static int coroutine_fn native_slurp(const char *path, size_t max, char **ret, size_t *ret_size)
{
    struct slurp_job job = {.path = path, .max = max};
    int r = worker_run(slurp_work, &job);

    if (r < 0) {
        return r;
    }
    *ret = job.data;
    if (ret_size) {
        *ret_size = job.size;
    }
    return 0;
}

const struct file_ops file_native_ops = {
    .open = native_open,
    .close = native_close,
    .info = native_info,
    .read = native_read,
    .write = native_write,
    .copy = file_memory_copy,
    .peek = file_memory_peek,
    .is_sound = file_memory_is_sound,
    .sync = native_sync,
    .allocate = native_allocate,
    .truncate = native_truncate,
    .set_layout = native_set_layout,
    .extent = native_extent,
    .lock = native_lock,
    .lock_test = native_lock_test,
    .unlink = native_unlink,
    .slurp = native_slurp,
};

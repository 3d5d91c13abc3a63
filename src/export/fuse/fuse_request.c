/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the kernel asks of a FUSE export: the handlers of libfuse's low-level interface. There is one inode, the root,
 * which is a regular file. Each handler runs in a coroutine on the export's loop, may yield, and answers exactly once.
 *
 * 1. Files are opened for direct I/O: the kernel caches nothing, since other exports and jobs change the node too.
 * 2. The size is the export's. What makes the file longer goes to the control thread and is a block_resize like any
 *    other, with its claims; making it shorter is refused there as long as this export looks at it.
 * 3. Zeroes and holes are requests to write zeroes; a hole may be deallocated.
 * 4. The daemon does not open its own export, be it by another name.
 * 5. Nothing of what the kernel hands over is trusted further than libfuse has checked it: ranges are looked at here.
 */
#define FUSE_USE_VERSION 312
#include "base/size.h"
#include "block/user.h"
#include "export/fuse/fuse_export.h"
#include "export/range.h"
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <glib.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ATTRIBUTES_VALID_SECONDS 1.0
#define SEEK_QUESTIONS_MAX 65536
#define SECTOR 512 /* sizes of images are multiples of it */

static struct fuse_export *fuse_of(fuse_req_t request)
{
    return fuse_req_userdata(request);
}

static uint64_t size_of(const struct fuse_export *fuse)
{
    return atomic_load(&fuse->export->size);
}

/* --- growing; the control loop --- */

struct growth {
    struct fuse_export *fuse;
    uint64_t size;
    int result;
    struct coroutine *waiter;
};

static void grow_run(void *argument)
{
    struct growth *growth = argument;
    struct export *export = growth->fuse->export;
    const struct exports_config *config = &export->exports->config;

    if (growth->size > size_of(growth->fuse)) { /* somebody else may have made it longer meanwhile */
        growth->result = config->resize ? config->resize(config->argument, export, growth->size) : -ENOTSUP;
    }
    coroutine_wake(growth->waiter);
}

static int coroutine_fn fuse_grow(struct fuse_export *fuse, uint64_t size)
{
    struct growth growth = {.fuse = fuse, .size = align_up(size, SECTOR), .waiter = coroutine_self()};

    if (size > INT64_MAX - SECTOR) {
        return -EFBIG;
    }

    loop_spawn(fuse->export->exports->loop, grow_run, &growth);
    coroutine_yield();
    return growth.result;
}

/* Before a write to [offset, offset + bytes): the file is long enough, or made so. 0, or what to answer. */
static int coroutine_fn make_room(struct fuse_export *fuse, uint64_t offset, uint64_t bytes)
{
    if (!fuse->export->writable) {
        return -EROFS;
    }
    if (bytes > INT64_MAX - offset) {
        return -EFBIG;
    }
    if (offset + bytes <= size_of(fuse)) {
        return 0;
    }
    return fuse->growable ? fuse_grow(fuse, offset + bytes) : -ENOSPC;
}

/* --- attributes --- */

static void attributes(const struct fuse_export *fuse, struct stat *ret)
{
    *ret = fuse->status;
    ret->st_ino = FUSE_ROOT_ID;
    ret->st_nlink = 1;
    ret->st_size = (off_t)size_of(fuse);
    ret->st_blksize = 64 * KiB;
    ret->st_blocks = ret->st_size / 512;
}

static void reply_attributes(fuse_req_t request)
{
    struct stat status;

    attributes(fuse_of(request), &status);
    fuse_reply_attr(request, &status, ATTRIBUTES_VALID_SECONDS);
}

static void on_init(void *userdata, struct fuse_conn_info *connection)
{
    connection->max_write = FUSE_TRANSFER_MAX;
    connection->max_read = FUSE_TRANSFER_MAX;
    connection->max_background = 64;
}

static void on_lookup(fuse_req_t request, fuse_ino_t parent, const char *name)
{
    fuse_reply_err(request, ENOENT); /* there is nothing below a file */
}

static void on_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *file)
{
    reply_attributes(request);
}

static void on_setattr(fuse_req_t request, fuse_ino_t inode, struct stat *wanted, int which,
                       struct fuse_file_info *file)
{
    struct fuse_export *fuse = fuse_of(request);
    int known = FUSE_SET_ATTR_MODE | FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID | FUSE_SET_ATTR_SIZE | FUSE_SET_ATTR_ATIME |
                FUSE_SET_ATTR_MTIME | FUSE_SET_ATTR_CTIME | FUSE_SET_ATTR_ATIME_NOW | FUSE_SET_ATTR_MTIME_NOW;
    int result = which & ~known ? -ENOTSUP : 0;

    if (result == 0 && (which & FUSE_SET_ATTR_SIZE) && (uint64_t)wanted->st_size != size_of(fuse)) {
        bool shorter = (uint64_t)wanted->st_size < size_of(fuse);
        result = !fuse->export->writable ? -EROFS : shorter ? -EBUSY : fuse_grow(fuse, (uint64_t)wanted->st_size);
    }
    if (result == 0 && (which & FUSE_SET_ATTR_MODE) && !fuse->export->writable && (wanted->st_mode & 0222)) {
        result = -EROFS;
    }
    if (result < 0) {
        fuse_reply_err(request, -result);
        return;
    }
    if (which & FUSE_SET_ATTR_MODE) {
        fuse->status.st_mode = S_IFREG | (wanted->st_mode & 0777);
    }
    if (which & FUSE_SET_ATTR_UID) {
        fuse->status.st_uid = wanted->st_uid;
    }
    if (which & FUSE_SET_ATTR_GID) {
        fuse->status.st_gid = wanted->st_gid;
    }
    reply_attributes(request);
}

/* One of our own threads, in whose hands the file would be when the process ends: its close would ask us, who are not
 * there any more, and the process would stay for ever, with its locks. */
static bool is_us(pid_t thread)
{
    return thread > 0 && syscall(SYS_tgkill, getpid(), thread, 0) == 0;
}

static void on_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *file)
{
    /* The kernel's own words (linux/fuse.h), for libfuse before 3.15 has none for the second flag: without that, a
     * client's writes wait for each other. Who writes behind the end has the file for himself all the same. */
    static const struct fuse_open_out opened = {.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES};
    bool writes = (file->flags & O_ACCMODE) != O_RDONLY;

    if (is_us(fuse_req_ctx(request)->pid)) {
        fuse_reply_err(request, EDEADLK);
        return;
    }
    if (writes && !fuse_of(request)->export->writable) {
        fuse_reply_err(request, EROFS);
        return;
    }
    fuse_reply_buf(request, (const char *)&opened, sizeof(opened));
}

/* --- data --- */

static void on_read(fuse_req_t request, fuse_ino_t inode, size_t bytes, off_t offset, struct fuse_file_info *file)
{
    struct fuse_export *fuse = fuse_of(request);
    uint64_t size = size_of(fuse), from = min_u64((uint64_t)offset, size);
    uint64_t some = min_u64(min_u64(bytes, FUSE_TRANSFER_MAX), size - from);
    void *memory = some ? g_try_malloc(some) : NULL;
    int result = some && !memory ? -ENOMEM : 0;

    if (some && memory) {
        struct iovec iov = {memory, some};
        result = backend_read(fuse->export->backend, from, some, buffers_one(&iov), 0);
    }
    if (result < 0) {
        fuse_reply_err(request, -result);
    } else {
        fuse_reply_buf(request, memory, some);
    }
    g_free(memory);
}

static unsigned write_flags(const struct fuse_export *fuse)
{
    return fuse->export->writethrough ? REQUEST_FUA : 0;
}

static void on_write(fuse_req_t request, fuse_ino_t inode, const char *data, size_t bytes, off_t offset,
                     struct fuse_file_info *file)
{
    struct fuse_export *fuse = fuse_of(request);
    struct iovec iov = {(char *)data, bytes};
    int result = make_room(fuse, (uint64_t)offset, bytes);

    if (result == 0 && bytes) {
        result = backend_write(fuse->export->backend, (uint64_t)offset, bytes, buffers_one(&iov), write_flags(fuse));
    }
    if (result < 0) {
        fuse_reply_err(request, -result);
    } else {
        fuse_reply_write(request, bytes);
    }
}

static bool export_goes_on(const void *argument)
{
    const struct export *export = argument;

    return !atomic_load(&export->ending);
}

static int coroutine_fn write_zeroes(struct fuse_export *fuse, uint64_t offset, uint64_t bytes, unsigned flags)
{
    struct range_work work = {.backend = fuse->export->backend,
                              .offset = offset,
                              .bytes = bytes,
                              .flags = flags | write_flags(fuse),
                              .goes_on = export_goes_on,
                              .argument = fuse->export};

    return range_write_zeroes(&work);
}

static int coroutine_fn allocate(struct fuse_export *fuse, int mode, uint64_t offset, uint64_t bytes)
{
    bool keeps_size = mode & FALLOC_FL_KEEP_SIZE;
    uint64_t end = offset + bytes, size;
    int result;

    mode &= ~FALLOC_FL_KEEP_SIZE;
    if (mode != 0 && mode != FALLOC_FL_PUNCH_HOLE && mode != FALLOC_FL_ZERO_RANGE) {
        return -EOPNOTSUPP;
    }
    if (!fuse->export->writable) {
        return -EROFS;
    }
    if (bytes > INT64_MAX - offset) {
        return -EFBIG;
    }
    size = size_of(fuse);
    if (end > size && !keeps_size) {
        result = fuse_grow(fuse, end); /* what is asked for, whether writes may do it or not */
        if (result < 0) {
            return result;
        }
        size = size_of(fuse);
    }
    if (mode == 0 || offset >= size) {
        return 0;
    }
    return write_zeroes(fuse, offset, min_u64(end, size) - offset,
                        mode == FALLOC_FL_PUNCH_HOLE ? REQUEST_MAY_UNMAP : 0);
}

static void on_fallocate(fuse_req_t request, fuse_ino_t inode, int mode, off_t offset, off_t bytes,
                         struct fuse_file_info *file)
{
    bool sane = offset >= 0 && bytes > 0;

    fuse_reply_err(request, sane ? -allocate(fuse_of(request), mode, (uint64_t)offset, (uint64_t)bytes) : EINVAL);
}

static void on_fsync(fuse_req_t request, fuse_ino_t inode, int data_only, struct fuse_file_info *file)
{
    fuse_reply_err(request, -backend_flush(fuse_of(request)->export->backend));
}

/* close() of a descriptor; it is also the last moment at which an error could be told. */
static void on_flush(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *file)
{
    struct fuse_export *fuse = fuse_of(request);

    fuse_reply_err(request, fuse->export->writable ? -backend_flush(fuse->export->backend) : 0);
}

/* Where the next data, or the next hole, begin: *ret. -ENXIO: there is none. */
static int coroutine_fn seek(struct fuse_export *fuse, uint64_t from, bool data, uint64_t *ret)
{
    uint64_t size = size_of(fuse), at = from;

    if (from >= size) {
        return -ENXIO;
    }
    for (unsigned questions = 0; at < size; questions++) {
        struct extent extent;
        int result = backend_block_status(fuse->export->backend, NULL, at, size - at, &extent);
        if (result < 0) {
            return result;
        }
        bool holds = !(extent.flags & EXTENT_ZERO);
        if (holds == data || questions == SEEK_QUESTIONS_MAX) {
            break; /* after so many questions: calling it data is never wrong, nor is calling the end a hole */
        }
        at += extent.bytes;
    }
    *ret = min_u64(at, size);
    return data && at >= size ? -ENXIO : 0;
}

static void on_lseek(fuse_req_t request, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *file)
{
    uint64_t at = 0;
    bool known = whence == SEEK_DATA || whence == SEEK_HOLE;
    int result = known && offset >= 0 ? seek(fuse_of(request), (uint64_t)offset, whence == SEEK_DATA, &at) : -EINVAL;

    if (result < 0) {
        fuse_reply_err(request, -result);
    } else {
        fuse_reply_lseek(request, (off_t)at);
    }
}

const struct fuse_lowlevel_ops fuse_export_operations = {
    .init = on_init,
    .lookup = on_lookup,
    .getattr = on_getattr,
    .setattr = on_setattr,
    .open = on_open,
    .read = on_read,
    .write = on_write,
    .fallocate = on_fallocate,
    .flush = on_flush,
    .fsync = on_fsync,
    .lseek = on_lseek,
};

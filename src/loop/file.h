/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_FILE_H
#define INTERLOCK_LOOP_FILE_H

#include "base/buffers.h"
#include "base/error.h"
#include "loop/coroutine.h"
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/*
 * Files, through the loop's engine. A file may be used from several loops at the same time. All
 * offsets and lengths are bytes; all functions return 0 or a negative errno unless said.
 */
struct file;

enum file_flags {
    FILE_WRITABLE = 1 << 0,
    FILE_DIRECT = 1 << 1,    /* O_DIRECT */
    FILE_CREATE = 1 << 2,    /* O_CREAT, mode 0644 */
    FILE_EXCLUSIVE = 1 << 3, /* O_EXCL */
    FILE_TRUNCATE = 1 << 4,
    FILE_MAPPED = 1 << 5, /* written through a mapping (loop/file_map.h); -EINVAL if it is not in memory (tmpfs) */
};
struct file_info {
    uint64_t size;      /* bytes; a block device's size */
    uint64_t allocated; /* bytes on disk (st_blocks * 512) */
    bool is_block_device;
    unsigned alignment; /* of offsets and lengths: 1 unless FILE_DIRECT */
    unsigned memory_alignment;
    uint64_t device, inode; /* who it is: two opens of one file agree */
};

/* Regular files and block devices, but not the kernel's own under /proc and /sys (-EINVAL). */
int coroutine_fn file_open(const char *path, unsigned flags, struct file **ret, struct error **err);
void coroutine_fn file_close(struct file *file); /* accepts NULL */
int coroutine_fn file_info(struct file *file, struct file_info *ret);
/* Reads exactly `bytes`; what lies behind the end of the file reads as zeroes. Into a view of bytes that are elsewhere:
 * tells it where they are. */
int coroutine_fn file_read(struct file *file, uint64_t offset, uint64_t bytes, struct buffers to);
/* Writes exactly `bytes`; fua: on stable storage before it returns (RWF_DSYNC). Of bytes that are elsewhere, all, some
 * or none have been written when it fails: -ENOTSUP where that gains nothing over reading and writing them. */
int coroutine_fn file_write(struct file *file, uint64_t offset, uint64_t bytes, struct buffers from, bool fua);
int coroutine_fn file_sync(struct file *file); /* fdatasync */
/* The bytes there as the file has them in memory (FILE_MAPPED); NULL: they are to be read. They change as the file
 * does, and can be taken away: a system call on them fails with EFAULT then. Who has looked at them or handed them on
 * asks file_is_sound() before anything comes of it: false means that zeroes may have been seen in their place. Any
 * thread. */
const void *file_peek(struct file *file, uint64_t offset, size_t bytes);
bool file_is_sound(struct file *file, const void *at, size_t bytes);

enum file_allocate_mode {
    FILE_ZERO,       /* allocated zeroes: FALLOC_FL_ZERO_RANGE, or punch + allocate */
    FILE_PUNCH,      /* FALLOC_FL_PUNCH_HOLE; BLKDISCARD on a block device */
    FILE_PREALLOCATE /* plain fallocate, grows the file */
};
/* -EOPNOTSUPP where the file system cannot. Never changes the size but for FILE_PREALLOCATE and FILE_ZERO. */
int coroutine_fn file_allocate(struct file *file, enum file_allocate_mode mode, uint64_t offset, uint64_t bytes);
int coroutine_fn file_truncate(struct file *file, uint64_t size);
/* Tells the file system how to lay a file out that is empty still: without copy-on-write (no_cow), in extents of so
 * many bytes at least (0: as it likes). -EOPNOTSUPP where it cannot be told; what it could be told of the two, was. */
int coroutine_fn file_set_layout(struct file *file, bool no_cow, uint64_t extent_bytes);
/* Where the extent at `offset` ends and whether it holds data (else a hole). At or behind the end: -ENXIO. */
int coroutine_fn file_extent(struct file *file, uint64_t offset, bool *ret_data, uint64_t *ret_end);

/* Open-file-description byte locks (F_OFD_SETLK), shared. */
int coroutine_fn file_lock_shared(struct file *file, uint64_t offset, uint64_t bytes);
int coroutine_fn file_unlock(struct file *file, uint64_t offset, uint64_t bytes);
/* -EAGAIN when another open file description holds a lock there that conflicts with an exclusive one (F_OFD_GETLK);
 * *ret_offset (may be NULL) is where. 0 when nobody does. */
int coroutine_fn file_lock_test(struct file *file, uint64_t offset, uint64_t bytes, uint64_t *ret_offset);

/* Page-aligned memory for direct I/O; free() it. NULL when there is none. */
void *file_memory(size_t bytes);
/* What the paths of small control files need. */
int coroutine_fn file_unlink(const char *path);
/* Reads a small file whole (at most max bytes, else -EFBIG); g_free() the result, which has a 0 behind it. */
int coroutine_fn file_slurp(const char *path, size_t max, char **ret, size_t *ret_size);

#endif

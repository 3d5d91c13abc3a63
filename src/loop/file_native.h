/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_FILE_NATIVE_H
#define INTERLOCK_LOOP_FILE_NATIVE_H

#include "base/list.h"
#include "loop/engine.h"
#include "loop/file_map.h"
#include "loop/huge_page.h"
#include "loop/worker.h"
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

/* Files of the real engines: what file_native.c and file_memory.c share, and nobody else includes. */

/* Budget that an inline transfer takes: one unit, and one for so many bytes. */
#define BYTES_PER_UNIT (32 * KiB)

struct native_file {
    struct file file;
    int fd;
    bool memory; /* tmpfs, ramfs: no call ever waits for a device */
    bool direct;
    bool block_device;
    unsigned alignment, memory_alignment;
    struct worker_lane *reads, *writes; /* of a memory file: its long ones */
    struct worker_turn turn;            /* of a memory file: writing at length */
    atomic_uint short_writes;           /* of a memory file: those in the kernel just now */
    struct huge_pages huge;             /* of a memory file: made for copies */
    struct file_map *map;               /* of a memory file, or NULL: it is written so */
    atomic_bool nowait;                 /* RWF_NOWAIT works */
    atomic_bool durable;                /* RWF_DSYNC works */
    atomic_bool locked;                 /* it had a lock: nobody else writes when it is closed */
};

static inline struct native_file *native(struct file *file)
{
    return container_of(file, struct native_file, file);
}

static inline size_t iov_bytes(const struct iovec *iov, unsigned count)
{
    size_t bytes = 0;

    for (unsigned i = 0; i < count; i++) {
        bytes += iov[i].iov_len;
    }
    return bytes;
}

/* One call; `flags`: RWF_. Bytes, or a negative errno. Any thread. */
ssize_t native_transfer_now(int fd, bool write, const struct iovec *iov, unsigned count, uint64_t offset, int flags);

/* Of files in memory; as struct file_ops says. */
ssize_t coroutine_fn file_memory_transfer(struct native_file *file, bool write, uint64_t offset,
                                          const struct iovec *iov, unsigned count);
int coroutine_fn file_memory_copy(struct file *from, uint64_t offset, struct file *to, uint64_t to_offset,
                                  uint64_t bytes, const struct copy_aid *aid);
const void *file_memory_peek(struct file *file, uint64_t offset, size_t bytes);
bool file_memory_is_sound(struct file *file, const void *at, size_t bytes);
/* Before and after something of the file is given back: who reads in between may have known it again. */
void file_memory_forget(struct native_file *file, uint64_t offset, uint64_t bytes);

#endif

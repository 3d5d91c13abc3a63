/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_FILE_MAP_H
#define INTERLOCK_LOOP_FILE_MAP_H

#include "loop/shared_memory.h"
#include <pthread.h>
#include <stdatomic.h>
#include <sys/uio.h>

/*
 * A file in memory (tmpfs) that is used through a mapping: it is written without a system call, and without the lock
 * that lets one writer at a time into a file. What was written once stays in the process's page tables and counts as
 * its shared resident memory (RssShmem of proc_pid_status(5)) while the file is open, though the pages are the file's
 * own; so does what was read. To look at a hole through a mapping would fill it: pages are read so that are known to be
 * there.
 */
#define FILE_MAP_VIEWS 32
struct file_map {
    int fd;     /* open for reading and writing */
    char *name; /* for messages */
    pthread_mutex_t mutex;
    struct file_view {
        struct shared_memory *memory;
        uint64_t room;
        atomic_uint_fast64_t end;       /* so long was the file when we looked */
        atomic_uint_least64_t *present; /* a bit for each page that the file is known to have; NULL: no memory for it */
    } views[FILE_MAP_VIEWS];
    atomic_uint count;           /* the last one is in use, in others somebody may be writing still */
    atomic_bool over;            /* the file was cut off by others, or is full, or too large: never again */
    atomic_bool written;         /* and its time of modification does not say so yet */
    atomic_uint given_back;      /* counts file_map_forget() */
    atomic_uint rest, next_rest; /* reads of what is not known that do not ask for it: it was in vain of late */
};

void file_map_init(struct file_map *map, int fd, const char *name);
void file_map_destroy(struct file_map *map); /* nobody writes */

/* Writes all of it; false: it is to be written by a call, which also says what is wrong. Some of it may have been
 * written. Never makes the file longer. Any thread; several at once. */
bool file_map_write(struct file_map *map, uint64_t offset, const struct iovec *iov, unsigned count, size_t bytes);
/* Reads all of it, if the file has a page everywhere there; false: it is to be read by a call. Any thread. */
bool file_map_read(struct file_map *map, uint64_t offset, const struct iovec *iov, unsigned count, size_t bytes);
/* The same for who uses the bytes where they are: a pointer to them, or NULL. Who has used them asks whether they were
 * sound: else zeroes may have been seen in their place. Any thread. */
const void *file_map_peek(struct file_map *map, uint64_t offset, size_t bytes);
bool file_map_is_sound(struct file_map *map, const void *at, size_t bytes);
static inline bool file_map_is_over(struct file_map *map)
{
    return atomic_load_explicit(&map->over, memory_order_relaxed);
}
/* The file is going to lose what it has there, or has just lost it: before and after. Any thread. */
void file_map_forget(struct file_map *map, uint64_t offset, uint64_t bytes);
/* Gives the file a new time of modification, if it was written. */
void file_map_touch(struct file_map *map);
/* The file is going to be cut to this size, or has just been: before and after. */
void file_map_cut(struct file_map *map, uint64_t size);

#endif

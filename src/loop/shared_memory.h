/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_SHARED_MEMORY_H
#define INTERLOCK_LOOP_SHARED_MEMORY_H

#include "base/error.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Memory that other processes share with us by a descriptor (memfd, files in tmpfs or hugetlbfs). They can take it
 * away at any time by cutting the file off: then what we see there are zeroes, and what we write is lost, from the
 * first touch on. System calls on it fail with EFAULT. Any thread; no coroutine is needed.
 */
struct shared_memory {
    uint8_t *bytes;
    size_t size;
    /* Of shared_memory.c. */
    void *mapped;
    size_t mapped_size;
    unsigned slot;
};

/* Maps [offset, offset + size) of the file for reading and writing; size is not 0. The descriptor stays the caller's
 * and is not needed any more. */
int shared_memory_map(int fd, uint64_t offset, uint64_t size, struct shared_memory **ret, struct error **err);
/* New memory, all zeroes, and a descriptor by which to share it, which is the caller's. */
int shared_memory_create(const char *name, size_t size, struct shared_memory **ret, int *ret_fd, struct error **err);
/* Maps a part of a file, with an address that is a multiple of `size`, which is a power of two, as `offset` is one of
 * its multiples. The file may end within. NULL: it cannot be mapped. */
struct shared_memory *shared_memory_map_extent(int fd, uint64_t offset, size_t size);
/* It was taken away, and we have noticed. */
bool shared_memory_is_lost(const struct shared_memory *memory);
/* The same of these bytes of it: false if they never were taken away, though others may have been. */
bool shared_memory_has_lost(const struct shared_memory *memory, const void *at, size_t bytes);
void shared_memory_unmap(struct shared_memory *memory); /* nobody uses it any more; accepts NULL */

#endif

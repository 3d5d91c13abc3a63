/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_CACHE_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_CACHE_H

#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * A write-back cache of slices of on-disk tables (L2 tables, refcount blocks), by host offset. Slices are all of one
 * size and naturally aligned. Memory is taken slice by slice as they are used. All functions are called with the
 * image's lock held. Somebody who goes through a large image once does not fill the cache with it. A table pointer is
 * valid until the next get on the same cache.
 */
struct edge;
struct qcow2_slice;

struct qcow2_cache {
    struct edge *file;
    enum blkdebug_event on_load, on_write; /* what the file is told; set after qcow2_cache_init() */
    unsigned slice_bits;
    unsigned max_slices;
    unsigned slice_count;
    struct qcow2_slice *slices;
    unsigned room;   /* of `slices` */
    uint8_t **slabs; /* the slices' content: several next to each other, so that their alignment wastes no memory */
    unsigned slab_count, slab_bits; /* slab_bits: log2 of slices per slab */
    uint32_t *buckets;              /* index + 1 of the first slice of a chain; 0: empty */
    unsigned bucket_bits;
    unsigned passing_max, passing_count; /* of slices used for the first time */
    uint64_t *ghosts;                    /* by bucket: the offset of one that had to go, or NULL */
    uint32_t hand;                       /* of the clock that chooses whom to evict */
    uint32_t last;                       /* the slice used last */
    uint32_t *dirty;                     /* indices */
    unsigned dirty_count, dirty_room;
    /* Called when a dirty slice has to go: makes every slice clean, in the order that the image needs. NULL: slices
     * may be written one by one, at any time. */
    int (*make_clean)(void *argument);
    void *argument;
};

void qcow2_cache_init(struct qcow2_cache *cache, struct edge *file, unsigned slice_bits, unsigned max_slices);
/* Frees everything, dirty or not. */
void qcow2_cache_finish(struct qcow2_cache *cache);
/* Finds or loads the slice at `offset`; *ret is its content, in disk order. */
int coroutine_fn qcow2_cache_get(struct qcow2_cache *cache, uint64_t offset, void **ret);
/* Takes a slice without reading: its content is zeroes, and it is dirty. */
int coroutine_fn qcow2_cache_get_zeroed(struct qcow2_cache *cache, uint64_t offset, void **ret);
/* The slice returned by the last get was changed. */
void qcow2_cache_mark_dirty(struct qcow2_cache *cache);
/* Writes every dirty slice, in the order of their offsets. Those that fail stay dirty. */
int coroutine_fn qcow2_cache_write(struct qcow2_cache *cache);
/* Forgets what is cached of [offset, offset + bytes), dirty or not. */
void qcow2_cache_forget(struct qcow2_cache *cache, uint64_t offset, uint64_t bytes);
/* Forgets everything; nothing is dirty. */
void qcow2_cache_clear(struct qcow2_cache *cache);

/* Gives back the memory of slices that are clean and were not used since the last trim. Table pointers become void. */
void qcow2_cache_trim(struct qcow2_cache *cache);

#endif

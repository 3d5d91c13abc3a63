/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_REQUEST_H
#define INTERLOCK_BLOCK_REQUEST_H

#include "base/buffers.h"
#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdbool.h>
#include <stdint.h>

/*
 * The request path: the one way to do I/O on an edge. Checks the grant (one AND), range and alignment, pads and
 * serialises unaligned edges, splits at limits, falls back from write-zeroes, calls the driver. Any loop, in a
 * coroutine. Offsets and lengths in bytes; 0 or a negative errno.
 */
struct edge;
struct node;

enum request_flags {
    REQUEST_FUA = 1 << 0,
    REQUEST_MAY_UNMAP = 1 << 1,   /* write-zeroes: may deallocate */
    REQUEST_NO_FALLBACK = 1 << 2, /* write-zeroes: -ENOTSUP rather than slow */
    REQUEST_IF_UNALLOCATED =
        1 << 3, /* write, write-zeroes: only where this layer has nothing of its own; needs write-metadata
                   instead of write-data. Granularity: the format's cluster; the caller aligns. A node may have
                   grown since: what lies behind the old end in its cluster, the driver fills. */
};

/* Writes only, among the flags above: the data are stored compressed, if the format has that and the data allow it;
 * whole clusters (but for the last one), never over what is allocated already (-EIO; of a cluster that is allocated in
 * part, the data are stored as they are). -ENOTSUP where the format cannot. */
#define REQUEST_COMPRESSED (1U << 4)

enum extent_flags {
    EXTENT_DATA = 1 << 0,      /* reads need storage */
    EXTENT_ZERO = 1 << 1,      /* reads as zeroes */
    EXTENT_ALLOCATED = 1 << 2, /* decided by this layer (not by its backing) */
    EXTENT_MAPPED = 1 << 3, /* `host_offset` is valid in node->file's child; without EXTENT_ALLOCATED: an empty place */
    EXTENT_COMPRESSED = 1 << 4,
    EXTENT_END = 1 << 5,          /* this extent reaches the node's end */
    EXTENT_IN_DATA_FILE = 1 << 6, /* `host_offset` is in node->data's child */
};
struct extent {
    uint64_t bytes;
    uint64_t host_offset;
    unsigned flags;
    unsigned depth; /* chain_status(): how many layers below the start it was found; layers + 1 if nowhere */
};

/* What lies behind the child's end reads as zeroes. */
int coroutine_fn edge_read(struct edge *edge, uint64_t offset, uint64_t bytes, struct buffers to, unsigned flags);
int coroutine_fn edge_write(struct edge *edge, uint64_t offset, uint64_t bytes, struct buffers from, unsigned flags);
int coroutine_fn edge_write_zeroes(struct edge *edge, uint64_t offset, uint64_t bytes, unsigned flags);
int coroutine_fn edge_discard(struct edge *edge, uint64_t offset, uint64_t bytes);
int coroutine_fn edge_flush(struct edge *edge);
/* Moves bytes from one edge to another, if that gains something (file_write() of bytes elsewhere) and no driver between
 * needs to see them. `flags` are of the write. When it fails, be it with -ENOTSUP, some of it may have been written:
 * whoever reads and writes then finds out what is wrong, and where. */
int coroutine_fn edge_copy(struct edge *source, uint64_t offset, struct edge *target, uint64_t to, uint64_t bytes,
                           unsigned flags, const struct copy_aid *aid);
int coroutine_fn edge_block_status(struct edge *edge, uint64_t offset, uint64_t bytes, struct extent *ret);
/* Sets the size of a child: needs `attributes` and, to shrink it, `write-beneath`. Control thread, drained. */
int coroutine_fn edge_truncate(struct edge *edge, uint64_t size);
/* The same for a larger size, with what is added allocated by `mode`: image.h's grow. -ENOTSUP with an error where the
 * child cannot. Control thread, drained. */
int coroutine_fn edge_grow(struct edge *edge, uint64_t size, enum preallocation_mode mode, struct error **err);
uint64_t edge_size(const struct edge *edge);

/* One-buffer convenience. */
int coroutine_fn edge_read_memory(struct edge *edge, uint64_t offset, void *to, uint64_t bytes);
int coroutine_fn edge_write_memory(struct edge *edge, uint64_t offset, const void *from, uint64_t bytes,
                                   unsigned flags);

/*
 * Block status along the backing chain, from `node` down to, not including, `base` (NULL: to the end). Filters are
 * looked through. Unallocated everywhere: flags 0 (or EXTENT_ZERO when base is NULL: nothing below). The caller is
 * inside a request, or holds the graph still.
 */
int coroutine_fn chain_block_status(struct node *node, struct node *base, uint64_t offset, uint64_t bytes,
                                    struct extent *ret);

#endif

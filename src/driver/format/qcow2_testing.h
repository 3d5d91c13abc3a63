/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_TESTING_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_TESTING_H

#include "base/error.h"
#include "base/seeded.h"
#include "loop/coroutine.h"
#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * For tests and fuzz targets: a disk in memory whose power can be cut, a graph to open images in, and the peer's
 * tools. Nothing here is in the daemon.
 */
struct graph;
struct node;
struct backend;

/* What is in a memory disk: as seen now, as it was when it was last flushed, and the writes between. */
struct memory_disk {
    GMutex lock;
    GByteArray *now;
    GByteArray *stable;
    GPtrArray *log; /* of GBytes-like struct logged, internal */
    uint64_t limit; /* of its size; writes behind it fail with -ENOSPC */
    /* Changes (writes, discards, flushes) are counted; those numbered from fail_first to before fail_end write half of
     * what they should and fail with fail_code. */
    uint64_t changes, fail_first, fail_end;
    int fail_code;
    bool yields; /* requests take several turns of the loop */
    bool zeroes; /* what is discarded reads as zeroes, as holes do */
    bool keeps_log;
    uint64_t random;
};
struct memory_disk *memory_disk_create(const void *content, uint64_t bytes, uint64_t limit);
void memory_disk_destroy(struct memory_disk *disk);
/* Puts a node over the disk into the graph, writable; the caller's reference. */
struct node *coroutine_fn memory_disk_open(struct memory_disk *disk, struct graph *graph, const char *name);
/* What a power cut now could leave: all that was flushed, and any sectors of what was not. g_byte_array_unref() it. */
GByteArray *memory_disk_cut(struct memory_disk *disk, uint64_t seed);

/* Drivers file, raw, qcow2. */
void testing_register_drivers(void);
/* Opens what the options (JSON) say; aborts the test on an error if `err` is NULL. */
struct node *coroutine_fn testing_add(struct graph *graph, struct error **err, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* A backend on the node that may do everything. */
struct backend *coroutine_fn testing_backend(struct graph *graph, struct node *node);

bool testing_have_peer(void); /* false: skips the test, loudly */
/* Runs a command; returns its exit status. With `must`, any but 0 fails the test, showing its output. */
int testing_run(bool must, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* A directory for this process, removed by testing_remove_directory(). */
const char *testing_directory(void);
void testing_remove_directory(void);

/* A generator of one's own, so that a seed says all. */
static inline uint64_t testing_random(uint64_t *state)
{
    return seeded_next(state);
}

#endif

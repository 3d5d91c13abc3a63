/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_CREATE_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_CREATE_H

#include "base/error.h"
#include "loop/coroutine.h"
#include <stdbool.h>
#include <stdint.h>

struct edge;

struct qcow2_create_options {
    uint64_t size;          /* of the guest's disk, bytes */
    unsigned version;       /* 2 or 3; 0: 3 */
    unsigned cluster_bits;  /* 9..21; 0: 16 */
    unsigned refcount_bits; /* 1..64; 0: 16 */
    bool lazy_refcounts;
    const char *backing_file, *backing_format; /* or NULL */
};

/* Writes a new, empty image into an empty file and flushes it. */
int coroutine_fn qcow2_create(struct edge *file, const struct qcow2_create_options *options, struct error **err);

#endif

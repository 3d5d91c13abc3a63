/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_CREATE_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_CREATE_H

#include "base/error.h"
#include "block/image.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdbool.h>
#include <stdint.h>

/* Making an empty image. */
struct edge;
struct graph;
struct qcow2_header;

struct qcow2_create_options {
    uint64_t size;          /* of the guest's disk, bytes */
    unsigned version;       /* 2 or 3; 0: 3 */
    unsigned cluster_bits;  /* 9..21; 0: 16 */
    unsigned refcount_bits; /* 1..64; 0: 16 */
    bool lazy_refcounts;
    bool extended_l2;
    enum qcow2_compression_type compression_type;
    enum preallocation_mode preallocation;
    const char *backing_file, *backing_format; /* or NULL */
    struct edge *data;                         /* the external data file, or NULL */
    const char *data_name; /* for the header; only with `data` (or when there is nothing to write) */
    bool data_raw;
    const struct crypto_create_options *encrypt; /* or NULL */
};

/* Writes a new, empty image into an empty file and flushes it. With an external data file: gives that its size, after
 * emptying it unless it is to be valid as a raw image. */
int coroutine_fn qcow2_create(struct edge *file, const struct qcow2_create_options *options, struct error **err);

/* The options of QMP; *ret borrows. `data` is left NULL. -EINVAL for what is no number in range. */
int qcow2_create_options_from(const struct blockdev_create_options_qcow2 *from, struct qcow2_create_options *ret,
                              struct error **err);
/* Fills defaults in and checks everything that does not need the files; *ret_header has what the header will say but
 * for offsets, strings and extensions. Pure. */
int qcow2_create_resolve(const struct qcow2_create_options *options, struct qcow2_header *ret_header,
                         struct error **err);
/* Whether there will be L2 tables that show every cluster. */
bool qcow2_create_maps_all(const struct qcow2_create_options *options);

/* image_driver.create and .options. */
int coroutine_fn qcow2_image_create(struct graph *graph, const struct blockdev_create_options *options,
                                    struct error **err);
extern const struct image_option qcow2_image_options[];
/* image_driver.measure. */
int coroutine_fn qcow2_measure(const struct blockdev_create_options *options, struct backend *source,
                               struct block_measure_info *ret, struct error **err);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_BITMAP_DIRECTORY_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_BITMAP_DIRECTORY_H

#include "driver/format/qcow2_format.h"
#include "loop/coroutine.h"
#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * The directory of bitmaps in the image, and the header extension that leads to it (specification, "Bitmaps
 * extension"). In coroutines; the image's lock is held.
 */
struct bitmap;
struct qcow2;

/* An entry of the directory on disk. */
struct qcow2_bitmap_record {
    char *name;
    uint64_t place; /* of the entry, in the file */
    uint64_t table_offset;
    uint32_t table_entries;
    uint32_t flags; /* as on disk */
    uint8_t type;
    uint8_t granularity_bits;
    uint8_t *extra; /* extra_size bytes, kept as they are */
    uint32_t extra_size;
    bool ours;             /* its table was written since the image was opened */
    struct bitmap *bitmap; /* the node's, or NULL: one that we only keep */
};
struct qcow2_bitmap_record *qcow2_bitmap_record_create(const char *name);
void qcow2_bitmap_record_free(void *record);
/* One that we know how to read: a dirty bitmap without unknown flags or extra data that forbid it. */
bool qcow2_bitmap_record_is_known(const struct qcow2_bitmap_record *record);

/* What the header shows, whole; -EINVAL: it makes no sense. *ret are struct qcow2_bitmap_record, freed with the array.
 * None if there is no directory, or its bit among the autoclear bits says that it is void. */
int coroutine_fn qcow2_bitmap_directory_read(struct qcow2 *image, GPtrArray **ret);
/* Writes a new directory of these records (which get their places) behind all that they lead to, and makes the header
 * show it: one write within a sector, with flushes before and behind. Refcounts are raised before the header changes.
 * On an error the old one is shown; or, if nobody knows which, the image is frozen. What only the old one led to is
 * the caller's to free, but for the directory itself. */
int coroutine_fn qcow2_bitmap_directory_write(struct qcow2 *image, GPtrArray *records);
/* Writes the flags of one record in place. Nothing is flushed. */
int coroutine_fn qcow2_bitmap_record_write_flags(struct qcow2 *image, const struct qcow2_bitmap_record *record);

#endif

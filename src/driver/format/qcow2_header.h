/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_HEADER_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_HEADER_H

#include "base/error.h"
#include "driver/format/qcow2_format.h"
#include "loop/coroutine.h"
#include <stdbool.h>
#include <stdint.h>

/* The header cluster: parsed, checked, written. Coroutines that run alone (open, close, or under the image's lock). */
struct edge;

/* One that is kept as it is when the header is rewritten. */
struct qcow2_extension {
    uint32_t type, length;
    uint8_t *data;
};

struct qcow2_header {
    unsigned version;
    unsigned cluster_bits;
    uint64_t size;
    uint32_t l1_size; /* entries */
    uint64_t l1_offset;
    uint64_t refcount_table_offset;
    uint32_t refcount_table_clusters;
    uint32_t snapshot_count;
    uint64_t snapshots_offset;
    uint64_t incompatible, compatible, autoclear;
    unsigned refcount_order;
    uint32_t length; /* of the fixed part; 72 in version 2 */
    uint8_t compression_type;
    unsigned crypt_method;                 /* enum qcow2_crypt */
    uint64_t crypto_offset, crypto_length; /* of the encryption header; length 0: none */
    uint64_t backing_offset;               /* 0: no backing file */
    uint32_t backing_length;
    char *backing_file, *backing_format; /* or NULL */
    char *data_file;                     /* name of the external data file, or NULL */
    uint32_t extensions_end;             /* where the list ends on disk, its end mark included */
    struct qcow2_extension *extensions;  /* all but the backing format and the end mark */
    unsigned extension_count;
    struct qcow2_disk_bitmaps bitmaps; /* host byte order; bitmap_count 0: none */
};

/*
 * Parses and checks the first `bytes` of the file (its first cluster, or 4 KiB to learn how large that is; what is
 * behind the file's end is zeroes). file_size bounds what the header may point at. No I/O.
 */
int qcow2_header_parse(const uint8_t *data, uint64_t bytes, uint64_t file_size, struct qcow2_header *ret,
                       struct error **err);
/* Reads, parses and checks; refuses what this driver does not support, by name. for_check: takes refcount and snapshot
 * tables that cannot be. */
int coroutine_fn qcow2_header_read(struct edge *file, bool for_check, struct qcow2_header *ret, struct error **err);
void qcow2_header_clear(struct qcow2_header *header);

/* Lays the header cluster out: sector-atomic where it fits, see qcow2_header.c. `to` has a cluster's size, zeroed.
 * *ret_name_offset: where the backing string went. -ENOSPC when it cannot fit. */
int qcow2_header_build(const struct qcow2_header *header, const char *backing_file, const char *backing_format,
                       uint8_t *to, uint64_t *ret_name_offset);
/* The same for a new image, where no write has to be atomic: everything is kept, and may go on behind the first sector.
 */
int qcow2_header_build_new(const struct qcow2_header *header, const char *backing_file, const char *backing_format,
                           uint8_t *to);
/* Makes the backing string and format what is given (NULL: none), on stable storage. */
int coroutine_fn qcow2_header_change_backing(struct edge *file, struct qcow2_header *header, const char *backing_file,
                                             const char *backing_format, struct error **err);
/* Write one part of the fixed header in a single write within a sector; nothing is flushed. */
int coroutine_fn qcow2_header_write_incompatible(struct edge *file, const struct qcow2_header *header);
int coroutine_fn qcow2_header_write_autoclear(struct edge *file, const struct qcow2_header *header);
int coroutine_fn qcow2_header_write_refcount_table(struct edge *file, const struct qcow2_header *header);
int coroutine_fn qcow2_header_write_compatible(struct edge *file, const struct qcow2_header *header);
/* The refcount table and the width of refcounts at once. */
int coroutine_fn qcow2_header_write_refcounts(struct edge *file, const struct qcow2_header *header);
/* size, l1_size and l1_offset at once */
int coroutine_fn qcow2_header_write_size(struct edge *file, const struct qcow2_header *header);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_CENSUS_PRIVATE_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_CENSUS_PRIVATE_H

#include "driver/format/qcow2_census.h"

/* Between the files of the census. All but the first run in a coroutine. */

/* A use of all clusters that [offset, offset + bytes) touches; a finding if it is not inside the file. */
bool census_use(struct qcow2_census *census, uint64_t offset, uint64_t bytes, uint32_t times, const char *what);
/* The same for metadata: the clusters are remembered as such. */
bool census_use_metadata(struct qcow2_census *census, uint64_t offset, uint64_t bytes, enum qcow2_place place,
                         const char *what);
void census_corruption(struct qcow2_census *census, const char *format, ...) __attribute__((format(printf, 2, 3)));
void census_error(struct qcow2_census *census, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Reads metadata; behind the file's end are zeroes. False, with a finding: it cannot be read, or there is too much. */
bool coroutine_fn census_read(struct qcow2_census *census, uint64_t offset, void *to, uint64_t bytes, const char *what);
/* A table of 64-bit numbers, into host byte order; NULL like census_read(). g_free() */
uint64_t *coroutine_fn census_read_table(struct qcow2_census *census, uint64_t offset, uint64_t entries,
                                         const char *what);
/* The L2 tables that an L1 table (host byte order) shows. */
void census_count_l1(struct qcow2_census *census, const uint64_t *l1, uint64_t entries, bool active);

#define CENSUS_NOWHERE UINT64_MAX
/* Clusters of metadata to be read: `take` is called with the content of each, in any order, and does not yield. */
struct census_clusters {
    const char *name;
    uint64_t count;
    uint64_t (*offset)(const struct qcow2_census *census, uint64_t index); /* CENSUS_NOWHERE: there is none */
    void (*take)(struct qcow2_census *census, uint64_t index, const uint8_t *content);
};
void coroutine_fn census_read_clusters(struct qcow2_census *census, const struct census_clusters *what);

/* qcow2_census_tables.c */
int coroutine_fn census_load_refcounts(struct qcow2_census *census, struct error **err);
void census_count_blocks(struct qcow2_census *census);
void coroutine_fn census_count_snapshots(struct qcow2_census *census);
void coroutine_fn census_count_bitmaps(struct qcow2_census *census);

#endif

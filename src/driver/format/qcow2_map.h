/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_MAP_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_MAP_H

#include "driver/format/qcow2_entry.h"
#include "loop/coroutine.h"
#include <stdbool.h>
#include <stdint.h>

/* The L1 and L2 tables: where guest clusters are. In a coroutine, the image's lock held. */
/* A stretch of guest clusters, or subclusters, of one kind, contiguous on the host if they have a place there. */
struct qcow2_run {
    enum qcow2_kind kind;
    bool copied;              /* ours alone: may be written in place */
    uint64_t bytes;           /* from the offset asked for */
    bool placed;              /* there is a host cluster; of QCOW2_UNALLOCATED: for other subclusters of the cluster */
    uint64_t host_offset;     /* of that offset, in the file of qcow2_data_edge(); 0 if not placed */
    struct qcow2_entry entry; /* of the first cluster */
};
/* `bytes` > 0 inside the image. Compressed clusters come one by one. */
int coroutine_fn qcow2_lookup(struct qcow2 *image, uint64_t offset, uint64_t bytes, struct qcow2_run *ret);

/* The L2 entry of `offset`, for changing: makes the table, or a copy of our own of a shared one. *ret are *ret_count
 * entries (qcow2_entry.h), up to the end of the slice; valid until the next use of the L2 cache. After a change:
 * qcow2_map_changed(). */
int coroutine_fn qcow2_l2_for_write(struct qcow2 *image, uint64_t offset, void **ret, unsigned *ret_count);
/* leans_on_new: the entries lean on data or refcounts that may not be stable. */
void qcow2_map_changed(struct qcow2 *image, bool leans_on_new);
/* Guest bytes from `offset` that no L2 table covers; 0 if one does at `offset`. */
uint64_t qcow2_unmapped_span(struct qcow2 *image, uint64_t offset, uint64_t bytes);
void qcow2_l1_changed(struct qcow2 *image, uint64_t index);
/* May the cluster at `guest` (a cluster's offset) have this entry? `kind`: of the entry or of one of its subclusters.
 */
bool qcow2_entry_is_possible(const struct qcow2 *image, struct qcow2_entry entry, enum qcow2_kind kind, uint64_t guest);
/* Drops what `entry` used: for an entry that is replaced. */
void qcow2_free_entry(struct qcow2 *image, struct qcow2_entry entry, bool discard);

#endif

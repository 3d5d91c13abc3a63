/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_SWITCH_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_SWITCH_H

#include "loop/coroutine.h"
#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * A change of all that hangs on the header at once: the active L1 table, the refcounts, the snapshot table. It is built
 * in clusters that nothing on disk refers to, and shown by one write inside one sector (qcow2_switch.c). In a
 * coroutine; the node is drained, and the image's lock is held from begin to commit or abort.
 */
struct qcow2;

/* What the header shows afterwards. */
struct qcow2_switch_target {
    uint64_t size; /* of the disk */
    uint64_t l1_offset;
    uint32_t l1_size; /* entries */
    uint32_t snapshot_count;
    uint64_t snapshots_offset;
};

struct qcow2_switch {
    struct qcow2 *image;
    uint64_t *old_table; /* the refcount table on disk, host byte order */
    uint32_t old_entries;
    GByteArray *moved; /* by index of the table: the block stands in a new place */
    GArray *in_use;    /* uint64_t: clusters of tables, sorted; they are not taken whatever their refcounts say */
    GArray *taken;     /* struct qcow2_free_run */
    GArray *pending;   /* struct qcow2_switch_change: refcounts to be changed yet */
    GArray *freed;     /* struct qcow2_free_run */
    uint64_t cursor;   /* no cluster below is free any more */
};

/* Everything is flushed first; takes the lock on success. */
int coroutine_fn qcow2_switch_begin(struct qcow2 *image, struct qcow2_switch *change);
/* Contiguous clusters, for new tables; their refcount will be 1. */
int coroutine_fn qcow2_switch_take(struct qcow2_switch *change, uint64_t clusters, uint64_t *ret_offset);
/* One more use of a cluster that was taken. */
void qcow2_switch_share(struct qcow2_switch *change, uint64_t offset);
/* Of all clusters that the range touches; those that fall to 0 are free afterwards. -ERANGE: does not fit the width;
 * -EIO: below 0, the image is corrupt. */
int coroutine_fn qcow2_switch_add(struct qcow2_switch *change, uint64_t offset, uint64_t bytes, int delta);
/* As it will be. */
int coroutine_fn qcow2_switch_get(struct qcow2_switch *change, uint64_t offset, uint64_t *ret);
/* Shows everything. `l1` (host byte order, target->l1_size entries) becomes the image's, whatever the outcome. On an
 * error the image is as before, or, if nobody knows what the header shows, frozen. `discard`: freed clusters, down to
 * the file. Ends the switch and releases the lock. */
int coroutine_fn qcow2_switch_commit(struct qcow2_switch *change, const struct qcow2_switch_target *target,
                                     uint64_t *l1, bool discard);
/* Ends it with nothing done, and releases the lock. */
void coroutine_fn qcow2_switch_abort(struct qcow2_switch *change);

#endif

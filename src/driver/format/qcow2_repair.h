/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_REPAIR_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_REPAIR_H

#include "driver/format/qcow2_census.h"

/*
 * The steps of a repair, each of which leaves an image that is no worse if it is the last; qcow2_check.c has their
 * order. In a coroutine, alone; `census` is of the image as it is.
 */
struct qcow2_repair {
    struct qcow2 *image;
    struct qcow2_census *census;
    uint64_t end;                          /* cluster index: from here on nothing is in use, nor behind */
    GHashTable *copies;                    /* of a cluster, see qcow2_repair_tables.c: where its content is copied to */
    uint64_t l1_moved_to;                  /* offset; 0: it stays */
    bool complete_extra;                   /* snapshots get the extra data that version 3 wants, in version 2 too */
    uint64_t snapshots_to, snapshots_room; /* of a new snapshot table; 0: none */
    struct error **err;
};
void qcow2_repair_init(struct qcow2_repair *repair, struct qcow2_census *census, struct error **err);
void qcow2_repair_finish(struct qcow2_repair *repair);
/* Clusters behind everything else, counted as used once; their index. */
uint64_t qcow2_repair_take(struct qcow2_repair *repair, uint64_t clusters);

/* qcow2_repair_tables.c */
/* Copies what has to be in a place of its own, and takes room for it. Changes nothing that anybody sees. */
int coroutine_fn qcow2_repair_prepare(struct qcow2_repair *repair);
/* Corrects all entries that cannot be; refcounts of what they are to show are stable. */
int coroutine_fn qcow2_repair_tables(struct qcow2_repair *repair);
/* Makes the COPIED flags of the active tables what the counts say, which are the refcounts on disk now. */
int coroutine_fn qcow2_repair_flags(struct qcow2_repair *repair);

/* qcow2_repair_snapshots.c. Takes room for what has to move. */
void qcow2_repair_prepare_snapshots(struct qcow2_repair *repair);
int coroutine_fn qcow2_repair_snapshots(struct qcow2_repair *repair);
/* The entries of an L1 table (host byte order) corrected; whether any was. */
bool qcow2_repair_l1_entries(struct qcow2_repair *repair, uint64_t *l1, uint64_t entries);

/* qcow2_repair_refcounts.c: makes the refcounts what was counted, or raises those that are too low. */
int coroutine_fn qcow2_repair_refcounts(struct qcow2_repair *repair, bool raise_only);
/* Refcounts of 2^order bits, in new structures that one write of the header shows. -ERANGE: one does not fit. On
 * another error nobody may know which ones the header shows. */
int coroutine_fn qcow2_repair_refcount_width(struct qcow2_repair *repair, unsigned order);

#endif

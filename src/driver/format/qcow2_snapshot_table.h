/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_SNAPSHOT_TABLE_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_SNAPSHOT_TABLE_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <glib.h>
#include <stdint.h>

/* The table of snapshots inside an image, as it is on disk (specification, "Snapshots"). */
struct qcow2;

struct qcow2_snapshot {
    char *id, *name;
    uint64_t l1_offset;
    uint32_t l1_size; /* entries */
    uint32_t date_s, date_ns;
    uint64_t vm_clock_ns;
    uint64_t vm_state_size; /* bytes */
    uint64_t disk_size;     /* bytes; of one that does not say: the image's */
    bool has_icount;
    uint64_t icount;
    uint8_t *extra; /* all extra data, known and unknown */
    uint32_t extra_size;
};

struct qcow2_snapshot_table {
    GPtrArray *snapshots; /* struct qcow2_snapshot, freed with it */
    uint64_t bytes;       /* on disk, as it was read */
};

/* Reads and checks the table; takes no lock. The image's lock is held, or nobody changes the table. */
int coroutine_fn qcow2_snapshot_table_read(struct qcow2 *image, struct qcow2_snapshot_table *ret, struct error **err);
void qcow2_snapshot_table_clear(struct qcow2_snapshot_table *table);
/* By its id, or else by its name; NULL: none. */
struct qcow2_snapshot *qcow2_snapshot_find(const struct qcow2_snapshot_table *table, const char *name);
/* An id that none of them has; g_free(). */
char *qcow2_snapshot_new_id(const struct qcow2_snapshot_table *table);
/* One that is in no table. `info` says all but id and places. */
struct qcow2_snapshot *qcow2_snapshot_create(const struct snapshot_info *info, char *id, uint64_t disk_size);
void qcow2_snapshot_free(struct qcow2_snapshot *snapshot);
struct snapshot_info *qcow2_snapshot_describe(const struct qcow2_snapshot *snapshot);
/* The table as it is to be on disk. -EFBIG: too long. */
int qcow2_snapshot_table_build(const struct qcow2_snapshot_table *table, GByteArray **ret);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_CENSUS_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_CENSUS_H

#include "driver/format/qcow2.h"
#include "driver/format/qcow2_entry.h"
#include "driver/format/qcow2_tally.h"

/*
 * What is in an image: every use of every cluster of its file, what the refcounts on disk say, and everything found to
 * be wrong on the way. It reads the file, not what is in memory of it, and changes nothing. Runs alone, in a coroutine:
 * nobody uses the image, and nothing of it is unwritten.
 */
enum { QCOW2_FINDINGS_SHOWN = 100, QCOW2_CENSUS_SPARE = 1 << 18 };

struct qcow2_findings {
    uint64_t errors;      /* what could not be looked at */
    uint64_t corruptions; /* without those that show in refcounts only */
    GPtrArray *lines;     /* char *, the first QCOW2_FINDINGS_SHOWN of all kinds */
};

/* An L2 table. */
struct qcow2_census_table {
    uint64_t offset;      /* what the L1 entries say, without flags and reserved bits; may be anything */
    uint64_t guest;       /* offset of what its first entry shows, by the L1 entry found first */
    uint32_t uses;        /* by all L1 tables */
    uint32_t active_uses; /* by the one in use */
    bool broken;          /* has entries that cannot be, or that refer to metadata */
};

enum qcow2_place {
    QCOW2_PLACE_HEADER,
    QCOW2_PLACE_REFCOUNT_TABLE,
    QCOW2_PLACE_REFCOUNT_BLOCK,
    QCOW2_PLACE_L1,
    QCOW2_PLACE_L2,
    QCOW2_PLACE_SNAPSHOT_TABLE,
    QCOW2_PLACE_SNAPSHOT_L1,
    QCOW2_PLACE_BITMAPS,
    QCOW2_PLACE_ENCRYPTION,
};
/* Clusters of the file that hold metadata. */
struct qcow2_metadata_run {
    uint64_t first, count;
    uint32_t uses; /* that are rightful: 1, or as many as L1 tables show an L2 table */
    enum qcow2_place place;
};

/* A snapshot as the table has it. */
struct qcow2_census_snapshot {
    uint64_t at; /* in the table */
    uint64_t l1_offset;
    uint32_t l1_size;
    uint64_t moved_to; /* by a repair; 0: it stays */
    bool unusable;     /* its L1 table cannot be where it should */
    bool broken;       /* has entries in that table that cannot be */
};

struct qcow2_census {
    struct qcow2 *image;
    struct edge *file;
    struct qcow2_findings *findings;
    uint64_t file_bytes;
    uint64_t clusters;       /* of the file, the last one as if it were whole */
    uint64_t memory, reads;  /* bytes left, see qcow2_census.c */
    struct qcow2_tally uses; /* has room for clusters that a repair adds behind the file's end */
    struct qcow2_tally refcounts;
    uint64_t *refcount_table; /* host byte order, as on disk */
    uint64_t refcount_entries;
    uint64_t *l1;            /* host byte order, as on disk */
    GArray *tables;          /* struct qcow2_census_table, those of the active L1 table first */
    GHashTable *by_offset;   /* of a table: its index + 1 */
    GArray *metadata;        /* struct qcow2_metadata_run; in order once the census is taken */
    GArray *snapshots;       /* struct qcow2_census_snapshot */
    uint64_t snapshot_bytes; /* of the table, as far as it makes sense */
    uint64_t allocated, fragmented, compressed;
    uint64_t longest_run; /* of metadata, in clusters */
    uint64_t wrong_flags; /* COPIED, in L2 tables */
    bool data_file;       /* guest data are elsewhere, and not counted */

    /* What has to be repaired. */
    bool overlaps;         /* metadata have other uses */
    bool refcounts_broken; /* the table or a block: cannot be corrected in place */
    bool l1_broken;
    bool l1_misplaced; /* shares a cluster with something else */
    bool snapshots_broken;
    bool snapshots_misplaced;
    bool bitmaps_broken;
};

/* Counts everything. An error only if nothing can be said at all (memory, the refcount table cannot be read). */
int coroutine_fn qcow2_census_take(struct qcow2_census *census, struct qcow2 *image, struct qcow2_findings *findings,
                                   struct error **err);
void qcow2_census_finish(struct qcow2_census *census); /* twice is once */

/* Does the cluster hold metadata; other ones than an L2 table? The census is taken. */
bool qcow2_census_is_metadata(const struct qcow2_census *census, uint64_t cluster, bool not_l2);
/* Whether [offset, offset + bytes) is inside the file, or less than a cluster behind it. */
bool qcow2_census_inside(const struct qcow2_census *census, uint64_t offset, uint64_t bytes);
/* Whether the descriptor's flag says what refcounts do: `refcount` is that of its cluster. */
static inline bool qcow2_flag_is_right(uint64_t descriptor, uint32_t refcount)
{
    return ((descriptor & QCOW2_COPIED) != 0) == (refcount == 1);
}
/* Is anything wrong with the entry that is not a matter of refcounts? The census may be under way. */
bool qcow2_entry_is_wrong(const struct qcow2_census *census, struct qcow2_entry entry);

void qcow2_findings_init(struct qcow2_findings *findings);
void qcow2_findings_finish(struct qcow2_findings *findings);
/* One line for people; drops it if there are enough. */
void qcow2_findings_add(struct qcow2_findings *findings, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_H

#include "base/list.h"
#include "block/driver.h"
#include "driver/format/qcow2_cache.h"
#include "driver/format/qcow2_header.h"
#include "loop/sync.h"
#include <glib.h>

/*
 * The state of an open qcow2 image. qcow2.c has the driver table and the reading order of the files.
 *
 * One lock guards the metadata, in memory and on disk; it is held over lookups, allocation and metadata I/O, never
 * over guest data. What makes that safe:
 *
 * 1. An allocation in flight (struct qcow2_allocation) covers guest clusters whose data are being written to a place
 *    that no L2 entry shows yet. Whoever wants to change those clusters' mapping waits until it is over.
 * 2. I/O on a host cluster outside the lock is counted in an epoch, entered with the lock held, after the lookup.
 *    A host cluster that lost its last use here is put on the list `freed`, and keeps its refcount until (a) the
 *    tables that no longer show it are on stable storage, and (b) every epoch in which it could be seen has ended.
 *    Only then is its refcount lowered, so that it can be reused.
 * 3. So refcounts on disk are only ever raised ahead of what the tables need, and metadata are written in one order:
 *    refcounts and data, barrier, L2 tables, barrier, L1 table, (barrier), lowered refcounts. A crash between any
 *    two leaves clusters leaked at most.
 *
 * Lazy refcounts are accepted, made, amended and repaired, and not practised: refcounts are kept in memory anyway until
 * a barrier or the guest's flush, and are then written in order with everything else, so the dirty bit would save a
 * write of a few blocks per flush and cost a count of the whole image after every crash. An image that says
 * lazy_refcounts and was left dirty by somebody else is counted before it is opened for writing (qcow2_check.c).
 */
struct qcow2_codecs;

struct qcow2_options {
    bool pass_discard;          /* of clusters that a discard freed, down to the file */
    bool pass_discard_snapshot; /* of clusters that a change of snapshots freed */
    bool pass_discard_other;    /* of clusters freed otherwise */
    bool discard_no_unref;      /* what is discarded keeps its host cluster */
    uint64_t l2_cache_bytes;    /* 0: not given; also below */
    uint64_t l2_entry_bytes;    /* of the L2 cache, a slice of a table */
    uint64_t refcount_cache_bytes;
    uint64_t cache_bytes;
    int64_t trim_interval_ns; /* of the caches; 0: never */
};

/* See 1. */
struct qcow2_allocation {
    struct list link;       /* qcow2.allocations */
    uint64_t offset, bytes; /* of the guest; whole clusters */
    struct co_queue waiters;
};

/* See 2. */
struct qcow2_freed {
    uint64_t offset, clusters;
    uint64_t epoch;      /* at the time it was freed */
    uint64_t generation; /* likewise */
    bool discard;        /* pass it down */
};

/* Clusters by index. */
struct qcow2_free_run {
    uint64_t first, count;
};

struct qcow2 {
    struct node *node;
    struct qcow2_options options;
    struct qcow2_header header; /* what is on disk, but for unwritten parts */
    unsigned cluster_bits;
    uint64_t cluster_size;
    unsigned entry_bits;      /* log2 of the bytes of an L2 entry: 3, or 4 (extended) */
    unsigned l2_bits;         /* log2 of entries per L2 table */
    unsigned subcluster_bits; /* what an L2 entry tells apart; cluster_bits without extended L2 entries */
    uint64_t subcluster_size;
    bool external;     /* standard clusters are in a data file, at their guest offsets; nothing of it is refcounted */
    bool external_raw; /* ... which is a valid raw image at every moment */
    uint64_t autoclear_kept; /* autoclear bits that need not be cleared before writing: they are kept true */

    struct co_mutex lock; /* of all below, but for the atomic members */
    uint64_t *l1;         /* host byte order, header.l1_size entries */
    uint8_t *l1_dirty;    /* one byte per 64 entries (a sector) */
    unsigned l1_dirty_count;
    uint64_t *refcount_table; /* host byte order */
    uint32_t refcount_table_entries;
    uint32_t refcount_dirty_first, refcount_dirty_end; /* entries of the table to be written; empty: first = end */
    unsigned refcount_block_bits;                      /* log2 of refcounts per block */
    struct qcow2_cache l2_cache;
    struct qcow2_cache refcount_cache;

    GArray *known_free;         /* struct qcow2_free_run, all below free_hint */
    uint64_t free_hint;         /* cluster index: none below is free */
    uint64_t slice_checked;     /* of refcounts, its number + 1: shows no table in use as free */
    uint64_t clean_from;        /* host offset: from here on the file was never written, so reads as zeroes */
    uint64_t data_clean_from;   /* the same of the data file */
    bool barrier_wanted;        /* dirty L2 entries lean on data or refcounts that may not be stable yet */
    uint64_t change_count;      /* counts what sets barrier_wanted */
    uint64_t generation;        /* of writing L2 and L1 out; what is freed now gets on disk with this one */
    uint64_t stable_generation; /* all up to this one are on stable storage */
    GArray *freed;              /* struct qcow2_freed */
    uint64_t freed_clusters;
    uint64_t settle_at; /* freed_clusters that ask for qcow2_settle() */
    atomic_bool settle_wanted;
    bool settling;
    bool holes_known, holes; /* holes: the file has some where tables show data; qcow2_status.c */
    int64_t trimmed_at_ns;
    unsigned overlap_places;    /* qcow2_overlap.c: what is checked because somebody asked; 0: nothing more */
    GArray *overlap_runs;       /* struct qcow2_metadata_run, or NULL */
    uint64_t overlap_directory; /* of bitmaps, when the runs were found */
    bool frozen;                /* the header may or may not show the newest tables: nothing may be written any more */

    uint64_t compressed_next; /* host offset of the next compressed cluster; 0: in a new host cluster */

    struct qcow2_crypto *crypto; /* NULL: not encrypted */
    struct qcow2_codecs *codecs; /* has a lock of its own */
    GPtrArray *bitmaps;          /* struct qcow2_bitmap_record: those in the image, in the order of its directory */
    bool bitmaps_unstable;       /* marks of theirs were written and not flushed yet */
    bool bitmaps_ours;           /* their directory was written since the image was opened */
    bool bitmaps_seen_through;   /* qcow2_bitmap_trust.c has looked: */
    bool bitmaps_trusted;        /* clusters of those that were found, and of their directory, are nobody else's */

    struct list allocations;
    uint64_t epoch;
    atomic_uint inflight[2]; /* by parity of the epoch */
    atomic_bool prepared;    /* autoclear bits on disk are what they must be for a writer */
    atomic_bool corrupt;     /* found so; no more writes */
    bool corrupt_logged;
    bool shows_snapshot; /* the tables in memory are a snapshot's: not to be written */
};

/* The image is inconsistent: logs the first time, refuses writes from now on, sets the corrupt bit on disk if
 * possible. Returns -EIO. The lock is held. */
int coroutine_fn qcow2_mark_corrupt(struct qcow2 *image, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* After a repair: forgets the tables and loads them from disk. Nothing is dirty, and nobody else uses the image. */
int coroutine_fn qcow2_reload_tables(struct qcow2 *image, struct error **err);
/* Whether [offset, offset + bytes) of the file runs into the header, the L1 table in use, or the refcount table. */
bool qcow2_overlaps_metadata(const struct qcow2 *image, uint64_t offset, uint64_t bytes);

/* See 2. enter: the lock is held; returns what leave wants. */
static inline unsigned qcow2_epoch_enter(struct qcow2 *image)
{
    unsigned parity = image->epoch & 1;
    atomic_fetch_add_explicit(&image->inflight[parity], 1, memory_order_relaxed);
    return parity;
}
static inline void qcow2_epoch_leave(struct qcow2 *image, unsigned parity)
{
    atomic_fetch_sub_explicit(&image->inflight[parity], 1, memory_order_release);
}

/* The edge where the data of standard clusters are. NULL: a data file that is not open, so nothing is to be read or
 * written. */
static inline struct edge *qcow2_data_edge(const struct qcow2 *image)
{
    return image->external ? image->node->data : image->node->file;
}

static inline uint64_t qcow2_cluster_floor(const struct qcow2 *image, uint64_t offset)
{
    return offset & ~(image->cluster_size - 1);
}
static inline uint64_t qcow2_cluster_ceiling(const struct qcow2 *image, uint64_t offset)
{
    return qcow2_cluster_floor(image, offset + image->cluster_size - 1);
}
static inline uint64_t qcow2_in_cluster(const struct qcow2 *image, uint64_t offset)
{
    return offset & (image->cluster_size - 1);
}

#endif

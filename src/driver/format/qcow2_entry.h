/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_ENTRY_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_ENTRY_H

#include "driver/format/qcow2.h"
#include <endian.h>

/*
 * L2 entries: what they say. Pure, from any context. Specification: "L2 table entry", "Extended L2 Entries".
 *
 * An entry is 8 bytes, or 16 in images with extended L2 entries, where a cluster has 32 subclusters. Elsewhere a
 * cluster has one subcluster, itself. With an external data file a cluster's place is its guest offset, 0 included.
 */
enum qcow2_kind {
    QCOW2_UNALLOCATED,
    QCOW2_PLAIN_ZERO,     /* zeroes, no host cluster */
    QCOW2_ALLOCATED_ZERO, /* zeroes, and a host cluster kept for later */
    QCOW2_DATA,
    QCOW2_COMPRESSED_DATA,
    QCOW2_INVALID,
};

/* In host byte order. */
struct qcow2_entry {
    uint64_t descriptor;
    uint64_t subclusters; /* bitmap: allocated in the low half, zero in the high half; 0 in entries of 8 bytes */
};
#define QCOW2_SUBCLUSTERS 32
#define QCOW2_ALL_ALLOCATED UINT64_C(0x00000000ffffffff)
#define QCOW2_ALL_ZERO UINT64_C(0xffffffff00000000)

/* One of the entries of a table, or of a part of it; `entries` in disk order. */
static inline struct qcow2_entry qcow2_entry_load(const struct qcow2 *image, const void *entries, uint64_t index)
{
    const uint64_t *words = entries;
    if (image->entry_bits == 3) {
        return (struct qcow2_entry){be64toh(words[index]), 0};
    }
    return (struct qcow2_entry){be64toh(words[2 * index]), be64toh(words[2 * index + 1])};
}
static inline void qcow2_entry_store(const struct qcow2 *image, void *entries, uint64_t index, struct qcow2_entry entry)
{
    uint64_t *words = entries;
    if (image->entry_bits == 3) {
        words[index] = htobe64(entry.descriptor);
    } else {
        words[2 * index] = htobe64(entry.descriptor);
        words[2 * index + 1] = htobe64(entry.subclusters);
    }
}
static inline bool qcow2_entry_same(struct qcow2_entry a, struct qcow2_entry b)
{
    return a.descriptor == b.descriptor && a.subclusters == b.subclusters;
}
/* The bits (of the low half) of the subclusters that [from, to) of a cluster touches. */
static inline uint64_t qcow2_subcluster_mask(const struct qcow2 *image, uint64_t from, uint64_t to)
{
    unsigned first = from >> image->subcluster_bits;
    unsigned end = (to + image->subcluster_size - 1) >> image->subcluster_bits;
    return ((UINT64_C(1) << end) - 1) & ~((UINT64_C(1) << first) - 1);
}
/* Images with extended L2 entries. */
static inline bool qcow2_has_subclusters(const struct qcow2 *image)
{
    return image->subcluster_bits != image->cluster_bits;
}
/* Of a guest offset, in its cluster. */
static inline unsigned qcow2_subcluster_index(const struct qcow2 *image, uint64_t offset)
{
    return qcow2_in_cluster(image, offset) >> image->subcluster_bits;
}

/* Of the cluster as a whole: whether it has a place (DATA, ALLOCATED_ZERO), is compressed, or neither. With subclusters
 * DATA says only that there is a place, and UNALLOCATED that there is none; INVALID if one subcluster is. */
enum qcow2_kind qcow2_entry_kind(const struct qcow2 *image, struct qcow2_entry entry);
/* Of one subcluster, and of how many from there on in its cluster. */
enum qcow2_kind qcow2_subcluster_kind(const struct qcow2 *image, struct qcow2_entry entry, unsigned index);
unsigned qcow2_subcluster_run(const struct qcow2 *image, struct qcow2_entry entry, unsigned index);
static inline bool qcow2_kind_has_place(enum qcow2_kind kind)
{
    return kind == QCOW2_DATA || kind == QCOW2_ALLOCATED_ZERO;
}
static inline bool qcow2_kind_is_zero(enum qcow2_kind kind)
{
    return kind == QCOW2_PLAIN_ZERO || kind == QCOW2_ALLOCATED_ZERO;
}
/* Does a standard cluster have a host cluster, at descriptor & QCOW2_OFFSET_MASK? */
static inline bool qcow2_entry_has_place(const struct qcow2 *image, struct qcow2_entry entry)
{
    return !(entry.descriptor & QCOW2_COMPRESSED) &&
           (entry.descriptor & QCOW2_OFFSET_MASK || (image->external && entry.descriptor & QCOW2_COPIED));
}
/* Where the compressed data of an entry are; *ret_bytes rounded up to what the entry says in sectors. */
void qcow2_compressed_place(unsigned cluster_bits, uint64_t descriptor, uint64_t *ret_offset, uint64_t *ret_bytes);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_TALLY_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_TALLY_H

#include <stdbool.h>
#include <stdint.h>

/*
 * A number per cluster of a file, 0 at first: how often it is used, or what its refcount is. Pure, no locks. Memory is
 * taken where numbers are set, a byte per cluster while they are small, and charged to a budget that several tallies
 * may share.
 */
enum { QCOW2_TALLY_CHUNK_BITS = 12 };

struct qcow2_tally {
    uint64_t clusters;  /* 0 .. clusters - 1 have a number */
    uint8_t **chunks;   /* by index >> QCOW2_TALLY_CHUNK_BITS; NULL: all 0. Bytes, or 32-bit numbers if wide */
    uint8_t *wide;      /* a byte per chunk */
    uint64_t *budget;   /* bytes left */
    bool out_of_memory; /* a number could not be kept: nothing that was counted holds */
};

/* False: more clusters than can be counted, or no memory; then nothing is to be finished. */
bool qcow2_tally_init(struct qcow2_tally *tally, uint64_t clusters, uint64_t *budget);
void qcow2_tally_finish(struct qcow2_tally *tally); /* accepts a zeroed one */

void qcow2_tally_set_slowly(struct qcow2_tally *tally, uint64_t cluster, uint32_t value);

/* 0 for what is behind the end. */
static inline uint32_t qcow2_tally_get(const struct qcow2_tally *tally, uint64_t cluster)
{
    uint64_t chunk = cluster >> QCOW2_TALLY_CHUNK_BITS;
    if (cluster >= tally->clusters || !tally->chunks[chunk]) {
        return 0;
    }
    uint32_t index = cluster & ((1u << QCOW2_TALLY_CHUNK_BITS) - 1);
    return tally->wide[chunk] ? ((const uint32_t *)tally->chunks[chunk])[index] : tally->chunks[chunk][index];
}

/* Numbers above 2^32 - 1 are kept as that. `cluster` is one of the file's. */
static inline void qcow2_tally_set(struct qcow2_tally *tally, uint64_t cluster, uint64_t value)
{
    uint64_t chunk = cluster >> QCOW2_TALLY_CHUNK_BITS;
    if (value <= UINT8_MAX && tally->chunks[chunk] && !tally->wide[chunk]) {
        tally->chunks[chunk][cluster & ((1u << QCOW2_TALLY_CHUNK_BITS) - 1)] = value;
    } else {
        qcow2_tally_set_slowly(tally, cluster, value > UINT32_MAX ? UINT32_MAX : value);
    }
}

static inline void qcow2_tally_add(struct qcow2_tally *tally, uint64_t cluster, uint32_t count)
{
    qcow2_tally_set(tally, cluster, (uint64_t)qcow2_tally_get(tally, cluster) + count);
}

/*
 * The first cluster from `cluster` on, before `end`, whose chunk has numbers in `tally` or in `other` (of no more
 * clusters; or NULL), else `end`: for skipping what is all 0. It looks no further than `end`, so who goes through a
 * file piece by piece looks at each chunk once.
 */
uint64_t qcow2_tally_skip(const struct qcow2_tally *tally, const struct qcow2_tally *other, uint64_t cluster,
                          uint64_t end);

#endif

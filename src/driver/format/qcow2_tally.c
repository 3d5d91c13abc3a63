/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Numbers by cluster, in chunks of 4096 clusters that are made when the first number in them is set and widened from
 * one byte to four when a number needs it.
 *
 * 1. A hostile image may name any cluster of a sparse file, so memory is bounded by the budget, not by the file's size.
 * 2. Who runs out of it is told once, by out_of_memory, at the end of the count.
 */
#include "driver/format/qcow2_tally.h"
#include <glib.h>

#define CHUNK_CLUSTERS (UINT64_C(1) << QCOW2_TALLY_CHUNK_BITS)
#define CLUSTERS_MAX (UINT64_C(1) << 34)

static bool charge(struct qcow2_tally *tally, uint64_t bytes)
{
    if (*tally->budget < bytes) {
        tally->out_of_memory = true;
        return false;
    }
    *tally->budget -= bytes;
    return true;
}

bool qcow2_tally_init(struct qcow2_tally *tally, uint64_t clusters, uint64_t *budget)
{
    *tally = (struct qcow2_tally){.clusters = clusters, .budget = budget};
    uint64_t chunks = (clusters + CHUNK_CLUSTERS - 1) / CHUNK_CLUSTERS;
    if (clusters > CLUSTERS_MAX || !charge(tally, chunks * (sizeof(*tally->chunks) + 1))) {
        return false;
    }
    tally->chunks = g_try_new0(uint8_t *, MAX(chunks, 1));
    tally->wide = g_try_malloc0(MAX(chunks, 1));
    if (!tally->chunks || !tally->wide) {
        g_free(tally->chunks);
        g_free(tally->wide);
        return false;
    }
    return true;
}

void qcow2_tally_finish(struct qcow2_tally *tally)
{
    if (!tally->chunks) {
        return;
    }
    uint64_t chunks = (tally->clusters + CHUNK_CLUSTERS - 1) / CHUNK_CLUSTERS;
    for (uint64_t i = 0; i < chunks; i++) {
        if (tally->chunks[i]) {
            *tally->budget += CHUNK_CLUSTERS * (tally->wide[i] ? 4 : 1);
            g_free(tally->chunks[i]);
        }
    }
    *tally->budget += chunks * (sizeof(*tally->chunks) + 1);
    g_free(tally->chunks);
    g_free(tally->wide);
    *tally = (struct qcow2_tally){0};
}

static bool widen(struct qcow2_tally *tally, uint64_t chunk)
{
    uint32_t *wide = charge(tally, CHUNK_CLUSTERS * 3) ? g_try_new(uint32_t, CHUNK_CLUSTERS) : NULL;
    if (!wide) {
        tally->out_of_memory = true;
        return false;
    }
    for (uint64_t i = 0; i < CHUNK_CLUSTERS; i++) {
        wide[i] = tally->chunks[chunk][i];
    }
    g_free(tally->chunks[chunk]);
    tally->chunks[chunk] = (uint8_t *)wide;
    tally->wide[chunk] = 1;
    return true;
}

void qcow2_tally_set_slowly(struct qcow2_tally *tally, uint64_t cluster, uint32_t value)
{
    uint64_t chunk = cluster >> QCOW2_TALLY_CHUNK_BITS;
    uint64_t index = cluster & (CHUNK_CLUSTERS - 1);
    if (!tally->chunks[chunk]) {
        if (value == 0) {
            return;
        }
        tally->chunks[chunk] = charge(tally, CHUNK_CLUSTERS) ? g_try_malloc0(CHUNK_CLUSTERS) : NULL;
        if (!tally->chunks[chunk]) {
            tally->out_of_memory = true;
            return;
        }
    }
    if (value > UINT8_MAX && !tally->wide[chunk] && !widen(tally, chunk)) {
        return;
    }
    if (tally->wide[chunk]) {
        ((uint32_t *)tally->chunks[chunk])[index] = value;
    } else {
        tally->chunks[chunk][index] = value;
    }
}

static bool chunk_is_empty(const struct qcow2_tally *tally, uint64_t cluster)
{
    return cluster >= tally->clusters || !tally->chunks[cluster >> QCOW2_TALLY_CHUNK_BITS];
}

uint64_t qcow2_tally_skip(const struct qcow2_tally *tally, const struct qcow2_tally *other, uint64_t cluster,
                          uint64_t end)
{
    while (cluster < end && chunk_is_empty(tally, cluster) && (!other || chunk_is_empty(other, cluster))) {
        cluster = cluster < tally->clusters ? (cluster | (CHUNK_CLUSTERS - 1)) + 1 : end;
    }
    return cluster < end ? cluster : end;
}

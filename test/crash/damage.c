/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Damages an image on purpose. Reads no more of it than the header, the refcount table and its blocks, as the published
 * specification has them ("Qcow2 Image File Format").
 */
#include "test/crash/damage.h"
#include "base/seeded.h"
#include "driver/format/qcow2_format.h"
#include "driver/format/qcow2_refcount.h"
#include <endian.h>
#include <glib.h>
#include <string.h>

void damage_refcounts(struct sim *sim, const char *path, uint64_t seed)
{
    uint64_t size, random = seed;
    g_autofree uint8_t *data = sim_disk_get(sim, path, &size);
    struct qcow2_disk_header header;
    memcpy(&header, data, sizeof(header));
    unsigned cluster_bits = be32toh(header.cluster_bits);
    unsigned order = be32toh(header.version) == 2 ? 4 : be32toh(header.refcount_order);
    uint64_t per_block = ((uint64_t)8 << cluster_bits) >> order;
    uint64_t *table = (uint64_t *)(void *)(data + be64toh(header.refcount_table_offset));
    uint64_t clusters = size >> cluster_bits;
    for (unsigned i = 0; i < 6; i++) {
        uint64_t cluster = seeded_next(&random) % clusters;
        uint64_t block = be64toh(table[cluster / per_block]) & QCOW2_REFCOUNT_TABLE_MASK;
        if (block && block + ((uint64_t)1 << cluster_bits) <= size) {
            qcow2_refcount_store(data + block, order, cluster % per_block, seeded_next(&random) % (order ? 3 : 2));
        }
    }
    if (seeded_next(&random) % 4 == 0) {
        table[seeded_next(&random) % (clusters / per_block + 1)] = 0;
    }
    sim_disk_set(sim, path, data, size);
}

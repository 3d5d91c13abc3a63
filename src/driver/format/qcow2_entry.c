/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What an L2 entry says, without looking at anything else.
 *
 * 1. Reserved bits must be 0, and a place must be that of a cluster: anything else is invalid as a whole. That it is
 *    the right one in a data file is for those to see who know the guest offset.
 * 2. The zero flag of the descriptor exists in version 3 without subclusters only.
 * 3. A subcluster is invalid if it claims to be both data and zero, or data without a place; those beside it are not.
 */
#include "driver/format/qcow2_entry.h"
#include "base/size.h"

/* Bits that must be 0 in a standard descriptor of this image. */
static bool descriptor_is_sane(const struct qcow2 *image, uint64_t descriptor)
{
    bool zero_flag = image->header.version >= 3 && !qcow2_has_subclusters(image);
    return !(descriptor & QCOW2_L2_RESERVED) && !(descriptor & QCOW2_ZERO && !zero_flag) &&
           is_aligned(descriptor & QCOW2_OFFSET_MASK, image->cluster_size);
}

enum qcow2_kind qcow2_subcluster_kind(const struct qcow2 *image, struct qcow2_entry entry, unsigned index)
{
    if (entry.descriptor & QCOW2_COMPRESSED) {
        return QCOW2_COMPRESSED_DATA;
    }
    if (!descriptor_is_sane(image, entry.descriptor)) {
        return QCOW2_INVALID;
    }
    bool place = qcow2_entry_has_place(image, entry);
    if (!qcow2_has_subclusters(image)) {
        if (entry.descriptor & QCOW2_ZERO) {
            return place ? QCOW2_ALLOCATED_ZERO : QCOW2_PLAIN_ZERO;
        }
        return place ? QCOW2_DATA : QCOW2_UNALLOCATED;
    }
    bool allocated = entry.subclusters >> index & 1;
    bool zero = entry.subclusters >> (QCOW2_SUBCLUSTERS + index) & 1;
    if (allocated) {
        return zero || !place ? QCOW2_INVALID : QCOW2_DATA;
    }
    if (zero) {
        return place ? QCOW2_ALLOCATED_ZERO : QCOW2_PLAIN_ZERO;
    }
    return QCOW2_UNALLOCATED;
}

unsigned qcow2_subcluster_run(const struct qcow2 *image, struct qcow2_entry entry, unsigned index)
{
    if (!qcow2_has_subclusters(image)) {
        return 1;
    }
    if (entry.descriptor & QCOW2_COMPRESSED) {
        return QCOW2_SUBCLUSTERS - index;
    }
    uint32_t allocated = entry.subclusters;
    uint32_t zero = entry.subclusters >> QCOW2_SUBCLUSTERS;
    bool is_allocated = allocated >> index & 1;
    bool is_zero = zero >> index & 1;
    uint32_t different = (is_allocated ? ~allocated : allocated) | (is_zero ? ~zero : zero);
    different >>= index;
    return different ? (unsigned)__builtin_ctz(different) : QCOW2_SUBCLUSTERS - index;
}

enum qcow2_kind qcow2_entry_kind(const struct qcow2 *image, struct qcow2_entry entry)
{
    if (!qcow2_has_subclusters(image) || entry.descriptor & QCOW2_COMPRESSED) {
        return qcow2_subcluster_kind(image, entry, 0);
    }
    bool place = qcow2_entry_has_place(image, entry);
    uint32_t allocated = entry.subclusters;
    uint32_t zero = entry.subclusters >> QCOW2_SUBCLUSTERS;
    if (!descriptor_is_sane(image, entry.descriptor) || allocated & zero || (allocated && !place)) {
        return QCOW2_INVALID;
    }
    return place ? QCOW2_DATA : QCOW2_UNALLOCATED;
}

void qcow2_compressed_place(unsigned cluster_bits, uint64_t descriptor, uint64_t *ret_offset, uint64_t *ret_bytes)
{
    unsigned offset_bits = 62 - (cluster_bits - 8);
    uint64_t offset = descriptor & ((UINT64_C(1) << offset_bits) - 1);
    uint64_t sectors = (descriptor & (QCOW2_COMPRESSED - 1)) >> offset_bits;
    *ret_offset = offset;
    *ret_bytes = (sectors + 1) * QCOW2_SECTOR - (offset & (QCOW2_SECTOR - 1));
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_CUT_TESTING_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_CUT_TESTING_H

#include "block/image.h"
#include "driver/format/qcow2_testing.h"

/* For tests of what changes an image as a whole: a small image with a bit of everything, what it reads as, and one
 * operation on it with the power cut at a chosen change. All in a coroutine. Images are GByteArrays, the caller's. */

struct cut_shape {
    unsigned version, cluster_bits, refcount_bits;
    bool backing;   /* the header names a file that is not there */
    bool snapshots; /* two */
    bool compressed;
    bool extended;
};
GByteArray *coroutine_fn cut_make(const struct cut_shape *shape, uint64_t seed);

/* A hash for each 4 KiB of the disk (of a snapshot, if `snapshot`), 0 for what cannot be read. g_array_unref() */
GArray *coroutine_fn cut_read(const GByteArray *image, const char *snapshot);
/* How many are the same in both and can be read. */
unsigned cut_same(const GArray *a, const GArray *b);

/* Opens a copy of the image (for_check: as a check does), runs `work`, closes. *ret_changes: how many changes (writes,
 * flushes, discards) that made. cut_at UINT64_MAX: no cut; else that change and those after fail, and *ret_image is
 * what a power cut leaves then. Returns what `work` did, or the error of opening. */
int coroutine_fn cut_run(const GByteArray *image, bool for_check, uint64_t cut_at, uint64_t seed,
                         int coroutine_fn (*work)(struct node *node, void *argument), void *argument,
                         GByteArray **ret_image, uint64_t *ret_changes);
/* A check; *ret_errors: corruptions and errors of the check, *ret_leaks. Returns 0, or -errno if it could not be made.
 */
int coroutine_fn cut_check(const GByteArray *image, uint64_t *ret_errors, uint64_t *ret_leaks);

/* Big-endian words of an image. */
uint64_t cut_load(const GByteArray *image, uint64_t offset);
void cut_store(GByteArray *image, uint64_t offset, uint64_t value);
/* Where the L2 entry of a guest offset stands; 0: there is no table. */
uint64_t cut_entry(const GByteArray *image, uint64_t guest);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_OVERLAP_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_OVERLAP_H

#include "driver/format/qcow2.h"

/*
 * Overlap checks that were asked for (`overlap-check`): what guest data are written over, or what is given out for new
 * clusters, must not be metadata. Without being asked there are those that cost nothing (qcow2_overlaps_metadata(), and
 * a look at tables in use once per slice of refcounts that clusters are given out of).
 */
struct blockdev_options_qcow2;

/* Reads the option. */
void qcow2_overlap_configure(struct qcow2 *image, const struct blockdev_options_qcow2 *options);
/* Before the first write, and the first after qcow2_overlap_forget(): learns where the metadata are that stay where
 * they are. The lock is held, nothing is dirty. */
int coroutine_fn qcow2_overlap_prepare(struct qcow2 *image);
/* They have moved. */
void qcow2_overlap_forget(struct qcow2 *image);
/* Whether any cluster of the range is metadata of a kind that is checked. The lock is held. */
bool qcow2_overlap_hits(const struct qcow2 *image, uint64_t offset, uint64_t bytes);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_IMAGE_H
#define INTERLOCK_TEST_EXPLORE_IMAGE_H

#include "loop/sim.h"
#include <stdbool.h>
#include <stdint.h>

/*
 * qcow2 images as bytes, made and read without the driver that is under test. Written from the published
 * specification ("Qcow2 Image File Format"); version 3, 16-bit refcounts, no snapshots, nothing compressed.
 */
enum image_cluster { IMAGE_NONE, IMAGE_DATA, IMAGE_ZERO };

struct image_plan {
    const char *backing; /* file name in the header, or NULL */
    uint64_t size;
    unsigned cluster_bits;
    const enum image_cluster *clusters; /* one for each cluster of the size */
    const unsigned char *content;       /* `size` bytes; used where a cluster is IMAGE_DATA */
};
/* The whole file; g_free(). */
unsigned char *image_build(const struct image_plan *plan, uint64_t *ret_bytes);

/* What the image in that disk shows, following backing names from disk to disk; g_free(). NULL with a sentence in
 * *ret_problem (g_free()) when it is not whole. */
unsigned char *image_show(struct sim *sim, const char *path, uint64_t *ret_size, char **ret_problem);
/* Where the backing name in the header leads, or NULL; g_free(). False: there is no image there. */
bool image_backing(struct sim *sim, const char *path, char **ret_backing);
/* Are the structures whole: every cluster in use counted, used once, within the file? exact: no cluster is counted that
 * nobody uses. NULL: yes; else a sentence; g_free(). */
char *image_check(struct sim *sim, const char *path, bool exact);

#endif

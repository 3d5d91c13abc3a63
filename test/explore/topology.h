/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_TOPOLOGY_H
#define INTERLOCK_TEST_EXPLORE_TOPOLOGY_H

#include <stdbool.h>

/* The shapes that are explored, as data. Images are indices; what an image leans on has a smaller index. */
#define TOPOLOGY_IMAGES_MAX 8
#define NO_IMAGE (-1)

struct topology {
    const char *name;
    const char *picture;
    unsigned count;
    struct {
        const char *name;
        int below; /* what it leans on, or NO_IMAGE */
    } images[TOPOLOGY_IMAGES_MAX];
};

extern const struct topology topologies[];
extern const unsigned topology_count;

const struct topology *topology_find(const char *name); /* NULL: none */
int topology_image(const struct topology *topology, const char *name);
/* By backing links, strictly. Nothing is above NO_IMAGE, and NO_IMAGE is below everything. */
bool topology_is_above(const struct topology *topology, int upper, int lower);
bool topology_is_leaf(const struct topology *topology, int image);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The shapes that are explored. A new one is an entry here: operations find their places on it by themselves
 * (operations.c), and every check works from backing links alone.
 */
#include "test/explore/topology.h"
#include <stddef.h>
#include <string.h>

const struct topology topologies[] = {
    {"chain", "base <- a <- b <- c <- top", 5, {{"base", NO_IMAGE}, {"a", 0}, {"b", 1}, {"c", 2}, {"top", 3}}},
    {"fork", "base <- a <- top, base <- s", 4, {{"base", NO_IMAGE}, {"a", 0}, {"top", 1}, {"s", 0}}},
    {"deep",
     "base <- a <- b <- c <- d <- top",
     6,
     {{"base", NO_IMAGE}, {"a", 0}, {"b", 1}, {"c", 2}, {"d", 3}, {"top", 4}}},
};
const unsigned topology_count = sizeof(topologies) / sizeof(topologies[0]);

const struct topology *topology_find(const char *name)
{
    for (unsigned i = 0; i < topology_count; i++) {
        if (strcmp(topologies[i].name, name) == 0) {
            return &topologies[i];
        }
    }
    return NULL;
}

int topology_image(const struct topology *topology, const char *name)
{
    for (unsigned i = 0; i < topology->count; i++) {
        if (strcmp(topology->images[i].name, name) == 0) {
            return (int)i;
        }
    }
    return NO_IMAGE;
}

bool topology_is_above(const struct topology *topology, int upper, int lower)
{
    for (int at = upper; at != NO_IMAGE;) {
        at = topology->images[at].below;
        if (at == lower) {
            return true;
        }
    }
    return false;
}

bool topology_is_leaf(const struct topology *topology, int image)
{
    for (unsigned i = 0; i < topology->count; i++) {
        if (topology->images[i].below == image) {
            return false;
        }
    }
    return true;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_CHECKS_H
#define INTERLOCK_TEST_EXPLORE_CHECKS_H

#include "loop/coroutine.h"
#include <stdbool.h>

/* What must be true when all moves have come to their ends. What is not true ends the process (world_violation()). */
struct world;

/* The graph leans as the model does, and every image that is not stale shows through the drivers what it ought to. */
void coroutine_fn check_graph(struct world *world);

/* How much the disks are held to. */
struct disk_rules {
    bool flushed_only; /* what was not flushed may be lost */
    bool links;        /* headers name what the model says */
    bool exact;        /* no cluster is counted that nobody uses */
};
/* The graph is closed. The stale images are deleted, and the others read by the explorer's own reader. */
void check_disks(struct world *world, const struct disk_rules *rules);
/* The same with the drivers, each image opened from its file in a fresh graph. After check_disks(). */
void coroutine_fn check_reopened(struct world *world, const struct disk_rules *rules);

#endif

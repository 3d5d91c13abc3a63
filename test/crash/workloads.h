/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_CRASH_WORKLOADS_H
#define INTERLOCK_TEST_CRASH_WORKLOADS_H

#include "test/crash/scene.h"

/* The kinds of workload. `draw` sets what it needs of scene->traits and the like, after they were drawn; `run` is
 * called between scene_begin() and scene_end(). */
struct workload {
    const char *name;
    unsigned layers;
    void (*draw)(struct scene *scene);
    void coroutine_fn (*run)(struct scene *scene);
};
extern const struct workload workloads[];
extern const unsigned workload_count;

#endif

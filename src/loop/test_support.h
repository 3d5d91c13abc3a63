/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_TEST_SUPPORT_H
#define INTERLOCK_LOOP_TEST_SUPPORT_H

#include "base/error.h"
#include "loop/loop.h"
#include <glib.h>
#include <stdbool.h>

/* For unit tests: each case in a coroutine on a fresh loop, once per engine that this kernel admits. */
struct loop_case {
    const char *name;
    void (*entry)(void *argument); /* the argument is NULL */
};

static enum engine_kind test_kind;

struct loop_case_run {
    enum engine_kind kind;
    void (*entry)(void *argument);
};

static void loop_case_run(gconstpointer data)
{
    const struct loop_case_run *run = data;
    struct loop *loop;

    test_kind = run->kind;
    g_assert_cmpint(loop_create(run->kind, &loop, NULL), ==, 0);
    loop_run_coroutine(loop, run->entry, NULL);
    loop_destroy(loop);
}

static inline bool test_kind_is_available(enum engine_kind kind)
{
    struct loop *loop;

    if (loop_create(kind, &loop, NULL) < 0) {
        return false;
    }
    loop_destroy(loop);
    return true;
}

static inline void test_add_loop_cases(const char *subject, const struct loop_case *cases, size_t count)
{
    static const enum engine_kind kinds[] = {ENGINE_URING, ENGINE_EPOLL};
    static const char *const names[] = {"uring", "epoll"};

    for (size_t k = 0; k < G_N_ELEMENTS(kinds); k++) {
        if (!test_kind_is_available(kinds[k])) {
            continue;
        }
        for (size_t i = 0; i < count; i++) {
            struct loop_case_run *run = g_new(struct loop_case_run, 1);
            g_autofree char *path = g_strdup_printf("/%s/%s/%s", subject, names[k], cases[i].name);

            *run = (struct loop_case_run){kinds[k], cases[i].entry};
            g_test_add_data_func_full(path, run, loop_case_run, g_free);
        }
    }
}

#endif

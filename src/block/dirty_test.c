/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The dirty bitmap: against a plain model, and with marks from other loops while it is emptied. */
#include "base/size.h"
#include "block/dirty.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib.h>
#include <stdatomic.h>
#include <string.h>

static struct dirty *make(uint64_t size, uint64_t granularity)
{
    struct dirty *dirty = NULL;
    g_assert_cmpint(dirty_create(size, granularity, &dirty), ==, 0);
    return dirty;
}

static void agrees_with_a_model(void)
{
    for (unsigned round = 0; round < 50; round++) {
        uint64_t granularity = (uint64_t)512 << g_random_int_range(0, 8);
        uint64_t size = 1 + g_random_int_range(0, 1 << 24);
        uint64_t regions = div_up(size, granularity);
        struct dirty *dirty = make(size, granularity);
        g_autofree bool *model = g_new0(bool, regions);
        for (unsigned step = 0; step < 200; step++) {
            if (g_random_int_range(0, 3)) {
                uint64_t offset = g_random_int_range(0, 1 << 24), bytes = g_random_int_range(0, 1 << 18);
                dirty_mark(dirty, offset, bytes);
                for (uint64_t at = 0; at < regions; at++) {
                    uint64_t from = at * granularity, to = min_u64(from + granularity, size);
                    model[at] |= bytes && offset < to && offset + bytes > from && offset < size;
                }
            } else if (g_random_int_range(0, 2)) {
                uint64_t offset = align_down(g_random_int_range(0, 1 << 24), granularity);
                uint64_t bytes = g_random_int_range(0, 1 << 18), found, length;
                dirty_unmark(dirty, offset, bytes);
                for (uint64_t at = offset / granularity; at < regions && at * granularity < offset + bytes; at++) {
                    model[at] = false;
                }
                uint64_t to = offset + bytes + 1, first = offset / granularity;
                while (first < regions && first * granularity < to && !model[first]) {
                    first++;
                }
                bool any = dirty_next_within(dirty, offset, to, &found, &length);
                g_assert_true(any == (first < regions && first * granularity < to));
                g_assert_true(!any || (found == first * granularity && found + length <= to));
            } else {
                uint64_t offset, bytes, most = g_random_int_range(0, 1 << 20);
                uint64_t from = g_random_int_range(0, 1 << 24);
                bool found = dirty_take(dirty, from, most, &offset, &bytes);
                g_assert_true(found == (memchr(model, true, regions) != NULL));
                if (found) {
                    g_assert_true(is_aligned(offset, granularity) && bytes > 0 && offset + bytes <= size);
                    g_assert_cmpuint(bytes, <=, max_u64(most, granularity));
                    for (uint64_t at = offset / granularity; at < div_up(offset + bytes, granularity); at++) {
                        g_assert_true(model[at]);
                        model[at] = false;
                    }
                }
            }
            uint64_t count = 0;
            for (uint64_t at = 0; at < regions; at++) {
                count += model[at];
            }
            g_assert_cmpuint(dirty_bytes(dirty), ==, count * granularity);
        }
        dirty_destroy(dirty);
    }
}

static void edges(void)
{
    uint64_t offset, bytes;
    struct dirty *dirty = make(0, 512);
    dirty_mark(dirty, 0, 100);
    g_assert_false(dirty_take(dirty, 0, 512, &offset, &bytes));
    dirty_destroy(dirty);
    dirty = make(64 * 512 * 3 - 100, 512);
    dirty_mark(dirty, 0, UINT64_MAX);
    g_assert_true(dirty_take(dirty, 0, UINT64_MAX, &offset, &bytes));
    g_assert_cmpuint(offset, ==, 0);
    g_assert_cmpuint(bytes, ==, 64 * 512 * 3 - 100);
    g_assert_cmpuint(dirty_bytes(dirty), ==, 0);
    dirty_mark(dirty, UINT64_MAX, UINT64_MAX);
    g_assert_cmpuint(dirty_bytes(dirty), ==, 0);
    dirty_destroy(dirty);
    g_assert_cmpint(dirty_create(UINT64_MAX, 512, &dirty), ==, -ENOMEM);
    dirty_destroy(NULL);
}

/* Two loops write counters and mark after each write; the taker reads after taking. What it has seen at last is the
 * last value of each. */
#define CELLS 4096
#define CELL 512
static struct dirty *shared;
static atomic_uint cells[CELLS];
static atomic_uint writers_left;

static void writer(void *argument)
{
    GRand *rand = g_rand_new_with_seed(GPOINTER_TO_UINT(argument));
    for (unsigned i = 0; i < 200000; i++) {
        unsigned first = (unsigned)g_rand_int_range(rand, 0, CELLS);
        unsigned count = (unsigned)g_rand_int_range(rand, 1, 5);
        for (unsigned at = first; at < first + count && at < CELLS; at++) {
            atomic_fetch_add(&cells[at], 1);
        }
        dirty_mark(shared, (uint64_t)first * CELL, (uint64_t)count * CELL);
    }
    g_rand_free(rand);
    atomic_fetch_sub(&writers_left, 1);
}

static void no_mark_is_lost_between_loops(void)
{
    struct loop *loops[2];
    unsigned seen[CELLS] = {0};
    shared = make((uint64_t)CELLS * CELL, CELL);
    atomic_store(&writers_left, 2);
    for (unsigned i = 0; i < 2; i++) {
        g_assert_cmpint(loop_thread_start("writer", ENGINE_EPOLL, &loops[i], NULL), ==, 0);
        loop_spawn(loops[i], writer, GUINT_TO_POINTER(i + 1));
    }
    uint64_t offset = 0, bytes = 0;
    while (true) {
        bool last = atomic_load(&writers_left) == 0;
        bool found = dirty_take(shared, offset + bytes, 64 * CELL, &offset, &bytes);
        for (uint64_t at = offset / CELL; found && at < (offset + bytes) / CELL; at++) {
            seen[at] = atomic_load(&cells[at]);
        }
        if (!found && last) {
            break;
        }
    }
    for (unsigned at = 0; at < CELLS; at++) {
        g_assert_cmpuint(seen[at], ==, atomic_load(&cells[at]));
    }
    g_assert_cmpuint(dirty_bytes(shared), ==, 0);
    for (unsigned i = 0; i < 2; i++) {
        loop_thread_join(loops[i]);
    }
    dirty_destroy(shared);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/dirty/agrees-with-a-model", agrees_with_a_model);
    g_test_add_func("/dirty/edges", edges);
    g_test_add_func("/dirty/no-mark-is-lost-between-loops", no_mark_is_lost_between_loops);
    return g_test_run();
}

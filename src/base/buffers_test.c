/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Tests of buffers.c: every offset and length over a view with uneven and empty pieces, against flat memory. */
#include "base/buffers.h"

#include <glib.h>
#include <stdbool.h>
#include <string.h>

#define TOTAL 40

static unsigned char memory[TOTAL];
static const struct iovec pieces[] = {
    {memory, 0}, {memory, 7}, {memory + 7, 0}, {memory + 7, 1}, {memory + 8, 32}, {memory + 40, 0},
};
static const struct buffers view = {pieces, G_N_ELEMENTS(pieces), 0};

static void memory_count(void)
{
    for (unsigned i = 0; i < TOTAL; i++) {
        memory[i] = (unsigned char)(i + 1);
    }
}

static void test_every_range(void)
{
    g_assert_cmpuint(buffers_size(view), ==, TOTAL);
    for (size_t offset = 0; offset <= TOTAL; offset++) {
        for (size_t bytes = 0; bytes <= TOTAL - offset; bytes++) {
            unsigned char flat[TOTAL], ones[TOTAL];
            struct buffers at = buffers_advance(view, offset);
            g_assert_cmpuint(buffers_size(at), ==, TOTAL - offset);
            memory_count();
            buffers_copy_out(at, flat, bytes);
            g_assert_true(memcmp(flat, memory + offset, bytes) == 0);

            struct iovec out[G_N_ELEMENTS(pieces)];
            unsigned count = buffers_to_iov(at, bytes, out, G_N_ELEMENTS(out));
            g_assert_cmpuint(buffers_size((struct buffers){out, count, 0}), ==, bytes);
            g_assert_true(count == 0 || out[0].iov_base == memory + offset);
            if (bytes && count > 1) {
                g_assert_cmpuint(buffers_to_iov(at, bytes, out, count - 1), ==, 0);
                g_assert_null(buffers_contiguous(at, bytes));
            } else if (bytes) {
                g_assert_true(buffers_contiguous(at, bytes) == memory + offset);
            }

            buffers_fill(at, 0, bytes);
            g_assert_true(buffers_is_zero(at, bytes));
            g_assert_true(offset == 0 || memory[offset - 1] == offset);
            g_assert_true(offset + bytes == TOTAL || !buffers_is_zero(at, bytes + 1));
            memset(ones, 0xff, sizeof(ones));
            buffers_copy_in(at, ones, bytes);
            g_assert_true(memcmp(memory + offset, ones, bytes) == 0);
            g_assert_true(offset + bytes == TOTAL || memory[offset + bytes] == offset + bytes + 1);
        }
    }
}

static void test_is_zero(void)
{
    g_autofree unsigned char *block = g_malloc0(1024);
    for (size_t start = 0; start < 3; start++) {
        for (size_t bytes = 0; bytes <= 600; bytes++) {
            block[start + bytes] = 1;
            g_assert_true(memory_is_zero(block + start, bytes));
            block[start + bytes] = 0;
        }
    }
    for (size_t at = 0; at < 600; at++) {
        block[at] = 0x80;
        g_assert_false(memory_is_zero(block, 600));
        g_assert_false(memory_is_zero(block, at + 1));
        g_assert_true(memory_is_zero(block, at));
        block[at] = 0;
    }
}

static int never_found(struct buffers_elsewhere *elsewhere, struct file *file, uint64_t offset, size_t at,
                       uint64_t bytes)
{
    g_assert_not_reached();
}

/* What is elsewhere can be walked, and knows what it was not given. */
static void test_elsewhere(void)
{
    struct buffers_elsewhere elsewhere = {.found = never_found};
    struct buffers there = buffers_of_elsewhere(&elsewhere);
    g_assert(buffers_elsewhere(there) == &elsewhere);
    g_assert(!buffers_elsewhere(view));
    there = buffers_advance(buffers_advance(there, 7), 0);
    g_assert(buffers_elsewhere(there) == &elsewhere);
    g_assert_cmpuint(there.skip, ==, 7);
    buffers_fill(there, 0, 0);
    buffers_copy_in(there, memory, 0);
    g_assert(!elsewhere.missed);
    buffers_fill(there, 0, 1);
    g_assert(elsewhere.missed);
    elsewhere.missed = false;
    buffers_copy_in(there, memory, 1);
    g_assert(elsewhere.missed);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/buffers/every-range", test_every_range);
    g_test_add_func("/buffers/is-zero", test_is_zero);
    g_test_add_func("/buffers/elsewhere", test_elsewhere);
    return g_test_run();
}

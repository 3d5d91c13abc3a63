/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The laws of the speed limiter, in virtual time. */
#include "base/size.h"
#include "copy/speed.h"
#include <glib.h>

#define SECOND_NS 1000000000LL

static void no_limit_never_waits(void)
{
    struct speed_limit limit = {0};
    for (unsigned i = 0; i < 100; i++) {
        g_assert_cmpint(speed_ask(&limit, GiB, 5), ==, 0);
    }
}

/* Whoever sleeps as told copies at the limit, whatever the pieces. */
static void a_limit_is_kept(void)
{
    for (unsigned round = 0; round < 200; round++) {
        uint64_t rate = 1 + g_random_int_range(0, 1 << 30);
        struct speed_limit limit = {0};
        int64_t start = g_random_int_range(0, 1 << 30), now = start;
        uint64_t sent = 0, largest = 0;
        speed_set(&limit, rate, now);
        for (unsigned i = 0; i < 50; i++) {
            uint64_t bytes = 1 + g_random_int_range(0, 4 << 20);
            int64_t wait;
            while ((wait = speed_ask(&limit, bytes, now)) > 0) {
                now += wait;
            }
            sent += bytes;
            largest = max_u64(largest, bytes);
            long double allowed = (long double)(now - start) / SECOND_NS * rate + largest;
            g_assert_cmpfloat((double)sent, <=, (double)(allowed * 1.000001L + 64));
        }
        /* and is used: the last wait was no longer than all earlier bytes needed */
        long double needed = (long double)sent / rate * SECOND_NS;
        g_assert_cmpfloat((double)(now - start), <=, (double)needed + 1);
    }
}

static void a_rest_is_not_saved_up(void)
{
    struct speed_limit limit = {0};
    speed_set(&limit, 1 * MiB, 0);
    g_assert_cmpint(speed_ask(&limit, MiB, 0), ==, 0);
    g_assert_cmpint(speed_ask(&limit, MiB, 100 * SECOND_NS), ==, 0);
    g_assert_cmpint(speed_ask(&limit, MiB, 100 * SECOND_NS), ==, SECOND_NS);
}

static void a_new_limit_holds_for_the_debt(void)
{
    struct speed_limit limit = {0};
    speed_set(&limit, 1, 0);
    g_assert_cmpint(speed_ask(&limit, MiB, 0), ==, 0);
    g_assert_cmpint(speed_ask(&limit, 1, 0), ==, (int64_t)MiB * SECOND_NS);
    speed_set(&limit, MiB, 0);
    g_assert_cmpint(speed_ask(&limit, 1, 0), <=, SECOND_NS);
    speed_set(&limit, 0, 0);
    g_assert_cmpint(speed_ask(&limit, GiB, 0), ==, 0);
    speed_set(&limit, 10, 0);
    g_assert_cmpint(speed_ask(&limit, 10, 0), ==, 0);
}

static void extremes_do_not_overflow(void)
{
    struct speed_limit limit = {0};
    int64_t now = INT64_MAX / 2;
    speed_set(&limit, 1, now);
    g_assert_cmpint(speed_ask(&limit, UINT64_MAX, now), ==, 0);
    int64_t wait = speed_ask(&limit, 1, now);
    g_assert_cmpint(wait, >, 0);
    g_assert_cmpint(wait, <, INT64_MAX / 2);
    speed_set(&limit, UINT64_MAX, now);
    g_assert_cmpint(speed_ask(&limit, UINT64_MAX, now + SECOND_NS), ==, 0);
}

static void pieces_fit_the_limit(void)
{
    struct speed_limit limit = {0};
    g_assert_cmpuint(speed_piece(&limit, 64 * KiB, MiB), ==, MiB);
    limit.rate = 1;
    g_assert_cmpuint(speed_piece(&limit, 64 * KiB, MiB), ==, 64 * KiB);
    limit.rate = 5 * MiB;
    g_assert_cmpuint(speed_piece(&limit, 64 * KiB, MiB), ==, 512 * KiB);
    limit.rate = GiB;
    g_assert_cmpuint(speed_piece(&limit, 64 * KiB, MiB), ==, MiB);
    g_assert_cmpuint(speed_piece(&limit, 2 * MiB, MiB), ==, MiB);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/speed/no-limit-never-waits", no_limit_never_waits);
    g_test_add_func("/speed/a-limit-is-kept", a_limit_is_kept);
    g_test_add_func("/speed/a-rest-is-not-saved-up", a_rest_is_not_saved_up);
    g_test_add_func("/speed/a-new-limit-holds-for-the-debt", a_new_limit_holds_for_the_debt);
    g_test_add_func("/speed/extremes-do-not-overflow", extremes_do_not_overflow);
    g_test_add_func("/speed/pieces-fit-the-limit", pieces_fit_the_limit);
    return g_test_run();
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Tests of size.h and size.c: tables of texts that must and must not parse, and of printed sizes. */
#include "base/size.h"

#include <errno.h>
#include <glib.h>

static void test_format(void)
{
    static const struct {
        uint64_t bytes;
        const char *text;
    } cases[] = {
        {0, "0 B"},
        {1, "1 B"},
        {1023, "1023 B"},
        {1024, "1 KiB"},
        {64 * KiB, "64 KiB"},
        {GiB + GiB / 2, "1.5 GiB"},
        {MiB - 1, "1 MiB"},
        {GiB - 1, "1 GiB"},
        {1023 * MiB, "1023 MiB"},
        {UINT64_MAX, "16 EiB"},
        {5 * TiB, "5 TiB"},
    };
    for (unsigned i = 0; i < array_size(cases); i++) {
        char out[32];
        g_assert_cmpstr(size_format(cases[i].bytes, out, sizeof(out)), ==, cases[i].text);
    }
}

static void test_parse_good(void)
{
    static const struct {
        const char *text;
        uint64_t bytes;
    } cases[] = {
        {"0", 0},
        {"512", 512},
        {"512b", 512},
        {"64k", 64 * KiB},
        {"64K", 64 * KiB},
        {"1G", GiB},
        {"1.5G", GiB + GiB / 2},
        {"0.5k", 512},
        {"15E", (uint64_t)15 << 60},
        {"18446744073709551615", UINT64_MAX},
    };
    for (unsigned i = 0; i < array_size(cases); i++) {
        uint64_t bytes = 77;
        g_assert_cmpint(size_parse(cases[i].text, &bytes), ==, 0);
        g_assert_cmpuint(bytes, ==, cases[i].bytes);
    }
}

static void test_parse_bad(void)
{
    static const struct {
        const char *text;
        int code;
    } cases[] = {
        {"", -EINVAL},    {" 1", -EINVAL},   {"-1", -EINVAL},  {"+1", -EINVAL},
        {"k", -EINVAL},   {"1kk", -EINVAL},  {"1 k", -EINVAL}, {"1x", -EINVAL},
        {"1.", -EINVAL},  {"1.5", -EINVAL},  {".5k", -EINVAL}, {"0x10", -EINVAL},
        {"1e3", -EINVAL}, {"1.5b", -EINVAL}, {"16E", -ERANGE}, {"18446744073709551616", -ERANGE},
    };
    for (unsigned i = 0; i < array_size(cases); i++) {
        uint64_t bytes = 77;
        g_assert_cmpint(size_parse(cases[i].text, &bytes), ==, cases[i].code);
        g_assert_cmpuint(bytes, ==, 77);
    }
}

static void test_arithmetic(void)
{
    g_assert_cmpuint(align_down(4097, 4096), ==, 4096);
    g_assert_cmpuint(align_up(4097, 4096), ==, 8192);
    g_assert_cmpuint(align_up(8192, 4096), ==, 8192);
    g_assert_true(is_aligned(512, 512));
    g_assert_false(is_aligned(513, 512));
    g_assert_true(is_power_of_two(1));
    g_assert_false(is_power_of_two(0));
    g_assert_cmpuint(div_up(UINT64_MAX, 2), ==, (uint64_t)1 << 63);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/size/format", test_format);
    g_test_add_func("/size/parse-good", test_parse_good);
    g_test_add_func("/size/parse-bad", test_parse_bad);
    g_test_add_func("/size/arithmetic", test_arithmetic);
    return g_test_run();
}

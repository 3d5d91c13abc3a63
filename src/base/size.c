/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Sizes as text: the one home of printing and parsing them for people and command lines.
 *
 * Invariants:
 * 1. size_format() rounds to one decimal and never prints a unit in which the value is 1024 or more.
 * 2. size_parse() accepts a whole text or nothing, does not depend on the locale, and never wraps around.
 *
 * It does not check alignment or limits of what the size is for.
 */
#include "base/size.h"

#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

char *size_format(uint64_t bytes, char *out, size_t out_size)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    unsigned unit = 0;
    uint64_t scale = 1;
    while (unit + 1 < array_size(units) && bytes / scale >= 1024) {
        scale <<= 10;
        unit++;
    }
    uint64_t whole = bytes / scale, rest = bytes % scale;
    /* rest < 2^60, so rest * 10 fits */
    unsigned tenths = (unsigned)((rest * 10 + scale / 2) / scale);
    if (tenths == 10) {
        tenths = 0;
        whole++;
    }
    if (whole == 1024 && unit + 1 < array_size(units)) {
        whole = 1;
        unit++;
    }
    if (tenths) {
        snprintf(out, out_size, "%" G_GUINT64_FORMAT ".%u %s", whole, tenths, units[unit]);
    } else {
        snprintf(out, out_size, "%" G_GUINT64_FORMAT " %s", whole, units[unit]);
    }
    return out;
}

/* Bits that the suffix shifts by, or -1. */
static int suffix_shift(char suffix)
{
    static const char suffixes[] = "bkmgtpe";
    const char *found = suffix ? strchr(suffixes, g_ascii_tolower(suffix)) : NULL;
    return found ? (int)(found - suffixes) * 10 : -1;
}

int size_parse(const char *text, uint64_t *ret_bytes)
{
    if (!g_ascii_isdigit(*text)) {
        return -EINVAL;
    }
    uint64_t value = 0, fraction = 0, divisor = 1;
    for (; g_ascii_isdigit(*text); text++) {
        if (__builtin_mul_overflow(value, (uint64_t)10, &value) ||
            __builtin_add_overflow(value, (uint64_t)(*text - '0'), &value)) {
            return -ERANGE;
        }
    }
    bool has_fraction = *text == '.';
    if (has_fraction) {
        text++;
        if (!g_ascii_isdigit(*text)) {
            return -EINVAL;
        }
        for (; g_ascii_isdigit(*text); text++) {
            if (divisor < 1000000000) {
                divisor *= 10;
                fraction = fraction * 10 + (uint64_t)(*text - '0');
            }
        }
    }
    int shift = 0;
    if (*text) {
        shift = suffix_shift(*text++);
    }
    if (shift < 0 || *text || (has_fraction && !shift)) {
        return -EINVAL;
    }
    if (value > UINT64_MAX >> shift) {
        return -ERANGE;
    }
    value <<= shift;
    uint64_t part = (uint64_t)(((unsigned __int128)fraction << shift) / divisor);
    if (__builtin_add_overflow(value, part, &value)) {
        return -ERANGE;
    }
    *ret_bytes = value;
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Numbers that the commands take, and the lines that they print: in the form that scripts know from qemu-io.
 *
 * 1. What is wrong with a number is told on standard output, where the results are; only the program itself and
 * getopt() speak on standard error.
 * 2. Sizes have three decimals, or none: "1.500 KiB", "64 KiB".
 */
#include "base/size.h"
#include "loop/loop.h"
#include "tool/io/io.h"
#include "tool/tool.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

/* size_parse() with what it leaves out: "+1", "0x200", ".5k", "1.k". */
int io_number(const char *text, int64_t *ret)
{
    bool negative = *text == '-';
    uint64_t value;
    int code;
    text += *text == '+' || negative;
    if (text[0] == '0' && (text[1] == 'x' || text[1] == 'X')) {
        char *end;
        errno = 0;
        value = g_ascii_strtoull(text + 2, &end, 16);
        code = !g_ascii_isxdigit(text[2]) || *end ? -EINVAL : -errno;
    } else {
        const char *point = strchr(text, '.');
        bool bare = point && !g_ascii_isdigit(point[1]);
        g_autofree char *whole = point ? g_strdup_printf("%s%.*s.%s%s", point == text ? "0" : "", (int)(point - text),
                                                         text, bare ? "0" : "", point + 1)
                                       : g_strdup(text);
        code = point == text && bare ? -EINVAL : size_parse(whole, &value);
    }
    if (code < 0) {
        return code;
    }
    if (value > INT64_MAX || (negative && value)) {
        return -ERANGE;
    }
    *ret = (int64_t)value;
    return 0;
}

int io_number_or_tell(const char *text, int64_t *ret)
{
    int code = io_number(text, ret);
    if (code == -ERANGE) {
        printf("Parsing error: argument too large -- %s\n", text);
    } else if (code < 0) {
        printf("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- %s\n", text);
    }
    return code;
}

int io_pattern(const char *text, uint8_t *ret)
{
    const char *digits = text + (*text == '+');
    int base = digits[0] != '0' ? 10 : digits[1] == 'x' || digits[1] == 'X' ? 16 : 8;
    const char *first = base == 16 ? digits + 2 : digits;
    char *end = NULL;
    errno = 0;
    uint64_t value = g_ascii_strtoull(first, &end, (guint)base);
    if (!g_ascii_isxdigit(*first) || end == first || *end || errno || value > 255) {
        printf("%s is not a valid pattern byte\n", text);
        return -EINVAL;
    }
    *ret = (uint8_t)value;
    return 0;
}

static const char *trim_decimals(char *text)
{
    char *point = strchr(text, '.');
    if (point && !strcmp(point, ".000")) {
        *point = 0;
    }
    return text;
}

char *io_size(double bytes, char out[64])
{
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    char number[40];
    unsigned unit = 0;
    while (bytes >= 1024 && unit + 1 < G_N_ELEMENTS(units)) {
        bytes /= 1024;
        unit++;
    }
    if (unit == 0) {
        bool whole = bytes == (double)(uint64_t)bytes;
        snprintf(number, sizeof(number), whole ? "%.0f" : "%f", bytes);
    } else {
        snprintf(number, sizeof(number), "%.3f", bytes);
        trim_decimals(number);
    }
    snprintf(out, 64, "%s %s", number, units[unit]);
    return out;
}

static void time_text(double seconds, bool fixed, char out[64])
{
    unsigned whole = (unsigned)seconds, hundredths = (unsigned)((seconds - whole) * 100);
    unsigned hours = whole / 3600, minutes = whole / 60 % 60;
    if (fixed || hours) {
        snprintf(out, 64, "%u:%02u:%02u.%02u", hours, minutes, whole % 60, hundredths);
    } else if (minutes) {
        snprintf(out, 64, "%02u:%02u.%02u", minutes, whole % 60, hundredths);
    } else {
        snprintf(out, 64, "%02u.%02u sec", whole, hundredths);
    }
}

void io_report(const char *verb, int64_t start_ns, uint64_t offset, uint64_t total, uint64_t done, bool for_programs)
{
    double seconds = MAX((double)(loop_clock_ns() - start_ns), 1) / 1e9;
    char time[64], size[64], rate[64];
    time_text(seconds, for_programs, time);
    if (for_programs) {
        printf("%" G_GUINT64_FORMAT ",1,%s,%.3f,%.3f\n", done, time, (double)done / seconds, 1 / seconds);
        return;
    }
    printf("%s %" G_GUINT64_FORMAT "/%" G_GUINT64_FORMAT " bytes at offset %" G_GUINT64_FORMAT "\n", verb, done, total,
           offset);
    printf("%s, 1 ops; %s (%s/sec and %.4f ops/sec)\n", io_size((double)done, size), time,
           io_size((double)done / seconds, rate), 1 / seconds);
}

void io_dump(const void *data, uint64_t offset, uint64_t bytes)
{
    const uint8_t *at = data;
    for (uint64_t line = 0; line < bytes; line += 16) {
        unsigned count = (unsigned)MIN(bytes - line, 16);
        printf("%08" G_GINT64_MODIFIER "x:  ", offset + line);
        for (unsigned i = 0; i < count; i++) {
            printf("%02x ", at[line + i]);
        }
        printf(" ");
        for (unsigned i = 0; i < count; i++) {
            printf("%c", g_ascii_isalnum(at[line + i]) ? at[line + i] : '.');
        }
        printf("\n");
    }
}

void io_tell_error(struct io *io, struct error *error)
{
    fflush(stdout);
    tool_fail(io->program, error);
}

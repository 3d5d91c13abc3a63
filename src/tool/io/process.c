/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * sleep, sigraise and abort: what a script does to the program itself, to see what is left of an image.
 *
 * 1. Requests under way go on while it sleeps.
 * 2. What was printed before a signal is on standard output when it comes.
 */
#include "loop/loop.h"
#include "tool/io/io.h"
#include <errno.h>
#include <glib.h>
#include <signal.h>
#include <stdlib.h>

/* As strtol() reads numbers: octal and hexadecimal too. */
static int parse_milliseconds(const char *text, int64_t *ret)
{
    char *end;
    gint64 value = g_ascii_strtoll(text, &end, 0);
    if (end == text || *end || value < 0) {
        printf("%s is not a valid number\n", text);
        return -EINVAL;
    }
    *ret = value;
    return 0;
}

int coroutine_fn io_command_sleep(struct io *io, int argc, char **argv)
{
    struct loop_sleep sleep = {0};
    int64_t milliseconds;
    int code = parse_milliseconds(argv[1], &milliseconds);
    if (code == 0) {
        (void)loop_sleep_ns(&sleep, MIN(milliseconds, INT64_MAX / 2000000) * 1000000);
    }
    return code;
}

int coroutine_fn io_command_sigraise(struct io *io, int argc, char **argv)
{
    int64_t number;
    int code = io_number_or_tell(argv[1], &number);
    if (code < 0) {
        return code;
    }
    if (number > NSIG) {
        printf("signal argument '%s' is too large to be a valid signal\n", argv[1]);
        return -EINVAL;
    }
    fflush(stdout); /* the signal may end the program */
    raise((int)number);
    return 0;
}

int coroutine_fn io_command_abort(struct io *io, int argc, char **argv)
{
    abort();
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The commands for zoned devices: no node here has zones, so they check their arguments and say that it is not
 * supported, each by its name.
 */
#include "tool/io/io.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>
#include <string.h>

static int refuse(const char *what)
{
    printf("zone %s failed: %s\n", what, g_strerror(EOPNOTSUPP));
    return -EOPNOTSUPP;
}

/* All but zone_append: two numbers. */
int coroutine_fn io_command_zone(struct io *io, int argc, char **argv)
{
    int64_t number;
    for (int i = 1; i <= 2; i++) {
        int code = io_number_or_tell(argv[i], &number);
        if (code < 0) {
            return code;
        }
    }
    return refuse(io_command_find(argv[0])->name + strlen("zone_"));
}

int coroutine_fn io_command_zone_append(struct io *io, int argc, char **argv)
{
    int64_t number;
    for (int option; (option = getopt(argc, argv, "pq")) != -1;) {
        if (option != 'p' && option != 'q') {
            return io_usage(argv[0]);
        }
    }
    if (optind > argc - 2) {
        return io_usage(argv[0]);
    }
    int code = io_number_or_tell(argv[optind], &number);
    return code < 0 ? code : refuse("append");
}

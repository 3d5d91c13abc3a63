/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * break, remove_break, resume and wait_break: breakpoints of the blkdebug node under the open image. Without such a
 * node they are not supported.
 */
#include "block/user.h"
#include "driver/filter/blkdebug.h"
#include "tool/io/io.h"
#include <errno.h>
#include <glib.h>

static void tell(const char *tag, bool stopped)
{
    printf("blkdebug: %s request '%s'\n", stopped ? "Suspended" : "Resuming", tag);
    fflush(stdout);
}

static struct node *find_debug(struct io *io)
{
    return blkdebug_find(backend_node(io->backend));
}

int coroutine_fn io_command_break(struct io *io, int argc, char **argv)
{
    struct node *node = find_debug(io);
    int code = node ? blkdebug_break(node, argv[1], argv[2], tell, NULL) : -EOPNOTSUPP;
    if (code < 0) {
        printf("Could not set breakpoint: %s\n", g_strerror(-code));
    }
    return code;
}

int coroutine_fn io_command_remove_break(struct io *io, int argc, char **argv)
{
    struct node *node = find_debug(io);
    int code = node ? blkdebug_remove_break(node, argv[1]) : -EOPNOTSUPP;
    if (code < 0) {
        printf("Could not remove breakpoint %s: %s\n", argv[1], g_strerror(-code));
    }
    return code;
}

int coroutine_fn io_command_resume(struct io *io, int argc, char **argv)
{
    struct node *node = find_debug(io);
    int code = node ? blkdebug_resume(node, argv[1]) : -EOPNOTSUPP;
    if (code < 0) {
        printf("Could not resume request: %s\n", g_strerror(-code));
    }
    return code;
}

/* Nobody could stop later than now when nothing is under way: then it would never end. */
int coroutine_fn io_command_wait_break(struct io *io, int argc, char **argv)
{
    struct node *node = find_debug(io);
    int code = !node ? -EOPNOTSUPP : !io->request_count ? -ENOENT : 0;
    if (code < 0) {
        printf("Could not wait for breakpoint %s: %s\n", argv[1], g_strerror(-code));
        return code;
    }
    blkdebug_wait(node, argv[1]);
    return 0;
}

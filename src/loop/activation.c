/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the service manager passed, by number and by name. Written once at the program's start, before there is a
 * second thread, and only read after that.
 * 1. Variables for another process (LISTEN_PID says whose they are) are left alone, and count as none.
 * 2. What is taken is taken whole: a descriptor that is not open refuses all of them.
 * It does not look at what the descriptors are: who listens on one does (listener_native.c).
 */
#include "loop/activation.h"
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DESCRIPTORS_MAX 1024

static unsigned descriptor_count;
static char **names; /* at most descriptor_count of them; or NULL */

static int parse_number(const char *variable, unsigned max, unsigned *ret, struct error **err)
{
    const char *text = g_getenv(variable);
    guint64 value;

    if (!text || !g_ascii_string_to_unsigned(text, 10, 1, max, &value, NULL)) {
        return error_set(err, -EINVAL, "%s is '%s', which is not a number from 1 to %u", variable, text ? text : "",
                         max);
    }
    *ret = (unsigned)value;
    return 0;
}

static int take_descriptors(unsigned count, struct error **err)
{
    for (unsigned i = 0; i < count; i++) {
        int fd = ACTIVATION_FIRST + (int)i, flags = fcntl(fd, F_GETFD);

        if (flags < 0 || fcntl(fd, F_SETFD, flags | FD_CLOEXEC) < 0) {
            return error_set_errno(err, -errno, "Cannot use descriptor %d, which LISTEN_FDS=%u passes", fd, count);
        }
    }
    return 0;
}

int activation_take(unsigned *ret, struct error **err)
{
    unsigned pid, count;
    int r;

    *ret = 0;
    if (!g_getenv("LISTEN_PID")) {
        return 0;
    }
    r = parse_number("LISTEN_PID", G_MAXINT, &pid, err);
    if (r < 0 || pid != (unsigned)getpid()) {
        return r;
    }
    r = parse_number("LISTEN_FDS", DESCRIPTORS_MAX, &count, err);
    if (r == 0) {
        r = take_descriptors(count, err);
    }
    if (r < 0) {
        return r;
    }
    if (g_getenv("LISTEN_FDNAMES")) {
        names = g_strsplit(g_getenv("LISTEN_FDNAMES"), ":", (gint)count);
    }
    g_unsetenv("LISTEN_PID");
    g_unsetenv("LISTEN_FDS");
    g_unsetenv("LISTEN_FDNAMES");
    *ret = descriptor_count = count;
    return 0;
}

int activation_find(const char *name)
{
    for (unsigned i = 0; names && i < descriptor_count && names[i]; i++) {
        if (strcmp(names[i], name) == 0) {
            return ACTIVATION_FIRST + (int)i;
        }
    }
    return -ENOENT;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Going into the background, as the daemon and the NBD server tool do: a fork before there is anything that would not
 * survive it, a pipe by which the child tells that it serves, and a pid file that is locked while its process lives.
 *
 * The working directory stays, for relative names (of images, sockets, the pid file) go on meaning what they meant on
 * the command line.
 */
#include "tool/background.h"
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <string.h>
#include <unistd.h>

int background_fork(int *ret_parent, struct error **err)
{
    int ends[2];
    char status = 1;
    pid_t child;

    if (pipe2(ends, O_CLOEXEC) < 0) {
        return error_set_errno(err, -errno, "Cannot create a pipe");
    }
    child = fork();
    if (child < 0) {
        return error_set_errno(err, -errno, "Cannot fork");
    }
    if (child > 0) {
        close(ends[1]);
        while (read(ends[0], &status, 1) < 0 && errno == EINTR) {
        }
        _exit(status);
    }
    close(ends[0]);
    setsid();
    *ret_parent = ends[1];
    return 0;
}

int background_release_parent(int *parent, struct error **err)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);

    if (null < 0) {
        return error_set_errno(err, -errno, "Cannot leave the terminal");
    }
    dup2(null, STDIN_FILENO);
    dup2(null, STDOUT_FILENO);
    dup2(null, STDERR_FILENO);
    close(null);
    if (write(*parent, "", 1) != 1) {
        return error_set_errno(err, -errno, "Cannot report to the parent process");
    }
    close(*parent);
    *parent = -1;
    return 0;
}

int background_write_pidfile(const char *path, struct error **err)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    g_autofree char *text = g_strdup_printf("%ld\n", (long)getpid());
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);

    if (fd < 0) {
        return error_set_errno(err, -errno, "Cannot create the pid file '%s'", path);
    }
    if (fcntl(fd, F_SETLK, &lock) < 0) {
        close(fd);
        return error_set(err, -EBUSY, "The pid file '%s' belongs to a running process", path);
    }
    if (ftruncate(fd, 0) < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text)) {
        int code = -errno;

        close(fd);
        return error_set_errno(err, code, "Cannot write the pid file '%s'", path);
    }
    return 0; /* left open: the lock lasts as long as the process */
}

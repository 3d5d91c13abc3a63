/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock daemon`, with the command line of qemu-storage-daemon: the options are carried out in the order in which
 * they stand, each like the QMP command that it stands for, then the control loop runs until `quit` or a signal.
 *
 * 1. --daemonize forks before any loop or thread exists; the parent leaves when the child has started, with its status.
 *    What the service manager passed is taken before that.
 * 2. A failing option ends the program with status 1 and the option named; what was opened until then is closed.
 * 3. SIGTERM, SIGINT and SIGHUP end it in order (service_shutdown()).
 */
#include "control/service.h"
#include "loop/activation.h"
#include "tool/daemon_options.h"
#include "tool/registry.h"
#include "tool/tool.h"
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct daemon {
    const struct daemon_options *options;
    struct control *control;
    int code;
    struct error *err;
    int parent; /* pipe to the waiting parent of --daemonize, or -1 */
};

/* Forks: returns in the child with the pipe's end in *ret_parent; the parent waits there and exits. */
static int daemonize(int *ret_parent, struct error **err)
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

/* The child has started: standard streams go to /dev/null and the parent may leave. The working directory stays, for
 * relative names (of images, sockets, the pid file) go on meaning what they meant on the command line. */
static int release_parent(int *parent, struct error **err)
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

/* Writes our number to `path` and keeps a lock on it while we live. */
static int write_pidfile(const char *path, struct error **err)
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

static void handle_signal(int number, void *argument)
{
    service_quit(argument, SHUTDOWN_CAUSE_HOST_SIGNAL);
}

static void coroutine_fn start(void *argument)
{
    struct daemon *daemon = argument;

    for (unsigned i = 0; i < daemon->options->steps->len && !daemon->code; i++) {
        daemon->code = daemon_step_run(g_ptr_array_index(daemon->options->steps, i), daemon->options, daemon->control,
                                       &daemon->err);
    }
}

static void coroutine_fn stop(void *argument)
{
    struct daemon *daemon = argument;

    service_shutdown(daemon->control);
}

static int run(struct daemon *daemon, struct loop *loop)
{
    static const int signals[] = {SIGTERM, SIGINT, SIGHUP};

    daemon->control = service_create(loop, daemon->options->engine);
    daemon->control->allow_override = daemon->options->allow_override;
    for (unsigned i = 0; i < G_N_ELEMENTS(signals); i++) {
        loop_watch_signal(signals[i], handle_signal, daemon->control);
    }
    loop_run_coroutine(loop, start, daemon);
    if (!daemon->code && daemon->options->pidfile) {
        daemon->code = write_pidfile(daemon->options->pidfile, &daemon->err);
    }
    if (!daemon->code && daemon->parent >= 0) {
        daemon->code = release_parent(&daemon->parent, &daemon->err);
    }
    if (!daemon->code && !daemon->control->quitting) {
        loop_run(loop);
    }
    loop_run_coroutine(loop, stop, daemon);
    service_destroy(daemon->control);
    if (!daemon->code && daemon->options->pidfile) {
        unlink(daemon->options->pidfile);
    }
    return daemon->code;
}

int tool_daemon(int argc, char **argv)
{
    struct daemon daemon = {.parent = -1};
    struct daemon_options *options = NULL;
    struct loop *loop = NULL;
    bool done = false;
    unsigned passed;
    int code = activation_take(&passed, &daemon.err);

    if (!code) {
        code = daemon_options_parse(argc, argv, &options, &done, &daemon.err);
    }

    if (code || done) {
        return code ? tool_fail("interlock daemon", daemon.err) : 0;
    }
    daemon.options = options;
    register_all();
    if (options->daemonize) {
        code = daemonize(&daemon.parent, &daemon.err);
    }
    if (!code) {
        code = loop_create(options->engine, &loop, &daemon.err);
    }
    if (!code) {
        code = run(&daemon, loop);
        loop_destroy(loop);
    }
    daemon_options_free(options);
    return code ? tool_fail("interlock daemon", daemon.err) : 0;
}

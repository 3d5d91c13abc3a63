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
#include "export/export.h"
#include "loop/activation.h"
#include "tool/background.h"
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
    if (!daemon->code) {
        nbd_server_admit(daemon->control->exports);
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
        daemon->code = background_write_pidfile(daemon->options->pidfile, &daemon->err);
    }
    if (!daemon->code && daemon->parent >= 0) {
        daemon->code = background_release_parent(&daemon->parent, &daemon->err);
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
        code = background_fork(&daemon.parent, &daemon.err);
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

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_DAEMON_OPTIONS_H
#define INTERLOCK_TOOL_DAEMON_OPTIONS_H

#include "loop/loop.h"
#include <glib.h>

/* The command line of the daemon: settings, and steps to be carried out in order. */
struct control;
struct daemon_step;

struct daemon_options {
    enum engine_kind engine;
    bool daemonize;
    bool allow_override;
    char *pidfile;
    GPtrArray *steps;     /* struct daemon_step */
    GHashTable *chardevs; /* id -> struct chardev, filled as the steps run */
};

/* *ret_done: --help or --version was answered and there is nothing to run. */
int daemon_options_parse(int argc, char **argv, struct daemon_options **ret, bool *ret_done, struct error **err);
void daemon_options_free(struct daemon_options *options);
/* Carries one step out; the error names the option. */
int coroutine_fn daemon_step_run(const struct daemon_step *step, const struct daemon_options *options,
                                 struct control *control, struct error **err);

#endif

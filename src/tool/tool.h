/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_TOOL_H
#define INTERLOCK_TOOL_TOOL_H

#include "base/error.h"

/* The sub-commands; each is a main() of its own: argv[0] is the name it was called by. Exit status as returned. */
int tool_daemon(int argc, char **argv);
int tool_io(int argc, char **argv);
int tool_nbd(int argc, char **argv);
int tool_status(int argc, char **argv);
int tool_graph(int argc, char **argv);
int tool_job(int argc, char **argv);
int tool_verb(int argc, char **argv); /* a live operation; argv[0] is its name */
int tool_access(int argc, char **argv);
int tool_img(int argc, char **argv); /* called as qemu-img it goes by that name */

/* The options of a sub-command that is a client of a daemon: `own` and, for all of them, --qmp. Callbacks of `own` get
 * `data`. -EINVAL with *err. */
struct _GOptionEntry;
int tool_parse(int *argc, char ***argv, const struct _GOptionEntry *own, const char *parameters, const char *summary,
               void *data, char **ret_qmp, struct error **err);

/* Prints "NAME: message" and the hint to standard error; frees the error; returns 1 for the exit status. */
int tool_fail(const char *name, struct error *error);

#endif

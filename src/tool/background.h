/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_BACKGROUND_H
#define INTERLOCK_TOOL_BACKGROUND_H

#include "base/error.h"

/* For programs that go on in the background: leaving the terminal, and the file with their number. */

/* Before any loop or thread exists: forks. Returns in the child with the pipe's end in *ret_parent; the parent waits
 * there and exits, with status 0 after background_release_parent(), with 1 if the child ends before. */
int background_fork(int *ret_parent, struct error **err);
/* The child has started: standard streams go to /dev/null and the parent may leave. *parent becomes -1. */
int background_release_parent(int *parent, struct error **err);
/* Writes our number to `path` and keeps a lock on it while we live. */
int background_write_pidfile(const char *path, struct error **err);

#endif

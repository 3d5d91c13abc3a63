/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_ENFORCE_H
#define INTERLOCK_BLOCK_ENFORCE_H

#include "base/error.h"
#include <stdbool.h>

struct node;
struct operation;

/*
 * What was not claimed is not done. Here is what happens when somebody tries: request.c asks for requests, and
 * transaction.c and node_change_backing() for changes of the graph. Trying is a programming error, so a debug build
 * aborts. -EPERM, logged; any thread. `need`: ACCESS_ bits.
 */
int enforce_refuse(const char *user, const char *what, const char *node, unsigned need);
/* Does `operation` (NULL: nobody) hold one of `any` on the image that `node` shows? Else as above, with an error.
 * Control thread. */
int enforce_claim(const struct operation *operation, const struct node *node, unsigned any, const char *what,
                  struct error **err);
/* For tests that try on purpose: false lets a debug build go on, as a release build does. */
void enforce_set_fatal(bool fatal);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_SCHEMA_COMMAND_H
#define INTERLOCK_SCHEMA_COMMAND_H

#include "base/error.h"
#include "loop/coroutine.h"
#include <jansson.h>
#include <stdbool.h>

/* An entry of the command table. The generated table is command_table[] (schema/commands.h). */
struct control;
struct claim_table;

struct command {
    const char *name;
    /* Parses the arguments (an object, empty for none), runs the handler, stores a new reference to what it returns
     * ({} for nothing). NULL: the monitor session answers itself. */
    int coroutine_fn (*dispatch)(struct control *control, json_t *arguments, json_t **ret, struct error **err);
    bool allow_oob;                   /* may be run with exec-oob: its handler never yields */
    const struct claim_table *claims; /* NULL: takes no claims */
};

#endif

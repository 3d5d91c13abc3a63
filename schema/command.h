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
    /* Up to the decision the same, and nothing after it: what access-check does. *ret_claims (NULL for a command
     * without claims) becomes a new reference to what the command would claim as soon as its arguments are understood,
     * also where access control then refuses it. */
    int coroutine_fn (*check)(struct control *control, json_t *arguments, json_t **ret_claims, struct error **err);
    bool allow_oob;                   /* may be run with exec-oob: its handler never yields */
    bool access_options;              /* takes the members of access-options: it has claims, or its actions do */
    const struct claim_table *claims; /* NULL: takes no claims of its own */
    const char *no_claims_because;    /* then: the reason, as the schema has it */
};

#endif

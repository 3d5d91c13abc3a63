/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_ACCESS_H
#define INTERLOCK_TOOL_ACCESS_H

#include "tool/client.h"
#include <glib.h>

/* What the verbs of `interlock access` share. One thread, no loop, but for what the matrix makes for itself. */
struct access_options {
    char *qmp;
    gboolean edges, json, markdown;
    char **words; /* the verb and what follows it; NULL: none */
};

/*
 * A verb. 0 or an error; *ret_status is the exit status (0 already; with an error, 0 stands for 1).
 */
int access_check(const struct access_options *options, int *ret_status, struct error **err);
int access_matrix(const struct access_options *options, int *ret_status, struct error **err);

/* A line for each claim of an array as query-access has it. Merges clauses of one role in place. */
void access_print_claims(json_t *claims);
/* What access-check answered, in words. */
void access_print_check(json_t *check);
void access_print_json(const json_t *json);

#endif

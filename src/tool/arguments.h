/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_ARGUMENTS_H
#define INTERLOCK_TOOL_ARGUMENTS_H

#include "base/error.h"

/*
 * Arguments of QMP commands on a command line: KEY=VALUE. A dot in a key descends, and a value that is JSON (a number,
 * true, [...], {...}, "...") is that, all else is a string: "server.type=unix" is {"server": {"type": "unix"}}.
 */

/* Adds one to an object. -EINVAL when it is none, or does not go with what is there. */
int argument_add(json_t *arguments, const char *word, struct error **err);
/* Adds all of a list that ends with NULL, or that is NULL. */
int arguments_add(json_t *arguments, char *const *words, struct error **err);

#endif

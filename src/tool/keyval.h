/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_KEYVAL_H
#define INTERLOCK_TOOL_KEYVAL_H

#include "base/error.h"
#include <stdbool.h>

/*
 * An option argument of the command line as a JSON object: either JSON itself (starts with '{') or
 * KEY=VALUE[,KEY=VALUE...] where a dot in a key descends ("file.filename=x"), numbers as keys make a list, and a comma
 * inside a value is written twice. All values become strings: read them with MARSHAL_TEXT. `implied` (may be NULL) is
 * the key of a first value without one. *ret_text: whether it was of the KEY=VALUE kind.
 */
int keyval_parse(const char *text, const char *implied, json_t **ret, bool *ret_text, struct error **err);
/* The next item of a list that commas part ("KEY=VALUE" or whatever stands there), with doubled commas undone; *text
 * moves behind it. NULL at the end of the text. g_free(). */
char *keyval_next(const char **text);

#endif

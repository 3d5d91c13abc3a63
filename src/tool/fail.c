/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How every sub-command says that it failed: its name, the sentence, and the hint on a line of its own.
 * The exit status of a failed sub-command is 1.
 */
#include "tool/tool.h"
#include <stdio.h>
#include <string.h>

int tool_fail(const char *name, struct error *error)
{
    fprintf(stderr, "%s: %s\n", name, error->message);
    if (error->hint && !strstr(error->message, error->hint)) {
        fprintf(stderr, "%s\n", error->hint);
    }
    error_free(error);
    return 1;
}

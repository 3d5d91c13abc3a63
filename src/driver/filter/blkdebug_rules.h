/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FILTER_BLKDEBUG_RULES_H
#define INTERLOCK_DRIVER_FILTER_BLKDEBUG_RULES_H

#include "base/error.h"
#include "base/list.h"
#include "schema/types.h"
#include <stddef.h>

/*
 * The rules of a blkdebug node, and the state machine that they make: which requests fail after which events. No I/O
 * and no lock: its owner calls it with one held.
 */
struct blkdebug_rules {
    struct list list; /* struct blkdebug_rule, newest first */
    int64_t state;
    unsigned count;
};

enum { BLKDEBUG_RULES_MAX = 4096 };

void blkdebug_rules_init(struct blkdebug_rules *rules);
void blkdebug_rules_finish(struct blkdebug_rules *rules);

/* -E2BIG behind the limit. */
int blkdebug_rules_add_error(struct blkdebug_rules *rules, const struct blkdebug_inject_error_options *options,
                             struct error **err);
int blkdebug_rules_add_state(struct blkdebug_rules *rules, const struct blkdebug_set_state_options *options,
                             struct error **err);
/* A breakpoint, which the next such event takes away; `tag` is copied. */
int blkdebug_rules_add_break(struct blkdebug_rules *rules, enum blkdebug_event event, const char *tag,
                             struct error **err);
/* Takes away every breakpoint with this tag (NULL: with any); returns how many. */
unsigned blkdebug_rules_remove_break(struct blkdebug_rules *rules, const char *tag);

/*
 * Reads a file of rules: sections "[inject-error]" and "[set-state]" (a name in double quotes may follow), lines
 * KEY = "VALUE" with the keys of the QMP options, empty lines, and comments that begin with '#'. All rules are added or
 * none; the error names the line.
 */
int blkdebug_rules_read(struct blkdebug_rules *rules, const char *text, size_t bytes, struct error **err);

/* The event happens: errors become active, the state changes. Returns the tags of the breakpoints that it hit (newest
 * first; an array ended by NULL), or NULL; g_strfreev() it. */
char **blkdebug_rules_event(struct blkdebug_rules *rules, enum blkdebug_event event);
/* Does this request fail? Returns 0 or a negative errno; *ret_immediately: see the option. A range of no bytes touches
 * no sector. */
int blkdebug_rules_request(struct blkdebug_rules *rules, enum blkdebug_iotype kind, uint64_t offset, uint64_t bytes,
                           bool *ret_immediately);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_REOPEN_H
#define INTERLOCK_BLOCK_REOPEN_H

#include "block/action.h"
#include "schema/types.h"

/*
 * One entry of blockdev-reopen as an action (block/action.h): a node that is open gets these options and these
 * children, or everything stays as it was. What is absent has its default. What can change stands in the schema; what
 * cannot is an error that names it. The options are borrowed until the action's clean. Control thread.
 */
void reopen_action(struct action *ret, const struct blockdev_options *options);

#endif

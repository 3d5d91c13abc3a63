/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_MATRIX_H
#define INTERLOCK_TOOL_MATRIX_H

#include "base/error.h"
#include "loop/coroutine.h"

/*
 * The operation matrix: which operations may run side by side, by the relation of their nodes. A new reference:
 *
 *   alone: [{operation, also, place, admitted, rules, instances: [{graph, operation}]}]
 *   pairs: [{first, second, relation, admitted, rules, instances: [{graph, first, second}]}]
 *   graphs: {name: {node: backing or null}}
 *
 * `also` names other commands that claim the same, word for word, and so are not listed. A rule is a reason why all
 * instances of a row are refused: {action, required-by: A or B, required-as: role, denied-by, denied-as}; {action:
 * "adopt"}: both want the same edge. In the relation, A is the first operation and B the second.
 *
 * An error says that the matrix could not be made: verdicts that depend on the order, or that differ within one row. In
 * a coroutine of the control loop.
 */
int coroutine_fn matrix_make(json_t **ret, struct error **err);

#endif

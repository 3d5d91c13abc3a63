/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CONTROL_OBJECT_H
#define INTERLOCK_CONTROL_OBJECT_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/types.h"

/* Adds an object as object-add and `--object` describe it, of any type but iothread (-ENOTSUP). Control thread. */
int coroutine_fn object_add_plain(const struct object_options *options, struct error **err);
/* All that were added so; nobody uses them any more. */
void object_remove_all(void);

#endif

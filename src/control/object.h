/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CONTROL_OBJECT_H
#define INTERLOCK_CONTROL_OBJECT_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/types.h"

/* Adds a secret as object-add and `--object` describe it. Control thread. */
int coroutine_fn object_add_secret(const struct object_options *options, struct error **err);

#endif

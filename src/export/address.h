/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_ADDRESS_H
#define INTERLOCK_EXPORT_ADDRESS_H

#include "loop/connection.h"
#include "schema/types.h"

/* The schema's address as the loop's. On success address_clear() it. Any thread. */
int address_from_options(const struct socket_address *options, struct address *ret, struct error **err);

#endif

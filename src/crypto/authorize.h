/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CRYPTO_AUTHORIZE_H
#define INTERLOCK_CRYPTO_AUTHORIZE_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdbool.h>

/*
 * Who may come in: authorizations, as the objects authz-simple, authz-list and authz-list-file give them. An identity
 * is text: the distinguished name of a certificate, a user name. One list for the process. Control thread.
 */

/* Of one of those three types. A file is read now. -EEXIST, -EINVAL, or what reading gave. */
int coroutine_fn authorization_add(const struct object_options *options, struct error **err);
bool authorization_exists(const char *id);
int authorization_remove(const char *id, struct error **err); /* -ENOENT */
void authorization_remove_all(void);
/* May `identity` (NULL: nobody knows) come in? Nobody may by an authorization that is not there. */
bool authorization_allows(const char *id, const char *identity);

#endif

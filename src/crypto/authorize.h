/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CRYPTO_AUTHORIZE_H
#define INTERLOCK_CRYPTO_AUTHORIZE_H

#include "base/error.h"
#include <stdbool.h>

/*
 * Who may come in: authorizations, as the objects authz-simple, authz-list and authz-list-file give them. An identity
 * is text: the distinguished name of a certificate, a user name. One list for the process. Control thread.
 */

struct authorization_rule {
    const char *match;
    bool glob; /* `match` has * and ?; else it is the whole identity */
    bool allow;
};
/* The first rule that matches decides, else `allow`. All is copied. -EEXIST. */
int authorization_add(const char *id, const struct authorization_rule *rules, unsigned count, bool allow,
                      struct error **err);
bool authorization_exists(const char *id);
int authorization_remove(const char *id, struct error **err); /* -ENOENT */
void authorization_remove_all(void);
/* May `identity` (NULL: nobody knows) come in? Nobody may by an authorization that is not there. */
bool authorization_allows(const char *id, const char *identity);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Enforcement: the refusal of what was not claimed. Owns the words, the log and whether it is the end of the program;
 * which request or step needs which claim stands where it is made (request.c, transaction.c, node.c).
 *
 * 1. Nothing has been done when it refuses.
 * 2. A debug build aborts, so that an operation that claims too little is found by the first test that runs it; a
 *    release build refuses and logs, so that it does no harm.
 */
#include "block/enforce.h"
#include "block/private.h"
#include <errno.h>

#ifdef INTERLOCK_DEBUG
static atomic_bool is_fatal = true;
#else
static atomic_bool is_fatal;
#endif

void enforce_set_fatal(bool fatal)
{
    atomic_store(&is_fatal, fatal);
}

int __attribute__((cold)) enforce_refuse(const char *user, const char *what, const char *node, unsigned need)
{
    g_autofree char *actions = access_actions_format(need);
    if (atomic_load(&is_fatal)) {
        g_error("%s by '%s' on node '%s' without a claim: it needs %s", what, user, node, actions);
    }
    g_critical("%s by '%s' on node '%s' without a claim is refused: it needs %s", what, user, node, actions);
    return -EPERM;
}

int enforce_claim(const struct operation *operation, const struct node *node, unsigned any, const char *what,
                  struct error **err)
{
    const struct node *image = node_beneath_filters((struct node *)node);
    if (operation && operation_granted(operation, image) & any) {
        return 0;
    }
    g_autofree char *user =
        operation ? g_strdup_printf("%s %s", operation->table->operation, access_holder_id(operation->holder))
                  : g_strdup("nobody");
    int r = enforce_refuse(user, what, image->name, any);
    return error_set(err, r, "%s on node '%s' was not claimed by %s", what, image->name, user);
}

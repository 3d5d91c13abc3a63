/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The names of the actions: for refusals, query-access and the manual. The table is indexed by bit number
 * and is the only place that spells them.
 */
#include "access/access.h"
#include "base/size.h"
#include <assert.h>
#include <glib.h>

static const char *const action_names[] = {
    "read-data", "read-metadata", "write-data", "write-beneath", "write-metadata", "attributes", "graph",
};
static_assert(array_size(action_names) == ACCESS_ACTION_COUNT, "a name for every action");

const char *access_action_name(enum access_action one_bit)
{
    g_assert(is_power_of_two(one_bit) && one_bit <= ACCESS_ALL);
    return action_names[__builtin_ctz(one_bit)];
}

char *access_actions_format(unsigned actions)
{
    g_autoptr(GString) text = g_string_new(NULL);

    for (unsigned i = 0; i < ACCESS_ACTION_COUNT; i++) {
        if (actions & 1u << i) {
            g_string_append_printf(text, "%s%s", text->len ? ", " : "", action_names[i]);
        }
    }
    if (!text->len) {
        g_string_append(text, "nothing");
    }
    return g_string_free(g_steal_pointer(&text), FALSE);
}

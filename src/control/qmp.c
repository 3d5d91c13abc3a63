/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the monitor says about itself: its version, its commands, its schema; and the shared state's beginnings.
 *
 * The version that clients see is that of the peer whose commands these are (clients choose by it what they may use);
 * the package tells them apart. None of these handlers yields or changes anything.
 */
#include "control/control.h"
#include "schema/commands.h"
#include "schema/introspection.h"
#include <glib.h>
#include <string.h>

void control_init(struct control *control, struct loop *loop, const struct command *commands, unsigned command_count)
{
    control->loop = loop;
    control->commands = commands;
    control->command_count = command_count;
    list_init(&control->monitors);
    list_init(&control->runs);
    list_init(&control->waiting);
}

const struct command *control_find_command(const struct control *control, const char *name)
{
    for (unsigned i = 0; i < control->command_count; i++) {
        if (strcmp(control->commands[i].name, name) == 0) {
            return &control->commands[i];
        }
    }
    return NULL;
}

static struct version_info *version_create(void)
{
    struct version_info *version = g_new0(struct version_info, 1);
    version->qemu = g_new0(struct version_triple, 1);
    version->qemu->major = 10;
    version->qemu->minor = 0;
    version->qemu->micro = 2;
    version->package = g_strdup("Interlock " INTERLOCK_VERSION);
    return version;
}

json_t *control_version(void)
{
    struct version_info *version = version_create();
    json_t *json = version_info_to_json(version);
    version_info_free(version);
    return json;
}

int coroutine_fn command_query_version(struct control *control, struct version_info **ret, struct error **err)
{
    *ret = version_create();
    return 0;
}

int coroutine_fn command_query_commands(struct control *control, struct command_info_list **ret, struct error **err)
{
    *ret = g_new0(struct command_info_list, 1);
    for (unsigned i = 0; i < control->command_count; i++) {
        struct command_info *info = g_new0(struct command_info, 1);
        info->name = g_strdup(control->commands[i].name);
        command_info_list_append(*ret, info);
    }
    return 0;
}

int coroutine_fn command_query_qmp_schema(struct control *control, json_t **ret, struct error **err)
{
    *ret = json_loads(schema_introspection, 0, NULL);
    g_assert(*ret);
    return 0;
}

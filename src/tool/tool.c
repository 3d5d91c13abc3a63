/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What every sub-command does alike: reading its options, and saying that it failed (its name, the sentence, and the
 * hint on a line of its own; exit status 1).
 */
#include "tool/tool.h"
#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

int tool_parse(int *argc, char ***argv, const GOptionEntry *own, const char *parameters, const char *summary,
               void *data, char **ret_qmp, struct error **err)
{
    const GOptionEntry common[] = {
        {"qmp", 0, 0, G_OPTION_ARG_STRING, ret_qmp, "monitor socket of the daemon (or $INTERLOCK_QMP)", "SOCKET"},
        {NULL, 0, 0, 0, NULL, NULL, NULL}};
    g_autoptr(GOptionContext) context = g_option_context_new(parameters);
    g_autoptr(GError) error = NULL;

    GOptionGroup *group = g_option_group_new(NULL, NULL, NULL, data, NULL);

    g_option_context_set_summary(context, summary);
    g_option_group_add_entries(group, common);
    if (own) {
        g_option_group_add_entries(group, own);
    }
    g_option_context_set_main_group(context, group);
    return g_option_context_parse(context, argc, argv, &error) ? 0 : error_set(err, -EINVAL, "%s", error->message);
}

int tool_fail(const char *name, struct error *error)
{
    fprintf(stderr, "%s: %s\n", name, error->message);
    if (error->hint && !strstr(error->message, error->hint)) {
        fprintf(stderr, "%s\n", error->hint);
    }
    error_free(error);
    return 1;
}

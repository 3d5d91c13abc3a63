/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The one runner of the verbs: finds the verb by the name that it was called by, reads its options, lets it make its
 * plan, and has that run. The table here is the only list of them; each stands in the file of its kind.
 */
#include "tool/tool.h"
#include "tool/verb/verb.h"
#include <string.h>

static const struct verb *const verbs[] = {&verb_commit, &verb_stream, &verb_mirror, &verb_backup, &verb_snapshot,
                                           &verb_bitmap, &verb_create, &verb_amend,  &verb_resize, &verb_close};

static const struct verb *verb_find(const char *name)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(verbs); i++) {
        if (!strcmp(verbs[i]->name, name)) {
            return verbs[i];
        }
    }
    g_assert_not_reached();
}

static int verb_run(const struct verb *verb, const struct verb_options *options, int *ret_status, struct error **err)
{
    auto_client client = NULL;
    int code = client_connect(options->qmp, &client, err);

    if (code) {
        return code;
    }
    struct plan plan = {.verb = verb->name,
                        .options = options,
                        .client = client,
                        .steps = g_ptr_array_new(),
                        .targets = g_ptr_array_new()};

    progress_catch_interrupt();
    code = client_knows(client, "access-check", &plan.interlock, err);
    code = code ? code : verb->make_plan(&plan, err);
    code = code ? code : plan_run(&plan, ret_status, err);
    plan_clear(&plan);
    return code;
}

int tool_verb(int argc, char **argv)
{
    const struct verb *verb = verb_find(argv[0]);
    struct verb_options options = {0};
    struct error *err = NULL;
    int status = 0;
    int code = options_read(verb, &options, &argc, &argv, &err);

    code = code ? code : verb_run(verb, &options, &status, &err);
    options_clear(&options);
    if (code) {
        g_autofree char *name = g_strconcat("interlock ", verb->name, NULL);

        tool_fail(name, err);
        return status ? status : 1;
    }
    return status;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Waiting for one's turn at the command line (--queue). A command that was given with on-conflict=wait is answered at
 * once. Whether it waits then query-access tells: its entry was not there before, has its name and, of a job, its id.
 * If there is none it has begun, or has waited and that has ended already: then the event has come before that answer.
 * Other events are left for whoever waits for the job itself.
 */
#include "tool/verb/verb.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

int turn_list(struct client *client, json_t **ret, struct error **err)
{
    auto_json access = NULL;
    int code = client_execute(client, "query-access", NULL, &access, err);
    size_t index;
    json_t *waiting;

    if (code) {
        return code;
    }
    *ret = json_array();
    json_array_foreach(json_object_get(access, "waiting"), index, waiting)
    {
        json_array_append(*ret, json_object_get(waiting, "id"));
    }
    return 0;
}

static bool has(const json_t *list, const json_t *id)
{
    size_t index;
    json_t *item;

    json_array_foreach(list, index, item)
    {
        if (json_equal(item, id)) {
            return true;
        }
    }
    return false;
}

static void tell(const char *name, const json_t *waiting)
{
    g_autoptr(GString) names = g_string_new(NULL);
    size_t index;
    json_t *behind;

    json_array_foreach(json_object_get(waiting, "behind"), index, behind)
    {
        g_string_append_printf(names, "%s%s", names->len ? ", " : "", json_string_value(behind));
    }
    printf("%s waits for %s\n", name, names->len ? names->str : "its turn");
    fflush(stdout);
}

/* *ret_id: what it waits as, or NULL. A transaction is listed as its first part. */
static int look(struct client *client, const char *part, const char *job_id, const json_t *before, char **ret_id,
                struct error **err)
{
    auto_json access = NULL;
    int code = client_execute(client, "query-access", NULL, &access, err);
    size_t index;
    json_t *waiting;

    *ret_id = NULL;
    json_array_foreach(json_object_get(access, "waiting"), index, waiting)
    {
        const json_t *id = json_object_get(waiting, "id");
        bool same_id = !job_id || !g_strcmp0(json_string_value(id), job_id);

        if (!*ret_id && same_id && !has(before, id) &&
            !g_strcmp0(json_string_value(json_object_get(waiting, "command")), part)) {
            *ret_id = g_strdup(json_string_value(id));
            tell(*ret_id, waiting);
        }
    }
    return code;
}

/* Has the waiting of `key` = `value` (its id, or its command) ended? Then *ret_over, and 0 if it has begun. */
static int take_end(struct client *client, const char *name, const char *key, const char *value, bool *ret_over,
                    struct error **err)
{
    auto_json granted = client_take_event(client, "ACCESS_GRANTED", key, value);
    auto_json ended = granted ? NULL : client_take_event(client, "ACCESS_WAIT_ENDED", key, value);
    json_t *data = json_object_get(ended, "data");
    const char *error = json_string_value(json_object_get(data, "error"));

    *ret_over = granted || ended;
    if (!ended) {
        return 0;
    }
    return error_set(err, -ECANCELED, "'%s' does not wait any more (%s)%s%s", name,
                     json_string_value(json_object_get(data, "reason")), error ? ": " : "", error ? error : "");
}

int turn_await(struct client *client, const char *command, const char *part, const char *job_id, const json_t *before,
               char **ret_id, struct error **err)
{
    bool over = false;
    int code = look(client, part, job_id, before, ret_id, err);

    if (!code && !*ret_id) {
        return job_id ? take_end(client, job_id, "id", job_id, &over, err)
                      : take_end(client, command, "operation", command, &over, err);
    }
    while (!code && !over) {
        code = take_end(client, *ret_id, "id", *ret_id, &over, err);
        if (code || over) {
            break;
        }
        if (!client_listen(client, 500)) {
            code = error_set(err, -ECONNRESET, "The daemon went away while '%s' was waiting", *ret_id);
        } else if (progress_interrupted()) {
            return error_set(err, -EINTR, "Interrupted");
        }
    }
    g_clear_pointer(ret_id, g_free);
    return code;
}

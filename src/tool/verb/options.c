/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The options of the verbs. One table has them all, so that an option is called, explained and stored in one way; a
 * verb names those that it takes, and what it does not take is refused by GLib as unknown. Two options of one verb
 * never share a member.
 */
#include "tool/tool.h"
#include "tool/verb/verb.h"
#include <errno.h>
#include <stddef.h>
#include <string.h>

/* --replace[=NODE] */
static gboolean read_replace(const gchar *name, const gchar *value, gpointer data, GError **error)
{
    struct verb_options *options = data;

    options->replace = TRUE;
    g_free(options->replaces);
    options->replaces = g_strdup(value);
    return TRUE;
}

#define AT(member) offsetof(struct verb_options, member)
#define CALLBACK SIZE_MAX

static const struct option {
    const char *name;
    char short_name;
    GOptionArg kind;
    size_t at;
    const char *help, *value;
} option_table[] = {
    /* how it is run */
    {"wait", 0, G_OPTION_ARG_NONE, AT(wait), "wait for the end and show how far it is (the default)", NULL},
    {"async", 0, G_OPTION_ARG_NONE, AT(async), "print the job's name and do not wait", NULL},
    {"dry-run", 0, G_OPTION_ARG_NONE, AT(dry_run),
     "change nothing: say what it would claim (status 0), or the refusal (1)", NULL},
    {"queue", 0, G_OPTION_ARG_NONE, AT(queue), "if others stand in the way, wait for them to end and then begin", NULL},
    {"queue-timeout", 0, G_OPTION_ARG_DOUBLE, AT(queue_timeout), "with --queue: wait for so long at most", "SECONDS"},
    {"job-id", 0, G_OPTION_ARG_STRING, AT(job_id), "the job's name (default: chosen)", "ID"},
    {"speed", 0, G_OPTION_ARG_STRING, AT(speed), "limit in bytes per second (100M, 2G, ...)", "BYTES"},
    {"on-error", 0, G_OPTION_ARG_STRING, AT(on_error),
     "when a request fails: report (the job fails), stop (it pauses), enospc (it pauses if there is no space), ignore",
     "POLICY"},
    {"arg", 0, G_OPTION_ARG_STRING_ARRAY, AT(arguments), "a further argument of the QMP command", "KEY=VALUE"},
    {"keep-ready", 0, G_OPTION_ARG_NONE, AT(keep_ready),
     "when both are the same, leave the job running, and them the same, instead of taking the last step", NULL},
    /* commit, stream */
    {"into", 0, G_OPTION_ARG_STRING, AT(base), "the image that takes the data (default: the lowest)", "NODE"},
    {"above", 0, G_OPTION_ARG_STRING, AT(base),
     "stop above this image, which stays the backing (default: take everything)", "NODE"},
    {"backing-file", 0, G_OPTION_ARG_STRING, AT(backing_file),
     "string to write into the header of the image above, instead of the file's name", "STRING"},
    /* what is written to */
    {"to", 0, G_OPTION_ARG_STRING, AT(to),
     "a node, or a file (a path, or a name with a dot): it is made and opened as a node", "NODE|FILE"},
    {"format", 0, G_OPTION_ARG_STRING, AT(format), "of the file: qcow2 or raw (default: raw for NAME.raw, else qcow2)",
     "FORMAT"},
    {"node-name", 0, G_OPTION_ARG_STRING, AT(node_name), "the new node's name (default: after the file)", "NAME"},
    {"existing", 0, G_OPTION_ARG_NONE, AT(existing),
     "the file or device is there: open it as it is (with --format), make nothing", NULL},
    {"backing", 0, G_OPTION_ARG_STRING, AT(backing),
     "what the new file's header names as its backing file (default: what fits)", "FILE"},
    {"backing-format", 0, G_OPTION_ARG_STRING, AT(backing_format), "its format", "FORMAT"},
    {"option", 'o', G_OPTION_ARG_STRING_ARRAY, AT(create),
     "an option of the new image, as blockdev-create calls it (cluster-size=131072)", "KEY=VALUE"},
    /* copies */
    {"sync", 0, G_OPTION_ARG_STRING, AT(sync),
     "what is copied: full (the default), top (this image alone), none, incremental, bitmap", "WHAT"},
    {"copy-mode", 0, G_OPTION_ARG_STRING, AT(copy_mode),
     "background, or write-blocking: a guest's write waits until it is copied too", "MODE"},
    {"replace", 0, G_OPTION_ARG_CALLBACK, CALLBACK,
     "at the end, the copy takes the place of NODE (default: of the node that is copied)", "NODE"},
    {"keep-backing", 0, G_OPTION_ARG_NONE, AT(keep_backing),
     "with --replace: leave the headers of the images above as they are", NULL},
    {"switch-after", 0, G_OPTION_ARG_STRING, AT(switch_after),
     "so long the copy may lag behind before guests are held to its speed; 0: for ever", "SECONDS"},
    {"bitmap", 0, G_OPTION_ARG_STRING, AT(bitmap), "copy what this dirty bitmap has marked", "NAME"},
    {"bitmap-mode", 0, G_OPTION_ARG_STRING, AT(bitmap_mode),
     "what becomes of the bitmap: on-success (it begins anew), never, always", "MODE"},
    {"compress", 0, G_OPTION_ARG_NONE, AT(compress), "write compressed", NULL},
    /* snapshots */
    {"internal", 0, G_OPTION_ARG_STRING, AT(internal), "a snapshot inside the image, under this name", "NAME"},
    {"delete", 0, G_OPTION_ARG_NONE, AT(delete), "with --internal: delete it", NULL},
    /* bitmaps */
    {"granularity", 0, G_OPTION_ARG_STRING, AT(granularity), "add: bytes for one bit (64k)", "BYTES"},
    {"persistent", 0, G_OPTION_ARG_NONE, AT(persistent), "add: keep it in the image", NULL},
    {"disabled", 0, G_OPTION_ARG_NONE, AT(disabled), "add: let it record nothing until it is enabled", NULL},
    {"from", 0, G_OPTION_ARG_STRING, AT(from), "merge: the node that has the sources (default: the same)", "NODE"},
    /* the rest */
    {"shrink", 0, G_OPTION_ARG_NONE, AT(shrink), "the new size may be smaller: what is behind it is lost", NULL},
    {"force", 0, G_OPTION_ARG_NONE, AT(force), "do it although the daemon warns", NULL},
};

static const struct option *option_find(const char *name)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(option_table); i++) {
        if (!strcmp(option_table[i].name, name)) {
            return &option_table[i];
        }
    }
    g_assert_not_reached();
}

static GOptionEntry option_entry(const struct option *option, struct verb_options *options)
{
    GOptionEntry entry = {.long_name = option->name,
                          .short_name = option->short_name,
                          .arg = option->kind,
                          .arg_data = (char *)options + option->at,
                          .description = option->help,
                          .arg_description = option->value};

    if (option->at == CALLBACK) {
        entry.flags = G_OPTION_FLAG_OPTIONAL_ARG;
        entry.arg_data = read_replace;
    }
    return entry;
}

static bool verb_takes(const struct verb *verb, const char *name)
{
    return g_strv_contains(verb->options, name);
}

int options_read(const struct verb *verb, struct verb_options *options, int *argc, char ***argv, struct error **err)
{
    g_autoptr(GArray) entries = g_array_new(TRUE, FALSE, sizeof(GOptionEntry));
    const GOptionEntry words = {G_OPTION_REMAINING, 0, 0, G_OPTION_ARG_STRING_ARRAY, &options->words, NULL, NULL};

    for (unsigned i = 0; verb->options[i]; i++) {
        GOptionEntry entry = option_entry(option_find(verb->options[i]), options);

        g_array_append_val(entries, entry);
    }
    g_array_append_val(entries, words);
    bool jobs = verb_takes(verb, "async");
    g_autofree char *summary =
        g_strconcat(verb->summary,
                    jobs ? "\n\nCtrl-C ends the waiting, not the job, and says how to follow or cancel it." : "", NULL);
    int code = tool_parse(argc, argv, (const GOptionEntry *)(void *)entries->data, verb->parameters, summary, options,
                          &options->qmp, err);

    if (!code && options->wait && options->async) {
        code = error_set(err, -EINVAL, "--wait and --async exclude each other");
    }
    if (!code && options->queue_timeout != 0 && (!options->queue || options->queue_timeout < 0)) {
        code = error_set(err, -EINVAL, "--queue-timeout is a number of seconds, and goes with --queue");
    }
    return code;
}

void options_clear(struct verb_options *options)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(option_table); i++) {
        const struct option *option = &option_table[i];
        void *member = (char *)options + option->at;

        if (option->kind == G_OPTION_ARG_STRING) {
            g_clear_pointer((char **)member, g_free);
        } else if (option->kind == G_OPTION_ARG_STRING_ARRAY) {
            g_clear_pointer((char ***)member, g_strfreev);
        }
    }
    g_free(options->replaces);
    g_free(options->qmp);
    g_strfreev(options->words);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock mirror`, `backup` and `snapshot`: the verbs with something else to write to. Each takes one or more pairs
 * of a node and its target; several are one transaction, so that all show the same point in time. A dry run with a
 * file that is not there yet asks about the command that makes its file itself (drive-mirror, drive-backup,
 * blockdev-snapshot-sync): it claims the same on the nodes that are there.
 *
 * A mirror without --replace ends, when both sides are the same, without moving anybody: that is a copy. What was
 * opened for a copy is closed when it is whole; what users are to see from then on stays open.
 */
#include "base/size.h"
#include "tool/verb/verb.h"
#include <errno.h>
#include <string.h>

/* One pair: adds its steps to the plan. */
typedef int (*pair_fn)(struct plan *plan, const char *node, const json_t *info, struct target *target,
                       struct error **err);

static int add_pair(struct plan *plan, const char *node, const char *word, pair_fn add, struct error **err)
{
    const json_t *info;
    struct target *target;
    int code = nodes_find(plan, node, &info, err);

    code = code ? code : target_add(plan, word, info, &target, err);
    return code ? code : add(plan, node, info, target, err);
}

/* "NODE --to WORD", or "NODE=WORD..." */
static int add_pairs(struct plan *plan, pair_fn add, struct error **err)
{
    const struct verb_options *options = plan->options;
    char **words = options->words;
    int code = 0;

    if (!words) {
        return error_set(err, -EINVAL, "Name a node and what to write to: NODE --to NODE|FILE; see --help");
    }
    if (words[1] && (options->node_name || options->backing)) {
        return error_set(err, -EINVAL, "--node-name and --backing are for one node");
    }
    for (unsigned i = 0; words[i] && !code; i++) {
        const char *equals = strchr(words[i], '=');
        g_autofree char *node = equals ? g_strndup(words[i], (gsize)(equals - words[i])) : g_strdup(words[i]);

        if (!equals == !options->to || (!equals && words[1])) {
            return error_set(err, -EINVAL,
                             "Say for each node what to write to: one NODE --to NODE|FILE, or NODE=FILE for each");
        }
        code = add_pair(plan, node, equals ? equals + 1 : options->to, add, err);
    }
    return code;
}

/* The new image leans on `info` (NULL: on what the user says, if anything). */
static int lean_on(struct plan *plan, struct target *target, const json_t *info, struct error **err)
{
    if (!target->path || target->existing || target->backing_file || !info) {
        return 0;
    }
    if (!strcmp(target->format, "raw")) {
        return error_set(err, -EINVAL, "A raw image cannot hold a part of the data only: it has no backing file");
    }
    target->backing_format = g_strdup(nodes_driver(info));
    return nodes_path(plan, info, &target->backing_file, err);
}

/* For a copy of a part of the data: what stands for the rest. */
static int lean_by_sync(struct plan *plan, struct target *target, const json_t *info, const char *sync,
                        struct error **err)
{
    const char *self = json_string_value(json_object_get(info, "node-name"));
    bool top = !strcmp(sync, "top");
    const char *below = top ? nodes_backing(plan, info) : self;
    const json_t *rest;

    if (!below || (!top && strcmp(sync, "none") != 0)) {
        return 0;
    }
    /* Interlock lets a copy lean on what is copied when that is written to no more: at the end, and by itself. */
    if (target->path && (top || !plan->interlock)) {
        target->backing_node = g_strdup(below);
    }
    int code = nodes_find(plan, below, &rest, err);

    return code ? code : lean_on(plan, target, rest, err);
}

static void add_text(json_t *arguments, const char *key, const char *text)
{
    if (text) {
        json_object_set_new(arguments, key, json_string(text));
    }
}

static const char *mode_of(const struct target *target)
{
    return target->existing ? "existing" : "absolute-paths";
}

/* The same command with the file instead of the node that is not there. */
static void foresee_file(struct step *step, const struct target *target, const char *command)
{
    if (target->path) {
        step->foreseen_by = command;
        step->foreseen_arguments = json_deep_copy(step->arguments);
        json_object_set_new(step->foreseen_arguments, "target", json_string(target->path));
        json_object_set_new(step->foreseen_arguments, "format", json_string(target->format));
        json_object_set_new(step->foreseen_arguments, "mode", json_string(mode_of(target)));
    }
}

/* What only Interlock's mirrors take. */
static int add_mirror_options(struct plan *plan, const char *node, json_t *arguments, struct error **err)
{
    const struct verb_options *options = plan->options;
    uint64_t seconds = 0;
    int code = 0;

    /* There without it only the users move, and not the images above; the peer moves all, and takes it less often. */
    if (options->replace) {
        add_text(arguments, "replaces", options->replaces ? options->replaces : plan->interlock ? node : NULL);
    }
    add_text(arguments, "backing-file", options->backing_file);
    if (options->keep_backing) {
        json_object_set_new(arguments, "keep-backing", json_true());
    }
    if (options->switch_after) {
        code = size_parse(options->switch_after, &seconds);
        json_object_set_new(arguments, "switch-after", json_integer((json_int_t)seconds));
        code = code ? error_set(err, code, "'%s' is no number of seconds", options->switch_after) : 0;
    }
    return code;
}

static int add_mirror(struct plan *plan, const char *node, const json_t *info, struct target *target,
                      struct error **err)
{
    const struct verb_options *options = plan->options;
    const char *sync = options->sync ? options->sync : options->bitmap ? "bitmap" : "full";
    json_t *arguments = json_pack("{s:s, s:s, s:s}", "device", node, "target", target->node, "sync", sync);
    struct step *step;
    int code;

    add_text(arguments, "copy-mode", options->copy_mode);
    add_text(arguments, "bitmap", options->bitmap);
    add_text(arguments, "bitmap-mode", options->bitmap_mode);
    if (!plan->interlock && !strcmp(sync, "none")) { /* there the copy would show nothing of what was before */
        json_decref(arguments);
        return error_set(err, -ENOTSUP, "A mirror of what is new alone (--sync none) needs Interlock");
    }
    code = plan_add_job(plan, "blockdev-mirror", node, arguments, &step, err);
    code = code ? code : add_mirror_options(plan, node, arguments, err);
    if (!code) {
        foresee_file(step, target, "drive-mirror");
        code = lean_by_sync(plan, target, info, sync, err);
    }
    return code;
}

static int mirror_plan(struct plan *plan, struct error **err)
{
    const struct verb_options *options = plan->options;

    plan->at_ready = options->keep_ready ? PROGRESS_LEAVE : options->replace ? PROGRESS_COMPLETE : PROGRESS_END;
    plan->stays = options->replace;
    return add_pairs(plan, add_mirror, err);
}

static int add_backup(struct plan *plan, const char *node, const json_t *info, struct target *target,
                      struct error **err)
{
    const struct verb_options *options = plan->options;
    const char *by_bitmap = options->bitmap_mode ? "bitmap" : "incremental";
    const char *sync = options->sync ? options->sync : options->bitmap ? by_bitmap : "full";
    json_t *arguments = json_pack("{s:s, s:s, s:s}", "device", node, "target", target->node, "sync", sync);
    struct step *step;
    int code;

    add_text(arguments, "bitmap", options->bitmap);
    add_text(arguments, "bitmap-mode", options->bitmap_mode);
    if (options->compress) {
        json_object_set_new(arguments, "compress", json_true());
    }
    plan->endless = plan->endless || !strcmp(sync, "none");
    code = plan_add_job(plan, "blockdev-backup", node, arguments, &step, err);
    if (!code) {
        foresee_file(step, target, "drive-backup");
        code = lean_by_sync(plan, target, info, sync, err);
    }
    return code;
}

static int backup_plan(struct plan *plan, struct error **err)
{
    plan->at_ready = PROGRESS_WAIT;
    return add_pairs(plan, add_backup, err);
}

static int add_snapshot(struct plan *plan, const char *node, const json_t *info, struct target *target,
                        struct error **err)
{
    struct step *step =
        plan_add(plan, "blockdev-snapshot", json_pack("{s:s, s:s}", "node", node, "overlay", target->node));

    if (target->path) {
        step->foreseen_by = "blockdev-snapshot-sync";
        step->foreseen_arguments = json_pack("{s:s, s:s, s:s, s:s}", "node-name", node, "snapshot-file", target->path,
                                             "snapshot-node-name", target->node, "format", target->format);
    }
    return lean_on(plan, target, info, err);
}

static int internal_plan(struct plan *plan, struct error **err)
{
    const struct verb_options *options = plan->options;
    const char *command =
        options->delete ? "blockdev-snapshot-delete-internal-sync" : "blockdev-snapshot-internal-sync";

    if (!options->words || options->to) {
        return error_set(err, -EINVAL, "An internal snapshot needs the names of nodes, and no --to");
    }
    for (unsigned i = 0; options->words[i]; i++) {
        plan_add(plan, command, json_pack("{s:s, s:s}", "device", options->words[i], "name", options->internal));
    }
    return 0;
}

static int snapshot_plan(struct plan *plan, struct error **err)
{
    if (plan->options->internal) {
        return internal_plan(plan, err);
    }
    if (plan->options->delete) {
        return error_set(err, -EINVAL,
                         "--delete goes with --internal NAME; a snapshot in a file is taken back by "
                         "'interlock commit'");
    }
    plan->stays = true;
    return add_pairs(plan, add_snapshot, err);
}

#define TARGET_OPTIONS "to", "format", "node-name", "existing", "backing", "backing-format", "option"
#define JOB_OPTIONS "job-id", "speed", "on-error", "arg", "wait", "async", "dry-run", "queue", "queue-timeout"

const struct verb verb_mirror = {"mirror", "NODE --to NODE|FILE, or NODE=FILE...",
                                 "Copies what NODE shows to another image and keeps both the same, while NODE is in "
                                 "use. When they are the same it ends "
                                 "and the copy is closed; with --replace the users of NODE go on with the copy; with "
                                 "--keep-ready it goes on. A FILE "
                                 "is made, with the size of NODE; nothing is written over.",
                                 (const char *const[]){"replace", "keep-backing", "backing-file", "switch-after",
                                                       "keep-ready", "sync", "copy-mode", "bitmap", "bitmap-mode",
                                                       TARGET_OPTIONS, JOB_OPTIONS, NULL},
                                 mirror_plan};

const struct verb verb_backup = {
    "backup", "NODE --to NODE|FILE, or NODE=FILE...",
    "Copies what NODE shows at this moment, while NODE is in use and whatever is written meanwhile. Several nodes are "
    "copied as they are at one point in time. When the copy is whole it is closed. A FILE is made, with the size of "
    "NODE; "
    "nothing is written over. --bitmap copies what has been written since the bitmap began; --backing then names "
    "the copy before it.",
    (const char *const[]){"sync", "bitmap", "bitmap-mode", "compress", TARGET_OPTIONS, JOB_OPTIONS, NULL}, backup_plan};

const struct verb verb_snapshot = {
    "snapshot", "NODE --to NODE|FILE, or NODE=FILE..., or NODE... --internal NAME",
    "Puts a new image over NODE, which takes all writes from now on; NODE keeps what it has at this moment. Several "
    "nodes "
    "are kept as they are at one point in time. With --internal the image keeps the moment inside itself.",
    (const char *const[]){"internal", "delete", TARGET_OPTIONS, "arg", "dry-run", "queue", "queue-timeout", NULL},
    snapshot_plan};

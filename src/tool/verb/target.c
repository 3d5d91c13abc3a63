/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a verb writes to: a node that is there, or a file. For a file the daemon is told to make the image and to open
 * it as a node, in three commands of its own (blockdev-create for the file, for the format in it, blockdev-add), so
 * that it works with any daemon that has them.
 *
 * 1. What is there is never written over: before a file is made the daemon is asked to open it, which has to fail. A
 * dry run does not ask it, for that would open the file, and looks for itself.
 * 2. What was made is told at once, and is taken back if what it was made for is refused or fails: the node is closed,
 *    the file removed. A file on another machine stays, and that is told.
 * 3. A node that was there is never touched.
 */
#include "base/size.h"
#include "tool/arguments.h"
#include "tool/verb/verb.h"
#include <errno.h>
#include <glib/gstdio.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

void target_free(struct target *target)
{
    g_free(target->node);
    g_free(target->path);
    g_free(target->format);
    g_free(target->backing_file);
    g_free(target->backing_format);
    g_free(target->backing_node);
    json_decref(target->create);
    g_free(target);
}

static bool is_raw(const struct target *target)
{
    return !strcmp(target->format, "raw");
}

static bool is_file_name(const char *word)
{
    return strchr(word, '/') || strchr(word, '.');
}

static int target_is_node(struct plan *plan, struct target *target, const char *word, struct error **err)
{
    const struct verb_options *options = plan->options;
    const json_t *node;

    if (options->format || options->node_name || options->existing || options->create || options->backing) {
        return error_set(err, -EINVAL,
                         "'%s' is a node; --format, --node-name, --existing, --backing and --option are about files",
                         word);
    }
    int code = nodes_find(plan, word, &node, err);

    if (code == -ENOENT) {
        error_hint(err, "A file is given with its path: ./%s", word);
    }
    target->node = g_strdup(word);
    return code;
}

static int target_is_file(struct plan *plan, struct target *target, const char *word, struct error **err)
{
    const struct verb_options *options = plan->options;

    target->path = g_canonicalize_filename(word, NULL);
    target->existing = options->existing;
    if (target->existing && !options->format) {
        return error_set(err, -EINVAL, "--existing needs --format: the format of '%s' is not guessed", word);
    }
    target->format = g_strdup(options->format ? options->format : g_str_has_suffix(word, ".raw") ? "raw" : "qcow2");
    if (strcmp(target->format, "qcow2") != 0 && !is_raw(target) && !target->file_only) {
        return error_set(err, -EINVAL, "Files are made as qcow2 or raw, not as '%s'", target->format);
    }
    target->node = options->node_name ? g_strdup(options->node_name) : nodes_name_for(plan, target->path);
    target->create = json_object();
    target->backing_file = options->backing ? g_canonicalize_filename(options->backing, NULL) : NULL;
    target->backing_format = g_strdup(options->backing_format);
    if (target->backing_file && (is_raw(target) || target->existing || !target->backing_format)) {
        return error_set(err, -EINVAL, "--backing goes with a new qcow2 file, and with --backing-format");
    }
    return arguments_add(target->create, options->create, err);
}

int target_add(struct plan *plan, const char *word, const json_t *source, struct target **ret, struct error **err)
{
    struct target *target = g_new0(struct target, 1);
    int code;

    target->size = nodes_size(source);
    if (nodes_exists(plan, word) || !is_file_name(word)) {
        code = target_is_node(plan, target, word, err);
    } else {
        code = target_is_file(plan, target, word, err);
    }
    if (code) {
        target_free(target);
        return code;
    }
    g_ptr_array_add(plan->targets, target);
    *ret = target;
    return 0;
}

int target_add_new(struct plan *plan, const char *word, uint64_t size, struct target **ret, struct error **err)
{
    struct target *target = g_new0(struct target, 1);

    target->size = size;
    target->file_only = true;
    g_ptr_array_add(plan->targets, target);
    *ret = target;
    return target_is_file(plan, target, word, err);
}

static const char *protocol_of(const struct target *target)
{
    struct stat status;

    return stat(target->path, &status) == 0 && S_ISBLK(status.st_mode) ? "host_device" : "file";
}

static json_t *file_of(const struct target *target)
{
    return json_pack("{s:s, s:s}", "driver", protocol_of(target), "filename", target->path);
}

json_t *target_create_options(const struct target *target)
{
    json_t *all =
        json_pack("{s:s, s:I}", "driver", is_raw(target) ? "file" : target->format, "size", (json_int_t)target->size);

    if (is_raw(target)) {
        json_object_set_new(all, "filename", json_string(target->path));
    } else {
        json_object_set_new(all, "file", file_of(target));
    }
    if (target->backing_file) {
        json_object_set_new(all, "backing-file", json_string(target->backing_file));
        json_object_set_new(all, "backing-fmt", json_string(target->backing_format));
    }
    json_object_update(all, target->create);
    return all;
}

/* A job to its end and out of the list. Takes `options`. `prefix`: of its id; another one for each job, for events of
 * the last one may still be on their way. */
static int create_run(struct plan *plan, const char *prefix, const struct target *target, json_t *options,
                      struct error **err)
{
    g_autofree char *id = NULL;
    int code = plan_job_id(plan, prefix, target->node, &id, err);
    json_t *arguments = json_pack("{s:s*, s:o}", "job-id", id, "options", options);

    code = code ? code : client_execute(plan->client, "blockdev-create", json_incref(arguments), NULL, err);
    json_decref(arguments);
    if (!code) {
        code = progress_wait_jobs(plan->client, &id, 1, PROGRESS_QUIET, err);
        if (code == -EINTR) {
            client_execute(plan->client, "job-cancel", json_pack("{s:s}", "id", id), NULL, NULL);
        }
        client_execute(plan->client, "job-dismiss", json_pack("{s:s}", "id", id), NULL, NULL);
    }
    return code;
}

/* -EEXIST if the daemon can open something of that name. */
static int refuse_existing(struct plan *plan, const struct target *target, struct error **err)
{
    g_autofree char *name = nodes_name_for(plan, "probe");
    json_t *probe = json_pack("{s:s, s:s, s:s, s:b, s:s}", "driver", "file", "node-name", name, "filename",
                              target->path, "read-only", 1, "locking", "off");

    if (client_execute(plan->client, "blockdev-add", probe, NULL, NULL) < 0) {
        return 0;
    }
    client_execute(plan->client, "blockdev-del", json_pack("{s:s}", "node-name", name), NULL, NULL);
    error_set(err, -EEXIST, "'%s' is there already; nothing is written over it", target->path);
    error_hint(err, "Another name, or --existing --format FORMAT to write to what is there");
    return -EEXIST;
}

static int target_create(struct plan *plan, struct target *target, struct error **err)
{
    int code = refuse_existing(plan, target, err);

    if (code) {
        return code;
    }
    target->made = true;
    if (!is_raw(target)) { /* something for the image to lie in */
        json_t *empty = json_pack("{s:s, s:s, s:i}", "driver", "file", "filename", target->path, "size", 0);

        code = create_run(plan, "create-file", target, empty, err);
    }
    return code || target->file_only ? code : create_run(plan, "create", target, target_create_options(target), err);
}

static int target_open(struct plan *plan, struct target *target, struct error **err)
{
    json_t *options = json_pack("{s:s, s:s, s:o, s:s}", "driver", target->format, "node-name", target->node, "file",
                                file_of(target), "discard", "unmap");

    if (!is_raw(target)) {
        json_object_set_new(options, "backing", target->backing_node ? json_string(target->backing_node) : json_null());
    }
    int code = client_execute(plan->client, "blockdev-add", options, NULL, err);

    target->opened = !code;
    return code;
}

static FILE *notes_to(const struct plan *plan)
{
    return plan->options->async ? stderr : stdout; /* there stands the job's name alone */
}

static void target_tell(const struct plan *plan, const struct target *target, const char *done)
{
    char size[32];

    size_format(target->size, size, sizeof(size));
    fprintf(notes_to(plan), "%s %s (%s, %s)", done, target->path, target->format, size);
    fprintf(notes_to(plan), target->file_only ? "\n" : ", node '%s'\n", target->node);
    fflush(notes_to(plan));
}

int targets_make(struct plan *plan, struct error **err)
{
    int code = 0;

    for (unsigned i = 0; i < plan->targets->len && !code; i++) {
        struct target *target = plan->targets->pdata[i];

        if (!target->path) {
            continue;
        }
        if (!target->existing) {
            code = target_create(plan, target, err);
        }
        if (!code && !target->file_only) {
            code = target_open(plan, target, err);
        }
        if (!code && !target->file_only) {
            target_tell(plan, target, target->existing ? "opened" : "made");
        }
    }
    if (code) {
        targets_close(plan, true);
    }
    return code;
}

static void target_close(struct plan *plan, struct target *target, bool failed)
{
    auto_error err = NULL;

    if (target->opened &&
        client_execute(plan->client, "blockdev-del", json_pack("{s:s}", "node-name", target->node), NULL, &err) < 0) {
        fprintf(stderr, "node '%s' stays open: %s\n", target->node, err->message);
        return;
    }
    target->opened = false;
    if (!failed || !target->made) {
        return;
    }
    if (client_is_local(plan->client) && g_unlink(target->path) == 0) {
        fprintf(notes_to(plan), "removed %s\n", target->path);
    } else if (!client_is_local(plan->client) || errno != ENOENT) {
        fprintf(stderr, "the unfinished %s is still there\n", target->path);
    }
    target->made = false;
}

void targets_close(struct plan *plan, bool failed)
{
    for (unsigned i = plan->targets->len; i-- > 0;) {
        target_close(plan, plan->targets->pdata[i], failed);
    }
}

int targets_foresee(struct plan *plan, struct error **err)
{
    for (unsigned i = 0; i < plan->targets->len; i++) {
        const struct target *target = plan->targets->pdata[i];

        if (!target->path) {
            continue;
        }
        if (!target->existing && client_is_local(plan->client) && g_file_test(target->path, G_FILE_TEST_EXISTS)) {
            return error_set(err, -EEXIST, "'%s' is there already; nothing is written over it", target->path);
        }
        target_tell(plan, target, target->existing ? "would open" : "would make");
    }
    return 0;
}

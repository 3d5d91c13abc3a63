/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock create`, `amend`, `resize` and `close`: the verbs about one image by itself. Creating and amending are
 * jobs, which stay in the daemon's list until they are dismissed; here that is done as soon as they have ended.
 *
 * What makes an image shorter, and so loses data, has to be asked for by an option of its own. Which options an image
 * has is the daemon's knowledge.
 */
#include "base/size.h"
#include "tool/arguments.h"
#include "tool/verb/verb.h"
#include <errno.h>
#include <string.h>

static int create_plan(struct plan *plan, struct error **err)
{
    char **words = plan->options->words;
    struct target *target;
    struct step *step;
    uint64_t size;

    if (!words || !words[0] || !words[1] || words[2]) {
        return error_set(err, -EINVAL, "Name a file and its size: create FILE SIZE; see --help");
    }
    if (size_parse(words[1], &size) < 0) {
        return error_set(err, -EINVAL, "'%s' is no size; say 10G, 512M, ...", words[1]);
    }
    int code = target_add_new(plan, words[0], size, &target, err);

    if (!code) {
        json_t *arguments = json_pack("{s:o}", "options", target_create_options(target));

        code = plan_add_job(plan, "blockdev-create", target->node, arguments, &step, err);
        step->to_dismiss = true;
    }
    plan->stays = true;
    return code;
}

static int amend_plan(struct plan *plan, struct error **err)
{
    const struct verb_options *options = plan->options;
    const json_t *node;
    struct step *step;

    if (!options->words || options->words[1] || !options->create) {
        return error_set(err, -EINVAL, "Name a node and what to change: amend NODE -o KEY=VALUE; see --help");
    }
    int code = nodes_find(plan, options->words[0], &node, err);

    if (code) {
        return code;
    }
    json_t *change = json_pack("{s:s}", "driver", nodes_driver(node));
    json_t *arguments = json_pack("{s:s, s:o}", "node-name", options->words[0], "options", change);

    if (options->force) {
        json_object_set_new(arguments, "force", json_true());
    }
    code = plan_add_job(plan, "x-blockdev-amend", options->words[0], arguments, &step, err);
    step->to_dismiss = true;
    return code ? code : arguments_add(change, options->create, err);
}

/* "20G", "+1G" */
static int size_read(const char *text, uint64_t old, uint64_t *ret, struct error **err)
{
    bool more = text[0] == '+';
    uint64_t size;

    if (size_parse(text + more, &size) < 0 || (more && old + size < old)) {
        return error_set(err, -EINVAL, "'%s' is no size; say 20G, +1G, ...", text);
    }
    *ret = more ? old + size : size;
    return 0;
}

static int resize_plan(struct plan *plan, struct error **err)
{
    char **words = plan->options->words;
    const json_t *node;
    uint64_t size;

    if (!words || !words[0] || !words[1] || words[2]) {
        return error_set(err, -EINVAL, "Name a node and its new size: resize NODE SIZE or +SIZE; see --help");
    }
    int code = nodes_find(plan, words[0], &node, err);

    code = code ? code : size_read(words[1], nodes_size(node), &size, err);
    if (!code && size < nodes_size(node) && !plan->options->shrink) {
        code =
            error_set(err, -EINVAL, "'%s' would get shorter, and what is behind its new end would be lost", words[0]);
        error_hint(err, "If that is wanted, say --shrink");
    }
    if (!code) {
        plan_add(plan, "block_resize", json_pack("{s:s, s:I}", "node-name", words[0], "size", (json_int_t)size));
    }
    return code;
}

/* There is no transaction that closes: each for itself, and none is asked about beforehand. */
static int close_plan(struct plan *plan, struct error **err)
{
    char **words = plan->options->words;
    int code = words ? 0 : error_set(err, -EINVAL, "Name the nodes to close; see --help");

    for (unsigned i = 0; words && words[i] && !code; i++) {
        code = client_execute(plan->client, "blockdev-del", json_pack("{s:s}", "node-name", words[i]), NULL, err);
    }
    return code;
}

const struct verb verb_create = {
    "create", "FILE SIZE",
    "Makes an image, by the daemon. Nothing is written over. ('interlock img create' does it without one.)",
    (const char *const[]){"format", "option", "backing", "backing-format", "job-id", "wait", "async", "dry-run", NULL},
    create_plan};

const struct verb verb_amend = {
    "amend", "NODE -o KEY=VALUE",
    "Changes options of an image that is open (x-blockdev-amend): the key slots of an encrypted one.",
    (const char *const[]){"option", "force", "job-id", "wait", "async", "dry-run", "queue", "queue-timeout", NULL},
    amend_plan};

const struct verb verb_resize = {
    "resize", "NODE SIZE|+SIZE", "Makes the image longer or, with --shrink, shorter, while it is in use.",
    (const char *const[]){"shrink", "arg", "dry-run", "queue", "queue-timeout", NULL}, resize_plan};

const struct verb verb_close = {"close", "NODE...",
                                "Closes nodes that were opened by name and that nobody uses any more.",
                                (const char *const[]){NULL}, close_plan};

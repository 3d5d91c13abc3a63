/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock bitmap`: the dirty bitmaps of nodes, which know what has been written since they began, for incremental
 * backups. The verbs are the table at the end; several names on one command line are one transaction. `list` only asks,
 * and leaves the plan empty.
 *
 * What a bitmap holds is not looked into here: how much is dirty is the daemon's count.
 */
#include "base/size.h"
#include "tool/verb/verb.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

/* NODE's bitmaps, a line each. */
static unsigned list_of(const json_t *node)
{
    size_t index;
    json_t *bitmap;

    json_array_foreach(json_object_get(node, "dirty-bitmaps"), index, bitmap)
    {
        const char *name = "";
        json_int_t count = 0, granularity = 0;
        int recording = 0, busy = 0, persistent = 0, inconsistent = 0;
        char dirty[32], bit[32];

        json_unpack(bitmap, "{s?s, s:I, s:I, s:b, s:b, s:b, s?b}", "name", &name, "count", &count, "granularity",
                    &granularity, "recording", &recording, "busy", &busy, "persistent", &persistent, "inconsistent",
                    &inconsistent);
        size_format((uint64_t)count, dirty, sizeof(dirty));
        size_format((uint64_t)granularity, bit, sizeof(bit));
        printf("%-16s %-20s %10s dirty, by %s%s%s%s%s\n", json_string_value(json_object_get(node, "node-name")), name,
               dirty, bit, recording ? "" : ", disabled", persistent ? ", persistent" : "", busy ? ", in use" : "",
               inconsistent ? ", INCONSISTENT: says nothing, remove it" : "");
    }
    return (unsigned)index;
}

static int list(struct plan *plan, struct error **err)
{
    const char *name = plan->options->words ? plan->options->words[1] : NULL;
    const json_t *one;
    unsigned count = 0;
    size_t index;
    json_t *node;
    int code = nodes_load(plan, err);

    if (code || name) {
        code = code ? code : nodes_find(plan, name, &one, err);
        count = code ? 1 : list_of(one);
    } else {
        json_array_foreach(plan->nodes, index, node)
        {
            count += list_of(node);
        }
    }
    if (!count) {
        printf("no bitmaps\n");
    }
    return code;
}

static int add_options(const struct verb_options *options, json_t *arguments, struct error **err)
{
    uint64_t granularity;

    if (options->granularity) {
        if (size_parse(options->granularity, &granularity) < 0 || granularity > UINT32_MAX) {
            return error_set(err, -EINVAL, "'%s' is no granularity; say 64k, 1M, ...", options->granularity);
        }
        json_object_set_new(arguments, "granularity", json_integer((json_int_t)granularity));
    }
    if (options->persistent) {
        json_object_set_new(arguments, "persistent", json_true());
    }
    if (options->disabled) {
        json_object_set_new(arguments, "disabled", json_true());
    }
    return 0;
}

/* merge NODE TARGET SOURCE... */
static int merge(struct plan *plan, const char *command, struct error **err)
{
    char **words = plan->options->words;
    const char *from = plan->options->from ? plan->options->from : words[1];
    json_t *sources = json_array();

    for (unsigned i = 3; words[i]; i++) {
        json_array_append_new(sources, json_pack("{s:s, s:s}", "node", from, "name", words[i]));
    }
    plan_add(plan, command, json_pack("{s:s, s:s, s:o}", "node", words[1], "target", words[2], "bitmaps", sources));
    return words[3] ? 0 : error_set(err, -EINVAL, "Say what to merge: bitmap merge NODE NAME SOURCE...");
}

/* VERB NODE NAME... */
static int each(struct plan *plan, const char *command, struct error **err)
{
    char **words = plan->options->words;
    int code = 0;

    for (unsigned i = 2; words[i] && !code; i++) {
        json_t *arguments = json_pack("{s:s, s:s}", "node", words[1], "name", words[i]);

        plan_add(plan, command, arguments);
        if (!strcmp(words[0], "add")) {
            code = add_options(plan->options, arguments, err);
        }
    }
    return code;
}

static const struct bitmap_verb {
    const char *name, *command;
    int (*make)(struct plan *plan, const char *command, struct error **err);
} bitmap_verbs[] = {
    {"add", "block-dirty-bitmap-add", each},         {"remove", "block-dirty-bitmap-remove", each},
    {"clear", "block-dirty-bitmap-clear", each},     {"enable", "block-dirty-bitmap-enable", each},
    {"disable", "block-dirty-bitmap-disable", each}, {"merge", "block-dirty-bitmap-merge", merge},
};

static int bitmap_plan(struct plan *plan, struct error **err)
{
    char **words = plan->options->words;

    if (!words || !strcmp(words[0], "list")) {
        return list(plan, err);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(bitmap_verbs); i++) {
        const struct bitmap_verb *verb = &bitmap_verbs[i];

        if (strcmp(verb->name, words[0]) != 0) {
            continue;
        }
        if (!words[1] || !words[2]) {
            return error_set(err, -EINVAL, "'bitmap %s' needs a node and the name of a bitmap; see --help", words[0]);
        }
        return verb->make(plan, verb->command, err);
    }
    return error_set(err, -EINVAL, "There is no 'bitmap %s'; see 'interlock bitmap --help'", words[0]);
}

const struct verb verb_bitmap = {
    "bitmap", "[VERB [NODE [NAME...]]]",
    "Dirty bitmaps: what has been written to a node since they began. Verbs:\n"
    "  list [NODE]               all, with how much is dirty\n"
    "  add NODE NAME...          begin one (--granularity, --persistent, --disabled)\n"
    "  remove NODE NAME...       forget it, in the image too\n"
    "  clear NODE NAME...        begin anew\n"
    "  enable|disable NODE NAME...  record, or do not\n"
    "  merge NODE NAME SOURCE... mark in NAME what SOURCE has marked (--from)\n"
    "Several names are done as one: all or none.",
    (const char *const[]){"granularity", "persistent", "disabled", "from", "arg", "dry-run", NULL}, bitmap_plan};

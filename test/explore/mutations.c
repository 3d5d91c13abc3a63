/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The breakages. Each drops one bit of one claim on its way into the ledger (access_set_filter()), so the rule is gone
 * for whoever decides, while everything else, the request path included, is as it was.
 */
#include "test/explore/mutations.h"
#include "access/access.h"
#include "test/explore/exploration.h"
#include <glib.h>
#include <stdio.h>
#include <string.h>

#define BACKING "backing" /* a claim of every edge, not of a command */

const struct mutation mutations[] = {
    {"block-commit", "top", ACCESS_READ_DATA, 0,
     "who denies it there is a commit that has this image as base or between, and refuses by its other bits"},
    {"block-commit", "top", 0, ACCESS_WRITE_BENEATH, "a shrink needs attributes as well"},
    {"block-commit", "top", 0, ACCESS_GRAPH, NULL},
    {"block-commit", "top", 0, ACCESS_ATTRIBUTES, NULL},
    {"block-commit", "top", 0, ACCESS_WRITE_DATA,
     "the edge of the overlay that makes it a middle commit denies it too"},
    {"block-commit", "between(top, base)", ACCESS_WRITE_BENEATH, 0, "who denies it there reads, and reading is denied"},
    {"block-commit", "between(top, base)", 0, ACCESS_READ_DATA,
     "who reads there denies write-beneath, which the commit requires"},
    {"block-commit", "between(top, base)", 0, ACCESS_READ_METADATA, NULL},
    {"block-commit", "between(top, base)", 0, ACCESS_GRAPH,
     "a stream into it needs write-metadata as well, and its header is that of an image that ends stale"},
    {"block-commit", "between(top, base)", 0, ACCESS_WRITE_METADATA, "a stream into it needs graph as well"},
    {"block-commit", "between(top, base)", 0, ACCESS_ATTRIBUTES, "its size is that of an image that ends stale"},
    {"block-commit", "base", ACCESS_WRITE_DATA, 0, "who denies it there reads, and reading is denied"},
    {"block-commit", "base", ACCESS_ATTRIBUTES, 0, "who denies it there is a commit that reads it as its top"},
    {"block-commit", "base", 0, ACCESS_READ_DATA,
     "who reads there denies write-data or write-beneath, which a commit requires"},
    {"block-commit", "base", 0, ACCESS_WRITE_DATA, "another commit into it needs attributes as well"},
    {"block-commit", "base", 0, ACCESS_WRITE_BENEATH, "a shrink needs attributes as well"},
    {"block-commit", "base", 0, ACCESS_ATTRIBUTES,
     "a base that is longer than top shows zeroes there, as its overlays do"},
    {"block-commit", "overlays(top)", ACCESS_GRAPH, 0, "the graph's lock keeps the two headers apart"},
    {"block-stream", "top", ACCESS_WRITE_METADATA, 0, NULL},
    {"block-stream", "top", ACCESS_GRAPH, 0, NULL},
    {"block-stream", "top", 0, ACCESS_WRITE_BENEATH, NULL},
    {"block-stream", "range(top, bottom)", 0, ACCESS_WRITE_METADATA, NULL},
    {"block-stream", "below(bottom)", ACCESS_READ_METADATA, 0, NULL},
    {"blockdev-mirror", "node", ACCESS_READ_DATA, 0,
     "who denies it there is a commit, which needs attributes or write-beneath as well"},
    {"blockdev-mirror", "node", 0, ACCESS_WRITE_BENEATH,
     "a shrink needs attributes as well, and a commit denies read-data"},
    {"blockdev-mirror", "node", 0, ACCESS_ATTRIBUTES, NULL},
    {"blockdev-mirror", "overlays(node)", ACCESS_GRAPH, 0, "the graph's lock keeps the two headers apart"},
    {"blockdev-backup", "node", ACCESS_READ_DATA, 0, NULL},
    {"blockdev-backup", "node", 0, ACCESS_WRITE_BENEATH, NULL},
    {"blockdev-snapshot", "node", ACCESS_READ_DATA, 0, "the new edge requires it as well"},
    {"blockdev-snapshot", "overlays(node)", ACCESS_GRAPH, 0,
     "who denies it there refuses the snapshot for its node, or is a command"},
    {"block-export-add", "node", ACCESS_READ_DATA, 0, "who denies it there writes, and writing is denied"},
    {"block-export-add", "node", ACCESS_WRITE_DATA, 0, NULL},
    {"block-export-add", "node", 0, ACCESS_WRITE_BENEATH, NULL},
    {"block-export-add", "node", 0, ACCESS_WRITE_DATA, NULL},
    {"block_resize", "node", ACCESS_ATTRIBUTES, 0, NULL},
    {"block_resize", "node", ACCESS_WRITE_BENEATH, 0, NULL},
    {"change-backing-file", "node", ACCESS_GRAPH, 0, "the graph's lock keeps the two headers apart"},
    {BACKING, "backing edge", ACCESS_READ_DATA, 0, "who denies it there writes, and writing is denied"},
    {BACKING, "backing edge", 0, ACCESS_WRITE_DATA, NULL},
    {BACKING, "backing edge", 0, ACCESS_WRITE_BENEATH, NULL},
};
const unsigned mutation_count = G_N_ELEMENTS(mutations);

char *mutation_describe(int mutation)
{
    const struct mutation *which = &mutations[mutation];
    g_autofree char *bits = access_actions_format(which->require | which->deny);
    return g_strdup_printf("%s: %s does not %s %s", which->command, which->path, which->require ? "require" : "deny",
                           bits);
}

void mutation_apply(int which, const struct access_holder *holder, struct access_claim *claim)
{
    const struct mutation *mutation = which == NO_MUTATION ? NULL : &mutations[which];
    if (mutation && strcmp(access_holder_command(holder), mutation->command) == 0 &&
        g_strcmp0(claim->path, mutation->path) == 0) {
        claim->require &= ~mutation->require;
        claim->deny &= ~mutation->deny;
    }
}

/* --- trying them --- */

static unsigned count_admitted(const struct exploration *exploration)
{
    unsigned count = 0;
    for (unsigned i = 0; i < exploration->count; i++) {
        count += exploration->singles[i].verdict == VERDICT_ADMITTED;
        for (unsigned j = i; j < exploration->count; j++) {
            count += exploration_pair(exploration, i, j)->verdict == VERDICT_ADMITTED;
        }
    }
    return count;
}

/* True: it was noticed. */
static bool mutation_try(int mutation, const struct exploration *before, unsigned rounds)
{
    struct exploration *exploration = exploration_create(before->topology, before->runner, before->seed, mutation);
    g_autofree char *what = mutation_describe(mutation);
    exploration->quiet = true;
    const char *command = mutations[mutation].command;
    explore_verdicts_again(exploration, before, strcmp(command, BACKING) == 0 ? NULL : command);
    unsigned admitted = count_admitted(exploration);
    explore_until_failure(exploration, rounds);
    bool caught = exploration->failures > 0;
    if (caught) {
        printf("  caught: %s; admits %u more: %s\n", what, admitted, exploration->first);
    } else {
        const char *why = mutations[mutation].survives;
        printf("  survives: %s; admits %u more: %s\n", what, admitted, why ? why : "not on this topology");
    }
    fflush(stdout);
    exploration_free(exploration);
    return caught;
}

static bool noticed[G_N_ELEMENTS(mutations)]; /* on any topology */

unsigned mutations_try(const struct exploration *before, unsigned rounds, bool known_only)
{
    unsigned caught = 0;
    for (unsigned i = 0; i < mutation_count; i++) {
        if (known_only && mutations[i].survives) {
            continue;
        }
        bool here = mutation_try((int)i, before, rounds);
        noticed[i] |= here;
        caught += here;
    }
    return caught;
}

unsigned mutations_missed(void)
{
    unsigned missed = 0;
    for (unsigned i = 0; i < mutation_count; i++) {
        if (!noticed[i] && !mutations[i].survives) {
            g_autofree char *what = mutation_describe((int)i);
            printf("NOT CAUGHT: %s\n", what);
            missed++;
        }
    }
    return missed;
}

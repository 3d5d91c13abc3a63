/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_INSTANCE_H
#define INTERLOCK_TOOL_INSTANCE_H

#include "block/graph.h"
#include <glib.h>

/*
 * Operations of the schema's claim tables on the nodes of a graph, and how two of them lie to each other. A variant is
 * an operation under some conditions ("block-export-add (writable)"); an instance is a variant with its nodes ("on
 * top"). An instance is on a node, or on a range: from its top down to its base, where a base of NULL is below
 * everything.
 */
struct variant {
    const struct claim_table *table;
    unsigned conditions;
    bool on_range;
    char *name;
    GPtrArray *also; /* the names of other commands that claim the same */
};
struct instance {
    const struct variant *variant;
    struct node *bound[CLAIM_VARIABLE_COUNT];
    const struct node *high, *low; /* the same node for one that is on a node */
    char *text;                    /* "commit c>a" */
};

/* Every variant of every table: struct variant, those on ranges first. -ENOTSUP for a table whose variables this file
 * does not know how to choose. */
int variants_make(GPtrArray **ret, struct error **err);
/* Every instance of every variant in the graph: struct instance. */
GPtrArray *instances_make(const GPtrArray *variants, struct node *const *nodes, unsigned count);
/* A new operation_config of an instance; `id` is borrowed. `spare`: a node that nobody uses, for a target or overlay.
 */
struct operation_config instance_config(const struct instance *instance, const char *id, struct node *spare);

/* How `first` (A) lies to `second` (B); first is on a range if either is. */
struct relation {
    unsigned rank; /* for sorting */
    const char *words;
    bool inverse; /* the same with A and B exchanged is another relation, which stands for both if they are alike */
};
const struct relation *relation_find(const struct instance *first, const struct instance *second);
/* Which ends are next to each other: a finer distinction; g_free(). */
char *relation_neighbours(const struct instance *first, const struct instance *second);
/* What lies above an instance, as far as it could matter to it alone. */
const char *instance_place(const struct instance *instance);

#endif

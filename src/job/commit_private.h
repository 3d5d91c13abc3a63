/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_COMMIT_PRIVATE_H
#define INTERLOCK_JOB_COMMIT_PRIVATE_H

#include "block/dirty.h"
#include "block/graph.h"
#include "block/operation.h"
#include "block/user.h"
#include "job/commit.h"
#include "job/converge.h"
#include "job/policy.h"
#include "job/succession.h"

/* What the two halves of commit share: commit_start.c, its beginning, and commit.c, its run and its end. */
struct commit {
    struct job *job;
    struct graph *graph;
    struct node *top, *base; /* references */
    bool active;
    char *base_before;  /* commit_base_before() */
    char *backing_file; /* given by the user, or NULL */
    bool mask_protocol;
    struct operation *operation;
    bool base_writable;  /* a node_writable_begin() of ours */
    GPtrArray *overlays; /* struct node, references, writable by us */
    struct backend *source, *target;
    struct node *filter; /* active; a reference */
    bool filter_inserted;
    struct dirty *dirty;
    struct copy *copy;
    struct converge converge; /* active */
    uint64_t size;            /* T's */
};

/* Those of T, of which commit->overlays are writable. It is a view: nothing to be closed. */
struct overlays commit_overlays(const struct commit *commit);
/* An image that leans on T and is not among commit->overlays yet, or NULL. graph->lock is held. */
struct node *commit_fresh_overlay(const struct commit *commit);
/* Can the overlay's header name B? */
int commit_check_overlay(const struct commit *commit, const struct node *overlay, struct error **err);
/* The job, which nobody sees yet; commit->job. Everything that it needs of the graph is there. */
void commit_make_job(struct commit *commit, struct jobs *jobs, const struct job_config *config,
                     const struct converge_rule *rule);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_MIRROR_PRIVATE_H
#define INTERLOCK_JOB_MIRROR_PRIVATE_H

#include "job/converge.h"
#include "job/policy.h"
#include "job/succession.h"

/* What mirror.c (the job) and mirror_start.c (its beginning) share. */
struct backend;
struct bitmap;
struct operation;

/* Where an image that the target is to lean on at the end comes from. */
enum mirror_lean {
    MIRROR_LEANS_ON_NOTHING, /* what is below the target stays as it is */
    MIRROR_LEANS_BELOW,      /* on what the node leans on then (sync top) */
    MIRROR_LEANS_ON_NODE,    /* on the node (sync none) */
};

struct mirror {
    struct graph *graph;
    struct job *job;
    struct operation *operation; /* its CLAIM_NODE is the node, which may change when another job ends */
    struct node *target;         /* a reference: as it was named, maybe a filter over the image */
    struct node *image;          /* a reference: the image that the target is */
    bool image_writable;         /* a node_writable_begin() of ours */
    struct node *filter;         /* a reference */
    bool filter_inserted;
    struct backend *source, *destination;
    struct dirty *dirty;
    struct copy *copy;
    struct converge converge;
    struct overlays overlays; /* with replace */
    struct bitmap *bitmap;    /* busy because of us, or NULL */
    enum mirror_sync_mode sync;
    enum bitmap_sync_mode bitmap_mode;
    enum mirror_lean lean;
    bool replace, keep_backing;
    char *backing_file;
    uint64_t size;
    bool exact;   /* the target has been what the node was, at the end */
    bool pivoted; /* the target is the node's successor */
    bool wrote;
};

extern const struct job_policy mirror_policy;
/* The node that is mirrored, now. */
struct node *mirror_node(const struct mirror *mirror);
/* overlays_open_locked()'s check: can this one's header be given the target's name? `argument` is the mirror. */
int coroutine_fn mirror_check_overlay(struct node *overlay, void *argument, struct error **err);
/* The copy's extent and failed. */
int coroutine_fn mirror_extent(void *argument, uint64_t offset, uint64_t bytes, struct copy_extent *ret);
/* Takes back and frees all that there is of it; graph->lock is held. The job itself is not its. */
void coroutine_fn mirror_destroy_locked(struct mirror *mirror);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_SUCCESSION_H
#define INTERLOCK_JOB_SUCCESSION_H

#include "base/error.h"
#include "job/relink.h"
#include "loop/coroutine.h"
#include <glib.h>
#include <stdbool.h>

/*
 * One image takes the place of another: its overlays, with their headers, and its users. What the ends of jobs share
 * that replace a node by another which shows the same. Control thread.
 */
struct graph;
struct node;
struct transaction;

/* The overlays of an image, also those that lean on filters over it; stale ones do not count. */
struct overlays {
    struct graph *graph;
    struct node *image;  /* borrowed */
    GPtrArray *writable; /* struct node, references: those that are open for writing because of us */
};
void overlays_init(struct overlays *overlays, struct graph *graph, struct node *image);
/* One that is not open for writing by us yet, or NULL. graph->lock is held. */
struct node *overlays_fresh(const struct overlays *overlays);
/* Calls `visit` for each, until one call fails. graph->lock is held. */
int coroutine_fn overlays_each(const struct overlays *overlays,
                               int coroutine_fn (*visit)(struct node *overlay, void *argument, struct error **err),
                               void *argument, struct error **err);
/* Opens all of them for writing that are not; `check` (as `visit` above) may refuse one first. graph->lock is held, and
 * they are drained. */
int coroutine_fn overlays_open_locked(struct overlays *overlays,
                                      int coroutine_fn (*check)(struct node *overlay, void *argument,
                                                                struct error **err),
                                      void *argument, struct error **err);
/* Takes graph->lock at a moment when all are open for writing; on failure it is not held. */
int coroutine_fn overlays_lock(struct overlays *overlays,
                               int coroutine_fn (*check)(struct node *overlay, void *argument, struct error **err),
                               void *argument, struct error **err);
/* Gives back what was opened; graph->lock is held. Accepts a zeroed one. */
void coroutine_fn overlays_close_locked(struct overlays *overlays);

/* Who goes over to the successor. */
enum succession {
    SUCCESSION_USERS, /* who follows (backend_follow()), with filters that no overlay leans on */
    SUCCESSION_ALL    /* overlays too */
};
/*
 * Records the steps by which `to` takes the place of `image` and of the job filters over it. Filters of other jobs and
 * of users go along with what stands on them; backends that do not follow stay, their jobs are about the image. `own`:
 * the filter of the job whose end it is, which is taken out in the same step; or NULL. graph->lock is held, everything
 * above `image` is drained.
 */
void succession_record(struct transaction *transaction, struct node *image, struct node *own, struct node *to,
                       enum succession who);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_IMG_COPYING_H
#define INTERLOCK_TOOL_IMG_COPYING_H

#include "copy/copy.h"
#include "tool/img/img.h"

/*
 * How the sub-commands that move data use the copy engine: every failure ends them, and how far they are is shown.
 * Embed it first: the callbacks of `config` get it as their argument.
 */
struct img_copying {
    struct copy_config config; /* without control, failed and argument */
    struct copy_control control;
    struct img_progress *progress; /* or NULL */
    uint64_t done_before, of;      /* for the progress: what was done before, and how much it is altogether */
    uint64_t failed_offset;        /* after a failure */
    bool failed_reading;
};

/* Copies [0, bytes). 0, -ECANCELED (config.differs), or a negative errno. */
int coroutine_fn img_copying_run(struct img_copying *copying, uint64_t bytes);
/* The same, with an error that says where it was. */
int coroutine_fn img_copying_run_or_error(struct img_copying *copying, uint64_t bytes, struct error **err);
/* Bytes per second; 0: no limit. */
void img_copying_set_rate(struct img_copying *copying, uint64_t rate);

/* Several images as one, end to end, whose sizes are whole sectors. */
struct backend;
struct img_source {
    struct node *node; /* a reference */
    struct backend *backend;
    uint64_t start, size;
};
struct img_sources {
    struct img_source *list;
    unsigned count;
    uint64_t size; /* of all */
};
struct image_name;
/* Adds one, which is opened. */
int coroutine_fn img_sources_add(struct img *img, struct img_sources *sources, const struct image_name *name,
                                 struct error **err);
void coroutine_fn img_sources_clear(struct img_sources *sources); /* closes them; accepts a zeroed one */
/* The one that has the byte at `offset`, which is inside. */
const struct img_source *img_sources_at(const struct img_sources *sources, uint64_t offset);
/* Reads across their borders; what lies behind the end is zero. */
int coroutine_fn img_sources_read(const struct img_sources *sources, uint64_t offset, uint64_t bytes,
                                  struct buffers to);
/* What the whole chain of the one at `offset` says of it. */
struct extent;
int coroutine_fn img_sources_status(const struct img_sources *sources, uint64_t offset, uint64_t bytes,
                                    struct extent *ret);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_IMAGE_OPEN_H
#define INTERLOCK_TOOL_IMAGE_OPEN_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdbool.h>

/*
 * Images as the command lines of `interlock img` and `interlock io` name them: a path, "json:{...}", or (image_opts) a
 * list of options. Control thread, in coroutines.
 */
struct backend;
struct graph;
struct node;

struct image_name {
    const char *name;
    const char *format; /* -f; NULL: found out by the content, for reading only */
    bool image_opts;    /* `name` is DRIVER-OPTIONS, and `format` NULL */
    bool writable;      /* needs a format that is given: -EINVAL says how (never guessed from what a guest may write) */
    bool no_backing;    /* what the header names as backing file is not opened */
    bool check_only;    /* GRAPH_OPEN_CHECK of graph_open(): nothing is repaired on the way */
    bool no_data;       /* GRAPH_OPEN_NO_DATA: to be looked at; no key and no data file are needed */
    bool force_share;   /* -U */
    const char *cache;  /* "none", "writeback", ... as -t and -T; NULL: writeback */
    const char *discard; /* "unmap", "ignore", or NULL */
    const char *detect_zeroes;
    const char *key_secret; /* the id of the secret that opens it, by the option that `format` has for that; or NULL */
};

/* The path that a plain name stands for: itself, or what is behind "file:". NULL with an error: another protocol. */
const char *image_path(const char *name, struct error **err);
/* Opens it; one reference, the caller's: node_release(). The message names the image. A protocol that is not built in
 * is refused by name; what an image names is opened by the rules of open.c only. */
int coroutine_fn image_open(struct graph *graph, const struct image_name *name, struct node **ret, struct error **err);
/* The format that the content shows: "qcow2", "luks", or "raw". Reads the first bytes and nothing else. */
int coroutine_fn image_probe(struct graph *graph, const char *path, const char **ret, struct error **err);
/* The cache mode by its name: direct, no-flush. -EINVAL for an unknown one. */
int image_cache_mode(const char *name, bool *ret_direct, bool *ret_no_flush, struct error **err);

/* A backend that may do everything that these programs do, on a graph of their own (they are alone there). */
int coroutine_fn image_backend(struct graph *graph, struct node *node, bool writable, struct backend **ret,
                               struct error **err);
void coroutine_fn image_backend_destroy(struct backend *backend); /* accepts NULL */

/* "--object secret,id=..." of a program without a monitor (src/tool/object.c). In a coroutine: it may read a file. */
int coroutine_fn image_object_add(const char *text, struct error **err);

#endif

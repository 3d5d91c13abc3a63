/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_NBD_CONTEXTS_H
#define INTERLOCK_EXPORT_NBD_CONTEXTS_H

#include "base/error.h"
#include "export/nbd/nbd_format.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * The metadata contexts of an export: what its clients may ask block status about.
 */
struct backend;
struct bitmap;
struct node;

#define NBD_BITMAPS_MAX 126u
#define NBD_CONTEXTS_MAX (NBD_BITMAPS_MAX + 2)

enum nbd_context_kind { NBD_CONTEXT_IS_ALLOCATION, NBD_CONTEXT_IS_DEPTH, NBD_CONTEXT_IS_BITMAP };
struct nbd_context {
    enum nbd_context_kind kind;
    uint32_t id; /* on the wire */
    char *name;
    struct bitmap *bitmap; /* busy; or NULL */
    struct node *node;     /* whose it is, referenced; or NULL */
};
/* They do not change while the export lives. */
struct nbd_contexts {
    unsigned count;
    struct nbd_context *items;
};
/* Some of an export's contexts, by their place. */
struct nbd_choice {
    uint64_t bits[NBD_CONTEXTS_MAX / 64];
};

/* Control thread, graph->lock held: are the bitmaps that the options name there, and free? `node` is to be exported. */
int nbd_contexts_check(const struct block_export_options *options, struct node *node, struct error **err);
/* The same place, when that said yes: they are busy from now on. */
void nbd_contexts_open(struct nbd_contexts *contexts, const struct block_export_options *options, struct node *node);
/* Control thread, without the lock, when no client is left. */
void coroutine_fn nbd_contexts_close(struct nbd_contexts *contexts);

/* Adds to *choice what a query means: a context by its name; and, in a list, all of a name space ("base:", "qemu:",
 * "qemu:dirty-bitmap:"), or all ("", asked by no query at all). What is unknown means none. */
void nbd_contexts_choose(const struct nbd_contexts *contexts, const char *query, size_t bytes, bool listing,
                         struct nbd_choice *choice);
/* Adds the one of that number to *choice if it is `among` them and not chosen yet; false if not. */
bool nbd_contexts_choose_id(const struct nbd_contexts *contexts, const struct nbd_choice *among, uint32_t id,
                            struct nbd_choice *choice);
bool nbd_choice_has(const struct nbd_choice *choice, unsigned index);
unsigned nbd_choice_count(const struct nbd_choice *choice);

/* The extents of [offset, offset + bytes) as they go out, `max` at most; they may end before the range does. `out` has
 * room for so many of struct nbd_extended_status_extent or, if not `extended`, struct nbd_status_extent: then `bytes`
 * is less than 4 GiB. Returns how many, at least 1, or a negative errno. On the session's loop. */
int coroutine_fn nbd_context_status(const struct nbd_context *context, struct backend *backend, uint64_t offset,
                                    uint64_t bytes, bool extended, void *out, unsigned max);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_DRIVER_H
#define INTERLOCK_BLOCK_DRIVER_H

#include "base/buffers.h"
#include "base/error.h"
#include "block/image.h"
#include "block/node.h"
#include "block/request.h"
#include "schema/types.h"

/*
 * For who implements a node. A driver is one const table. Requests arrive from several loops at the same time: shared
 * state is protected by the driver's own locks. Open, close, set_writable, change_backing and truncate run on the
 * control thread with the node drained. A driver does I/O on its children through edge_*() (request.h) only.
 */
enum driver_kind { DRIVER_PROTOCOL, DRIVER_FORMAT, DRIVER_FILTER };

struct driver {
    const char *name; /* as in blockdev-options' `driver` */
    enum blockdev_driver id;
    enum driver_kind kind;
    size_t state_size;
    bool backing;              /* may have a backing edge */
    bool write_if_unallocated; /* honours REQUEST_IF_UNALLOCATED, atomically against other writes */
    bool compresses;           /* honours REQUEST_COMPRESSED (a filter passes it on, and need not say so) */
    bool grows_on_write;       /* writes behind the end are legal and move it (edge needs `attributes`) */
    bool guards;               /* a filter that all users of what it shows go through: graph_enter_filter_locked() */
    bool offloads;             /* read and write know views of bytes that are elsewhere (buffers.h), and answer
                                  -ENOTSUP where they need those in memory */
    unsigned filtered_claim;   /* ACCESS_ bits that a filter's edge requires for what the filter does of its own */

    /*
     * Makes node->state usable; sets node->size, node->limits (a filter has them from its child), node->filename
     * (g_strdup), header_backing*. Children `file`/`filtered` given in the options are attached already (node->file,
     * node->data); `backing` is opened and attached after this returns. node->writable says how to open. On error
     * cleans up after itself (close is not called).
     */
    int coroutine_fn (*open)(struct node *node, const struct blockdev_options *options, struct error **err);
    /* Flushes its caches and frees everything in state. Its children are still attached. */
    void coroutine_fn (*close)(struct node *node);

    /* Data. Ranges are inside the node (but for grows_on_write, and for a last block that the size cuts: then they go
     * on to its end), aligned to limits.alignment, not longer than limits.max_transfer. Return 0 or negative errno.
     * flags: enum request_flags. The request path moves node->size when a write grows it. A filter's NULL members
     * mean: pass the request to node->filtered. */
    int coroutine_fn (*read)(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to, unsigned flags);
    int coroutine_fn (*write)(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from, unsigned flags);
    /* NULL or -ENOTSUP: the request path writes zeroes (unless REQUEST_NO_FALLBACK). */
    int coroutine_fn (*write_zeroes)(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags);
    /* A hint; NULL or -ENOTSUP: nothing happens. */
    int coroutine_fn (*discard)(struct node *node, uint64_t offset, uint64_t bytes);
    /* Data acknowledged before this call are on stable storage when it returns. The driver flushes its own
     * metadata and then its file edge. NULL: the request path flushes the file/filtered child. */
    int coroutine_fn (*flush)(struct node *node);
    /* Describes [offset, offset + ret->bytes), 0 < ret->bytes <= bytes, of this layer alone. NULL: all data. */
    int coroutine_fn (*block_status)(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret);

    /* Control. NULL: not supported. `truncate` preallocates nothing (image.h: `grow`). */
    int coroutine_fn (*truncate)(struct node *node, uint64_t size, struct error **err);
    /* Opens for writing or stops writing (then everything is flushed). node->writable is changed by the caller after
     * success. Children have been made writable before / are released after. */
    int coroutine_fn (*set_writable)(struct node *node, bool writable, struct error **err);
    /* Writes the backing string and format into the header (NULL: none), flushed before and after; one sector write
     * makes the change, so a crash leaves the one or the other. */
    int coroutine_fn (*change_backing)(struct node *node, const char *file, const char *format, struct error **err);
    /* blockdev-reopen, drained, the graph's lock held: takes the node's direct, no_flush and discard as they are now,
     * and of `options` those that `reopenable` lists (ended by NULL; the others are what they were). On failure nothing
     * has changed; going back to the options before does not fail. NULL: there is nothing to do. */
    int coroutine_fn (*reopen)(struct node *node, const struct blockdev_options *options, struct error **err);
    const char *const *reopenable; /* NULL: none */
    /* For query-named-block-nodes: "format-specific" etc; may be NULL. */
    struct image_info_specific *(*specific_info)(struct node *node);
    uint64_t coroutine_fn (*allocated_size)(struct node *node); /* bytes on disk; NULL: ask the file child */
    /* The parent is about to do what `event` says: edge_event(). May let the parent wait. NULL: not interested. */
    void coroutine_fn (*event)(struct node *node, enum blkdebug_event event);
    /* Part of every drain that reaches the node, after its requests have ended: waits for what it does of its own that
     * outlives them. NULL: nothing does. */
    void coroutine_fn (*settle)(struct node *node);
    /* What can be done with an image besides I/O (image.h); NULL: nothing. */
    const struct image_driver *image;
};

/* Tells a filter that listens, beneath this edge, what its parent is about to do there: fault injection and
 * breakpoints. One test where there is no filter. Any loop, in a coroutine; locks may be held. */
void coroutine_fn edge_event_to_filter(struct node *filter, enum blkdebug_event event);
static inline void coroutine_fn edge_event(struct edge *edge, enum blkdebug_event event)
{
    if (__builtin_expect(edge->child->driver->kind == DRIVER_FILTER, 0)) {
        edge_event_to_filter(edge->child, event);
    }
}

/* Drivers are registered once at start by src/tool. */
void driver_register(const struct driver *driver);
const struct driver *driver_find(const char *name); /* NULL: unknown */

#endif

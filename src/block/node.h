/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_NODE_H
#define INTERLOCK_BLOCK_NODE_H

#include "access/access.h"
#include "base/list.h"
#include "loop/sync.h"
#include <jansson.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * The whole model. A graph has nodes; an edge is one parent's use of a child; a backend is a user's handle on the
 * root of a graph and the only way in from outside.
 *
 * 1. The graph changes only on the control thread, holding graph->lock, with the touched nodes drained: no request
 *    is inside them, and none enters.
 * 2. Readers of the graph (requests, on any loop) take no lock: an undrained node does not change.
 * 3. Draining stops requests where they enter, at the backends above; only backends count requests.
 */
struct graph;
struct node;
struct edge;
struct backend;
struct driver;
struct operation;
struct blockdev_options;

enum edge_role {
    EDGE_FILE,     /* a format's container */
    EDGE_DATA,     /* a second one: qcow2's external data file, the log of blklogwrites, what blkverify compares with */
    EDGE_BACKING,  /* where data come from that the parent has not */
    EDGE_FILTERED, /* what a filter shows */
    EDGE_TARGET,   /* where a filter puts data for its job, or the filter whose frozen view a node shows: the parent's
                      operation claims for it */
    EDGE_ROOT,     /* a backend's */
};

struct edge {
    struct list parent_link; /* node->children of the parent; unused for a root edge */
    struct list child_link;  /* node->parents of the child */
    struct node *parent;     /* NULL for a root edge */
    struct backend *backend; /* of a root edge */
    struct node *child;
    enum edge_role role;
    unsigned granted; /* ACCESS_ bits; the request path tests them */
    struct access_holder
        *holder;               /* its standing claims on the child; NULL for a root edge (its operation holds them) */
    struct operation *adopter; /* whose claims those count as, or NULL; edge_set_adopter() */
    struct list adopter_link;  /* adopter->adopted */
};

/* What a request to a node must respect; bytes, powers of two unless said. */
struct limits {
    uint32_t alignment;        /* of offset and length of reads and writes; the request path pads */
    uint32_t memory_alignment; /* of buffers */
    uint32_t cluster_size;     /* natural unit of allocation, or 0 */
    uint32_t zero_alignment;   /* best unit of write-zeroes and discard, or 0 */
    uint64_t max_transfer;     /* the request path splits, or 0 for no limit; any number */
};

struct node {
    struct list graph_link;
    struct graph *graph;
    char *name;
    const struct driver *driver;
    void *state;          /* the driver's, driver->state_size bytes, zeroed */
    struct list children; /* struct edge by parent_link */
    struct list parents;  /* struct edge by child_link */
    struct edge *file;    /* shortcuts into children, or NULL */
    struct edge *data;
    struct edge *backing;
    struct edge *filtered;
    struct edge *target;
    struct limits limits;
    atomic_uint_fast64_t size; /* bytes */
    unsigned references;       /* monitor's, edges', operations' */
    bool open;                 /* driver->open succeeded: there is something to close */
    bool monitor_owned;        /* made by blockdev-add or --blockdev */
    bool writable;             /* now */
    bool wants_writable;       /* opened for writing by its options */
    bool never_writable;       /* read-only by explicit option or by its nature */
    bool check_only;           /* opened to be checked or repaired: nothing is repaired or loaded on the way */
    bool encrypted;            /* what the file holds is; set by the driver */
    bool dirty;                /* the image says that it was not closed in order; set by the driver */
    bool no_data;              /* opened to be looked at: nobody reads its data; see GRAPH_OPEN_NO_DATA */
    unsigned writers;          /* node_writable_begin() */
    bool made_files_writable;  /* counts among the writers of its file and data children */
    bool discard;              /* discard=unmap */
    bool detect_zeroes, detect_zeroes_unmap;
    bool force_share;
    bool direct, no_flush; /* cache.direct, cache.no-flush */
    atomic_bool unsettled; /* has data that nobody flushes by itself: a flush of what leans on it flushes it too */
    bool job_filter;       /* inserted over an image, by a job or as driver.guards says: part of its head */
    struct operation *operation; /* of a job filter, or NULL: what it shows is this variable of its job's */
    unsigned variable;
    uint64_t device, inode; /* a protocol node's file, or 0: two opens of one file agree */
    char *stale;            /* why nobody may rely on its content any more, or NULL */
    char *filename;         /* what query-named-block-nodes shows, or NULL */
    char *header_backing;   /* the image's own backing string and format, or NULL */
    char *header_backing_format;
    char *header_data;         /* the name of its data file in the header, if no option gave one, or NULL */
    json_t *options;           /* what it was opened with, or NULL: a job's own node */
    char *opened_for;          /* who made it implicitly ("backing of top", "filter of block-commit j1"), or NULL */
    struct list bitmaps;       /* struct bitmap by link (block/bitmap.h) */
    struct range_lock overlap; /* used only when limits.alignment > 1, or by a driver that asked */
};

/* src/block/graph.h has what to do with a graph. */
#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_EXPORT_TYPE_H
#define INTERLOCK_EXPORT_EXPORT_TYPE_H

#include "base/list.h"
#include "export/export.h"
#include "loop/sync.h"
#include <stdatomic.h>

/*
 * For who implements a type of export; export.h is for who uses exports. Control thread, but for what is marked.
 *
 * 1. The table holds one reference to an export, every connected client one more. Deleting drops the table's; the
 *    last one ends the export: backend, claims, then the `deleted` event.
 * 2. backend, loops and the flags do not change while an export lives, so its clients read them on their own loop. What
 *    the backend is attached to does change: its clients ask for its size here, not there.
 * 3. A client, or a queue of one, stays with one of the loops; several are there only for types that say so.
 */
#define EXPORT_LOOPS_MAX 64
/* Where an export's clients are served; the first is `loop` of struct export. */
struct export_loops {
    unsigned count; /* at least 1; no two are the same */
    struct loop *items[EXPORT_LOOPS_MAX];
};
struct backend;
struct node;
struct operation;
struct export_type;
struct nbd_server;

struct export
{
    struct list link; /* exports->list */
    struct exports *exports;
    const struct export_type *type;
    char *id, *node_name;
    struct operation *operation;
    struct backend *backend;
    atomic_uint_fast64_t size; /* the backend's, for any thread; bytes */
    struct export_loops loops;
    struct loop *loop; /* loops.items[0] */
    bool writable, writethrough;
    bool opening;       /* its id is taken, nothing else yet */
    bool shutting_down; /* no new clients */
    atomic_bool ending; /* the same, for any thread: what takes long need not come to its end */
    bool condemned;     /* to be deleted, at once or when it is open */
    bool never_was;     /* its adding was taken back: nobody is told that it is gone */
    unsigned references;
    void *state; /* the type's */
};

struct export_type {
    const char *name;
    enum block_export_type id;
    bool several_loops; /* an export may have more than one */
    /* Could an export with these options be opened now? Changes nothing. */
    int (*check)(struct exports *exports, const struct block_export_options *options, struct error **err);
    /* May be NULL. The same with the graph, whose lock is held: `node` is what is to be exported. */
    int (*plan)(struct exports *exports, const struct block_export_options *options, struct node *node,
                struct error **err);
    /* backend and loop are set: from now on there may be clients. graph->lock is held since `plan` succeeded. */
    int (*open)(struct export *export, const struct block_export_options *options, struct error **err);
    /* May be NULL. The export's size has changed. */
    void (*resized)(struct export *export);
    /* No new clients; those that are connected are disconnected, which may take until their requests are done. */
    void (*disconnect)(struct export *export);
    /* No client is left. Takes graph->lock if it needs it. */
    void coroutine_fn (*close)(struct export *export);
};

struct exports {
    struct exports_config config;
    struct loop *loop;                              /* the control loop */
    struct list list;                               /* struct export by link */
    struct co_group alive[BLOCK_EXPORT_TYPE_COUNT]; /* exports, from the first moment to the last */
    struct co_group servers;                        /* the same for servers */
    struct nbd_server *nbd_server;                  /* NULL: not running */
};

/* A client came or went. */
void export_ref(struct export *export);
void export_unref(struct export *export);
/* Deletes every export of the type and waits until they, and those of it that are being deleted, are gone. */
void coroutine_fn exports_delete_type(struct exports *exports, const struct export_type *type);

extern const struct export_type nbd_export_type, vhost_user_export_type;
#ifdef INTERLOCK_FUSE
extern const struct export_type fuse_export_type;
#endif

#endif

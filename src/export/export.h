/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_EXPORT_H
#define INTERLOCK_EXPORT_EXPORT_H

#include "base/error.h"
#include "block/action.h"
#include "loop/connection.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <jansson.h>
#include <stdbool.h>

/*
 * The exports of a daemon and its NBD server. An export is an operation: it takes the claims of block-export-add and
 * holds them until it is gone. Control thread only; functions marked coroutine_fn in a coroutine.
 */
struct export;
struct exports;
struct graph;
struct loop;

struct exports_config {
    struct graph *graph;
    /* An export is gone (BLOCK_EXPORT_DELETED). May be NULL. */
    void (*deleted)(void *argument, const char *id);
    /* The loop of an iothread by its name, or NULL when there is none. It outlives the exports on it. May be NULL. */
    struct loop *(*find_iothread)(void *argument, const char *name);
    /* Makes the export's node longer: block_resize. 0 or a negative errno. May be NULL. */
    int coroutine_fn (*resize)(void *argument, struct export *export, uint64_t size);
    void *argument;
};
/* The node that clients of it see now: a job that ended may have moved them. Job filters are not its name. */
const char *export_node_name(const struct export *export);
struct exports *exports_create(const struct exports_config *config);
/* Asserts that no export is left and that the NBD server is stopped: exports_shutdown() comes first. Accepts NULL. */
void exports_destroy(struct exports *exports);

/* block-export-add as an action; the options are borrowed until its clean. Clients that come before all is decided
 * wait.
 */
void export_add_action(struct action *ret, struct exports *exports, const struct block_export_options *options);
/* block-export-del as an action: it begins to delete when all is decided. */
void export_del_action(struct action *ret, struct exports *exports, const struct block_export_del_args *args);
/* block-export-add alone. -EBUSY with a refusal when its claims clash. */
int coroutine_fn exports_add(struct exports *exports, const struct block_export_options *options, struct error **err);
/* The dry run of it, up to the decision; see struct command. */
int coroutine_fn exports_check_add(struct exports *exports, const struct block_export_options *options,
                                   json_t **ret_claims, struct error **err);
/* block-export-del: begins to delete. Safe: -EBUSY while clients are connected. Hard: disconnects them. `deleted` is
 * called when it is gone; until then exports_query() shows it as shutting down. */
int exports_delete(struct exports *exports, const char *id, enum block_export_remove_mode mode, struct error **err);
/* Does an export serve its clients on this loop? Then it must stay. */
bool exports_use_loop(struct exports *exports, const struct loop *loop);
/* query-block-exports: an array of {id, type, node-name, shutting-down}; a new reference. */
json_t *exports_query(struct exports *exports);

/* nbd-server-start */
struct nbd_server_config {
    const struct address *address;  /* borrowed */
    unsigned handshake_max_seconds; /* 0: no limit */
    unsigned max_connections;       /* 0: no limit */
    const char *tls_credentials;    /* id of credentials (crypto/tls.h): every client has to use TLS; or NULL */
    const char *tls_authorization;  /* id of an authorization (crypto/authorize.h) of them; or NULL: all */
    /* A client that had chosen an export has gone, and so many others that have are there still. May be NULL. */
    void (*left)(void *argument, unsigned remaining);
    void *argument;
    bool held; /* clients wait outside until nbd_server_admit() */
};
#define NBD_SERVER_HANDSHAKE_MAX_SECONDS 10u
#define NBD_SERVER_MAX_CONNECTIONS 100u
int coroutine_fn nbd_server_start(struct exports *exports, const struct nbd_server_config *config, struct error **err);
/* The exports that clients shall find are there: from now on they may come. Harmless where nothing was held, or no
 * server is. */
void nbd_server_admit(struct exports *exports);
/* nbd-server-stop: no more clients, those connected are disconnected, every NBD export is deleted; returns when all
 * that is done. */
int coroutine_fn nbd_server_stop(struct exports *exports, struct error **err);

/* query-nbd-clients: an array; a new reference. */
json_t *nbd_clients_query(const struct exports *exports);

/* Stops the server and deletes every export, hard. Returns when they are gone; requests that are inside are waited for.
 */
void coroutine_fn exports_shutdown(struct exports *exports);

#endif

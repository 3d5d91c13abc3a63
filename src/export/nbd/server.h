/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_NBD_SERVER_H
#define INTERLOCK_EXPORT_NBD_SERVER_H

#include "base/list.h"
#include "export/export_type.h"
#include "export/nbd/contexts.h"
#include "export/nbd/session.h"
#include "loop/loop.h"
#include "loop/sync.h"
#include <stdbool.h>
#include <stdint.h>

/*
 * The NBD server: who is connected to what. Control thread, but for what is marked.
 *
 * A client's life: accepted -> handshake (control loop) -> nbd_client_choose() -> transmission (one of the export's
 * loops, that with the fewest clients of it) -> gone (control loop). It is in server->clients from the first to the
 * last, and in its export's clients from the choice on; whoever finds it in a list may shut its connection down, at any
 * time.
 */
struct connection;
struct listener;
struct nbd_pool;
struct tls_credentials;

struct nbd_export {
    struct list link; /* server->exports; an empty list once clients shall not find it any more */
    struct nbd_server *server;
    struct export *export;
    char *name;
    char *description; /* or NULL */
    uint64_t serial;   /* no two of a server have the same */
    struct nbd_contexts contexts;
    struct list clients;                     /* struct nbd_client by export_link */
    unsigned loop_clients[EXPORT_LOOPS_MAX]; /* of them; by the place of their loop in export->loops */
};

struct nbd_server {
    struct exports *exports;
    struct loop *loop;
    struct listener *listener;
    unsigned handshake_max_seconds, max_connections;
    struct tls_credentials *tls;                      /* every client has to use TLS; or NULL */
    char *authorization;                              /* whom of them to let in, or NULL: all */
    struct list directory;                            /* struct nbd_export by link */
    struct list clients;                              /* struct nbd_client by link */
    unsigned client_count, chosen_count;              /* all; those that have chosen an export */
    void (*left)(void *argument, unsigned remaining); /* nbd_server_config's */
    void *argument;
    uint64_t serial;         /* the last one given */
    struct list pools;       /* of loops that have clients */
    struct loop_sleep pause; /* the acceptor's: after an error, or until a client goes */
    bool held;               /* nobody is served yet */
    bool stopping;
    struct co_group running; /* the acceptor and the clients */
};

struct nbd_client {
    struct list link, export_link;
    struct nbd_server *server;
    struct connection *connection; /* from its handshake on, with TLS, the layer */
    bool secure;                   /* by TLS */
    bool evicted;                  /* it was told to go, for the sake of others */
    char *address;                 /* where it is */
    char *identity;                /* by TLS, or NULL */
    int64_t since_ns;
    struct loop_timer deadline; /* of the handshake */
    struct loop_task gone;
    struct nbd_loop_pool *pool;
    struct nbd_export *chosen; /* referenced; NULL until chosen */
    unsigned place;            /* in chosen->export->loops: where it is served */
    struct nbd_counters counters;
    enum nbd_style style;     /* negotiated */
    struct nbd_choice choice; /* contexts of `chosen` */
};

/* A client has connected; takes the connection over. */
void nbd_server_adopt(struct nbd_server *server, struct connection *connection);
/* NULL: no such export. */
struct nbd_export *nbd_server_find(struct nbd_server *server, const char *name, size_t name_bytes);
/* The client's export, from now on referenced. */
void nbd_client_choose(struct nbd_client *client, struct nbd_export *chosen);

uint64_t nbd_export_size(const struct nbd_export *of);
/* Transmission flags; `contexts`: the client has chosen some of them. */
uint16_t nbd_export_flags(const struct nbd_export *of, enum nbd_style style, bool contexts);

/* handshake.c: negotiates until the transmission phase begins (0: client->chosen is set) or the client is to be
 * dropped (negative errno). */
int coroutine_fn nbd_handshake(struct nbd_client *client);

#endif

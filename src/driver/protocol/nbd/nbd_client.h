/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_PROTOCOL_NBD_NBD_CLIENT_H
#define INTERLOCK_DRIVER_PROTOCOL_NBD_NBD_CLIENT_H

#include "base/error.h"
#include "base/list.h"
#include "loop/connection.h"
#include "loop/coroutine.h"
#include "loop/sync.h"
#include <libnbd.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * The inside of the `nbd` driver: nbd.c (the node), nbd_link.c (commands on a connection, and its revival),
 * nbd_journal.c (what may be lost with it), nbd_dial.c (making a connection), nbd_tls.c (TLS beneath libnbd). Home is
 * the loop that opened the node: the control thread's.
 */
struct descriptor_wait;
struct nbd_entry;
struct nbd_journal;
struct tls_credentials;

/* Which server; does not change once the node is open. */
struct nbd_server {
    struct address address;
    char *export;
    char *context;        /* the metadata context that block status is */
    bool context_is_must; /* a server without it is refused */
    struct tls_credentials *credentials;
    char *host_name;          /* whose certificate the server must show, or NULL */
    struct co_group *tunnels; /* everything of nbd_tls.c that runs */
};

/* What a server says of its export; checked: no number of it can do harm. */
struct nbd_facts {
    uint64_t size;    /* a multiple of minimum */
    uint32_t minimum; /* bytes: alignment of requests, a power of two up to 64 KiB */
    uint32_t maximum; /* bytes of one read or write: a multiple of minimum */
    bool read_only, flush, fua, trim, zero, fast_zero, multi, context;
};

/* An attempt to connect, that can be given up. Zero-initialise. Home only. */
struct nbd_attempt {
    bool cancelled;
    struct connecting connecting;
    struct connection *connection; /* while TLS begins */
    struct descriptor_wait *wait;  /* while libnbd shakes hands, or what is journaled is written again */
    struct loop_timer *limit;      /* that cancels it; or NULL */
    int64_t patience_ns;           /* it does so when for this long nothing was written again */
};
/* Connects and shakes hands. On success *ret takes commands: nbd_close() it. -ECANCELED after nbd_attempt_cancel(). */
int coroutine_fn nbd_dial(const struct nbd_server *server, struct nbd_attempt *attempt, struct nbd_handle **ret,
                          struct nbd_facts *ret_facts, struct error **err);
/* The first half of it: a connected socket on which the server is about to greet, TLS done. */
int coroutine_fn nbd_dial_socket(const struct nbd_server *server, struct nbd_attempt *attempt, struct error **err);
void nbd_attempt_cancel(struct nbd_attempt *attempt);
void nbd_attempt_goes_on(struct nbd_attempt *attempt); /* the limit begins anew */
/* What libnbd last complained of, as an error. */
int nbd_library_error(struct error **err);
/* Tells a handle which of its directions are ready (DESCRIPTOR_ bits); under whatever lock guards it. -1: it broke. */
int nbd_handle_notify(struct nbd_handle *handle, unsigned ready);
unsigned nbd_handle_directions(struct nbd_handle *handle); /* DESCRIPTOR_ bits to wait for */
bool nbd_handle_is_lost(struct nbd_handle *handle);

/* Begins TLS over `plain`, and gives a socket on which the server speaks as if it began now. Takes `plain` over, also
 * when it fails. Moving bytes between the two goes on until either ends, as part of server->tunnels. */
int coroutine_fn nbd_tls_open(const struct nbd_server *server, struct connection *plain, int *ret_fd,
                              struct error **err);

enum nbd_command_kind { NBD_READ, NBD_WRITE, NBD_ZERO, NBD_TRIM, NBD_FLUSH, NBD_STATUS };
/* Lives on the stack of who waits for it. */
struct nbd_command {
    enum nbd_command_kind kind;
    uint32_t flags; /* LIBNBD_CMD_FLAG_ */
    uint64_t offset, bytes;
    void *memory;                        /* of a read or write */
    const char *context;                 /* of a status */
    uint64_t read_bytes;                 /* of a read: how much came */
    uint32_t extent_bytes, extent_flags; /* its answer: the first extent; 0 bytes: none came */
    /* nbd_link.c's */
    struct nbd_journal *journal; /* that its answer changes, or NULL: none */
    struct nbd_entry *entry;     /* to be added there */
    uint64_t sequence;           /* of a flush: the journal's when it was issued */
    struct coroutine *waiter;
    struct list link; /* nbd_link.waiting, while `queued` */
    bool queued, done;
    int result;
};

/* A connection, with one handle after the other. */
struct nbd_link {
    struct nbd_client *client;
    bool main;                   /* the one that always is; others only spare its lock and socket */
    _Atomic(struct loop *) loop; /* whose requests come here; the main one's: anybody's */
    struct co_mutex guard;       /* the handle's calls, and all of the following */
    struct nbd_handle *handle;   /* NULL: none, or not yet */
    atomic_bool up;              /* takes commands; written under guard */
    bool failing, dialing;
    char *reason;        /* why the last one was lost, until somebody is told; or NULL */
    unsigned generation; /* of handles */
    int64_t lost_ns, used_ns, retry_ns;
    struct list waiting;          /* commands that neither have an answer nor watch */
    struct nbd_command *watcher;  /* whose coroutine watches the socket, or is about to */
    struct descriptor_wait *wait; /* the watcher's, on watch_loop, for the directions `watched` */
    struct loop *watch_loop;
    unsigned watched;
    struct co_queue revival;     /* who waits for it to be up, or failing */
    struct nbd_attempt *attempt; /* of the coroutine that dials; home only, as is the next one */
    struct loop_sleep pause;
};

/* nbd_journal.c: what was acknowledged and is not flushed. */
struct nbd_journal {
    bool active; /* does not change */
    struct list entries;
    atomic_uint_fast64_t sequence; /* of the last change that was acknowledged; counted in any case */
    atomic_uint_fast64_t flushed;  /* of one that is not active: up to here a flush has come */
    atomic_bool forgotten;         /* the same: what came after that may be lost, and no flush has said so */
    atomic_uint_fast64_t cost;     /* bytes of memory */
    struct co_mutex flushing;      /* who makes room */
    struct range_lock changing;    /* by commands of an active one that are under way */
};
void nbd_journal_init(struct nbd_journal *journal, bool active);
void nbd_journal_finish(struct nbd_journal *journal);
/* An entry for a command that is about to be issued, which takes its data from there; g_free() it unless it is added.
 * NULL: no memory. */
struct nbd_entry *nbd_journal_prepare(struct nbd_command *command);
/* Its answer has come. */
void nbd_journal_add(struct nbd_journal *journal, struct nbd_entry *entry);
/* The same where it is not active. */
void nbd_journal_count(struct nbd_journal *journal, const struct nbd_command *command);
/* A connection was lost. */
void nbd_journal_lose(struct nbd_journal *journal);
/* Of one that is not active: did a flush that has succeeded come too late for something? Says so once. */
bool nbd_journal_take_loss(struct nbd_journal *journal);
/* A flush was answered, before whose issue `last` was journal->sequence. */
void nbd_journal_forget(struct nbd_journal *journal, uint64_t last);
bool nbd_journal_is_full(const struct nbd_journal *journal);
bool nbd_journal_is_empty(const struct nbd_journal *journal); /* under guard */
/* Home: issues everything again on a handle that is not in use yet. The attempt goes on with every answer. */
int coroutine_fn nbd_journal_replay(struct nbd_journal *journal, struct nbd_handle *handle, struct nbd_attempt *attempt,
                                    struct error **err);
/* Home: flushes, on a handle that is not in use any more, and forgets. */
int coroutine_fn nbd_journal_settle(struct nbd_journal *journal, struct nbd_handle *handle,
                                    struct nbd_attempt *attempt);
/* nbd_link.c: gives a command to libnbd; command->done and ->result when it has its answer. Negative: not given. */
int64_t nbd_command_issue(struct nbd_handle *handle, struct nbd_command *command);

enum { NBD_LINKS_MAX = 8 };
struct nbd_client {
    struct nbd_server server;
    struct nbd_facts facts; /* of the first connection; later ones must agree */
    const char *name;       /* the node's */
    int64_t reconnect_delay_ns;
    struct loop *home;
    atomic_bool closing;
    struct co_group dials, wakes, tunnels; /* coroutines that outlive requests */
    struct nbd_journal journal;
    unsigned link_count; /* 1 unless the server offers multi-conn */
    struct nbd_link links[NBD_LINKS_MAX];
};

/* Home. The first connection, with `handle` (its facts are in client->facts already). */
void nbd_links_init(struct nbd_client *client, struct nbd_handle *handle);
/* Home; no command is under way. Says goodbye to the server, gives up dialling. */
void coroutine_fn nbd_links_close(struct nbd_client *client);
/*
 * Any loop. Runs a command to its end: 0, or the server's refusal as a negative errno. If the connection is lost, or
 * was before, waits for another one up to the reconnect delay and issues it anew there; -EIO when that has passed.
 */
int coroutine_fn nbd_client_run(struct nbd_client *client, struct nbd_command *command);

#endif

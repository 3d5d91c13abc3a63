/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The NBD server: its listener, its clients and the exports they may choose from; and NBD as a type of export.
 * server.h has the life of a client. Invariants:
 * 1. all lists belong to the control thread. A client on an I/O thread comes back with a posted task, and its
 *    connection is closed only after it left the lists: shutting down what is in a list is always safe;
 * 2. a client that has chosen holds a reference to its export, so backend and loop outlive it;
 * 3. an export that is being deleted is not in the directory, and its clients' connections are shut down;
 * 4. the server is freed by nbd_server_stop() alone, after its acceptor, clients and exports are gone.
 * What is spoken is in handshake.c and session.c.
 */
#include "export/nbd/server.h"
#include "block/graph.h"
#include "crypto/authorize.h"
#include "crypto/tls.h"
#include "export/export_type.h"
#include "export/nbd/memory.h"
#include "export/nbd/nbd_format.h"
#include "export/nbd/session.h"
#include "loop/connection.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

/* How long the acceptor waits after an error that is not the clients' fault (no descriptors left). */
#define ACCEPT_PAUSE_NS INT64_C(100000000)
#define SECOND_NS INT64_C(1000000000)
/* How long a handshake may take while others wait for its place. */
#define HANDSHAKE_GRACE_NS SECOND_NS

/* The pool of a loop, while it has clients. */
struct nbd_loop_pool {
    struct list link; /* server->pools */
    struct loop *loop;
    struct nbd_pool *pool;
    unsigned clients;
};

static struct nbd_loop_pool *server_pool_ref(struct nbd_server *server, struct loop *loop)
{
    list_for_each (position, &server->pools) {
        struct nbd_loop_pool *found = container_of(position, struct nbd_loop_pool, link);

        if (found->loop == loop) {
            found->clients++;
            return found;
        }
    }
    struct nbd_loop_pool *fresh = g_new(struct nbd_loop_pool, 1);

    *fresh = (struct nbd_loop_pool){.loop = loop, .pool = nbd_pool_create(), .clients = 1};
    list_append(&server->pools, &fresh->link);
    return fresh;
}

static void server_pool_unref(struct nbd_loop_pool *pool)
{
    if (pool && --pool->clients == 0) {
        list_remove(&pool->link);
        nbd_pool_destroy(pool->pool);
        g_free(pool);
    }
}

/* ---- clients ---- */

static void client_end_run(void *argument)
{
    struct nbd_client *client = argument;
    struct nbd_server *server = client->server;
    bool had_chosen = client->chosen;

    list_remove(&client->link);
    list_remove(&client->export_link);
    connection_close(client->connection);
    server_pool_unref(client->pool);
    if (client->chosen) {
        client->chosen->loop_clients[client->place]--;
        export_unref(client->chosen->export);
    }
    g_free(client->address);
    g_free(client->identity);
    g_free(client);
    server->client_count--;
    loop_sleep_wake(&server->pause);
    if (had_chosen) {
        server->chosen_count--;
        if (server->left) {
            server->left(server->argument, server->chosen_count);
        }
    }
    co_group_leave(&server->running);
}

static void client_gone(struct loop_task *task)
{
    struct nbd_client *client = container_of(task, struct nbd_client, gone);

    coroutine_enter(coroutine_create(client_end_run, client));
}

/* On one of the export's loops. */
static void client_transmit_run(void *argument)
{
    struct nbd_client *client = argument;
    struct nbd_server *server = client->server;
    const struct export *export = client->chosen->export;
    struct nbd_session_config config = {
        .size = &export->size,
        .counters = &client->counters,
        .ending = &export->ending,
        .connection = client->connection,
        .backend = export->backend,
        .pool = client->pool->pool,
        .style = client->style,
        .contexts = &client->chosen->contexts,
        .choice = client->choice,
        .read_only = !export->writable,
        .writethrough = export->writethrough,
    };

    nbd_session_run(&config);
    if (loop_self() != server->loop) {
        connection_move(client->connection, server->loop);
    }
    loop_post(server->loop, &client->gone);
}

static void client_deadline(struct loop_timer *timer)
{
    connection_shutdown(container_of(timer, struct nbd_client, deadline)->connection);
}

static void client_run(void *argument)
{
    struct nbd_client *client = argument;
    struct nbd_server *server = client->server;
    int r;

    loop_timer_init(&client->deadline, client_deadline);
    if (server->handshake_max_seconds) {
        loop_timer_arm(&client->deadline, loop_clock_ns() + server->handshake_max_seconds * SECOND_NS);
    }
    r = nbd_handshake(client);
    loop_timer_cancel(&client->deadline);
    if (r < 0) {
        client_end_run(client);
        return;
    }
    struct loop *loop = client->chosen->export->loops.items[client->place];

    client->pool = server_pool_ref(server, loop);
    if (loop == server->loop) {
        client_transmit_run(client);
    } else {
        connection_move(client->connection, loop);
        loop_spawn(loop, client_transmit_run, client);
    }
}

void nbd_server_adopt(struct nbd_server *server, struct connection *connection)
{
    struct nbd_client *client = g_new0(struct nbd_client, 1);

    client->server = server;
    client->connection = connection;
    client->address = connection_peer(connection);
    client->since_ns = loop_now_ns();
    client->gone.run = client_gone;
    list_append(&server->clients, &client->link);
    list_init(&client->export_link);
    server->client_count++;
    co_group_enter(&server->running);
    coroutine_enter(coroutine_create(client_run, client));
}

void nbd_client_choose(struct nbd_client *client, struct nbd_export *chosen)
{
    g_assert(!client->chosen);
    client->chosen = chosen;
    client->server->chosen_count++;
    export_ref(chosen->export);
    list_append(&chosen->clients, &client->export_link);
    for (unsigned i = 1; i < chosen->export->loops.count; i++) {
        client->place = chosen->loop_clients[i] < chosen->loop_clients[client->place] ? i : client->place;
    }
    chosen->loop_clients[client->place]++;
}

static const char *style_name(enum nbd_style style)
{
    static const enum nbd_headers headers[] = {NBD_HEADERS_SIMPLE, NBD_HEADERS_STRUCTURED, NBD_HEADERS_EXTENDED};

    return nbd_headers_name(headers[style]);
}

static json_t *client_describe(const struct nbd_client *client)
{
    const struct nbd_export *chosen = client->chosen;
    json_t *info =
        json_pack("{s:s, s:b, s:s*, s:s, s:f, s:s}", "address", client->address, "tls", client->secure, "tls-identity",
                  client->identity, "phase",
                  nbd_client_phase_name(chosen ? NBD_CLIENT_PHASE_TRANSMISSION : NBD_CLIENT_PHASE_HANDSHAKE), "since",
                  (double)(loop_now_ns() - client->since_ns) / SECOND_NS, "headers", style_name(client->style));

    if (chosen) {
        const struct nbd_counters *counters = &client->counters;

        json_object_set_new(info, "id", json_string(chosen->export->id));
        json_object_set_new(info, "name", json_string(chosen->name));
        json_object_set_new(info, "thread-id",
                            json_integer(loop_thread_id(chosen->export->loops.items[client->place])));
        json_object_set_new(info, "requests", json_integer((json_int_t)atomic_load(&counters->requests)));
        json_object_set_new(info, "read-bytes", json_integer((json_int_t)atomic_load(&counters->read_bytes)));
        json_object_set_new(info, "written-bytes", json_integer((json_int_t)atomic_load(&counters->written_bytes)));
    }
    return info;
}

json_t *nbd_clients_query(const struct exports *exports)
{
    json_t *list = json_array();

    if (exports->nbd_server) {
        list_for_each (position, &exports->nbd_server->clients) {
            json_array_append_new(list, client_describe(container_of(position, struct nbd_client, link)));
        }
    }
    return list;
}

/* ---- exports ---- */

struct nbd_export *nbd_server_find(struct nbd_server *server, const char *name, size_t name_bytes)
{
    list_for_each (position, &server->directory) {
        struct nbd_export *export = container_of(position, struct nbd_export, link);

        if (strlen(export->name) == name_bytes && memcmp(export->name, name, name_bytes) == 0) {
            return export;
        }
    }
    return NULL;
}

uint64_t nbd_export_size(const struct nbd_export *of)
{
    return atomic_load(&of->export->size);
}

uint16_t nbd_export_flags(const struct nbd_export *of, enum nbd_style style, bool contexts)
{
    /* Every client goes through one backend: what one has flushed is stable, and what one wrote all of them read. */
    uint16_t flags =
        NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE;

    flags |= style >= NBD_STRUCTURED ? NBD_FLAG_SEND_DF : 0;
    flags |= style >= NBD_EXTENDED && contexts ? NBD_FLAG_BLOCK_STATUS_PAYLOAD : 0;
    /* Who is told of several connections opens them, and would wait for the second one. */
    flags &= (uint16_t)(of->server->max_connections == 1 ? ~NBD_FLAG_CAN_MULTI_CONN : ~0);
    flags |= of->export->writable ? NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO
                                  : NBD_FLAG_READ_ONLY;
    return flags;
}

/* The name that clients ask for. */
static const char *export_name(const struct block_export_options *options)
{
    return options->u.nbd.name ? options->u.nbd.name : options->node_name;
}

static int nbd_export_check(struct exports *exports, const struct block_export_options *options, struct error **err)
{
    struct nbd_server *server = exports->nbd_server;
    const char *name = export_name(options);
    const char *description = options->u.nbd.description;

    if (!server || server->stopping) {
        error_set(err, -ENOTCONN, "NBD server not running");
        error_hint(err, "Start it with nbd-server-start or --nbd-server first");
        return -ENOTCONN;
    }
    if (strlen(name) > NBD_STRING_MAX) {
        return error_set(err, -ENAMETOOLONG, "export name of '%s' is longer than %u bytes", options->id,
                         NBD_STRING_MAX);
    }
    if (description && strlen(description) > NBD_STRING_MAX) {
        return error_set(err, -ENAMETOOLONG, "description of '%s' is longer than %u bytes", options->id,
                         NBD_STRING_MAX);
    }
    if (nbd_server_find(server, name, strlen(name))) {
        return error_set(err, -EEXIST, "NBD server already has export named '%s'", name);
    }
    return 0;
}

static int nbd_export_plan(struct exports *exports, const struct block_export_options *options, struct node *node,
                           struct error **err)
{
    return nbd_contexts_check(options, node, err);
}

static int nbd_export_open(struct export *export, const struct block_export_options *options, struct error **err)
{
    /* The caller has waited since the first check. */
    int r = nbd_export_check(export->exports, options, err);

    if (r < 0) {
        return r;
    }
    struct nbd_export *opened = g_new0(struct nbd_export, 1);

    opened->server = export->exports->nbd_server;
    opened->export = export;
    opened->serial = ++opened->server->serial;
    nbd_contexts_open(&opened->contexts, options, graph_find(export->exports->config.graph, options->node_name));
    opened->name = g_strdup(export_name(options));
    opened->description = g_strdup(options->u.nbd.description);
    list_init(&opened->clients);
    list_append(&opened->server->directory, &opened->link);
    export->state = opened;
    return 0;
}

static void nbd_export_disconnect(struct export *export)
{
    struct nbd_export *closing = export->state;

    list_remove(&closing->link);
    list_for_each (position, &closing->clients) {
        connection_shutdown(container_of(position, struct nbd_client, export_link)->connection);
    }
}

static void coroutine_fn nbd_export_close(struct export *export)
{
    struct nbd_export *closing = export->state;

    g_assert(list_is_empty(&closing->clients) && list_is_empty(&closing->link));
    nbd_contexts_close(&closing->contexts);
    g_free(closing->name);
    g_free(closing->description);
    g_free(closing);
}

const struct export_type nbd_export_type = {
    .name = "nbd",
    .id = BLOCK_EXPORT_TYPE_NBD,
    .several_loops = true,
    .check = nbd_export_check,
    .plan = nbd_export_plan,
    .open = nbd_export_open,
    .disconnect = nbd_export_disconnect,
    .close = nbd_export_close,
};

/* ---- the server ---- */

/* Whoever has been shaking hands for longest, if for longer than HANDSHAKE_GRACE_NS; or NULL. */
static struct nbd_client *server_find_loiterer(struct nbd_server *server)
{
    list_for_each (position, &server->clients) {
        struct nbd_client *client = container_of(position, struct nbd_client, link);

        if (!client->chosen && !client->evicted) {
            /* The list is in order of arrival. */
            return loop_now_ns() - client->since_ns > HANDSHAKE_GRACE_NS ? client : NULL;
        }
    }
    return NULL;
}

/* Waits until there is room for one client more. One that has come and waits may put out one that only occupies a
 * place; not where the handshake is allowed to take for ever. */
static void coroutine_fn server_wait_for_room(struct nbd_server *server)
{
    while (server->held && !server->stopping) {
        loop_sleep_ns(&server->pause, ACCEPT_PAUSE_NS);
    }
    while (server->max_connections && server->client_count >= server->max_connections && !server->stopping) {
        struct nbd_client *loiterer = server->handshake_max_seconds ? server_find_loiterer(server) : NULL;

        if (loiterer) {
            loiterer->evicted = true;
            connection_shutdown(loiterer->connection);
        }
        loop_sleep_ns(&server->pause, HANDSHAKE_GRACE_NS / 4);
    }
}

static void server_accept_run(void *argument)
{
    struct nbd_server *server = argument;

    while (!server->stopping) {
        struct connection *connection;
        int r = listener_accept(server->listener, &connection);

        if (r == 0) {
            server_wait_for_room(server);
        }
        if (r == 0 && server->stopping) {
            connection_close(connection);
        } else if (r == 0) {
            nbd_server_adopt(server, connection);
        } else if (r == -ECANCELED) {
            break;
        } else {
            loop_sleep_ns(&server->pause, ACCEPT_PAUSE_NS);
        }
    }
    co_group_leave(&server->running);
}

static void server_free(struct nbd_server *server)
{
    co_group_destroy(&server->running);
    tls_credentials_put(server->tls);
    g_free(server->authorization);
    g_free(server);
}

/* The server's credentials, referenced. */
static int check_tls(const struct nbd_server_config *config, struct tls_credentials **ret, struct error **err)
{
    *ret = NULL;
    if (config->tls_authorization && !config->tls_credentials) {
        return error_set(err, -EINVAL, "'tls-authz' says who may come in by TLS, but there are no 'tls-creds'");
    }
    if (config->tls_authorization && !authorization_exists(config->tls_authorization)) {
        return error_set(err, -ENOENT, "There is no authorization '%s'", config->tls_authorization);
    }
    if (config->tls_credentials) {
        *ret = tls_credentials_get(config->tls_credentials, false, err);
    }
    return config->tls_credentials && !*ret ? -ENOENT : 0;
}

int coroutine_fn nbd_server_start(struct exports *exports, const struct nbd_server_config *config, struct error **err)
{
    struct tls_credentials *credentials = NULL;
    struct nbd_server *server;
    int r;

    if (exports->nbd_server) {
        return error_set(err, -EALREADY, "NBD server already running");
    }
    r = check_tls(config, &credentials, err);
    if (r < 0) {
        return r;
    }
    server = g_new0(struct nbd_server, 1);
    server->exports = exports;
    server->loop = exports->loop;
    server->handshake_max_seconds = config->handshake_max_seconds;
    server->max_connections = config->max_connections;
    server->left = config->left;
    server->held = config->held;
    server->argument = config->argument;
    server->tls = credentials;
    server->authorization = g_strdup(config->tls_authorization);
    list_init(&server->directory);
    list_init(&server->clients);
    list_init(&server->pools);
    co_group_init(&server->running);
    /* Taken before the first wait: a second start in between must not get through. */
    exports->nbd_server = server;
    server->stopping = true;
    r = listener_open(config->address, &server->listener, err);
    if (r < 0) {
        exports->nbd_server = NULL;
        server_free(server);
        return r;
    }
    server->stopping = false;
    co_group_enter(&exports->servers);
    co_group_enter(&server->running);
    coroutine_enter(coroutine_create(server_accept_run, server));
    return 0;
}

void nbd_server_admit(struct exports *exports)
{
    struct nbd_server *server = exports->nbd_server;

    if (server) {
        server->held = false;
        loop_sleep_wake(&server->pause);
    }
}

int coroutine_fn nbd_server_stop(struct exports *exports, struct error **err)
{
    struct nbd_server *server = exports->nbd_server;

    if (!server || server->stopping) {
        return error_set(err, -ENOTCONN, "NBD server not running");
    }
    server->stopping = true;
    listener_shutdown(server->listener);
    loop_sleep_wake(&server->pause);
    list_for_each (position, &server->clients) {
        connection_shutdown(container_of(position, struct nbd_client, link)->connection);
    }
    exports_delete_type(exports, &nbd_export_type);
    co_group_wait(&server->running);
    listener_close(server->listener);
    g_assert(list_is_empty(&server->directory) && list_is_empty(&server->clients) && list_is_empty(&server->pools));
    exports->nbd_server = NULL;
    server_free(server);
    co_group_leave(&exports->servers);
    return 0;
}

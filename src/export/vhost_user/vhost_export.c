/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * vhost-user-blk as a type of export: it listens, and serves one front end after the other; who comes meanwhile waits
 * in the socket's backlog. Invariants:
 * 1. one coroutine on the control loop accepts and serves; a front end that is connected holds a reference;
 * 2. whoever deletes the export shuts down what listens and what is connected; both are closed by that coroutine, or
 *    after its end;
 * 3. `session` is there only while somebody is connected.
 * What is spoken is in session.c, how the guest's requests are done in queue.c and request.c.
 */
#include "export/address.h"
#include "export/export_type.h"
#include "export/vhost_user/config.h"
#include "export/vhost_user/session.h"
#include "loop/connection.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

/* How long the acceptor waits after an error that is not the clients' fault (no descriptors left). */
#define ACCEPT_PAUSE_NS INT64_C(100000000)

struct vhost_export {
    struct export *export;
    struct listener *listener;
    struct connection *connection; /* the front end's, or NULL */
    struct vhost_session *session; /* or NULL */
    uint32_t block_bytes;
    unsigned queues;
    bool stopping;
    struct loop_sleep pause;
    struct co_group running; /* the acceptor */
};

static void coroutine_fn serve(struct vhost_export *vhost)
{
    struct export *export = vhost->export;
    struct vhost_session session;
    struct vhost_session_config config = {
        .connection = vhost->connection,
        .backend = export->backend,
        .size = &export->size,
        .loops = export->loops.items,
        .loop_count = export->loops.count,
        .queues = vhost->queues,
        .block_bytes = vhost->block_bytes,
        .writable = export->writable,
        .writethrough = export->writethrough,
        .name = export->id,
    };

    export_ref(export);
    vhost->session = &session;
    vhost_session_run(&session, &config);
    vhost->session = NULL;
    connection_close(vhost->connection);
    vhost->connection = NULL;
    export_unref(export);
}

static void accept_run(void *argument)
{
    struct vhost_export *vhost = argument;

    while (!vhost->stopping) {
        int r = listener_accept(vhost->listener, &vhost->connection);

        if (r == 0 && vhost->stopping) {
            connection_close(vhost->connection);
            vhost->connection = NULL;
        } else if (r == 0) {
            serve(vhost);
        } else if (r == -ECANCELED) {
            break;
        } else {
            loop_sleep_ns(&vhost->pause, ACCEPT_PAUSE_NS);
        }
    }
    co_group_leave(&vhost->running);
}

/* --- the type --- */

static int vhost_check(struct exports *exports, const struct block_export_options *options, struct error **err)
{
    const struct block_export_options_vhost_user_blk *wanted = &options->u.vhost_user_blk;
    uint64_t block = (uint64_t)wanted->logical_block_size;

    if (wanted->addr->type != SOCKET_ADDRESS_TYPE_UNIX && wanted->addr->type != SOCKET_ADDRESS_TYPE_FD) {
        return error_set(err, -EINVAL,
                         "Export '%s' needs an address of type 'unix' or 'fd': memory cannot be shared "
                         "by others",
                         options->id);
    }
    if (!is_power_of_two(block) || block < 512 || block > VHOST_BLOCK_BYTES_MAX) {
        return error_set(err, -EINVAL, "logical-block-size of export '%s' must be a power of 2 between 512 and %u",
                         options->id, VHOST_BLOCK_BYTES_MAX);
    }
    if (wanted->num_queues < 1 || wanted->num_queues > VHOST_QUEUES_MAX) {
        return error_set(err, -EINVAL, "num-queues of export '%s' must be between 1 and %u", options->id,
                         VHOST_QUEUES_MAX);
    }
    return 0;
}

static int coroutine_fn vhost_open(struct export *export, const struct block_export_options *options,
                                   struct error **err)
{
    const struct block_export_options_vhost_user_blk *wanted = &options->u.vhost_user_blk;
    struct vhost_export *vhost;
    struct listener *listener;
    struct address address;
    int r = address_from_options(wanted->addr, &address, err);

    if (r < 0) {
        return r;
    }
    r = listener_open(&address, &listener, err);
    address_clear(&address);
    if (r < 0) {
        return r;
    }
    vhost = g_new0(struct vhost_export, 1);
    vhost->export = export;
    vhost->listener = listener;
    vhost->block_bytes = (uint32_t)wanted->logical_block_size;
    vhost->queues = (unsigned)wanted->num_queues;
    co_group_init(&vhost->running);
    co_group_enter(&vhost->running);
    export->state = vhost;
    coroutine_enter(coroutine_create(accept_run, vhost));
    return 0;
}

static void vhost_resized(struct export *export)
{
    struct vhost_export *vhost = export->state;

    if (vhost->session) {
        vhost_session_resized(vhost->session);
    }
}

static void vhost_disconnect(struct export *export)
{
    struct vhost_export *vhost = export->state;

    vhost->stopping = true;
    listener_shutdown(vhost->listener);
    loop_sleep_wake(&vhost->pause);
    if (vhost->connection) {
        connection_shutdown(vhost->connection);
    }
}

static void coroutine_fn vhost_close(struct export *export)
{
    struct vhost_export *vhost = export->state;

    co_group_wait(&vhost->running);
    listener_close(vhost->listener);
    co_group_destroy(&vhost->running);
    g_free(vhost);
}

const struct export_type vhost_user_export_type = {
    .name = "vhost-user-blk",
    .id = BLOCK_EXPORT_TYPE_VHOST_USER_BLK,
    .several_loops = true,
    .check = vhost_check,
    .open = vhost_open,
    .resized = vhost_resized,
    .disconnect = vhost_disconnect,
    .close = vhost_close,
};

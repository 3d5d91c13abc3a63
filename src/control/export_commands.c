/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Handlers of the commands about exports, the NBD server and I/O threads: a translation from the commands' arguments
 * to what src/export and iothread.h take. Each runs in a coroutine on the control loop and is called by the generated
 * dispatcher only. It keeps no state and decides nothing.
 * Addresses come in two shapes, the command line's and the older one of commands; both become the loop's here.
 */
#include "control/control.h"
#include "control/iothread.h"
#include "export/address.h"
#include "export/export.h"
#include "loop/connection.h"
#include "schema/commands.h"
#include "schema/marshal.h"
#include <errno.h>
#include <glib.h>
#include <stdlib.h>

static int address_from_legacy(const struct socket_address_legacy *options, struct address *ret, struct error **err)
{
    struct socket_address same = {.type = options->type};

    switch (options->type) {
    case SOCKET_ADDRESS_TYPE_FD:
        same.u.fd = *options->u.fd.data;
        break;
    case SOCKET_ADDRESS_TYPE_INET:
        same.u.inet = *options->u.inet.data;
        break;
    default:
        same.u.unix_ = *options->u.unix_.data;
        break;
    }
    return address_from_options(&same, ret, err);
}

int coroutine_fn command_nbd_server_start(struct control *control, struct nbd_server_start_args *args,
                                          struct error **err)
{
    struct address address;
    int code = address_from_legacy(args->addr, &address, err);

    if (!code) {
        struct nbd_server_config config = {.address = &address,
                                           .handshake_max_seconds = (unsigned)args->handshake_max_seconds,
                                           .max_connections = (unsigned)args->max_connections,
                                           .tls_credentials = args->tls_creds,
                                           .tls_authorization = args->tls_authz};

        code = nbd_server_start(control->exports, &config, err);
        address_clear(&address);
    }
    return code;
}

int coroutine_fn command_nbd_server_stop(struct control *control, struct error **err)
{
    return nbd_server_stop(control->exports, err);
}

int coroutine_fn command_block_export_add(struct control *control, struct block_export_options *args,
                                          struct error **err)
{
    return exports_add(control->exports, args, err);
}

int coroutine_fn command_block_export_add_check(struct control *control, struct block_export_options *args,
                                                json_t **ret_claims, struct error **err)
{
    return exports_check_add(control->exports, args, ret_claims, err);
}

int coroutine_fn command_block_export_del(struct control *control, struct block_export_del_args *args,
                                          struct error **err)
{
    return exports_delete(control->exports, args->id, args->mode, err);
}

int coroutine_fn command_query_block_exports(struct control *control, struct block_export_info_list **ret,
                                             struct error **err)
{
    json_t *array = exports_query(control->exports);
    int code;

    *ret = g_new0(struct block_export_info_list, 1);
    code = marshal_read(&block_export_info_list_type, array, "exports", MARSHAL_JSON, *ret, err);
    json_decref(array);
    return code;
}

int coroutine_fn command_query_nbd_clients(struct control *control, struct nbd_client_info_list **ret,
                                           struct error **err)
{
    json_t *array = nbd_clients_query(control->exports);
    int code;

    *ret = g_new0(struct nbd_client_info_list, 1);
    code = marshal_read(&nbd_client_info_list_type, array, "clients", MARSHAL_JSON, *ret, err);
    json_decref(array);
    return code;
}

int coroutine_fn command_query_iothreads(struct control *control, struct iothread_info_list **ret, struct error **err)
{
    json_t *array = iothreads_query(control->iothreads);
    int code;

    *ret = g_new0(struct iothread_info_list, 1);
    code = marshal_read(&iothread_info_list_type, array, "iothreads", MARSHAL_JSON, *ret, err);
    json_decref(array);
    return code;
}

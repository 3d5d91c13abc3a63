/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The schema's addresses as the loop's: a translation for exports, commands and the command line. It looks nothing up
 * and opens nothing, but for the names of descriptors that came from a service manager. Older commands have another
 * shape of the same (export_commands.c).
 */
#include "export/address.h"
#include "loop/activation.h"
#include <errno.h>
#include <glib.h>
#include <stdlib.h>

static int address_from_fd(const char *text, struct address *ret, struct error **err)
{
    char *end;
    long fd = g_ascii_isdigit(*text) ? strtol(text, &end, 10) : activation_find(text);

    if (fd < 0 || fd > G_MAXINT || (g_ascii_isdigit(*text) && *end)) {
        error_set(err, -EINVAL, "'%s' is not the number of a file descriptor, nor the name of one", text);
        error_hint(err, "Names are those that the service manager passed in LISTEN_FDNAMES");
        return -EINVAL;
    }
    *ret = (struct address){.kind = ADDRESS_FD, .fd = (int)fd};
    return 0;
}

static void address_from_inet(const struct inet_socket_address *inet, struct address *ret)
{
    *ret = (struct address){.kind = ADDRESS_INET, .host = g_strdup(inet->host), .port = g_strdup(inet->port), .fd = -1};
}

static void address_from_unix(const struct unix_socket_address *unix_address, struct address *ret)
{
    *ret = (struct address){
        .kind = ADDRESS_UNIX, .path = g_strdup(unix_address->path), .abstract = unix_address->abstract, .fd = -1};
}

int address_from_options(const struct socket_address *options, struct address *ret, struct error **err)
{
    switch (options->type) {
    case SOCKET_ADDRESS_TYPE_FD:
        return address_from_fd(options->u.fd.str, ret, err);
    case SOCKET_ADDRESS_TYPE_INET:
        address_from_inet(&options->u.inet, ret);
        return 0;
    default:
        address_from_unix(&options->u.unix_, ret);
        return 0;
    }
}

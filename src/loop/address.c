/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Addresses of stream sockets as text. "unix:/path" and "/path" are unix sockets, "unix:@name" one in
 * the abstract name space, "host:port" and "[::1]:port" internet ones (an empty host: every interface).
 * What a name resolves to is not decided here.
 */
#include "loop/connection.h"
#include <errno.h>
#include <glib.h>
#include <string.h>
#include <sys/un.h>

#define UNIX_PATH_MAX_BYTES (sizeof(((struct sockaddr_un *)NULL)->sun_path) - 1)

void address_clear(struct address *address)
{
    g_free(address->path);
    g_free(address->host);
    g_free(address->port);
    *address = (struct address){.fd = -1};
}

static int address_parse_unix(const char *path, struct address *ret, struct error **err)
{
    bool abstract = path[0] == '@';

    path += abstract;
    if (!*path) {
        return error_set(err, -EINVAL, "The path of a unix socket is empty");
    }
    if (strlen(path) > UNIX_PATH_MAX_BYTES - abstract) {
        return error_set(err, -ENAMETOOLONG, "The unix socket path '%s' is longer than %zu bytes", path,
                         UNIX_PATH_MAX_BYTES);
    }
    *ret = (struct address){.kind = ADDRESS_UNIX, .path = g_strdup(path), .abstract = abstract, .fd = -1};
    return 0;
}

int address_parse(const char *text, struct address *ret, struct error **err)
{
    const char *host = text, *colon = strrchr(text, ':');
    size_t host_length;

    if (g_str_has_prefix(text, "unix:")) {
        return address_parse_unix(text + 5, ret, err);
    }
    if (text[0] == '/') {
        return address_parse_unix(text, ret, err);
    }
    if (!colon || !colon[1]) {
        return error_set(err, -EINVAL, "'%s' is neither unix:path, nor /path, nor host:port", text);
    }
    host_length = (size_t)(colon - text);
    if (text[0] == '[') {
        if (host_length < 3 || colon[-1] != ']') {
            return error_set(err, -EINVAL, "'%s' lacks a ']' before its port", text);
        }
        host++;
        host_length -= 2;
    } else if (memchr(text, ':', host_length)) {
        error_set(err, -EINVAL, "'%s' has more than one ':'", text);
        error_hint(err, "Put an IPv6 address in brackets: [::1]:10809");
        return -EINVAL;
    }
    *ret = (struct address){
        .kind = ADDRESS_INET, .host = g_strndup(host, host_length), .port = g_strdup(colon + 1), .fd = -1};
    return 0;
}

char *address_format(const struct address *address)
{
    switch (address->kind) {
    case ADDRESS_UNIX:
        return g_strdup_printf("unix:%s%s", address->abstract ? "@" : "", address->path);
    case ADDRESS_INET:
        return g_strdup_printf(strchr(address->host, ':') ? "[%s]:%s" : "%s:%s", address->host, address->port);
    case ADDRESS_FD:
        break;
    }
    return g_strdup_printf("fd:%d", address->fd);
}

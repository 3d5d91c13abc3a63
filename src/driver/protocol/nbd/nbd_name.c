/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Names of NBD exports and what they mean: the URIs of
 * https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md, and the older names with colons. Owns both
 * directions; opens nothing.
 *
 * 1. Every part of a name means something: what is not known in it is refused.
 * 2. What nbd_name_format() makes, nbd_name_parse() takes apart to the same options, but for TLS.
 */
#include "driver/protocol/nbd/nbd_name.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

#define DEFAULT_PORT "10809"
#define EXPORT_MARK ":exportname="

bool nbd_name_is(const char *name)
{
    static const char *const schemes[] = {"nbd:", "nbd+tcp:", "nbd+unix:", "nbds:", "nbds+tcp:", "nbds+unix:"};
    for (unsigned i = 0; i < G_N_ELEMENTS(schemes); i++) {
        if (!g_ascii_strncasecmp(name, schemes[i], strlen(schemes[i]))) {
            return true;
        }
    }
    return false;
}

static int refuse(const char *name, const char *why, struct error **err)
{
    int r = error_set(err, -EINVAL, "'%s' is no name of an NBD export: %s", name, why);
    error_hint(err, "nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH, nbd:HOST:PORT:exportname=EXPORT and "
                    "nbd:unix:PATH:exportname=EXPORT are");
    return r;
}

/* `server` is taken over. NULL members are left out. */
static int options_of(const char *name, json_t *server, const char *export, const char *creds, const char *host_name,
                      json_t **ret, struct error **err)
{
    json_t *options = server
                          ? json_pack("{s:s, s:o, s:s*, s:s*, s:s*}", "driver", "nbd", "server", server, "export",
                                      export && *export ? export : NULL, "tls-creds", creds, "tls-hostname", host_name)
                          : NULL;
    if (!options) {
        return refuse(name, "it is not valid UTF-8", err);
    }
    *ret = options;
    return 0;
}

static json_t *server_unix(const char *path)
{
    return json_pack("{s:s, s:s}", "type", "unix", "path", path);
}

static json_t *server_inet(const char *host, const char *port)
{
    return json_pack("{s:s, s:s, s:s}", "type", "inet", "host", host, "port", port);
}

/* --- URIs --- */

struct uri_parts {
    char *socket, *creds, *host_name;
};

static int uri_query(const char *name, const char *query, bool secure, struct uri_parts *ret, struct error **err)
{
    GUriParamsIter iter;
    char *key, *value;
    int r = 0;
    g_uri_params_iter_init(&iter, query, -1, "&", G_URI_PARAMS_NONE);
    GError *problem = NULL;
    while (r == 0 && g_uri_params_iter_next(&iter, &key, &value, &problem)) {
        char **to = !strcmp(key, "socket")                   ? &ret->socket
                    : secure && !strcmp(key, "tls-creds")    ? &ret->creds
                    : secure && !strcmp(key, "tls-hostname") ? &ret->host_name
                                                             : NULL;
        if (!to || *to) {
            g_autofree char *why = g_strdup_printf("'%s' is not known, or there twice", key);
            r = refuse(name, why, err);
            g_free(value);
        } else {
            *to = value;
        }
        g_free(key);
    }
    if (problem) {
        g_error_free(problem);
        r = r < 0 ? r : refuse(name, "what stands behind '?' is malformed", err);
    }
    return r;
}

static int uri_options(const char *name, GUri *uri, json_t **ret, struct error **err)
{
    g_autofree char *scheme = g_ascii_strdown(g_uri_get_scheme(uri), -1);
    bool secure = g_str_has_prefix(scheme, "nbds"), local = g_str_has_suffix(scheme, "+unix");
    const char *host = g_uri_get_host(uri), *path = g_uri_get_path(uri);
    struct uri_parts parts = {0};
    json_t *server = NULL;
    int r = g_uri_get_query(uri) ? uri_query(name, g_uri_get_query(uri), secure, &parts, err) : 0;
    if (r == 0 && local && (!parts.socket || (host && *host))) {
        r = refuse(name, "a unix socket is given as ?socket=PATH, without a host", err);
    } else if (r == 0 && !local && parts.socket) {
        r = refuse(name, "a socket goes with nbd+unix://", err);
    } else if (r == 0 && g_uri_get_userinfo(uri)) {
        r = refuse(name, "users are told by the TLS credentials", err);
    } else if (r == 0 && secure && !parts.creds) {
        r = refuse(name, "TLS needs credentials", err);
        error_hint(err, "Add ?tls-creds=ID with the id of an object tls-creds-x509 or tls-creds-psk");
    }
    if (r == 0) {
        g_autofree char *port = g_uri_get_port(uri) > 0 ? g_strdup_printf("%d", g_uri_get_port(uri)) : NULL;
        server = local ? server_unix(parts.socket)
                       : server_inet(host && *host ? host : "localhost", port ? port : DEFAULT_PORT);
        r = options_of(name, server, path && *path == '/' ? path + 1 : path, parts.creds, parts.host_name, ret, err);
    }
    g_free(parts.socket);
    g_free(parts.creds);
    g_free(parts.host_name);
    return r;
}

/* --- with colons --- */

static int old_options(const char *name, json_t **ret, struct error **err)
{
    const char *rest = name + strlen("nbd:"), *mark = strstr(rest, EXPORT_MARK);
    g_autofree char *where = mark ? g_strndup(rest, (size_t)(mark - rest)) : g_strdup(rest);
    const char *export = mark ? mark + strlen(EXPORT_MARK) : NULL;
    if (g_str_has_prefix(where, "unix:")) {
        const char *path = where + strlen("unix:");
        return *path ? options_of(name, server_unix(path), export, NULL, NULL, ret, err)
                     : refuse(name, "the path of the socket is empty", err);
    }
    char *colon = strrchr(where, ':');
    if (!colon || !colon[1]) {
        return refuse(name, "it has no port", err);
    }
    *colon = 0;
    char *host = where;
    size_t length = strlen(host);
    if (*host == '[' && host[length - 1] == ']') {
        host[length - 1] = 0;
        host++;
    }
    return options_of(name, server_inet(*host ? host : "localhost", colon + 1), export, NULL, NULL, ret, err);
}

int nbd_name_parse(const char *name, json_t **ret, struct error **err)
{
    if (g_str_has_prefix(name, "nbd:") && !g_str_has_prefix(name, "nbd://")) {
        return old_options(name, ret, err);
    }
    GError *problem = NULL;
    GUri *uri = g_uri_parse(name, G_URI_FLAGS_ENCODED_QUERY | G_URI_FLAGS_PARSE_RELAXED, &problem);
    if (!uri) {
        int r = refuse(name, problem->message, err);
        g_error_free(problem);
        return r;
    }
    int r = uri_options(name, uri, ret, err);
    g_uri_unref(uri);
    return r;
}

/* --- the other way --- */

char *nbd_name_format(const struct blockdev_options_nbd *options)
{
    const struct socket_address *server = options->server;
    const char *secure = options->tls_creds ? "nbds" : "nbd";
    g_autofree char *export = options->export && *options->export
                                  ? g_uri_escape_string(options->export, G_URI_RESERVED_CHARS_ALLOWED_IN_PATH, TRUE)
                                  : NULL;
    if (server->type == SOCKET_ADDRESS_TYPE_UNIX) {
        g_autofree char *path = g_uri_escape_string(server->u.unix_.path, "/", TRUE);
        return g_strconcat(secure, "+unix://", export ? "/" : "", export ? export : "", "?socket=", path, NULL);
    }
    bool brackets = strchr(server->u.inet.host, ':');
    return g_strconcat(secure, "://", brackets ? "[" : "", server->u.inet.host, brackets ? "]" : "", ":",
                       server->u.inet.port, export ? "/" : "", export ? export : "", NULL);
}

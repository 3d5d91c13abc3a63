/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CRYPTO_TLS_H
#define INTERLOCK_CRYPTO_TLS_H

#include "base/error.h"
#include "loop/coroutine.h"
#include <stdbool.h>

/*
 * TLS over a connection, by GnuTLS: credentials, as the objects tls-creds-* give them, and the layer. Credentials are
 * one list for the process, on the control thread; a layer belongs to its connection's loop.
 */
struct connection;
struct tls_credentials;

enum tls_kind { TLS_ANONYMOUS, TLS_PSK, TLS_X509 };
struct tls_options {
    const char *id;
    enum tls_kind kind;
    bool client;             /* else for a server */
    const char *directory;   /* of the files below; NULL: no files (anonymous only) */
    const char *priority;    /* GnuTLS priority string, or NULL: its default */
    bool verify_peer;        /* x509: a peer without a certificate that our authority signed is refused */
    const char *password_id; /* x509: a secret, the password of the private key; or NULL */
    const char *username;    /* PSK, client: whose key; NULL: "qemu" */
};
/*
 * Reads the files, now: x509: ca-cert.pem, ca-crl.pem (may be missing), server-cert.pem and server-key.pem or
 * client-cert.pem and client-key.pem (a client may have none); PSK: keys.psk, lines of NAME:HEX. -EEXIST, -EINVAL, or
 * what reading gave.
 */
int coroutine_fn tls_credentials_add(const struct tls_options *options, struct error **err);
bool tls_credentials_exist(const char *id);
/* -ENOENT; -EBUSY while somebody holds a reference. */
int tls_credentials_remove(const char *id, struct error **err);
void tls_credentials_remove_all(void);
/* A reference to those of that id, which are for the wanted side. NULL with an error. */
struct tls_credentials *tls_credentials_get(const char *id, bool client, struct error **err);
void tls_credentials_put(struct tls_credentials *credentials); /* accepts NULL */
/* A client that checks certificates has to know whose: host_name of tls_connection_open(). */
bool tls_credentials_need_host_name(const struct tls_credentials *credentials);

/*
 * Shakes hands over `inner`, which belongs to the calling loop and has nothing in flight. On success *ret is a
 * connection like any other, which owns `inner`; on failure `inner` stays the caller's. host_name: a client's, whose
 * certificate must be that host's; or NULL. *ret_identity (may be NULL): who the peer is, verified: the distinguished
 * name of its certificate (RFC 4514) or its PSK user name, NULL if nobody in particular; g_free(). -EACCES: the peer
 * is not who it must be; -EPROTO: it does not speak TLS, or nothing that both sides accept.
 */
int coroutine_fn tls_connection_open(struct connection *inner, struct tls_credentials *credentials,
                                     const char *host_name, struct connection **ret, char **ret_identity,
                                     struct error **err);

#endif

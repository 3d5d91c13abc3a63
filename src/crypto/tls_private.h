/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CRYPTO_TLS_PRIVATE_H
#define INTERLOCK_CRYPTO_TLS_PRIVATE_H

#include "crypto/tls.h"
#include <gnutls/gnutls.h>

/* Shared by tls_credentials.c and tls_connection.c only. Does not change once it is made, but for the references. */
struct tls_credentials {
    char *id;
    enum tls_kind kind;
    bool client, verify_peer;
    char *priority;      /* complete: with what the kind needs */
    unsigned references; /* besides the list's; control thread */
    union {
        gnutls_anon_server_credentials_t anonymous_server;
        gnutls_anon_client_credentials_t anonymous_client;
        gnutls_psk_server_credentials_t psk_server;
        gnutls_psk_client_credentials_t psk_client;
        gnutls_certificate_credentials_t x509;
    };
};

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * TLS as a connection over a connection. GnuTLS sees memory only: what it wants to receive comes out of `in`, what it
 * wants to send goes into `out`, and neither ever waits. Around it the layer moves bytes of the connection beneath.
 *
 * 1. No call of GnuTLS yields, so its session is never inside two calls, though one coroutine receives while another
 *    sends. (The handshake runs on the worker pool, alone.)
 * 2. What is in `out` is sent in its order: whoever sends holds `sending` from taking it to its end.
 * 3. GnuTLS may want to be called again (it has read something about keys, not data) while there is more in `in`.
 *    Nothing is received from beneath before it has used up `in`: so what a client sends in plain text before its
 *    handshake is never taken for something that came through TLS, and memory is bounded by one record.
 * 4. The end of the stream counts as an end with or without TLS's farewell: NBD has its own.
 *
 * RFC 8446, RFC 5246; renegotiation is refused.
 */
#include "base/size.h"
#include "crypto/tls_private.h"
#include "loop/connection.h"
#include "loop/stream.h"
#include "loop/sync.h"
#include "loop/worker.h"
#include <errno.h>
#include <glib.h>
#include <gnutls/x509.h>
#include <string.h>

#define IN_BYTES (32 * KiB)   /* what is received at once; a record has at most 16 KiB and some */
#define OUT_BYTES (256 * KiB) /* what is encrypted before it is sent */
#define HANDSHAKE_STEPS_MAX 4096

struct tls_connection {
    struct connection connection;
    struct connection *inner;
    gnutls_session_t session;
    uint8_t in[IN_BYTES];
    size_t in_at, in_end;
    bool in_ended; /* beneath nothing more comes */
    GByteArray *out;
    struct co_mutex sending;
};

static struct tls_connection *tls_of(struct connection *connection)
{
    return container_of(connection, struct tls_connection, connection);
}

/* --- what GnuTLS calls; never waits --- */

static ssize_t pull(gnutls_transport_ptr_t argument, void *to, size_t bytes)
{
    struct tls_connection *tls = argument;
    bytes = min_u64(bytes, tls->in_end - tls->in_at);
    if (bytes == 0 && !tls->in_ended) {
        gnutls_transport_set_errno(tls->session, EAGAIN);
        return -1;
    }
    memcpy(to, tls->in + tls->in_at, bytes);
    tls->in_at += bytes;
    return (ssize_t)bytes;
}

static ssize_t push(gnutls_transport_ptr_t argument, const void *from, size_t bytes)
{
    struct tls_connection *tls = argument;
    g_byte_array_append(tls->out, from, (guint)bytes);
    return (ssize_t)bytes;
}

/* --- moving bytes beneath --- */

static int coroutine_fn send_out(struct tls_connection *tls)
{
    int code = 0;
    if (!tls->out->len) {
        return 0;
    }
    co_mutex_lock(&tls->sending);
    while (code == 0 && tls->out->len) {
        GByteArray *now = tls->out;
        struct iovec iov = {now->data, now->len};
        tls->out = g_byte_array_new();
        code = connection_send(tls->inner, buffers_one(&iov), iov.iov_len);
        explicit_bzero(now->data, now->len);
        g_byte_array_unref(now);
    }
    co_mutex_unlock(&tls->sending);
    return code;
}

static int coroutine_fn receive_in(struct tls_connection *tls)
{
    g_assert(tls->in_at == tls->in_end);
    ssize_t received = connection_receive(tls->inner, tls->in, IN_BYTES);
    tls->in_at = 0;
    tls->in_end = received > 0 ? (size_t)received : 0;
    tls->in_ended = received == 0;
    return received < 0 ? (int)received : 0;
}

static bool must_wait(ssize_t verdict)
{
    return verdict == GNUTLS_E_AGAIN || verdict == GNUTLS_E_INTERRUPTED;
}

/* --- as a connection --- */

static ssize_t coroutine_fn tls_receive(struct connection *connection, void *to, size_t minimum, size_t maximum)
{
    struct tls_connection *tls = tls_of(connection);
    while (true) {
        size_t left = tls->in_end - tls->in_at;
        ssize_t verdict = gnutls_record_recv(tls->session, to, maximum);
        int code = send_out(tls); /* it may have had something to answer */
        if (verdict > 0) {
            return verdict;
        }
        if (verdict == 0 || verdict == GNUTLS_E_PREMATURE_TERMINATION) {
            return 0;
        }
        if (!must_wait(verdict)) {
            return -EPROTO;
        }
        if (code == 0 && tls->in_at == tls->in_end) {
            code = receive_in(tls);
        } else if (code == 0 && left == tls->in_end - tls->in_at) {
            code = -EPROTO; /* it neither needs more nor uses what there is */
        }
        if (code < 0) {
            return code;
        }
    }
}

static ssize_t coroutine_fn tls_send(struct connection *connection, const struct iovec *iov, unsigned count)
{
    struct tls_connection *tls = tls_of(connection);
    size_t sent = 0;
    for (unsigned i = 0; i < count && sent < OUT_BYTES; i++) {
        for (size_t at = 0; at < iov[i].iov_len && sent < OUT_BYTES;) {
            ssize_t verdict = gnutls_record_send(tls->session, (char *)iov[i].iov_base + at, iov[i].iov_len - at);
            if (verdict <= 0) {
                return -EPROTO; /* push() takes everything: there is no waiting here */
            }
            at += (size_t)verdict;
            sent += (size_t)verdict;
        }
    }
    int code = send_out(tls);
    return code < 0 ? code : (ssize_t)sent;
}

static void tls_shutdown(struct connection *connection)
{
    connection_shutdown(tls_of(connection)->inner);
}

static void tls_free(struct tls_connection *tls)
{
    if (tls->session) {
        gnutls_deinit(tls->session);
    }
    explicit_bzero(tls->in, sizeof(tls->in));
    co_mutex_destroy(&tls->sending);
    g_byte_array_unref(tls->out);
    g_free(tls);
}

static void coroutine_fn tls_close(struct connection *connection)
{
    struct tls_connection *tls = tls_of(connection);
    connection_close(tls->inner);
    tls_free(tls);
}

static void tls_move(struct connection *connection, struct loop *to)
{
    connection_move(tls_of(connection)->inner, to);
}

static int tls_fd(struct connection *connection)
{
    return connection_fd(tls_of(connection)->inner);
}

static char *tls_peer(struct connection *connection)
{
    return connection_peer(tls_of(connection)->inner);
}

static const struct stream_ops tls_ops = {
    .receive = tls_receive,
    .send = tls_send,
    .shutdown = tls_shutdown,
    .close = tls_close,
    .move = tls_move,
    .fd = tls_fd,
    .peer = tls_peer,
};

/* --- the handshake --- */

static int session_create(struct tls_connection *tls, struct tls_credentials *credentials, const char *host_name)
{
    static const gnutls_credentials_type_t types[] = {
        [TLS_ANONYMOUS] = GNUTLS_CRD_ANON, [TLS_PSK] = GNUTLS_CRD_PSK, [TLS_X509] = GNUTLS_CRD_CERTIFICATE};
    void *own =
        credentials->kind == TLS_X509 ? (void *)credentials->x509
        : credentials->kind == TLS_PSK
            ? (credentials->client ? (void *)credentials->psk_client : (void *)credentials->psk_server)
            : (credentials->client ? (void *)credentials->anonymous_client : (void *)credentials->anonymous_server);
    int verdict = gnutls_init(&tls->session, credentials->client ? GNUTLS_CLIENT : GNUTLS_SERVER);
    if (verdict >= 0) {
        verdict = gnutls_priority_set_direct(tls->session, credentials->priority, NULL);
    }
    if (verdict >= 0) {
        verdict = gnutls_credentials_set(tls->session, types[credentials->kind], own);
    }
    if (verdict >= 0 && host_name && credentials->kind == TLS_X509) {
        verdict = gnutls_server_name_set(tls->session, GNUTLS_NAME_DNS, host_name, strlen(host_name));
    }
    if (verdict < 0) {
        return -EPROTO;
    }
    if (!credentials->client && credentials->kind == TLS_X509) {
        gnutls_certificate_server_set_request(tls->session,
                                              credentials->verify_peer ? GNUTLS_CERT_REQUIRE : GNUTLS_CERT_REQUEST);
    }
    gnutls_transport_set_ptr(tls->session, tls);
    gnutls_transport_set_pull_function(tls->session, pull);
    gnutls_transport_set_push_function(tls->session, push);
    gnutls_handshake_set_timeout(tls->session, GNUTLS_INDEFINITE_TIMEOUT); /* who calls has a limit */
    return 0;
}

/* The worker pool: it computes for milliseconds. */
static int handshake_work(void *argument)
{
    struct tls_connection *tls = argument;
    return gnutls_handshake(tls->session);
}

static int coroutine_fn shake_hands(struct tls_connection *tls, struct error **err)
{
    int verdict, code = 0;
    for (unsigned step = 0; step < HANDSHAKE_STEPS_MAX; step++) {
        verdict = worker_run(handshake_work, tls);
        code = send_out(tls); /* an alert too */
        if (verdict == GNUTLS_E_SUCCESS || !must_wait(verdict) || code < 0) {
            break;
        }
        if (tls->in_at == tls->in_end) {
            code = receive_in(tls);
        }
        if (code < 0) {
            break;
        }
        verdict = GNUTLS_E_TIMEDOUT;
    }
    if (code < 0) {
        return error_set_errno(err, code, "The TLS handshake was cut off");
    }
    return verdict == GNUTLS_E_SUCCESS
               ? 0
               : error_set(err, -EPROTO, "The TLS handshake failed: %s", gnutls_strerror(verdict));
}

/* The name in the peer's certificate. */
static char *certificate_name(gnutls_session_t session)
{
    unsigned count = 0;
    const gnutls_datum_t *chain = gnutls_certificate_get_peers(session, &count);
    gnutls_x509_crt_t certificate;
    gnutls_datum_t name = {0};
    if (!chain || !count || gnutls_x509_crt_init(&certificate) < 0) {
        return NULL;
    }
    char *copy = NULL;
    if (gnutls_x509_crt_import(certificate, &chain[0], GNUTLS_X509_FMT_DER) >= 0 &&
        gnutls_x509_crt_get_dn3(certificate, &name, 0) >= 0) {
        copy = g_strndup((const char *)name.data, name.size);
        gnutls_free(name.data);
    }
    gnutls_x509_crt_deinit(certificate);
    return copy;
}

/* Is the peer who it must be? */
static int check_certificate(struct tls_connection *tls, const struct tls_credentials *credentials,
                             const char *host_name, char **ret_identity, struct error **err)
{
    unsigned count = 0, status = 0;
    bool shown = gnutls_certificate_get_peers(tls->session, &count) && count;
    if (!shown && !credentials->client && !credentials->verify_peer) {
        return 0;
    }
    int verdict = gnutls_certificate_verify_peers3(tls->session, credentials->client ? host_name : NULL, &status);
    if (verdict < 0) {
        return error_set(err, -EACCES, "The peer's certificate cannot be verified: %s", gnutls_strerror(verdict));
    }
    if (status && (credentials->client || credentials->verify_peer)) {
        gnutls_datum_t text = {0};
        gnutls_certificate_verification_status_print(status, GNUTLS_CRT_X509, &text, 0);
        error_set(err, -EACCES, "The peer's certificate is not good: %s", text.data ? (char *)text.data : "unknown");
        gnutls_free(text.data);
        return -EACCES;
    }
    *ret_identity = status ? NULL : certificate_name(tls->session);
    return 0;
}

static int check_peer(struct tls_connection *tls, const struct tls_credentials *credentials, const char *host_name,
                      char **ret_identity, struct error **err)
{
    *ret_identity = NULL;
    if (credentials->kind == TLS_X509) {
        return check_certificate(tls, credentials, host_name, ret_identity, err);
    }
    if (credentials->kind == TLS_PSK && !credentials->client) {
        *ret_identity = g_strdup(gnutls_psk_server_get_username(tls->session));
    }
    return 0;
}

int coroutine_fn tls_connection_open(struct connection *inner, struct tls_credentials *credentials,
                                     const char *host_name, struct connection **ret, char **ret_identity,
                                     struct error **err)
{
    struct tls_connection *tls = g_new0(struct tls_connection, 1);
    g_autofree char *identity = NULL;
    tls->connection.ops = &tls_ops;
    tls->inner = inner;
    tls->out = g_byte_array_new();
    co_mutex_init(&tls->sending);
    int code = session_create(tls, credentials, host_name);
    if (code < 0) {
        error_set(err, code, "TLS credentials '%s' and priority '%s' do not go together", credentials->id,
                  credentials->priority);
    }
    if (code == 0) {
        code = shake_hands(tls, err);
    }
    if (code == 0) {
        code = check_peer(tls, credentials, host_name, &identity, err);
    }
    if (code < 0) {
        tls_free(tls);
        return code;
    }
    *ret = &tls->connection;
    if (ret_identity) {
        *ret_identity = g_steal_pointer(&identity);
    }
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * TLS credentials: what the objects tls-creds-anon, tls-creds-psk and tls-creds-x509 name. Owns the list of them.
 *
 * 1. Files are read once, when the object is added; to change them, remove and add it.
 * 2. Who uses credentials holds a reference; so they are not removed meanwhile.
 * 3. A certificate that cannot be used (expired, not signed by the authority beside it) is found out when it is added,
 *    and not by the first client.
 *
 * Control thread only; GnuTLS reads small files here, on the worker pool.
 */
#include "crypto/secret.h"
#include "crypto/tls_private.h"
#include "loop/file.h"
#include "loop/worker.h"
#include <errno.h>
#include <glib.h>
#include <gnutls/x509.h>
#include <string.h>

#define KEYS_FILE_MAX (1 << 20)

static GPtrArray *all; /* NULL: none yet */

static struct tls_credentials *find(const char *id)
{
    for (unsigned i = 0; all && i < all->len; i++) {
        struct tls_credentials *credentials = all->pdata[i];
        if (!strcmp(credentials->id, id)) {
            return credentials;
        }
    }
    return NULL;
}

static void credentials_free(struct tls_credentials *credentials)
{
    if (credentials->kind == TLS_X509 && credentials->x509) {
        gnutls_certificate_free_credentials(credentials->x509);
    } else if (credentials->kind == TLS_PSK && credentials->client && credentials->psk_client) {
        gnutls_psk_free_client_credentials(credentials->psk_client);
    } else if (credentials->kind == TLS_PSK && !credentials->client && credentials->psk_server) {
        gnutls_psk_free_server_credentials(credentials->psk_server);
    } else if (credentials->kind == TLS_ANONYMOUS && credentials->client && credentials->anonymous_client) {
        gnutls_anon_free_client_credentials(credentials->anonymous_client);
    } else if (credentials->kind == TLS_ANONYMOUS && !credentials->client && credentials->anonymous_server) {
        gnutls_anon_free_server_credentials(credentials->anonymous_server);
    }
    g_free(credentials->priority);
    g_free(credentials->id);
    g_free(credentials);
}

/* --- reading; the worker pool --- */

struct reading {
    const struct tls_options *options;
    struct tls_credentials *credentials;
    const char *password;
    char *keys;    /* a PSK client's keys.psk */
    char *problem; /* what is wrong, for users */
};

static char *path_of(const struct reading *reading, const char *name)
{
    return g_build_filename(reading->options->directory ? reading->options->directory : ".", name, NULL);
}

/* GnuTLS's verdict on a file; fewer than nothing is an error. */
static int told(struct reading *reading, int verdict, const char *what)
{
    if (verdict >= 0) {
        return 0;
    }
    reading->problem = g_strdup_printf("%s: %s", what, gnutls_strerror(verdict));
    return verdict == GNUTLS_E_FILE_ERROR ? -ENOENT : -EINVAL;
}

static int read_anonymous(struct reading *reading)
{
    struct tls_credentials *credentials = reading->credentials;
    if (credentials->client) {
        return told(reading, gnutls_anon_allocate_client_credentials(&credentials->anonymous_client), "anonymous");
    }
    int code = told(reading, gnutls_anon_allocate_server_credentials(&credentials->anonymous_server), "anonymous");
    return code < 0
               ? code
               : told(reading,
                      gnutls_anon_set_server_known_dh_params(credentials->anonymous_server, GNUTLS_SEC_PARAM_MEDIUM),
                      "Diffie-Hellman parameters");
}

/* The client's line of keys.psk. */
static int take_key(struct reading *reading, const char *path)
{
    const char *user = reading->options->username ? reading->options->username : "qemu";
    size_t length = strlen(user);
    char *next;
    for (char *line = reading->keys; line; line = next) {
        next = strchr(line, '\n');
        if (next) {
            *next++ = 0;
        }
        if (!strncmp(line, user, length) && line[length] == ':') {
            char *hex = g_strstrip(line + length + 1);
            gnutls_datum_t key = {(unsigned char *)hex, (unsigned)strlen(hex)};
            return told(
                reading,
                gnutls_psk_set_client_credentials(reading->credentials->psk_client, user, &key, GNUTLS_PSK_KEY_HEX),
                path);
        }
    }
    reading->problem = g_strdup_printf("%s has no key of user '%s'", path, user);
    return -ENOENT;
}

static int read_psk(struct reading *reading)
{
    struct tls_credentials *credentials = reading->credentials;
    g_autofree char *path = path_of(reading, "keys.psk");
    int code;
    if (credentials->client) {
        code = told(reading, gnutls_psk_allocate_client_credentials(&credentials->psk_client), "keys");
        return code < 0 ? code : take_key(reading, path);
    }
    code = told(reading, gnutls_psk_allocate_server_credentials(&credentials->psk_server), "keys");
    if (code == 0 && !g_file_test(path, G_FILE_TEST_IS_REGULAR)) {
        return told(reading, GNUTLS_E_FILE_ERROR, path);
    }
    if (code == 0) {
        code = told(reading, gnutls_psk_set_server_credentials_file(credentials->psk_server, path), path);
    }
    if (code == 0) {
        code = told(reading, gnutls_psk_set_server_known_dh_params(credentials->psk_server, GNUTLS_SEC_PARAM_MEDIUM),
                    "Diffie-Hellman parameters");
    }
    return code;
}

/* Is our certificate good for what it is to be used for, in the eyes of the authority? */
static int check_certificate(struct reading *reading, const char *path)
{
    struct tls_credentials *credentials = reading->credentials;
    gnutls_x509_crt_t *chain = NULL;
    unsigned count = 0, status = 0;
    gnutls_x509_trust_list_t authority;
    gnutls_typed_vdata_st purpose = {
        GNUTLS_DT_KEY_PURPOSE_OID,
        (unsigned char *)(credentials->client ? GNUTLS_KP_TLS_WWW_CLIENT : GNUTLS_KP_TLS_WWW_SERVER), 0};
    int verdict = gnutls_certificate_get_x509_crt(credentials->x509, 0, &chain, &count);
    if (verdict < 0) {
        return told(reading, verdict, path);
    }
    gnutls_certificate_get_trust_list(credentials->x509, &authority);
    verdict = gnutls_x509_trust_list_verify_crt2(authority, chain, count, &purpose, 1, 0, &status, NULL);
    for (unsigned i = 0; i < count; i++) {
        gnutls_x509_crt_deinit(chain[i]);
    }
    gnutls_free(chain);
    if (verdict >= 0 && status) {
        gnutls_datum_t text = {0};
        gnutls_certificate_verification_status_print(status, GNUTLS_CRT_X509, &text, 0);
        reading->problem = g_strdup_printf("%s cannot be used: %s", path, text.data ? (char *)text.data : "unknown");
        gnutls_free(text.data);
        return -EINVAL;
    }
    return told(reading, verdict, path);
}

static int read_x509(struct reading *reading)
{
    struct tls_credentials *credentials = reading->credentials;
    const char *side = credentials->client ? "client" : "server";
    g_autofree char *certificate_name = g_strconcat(side, "-cert.pem", NULL);
    g_autofree char *key_name = g_strconcat(side, "-key.pem", NULL);
    g_autofree char *authority = path_of(reading, "ca-cert.pem"), *revoked = path_of(reading, "ca-crl.pem");
    g_autofree char *certificate = path_of(reading, certificate_name), *key = path_of(reading, key_name);
    int code = told(reading, gnutls_certificate_allocate_credentials(&credentials->x509), "certificates");
    if (code == 0) {
        int count = gnutls_certificate_set_x509_trust_file(credentials->x509, authority, GNUTLS_X509_FMT_PEM);
        code = told(reading, count == 0 ? GNUTLS_E_NO_CERTIFICATE_FOUND : count, authority);
    }
    if (code == 0 && g_file_test(revoked, G_FILE_TEST_EXISTS)) {
        code = told(reading, gnutls_certificate_set_x509_crl_file(credentials->x509, revoked, GNUTLS_X509_FMT_PEM),
                    revoked);
    }
    if (code < 0 || (credentials->client && !g_file_test(certificate, G_FILE_TEST_EXISTS))) {
        return code;
    }
    code = told(reading,
                gnutls_certificate_set_x509_key_file2(credentials->x509, certificate, key, GNUTLS_X509_FMT_PEM,
                                                      reading->password, 0),
                certificate);
    return code < 0 ? code : check_certificate(reading, certificate);
}

static int read_work(void *argument)
{
    struct reading *reading = argument;
    const char *problem = NULL;
    gnutls_priority_t parsed;
    if (gnutls_priority_init(&parsed, reading->credentials->priority, &problem) < 0) {
        reading->problem = g_strdup_printf("priority '%s' is wrong from '%s' on", reading->credentials->priority,
                                           problem ? problem : "its beginning");
        return -EINVAL;
    }
    gnutls_priority_deinit(parsed);
    switch (reading->credentials->kind) {
    case TLS_X509:
        return read_x509(reading);
    case TLS_PSK:
        return read_psk(reading);
    default:
        return read_anonymous(reading);
    }
}

/* --- the list --- */

static struct tls_credentials *credentials_create(const struct tls_options *options)
{
    static const char *const additions[] = {
        [TLS_ANONYMOUS] = ":+ANON-ECDH:+ANON-DH", [TLS_PSK] = ":+ECDHE-PSK:+DHE-PSK:+PSK", [TLS_X509] = ""};
    struct tls_credentials *credentials = g_new0(struct tls_credentials, 1);
    credentials->id = g_strdup(options->id);
    credentials->kind = options->kind;
    credentials->client = options->client;
    credentials->verify_peer = options->verify_peer;
    credentials->priority =
        g_strconcat(options->priority ? options->priority : "NORMAL", additions[options->kind], NULL);
    return credentials;
}

static int get_password(const struct tls_options *options, uint8_t **ret, size_t *ret_bytes, struct error **err)
{
    *ret = NULL;
    *ret_bytes = 0;
    return options->password_id ? secret_get(options->password_id, ret, ret_bytes, err) : 0;
}

/* What is read here and not by GnuTLS. */
static int coroutine_fn read_keys(struct reading *reading, size_t *ret_bytes)
{
    *ret_bytes = 0;
    if (reading->options->kind != TLS_PSK || !reading->options->client) {
        return 0;
    }
    g_autofree char *path = path_of(reading, "keys.psk");
    int code = file_slurp(path, KEYS_FILE_MAX, &reading->keys, ret_bytes);
    if (code < 0) {
        reading->problem = g_strdup_printf("%s: %s", path, g_strerror(-code));
    }
    return code;
}

int coroutine_fn tls_credentials_add(const struct tls_options *options, struct error **err)
{
    uint8_t *password;
    size_t password_bytes;
    if (find(options->id)) {
        return error_set(err, -EEXIST, "There are TLS credentials '%s' already", options->id);
    }
    int code = get_password(options, &password, &password_bytes, err);
    if (code < 0) {
        return code;
    }
    struct tls_credentials *credentials = credentials_create(options);
    struct reading reading = {.options = options, .credentials = credentials, .password = (const char *)password};
    size_t key_bytes;
    code = read_keys(&reading, &key_bytes);
    if (code == 0) {
        code = worker_run(read_work, &reading);
    }
    secret_free(password, password_bytes);
    secret_free((uint8_t *)reading.keys, key_bytes);
    if (code == 0 && find(options->id)) {
        code = -EEXIST;
        reading.problem = g_strdup("somebody else has just added them");
    }
    if (code < 0) {
        error_set(err, code, "TLS credentials '%s': %s", options->id, reading.problem);
        g_free(reading.problem);
        credentials_free(credentials);
        return code;
    }
    all = all ? all : g_ptr_array_new();
    g_ptr_array_add(all, credentials);
    return 0;
}

bool tls_credentials_exist(const char *id)
{
    return find(id);
}

int tls_credentials_remove(const char *id, struct error **err)
{
    struct tls_credentials *credentials = find(id);
    if (!credentials) {
        return error_set(err, -ENOENT, "There are no TLS credentials '%s'", id);
    }
    if (credentials->references) {
        return error_set(err, -EBUSY, "TLS credentials '%s' are in use", id);
    }
    g_ptr_array_remove(all, credentials);
    credentials_free(credentials);
    return 0;
}

void tls_credentials_remove_all(void)
{
    for (unsigned i = 0; all && i < all->len; i++) {
        struct tls_credentials *credentials = all->pdata[i];
        g_assert(!credentials->references);
        credentials_free(credentials);
    }
    g_clear_pointer(&all, g_ptr_array_unref);
}

struct tls_credentials *tls_credentials_get(const char *id, bool client, struct error **err)
{
    struct tls_credentials *credentials = find(id);
    if (!credentials) {
        error_set(err, -ENOENT, "There are no TLS credentials '%s'", id);
        error_hint(err, "Add them first: object-add with qom-type tls-creds-x509, tls-creds-psk or tls-creds-anon");
        return NULL;
    }
    if (credentials->client != client) {
        error_set(err, -EINVAL, "TLS credentials '%s' are for a %s", id, client ? "server" : "client");
        return NULL;
    }
    credentials->references++;
    return credentials;
}

void tls_credentials_put(struct tls_credentials *credentials)
{
    if (credentials) {
        g_assert(credentials->references);
        credentials->references--;
    }
}

bool tls_credentials_need_host_name(const struct tls_credentials *credentials)
{
    return credentials->client && credentials->kind == TLS_X509 && credentials->verify_peer;
}

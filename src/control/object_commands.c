/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * object-add and object-del: I/O threads (iothread.c has them), secrets, TLS credentials and authorizations
 * (src/crypto).
 *
 * 1. An id names one object, of whatever type.
 * 2. A secret may go while an image that it opened is open: what was unlocked stays so, and only what asks for the
 *    secret again (a change of keys, opening another image) misses it.
 */
#include "control/control.h"
#include "control/iothread.h"
#include "control/object.h"
#include "crypto/authorize.h"
#include "crypto/secret.h"
#include "crypto/tls.h"
#include "loop/file.h"
#include "schema/commands.h"
#include <errno.h>
#include <glib.h>

#define RULES_FILE_MAX (1 << 20)

static int coroutine_fn object_add_secret(const struct object_options *options, struct error **err)
{
    const struct object_options_secret *own = &options->u.secret;
    struct secret_options secret = {
        .id = options->id,
        .data = own->data,
        .file = own->file,
        .base64 = own->has_format && own->format == SECRET_FORMAT_BASE64,
        .keyid = own->keyid,
        .iv = own->iv,
    };
    return secret_add(&secret, err);
}

static int coroutine_fn add_tls_anon(const struct object_options *options, struct error **err)
{
    const struct object_options_tls_creds_anon *own = &options->u.tls_creds_anon;
    struct tls_options tls = {.id = options->id,
                              .kind = TLS_ANONYMOUS,
                              .client = own->endpoint == TLS_CREDS_ENDPOINT_CLIENT,
                              .priority = own->priority};
    return tls_credentials_add(&tls, err);
}

static int coroutine_fn add_tls_psk(const struct object_options *options, struct error **err)
{
    const struct object_options_tls_creds_psk *own = &options->u.tls_creds_psk;
    struct tls_options tls = {.id = options->id,
                              .kind = TLS_PSK,
                              .client = own->endpoint == TLS_CREDS_ENDPOINT_CLIENT,
                              .directory = own->dir,
                              .priority = own->priority,
                              .username = own->username};
    return tls_credentials_add(&tls, err);
}

static int coroutine_fn add_tls_x509(const struct object_options *options, struct error **err)
{
    const struct object_options_tls_creds_x509 *own = &options->u.tls_creds_x509;
    struct tls_options tls = {.id = options->id,
                              .kind = TLS_X509,
                              .client = own->endpoint == TLS_CREDS_ENDPOINT_CLIENT,
                              .directory = own->dir,
                              .priority = own->priority,
                              .verify_peer = own->verify_peer,
                              .password_id = own->passwordid};
    return tls_credentials_add(&tls, err);
}

static int add_authz_list(const char *id, const struct object_options_authz_list *list, struct error **err)
{
    g_autofree struct authorization_rule *rules = g_new0(struct authorization_rule, list->rules.count);
    for (size_t i = 0; i < list->rules.count; i++) {
        const struct authz_rule *rule = list->rules.items[i];
        rules[i] = (struct authorization_rule){rule->match, rule->format == AUTHZ_FORMAT_GLOB,
                                               rule->policy == AUTHZ_POLICY_ALLOW};
    }
    return authorization_add(id, rules, (unsigned)list->rules.count, list->policy == AUTHZ_POLICY_ALLOW, err);
}

static int coroutine_fn add_authz_list_file(const char *id, const char *path, struct error **err)
{
    g_autofree char *text = NULL;
    size_t bytes;
    struct object_options_authz_list *list;
    json_error_t problem;
    int code = file_slurp(path, RULES_FILE_MAX, &text, &bytes);
    if (code < 0) {
        return error_set_errno(err, code, "Cannot read the rules in '%s'", path);
    }
    json_t *json = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &problem);
    if (!json) {
        return error_set(err, -EINVAL, "'%s' is no JSON: line %d: %s", path, problem.line, problem.text);
    }
    code = object_options_authz_list_from_json(json, path, &list, err);
    json_decref(json);
    if (code == 0) {
        code = add_authz_list(id, list, err);
        object_options_authz_list_free(list);
    }
    return code;
}

static int add_authz_simple(const char *id, const char *identity, struct error **err)
{
    struct authorization_rule rule = {.match = identity, .allow = true};
    return authorization_add(id, &rule, 1, false, err);
}

int coroutine_fn object_add_plain(const struct object_options *options, struct error **err)
{
    if (secret_exists(options->id) || tls_credentials_exist(options->id) || authorization_exists(options->id)) {
        return error_set(err, -EEXIST, "There is an object '%s' already", options->id);
    }
    switch (options->qom_type) {
    case OBJECT_TYPE_SECRET:
        return object_add_secret(options, err);
    case OBJECT_TYPE_TLS_CREDS_ANON:
        return add_tls_anon(options, err);
    case OBJECT_TYPE_TLS_CREDS_PSK:
        return add_tls_psk(options, err);
    case OBJECT_TYPE_TLS_CREDS_X509:
        return add_tls_x509(options, err);
    case OBJECT_TYPE_AUTHZ_SIMPLE:
        return add_authz_simple(options->id, options->u.authz_simple.identity, err);
    case OBJECT_TYPE_AUTHZ_LIST:
        return add_authz_list(options->id, &options->u.authz_list, err);
    case OBJECT_TYPE_AUTHZ_LIST_FILE:
        return add_authz_list_file(options->id, options->u.authz_list_file.filename, err);
    default:
        return error_set(err, -ENOTSUP, "Objects of type '%s' are of no use to this program",
                         object_type_name(options->qom_type));
    }
}

int coroutine_fn command_object_add(struct control *control, struct object_options *args, struct error **err)
{
    if (iothreads_find(control->iothreads, args->id)) {
        return error_set(err, -EEXIST, "There is an object '%s' already", args->id);
    }
    if (args->qom_type != OBJECT_TYPE_IOTHREAD) {
        return object_add_plain(args, err);
    }
    return secret_exists(args->id) || tls_credentials_exist(args->id) || authorization_exists(args->id)
               ? error_set(err, -EEXIST, "There is an object '%s' already", args->id)
               : iothreads_add(control->iothreads, args->id, args->u.iothread.poll_max_ns, err);
}

int coroutine_fn command_object_del(struct control *control, struct object_del_args *args, struct error **err)
{
    return secret_exists(args->id)           ? secret_remove(args->id, err)
           : tls_credentials_exist(args->id) ? tls_credentials_remove(args->id, err)
           : authorization_exists(args->id)  ? authorization_remove(args->id, err)
                                             : iothreads_remove(control->iothreads, args->id, err);
}

void object_remove_all(void)
{
    tls_credentials_remove_all();
    authorization_remove_all();
    secret_remove_all();
}

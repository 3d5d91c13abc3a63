/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock nbd --list`: what exports another server has, in the lines of qemu-nbd 10.0. Connecting and TLS are the
 * nbd driver's (nbd_client.h); the handshake is led step by step, for nothing is opened.
 *
 * 1. What a server says is text of strangers: control characters in it are shown as '?'.
 * 2. A server that does not answer for TIMEOUT_NS is given up.
 */
#include "tool/nbd/nbd.h"
#include "tool/tool.h"
#include <errno.h>
#ifdef INTERLOCK_NBD
#include "control/object.h"
#include "crypto/tls.h"
#include "driver/protocol/nbd/nbd_client.h"
#include "loop/descriptor.h"
#include "loop/loop.h"
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define TIMEOUT_NS INT64_C(30000000000)

struct found_export {
    char *name, *description;
};

struct lister {
    const struct nbd_options *options;
    struct nbd_server server;
    struct nbd_attempt attempt;
    struct co_group tunnels;
    struct loop_timer timer;
    GArray *exports; /* struct found_export */
    bool done;       /* the option that is under way */
    int problem;     /* of it: an errno, or 0 */
    int code;
    struct error *err;
};

static void found_clear(void *found)
{
    struct found_export *export = found;
    g_free(export->name);
    g_free(export->description);
}

static char *printable(const char *text)
{
    char *valid = g_utf8_make_valid(text, -1);
    for (char *at = valid; *at; at++) {
        *at = g_ascii_iscntrl(*at) ? '?' : *at;
    }
    return valid;
}

/* --- the handshake, step by step --- */

static int option_done(void *argument, int *error)
{
    struct lister *lister = argument;
    lister->problem = *error;
    lister->done = true;
    return 1;
}

static int export_found(void *argument, const char *name, const char *description)
{
    struct lister *lister = argument;
    struct found_export found = {g_strdup(name), g_strdup(description)};
    g_array_append_val(lister->exports, found);
    return 0;
}

/* Until libnbd waits for us, and the option under way is done. */
static int coroutine_fn go_on(struct lister *lister, struct nbd_handle *handle, struct error **err)
{
    struct nbd_attempt *attempt = &lister->attempt;
    int r = descriptor_wait_create(nbd_aio_get_fd(handle), &attempt->wait);
    if (r < 0) {
        return error_set_errno(err, r, "Cannot wait for a socket");
    }
    while (r == 0 && !(nbd_aio_is_negotiating(handle) > 0 && lister->done)) {
        int ready = attempt->cancelled ? 0 : descriptor_wait_ready(attempt->wait, nbd_handle_directions(handle));
        if (attempt->cancelled) {
            r = error_set(err, -ETIMEDOUT, "The server did not answer");
        } else if (nbd_handle_notify(handle, ready < 0 ? DESCRIPTOR_READABLE : (unsigned)ready) < 0) {
            r = nbd_library_error(err);
        } else if (nbd_handle_is_lost(handle) || nbd_aio_is_ready(handle) > 0) {
            r = error_set(err, -EPROTO, "The server ended the connection, or is too old to have a list");
        }
    }
    descriptor_wait_destroy(attempt->wait);
    attempt->wait = NULL;
    return r;
}

static int coroutine_fn ask_list(struct lister *lister, struct nbd_handle *handle, struct error **err)
{
    lister->done = false;
    if (nbd_aio_opt_list(handle, (nbd_list_callback){.callback = export_found, .user_data = lister},
                         (nbd_completion_callback){.callback = option_done, .user_data = lister}) < 0) {
        return nbd_library_error(err);
    }
    int r = go_on(lister, handle, err);
    if (r == 0 && lister->problem) {
        r = error_set(err, -lister->problem, "The server refuses to list its exports: %s", g_strerror(lister->problem));
    }
    return r;
}

static int context_found(void *argument, const char *name)
{
    g_ptr_array_add(argument, printable(name));
    return 0;
}

/* --- what is printed --- */

static void print_flags(struct nbd_handle *handle)
{
    static const struct {
        unsigned bit;
        int (*ask)(struct nbd_handle *handle);
        const char *name;
    } flags[] = {{1, nbd_is_read_only, "readonly"},
                 {2, nbd_can_flush, "flush"},
                 {3, nbd_can_fua, "fua"},
                 {4, nbd_is_rotational, "rotational"},
                 {5, nbd_can_trim, "trim"},
                 {6, nbd_can_zero, "zeroes"},
                 {7, nbd_can_df, "df"},
                 {8, nbd_can_multi_conn, "multi"},
                 {10, nbd_can_cache, "cache"},
                 {11, nbd_can_fast_zero, "fast-zero"}};
    g_autoptr(GString) names = g_string_new(NULL);
    unsigned mask = 1; /* there are flags */
    for (unsigned i = 0; i < G_N_ELEMENTS(flags); i++) {
        if (flags[i].ask(handle) > 0) {
            mask |= 1U << flags[i].bit;
            g_string_append_printf(names, "%s ", flags[i].name);
        }
    }
    printf("  flags: 0x%x ( %s)\n", mask, names->str);
}

static void print_blocks(struct nbd_handle *handle)
{
    static const char *const names[] = {"min block", "opt block", "max block"};
    for (int i = 0; i < 3; i++) {
        int64_t bytes = nbd_get_block_size(handle, i);
        if (bytes > 0) {
            printf("  %s: %" PRId64 "\n", names[i], bytes);
        }
    }
}

/* The name that it was asked for by, what it says of itself, and its contexts. */
static int coroutine_fn print_export(struct lister *lister, struct nbd_handle *handle, const struct found_export *found,
                                     struct error **err)
{
    g_autofree char *name = printable(found->name), *description = printable(found->description);
    g_autoptr(GPtrArray) contexts = g_ptr_array_new_with_free_func(g_free);
    printf(" export: '%s'\n", name);
    if (*description) {
        printf("  description: %s\n", description);
    }
    lister->done = false;
    if (nbd_set_export_name(handle, found->name) < 0 ||
        nbd_aio_opt_info(handle, (nbd_completion_callback){.callback = option_done, .user_data = lister}) < 0) {
        return nbd_library_error(err);
    }
    int r = go_on(lister, handle, err);
    if (r < 0) {
        return r;
    }
    if (lister->problem) { /* an old server, or the export has just gone */
        return 0;
    }
    printf("  size:  %" PRId64 "\n", nbd_get_size(handle));
    print_flags(handle);
    print_blocks(handle);
    if (nbd_get_structured_replies_negotiated(handle) > 0) {
        printf("  transaction size: 32-bit\n"); /* libnbd 1.14 knows no extended headers */
    }
    lister->done = false;
    if (nbd_aio_opt_list_meta_context(handle, (nbd_context_callback){.callback = context_found, .user_data = contexts},
                                      (nbd_completion_callback){.callback = option_done, .user_data = lister}) < 0) {
        return nbd_library_error(err);
    }
    r = go_on(lister, handle, err);
    if (r == 0 && contexts->len) {
        printf("  available meta contexts: %u\n", contexts->len);
        for (unsigned i = 0; i < contexts->len; i++) {
            printf("   %s\n", (char *)contexts->pdata[i]);
        }
    }
    return r;
}

static int coroutine_fn list_exports(struct lister *lister, struct nbd_handle *handle, struct error **err)
{
    lister->done = true;
    int r = go_on(lister, handle, err);
    r = r < 0 ? r : ask_list(lister, handle, err);
    if (r == 0) {
        printf("exports available: %u\n", lister->exports->len);
    }
    nbd_clear_meta_contexts(handle); /* none: all that there are */
    for (unsigned i = 0; i < lister->exports->len && r == 0; i++) {
        r = print_export(lister, handle, &g_array_index(lister->exports, struct found_export, i), err);
    }
    return r;
}

/* --- connecting --- */

static void is_late(struct loop_timer *timer)
{
    nbd_attempt_cancel(&container_of(timer, struct lister, timer)->attempt);
}

static int coroutine_fn connect_and_list(struct lister *lister, struct error **err)
{
    int fd = nbd_dial_socket(&lister->server, &lister->attempt, err);
    if (fd < 0) {
        return fd;
    }
    struct nbd_handle *handle = nbd_create();
    int r = 0;
    if (!handle || nbd_set_opt_mode(handle, true) < 0 || nbd_set_full_info(handle, true) < 0 ||
        nbd_aio_connect_socket(handle, fd) < 0) {
        r = nbd_library_error(err);
        descriptor_close(fd);
    }
    r = r < 0 ? r : list_exports(lister, handle, err);
    if (handle && nbd_aio_is_negotiating(handle) > 0) {
        nbd_aio_opt_abort(handle);
    }
    nbd_close(handle);
    return r;
}

static int take_credentials(struct lister *lister, struct error **err)
{
    const struct nbd_options *options = lister->options;
    if (!options->tls_creds) {
        return 0;
    }
    lister->server.host_name = g_strdup(options->tls_hostname ? options->tls_hostname
                                        : options->socket     ? NULL
                                                              : options->host);
    lister->server.credentials = tls_credentials_get(options->tls_creds, true, err);
    if (!lister->server.credentials) {
        return -ENOENT;
    }
    if (!lister->server.host_name && tls_credentials_need_host_name(lister->server.credentials)) {
        return error_set(err, -EINVAL, "Certificates need a name to be compared with: give --tls-hostname");
    }
    return 0;
}

static void coroutine_fn list_entry(void *argument)
{
    struct lister *lister = argument;
    const struct nbd_options *options = lister->options;
    for (unsigned i = 0; i < options->objects->len && lister->code == 0; i++) {
        lister->code = image_object_add(options->objects->pdata[i], &lister->err);
    }
    if (lister->code == 0) {
        lister->code = take_credentials(lister, &lister->err);
    }
    if (lister->code == 0) {
        co_group_init(&lister->tunnels);
        loop_timer_init(&lister->timer, is_late);
        loop_timer_arm(&lister->timer, loop_clock_ns() + TIMEOUT_NS);
        lister->code = connect_and_list(lister, &lister->err);
        loop_timer_cancel(&lister->timer);
        co_group_wait(&lister->tunnels);
        co_group_destroy(&lister->tunnels);
    }
    g_free(lister->server.host_name);
    tls_credentials_put(lister->server.credentials);
    object_remove_all();
}

int nbd_list(const struct nbd_options *options)
{
    struct lister lister = {.options = options, .exports = g_array_new(FALSE, FALSE, sizeof(struct found_export))};
    const char *host = options->host_given ? options->host : "localhost";
    struct loop *loop;
    lister.server.tunnels = &lister.tunnels;
    lister.server.address =
        options->socket ? (struct address){.kind = ADDRESS_UNIX, .path = (char *)options->socket}
                        : (struct address){.kind = ADDRESS_INET, .host = (char *)host, .port = (char *)options->port};
    g_array_set_clear_func(lister.exports, found_clear);
    lister.code = loop_create(ENGINE_AUTO, &loop, &lister.err);
    if (lister.code == 0) {
        loop_run_coroutine(loop, list_entry, &lister);
        loop_destroy(loop);
    }
    g_array_free(lister.exports, TRUE);
    return lister.code < 0 ? tool_fail(options->program, lister.err) : 0;
}
#else
int nbd_list(const struct nbd_options *options)
{
    struct error *error = NULL;
    error_set(&error, -ENOTSUP, "Lists of exports need libnbd, which is not in this build");
    return tool_fail(options->program, error);
}
#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The handshake: fixed newstyle negotiation, one row of the table `options` per option that we know. Called in the
 * client's coroutine on the control loop, under the server's time limit. Invariants:
 * 1. an option's data is read whole before it is looked at, never beyond NBD_OPTION_MAX; what is longer is skipped and
 *    refused, and what is absurd ends the connection;
 * 2. every length inside the data is checked against what is left of it;
 * 3. each option gets its final reply exactly once (NBD_OPT_EXPORT_NAME has a form of its own), and what belongs to one
 *    reply is sent with one call;
 * 4. the export is referenced before its client hears that it may go on.
 */
#include "base/buffers.h"
#include "base/size.h"
#include "block/node.h"
#include "block/user.h"
#include "crypto/authorize.h"
#include "crypto/tls.h"
#include "export/nbd/nbd_format.h"
#include "export/nbd/server.h"
#include "loop/connection.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

struct handshake {
    struct nbd_client *client;
    bool fixed, no_zeroes;    /* what the client said */
    uint64_t contexts_of;     /* the serial number of the export of which contexts were chosen, or 0 */
    struct nbd_choice choice; /* these */
    uint32_t option;          /* the present one */
    const uint8_t *data;      /* its data, from here on not yet parsed */
    size_t left;              /* bytes of it */
    GByteArray *out;          /* its replies */
};

/* What an option's handler says. */
enum { NEGOTIATE_ON = 0, NEGOTIATED = 1 };

struct option {
    enum nbd_option number;
    const char *name;
    int coroutine_fn (*handle)(struct handshake *handshake);
    bool needs_data; /* else any data is refused */
};

/* ---- replies ---- */

static void reply_add(struct handshake *handshake, uint32_t type, const void *data, size_t bytes)
{
    struct nbd_option_reply_header header = {htobe64(NBD_OPTION_REPLY_MAGIC), htobe32(handshake->option), htobe32(type),
                                             htobe32((uint32_t)bytes)};

    g_byte_array_append(handshake->out, (const uint8_t *)&header, sizeof(header));
    g_byte_array_append(handshake->out, data, (guint)bytes);
}

static int reply_ack(struct handshake *handshake)
{
    reply_add(handshake, NBD_REP_ACK, "", 0);
    return NEGOTIATE_ON;
}

static int reply_error(struct handshake *handshake, uint32_t type, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static int reply_error(struct handshake *handshake, uint32_t type, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    g_autofree char *text = g_strdup_vprintf(format, arguments);
    va_end(arguments);
    reply_add(handshake, type, text, MIN(strlen(text), NBD_STRING_MAX));
    return NEGOTIATE_ON;
}

static int coroutine_fn send_out(struct handshake *handshake)
{
    struct iovec iov = {handshake->out->data, handshake->out->len};
    int r = 0;

    if (iov.iov_len) {
        r = connection_send(handshake->client->connection, buffers_one(&iov), iov.iov_len);
        g_byte_array_set_size(handshake->out, 0);
    }
    return r;
}

/* ---- an option's data ---- */

static bool take(struct handshake *handshake, void *to, size_t bytes)
{
    if (handshake->left < bytes) {
        return false;
    }
    memcpy(to, handshake->data, bytes);
    handshake->data += bytes;
    handshake->left -= bytes;
    return true;
}

static bool take_u16(struct handshake *handshake, uint16_t *ret)
{
    bool there = take(handshake, ret, sizeof(*ret));

    *ret = there ? be16toh(*ret) : 0;
    return there;
}

static bool take_u32(struct handshake *handshake, uint32_t *ret)
{
    bool there = take(handshake, ret, sizeof(*ret));

    *ret = there ? be32toh(*ret) : 0;
    return there;
}

/* A length and so many bytes, which stay where they are. */
static bool take_string(struct handshake *handshake, const char **ret, uint32_t *ret_bytes)
{
    if (!take_u32(handshake, ret_bytes) || *ret_bytes > NBD_STRING_MAX || *ret_bytes > handshake->left) {
        return false;
    }
    *ret = (const char *)handshake->data;
    handshake->data += *ret_bytes;
    handshake->left -= *ret_bytes;
    return true;
}

static int reply_unknown_export(struct handshake *handshake, const char *name, uint32_t bytes)
{
    g_autofree char *shown = g_utf8_make_valid(name, (gssize)MIN(bytes, 256u));

    return reply_error(handshake, NBD_REP_ERR_UNKNOWN, "export '%s' not present", shown);
}

/* ---- the options ---- */

static bool has_contexts(const struct handshake *handshake, const struct nbd_export *export)
{
    return handshake->contexts_of == export->serial && nbd_choice_count(&handshake->choice);
}

static void choose(struct handshake *handshake, struct nbd_export *chosen)
{
    struct nbd_client *client = handshake->client;

    nbd_client_choose(client, chosen);
    if (client->style >= NBD_STRUCTURED && has_contexts(handshake, chosen)) {
        client->choice = handshake->choice;
    }
}

/* The only option of clients that are not "fixed": answered without a header, or by hanging up. */
static int coroutine_fn option_export_name(struct handshake *handshake)
{
    struct nbd_client *client = handshake->client;
    struct nbd_export *chosen = nbd_server_find(client->server, (const char *)handshake->data, handshake->left);

    if (client->style >= NBD_EXTENDED) {
        return -EPROTO; /* whoever asks for extended headers knows NBD_OPT_GO */
    }
    if (!chosen) {
        return -ENOENT;
    }
    struct nbd_export_name_reply reply = {
        htobe64(nbd_export_size(chosen)), htobe16(nbd_export_flags(chosen, client->style, false)), {0}};

    choose(handshake, chosen);
    g_byte_array_append(handshake->out, (const uint8_t *)&reply,
                        handshake->no_zeroes ? offsetof(struct nbd_export_name_reply, zeroes) : sizeof(reply));
    return NEGOTIATED;
}

static int coroutine_fn option_abort(struct handshake *handshake)
{
    reply_ack(handshake);
    send_out(handshake);
    return -ESHUTDOWN;
}

static int coroutine_fn option_list(struct handshake *handshake)
{
    list_for_each (position, &handshake->client->server->directory) {
        struct nbd_export *export = container_of(position, struct nbd_export, link);
        uint32_t name_bytes = (uint32_t)strlen(export->name);
        uint32_t length = htobe32(name_bytes);
        g_autoptr(GByteArray) item = g_byte_array_new();

        g_byte_array_append(item, (const uint8_t *)&length, sizeof(length));
        g_byte_array_append(item, (const uint8_t *)export->name, name_bytes);
        if (export->description) {
            g_byte_array_append(item, (const uint8_t *)export->description, (guint)strlen(export->description));
        }
        reply_add(handshake, NBD_REP_SERVER, item->data, item->len);
    }
    return reply_ack(handshake);
}

static void reply_info_text(struct handshake *handshake, enum nbd_info type, const char *text)
{
    g_autoptr(GByteArray) info = g_byte_array_new();
    uint16_t number = htobe16(type);

    g_byte_array_append(info, (const uint8_t *)&number, sizeof(number));
    g_byte_array_append(info, (const uint8_t *)text, (guint)strlen(text));
    reply_add(handshake, NBD_REP_INFO, info->data, info->len);
}

static void reply_info(struct handshake *handshake, const struct nbd_export *export)
{
    const struct node *node = backend_node(export->export->backend);
    /* Unaligned requests are padded by the request path: 1 is the minimum of every export. */
    struct nbd_info_block_size sizes = {
        htobe16(NBD_INFO_BLOCK_SIZE), htobe32(1),
        htobe32((uint32_t)min_u64(max_u64(node ? node->limits.alignment : 1, 4096), NBD_PAYLOAD_MAX)),
        htobe32(NBD_PAYLOAD_MAX)};
    struct nbd_info_export basics = {
        htobe16(NBD_INFO_EXPORT), htobe64(nbd_export_size(export)),
        htobe16(nbd_export_flags(export, handshake->client->style, has_contexts(handshake, export)))};

    reply_add(handshake, NBD_REP_INFO, &sizes, sizeof(sizes));
    reply_add(handshake, NBD_REP_INFO, &basics, sizeof(basics));
    reply_ack(handshake);
}

/* NBD_OPT_INFO and NBD_OPT_GO: the same, but for what follows. */
static int coroutine_fn option_info(struct handshake *handshake)
{
    const char *name;
    uint32_t name_bytes;
    uint16_t count;
    bool want_name = false, want_description = false;

    if (!take_string(handshake, &name, &name_bytes) || !take_u16(handshake, &count) ||
        handshake->left != count * sizeof(uint16_t)) {
        return reply_error(handshake, NBD_REP_ERR_INVALID, "lengths that do not fit the option's length");
    }
    for (unsigned i = 0; i < count; i++) {
        uint16_t wanted;

        take_u16(handshake, &wanted);
        want_name |= wanted == NBD_INFO_NAME;
        want_description |= wanted == NBD_INFO_DESCRIPTION;
    }
    struct nbd_export *export = nbd_server_find(handshake->client->server, name, name_bytes);

    if (!export) {
        return reply_unknown_export(handshake, name, name_bytes);
    }
    if (want_name) {
        reply_info_text(handshake, NBD_INFO_NAME, export->name);
    }
    if (want_description && export->description) {
        reply_info_text(handshake, NBD_INFO_DESCRIPTION, export->description);
    }
    reply_info(handshake, export);
    if (handshake->option == NBD_OPT_INFO) {
        return NEGOTIATE_ON;
    }
    choose(handshake, export);
    return NEGOTIATED;
}

static int coroutine_fn option_structured_reply(struct handshake *handshake)
{
    struct nbd_client *client = handshake->client;

    if (client->style >= NBD_EXTENDED) {
        return reply_error(handshake, NBD_REP_ERR_EXT_HEADER_REQD, "extended headers are negotiated already");
    }
    if (client->style >= NBD_STRUCTURED) {
        return reply_error(handshake, NBD_REP_ERR_INVALID, "structured replies are negotiated already");
    }
    client->style = NBD_STRUCTURED;
    return reply_ack(handshake);
}

static int coroutine_fn option_extended_headers(struct handshake *handshake)
{
    struct nbd_client *client = handshake->client;

    if (client->style >= NBD_EXTENDED) {
        return reply_error(handshake, NBD_REP_ERR_INVALID, "extended headers are negotiated already");
    }
    client->style = NBD_EXTENDED;
    return reply_ack(handshake);
}

/* Lets the client in, or not, by who it is. */
static int check_identity(const struct nbd_server *server, const char *identity)
{
    return !server->authorization || authorization_allows(server->authorization, identity) ? 0 : -EACCES;
}

/* NBD_OPT_STARTTLS. Whatever was negotiated in plain text is forgotten: somebody in between may have said it. */
static int coroutine_fn option_start_tls(struct handshake *handshake)
{
    struct nbd_client *client = handshake->client;
    struct connection *secured;
    int r;

    if (!client->server->tls) {
        return reply_error(handshake, NBD_REP_ERR_POLICY, "this server has no TLS");
    }
    if (client->secure) {
        return reply_error(handshake, NBD_REP_ERR_INVALID, "TLS has been negotiated already");
    }
    reply_ack(handshake);
    r = send_out(handshake);
    if (r == 0) {
        r = tls_connection_open(client->connection, client->server->tls, NULL, &secured, &client->identity, NULL);
    }
    if (r < 0) {
        return r;
    }
    client->connection = secured;
    client->secure = true;
    client->style = NBD_SIMPLE;
    handshake->contexts_of = 0;
    r = check_identity(client->server, client->identity);
    return r < 0 ? r : NEGOTIATE_ON;
}

/* Reads the queries, and chooses of the export's contexts those that they name; listing, none names all. False:
 * malformed. `contexts` NULL: there is no such export. */
static bool take_queries(struct handshake *handshake, bool listing, const struct nbd_contexts *contexts,
                         struct nbd_choice *ret)
{
    uint32_t count;

    *ret = (struct nbd_choice){0};
    if (!take_u32(handshake, &count)) {
        return false;
    }
    if (contexts && listing && count == 0) {
        nbd_contexts_choose(contexts, "", 0, true, ret);
    }
    for (uint32_t i = 0; i < count; i++) {
        const char *text;
        uint32_t bytes;

        if (!take_string(handshake, &text, &bytes)) {
            return false;
        }
        if (contexts && bytes) {
            nbd_contexts_choose(contexts, text, bytes, listing, ret);
        }
    }
    return handshake->left == 0;
}

static void reply_context(struct handshake *handshake, const struct nbd_context *context)
{
    g_autoptr(GByteArray) data = g_byte_array_new();
    uint32_t id = htobe32(context->id);

    g_byte_array_append(data, (const uint8_t *)&id, sizeof(id));
    g_byte_array_append(data, (const uint8_t *)context->name, (guint)strlen(context->name));
    reply_add(handshake, NBD_REP_META_CONTEXT, data->data, data->len);
}

/* NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT. */
static int coroutine_fn option_meta_context(struct handshake *handshake)
{
    bool listing = handshake->option == NBD_OPT_LIST_META_CONTEXT;
    const char *name;
    uint32_t name_bytes;
    struct nbd_export *export;
    struct nbd_choice choice;

    if (!listing) {
        handshake->contexts_of = 0; /* whatever comes of it, the earlier choice is gone */
    }
    if (handshake->client->style < NBD_STRUCTURED) {
        return reply_error(handshake, NBD_REP_ERR_INVALID,
                           "structured replies or extended headers must be negotiated first");
    }
    if (!take_string(handshake, &name, &name_bytes)) {
        return reply_error(handshake, NBD_REP_ERR_INVALID, "lengths that do not fit the option's length");
    }
    export = nbd_server_find(handshake->client->server, name, name_bytes);
    if (!take_queries(handshake, listing, export ? &export->contexts : NULL, &choice)) {
        return reply_error(handshake, NBD_REP_ERR_INVALID, "lengths that do not fit the option's length");
    }
    if (!export) {
        return reply_unknown_export(handshake, name, name_bytes);
    }
    for (unsigned i = 0; i < export->contexts.count; i++) {
        if (nbd_choice_has(&choice, i)) {
            reply_context(handshake, &export->contexts.items[i]);
        }
    }
    if (!listing) {
        handshake->contexts_of = export->serial;
        handshake->choice = choice;
    }
    return reply_ack(handshake);
}

/* Options that are not here get NBD_REP_ERR_UNSUP. */
static const struct option options[] = {
    {NBD_OPT_EXPORT_NAME, "export-name", option_export_name, true},
    {NBD_OPT_ABORT, "abort", option_abort, true},
    {NBD_OPT_LIST, "list", option_list, false},
    {NBD_OPT_STARTTLS, "starttls", option_start_tls, false},
    {NBD_OPT_INFO, "info", option_info, true},
    {NBD_OPT_GO, "go", option_info, true},
    {NBD_OPT_STRUCTURED_REPLY, "structured-reply", option_structured_reply, false},
    {NBD_OPT_LIST_META_CONTEXT, "list-meta-context", option_meta_context, true},
    {NBD_OPT_SET_META_CONTEXT, "set-meta-context", option_meta_context, true},
    {NBD_OPT_EXTENDED_HEADERS, "extended-headers", option_extended_headers, false},
};

/* ---- the negotiation ---- */

static const struct option *option_find(uint32_t number)
{
    for (size_t i = 0; i < G_N_ELEMENTS(options); i++) {
        if (options[i].number == number) {
            return &options[i];
        }
    }
    return NULL;
}

static int coroutine_fn skip_data(struct handshake *handshake, size_t bytes)
{
    uint8_t rest[4096];

    while (bytes) {
        size_t now = MIN(bytes, sizeof(rest));
        int r = connection_receive_all(handshake->client->connection, rest, now);

        if (r < 0) {
            return r;
        }
        bytes -= now;
    }
    return 0;
}

/* Before its TLS a client of a server that has some may ask for that, and go. */
static bool needs_tls(const struct handshake *handshake)
{
    const struct nbd_client *client = handshake->client;

    return client->server->tls && !client->secure && handshake->option != NBD_OPT_STARTTLS &&
           handshake->option != NBD_OPT_ABORT;
}

static int coroutine_fn negotiate_option(struct handshake *handshake)
{
    struct connection *connection = handshake->client->connection;
    struct nbd_option_header header;
    const struct option *option;
    g_autofree uint8_t *data = NULL;
    int r = connection_receive_all(connection, &header, sizeof(header));

    if (r < 0) {
        return r;
    }
    if (be64toh(header.magic) != NBD_OPTION_MAGIC) {
        return -EPROTO;
    }
    size_t bytes = be32toh(header.bytes);
    handshake->option = be32toh(header.option);
    option = option_find(handshake->option);
    if (!handshake->fixed && handshake->option != NBD_OPT_EXPORT_NAME) {
        return -EPROTO;
    }
    if (needs_tls(handshake)) {
        if (handshake->option == NBD_OPT_EXPORT_NAME || bytes > NBD_OPTION_SKIP_MAX) {
            return -EPROTO; /* this option has no reply that could say so */
        }
        r = skip_data(handshake, bytes);
        return r < 0 ? r : reply_error(handshake, NBD_REP_ERR_TLS_REQD, "this server speaks to clients with TLS only");
    }
    if (bytes > (handshake->option == NBD_OPT_EXPORT_NAME ? NBD_STRING_MAX : NBD_OPTION_SKIP_MAX)) {
        return -EMSGSIZE;
    }
    if (!option || bytes > NBD_OPTION_MAX || (bytes && !option->needs_data)) {
        r = skip_data(handshake, bytes);
        if (r < 0) {
            return r;
        }
        if (!option) {
            return reply_error(handshake, NBD_REP_ERR_UNSUP, "option %u is not supported", handshake->option);
        }
        return option->needs_data ? reply_error(handshake, NBD_REP_ERR_TOO_BIG, "option %s is too long", option->name)
                                  : reply_error(handshake, NBD_REP_ERR_INVALID, "option %s has no data", option->name);
    }
    data = g_malloc(bytes + 1);
    r = connection_receive_all(connection, data, bytes);
    if (r < 0) {
        return r;
    }
    handshake->data = data;
    handshake->left = bytes;
    return option->handle(handshake);
}

static int coroutine_fn negotiate(struct handshake *handshake)
{
    struct nbd_greeting greeting = {htobe64(NBD_MAGIC), htobe64(NBD_OPTION_MAGIC),
                                    htobe16(NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES)};
    uint32_t flags;
    int r;

    g_byte_array_append(handshake->out, (const uint8_t *)&greeting, sizeof(greeting));
    r = send_out(handshake);
    if (r == 0) {
        r = connection_receive_all(handshake->client->connection, &flags, sizeof(flags));
    }
    if (r < 0) {
        return r;
    }
    flags = be32toh(flags);
    if (flags & ~(uint32_t)(NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES)) {
        return -EPROTO;
    }
    handshake->fixed = flags & NBD_FIXED_NEWSTYLE;
    handshake->no_zeroes = flags & NBD_NO_ZEROES;
    for (;;) {
        int said = negotiate_option(handshake);

        r = said < 0 ? said : send_out(handshake);
        if (r < 0 || said == NEGOTIATED) {
            return r;
        }
    }
}

int coroutine_fn nbd_handshake(struct nbd_client *client)
{
    struct handshake handshake = {.client = client, .out = g_byte_array_new()};
    int r = negotiate(&handshake);

    g_byte_array_unref(handshake.out);
    return r;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The `luks` format: a LUKS1 volume, shown as what it encrypts. Owns the header in memory, and the cipher when a key
 * was given. The header lies in front of the data, or (option `header`) in a node of its own.
 *
 * 1. Without a key the image opens only to be looked at or for its keys to be changed (node->no_data); its data are
 *    refused then.
 * 2. Requests are whole sectors (limits.alignment). The number of a sector counts from the payload's beginning.
 * 3. All of it is data: a hole in the file is not a hole here, since zeroes do not decrypt to zeroes.
 *
 * Data go through cipher_edge.c. create, measure and amend run on the control thread.
 */
#include "base/size.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/user.h"
#include "driver/drivers.h"
#include "driver/format/cipher_edge.h"
#include "driver/format/image_place.h"
#include "driver/format/luks_options.h"
#include <errno.h>
#include <glib.h>

struct luks_state {
    struct luks_header header;
    struct luks_place place;
    struct sector_cipher *cipher; /* NULL: no key was given */
    char *key_secret;             /* likewise */
    uint64_t payload;             /* where the data begin in the file */
};

/* --- opening --- */

static int open_size(struct node *node, struct luks_state *state, struct error **err)
{
    uint64_t size = edge_size(node->file);
    state->payload = state->header.payload_offset;
    if (state->payload == 0 && !node->data && !node->no_data) { /* a write would go over the key slots */
        return error_set(err, -EINVAL,
                         "LUKS header says that its payload lies elsewhere, and '%s' has no node for the "
                         "header alone (option 'header')",
                         node->name);
    }
    if (size < state->payload) {
        return error_set(err, -EINVAL,
                         "LUKS volume of node '%s' is cut off: its payload begins at %" G_GUINT64_FORMAT
                         " of %" G_GUINT64_FORMAT " bytes",
                         node->name, state->payload, size);
    }
    atomic_store(&node->size, align_down(size - state->payload, CIPHER_SECTOR));
    return 0;
}

static int coroutine_fn luks_open(struct node *node, const struct blockdev_options *options, struct error **err)
{
    const struct blockdev_options_luks *own = &options->u.luks;
    struct luks_state *state = node->state;
    struct edge *holder = node->data ? node->data : node->file;
    luks_place_init(&state->place, holder, 0, edge_size(holder));
    int code = luks_read(&state->place.io, &state->header, err);
    if (code == 0) {
        code = open_size(node, state, err);
    }
    if (code == 0 && own->key_secret) {
        code = luks_unlock_with(&state->place.io, &state->header, own->key_secret, &state->cipher, err);
    } else if (code == 0 && !node->no_data) {
        code = luks_key_missing("key-secret", err);
    }
    if (code < 0) {
        error_prepend(err, "Node '%s'", node->name);
        return code;
    }
    state->key_secret = g_strdup(own->key_secret);
    node->encrypted = true;
    node->limits = (struct limits){.alignment = CIPHER_SECTOR, .memory_alignment = 1};
    node->filename = g_strdup(node_beneath_filters(node->file->child)->filename);
    return 0;
}

static void coroutine_fn luks_close(struct node *node)
{
    struct luks_state *state = node->state;
    sector_cipher_destroy(state->cipher);
    g_free(state->key_secret);
}

/* --- data --- */

static int coroutine_fn luks_node_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to,
                                       unsigned flags)
{
    const struct luks_state *state = node->state;
    return state->cipher
               ? cipher_edge_read(node->file, state->cipher, state->payload + offset, offset / CIPHER_SECTOR, bytes, to)
               : -EACCES;
}

static int coroutine_fn luks_node_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                        unsigned flags)
{
    const struct luks_state *state = node->state;
    return state->cipher ? cipher_edge_write(node->file, state->cipher, state->payload + offset, offset / CIPHER_SECTOR,
                                             bytes, from, flags & REQUEST_FUA)
                         : -EACCES;
}

static int coroutine_fn luks_block_status(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    *ret = (struct extent){.bytes = bytes, .flags = EXTENT_DATA | EXTENT_ALLOCATED};
    if (offset + bytes == atomic_load(&node->size)) {
        ret->flags |= EXTENT_END;
    }
    return 0;
}

/* --- sizes --- */

static int check_size(const struct node *node, uint64_t size, struct error **err)
{
    const struct luks_state *state = node->state;
    if (size > INT64_MAX - state->payload) {
        return error_set(err, -EFBIG, "Node '%s': the new size is too large", node->name);
    }
    return 0;
}

static int coroutine_fn luks_truncate(struct node *node, uint64_t size, struct error **err)
{
    const struct luks_state *state = node->state;
    int code = check_size(node, size, err);
    if (code < 0) {
        return code;
    }
    code = edge_truncate(node->file, state->payload + size);
    return code < 0 ? error_set_errno(err, code, "Cannot set the size of node '%s'", node->file->child->name) : 0;
}

static int coroutine_fn luks_grow(struct node *node, uint64_t size, enum preallocation_mode mode, struct error **err)
{
    const struct luks_state *state = node->state;
    int code = check_size(node, size, err);
    return code < 0 ? code : edge_grow(node->file, state->payload + size, mode, err);
}

/* --- creation --- */

static int options_of_create(const struct blockdev_create_options_luks *own, struct luks_options *ret,
                             uint64_t *ret_header, struct error **err)
{
    struct crypto_create_options_luks crypto = {
        .has_cipher_alg = own->has_cipher_alg,
        .cipher_alg = own->cipher_alg,
        .has_cipher_mode = own->has_cipher_mode,
        .cipher_mode = own->cipher_mode,
        .has_ivgen_alg = own->has_ivgen_alg,
        .ivgen_alg = own->ivgen_alg,
        .has_ivgen_hash_alg = own->has_ivgen_hash_alg,
        .ivgen_hash_alg = own->ivgen_hash_alg,
        .has_hash_alg = own->has_hash_alg,
        .hash_alg = own->hash_alg,
        .has_iter_time = own->has_iter_time,
        .iter_time = own->iter_time,
    };
    luks_options_from(&crypto, ret);
    int code = luks_new_bytes(ret, ret_header, err);
    if (code == 0 && own->size > (uint64_t)INT64_MAX - *ret_header) {
        code = error_set(err, -EFBIG, "A LUKS volume cannot be %" G_GUINT64_FORMAT " bytes large", own->size);
    }
    return code;
}

/* Empties it and makes it `bytes` long, of which those from `kept` on are preallocated. */
static int coroutine_fn make_room(struct edge *edge, uint64_t kept, uint64_t bytes, enum preallocation_mode mode,
                                  struct error **err)
{
    int code = image_place_empty(edge, err);
    if (code == 0 && edge_size(edge) < kept) {
        code = edge_grow(edge, kept, PREALLOCATION_MODE_OFF, err);
    }
    if (code == 0 && edge_size(edge) < bytes) {
        code = edge_grow(edge, bytes, mode, err);
    }
    return code;
}

static int coroutine_fn create_in(const struct blockdev_create_options_luks *own, const struct luks_options *options,
                                  uint64_t header_bytes, struct backend *file, struct backend *detached,
                                  struct error **err)
{
    enum preallocation_mode mode = own->has_preallocation ? own->preallocation : PREALLOCATION_MODE_OFF;
    uint64_t inside = detached ? 0 : header_bytes;
    struct luks_header header;
    struct luks_place place;
    int code = file ? make_room(backend_edge(file), inside, inside + own->size, mode, err) : 0;
    if (code == 0 && detached) {
        code = make_room(backend_edge(detached), header_bytes, header_bytes, PREALLOCATION_MODE_OFF, err);
    }
    if (code < 0) {
        return code;
    }
    luks_place_init(&place, backend_edge(detached ? detached : file), 0, header_bytes);
    struct luks_options with = *options;
    with.detached = detached != NULL;
    code = luks_create_with(&place.io, &with, own->key_secret, "key-secret", &header, err);
    if (code == 0 && file) {
        code = edge_flush(backend_edge(file));
        code = code < 0 ? error_set_errno(err, code, "Cannot flush the new LUKS volume") : 0;
    }
    return code;
}

static int coroutine_fn luks_image_create(struct graph *graph, const struct blockdev_create_options *options,
                                          struct error **err)
{
    const struct blockdev_create_options_luks *own = &options->u.luks;
    struct image_place file = {0}, detached = {0};
    struct luks_options resolved;
    uint64_t header_bytes;
    int code = options_of_create(own, &resolved, &header_bytes, err);
    if (code == 0) { /* before anything is touched */
        code = luks_key_check(own->key_secret, "key-secret", err);
    }
    if (code == 0 && !own->file && !own->header) {
        code = error_set(err, -EINVAL, "A LUKS volume needs 'file', 'header', or both");
    }
    if (code == 0 && own->file) {
        code = image_place_open(graph, own->file, &file, err);
    }
    if (code == 0 && own->header) {
        code = image_place_open(graph, own->header, &detached, err);
    }
    if (code == 0) {
        code = create_in(own, &resolved, header_bytes, file.backend, detached.backend, err);
    }
    image_place_close(&detached);
    image_place_close(&file);
    return code;
}

static int coroutine_fn luks_measure(const struct blockdev_create_options *options, struct backend *source,
                                     struct block_measure_info *ret, struct error **err)
{
    struct luks_options resolved;
    uint64_t header_bytes;
    int code = options_of_create(&options->u.luks, &resolved, &header_bytes, err);
    if (code == 0) {
        uint64_t size = align_up(source ? backend_size(source) : options->u.luks.size, CIPHER_SECTOR);
        ret->required = ret->fully_allocated = header_bytes + size;
    }
    return code;
}

/* --- keys --- */

static int coroutine_fn luks_image_amend(struct node *node, const struct image_amendment *amendment,
                                         const struct image_progress *progress, struct error **err)
{
    struct luks_state *state = node->state;
    if (!amendment->keys) {
        return error_set(err, -ENOTSUP, "Of a LUKS volume only the keys can be amended");
    }
    return luks_amend_with(&state->place.io, &state->header, &amendment->keys->u.luks, state->key_secret,
                           amendment->force, err);
}

static struct image_info_specific *luks_specific_info(struct node *node)
{
    const struct luks_state *state = node->state;
    struct image_info_specific *info = g_new0(struct image_info_specific, 1);
    info->type = IMAGE_INFO_SPECIFIC_KIND_LUKS;
    info->u.luks.data = luks_describe(&state->header, node->data != NULL);
    return info;
}

static const struct image_option luks_image_options[] = {
    {.name = "cipher-alg", .type = "str", .help = "Name of encryption cipher algorithm"},
    {.name = "cipher-mode", .type = "str", .help = "Name of encryption cipher mode"},
    {.name = "hash-alg", .type = "str", .help = "Name of encryption hash algorithm"},
    {.name = "iter-time", .type = "num", .help = "Time to spend in PBKDF in milliseconds"},
    {.name = "ivgen-alg", .type = "str", .help = "Name of IV generator algorithm"},
    {.name = "ivgen-hash-alg", .type = "str", .help = "Name of IV generator hash algorithm"},
    {.name = "key-secret", .type = "str", .help = "ID of the secret that provides the keyslot passphrase"},
    {.name = "preallocation", .type = "str", .help = "Preallocation mode (allowed values: off, falloc, full)"},
    {.name = "size", .type = "size", .help = "Virtual disk size"},
    {.name = "iter-time",
     .type = "num",
     .help = "Time to spend in PBKDF in milliseconds",
     .amend_only = true,
     .keys = true},
    {.name = "keyslot",
     .type = "num",
     .help = "Select a single keyslot to modify explicitly",
     .amend_only = true,
     .keys = true},
    {.name = "new-secret",
     .type = "str",
     .help = "New secret to set in the matching keyslots. Empty string to erase",
     .amend_only = true,
     .keys = true},
    {.name = "old-secret",
     .type = "str",
     .help = "Select all keyslots that match this password",
     .amend_only = true,
     .keys = true},
    {.name = "state",
     .type = "str",
     .help = "Select new state of affected keyslots (active/inactive)",
     .amend_only = true,
     .keys = true},
    {.name = NULL},
};

static const struct image_driver luks_image = {
    .options = luks_image_options,
    .create = luks_image_create,
    .measure = luks_measure,
    .amend = luks_image_amend,
    .grow = luks_grow,
};

const struct driver driver_luks = {
    .name = "luks",
    .id = BLOCKDEV_DRIVER_LUKS,
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct luks_state),
    .open = luks_open,
    .close = luks_close,
    .read = luks_node_read,
    .write = luks_node_write,
    .block_status = luks_block_status,
    .truncate = luks_truncate,
    .specific_info = luks_specific_info,
    .image = &luks_image,
};

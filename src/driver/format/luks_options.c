/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What options say about LUKS headers, and what a header says to a user: a translation, with the secrets looked up by
 * id. It decides nothing; luks_amend() has the rules of key slots.
 *
 * 1. The enumerations of the control language and of src/crypto have the same order, so that they are cast.
 * 2. A passphrase is copied for as long as it is used and wiped.
 */
#include "driver/format/luks_options.h"
#include "block/request.h"
#include "crypto/secret.h"
#include <errno.h>
#include <glib.h>

G_STATIC_ASSERT((int)CIPHER_ALGORITHM_COUNT == (int)CRYPTO_CIPHER_ALGORITHM_COUNT);
G_STATIC_ASSERT((int)CIPHER_TWOFISH_256 == (int)CRYPTO_CIPHER_ALGORITHM_TWOFISH_256);
G_STATIC_ASSERT((int)CIPHER_MODE_COUNT == (int)CRYPTO_CIPHER_MODE_COUNT);
G_STATIC_ASSERT((int)CIPHER_XTS == (int)CRYPTO_CIPHER_MODE_XTS);
G_STATIC_ASSERT((int)CIPHER_IV_COUNT == (int)CRYPTO_IVGEN_ALGORITHM_COUNT);
G_STATIC_ASSERT((int)CIPHER_IV_ESSIV == (int)CRYPTO_IVGEN_ALGORITHM_ESSIV);
G_STATIC_ASSERT((int)HASH_COUNT == (int)CRYPTO_HASH_ALGORITHM_COUNT);
G_STATIC_ASSERT((int)HASH_RIPEMD160 == (int)CRYPTO_HASH_ALGORITHM_RIPEMD160);

/* --- where a header lies --- */

static int coroutine_fn place_read(void *argument, uint64_t offset, void *to, size_t bytes)
{
    const struct luks_place *place = argument;
    return edge_read_memory(place->edge, place->offset + offset, to, bytes);
}

static int coroutine_fn place_write(void *argument, uint64_t offset, const void *from, size_t bytes)
{
    const struct luks_place *place = argument;
    return edge_write_memory(place->edge, place->offset + offset, from, bytes, 0);
}

static int coroutine_fn place_flush(void *argument)
{
    const struct luks_place *place = argument;
    return edge_flush(place->edge);
}

void luks_place_init(struct luks_place *place, struct edge *edge, uint64_t offset, uint64_t size)
{
    *place = (struct luks_place){
        .io = {.read = place_read, .write = place_write, .flush = place_flush, .argument = place, .size = size},
        .edge = edge,
        .offset = offset,
    };
}

/* --- options and answers --- */

void luks_options_from(const struct crypto_create_options_luks *from, struct luks_options *ret)
{
    luks_options_default(ret);
    ret->cipher.algorithm = from->has_cipher_alg ? (enum cipher_algorithm)from->cipher_alg : ret->cipher.algorithm;
    ret->cipher.mode = from->has_cipher_mode ? (enum cipher_mode)from->cipher_mode : ret->cipher.mode;
    ret->cipher.iv = from->has_ivgen_alg ? (enum cipher_iv)from->ivgen_alg : ret->cipher.iv;
    ret->cipher.iv_hash = from->has_ivgen_hash_alg ? (enum hash_algorithm)from->ivgen_hash_alg : ret->cipher.iv_hash;
    ret->hash = from->has_hash_alg ? (enum hash_algorithm)from->hash_alg : ret->hash;
    ret->iter_time_ms = from->has_iter_time ? (uint64_t)from->iter_time : ret->iter_time_ms;
}

struct crypto_luks_info *luks_describe(const struct luks_header *header, bool detached)
{
    struct crypto_luks_info *info = g_new0(struct crypto_luks_info, 1);
    *info = (struct crypto_luks_info){
        .cipher_alg = (enum crypto_cipher_algorithm)header->cipher.algorithm,
        .cipher_mode = (enum crypto_cipher_mode)header->cipher.mode,
        .ivgen_alg = (enum crypto_ivgen_algorithm)header->cipher.iv,
        .has_ivgen_hash_alg = header->cipher.iv == CIPHER_IV_ESSIV,
        .ivgen_hash_alg = (enum crypto_hash_algorithm)header->cipher.iv_hash,
        .hash_alg = (enum crypto_hash_algorithm)header->hash,
        .detached_header = detached,
        .payload_offset = header->payload_offset,
        .master_key_iters = header->digest_iterations,
        .uuid = g_strdup(header->uuid),
    };
    for (unsigned i = 0; i < LUKS_SLOTS; i++) {
        const struct luks_slot *from = &header->slots[i];
        struct crypto_luks_slot *slot = g_new0(struct crypto_luks_slot, 1);
        *slot = (struct crypto_luks_slot){
            .active = from->active,
            .has_iters = from->active,
            .iters = from->iterations,
            .has_stripes = from->active,
            .stripes = from->stripes,
            .key_offset = from->key_offset,
        };
        crypto_luks_slot_list_append(&info->slots, slot);
    }
    return info;
}

int luks_key_missing(const char *option, struct error **err)
{
    error_set(err, -EINVAL, "Parameter '%s' is required for cipher", option);
    error_hint(err, "Give the id of a secret (--object secret,id=...) with the image's passphrase");
    return -EINVAL;
}

int luks_key_check(const char *key_secret, const char *option, struct error **err)
{
    uint8_t *secret;
    size_t bytes;
    if (!key_secret) {
        return luks_key_missing(option, err);
    }
    int code = secret_get(key_secret, &secret, &bytes, err);
    if (code == 0) {
        secret_free(secret, bytes);
    }
    return code;
}

/* --- with secrets --- */

int coroutine_fn luks_create_with(const struct luks_io *io, const struct luks_options *options, const char *key_secret,
                                  const char *option, struct luks_header *ret, struct error **err)
{
    uint8_t *passphrase;
    size_t bytes;
    if (!key_secret) {
        return luks_key_missing(option, err);
    }
    int code = secret_get(key_secret, &passphrase, &bytes, err);
    if (code < 0) {
        return code;
    }
    code = luks_create(io, options, passphrase, bytes, ret, err);
    secret_free(passphrase, bytes);
    return code;
}

int coroutine_fn luks_unlock_with(const struct luks_io *io, const struct luks_header *header, const char *key_secret,
                                  struct sector_cipher **ret, struct error **err)
{
    uint8_t key[CIPHER_KEY_MAX], *passphrase;
    size_t bytes;
    int code = secret_get(key_secret, &passphrase, &bytes, err);
    if (code < 0) {
        return code;
    }
    code = luks_unlock(io, header, 0, passphrase, bytes, key, err);
    secret_free(passphrase, bytes);
    if (code >= 0) {
        code = sector_cipher_create(&header->cipher, key, ret, err);
    }
    explicit_bzero(key, sizeof(key));
    return code;
}

/* Absent: nothing. */
static int secret_of(const char *id, uint8_t **ret, struct luks_secret *ret_secret, struct error **err)
{
    if (!id) {
        return 0;
    }
    int code = secret_get(id, ret, &ret_secret->bytes, err);
    ret_secret->data = *ret;
    return code;
}

int coroutine_fn luks_amend_with(const struct luks_io *io, struct luks_header *header,
                                 const struct crypto_amend_options_luks *options, const char *opened_with, bool force,
                                 struct error **err)
{
    bool activate = options->state == CRYPTO_LUKS_KEYSLOT_STATE_ACTIVE;
    uint8_t *current = NULL, *new_secret = NULL, *old_secret = NULL;
    struct luks_amendment change = {
        .activate = activate,
        .slot = options->has_keyslot ? MIN(options->keyslot, INT32_MAX) : -1,
        .iter_time_ms = options->has_iter_time ? options->iter_time : 0,
        .force = force,
    };
    const char *opens = options->secret ? options->secret : opened_with;
    if (activate && !opens) {
        return luks_key_missing("secret", err);
    }
    int code = secret_of(activate ? opens : NULL, &current, &change.current, err);
    if (code == 0) {
        code = secret_of(options->new_secret, &new_secret, &change.new_secret, err);
    }
    if (code == 0) {
        code = secret_of(options->old_secret, &old_secret, &change.old_secret, err);
    }
    if (code == 0) {
        code = luks_amend(io, header, &change, err);
    }
    secret_free(current, change.current.bytes);
    secret_free(new_secret, change.new_secret.bytes);
    secret_free(old_secret, change.old_secret.bytes);
    return code;
}

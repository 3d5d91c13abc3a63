/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Hashes by number and name, over nettle's; PBKDF2 with whichever of them.
 *
 * 1. Whatever a password or key went through is wiped before its memory is given back.
 *
 * HMAC is put together here from nettle's generic parts, because its table of HMACs takes keys of one length only.
 */
#include "crypto/hash.h"
#include <glib.h>
#include <nettle/hmac.h>
#include <nettle/nettle-meta.h>
#include <nettle/pbkdf2.h>
#include <string.h>

static const struct {
    const char *name;
    const struct nettle_hash *hash;
} hashes[] = {
    [HASH_MD5] = {"md5", &nettle_md5},          [HASH_SHA1] = {"sha1", &nettle_sha1},
    [HASH_SHA224] = {"sha224", &nettle_sha224}, [HASH_SHA256] = {"sha256", &nettle_sha256},
    [HASH_SHA384] = {"sha384", &nettle_sha384}, [HASH_SHA512] = {"sha512", &nettle_sha512},
    [HASH_SM3] = {"sm3", &nettle_sm3},          [HASH_RIPEMD160] = {"ripemd160", &nettle_ripemd160},
};
G_STATIC_ASSERT(G_N_ELEMENTS(hashes) == HASH_COUNT);

const char *hash_name(enum hash_algorithm hash)
{
    return hashes[hash].name;
}

bool hash_parse(const char *name, enum hash_algorithm *ret)
{
    for (unsigned i = 0; i < HASH_COUNT; i++) {
        if (!strcmp(hashes[i].name, name)) {
            *ret = i;
            return true;
        }
    }
    return false;
}

unsigned hash_bytes(enum hash_algorithm hash)
{
    return hashes[hash].hash->digest_size;
}

void hash_digest(enum hash_algorithm hash, const void *a, size_t a_bytes, const void *b, size_t b_bytes, uint8_t *out)
{
    const struct nettle_hash *with = hashes[hash].hash;
    g_autofree void *context = g_malloc(with->context_size);
    with->init(context);
    with->update(context, a_bytes, a);
    if (b) {
        with->update(context, b_bytes, b);
    }
    with->digest(context, with->digest_size, out);
    explicit_bzero(context, with->context_size);
}

/* An HMAC as nettle's pbkdf2() takes one. */
struct hmac {
    const struct nettle_hash *hash;
    void *outer, *inner, *state;
};

static void hmac_thunk_update(void *context, size_t bytes, const uint8_t *data)
{
    struct hmac *hmac = context;
    hmac_update(hmac->state, hmac->hash, bytes, data);
}

static void hmac_thunk_digest(void *context, size_t bytes, uint8_t *out)
{
    struct hmac *hmac = context;
    hmac_digest(hmac->outer, hmac->inner, hmac->state, hmac->hash, bytes, out);
}

void hash_pbkdf2(enum hash_algorithm hash, const void *password, size_t password_bytes, const uint8_t *salt,
                 size_t salt_bytes, uint32_t iterations, uint8_t *out, size_t out_bytes)
{
    const struct nettle_hash *with = hashes[hash].hash;
    size_t size = (with->context_size + 15) & ~(size_t)15;
    g_autofree uint8_t *memory = g_malloc(3 * size);
    struct hmac hmac = {with, memory, memory + size, memory + 2 * size};
    g_assert(iterations > 0);
    hmac_set_key(hmac.outer, hmac.inner, hmac.state, with, password_bytes, password);
    pbkdf2(&hmac, hmac_thunk_update, hmac_thunk_digest, with->digest_size, iterations, salt_bytes, salt, out_bytes,
           out);
    explicit_bzero(memory, 3 * size);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CRYPTO_HASH_H
#define INTERLOCK_CRYPTO_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Hashes, and what is derived with them. Pure computing; any thread. The order is that of the control language. */
enum hash_algorithm {
    HASH_MD5,
    HASH_SHA1,
    HASH_SHA224,
    HASH_SHA256,
    HASH_SHA384,
    HASH_SHA512,
    HASH_RIPEMD160,
    HASH_SM3,
    HASH_COUNT
};
enum { HASH_BYTES_MAX = 64 };

const char *hash_name(enum hash_algorithm hash);
bool hash_parse(const char *name, enum hash_algorithm *ret); /* false: unknown */
unsigned hash_bytes(enum hash_algorithm hash);               /* of its digest */

/* The digest of two pieces of memory, one behind the other (`b` may be NULL). `out` has hash_bytes(). */
void hash_digest(enum hash_algorithm hash, const void *a, size_t a_bytes, const void *b, size_t b_bytes, uint8_t *out);
/* PBKDF2 (RFC 2898) with HMAC of this hash; at least one iteration. Takes long: iterations * (out_bytes / hash_bytes()
 * rounded up) is what it costs. */
void hash_pbkdf2(enum hash_algorithm hash, const void *password, size_t password_bytes, const uint8_t *salt,
                 size_t salt_bytes, uint32_t iterations, uint8_t *out, size_t out_bytes);

#endif

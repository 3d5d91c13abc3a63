/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CRYPTO_CIPHER_H
#define INTERLOCK_CRYPTO_CIPHER_H

#include "base/error.h"
#include "crypto/hash.h"
#include "loop/coroutine.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Encryption of sectors of 512 bytes, in place: a block cipher, a mode, and how the initialisation vector of a sector
 * comes from its number. What is what: the names of dm-crypt and LUKS1 ("aes", "xts-plain64", "cbc-essiv:sha256").
 * The orders are those of the control language.
 */
enum { CIPHER_SECTOR = 512, CIPHER_KEY_MAX = 64 };

enum cipher_algorithm {
    CIPHER_AES_128,
    CIPHER_AES_192,
    CIPHER_AES_256,
    CIPHER_DES,        /* known by name only */
    CIPHER_TRIPLE_DES, /* likewise */
    CIPHER_CAST5_128,
    CIPHER_SERPENT_128,
    CIPHER_SERPENT_192,
    CIPHER_SERPENT_256,
    CIPHER_TWOFISH_128,
    CIPHER_TWOFISH_192,
    CIPHER_TWOFISH_256,
    CIPHER_SM4, /* known by name only */
    CIPHER_ALGORITHM_COUNT
};
enum cipher_mode { CIPHER_ECB, CIPHER_CBC, CIPHER_XTS, CIPHER_CTR, CIPHER_MODE_COUNT };
enum cipher_iv {
    CIPHER_IV_PLAIN,   /* the number's low 32 bits, little-endian, zeroes behind */
    CIPHER_IV_PLAIN64, /* all 64 bits */
    CIPHER_IV_ESSIV,   /* the same, encrypted with a hash of the key */
    CIPHER_IV_COUNT
};
struct cipher_config {
    enum cipher_algorithm algorithm;
    enum cipher_mode mode;
    enum cipher_iv iv;
    enum hash_algorithm iv_hash; /* of essiv */
};

const char *cipher_algorithm_name(enum cipher_algorithm algorithm); /* "aes-256" */
/* Bytes of key that sectors are encrypted with: twice the cipher's for XTS. -ENOTSUP, or -EINVAL for what does not go
 * together, with what is possible. */
int cipher_key_bytes(const struct cipher_config *config, size_t *ret, struct error **err);
/* As LUKS1 headers have them: "aes", and "cbc-essiv:sha256" (g_free()). */
const char *cipher_luks_name(enum cipher_algorithm algorithm);
char *cipher_luks_mode(const struct cipher_config *config);
/* The other way; -ENOTSUP names what is not known. */
int cipher_from_luks(const char *name, const char *mode, size_t key_bytes, struct cipher_config *ret,
                     struct error **err);

struct sector_cipher;
/* `key` has cipher_key_bytes(); a copy is kept until the end. */
int sector_cipher_create(const struct cipher_config *config, const uint8_t *key, struct sector_cipher **ret,
                         struct error **err);
void sector_cipher_destroy(struct sector_cipher *cipher); /* wipes the key; accepts NULL */

/* Pure computing, any thread, any number at the same time. `bytes` is a multiple of CIPHER_SECTOR; `sector` is the
 * number of the first. */
void sector_cipher_encrypt(const struct sector_cipher *cipher, uint64_t sector, void *data, size_t bytes);
void sector_cipher_decrypt(const struct sector_cipher *cipher, uint64_t sector, void *data, size_t bytes);
/* The same from a coroutine: what would hold up the loop goes to the worker pool, in pieces, so that all cores work. */
void coroutine_fn sector_cipher_run(const struct sector_cipher *cipher, bool encrypt, uint64_t sector, void *data,
                                    size_t bytes);

#endif

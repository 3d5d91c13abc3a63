/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which ciphers there are, and sectors through them. The block ciphers, CBC and CTR are nettle's. XTS is put together
 * here, over whatever cipher has blocks of 16 bytes, because that lets a few sectors go through the cipher in one call:
 * several times as fast as block by block, where the processor has instructions for AES.
 *
 * 1. After creation a cipher is never changed, so any number of threads use it at the same time.
 * 2. Key schedules and keys are wiped when it is destroyed; what is derived on the way holds no key.
 *
 * What a request gains from more cores, and from which length on, is cipher_run.c.
 */
#include "crypto/cipher.h"
#include "base/size.h"
#include "crypto/cipher_private.h"
#include <endian.h>
#include <errno.h>
#include <glib.h>
#include <nettle/cbc.h>
#include <nettle/ctr.h>
#include <nettle/nettle-meta.h>
#include <string.h>

enum { BLOCK = 16, BATCH_SECTORS = 8, BLOCKS_OF_SECTOR = CIPHER_SECTOR / BLOCK };

static const struct {
    const char *name, *luks;
    const struct nettle_cipher *cipher; /* NULL: known by name only */
    bool fast;                          /* by instructions of the processor */
} ciphers[] = {
    [CIPHER_AES_128] = {"aes-128", "aes", &nettle_aes128, true},
    [CIPHER_AES_192] = {"aes-192", "aes", &nettle_aes192, true},
    [CIPHER_AES_256] = {"aes-256", "aes", &nettle_aes256, true},
    [CIPHER_DES] = {"des", "des", NULL, false},
    [CIPHER_TRIPLE_DES] = {"3des", "des3_ede", NULL, false},
    [CIPHER_CAST5_128] = {"cast5-128", "cast5", &nettle_cast128, false},
    [CIPHER_SERPENT_128] = {"serpent-128", "serpent", &nettle_serpent128, false},
    [CIPHER_SERPENT_192] = {"serpent-192", "serpent", &nettle_serpent192, false},
    [CIPHER_SERPENT_256] = {"serpent-256", "serpent", &nettle_serpent256, false},
    [CIPHER_TWOFISH_128] = {"twofish-128", "twofish", &nettle_twofish128, false},
    [CIPHER_TWOFISH_192] = {"twofish-192", "twofish", &nettle_twofish192, false},
    [CIPHER_TWOFISH_256] = {"twofish-256", "twofish", &nettle_twofish256, false},
    [CIPHER_SM4] = {"sm4", "sm4", NULL, false},
};
G_STATIC_ASSERT(G_N_ELEMENTS(ciphers) == CIPHER_ALGORITHM_COUNT);
static const char *const mode_names[] = {"ecb", "cbc", "xts", "ctr"};
G_STATIC_ASSERT(G_N_ELEMENTS(mode_names) == CIPHER_MODE_COUNT);
static const char *const iv_names[] = {"plain", "plain64", "essiv"};
G_STATIC_ASSERT(G_N_ELEMENTS(iv_names) == CIPHER_IV_COUNT);

struct sector_cipher {
    struct cipher_config config;
    const struct nettle_cipher *block;
    void *encrypt, *decrypt, *tweak;
    const struct nettle_cipher *essiv;
    void *essiv_key;
};

/* --- names --- */

const char *cipher_algorithm_name(enum cipher_algorithm algorithm)
{
    return ciphers[algorithm].name;
}

const char *cipher_luks_name(enum cipher_algorithm algorithm)
{
    return ciphers[algorithm].luks;
}

char *cipher_luks_mode(const struct cipher_config *config)
{
    if (config->iv == CIPHER_IV_ESSIV) {
        return g_strdup_printf("%s-essiv:%s", mode_names[config->mode], hash_name(config->iv_hash));
    }
    return g_strdup_printf("%s-%s", mode_names[config->mode], iv_names[config->iv]);
}

/* The cipher that essiv uses: of the same kind, with a key as long as the hash. NULL: there is none. */
static const struct nettle_cipher *essiv_cipher(const struct cipher_config *config)
{
    for (unsigned i = 0; i < CIPHER_ALGORITHM_COUNT; i++) {
        if (ciphers[i].cipher && !strcmp(ciphers[i].luks, ciphers[config->algorithm].luks) &&
            ciphers[i].cipher->key_size == hash_bytes(config->iv_hash)) {
            return ciphers[i].cipher;
        }
    }
    return NULL;
}

int cipher_key_bytes(const struct cipher_config *config, size_t *ret, struct error **err)
{
    const struct nettle_cipher *cipher = ciphers[config->algorithm].cipher;
    if (!cipher) {
        return error_set(err, -ENOTSUP, "Cipher '%s' is not supported", ciphers[config->algorithm].name);
    }
    if (config->mode == CIPHER_XTS && cipher->block_size != BLOCK) {
        return error_set(err, -EINVAL, "Cipher '%s' has blocks of %u bytes and cannot be used in mode xts",
                         ciphers[config->algorithm].name, cipher->block_size);
    }
    if (config->iv == CIPHER_IV_ESSIV && !essiv_cipher(config)) {
        return error_set(err, -EINVAL, "essiv with hash '%s' needs a key of %u bytes, which cipher '%s' cannot have",
                         hash_name(config->iv_hash), hash_bytes(config->iv_hash), ciphers[config->algorithm].luks);
    }
    *ret = config->mode == CIPHER_XTS ? 2 * cipher->key_size : cipher->key_size;
    return 0;
}

static int find_name(const char *const *names, unsigned count, const char *name)
{
    for (unsigned i = 0; i < count; i++) {
        if (!strcmp(names[i], name)) {
            return i;
        }
    }
    return -1;
}

int cipher_from_luks(const char *name, const char *mode, size_t key_bytes, struct cipher_config *ret,
                     struct error **err)
{
    g_auto(GStrv) parts = g_strsplit(mode, "-", 2);
    char *iv = parts[0] ? parts[1] : NULL;
    char *iv_hash = iv ? strchr(iv, ':') : NULL;
    struct cipher_config config = {.iv_hash = HASH_SHA256};
    if (iv_hash) {
        *iv_hash++ = 0;
    }
    int mode_found = parts[0] ? find_name(mode_names, CIPHER_MODE_COUNT, parts[0]) : -1;
    int iv_found = iv ? find_name(iv_names, CIPHER_IV_COUNT, iv) : -1;
    if (mode_found == CIPHER_ECB && !iv) {
        iv_found = CIPHER_IV_PLAIN; /* it uses none */
    }
    bool hash_is_right = iv_found == CIPHER_IV_ESSIV ? iv_hash && hash_parse(iv_hash, &config.iv_hash) : !iv_hash;
    if (mode_found < 0 || iv_found < 0 || !hash_is_right) {
        return error_set(err, -ENOTSUP, "LUKS cipher mode '%s' is not supported", mode);
    }
    config.mode = mode_found;
    config.iv = iv_found;
    bool known = false;
    for (unsigned i = 0; i < CIPHER_ALGORITHM_COUNT; i++) {
        size_t bytes;
        config.algorithm = i;
        if (strcmp(ciphers[i].luks, name) || !ciphers[i].cipher) {
            continue;
        }
        known = true;
        bytes = ciphers[i].cipher->key_size * (config.mode == CIPHER_XTS ? 2 : 1);
        if (bytes == key_bytes) {
            *ret = config;
            return cipher_key_bytes(&config, &bytes, err);
        }
    }
    if (known) {
        return error_set(err, -EINVAL, "LUKS cipher '%s' in mode '%s' does not take keys of %zu bytes", name, mode,
                         key_bytes);
    }
    return error_set(err, -ENOTSUP, "LUKS cipher '%s' is not supported", name);
}

/* --- keys --- */

static void *schedule(const struct nettle_cipher *cipher, bool encrypt, const uint8_t *key)
{
    void *context = NULL;
    g_assert(posix_memalign(&context, 64, align_up(cipher->context_size, 64)) == 0);
    if (encrypt) {
        cipher->set_encrypt_key(context, key);
    } else {
        cipher->set_decrypt_key(context, key);
    }
    return context;
}

static void schedule_free(const struct nettle_cipher *cipher, void *context)
{
    if (context) {
        explicit_bzero(context, cipher->context_size);
        free(context);
    }
}

int sector_cipher_create(const struct cipher_config *config, const uint8_t *key, struct sector_cipher **ret,
                         struct error **err)
{
    size_t key_bytes;
    int code = cipher_key_bytes(config, &key_bytes, err);
    if (code < 0) {
        return code;
    }
    struct sector_cipher *cipher = g_new0(struct sector_cipher, 1);
    cipher->config = *config;
    cipher->block = ciphers[config->algorithm].cipher;
    cipher->encrypt = schedule(cipher->block, true, key);
    cipher->decrypt = schedule(cipher->block, false, key);
    if (config->mode == CIPHER_XTS) {
        cipher->tweak = schedule(cipher->block, true, key + key_bytes / 2);
    }
    if (config->iv == CIPHER_IV_ESSIV) {
        uint8_t digest[HASH_BYTES_MAX];
        hash_digest(config->iv_hash, key, key_bytes, NULL, 0, digest);
        cipher->essiv = essiv_cipher(config);
        cipher->essiv_key = schedule(cipher->essiv, true, digest);
        explicit_bzero(digest, sizeof(digest));
    }
    *ret = cipher;
    return 0;
}

void sector_cipher_destroy(struct sector_cipher *cipher)
{
    if (!cipher) {
        return;
    }
    schedule_free(cipher->block, cipher->encrypt);
    schedule_free(cipher->block, cipher->decrypt);
    schedule_free(cipher->block, cipher->tweak);
    schedule_free(cipher->essiv, cipher->essiv_key);
    g_free(cipher);
}

bool sector_cipher_is_fast(const struct sector_cipher *cipher)
{
    bool serial = cipher->config.mode != CIPHER_XTS; /* block after block, at least one way */
    return ciphers[cipher->config.algorithm].fast && !serial;
}

/* --- sectors --- */

/* The initialisation vector of a sector, one block long. */
static void make_iv(const struct sector_cipher *cipher, uint64_t sector, uint8_t *iv)
{
    uint64_t number = htole64(cipher->config.iv == CIPHER_IV_PLAIN ? (uint32_t)sector : sector);
    memset(iv, 0, BLOCK);
    memcpy(iv, &number, sizeof(number));
    if (cipher->essiv) {
        cipher->essiv->encrypt(cipher->essiv_key, BLOCK, iv, iv);
    }
}

static inline void double_tweak(const uint64_t *from, uint64_t *to)
{
    uint64_t low = le64toh(from[0]), high = le64toh(from[1]);
    to[1] = htole64(high << 1 | low >> 63);
    to[0] = htole64(low << 1 ^ (0x87 & -(high >> 63)));
}

static void xor_words(uint64_t *to, const uint64_t *with, size_t words)
{
    for (size_t i = 0; i < words; i++) {
        to[i] ^= with[i];
    }
}

/* Up to BATCH_SECTORS. `data` may lie anywhere, so it is worked on in a copy. */
static void xts_batch(const struct sector_cipher *cipher, bool encrypt, uint64_t sector, uint8_t *data, size_t bytes)
{
    uint64_t tweaks[BATCH_SECTORS * CIPHER_SECTOR / 8];
    uint64_t work[BATCH_SECTORS * CIPHER_SECTOR / 8];
    uint8_t ivs[BATCH_SECTORS][BLOCK];
    unsigned sectors = bytes / CIPHER_SECTOR;
    for (unsigned i = 0; i < sectors; i++) {
        make_iv(cipher, sector + i, ivs[i]);
    }
    cipher->block->encrypt(cipher->tweak, sectors * BLOCK, ivs[0], ivs[0]);
    for (unsigned i = 0; i < sectors; i++) {
        uint64_t *tweak = tweaks + (size_t)i * CIPHER_SECTOR / 8;
        memcpy(tweak, ivs[i], BLOCK);
        for (unsigned n = 1; n < BLOCKS_OF_SECTOR; n++, tweak += 2) {
            double_tweak(tweak, tweak + 2);
        }
    }
    memcpy(work, data, bytes);
    xor_words(work, tweaks, bytes / 8);
    if (encrypt) {
        cipher->block->encrypt(cipher->encrypt, bytes, (uint8_t *)work, (uint8_t *)work);
    } else {
        cipher->block->decrypt(cipher->decrypt, bytes, (uint8_t *)work, (uint8_t *)work);
    }
    xor_words(work, tweaks, bytes / 8);
    memcpy(data, work, bytes);
}

static void other_sector(const struct sector_cipher *cipher, bool encrypt, uint64_t sector, uint8_t *data)
{
    const struct nettle_cipher *block = cipher->block;
    uint8_t iv[BLOCK];
    make_iv(cipher, sector, iv);
    if (cipher->config.mode == CIPHER_CBC && encrypt) {
        cbc_encrypt(cipher->encrypt, block->encrypt, block->block_size, iv, CIPHER_SECTOR, data, data);
    } else if (cipher->config.mode == CIPHER_CBC) {
        cbc_decrypt(cipher->decrypt, block->decrypt, block->block_size, iv, CIPHER_SECTOR, data, data);
    } else if (cipher->config.mode == CIPHER_CTR) {
        ctr_crypt(cipher->encrypt, block->encrypt, block->block_size, iv, CIPHER_SECTOR, data, data);
    } else if (encrypt) {
        block->encrypt(cipher->encrypt, CIPHER_SECTOR, data, data);
    } else {
        block->decrypt(cipher->decrypt, CIPHER_SECTOR, data, data);
    }
}

static void run(const struct sector_cipher *cipher, bool encrypt, uint64_t sector, uint8_t *data, size_t bytes)
{
    g_assert(bytes % CIPHER_SECTOR == 0);
    while (bytes) {
        size_t part = CIPHER_SECTOR;
        if (cipher->config.mode == CIPHER_XTS) {
            part = MIN(bytes, BATCH_SECTORS * CIPHER_SECTOR);
            xts_batch(cipher, encrypt, sector, data, part);
        } else {
            other_sector(cipher, encrypt, sector, data);
        }
        sector += part / CIPHER_SECTOR;
        data += part;
        bytes -= part;
    }
}

void sector_cipher_encrypt(const struct sector_cipher *cipher, uint64_t sector, void *data, size_t bytes)
{
    run(cipher, true, sector, data, bytes);
}

void sector_cipher_decrypt(const struct sector_cipher *cipher, uint64_t sector, void *data, size_t bytes)
{
    run(cipher, false, sector, data, bytes);
}

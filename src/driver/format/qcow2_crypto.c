/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Encrypted qcow2 images: their keys, and guest data through the cipher (qcow2_data.c comes here for every access).
 *
 * 1. Only the data of standard clusters are encrypted; no metadata, and no compressed clusters (none are written).
 * 2. LUKS: a LUKS1 header lies in clusters of its own; the number of a sector is that of its place on the host, so a
 *    cluster that moves is encrypted anew. AES: there is no header, the first 16 bytes of the secret are the key, and
 *    the number is the guest's.
 * 3. What was never written decrypts to garbage, also where the file reads as zeroes: no cluster of an encrypted image
 *    counts as clean (qcow2_step.c), and preallocated ones are marked zero (qcow2_create.c).
 * 4. Without a key the image can be looked at and checked, and its keys are shown; data are refused.
 */
#include "driver/format/qcow2_crypto.h"
#include "base/size.h"
#include "block/image.h"
#include "block/request.h"
#include "crypto/secret.h"
#include "driver/format/cipher_edge.h"
#include "driver/format/luks_options.h"
#include "driver/format/qcow2.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

enum { AES_KEY_BYTES = 16, HEADER_BYTES_MAX = 64 << 20 };

struct qcow2_crypto {
    bool luks; /* else AES */
    struct luks_header header;
    struct luks_place place;
    struct sector_cipher *cipher; /* NULL: no key was given */
    char *key_secret;             /* likewise */
};

/* --- opening --- */

static int coroutine_fn open_luks(struct qcow2 *image, struct qcow2_crypto *crypto, struct error **err)
{
    const struct qcow2_header *header = &image->header;
    struct edge *file = image->node->file;
    uint64_t end = align_up(edge_size(file), image->cluster_size);
    if (header->crypto_length == 0) {
        return error_set(err, -EINVAL, "qcow2 image lacks the header of its encryption");
    }
    if (!is_aligned(header->crypto_offset, image->cluster_size) || header->crypto_offset == 0) {
        return error_set(err, -EINVAL, "qcow2 encryption header offset 0x%" G_GINT64_MODIFIER "x is invalid",
                         header->crypto_offset);
    }
    if (header->crypto_length > HEADER_BYTES_MAX || header->crypto_offset > end ||
        header->crypto_length > end - header->crypto_offset) {
        return error_set(err, -EINVAL,
                         "qcow2 encryption header (0x%" G_GINT64_MODIFIER "x, %" G_GUINT64_FORMAT
                         " bytes) is too long, or lies behind the end of the file",
                         header->crypto_offset, header->crypto_length);
    }
    luks_place_init(&crypto->place, file, header->crypto_offset, header->crypto_length);
    return luks_read(&crypto->place.io, &crypto->header, err);
}

static int aes_cipher(const char *key_secret, struct sector_cipher **ret, struct error **err)
{
    static const struct cipher_config config = {CIPHER_AES_128, CIPHER_CBC, CIPHER_IV_PLAIN64, HASH_SHA256};
    uint8_t key[AES_KEY_BYTES] = {0}, *secret;
    size_t bytes;
    int code = secret_get(key_secret, &secret, &bytes, err);
    if (code < 0) {
        return code;
    }
    memcpy(key, secret, MIN(bytes, sizeof(key)));
    secret_free(secret, bytes);
    code = sector_cipher_create(&config, key, ret, err);
    explicit_bzero(key, sizeof(key));
    return code;
}

/* The secret that the options give, or NULL. */
static int choose_secret(const struct qcow2 *image, const struct blockdev_qcow2_encryption *options, const char **ret,
                         struct error **err)
{
    unsigned method = image->header.crypt_method;
    *ret = NULL;
    if (!options) {
        return 0;
    }
    if (method == QCOW2_CRYPT_NONE) {
        return error_set(err, -EINVAL, "qcow2 image of node '%s' is not encrypted, but the option 'encrypt' is given",
                         image->node->name);
    }
    enum blockdev_qcow2_encryption_format format =
        method == QCOW2_CRYPT_AES ? BLOCKDEV_QCOW2_ENCRYPTION_FORMAT_AES : BLOCKDEV_QCOW2_ENCRYPTION_FORMAT_LUKS;
    if (options->format == BLOCKDEV_QCOW2_ENCRYPTION_FORMAT_AUTO) {
        *ret = options->u.auto_.key_secret;
    } else if (options->format != format) {
        return error_set(err, -EINVAL, "qcow2 image of node '%s' is encrypted with '%s', not '%s' (encrypt.format)",
                         image->node->name, blockdev_qcow2_encryption_format_name(format),
                         blockdev_qcow2_encryption_format_name(options->format));
    } else {
        *ret = format == BLOCKDEV_QCOW2_ENCRYPTION_FORMAT_AES ? options->u.aes.key_secret : options->u.luks.key_secret;
    }
    return 0;
}

int coroutine_fn qcow2_crypto_open(struct qcow2 *image, const struct blockdev_qcow2_encryption *options,
                                   struct error **err)
{
    const char *key_secret;
    int code = choose_secret(image, options, &key_secret, err);
    if (code < 0 || image->header.crypt_method == QCOW2_CRYPT_NONE) {
        return code;
    }
    struct qcow2_crypto *crypto = g_new0(struct qcow2_crypto, 1);
    crypto->luks = image->header.crypt_method == QCOW2_CRYPT_LUKS;
    if (crypto->luks) {
        code = open_luks(image, crypto, err);
    }
    if (code == 0 && key_secret) {
        code = crypto->luks ? luks_unlock_with(&crypto->place.io, &crypto->header, key_secret, &crypto->cipher, err)
                            : aes_cipher(key_secret, &crypto->cipher, err);
    } else if (code == 0 && !image->node->no_data && !image->node->check_only) {
        code = luks_key_missing("encrypt.key-secret", err);
    }
    if (code < 0) {
        qcow2_crypto_close(crypto);
        return code;
    }
    crypto->key_secret = g_strdup(key_secret);
    image->crypto = crypto;
    image->node->encrypted = true;
    return 0;
}

void qcow2_crypto_close(struct qcow2_crypto *crypto)
{
    if (crypto) {
        sector_cipher_destroy(crypto->cipher);
        g_free(crypto->key_secret);
        g_free(crypto);
    }
}

/* --- data --- */

static uint64_t sector_of(const struct qcow2_crypto *crypto, uint64_t host, uint64_t guest)
{
    return (crypto->luks ? host : guest) / CIPHER_SECTOR;
}

int coroutine_fn qcow2_crypto_read(const struct qcow2_crypto *crypto, struct edge *edge, uint64_t host, uint64_t guest,
                                   uint64_t bytes, struct buffers to)
{
    uint64_t sector = sector_of(crypto, host, guest);
    return crypto->cipher ? cipher_edge_read(edge, crypto->cipher, host, sector, bytes, to) : -EACCES;
}

int coroutine_fn qcow2_crypto_write(const struct qcow2_crypto *crypto, struct edge *edge, uint64_t host, uint64_t guest,
                                    uint64_t bytes, struct buffers from)
{
    uint64_t sector = sector_of(crypto, host, guest);
    return crypto->cipher ? cipher_edge_write(edge, crypto->cipher, host, sector, bytes, from, 0) : -EACCES;
}

int coroutine_fn qcow2_crypto_moved(const struct qcow2_crypto *crypto, uint64_t from, uint64_t to, void *data,
                                    uint64_t bytes)
{
    if (!crypto->luks) {
        return 0; /* what counts is the guest's place */
    }
    if (!crypto->cipher) {
        return -EACCES;
    }
    sector_cipher_run(crypto->cipher, false, from / CIPHER_SECTOR, data, bytes);
    sector_cipher_run(crypto->cipher, true, to / CIPHER_SECTOR, data, bytes);
    return 0;
}

int coroutine_fn qcow2_crypto_write_zeroes(const struct qcow2_crypto *crypto, struct edge *edge, uint64_t host,
                                           uint64_t bytes)
{
    g_autofree void *zeroes = g_try_malloc0(bytes);
    struct iovec iov = {zeroes, bytes};
    if (!crypto->luks) {
        return -ENOTSUP;
    }
    return zeroes ? qcow2_crypto_write(crypto, edge, host, 0, bytes, buffers_one(&iov)) : -ENOMEM;
}

/* --- for users --- */

struct image_info_specific_qcow2_encryption *qcow2_crypto_describe(const struct qcow2_crypto *crypto)
{
    struct image_info_specific_qcow2_encryption *info = g_new0(struct image_info_specific_qcow2_encryption, 1);
    info->format = IMAGE_INFO_SPECIFIC_QCOW2_ENCRYPTION_FORMAT_AES;
    if (crypto->luks) {
        struct crypto_luks_info *luks = luks_describe(&crypto->header, false);
        info->format = IMAGE_INFO_SPECIFIC_QCOW2_ENCRYPTION_FORMAT_LUKS;
        info->u.luks = *luks; /* what it points to moves with it */
        g_free(luks);
    }
    return info;
}

int coroutine_fn qcow2_crypto_amend(struct qcow2 *image, const struct image_amendment *amendment, struct error **err)
{
    const struct crypto_amend_options *encrypt = amendment->keys->u.qcow2.encrypt;
    struct qcow2_crypto *crypto = image->crypto;
    if (!encrypt) {
        return 0;
    }
    if (!crypto || !crypto->luks || encrypt->format != CRYPTO_FORMAT_LUKS) {
        return error_set(err, -ENOTSUP, "qcow2 image of node '%s' is not encrypted with LUKS: it has no key slots",
                         image->node->name);
    }
    return luks_amend_with(&crypto->place.io, &crypto->header, &encrypt->u.luks, crypto->key_secret, amendment->force,
                           err);
}

/* --- creation --- */

int qcow2_crypto_new_bytes(const struct crypto_create_options *options, bool with_key, uint64_t *ret,
                           struct error **err)
{
    struct luks_options luks;
    const char *key_secret;
    *ret = 0;
    if (!options) {
        return 0;
    }
    bool is_luks = options->format == CRYPTO_FORMAT_LUKS;
    key_secret = is_luks ? options->u.luks.key_secret : options->u.qcow.key_secret;
    if (with_key) {
        int code = luks_key_check(key_secret, "encrypt.key-secret", err);
        if (code < 0) {
            return code;
        }
    }
    if (!is_luks) {
        return 0;
    }
    luks_options_from(&options->u.luks, &luks);
    return luks_new_bytes(&luks, ret, err);
}

int coroutine_fn qcow2_crypto_create(struct edge *file, uint64_t offset, const struct crypto_create_options *options,
                                     struct error **err)
{
    struct luks_options luks;
    struct luks_header header;
    struct luks_place place;
    uint64_t bytes;
    if (!options || options->format != CRYPTO_FORMAT_LUKS) {
        return 0;
    }
    luks_options_from(&options->u.luks, &luks);
    int code = luks_new_bytes(&luks, &bytes, err);
    if (code < 0) {
        return code;
    }
    luks_place_init(&place, file, offset, bytes);
    return luks_create_with(&place.io, &luks, options->u.luks.key_secret, "encrypt.key-secret", &header, err);
}

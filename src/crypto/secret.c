/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The list of secrets. Owns their memory.
 *
 * 1. An id stands once. What it names never changes; to change it, remove and add it.
 * 2. A secret that is encrypted with another one is decrypted when it is added; they are independent from then on.
 * 3. Memory is wiped before it is freed, also what was only on the way: text of base64, what a file held.
 *
 * Control thread only. It does not keep secrets from being swapped out, nor from a debugger.
 */
#include "crypto/secret.h"
#include "loop/file.h"
#include <errno.h>
#include <glib.h>
#include <nettle/aes.h>
#include <nettle/base64.h>
#include <nettle/cbc.h>
#include <nettle/nettle-meta.h>
#include <string.h>

enum { KEY_BYTES = 32, IV_BYTES = AES_BLOCK_SIZE };

struct bytes {
    uint8_t *data; /* a 0 behind it */
    size_t bytes;
};
struct secret {
    char *id;
    struct bytes content;
};
static GPtrArray *secrets; /* NULL: none yet */

void secret_free(uint8_t *secret, size_t bytes)
{
    if (secret) {
        explicit_bzero(secret, bytes);
        g_free(secret);
    }
}

static void bytes_clear(struct bytes *bytes)
{
    secret_free(bytes->data, bytes->bytes);
    *bytes = (struct bytes){0};
}

static struct bytes bytes_copy(const void *data, size_t bytes)
{
    struct bytes copy = {g_malloc(bytes + 1), bytes};
    memcpy(copy.data, data, bytes);
    copy.data[bytes] = 0;
    return copy;
}

static struct secret *find(const char *id)
{
    for (unsigned i = 0; secrets && i < secrets->len; i++) {
        struct secret *secret = secrets->pdata[i];
        if (!strcmp(secret->id, id)) {
            return secret;
        }
    }
    return NULL;
}

static void destroy(void *pointer)
{
    struct secret *secret = pointer;
    bytes_clear(&secret->content);
    g_free(secret->id);
    g_free(secret);
}

/* --- what is given --- */

static int decode_base64(const char *what, const struct bytes *from, struct bytes *ret, struct error **err)
{
    struct base64_decode_ctx context;
    struct bytes to = {g_malloc0(BASE64_DECODE_LENGTH(from->bytes) + 1), BASE64_DECODE_LENGTH(from->bytes)};
    size_t done = to.bytes;
    base64_decode_init(&context);
    bool good = base64_decode_update(&context, &done, to.data, from->bytes, (const char *)from->data) &&
                base64_decode_final(&context);
    explicit_bzero(&context, sizeof(context));
    if (!good) {
        bytes_clear(&to);
        return error_set(err, -EINVAL, "%s is not valid base64", what);
    }
    explicit_bzero(to.data + done, to.bytes - done);
    to.bytes = done;
    *ret = to;
    return 0;
}

static int coroutine_fn read_given(const struct secret_options *options, struct bytes *ret, struct error **err)
{
    if (!options->data == !options->file) {
        return error_set(err, -EINVAL, "Secret '%s' needs either 'data' or 'file'", options->id);
    }
    if (options->data) {
        *ret = bytes_copy(options->data, strlen(options->data));
        return 0;
    }
    char *content;
    size_t bytes;
    int code = file_slurp(options->file, SECRET_FILE_MAX, &content, &bytes);
    if (code < 0) {
        return error_set_errno(err, code, "Cannot read secret '%s' from '%s'", options->id, options->file);
    }
    *ret = (struct bytes){(uint8_t *)content, bytes};
    return 0;
}

/* --- encrypted ones --- */

/* How many bytes of padding (PKCS#7) end the data; 0: they are not padded. */
static unsigned padding_of(const struct bytes *bytes)
{
    unsigned padding = bytes->bytes ? bytes->data[bytes->bytes - 1] : 0;
    if (padding == 0 || padding > AES_BLOCK_SIZE || padding > bytes->bytes) {
        return 0;
    }
    for (unsigned i = 1; i <= padding; i++) {
        if (bytes->data[bytes->bytes - i] != padding) {
            return 0;
        }
    }
    return padding;
}

static int read_iv(const struct secret_options *options, uint8_t iv[IV_BYTES], struct error **err)
{
    struct bytes text, decoded;
    if (!options->iv) {
        return error_set(err, -EINVAL, "Secret '%s' is encrypted: 'iv' is required", options->id);
    }
    text = (struct bytes){(uint8_t *)options->iv, strlen(options->iv)};
    int code = decode_base64("'iv'", &text, &decoded, err);
    if (code < 0) {
        return code;
    }
    if (decoded.bytes == IV_BYTES) {
        memcpy(iv, decoded.data, IV_BYTES);
    } else {
        code = error_set(err, -EINVAL, "'iv' of secret '%s' must have %d bytes, not %zu", options->id, IV_BYTES,
                         decoded.bytes);
    }
    bytes_clear(&decoded);
    return code;
}

static int decrypt(const struct secret_options *options, struct bytes *content, struct error **err)
{
    const struct secret *key = find(options->keyid);
    uint8_t iv[IV_BYTES];
    struct aes256_ctx context;
    if (!key) {
        return error_set(err, -ENOENT, "There is no secret '%s', which secret '%s' is encrypted with", options->keyid,
                         options->id);
    }
    if (key->content.bytes != KEY_BYTES) {
        return error_set(err, -EINVAL, "Secret '%s' has %zu bytes; to encrypt others with it, it must have %d",
                         options->keyid, key->content.bytes, KEY_BYTES);
    }
    int code = read_iv(options, iv, err);
    if (code < 0) {
        return code;
    }
    if (content->bytes % AES_BLOCK_SIZE) {
        return error_set(err, -EINVAL, "Secret '%s' is encrypted, but no multiple of %d bytes long", options->id,
                         AES_BLOCK_SIZE);
    }
    aes256_set_decrypt_key(&context, key->content.data);
    cbc_decrypt(&context, nettle_aes256.decrypt, AES_BLOCK_SIZE, iv, content->bytes, content->data, content->data);
    explicit_bzero(&context, sizeof(context));
    unsigned padding = padding_of(content);
    if (!padding) {
        return error_set(err, -EINVAL, "Secret '%s' cannot be decrypted with '%s': is that the right key?", options->id,
                         options->keyid);
    }
    content->bytes -= padding;
    explicit_bzero(content->data + content->bytes, padding);
    return 0;
}

/* --- the list --- */

int coroutine_fn secret_add(const struct secret_options *options, struct error **err)
{
    struct bytes given, content;
    if (find(options->id)) {
        return error_set(err, -EEXIST, "There is a secret '%s' already", options->id);
    }
    if (options->iv && !options->keyid) {
        return error_set(err, -EINVAL, "'iv' of secret '%s' is of no use without 'keyid'", options->id);
    }
    int code = read_given(options, &given, err);
    if (code < 0) {
        return code;
    }
    if (options->base64) {
        code = decode_base64(options->data ? "The secret's data" : "The secret's file", &given, &content, err);
        bytes_clear(&given);
    } else {
        content = given;
    }
    if (code == 0 && options->keyid) {
        code = decrypt(options, &content, err);
        if (code < 0) {
            bytes_clear(&content);
        }
    }
    if (code < 0) {
        return code;
    }
    if (!secrets) {
        secrets = g_ptr_array_new_with_free_func(destroy);
    }
    struct secret *secret = g_new0(struct secret, 1);
    secret->id = g_strdup(options->id);
    secret->content = content;
    g_ptr_array_add(secrets, secret);
    return 0;
}

bool secret_exists(const char *id)
{
    return find(id) != NULL;
}

int secret_remove(const char *id, struct error **err)
{
    struct secret *secret = find(id);
    if (!secret) {
        return error_set(err, -ENOENT, "There is no secret '%s'", id);
    }
    g_ptr_array_remove(secrets, secret);
    return 0;
}

void secret_remove_all(void)
{
    if (secrets) {
        g_ptr_array_unref(secrets);
        secrets = NULL;
    }
}

int secret_get(const char *id, uint8_t **ret, size_t *ret_bytes, struct error **err)
{
    const struct secret *secret = find(id);
    if (!secret) {
        error_set(err, -ENOENT, "No secret with id '%s'", id);
        error_hint(err, "Add it before it is used: --object secret,id=%s,file=... or object-add", id);
        return -ENOENT;
    }
    struct bytes copy = bytes_copy(secret->content.data, secret->content.bytes);
    *ret = copy.data;
    *ret_bytes = copy.bytes;
    return 0;
}

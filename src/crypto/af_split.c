/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Splitting: all stripes but the last one are random; a running block takes in each of them by XOR and is diffused by
 * a hash, so that every bit of it depends on every bit that went in; the last stripe is what makes the block the key.
 * Merging goes the same way and ends with that.
 *
 * 1. The running block is as long as the key, whatever the hash's length: it is hashed piece by piece, each with its
 *    number (32 bits, big-endian) in front, and the last digest is cut.
 */
#include "crypto/af_split.h"
#include "crypto/cipher.h"
#include <endian.h>
#include <glib.h>
#include <string.h>

static void diffuse(enum hash_algorithm hash, uint8_t *block, size_t bytes)
{
    size_t step = hash_bytes(hash);
    uint8_t digest[HASH_BYTES_MAX];
    for (size_t at = 0, number = 0; at < bytes; at += step, number++) {
        uint32_t prefix = htobe32(number);
        size_t part = MIN(step, bytes - at);
        hash_digest(hash, &prefix, sizeof(prefix), block + at, part, digest);
        memcpy(block + at, digest, part);
    }
    explicit_bzero(digest, sizeof(digest));
}

/* The running block after all stripes but the last. */
static void run_over(enum hash_algorithm hash, const uint8_t *split, size_t bytes, uint32_t stripes, uint8_t *block)
{
    memset(block, 0, bytes);
    for (uint32_t stripe = 0; stripe + 1 < stripes; stripe++) {
        for (size_t i = 0; i < bytes; i++) {
            block[i] ^= split[stripe * bytes + i];
        }
        diffuse(hash, block, bytes);
    }
}

void af_split(enum hash_algorithm hash, const uint8_t *key, size_t bytes, uint32_t stripes, const uint8_t *random,
              uint8_t *out)
{
    uint8_t block[CIPHER_KEY_MAX];
    uint8_t *last = out + (size_t)(stripes - 1) * bytes;
    g_assert(bytes <= sizeof(block) && stripes > 0);
    memmove(out, random, (size_t)(stripes - 1) * bytes);
    run_over(hash, out, bytes, stripes, block);
    for (size_t i = 0; i < bytes; i++) {
        last[i] = block[i] ^ key[i];
    }
    explicit_bzero(block, sizeof(block));
}

void af_merge(enum hash_algorithm hash, const uint8_t *split, size_t bytes, uint32_t stripes, uint8_t *key)
{
    uint8_t block[CIPHER_KEY_MAX];
    const uint8_t *last = split + (size_t)(stripes - 1) * bytes;
    g_assert(bytes <= sizeof(block) && stripes > 0);
    run_over(hash, split, bytes, stripes, block);
    for (size_t i = 0; i < bytes; i++) {
        key[i] = block[i] ^ last[i];
    }
    explicit_bzero(block, sizeof(block));
}

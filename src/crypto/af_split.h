/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CRYPTO_AF_SPLIT_H
#define INTERLOCK_CRYPTO_AF_SPLIT_H

#include "crypto/hash.h"

/*
 * The anti-forensic splitter of LUKS1 (on-disk format specification, 2.4): a key becomes `stripes` times as long, and
 * whoever lacks any part of that cannot get it back; so erasing any part erases the key. Pure computing.
 */

/* `random` has (stripes - 1) * bytes; `out` has stripes * bytes and may be the same memory. */
void af_split(enum hash_algorithm hash, const uint8_t *key, size_t bytes, uint32_t stripes, const uint8_t *random,
              uint8_t *out);
void af_merge(enum hash_algorithm hash, const uint8_t *split, size_t bytes, uint32_t stripes, uint8_t *key);

#endif

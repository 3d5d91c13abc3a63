/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CRYPTO_CIPHER_PRIVATE_H
#define INTERLOCK_CRYPTO_CIPHER_PRIVATE_H

#include <stdbool.h>

struct sector_cipher;

/* Gigabytes in a second rather than a hundred megabytes. */
bool sector_cipher_is_fast(const struct sector_cipher *cipher);

#endif

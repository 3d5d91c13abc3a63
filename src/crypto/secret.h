/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CRYPTO_SECRET_H
#define INTERLOCK_CRYPTO_SECRET_H

#include "base/error.h"
#include "loop/coroutine.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Secrets: passwords and keys by id, as objects of type `secret` give them. One list for the process. Control thread.
 * Memory that held one is wiped before it is given back.
 */
enum { SECRET_FILE_MAX = 1 << 20 };

struct secret_options {
    const char *id;
    const char *data;  /* the secret itself; or */
    const char *file;  /* where it is read from, now */
    bool base64;       /* what is given is so encoded */
    const char *keyid; /* NULL; or another secret, 32 bytes, that it is encrypted with (AES-256-CBC, PKCS#7 padding), */
    const char *iv;    /* and its initialisation vector: 16 bytes in base64 */
};

/* -EEXIST, -EINVAL, or what reading the file gave. Nothing of the secret stands in the message. */
int coroutine_fn secret_add(const struct secret_options *options, struct error **err);
bool secret_exists(const char *id);
/* -ENOENT. Whoever has looked it up before keeps what it got. */
int secret_remove(const char *id, struct error **err);
/* A copy, with a 0 behind it that does not count: secret_free(). -ENOENT says how to give one. */
int secret_get(const char *id, uint8_t **ret, size_t *ret_bytes, struct error **err);
void secret_free(uint8_t *secret, size_t bytes); /* wipes; accepts NULL */
void secret_remove_all(void);

#endif

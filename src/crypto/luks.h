/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CRYPTO_LUKS_H
#define INTERLOCK_CRYPTO_LUKS_H

#include "base/error.h"
#include "crypto/cipher.h"
#include "loop/coroutine.h"

/*
 * LUKS1 headers: parsing, unlocking, making, and their key slots. Where a header lies is the caller's affair: it is
 * read and written through functions of the caller, with offsets from its beginning. A header is a plain struct; who
 * has one changes it from one coroutine at a time.
 */
enum {
    LUKS_SLOTS = 8,
    LUKS_HEADER_BYTES = 592,
    LUKS_ITERATIONS_MIN = 1000,
    LUKS_ITERATIONS_MAX = 1 << 30, /* of what a header may ask for: minutes of computing */
    LUKS_MATERIAL_MAX = 1 << 20,   /* bytes of one slot's key material, likewise */
    LUKS_ITER_TIME_MS = 2000,
};

struct luks_io {
    int coroutine_fn (*read)(void *argument, uint64_t offset, void *to, size_t bytes);
    int coroutine_fn (*write)(void *argument, uint64_t offset, const void *from, size_t bytes);
    int coroutine_fn (*flush)(void *argument);
    void *argument;
    uint64_t size; /* bytes that there are: nothing behind is read */
};

struct luks_slot {
    bool active;
    uint32_t iterations;
    uint32_t stripes;
    uint64_t key_offset; /* bytes, from the header */
    uint8_t salt[32];
};
struct luks_header {
    struct cipher_config cipher;
    enum hash_algorithm hash;
    size_t key_bytes;
    uint64_t payload_offset; /* bytes, from the header */
    uint8_t digest[20];
    uint8_t digest_salt[32];
    uint32_t digest_iterations;
    char uuid[41];
    struct luks_slot slots[LUKS_SLOTS];
};

/* What a new header is to be; zeroed: not what luks_options_default() makes. */
struct luks_options {
    struct cipher_config cipher;
    enum hash_algorithm hash;
    uint64_t iter_time_ms;
    bool detached;       /* the payload lies elsewhere, from its beginning on */
    uint32_t iterations; /* 0: as many as iter_time_ms allows on this machine */
};
void luks_options_default(struct luks_options *options); /* aes-256, xts-plain64, sha256, 2 seconds */

/* `data` has LUKS_HEADER_BYTES. Checks every field; the size of what follows is checked when it is read. */
int luks_parse(const uint8_t *data, struct luks_header *ret, struct error **err);
void luks_build(const struct luks_header *header, uint8_t *data);
int coroutine_fn luks_read(const struct luks_io *io, struct luks_header *ret, struct error **err);

/* Bytes that a new header takes with its key material: where the payload begins. */
int luks_new_bytes(const struct luks_options *options, uint64_t *ret, struct error **err);
/* Writes a new header with a random key in slot 0, flushed; the place for key material is written whole. */
int coroutine_fn luks_create(const struct luks_io *io, const struct luks_options *options, const uint8_t *passphrase,
                             size_t passphrase_bytes, struct luks_header *ret, struct error **err);

/* Finds a slot that the passphrase opens, from slot `from` on; `key` has CIPHER_KEY_MAX bytes. Returns its number,
 * -EACCES when there is none, or another error. Computes on the worker pool, for seconds. */
int coroutine_fn luks_unlock(const struct luks_io *io, const struct luks_header *header, unsigned from,
                             const uint8_t *passphrase, size_t passphrase_bytes, uint8_t *key, struct error **err);
/* Puts the key into the slot under a passphrase. Flushed. A power cut leaves the slot as it was or as it is to be if it
 * was inactive; an active one is written over: see luks_amend(). */
int coroutine_fn luks_slot_set(const struct luks_io *io, struct luks_header *header, unsigned slot, const uint8_t *key,
                               const uint8_t *passphrase, size_t passphrase_bytes, const struct luks_options *options,
                               struct error **err);
/* Writes over the slot's key material, then marks it inactive. Flushed. */
int coroutine_fn luks_slot_erase(const struct luks_io *io, struct luks_header *header, unsigned slot,
                                 struct error **err);
unsigned luks_active_count(const struct luks_header *header);

/*
 * A change of key slots, as amend makes it. At each moment, power cuts included, the image can be unlocked with a
 * secret that opened it before or with the new one, but for the erasing of the last active slot, which needs `force`.
 */
struct luks_secret {
    const uint8_t *data; /* NULL: not given */
    size_t bytes;
};
struct luks_amendment {
    bool activate;
    int slot;                      /* or -1: not given */
    struct luks_secret current;    /* activate: opens the image */
    struct luks_secret new_secret; /* activate */
    struct luks_secret old_secret; /* deactivate: the slots that it opens */
    uint64_t iter_time_ms;         /* activate */
    uint32_t iterations;           /* or this, if not 0 */
    bool force;
};
int coroutine_fn luks_amend(const struct luks_io *io, struct luks_header *header, const struct luks_amendment *change,
                            struct error **err);

#endif

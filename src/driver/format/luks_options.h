/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_LUKS_OPTIONS_H
#define INTERLOCK_DRIVER_FORMAT_LUKS_OPTIONS_H

#include "crypto/luks.h"
#include "schema/types.h"

/* Between the control language and LUKS headers (crypto/luks.h), for whatever format has one in it. Control thread. */
struct edge;

/* A header at `offset` of what the edge leads to; lives as long as `io` is used. */
struct luks_place {
    struct luks_io io;
    struct edge *edge;
    uint64_t offset;
};
void luks_place_init(struct luks_place *place, struct edge *edge, uint64_t offset, uint64_t size);

void luks_options_from(const struct crypto_create_options_luks *from, struct luks_options *ret);
struct crypto_luks_info *luks_describe(const struct luks_header *header, bool detached);

/* Makes a header with the passphrase that the secret `key_secret` is. `option` is what to give it by, for messages. */
int coroutine_fn luks_create_with(const struct luks_io *io, const struct luks_options *options, const char *key_secret,
                                  const char *option, struct luks_header *ret, struct error **err);
/* Opens the header with it: the cipher of the data. */
int coroutine_fn luks_unlock_with(const struct luks_io *io, const struct luks_header *header, const char *key_secret,
                                  struct sector_cipher **ret, struct error **err);
/* `opened_with`: the id of the secret that the image was opened with, or NULL. */
int coroutine_fn luks_amend_with(const struct luks_io *io, struct luks_header *header,
                                 const struct crypto_amend_options_luks *options, const char *opened_with, bool force,
                                 struct error **err);
/* -EINVAL: the option is missing. */
int luks_key_missing(const char *option, struct error **err);
/* The same if `key_secret` is NULL; -ENOENT if there is no such secret. To be asked before anything is written. */
int luks_key_check(const char *key_secret, const char *option, struct error **err);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CRYPTO_LUKS_PRIVATE_H
#define INTERLOCK_CRYPTO_LUKS_PRIVATE_H

#include "base/size.h"
#include "crypto/luks.h"
#include "crypto/luks_format.h"

/* Bytes of a slot's key material, in whole sectors. */
static inline size_t luks_material_bytes(size_t key_bytes, uint32_t stripes)
{
    return align_up((uint64_t)key_bytes * stripes, LUKS_SECTOR);
}
/* Whether the slot's key material lies where it can be: bounded, behind the header, before the payload, not in another
 * slot's. Of an inactive slot too, before it is used. */
int luks_slot_check(const struct luks_header *header, unsigned slot, struct error **err);
/* The same by one slot alone. */
int coroutine_fn luks_unlock_slot(const struct luks_io *io, const struct luks_header *header, unsigned slot,
                                  const uint8_t *passphrase, size_t passphrase_bytes, uint8_t *key, bool *ret_opened,
                                  struct error **err);

#endif

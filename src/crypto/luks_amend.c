/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What amend may do with the key slots of a LUKS1 header: the rules (what is refused, what `force` allows), and the
 * order of steps for more than one slot. luks_slots.c has the steps.
 *
 * 1. Nothing is written before everything that can be refused has been decided.
 * 2. An active slot that is overwritten (force) is for that time doubled in a free one, if there is one: a power cut
 *    between leaves the new passphrase in two slots, never in none.
 */
#include "crypto/luks.h"
#include "crypto/luks_private.h"
#include <errno.h>
#include <string.h>

static int check_slot_number(int slot, struct error **err)
{
    if (slot >= LUKS_SLOTS) {
        return error_set(err, -EINVAL, "Invalid keyslot %d specified, must be between 0 and %d", slot, LUKS_SLOTS - 1);
    }
    return 0;
}

static int find_free(const struct luks_header *header)
{
    for (unsigned i = 0; i < LUKS_SLOTS; i++) {
        if (!header->slots[i].active) {
            return i;
        }
    }
    return -1;
}

/* --- activate --- */

static int check_activate(const struct luks_header *header, const struct luks_amendment *change, int *ret_slot,
                          struct error **err)
{
    if (!change->new_secret.data) {
        return error_set(err, -EINVAL, "'new-secret' is required to activate a keyslot");
    }
    if (change->old_secret.data) {
        return error_set(err, -EINVAL, "'old-secret' must not be given when activating keyslots");
    }
    *ret_slot = change->slot >= 0 ? change->slot : find_free(header);
    if (*ret_slot < 0) {
        return error_set(err, -ENOSPC, "Can't add a keyslot - all keyslots are in use");
    }
    if (header->slots[*ret_slot].active && !change->force) {
        return error_set(err, -EEXIST, "Refusing to overwrite active keyslot %d - please erase it first", *ret_slot);
    }
    return 0;
}

static int coroutine_fn activate(const struct luks_io *io, struct luks_header *header,
                                 const struct luks_amendment *change, struct error **err)
{
    uint8_t key[CIPHER_KEY_MAX];
    const struct luks_secret *new = &change->new_secret;
    struct luks_options options = {
        .iter_time_ms = change->iter_time_ms ? change->iter_time_ms : LUKS_ITER_TIME_MS,
        .iterations = change->iterations,
    };
    int slot;
    int code = check_activate(header, change, &slot, err);
    if (code == 0) {
        code = luks_unlock(io, header, 0, change->current.data, change->current.bytes, key, err);
    }
    if (code < 0) {
        return code;
    }
    int spare = header->slots[slot].active ? find_free(header) : -1;
    code = 0;
    if (spare >= 0) {
        code = luks_slot_set(io, header, spare, key, new->data, new->bytes, &options, err);
    }
    if (code == 0) {
        code = luks_slot_set(io, header, slot, key, new->data, new->bytes, &options, err);
    }
    if (code == 0 && spare >= 0) {
        code = luks_slot_erase(io, header, spare, err);
    }
    explicit_bzero(key, sizeof(key));
    return code;
}

/* --- deactivate --- */

/* Which slots the old passphrase opens, among all, or the one that is given: a mask. */
static int coroutine_fn find_matching(const struct luks_io *io, const struct luks_header *header,
                                      const struct luks_amendment *change, unsigned *ret_mask, struct error **err)
{
    uint8_t key[CIPHER_KEY_MAX];
    *ret_mask = 0;
    for (int slot = 0; slot < LUKS_SLOTS; slot++) {
        bool opened = false;
        if (!header->slots[slot].active || (change->slot >= 0 && slot != change->slot)) {
            continue;
        }
        int code =
            luks_unlock_slot(io, header, slot, change->old_secret.data, change->old_secret.bytes, key, &opened, err);
        if (code < 0) {
            return code;
        }
        *ret_mask |= opened ? 1u << slot : 0;
    }
    explicit_bzero(key, sizeof(key));
    if (*ret_mask == 0) {
        return change->slot >= 0
                   ? error_set(err, -EINVAL, "Given keyslot %d doesn't contain the given (old) password", change->slot)
                   : error_set(err, -EINVAL, "No keyslots match given (old) password for erase operation");
    }
    return 0;
}

static int coroutine_fn deactivate(const struct luks_io *io, struct luks_header *header,
                                   const struct luks_amendment *change, struct error **err)
{
    unsigned mask = change->slot >= 0 ? 1u << change->slot : 0;
    int code = 0;
    if (change->new_secret.data) {
        return error_set(err, -EINVAL, "'new-secret' must not be given when erasing keyslots");
    }
    if (change->iter_time_ms) {
        return error_set(err, -EINVAL, "'iter-time' must not be given when erasing keyslots");
    }
    if (change->slot < 0 && !change->old_secret.data) {
        return error_set(err, -EINVAL,
                         "To erase keyslot(s), either explicit keyslot index or the password currently contained in "
                         "them must be given");
    }
    if (change->slot >= 0 && !header->slots[change->slot].active) {
        if (change->force) {
            return luks_slot_erase(io, header, change->slot, err);
        }
        return error_set(err, -EINVAL, "Given keyslot %d is already erased (inactive)", change->slot);
    }
    if (change->old_secret.data) {
        code = find_matching(io, header, change, &mask, err);
    }
    if (code == 0 && (unsigned)__builtin_popcount(mask) == luks_active_count(header) && !change->force) {
        code = error_set(err, -EPERM,
                         "This would erase the last active keyslots, and with them, irreversibly, all data of the "
                         "image");
        error_hint(err, "Activate another keyslot first, or give --force if that is what you want");
    }
    for (int slot = 0; code == 0 && slot < LUKS_SLOTS; slot++) {
        if (mask >> slot & 1) {
            code = luks_slot_erase(io, header, slot, err);
        }
    }
    return code;
}

int coroutine_fn luks_amend(const struct luks_io *io, struct luks_header *header, const struct luks_amendment *change,
                            struct error **err)
{
    int code = check_slot_number(change->slot, err);
    if (code < 0) {
        return code;
    }
    return change->activate ? activate(io, header, change, err) : deactivate(io, header, change, err);
}

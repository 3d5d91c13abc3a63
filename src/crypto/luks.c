/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The LUKS1 header, and unlocking. A header comes from an image, so nothing in it is trusted.
 *
 * 1. What luks_parse() accepts has a cipher, mode and hash that are known here, with a key length that fits them, and
 *    iteration counts within limits: what is computed for a hostile header is bounded, and so is memory.
 * 2. Key material is read only from slots that passed luks_slot_check().
 * 3. Whatever a passphrase or key went through is wiped.
 *
 * The hard computing (PBKDF2, merging 4,000 stripes) runs on the worker pool. luks_slots.c makes headers and changes
 * their slots.
 */
#include "crypto/luks.h"
#include "crypto/af_split.h"
#include "crypto/luks_private.h"
#include "loop/worker.h"
#include <endian.h>
#include <errno.h>
#include <glib.h>
#include <string.h>

G_STATIC_ASSERT((size_t)LUKS_HEADER_BYTES == sizeof(struct luks_disk_header));
G_STATIC_ASSERT((int)LUKS_SLOTS == (int)LUKS_DISK_SLOTS);

/* --- between disk and memory --- */

/* A field of text: ended by a 0, printable. */
static int read_text(const char *what, const char *from, size_t size, char **ret, struct error **err)
{
    size_t length = strnlen(from, size);
    if (length == size) {
        return error_set(err, -EINVAL, "LUKS header: the %s has no end", what);
    }
    for (size_t i = 0; i < length; i++) {
        if (!g_ascii_isprint(from[i])) {
            return error_set(err, -EINVAL, "LUKS header: the %s is not text", what);
        }
    }
    *ret = g_strndup(from, length);
    return 0;
}

static int parse_names(const struct luks_disk_header *disk, struct luks_header *header, struct error **err)
{
    g_autofree char *name = NULL, *mode = NULL, *hash = NULL, *uuid = NULL;
    int code = read_text("cipher's name", disk->cipher_name, sizeof(disk->cipher_name), &name, err);
    if (code == 0) {
        code = read_text("cipher's mode", disk->cipher_mode, sizeof(disk->cipher_mode), &mode, err);
    }
    if (code == 0) {
        code = read_text("hash's name", disk->hash_name, sizeof(disk->hash_name), &hash, err);
    }
    if (code == 0) {
        code = read_text("UUID", disk->uuid, sizeof(disk->uuid), &uuid, err);
    }
    if (code < 0) {
        return code;
    }
    g_strlcpy(header->uuid, uuid, sizeof(header->uuid));
    if (!hash_parse(hash, &header->hash)) {
        return error_set(err, -ENOTSUP, "LUKS hash '%s' is not supported", hash);
    }
    header->key_bytes = be32toh(disk->key_bytes);
    return cipher_from_luks(name, mode, header->key_bytes, &header->cipher, err);
}

static int parse_slot(const struct luks_disk_slot *disk, unsigned number, struct luks_header *header,
                      struct error **err)
{
    struct luks_slot *slot = &header->slots[number];
    uint32_t active = be32toh(disk->active);
    if (active != LUKS_SLOT_ENABLED && active != LUKS_SLOT_DISABLED) {
        return error_set(err, -EINVAL, "LUKS key slot %u is corrupt: its state is 0x%08x", number, active);
    }
    slot->active = active == LUKS_SLOT_ENABLED;
    slot->iterations = be32toh(disk->iterations);
    slot->stripes = be32toh(disk->stripes);
    slot->key_offset = (uint64_t)be32toh(disk->key_sector) * LUKS_SECTOR;
    memcpy(slot->salt, disk->salt, sizeof(slot->salt));
    if (slot->active && (slot->iterations == 0 || slot->iterations > LUKS_ITERATIONS_MAX)) {
        return error_set(err, -EINVAL, "LUKS key slot %u wants %u iterations; from 1 to %u are accepted", number,
                         slot->iterations, LUKS_ITERATIONS_MAX);
    }
    return slot->active ? luks_slot_check(header, number, err) : 0;
}

int luks_slot_check(const struct luks_header *header, unsigned number, struct error **err)
{
    const struct luks_slot *slot = &header->slots[number];
    if (slot->stripes == 0 || slot->stripes > LUKS_MATERIAL_MAX / header->key_bytes) {
        return error_set(err, -EINVAL, "LUKS key slot %u is corrupt: it has %u stripes", number, slot->stripes);
    }
    uint64_t end = slot->key_offset + luks_material_bytes(header->key_bytes, slot->stripes);
    if (slot->key_offset < align_up(LUKS_HEADER_BYTES, LUKS_SECTOR)) {
        return error_set(err, -EINVAL, "LUKS key slot %u is corrupt: its key material lies in the header", number);
    }
    if (header->payload_offset && end > header->payload_offset) { /* 0: the payload lies elsewhere */
        return error_set(err, -EINVAL, "LUKS key slot %u is corrupt: its key material lies in the payload", number);
    }
    for (unsigned i = 0; i < LUKS_SLOTS; i++) {
        const struct luks_slot *other = &header->slots[i];
        if (i == number || !other->active || other->stripes > LUKS_MATERIAL_MAX / header->key_bytes) {
            continue;
        }
        uint64_t other_end = other->key_offset + luks_material_bytes(header->key_bytes, other->stripes);
        if (slot->key_offset < other_end && other->key_offset < end) {
            return error_set(err, -EINVAL, "LUKS key slots %u and %u are corrupt: their key material overlaps", number,
                             i);
        }
    }
    return 0;
}

int luks_parse(const uint8_t *data, struct luks_header *ret, struct error **err)
{
    struct luks_disk_header disk;
    struct luks_header header = {0};
    memcpy(&disk, data, sizeof(disk));
    if (memcmp(disk.magic, LUKS_MAGIC, sizeof(disk.magic))) {
        return error_set(err, -EINVAL, "There is no LUKS header");
    }
    if (be16toh(disk.version) != 1) {
        return error_set(err, -ENOTSUP, "LUKS version %u is not supported, only version 1", be16toh(disk.version));
    }
    int code = parse_names(&disk, &header, err);
    if (code < 0) {
        return code;
    }
    header.payload_offset = (uint64_t)be32toh(disk.payload_sector) * LUKS_SECTOR;
    header.digest_iterations = be32toh(disk.digest_iterations);
    memcpy(header.digest, disk.digest, sizeof(header.digest));
    memcpy(header.digest_salt, disk.digest_salt, sizeof(header.digest_salt));
    if (header.digest_iterations == 0 || header.digest_iterations > LUKS_ITERATIONS_MAX) {
        return error_set(err, -EINVAL, "LUKS header: the digest wants %u iterations; from 1 to %u are accepted",
                         header.digest_iterations, LUKS_ITERATIONS_MAX);
    }
    if (header.payload_offset && header.payload_offset < LUKS_HEADER_BYTES) {
        return error_set(err, -EINVAL, "LUKS header: the payload lies in the header");
    }
    for (unsigned i = 0; code == 0 && i < LUKS_SLOTS; i++) {
        code = parse_slot(&disk.slots[i], i, &header, err);
    }
    if (code == 0) {
        *ret = header;
    }
    return code;
}

void luks_build(const struct luks_header *header, uint8_t *data)
{
    struct luks_disk_header disk = {.version = htobe16(1)};
    g_autofree char *mode = cipher_luks_mode(&header->cipher);
    memcpy(disk.magic, LUKS_MAGIC, sizeof(disk.magic));
    g_strlcpy(disk.cipher_name, cipher_luks_name(header->cipher.algorithm), sizeof(disk.cipher_name));
    g_strlcpy(disk.cipher_mode, mode, sizeof(disk.cipher_mode));
    g_strlcpy(disk.hash_name, hash_name(header->hash), sizeof(disk.hash_name));
    disk.payload_sector = htobe32(header->payload_offset / LUKS_SECTOR);
    disk.key_bytes = htobe32(header->key_bytes);
    memcpy(disk.digest, header->digest, sizeof(disk.digest));
    memcpy(disk.digest_salt, header->digest_salt, sizeof(disk.digest_salt));
    disk.digest_iterations = htobe32(header->digest_iterations);
    g_strlcpy(disk.uuid, header->uuid, sizeof(disk.uuid));
    for (unsigned i = 0; i < LUKS_SLOTS; i++) {
        const struct luks_slot *slot = &header->slots[i];
        disk.slots[i].active = htobe32(slot->active ? LUKS_SLOT_ENABLED : LUKS_SLOT_DISABLED);
        disk.slots[i].iterations = htobe32(slot->iterations);
        disk.slots[i].key_sector = htobe32(slot->key_offset / LUKS_SECTOR);
        disk.slots[i].stripes = htobe32(slot->stripes);
        memcpy(disk.slots[i].salt, slot->salt, sizeof(slot->salt));
    }
    memcpy(data, &disk, sizeof(disk));
}

int coroutine_fn luks_read(const struct luks_io *io, struct luks_header *ret, struct error **err)
{
    uint8_t data[LUKS_HEADER_BYTES];
    if (io->size < sizeof(data)) {
        return error_set(err, -EINVAL, "There is no LUKS header: only %" G_GUINT64_FORMAT " bytes", io->size);
    }
    int code = io->read(io->argument, 0, data, sizeof(data));
    if (code < 0) {
        return error_set_errno(err, code, "Cannot read the LUKS header");
    }
    return luks_parse(data, ret, err);
}

unsigned luks_active_count(const struct luks_header *header)
{
    unsigned count = 0;
    for (unsigned i = 0; i < LUKS_SLOTS; i++) {
        count += header->slots[i].active;
    }
    return count;
}

/* --- unlocking --- */

struct unlock_job {
    const struct luks_header *header;
    const struct luks_slot *slot;
    const uint8_t *passphrase;
    size_t passphrase_bytes;
    uint8_t *material;
    uint8_t *key;
};

/* On the worker pool; 1: the key is right, 0: it is not. */
static int unlock_work(void *argument)
{
    const struct unlock_job *job = argument;
    const struct luks_header *header = job->header;
    uint8_t slot_key[CIPHER_KEY_MAX], digest[LUKS_DIGEST_BYTES];
    struct sector_cipher *cipher;
    unsigned difference = 0;
    hash_pbkdf2(header->hash, job->passphrase, job->passphrase_bytes, job->slot->salt, sizeof(job->slot->salt),
                job->slot->iterations, slot_key, header->key_bytes);
    int code = sector_cipher_create(&header->cipher, slot_key, &cipher, NULL);
    explicit_bzero(slot_key, sizeof(slot_key));
    if (code < 0) {
        return code;
    }
    sector_cipher_decrypt(cipher, 0, job->material, luks_material_bytes(header->key_bytes, job->slot->stripes));
    sector_cipher_destroy(cipher);
    af_merge(header->hash, job->material, header->key_bytes, job->slot->stripes, job->key);
    hash_pbkdf2(header->hash, job->key, header->key_bytes, header->digest_salt, sizeof(header->digest_salt),
                header->digest_iterations, digest, sizeof(digest));
    for (unsigned i = 0; i < sizeof(digest); i++) { /* takes the same time whatever differs */
        difference |= digest[i] ^ header->digest[i];
    }
    explicit_bzero(digest, sizeof(digest));
    return difference == 0;
}

int coroutine_fn luks_unlock_slot(const struct luks_io *io, const struct luks_header *header, unsigned slot,
                                  const uint8_t *passphrase, size_t passphrase_bytes, uint8_t *key, bool *ret_opened,
                                  struct error **err)
{
    const struct luks_slot *of = &header->slots[slot];
    size_t bytes = luks_material_bytes(header->key_bytes, of->stripes);
    if (of->key_offset > io->size || bytes > io->size - of->key_offset) {
        return error_set(err, -EINVAL, "LUKS key slot %u is corrupt: its key material lies behind the end", slot);
    }
    g_autofree uint8_t *material = g_try_malloc(bytes);
    int code = material ? io->read(io->argument, of->key_offset, material, bytes) : -ENOMEM;
    if (code < 0) {
        return error_set_errno(err, code, "Cannot read LUKS key slot %u", slot);
    }
    struct unlock_job job = {header, of, passphrase, passphrase_bytes, material, key};
    code = worker_run(unlock_work, &job);
    explicit_bzero(material, bytes);
    if (code != 1) {
        explicit_bzero(key, CIPHER_KEY_MAX);
    }
    if (code < 0) {
        return error_set_errno(err, code, "Cannot unlock LUKS key slot %u", slot);
    }
    *ret_opened = code == 1;
    return 0;
}

int coroutine_fn luks_unlock(const struct luks_io *io, const struct luks_header *header, unsigned from,
                             const uint8_t *passphrase, size_t passphrase_bytes, uint8_t *key, struct error **err)
{
    for (unsigned slot = from; slot < LUKS_SLOTS; slot++) {
        bool opened;
        if (!header->slots[slot].active) {
            continue;
        }
        int code = luks_unlock_slot(io, header, slot, passphrase, passphrase_bytes, key, &opened, err);
        if (code < 0) {
            return code;
        }
        if (opened) {
            return slot;
        }
    }
    return error_set(err, -EACCES, "Invalid password, cannot unlock any keyslot");
}

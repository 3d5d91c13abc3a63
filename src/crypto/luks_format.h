/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CRYPTO_LUKS_FORMAT_H
#define INTERLOCK_CRYPTO_LUKS_FORMAT_H

#include <stdint.h>

/* LUKS1 On-Disk Format Specification 1.2.3, 4: all numbers big-endian, sectors of 512 bytes. */
#define LUKS_MAGIC "LUKS\xba\xbe"
enum {
    LUKS_SECTOR = 512,
    LUKS_DIGEST_BYTES = 20,
    LUKS_SALT_BYTES = 32,
    LUKS_DISK_SLOTS = 8,
    LUKS_SLOT_DISABLED = 0x0000dead,
    LUKS_SLOT_ENABLED = 0x00ac71f3,
    LUKS_STRIPES = 4000,
    LUKS_ALIGN = 4096, /* of key material, by custom */
};

struct luks_disk_slot {
    uint32_t active;
    uint32_t iterations;
    uint8_t salt[LUKS_SALT_BYTES];
    uint32_t key_sector; /* relative to the header */
    uint32_t stripes;
} __attribute__((packed));

struct luks_disk_header {
    char magic[6];
    uint16_t version;
    char cipher_name[32];
    char cipher_mode[32];
    char hash_name[32];
    uint32_t payload_sector;
    uint32_t key_bytes;
    uint8_t digest[LUKS_DIGEST_BYTES];
    uint8_t digest_salt[LUKS_SALT_BYTES];
    uint32_t digest_iterations;
    char uuid[40];
    struct luks_disk_slot slots[LUKS_DISK_SLOTS];
} __attribute__((packed));

_Static_assert(sizeof(struct luks_disk_slot) == 48, "LUKS1 key slot");
_Static_assert(sizeof(struct luks_disk_header) == 592, "LUKS1 header");

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FILTER_LOG_WRITES_FORMAT_H
#define INTERLOCK_DRIVER_FILTER_LOG_WRITES_FORMAT_H

#include <stdint.h>

/*
 * The log of the kernel's dm-log-writes (Documentation/admin-guide/device-mapper/log-writes.rst), version 1; all
 * integers little-endian. Sector 0 has the superblock. Behind it stand the entries, each with a sector of its own and
 * then its data, which are whole sectors too; a discard has none.
 */
#define LOG_WRITES_MAGIC UINT64_C(0x6a736677736872)
#define LOG_WRITES_VERSION 1

enum {
    LOG_WRITES_FLUSH = 1 << 0,
    LOG_WRITES_FUA = 1 << 1,
    LOG_WRITES_DISCARD = 1 << 2,
    LOG_WRITES_MARK = 1 << 3, /* a note of somebody's, behind the entry in its sector */
};

struct log_writes_super {
    uint64_t magic;
    uint64_t version;
    uint64_t entries;
    uint32_t sector_size; /* bytes */
} __attribute__((packed));
_Static_assert(sizeof(struct log_writes_super) == 28, "as on disk");

struct log_writes_entry {
    uint64_t sector;
    uint64_t sectors;
    uint64_t flags;
    uint64_t data_length; /* of a mark's note, bytes */
} __attribute__((packed));
_Static_assert(sizeof(struct log_writes_entry) == 32, "as on disk");

#endif

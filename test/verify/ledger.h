/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_VERIFY_LEDGER_H
#define INTERLOCK_TEST_VERIFY_LEDGER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * What a region of a disk must contain, block by block, as the one client that writes it knows. The ledger is a
 * mapped file: it outlives a killed client and a killed daemon.
 *
 * The content of a block is a version. 0: what the original file has there (zeroes without one). Odd: data that
 * name region seed, block and version, different in every sector. Even: zeroes. Versions of a block only grow.
 */
struct ledger_block {
    uint32_t issued;  /* the version last sent to the daemon */
    uint32_t current; /* the version last acknowledged; less than `issued` while a request is under way */
    uint32_t flushed; /* the version that a completed flush or FUA write promised to keep */
    uint32_t trimmed; /* 0, or the version written after a trim: zeroes may show until that one is flushed */
};

struct ledger_header {
    uint64_t magic;
    uint64_t seed;
    uint64_t offset; /* of the region in the export */
    uint64_t block_size;
    uint64_t block_count;
    uint64_t reads, writes, zeroes, trims, flushes; /* completed requests, for whoever watches the file */
};

struct ledger {
    struct ledger_header *header;
    struct ledger_block *blocks;
    const uint8_t *original; /* NULL: zeroes */
    size_t original_size;
    size_t map_size;
};

enum ledger_check {
    LEDGER_EXACT, /* every block has its current version; those under way have any from current to issued */
    LEDGER_CRASH, /* every sector has some version from flushed to issued */
};

/* Makes the file; exits with a message on failure, as all of this tool does. */
void ledger_create(struct ledger *ledger, const char *path, uint64_t seed, uint64_t offset, uint64_t length,
                   uint64_t block_size);
void ledger_open(struct ledger *ledger, const char *path);
/* The content of version 0: a raw image of the whole export. */
void ledger_set_original(struct ledger *ledger, const char *path);

static inline uint64_t ledger_length(const struct ledger *ledger)
{
    return ledger->header->block_count * ledger->header->block_size;
}
/* The version after `issued` of a block, for data or zeroes. */
uint32_t ledger_next_version(const struct ledger_block *block, bool zeroes);
/* Fills `buffer` with the content of a data version. */
void ledger_fill(const struct ledger *ledger, uint64_t block, uint32_t version, uint8_t *buffer);
/* Whether `data`, read from block `block` of the region, is what the ledger says; says on stderr what it is if not. */
bool ledger_matches(const struct ledger *ledger, uint64_t block, const uint8_t *data, enum ledger_check check);
/* Whether it is exactly the issued version, without a word. */
bool ledger_is_issued(const struct ledger *ledger, uint64_t block, const uint8_t *data);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The verifying client's ledger: what each block of its region must contain.
 *
 * 1. flushed <= current <= issued for every block; all three only grow.
 * 2. The content of a data version is a pure function of seed, block, version and position, so that any stray,
 *    torn or old content is recognised, and named, wherever it turns up.
 * 3. Content is compared sector by sector: a kill may tear a block that was being written, not a sector.
 *
 * Does not talk to anybody: connection.c does, and main.c decides what is written.
 */
#include "ledger.h"

#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define LEDGER_MAGIC 0x31524547444c4c49ULL
#define SECTOR 512

static uint64_t mix(uint64_t value)
{
    value += 0x9e3779b97f4a7c15ULL;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ULL;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebULL;
    return value ^ (value >> 31);
}

static void ledger_map(struct ledger *ledger, const char *path, int fd, size_t size)
{
    void *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        err(4, "%s", path);
    }
    close(fd);
    *ledger = (struct ledger){
        .header = map, .blocks = (void *)((char *)map + sizeof(struct ledger_header)), .map_size = size};
}

void ledger_create(struct ledger *ledger, const char *path, uint64_t seed, uint64_t offset, uint64_t length,
                   uint64_t block_size)
{
    if (block_size < SECTOR || block_size % SECTOR || length < block_size || offset % SECTOR) {
        errx(4, "a region wants a block size in sectors and at least one block");
    }
    uint64_t count = length / block_size;
    size_t size = sizeof(struct ledger_header) + count * sizeof(struct ledger_block);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, size) < 0) {
        err(4, "%s", path);
    }
    ledger_map(ledger, path, fd, size);
    *ledger->header = (struct ledger_header){
        .magic = LEDGER_MAGIC, .seed = seed, .offset = offset, .block_size = block_size, .block_count = count};
}

void ledger_open(struct ledger *ledger, const char *path)
{
    struct stat status;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status) < 0) {
        err(4, "%s", path);
    }
    if ((size_t)status.st_size < sizeof(struct ledger_header)) {
        errx(4, "%s: not a ledger", path);
    }
    ledger_map(ledger, path, fd, status.st_size);
    if (ledger->header->magic != LEDGER_MAGIC) {
        errx(4, "%s: not a ledger", path);
    }
}

void ledger_set_original(struct ledger *ledger, const char *path)
{
    struct stat status;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status) < 0) {
        err(4, "%s", path);
    }
    void *map = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) {
        err(4, "%s", path);
    }
    close(fd);
    ledger->original = map;
    ledger->original_size = status.st_size;
}

uint32_t ledger_next_version(const struct ledger_block *block, bool zeroes)
{
    uint32_t next = block->issued + 1;
    return (next % 2 == 0) == zeroes ? next : next + 1;
}

/* The first word of a sector names its version; the others depend on it and on their position. */
static void fill_sector(const struct ledger *ledger, uint64_t block, unsigned sector, uint32_t version, uint8_t *data)
{
    uint64_t words[SECTOR / sizeof(uint64_t)];
    uint64_t key = mix(ledger->header->seed ^ mix(block * 4096 + sector));
    words[0] = key ^ version;
    uint64_t state = mix(words[0]);
    for (unsigned i = 1; i < SECTOR / sizeof(uint64_t); i++) {
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        words[i] = state;
    }
    memcpy(data, words, SECTOR);
}

void ledger_fill(const struct ledger *ledger, uint64_t block, uint32_t version, uint8_t *buffer)
{
    for (unsigned sector = 0; sector < ledger->header->block_size / SECTOR; sector++) {
        fill_sector(ledger, block, sector, version, buffer + sector * SECTOR);
    }
}

static bool is_zero(const uint8_t *data, size_t size)
{
    return data[0] == 0 && memcmp(data, data + 1, size - 1) == 0;
}

/* What version 0 has in a sector. */
static void original_sector(const struct ledger *ledger, uint64_t block, unsigned sector, uint8_t *data)
{
    uint64_t offset = ledger->header->offset + block * ledger->header->block_size + sector * SECTOR;
    memset(data, 0, SECTOR);
    if (ledger->original && offset < ledger->original_size) {
        size_t left = ledger->original_size - offset;
        memcpy(data, ledger->original + offset, left < SECTOR ? left : SECTOR);
    }
}

/* The data version that a sector shows, or 0 if it is none of this place. */
static uint32_t sector_version(const struct ledger *ledger, uint64_t block, unsigned sector, const uint8_t *data)
{
    uint64_t key = mix(ledger->header->seed ^ mix(block * 4096 + sector));
    uint64_t first;
    memcpy(&first, data, sizeof(first));
    uint64_t version = first ^ key;
    if (version == 0 || version > UINT32_MAX || version % 2 == 0) {
        return 0;
    }
    uint8_t expected[SECTOR];
    fill_sector(ledger, block, sector, version, expected);
    return memcmp(expected, data, SECTOR) == 0 ? version : 0;
}

static bool sector_in_range(const struct ledger *ledger, uint64_t block, unsigned sector, const uint8_t *data,
                            uint32_t from, uint32_t to, bool zeroes_too)
{
    uint32_t version = sector_version(ledger, block, sector, data);
    if (version) {
        return version >= from && version <= to;
    }
    if (is_zero(data, SECTOR)) {
        uint32_t first_even = from == 0 ? 2 : from + from % 2;
        if (zeroes_too || first_even <= to) {
            return true;
        }
    }
    if (from == 0) {
        uint8_t original[SECTOR];
        original_sector(ledger, block, sector, original);
        return memcmp(original, data, SECTOR) == 0;
    }
    return false;
}

static void complain(const struct ledger *ledger, uint64_t block, unsigned sector, const uint8_t *data, uint32_t from,
                     uint32_t to)
{
    const struct ledger_block *state = &ledger->blocks[block];
    uint8_t original[SECTOR];
    original_sector(ledger, block, sector, original);
    uint32_t version = sector_version(ledger, block, sector, data);
    char found[64];
    if (version) {
        snprintf(found, sizeof(found), "version %u", version);
    } else if (is_zero(data, SECTOR)) {
        snprintf(found, sizeof(found), "zeroes");
    } else if (memcmp(original, data, SECTOR) == 0) {
        snprintf(found, sizeof(found), "the original");
    } else {
        snprintf(found, sizeof(found), "strange data %02x%02x%02x%02x%02x%02x%02x%02x", data[0], data[1], data[2],
                 data[3], data[4], data[5], data[6], data[7]);
    }
    fprintf(stderr, "verify: MISMATCH at offset %llu (block %llu, sector %u): wanted version %u",
            (unsigned long long)(ledger->header->offset + block * ledger->header->block_size + sector * SECTOR),
            (unsigned long long)block, sector, from);
    if (to != from) {
        fprintf(stderr, " to %u", to);
    }
    fprintf(stderr, ", found %s (issued %u, current %u, flushed %u, trimmed %u)\n", found, state->issued,
            state->current, state->flushed, state->trimmed);
}

bool ledger_matches(const struct ledger *ledger, uint64_t block, const uint8_t *data, enum ledger_check check)
{
    const struct ledger_block *state = &ledger->blocks[block];
    uint32_t from = check == LEDGER_CRASH ? state->flushed : state->current;
    uint32_t to = state->issued;
    bool zeroes_too = state->trimmed > (check == LEDGER_CRASH ? state->flushed : state->current);
    for (unsigned sector = 0; sector < ledger->header->block_size / SECTOR; sector++) {
        const uint8_t *part = data + sector * SECTOR;
        if (!sector_in_range(ledger, block, sector, part, from, to, zeroes_too)) {
            complain(ledger, block, sector, part, from, to);
            return false;
        }
    }
    return true;
}

bool ledger_is_issued(const struct ledger *ledger, uint64_t block, const uint8_t *data)
{
    uint32_t version = ledger->blocks[block].issued;
    if (ledger->blocks[block].trimmed > ledger->blocks[block].current) {
        return false;
    }
    for (unsigned sector = 0; sector < ledger->header->block_size / SECTOR; sector++) {
        if (!sector_in_range(ledger, block, sector, data + sector * SECTOR, version, version, false)) {
            return false;
        }
    }
    return true;
}

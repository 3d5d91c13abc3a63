/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Making LUKS1 headers, and changing their key slots, in an order that a power cut cannot hurt:
 *
 * 1. Key material goes to an inactive slot, is flushed, and only then the header says that the slot is active.
 * 2. Erasing goes the other way: the material is overwritten and flushed before the slot is marked, so that a slot
 *    that looks inactive holds nothing any more.
 * 3. The header is two sectors, and one sector is what a disk writes as one. Each slot's state lies in one of them;
 *    salts and iterations that lie in the other are on disk before the state says that they count (slot 6 lies across).
 * 4. An active slot is overwritten only while another one can be opened with the new passphrase or, if there is no room
 *    for that, with one of those which the image has.
 *
 * Randomness and clock are the loop's; the computing is on the worker pool.
 */
#include "crypto/af_split.h"
#include "crypto/luks.h"
#include "crypto/luks_private.h"
#include "loop/loop.h"
#include "loop/worker.h"
#include <errno.h>
#include <glib.h>
#include <stddef.h>
#include <string.h>

enum { BENCHMARK_START = 1 << 13, BENCHMARK_MAX = 1 << 20, BENCHMARK_NS = 5000000, DIGEST_SHARE = 8 };

static void fill_random(void *memory, size_t bytes)
{
    uint8_t *to = memory;
    while (bytes) {
        uint64_t random = loop_random();
        size_t part = MIN(bytes, sizeof(random));
        memcpy(to, &random, part);
        to += part;
        bytes -= part;
    }
}

void luks_options_default(struct luks_options *options)
{
    *options = (struct luks_options){
        .cipher = {CIPHER_AES_256, CIPHER_XTS, CIPHER_IV_PLAIN64, HASH_SHA256},
        .hash = HASH_SHA256,
        .iter_time_ms = LUKS_ITER_TIME_MS,
    };
}

/* --- how many iterations --- */

struct benchmark {
    enum hash_algorithm hash;
    uint32_t iterations;
};

static int benchmark_work(void *argument)
{
    const struct benchmark *benchmark = argument;
    uint8_t salt[LUKS_SALT_BYTES] = {0}, out[LUKS_DIGEST_BYTES];
    hash_pbkdf2(benchmark->hash, "benchmark", 9, salt, sizeof(salt), benchmark->iterations, out,
                MIN(sizeof(out), hash_bytes(benchmark->hash)));
    return 0;
}

/* Iterations of one block of output in a millisecond: the best of three, since others use the machine too. */
static uint64_t coroutine_fn measure_speed(enum hash_algorithm hash)
{
    struct benchmark benchmark = {hash, BENCHMARK_START};
    uint64_t best = 0;
    for (unsigned good = 0; good < 3;) {
        int64_t start = loop_clock_ns();
        worker_run(benchmark_work, &benchmark);
        int64_t took = loop_clock_ns() - start;
        if (took > 0) {
            best = MAX(best, benchmark.iterations * UINT64_C(1000000) / took);
        }
        if (took < BENCHMARK_NS && benchmark.iterations < BENCHMARK_MAX) {
            benchmark.iterations *= 2;
        } else {
            good++;
        }
    }
    return best; /* 0: there is no clock that moves (a simulated world) */
}

static uint32_t iterations_within(uint64_t speed, uint64_t time_ms, unsigned blocks)
{
    uint64_t most = LUKS_ITERATIONS_MAX;
    uint64_t count = speed && time_ms > most * blocks / speed ? most : speed * time_ms / blocks;
    return MAX(count, LUKS_ITERATIONS_MIN);
}

static uint32_t coroutine_fn choose_iterations(const struct luks_options *options, size_t key_bytes,
                                               uint32_t *ret_digest)
{
    if (options->iterations) {
        *ret_digest = options->iterations;
        return options->iterations;
    }
    uint64_t speed = measure_speed(options->hash);
    *ret_digest = iterations_within(speed, options->iter_time_ms,
                                    DIGEST_SHARE * div_up(LUKS_DIGEST_BYTES, hash_bytes(options->hash)));
    return iterations_within(speed, options->iter_time_ms, div_up(key_bytes, hash_bytes(options->hash)));
}

/* --- slots --- */

struct set_job {
    const struct luks_header *header;
    const struct luks_slot *slot;
    const uint8_t *key, *passphrase;
    size_t passphrase_bytes;
    uint8_t *material; /* random, then what goes to the disk */
};

static int set_work(void *argument)
{
    const struct set_job *job = argument;
    const struct luks_header *header = job->header;
    uint8_t slot_key[CIPHER_KEY_MAX];
    struct sector_cipher *cipher;
    hash_pbkdf2(header->hash, job->passphrase, job->passphrase_bytes, job->slot->salt, sizeof(job->slot->salt),
                job->slot->iterations, slot_key, header->key_bytes);
    int code = sector_cipher_create(&header->cipher, slot_key, &cipher, NULL);
    explicit_bzero(slot_key, sizeof(slot_key));
    if (code < 0) {
        return code;
    }
    af_split(header->hash, job->key, header->key_bytes, job->slot->stripes, job->material, job->material);
    sector_cipher_encrypt(cipher, 0, job->material, luks_material_bytes(header->key_bytes, job->slot->stripes));
    sector_cipher_destroy(cipher);
    return 0;
}

/* Writes and flushes the sectors of the header that the slot touches: that of its state last. */
static int coroutine_fn write_slot_fields(const struct luks_io *io, const struct luks_header *header, unsigned slot)
{
    uint8_t data[LUKS_HEADER_BYTES];
    size_t at = offsetof(struct luks_disk_header, slots) + slot * sizeof(struct luks_disk_slot);
    size_t end = at + sizeof(struct luks_disk_slot);
    int code = 0;
    luks_build(header, data);
    if (at < LUKS_SECTOR && end > LUKS_SECTOR) {
        code = io->write(io->argument, LUKS_SECTOR, data + LUKS_SECTOR, end - LUKS_SECTOR);
        end = LUKS_SECTOR;
        if (code == 0) {
            code = io->flush(io->argument);
        }
    }
    if (code == 0) {
        code = io->write(io->argument, at, data + at, end - at);
    }
    return code == 0 ? io->flush(io->argument) : code;
}

static int check_room(const struct luks_io *io, const struct luks_header *header, unsigned slot, struct error **err)
{
    const struct luks_slot *of = &header->slots[slot];
    int code = luks_slot_check(header, slot, err);
    uint64_t bytes = luks_material_bytes(header->key_bytes, of->stripes);
    if (code == 0 && (of->key_offset > io->size || bytes > io->size - of->key_offset)) {
        code = error_set(err, -EINVAL, "LUKS key slot %u is corrupt: its key material lies behind the end", slot);
    }
    return code;
}

int coroutine_fn luks_slot_set(const struct luks_io *io, struct luks_header *header, unsigned slot, const uint8_t *key,
                               const uint8_t *passphrase, size_t passphrase_bytes, const struct luks_options *options,
                               struct error **err)
{
    struct luks_slot *of = &header->slots[slot], before = *of;
    uint32_t digest_iterations;
    int code = check_room(io, header, slot, err);
    if (code < 0) {
        return code;
    }
    struct luks_options with = *options;
    with.hash = header->hash;
    size_t bytes = luks_material_bytes(header->key_bytes, of->stripes);
    g_autofree uint8_t *material = g_try_malloc0(bytes);
    if (!material) {
        return error_set_errno(err, -ENOMEM, "Cannot set LUKS key slot %u", slot);
    }
    of->iterations = choose_iterations(&with, header->key_bytes, &digest_iterations);
    fill_random(of->salt, sizeof(of->salt));
    fill_random(material, (size_t)(of->stripes - 1) * header->key_bytes);
    struct set_job job = {header, of, key, passphrase, passphrase_bytes, material};
    code = worker_run(set_work, &job);
    if (code == 0) {
        code = io->write(io->argument, of->key_offset, material, bytes);
    }
    if (code == 0) {
        code = io->flush(io->argument);
    }
    explicit_bzero(material, bytes);
    of->active = true;
    if (code == 0) {
        code = write_slot_fields(io, header, slot);
    }
    if (code < 0) {
        *of = before;
        return error_set_errno(err, code, "Cannot write LUKS key slot %u", slot);
    }
    return 0;
}

int coroutine_fn luks_slot_erase(const struct luks_io *io, struct luks_header *header, unsigned slot,
                                 struct error **err)
{
    struct luks_slot *of = &header->slots[slot];
    int code = check_room(io, header, slot, err);
    if (code < 0) {
        return code;
    }
    size_t bytes = luks_material_bytes(header->key_bytes, of->stripes);
    g_autofree uint8_t *garbage = g_try_malloc(bytes);
    code = garbage ? 0 : -ENOMEM;
    if (code == 0) {
        fill_random(garbage, bytes);
        code = io->write(io->argument, of->key_offset, garbage, bytes);
    }
    if (code == 0) {
        code = io->flush(io->argument);
    }
    if (code == 0) {
        of->active = false;
        of->iterations = 0;
        memset(of->salt, 0, sizeof(of->salt));
        code = write_slot_fields(io, header, slot);
    }
    return code < 0 ? error_set_errno(err, code, "Cannot erase LUKS key slot %u", slot) : 0;
}

/* --- new headers --- */

int luks_new_bytes(const struct luks_options *options, uint64_t *ret, struct error **err)
{
    size_t key_bytes;
    int code = cipher_key_bytes(&options->cipher, &key_bytes, err);
    if (code == 0) {
        *ret = LUKS_ALIGN + LUKS_SLOTS * align_up((uint64_t)key_bytes * LUKS_STRIPES, LUKS_ALIGN);
    }
    return code;
}

static void make_uuid(char *out, size_t size)
{
    uint8_t u[16]; /* RFC 4122, 4.4 */
    fill_random(u, sizeof(u));
    u[6] = (u[6] & 0x0f) | 0x40;
    u[8] = (u[8] & 0x3f) | 0x80;
    g_snprintf(out, size, "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1], u[2],
               u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
}

struct digest_job {
    struct luks_header *header;
    const uint8_t *key;
};

static int digest_work(void *argument)
{
    const struct digest_job *job = argument;
    struct luks_header *header = job->header;
    hash_pbkdf2(header->hash, job->key, header->key_bytes, header->digest_salt, sizeof(header->digest_salt),
                header->digest_iterations, header->digest, sizeof(header->digest));
    return 0;
}

/* Zeroes where key material will lie, then the header with all slots inactive. */
static int coroutine_fn write_fresh(const struct luks_io *io, const struct luks_header *header, uint64_t bytes)
{
    g_autofree uint8_t *zeroes = g_malloc0(LUKS_ALIGN);
    uint8_t data[LUKS_HEADER_BYTES];
    int code = 0;
    for (uint64_t at = 0; code == 0 && at < bytes; at += LUKS_ALIGN) {
        code = io->write(io->argument, at, zeroes, LUKS_ALIGN);
    }
    luks_build(header, data);
    if (code == 0) {
        code = io->write(io->argument, 0, data, sizeof(data));
    }
    return code;
}

int coroutine_fn luks_create(const struct luks_io *io, const struct luks_options *options, const uint8_t *passphrase,
                             size_t passphrase_bytes, struct luks_header *ret, struct error **err)
{
    struct luks_header header = {.cipher = options->cipher, .hash = options->hash};
    uint8_t key[CIPHER_KEY_MAX];
    uint64_t bytes;
    int code = luks_new_bytes(options, &bytes, err);
    if (code < 0) {
        return code;
    }
    if (io->size < bytes) {
        return error_set(err, -ENOSPC, "A LUKS header with its keys takes %" G_GUINT64_FORMAT " bytes", bytes);
    }
    header.payload_offset = options->detached ? 0 : bytes;
    cipher_key_bytes(&options->cipher, &header.key_bytes, NULL);
    uint64_t area = align_up((uint64_t)header.key_bytes * LUKS_STRIPES, LUKS_ALIGN);
    for (unsigned i = 0; i < LUKS_SLOTS; i++) {
        header.slots[i] = (struct luks_slot){.stripes = LUKS_STRIPES, .key_offset = LUKS_ALIGN + i * area};
    }
    struct luks_options with = *options;
    with.iterations = choose_iterations(options, header.key_bytes, &header.digest_iterations);
    make_uuid(header.uuid, sizeof(header.uuid));
    fill_random(header.digest_salt, sizeof(header.digest_salt));
    fill_random(key, header.key_bytes);
    struct digest_job job = {&header, key};
    worker_run(digest_work, &job);
    code = write_fresh(io, &header, bytes);
    if (code < 0) {
        error_set_errno(err, code, "Cannot write the LUKS header");
    } else {
        code = luks_slot_set(io, &header, 0, key, passphrase, passphrase_bytes, &with, err);
    }
    explicit_bzero(key, sizeof(key));
    if (code == 0) {
        *ret = header;
    }
    return code;
}

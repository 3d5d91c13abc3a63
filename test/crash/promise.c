/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The model of a disk with a cache that may lose what was not flushed.
 *
 * 1. Changes and flushes have moments (a clock that every call moves on) and points (places in the recording). Order is
 *    told by moments; what a crash can have seen, by points.
 * 2. After a crash at point p a change counts when it had begun by then. It is superseded when another one, not
 * optional, began after it was done and was done before the beginning of a flush that was over by p.
 * 3. A sector may hold any change that counts and is not superseded.
 */
#include "test/crash/promise.h"
#include <string.h>

struct change {
    uint64_t begun_point, begun, done; /* done: 0 while it is under way */
    uint32_t number;
    bool optional;
};
struct flush {
    uint64_t begun, over_point;
    bool over;
};
struct promise {
    uint64_t sectors, clock;
    GArray *changes;         /* struct change; 0: the beginning */
    GArray *flushes;         /* struct flush */
    GArray **of_sector;      /* of each sector: indices of changes, in order of their beginning */
    uint64_t point, flushed; /* promise_look(): begun moment of the latest flush that is over */
};

void sector_fill(uint8_t *to, uint64_t sector, uint32_t number)
{
    uint64_t word = (uint64_t)number << 32 | (uint32_t)(sector + 1);
    if (number == 0) {
        memset(to, 0, SECTOR);
        return;
    }
    for (unsigned i = 0; i < SECTOR; i += 8) {
        memcpy(to + i, &word, 8);
    }
}

bool sector_number(const uint8_t *data, uint64_t sector, uint32_t *ret)
{
    uint64_t word;
    memcpy(&word, data, 8);
    if (memcmp(data, data + 8, SECTOR - 8) != 0 || (word != 0 && (uint32_t)word != (uint32_t)(sector + 1))) {
        return false;
    }
    *ret = (uint32_t)(word >> 32);
    return word == 0 || *ret != 0;
}

bool sector_is_of_guest(const uint8_t *data, uint64_t bytes)
{
    return bytes >= SECTOR && memcmp(data, data + 8, SECTOR - 8) == 0;
}

struct promise *promise_create(uint64_t sectors)
{
    struct promise *promise = g_new0(struct promise, 1);
    struct change beginning = {0};
    promise->sectors = sectors;
    promise->changes = g_array_new(FALSE, TRUE, sizeof(struct change));
    promise->flushes = g_array_new(FALSE, TRUE, sizeof(struct flush));
    promise->of_sector = g_new0(GArray *, sectors);
    g_array_append_val(promise->changes, beginning);
    return promise;
}

void promise_destroy(struct promise *promise)
{
    for (uint64_t i = 0; i < promise->sectors; i++) {
        if (promise->of_sector[i]) {
            g_array_unref(promise->of_sector[i]);
        }
    }
    g_free(promise->of_sector);
    g_array_unref(promise->changes);
    g_array_unref(promise->flushes);
    g_free(promise);
}

static struct change *change_at(const struct promise *promise, unsigned index)
{
    return &g_array_index(promise->changes, struct change, index);
}

unsigned promise_begin(struct promise *promise, uint64_t point, uint64_t first, uint64_t count, uint32_t number,
                       bool optional)
{
    struct change change = {.begun_point = point, .begun = ++promise->clock, .number = number, .optional = optional};
    unsigned index = promise->changes->len;
    g_array_append_val(promise->changes, change);
    g_assert(first + count <= promise->sectors);
    for (uint64_t i = first; i < first + count; i++) {
        if (!promise->of_sector[i]) {
            promise->of_sector[i] = g_array_new(FALSE, FALSE, sizeof(unsigned));
        }
        g_array_append_val(promise->of_sector[i], index);
    }
    return index;
}

void promise_done(struct promise *promise, unsigned change)
{
    change_at(promise, change)->done = ++promise->clock;
}

unsigned promise_flush_begin(struct promise *promise)
{
    struct flush flush = {.begun = ++promise->clock};
    g_array_append_val(promise->flushes, flush);
    return promise->flushes->len - 1;
}

void promise_flush_done(struct promise *promise, uint64_t point, unsigned flush)
{
    struct flush *over = &g_array_index(promise->flushes, struct flush, flush);
    over->over = true;
    over->over_point = point;
}

uint32_t promise_now(const struct promise *promise, uint64_t sector)
{
    const GArray *of = promise->of_sector[sector];
    if (!of) {
        return 0;
    }
    const struct change *last = change_at(promise, g_array_index(of, unsigned, of->len - 1));
    g_assert(last->done && !last->optional);
    return last->number;
}

struct promise *promise_freeze(const struct promise *from)
{
    struct promise *promise = promise_create(from->sectors);
    for (uint64_t i = 0; i < from->sectors; i++) {
        promise_done(promise, promise_begin(promise, 0, i, 1, promise_now(from, i), false));
    }
    promise_flush_done(promise, 0, promise_flush_begin(promise));
    return promise;
}

unsigned promise_become(struct promise *promise, uint64_t point, const struct promise *from)
{
    unsigned first = promise->changes->len;
    for (uint64_t i = 0; i < promise->sectors; i++) {
        promise_begin(promise, point, i, 1, promise_now(from, i), false);
    }
    return first;
}

void promise_become_done(struct promise *promise, unsigned first)
{
    for (unsigned i = first; i < first + promise->sectors; i++) {
        promise_done(promise, i);
    }
}

void promise_look(struct promise *promise, uint64_t point)
{
    promise->point = point;
    promise->flushed = 0;
    for (unsigned i = 0; i < promise->flushes->len; i++) {
        const struct flush *flush = &g_array_index(promise->flushes, struct flush, i);
        if (flush->over && flush->over_point <= point) {
            promise->flushed = MAX(promise->flushed, flush->begun);
        }
    }
}

bool promise_allows(const struct promise *promise, uint64_t sector, uint32_t number)
{
    const GArray *of = promise->of_sector[sector];
    uint64_t settled = 0; /* the latest beginning of a change that is sure to be there */
    for (unsigned i = 0; of && i < of->len; i++) {
        const struct change *change = change_at(promise, g_array_index(of, unsigned, i));
        if (!change->optional && change->done && change->done < promise->flushed) {
            settled = MAX(settled, change->begun);
        }
    }
    for (unsigned i = 0; of && i < of->len; i++) {
        const struct change *change = change_at(promise, g_array_index(of, unsigned, i));
        if (change->begun_point <= promise->point && change->number == number &&
            !(change->done && change->done < settled)) {
            return true;
        }
    }
    return number == 0 && settled == 0;
}

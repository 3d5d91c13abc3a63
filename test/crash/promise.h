/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_CRASH_PROMISE_H
#define INTERLOCK_TEST_CRASH_PROMISE_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * What a client was promised of a disk: what each sector may hold after a crash at a point of the recording. Writes are
 * known by a number; a sector's content tells its number and its place. Whoever records calls these as things happen;
 * `point` is how many records there are at that moment.
 */
#define SECTOR 512u

/* The content of a sector as write `number` left it; 0: zeroes. Compressible. */
void sector_fill(uint8_t *to, uint64_t sector, uint32_t number);
/* Which write it is of; false: it is of none, or torn. */
bool sector_number(const uint8_t *data, uint64_t sector, uint32_t *ret);
/* Does it look like something that sector_fill() made (for some sector)? */
bool sector_is_of_guest(const uint8_t *data, uint64_t bytes);

struct promise;
/* All sectors hold write 0 (zeroes). `sectors`: as many as there may ever be. */
struct promise *promise_create(uint64_t sectors);
void promise_destroy(struct promise *promise);

/* A change of [first, first + count) begins; `optional`: what was there before may stay (a discard). Several may be
 * under way, not of the same sectors. Returns what promise_done() wants. */
unsigned promise_begin(struct promise *promise, uint64_t point, uint64_t first, uint64_t count, uint32_t number,
                       bool optional);
void promise_done(struct promise *promise, unsigned change);
/* A flush: what was done before it began is promised once it is over. */
unsigned promise_flush_begin(struct promise *promise);
void promise_flush_done(struct promise *promise, uint64_t point, unsigned flush);

/* What `from` holds now (nothing is under way, nothing is optional), for ever and from now on: a snapshot. */
struct promise *promise_freeze(const struct promise *from);
/* Everything becomes as `from` shows it: one change of all sectors, under way. */
unsigned promise_become(struct promise *promise, uint64_t point, const struct promise *from);
void promise_become_done(struct promise *promise, unsigned first);
/* The number that the sector holds now, likewise. */
uint32_t promise_now(const struct promise *promise, uint64_t sector);

/* Prepares questions about a crash at the point. */
void promise_look(struct promise *promise, uint64_t point);
/* May the sector hold that write after the crash? */
bool promise_allows(const struct promise *promise, uint64_t sector, uint32_t number);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The buffers of NBD clients: payloads of requests, and the arenas that requests are received into. One pool per loop,
 * so that no lock is needed and memory that is still in the processor's cache is used first. Invariants:
 * 1. a buffer's room is a power of two, from a page up; rooms above CLASS_MAX are never kept;
 * 2. what a pool keeps is at most KEPT_MAX bytes;
 * 3. a pool that has no clients does not exist, so an idle daemon holds no buffers.
 * It does not limit how much is in use: the session's limits do (session.c).
 */
#include "export/nbd/memory.h"
#include "base/size.h"
#include "loop/file.h"
#include <glib.h>
#include <stdlib.h>

#define CLASS_MIN_BITS 12
#define CLASS_MAX_BITS 21
#define CLASS_COUNT (CLASS_MAX_BITS - CLASS_MIN_BITS + 1)
#define KEPT_MAX (16 * MiB)

struct nbd_free {
    struct nbd_free *next;
};

struct nbd_pool {
    struct nbd_free *free[CLASS_COUNT];
    size_t kept;
    size_t in_use; /* buffers */
};

struct nbd_pool *nbd_pool_create(void)
{
    return g_new0(struct nbd_pool, 1);
}

void nbd_pool_destroy(struct nbd_pool *pool)
{
    if (!pool) {
        return;
    }
    g_assert(pool->in_use == 0);
    for (unsigned i = 0; i < CLASS_COUNT; i++) {
        while (pool->free[i]) {
            struct nbd_free *memory = pool->free[i];

            pool->free[i] = memory->next;
            free(memory);
        }
    }
    g_free(pool);
}

/* The bits of the smallest room that holds `bytes`. */
static unsigned class_bits(size_t bytes)
{
    unsigned bits = bytes <= 1 ? 0 : 64 - (unsigned)__builtin_clzll((unsigned long long)bytes - 1);

    return MAX(bits, CLASS_MIN_BITS);
}

void *nbd_pool_take(struct nbd_pool *pool, size_t bytes, size_t *ret_room)
{
    unsigned bits = class_bits(bytes);
    void *memory;

    *ret_room = (size_t)1 << bits;
    if (bits <= CLASS_MAX_BITS && pool->free[bits - CLASS_MIN_BITS]) {
        struct nbd_free *kept = pool->free[bits - CLASS_MIN_BITS];

        pool->free[bits - CLASS_MIN_BITS] = kept->next;
        pool->kept -= *ret_room;
        memory = kept;
    } else {
        memory = file_memory(*ret_room);
    }
    pool->in_use += memory != NULL;
    return memory;
}

void nbd_pool_give(struct nbd_pool *pool, void *memory, size_t room)
{
    unsigned bits = class_bits(room);

    g_assert(pool->in_use > 0 && is_power_of_two(room));
    pool->in_use--;
    if (bits <= CLASS_MAX_BITS && pool->kept + room <= KEPT_MAX) {
        struct nbd_free *kept = memory;

        kept->next = pool->free[bits - CLASS_MIN_BITS];
        pool->free[bits - CLASS_MIN_BITS] = kept;
        pool->kept += room;
    } else {
        free(memory);
    }
}

struct nbd_arena *nbd_arena_create(struct nbd_pool *pool)
{
    size_t room;
    uint8_t *bytes = nbd_pool_take(pool, NBD_ARENA_ROOM, &room);
    struct nbd_arena *arena;

    if (!bytes) {
        return NULL;
    }
    arena = g_new(struct nbd_arena, 1);
    *arena = (struct nbd_arena){.pool = pool, .references = 1, .bytes = bytes};
    return arena;
}

struct nbd_arena *nbd_arena_unref(struct nbd_arena *arena)
{
    if (arena && --arena->references == 0) {
        nbd_pool_give(arena->pool, arena->bytes, NBD_ARENA_ROOM);
        g_free(arena);
    }
    return NULL;
}

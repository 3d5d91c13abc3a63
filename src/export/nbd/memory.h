/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_NBD_MEMORY_H
#define INTERLOCK_EXPORT_NBD_MEMORY_H

#include <stddef.h>
#include <stdint.h>

/*
 * Buffers for the clients of one loop, kept for reuse. A pool is made, referenced and dropped on the control thread
 * (which sees the clients come and go); taken from and given to on its loop only.
 */
struct nbd_pool;
struct nbd_pool *nbd_pool_create(void);
void nbd_pool_destroy(struct nbd_pool *pool); /* everything was given back; accepts NULL */

/* Page-aligned memory of at least `bytes` (at least 1), or NULL. *ret_room is what nbd_pool_give() wants to know. */
void *nbd_pool_take(struct nbd_pool *pool, size_t bytes, size_t *ret_room);
void nbd_pool_give(struct nbd_pool *pool, void *memory, size_t room);

/* A receive buffer, shared by its receiver and by the write requests whose payload lies in it. */
#define NBD_ARENA_ROOM ((size_t)256 * 1024)
struct nbd_arena {
    struct nbd_pool *pool;
    unsigned references;
    uint8_t *bytes; /* NBD_ARENA_ROOM of them */
};
struct nbd_arena *nbd_arena_create(struct nbd_pool *pool);  /* NULL: no memory */
struct nbd_arena *nbd_arena_unref(struct nbd_arena *arena); /* accepts NULL; returns NULL */

#endif

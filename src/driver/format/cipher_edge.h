/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_CIPHER_EDGE_H
#define INTERLOCK_DRIVER_FORMAT_CIPHER_EDGE_H

#include "base/buffers.h"
#include "crypto/cipher.h"

/*
 * Reading and writing through a cipher: `offset` is where in the child (a multiple of the sector), `sector` the number
 * that its vectors of initialisation are made of. `bytes` may end inside a sector: what the rest of it decrypts to is
 * dropped, and it is written as zeroes. Any loop, in a coroutine; 0 or a negative errno.
 */
struct edge;

int coroutine_fn cipher_edge_read(struct edge *edge, const struct sector_cipher *cipher, uint64_t offset,
                                  uint64_t sector, uint64_t bytes, struct buffers to);
/* flags: as edge_write(). */
int coroutine_fn cipher_edge_write(struct edge *edge, const struct sector_cipher *cipher, uint64_t offset,
                                   uint64_t sector, uint64_t bytes, struct buffers from, unsigned flags);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_PADDED_H
#define INTERLOCK_BLOCK_PADDED_H

#include "base/buffers.h"
#include "block/node.h"

/*
 * Requests that do not fit a node's limits.alignment or whose memory does not fit limits.memory_alignment: through a
 * buffer of our own, in pieces. Any loop, in a coroutine. node->driver has the member that is used.
 */
bool padded_is_needed(const struct node *node, uint64_t offset, uint64_t bytes, struct buffers memory);
int coroutine_fn padded_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to, unsigned flags);
/* Keeps the bytes around an unaligned range; atomic against every other write to the same blocks. */
int coroutine_fn padded_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from, unsigned flags);

#endif

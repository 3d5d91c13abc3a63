/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The `null-co` driver: a node that holds nothing, for tests and measurements. Owns its three constants.
 *
 * 1. Writes, zeroes and discards are taken and forgotten.
 * 2. Reads leave the buffer as it is, or give zeroes with read-zeroes=on; block status says the same.
 * 3. Each request takes latency-ns, as a sleep of its loop.
 *
 * It has no locks, because its state is constant after opening, and its size never changes.
 */
#include "base/size.h"
#include "block/driver.h"
#include "driver/drivers.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib.h>

struct null_state {
    int64_t latency_ns;
    bool read_zeroes;
};

static int coroutine_fn null_open(struct node *node, const struct blockdev_options *options, struct error **err)
{
    const struct blockdev_options_null_co *own = &options->u.null_co;
    struct null_state *state = node->state;
    uint64_t size = own->has_size ? own->size : 1 * GiB;
    if (size > INT64_MAX) {
        return error_set(err, -EINVAL, "Node '%s': the size of a null-co node is at most 2^63 - 1 bytes", node->name);
    }
    if (own->has_latency_ns && own->latency_ns < 0) {
        return error_set(err, -EINVAL, "Node '%s': latency-ns is negative", node->name);
    }
    state->latency_ns = own->has_latency_ns ? own->latency_ns : 0;
    state->read_zeroes = own->has_read_zeroes && own->read_zeroes;
    atomic_store(&node->size, size);
    node->filename = g_strdup("null-co://");
    return 0;
}

static int coroutine_fn null_wait(const struct null_state *state)
{
    struct loop_sleep sleep = {0};
    if (state->latency_ns > 0) {
        loop_sleep_ns(&sleep, state->latency_ns);
    }
    return 0;
}

static int coroutine_fn null_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to, unsigned flags)
{
    const struct null_state *state = node->state;
    if (state->read_zeroes) {
        buffers_fill(to, 0, bytes);
    }
    return null_wait(state);
}

static int coroutine_fn null_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                   unsigned flags)
{
    return null_wait(node->state);
}

static int coroutine_fn null_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    return null_wait(node->state);
}

static int coroutine_fn null_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    return null_wait(node->state);
}

static int coroutine_fn null_flush(struct node *node)
{
    return null_wait(node->state);
}

static int coroutine_fn null_block_status(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    const struct null_state *state = node->state;
    ret->bytes = bytes;
    ret->host_offset = offset;
    ret->flags = EXTENT_ALLOCATED | EXTENT_MAPPED | (state->read_zeroes ? EXTENT_ZERO : EXTENT_DATA);
    return 0;
}

static uint64_t coroutine_fn null_allocated_size(struct node *node)
{
    return 0;
}

const struct driver driver_null_co = {
    .name = "null-co",
    .id = BLOCKDEV_DRIVER_NULL_CO,
    .kind = DRIVER_PROTOCOL,
    .state_size = sizeof(struct null_state),
    .open = null_open,
    .read = null_read,
    .write = null_write,
    .write_zeroes = null_write_zeroes,
    .discard = null_discard,
    .flush = null_flush,
    .block_status = null_block_status,
    .allocated_size = null_allocated_size,
};

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the two layouts of rings share: starting and stopping, collecting a request's buffers, the order in which what
 * was in flight is submitted again. Invariants:
 * 1. a ring that is broken stays so until it is started again; it neither takes nor gives;
 * 2. a request's buffers lie in the memory table, the ones that are read before the ones that are written, and are as
 *    many as fit in struct ring_chain;
 * 3. nothing that a region says is relied on: it lies in memory that the front end can write.
 * The layouts are in ring_split.c and ring_packed.c; what requests mean is in request.c.
 */
#include "export/vhost_user/ring.h"
#include "base/size.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

uint64_t ring_inflight_bytes(unsigned size)
{
    uint64_t split = sizeof(struct inflight_split) + size * sizeof(struct inflight_split_entry);
    uint64_t packed = sizeof(struct inflight_packed) + size * sizeof(struct inflight_packed_entry);

    return align_up(max_u64(split, packed), 64);
}

int ring_start(struct ring *ring, const struct ring_config *config)
{
    int r;

    memset(ring, 0, offsetof(struct ring, table));
    ring->config = *config;
    ring->ops = config->packed ? &ring_packed_ops : &ring_split_ops;
    if (!config->size || config->size > RING_SIZE_MAX || (!config->packed && !is_power_of_two(config->size))) {
        return -EINVAL;
    }
    ring->resubmit = g_new0(uint16_t, config->size);
    ring->next_entry = g_new0(uint16_t, config->size);
    r = ring->ops->start(ring);
    if (r < 0) {
        ring_stop(ring);
    }
    return r;
}

void ring_stop(struct ring *ring)
{
    g_clear_pointer(&ring->resubmit, g_free);
    g_clear_pointer(&ring->next_entry, g_free);
}

uint32_t ring_base(const struct ring *ring)
{
    if (!ring->config.packed) {
        return ring->next_available;
    }
    return ring->next_available | (uint32_t)ring->available_wrap << 15 | (uint32_t)ring->next_used << 16 |
           (uint32_t)ring->used_wrap << 31;
}

int ring_break(struct ring *ring, const char *reason)
{
    if (!ring->broken) {
        ring->broken = reason;
    }
    return -EPROTO;
}

int ring_pop(struct ring *ring, struct ring_chain *ret)
{
    if (ring->broken) {
        return -EPROTO;
    }
    ret->descriptors = 0;
    ret->out = ret->in = 0;
    ret->out_bytes = ret->in_bytes = 0;
    if (ring->resubmit_at < ring->resubmit_count) {
        int r = ring->ops->resubmit(ring, ring->resubmit[ring->resubmit_at], ret);

        ring->resubmit_at++;
        return r;
    }
    return ring->ops->pop(ring, ret);
}

void ring_push(struct ring *ring, const struct ring_chain *chain, uint32_t written)
{
    if (!ring->broken) {
        ring->ops->push(ring, chain, written);
    }
}

bool ring_wants_call(struct ring *ring)
{
    unsigned pushed = ring->unsignalled;

    ring->unsignalled = 0;
    return pushed && !ring->broken && ring->ops->wants_call(ring, pushed);
}

bool ring_enable_kicks(struct ring *ring)
{
    return !ring->broken && (ring->ops->enable_kicks(ring) || ring->resubmit_at < ring->resubmit_count);
}

void ring_disable_kicks(struct ring *ring)
{
    if (!ring->broken) {
        ring->ops->disable_kicks(ring);
    }
}

int ring_add_buffer(struct ring *ring, struct ring_chain *chain, uint64_t address, uint32_t bytes, bool write)
{
    unsigned used = chain->out + chain->in;

    if (!write && chain->in) {
        return ring_break(ring, "a buffer to be read follows one to be written");
    }
    if (!bytes) {
        return 0;
    }
    int count = vhost_memory_find(ring->config.memory, address, bytes, chain->iov + used, RING_IOV_MAX - used);
    if (count < 0) {
        return ring_break(ring, count == -EFAULT ? "a buffer is not in the guest's memory"
                                                 : "a request has too many buffers");
    }
    *(write ? &chain->in : &chain->out) += (unsigned)count;
    *(write ? &chain->in_bytes : &chain->out_bytes) += bytes;
    return 0;
}

int ring_read_table(struct ring *ring, uint64_t address, uint32_t bytes)
{
    if (!ring->config.indirect) {
        return ring_break(ring, "an indirect table that was not negotiated");
    }
    if (!bytes || bytes % sizeof(struct vring_desc) || bytes > sizeof(ring->table)) {
        return ring_break(ring, "an indirect table of an impossible size");
    }
    if (vhost_memory_read(ring->config.memory, address, ring->table, bytes) < 0) {
        return ring_break(ring, "an indirect table is not in the guest's memory");
    }
    return (int)(bytes / sizeof(struct vring_desc));
}

struct resubmission {
    uint64_t counter;
    uint16_t what;
};

static int compare_counters(const void *a, const void *b)
{
    const struct resubmission *one = a, *other = b;

    return one->counter < other->counter ? -1 : one->counter > other->counter;
}

/* counters[i] belongs to ring->resubmit[i]. */
void ring_sort_resubmission(struct ring *ring, const uint64_t *counters)
{
    g_autofree struct resubmission *list = g_new(struct resubmission, ring->resubmit_count + 1);

    for (unsigned i = 0; i < ring->resubmit_count; i++) {
        list[i] = (struct resubmission){counters[i], ring->resubmit[i]};
        ring->counter = max_u64(ring->counter, counters[i] + 1);
    }
    qsort(list, ring->resubmit_count, sizeof(*list), compare_counters);
    for (unsigned i = 0; i < ring->resubmit_count; i++) {
        ring->resubmit[i] = list[i].what;
    }
}

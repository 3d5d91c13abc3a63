/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The split ring: a table of descriptors, a ring of heads that are available, a ring of heads that were used. Its
 * region (struct inflight_split) is written in the protocol's order, with batches of one: where we are cut off, the
 * used ring's index beside the region's says whether the last push was seen. Invariants:
 * 1. next_available and next_used run freely; available entries are looked at only as far as the guest's index, which
 *    is at most a ring ahead;
 * 2. a chain is followed at most RING_CHAIN_MAX steps.
 */
#include "base/size.h"
#include "export/vhost_user/ring.h"
#include <errno.h>
#include <glib.h>
#include <stdatomic.h>

#define LOAD(from) __atomic_load_n(&(from), __ATOMIC_RELAXED)
#define STORE(to, value) __atomic_store_n(&(to), (value), __ATOMIC_RELEASE)

static struct inflight_split *region_of(const struct ring *ring)
{
    return ring->config.inflight;
}

/* Behind the rings' entries: the guest's wish for calls, and ours for kicks. */
static uint16_t *used_event(const struct ring *ring)
{
    return &ring->split.available->ring[ring->config.size];
}
static uint16_t *available_event(const struct ring *ring)
{
    return (uint16_t *)&ring->split.used->ring[ring->config.size];
}

/* The last push may have been seen by the guest, and not have reached the region. */
static void settle_region(struct ring *ring, uint16_t used_index)
{
    struct inflight_split *region = region_of(ring);
    unsigned size = ring->config.size;
    uint16_t batch = used_index - LOAD(region->used_index), at = LOAD(region->last_batch);

    for (unsigned i = 0; i < batch && i < size && at < size; i++) {
        region->entries[at].inflight = 0;
        at = LOAD(region->entries[at].next);
    }
    STORE(region->used_index, used_index);
}

static void start_region(struct ring *ring)
{
    struct inflight_split *region = region_of(ring);
    unsigned size = ring->config.size;
    g_autofree uint64_t *counters = g_new(uint64_t, size);

    if (LOAD(region->version) != INFLIGHT_VERSION || LOAD(region->count) != size) {
        for (unsigned i = 0; i < size; i++) {
            region->entries[i] = (struct inflight_split_entry){0};
        }
        region->features = 0;
        region->count = (uint16_t)size;
        region->last_batch = 0;
        region->used_index = ring->next_used;
        STORE(region->version, INFLIGHT_VERSION);
        return;
    }
    settle_region(ring, ring->next_used);
    for (unsigned i = 0; i < size; i++) {
        if (region->entries[i].inflight) {
            counters[ring->resubmit_count] = LOAD(region->entries[i].counter);
            ring->resubmit[ring->resubmit_count++] = (uint16_t)i;
        }
    }
    ring_sort_resubmission(ring, counters);
    /* Who comes back after our death does not know how far we were: the region does. */
    ring->next_available = ring->next_used + ring->resubmit_count;
}

static int split_start(struct ring *ring)
{
    const struct ring_config *config = &ring->config;
    unsigned size = config->size;

    ring->split.descriptors =
        vhost_memory_ring(config->memory, config->descriptors, size * sizeof(struct vring_desc), 16);
    ring->split.available = vhost_memory_ring(config->memory, config->available,
                                              sizeof(struct vring_avail) + (size + 1) * sizeof(uint16_t), 2);
    ring->split.used =
        vhost_memory_ring(config->memory, config->used,
                          sizeof(struct vring_used) + size * sizeof(struct vring_used_elem) + sizeof(uint16_t), 4);
    if (!ring->split.descriptors || !ring->split.available || !ring->split.used) {
        return -EFAULT;
    }
    ring->next_available = (uint16_t)config->base;
    ring->next_used = LOAD(ring->split.used->idx);
    if (config->inflight) {
        start_region(ring);
    }
    return 0;
}

/* The chain from `head` on, in the ring's own table or in ring->table. */
static int follow(struct ring *ring, struct ring_chain *chain, uint16_t head)
{
    const struct vring_desc *table = ring->split.descriptors;
    unsigned length = ring->config.size, at = head;
    bool indirect = false;

    for (unsigned steps = 0; steps < RING_CHAIN_MAX; steps++) {
        struct vring_desc copy = {LOAD(table[at].addr), LOAD(table[at].len), LOAD(table[at].flags),
                                  LOAD(table[at].next)};
        int r;

        if (copy.flags & VRING_DESC_F_INDIRECT) {
            if (indirect || (copy.flags & VRING_DESC_F_NEXT)) {
                return ring_break(ring, "an indirect table inside another, or in the middle of a chain");
            }
            r = ring_read_table(ring, copy.addr, copy.len);
            if (r < 0) {
                return r;
            }
            table = ring->table;
            length = (unsigned)r;
            indirect = true;
            at = 0;
            continue;
        }
        r = ring_add_buffer(ring, chain, copy.addr, copy.len, copy.flags & VRING_DESC_F_WRITE);
        if (r < 0) {
            return r;
        }
        if (!(copy.flags & VRING_DESC_F_NEXT)) {
            return 1;
        }
        at = copy.next;
        if (at >= length) {
            return ring_break(ring, "a descriptor leads out of its table");
        }
    }
    return ring_break(ring, "a chain of descriptors that is too long, or does not end");
}

static int split_resubmit(struct ring *ring, unsigned what, struct ring_chain *ret)
{
    ret->id = (uint16_t)what;
    return follow(ring, ret, ret->id);
}

static int split_pop(struct ring *ring, struct ring_chain *ret)
{
    unsigned size = ring->config.size;
    uint16_t waiting = __atomic_load_n(&ring->split.available->idx, __ATOMIC_ACQUIRE) - ring->next_available;

    if (!waiting) {
        return 0;
    }
    if (waiting > size) {
        return ring_break(ring, "more requests are available than the ring has room for");
    }
    uint16_t head = LOAD(ring->split.available->ring[ring->next_available & (size - 1)]);
    if (head >= size) {
        return ring_break(ring, "an available request is not in the table");
    }
    ret->id = head;
    int r = follow(ring, ret, head);
    if (r < 0) {
        return r;
    }
    if (region_of(ring)) {
        struct inflight_split_entry *entry = &region_of(ring)->entries[head];

        entry->counter = ring->counter++;
        STORE(entry->inflight, 1);
    }
    ring->next_available++;
    return 1;
}

static void split_push(struct ring *ring, const struct ring_chain *chain, uint32_t written)
{
    struct inflight_split *region = region_of(ring);
    struct vring_used_elem *element = &ring->split.used->ring[ring->next_used & (ring->config.size - 1)];

    if (region) {
        STORE(region->entries[chain->id].next, LOAD(region->last_batch));
        STORE(region->last_batch, chain->id);
    }
    element->id = chain->id;
    element->len = written;
    STORE(ring->split.used->idx, ++ring->next_used);
    if (region) {
        STORE(region->entries[chain->id].inflight, 0);
        STORE(region->used_index, ring->next_used);
    }
    ring->unsignalled++;
}

static bool split_enable_kicks(struct ring *ring)
{
    if (ring->config.event_index) {
        STORE(*available_event(ring), ring->next_available);
    } else {
        STORE(ring->split.used->flags, 0);
    }
    atomic_thread_fence(memory_order_seq_cst);
    return LOAD(ring->split.available->idx) != ring->next_available;
}

static void split_disable_kicks(struct ring *ring)
{
    if (!ring->config.event_index) {
        STORE(ring->split.used->flags, VRING_USED_F_NO_NOTIFY);
    }
}

static bool split_wants_call(struct ring *ring, unsigned pushed)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (ring->config.event_index) {
        return ring_event_is_due(LOAD(*used_event(ring)), ring->next_used, (uint16_t)(ring->next_used - pushed));
    }
    return !(LOAD(ring->split.available->flags) & VRING_AVAIL_F_NO_INTERRUPT);
}

const struct ring_ops ring_split_ops = {
    .start = split_start,
    .pop = split_pop,
    .resubmit = split_resubmit,
    .push = split_push,
    .enable_kicks = split_enable_kicks,
    .disable_kicks = split_disable_kicks,
    .wants_call = split_wants_call,
};

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The packed ring: one ring of descriptors that the guest makes available and the device gives back in place, each
 * side with a wrap counter. Its region (struct inflight_packed) keeps a copy of each chain in flight, since the ring's
 * places may be used again before; it is written in the protocol's order, with batches of one. Invariants:
 * 1. next_available and next_used are places in the ring, below its size; a chain takes as many places as it has
 *    descriptors, when it is made available and when it is given back;
 * 2. next_entry[] and free_entry are our own list of the region's free entries: the region's is written after it and
 *    read only when the ring starts, where each entry is looked at once;
 * 3. a chain is followed at most once around the ring.
 */
#include "base/size.h"
#include "export/vhost_user/ring.h"
#include <errno.h>
#include <glib.h>
#include <stdatomic.h>
#include <string.h>

#define LOAD(from) __atomic_load_n(&(from), __ATOMIC_RELAXED)
#define STORE(to, value) __atomic_store_n(&(to), (value), __ATOMIC_RELEASE)
#define WRAP_BIT (1u << VRING_PACKED_EVENT_F_WRAP_CTR)

static struct inflight_packed *region_of(const struct ring *ring)
{
    return ring->config.inflight;
}

static void advance(const struct ring *ring, uint16_t *place, bool *wrap, unsigned by)
{
    unsigned next = *place + by;

    if (next >= ring->config.size) {
        next -= ring->config.size;
        *wrap = !*wrap;
    }
    *place = (uint16_t)next;
}

/* --- the region, when the ring starts --- */

static void region_init(struct ring *ring)
{
    struct inflight_packed *region = region_of(ring);
    unsigned size = ring->config.size;

    memset(region, 0, sizeof(*region) + size * sizeof(struct inflight_packed_entry));
    for (unsigned i = 0; i < size; i++) {
        region->entries[i].next = ring->next_entry[i] = (uint16_t)(i + 1);
    }
    region->count = (uint16_t)size;
    region->used_index = region->old_used_index = ring->next_used;
    region->used_wrap = region->old_used_wrap = ring->used_wrap;
    STORE(region->version, INFLIGHT_VERSION);
}

/* A push that we were cut off in: it counts if the guest has seen it, and else has never been. */
static void settle_region(struct ring *ring)
{
    struct inflight_packed *region = region_of(ring);
    uint16_t old = LOAD(region->old_used_index);

    if ((LOAD(region->used_index) != old || region->used_wrap != region->old_used_wrap) && old < ring->config.size) {
        uint16_t flags = LOAD(ring->packed.descriptors[old].flags);

        if ((flags & (PACKED_AVAILABLE | PACKED_USED)) != (region->old_used_wrap ? PACKED_AVAILABLE : PACKED_USED)) {
            region->old_free = region->free;
            region->old_used_index = region->used_index;
            region->old_used_wrap = region->used_wrap;
        }
    }
    region->free = region->old_free;
    region->used_index = region->old_used_index;
    region->used_wrap = region->old_used_wrap;
}

/* What is in flight: the chains that no entry of the free list is in. Everything else is made free again. -EPROTO: the
 * region makes no sense. */
static int region_take_over(struct ring *ring)
{
    struct inflight_packed *region = region_of(ring);
    unsigned size = ring->config.size, places = 0;
    g_autofree uint64_t *counters = g_new(uint64_t, size);
    g_autofree bool *taken = g_new0(bool, size);
    uint16_t at = LOAD(region->free);

    for (unsigned i = 0; i < size && at < size; i++) {
        region->entries[at].inflight = 0;
        at = LOAD(region->entries[at].next);
    }
    for (unsigned i = 0; i < size; i++) {
        if (!LOAD(region->entries[i].inflight)) {
            continue;
        }
        unsigned length = LOAD(region->entries[i].length), entry = i;
        for (unsigned step = 0; step < length; step++) {
            if (entry >= size || taken[entry] || places == size) {
                return -EPROTO;
            }
            taken[entry] = true;
            places++;
            ring->next_entry[entry] = LOAD(region->entries[entry].next);
            if (step + 1 == length) {
                STORE(region->entries[i].last, (uint16_t)entry);
            }
            entry = ring->next_entry[entry];
        }
        counters[ring->resubmit_count] = LOAD(region->entries[i].counter);
        ring->resubmit[ring->resubmit_count++] = (uint16_t)i;
    }
    uint16_t head = (uint16_t)size;
    for (unsigned i = size; i-- > 0;) {
        if (!taken[i]) {
            region->entries[i].next = ring->next_entry[i] = head;
            head = (uint16_t)i;
        }
    }
    ring->free_entry = region->free = region->old_free = head;
    ring_sort_resubmission(ring, counters);
    ring->next_used = LOAD(region->used_index);
    ring->used_wrap = LOAD(region->used_wrap) & 1;
    if (ring->next_used >= size) {
        return -EPROTO;
    }
    ring->next_available = ring->next_used;
    ring->available_wrap = ring->used_wrap;
    advance(ring, &ring->next_available, &ring->available_wrap, places);
    return 0;
}

static int packed_start(struct ring *ring)
{
    const struct ring_config *config = &ring->config;
    const struct vhost_memory *memory = config->memory;

    ring->packed.descriptors =
        vhost_memory_ring(memory, config->descriptors, config->size * sizeof(struct vring_packed_desc), 16);
    ring->packed.driver = vhost_memory_ring(memory, config->available, sizeof(struct vring_packed_desc_event), 4);
    ring->packed.device = vhost_memory_ring(memory, config->used, sizeof(struct vring_packed_desc_event), 4);
    if (!ring->packed.descriptors || !ring->packed.driver || !ring->packed.device) {
        return -EFAULT;
    }
    ring->next_available = config->base & 0x7fff;
    ring->available_wrap = config->base >> 15 & 1;
    /* Without a region nothing is in flight: both ends are at the same place. */
    ring->next_used = ring->next_available;
    ring->used_wrap = ring->available_wrap;
    if (ring->next_available >= config->size) {
        return -EINVAL;
    }
    if (!region_of(ring)) {
        return 0;
    }
    if (LOAD(region_of(ring)->version) != INFLIGHT_VERSION || LOAD(region_of(ring)->count) != config->size) {
        region_init(ring);
        return 0;
    }
    settle_region(ring);
    return region_take_over(ring);
}

/* --- requests --- */

static int add_descriptor(struct ring *ring, struct ring_chain *chain, const struct vring_packed_desc *copy)
{
    uint16_t flags = copy->flags;

    if (!(flags & VRING_DESC_F_INDIRECT)) {
        return ring_add_buffer(ring, chain, copy->addr, copy->len, flags & VRING_DESC_F_WRITE);
    }
    if ((flags & VRING_DESC_F_NEXT) || chain->out || chain->in) {
        return ring_break(ring, "an indirect table in the middle of a chain");
    }
    int length = ring_read_table(ring, copy->addr, copy->len);
    for (int i = 0; i < length; i++) {
        const struct vring_packed_desc *entry = (const struct vring_packed_desc *)&ring->table[i];
        int r = entry->flags & VRING_DESC_F_INDIRECT
                    ? ring_break(ring, "an indirect table inside another")
                    : ring_add_buffer(ring, chain, entry->addr, entry->len, entry->flags & VRING_DESC_F_WRITE);

        if (r < 0) {
            return r;
        }
    }
    return MIN(length, 0);
}

/* The next entry of the region for a descriptor of the chain that is being read. */
static void record_descriptor(struct ring *ring, struct ring_chain *chain, const struct vring_packed_desc *copy)
{
    struct inflight_packed *region = region_of(ring);
    struct inflight_packed_entry *entry = &region->entries[ring->free_entry];

    entry->address = copy->addr;
    entry->bytes = copy->len;
    entry->flags = copy->flags;
    entry->id = copy->id;
    region->entries[chain->entry].last = ring->free_entry;
    ring->free_entry = ring->next_entry[ring->free_entry];
}

static int packed_resubmit(struct ring *ring, unsigned what, struct ring_chain *ret)
{
    const struct inflight_packed *region = region_of(ring);
    unsigned length = LOAD(region->entries[what].length), at = what;

    ret->entry = (uint16_t)what;
    for (unsigned i = 0; i < length && at < ring->config.size; i++) {
        struct vring_packed_desc copy = {LOAD(region->entries[at].address), LOAD(region->entries[at].bytes),
                                         LOAD(region->entries[at].id), LOAD(region->entries[at].flags)};
        int r = add_descriptor(ring, ret, &copy);

        if (r < 0) {
            return r;
        }
        ret->id = copy.id;
        ret->descriptors++;
        at = ring->next_entry[at];
    }
    return 1;
}

static bool is_available(const struct ring *ring, uint16_t flags)
{
    bool available = flags & PACKED_AVAILABLE, used = flags & PACKED_USED;

    return available == ring->available_wrap && used != ring->available_wrap;
}

/* The chain was read whole: from now on it is in flight. */
static void record_chain(struct ring *ring, const struct ring_chain *chain)
{
    struct inflight_packed *region = region_of(ring);
    struct inflight_packed_entry *head = &region->entries[chain->entry];

    head->length = chain->descriptors;
    head->counter = ring->counter++;
    STORE(head->inflight, 1);
    STORE(region->free, ring->free_entry);
    STORE(region->old_free, ring->free_entry);
}

static int packed_pop(struct ring *ring, struct ring_chain *ret)
{
    uint16_t place = ring->next_available, free_entry = ring->free_entry;
    bool wrap = ring->available_wrap, first = true;
    struct vring_packed_desc copy;

    do {
        const struct vring_packed_desc *from = &ring->packed.descriptors[place];

        copy.flags = __atomic_load_n(&from->flags, __ATOMIC_ACQUIRE);
        if (first && !is_available(ring, copy.flags)) {
            return 0;
        }
        copy = (struct vring_packed_desc){LOAD(from->addr), LOAD(from->len), LOAD(from->id), copy.flags};
        if (ret->descriptors == ring->config.size) {
            return ring_break(ring, "a chain of descriptors that does not end");
        }
        if (region_of(ring)) {
            if (ring->free_entry >= ring->config.size) {
                return ring_break(ring, "more requests are available than the ring has room for");
            }
            ret->entry = first ? free_entry : ret->entry;
            record_descriptor(ring, ret, &copy);
        }
        int r = add_descriptor(ring, ret, &copy);
        if (r < 0) {
            return r;
        }
        ret->descriptors++;
        advance(ring, &place, &wrap, 1);
        first = false;
    } while (copy.flags & VRING_DESC_F_NEXT);
    ret->id = copy.id;
    if (region_of(ring)) {
        record_chain(ring, ret);
    }
    ring->next_available = place;
    ring->available_wrap = wrap;
    return 1;
}

static void packed_push(struct ring *ring, const struct ring_chain *chain, uint32_t written)
{
    struct inflight_packed *region = region_of(ring);
    struct vring_packed_desc *descriptor = &ring->packed.descriptors[ring->next_used];
    uint16_t flags = (ring->used_wrap ? PACKED_AVAILABLE | PACKED_USED : 0) | (written ? VRING_DESC_F_WRITE : 0);

    advance(ring, &ring->next_used, &ring->used_wrap, chain->descriptors);
    if (region) {
        uint16_t last = chain->entry;

        for (unsigned i = 1; i < chain->descriptors; i++) {
            last = ring->next_entry[last];
        }
        STORE(region->entries[last].next, ring->free_entry);
        ring->next_entry[last] = ring->free_entry;
        ring->free_entry = chain->entry;
        STORE(region->free, chain->entry);
        STORE(region->used_wrap, ring->used_wrap);
        STORE(region->used_index, ring->next_used);
    }
    descriptor->id = chain->id;
    descriptor->len = written;
    STORE(descriptor->flags, flags);
    if (region) {
        STORE(region->entries[chain->entry].inflight, 0);
        STORE(region->old_free, ring->free_entry);
        STORE(region->old_used_wrap, ring->used_wrap);
        STORE(region->old_used_index, ring->next_used);
    }
    ring->unsignalled += chain->descriptors;
}

/* --- who tells whom --- */

static bool packed_enable_kicks(struct ring *ring)
{
    if (ring->config.event_index) {
        STORE(ring->packed.device->off_wrap, (uint16_t)(ring->next_available | (ring->available_wrap ? WRAP_BIT : 0)));
        STORE(ring->packed.device->flags, VRING_PACKED_EVENT_FLAG_DESC);
    } else {
        STORE(ring->packed.device->flags, VRING_PACKED_EVENT_FLAG_ENABLE);
    }
    atomic_thread_fence(memory_order_seq_cst);
    return is_available(ring, LOAD(ring->packed.descriptors[ring->next_available].flags));
}

static void packed_disable_kicks(struct ring *ring)
{
    STORE(ring->packed.device->flags, VRING_PACKED_EVENT_FLAG_DISABLE);
}

static bool packed_wants_call(struct ring *ring, unsigned pushed)
{
    atomic_thread_fence(memory_order_seq_cst);
    uint16_t flags = __atomic_load_n(&ring->packed.driver->flags, __ATOMIC_ACQUIRE);

    if (flags != VRING_PACKED_EVENT_FLAG_DESC || !ring->config.event_index) {
        return flags != VRING_PACKED_EVENT_FLAG_DISABLE;
    }
    uint16_t event = LOAD(ring->packed.driver->off_wrap), place = event & ~WRAP_BIT;
    if (!!(event & WRAP_BIT) != ring->used_wrap) {
        place -= ring->config.size;
    }
    return ring_event_is_due(place, ring->next_used, (uint16_t)(ring->next_used - pushed));
}

const struct ring_ops ring_packed_ops = {
    .start = packed_start,
    .pop = packed_pop,
    .resubmit = packed_resubmit,
    .push = packed_push,
    .enable_kicks = packed_enable_kicks,
    .disable_kicks = packed_disable_kicks,
    .wants_call = packed_wants_call,
};

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Rings against a driver of our own (front_testing.h), without a device behind them: requests in any order, deaths of
 * the device at any moment, guests that lie. What the device sees is compared with what the driver did.
 */
#include "base/seeded.h"
#include "export/vhost_user/front_testing.h"
#include "export/vhost_user/ring.h"
#include "loop/shared_memory.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

#define SIZE 16

struct bench {
    struct front front;
    struct vhost_memory memory;
    struct ring *ring;
    struct ring_config config;
    void *region;
    struct ring_chain *chains[SIZE]; /* in flight, by slot */
    unsigned order[SIZE], in_flight; /* slots, the oldest first */
};

static void bench_start(struct bench *bench, const struct front_options *options)
{
    struct front_queue *queue = &bench->front.queue[0];

    memset(bench, 0, sizeof(*bench));
    front_prepare(&bench->front, options);
    size_t half = bench->front.memory_bytes / 2;
    for (unsigned i = 0; i < 2; i++) {
        struct vhost_region region = {FRONT_GUEST + i * half, half, (uintptr_t)bench->front.memory + i * half,
                                      i * half};
        g_assert_cmpint(vhost_memory_add(&bench->memory, &region, bench->front.memory_fd, NULL), ==, 0);
    }
    bench->region = options->inflight ? g_malloc0(ring_inflight_bytes(options->size)) : NULL;
    bench->config = (struct ring_config){.memory = &bench->memory,
                                         .packed = options->packed,
                                         .event_index = options->event_index,
                                         .indirect = options->indirect,
                                         .size = options->size,
                                         .descriptors = (uintptr_t)queue->descriptors,
                                         .available = (uintptr_t)queue->available,
                                         .used = (uintptr_t)queue->used,
                                         .base = options->packed ? 0x80008000u : 0,
                                         .inflight = bench->region};
    bench->ring = g_new(struct ring, 1);
    g_assert_cmpint(ring_start(bench->ring, &bench->config), ==, 0);
    for (unsigned i = 0; i < SIZE; i++) {
        bench->chains[i] = g_new(struct ring_chain, 1);
    }
}

static void bench_stop(struct bench *bench)
{
    ring_stop(bench->ring);
    g_free(bench->ring);
    for (unsigned i = 0; i < SIZE; i++) {
        g_free(bench->chains[i]);
    }
    g_free(bench->region);
    vhost_memory_clear(&bench->memory);
    front_finish(&bench->front);
}

static unsigned slot_of(const struct bench *bench, const struct ring_chain *chain)
{
    const struct front_options *options = &bench->front.options;

    return options->packed || options->indirect ? chain->id : chain->id / 3;
}

/* Takes the next request; its slot, or -1. */
static int bench_pop(struct bench *bench)
{
    g_autofree struct ring_chain *chain = g_new(struct ring_chain, 1);
    int r = ring_pop(bench->ring, chain);

    g_assert_cmpint(r, >=, 0);
    if (!r) {
        return -1;
    }
    unsigned slot = slot_of(bench, chain);
    g_assert_cmpuint(slot, <, bench->front.queue[0].slots);
    g_assert_cmpuint(chain->out_bytes, >=, sizeof(struct virtio_blk_outhdr));
    struct virtio_blk_outhdr header;
    memcpy(&header, chain->iov[0].iov_base, MIN(sizeof(header), chain->iov[0].iov_len));
    g_assert_cmpuint(header.sector, ==, slot + 1000);
    memcpy(bench->chains[slot], chain, sizeof(*chain));
    return (int)slot;
}

static void bench_take(struct bench *bench)
{
    int slot = bench_pop(bench);

    if (slot >= 0) {
        bench->order[bench->in_flight++] = (unsigned)slot;
    }
}

static void bench_give(struct bench *bench, unsigned which)
{
    unsigned slot = bench->order[which];

    ring_push(bench->ring, bench->chains[slot], slot + 1);
    bench->in_flight--;
    memmove(bench->order + which, bench->order + which + 1, (bench->in_flight - which) * sizeof(unsigned));
}

/* The device dies and another one takes over: what was in flight comes again, in order. */
static void bench_die(struct bench *bench)
{
    unsigned expected = bench->in_flight;
    unsigned order[SIZE];

    memcpy(order, bench->order, sizeof(order));
    ring_stop(bench->ring);
    memset(bench->ring, 0x55, sizeof(*bench->ring));
    bench->config.base = bench->config.packed ? 0x80008000u : bench->front.queue[0].used->idx;
    g_assert_cmpint(ring_start(bench->ring, &bench->config), ==, 0);
    g_assert_cmpuint(bench->ring->resubmit_count, ==, expected);
    for (unsigned i = 0; i < expected; i++) {
        g_assert_cmpint(bench_pop(bench), ==, order[i]);
    }
}

static void play(struct bench *bench, uint64_t *seed, unsigned steps)
{
    struct front_queue *queue = &bench->front.queue[0];
    unsigned submitted = 0, ended = 0;

    for (unsigned i = 0; i < steps || ended < submitted; i++) {
        unsigned what = (unsigned)(seeded_next(seed) % 16), slot = (unsigned)(seeded_next(seed) % queue->slots);

        if (what < 6 && i < steps && !queue->slot[slot].busy) {
            front_submit(queue, slot, what & 1 ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN, slot + 1000, 512 * (what % 3));
            submitted++;
        } else if (what < 10) {
            bench_take(bench);
        } else if (what < 14 && bench->in_flight) {
            bench_give(bench, (unsigned)(seeded_next(seed) % bench->in_flight));
        } else if (what == 14) {
            while (front_reap(queue) >= 0) {
                ended++;
            }
        } else if (what == 15 && bench->region) {
            bench_die(bench);
        }
    }
    g_assert_cmpint(bench_pop(bench), ==, -1);
    g_assert_cmpuint(submitted, >, steps / 16);
}

/* Each kind of ring by its bits. */
static struct front_options kind_of_ring(uint64_t bits, size_t buffer)
{
    return (struct front_options){.queues = 1,
                                  .size = SIZE,
                                  .buffer = buffer,
                                  .packed = bits & 1,
                                  .indirect = bits & 2,
                                  .inflight = bits & 4,
                                  .event_index = bits & 8};
}

static void test_order_and_deaths(void)
{
    for (unsigned kind = 0; kind < 8; kind++) {
        for (uint64_t seed = 1; seed <= 20; seed++) {
            struct front_options options = kind_of_ring(kind | (seed & 1) << 3, 1024);
            uint64_t state = seed * 8 + kind;
            struct bench bench;

            bench_start(&bench, &options);
            play(&bench, &state, 500);
            bench_stop(&bench);
        }
    }
}

/* Cut off in the middle of a push, at each store of it: it counts as done from the moment on when the guest saw it. */
static void test_death_in_a_push(void)
{
    for (unsigned packed = 0; packed < 2; packed++) {
        for (unsigned seen = 0; seen < 2; seen++) {
            struct front_options options = {
                .queues = 1, .size = SIZE, .buffer = 512, .packed = packed, .indirect = true, .inflight = true};
            struct bench bench;
            struct front_queue *queue = &bench.front.queue[0];

            bench_start(&bench, &options);
            for (unsigned slot = 0; slot < 3; slot++) {
                front_submit(queue, slot, VIRTIO_BLK_T_IN, slot + 1000, 512);
                bench_take(&bench);
            }
            g_autofree void *before = g_memdup2(bench.region, ring_inflight_bytes(SIZE));
            struct vring_packed_desc first = queue->packed[0];
            bench_give(&bench, 1);
            if (packed) { /* all but the last stores: the guest's descriptor is written before them */
                struct inflight_packed *region = bench.region, *was = before;
                region->entries[1].inflight = 1;
                region->old_free = was->old_free;
                region->old_used_index = was->old_used_index;
                region->old_used_wrap = was->old_used_wrap;
                if (!seen) {
                    queue->packed[0] = first;
                }
            } else {
                struct inflight_split *region = bench.region, *was = before;
                region->entries[1].inflight = 1;
                region->used_index = was->used_index;
                if (!seen) {
                    queue->used->idx = 0;
                }
            }
            if (!seen) {
                bench.order[0] = 0, bench.order[1] = 1, bench.order[2] = 2;
                bench.in_flight = 3;
            }
            bench_die(&bench);
            g_assert_cmpint(front_reap(queue), ==, seen ? 1 : -1);
            while (bench.in_flight) {
                bench_give(&bench, bench.in_flight - 1);
            }
            while (front_reap(queue) >= 0) {
            }
            for (unsigned slot = 0; slot < 3; slot++) {
                g_assert_false(queue->slot[slot].busy);
            }
            bench_stop(&bench);
        }
    }
}

/* Calls and kicks: wanted exactly when somebody waits for one. */
static void test_events(void)
{
    for (unsigned kind = 0; kind < 4; kind++) {
        struct front_options options = {
            .queues = 1, .size = SIZE, .buffer = 512, .packed = kind & 1, .event_index = kind & 2, .indirect = true};
        struct bench bench;
        struct front_queue *queue = &bench.front.queue[0];

        bench_start(&bench, &options);
        for (unsigned round = 0; round < 100; round++) {
            /* It waits for the next one: what front_wait() would say. */
            if (kind == 3) {
                queue->driver->off_wrap = (uint16_t)(queue->taken | queue->taken_wrap << 15);
                queue->driver->flags = VRING_PACKED_EVENT_FLAG_DESC;
            } else if (kind == 2) {
                queue->available->ring[SIZE] = queue->taken;
            }
            g_assert_false(ring_enable_kicks(bench.ring));
            front_submit(queue, 0, VIRTIO_BLK_T_IN, 1000, 512);
            front_kick(queue);
            g_assert_cmpuint(queue->kicks, ==, round + 1);
            ring_disable_kicks(bench.ring);
            bench_take(&bench);
            front_submit(queue, 1, VIRTIO_BLK_T_IN, 1001, 512);
            front_kick(queue);
            g_assert_cmpuint(queue->kicks, ==, round + 1);
            g_assert_true(ring_enable_kicks(bench.ring));
            bench_take(&bench);
            g_assert_false(ring_wants_call(bench.ring));
            bench_give(&bench, 0);
            bool first = ring_wants_call(bench.ring);
            g_assert_true(first || (kind & 2));
            bench_give(&bench, 0);
            g_assert_true(kind & 2 ? ring_wants_call(bench.ring) != first : ring_wants_call(bench.ring));
            g_assert_false(ring_wants_call(bench.ring));
            while (front_reap(queue) >= 0) {
            }
        }
        bench_stop(&bench);
    }
}

static void check_chain(const struct bench *bench, const struct ring_chain *chain)
{
    uint64_t bytes = 0;

    g_assert_cmpuint(chain->out + chain->in, <=, RING_IOV_MAX);
    for (unsigned i = 0; i < chain->out + chain->in; i++) {
        bool inside = false;
        for (unsigned m = 0; m < bench->memory.count; m++) {
            const struct shared_memory *memory = bench->memory.regions[m].memory;
            uint64_t offset = (uint64_t)((uint8_t *)chain->iov[i].iov_base - memory->bytes);
            inside |= offset < memory->size && chain->iov[i].iov_len <= memory->size - offset;
        }
        g_assert_true(inside && chain->iov[i].iov_len);
        bytes += chain->iov[i].iov_len;
    }
    g_assert_cmpuint(bytes, ==, chain->out_bytes + chain->in_bytes);
}

/* A guest, or a front end with the region, that writes anything anywhere. */
static void test_noise(void)
{
    unsigned broken = 0, taken = 0;

    for (uint64_t seed = 1; seed <= 4000; seed++) {
        struct front_options options = kind_of_ring(seed, 512);
        struct bench bench;
        struct front_queue *queue = &bench.front.queue[0];
        uint64_t state = seed;
        struct ring_chain *chain = NULL;

        bench_start(&bench, &options);
        chain = bench.chains[0];
        for (unsigned slot = 0; slot < queue->slots; slot++) {
            front_submit(queue, slot, VIRTIO_BLK_T_IN, slot + 1000, 512);
        }
        for (unsigned i = 0; i < 8; i++) {
            uint8_t *places[] = {(uint8_t *)queue->descriptors, (uint8_t *)queue->available,
                                 (uint8_t *)queue->slot[0].header, bench.region ? bench.region : queue->used};
            size_t sizes[] = {SIZE * 16, 4 + SIZE * 2, 256, 16 + SIZE * 16};
            unsigned which = (unsigned)(seeded_next(&state) % 4);

            places[which][seeded_next(&state) % sizes[which]] = (uint8_t)(seeded_next(&state) >> (seed & 16 ? 3 : 7));
            if (i == 3 && bench.region) {
                ring_stop(bench.ring);
                if (ring_start(bench.ring, &bench.config) < 0) {
                    break;
                }
            }
            int r = bench.ring->broken ? -EPROTO : ring_pop(bench.ring, chain);
            if (r > 0) {
                check_chain(&bench, chain);
                ring_push(bench.ring, chain, 1);
                ring_wants_call(bench.ring);
                taken++;
            }
            ring_enable_kicks(bench.ring);
        }
        broken += bench.ring->broken != NULL;
        bench_stop(&bench);
    }
    g_assert_cmpuint(broken, >, 100);
    g_assert_cmpuint(taken, >, 1000);
}

/* Each lie breaks the ring, with its own reason. */
struct lie {
    const char *reason;
    uint64_t address;
    uint32_t bytes;
    uint16_t flags, next;
    bool indirect;
};
static const struct lie lies[] = {
    {"a buffer is not in the guest's memory", 0, 512, 0, 0, false},
    {"a buffer is not in the guest's memory", FRONT_GUEST, UINT32_MAX, 0, 0, false},
    {"a buffer is not in the guest's memory", UINT64_MAX - 100, 512, 0, 0, false},
    {"a descriptor leads out of its table", FRONT_GUEST, 16, VRING_DESC_F_NEXT, SIZE, false},
    {"a chain of descriptors that is too long, or does not end", FRONT_GUEST, 16, VRING_DESC_F_NEXT, 0, false},
    {"an indirect table that was not negotiated", FRONT_GUEST, 16, VRING_DESC_F_INDIRECT, 0, false},
    {"an indirect table of an impossible size", FRONT_GUEST, 17, VRING_DESC_F_INDIRECT, 0, true},
    {"an indirect table of an impossible size", FRONT_GUEST, 0, VRING_DESC_F_INDIRECT, 0, true},
    {"an indirect table of an impossible size", FRONT_GUEST, 16 * (RING_CHAIN_MAX + 1), VRING_DESC_F_INDIRECT, 0, true},
    {"an indirect table is not in the guest's memory", 16, 16, VRING_DESC_F_INDIRECT, 0, true},
    {"an indirect table inside another, or in the middle of a chain", FRONT_GUEST, 16,
     VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT, 1, true},
};

static void test_lies(void)
{
    for (size_t i = 0; i < G_N_ELEMENTS(lies); i++) {
        struct front_options options = {.queues = 1, .size = SIZE, .buffer = 512, .indirect = lies[i].indirect};
        struct bench bench;
        struct front_queue *queue = &bench.front.queue[0];

        bench_start(&bench, &options);
        queue->descriptors[0] = (struct vring_desc){lies[i].address, lies[i].bytes, lies[i].flags, lies[i].next};
        queue->available->idx = 1;
        g_assert_cmpint(ring_pop(bench.ring, bench.chains[0]), ==, -EPROTO);
        g_assert_cmpstr(bench.ring->broken, ==, lies[i].reason);
        g_assert_cmpint(ring_pop(bench.ring, bench.chains[0]), ==, -EPROTO);
        ring_push(bench.ring, bench.chains[0], 1);
        g_assert_cmpuint(queue->used->idx, ==, 0);
        bench_stop(&bench);
    }
}

static void test_places(void)
{
    struct front_options options = {.queues = 1, .size = SIZE, .buffer = 512};
    struct bench bench;

    bench_start(&bench, &options);
    struct ring_config good = bench.config;
    const struct {
        unsigned size;
        uint64_t add;
        int result;
    } bad[] = {{0, 0, -EINVAL},
               {15, 0, -EINVAL},
               {2 * RING_SIZE_MAX, 0, -EINVAL},
               {16, 8, -EFAULT},
               {16, 1ULL << 60, -EFAULT}};
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        struct ring_config config = good;

        ring_stop(bench.ring);
        config.size = bad[i].size;
        config.descriptors += bad[i].add;
        g_assert_cmpint(ring_start(bench.ring, &config), ==, bad[i].result);
    }
    bench_stop(&bench);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/vhost-ring/order-and-deaths", test_order_and_deaths);
    g_test_add_func("/vhost-ring/death-in-a-push", test_death_in_a_push);
    g_test_add_func("/vhost-ring/events", test_events);
    g_test_add_func("/vhost-ring/noise", test_noise);
    g_test_add_func("/vhost-ring/lies", test_lies);
    g_test_add_func("/vhost-ring/places", test_places);
    return g_test_run();
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A whole export against a front end of our own on another thread: every kind of ring and request with data that are
 * verified, settings that change while requests run, messages that make no sense, front ends that come and go.
 */
#include "base/seeded.h"
#include "export/vhost_user/bed_testing.h"
#include "export/vhost_user/config.h"
#include <errno.h>
#include <glib.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

static const struct front_options plain = {.queues = 1, .size = 32, .buffer = 8192};

/* --- data --- */

static void fill(uint8_t *buffer, size_t bytes, uint64_t seed)
{
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t value = seeded_mix(seed + i);
        memcpy(buffer + i, &value, 8);
    }
}

/* Writes to places of its own, reads and compares, many at a time. */
static void exercise(struct front_queue *queue, uint64_t seed, unsigned requests)
{
    uint64_t written[64] = {0}; /* seed of what is at each place */
    unsigned places = 64, begun = 0, ended = 0;
    int place_of[64];
    bool busy[64] = {false};
    uint64_t first_sector = queue->index * 64 * 16;

    g_assert_cmpuint(queue->slots, <=, 64);
    while (ended < requests) {
        unsigned batch = 1 + (unsigned)(seeded_next(&seed) % 8);

        for (unsigned slot = 0; slot < queue->slots && begun < requests && batch; slot++) {
            unsigned place = (unsigned)(seeded_next(&seed) % places);

            if (queue->slot[slot].busy || busy[place]) {
                continue;
            }
            bool writes = !written[place] || seeded_next(&seed) % 2;
            busy[place] = true;
            place_of[slot] = writes ? (int)place : -1 - (int)place;
            if (writes) {
                written[place] = seeded_next(&seed) | 1;
                fill(queue->slot[slot].buffer, 8192, written[place]);
            }
            front_submit(queue, slot, writes ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN, first_sector + place * 16, 8192);
            begun++;
            batch--;
        }
        front_kick(queue);
        for (int slot = front_wait(queue); slot >= 0; slot = front_reap(queue), ended++) {
            int place = place_of[slot] < 0 ? -1 - place_of[slot] : place_of[slot];

            g_assert_cmpuint(*queue->slot[slot].status, ==, VIRTIO_BLK_S_OK);
            if (place_of[slot] < 0) {
                uint8_t expected[8192];

                fill(expected, sizeof(expected), written[place]);
                g_assert_cmpmem(queue->slot[slot].buffer, 8192, expected, 8192);
            }
            busy[place] = false;
        }
    }
}

static void data_client(void *argument)
{
    const struct front_options *options = argument;
    struct front front;

    front_init(&front, bed_connect("rw"), options);
    for (unsigned i = 0; i < options->queues; i++) {
        exercise(&front.queue[i], i + 1, 600);
        g_assert_cmpuint(front_run(&front.queue[i], VIRTIO_BLK_T_FLUSH, 0, 0), ==, VIRTIO_BLK_S_OK);
    }
    front_finish(&front);
}

static void test_data(void)
{
    for (unsigned kind = 0; kind < 16; kind++) {
        struct front_options options = {.queues = kind & 4 ? 2 : 1,
                                        .size = 64,
                                        .buffer = 8192,
                                        .packed = kind & 1,
                                        .indirect = kind & 2,
                                        .event_index = kind & 4,
                                        .inflight = kind & 8,
                                        .add_regions = kind & 8};
        bed_run(data_client, &options, kind & 2);
    }
}

/* --- the other requests, and their statuses --- */

static void requests_client(void *argument)
{
    struct front front;
    struct front_queue *queue = &front.queue[0];
    struct front_slot *slot;
    uint64_t end = BED_SIZE / 512;

    front_init(&front, bed_connect("rw"), &plain);
    slot = &queue->slot[0];
    g_assert_cmpuint(front.config.capacity, ==, end);
    g_assert_cmpuint(front.config.blk_size, ==, 512);
    g_assert_cmpuint(front.config.wce, ==, 1);
    g_assert_cmpuint(front.config.num_queues, ==, 4);
    g_assert_cmpuint(front.config.seg_max, ==, VHOST_SEGMENTS_MAX);
    g_assert_cmpuint(front_run(queue, VIRTIO_BLK_T_GET_ID, 0, 20), ==, VIRTIO_BLK_S_OK);
    g_assert_cmpstr((char *)slot->buffer, ==, "rw");
    g_assert_cmpuint(front_run(queue, VIRTIO_BLK_T_IN, end - 1, 512), ==, VIRTIO_BLK_S_OK);
    g_assert_cmpuint(front_run(queue, VIRTIO_BLK_T_IN, end, 512), ==, VIRTIO_BLK_S_IOERR);
    g_assert_cmpuint(front_run(queue, VIRTIO_BLK_T_IN, end - 1, 1024), ==, VIRTIO_BLK_S_IOERR);
    g_assert_cmpuint(front_run(queue, VIRTIO_BLK_T_IN, UINT64_MAX, 512), ==, VIRTIO_BLK_S_IOERR);
    g_assert_cmpuint(front_run(queue, VIRTIO_BLK_T_OUT, UINT64_MAX / 512, 512), ==, VIRTIO_BLK_S_IOERR);
    g_assert_cmpuint(front_run(queue, VIRTIO_BLK_T_IN, 0, 100), ==, VIRTIO_BLK_S_IOERR);
    g_assert_cmpuint(front_run(queue, VIRTIO_BLK_T_OUT, 0, 513), ==, VIRTIO_BLK_S_IOERR);
    g_assert_cmpuint(front_run(queue, VIRTIO_BLK_T_IN, 0, 0), ==, VIRTIO_BLK_S_OK);
    g_assert_cmpuint(front_run(queue, VIRTIO_BLK_T_SCSI_CMD, 0, 512), ==, VIRTIO_BLK_S_UNSUPP);
    g_assert_cmpuint(front_run(queue, 12345, 0, 0), ==, VIRTIO_BLK_S_UNSUPP);

    struct virtio_blk_discard_write_zeroes *range = (void *)slot->buffer;
    static const struct {
        uint32_t type, bytes;
        uint64_t sector;
        uint32_t count, flags;
        unsigned status;
    } ranges[] = {
        {VIRTIO_BLK_T_WRITE_ZEROES, 16, 8, 8, 0, VIRTIO_BLK_S_OK},
        {VIRTIO_BLK_T_WRITE_ZEROES, 16, 24, 8, 1, VIRTIO_BLK_S_OK},
        {VIRTIO_BLK_T_DISCARD, 16, 40, 8, 0, VIRTIO_BLK_S_OK},
        {VIRTIO_BLK_T_DISCARD, 16, 40, 8, 1, VIRTIO_BLK_S_UNSUPP},
        {VIRTIO_BLK_T_WRITE_ZEROES, 16, 0, 8, 2, VIRTIO_BLK_S_UNSUPP},
        {VIRTIO_BLK_T_WRITE_ZEROES, 16, BED_SIZE / 512 - 7, 8, 0, VIRTIO_BLK_S_IOERR},
        {VIRTIO_BLK_T_WRITE_ZEROES, 16, 0, UINT32_MAX, 0, VIRTIO_BLK_S_IOERR},
        {VIRTIO_BLK_T_WRITE_ZEROES, 15, 0, 8, 0, VIRTIO_BLK_S_IOERR},
        {VIRTIO_BLK_T_WRITE_ZEROES, 0, 0, 8, 0, VIRTIO_BLK_S_IOERR},
        {VIRTIO_BLK_T_DISCARD, 16 * (VHOST_RANGES_MAX + 1), 0, 0, 0, VIRTIO_BLK_S_IOERR},
    };
    memset(slot->buffer, 0xaa, 8192);
    for (unsigned at = 0; at < 64; at += 16) {
        g_assert_cmpuint(front_run(queue, VIRTIO_BLK_T_OUT, at, 8192), ==, VIRTIO_BLK_S_OK);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(ranges); i++) {
        memset(slot->buffer, 0, 8192);
        *range = (struct virtio_blk_discard_write_zeroes){ranges[i].sector, ranges[i].count, ranges[i].flags};
        g_assert_cmpuint(front_run(queue, ranges[i].type, 0, ranges[i].bytes), ==, ranges[i].status);
    }
    for (uint64_t at = 0; at < 64; at += 8) {
        g_assert_cmpuint(front_run(queue, VIRTIO_BLK_T_IN, at, 4096), ==, VIRTIO_BLK_S_OK);
        if (at != 40) { /* what was discarded may read as anything */
            g_assert_cmpuint(slot->buffer[4095], ==, at == 8 || at == 24 ? 0 : 0xaa);
        }
    }
    front_finish(&front);

    front_init(&front, bed_connect("ro"), &plain);
    g_assert_true(front.offered >> VIRTIO_BLK_F_RO & 1);
    g_assert_false(front.offered >> VIRTIO_BLK_F_DISCARD & 1);
    g_assert_cmpuint(front_run(&front.queue[0], VIRTIO_BLK_T_IN, 0, 4096), ==, VIRTIO_BLK_S_OK);
    g_assert_cmpuint(front_run(&front.queue[0], VIRTIO_BLK_T_OUT, 0, 4096), ==, VIRTIO_BLK_S_IOERR);
    memset(front.queue[0].slot[0].buffer, 0, 16);
    g_assert_cmpuint(front_run(&front.queue[0], VIRTIO_BLK_T_WRITE_ZEROES, 0, 16), ==, VIRTIO_BLK_S_IOERR);
    g_assert_cmpuint(front.config.blk_size, ==, 4096);
    g_assert_cmpuint(front_run(&front.queue[0], VIRTIO_BLK_T_IN, 1, 4096), ==, VIRTIO_BLK_S_IOERR);
    g_assert_cmpuint(front_run(&front.queue[0], VIRTIO_BLK_T_IN, 8, 512), ==, VIRTIO_BLK_S_IOERR);
    front_finish(&front);
}

static void test_requests(void)
{
    bed_run(requests_client, NULL, false);
}

/* --- settings that change --- */

static void changes_client(void *argument)
{
    struct front_options options = plain;
    struct front front;
    struct front_queue *queue = &front.queue[0];
    uint64_t index = 0, count;

    options.queues = 2;
    options.packed = argument != NULL;
    options.inflight = argument != NULL;
    front_init(&front, bed_connect("rw"), &options);
    for (unsigned round = 0; round < 20; round++) {
        exercise(queue, round, 20);
        switch (round % 5) {
        case 0: { /* stopped and started again */
            uint32_t base = front_stop(queue);
            g_assert_cmpuint(base & 0x7fff, ==, options.packed ? queue->taken : queue->taken & 0x7fff);
            front_start(queue, base);
            break;
        }
        case 1: { /* another event for calls */
            int call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
            g_assert_true(front_tell(&front, VHOST_SET_VRING_CALL, &index, sizeof(index), &call, 1));
            g_assert_cmpint(read(call, &count, sizeof(count)), ==, sizeof(count));
            close(queue->call);
            queue->call = call;
            break;
        }
        case 2: { /* off and on */
            struct vhost_vring_number off = {0, 0}, on = {0, 1};
            g_assert_true(front_tell(&front, VHOST_SET_VRING_ENABLE, &off, sizeof(off), NULL, 0));
            (void)!read(queue->call, &count, sizeof(count));
            front_submit(queue, 0, VIRTIO_BLK_T_IN, 0, 512);
            front_kick(queue);
            struct pollfd call = {.fd = queue->call, .events = POLLIN};
            g_assert_cmpint(poll(&call, 1, 20), ==, 0);
            g_assert_cmpint(front_reap(queue), ==, -1);
            g_assert_true(front_tell(&front, VHOST_SET_VRING_ENABLE, &on, sizeof(on), NULL, 0));
            g_assert_cmpint(front_wait(queue), ==, 0);
            break;
        }
        case 3: { /* memory comes and goes while the queue runs */
            int fd = memfd_create("more", MFD_CLOEXEC);
            struct vhost_single_region more = {0, {1 << 20, 8192, 4096, 4096}};
            g_assert_cmpint(ftruncate(fd, 16384), ==, 0);
            g_assert_true(front_tell(&front, VHOST_ADD_MEM_REG, &more, sizeof(more), &fd, 1));
            g_assert_false(front_tell(&front, VHOST_ADD_MEM_REG, &more, sizeof(more), &fd, 1));
            more.region.offset = 99;
            g_assert_true(front_tell(&front, VHOST_REM_MEM_REG, &more, sizeof(more), NULL, 0));
            g_assert_false(front_tell(&front, VHOST_REM_MEM_REG, &more, sizeof(more), NULL, 0));
            close(fd);
            break;
        }
        default: { /* write-through and back */
            struct vhost_config_message wce = {32, 1, 0, {round % 2}};
            g_assert_true(front_tell(&front, VHOST_SET_CONFIG, &wce, VHOST_CONFIG_HEAD + 1, NULL, 0));
            wce.offset = 0;
            g_assert_false(front_tell(&front, VHOST_SET_CONFIG, &wce, VHOST_CONFIG_HEAD + 1, NULL, 0));
            break;
        }
        }
    }
    bed_resize(BED_SIZE * 2);
    struct vhost_header change;
    g_assert_cmpint(read(front.channel, &change, sizeof(change)), ==, sizeof(change));
    g_assert_cmpuint(change.request, ==, VHOST_BACKEND_CONFIG_CHANGE);
    struct vhost_config_message config = {.bytes = 8};
    front_send(&front, VHOST_GET_CONFIG, 0, &config, VHOST_CONFIG_HEAD + 8, NULL, 0);
    g_assert_true(front_reply(&front, VHOST_GET_CONFIG, &config, sizeof(config), NULL));
    memcpy(&count, config.payload, 8);
    g_assert_cmpuint(count, ==, BED_SIZE * 2 / 512);
    g_assert_cmpuint(front_run(queue, VIRTIO_BLK_T_IN, BED_SIZE / 512, 512), ==, VIRTIO_BLK_S_OK);
    /* Reset: nothing runs any more, and all of it can be set up again. */
    uint64_t none = 0;
    g_assert_true(front_tell(&front, VHOST_SET_STATUS, &none, sizeof(none), NULL, 0));
    g_assert_true(front_tell(&front, VHOST_RESET_DEVICE, NULL, 0, NULL, 0));
    front_submit(queue, 0, VIRTIO_BLK_T_IN, 0, 512);
    g_assert_cmpuint(front_ask(&front, VHOST_GET_STATUS), ==, 0);
    g_assert_cmpint(front_reap(queue), ==, -1);
    front_finish(&front);
}

static void test_changes(void)
{
    bed_run(changes_client, NULL, false);
    bed_run(changes_client, (void *)&plain, true);
}

/* --- lies --- */

struct lie {
    uint32_t request;
    uint32_t bytes;
    unsigned fds;
    union vhost_payload payload;
};
static const struct lie lies[] = {
    {VHOST_SET_FEATURES, 8, 0, {.number = 1ULL << 63}},
    {VHOST_SET_FEATURES, 4, 0, {.number = 0}},
    {VHOST_SET_PROTOCOL_FEATURES, 8, 0, {.number = 2}},
    {VHOST_SET_VRING_NUM, 8, 0, {.vring = {4, 16}}},
    {VHOST_SET_VRING_NUM, 8, 0, {.vring = {UINT32_MAX, 16}}},
    {VHOST_SET_VRING_NUM, 8, 0, {.vring = {0, 0}}},
    {VHOST_SET_VRING_NUM, 8, 0, {.vring = {0, 65536}}},
    {VHOST_SET_VRING_ADDR, 40, 0, {.addresses = {.index = 99}}},
    {VHOST_SET_VRING_ADDR, 40, 0, {.addresses = {.flags = 1}}},
    {VHOST_SET_VRING_KICK, 8, 1, {.number = 4}},
    {VHOST_SET_VRING_KICK, 8, 0, {.number = 0}},
    {VHOST_SET_VRING_KICK, 8, 2, {.number = 0}},
    {VHOST_SET_VRING_KICK, 8, 1, {.number = 0}}, /* it is no eventfd */
    {VHOST_SET_VRING_KICK, 8, 0, {.number = VHOST_VRING_NO_FD}},
    {VHOST_SET_VRING_CALL, 8, 1, {.number = 0x1000}},
    {VHOST_SET_VRING_ENABLE, 8, 0, {.vring = {0, 2}}},
    {VHOST_SET_BACKEND_REQ_FD, 0, 0, {0}},
    {VHOST_SET_BACKEND_REQ_FD, 0, 1, {0}}, /* it is no socket */
    {VHOST_SET_MEM_TABLE, 40, 0, {.table = {.count = 1}}},
    {VHOST_SET_MEM_TABLE, 40, 1, {.table = {.count = 9}}},
    {VHOST_SET_MEM_TABLE, 8, 1, {.table = {.count = 1}}},
    {VHOST_SET_MEM_TABLE, 40, 1, {.table = {.count = 1, .regions = {{0, 0, 0, 0}}}}},
    {VHOST_SET_MEM_TABLE, 40, 1, {.table = {.count = 1, .regions = {{0, 1 << 20, 0, 0}}}}},
    {VHOST_SET_MEM_TABLE, 40, 1, {.table = {.count = 1, .regions = {{UINT64_MAX, 4096, 0, 0}}}}},
    {VHOST_SET_MEM_TABLE, 40, 1, {.table = {.count = 1, .regions = {{0, 4096, 0, UINT64_MAX}}}}},
    {VHOST_SET_MEM_TABLE, 72, 2, {.table = {.count = 2, .regions = {{0, 4096, 0, 0}, {4095, 4096, 1 << 20, 0}}}}},
    {VHOST_SET_MEM_TABLE, 72, 2, {.table = {.count = 2, .regions = {{0, 4096, 0, 0}, {1 << 20, 4096, 1, 0}}}}},
    {VHOST_ADD_MEM_REG, 40, 0, {.region = {0, {0, 4096, 0, 0}}}},
    {VHOST_REM_MEM_REG, 40, 0, {.region = {0, {0, 4096, 0, 0}}}},
    {VHOST_SET_INFLIGHT_FD, 20, 1, {.inflight = {64, 0, 1, 32}}},
    {VHOST_SET_INFLIGHT_FD, 20, 1, {.inflight = {1 << 20, 0, 1, 32}}},
    {VHOST_SET_INFLIGHT_FD, 20, 1, {.inflight = {1 << 20, 0, 999, 32}}},
    {VHOST_SET_INFLIGHT_FD, 20, 0, {.inflight = {1 << 20, 0, 1, 32}}},
    {VHOST_SET_CONFIG, 12, 0, {.config = {0, 256, 0, {0}}}},
    {VHOST_SET_CONFIG, 13, 0, {.config = {UINT32_MAX, 1, 0, {0}}}},
    {VHOST_SET_STATUS, 8, 0, {.number = 256}},
    {6 /* SET_LOG_BASE */, 16, 1, {.number = 0}},
    {0, 0, 0, {0}},
    {999, 0, 0, {0}},
};

static void lies_client(void *argument)
{
    struct front front;
    int fds[2] = {memfd_create("lie", MFD_CLOEXEC), memfd_create("lie", MFD_CLOEXEC)};

    g_assert_cmpint(ftruncate(fds[0], 8192) | ftruncate(fds[1], 8192), ==, 0);
    front_init(&front, bed_connect("rw"), &plain);
    for (size_t i = 0; i < G_N_ELEMENTS(lies); i++) {
        if (!(lies[i].request >= VHOST_REQUEST_COUNT || lies[i].request == 0 || lies[i].request == 6)) {
            g_test_message("lie %zu", i);
            g_assert_false(front_tell(&front, lies[i].request, &lies[i].payload, lies[i].bytes, fds, lies[i].fds));
        }
        g_assert_cmpuint(front_run(&front.queue[0], VIRTIO_BLK_T_IN, 0, 512), ==, VIRTIO_BLK_S_OK);
    }
    struct vhost_config_message config = {.offset = 250, .bytes = 7};
    front_send(&front, VHOST_GET_CONFIG, 0, &config, VHOST_CONFIG_HEAD + 7, NULL, 0);
    g_assert_true(front_reply(&front, VHOST_GET_CONFIG, &config, sizeof(config), NULL));
    g_assert_cmpuint(config.bytes, ==, 0);
    front_finish(&front);
    /* Who does not want an answer is sent away. */
    for (size_t i = 0; i < G_N_ELEMENTS(lies); i++) {
        uint64_t answer;

        front_init(&front, bed_connect("rw"), &plain);
        front_send(&front, lies[i].request, 0, &lies[i].payload, lies[i].bytes, fds, lies[i].fds);
        g_assert_false(front_reply(&front, lies[i].request, &answer, sizeof(answer), NULL));
        front_finish(&front);
    }
    close(fds[0]);
    close(fds[1]);
}

static void test_lies(void)
{
    bed_run(lies_client, NULL, false);
}

/* A queue that is broken is told of, and works again after it was stopped and started. */
static void broken_client(void *argument)
{
    struct front_options options = plain;
    struct front front;
    struct front_queue *queue = &front.queue[0];
    uint64_t count;

    options.packed = argument != NULL;
    for (unsigned how = 0; how < 3; how++) {
        front_init(&front, bed_connect("rw"), &options);
        front_run(queue, VIRTIO_BLK_T_IN, 0, 512);
        (void)!read(queue->error, &count, sizeof(count));
        front_submit(queue, 0, VIRTIO_BLK_T_IN, 0, 512);
        if (how == 0) {
            queue->packed[options.packed ? 3 : 0].addr = 1; /* the header is nowhere */
        } else if (how == 1) {
            queue->packed[options.packed ? 3 : 0].len = 15; /* it is too short */
        } else {
            g_assert_cmpint(ftruncate(front.memory_fd, 0), ==, 0); /* all memory is taken away */
        }
        uint64_t one = 1;
        g_assert_cmpint(write(queue->kick, &one, sizeof(one)), ==, sizeof(one));
        struct pollfd error = {.fd = queue->error, .events = POLLIN};
        g_assert_cmpint(poll(&error, 1, 10000), ==, 1);
        g_assert_cmpuint(front_ask(&front, VHOST_GET_STATUS), ==, VIRTIO_CONFIG_S_NEEDS_RESET);
        front_stop(queue);
        if (how < 2 && !options.packed) {
            queue->next = queue->taken = 0;
            queue->available->idx = queue->used->idx = 0;
            queue->slot[0].busy = false;
            front_start(queue, 0);
            exercise(queue, how, 20);
            g_assert_cmpuint(front_ask(&front, VHOST_GET_STATUS), ==, 0);
        }
        front_finish(&front);
    }
}

static void test_broken(void)
{
    bed_run(broken_client, NULL, true);
    bed_run(broken_client, (void *)&plain, true);
}

/* Front ends that leave in the middle of everything, and one that waits for its turn meanwhile. */
static void leaving_client(void *argument)
{
    for (unsigned round = 0; round < 30; round++) {
        struct front_options options = plain;
        struct front front;

        options.packed = round & 1;
        options.indirect = round & 2;
        options.inflight = round & 4;
        front_init(&front, bed_connect("rw"), &options);
        int waiting = bed_connect("rw");
        for (unsigned slot = 0; slot < front.queue[0].slots; slot++) {
            front_submit(&front.queue[0], slot, VIRTIO_BLK_T_OUT, slot * 16, 8192);
        }
        front_kick(&front.queue[0]);
        front_finish(&front);
        close(waiting);
    }
}

static void test_leaving(void)
{
    bed_run(leaving_client, NULL, true);
}

/* With a record, requests that were in flight when the connection broke are answered on the next one. */
static void record_client(void *argument)
{
    for (unsigned kind = 0; kind < 4; kind++) {
        struct front_options options = {
            .queues = 2, .size = 64, .buffer = 8192, .packed = kind & 1, .indirect = kind & 2, .inflight = true};
        struct front front;

        front_init(&front, bed_connect("rw"), &options);
        for (unsigned round = 0; round < 10; round++) {
            exercise(&front.queue[0], round, 50);
            for (unsigned slot = 0; slot < front.queue[1].slots; slot++) {
                front_submit(&front.queue[1], slot, VIRTIO_BLK_T_IN, slot * 16, 8192);
            }
            front_kick(&front.queue[1]);
            struct vhost_config_message wce = {32, 1, 0, {round % 3 == 0}};
            g_assert_true(front_tell(&front, VHOST_SET_CONFIG, &wce, VHOST_CONFIG_HEAD + 1, NULL, 0));
            front_reconnect(&front, bed_connect("rw"));
            front_send(&front, VHOST_GET_CONFIG, 0, &wce, VHOST_CONFIG_HEAD + 1, NULL, 0);
            g_assert_true(front_reply(&front, VHOST_GET_CONFIG, &wce, sizeof(wce), NULL));
            g_assert_cmpuint(wce.payload[0], ==, round % 3 == 0);
            for (unsigned slot = 0; slot < front.queue[1].slots; slot++) {
                g_assert_cmpint(front_wait(&front.queue[1]), >=, 0);
            }
        }
        front_finish(&front);
    }
}

static void test_record(void)
{
    bed_run(record_client, NULL, true);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/vhost-session/data", test_data);
    g_test_add_func("/vhost-session/requests", test_requests);
    g_test_add_func("/vhost-session/changes", test_changes);
    g_test_add_func("/vhost-session/lies", test_lies);
    g_test_add_func("/vhost-session/broken", test_broken);
    g_test_add_func("/vhost-session/leaving", test_leaving);
    g_test_add_func("/vhost-session/record", test_record);
    return g_test_run();
}

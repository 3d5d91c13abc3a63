/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fuzzes rings: the input is what a hostile guest and front end have written to the shared memory (rings, tables, the
 * record of what is in flight) and, between the device's steps, go on writing. The first bytes choose the layout. What
 * the device takes must lie in the memory.
 */
#include "export/vhost_user/ring.h"
#include "loop/shared_memory.h"
#include <glib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MEMORY 65536
#define GUEST UINT64_C(0x10000)
#define USER UINT64_C(0x7f0000000000)
#define RING_SIZE 16

static struct shared_memory *pages;
static struct vhost_memory memory;

static void check(const struct ring_chain *chain)
{
    for (unsigned i = 0; i < chain->out + chain->in; i++) {
        bool inside = false;

        for (unsigned m = 0; m < memory.count; m++) {
            const struct shared_memory *mapped = memory.regions[m].memory;
            uint64_t offset = (uint64_t)((uint8_t *)chain->iov[i].iov_base - mapped->bytes);

            inside |= offset < mapped->size && chain->iov[i].iov_len <= mapped->size - offset;
        }
        g_assert_true(inside && chain->iov[i].iov_len);
        memset(chain->iov[i].iov_base, 1, MIN(chain->iov[i].iov_len, 16)); /* as a read would */
    }
}

static void memory_start(void)
{
    int fd;

    g_assert_cmpint(shared_memory_create("fuzz", MEMORY, &pages, &fd, NULL), ==, 0);
    for (uint64_t half = 0; half < 2; half++) {
        struct vhost_region region = {GUEST + half * MEMORY / 2, MEMORY / 2, USER + half * MEMORY / 2,
                                      half * MEMORY / 2};
        g_assert_cmpint(vhost_memory_add(&memory, &region, fd, NULL), ==, 0);
    }
    close(fd);
}

/* The next bytes of the input to where they want to go, as (place, count, bytes). */
static size_t scribble(const uint8_t *data, size_t size)
{
    if (size < 3) {
        return size;
    }
    size_t place = ((size_t)data[0] << 8 | data[1]) % MEMORY, count = MIN(MIN(data[2], size - 3), MEMORY - place);

    memcpy(pages->bytes + place, data + 3, count);
    return 3 + count;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct ring ring;
    static struct ring_chain chains[4];
    unsigned taken = 0;

    if (!pages) {
        memory_start();
    }
    if (size < 8) {
        return 0;
    }
    memset(pages->bytes, 0, MEMORY);
    struct ring_config config = {.memory = &memory,
                                 .packed = data[0] & 1,
                                 .event_index = data[0] & 2,
                                 .indirect = data[0] & 4,
                                 .size = data[0] & 16 ? data[1] : RING_SIZE,
                                 .descriptors = USER,
                                 .available = USER + 4096,
                                 .used = USER + 8192,
                                 .base = (uint32_t)data[2] << 24 | (uint32_t)data[3] << 16 | (uint32_t)data[4] << 8 |
                                         data[5],
                                 .inflight = data[0] & 8 ? pages->bytes + 12288 : NULL};
    size_t at = 6;
    at += scribble(data + at, size - at);
    at += scribble(data + at, size - at);
    if (ring_start(&ring, &config) < 0) {
        return 0;
    }
    for (unsigned steps = 0; steps < 64; steps++) {
        if (taken < G_N_ELEMENTS(chains) && ring_pop(&ring, &chains[taken]) > 0) {
            check(&chains[taken++]);
        } else if (taken) {
            ring_push(&ring, &chains[--taken], 1);
        }
        ring_wants_call(&ring);
        ring_enable_kicks(&ring);
        at += scribble(data + at, size - at);
    }
    ring_base(&ring);
    ring_stop(&ring);
    return 0;
}

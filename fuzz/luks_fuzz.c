/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * LUKS1 headers: bytes are the beginning of a volume. What is accepted must come back the same from building it, and
 * its slots are erased, over a memory that says when anything outside of the volume is touched. Nothing is unlocked:
 * how long that takes is up to the header.
 */
#include "crypto/luks.h"
#include "loop/loop.h"
#include <glib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { VOLUME = 2 << 20 };
static uint8_t volume[VOLUME];

static int coroutine_fn volume_read(void *argument, uint64_t offset, void *to, size_t bytes)
{
    g_assert(offset <= VOLUME && bytes <= VOLUME - offset);
    memcpy(to, volume + offset, bytes);
    return 0;
}

static int coroutine_fn volume_write(void *argument, uint64_t offset, const void *from, size_t bytes)
{
    g_assert(offset <= VOLUME && bytes <= VOLUME - offset);
    memcpy(volume + offset, from, bytes);
    return 0;
}

static int coroutine_fn volume_flush(void *argument)
{
    return 0;
}

static void coroutine_fn try_volume(void *argument)
{
    const struct luks_io io = {volume_read, volume_write, volume_flush, NULL, VOLUME};
    struct luks_header header, again;
    uint8_t built[LUKS_HEADER_BYTES];
    if (luks_read(&io, &header, NULL) < 0) {
        return;
    }
    luks_build(&header, built);
    int code = luks_parse(built, &again, NULL);
    g_assert(code == 0 && again.key_bytes == header.key_bytes && again.payload_offset == header.payload_offset &&
             !memcmp(again.slots, header.slots, sizeof(header.slots)) && !strcmp(again.uuid, header.uuid));
    for (unsigned slot = 0; slot < LUKS_SLOTS; slot++) {
        if (luks_slot_erase(&io, &header, slot, NULL) == 0) {
            g_assert(!header.slots[slot].active);
            code = luks_read(&io, &again, NULL);
            g_assert(code == 0 && !again.slots[slot].active);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct loop *loop;
    if (!loop) {
        int code = loop_create(ENGINE_EPOLL, &loop, NULL);
        g_assert(code == 0);
    }
    size = MIN(size, VOLUME);
    memset(volume, 0, 4096);
    memcpy(volume, data, size);
    loop_run_coroutine(loop, try_volume, NULL);
    return 0;
}

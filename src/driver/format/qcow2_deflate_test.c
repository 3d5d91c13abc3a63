/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The deflate compressor, by another's decompressor that has the least window (4 KiB) and is given little room at a
 * time, so that it needs that window: data of many kinds and lengths; distributions that want codes longer than there
 * are; packers that are used again and again; too little room.
 */
#include "base/seeded.h"
#include "driver/format/qcow2_deflate.h"
#include <glib.h>
#include <string.h>
#include <zlib.h>

enum { MAX = 2 << 20 };

static void unpack_and_compare(const uint8_t *packed, size_t packed_bytes, const uint8_t *data, size_t bytes)
{
    uint8_t some[1000];
    z_stream stream = {.next_in = (uint8_t *)packed, .avail_in = packed_bytes};
    g_assert_cmpint(inflateInit2(&stream, -12), ==, Z_OK);
    size_t done = 0;
    int code = Z_OK;
    while (code == Z_OK) {
        stream.next_out = some;
        stream.avail_out = sizeof(some);
        code = inflate(&stream, Z_SYNC_FLUSH);
        if (code != Z_OK && code != Z_STREAM_END) {
            g_error("after %zu bytes: %d, %s", done, code, stream.msg ? stream.msg : "");
        }
        size_t got = sizeof(some) - stream.avail_out;
        g_assert_cmpuint(done + got, <=, bytes);
        g_assert_cmpmem(some, got, data + done, got);
        done += got;
    }
    g_assert_cmpuint(done, ==, bytes);
    g_assert_cmpuint(stream.avail_in, ==, 0);
    inflateEnd(&stream);
}

/* Returns the packed length. */
static size_t round_trip(struct qcow2_deflate *deflate, const uint8_t *data, size_t bytes, uint8_t *to)
{
    size_t room = bytes + bytes / 8 + 100;
    memset(to + room, 0xa5, 64);
    size_t packed = qcow2_deflate_pack(deflate, data, bytes, to, room);
    g_assert_cmpuint(packed, >, 0);
    g_assert_cmpuint(packed, <=, room);
    for (unsigned i = 0; i < 64; i++) {
        g_assert_cmpint(to[room + i], ==, 0xa5);
    }
    unpack_and_compare(to, packed, data, bytes);
    return packed;
}

static void fill(uint64_t *random, uint8_t *to, size_t bytes, unsigned kind)
{
    for (size_t i = 0; i < bytes; i++) {
        uint64_t next = seeded_next(random);
        switch (kind) {
        case 0: /* noise */
            to[i] = next;
            break;
        case 1: /* one value */
            to[i] = 7;
            break;
        case 2: /* copies from near and far */
            if (i > 10 && next % 8 == 0) {
                size_t back = 1 + next / 8 % MIN(i, 20000), length = 3 + next / (1 << 20) % 400;
                for (; length && i < bytes; length--, i++) {
                    to[i] = to[i - back];
                }
                i--;
            } else {
                to[i] = next >> 32 & 15;
            }
            break;
        case 3: /* each value half as often as the one before: long codes */
            to[i] = __builtin_ctzll(next | UINT64_C(1) << 60);
            break;
        case 4: /* as far away as a match may be, and one byte further */
            to[i] = i >= 4097 && next % 100 ? to[i - (i / 5000 % 2 ? 4096 : 4097)] : next;
            break;
        default: /* words */
            to[i] = " etaoinshrdlu"[next % 13];
            break;
        }
    }
}

static void test_round_trips(void)
{
    static const size_t sizes[] = {1, 2, 3, 4, 5, 100, 512, 4096, 4097, 65536, 200000};
    g_autofree uint8_t *data = g_malloc(MAX);
    g_autofree uint8_t *to = g_malloc(MAX + MAX / 4);
    struct qcow2_deflate *deflate = qcow2_deflate_create();
    uint64_t random = 1;
    for (unsigned kind = 0; kind < 6; kind++) {
        for (unsigned i = 0; i < G_N_ELEMENTS(sizes); i++) {
            fill(&random, data, sizes[i], kind);
            size_t packed = round_trip(deflate, data, sizes[i], to);
            if (sizes[i] >= 65536 && kind) {
                g_assert_cmpuint(packed, <, sizes[i]);
            }
            /* The same again has nothing to do with the first time. */
            g_assert_cmpuint(round_trip(deflate, data, sizes[i], to), ==, packed);
        }
    }
    fill(&random, data, MAX, 2);
    round_trip(deflate, data, MAX, to);
    qcow2_deflate_destroy(deflate);
}

/* Uses like the Fibonacci numbers make the longest codes there can be. */
static void test_long_codes(void)
{
    g_autofree uint8_t *data = g_malloc(MAX);
    g_autofree uint8_t *to = g_malloc(MAX + MAX / 4);
    struct qcow2_deflate *deflate = qcow2_deflate_create();
    uint64_t random = 5;
    size_t bytes = 0;
    for (size_t value = 0, a = 1, b = 1; value < 20; value++) {
        for (size_t i = 0; i < a; i++) {
            data[bytes++] = value * 11;
        }
        size_t next = a + b;
        a = b;
        b = next;
    }
    for (size_t i = bytes; i-- > 1;) { /* mixed, so that they stay literals mostly */
        size_t other = seeded_next(&random) % (i + 1);
        uint8_t value = data[i];
        data[i] = data[other];
        data[other] = value;
    }
    round_trip(deflate, data, bytes, to);
    qcow2_deflate_destroy(deflate);
}

static void test_no_room(void)
{
    uint8_t data[4096], to[4096 + 64];
    struct qcow2_deflate *deflate = qcow2_deflate_create();
    uint64_t random = 3;
    fill(&random, data, sizeof(data), 5);
    size_t packed = qcow2_deflate_pack(deflate, data, sizeof(data), to, 4096);
    g_assert_cmpuint(packed, >, 100);
    for (size_t room = 0; room < packed; room++) {
        memset(to, 0xa5, sizeof(to));
        g_assert_cmpuint(qcow2_deflate_pack(deflate, data, sizeof(data), to, room), ==, 0);
        g_assert_cmpint(to[room], ==, 0xa5);
    }
    g_assert_cmpuint(qcow2_deflate_pack(deflate, data, sizeof(data), to, packed), ==, packed);
    unpack_and_compare(to, packed, data, sizeof(data));
    fill(&random, data, sizeof(data), 0);
    g_assert_cmpuint(qcow2_deflate_pack(deflate, data, sizeof(data), to, 4095), ==, 0);
    qcow2_deflate_destroy(deflate);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/qcow2/deflate/round-trips", test_round_trips);
    g_test_add_func("/qcow2/deflate/long-codes", test_long_codes);
    g_test_add_func("/qcow2/deflate/no-room", test_no_room);
    return g_test_run();
}

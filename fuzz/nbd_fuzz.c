/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fuzzes the NBD server: a client that sends the input as one stream, over a socket pair, to a server with a null-co
 * node. The first byte chooses what is sent before it, so that the transmission phase is reached without the fuzzer
 * having to find the handshake; 0 leaves everything to the input.
 */
#include "export/nbd/test_bed.h"
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define FLAGS "\0\0\0\3"
#define OPTION(number, length) "IHAVEOPT\0\0\0" number "\0\0\0" length
#define STRUCTURED OPTION("\x08", "\0")
#define EXTENDED OPTION("\x0b", "\0")
#define CONTEXT                    \
    OPTION("\x0a", "\x1d")         \
    "\0\0\0\2n0\0\0\0\1\0\0\0\x0f" \
    "base:allocation"
#define BITMAP_CONTEXTS                              \
    OPTION("\x0a", "\x4d")                           \
    "\0\0\0\2bm\0\0\0\3\0\0\0\x0f"                   \
    "base:allocation\0\0\0\x15qemu:allocation-depth" \
    "\0\0\0\x13qemu:dirty-bitmap:b"
#define GO_BITMAPS OPTION("\x07", "\x08") "\0\0\0\2bm\0\0"
#define GO OPTION("\x07", "\x08") "\0\0\0\2n0\0\0"
#define GO_READ_ONLY OPTION("\x07", "\x08") "\0\0\0\2ro\0\0"

struct prefix {
    const char *bytes;
    size_t size;
};
#define PREFIX(text)           \
    {                          \
        text, sizeof(text) - 1 \
    }
static const struct prefix prefixes[] = {
    PREFIX(""),
    PREFIX(FLAGS),
    PREFIX(FLAGS GO),
    PREFIX(FLAGS GO_READ_ONLY),
    PREFIX(FLAGS STRUCTURED),
    PREFIX(FLAGS STRUCTURED CONTEXT GO),
    PREFIX(FLAGS STRUCTURED BITMAP_CONTEXTS GO_BITMAPS),
    PREFIX(FLAGS EXTENDED BITMAP_CONTEXTS GO_BITMAPS),
    PREFIX(FLAGS EXTENDED GO),
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct bed bed;

    if (!bed.loop) {
        bed_start(&bed, false);
    }
    if (!size) {
        return 0;
    }
    const struct prefix *prefix = &prefixes[data[0] % G_N_ELEMENTS(prefixes)];
    g_autoptr(GByteArray) stream = g_byte_array_new();

    g_byte_array_append(stream, (const guint8 *)prefix->bytes, (guint)prefix->size);
    g_byte_array_append(stream, data + 1, (guint)size - 1);
    bed_feed(&bed, stream->data, stream->len, NULL);
    return 0;
}

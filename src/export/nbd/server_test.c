/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Streams of bytes, well-behaved and hostile, against a whole NBD server; what it answers is compared word by word.
 * Each row of the table is one client: what it sends, in the little language of `words`, and what it must hear.
 */
#include "export/nbd/session.h"
#include "export/nbd/test_bed.h"
#include <errno.h>

/*
 * What a client sends: words, separated by spaces.
 *   hi, hi=N          the client's flags (3 if not said)
 *   opt=N             an option without data     opt=N,BYTES  its header alone
 *   str=TEXT          a 32-bit length and the text    text=TEXT  the text alone
 *   u16=N u32=N u64=N numbers                    zero=N     N bytes of 0
 *   magic             a wrong magic number of 8 bytes
 *   go=NAME           NBD_OPT_GO for the export, no info requests
 *   sr                NBD_OPT_STRUCTURED_REPLY              xh         NBD_OPT_EXTENDED_HEADERS
 *   ctx=NAME          NBD_OPT_SET_META_CONTEXT base:allocation for the export
 *   req=TYPE,FLAGS,OFFSET,LENGTH   a request (its payload follows as zero=N); cookies count from 1
 *   xreq=TYPE,FLAGS,OFFSET,LENGTH  the same with an extended header (flag 32: the length is the payload's)
 * What it hears: words.
 *   hello             the greeting
 *   ack:N server:NAME info:TYPE ctx:NAME err:N   option replies (N: option or error number)
 *   name:SIZE         the reply to NBD_OPT_EXPORT_NAME
 *   ok                a simple reply without error (with its payload, if the request was a read)
 *   no:ERROR          a simple reply with an error
 *   data:N hole:N none status:FLAGS=N,... error:N   chunks; a '+' behind: more will follow; an 'x' before: extended
 * The server then closes the connection.
 */
struct scenario {
    const char *name, *sends, *hears;
};

#define SET_B "opt=10,33 str=bm u32=1 str=qemu:dirty-bitmap:b "
#define B_SET "ctx:qemu:dirty-bitmap:b ack:10 "
#define GO "hello info:3 info:0 ack:7 "
#define GO_STRUCTURED "hello ack:8 info:3 info:0 ack:7 "
#define GO_EXTENDED "hello ack:11 info:3 info:0 ack:7 "
#define SET_THREE "hi xh opt=10,77 str=bm u32=3 str=qemu:dirty-bitmap:b str=base:allocation str=qemu:allocation-depth "
#define THREE_SET "ctx:base:allocation ctx:qemu:allocation-depth ctx:qemu:dirty-bitmap:b ack:10 "
static const struct scenario scenarios[] = {
    {"nothing", "", "hello"},
    {"half a flag", "u16=0", "hello"},
    {"unknown client flags", "hi=7 go=n0", "hello"},
    {"wrong option magic", "hi magic zero=8", "hello"},
    {"option header cut", "hi text=IHAVEOPT u32=7", "hello"},
    {"option data cut", "hi opt=7,100 zero=10", "hello"},
    {"abort", "hi opt=2", "hello ack:2"},
    {"abort, then more", "hi opt=2 go=n0", "hello ack:2"},
    {"list", "hi opt=3", "hello server:n0 server:ro server:bm ack:3"},
    {"list with data", "hi opt=3,4 u32=0 opt=2", "hello err:3 ack:2"},
    {"unknown option", "hi opt=99,5 zero=5 opt=2", "hello err:1 ack:2"},
    {"starttls", "hi opt=5 opt=2", "hello err:2 ack:2"},
    {"extended headers", "hi xh opt=2", "hello ack:11 ack:2"},
    {"extended headers with data", "hi opt=11,4 u32=0 opt=2", "hello err:3 ack:2"},
    {"extended headers twice", "hi xh xh opt=2", "hello ack:11 err:3 ack:2"},
    {"extended after structured, then structured", "hi sr xh sr opt=2", "hello ack:8 ack:11 err:10 ack:2"},
    {"extended headers, export name", "hi xh opt=1,2 text=n0", "hello ack:11"},
    {"option too long to look at", "hi opt=7,70000 zero=70000 opt=2", "hello err:9 ack:2"},
    {"option too long to skip", "hi opt=99,4294967295 zero=100", "hello"},
    {"go", "hi go=n0", GO},
    {"go, unknown export", "hi go=n1 opt=2", "hello err:6 ack:2"},
    {"go, empty name", "hi go= opt=2", "hello err:6 ack:2"},
    {"go, name longer than the option", "hi opt=7,6 u32=4294967295 u16=0 opt=2", "hello err:3 ack:2"},
    {"go, name above the limit", "hi opt=7,5006 u32=5000 zero=5000 u16=0 opt=2", "hello err:3 ack:2"},
    {"go, no data", "hi opt=7 opt=2", "hello err:3 ack:2"},
    {"go, too few info requests", "hi opt=7,8 str=n0 u16=1 opt=2", "hello err:3 ack:2"},
    {"go, too many info requests", "hi opt=7,12 str=n0 u16=1 u16=3 u16=3 opt=2", "hello err:3 ack:2"},
    {"go, name and description", "hi opt=7,12 str=ro u16=2 u16=1 u16=2", "hello info:1 info:2 info:3 info:0 ack:7"},
    {"info, then go", "hi opt=6,8 str=n0 u16=0 go=n0", "hello info:3 info:0 ack:6 info:3 info:0 ack:7"},
    {"export name", "hi opt=1,2 text=n0 req=2,0,0,0", "hello name:1048576"},
    {"export name, unknown", "hi opt=1,2 text=n1", "hello"},
    {"export name, endless", "hi opt=1,4097 zero=4097", "hello"},
    {"not fixed, export name", "hi=0 opt=1,2 text=n0", "hello name:1048576"},
    {"not fixed, go", "hi=0 go=n0", "hello"},
    {"structured twice", "hi sr sr opt=2", "hello ack:8 err:3 ack:2"},
    {"structured with data", "hi opt=8,1 zero=1 opt=2", "hello err:3 ack:2"},
    {"set context without structured", "hi ctx=n0 opt=2", "hello err:3 ack:2"},
    {"set context", "hi sr ctx=n0 opt=2", "hello ack:8 ctx:base:allocation ack:10 ack:2"},
    {"set context, unknown export", "hi sr ctx=n1 opt=2", "hello ack:8 err:6 ack:2"},
    {"set context, query count too high", "hi sr opt=10,14 str=n0 u32=4294967295 u32=0 opt=2",
     "hello ack:8 err:3 ack:2"},
    {"set context, query cut", "hi sr opt=10,15 str=n0 u32=1 u32=4 zero=1 opt=2", "hello ack:8 err:3 ack:2"},
    {"set context, bytes left over", "hi sr opt=10,11 str=n0 u32=0 zero=1 opt=2", "hello ack:8 err:3 ack:2"},
    {"list contexts, all", "hi sr opt=9,10 str=n0 u32=0 opt=2", "hello ack:8 ctx:base:allocation ack:9 ack:2"},
    {"list contexts, name space", "hi sr opt=9,19 str=n0 u32=1 str=base: opt=2",
     "hello ack:8 ctx:base:allocation ack:9 ack:2"},
    {"list contexts, another", "hi sr opt=9,20 str=n0 u32=1 str=qemu:x opt=2", "hello ack:8 ack:9 ack:2"},
    {"list contexts, nothing asked", "hi sr opt=9,14 str=n0 u32=1 str= opt=2", "hello ack:8 ack:9 ack:2"},
    {"list contexts of bitmaps", "hi sr opt=9,10 str=bm u32=0 opt=2",
     "hello ack:8 ctx:base:allocation ctx:qemu:allocation-depth ctx:qemu:dirty-bitmap:b ctx:qemu:dirty-bitmap:c ack:9 "
     "ack:2"},
    {"list contexts, the peer's name space", "hi sr opt=9,19 str=bm u32=1 str=qemu: opt=2",
     "hello ack:8 ctx:qemu:allocation-depth ctx:qemu:dirty-bitmap:b ctx:qemu:dirty-bitmap:c ack:9 ack:2"},
    {"list contexts, all bitmaps", "hi sr opt=9,32 str=bm u32=1 str=qemu:dirty-bitmap: opt=2",
     "hello ack:8 ctx:qemu:dirty-bitmap:b ctx:qemu:dirty-bitmap:c ack:9 ack:2"},
    {"list contexts, half of a name", "hi sr opt=9,31 str=bm u32=1 str=qemu:dirty-bitmap opt=2",
     "hello ack:8 ack:9 ack:2"},
    {"list contexts, one bitmap twice",
     "hi sr opt=9,56 str=bm u32=2 str=qemu:dirty-bitmap:c str=qemu:dirty-bitmap:c opt=2",
     "hello ack:8 ctx:qemu:dirty-bitmap:c ack:9 ack:2"},
    {"list contexts, no such bitmap", "hi sr opt=9,33 str=bm u32=1 str=qemu:dirty-bitmap:d opt=2",
     "hello ack:8 ack:9 ack:2"},

    {"request cut", "hi go=n0 u32=624988435", GO},
    {"request of a wrong magic", "hi go=n0 zero=28 req=3,0,0,0", GO},
    {"disconnect", "hi go=n0 req=2,0,0,0 req=3,0,0,0", GO},
    {"flush, disconnect", "hi go=n0 req=3,0,0,0 req=2,0,0,0", GO "ok"},
    {"unknown command", "hi go=n0 req=8,0,0,0 req=65535,0,0,0", GO "no:22 no:22"},
    {"flags for another command", "hi go=n0 req=0,8,0,512 req=3,2,0,0 req=0,32768,0,1", GO "no:22 no:22 no:22"},
    {"flush of a range", "hi go=n0 req=3,0,1,0 req=3,0,0,1", GO "no:22 no:22"},
    {"read", "hi go=n0 req=0,0,0,4096", GO "ok"},
    {"read of nothing", "hi go=n0 req=0,0,0,0 req=0,0,1048576,0", GO "ok ok"},
    {"read to the end", "hi go=n0 req=0,0,1044480,4096", GO "ok"},
    {"read beyond the end", "hi go=n0 req=0,0,1044481,4096 req=0,0,1048577,0", GO "no:22 no:22"},
    {"read that wraps around", "hi go=n0 req=0,0,18446744073709551615,4096", GO "no:22"},
    {"read above the maximum", "hi go=n0 req=0,0,0,33554433 req=0,0,0,4294967295", GO "no:22 no:22"},
    {"do not fragment, not structured", "hi go=n0 req=0,4,0,512", GO "no:22"},
    {"write", "hi go=n0 req=1,0,0,4096 zero=4096 req=1,1,512,512 zero=512", GO "ok ok"},
    {"write, big", "hi go=n0 req=1,0,0,300000 zero=300000 req=1,0,0,300000 zero=300000 req=3,0,0,0", GO "ok ok ok"},
    {"write beyond the end", "hi go=n0 req=1,0,1048576,512 zero=512 req=3,0,0,0", GO "no:28 ok"},
    {"write, big, beyond the end", "hi go=n0 req=1,0,1000000,400000 zero=400000 req=3,0,0,0", GO "no:28 ok"},
    {"write above the maximum", "hi go=n0 req=1,0,0,33554433 zero=100 req=3,0,0,0", GO "no:22"},
    {"write cut", "hi go=n0 req=3,0,0,0 req=1,0,0,4096 zero=4095", GO "ok"},
    {"write, big, cut", "hi go=n0 req=3,0,0,0 req=1,0,0,400000 zero=399999", GO "ok"},
    {"write to a read-only export", "hi go=ro req=1,0,0,512 zero=512 req=0,0,0,1", GO "no:1 ok"},
    {"trim, zeroes on a read-only export", "hi go=ro req=4,0,0,512 req=6,0,0,512", GO "no:1 no:1"},
    {"trim, cache, zeroes", "hi go=n0 req=4,1,0,4096 req=5,0,0,1048576 req=6,3,0,4096 req=6,0,0,1048576",
     GO "ok ok ok ok"},
    {"trim, cache, zeroes beyond the end", "hi go=n0 req=4,0,1,1048576 req=5,0,1,1048576 req=6,0,1,1048576",
     GO "no:22 no:22 no:28"},
    {"block status without context", "hi sr go=n0 req=7,0,0,512", GO_STRUCTURED "error:22"},
    {"block status, not structured", "hi go=n0 req=7,0,0,512", GO "no:22"},
    {"context of another export", "hi sr ctx=ro go=n0 req=7,0,0,512",
     "hello ack:8 ctx:base:allocation ack:10 info:3 info:0 ack:7 error:22"},
    {"context taken back", "hi sr ctx=n0 opt=10,10 str=n0 u32=0 go=n0 req=7,0,0,512",
     "hello ack:8 ctx:base:allocation ack:10 ack:10 info:3 info:0 ack:7 error:22"},
    {"block status", "hi sr ctx=n0 go=n0 req=7,8,0,1048576 req=7,0,0,0 req=7,0,1,1048576",
     "hello ack:8 ctx:base:allocation ack:10 info:3 info:0 ack:7 status:3=1048576 error:22 error:22"},
    {"a bitmap", "hi sr " SET_B "go=bm req=7,0,0,1048576 req=7,8,0,1048576 req=7,0,65535,2 req=7,0,640000,65536",
     "hello ack:8 " B_SET "info:3 info:0 ack:7 status:1=65536,0=458752,1=131072,0=393216 status:1=65536 "
     "status:1=1,0=1 status:1=15360,0=50176"},
    {"three contexts",
     "hi sr opt=10,77 str=bm u32=3 str=qemu:dirty-bitmap:b str=base:allocation str=qemu:allocation-depth go=bm "
     "req=7,0,0,131072 req=7,8,0,131072",
     "hello ack:8 ctx:base:allocation ctx:qemu:allocation-depth ctx:qemu:dirty-bitmap:b ack:10 info:3 info:0 ack:7 "
     "status:3=131072+ status:1=131072+ status:1=65536,0=65536 status:3=131072+ status:1=131072+ status:1=65536"},
    {"a name space cannot be set", "hi sr opt=10,32 str=bm u32=1 str=qemu:dirty-bitmap: go=bm req=7,0,0,512",
     "hello ack:8 ack:10 info:3 info:0 ack:7 error:22"},
    {"a bitmap, then malformed queries",
     "hi sr " SET_B "opt=10,37 str=bm u32=4294967295 str=qemu:dirty-bitmap:b u32=9 go=bm req=7,0,0,512",
     "hello ack:8 " B_SET "err:3 info:3 info:0 ack:7 error:22"},
    {"a bitmap of another export", "hi sr " SET_B "go=n0 req=7,0,0,512",
     "hello ack:8 " B_SET "info:3 info:0 ack:7 error:22"},
    {"structured, read", "hi sr go=n0 req=0,0,0,4096 req=0,4,0,65536 req=0,0,0,0",
     GO_STRUCTURED "data:4096 data:65536 none"},
    {"structured, read of zeroes", "hi sr go=n0 req=0,0,0,1048576", GO_STRUCTURED "hole:1048576"},
    {"structured, errors", "hi sr go=n0 req=0,0,1,1048576 req=1,0,1,1048576 zero=1048576 req=9,0,0,0",
     GO_STRUCTURED "error:22 error:28 error:22"},
    {"structured, write, flush", "hi sr go=n0 req=1,0,0,512 zero=512 req=3,0,0,0", GO_STRUCTURED "ok ok"},
    {"the flag for payloads without extended headers", "hi sr go=n0 req=1,32,0,512 zero=512 req=0,32,0,512",
     GO_STRUCTURED "error:22 error:22"},

    {"extended, read", "hi xh go=n0 xreq=0,0,4096,4096 xreq=0,4,0,65536 xreq=0,0,7,0 xreq=0,0,0,1048576",
     GO_EXTENDED "xdata:4096 xdata:65536 xnone xhole:1048576"},
    {"extended, write, flush, trim, zeroes, cache",
     "hi xh go=n0 xreq=1,33,512,512 zero=512 xreq=1,32,0,300000 zero=300000 xreq=3,0,0,0 xreq=4,0,0,1048576 "
     "xreq=6,0,1,2 xreq=5,0,3,4 xreq=1,32,0,0",
     GO_EXTENDED "xnone xnone xnone xnone xnone xnone xnone"},
    {"extended, lengths of 64 bits",
     "hi xh go=n0 xreq=0,0,0,4294967296 xreq=4,0,0,4294967297 xreq=6,0,0,18446744073709551615 "
     "xreq=6,0,18446744073709551615,18446744073709551615 xreq=5,0,1,4294967296 xreq=7,0,0,4294967297",
     GO_EXTENDED "xerror:22 xerror:22 xerror:28 xerror:28 xerror:22 xerror:22"},
    {"extended, write without the flag",
     "hi xh go=n0 xreq=1,0,0,512 zero=512 xreq=1,1,0,70000 zero=70000 xreq=3,0,0,0 xreq=1,0,0,4294967296 zero=9 "
     "xreq=3,0,0,0",
     GO_EXTENDED "xnone xnone xnone xerror:22"},
    {"extended, payloads that nobody wants",
     "hi xh go=n0 xreq=0,32,0,100 zero=100 xreq=3,32,0,70000 zero=70000 xreq=4,32,0,1 zero=1 xreq=99,32,0,9 zero=9 "
     "xreq=7,32,0,5000 zero=5000 xreq=3,32,0,0 xreq=3,0,0,0",
     GO_EXTENDED "xerror:22 xerror:22 xerror:22 xerror:22 xerror:22 xerror:22 xnone"},
    {"extended, write above the maximum", "hi xh go=n0 xreq=1,32,0,33554433 zero=9 xreq=3,0,0,0",
     GO_EXTENDED "xerror:22"},
    {"extended, endless payload", "hi xh go=n0 xreq=4,32,0,18446744073709551615 zero=9", GO_EXTENDED "xerror:22"},
    {"extended, payload cut", "hi xh go=n0 xreq=3,0,0,0 xreq=5,32,0,70000 zero=69999", GO_EXTENDED "xnone"},
    {"extended, a compact request", "hi xh go=n0 xreq=3,0,0,0 req=3,0,0,0 zero=100", GO_EXTENDED "xnone"},
    {"an extended request, not negotiated", "hi go=n0 xreq=3,0,0,0", GO},
    {"extended, disconnect", "hi xh go=n0 xreq=2,0,0,0 xreq=3,0,0,0", GO_EXTENDED},
    {"extended, write beyond the end", "hi xh go=n0 xreq=1,32,1048575,2 zero=2 xreq=0,0,1048575,1",
     GO_EXTENDED "xerror:28 xdata:1"},
    {"extended, read-only", "hi xh go=ro xreq=1,32,0,2 zero=2 xreq=6,0,0,1", GO_EXTENDED "xerror:1 xerror:1"},
    {"extended, block status", "hi xh ctx=n0 go=n0 xreq=7,0,0,1048576 xreq=7,0,0,0 xreq=7,0,1,1048576",
     "hello ack:11 ctx:base:allocation ack:10 info:3 info:0 ack:7 xstatus:3=1048576 xerror:22 xerror:22"},
    {"extended, a bitmap", "hi xh " SET_B "go=bm xreq=7,0,0,1048576 xreq=7,8,0,1048576",
     "hello ack:11 " B_SET "info:3 info:0 ack:7 xstatus:1=65536,0=458752,1=131072,0=393216 xstatus:1=65536"},
    {"extended, block status of contexts by number",
     SET_THREE "go=bm xreq=7,32,0,16 u64=131072 u32=3 u32=1 "
               "xreq=7,40,0,12 u64=131072 u32=2 xreq=7,0,0,131072",
     "hello ack:11 " THREE_SET "info:3 info:0 ack:7 xstatus:3=131072+ xstatus:1=65536,0=65536 xstatus:1=131072 "
     "xstatus:3=131072+ xstatus:1=131072+ xstatus:1=65536,0=65536"},
    {"extended, block status of wrong contexts",
     SET_THREE "go=bm xreq=7,32,0,8 u64=512 xreq=7,32,0,4 zero=4 xreq=7,32,0,11 zero=11 xreq=7,32,0,14 zero=14 "
               "xreq=7,32,0,12 u64=512 u32=0 xreq=7,32,0,12 u64=512 u32=4 xreq=7,32,0,12 u64=512 u32=4294967295 "
               "xreq=7,32,0,16 u64=512 u32=1 u32=1 xreq=7,32,0,12 u64=1048577 u32=1 xreq=7,32,0,12 u64=0 u32=1 "
               "xreq=7,32,0,12 u64=18446744073709551615 u32=1 xreq=7,32,0,524 zero=524 xreq=3,0,0,0",
     "hello ack:11 " THREE_SET "info:3 info:0 ack:7 xerror:22 xerror:22 xerror:22 xerror:22 xerror:22 xerror:22 "
     "xerror:22 xerror:22 xerror:22 xerror:22 xerror:22 xerror:22 xnone"},
    {"extended, block status with a payload, no context chosen", "hi xh go=bm xreq=7,32,0,12 u64=512 u32=1",
     GO_EXTENDED "xerror:22"},
};

/* ---- what is sent ---- */

static void put(GByteArray *out, const void *data, size_t bytes)
{
    g_byte_array_append(out, data, (guint)bytes);
}

static void put_u32(GByteArray *out, uint64_t value)
{
    uint32_t number = htobe32((uint32_t)value);

    put(out, &number, sizeof(number));
}

static void put_u16(GByteArray *out, uint64_t value)
{
    uint16_t number = htobe16((uint16_t)value);

    put(out, &number, sizeof(number));
}

static void put_u64(GByteArray *out, uint64_t value)
{
    uint64_t number = htobe64(value);

    put(out, &number, sizeof(number));
}

static void put_zeroes(GByteArray *out, size_t count)
{
    guint before = out->len;

    g_byte_array_set_size(out, before + (guint)count);
    memset(out->data + before, 0, count);
}

static void put_option(GByteArray *out, uint64_t option, uint64_t bytes)
{
    put(out, "IHAVEOPT", 8);
    put_u32(out, option);
    put_u32(out, bytes);
}

static void put_string(GByteArray *out, const char *text)
{
    put_u32(out, strlen(text));
    put(out, text, strlen(text));
}

static void put_request(GByteArray *out, char **numbers, uint64_t *cookie)
{
    struct nbd_request_header header = {htobe32(NBD_REQUEST_MAGIC),
                                        htobe16((uint16_t)g_ascii_strtoull(numbers[1], NULL, 10)),
                                        htobe16((uint16_t)g_ascii_strtoull(numbers[0], NULL, 10)),
                                        htobe64(++*cookie),
                                        htobe64(g_ascii_strtoull(numbers[2], NULL, 10)),
                                        htobe32((uint32_t)g_ascii_strtoull(numbers[3], NULL, 10))};

    put(out, &header, sizeof(header));
}

static void put_extended_request(GByteArray *out, char **numbers, uint64_t *cookie)
{
    struct nbd_extended_request_header header = {htobe32(NBD_EXTENDED_REQUEST_MAGIC),
                                                 htobe16((uint16_t)g_ascii_strtoull(numbers[1], NULL, 10)),
                                                 htobe16((uint16_t)g_ascii_strtoull(numbers[0], NULL, 10)),
                                                 htobe64(++*cookie),
                                                 htobe64(g_ascii_strtoull(numbers[2], NULL, 10)),
                                                 htobe64(g_ascii_strtoull(numbers[3], NULL, 10))};

    put(out, &header, sizeof(header));
}

static void put_word(GByteArray *out, const char *word, uint64_t *cookie)
{
    g_auto(GStrv) parts = g_strsplit(word, "=", 2);
    const char *value = parts[1] ? parts[1] : "";
    g_auto(GStrv) numbers = g_strsplit(value, ",", 4);
    uint64_t first = g_ascii_strtoull(value, NULL, 10);

    if (!strcmp(parts[0], "hi")) {
        put_u32(out, parts[1] ? first : 3);
    } else if (!strcmp(parts[0], "opt")) {
        put_option(out, first, numbers[1] ? g_ascii_strtoull(numbers[1], NULL, 10) : 0);
    } else if (!strcmp(parts[0], "str")) {
        put_string(out, value);
    } else if (!strcmp(parts[0], "text")) {
        put(out, value, strlen(value));
    } else if (!strcmp(parts[0], "u16")) {
        put_u16(out, first);
    } else if (!strcmp(parts[0], "u32")) {
        put_u32(out, first);
    } else if (!strcmp(parts[0], "u64")) {
        put_u64(out, first);
    } else if (!strcmp(parts[0], "zero")) {
        put_zeroes(out, first);
    } else if (!strcmp(parts[0], "magic")) {
        put(out, "IHATEOPT", 8);
    } else if (!strcmp(parts[0], "go")) {
        put_option(out, NBD_OPT_GO, strlen(value) + 6);
        put_string(out, value);
        put_u16(out, 0);
    } else if (!strcmp(parts[0], "sr")) {
        put_option(out, NBD_OPT_STRUCTURED_REPLY, 0);
    } else if (!strcmp(parts[0], "xh")) {
        put_option(out, NBD_OPT_EXTENDED_HEADERS, 0);
    } else if (!strcmp(parts[0], "xreq")) {
        put_extended_request(out, numbers, cookie);
    } else if (!strcmp(parts[0], "ctx")) {
        put_option(out, NBD_OPT_SET_META_CONTEXT, strlen(value) + 12 + strlen(NBD_CONTEXT_ALLOCATION));
        put_string(out, value);
        put_u32(out, 1);
        put_string(out, NBD_CONTEXT_ALLOCATION);
    } else {
        g_assert_cmpstr(parts[0], ==, "req");
        put_request(out, numbers, cookie);
    }
}

static GByteArray *stream_of(const char *sends)
{
    GByteArray *out = g_byte_array_new();
    g_auto(GStrv) words = g_strsplit(sends, " ", -1);
    uint64_t cookie = 0;

    for (char **word = words; *word; word++) {
        if (**word) {
            put_word(out, *word, &cookie);
        }
    }
    return out;
}

/* ---- what is heard ---- */

struct heard {
    const uint8_t *bytes;
    size_t left;
    const struct scenario *scenario;
    GString *words;
    bool transmission;
};

static const void *hear(struct heard *heard, size_t bytes)
{
    const void *there = heard->bytes;

    g_assert_cmpuint(heard->left, >=, bytes);
    heard->bytes += bytes;
    heard->left -= bytes;
    return there;
}

static void hear_option_reply(struct heard *heard)
{
    const struct nbd_option_reply_header *header = hear(heard, sizeof(*header));
    uint32_t type = be32toh(header->type), bytes = be32toh(header->bytes), option = be32toh(header->option);
    const uint8_t *data = hear(heard, bytes);

    g_assert_cmphex(be64toh(header->magic), ==, NBD_OPTION_REPLY_MAGIC);
    if (type == NBD_REP_ACK) {
        g_string_append_printf(heard->words, " ack:%u", option);
        g_assert_cmpuint(bytes, ==, 0);
        heard->transmission = option == NBD_OPT_GO;
    } else if (type == NBD_REP_SERVER) {
        g_string_append_printf(heard->words, " server:%.*s", data[3], data + 4);
    } else if (type == NBD_REP_INFO) {
        g_string_append_printf(heard->words, " info:%u", data[1]);
    } else if (type == NBD_REP_META_CONTEXT) {
        g_string_append_printf(heard->words, " ctx:%.*s", (int)bytes - 4, data + 4);
    } else {
        g_assert_true(type & 0x80000000u);
        g_string_append_printf(heard->words, " err:%u", type & 0x7fffffffu);
    }
}

static void hear_export_name(struct heard *heard)
{
    const struct nbd_export_name_reply *reply = (const void *)heard->bytes;

    g_string_append_printf(heard->words, " name:%" G_GUINT64_FORMAT, be64toh(reply->size));
    hear(heard, heard->left >= sizeof(*reply) ? sizeof(*reply) : offsetof(struct nbd_export_name_reply, zeroes));
    heard->transmission = true;
}

/* The numbers of the request that got this cookie. */
static char **request_numbers(const struct scenario *scenario, uint64_t cookie)
{
    const char *request = scenario->sends;

    for (uint64_t i = 0; i < cookie; i++) {
        request = strstr(request, "req=") + 4;
    }
    return g_strsplit(request, ",", 4);
}

/* How long a read is that got this cookie. */
static size_t read_length(const struct scenario *scenario, uint64_t cookie)
{
    g_auto(GStrv) numbers = request_numbers(scenario, cookie);

    return strcmp(numbers[0], "0") ? 0 : g_ascii_strtoull(numbers[3], NULL, 10);
}

static void hear_simple(struct heard *heard)
{
    const struct nbd_simple_reply *reply = hear(heard, sizeof(*reply));

    if (reply->error) {
        g_string_append_printf(heard->words, " no:%u", be32toh(reply->error));
    } else {
        g_string_append(heard->words, " ok");
        hear(heard, read_length(heard->scenario, be64toh(reply->cookie)));
    }
}

static void hear_extended_status(struct heard *heard, const uint8_t *data, size_t bytes)
{
    struct nbd_body_extended_status body;

    g_assert_cmpuint(bytes, >=, sizeof(body) + sizeof(struct nbd_extended_status_extent));
    memcpy(&body, data, sizeof(body));
    g_assert_cmpuint(bytes, ==, sizeof(body) + be32toh(body.count) * sizeof(struct nbd_extended_status_extent));
    g_string_append(heard->words, "status:");
    for (size_t at = sizeof(body); at < bytes; at += sizeof(struct nbd_extended_status_extent)) {
        struct nbd_extended_status_extent extent;

        memcpy(&extent, data + at, sizeof(extent));
        g_string_append_printf(heard->words, "%s%" G_GUINT64_FORMAT "=%" G_GUINT64_FORMAT, at > sizeof(body) ? "," : "",
                               be64toh(extent.flags), be64toh(extent.bytes));
    }
}

static void hear_status(struct heard *heard, const uint8_t *data, size_t bytes)
{
    g_assert_true(bytes >= 12 && bytes % 8 == 4);
    g_string_append(heard->words, "status:");
    for (size_t at = 4; at < bytes; at += 8) {
        struct nbd_status_extent extent;

        memcpy(&extent, data + at, sizeof(extent));
        g_string_append_printf(heard->words, "%s%u=%u", at > 4 ? "," : "", be32toh(extent.flags),
                               be32toh(extent.bytes));
    }
}

static void hear_body(struct heard *heard, uint16_t type, uint16_t flags, size_t bytes)
{
    const uint8_t *data = hear(heard, bytes);
    uint32_t number;

    switch (type) {
    case NBD_CHUNK_NONE:
        g_assert_cmpuint(bytes, ==, 0);
        g_string_append(heard->words, "none");
        break;
    case NBD_CHUNK_OFFSET_DATA:
        g_string_append_printf(heard->words, "data:%zu", bytes - 8);
        break;
    case NBD_CHUNK_OFFSET_HOLE:
        g_assert_cmpuint(bytes, ==, sizeof(struct nbd_body_hole));
        memcpy(&number, data + 8, sizeof(number));
        g_string_append_printf(heard->words, "hole:%u", be32toh(number));
        break;
    case NBD_CHUNK_BLOCK_STATUS:
        hear_status(heard, data, bytes);
        break;
    case NBD_CHUNK_BLOCK_STATUS_EXT:
        hear_extended_status(heard, data, bytes);
        break;
    default:
        g_assert_cmphex(type, ==, NBD_CHUNK_ERROR);
        memcpy(&number, data, sizeof(number));
        g_string_append_printf(heard->words, "error:%u", be32toh(number));
    }
    if (!(flags & NBD_CHUNK_DONE)) {
        g_string_append_c(heard->words, '+');
    }
}

static void hear_chunk(struct heard *heard)
{
    const struct nbd_chunk *chunk = hear(heard, sizeof(*chunk));

    g_assert_cmphex(be16toh(chunk->type), !=, NBD_CHUNK_BLOCK_STATUS_EXT);
    g_string_append_c(heard->words, ' ');
    hear_body(heard, be16toh(chunk->type), be16toh(chunk->flags), be32toh(chunk->bytes));
}

static void hear_extended_chunk(struct heard *heard)
{
    const struct nbd_extended_chunk *chunk = hear(heard, sizeof(*chunk));
    g_auto(GStrv) numbers = request_numbers(heard->scenario, be64toh(chunk->cookie));

    g_assert_cmphex(be16toh(chunk->type), !=, NBD_CHUNK_BLOCK_STATUS);
    g_assert_cmphex(be64toh(chunk->offset), ==, g_ascii_strtoull(numbers[2], NULL, 10));
    g_string_append(heard->words, " x");
    hear_body(heard, be16toh(chunk->type), be16toh(chunk->flags), be64toh(chunk->bytes));
}

static char *words_of(const struct scenario *scenario, const GByteArray *answer)
{
    struct heard heard = {answer->data, answer->len, scenario, g_string_new("hello"), false};
    const struct nbd_greeting *greeting = hear(&heard, sizeof(*greeting));

    g_assert_cmphex(be64toh(greeting->magic), ==, NBD_MAGIC);
    while (heard.left) {
        uint64_t magic = 0;
        uint32_t short_magic;

        memcpy(&magic, heard.bytes, MIN(heard.left, sizeof(magic)));
        memcpy(&short_magic, &magic, sizeof(short_magic));
        if (!heard.transmission && be64toh(magic) == NBD_OPTION_REPLY_MAGIC) {
            hear_option_reply(&heard);
        } else if (!heard.transmission) {
            hear_export_name(&heard);
        } else if (be32toh(short_magic) == NBD_SIMPLE_REPLY_MAGIC) {
            hear_simple(&heard);
        } else if (be32toh(short_magic) == NBD_EXTENDED_CHUNK_MAGIC) {
            hear_extended_chunk(&heard);
        } else {
            g_assert_cmphex(be32toh(short_magic), ==, NBD_CHUNK_MAGIC);
            hear_chunk(&heard);
        }
    }
    return g_string_free(heard.words, false);
}

/* ---- the tests ---- */

static void run_scenario(struct bed *bed, const struct scenario *scenario)
{
    g_autoptr(GByteArray) stream = stream_of(scenario->sends);
    g_autoptr(GByteArray) answer = g_byte_array_new();
    g_autofree char *expected = g_strchomp(g_strdup(scenario->hears));
    g_autofree char *words = NULL;

    bed_feed(bed, stream->data, stream->len, answer);
    words = words_of(scenario, answer);
    if (strcmp(words, expected)) {
        g_test_message("%s: sent '%s', expected '%s', heard '%s'", scenario->name, scenario->sends, expected, words);
        g_test_fail();
    }
}

static void test_scenarios(void)
{
    struct bed bed;

    bed_start(&bed, false);
    for (size_t i = 0; i < G_N_ELEMENTS(scenarios); i++) {
        run_scenario(&bed, &scenarios[i]);
    }
    bed_stop(&bed);
}

/* The same on an I/O thread: the connection moves there and back. */
static void test_iothread(void)
{
    static const struct scenario scenario = {"iothread",
                                             "hi sr go=io req=0,0,0,4096 req=1,0,0,300000 zero=300000 req=3,0,0,0",
                                             GO_STRUCTURED "data:4096 ok ok"};
    struct bed bed;

    bed_start(&bed, true);
    for (unsigned i = 0; i < 20; i++) {
        run_scenario(&bed, &scenario);
    }
    bed_stop(&bed);
}

/* More requests than may be in flight, in one stream; every one is answered. */
static void test_many(void)
{
    g_autofree char *request = g_strdup("req=1,0,4096,4096 zero=4096 req=0,0,0,4096 req=3,0,0,0 ");
    g_autoptr(GString) sends = g_string_new("hi sr go=n0 ");
    g_autoptr(GByteArray) answer = g_byte_array_new();
    struct bed bed;
    size_t replies = 0;

    for (unsigned i = 0; i < 1000; i++) {
        g_string_append(sends, request);
    }
    g_autoptr(GByteArray) stream = stream_of(sends->str);
    bed_start(&bed, false);
    bed_feed(&bed, stream->data, stream->len, answer);
    bed_stop(&bed);
    /* 1000 * (write 16 + read 28 + 4096 + flush 16), behind a handshake of less than one of these. */
    replies = answer->len / (16 + 28 + 4096 + 16);
    g_assert_cmpuint(replies, ==, 1000);
}

/* Every prefix of a conversation, as if the client had died there. */
static void test_prefixes(void)
{
    static const char *const conversations[] = {
        "hi sr ctx=n0 opt=6,8 str=n0 u16=0 go=n0 req=0,0,0,512 req=1,0,0,64 zero=64 req=7,0,0,512 req=2,0,0,0",
        "hi sr opt=9,19 str=bm u32=1 str=qemu: " SET_B "go=bm req=7,0,0,1048576 req=2,0,0,0",
        "hi xh " SET_B "go=bm xreq=1,32,0,64 zero=64 xreq=7,32,0,12 u64=512 u32=3 xreq=0,0,0,64"};
    struct bed bed;

    bed_start(&bed, false);
    for (unsigned i = 0; i < G_N_ELEMENTS(conversations); i++) {
        g_autoptr(GByteArray) stream = stream_of(conversations[i]);

        for (guint bytes = 0; bytes <= stream->len; bytes++) {
            bed_feed(&bed, stream->data, bytes, NULL);
        }
    }
    bed_stop(&bed);
}

static void test_errors(void)
{
    static const struct {
        int error;
        uint32_t number;
    } rows[] = {{0, 0},
                {-EPERM, 1},
                {-EROFS, 1},
                {-EIO, 5},
                {-ENOMEM, 12},
                {-EINVAL, 22},
                {-ENOSPC, 28},
                {-EFBIG, 28},
                {-EDQUOT, 28},
                {-EOVERFLOW, 75},
                {-EOPNOTSUPP, 95},
                {-ESHUTDOWN, 108},
                {-ENOMEDIUM, 108},
                {-ECONNRESET, 5},
                {-EILSEQ, 5}};

    for (size_t i = 0; i < G_N_ELEMENTS(rows); i++) {
        g_assert_cmpuint(nbd_error_from_errno(rows[i].error), ==, rows[i].number);
    }
}

/* ---- exports ---- */

static void expect_refusal(struct bed *bed, struct block_export_options *options, const char *text)
{
    struct error *err = NULL;

    g_assert_cmpint(exports_add(bed->exports, options, &err), <, 0);
    if (!strstr(err->message, text)) {
        g_test_message("'%s' does not say '%s'", err->message, text);
        g_test_fail();
    }
    error_free(err);
}

static void refusals_run(void *argument)
{
    struct bed *bed = argument;
    struct block_export_options options = {.type = BLOCK_EXPORT_TYPE_NBD, .id = "x", .node_name = "n0"};
    struct error *err = NULL;

    expect_refusal(bed, &options, "already has export named 'n0'");
    options.u.nbd.name = "x";
    options.id = "e0";
    expect_refusal(bed, &options, "'e0' is already in use");
    options.id = "1 bad id";
    expect_refusal(bed, &options, "Invalid block export id");
    options.id = "x";
    options.node_name = "nope";
    expect_refusal(bed, &options, "nope");
    options.node_name = "n0";
    struct block_export_iothreads iothreads = {.kind = BLOCK_EXPORT_IOTHREADS_SINGLE, .u.single = "nope"};
    options.iothread = &iothreads;
    expect_refusal(bed, &options, "iothread \"nope\" not found");
    iothreads = (struct block_export_iothreads){.kind = BLOCK_EXPORT_IOTHREADS_MULTI};
    expect_refusal(bed, &options, "is empty");
    options.iothread = NULL;
    g_autofree char *endless = g_strnfill(NBD_STRING_MAX + 1, 'x');
    options.u.nbd.name = endless;
    expect_refusal(bed, &options, "longer than");
    g_assert_cmpint(exports_delete(bed->exports, "nope", BLOCK_EXPORT_REMOVE_MODE_SAFE, &err), ==, -ENOENT);
    error_free(err);

    json_t *list = exports_query(bed->exports);
    g_assert_cmpuint(json_array_size(list), ==, 3);
    json_decref(list);
}

static void test_refusals(void)
{
    struct bed bed;

    bed_start(&bed, false);
    loop_run_coroutine(bed.loop, refusals_run, &bed);
    bed_stop(&bed);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/nbd/errors", test_errors);
    g_test_add_func("/nbd/scenarios", test_scenarios);
    g_test_add_func("/nbd/prefixes", test_prefixes);
    g_test_add_func("/nbd/many", test_many);
    g_test_add_func("/nbd/iothread", test_iothread);
    g_test_add_func("/exports/refusals", test_refusals);
    return g_test_run();
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Deflate with a window of 4 KiB. Libraries have either such a window or speed; compressing is what a compressed image
 * costs, so here are both. By RFC 1951 alone.
 *
 * The input is cut into tokens: literals, and matches of 3 to 258 bytes found through hash tables of the last position
 * of 3 and of 4 bytes, the latter with chains. A match is put off by one byte if the next one is longer. Tokens make
 * blocks, each with codes of its own (dynamic) or the fixed ones, whichever is shorter.
 *
 * 1. Positions grow from one input to the next (`base`), so that tables need not be cleared: what is below the present
 *    input's base is not there.
 * 2. A distance is at most WINDOW, and never reaches before the input. `previous` is indexed by position modulo WINDOW;
 *    a chain ends where positions do not fall any more, or are out of reach.
 * 3. The writer never goes behind `max`; what does not fit is found out at the end of a block at the latest.
 */
#include "driver/format/qcow2_deflate.h"
#include "base/size.h"
#include <endian.h>
#include <glib.h>
#include <stdlib.h>
#include <string.h>

enum {
    WINDOW = 4096,
    HASH_BITS = 13,
    MATCH_MIN = 3,
    MATCH_MAX = 258,
    CHAIN_MAX = 8,    /* positions tried */
    LONG_ENOUGH = 32, /* a match that is taken without a look at the next byte */
    TOKENS_MAX = 16384,
    LITERALS = 286,
    DISTANCES = 30,
    END_OF_BLOCK = 256,
    CODE_BITS_MAX = 15,
    LENGTH_CODES = 19,
    LENGTH_CODE_BITS_MAX = 7,
};
#define POSITION_MAX (UINT32_MAX - (4u << 20))

struct code {
    uint16_t bits[LITERALS]; /* in the order of writing */
    uint8_t length[LITERALS];
};

/* A literal, or a match: the length above the distance. */
struct token {
    uint16_t length, value;
};

struct qcow2_deflate {
    uint32_t base;
    uint32_t last3[1 << HASH_BITS];
    uint32_t last4[1 << HASH_BITS];
    uint32_t previous[WINDOW];
    struct token tokens[TOKENS_MAX];
    unsigned token_count;
    uint32_t literal_uses[LITERALS], distance_uses[DISTANCES];
    struct code literal, distance;
    uint8_t *at, *end;
    uint64_t hold; /* bits that are not written yet, the first lowest */
    unsigned held;
    bool full;
};

/* --- tables of the format --- */

static const uint16_t length_base[] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                       31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
static const uint8_t length_extra[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                       2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};

/* The symbol of a match's length, less 257. */
static unsigned length_symbol(unsigned length)
{
    if (length <= 10) {
        return length - MATCH_MIN;
    }
    if (length == MATCH_MAX) {
        return 28;
    }
    unsigned bits = 31 - __builtin_clz(length - MATCH_MIN);
    return ((bits - 1) << 2) + ((length - MATCH_MIN) >> (bits - 2) & 3);
}

/* Distances have two symbols for each power of two. */
static unsigned distance_symbol(unsigned distance)
{
    unsigned less = distance - 1;
    if (less < 4) {
        return less;
    }
    unsigned bits = 31 - __builtin_clz(less);
    return 2 * bits + (less >> (bits - 1) & 1);
}

static unsigned distance_extra_bits(unsigned symbol)
{
    return symbol < 4 ? 0 : symbol / 2 - 1;
}

/* --- bits --- */

static inline void put_bits(struct qcow2_deflate *deflate, uint64_t bits, unsigned count)
{
    deflate->hold |= bits << deflate->held;
    deflate->held += count;
}

/* Between puts of 56 bits at most. */
static inline void flush_bits(struct qcow2_deflate *deflate)
{
    unsigned bytes = deflate->held / 8;
    if (G_LIKELY(deflate->end - deflate->at >= 8)) {
        uint64_t word = htole64(deflate->hold);
        memcpy(deflate->at, &word, 8);
        deflate->at += bytes;
    } else {
        for (unsigned i = 0; i < bytes; i++) {
            if (deflate->at == deflate->end) {
                deflate->full = true;
                break;
            }
            *deflate->at++ = deflate->hold >> 8 * i;
        }
    }
    deflate->hold = bytes == 8 ? 0 : deflate->hold >> 8 * bytes;
    deflate->held -= 8 * bytes;
}

/* --- codes --- */

static int compare_uses(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a;
    uint32_t y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* How many codes of each length an optimal code has, for `count` > 1 uses in rising order; they are overwritten. By two
 * queues: leaves, and nodes in the order of making, of which both rise. */
static void count_lengths(uint32_t *uses, unsigned count, unsigned *lengths)
{
    uint16_t parent[2 * LITERALS];
    uint32_t weight[2 * LITERALS];
    uint8_t depth[2 * LITERALS];
    unsigned leaf = 0, node = count, made = count;
    memcpy(weight, uses, count * sizeof(*uses));
    for (; made < 2 * count - 1; made++) {
        weight[made] = 0;
        for (unsigned i = 0; i < 2; i++) {
            unsigned next = leaf < count && (node >= made || weight[leaf] <= weight[node]) ? leaf++ : node++;
            weight[made] += weight[next];
            parent[next] = made;
        }
    }
    memset(lengths, 0, (CODE_BITS_MAX + 1) * sizeof(*lengths));
    depth[made - 1] = 0;
    for (unsigned i = made - 1; i-- > 0;) {
        depth[i] = MIN(depth[parent[i]] + 1, 255);
        if (i < count) {
            lengths[MIN(depth[i], CODE_BITS_MAX)]++;
        }
    }
}

/* Codes that are longer than `max` are shortened, and others made longer for them, until they fit again. */
static void limit_lengths(unsigned *lengths, unsigned max)
{
    uint32_t used = 0;
    for (unsigned i = max + 1; i <= CODE_BITS_MAX; i++) {
        lengths[max] += lengths[i];
        lengths[i] = 0;
    }
    for (unsigned i = 1; i <= max; i++) {
        used += lengths[i] << (max - i);
    }
    for (; used > 1u << max; used--) {
        unsigned i = max - 1;
        while (lengths[i] == 0) {
            i--;
        }
        lengths[max]--;
        lengths[i]--;
        lengths[i + 1] += 2;
    }
}

/* The codes of each length in rising order of symbols, and their bits the other way round, as they are written. */
static void assign_bits(struct code *code, unsigned symbols, const unsigned *lengths)
{
    unsigned next[CODE_BITS_MAX + 2] = {0};
    for (unsigned i = 1; i <= CODE_BITS_MAX; i++) {
        next[i + 1] = (next[i] + lengths[i]) << 1;
    }
    for (unsigned i = 0; i < symbols; i++) {
        unsigned length = code->length[i], bits = length ? next[length]++ : 0, turned = 0;
        for (unsigned n = 0; n < length; n++) {
            turned |= (bits >> n & 1) << (length - 1 - n);
        }
        code->bits[i] = turned;
    }
}

/* A code for the symbols that are used; two at least, so that it is complete. */
static void make_code(struct code *code, uint32_t *uses, unsigned symbols, unsigned max)
{
    uint32_t sorted[LITERALS], plain[LITERALS];
    unsigned lengths[CODE_BITS_MAX + 1], count = 0;
    for (unsigned i = 0; i < symbols; i++) {
        count += uses[i] != 0;
    }
    for (unsigned i = 0; i < symbols && count < 2; i++) {
        count += uses[i] == 0;
        uses[i] = MAX(uses[i], 1);
    }
    count = 0;
    for (unsigned i = 0; i < symbols; i++) {
        if (uses[i]) {
            sorted[count++] = MIN(uses[i], (1u << 22) - 1) << 9 | i; /* the symbol goes along */
        }
    }
    qsort(sorted, count, sizeof(*sorted), compare_uses);
    for (unsigned i = 0; i < count; i++) {
        plain[i] = sorted[i] >> 9;
    }
    count_lengths(plain, count, lengths);
    limit_lengths(lengths, max);
    memset(code->length, 0, symbols);
    for (unsigned length = max, i = 0; length > 0; length--) { /* the rarest are the longest */
        for (unsigned n = 0; n < lengths[length]; n++) {
            code->length[sorted[i++] & 511] = length;
        }
    }
    assign_bits(code, symbols, lengths);
}

static void make_fixed_codes(struct code *literal, struct code *distance)
{
    unsigned lengths[CODE_BITS_MAX + 1] = {[7] = 24, [8] = 152, [9] = 112};
    unsigned distance_lengths[CODE_BITS_MAX + 1] = {[5] = 32};
    for (unsigned i = 0; i < LITERALS; i++) {
        literal->length[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
    }
    memset(distance->length, 5, DISTANCES);
    assign_bits(literal, LITERALS, lengths);
    assign_bits(distance, DISTANCES, distance_lengths);
}

/* --- blocks --- */

/* The lengths of both codes as they are sent: symbols 16 to 18 repeat. */
struct sent_lengths {
    uint8_t symbol[LITERALS + DISTANCES], extra[LITERALS + DISTANCES];
    unsigned count;
    uint32_t uses[LENGTH_CODES];
    struct code code;
    unsigned literals, distances, codes;
};
static const uint8_t length_code_order[LENGTH_CODES] = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                                        11, 4,  12, 3, 13, 2, 14, 1, 15};

static void send_length(struct sent_lengths *sent, unsigned symbol, unsigned extra)
{
    sent->symbol[sent->count] = symbol;
    sent->extra[sent->count++] = extra;
    sent->uses[symbol]++;
}

static void send_run(struct sent_lengths *sent, unsigned length, unsigned run)
{
    if (length) {
        send_length(sent, length, 0);
        run--;
    }
    while (run >= 3) {
        unsigned some = MIN(run, length ? 6 : 138);
        send_length(sent, length ? 16 : some > 10 ? 18 : 17, some - (some > 10 ? 11 : 3));
        run -= some;
    }
    for (; run; run--) {
        send_length(sent, length, 0);
    }
}

static void prepare_lengths(const struct qcow2_deflate *deflate, struct sent_lengths *sent)
{
    uint8_t all[LITERALS + DISTANCES];
    memset(sent, 0, sizeof(*sent));
    sent->literals = LITERALS;
    sent->distances = DISTANCES;
    while (sent->literals > 257 && !deflate->literal.length[sent->literals - 1]) {
        sent->literals--;
    }
    while (sent->distances > 1 && !deflate->distance.length[sent->distances - 1]) {
        sent->distances--;
    }
    memcpy(all, deflate->literal.length, sent->literals);
    memcpy(all + sent->literals, deflate->distance.length, sent->distances);
    unsigned total = sent->literals + sent->distances;
    for (unsigned i = 0, run; i < total; i += run) {
        run = 1;
        while (i + run < total && all[i + run] == all[i]) {
            run++;
        }
        send_run(sent, all[i], run);
    }
    make_code(&sent->code, sent->uses, LENGTH_CODES, LENGTH_CODE_BITS_MAX);
    sent->codes = LENGTH_CODES;
    while (sent->codes > 4 && !sent->code.length[length_code_order[sent->codes - 1]]) {
        sent->codes--;
    }
}

static unsigned repeat_bits(unsigned symbol)
{
    return symbol == 16 ? 2 : symbol == 17 ? 3 : symbol == 18 ? 7 : 0;
}

static uint64_t lengths_cost(const struct sent_lengths *sent)
{
    uint64_t cost = 14 + 3 * sent->codes;
    for (unsigned i = 0; i < sent->count; i++) {
        cost += sent->code.length[sent->symbol[i]] + repeat_bits(sent->symbol[i]);
    }
    return cost;
}

static void write_lengths(struct qcow2_deflate *deflate, const struct sent_lengths *sent)
{
    put_bits(deflate, sent->literals - 257, 5);
    put_bits(deflate, sent->distances - 1, 5);
    put_bits(deflate, sent->codes - 4, 4);
    for (unsigned i = 0; i < sent->codes; i++) {
        put_bits(deflate, sent->code.length[length_code_order[i]], 3);
        flush_bits(deflate);
    }
    for (unsigned i = 0; i < sent->count; i++) {
        unsigned symbol = sent->symbol[i];
        put_bits(deflate, sent->code.bits[symbol], sent->code.length[symbol]);
        put_bits(deflate, sent->extra[i], repeat_bits(symbol));
        flush_bits(deflate);
    }
}

/* Bits of the symbols by these codes, without the extra ones, which are the same by all. */
static uint64_t codes_cost(const struct qcow2_deflate *deflate, const struct code *literal, const struct code *distance)
{
    uint64_t cost = 0;
    for (unsigned i = 0; i < LITERALS; i++) {
        cost += (uint64_t)deflate->literal_uses[i] * literal->length[i];
    }
    for (unsigned i = 0; i < DISTANCES; i++) {
        cost += (uint64_t)deflate->distance_uses[i] * distance->length[i];
    }
    return cost;
}

static void write_tokens(struct qcow2_deflate *deflate, const struct code *literal, const struct code *distance)
{
    for (unsigned i = 0; i < deflate->token_count && !deflate->full; i++) {
        struct token token = deflate->tokens[i];
        if (token.length == 0) {
            put_bits(deflate, literal->bits[token.value], literal->length[token.value]);
        } else {
            unsigned symbol = length_symbol(token.length);
            put_bits(deflate, literal->bits[257 + symbol], literal->length[257 + symbol]);
            put_bits(deflate, token.length - length_base[symbol], length_extra[symbol]);
            symbol = distance_symbol(token.value);
            unsigned extra = distance_extra_bits(symbol);
            put_bits(deflate, distance->bits[symbol], distance->length[symbol]);
            put_bits(deflate, (token.value - 1) & ((1u << extra) - 1), extra);
        }
        flush_bits(deflate);
    }
    put_bits(deflate, literal->bits[END_OF_BLOCK], literal->length[END_OF_BLOCK]);
    flush_bits(deflate);
}

static void write_block(struct qcow2_deflate *deflate, bool last)
{
    struct code literal, distance;
    struct sent_lengths sent;
    uint32_t literal_uses[LITERALS];
    uint32_t distance_uses[DISTANCES];
    deflate->literal_uses[END_OF_BLOCK] = 1;
    memcpy(literal_uses, deflate->literal_uses, sizeof(literal_uses));
    memcpy(distance_uses, deflate->distance_uses, sizeof(distance_uses));
    make_code(&deflate->literal, literal_uses, LITERALS, CODE_BITS_MAX);
    make_code(&deflate->distance, distance_uses, DISTANCES, CODE_BITS_MAX);
    prepare_lengths(deflate, &sent);
    make_fixed_codes(&literal, &distance);
    uint64_t dynamic = lengths_cost(&sent) + codes_cost(deflate, &deflate->literal, &deflate->distance);
    put_bits(deflate, last, 1);
    if (codes_cost(deflate, &literal, &distance) <= dynamic) {
        put_bits(deflate, 1, 2);
        write_tokens(deflate, &literal, &distance);
    } else {
        put_bits(deflate, 2, 2);
        write_lengths(deflate, &sent);
        write_tokens(deflate, &deflate->literal, &deflate->distance);
    }
    deflate->token_count = 0;
    memset(deflate->literal_uses, 0, sizeof(deflate->literal_uses));
    memset(deflate->distance_uses, 0, sizeof(deflate->distance_uses));
}

/* --- matches --- */

struct match {
    unsigned length, distance;
};

static inline uint32_t load4(const uint8_t *from)
{
    uint32_t word;
    memcpy(&word, from, 4);
    return word;
}

static inline unsigned hash4(uint32_t word)
{
    return word * 0x9e3779b1u >> (32 - HASH_BITS);
}

static inline unsigned hash3(uint32_t word)
{
    return (htole32(word) << 8) * 0x9e3779b1u >> (32 - HASH_BITS);
}

static inline unsigned match_length(const uint8_t *a, const uint8_t *b, unsigned max)
{
    unsigned length = 0;
    while (length + 8 <= max) {
        uint64_t x, y;
        memcpy(&x, a + length, 8);
        memcpy(&y, b + length, 8);
        if (x != y) {
            return length + __builtin_ctzll(le64toh(x) ^ le64toh(y)) / 8;
        }
        length += 8;
    }
    while (length < max && a[length] == b[length]) {
        length++;
    }
    return length;
}

/* Puts the position into the tables; *ret: the one of 4 bytes alike before it, and *ret3. `data` is position 0. */
static inline void insert(struct qcow2_deflate *deflate, const uint8_t *from, uint32_t position, uint32_t *ret3,
                          uint32_t *ret4)
{
    uint32_t word = load4(from);
    unsigned three = hash3(word), four = hash4(word);
    *ret3 = deflate->last3[three];
    *ret4 = deflate->last4[four];
    deflate->last3[three] = deflate->last4[four] = position;
    deflate->previous[position % WINDOW] = *ret4;
}

/* The longest match at `from`, longer than `least`; length 0: none. */
static struct match find_match(struct qcow2_deflate *deflate, const uint8_t *from, uint32_t position, unsigned max,
                               unsigned least)
{
    struct match best = {MAX(least, MATCH_MIN - 1), 0};
    uint32_t three, at;
    uint32_t reach = MAX(deflate->base, position - MIN(position, WINDOW));
    insert(deflate, from, position, &three, &at);
    for (unsigned tries = CHAIN_MAX; at >= reach && at < position && tries; tries--) {
        const uint8_t *other = from - (position - at);
        if (best.length < max && other[best.length] == from[best.length] && load4(other) == load4(from)) {
            unsigned length = match_length(from, other, max);
            if (length > best.length) {
                best = (struct match){length, position - at};
                if (length >= LONG_ENOUGH) {
                    break;
                }
            }
        }
        uint32_t next = deflate->previous[at % WINDOW];
        if (next >= at) {
            break;
        }
        at = next;
    }
    if (best.distance == 0 && least < MATCH_MIN && three >= reach && three < position) {
        const uint8_t *other = from - (position - three);
        if (memcmp(other, from, MATCH_MIN) == 0) {
            best = (struct match){match_length(from, other, max), position - three};
        }
    }
    return best.distance ? best : (struct match){0, 0};
}

static inline void add_literal(struct qcow2_deflate *deflate, uint8_t value)
{
    deflate->tokens[deflate->token_count++] = (struct token){0, value};
    deflate->literal_uses[value]++;
}

static inline void add_match(struct qcow2_deflate *deflate, struct match match)
{
    deflate->tokens[deflate->token_count++] = (struct token){match.length, match.distance};
    deflate->literal_uses[257 + length_symbol(match.length)]++;
    deflate->distance_uses[distance_symbol(match.distance)]++;
}

/* All of the input as blocks, up to where it does not fit any more. */
static void pack_all(struct qcow2_deflate *deflate, const uint8_t *from, size_t bytes)
{
    struct match pending = {0, 0}; /* of the byte before `at` */
    size_t at = 0;
    while (at < bytes && !deflate->full) {
        unsigned max = min_u64(bytes - at, MATCH_MAX);
        struct match match = {0, 0};
        if (max >= 4 && pending.length < LONG_ENOUGH) {
            match = find_match(deflate, from + at, deflate->base + at, max, pending.length);
        }
        if (pending.length && match.length <= pending.length) {
            add_match(deflate, pending);
            uint32_t ignored;
            size_t stop = at + pending.length - 1;
            for (at += pending.length < LONG_ENOUGH; at < stop; at++) { /* the first was looked at already */
                if (bytes - at >= 4) {
                    insert(deflate, from + at, deflate->base + at, &ignored, &ignored);
                }
            }
            pending = (struct match){0, 0};
        } else {
            if (pending.length) {
                add_literal(deflate, from[at - 1]);
            }
            if (match.length) {
                pending = match;
            } else {
                add_literal(deflate, from[at]);
            }
            at++;
        }
        if (deflate->token_count >= TOKENS_MAX - 2) {
            write_block(deflate, false);
        }
    }
    if (pending.length) {
        add_match(deflate, pending);
    }
    write_block(deflate, true);
}

struct qcow2_deflate *qcow2_deflate_create(void)
{
    struct qcow2_deflate *deflate = g_try_new0(struct qcow2_deflate, 1);
    if (deflate) {
        deflate->base = 1;
    }
    return deflate;
}

void qcow2_deflate_destroy(struct qcow2_deflate *deflate)
{
    g_free(deflate);
}

size_t qcow2_deflate_pack(struct qcow2_deflate *deflate, const uint8_t *from, size_t bytes, uint8_t *to, size_t max)
{
    if (deflate->base > POSITION_MAX) {
        memset(deflate->last3, 0, sizeof(deflate->last3));
        memset(deflate->last4, 0, sizeof(deflate->last4));
        memset(deflate->previous, 0, sizeof(deflate->previous));
        deflate->base = 1;
    }
    deflate->at = to;
    deflate->end = to + max;
    deflate->hold = deflate->held = 0;
    deflate->full = false;
    deflate->token_count = 0;
    memset(deflate->literal_uses, 0, sizeof(deflate->literal_uses));
    memset(deflate->distance_uses, 0, sizeof(deflate->distance_uses));
    pack_all(deflate, from, bytes);
    put_bits(deflate, 0, (8 - deflate->held % 8) % 8);
    flush_bits(deflate);
    deflate->base += bytes;
    return deflate->full ? 0 : (size_t)(deflate->at - to);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The copy engine: one dispatcher (the caller's coroutine), and a coroutine for each piece in flight.
 *
 * The dispatcher walks a run of offsets (a whole range, or run after run of a dirty bitmap), asks its owner what lies
 * there while earlier pieces are still moving, cuts pieces and launches them. It is also the only one that waits: for a
 * free slot, for the speed limit, for the end of a rest, or for the last piece; always in control->sleep.
 *
 * 1. Two pieces that overlap never move at the same time (the range lock `busy`): the later one reads after the
 *    earlier one has written, so an old copy never lands on a newer one.
 * 2. `resting` holds failed pieces that are to be tried again; they are counted neither in flight nor done. What they
 *    write is read, or looked at, anew.
 * 3. copy_range() and copy_dirty() return with nothing in flight and nothing resting.
 * 4. With config.ordered, launched pieces are numbered and begin to write in the order of their numbers: who has read
 *    waits for its turn, and hands it on just before its last write. Every piece hands it on, also one that fails or
 * has nothing to write; locks of `busy` are asked for in the same order, so nobody waits in a circle.
 * 5. Where others write to the target as well (config.target_edge), what a piece does was decided or found out under
 * its lock: data are read there, zeroes looked at again. Zeroes that are none any more become pieces of data of the
 * same pass, which copy whatever is there then: nothing that others write leaves anything for another pass.
 * 6. A piece of data goes from file to file where the drivers between can do that (edge_copy()), after a look at some
 * places of it whether it may be zero; who copies it looks at the rest. Whatever comes of it but success is forgotten:
 * the piece is read and written, which tells who failed.
 * 7. A cancel is seen at the next look at `control`, and nothing sleeps through one: each wait is woken by it.
 *
 * It knows no job and no graph; it opens, closes and flushes nothing.
 */
#include "copy/copy.h"
#include "base/list.h"
#include "base/size.h"
#include "block/dirty.h"
#include "block/node.h"
#include "block/user.h"
#include "loop/file.h"
#include "loop/sync.h"
#include <errno.h>
#include <glib.h>
#include <stdlib.h>
#include <string.h>

#define RETRY_DELAY_NS (100LL * 1000 * 1000)
#define FOREVER_NS ((int64_t)3600 * 1000 * 1000 * 1000)
#define ZERO_PIECES 64              /* a piece of zeroes needs no memory: it may be as long as this many others */
#define LOOK_STRIDE (32 * KiB)      /* looking at more places of a piece than that costs more than is won */
#define LOOK_STRIDE_MAX (512 * KiB) /* while none was found to be zero */
#define LOOK_BYTES (256 * KiB)      /* what may be zero is read in steps of so much */
#define OFFLOAD_PEEK 512            /* what is zero as a whole begins with so many zeroes */
#define OFFLOAD_WIDTH 3             /* one reads while another one writes, and one is on its way */
#define COMPANY_PIECE (256 * KiB)
#define COMPANY_NS (20LL * 1000 * 1000) /* so long after a client's request we share the processors with it */
/* Pieces that are read and written after one that could not be offloaded; then twice as many, up to a limit. */
#define OFFLOAD_REST 16
#define OFFLOAD_REST_MAX 1024
#define EXTENTS_PER_TURN 64 /* looks at extents before the loop's other work gets its turn */

struct copy {
    struct copy_config config;
    struct range_lock own_busy, *busy; /* the second is the one that is used */
    struct list resting;               /* struct copy_piece, to be tried again */
    struct list buffers;               /* struct copy_buffer, unused */
    unsigned in_flight;
    uint64_t memory_used;
    uint64_t done;
    uint64_t taken; /* out of a dirty bitmap, not done */
    int error;      /* a verdict of COPY_FAIL, or -ECANCELED of a difference */
    uint64_t error_offset;
    bool error_reading;
    int64_t retry_ns;
    struct dirty *dirty; /* of the running copy_dirty() */
    bool urgent;
    unsigned looks;
    uint64_t look_stride;
    bool offloads;           /* the last piece was; at first, it may be */
    bool offloaded;          /* one ever was */
    unsigned offload_rest;   /* pieces until the next try */
    unsigned offload_pause;  /* what that was at first */
    uint64_t launched, turn; /* ordered: the next number to be given, and the one whose turn it is */
    struct list in_line;     /* ordered: struct copy_piece that wait for their turn, by in_line */
    uint64_t pass;           /* how far the running copy_dirty() has come in its dirty bitmap */
    /* the run that is being cut up */
    uint64_t position, end;
    struct copy_extent ahead; /* what lies at position; bytes 0: not asked yet */
};
/* What a stretch of a piece's data turned out to be. */
enum copy_run_kind {
    RUN_DATA,
    RUN_ZERO,
    RUN_SHOWN, /* the same as what the target shows */
};
struct copy_run {
    enum copy_run_kind kind;
    uint64_t bytes; /* 0: none is known */
};
struct copy_piece {
    struct list link;
    struct copy *copy;
    uint64_t offset, bytes;
    uint64_t credit; /* how far it moves `done` */
    enum copy_kind kind;
    bool paid;       /* the speed limit has had its bytes */
    uint64_t number; /* ordered */
    struct list in_line;
    struct coroutine *waiter;
    void *buffer; /* config.piece bytes; with config.shown as many again, for what that reads */
    struct copy_run next;
};
struct copy_buffer {
    struct list link;
};

void copy_control_wake(struct copy_control *control)
{
    loop_sleep_wake(&control->sleep);
}

/* What one piece needs. */
static uint64_t buffer_bytes(const struct copy *copy)
{
    return copy->config.piece * (copy->config.shown ? 2 : 1);
}

/* Are there pieces that need not come into memory, because nobody wants to look at all of it? */
static bool copy_may_offload(const struct copy_config *config)
{
    return config->source && !config->read && !config->shown && (config->target || config->target_edge) &&
           !(config->write_flags & REQUEST_COMPRESSED);
}

struct copy *copy_create(const struct copy_config *config)
{
    struct copy *copy = g_new0(struct copy, 1);
    copy->config = *config;
    struct copy_config *own = &copy->config;
    g_assert(is_power_of_two(own->alignment));
    g_assert(own->zero_alignment == 0 || is_power_of_two(own->zero_alignment));
    own->workers = own->workers ? own->workers : COPY_WORKERS;
    own->piece = max_u64(own->piece ? own->piece : COPY_PIECE, own->alignment);
    own->piece = align_down(own->piece, own->alignment);
    own->memory = max_u64(own->memory ? own->memory : COPY_MEMORY, buffer_bytes(copy));
    if (own->zero_alignment) {
        own->zero_alignment = max_u64(own->zero_alignment, own->alignment);
    }
    copy->offloads = copy_may_offload(own);
    copy->look_stride = LOOK_STRIDE;
    range_lock_init(&copy->own_busy);
    copy->busy = own->busy ? own->busy : &copy->own_busy;
    list_init(&copy->resting);
    list_init(&copy->buffers);
    list_init(&copy->in_line);
    return copy;
}

void copy_destroy(struct copy *copy)
{
    if (!copy) {
        return;
    }
    g_assert(copy->in_flight == 0 && list_is_empty(&copy->resting));
    list_for_each_safe (link, &copy->buffers) {
        free(container_of(link, struct copy_buffer, link));
    }
    range_lock_destroy(&copy->own_busy);
    g_free(copy);
}

uint64_t copy_done(const struct copy *copy)
{
    return copy->done;
}

struct range_lock *copy_busy(struct copy *copy)
{
    return copy->busy;
}

uint64_t copy_in_flight(const struct copy *copy)
{
    return copy->taken;
}

/* NULL: there is none just now. */
static void *copy_buffer_get(struct copy *copy)
{
    if (copy->memory_used + buffer_bytes(copy) > copy->config.memory) {
        return NULL;
    }
    void *buffer;
    if (!list_is_empty(&copy->buffers)) {
        struct copy_buffer *unused = container_of(copy->buffers.next, struct copy_buffer, link);
        list_remove(&unused->link);
        buffer = unused;
    } else {
        buffer = file_memory(buffer_bytes(copy));
    }
    if (buffer) {
        copy->memory_used += buffer_bytes(copy);
    }
    return buffer;
}

static void copy_buffer_put(struct copy *copy, void *buffer)
{
    if (buffer) {
        struct copy_buffer *unused = buffer;
        list_prepend(&copy->buffers, &unused->link);
        copy->memory_used -= buffer_bytes(copy);
    }
}

/* The copy ends because of this, unless something before it in the range is why. */
static void copy_set_error(struct copy *copy, int error, uint64_t offset, bool reading)
{
    if (!copy->error || offset < copy->error_offset) {
        copy->error = error;
        copy->error_offset = offset;
        copy->error_reading = reading;
    }
}

void copy_failed_at(const struct copy *copy, uint64_t *ret_offset, bool *ret_reading)
{
    *ret_offset = copy->error_offset;
    *ret_reading = copy->error_reading;
}

/* --- how long pieces are --- */

/* Do clients wait for their requests, behind ours? */
static bool copy_has_company(const struct copy *copy)
{
    const struct copy_config *config = &copy->config;
    return config->source && !copy->urgent && loop_now_ns() - backend_client_ns(config->source) < COMPANY_NS;
}

static bool copy_is_limited(const struct copy *copy)
{
    return copy->config.control->speed.rate && !copy->urgent;
}

/* A piece of data is not longer. */
static uint64_t copy_longest(const struct copy *copy)
{
    const struct copy_config *config = &copy->config;
    const struct speed_limit *speed = &config->control->speed;
    uint64_t longest =
        copy_is_limited(copy) ? speed_piece(speed, max_u64(config->alignment, 64 * KiB), config->piece) : config->piece;
    if (copy_has_company(copy)) { /* a disk does one thing at a time, and a processor */
        longest = min_u64(longest, max_u64(COMPANY_PIECE, config->alignment));
    }
    return longest;
}

/* --- turns --- */

static void coroutine_fn turn_wait(struct copy_piece *piece)
{
    struct copy *copy = piece->copy;
    if (copy->config.ordered && piece->number > copy->turn) {
        list_append(&copy->in_line, &piece->in_line);
        piece->waiter = coroutine_self();
        coroutine_yield();
    }
}

/* Whoever is next runs when this coroutine yields, so what it does until then comes first. Twice is once. */
static void turn_pass(struct copy_piece *piece)
{
    struct copy *copy = piece->copy;
    if (!copy->config.ordered || piece->number != copy->turn) {
        return;
    }
    copy->turn++;
    list_for_each (link, &copy->in_line) {
        struct copy_piece *next = container_of(link, struct copy_piece, in_line);
        if (next->number == copy->turn) {
            list_remove(&next->in_line);
            coroutine_wake(next->waiter);
            return;
        }
    }
}

/* --- moving a piece --- */

static char *piece_shown(const struct copy_piece *piece)
{
    return (char *)piece->buffer + piece->copy->config.piece;
}

static enum copy_run_kind unit_kind(const struct copy_piece *piece, uint64_t at, uint64_t bytes)
{
    const struct copy_config *config = &piece->copy->config;
    const char *memory = piece->buffer;
    if (config->shown && !memcmp(memory + at, piece_shown(piece) + at, bytes)) {
        return RUN_SHOWN;
    }
    return config->zero_alignment && memory_is_zero(memory + at, bytes) ? RUN_ZERO : RUN_DATA;
}

/* The longest run of units of one kind from `at` on. */
static struct copy_run piece_same(const struct copy_piece *piece, uint64_t at)
{
    const struct copy_config *config = &piece->copy->config;
    uint64_t unit = max_u64(config->zero_alignment, config->alignment), from = at;
    struct copy_run run = {0};
    while (at < piece->bytes) {
        uint64_t next = min_u64(align_down(piece->offset + at, unit) + unit - piece->offset, piece->bytes);
        enum copy_run_kind kind = unit_kind(piece, at, next - at);
        if (at == from) {
            run.kind = kind;
        } else if (kind != run.kind) {
            break;
        }
        at = next;
    }
    run.bytes = at - from;
    if (run.kind == RUN_ZERO && run.bytes < config->zero_minimum && from > 0 && at < piece->bytes) {
        run.kind = RUN_DATA;
    }
    return run;
}

/* The run from `at` on that is dealt with as one. */
static struct copy_run piece_run(struct copy_piece *piece, uint64_t at)
{
    if (!piece->copy->config.zero_alignment && !piece->copy->config.shown) {
        return (struct copy_run){RUN_DATA, piece->bytes - at};
    }
    struct copy_run run = piece->next.bytes ? piece->next : piece_same(piece, at);
    piece->next.bytes = 0;
    while (run.kind == RUN_DATA && at + run.bytes < piece->bytes) { /* zeroes that are too few join it */
        piece->next = piece_same(piece, at + run.bytes);
        if (piece->next.kind != RUN_DATA) {
            break;
        }
        run.bytes += piece->next.bytes;
        piece->next.bytes = 0;
    }
    return run;
}

/* To the target, by whichever way leads there. */
static int coroutine_fn target_write(const struct copy_config *config, uint64_t offset, uint64_t bytes,
                                     struct buffers from, unsigned flags)
{
    return config->target_edge ? edge_write(config->target_edge, offset, bytes, from, flags)
                               : backend_write(config->target, offset, bytes, from, flags);
}

static int coroutine_fn target_write_zeroes(const struct copy_config *config, uint64_t offset, uint64_t bytes,
                                            unsigned flags)
{
    flags &= ~REQUEST_COMPRESSED;
    return config->target_edge ? edge_write_zeroes(config->target_edge, offset, bytes, flags)
                               : backend_write_zeroes(config->target, offset, bytes, flags);
}

static int coroutine_fn piece_write_run(struct copy_piece *piece, uint64_t at, struct copy_run run)
{
    const struct copy_config *config = &piece->copy->config;
    struct iovec iov = {(char *)piece->buffer + at, run.bytes};
    if (run.kind == RUN_DATA) {
        return target_write(config, piece->offset + at, run.bytes, buffers_one(&iov), config->write_flags);
    }
    if (run.kind == RUN_SHOWN || config->target_is_zero) {
        return 0;
    }
    return target_write_zeroes(config, piece->offset + at, run.bytes, config->write_flags);
}

/* Can the next piece be written beside this one's last write? */
static bool piece_ends_unit(const struct copy_piece *piece)
{
    uint64_t unit = piece->copy->config.order_unit;
    return !unit || is_aligned(piece->offset + piece->bytes, unit);
}

static int coroutine_fn piece_write(struct copy_piece *piece)
{
    int result = 0;
    turn_wait(piece);
    piece->next.bytes = 0;
    for (uint64_t at = 0; at < piece->bytes && result == 0;) {
        struct copy_run run = piece_run(piece, at);
        if (at + run.bytes == piece->bytes && piece_ends_unit(piece)) {
            turn_pass(piece);
        }
        result = piece_write_run(piece, at, run);
        at += run.bytes;
    }
    return result;
}

static int piece_compare(struct copy_piece *piece)
{
    struct copy *copy = piece->copy;
    const char *one = piece->buffer, *other = piece_shown(piece);
    if (memcmp(one, other, piece->bytes) != 0) {
        uint64_t at = 0;
        while (one[at] == other[at]) {
            at++;
        }
        copy->config.differs(copy->config.argument, piece->offset + at);
        copy_set_error(copy, -ECANCELED, piece->offset + at, true);
    }
    return 0;
}

static int coroutine_fn piece_read(struct copy_piece *piece)
{
    const struct copy_config *config = &piece->copy->config;
    struct iovec iov = {piece->buffer, piece->bytes};
    struct buffers to = buffers_one(&iov);
    int result = config->read          ? config->read(config->argument, piece->offset, piece->bytes, to)
                 : config->target_edge ? edge_read(backend_edge(config->source), piece->offset, piece->bytes, to, 0)
                                       : backend_read(config->source, piece->offset, piece->bytes, to, 0);
    if (result == 0 && config->shown) {
        iov.iov_base = piece_shown(piece);
        result = config->shown(config->argument, piece->offset, piece->bytes, buffers_one(&iov));
    }
    return result;
}

static int coroutine_fn zero_run(const struct copy_config *config, uint64_t offset, uint64_t bytes)
{
    unsigned flags = config->write_flags | (config->pin_zeroes ? 0 : REQUEST_MAY_UNMAP);
    bool looks = !config->pin_zeroes && !(config->write_flags & REQUEST_IF_UNALLOCATED);
    int result = 0;
    while (bytes && result == 0 && !config->target_is_zero) {
        struct extent shown = {.bytes = bytes};
        int code = !looks                ? 0
                   : config->target_edge ? chain_block_status(config->target_edge->child, NULL, offset, bytes, &shown)
                                         : backend_block_status(config->target, NULL, offset, bytes, &shown);
        if (code < 0) {
            shown = (struct extent){.bytes = bytes};
        }
        if (!(shown.flags & EXTENT_ZERO)) {
            result = target_write_zeroes(config, offset, shown.bytes, flags);
        }
        offset += shown.bytes;
        bytes -= shown.bytes;
    }
    return result;
}

static struct copy_piece *piece_create(struct copy *copy, uint64_t offset, uint64_t bytes, enum copy_kind kind)
{
    struct copy_piece *piece = g_new0(struct copy_piece, 1);
    g_assert(is_aligned(offset, copy->config.alignment));
    list_init(&piece->link);
    list_init(&piece->in_line);
    piece->copy = copy;
    piece->offset = offset;
    piece->bytes = bytes;
    piece->credit = bytes;
    piece->kind = kind;
    return piece;
}

/* What the zeroes that lie at `offset` of a piece of zeroes have become, in whole units. */
static int coroutine_fn piece_look_again(const struct copy_piece *piece, uint64_t offset, struct copy_extent *ret)
{
    const struct copy_config *config = &piece->copy->config;
    uint64_t end = piece->offset + piece->bytes;
    struct extent extent;
    int result = chain_block_status(backend_edge(config->source)->child, NULL, offset, end - offset, &extent);
    if (result < 0) {
        return result;
    }
    uint64_t to = offset + extent.bytes;
    uint64_t zero_to = to == end ? end : align_down(to, config->alignment);
    if (extent.flags & EXTENT_ZERO && zero_to > offset) {
        *ret = (struct copy_extent){zero_to - offset, COPY_ZERO};
    } else {
        to = min_u64(align_up(to, config->alignment), offset + copy_longest(piece->copy));
        *ret = (struct copy_extent){min_u64(to, end) - offset, COPY_DATA};
    }
    return 0;
}

/* They were found before the piece had its place. What is none any more becomes pieces of data. */
static int coroutine_fn piece_zero_again(struct copy_piece *piece, bool *ret_reading)
{
    struct copy *copy = piece->copy;
    struct list data;
    uint64_t data_bytes = 0;
    struct copy_extent extent;
    int result = 0;
    list_init(&data);
    for (uint64_t at = 0; at < piece->bytes && result == 0; at += extent.bytes) {
        uint64_t offset = piece->offset + at;
        result = piece_look_again(piece, offset, &extent);
        *ret_reading = result < 0;
        if (result == 0 && extent.kind == COPY_ZERO) {
            result = zero_run(&copy->config, offset, extent.bytes);
        } else if (result == 0) {
            struct copy_piece *other = piece_create(copy, offset, extent.bytes, COPY_DATA);
            other->paid = true;
            list_append(&data, &other->link);
            data_bytes += extent.bytes;
        }
    }
    list_for_each_safe (link, &data) { /* a piece that failed is looked at again as a whole */
        struct copy_piece *other = container_of(link, struct copy_piece, link);
        list_remove(&other->link);
        if (result < 0) {
            g_free(other);
        } else {
            list_append(&copy->resting, &other->link);
        }
    }
    piece->credit -= result < 0 ? 0 : data_bytes;
    return result;
}

/* --- offload --- */

static int coroutine_fn source_read(const struct copy_config *config, uint64_t offset, uint64_t bytes, void *memory)
{
    struct iovec iov = {memory, bytes};
    return config->target_edge ? edge_read(backend_edge(config->source), offset, bytes, buffers_one(&iov), 0)
                               : backend_read(config->source, offset, bytes, buffers_one(&iov), 0);
}

/* May the unit at `at` of the piece be zero, or could it not be read? */
static bool coroutine_fn unit_may_be_zero(const struct copy_piece *piece, uint64_t at, uint64_t bytes)
{
    char memory[OFFLOAD_PEEK];
    bytes = min_u64(bytes, sizeof(memory));
    return source_read(&piece->copy->config, piece->offset + at, bytes, memory) < 0 || memory_is_zero(memory, bytes);
}

/* How far the piece goes on with units that all may be zero, or all may not, as far as a few of them tell. Nobody looks
 * before it is known that something may come of it. */
static uint64_t coroutine_fn piece_look(const struct copy_piece *piece, bool *ret_zero)
{
    const struct copy_config *config = &piece->copy->config;
    uint64_t unit = max_u64(max_u64(config->zero_alignment, config->alignment), piece->copy->look_stride), at = 0;
    *ret_zero = false;
    if (!config->zero_alignment || !piece->copy->offloaded) {
        return piece->bytes;
    }
    while (at < piece->bytes) {
        uint64_t next = min_u64(align_down(piece->offset + at, unit) + unit - piece->offset, piece->bytes);
        bool zero = unit_may_be_zero(piece, at, next - at);
        if (at == 0) {
            *ret_zero = zero;
        } else if (zero != *ret_zero || (zero && next > LOOK_BYTES)) {
            break;
        }
        at = next;
    }
    return at;
}

static void offload_tried(struct copy *copy, bool done)
{
    copy->offloads = done;
    copy->offloaded |= done;
    copy->look_stride = done ? min_u64(2 * copy->look_stride, LOOK_STRIDE_MAX) : LOOK_STRIDE;
    copy->offload_pause = done ? 0 : CLAMP(2 * copy->offload_pause, OFFLOAD_REST, OFFLOAD_REST_MAX);
    copy->offload_rest = copy->offload_pause;
}

/* Is it worth trying? */
static bool piece_may_offload(struct copy_piece *piece)
{
    struct copy *copy = piece->copy;
    if (!copy_may_offload(&copy->config)) {
        return false;
    }
    if (copy->offload_rest) {
        copy->offload_rest--;
        return false;
    }
    return true;
}

/* Is it done? Whoever looks for zeroes meanwhile looks at all of it. */
static bool coroutine_fn piece_offload(struct copy_piece *piece, bool is_last)
{
    struct copy *copy = piece->copy;
    const struct copy_config *config = &copy->config;
    struct copy_aid aid = {{piece->buffer, piece->bytes}, config->zero_alignment};
    turn_wait(piece);
    if (is_last && copy->offloaded && piece_ends_unit(piece)) {
        turn_pass(piece);
    }
    int result = config->target_edge ? edge_copy(backend_edge(config->source), piece->offset, config->target_edge,
                                                 piece->offset, piece->bytes, config->write_flags, &aid)
                                     : backend_copy(config->source, piece->offset, config->target, piece->offset,
                                                    piece->bytes, config->write_flags, &aid);
    offload_tried(copy, result == 0);
    return result == 0;
}

static int coroutine_fn piece_read_and_write(struct copy_piece *piece, bool *ret_reading)
{
    const struct copy_config *config = &piece->copy->config;
    int result = piece_read(piece);
    if (result < 0) {
        *ret_reading = true;
        return result;
    }
    return config->target || config->target_edge ? piece_write(piece) : piece_compare(piece);
}

/* What may be zero is read, in steps that stay in a processor's cache until they have been looked at; the rest goes
 * from file to file. */
static int coroutine_fn piece_move_data(struct copy_piece *piece, bool *ret_reading)
{
    struct copy *copy = piece->copy;
    uint64_t offset = piece->offset, bytes = piece->bytes, end = offset + bytes;
    int result = 0;
    bool zero = false;
    while (result == 0 && piece->offset < end) {
        piece->bytes = end - piece->offset;
        if (!piece_may_offload(piece)) {
            result = piece_read_and_write(piece, ret_reading);
            break;
        }
        piece->bytes = piece_look(piece, &zero);
        if (zero || piece->offset + piece->bytes < end) {
            copy->look_stride = LOOK_STRIDE;
        }
        if (copy->config.ordered && piece->offset + piece->bytes < end) {
            piece->bytes = end - piece->offset; /* in order, it goes by one way as a whole */
            zero = true;
        }
        if (zero || !piece_offload(piece, piece->offset + piece->bytes == end)) {
            result = piece_read_and_write(piece, ret_reading);
        }
        piece->offset += piece->bytes;
    }
    piece->offset = offset;
    piece->bytes = bytes;
    return result;
}

static int coroutine_fn piece_move(struct copy_piece *piece, bool *ret_reading)
{
    const struct copy_config *config = &piece->copy->config;
    *ret_reading = false;
    if (piece->kind == COPY_ZERO) {
        turn_wait(piece);
        turn_pass(piece);
        return config->target_edge && piece->copy->dirty ? piece_zero_again(piece, ret_reading)
                                                         : zero_run(config, piece->offset, piece->bytes);
    }
    return piece_move_data(piece, ret_reading);
}

/* What is still to be moved of it, run by run. Its range is locked. */
static int coroutine_fn piece_move_wanted(struct copy_piece *piece, bool *ret_reading)
{
    const struct copy_config *config = &piece->copy->config;
    uint64_t offset = piece->offset, bytes = piece->bytes, end = offset + bytes;
    int result = 0;
    *ret_reading = false;
    while (result == 0 && piece->offset < end) {
        piece->bytes = end - piece->offset;
        if (config->wanted && !config->wanted(config->argument, &piece->offset, &piece->bytes)) {
            break;
        }
        result = piece_move(piece, ret_reading);
        if (result == 0 && config->moved) {
            config->moved(config->argument, piece->offset, piece->bytes);
        }
        piece->offset += piece->bytes;
    }
    piece->offset = offset;
    piece->bytes = bytes;
    return result;
}

static void piece_done(struct copy_piece *piece)
{
    struct copy *copy = piece->copy;
    copy->done += piece->credit;
    if (copy->dirty) {
        copy->taken -= piece->credit;
    }
    g_free(piece);
}

/* The owner's verdict on a failed piece, which may be freed. */
static void piece_failed(struct copy_piece *piece, bool reading, int error)
{
    struct copy *copy = piece->copy;
    switch (copy->error ? COPY_FAIL : copy->config.failed(copy->config.argument, reading, error)) {
    case COPY_LEAVE:
        piece_done(piece);
        return;
    case COPY_FAIL:
        copy_set_error(copy, error, piece->offset, reading);
        break;
    case COPY_RETRY:
        copy->retry_ns = loop_now_ns() + RETRY_DELAY_NS;
        break;
    case COPY_PAUSE:
        break;
    }
    list_append(&copy->resting, &piece->link);
}

static void piece_entry(void *argument)
{
    struct copy_piece *piece = argument;
    struct copy *copy = piece->copy;
    struct range_hold hold;
    if (copy->config.target_edge) {
        backend_enter(copy->config.source);
    }
    range_lock_acquire(copy->busy, &hold, piece->offset, piece->bytes, false);
    bool reading;
    int result = piece_move_wanted(piece, &reading);
    turn_wait(piece);
    turn_pass(piece);
    range_lock_release(copy->busy, &hold);
    if (copy->config.target_edge) {
        backend_leave(copy->config.source);
    }
    copy_buffer_put(copy, piece->buffer);
    piece->buffer = NULL;
    copy->in_flight--;
    if (result < 0) {
        piece_failed(piece, reading, result);
    } else {
        piece_done(piece);
    }
    copy_control_wake(copy->config.control);
}

/* Asks what lies at `position`, unless that is known. */
static int coroutine_fn copy_look(struct copy *copy)
{
    if (copy->ahead.bytes) {
        return 0;
    }
    if (++copy->looks % EXTENTS_PER_TURN == 0) {
        coroutine_pause();
    }
    uint64_t bytes = copy->end - copy->position;
    int result = copy->config.extent(copy->config.argument, copy->position, bytes, &copy->ahead);
    if (result < 0) {
        copy->ahead.bytes = 0;
        return result;
    }
    g_assert(copy->ahead.bytes > 0 && copy->ahead.bytes <= bytes);
    return 0;
}

/* Moves `position` on over what has been dealt with. */
static void copy_advance(struct copy *copy, uint64_t bytes)
{
    copy->position += bytes;
    copy->ahead.bytes -= min_u64(bytes, copy->ahead.bytes);
}

/* Cuts the next piece off what lies ahead (which is not to be skipped), and moves on behind it. */
static struct copy_piece *copy_cut(struct copy *copy)
{
    const struct copy_config *config = &copy->config;
    uint64_t longest = copy_longest(copy);
    if (!copy_is_limited(copy) && copy->ahead.kind == COPY_ZERO) {
        longest *= ZERO_PIECES;
    }
    uint64_t from = align_down(copy->position, config->alignment);
    uint64_t extent_end = copy->position + copy->ahead.bytes;
    uint64_t to = min_u64(align_up(extent_end, config->alignment), copy->end);
    enum copy_kind kind = copy->ahead.kind;
    if (from < copy->position || to > extent_end) {
        /* Rounded outward it holds something of its neighbours: that has to be read. */
        kind = COPY_DATA;
        longest = min_u64(longest, config->piece);
    }
    to = min_u64(to, from + max_u64(align_down(longest, config->alignment), config->alignment));
    struct copy_piece *piece = piece_create(copy, from, to - from, kind);
    piece->credit = to - copy->position;
    copy_advance(copy, piece->credit);
    return piece;
}

/* The next run of the dirty bitmap becomes the run to be cut up. False: the pass is over. */
static bool copy_next_run(struct copy *copy)
{
    uint64_t offset, bytes;
    if (!copy->dirty || !dirty_take(copy->dirty, copy->pass, copy->config.piece, &offset, &bytes)) {
        return false;
    }
    if (offset < copy->pass) { /* round the end: it was marked behind our back, and is for the next pass */
        dirty_mark(copy->dirty, offset, bytes);
        return false;
    }
    copy->pass = offset + bytes;
    copy->position = offset;
    copy->end = offset + bytes;
    copy->ahead.bytes = 0;
    copy->taken += bytes;
    return true;
}

/* Sleeps until something changes, but not longer than this. */
static void coroutine_fn copy_sleep(struct copy *copy, int64_t duration_ns)
{
    loop_sleep_ns(&copy->config.control->sleep, min_u64(duration_ns, FOREVER_NS));
}

/*
 * A failed piece whose time has come, or NULL. In a dirty copy, zeroes are looked at again like a run of their own,
 * once the present run is cut up: users may have written there meanwhile, and that may have been copied already.
 */
static struct copy_piece *copy_next_resting(struct copy *copy)
{
    if (list_is_empty(&copy->resting) || loop_now_ns() < copy->retry_ns) {
        return NULL;
    }
    struct copy_piece *piece = container_of(copy->resting.next, struct copy_piece, link);
    if (copy->dirty && piece->kind == COPY_ZERO) {
        if (copy->position == copy->end) {
            list_remove(&piece->link);
            copy->position = piece->offset;
            copy->end = piece->offset + piece->bytes;
            copy->ahead.bytes = 0;
            g_free(piece);
        }
        return NULL;
    }
    list_remove(&piece->link);
    return piece;
}

/*
 * Finds the next piece to launch: one that failed before, or a new one. NULL with 0: all is launched. What is to be
 * skipped is skipped here.
 */
static int coroutine_fn copy_next(struct copy *copy, struct copy_piece **ret)
{
    *ret = copy_next_resting(copy);
    if (*ret) {
        return 0;
    }
    if (copy->position == copy->end && !copy_next_run(copy)) {
        return 0;
    }
    int result = copy_look(copy);
    if (result < 0) {
        /* Nobody knows what lies there: a piece stands for it, to be retried like one that could not be read. */
        copy->ahead.bytes = min_u64(copy->end - copy->position, copy->config.piece);
        copy->ahead.kind = COPY_DATA;
        struct copy_piece *piece = copy_cut(copy);
        piece_failed(piece, true, result);
        return -EAGAIN;
    }
    if (copy->ahead.kind == COPY_SKIP) {
        copy->done += copy->ahead.bytes;
        if (copy->dirty) {
            copy->taken -= copy->ahead.bytes;
        }
        copy_advance(copy, copy->ahead.bytes);
        return -EAGAIN;
    }
    *ret = copy_cut(copy);
    return 0;
}

/* How many pieces may be in flight. What is offloaded keeps a processor busy, and clients need one. */
static unsigned copy_width(const struct copy *copy)
{
    unsigned width = copy_has_company(copy) ? 1 : copy->offloads ? OFFLOAD_WIDTH : copy->config.workers;
    return MIN(copy->config.workers, width);
}

/* Waits until the piece may go; 0, or -EAGAIN when something else has to be looked at first. */
static int coroutine_fn copy_admit(struct copy *copy, struct copy_piece *piece)
{
    struct copy_control *control = copy->config.control;
    if (copy->in_flight >= copy_width(copy)) {
        copy_sleep(copy, FOREVER_NS);
        return -EAGAIN;
    }
    if (piece->kind == COPY_DATA && !piece->buffer) {
        piece->buffer = copy_buffer_get(copy);
        if (!piece->buffer) {
            if (copy->in_flight == 0) {
                copy_set_error(copy, -ENOMEM, piece->offset, true);
            } else {
                copy_sleep(copy, FOREVER_NS);
            }
            return -EAGAIN;
        }
    }
    if (!copy->urgent && !piece->paid) {
        int64_t wait = speed_ask(&control->speed, piece->bytes, loop_now_ns());
        if (wait > 0) {
            copy_sleep(copy, wait);
            return -EAGAIN;
        }
    }
    return 0;
}

static void copy_launch(struct copy *copy, struct copy_piece *piece)
{
    copy->in_flight++;
    piece->paid = false; /* for once */
    piece->number = copy->launched++;
    coroutine_enter(coroutine_create(piece_entry, piece));
}

/* Puts back what was begun and will not be finished: in a dirty copy it is dirty again. */
static void copy_abandon(struct copy *copy, struct copy_piece *waiting)
{
    if (waiting) {
        copy_buffer_put(copy, waiting->buffer);
        list_append(&copy->resting, &waiting->link);
    }
    list_for_each_safe (link, &copy->resting) {
        struct copy_piece *piece = container_of(link, struct copy_piece, link);
        list_remove(&piece->link);
        if (copy->dirty) {
            dirty_mark(copy->dirty, piece->offset, piece->bytes);
        }
        g_free(piece);
    }
    if (copy->dirty) {
        dirty_mark(copy->dirty, copy->position, copy->end - copy->position);
        copy->taken = 0;
    }
    copy->position = copy->end = copy->ahead.bytes = 0;
}

/* Whether the dispatcher has to let the pieces in flight come home before it launches more. */
static bool copy_must_settle(const struct copy *copy)
{
    const struct copy_control *control = copy->config.control;
    return copy->error || control->cancelled || (control->pauses && !copy->urgent);
}

static int coroutine_fn copy_run(struct copy *copy)
{
    struct copy_control *control = copy->config.control;
    struct copy_piece *piece = NULL;
    while (true) {
        if (copy_must_settle(copy)) {
            if (copy->in_flight) {
                copy_sleep(copy, FOREVER_NS);
            } else if (copy->error || control->cancelled) {
                break;
            } else {
                control->rest(control);
            }
            continue;
        }
        if (!piece && (copy_next(copy, &piece) == -EAGAIN || piece)) {
            continue; /* it may have yielded: a wake that came meanwhile found nobody asleep */
        }
        if (!piece) {
            if (copy->in_flight == 0 && list_is_empty(&copy->resting)) {
                break;
            }
            bool retry = !list_is_empty(&copy->resting);
            copy_sleep(copy, retry ? max_u64(copy->retry_ns - loop_now_ns(), 1) : (uint64_t)FOREVER_NS);
            continue;
        }
        if (copy_admit(copy, piece) == 0) {
            copy_launch(copy, piece);
            piece = NULL;
        }
    }
    int result = copy->error ? copy->error : control->cancelled ? -ECANCELED : 0;
    copy_abandon(copy, piece);
    copy->error = 0;
    return result;
}

int coroutine_fn copy_range(struct copy *copy, uint64_t offset, uint64_t bytes, bool urgent)
{
    g_assert(copy->in_flight == 0 && is_aligned(offset, copy->config.alignment));
    copy->position = offset;
    copy->end = offset + bytes;
    copy->ahead.bytes = 0;
    copy->dirty = NULL;
    copy->urgent = urgent;
    return copy_run(copy);
}

int coroutine_fn copy_dirty(struct copy *copy, struct dirty *dirty, bool urgent)
{
    g_assert(copy->in_flight == 0);
    copy->position = copy->end = 0;
    copy->ahead.bytes = 0;
    copy->pass = 0;
    copy->dirty = dirty;
    copy->urgent = urgent;
    int result = copy_run(copy);
    copy->dirty = NULL;
    return result;
}

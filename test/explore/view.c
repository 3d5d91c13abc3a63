/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The model of what may be read. Every byte has a history: what was there at first, then the writes that cover it, in
 * order. A look may see the last write that had been acknowledged when it began, or any later one that was begun
 * before it ended; after a crash the rule is the same with "flushed" in the place of "acknowledged".
 *
 * 1. Writes in flight do not overlap (view_write_begin() refuses), so the order of begin is the order of a byte's
 *    history.
 * 2. A write that failed may show or not, for ever, until one over it is acknowledged.
 * 3. A frozen view is a copy of the history up to a moment that is known to lie between two readings of the clock. Of
 *    the writes of that time each may show or not, but those that do must be all that one moment has.
 *
 * Content is made of words of 8 bytes: a tag that names the writer, and the word's own place. So a wrong byte says
 * whose it is and whether it lies where it belongs.
 */
#include "test/explore/view.h"
#include <string.h>

#define WORD 8u
#define TAG_WRITE 0x80000000u
#define TAG_IMAGE 0x40000000u

/* --- content --- */

uint32_t content_image_tag(unsigned image, unsigned cluster)
{
    return TAG_IMAGE | image << 16 | cluster;
}

uint32_t content_write_tag(unsigned writer, unsigned number)
{
    return TAG_WRITE | (writer & 0x7f) << 24 | (number & 0xffffff);
}

static void word_make(uint64_t index, uint32_t tag, unsigned char word[WORD])
{
    uint32_t halves[2] = {tag, (uint32_t)index ^ 0x5a5a5a5au};
    memcpy(word, halves, WORD);
}

void content_fill(unsigned char *to, uint64_t offset, uint64_t bytes, uint32_t tag)
{
    unsigned char word[WORD];
    for (uint64_t at = offset; at < offset + bytes; at++) {
        if (at == offset || at % WORD == 0) {
            word_make(at / WORD, tag, word);
        }
        to[at - offset] = word[at % WORD];
    }
}

/* What the word around a byte says of itself. */
static char *content_explain(const unsigned char *seen, uint64_t offset, uint64_t bytes, uint64_t at)
{
    uint64_t start = at / WORD * WORD;
    if (start < offset || start + WORD > offset + bytes) {
        return g_strdup_printf("%#x", seen[at - offset]);
    }
    static const unsigned char zeroes[WORD];
    const unsigned char *word = seen + (start - offset);
    uint32_t halves[2];
    memcpy(halves, word, WORD);
    uint64_t place = (uint64_t)(halves[1] ^ 0x5a5a5a5au) * WORD;
    if (memcmp(word, zeroes, WORD) == 0) {
        return g_strdup("zero");
    }
    if ((halves[0] & TAG_WRITE) != 0) {
        return g_strdup_printf("write %u of client %u, of byte %#" G_GINT64_MODIFIER "x", halves[0] & 0xffffff,
                               halves[0] >> 24 & 0x7f, place);
    }
    if ((halves[0] & TAG_IMAGE) != 0) {
        return g_strdup_printf("cluster %u of image %u, of byte %#" G_GINT64_MODIFIER "x", halves[0] & 0xffff,
                               halves[0] >> 16 & 0xff, place);
    }
    return g_strdup_printf("%08x %08x", halves[0], halves[1]);
}

/* --- the view --- */

static uint64_t now = 1;

uint64_t view_clock(void)
{
    return now;
}

static void write_free(void *argument)
{
    struct view_write *write = argument;
    g_free(write->data);
    g_free(write);
}

struct view *view_create(unsigned char *initial, uint64_t size)
{
    struct view *view = g_new0(struct view, 1);
    view->references = 1;
    view->size = size;
    view->initial = initial;
    view->writes = g_ptr_array_new_with_free_func(write_free);
    return view;
}

struct view *view_ref(struct view *view)
{
    view->references++;
    return view;
}

void view_unref(struct view *view)
{
    if (view && --view->references == 0) {
        g_ptr_array_free(view->writes, TRUE);
        g_free(view->initial);
        g_free(view);
    }
}

void view_resize(struct view *view, uint64_t size)
{
    view->initial = g_realloc(view->initial, size + 1);
    if (size > view->size) {
        memset(view->initial + view->size, 0, size - view->size);
    }
    view->size = size;
    for (guint i = 0; i < view->writes->len; i++) {
        struct view_write *write = view->writes->pdata[i];
        write->bytes = write->offset < size ? MIN(write->bytes, size - write->offset) : 0;
    }
}

struct view *view_freeze(const struct view *view, uint64_t since, bool settled)
{
    struct view *frozen = view_create(g_malloc(view->size + 1), view->size);
    memcpy(frozen->initial, view->initial, view->size);
    frozen->since = view->until ? MIN(since, view->since) : since; /* what shows one moment is at that moment still */
    frozen->until = now;
    frozen->unknown = view->unknown;
    for (guint i = 0; i < view->writes->len; i++) {
        const struct view_write *from = view->writes->pdata[i];
        struct view_write *write = g_new(struct view_write, 1);
        *write = *from;
        write->data = g_memdup2(from->data, from->bytes);
        write->ended = true; /* whose end is still to come was not acknowledged at that moment */
        write->flushed |= settled && write->acknowledged;
        g_ptr_array_add(frozen->writes, write);
    }
    return frozen;
}

struct view_write *view_write_begin(struct view *view, unsigned writer, uint64_t offset, uint64_t bytes,
                                    const unsigned char *data)
{
    for (guint i = 0; i < view->writes->len; i++) {
        const struct view_write *other = view->writes->pdata[i];
        if (!other->ended && offset < other->offset + other->bytes && other->offset < offset + bytes) {
            return NULL;
        }
    }
    struct view_write *write = g_new0(struct view_write, 1);
    write->writer = writer;
    write->offset = offset;
    write->bytes = bytes;
    write->data = data ? g_memdup2(data, bytes) : g_malloc0(bytes);
    write->begun = ++now;
    g_ptr_array_add(view->writes, write);
    return write;
}

void view_write_end(struct view *view, struct view_write *write, bool good)
{
    write->ended = true;
    write->acknowledged = good ? ++now : 0;
}

uint64_t view_flush_mark(void)
{
    return now;
}

void view_flushed(struct view *view, uint64_t mark)
{
    for (guint i = 0; i < view->writes->len; i++) {
        struct view_write *write = view->writes->pdata[i];
        write->flushed |= write->acknowledged && write->acknowledged <= mark;
    }
}

/* --- looking --- */

struct view_look view_look_now(void)
{
    return (struct view_look){.since = now, .alone = VIEW_NOBODY};
}

static bool write_must_show(const struct view *view, const struct view_look *look, const struct view_write *write)
{
    bool settled = look->flushed_only ? write->flushed : write->acknowledged && write->acknowledged <= look->since;
    bool older = view->until && write->begun <= view->until;
    return settled && (!older || write->acknowledged <= view->since);
}

static bool write_is_foreign(const struct view_look *look, const struct view_write *write)
{
    return look->alone != VIEW_NOBODY && write->writer != look->alone && write->begun > look->alone_since;
}

static bool byte_may_be(const struct view *view, const struct view_look *look, uint64_t at, unsigned char seen)
{
    for (guint i = view->writes->len; i > 0; i--) {
        const struct view_write *write = view->writes->pdata[i - 1];
        if (at < write->offset || at - write->offset >= write->bytes || write_is_foreign(look, write)) {
            continue;
        }
        if (write->data[at - write->offset] == seen) {
            return true;
        }
        if (write_must_show(view, look, write)) {
            return false;
        }
    }
    return seen == (at < view->size ? view->initial[at] : 0);
}

/* What is most likely expected there, for the message. */
static char *expected_at(const struct view *view, const struct view_look *look, uint64_t at)
{
    uint64_t start = at / WORD * WORD;
    unsigned char word[WORD] = {0};
    for (uint64_t i = 0; i < WORD; i++) {
        word[i] = start + i < view->size ? view->initial[start + i] : 0;
    }
    for (guint i = 0; i < view->writes->len; i++) {
        const struct view_write *write = view->writes->pdata[i];
        for (uint64_t j = 0; j < WORD; j++) {
            if (start + j >= write->offset && start + j - write->offset < write->bytes &&
                write_must_show(view, look, write) && !write_is_foreign(look, write)) {
                word[j] = write->data[start + j - write->offset];
            }
        }
    }
    return content_explain(word, start, WORD, at);
}

/* The last write everywhere, which may always show; g_free(). */
static unsigned char *latest(const struct view *view, const struct view_look *look, uint64_t offset, uint64_t bytes)
{
    unsigned char *shown = g_malloc0(bytes + 1);
    if (offset < view->size) {
        memcpy(shown, view->initial + offset, MIN(bytes, view->size - offset));
    }
    for (guint i = 0; i < view->writes->len; i++) {
        const struct view_write *write = view->writes->pdata[i];
        uint64_t from = MAX(offset, write->offset), to = MIN(offset + bytes, write->offset + write->bytes);
        if (from < to && !write_is_foreign(look, write)) {
            memcpy(shown + (from - offset), write->data + (from - write->offset), to - from);
        }
    }
    return shown;
}

char *view_compare(const struct view *view, const struct view_look *look, uint64_t offset, uint64_t bytes,
                   const unsigned char *seen)
{
    g_autofree unsigned char *likely = latest(view, look, offset, bytes);
    for (uint64_t at = offset; at < offset + bytes; at++) {
        if (seen[at - offset] != likely[at - offset] && !byte_may_be(view, look, at, seen[at - offset])) {
            g_autofree char *found = content_explain(seen, offset, bytes, at);
            g_autofree char *wanted = expected_at(view, look, at);
            return g_strdup_printf("byte %#" G_GINT64_MODIFIER "x shows %s instead of %s", at, found, wanted);
        }
    }
    return NULL;
}

/* --- one moment --- */

/* Is it of the time in which the moment lies? */
static bool is_doubtful(const struct view *view, const struct view_write *write)
{
    return write->begun <= view->until && (write->begun > view->since || write->acknowledged > view->since);
}

static bool moment_fits(struct view *view, const struct view_look *look, uint64_t moment, uint64_t bytes,
                        const unsigned char *seen)
{
    bool fits = true;
    uint64_t since = view->since;
    GPtrArray *all = view->writes, *before = g_ptr_array_new();
    for (guint i = 0; i < all->len; i++) {
        const struct view_write *write = all->pdata[i];
        if (write->begun <= moment || write->begun > view->until) {
            g_ptr_array_add(before, all->pdata[i]);
        }
    }
    view->since = moment;
    view->writes = before;
    for (guint i = 0; fits && i < all->len; i++) {
        const struct view_write *write = all->pdata[i];
        uint64_t end = MIN(write->offset + write->bytes, bytes);
        for (uint64_t at = write->offset; fits && is_doubtful(view, write) && at < end; at++) {
            fits = byte_may_be(view, look, at, seen[at]);
        }
    }
    view->writes = all;
    view->since = since;
    g_ptr_array_free(before, TRUE);
    return fits;
}

char *view_compare_moment(const struct view *view, const struct view_look *look, uint64_t bytes,
                          const unsigned char *seen)
{
    struct view copy = *view;
    for (uint64_t moment = view->since; moment <= view->until; moment++) {
        if (moment_fits(&copy, look, moment, bytes, seen)) {
            return NULL;
        }
    }
    return g_strdup("it does not show one moment: a later write is there and an earlier one is not");
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Files in memory, read and written through a mapping.
 *
 * 1. A view is longer than its file, so that the file may grow into it; what is written lies before `end`, where the
 *    file had bytes when we last looked. One that has grown out of its view gets another, twice as long as the file.
 * 2. Views are taken away when the file is closed, and not before: another thread may be writing to one.
 * 3. Who cuts the file off while somebody writes (others, or ourselves in between), or a file system without room,
 *    raises SIGBUS: the view is lost then (loop/shared_memory.h). Whoever wrote meanwhile sees that after the last byte
 *    and writes all of it again by a call. What was written before is in the file's pages. Who cuts a file that is not
 *    his inside a page is not noticed at once: what is written to the rest of that page is behind the end, and lost.
 * 4. Long writes go to pages that are there: to make them, one by one, takes longer than a call does.
 * 5. Writing through a mapping does not change the file's time of modification: flushing and closing do.
 * 6. Only pages that the file has are read so: to look at a hole would fill it. What is known to be there (`present`)
 *    was written here, or the kernel was asked. It stays known until we give it back ourselves; so if others punch
 *    holes, or we do while somebody reads the same page, a hole may be filled, with zeroes: that takes memory, and
 *    nothing else.
 * 7. What is written in pieces of 4 KiB or more goes past the processor's caches (non-temporal stores), which need
 *    not fetch what it replaces: half the time of memcpy(), and what the caches hold stays there.
 * 8. Who sets a page known looks afterwards whether anything was given back meanwhile (`given_back`), and forgets it
 *    then.
 */
#include "loop/file_map.h"
#include "base/size.h"
#ifdef __SSE2__
#include <emmintrin.h>
#endif
#include <glib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define LONG_WRITE (32 * KiB)
/* Less is likely to be read again before long. */
#define PAST_CACHE_LEAST (4 * KiB)
#define PAGE_BYTES ((uint64_t)4096)
/* So many pages at a time the kernel is asked about: as many as one fault enters. */
#define WINDOW_PAGES 16u
/* More is read by calls. */
#define PAGES_MAX 1024u
#define BITS_IN_WORD 64u
#define REST_MAX 255u
#define ROOM_LEAST (64 * MiB)
#define ROOM_MOST ((uint64_t)1 << 44) /* of an address space of 2^47 */

void file_map_init(struct file_map *map, int fd, const char *name)
{
    *map = (struct file_map){.fd = fd, .name = g_strdup(name)};
    pthread_mutex_init(&map->mutex, NULL);
}

void file_map_destroy(struct file_map *map)
{
    for (unsigned i = 0; i < atomic_load(&map->count); i++) {
        shared_memory_unmap(map->views[i].memory);
        g_free(map->views[i].present);
    }
    pthread_mutex_destroy(&map->mutex);
    g_free(map->name);
}

/* The newest view, or NULL. */
static struct file_view *last_view(struct file_map *map)
{
    unsigned count = atomic_load_explicit(&map->count, memory_order_acquire);

    return count ? &map->views[count - 1] : NULL;
}

static bool covers(struct file_view *view, uint64_t end)
{
    return view && end <= atomic_load_explicit(&view->end, memory_order_relaxed);
}

static struct file_view *add_view(struct file_map *map, uint64_t size)
{
    unsigned count = atomic_load(&map->count);
    uint64_t room = ROOM_LEAST;

    while (room < 2 * size && room < ROOM_MOST) {
        room *= 2;
    }
    struct shared_memory *memory =
        count < FILE_MAP_VIEWS && size <= room ? shared_memory_map_extent(map->fd, 0, room) : NULL;

    if (!memory) {
        return NULL;
    }
    struct file_view *view = &map->views[count];

    view->memory = memory;
    view->room = room;
    view->present = g_try_malloc0(room / PAGE_BYTES / BITS_IN_WORD * sizeof(*view->present));
    atomic_init(&view->end, 0);
    atomic_store_explicit(&map->count, count + 1, memory_order_release);
    return view;
}

/* From now on everything goes by calls. */
static void file_map_end(struct file_map *map)
{
    if (!atomic_exchange(&map->over, true)) {
        g_message("'%s' is used without its mapping (mapped=on) from now on: it was cut off by others, its file system "
                  "is full, or it cannot be mapped",
                  map->name);
    }
}

/* A view that covers [0, end), if the file has so much. */
static struct file_view *find_view(struct file_map *map, uint64_t end)
{
    struct file_view *view;
    struct stat status;

    pthread_mutex_lock(&map->mutex);
    view = last_view(map);
    if (!covers(view, end)) {
        uint64_t size = fstat(map->fd, &status) < 0 ? 0 : (uint64_t)status.st_size;

        if (end > size) {
            view = NULL;
        } else {
            if (!view || size > view->room) {
                view = add_view(map, size);
            }
            if (view) {
                atomic_store_explicit(&view->end, size, memory_order_relaxed);
            } else {
                file_map_end(map);
            }
        }
    }
    pthread_mutex_unlock(&map->mutex);
    return view;
}

/* A view of [offset, offset + bytes), or NULL. */
static struct file_view *open_view(struct file_map *map, uint64_t offset, size_t bytes)
{
    struct file_view *view = last_view(map);

    if (file_map_is_over(map)) {
        return NULL;
    }
    return covers(view, offset + bytes) ? view : find_view(map, offset + bytes);
}

/* Were all the bytes that have just been copied the file's? */
static bool close_view(struct file_map *map, const struct file_view *view)
{
    if (shared_memory_is_lost(view->memory)) {
        file_map_end(map);
        return false;
    }
    return true;
}

/* ---- which pages the file has ---- */

static uint64_t page_bit(uint64_t page)
{
    return (uint64_t)1 << (page % BITS_IN_WORD);
}

static bool pages_are_known(struct file_view *view, uint64_t page, uint64_t end)
{
    for (; page < end; page++) {
        if (!(atomic_load_explicit(&view->present[page / BITS_IN_WORD], memory_order_relaxed) & page_bit(page))) {
            return false;
        }
    }
    return true;
}

static void page_set_known(struct file_view *view, uint64_t page)
{
    atomic_uint_least64_t *word = &view->present[page / BITS_IN_WORD];

    if (!(atomic_load_explicit(word, memory_order_relaxed) & page_bit(page))) {
        atomic_fetch_or(word, page_bit(page));
    }
}

static void page_bits_clear(struct file_view *view, uint64_t page, uint64_t end)
{
    while (page < end) {
        uint64_t next = min_u64(align_down(page + BITS_IN_WORD, BITS_IN_WORD), end);
        uint64_t mask = (UINT64_MAX >> (BITS_IN_WORD - (next - page))) << (page % BITS_IN_WORD);
        atomic_uint_least64_t *word = &view->present[page / BITS_IN_WORD];

        if (atomic_load(word) & mask) {
            atomic_fetch_and(word, ~mask);
        }
        page = next;
    }
}

/* These were set; `before` is what given_back was when they were looked at. */
static void pages_confirm(struct file_map *map, struct file_view *view, uint64_t page, uint64_t end, unsigned before)
{
    if (atomic_load(&map->given_back) != before) {
        page_bits_clear(view, page, end);
    }
}

/* mincore(2) says "there" of everything to who may not write the file (any more), also of what is behind its end. */
static bool is_lied_to(const struct file_view *view)
{
    unsigned char there;

    return mincore(view->memory->bytes + view->room - PAGE_BYTES, PAGE_BYTES, &there) < 0 || (there & 1);
}

/* Asks the kernel about these pages, PAGES_MAX at most. */
static void pages_look(struct file_map *map, struct file_view *view, uint64_t page, uint64_t end)
{
    unsigned char there[PAGES_MAX];
    unsigned before = atomic_load(&map->given_back), found = 0;

    if (mincore(view->memory->bytes + page * PAGE_BYTES, (end - page) * PAGE_BYTES, there) < 0) {
        return;
    }
    for (uint64_t i = page; i < end; i++) {
        found += there[i - page] & 1;
    }
    if (found == end - page && is_lied_to(view)) {
        return;
    }
    for (uint64_t i = page; found && i < end; i++) {
        if (there[i - page] & 1) {
            page_set_known(view, i);
        }
    }
    pages_confirm(map, view, page, end, before);
}

/* Whether to ask: the more often that was in vain, the more seldom. */
static bool may_look(struct file_map *map)
{
    unsigned rest = atomic_load_explicit(&map->rest, memory_order_relaxed);

    if (rest) {
        atomic_store_explicit(&map->rest, rest - 1, memory_order_relaxed);
    }
    return !rest;
}

/* Has the file a page everywhere there, as far as we can tell? */
static bool pages_are_there(struct file_map *map, struct file_view *view, uint64_t offset, size_t bytes)
{
    uint64_t page = offset / PAGE_BYTES, end = div_up(offset + bytes, PAGE_BYTES);
    uint64_t from = align_down(page, WINDOW_PAGES), to = align_up(end, WINDOW_PAGES);

    if (!view->present || to - from > PAGES_MAX) {
        return false;
    }
    if (pages_are_known(view, page, end)) {
        return true;
    }
    if (!may_look(map)) {
        return false;
    }
    pages_look(map, view, from, to);
    bool there = pages_are_known(view, page, end);
    unsigned next = there ? 0 : MIN(2 * atomic_load_explicit(&map->next_rest, memory_order_relaxed) + 1, REST_MAX);

    atomic_store_explicit(&map->next_rest, next, memory_order_relaxed);
    atomic_store_explicit(&map->rest, next, memory_order_relaxed);
    return there;
}

void file_map_forget(struct file_map *map, uint64_t offset, uint64_t bytes)
{
    struct file_view *view = last_view(map);

    atomic_fetch_add(&map->given_back, 1);
    if (view && view->present && bytes && offset < view->room) {
        page_bits_clear(view, offset / PAGE_BYTES, div_up(offset + min_u64(bytes, view->room - offset), PAGE_BYTES));
    }
}

#ifdef __SSE2__
static void copy_past_cache(uint8_t *to, const uint8_t *from, size_t bytes)
{
    size_t head = MIN(-(uintptr_t)to % sizeof(__m128i), bytes);

    memcpy(to, from, head);
    for (to += head, from += head, bytes -= head; bytes >= 4 * sizeof(__m128i); bytes -= 4 * sizeof(__m128i)) {
        for (unsigned i = 0; i < 4; i++, to += sizeof(__m128i), from += sizeof(__m128i)) {
            _mm_stream_si128((__m128i *)to, _mm_loadu_si128((const __m128i *)from));
        }
    }
    memcpy(to, from, bytes);
    _mm_sfence(); /* before anybody is told that it is there */
}
#else
static void copy_past_cache(uint8_t *to, const uint8_t *from, size_t bytes)
{
    memcpy(to, from, bytes);
}
#endif

static void copy_to_page_cache(uint8_t *to, const struct iovec *iov, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        if (iov[i].iov_len >= PAST_CACHE_LEAST) {
            copy_past_cache(to, iov[i].iov_base, iov[i].iov_len);
        } else {
            memcpy(to, iov[i].iov_base, iov[i].iov_len);
        }
        to += iov[i].iov_len;
    }
}

bool file_map_write(struct file_map *map, uint64_t offset, const struct iovec *iov, unsigned count, size_t bytes)
{
    struct file_view *view = open_view(map, offset, bytes);

    if (!view || (bytes >= LONG_WRITE && !pages_are_there(map, view, offset, bytes))) {
        return false;
    }
    if (!atomic_load_explicit(&map->written, memory_order_relaxed)) {
        atomic_store(&map->written, true);
    }
    unsigned before = atomic_load(&map->given_back);

    copy_to_page_cache(view->memory->bytes + offset, iov, count);
    if (view->present) {
        uint64_t page = offset / PAGE_BYTES, end = div_up(offset + bytes, PAGE_BYTES);

        for (uint64_t i = page; i < end; i++) {
            page_set_known(view, i);
        }
        pages_confirm(map, view, page, end, before);
    }
    return close_view(map, view);
}

bool file_map_read(struct file_map *map, uint64_t offset, const struct iovec *iov, unsigned count, size_t bytes)
{
    struct file_view *view = open_view(map, offset, bytes);

    if (!view || !pages_are_there(map, view, offset, bytes)) {
        return false;
    }
    const uint8_t *at = view->memory->bytes + offset;

    for (unsigned i = 0; i < count; i++) {
        memcpy(iov[i].iov_base, at, iov[i].iov_len);
        at += iov[i].iov_len;
    }
    return close_view(map, view);
}

const void *file_map_peek(struct file_map *map, uint64_t offset, size_t bytes)
{
    struct file_view *view = open_view(map, offset, bytes);

    if (!view || !pages_are_there(map, view, offset, bytes)) {
        return NULL;
    }
    const uint8_t *at = view->memory->bytes + offset;

    return shared_memory_has_lost(view->memory, at, bytes) ? NULL : at;
}

bool file_map_is_sound(struct file_map *map, const void *at, size_t bytes)
{
    for (unsigned i = 0; i < atomic_load_explicit(&map->count, memory_order_acquire); i++) {
        const struct shared_memory *memory = map->views[i].memory;

        if (shared_memory_is_lost(memory)) {
            file_map_end(map);
        }
        if (shared_memory_has_lost(memory, at, bytes)) {
            return false;
        }
    }
    return true;
}

void file_map_touch(struct file_map *map)
{
    if (atomic_exchange(&map->written, false)) {
        futimens(map->fd, NULL);
    }
}

void file_map_cut(struct file_map *map, uint64_t size)
{
    pthread_mutex_lock(&map->mutex);
    struct file_view *view = last_view(map);

    uint64_t end = view ? atomic_load(&view->end) : 0;

    uint64_t known = align_up(end, WINDOW_PAGES * PAGE_BYTES); /* a window may go on behind what was the end */

    if (end > size) {
        atomic_store(&view->end, size);
    }
    if (known > size) {
        file_map_forget(map, size, known - size);
    }
    pthread_mutex_unlock(&map->mutex);
}

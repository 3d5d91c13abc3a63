/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Files in memory, written through a mapping.
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
 */
#include "loop/file_map.h"
#include "base/size.h"
#include <glib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define LONG_WRITE (32 * KiB)
/* More at a time is read by calls. */
#define PAGES_MAX 1024
#define ROOM_LEAST (64 * MiB)
#define ROOM_MOST ((uint64_t)1 << 44) /* of an address space of 2^47 */

void file_map_init(struct file_map *map, int fd)
{
    *map = (struct file_map){.fd = fd};
    pthread_mutex_init(&map->mutex, NULL);
}

void file_map_destroy(struct file_map *map)
{
    for (unsigned i = 0; i < atomic_load(&map->count); i++) {
        shared_memory_unmap(map->views[i].memory);
    }
    pthread_mutex_destroy(&map->mutex);
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
    atomic_init(&view->end, 0);
    atomic_store_explicit(&map->count, count + 1, memory_order_release);
    return view;
}

/* From now on everything goes by calls. */
static void file_map_end(struct file_map *map)
{
    if (!atomic_exchange(&map->over, true)) {
        g_message(
            "a file with mapped=on is used without its mapping from now on: it was cut off by others, its file system "
            "is full, or it cannot be mapped");
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

static bool has_pages(uint8_t *begin, size_t bytes)
{
    unsigned char present[PAGES_MAX];
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t before = (uintptr_t)begin % page;
    size_t pages = div_up(before + bytes, page);

    if (pages > PAGES_MAX || mincore(begin - before, before + bytes, present) < 0) {
        return false;
    }
    for (size_t i = 0; i < pages; i++) {
        if (!(present[i] & 1)) {
            return false;
        }
    }
    return true;
}

bool file_map_write(struct file_map *map, uint64_t offset, const struct iovec *iov, unsigned count, size_t bytes)
{
    struct file_view *view = open_view(map, offset, bytes);

    if (!view || (bytes >= LONG_WRITE && !has_pages(view->memory->bytes + offset, bytes))) {
        return false;
    }
    if (!atomic_load_explicit(&map->written, memory_order_relaxed)) {
        atomic_store(&map->written, true);
    }
    uint8_t *at = view->memory->bytes + offset;

    for (unsigned i = 0; i < count; i++) {
        memcpy(at, iov[i].iov_base, iov[i].iov_len);
        at += iov[i].iov_len;
    }
    return close_view(map, view);
}

bool file_map_read(struct file_map *map, uint64_t offset, const struct iovec *iov, unsigned count, size_t bytes)
{
    struct file_view *view = open_view(map, offset, bytes);

    if (!view || !has_pages(view->memory->bytes + offset, bytes)) {
        return false;
    }
    const uint8_t *at = view->memory->bytes + offset;

    for (unsigned i = 0; i < count; i++) {
        memcpy(iov[i].iov_base, at, iov[i].iov_len);
        at += iov[i].iov_len;
    }
    return close_view(map, view);
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

    if (view && atomic_load(&view->end) > size) {
        atomic_store(&view->end, size);
    }
    pthread_mutex_unlock(&map->mutex);
}

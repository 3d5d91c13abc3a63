/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Huge pages for new parts of files in memory, by madvise(MADV_COLLAPSE) (Linux 6.1, madvise(2)): it works whatever
 * the mount options and sysfs say of huge pages, keeps what the extent holds, whoever else writes there meanwhile, and
 * fills the rest with zeroes. An extent that holds nothing at all cannot be collapsed: a zero is written first.
 *
 * 1. That zero goes to a hole or behind the end of the file, and to where only the caller writes: nobody sees it.
 * 2. What nobody wrote stays a hole: an extent is taken if it will be full, or if the file is just growing into it: it
 *    goes on growing, or what its last extent holds too much is given back when it is closed.
 * 3. It may be slow (memory in small pieces, which the kernel has to move together), refused (a full file system, a
 *    group's limit, others who write there just then) or unknown: what it wins and costs is kept as a credit, and once
 *    that is used up, it rests for more and more extents before it is tried again.
 * 4. A second writer of an extent waits until the first has made a page of it, and finds it in `made`. That an extent
 *    stands there says only that it is worth mapping: it may have been cut or punched since.
 */
#include "loop/huge_page.h"
#include "base/size.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#define WON_US 800      /* what filling an extent costs less, about */
#define TRY_US 5000     /* what the first try after a rest may cost */
#define CREDIT_US 20000 /* at first, and at most */
#define REST_LEAST 32   /* extents */
#define REST_MOST 8192

void huge_pages_init(struct huge_pages *pages, int fd)
{
    pages->fd = fd;
    for (unsigned i = 0; i < HUGE_PAGE_GUARDS; i++) {
        pthread_mutex_init(&pages->guards[i].mutex, NULL);
        pages->guards[i].made = UINT64_MAX;
    }
    atomic_init(&pages->credit_us, CREDIT_US);
    atomic_init(&pages->rest, 0);
    atomic_init(&pages->next_rest, REST_LEAST);
}

void huge_pages_destroy(struct huge_pages *pages)
{
    for (unsigned i = 0; i < HUGE_PAGE_GUARDS; i++) {
        pthread_mutex_destroy(&pages->guards[i].mutex);
    }
}

static int64_t now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* Several threads may count at once: a try more or less does no harm. */
static bool is_resting(struct huge_pages *pages)
{
    unsigned rest = atomic_load_explicit(&pages->rest, memory_order_relaxed);

    if (rest) {
        atomic_store_explicit(&pages->rest, rest - 1, memory_order_relaxed);
    }
    return rest > 0;
}

static void account(struct huge_pages *pages, int64_t won_us)
{
    int64_t credit = atomic_load_explicit(&pages->credit_us, memory_order_relaxed) + won_us;

    if (credit >= CREDIT_US) {
        credit = CREDIT_US;
        atomic_store_explicit(&pages->next_rest, REST_LEAST, memory_order_relaxed);
    } else if (credit < 0) {
        unsigned rest = atomic_load_explicit(&pages->next_rest, memory_order_relaxed);

        credit = TRY_US;
        atomic_store_explicit(&pages->rest, rest, memory_order_relaxed);
        atomic_store_explicit(&pages->next_rest, 2 * rest < REST_MOST ? 2 * rest : REST_MOST, memory_order_relaxed);
    }
    atomic_store_explicit(&pages->credit_us, (int)credit, memory_order_relaxed);
}

/* Does the extent hold no data? SEEK_DATA would look at all that is preallocated behind it. */
static bool is_empty(const struct shared_memory *memory)
{
    unsigned char pages[HUGE_PAGE_BYTES / 4096];

    if (mincore(memory->bytes, HUGE_PAGE_BYTES, pages) < 0) {
        return false;
    }
    for (size_t i = 0; i < HUGE_PAGE_BYTES / (size_t)sysconf(_SC_PAGESIZE); i++) {
        if (pages[i] & 1) {
            return false;
        }
    }
    return true;
}

/* Makes a page of the extent, which is mapped and will be full or lies behind the end: [.., last] is going to be
 * written. */
static bool make(struct huge_pages *pages, const struct shared_memory *memory, uint64_t last)
{
    if (!is_empty(memory) || is_resting(pages) || pwrite(pages->fd, "", 1, (off_t)last) != 1) {
        return false;
    }
    int64_t begin = now_us();
    bool done = !madvise(memory->bytes, HUGE_PAGE_BYTES, MADV_COLLAPSE);

    account(pages, (done ? WON_US : -WON_US) - (now_us() - begin));
    return done;
}

/* The extent at `base` as memory, of which [offset, end) is going to be written, or NULL; made: it is a page already.
 */
static struct shared_memory *prepare(struct huge_pages *pages, uint64_t base, uint64_t offset, uint64_t end, bool made)
{
    struct stat status;
    uint64_t last = min_u64(end, base + HUGE_PAGE_BYTES) - 1;

    if (fstat(pages->fd, &status) < 0) {
        return NULL;
    }
    uint64_t size = (uint64_t)status.st_size;
    bool whole = offset == base && end >= base + HUGE_PAGE_BYTES;
    struct shared_memory *memory =
        made || whole || size <= base ? shared_memory_map_extent(pages->fd, base, HUGE_PAGE_BYTES) : NULL;
    bool ready =
        memory && (made ? size > last || pwrite(pages->fd, "", 1, (off_t)last) == 1 : make(pages, memory, last));

    if (!ready) {
        shared_memory_unmap(memory);
        return NULL;
    }
    return memory;
}

struct shared_memory *huge_page_open(struct huge_pages *pages, uint64_t offset, uint64_t bytes, bool *ret_is_new)
{
    uint64_t base = align_down(offset, HUGE_PAGE_BYTES);
    unsigned slot = base / HUGE_PAGE_BYTES % HUGE_PAGE_GUARDS;

    pthread_mutex_lock(&pages->guards[slot].mutex);
    bool made = pages->guards[slot].made == base;
    struct shared_memory *memory = prepare(pages, base, offset, offset + bytes, made);

    if (memory) {
        pages->guards[slot].made = base;
    }
    pthread_mutex_unlock(&pages->guards[slot].mutex);
    *ret_is_new = !made && offset == base && bytes >= HUGE_PAGE_BYTES;
    return memory;
}

void huge_page_undo(struct huge_pages *pages, uint64_t offset)
{
    unsigned slot = offset / HUGE_PAGE_BYTES % HUGE_PAGE_GUARDS;

    pthread_mutex_lock(&pages->guards[slot].mutex);
    pages->guards[slot].made = UINT64_MAX;
    fallocate(pages->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)HUGE_PAGE_BYTES);
    pthread_mutex_unlock(&pages->guards[slot].mutex);
}

void huge_pages_trim(struct huge_pages *pages)
{
    struct stat status;

    if (fstat(pages->fd, &status) < 0) {
        return;
    }
    uint64_t size = (uint64_t)status.st_size, base = align_down(size, HUGE_PAGE_BYTES);
    uint64_t from = align_up(size, (uint64_t)sysconf(_SC_PAGESIZE)), end = base + HUGE_PAGE_BYTES;

    if (pages->guards[base / HUGE_PAGE_BYTES % HUGE_PAGE_GUARDS].made == base && from < end) {
        fallocate(pages->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)from, (off_t)(end - from));
    }
}

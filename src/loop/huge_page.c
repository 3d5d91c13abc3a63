/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Huge pages for new parts of files in memory, by madvise(MADV_COLLAPSE) (Linux 6.1, madvise(2)): it works whatever
 * the mount options and sysfs say of huge pages, keeps what the extent holds, whoever else writes there meanwhile, and
 * fills the rest with zeroes. An extent that holds nothing at all cannot be collapsed: a zero is written first.
 *
 * 1. That zero goes to a hole or behind the end of the file, and to where only the caller writes: nobody sees it.
 * 2. What nobody wrote stays a hole: an extent is taken if it will be full, or if the file is just growing into it: it
 *    goes on growing, or its last extent holds more memory than it needs, as with mount option huge=always.
 * 3. It may be slow (memory in small pieces, which the kernel has to move together), refused (a full file system, a
 *    group's limit, others who write there just then) or unknown: what it wins and costs is kept as a credit, and once
 *    that is used up, it rests for more and more extents before it is tried again.
 * 4. A second writer of an extent waits until the first has made a page of it, and finds it in `made`. That an extent
 *    stands there says only that it is worth mapping: it may have been cut or punched since.
 */
#include "loop/huge_page.h"
#include "base/size.h"
#include <errno.h>
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

/* Of the extent at `base`, [offset, end) is going to be written. */
static bool is_new(const struct huge_pages *pages, uint64_t base, uint64_t offset, uint64_t end, uint64_t size)
{
    if (offset > base || end < base + HUGE_PAGE_BYTES) {
        return size <= base;
    }
    off_t data = lseek(pages->fd, (off_t)base, SEEK_DATA);

    return data < 0 ? errno == ENXIO : (uint64_t)data >= base + HUGE_PAGE_BYTES;
}

/* Makes a page of the extent, of which [offset, end) is going to be written, or only sees to the file's length. */
static struct shared_memory *prepare(struct huge_pages *pages, uint64_t base, uint64_t offset, uint64_t end, bool made)
{
    struct stat status;
    struct shared_memory *memory;
    uint64_t last = min_u64(end, base + HUGE_PAGE_BYTES) - 1;

    if (fstat(pages->fd, &status) < 0 ||
        (!made && (!is_new(pages, base, offset, end, (uint64_t)status.st_size) || is_resting(pages)))) {
        return NULL;
    }
    if ((!made || (uint64_t)status.st_size <= last) && pwrite(pages->fd, "", 1, (off_t)last) != 1) {
        return NULL;
    }
    memory = shared_memory_map_extent(pages->fd, base, HUGE_PAGE_BYTES);
    if (memory && !made) {
        int64_t begin = now_us();
        bool done = !madvise(memory->bytes, HUGE_PAGE_BYTES, MADV_COLLAPSE);

        account(pages, (done ? WON_US : -WON_US) - (now_us() - begin));
        if (!done) {
            shared_memory_unmap(memory);
            return NULL;
        }
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

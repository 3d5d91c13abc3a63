/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Huge pages for new parts of files in memory, by madvise(MADV_COLLAPSE) (Linux 6.1, madvise(2)): it works whatever
 * the mount options and sysfs say of huge pages, keeps what the extent holds, whoever else writes there meanwhile, and
 * fills the rest with zeroes. An extent that holds nothing at all cannot be collapsed: a zero is written first.
 *
 * 1. That zero goes to a hole or behind the end of the file, and to where only the caller writes: nobody sees it.
 * 2. What nobody wrote stays a hole: an extent is taken if it will be full, or if the caller says that the file is just
 *    growing into it: it goes on growing, or what its last extent holds too much is given back when it is closed. What
 *    was preallocated stays so.
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

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now); /* others may have the processor meanwhile */
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

/* Is there nothing in the extent? What is preallocated looks like a hole, but is none to us: all of a file is, if its
 * blocks are as many as it is long. */
static bool is_hole(const struct huge_pages *pages, uint64_t base, const struct stat *status)
{
    off_t data = (uint64_t)status->st_blocks * 512 < (uint64_t)status->st_size
                     ? lseek(pages->fd, (off_t)base, SEEK_DATA)
                     : (off_t)base;

    return data < 0 ? errno == ENXIO : (uint64_t)data >= base + HUGE_PAGE_BYTES;
}

/* Makes a page of the extent, of which [.., last] is going to be written. */
static struct shared_memory *make(struct huge_pages *pages, uint64_t base, uint64_t last, const struct stat *before,
                                  bool *ret_was_hole)
{
    struct stat status;
    int64_t begin = now_us();

    if (((uint64_t)before->st_size > base && !is_hole(pages, base, before)) || is_resting(pages) ||
        pwrite(pages->fd, "", 1, (off_t)last) != 1) {
        return NULL;
    }
    struct shared_memory *memory = shared_memory_map_extent(pages->fd, base, HUGE_PAGE_BYTES);
    bool done = memory && !madvise(memory->bytes, HUGE_PAGE_BYTES, MADV_COLLAPSE);

    account(pages, (done ? WON_US : -WON_US) - (now_us() - begin));
    if (!done) {
        shared_memory_unmap(memory);
        return NULL;
    }
    /* A part of a file may be preallocated. (Who takes as much at the same time hides that.) */
    *ret_was_hole =
        !fstat(pages->fd, &status) && (uint64_t)(status.st_blocks - before->st_blocks) * 512 >= HUGE_PAGE_BYTES;
    return memory;
}

/* Sees to the file's length, in an extent that is a page. */
static struct shared_memory *reuse(struct huge_pages *pages, uint64_t base, uint64_t last, const struct stat *before)
{
    bool short_file = (uint64_t)before->st_size <= last;

    return short_file && pwrite(pages->fd, "", 1, (off_t)last) != 1
               ? NULL
               : shared_memory_map_extent(pages->fd, base, HUGE_PAGE_BYTES);
}

struct shared_memory *huge_page_open(struct huge_pages *pages, uint64_t offset, uint64_t bytes, bool grows,
                                     bool *ret_is_new)
{
    uint64_t base = align_down(offset, HUGE_PAGE_BYTES);
    uint64_t last = min_u64(offset + bytes, base + HUGE_PAGE_BYTES) - 1;
    unsigned slot = base / HUGE_PAGE_BYTES % HUGE_PAGE_GUARDS;
    bool whole = offset == base && bytes >= HUGE_PAGE_BYTES;
    struct shared_memory *memory = NULL;
    struct stat status;

    *ret_is_new = false;
    pthread_mutex_lock(&pages->guards[slot].mutex);
    if (!fstat(pages->fd, &status)) {
        if (pages->guards[slot].made == base) {
            memory = reuse(pages, base, last, &status);
        } else if (whole || (grows && (uint64_t)status.st_size <= base)) {
            memory = make(pages, base, last, &status, ret_is_new);
        }
    }
    if (memory) {
        pages->guards[slot].made = base;
    }
    pthread_mutex_unlock(&pages->guards[slot].mutex);
    return memory;
}

void huge_page_undo(struct huge_pages *pages, uint64_t offset, uint64_t bytes)
{
    uint64_t base = align_down(offset, HUGE_PAGE_BYTES);
    unsigned slot = base / HUGE_PAGE_BYTES % HUGE_PAGE_GUARDS;

    pthread_mutex_lock(&pages->guards[slot].mutex);
    if (bytes == HUGE_PAGE_BYTES) {
        pages->guards[slot].made = UINT64_MAX;
    }
    fallocate(pages->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes);
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

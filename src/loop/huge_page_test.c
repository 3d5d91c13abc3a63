/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Huge pages of files in tmpfs: what is made one and what is left alone, what that does to a file's content, holes and
 * length, and many writers at once in the same extents.
 */
#include "base/size.h"
#include "loop/huge_page.h"
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <stdbool.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct bed {
    int fd;
    bool is_new; /* the last one */
    struct huge_pages pages;
};

static void bed_init(struct bed *bed, uint64_t size)
{
    char path[] = "/dev/shm/huge-page-test-XXXXXX";

    bed->fd = mkstemp(path);
    g_assert_cmpint(bed->fd, >=, 0);
    unlink(path);
    g_assert_cmpint(ftruncate(bed->fd, (off_t)size), ==, 0);
    huge_pages_init(&bed->pages, bed->fd);
}

static void bed_finish(struct bed *bed)
{
    huge_pages_destroy(&bed->pages);
    close(bed->fd);
}

static uint64_t size_of(const struct bed *bed)
{
    struct stat status;

    g_assert_cmpint(fstat(bed->fd, &status), ==, 0);
    return (uint64_t)status.st_size;
}

static void assert_byte(const struct bed *bed, uint64_t offset, uint8_t value)
{
    uint8_t byte;

    g_assert_cmpint(pread(bed->fd, &byte, 1, (off_t)offset), ==, 1);
    g_assert_cmpuint(byte, ==, value);
}

/* Does this kernel make huge pages at all? It may not know how, or have no memory in one piece. */
static bool can_be_made(void)
{
    struct bed bed;
    struct shared_memory *page;

    bed_init(&bed, HUGE_PAGE_BYTES);
    page = huge_page_open(&bed.pages, 0, HUGE_PAGE_BYTES, true, &bed.is_new);
    shared_memory_unmap(page);
    bed_finish(&bed);
    if (!page) {
        g_test_skip("this kernel makes no huge page of a file in memory just now");
    }
    return page != NULL;
}

static void holes(void)
{
    struct bed bed;

    if (!can_be_made()) {
        return;
    }
    bed_init(&bed, 8 * HUGE_PAGE_BYTES);
    struct shared_memory *page = huge_page_open(&bed.pages, 2 * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES, true, &bed.is_new);

    g_assert_nonnull(page);
    memset(page->bytes, 5, HUGE_PAGE_BYTES);
    shared_memory_unmap(page);
    g_assert_cmpint(lseek(bed.fd, 0, SEEK_DATA), ==, 2 * HUGE_PAGE_BYTES);
    g_assert_cmpint(lseek(bed.fd, 2 * HUGE_PAGE_BYTES, SEEK_HOLE), ==, 3 * HUGE_PAGE_BYTES);
    assert_byte(&bed, 2 * HUGE_PAGE_BYTES, 5);
    assert_byte(&bed, 3 * HUGE_PAGE_BYTES - 1, 5);
    assert_byte(&bed, 3 * HUGE_PAGE_BYTES, 0);
    g_assert_true(bed.is_new);
    page = huge_page_open(&bed.pages, 2 * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES, true, &bed.is_new);
    g_assert_false(bed.is_new);
    shared_memory_unmap(page);
    page = huge_page_open(&bed.pages, 6 * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES, true, &bed.is_new);
    g_assert_true(page && bed.is_new);
    shared_memory_unmap(page);
    huge_page_undo(&bed.pages, 6 * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES);
    /* What will not be full stays a hole. */
    g_assert_null(huge_page_open(&bed.pages, 4 * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES - 1, true, &bed.is_new));
    g_assert_null(huge_page_open(&bed.pages, 4 * HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES, true, &bed.is_new));
    g_assert_cmpint(lseek(bed.fd, 3 * HUGE_PAGE_BYTES, SEEK_DATA), ==, -1);
    g_assert_cmpuint(size_of(&bed), ==, 8 * HUGE_PAGE_BYTES);
    bed_finish(&bed);
}

/* A file that grows, in parts that have nothing to do with extents. */
static void growth(void)
{
    const uint64_t part = HUGE_PAGE_BYTES / 4 + 4097;
    struct bed bed;

    if (!can_be_made()) {
        return;
    }
    bed_init(&bed, 100);
    g_assert_cmpint(pwrite(bed.fd, "begin", 5, 0), ==, 5);
    g_assert_null(huge_page_open(&bed.pages, 100, part, true, &bed.is_new)); /* there is something */
    assert_byte(&bed, 0, 'b');
    for (uint64_t at = HUGE_PAGE_BYTES + 1; at + part < 3 * HUGE_PAGE_BYTES; at += part) {
        struct shared_memory *page = huge_page_open(&bed.pages, at, part, true, &bed.is_new);
        uint64_t here = min_u64(part, HUGE_PAGE_BYTES - at % HUGE_PAGE_BYTES);

        g_assert_nonnull(page);
        g_assert_cmpuint(size_of(&bed), ==, at + here);
        memset(page->bytes + at % HUGE_PAGE_BYTES, (int)(at / part), here);
        shared_memory_unmap(page);
        if (here < part) {
            page = huge_page_open(&bed.pages, at + here, part - here, true, &bed.is_new);
            g_assert_nonnull(page);
            memset(page->bytes, (int)(at / part), part - here);
            shared_memory_unmap(page);
        }
        g_assert_cmpuint(size_of(&bed), ==, at + part);
        for (uint64_t back = HUGE_PAGE_BYTES + 1; back <= at; back += part) {
            assert_byte(&bed, back, (uint8_t)(back / part));
            assert_byte(&bed, back + part - 1, (uint8_t)(back / part));
        }
    }
    assert_byte(&bed, HUGE_PAGE_BYTES, 0);
    bed_finish(&bed);
}

/* What nobody wrote behind the end is given back. */
static void trim(void)
{
    struct bed bed;
    struct stat status;

    if (!can_be_made()) {
        return;
    }
    bed_init(&bed, 0);
    shared_memory_unmap(huge_page_open(&bed.pages, HUGE_PAGE_BYTES, 10000, true, &bed.is_new));
    huge_pages_trim(&bed.pages);
    g_assert_cmpint(fstat(bed.fd, &status), ==, 0);
    g_assert_cmpint(status.st_size, ==, HUGE_PAGE_BYTES + 10000);
    g_assert_cmpint(status.st_blocks * 512, ==, align_up(10000, (uint64_t)sysconf(_SC_PAGESIZE)));
    g_assert_null(huge_page_open(&bed.pages, 3 * HUGE_PAGE_BYTES, 10000, false, &bed.is_new));
    bed_finish(&bed);
    /* What was preallocated stays so: all of a file, or a part. */
    bed_init(&bed, 4 * HUGE_PAGE_BYTES);
    g_assert_cmpint(fallocate(bed.fd, 0, 0, HUGE_PAGE_BYTES), ==, 0);
    struct shared_memory *page = huge_page_open(&bed.pages, 0, HUGE_PAGE_BYTES, true, &bed.is_new);
    g_assert_false(bed.is_new);
    shared_memory_unmap(page);
    g_assert_cmpint(fallocate(bed.fd, 0, 0, 4 * HUGE_PAGE_BYTES), ==, 0);
    g_assert_null(huge_page_open(&bed.pages, 2 * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES, true, &bed.is_new));
    bed_finish(&bed);
}

static void what_is_there(void)
{
    struct bed bed;

    if (!can_be_made()) {
        return;
    }
    bed_init(&bed, 2 * HUGE_PAGE_BYTES);
    g_assert_cmpint(pwrite(bed.fd, "x", 1, HUGE_PAGE_BYTES + 12345), ==, 1);
    g_assert_null(huge_page_open(&bed.pages, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES, true, &bed.is_new));
    assert_byte(&bed, HUGE_PAGE_BYTES + 12345, 'x');
    assert_byte(&bed, 2 * HUGE_PAGE_BYTES - 1, 0);
    /* One that was made and has been cut off, and is written again. */
    struct shared_memory *page = huge_page_open(&bed.pages, 0, HUGE_PAGE_BYTES, true, &bed.is_new);

    g_assert_nonnull(page);
    memset(page->bytes, 7, HUGE_PAGE_BYTES);
    shared_memory_unmap(page);
    g_assert_cmpint(ftruncate(bed.fd, 4096), ==, 0);
    page = huge_page_open(&bed.pages, 8192, 8192, true, &bed.is_new);
    if (page) { /* it need not be one */
        g_assert_cmpuint(size_of(&bed), ==, 16384);
        memset(page->bytes + 8192, 9, 8192);
        assert_byte(&bed, 16383, 9);
        shared_memory_unmap(page);
    }
    assert_byte(&bed, 4095, 7);
    bed_finish(&bed);
}

static void cut_off_meanwhile(void)
{
    struct bed bed;

    if (!can_be_made()) {
        return;
    }
    bed_init(&bed, 2 * HUGE_PAGE_BYTES);
    struct shared_memory *page = huge_page_open(&bed.pages, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES, true, &bed.is_new);

    g_assert_nonnull(page);
    g_assert_cmpint(ftruncate(bed.fd, 0), ==, 0);
    g_assert_cmpint(pread(open("/proc/self/exe", O_RDONLY | O_CLOEXEC), page->bytes, 4096, 0), ==, -1);
    g_assert_cmpint(errno, ==, EFAULT);
    g_assert_cmpuint(page->bytes[0], ==, 0);
    g_assert_true(shared_memory_is_lost(page));
    shared_memory_unmap(page);
    bed_finish(&bed);
}

/* A descriptor of which no page can be made: soon nobody tries any more, and nothing shows but zeroes. */
static void refusals(void)
{
    struct huge_pages pages;
    char path[] = "/dev/shm/huge-page-test-XXXXXX";
    int writable = mkstemp(path);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    bool is_new;

    g_assert_cmpint(ftruncate(writable, HUGE_PAGE_BYTES), ==, 0);
    unlink(path);
    huge_pages_init(&pages, fd);
    for (unsigned i = 0; i < 1000; i++) {
        g_assert_null(huge_page_open(&pages, i * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES, true, &is_new));
    }
    g_assert_cmpint(lseek(writable, 0, SEEK_DATA), ==, -1);
    huge_pages_destroy(&pages);
    close(fd);
    close(writable);
}

/*
 * Writers of pieces that lie anywhere, and of the gaps between them, into the same extents of a file that grows or is
 * a hole. What would break: the zero that goes before a page is made, or the making of it, wipes out what another one
 * has just written.
 */
#define CROWD_BYTES (24 * HUGE_PAGE_BYTES)
#define CROWD_GAP 4096
#define CROWD_THREADS 4

struct crowd {
    struct bed bed;
    uint64_t starts[512]; /* of pieces; a gap before each */
    unsigned pieces;
    atomic_uint next;
    atomic_uint pages;
};

static uint8_t value_at(uint64_t offset)
{
    return (uint8_t)(offset / 509 % 251 + 1);
}

static void fill(uint8_t *memory, uint64_t offset, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++) {
        memory[i] = value_at(offset + i);
    }
}

static void crowd_write(struct crowd *crowd, uint64_t offset, uint64_t bytes)
{
    g_autofree uint8_t *memory = g_malloc(bytes);

    fill(memory, offset, bytes);
    g_assert_cmpint(pwrite(crowd->bed.fd, memory, bytes, (off_t)offset), ==, (ssize_t)bytes);
}

static void *crowd_main(void *argument)
{
    struct crowd *crowd = argument;

    for (unsigned i = atomic_fetch_add(&crowd->next, 1); i < 2 * crowd->pieces; i = atomic_fetch_add(&crowd->next, 1)) {
        uint64_t offset = crowd->starts[i / 2], end = crowd->starts[i / 2 + 1] - CROWD_GAP;

        if (i % 2) {
            crowd_write(crowd, offset - CROWD_GAP, CROWD_GAP);
            continue;
        }
        while (offset < end) {
            uint64_t bytes = min_u64(end - offset, HUGE_PAGE_BYTES - offset % HUGE_PAGE_BYTES);
            bool is_new;
            struct shared_memory *page = huge_page_open(&crowd->bed.pages, offset, end - offset, true, &is_new);

            if (page) {
                fill(page->bytes + offset % HUGE_PAGE_BYTES, offset, bytes);
                atomic_fetch_add(&crowd->pages, 1);
            } else {
                crowd_write(crowd, offset, bytes);
            }
            shared_memory_unmap(page);
            offset += bytes;
        }
    }
    return NULL;
}

static unsigned crowd_run(bool grows)
{
    g_autofree struct crowd *crowd = g_new0(struct crowd, 1);
    g_autofree uint8_t *all = g_malloc(CROWD_BYTES), *expected = g_malloc(CROWD_BYTES);
    pthread_t threads[CROWD_THREADS];
    uint64_t end = CROWD_GAP;

    while (end < CROWD_BYTES && crowd->pieces + 1 < array_size(crowd->starts)) {
        crowd->starts[crowd->pieces++] = end;
        end += CROWD_GAP + (uint64_t)g_test_rand_int_range(4096, 3 * MiB);
    }
    end = crowd->starts[--crowd->pieces] - CROWD_GAP;
    bed_init(&crowd->bed, grows ? 0 : CROWD_BYTES);
    for (unsigned i = 0; i < CROWD_THREADS; i++) {
        g_assert_cmpint(pthread_create(&threads[i], NULL, crowd_main, crowd), ==, 0);
    }
    for (unsigned i = 0; i < CROWD_THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    fill(expected, 0, end);
    g_assert_cmpuint(size_of(&crowd->bed), ==, grows ? end : CROWD_BYTES);
    g_assert_cmpint(pread(crowd->bed.fd, all, end, 0), ==, (ssize_t)end);
    g_assert_true(!memcmp(all, expected, end));
    bed_finish(&crowd->bed);
    return crowd->pages;
}

static void crowds(void)
{
    unsigned pages = 0;

    if (!can_be_made()) {
        return;
    }
    for (unsigned round = 0; round < 6; round++) {
        pages += crowd_run(round % 2);
    }
    g_assert_cmpuint(pages, >, 0);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/huge-page/holes", holes);
    g_test_add_func("/huge-page/growth", growth);
    g_test_add_func("/huge-page/trim", trim);
    g_test_add_func("/huge-page/what-is-there", what_is_there);
    g_test_add_func("/huge-page/cut-off-meanwhile", cut_off_meanwhile);
    g_test_add_func("/huge-page/refusals", refusals);
    g_test_add_func("/huge-page/crowds", crowds);
    return g_test_run();
}

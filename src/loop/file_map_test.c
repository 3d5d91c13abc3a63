/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Files in tmpfs that are written through mappings: what is the file's and what is not, growth, cutting by ourselves
 * and by others at any moment, a file system without room, and many threads.
 */
#include "base/size.h"
#include "loop/file_map.h"
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <sched.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

struct bed {
    int fd;
    struct file_map map;
};

static void bed_init_in(struct bed *bed, const char *directory, uint64_t size)
{
    g_autofree char *path = g_strdup_printf("%s/file-map-test-XXXXXX", directory);

    bed->fd = mkstemp(path);
    g_assert_cmpint(bed->fd, >=, 0);
    unlink(path);
    g_assert_cmpint(ftruncate(bed->fd, (off_t)size), ==, 0);
    file_map_init(&bed->map, bed->fd, path);
}

static void bed_init(struct bed *bed, uint64_t size)
{
    bed_init_in(bed, "/dev/shm", size);
}

static void bed_finish(struct bed *bed)
{
    file_map_destroy(&bed->map);
    close(bed->fd);
}

static struct stat status_of(const struct bed *bed)
{
    struct stat status;

    g_assert_cmpint(fstat(bed->fd, &status), ==, 0);
    return status;
}

static bool write_bytes(struct bed *bed, uint64_t offset, uint8_t value, size_t bytes)
{
    g_autofree uint8_t *memory = g_malloc(bytes);
    struct iovec iov[2] = {{memory, bytes / 3}, {memory + bytes / 3, bytes - bytes / 3}};

    memset(memory, value, bytes);
    return file_map_write(&bed->map, offset, iov, 2, bytes);
}

/* In pieces that are short enough to make pages. True: all of it. */
static bool fill(struct bed *bed, uint64_t offset, uint8_t value, uint64_t bytes)
{
    for (uint64_t at = 0; at < bytes; at += 4096) {
        if (!write_bytes(bed, offset + at, value, 4096)) {
            return false;
        }
    }
    return true;
}

static bool read_bytes(struct bed *bed, uint64_t offset, uint8_t *to, size_t bytes)
{
    struct iovec iov = {to, bytes};

    return file_map_read(&bed->map, offset, &iov, 1, bytes);
}

/* We cut it to so many pages, and somebody makes it longer: what lies behind is a hole, not known, and stays one. */
static void cut_and_grow(struct bed *bed, uint64_t size, uint64_t grown)
{
    uint8_t read;

    file_map_cut(&bed->map, size);
    g_assert_cmpint(ftruncate(bed->fd, (off_t)size), ==, 0);
    file_map_cut(&bed->map, size);
    g_assert_cmpint(ftruncate(bed->fd, (off_t)grown), ==, 0);
    for (uint64_t at = size; at < grown; at += 4096) {
        g_assert_false(read_bytes(bed, at, &read, 1));
    }
    g_assert_cmpuint((uint64_t)status_of(bed).st_blocks, ==, size / 512);
}

static void assert_bytes(const struct bed *bed, uint64_t offset, uint8_t value, size_t bytes)
{
    g_autofree uint8_t *memory = g_malloc(bytes);

    g_assert_cmpint(pread(bed->fd, memory, bytes, (off_t)offset), ==, (ssize_t)bytes);
    for (size_t i = 0; i < bytes; i++) {
        g_assert_cmpuint(memory[i], ==, value);
    }
}

static void test_what_is_written_is_the_files(void)
{
    struct bed bed;
    uint8_t read[300];

    bed_init(&bed, 1 * MiB);
    g_assert_true(write_bytes(&bed, 5000, 7, 300));
    assert_bytes(&bed, 5000, 7, 300);
    assert_bytes(&bed, 4999, 0, 1);
    assert_bytes(&bed, 5300, 0, 1);
    g_assert_true(read_bytes(&bed, 5000, read, 300));
    g_assert_cmpuint(read[0], ==, 7);
    g_assert_cmpuint(read[299], ==, 7);
    g_assert_cmpint(pwrite(bed.fd, "x", 1, 5000), ==, 1);
    g_assert_true(read_bytes(&bed, 5000, read, 300));
    g_assert_cmpuint(read[0], ==, 'x');
    bed_finish(&bed);
}

static void test_holes_stay_holes_when_they_are_read(void)
{
    struct bed bed;
    uint8_t read[8192];

    bed_init(&bed, 1 * MiB);
    g_assert_true(write_bytes(&bed, 64 * KiB, 1, 4096));
    g_assert_false(read_bytes(&bed, 64 * KiB, read, 8192));
    g_assert_false(read_bytes(&bed, 0, read, 1));
    g_assert_cmpint(status_of(&bed).st_blocks, ==, 8);
    g_assert_true(read_bytes(&bed, 64 * KiB, read, 4096));
    g_assert_cmpint(fallocate(bed.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 64 * KiB, 4096), ==, 0);
    file_map_forget(&bed.map, 64 * KiB, 4096);
    g_assert_false(read_bytes(&bed, 64 * KiB, read, 1));
    g_assert_cmpint(status_of(&bed).st_blocks, ==, 0);
    bed_finish(&bed);
}

static bool page_is_known(const struct bed *bed, uint64_t page)
{
    const struct file_view *view = &bed->map.views[atomic_load(&bed->map.count) - 1];

    return atomic_load(&view->present[page / 64]) >> (page % 64) & 1;
}

/* Every page that a range touches, and no other. */
static void test_what_is_forgotten(void)
{
    static const uint64_t ranges[][2] = {
        {0, 1},
        {4095, 2},
        {4096, 4096},
        {63 * 4096, 2 * 4096},
        {100 * 4096 + 1, 130 * 4096},
        {64 * 4096, 256 * KiB},
        {0, 1 * MiB},
        {1 * MiB, 1},
        {1 * MiB - 1, UINT64_MAX / 2},
    };
    struct bed bed;
    uint8_t read[1];

    bed_init(&bed, 1 * MiB);
    g_assert_true(fill(&bed, 0, 1, 1 * MiB));
    for (unsigned i = 0; i < G_N_ELEMENTS(ranges); i++) {
        uint64_t begin = ranges[i][0], end = begin + ranges[i][1];

        file_map_forget(&bed.map, begin, end - begin);
        for (uint64_t page = 0; page < 256; page++) {
            bool touched = begin < (page + 1) * 4096 && end > page * 4096;

            g_assert_cmpint(page_is_known(&bed, page), ==, !touched);
        }
        for (uint64_t page = 0; page < 256; page++) { /* and it is learnt again */
            g_assert_true(read_bytes(&bed, page * 4096, read, 1));
            g_assert_true(page_is_known(&bed, page));
        }
    }
    bed_finish(&bed);
}

/* A file that was cut and grew again has holes where it had pages. */
static void test_what_was_cut_is_forgotten(void)
{
    struct bed bed;
    uint8_t read[1];

    bed_init(&bed, 1 * MiB);
    g_assert_true(fill(&bed, 0, 1, 1 * MiB));
    cut_and_grow(&bed, 8192, 1 * MiB);
    g_assert_true(read_bytes(&bed, 8191, read, 1));
    bed_finish(&bed);
}

static void test_long_writes_go_to_pages_that_are_there(void)
{
    struct bed bed;

    bed_init(&bed, 1 * MiB);
    g_assert_false(write_bytes(&bed, 0, 1, 64 * KiB));
    g_assert_cmpint(status_of(&bed).st_blocks, ==, 0);
    g_assert_true(fill(&bed, 0, 1, 64 * KiB));
    g_assert_true(write_bytes(&bed, 0, 2, 64 * KiB));
    assert_bytes(&bed, 0, 2, 64 * KiB);
    bed_finish(&bed);
}

static void test_the_time_of_modification(void)
{
    struct bed bed;

    bed_init(&bed, 1 * MiB);
    struct timespec before = status_of(&bed).st_mtim;

    file_map_touch(&bed.map);
    g_assert_cmpint(status_of(&bed).st_mtim.tv_nsec, ==, before.tv_nsec);
    g_usleep(20000); /* longer than the clock that files have goes on at a time */
    g_assert_true(write_bytes(&bed, 0, 1, 512));
    file_map_touch(&bed.map);
    struct timespec after = status_of(&bed).st_mtim;

    g_assert_true(after.tv_sec > before.tv_sec || after.tv_nsec > before.tv_nsec);
    bed_finish(&bed);
}

static void test_nothing_is_written_behind_the_end(void)
{
    struct bed bed;
    uint8_t read[2];

    bed_init(&bed, 1 * MiB + 1);
    g_assert_false(write_bytes(&bed, 1 * MiB, 1, 2));
    g_assert_false(write_bytes(&bed, 100 * MiB, 1, 1));
    g_assert_false(read_bytes(&bed, 1 * MiB, read, 2));
    g_assert_cmpint(status_of(&bed).st_size, ==, 1 * MiB + 1);
    g_assert_true(write_bytes(&bed, 1 * MiB, 1, 1));
    bed_finish(&bed);
}

static void test_it_grows_with_the_file(void)
{
    struct bed bed;
    uint64_t size = 1;

    bed_init(&bed, 0);
    g_assert_false(write_bytes(&bed, 0, 1, 1));
    for (uint8_t i = 1; size < 64 * GiB; i++, size *= 3) { /* through several views */
        g_assert_cmpint(ftruncate(bed.fd, (off_t)size), ==, 0);
        g_assert_true(write_bytes(&bed, size - 1, i, 1));
        assert_bytes(&bed, size - 1, i, 1);
        assert_bytes(&bed, size / 3 ? size / 3 - 1 : 0, size / 3 ? i - 1 : i, 1);
    }
    g_assert_cmpuint(atomic_load(&bed.map.count), >, 2);
    bed_finish(&bed);
}

static void test_we_cut_it(void)
{
    struct bed bed;

    bed_init(&bed, 1 * MiB);
    g_assert_true(fill(&bed, 0, 1, 1 * MiB));
    file_map_cut(&bed.map, 8192);
    g_assert_cmpint(ftruncate(bed.fd, 8192), ==, 0);
    g_assert_false(write_bytes(&bed, 8190, 2, 4));
    g_assert_true(write_bytes(&bed, 8000, 2, 192));
    g_assert_cmpint(ftruncate(bed.fd, 1 * MiB), ==, 0);
    g_assert_true(write_bytes(&bed, 512 * KiB, 3, 1));
    assert_bytes(&bed, 7999, 1, 1);
    assert_bytes(&bed, 8000, 2, 192);
    assert_bytes(&bed, 8192, 0, 512 * KiB - 8192);
    bed_finish(&bed);
}

/* It grew by a call, so that the map knows of pages behind the end that it has seen. */
static void test_we_cut_what_grew_by_a_call(void)
{
    struct bed bed;
    uint8_t read[1];

    bed_init(&bed, 5000);
    g_assert_true(write_bytes(&bed, 0, 1, 5000));
    g_autofree uint8_t *more = g_malloc0(64 * KiB);

    g_assert_cmpint(pwrite(bed.fd, more, 64 * KiB - 5000, 5000), ==, 64 * KiB - 5000);
    g_assert_true(read_bytes(&bed, 4096, read, 1));
    cut_and_grow(&bed, 8192, 64 * KiB);
    bed_finish(&bed);
}

/* What is given back is forgotten by the view that is in use. */
static void test_forgetting_after_growth(void)
{
    struct bed bed;
    uint8_t read[1];

    bed_init(&bed, 1 * MiB);
    g_assert_true(fill(&bed, 0, 1, 1 * MiB));
    g_assert_cmpint(ftruncate(bed.fd, 1 * GiB), ==, 0);
    g_assert_true(write_bytes(&bed, 1 * GiB - 1, 1, 1));
    g_assert_cmpuint(atomic_load(&bed.map.count), ==, 2);
    g_assert_true(read_bytes(&bed, 0, read, 1));
    g_assert_cmpint(fallocate(bed.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 1 * MiB), ==, 0);
    file_map_forget(&bed.map, 0, 1 * MiB);
    g_assert_false(read_bytes(&bed, 0, read, 1));
    bed_finish(&bed);
}

static void test_long_reads(void)
{
    struct bed bed;
    g_autofree uint8_t *read = g_malloc(8 * MiB);

    bed_init(&bed, 8 * MiB);
    g_assert_true(fill(&bed, 0, 1, 8 * MiB));
    g_assert_true(read_bytes(&bed, 12345, read, 3 * MiB));
    g_assert_cmpuint(read[3 * MiB - 1], ==, 1);
    g_assert_false(read_bytes(&bed, 0, read, 8 * MiB)); /* more than is asked for at a time */
    bed_finish(&bed);
}

static void test_who_reads_sees_first_that_it_was_cut(void)
{
    struct bed bed;
    uint8_t read;

    bed_init(&bed, 1 * MiB);
    g_assert_true(fill(&bed, 0, 1, 1 * MiB));
    g_assert_cmpint(ftruncate(bed.fd, 4096), ==, 0);
    g_assert_false(read_bytes(&bed, 512 * KiB, &read, 1));
    g_assert_true(file_map_is_over(&bed.map));
    bed_finish(&bed);
}

static void test_who_peeks(void)
{
    struct bed bed;
    const uint8_t *seen;
    int pair[2];

    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), ==, 0);
    bed_init(&bed, 1 * MiB);
    g_assert_null(file_map_peek(&bed.map, 0, 4096)); /* a hole */
    g_assert_true(fill(&bed, 0, 7, 128 * KiB));
    g_assert_null(file_map_peek(&bed.map, 64 * KiB, 128 * KiB));
    g_assert_null(file_map_peek(&bed.map, 1 * MiB, 4096)); /* behind the end */
    seen = file_map_peek(&bed.map, 512, 64 * KiB);
    g_assert_nonnull(seen);
    g_assert_cmpuint(seen[0], ==, 7);
    g_assert_cmpuint(seen[64 * KiB - 1], ==, 7);
    g_assert_true(write_bytes(&bed, 512, 8, 4096));
    g_assert_cmpuint(seen[0], ==, 8);
    g_assert_true(file_map_is_sound(&bed.map, seen, 64 * KiB));
    g_assert_cmpuint(status_of(&bed).st_blocks, ==, 128 * KiB / 512);

    file_map_forget(&bed.map, 0, 4096);
    g_assert_cmpint(fallocate(bed.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), ==, 0);
    g_assert_null(file_map_peek(&bed.map, 0, 4096));

    seen = file_map_peek(&bed.map, 8192, 4096);
    g_assert_cmpint(ftruncate(bed.fd, 0), ==, 0);
    g_assert_cmpint(send(pair[0], seen, 4096, MSG_DONTWAIT), ==, -1);
    g_assert_cmpint(errno, ==, EFAULT);
    g_assert_true(file_map_is_sound(&bed.map, seen, 4096)); /* a call that fails harms nobody */
    g_assert_cmpuint(*(volatile const uint8_t *)seen, ==, 0);
    g_assert_false(file_map_is_sound(&bed.map, seen + 4095, 1));
    g_assert_true(file_map_is_sound(&bed.map, seen - 4096, 4096));
    g_assert_true(file_map_is_sound(&bed.map, seen + 4096, 4096));
    g_assert_null(file_map_peek(&bed.map, 0, 4096));
    bed_finish(&bed);
    close(pair[0]);
    close(pair[1]);
}

static void test_others_cut_it(void)
{
    struct bed bed;
    uint8_t read;

    bed_init(&bed, 1 * MiB);
    g_assert_true(fill(&bed, 0, 1, 1 * MiB));
    g_assert_cmpint(ftruncate(bed.fd, 4096), ==, 0);
    g_assert_false(write_bytes(&bed, 512 * KiB, 2, 1));
    g_assert_false(write_bytes(&bed, 0, 2, 1)); /* the view is lost: what is written there would be */
    g_assert_false(read_bytes(&bed, 0, &read, 1));
    assert_bytes(&bed, 0, 1, 4096);
    g_assert_cmpint(status_of(&bed).st_size, ==, 4096);
    bed_finish(&bed);
}

static void test_no_room(void)
{
    struct bed bed;
    g_autofree char *directory = g_dir_make_tmp("file-map-test-XXXXXX", NULL);

    if (unshare(CLONE_NEWNS) < 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("none", directory, "tmpfs", 0, "size=64k") < 0) {
        g_test_skip("a file system of our own cannot be mounted here");
        rmdir(directory);
        return;
    }
    bed_init_in(&bed, directory, 1 * MiB);
    g_assert_true(fill(&bed, 0, 1, 32 * KiB));
    g_assert_false(fill(&bed, 64 * KiB, 2, 128 * KiB));
    assert_bytes(&bed, 0, 1, 32 * KiB);
    g_assert_cmpint(pwrite(bed.fd, "x", 1, 512 * KiB), ==, -1); /* which is what tells the user */
    g_assert_cmpint(errno, ==, ENOSPC);
    bed_finish(&bed);
    umount(directory);
    rmdir(directory);
}

#define WRITERS 4
#define AREA (256 * KiB)
#define TURNS 3000

struct writer {
    struct bed *bed;
    unsigned number;
    bool cut; /* others cut the file meanwhile */
    unsigned by_map, read_by_map;
};

/* As the file's user does: what the mapping does not take is written by a call. Every byte is in the file afterwards.
 */
static void *write_and_look(void *argument)
{
    struct writer *writer = argument;
    struct bed *bed = writer->bed;
    g_autoptr(GRand) chance = g_rand_new_with_seed(writer->number);
    uint8_t memory[4096], seen[4096];

    for (unsigned i = 0; i < TURNS; i++) {
        uint64_t offset = writer->number * AREA + (uint64_t)g_rand_int_range(chance, 0, AREA - 4096);
        struct iovec iov = {memory, (size_t)g_rand_int_range(chance, 1, 4096)};

        memset(memory, (int)i, sizeof(memory));
        if (file_map_write(&bed->map, offset, &iov, 1, iov.iov_len)) {
            writer->by_map++;
        } else {
            g_assert_cmpint(pwrite(bed->fd, memory, iov.iov_len, (off_t)offset), ==, (ssize_t)iov.iov_len);
        }
        if (!writer->cut) {
            g_assert_cmpint(pread(bed->fd, seen, iov.iov_len, (off_t)offset), ==, (ssize_t)iov.iov_len);
            g_assert_cmpint(memcmp(memory, seen, iov.iov_len), ==, 0);
            struct iovec to = {seen, iov.iov_len};

            memset(seen, ~(int)i, sizeof(seen));
            if (file_map_read(&bed->map, offset, &to, 1, to.iov_len)) {
                g_assert_cmpint(memcmp(memory, seen, iov.iov_len), ==, 0);
                writer->read_by_map++;
            }
        }
    }
    return NULL;
}

static void run_writers(bool cut)
{
    struct bed bed;
    struct writer writers[WRITERS];
    GThread *threads[WRITERS];
    g_autoptr(GRand) chance = g_rand_new_with_seed(1);

    bed_init(&bed, 1);
    for (unsigned i = 0; i < WRITERS; i++) {
        writers[i] = (struct writer){.bed = &bed, .number = i, .cut = cut};
        threads[i] = g_thread_new(NULL, write_and_look, &writers[i]);
    }
    for (unsigned i = 0; i < 2000; i++) { /* beside them it grows into new views, and into the writers' areas */
        if (cut) {
            g_assert_cmpint(ftruncate(bed.fd, g_rand_int_range(chance, 0, WRITERS * AREA)), ==, 0);
        } else {
            g_assert_cmpint(pwrite(bed.fd, "", 1, (off_t)(2 * WRITERS * AREA + i * MiB)), ==, 1);
        }
        sched_yield();
    }
    for (unsigned i = 0; i < WRITERS; i++) {
        g_thread_join(threads[i]);
        g_assert_true(cut || (writers[i].by_map > 0 && writers[i].read_by_map > 0));
    }
    bed_finish(&bed);
}

static void test_many_write_while_it_grows(void)
{
    run_writers(false);
}

/* A writer that comes through this has met SIGBUS, or the others were too slow. */
static void test_many_write_while_it_is_cut(void)
{
    run_writers(true);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/file-map/what-is-written-is-the-files", test_what_is_written_is_the_files);
    g_test_add_func("/file-map/holes-stay-holes-when-they-are-read", test_holes_stay_holes_when_they_are_read);
    g_test_add_func("/file-map/what-is-forgotten", test_what_is_forgotten);
    g_test_add_func("/file-map/what-was-cut-is-forgotten", test_what_was_cut_is_forgotten);
    g_test_add_func("/file-map/long-writes-go-to-pages-that-are-there", test_long_writes_go_to_pages_that_are_there);
    g_test_add_func("/file-map/the-time-of-modification", test_the_time_of_modification);
    g_test_add_func("/file-map/nothing-is-written-behind-the-end", test_nothing_is_written_behind_the_end);
    g_test_add_func("/file-map/it-grows-with-the-file", test_it_grows_with_the_file);
    g_test_add_func("/file-map/we-cut-it", test_we_cut_it);
    g_test_add_func("/file-map/we-cut-what-grew-by-a-call", test_we_cut_what_grew_by_a_call);
    g_test_add_func("/file-map/forgetting-after-growth", test_forgetting_after_growth);
    g_test_add_func("/file-map/long-reads", test_long_reads);
    g_test_add_func("/file-map/who-reads-sees-first-that-it-was-cut", test_who_reads_sees_first_that_it_was_cut);
    g_test_add_func("/file-map/who-peeks", test_who_peeks);
    g_test_add_func("/file-map/others-cut-it", test_others_cut_it);
    g_test_add_func("/file-map/no-room", test_no_room);
    g_test_add_func("/file-map/many-write-while-it-grows", test_many_write_while_it_grows);
    g_test_add_func("/file-map/many-write-while-it-is-cut", test_many_write_while_it_is_cut);
    return g_test_run();
}

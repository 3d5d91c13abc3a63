/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Files on tmpfs, on disk and with O_DIRECT: exact transfers, zeroes behind the end, allocation, extents,
 * locks, many at once from two loops; on both engines.
 */
#include "base/list.h"
#include "base/size.h"
#include "loop/file.h"
#include "loop/sync.h"
#include "loop/test_support.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

static char *make_path(const char *folder, const char *name)
{
    return g_strdup_printf("%s/interlock-%d-%s", folder, (int)getpid(), name);
}

static void fill(char *data, size_t bytes, unsigned seed)
{
    for (size_t i = 0; i < bytes; i++) {
        data[i] = (char)(i * 31 + i / 512 + seed);
    }
}

static struct file *must_open(const char *path, unsigned flags)
{
    struct file *file;
    struct error *err = NULL;
    int r = file_open(path, flags, &file, &err);

    if (r < 0) {
        g_error("%s", err->message);
    }
    return file;
}

/* Everything that holds wherever the file is; offsets are multiples of 4 KiB for direct ones. */
static void transfers(const char *path, unsigned extra)
{
    struct file *file = must_open(path, FILE_WRITABLE | FILE_CREATE | FILE_TRUNCATE | extra);
    const size_t total = 3 * MiB;
    char *data = file_memory(total), *back = file_memory(total);
    struct iovec iov[40];
    struct file_info info;

    g_assert_cmpint(file_info(file, &info), ==, 0);
    g_assert_cmpuint(info.size, ==, 0);
    g_assert_cmpuint(info.alignment, <=, 4096);
    g_assert_true(extra & FILE_DIRECT || info.alignment == 1);
    fill(data, total, 1);
    struct iovec whole = {data, total}, whole_back = {back, total};
    g_assert_cmpint(file_write(file, 0, total, buffers_one(&whole), false), ==, 0);
    g_assert_cmpint(file_sync(file), ==, 0);
    /* Forty scattered pieces, with a skip, and fua. */
    for (size_t i = 0; i < array_size(iov); i++) {
        iov[i] = (struct iovec){data + (array_size(iov) - 1 - i) * 8192, 8192};
    }
    struct buffers scattered = {iov, array_size(iov), 4096};
    size_t scattered_bytes = array_size(iov) * 8192 - 4096;
    g_assert_cmpint(file_write(file, 4096, scattered_bytes, scattered, true), ==, 0);
    memset(back, 0xee, total);
    g_assert_cmpint(file_read(file, 4096, scattered_bytes, buffers_one(&whole_back)), ==, 0);
    g_autofree char *expected = g_malloc(scattered_bytes);
    buffers_copy_out(scattered, expected, scattered_bytes);
    g_assert_true(!memcmp(back, expected, scattered_bytes));
    /* Behind the end: zeroes. */
    memset(back, 0xee, total);
    g_assert_cmpint(file_read(file, total - 8192, 65536, buffers_one(&whole_back)), ==, 0);
    g_assert_true(!memcmp(back, data + total - 8192, 8192));
    g_assert_true(memory_is_zero(back + 8192, 65536 - 8192));
    g_assert_cmpint((unsigned char)back[65536], ==, 0xee);
    memset(back, 0xee, total);
    g_assert_cmpint(file_read(file, 64 * MiB, 8192, buffers_one(&whole_back)), ==, 0);
    g_assert_true(memory_is_zero(back, 8192));
    g_assert_cmpint(file_read(file, (uint64_t)INT64_MAX + 5, 8192, buffers_one(&whole_back)), ==, -EINVAL);
    g_assert_cmpint(file_write(file, UINT64_MAX - 4095, 8192, buffers_one(&whole), false), ==, -EFBIG);
    /* The file ends inside a block. */
    g_assert_cmpint(file_truncate(file, 8192 + 100), ==, 0);
    memset(back, 0xee, total);
    g_assert_cmpint(file_read(file, 8192, 8192, buffers_one(&whole_back)), ==, 0);
    g_assert_true(memory_is_zero(back + 100, 8092));
    g_assert_cmpint(file_info(file, &info), ==, 0);
    g_assert_cmpuint(info.size, ==, 8292);
    file_close(file);
    free(data);
    free(back);
}

/* A big transfer from many odd pieces, more than one system call takes. */
static void odd_pieces(const char *path)
{
    struct file *file = must_open(path, FILE_WRITABLE | FILE_CREATE | FILE_TRUNCATE);
    const unsigned count = 3000;
    g_autofree struct iovec *iov = g_new(struct iovec, count);
    g_autofree char *data = g_malloc(count * 100), *back = g_malloc0(count * 100);
    size_t at = 0;

    fill(data, count * 100, 9);
    for (unsigned i = 0; i < count; i++) {
        size_t bytes = i % 100;
        iov[i] = (struct iovec){data + at, bytes};
        at += bytes;
    }
    g_assert_cmpint(file_write(file, 12345, at, (struct buffers){iov, count, 0}, false), ==, 0);
    for (unsigned i = 0; i < count; i++) {
        iov[i].iov_base = back + ((char *)iov[i].iov_base - data);
    }
    g_assert_cmpint(file_read(file, 12345, at, (struct buffers){iov, count, 0}), ==, 0);
    g_assert_true(!memcmp(data, back, at));
    file_close(file);
}

static void allocation(const char *path)
{
    struct file *file = must_open(path, FILE_WRITABLE | FILE_CREATE | FILE_TRUNCATE);
    struct file_info info;
    g_autofree char *data = g_malloc(4 * MiB);
    struct iovec iov = {data, 4 * MiB};
    bool is_data;
    uint64_t end;
    int r;

    fill(data, 4 * MiB, 3);
    g_assert_cmpint(file_extent(file, 0, &is_data, &end), ==, -ENXIO);
    g_assert_cmpint(file_truncate(file, 1 * MiB), ==, 0);
    g_assert_cmpint(file_extent(file, 4096, &is_data, &end), ==, 0);
    g_assert_true(!is_data && end == 1 * MiB);
    g_assert_cmpint(file_write(file, 1 * MiB, 4 * MiB, buffers_one(&iov), false), ==, 0);
    g_assert_cmpint(file_sync(file), ==, 0);
    g_assert_cmpint(file_extent(file, 0, &is_data, &end), ==, 0);
    g_assert_true(!is_data && end == 1 * MiB);
    g_assert_cmpint(file_extent(file, 1 * MiB + 5, &is_data, &end), ==, 0);
    g_assert_true(is_data && end == 5 * MiB);
    g_assert_cmpint(file_extent(file, 5 * MiB, &is_data, &end), ==, -ENXIO);
    g_assert_cmpint(file_allocate(file, FILE_PUNCH, 2 * MiB, 2 * MiB), ==, 0);
    g_assert_cmpint(file_extent(file, 2 * MiB, &is_data, &end), ==, 0);
    g_assert_true(!is_data && end == 4 * MiB);
    r = file_allocate(file, FILE_ZERO, 4 * MiB, 65536);
    if (r != -EOPNOTSUPP) {
        g_assert_cmpint(r, ==, 0);
        g_assert_cmpint(file_read(file, 4 * MiB, 131072, buffers_one(&iov)), ==, 0);
        g_assert_true(memory_is_zero(data, 65536));
        g_assert_false(memory_is_zero(data + 65536, 65536));
    }
    r = file_allocate(file, FILE_PREALLOCATE, 5 * MiB, 3 * MiB);
    if (r != -EOPNOTSUPP) {
        g_assert_cmpint(r, ==, 0);
        g_assert_cmpint(file_info(file, &info), ==, 0);
        g_assert_cmpuint(info.size, ==, 8 * MiB);
        g_assert_cmpuint(info.allocated, >=, 3 * MiB);
    }
    file_close(file);
}

static void locks(const char *path)
{
    struct file *a = must_open(path, FILE_WRITABLE | FILE_CREATE), *b = must_open(path, FILE_WRITABLE);
    struct file_info info_a, info_b;
    uint64_t where = 0;

    g_assert_cmpint(file_info(a, &info_a), ==, 0);
    g_assert_cmpint(file_info(b, &info_b), ==, 0);
    g_assert_true(info_a.device == info_b.device && info_a.inode == info_b.inode);
    g_assert_cmpint(file_lock_test(b, 100, 100, NULL), ==, 0);
    g_assert_cmpint(file_lock_shared(a, 150, 1), ==, 0);
    g_assert_cmpint(file_lock_test(a, 100, 100, NULL), ==, 0);
    g_assert_cmpint(file_lock_test(b, 100, 100, &where), ==, -EAGAIN);
    g_assert_cmpuint(where, ==, 150);
    g_assert_cmpint(file_lock_shared(b, 150, 1), ==, 0);
    g_assert_cmpint(file_unlock(a, 150, 1), ==, 0);
    g_assert_cmpint(file_lock_test(b, 100, 100, NULL), ==, 0);
    g_assert_cmpint(file_lock_test(a, 100, 100, NULL), ==, -EAGAIN);
    file_close(b);
    g_assert_cmpint(file_lock_test(a, 100, 100, NULL), ==, 0);
    file_close(a);
}

/* ---- many at once: more than a submission queue holds ---- */

#define SWARM 800
#define SWARM_ROUNDS 4

struct swarm {
    struct file *file;
    struct co_group group;
    unsigned next;
};

static void swarm_entry(void *argument)
{
    struct swarm *swarm = argument;
    unsigned number = __atomic_fetch_add(&swarm->next, 1, __ATOMIC_RELAXED);
    char *data = file_memory(4096), *back = file_memory(4096);
    struct iovec iov = {data, 4096}, iov_back = {back, 4096};

    for (unsigned i = 0; i < SWARM_ROUNDS; i++) {
        uint64_t offset = (uint64_t)(number * SWARM_ROUNDS + i) * 4096;

        fill(data, 4096, number * SWARM_ROUNDS + i);
        g_assert_cmpint(file_write(swarm->file, offset, 4096, buffers_one(&iov), false), ==, 0);
        g_assert_cmpint(file_read(swarm->file, offset, 4096, buffers_one(&iov_back)), ==, 0);
        g_assert_true(!memcmp(data, back, 4096));
    }
    free(data);
    free(back);
    co_group_leave(&swarm->group);
}

static void swarm_run(const char *path, unsigned extra)
{
    struct swarm swarm = {.file = must_open(path, FILE_WRITABLE | FILE_CREATE | FILE_TRUNCATE | extra)};
    struct loop *other;

    g_assert_cmpint(loop_thread_start("swarm", test_kind, &other, NULL), ==, 0);
    co_group_init(&swarm.group);
    for (int i = 0; i < SWARM; i++) {
        co_group_enter(&swarm.group);
        loop_spawn(i % 2 ? other : loop_self(), swarm_entry, &swarm);
    }
    co_group_wait(&swarm.group);
    co_group_destroy(&swarm.group);
    file_close(swarm.file);
    loop_thread_join(other);
}

/* ---- from file to file ---- */

#define COPY_TOTAL (6 * MiB)
#define COPY_PIECE (1536 * KiB + 4096)

struct file_copying {
    struct buffers_elsewhere view;
    struct file *to;
    uint64_t to_offset;
};

static int found_to_write(struct buffers_elsewhere *view, struct file *file, uint64_t offset, size_t at, uint64_t bytes)
{
    struct file_copying *copying = container_of(view, struct file_copying, view);
    struct buffers_elsewhere from = {.file = file, .offset = offset, .aid = view->aid};

    return file_write(copying->to, copying->to_offset + at, bytes, buffers_of_elsewhere(&from), false);
}

static int copy_file(struct file *from, uint64_t offset, struct file *to, uint64_t to_offset, uint64_t bytes,
                     uint64_t zero_unit)
{
    g_autofree char *memory = g_malloc(100000);
    struct file_copying copying = {
        .view = {.found = found_to_write, .aid = {{memory, 100000}, zero_unit}}, .to = to, .to_offset = to_offset};

    return file_read(from, offset, bytes, buffers_of_elsewhere(&copying.view));
}

struct copying_piece {
    struct file *from, *to;
    uint64_t offset, bytes;
    struct co_group *group;
};

static void copying_piece_entry(void *argument)
{
    struct copying_piece *piece = argument;

    g_assert_cmpint(copy_file(piece->from, piece->offset, piece->to, piece->offset + 4096, piece->bytes, 4096), ==, 0);
    co_group_leave(piece->group);
}

/* Long pieces at once and short writes between them, all into one file: everything is where it belongs. */
static void copies_at_once(struct file *from, struct file *to, const char *data)
{
    struct copying_piece pieces[COPY_TOTAL / COPY_PIECE + 1];
    struct co_group group;
    char mark[4096], back[4096];
    struct iovec iov = {mark, sizeof(mark)}, iov_back = {back, sizeof(back)};

    co_group_init(&group);
    for (unsigned i = 0; i < array_size(pieces); i++) {
        uint64_t offset = (uint64_t)i * COPY_PIECE;

        pieces[i] = (struct copying_piece){from, to, offset, min_u64(COPY_TOTAL - offset, COPY_PIECE), &group};
        co_group_enter(&group);
        coroutine_enter(coroutine_create(copying_piece_entry, &pieces[i]));
    }
    memset(mark, 0x77, sizeof(mark));
    for (unsigned i = 0; i < 50; i++) {
        uint64_t offset = COPY_TOTAL + MiB + i * sizeof(mark);

        g_assert_cmpint(file_write(to, offset, sizeof(mark), buffers_one(&iov), false), ==, 0);
        g_assert_cmpint(file_read(to, offset, sizeof(back), buffers_one(&iov_back)), ==, 0);
        g_assert_true(!memcmp(mark, back, sizeof(mark)));
        coroutine_pause();
    }
    co_group_wait(&group);
    co_group_destroy(&group);
    char *all = file_memory(COPY_TOTAL);
    struct iovec whole = {all, COPY_TOTAL};

    g_assert_cmpint(file_read(to, 4096, COPY_TOTAL, buffers_one(&whole)), ==, 0);
    g_assert_true(!memcmp(all, data, COPY_TOTAL));
    free(all);
}

/* What is not copied because of zeroes in it is not allocated either. */
static void zeroes_leave_holes(struct file *from, struct file *to)
{
    const uint64_t behind = 8 * MiB, at = 3 * MiB;
    struct iovec zeroes = {g_malloc0(8192), 8192}, before = {g_malloc0(8192), 8192};
    uint64_t end;
    bool data;

    g_assert_cmpint(file_read(from, at, 8192, buffers_one(&before)), ==, 0);
    g_assert_cmpint(file_write(from, at, 8192, buffers_one(&zeroes), false), ==, 0);
    g_assert_cmpint(file_truncate(to, behind + COPY_TOTAL), ==, 0);
    g_assert_cmpint(copy_file(from, 2 * MiB, to, behind, 2 * MiB, 4096), ==, -ENOTSUP);
    g_assert_cmpint(file_extent(to, behind, &data, &end), ==, 0);
    g_assert_true(!data && end == behind + COPY_TOTAL);
    g_assert_cmpint(file_write(from, at, 8192, buffers_one(&before), false), ==, 0);
    g_free(zeroes.iov_base);
    g_free(before.iov_base);
}

static void copies(const char *path, const char *other)
{
    struct file *from = must_open(path, FILE_WRITABLE | FILE_CREATE | FILE_TRUNCATE);
    struct file *to = must_open(other, FILE_WRITABLE | FILE_CREATE | FILE_TRUNCATE);
    char *data = file_memory(COPY_TOTAL);
    struct iovec whole = {data, COPY_TOTAL};
    struct statfs system;

    fill(data, COPY_TOTAL, 5);
    g_assert_cmpint(file_write(from, 0, COPY_TOTAL, buffers_one(&whole), false), ==, 0);
    g_assert_cmpint(statfs(path, &system), ==, 0);
    if (system.f_type == 0x01021994 /* tmpfs */) {
        copies_at_once(from, to, data);
        /* What lies behind the end is no file's. */
        g_assert_cmpint(copy_file(from, COPY_TOTAL - 4096, to, 0, 8192, 0), ==, -ENOTSUP);
        zeroes_leave_holes(from, to);
        /* Nor is a unit of zeroes, however it lies to the steps, if nobody is to take it. */
        for (uint64_t at = 0; at < 4 * MiB; at += 700 * KiB + 4096) {
            struct iovec zeroes = {g_malloc0(8191), 8191};

            g_assert_cmpint(file_write(from, at, 8191, buffers_one(&zeroes), false), ==, 0);
            g_assert_cmpint(copy_file(from, 0, to, 0, COPY_TOTAL, 4096), ==, -ENOTSUP);
            g_assert_cmpint(copy_file(from, 0, to, 0, COPY_TOTAL, 8192), ==, 0);
            g_assert_cmpint(copy_file(from, 0, to, 0, COPY_TOTAL, 0), ==, 0);
            memcpy(zeroes.iov_base, data + at, 8191);
            g_assert_cmpint(file_write(from, at, 8191, buffers_one(&zeroes), false), ==, 0);
            g_free(zeroes.iov_base);
        }
    } else {
        g_assert_cmpint(copy_file(from, 0, to, 0, 4096, 0), ==, -ENOTSUP);
    }
    g_assert_cmpint(copy_file(from, 0, to, INT64_MAX - 10, 4096, 0), ==, -ENOTSUP);
    file_close(from);
    file_close(to);
    free(data);
    unlink(other);
}

static void in_folder(const char *folder)
{
    g_autofree char *path = make_path(folder, "file"), *other = make_path(folder, "other");

    transfers(path, 0);
    odd_pieces(path);
    allocation(path);
    locks(path);
    swarm_run(path, 0);
    copies(path, other);
    g_assert_cmpint(file_unlink(path), ==, 0);
    g_assert_cmpint(file_unlink(path), ==, -ENOENT);
}

static void on_tmpfs(void *argument)
{
    in_folder("/dev/shm");
}

static void on_disk(void *argument)
{
    in_folder(g_get_tmp_dir());
}

static void direct(void *argument)
{
    g_autofree char *path = make_path(g_get_tmp_dir(), "direct");
    struct file *file;
    struct error *err = NULL;

    if (file_open(path, FILE_WRITABLE | FILE_CREATE | FILE_DIRECT, &file, &err) < 0) {
        g_test_skip(err->message);
        error_free(err);
        return;
    }
    file_close(file);
    transfers(path, FILE_DIRECT);
    swarm_run(path, FILE_DIRECT);
    g_assert_cmpint(file_unlink(path), ==, 0);
}

static void refusals(void *argument)
{
    g_autofree char *path = make_path(g_get_tmp_dir(), "refused");
    g_autofree char *fifo = make_path(g_get_tmp_dir(), "fifo");
    struct file *file;
    struct error *err = NULL;

    g_assert_cmpint(file_open(path, 0, &file, &err), ==, -ENOENT);
    g_assert_nonnull(strstr(err->message, path));
    error_free(err);
    g_assert_cmpint(file_open(g_get_tmp_dir(), 0, &file, NULL), ==, -EISDIR);
    g_assert_cmpint(file_open("/dev/null", FILE_WRITABLE, &file, NULL), ==, -EINVAL);
    g_assert_cmpint(mkfifo(fifo, 0600), ==, 0);
    g_assert_cmpint(file_open(fifo, 0, &file, NULL), ==, -EINVAL);
    unlink(fifo);
    /* What the kernel shows as files can be anything, the memory of this process too. */
    g_assert_cmpint(file_open("/proc/self/mem", FILE_WRITABLE, &file, NULL), ==, -EINVAL);
    file_close(must_open(path, FILE_WRITABLE | FILE_CREATE | FILE_EXCLUSIVE));
    g_assert_cmpint(file_open(path, FILE_WRITABLE | FILE_CREATE | FILE_EXCLUSIVE, &file, NULL), ==, -EEXIST);
    file = must_open(path, 0);
    struct iovec iov = {"x", 1};
    g_assert_cmpint(file_write(file, 0, 1, buffers_one(&iov), false), ==, -EBADF);
    file_close(file);
    file_close(NULL);
    file_unlink(path);
}

/* A file that may not grow fails the write, and does not end the process with it. */
static void too_long(void *argument)
{
    g_autofree char *path = make_path(g_get_tmp_dir(), "limited");
    struct file *file = must_open(path, FILE_WRITABLE | FILE_CREATE | FILE_EXCLUSIVE);
    struct rlimit limit, small;
    struct iovec iov = {"x", 1};
    g_assert_cmpint(getrlimit(RLIMIT_FSIZE, &limit), ==, 0);
    small = limit;
    small.rlim_cur = 4096;
    g_assert_cmpint(setrlimit(RLIMIT_FSIZE, &small), ==, 0);
    int written = file_write(file, 1 * MiB, 1, buffers_one(&iov), false);
    int grown = file_truncate(file, 1 * MiB);
    g_assert_cmpint(setrlimit(RLIMIT_FSIZE, &limit), ==, 0);
    g_assert_cmpint(written, ==, -EFBIG);
    g_assert_cmpint(grown, ==, -EFBIG);
    file_close(file);
    file_unlink(path);
}

static void slurp(void *argument)
{
    g_autofree char *path = make_path(g_get_tmp_dir(), "slurp");
    g_autofree char *data = g_strnfill(10000, 'z');
    char *text;
    size_t size;

    g_assert_cmpint(file_slurp(path, 100, &text, &size), ==, -ENOENT);
    g_assert_true(g_file_set_contents(path, data, 10000, NULL));
    g_assert_cmpint(file_slurp(path, 9999, &text, &size), ==, -EFBIG);
    g_assert_cmpint(file_slurp(path, 10000, &text, &size), ==, 0);
    g_assert_cmpuint(size, ==, 10000);
    g_assert_cmpstr(text, ==, data);
    g_free(text);
    file_unlink(path);
}

int main(int argc, char **argv)
{
    static const struct loop_case cases[] = {
        {"tmpfs", on_tmpfs},    {"disk", on_disk},      {"direct", direct},
        {"refusals", refusals}, {"too-long", too_long}, {"slurp", slurp},
    };

    g_test_init(&argc, &argv, NULL);
    test_add_loop_cases("file", cases, array_size(cases));
    return g_test_run();
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Files as the rest of the house sees them: whole transfers made of the engine's possibly short ones.
 * Invariants:
 * 1. a read delivers exactly what was asked for: behind the end of the file there are zeroes;
 * 2. a write that returns 0 has written everything; what an interrupted one left behind is retried;
 * 3. one engine call moves at most STEP_BYTES and IOV_MAX pieces, so no transfer holds up its loop for long;
 *    pieces keep their boundaries, so that aligned memory stays aligned (direct I/O).
 * It knows no descriptor and no file system: that is the engine's (file_native.c).
 */
#include "loop/file.h"
#include "base/size.h"
#include "loop/engine.h"
#include <errno.h>
#include <glib.h>
#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

/* Pieces that fit on the stack; more take an allocation. */
#define IOV_FEW 16
#define STEP_BYTES (1 * MiB)

/* Fills out[0..max) from the view with at most `bytes`; returns how many pieces, and their sum in *ret_bytes. */
static unsigned step_iov(struct buffers view, size_t bytes, struct iovec *out, unsigned max, size_t *ret_bytes)
{
    unsigned count = 0;
    size_t sum = 0, skip = view.skip;

    for (unsigned i = 0; i < view.count && count < max && sum < bytes; i++, skip = 0) {
        size_t piece = min_u64(view.iov[i].iov_len - skip, bytes - sum);

        if (piece) {
            out[count++] = (struct iovec){(char *)view.iov[i].iov_base + skip, piece};
            sum += piece;
        }
    }
    *ret_bytes = sum;
    return count;
}

static ssize_t coroutine_fn file_step(struct file *file, bool write, uint64_t offset, const struct iovec *iov,
                                      unsigned count, bool fua)
{
    ssize_t moved;

    do {
        moved = write ? file->ops->write(file, offset, iov, count, fua) : file->ops->read(file, offset, iov, count);
    } while (moved == -EINTR || moved == -EAGAIN);
    return moved;
}

static int coroutine_fn file_transfer(struct file *file, bool write, uint64_t offset, uint64_t bytes,
                                      struct buffers view, bool fua, struct iovec *iov, unsigned max)
{
    while (bytes) {
        size_t step;
        unsigned count = step_iov(view, min_u64(bytes, STEP_BYTES), iov, max, &step);
        g_assert(count);
        ssize_t moved = file_step(file, write, offset, iov, count, fua);

        if (moved < 0) {
            return (int)moved;
        }
        if (moved == 0) {
            if (write) {
                return -EIO;
            }
            buffers_fill(view, 0, bytes);
            return 0;
        }
        g_assert((size_t)moved <= step);
        bytes -= (uint64_t)moved;
        offset += (uint64_t)moved;
        if (bytes) {
            view = buffers_advance(view, (size_t)moved);
        }
    }
    return 0;
}

static int coroutine_fn file_move(struct file *file, bool write, uint64_t offset, uint64_t bytes, struct buffers view,
                                  bool fua)
{
    struct iovec few[IOV_FEW];

    if (offset > INT64_MAX || bytes > INT64_MAX - offset) {
        return write ? -EFBIG : -EINVAL;
    }
    if (view.count <= IOV_FEW) {
        return file_transfer(file, write, offset, bytes, view, fua, few, IOV_FEW);
    }
    unsigned max = MIN(view.count, IOV_MAX);
    struct iovec *many = g_try_new(struct iovec, max);

    if (!many) {
        return -ENOMEM;
    }
    int r = file_transfer(file, write, offset, bytes, view, fua, many, max);

    g_free(many);
    return r;
}

static int coroutine_fn file_take(struct file *file, uint64_t offset, uint64_t bytes, struct buffers from, bool fua)
{
    const struct buffers_elsewhere *elsewhere = buffers_elsewhere(from);
    uint64_t place = elsewhere->offset + from.skip;

    if (fua || !file->ops->copy || file->ops != elsewhere->file->ops || place > INT64_MAX ||
        bytes > INT64_MAX - place || offset > INT64_MAX || bytes > INT64_MAX - offset) {
        return -ENOTSUP;
    }
    return file->ops->copy(elsewhere->file, place, file, offset, bytes, &elsewhere->aid);
}

int coroutine_fn file_read(struct file *file, uint64_t offset, uint64_t bytes, struct buffers to)
{
    struct buffers_elsewhere *elsewhere = buffers_elsewhere(to);

    if (elsewhere) {
        return elsewhere->found(elsewhere, file, offset, to.skip, bytes);
    }
    return file_move(file, false, offset, bytes, to, false);
}

int coroutine_fn file_write(struct file *file, uint64_t offset, uint64_t bytes, struct buffers from, bool fua)
{
    if (buffers_elsewhere(from)) {
        return file_take(file, offset, bytes, from, fua);
    }
    return file_move(file, true, offset, bytes, from, fua);
}

const void *file_peek(struct file *file, uint64_t offset, size_t bytes)
{
    return file->ops->peek ? file->ops->peek(file, offset, bytes) : NULL;
}

bool file_is_sound(struct file *file, const void *at, size_t bytes)
{
    return file->ops->is_sound(file, at, bytes);
}

int coroutine_fn file_open(const char *path, unsigned flags, struct file **ret, struct error **err)
{
    g_assert(coroutine_running());
    return engine_self()->ops->files->open(path, flags, ret, err);
}

void coroutine_fn file_close(struct file *file)
{
    if (file) {
        file->ops->close(file);
    }
}

int coroutine_fn file_info(struct file *file, struct file_info *ret)
{
    return file->ops->info(file, ret);
}

int coroutine_fn file_sync(struct file *file)
{
    return file->ops->sync(file);
}

int coroutine_fn file_allocate(struct file *file, enum file_allocate_mode mode, uint64_t offset, uint64_t bytes)
{
    if (offset > INT64_MAX || bytes > INT64_MAX - offset) {
        return -EFBIG;
    }
    return bytes ? file->ops->allocate(file, mode, offset, bytes) : 0;
}

int coroutine_fn file_truncate(struct file *file, uint64_t size)
{
    return size > INT64_MAX ? -EFBIG : file->ops->truncate(file, size);
}

int coroutine_fn file_set_layout(struct file *file, bool no_cow, uint64_t extent_bytes)
{
    return file->ops->set_layout ? file->ops->set_layout(file, no_cow, extent_bytes) : -EOPNOTSUPP;
}

int coroutine_fn file_extent(struct file *file, uint64_t offset, bool *ret_data, uint64_t *ret_end)
{
    return offset > INT64_MAX ? -ENXIO : file->ops->extent(file, offset, ret_data, ret_end);
}

int coroutine_fn file_lock_shared(struct file *file, uint64_t offset, uint64_t bytes)
{
    return file->ops->lock(file, true, offset, bytes);
}

int coroutine_fn file_unlock(struct file *file, uint64_t offset, uint64_t bytes)
{
    return file->ops->lock(file, false, offset, bytes);
}

int coroutine_fn file_lock_test(struct file *file, uint64_t offset, uint64_t bytes, uint64_t *ret_offset)
{
    return file->ops->lock_test(file, offset, bytes, ret_offset);
}

void *file_memory(size_t bytes)
{
    void *memory;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);

    return posix_memalign(&memory, page, MAX(bytes, 1)) ? NULL : memory;
}

int coroutine_fn file_unlink(const char *path)
{
    return engine_self()->ops->files->unlink(path);
}

int coroutine_fn file_slurp(const char *path, size_t max, char **ret, size_t *ret_size)
{
    return engine_self()->ops->files->slurp(path, max, ret, ret_size);
}

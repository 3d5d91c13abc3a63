/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Making files, and making them longer with the space for it: the `file` driver's part of image.h. It uses the loop's
 * files only, so it serves an open node (grow) and a path (create) alike.
 *
 * 1. A file that is there already is emptied, but only once its image locks are ours: what another program has open is
 *    refused, not cut.
 * 2. What fails half-way leaves a file behind that is short, never one that was not there before: it is removed.
 * 3. Reserved space reads as zeroes. A reservation that failed leaves the file as long as it was.
 *
 * How the file system is to lay the file out (nocow, extent size) is a wish: only one that was asked for by name is
 * spoken of when it cannot be had.
 */
#include "driver/protocol/file_create.h"
#include "base/size.h"
#include "block/user.h"
#include "driver/protocol/image_lock.h"
#include "loop/file.h"
#include <errno.h>
#include <glib.h>

#define ZEROES_BYTES (1 * MiB)
#define SECTOR 512

static int coroutine_fn write_zeroes(struct file *file, uint64_t from, uint64_t to)
{
    g_autofree char *memory = g_try_malloc0(ZEROES_BYTES);
    int r = memory ? 0 : -ENOMEM;
    while (r == 0 && from < to) {
        struct iovec iov = {memory, min_u64(to - from, ZEROES_BYTES - from % ZEROES_BYTES)};
        r = file_write(file, from, iov.iov_len, buffers_one(&iov), false);
        from += iov.iov_len;
    }
    return r;
}

int coroutine_fn file_extend(struct file *file, const char *path, uint64_t from, uint64_t to,
                             enum preallocation_mode mode, struct error **err)
{
    int r = 0;
    switch (mode) {
    case PREALLOCATION_MODE_OFF:
        r = file_truncate(file, to);
        break;
    case PREALLOCATION_MODE_FALLOC:
        r = file_allocate(file, FILE_PREALLOCATE, from, to - from);
        break;
    case PREALLOCATION_MODE_FULL:
        /* What cannot be had is known sooner this way; zeroes are written nevertheless. */
        r = file_allocate(file, FILE_PREALLOCATE, from, to - from);
        r = r == -EOPNOTSUPP || r == 0 ? write_zeroes(file, from, to) : r;
        break;
    case PREALLOCATION_MODE_METADATA:
    case PREALLOCATION_MODE_COUNT:
        r = error_set(err, -ENOTSUP, "A file has no metadata to preallocate");
        error_hint(err, "The preallocation of a file is off, falloc or full");
        return r;
    }
    if (r == 0) {
        return 0;
    }
    if (mode != PREALLOCATION_MODE_OFF) {
        file_truncate(file, from);
    }
    if (r == -EOPNOTSUPP) {
        r = error_set(err, -ENOTSUP, "Cannot reserve space for '%s': its file system cannot do that", path);
        error_hint(err, "preallocation=full writes the space instead");
        return r;
    }
    return error_set_errno(err, r, "Cannot make '%s' %" G_GUINT64_FORMAT " bytes long", path, to);
}

static int coroutine_fn fill(struct file *file, const struct blockdev_create_options_file *options, struct error **err)
{
    int r = image_lock_take(file, options->filename, true, err);
    if (r < 0) {
        return r;
    }
    r = file_truncate(file, 0);
    if (r < 0) {
        return error_set_errno(err, r, "Cannot empty '%s'", options->filename);
    }
    uint64_t extent_bytes = options->extent_size_hint;
    r = file_set_layout(file, options->nocow, extent_bytes);
    if (r < 0 && ((options->has_nocow && options->nocow) || (options->has_extent_size_hint && extent_bytes))) {
        g_message("'%s': its file system takes no hints about the layout of files (nocow, extent size)",
                  options->filename);
    }
    r = file_extend(file, options->filename, 0, options->size, options->preallocation, err);
    if (r < 0) {
        return r;
    }
    r = file_sync(file);
    return r < 0 ? error_set_errno(err, r, "Cannot flush '%s'", options->filename) : 0;
}

int coroutine_fn file_driver_create(struct graph *graph, const struct blockdev_create_options *options,
                                    struct error **err)
{
    const struct blockdev_create_options_file *own = &options->u.file;
    struct file *file;
    bool made = true;
    if (!*own->filename) {
        return error_set(err, -EINVAL, "The name of a new file must not be empty");
    }
    if (own->size > INT64_MAX) {
        return error_set(err, -EFBIG, "A file cannot be %" G_GUINT64_FORMAT " bytes long", own->size);
    }
    if (own->extent_size_hint > UINT32_MAX) {
        return error_set(err, -EINVAL, "Extent size hint is too large");
    }
    int r = file_open(own->filename, FILE_WRITABLE | FILE_CREATE | FILE_EXCLUSIVE, &file, NULL);
    if (r < 0) {
        made = false;
        r = file_open(own->filename, FILE_WRITABLE | FILE_CREATE, &file, err);
    }
    if (r < 0) {
        return r;
    }
    struct file_info info;
    r = file_info(file, &info);
    if (r == 0 && info.is_block_device) {
        r = error_set(err, -EINVAL, "'%s' is a block device: driver 'file' makes regular files only", own->filename);
    } else if (r == 0) {
        r = fill(file, own, err);
    } else {
        error_set_errno(err, r, "Cannot look at '%s'", own->filename);
    }
    if (r < 0 && made) {
        file_unlink(own->filename);
    }
    file_close(file);
    return r;
}

int coroutine_fn file_driver_measure(const struct blockdev_create_options *options, struct backend *source,
                                     struct block_measure_info *ret, struct error **err)
{
    uint64_t size = source ? backend_size(source) : options->u.file.size;
    if (size > INT64_MAX - SECTOR) {
        return error_set(err, -EFBIG, "A file cannot be %" G_GUINT64_FORMAT " bytes long", size);
    }
    *ret = (struct block_measure_info){0};
    ret->required = ret->fully_allocated = align_up(size, SECTOR);
    return 0;
}

const struct image_option file_create_options[] = {
    {.name = "extent_size_hint", .type = "size", .help = "Extent size hint for the image file, 0 to disable"},
    {.name = "nocow", .type = "bool (on/off)", .help = "Turn off copy-on-write (valid only on btrfs)"},
    {.name = "preallocation", .type = "str", .help = "Preallocation mode (allowed values: off, falloc, full)"},
    {.name = "size", .type = "size", .help = "Virtual disk size"},
    {.name = NULL},
};

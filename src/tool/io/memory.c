/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Memory for transfers: page-aligned, so that a file opened without the host's cache takes it as it is, or off that by
 * 16 bytes with -m.
 *
 * 1. Lengths are checked against IO_LENGTH_MAX, alone and in sum, before anything is taken.
 * 2. Memory that is not there is told, and no reason to end.
 */
#include "block/user.h"
#include "loop/file.h"
#include "tool/io/io.h"
#include <errno.h>
#include <glib.h>
#include <stdlib.h>
#include <string.h>

enum { MISALIGNMENT = 16 };

int io_memory_take(struct io *io, struct io_memory *memory, uint64_t bytes, int fill)
{
    memory->all = file_memory(bytes + MISALIGNMENT);
    if (!memory->all) {
        printf("There is no memory for %" G_GUINT64_FORMAT " bytes\n", bytes);
        return -ENOMEM;
    }
    memory->data = (uint8_t *)memory->all + (io->misalign ? MISALIGNMENT : 0);
    memset(memory->data, fill, bytes);
    return 0;
}

int io_memory_take_file(struct io *io, struct io_memory *memory, uint64_t bytes, const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file) {
        int code = -errno;
        fprintf(stderr, "%s: %s\n", path, g_strerror(errno));
        return code;
    }
    int code = io_memory_take(io, memory, bytes, 0);
    size_t got = code == 0 ? fread(memory->data, 1, bytes, file) : 0;
    if (code == 0 && ferror(file)) {
        code = -EIO;
        fprintf(stderr, "%s: cannot be read\n", path);
    } else if (code == 0 && got == 0 && bytes) {
        code = -EINVAL;
        fprintf(stderr, "%s: file is empty\n", path);
    }
    fclose(file);
    for (uint64_t at = got; code == 0 && at < bytes; at++) {
        memory->data[at] = memory->data[at - got];
    }
    if (code < 0) {
        io_memory_release(memory);
    }
    return code;
}

void io_memory_release(struct io_memory *memory)
{
    free(memory->all);
    *memory = (struct io_memory){0};
}

int io_vector_take(struct io *io, struct io_vector *vector, char *const *lengths, unsigned count, int fill)
{
    uint64_t total = 0;
    *vector = (struct io_vector){.iov = g_new0(struct iovec, count), .count = count};
    int code = 0;
    for (unsigned i = 0; i < count && code == 0; i++) {
        int64_t length;
        code = io_number_or_tell(lengths[i], &length);
        if (code == 0 && length > IO_LENGTH_MAX) {
            printf("Argument '%s' exceeds maximum size %d\n", lengths[i], (int)IO_LENGTH_MAX);
            code = -EINVAL;
        } else if (code == 0 && total > (uint64_t)(IO_LENGTH_MAX - length)) {
            printf("The total number of bytes exceed the maximum size %d\n", (int)IO_LENGTH_MAX);
            code = -EINVAL;
        }
        if (code == 0) {
            vector->iov[i].iov_len = (size_t)length;
            total += (uint64_t)length;
        }
    }
    vector->bytes = total;
    if (code == 0 && total <= backend_size(io->backend)) { /* else the range is refused, and it is not needed */
        code = io_memory_take(io, &vector->memory, total, fill);
    }
    if (code < 0) {
        g_free(vector->iov);
        return code;
    }
    if (!vector->memory.data) {
        return 0;
    }
    uint8_t *at = vector->memory.data;
    for (unsigned i = 0; i < count; i++) {
        vector->iov[i].iov_base = at;
        at += vector->iov[i].iov_len;
    }
    return 0;
}

void io_vector_release(struct io_vector *vector)
{
    io_memory_release(&vector->memory);
    g_free(vector->iov);
}

int io_check_range(struct io *io, int64_t offset, uint64_t bytes)
{
    uint64_t size = backend_size(io->backend);
    return (uint64_t)offset > size || bytes > size - (uint64_t)offset ? -EIO : 0;
}

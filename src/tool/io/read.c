/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * read and readv: with a pattern that the data are held against, a dump, and the report.
 *
 * 1. A difference is told and makes the command fail, and the report follows all the same.
 * 2. Arguments are looked at in the order in which qemu-io does, so that the same one is told.
 */
#include "base/buffers.h"
#include "block/user.h"
#include "loop/loop.h"
#include "tool/io/io.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>

enum { UNREAD = 0xab };

int io_verify(const uint8_t *data, uint8_t byte, uint64_t offset, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++) {
        if (data[i] != byte) {
            printf("Pattern verification failed at offset %" G_GUINT64_FORMAT ", %" G_GUINT64_FORMAT " bytes\n", offset,
                   bytes);
            return -EINVAL;
        }
    }
    return 0;
}

struct reading {
    bool for_programs, quiet, dump, verify, vm_state;
    bool part_start, part_length; /* given */
    uint8_t pattern;
    int64_t start, length; /* of what is verified */
    int64_t offset, bytes;
};

static int read_option(struct reading *reading, int option, const char *name)
{
    switch (option) {
    case 'b':
        reading->vm_state = true;
        return 0;
    case 'C':
        reading->for_programs = true;
        return 0;
    case 'l':
        reading->part_length = true;
        return io_number_or_tell(optarg, &reading->length);
    case 'p':
    case 'r':
        return 0;
    case 'P':
        reading->verify = true;
        return io_pattern(optarg, &reading->pattern);
    case 'q':
        reading->quiet = true;
        return 0;
    case 's':
        reading->part_start = true;
        return io_number_or_tell(optarg, &reading->start);
    case 'v':
        reading->dump = true;
        return 0;
    default:
        return io_usage(name);
    }
}

/* What -s and -l leave to be verified. */
static int settle_part(struct reading *reading)
{
    if (!reading->part_length) {
        reading->length = reading->bytes - reading->start;
    }
    if (reading->length < 0 || reading->start > reading->bytes || reading->length > reading->bytes - reading->start) {
        printf("pattern verification range exceeds end of read data\n");
        return -EINVAL;
    }
    return 0;
}

static int check_alignment(const struct reading *reading)
{
    if (reading->vm_state && reading->offset % 512) {
        printf("%" G_GINT64_FORMAT " is not a sector-aligned value for 'offset'\n", reading->offset);
        return -EINVAL;
    }
    if (reading->vm_state && reading->bytes % 512) {
        printf("%" G_GINT64_FORMAT " is not a sector-aligned value for 'count'\n", reading->bytes);
        return -EINVAL;
    }
    return 0;
}

static int coroutine_fn read_now(struct io *io, const struct reading *reading)
{
    struct io_memory memory = {0};
    int64_t start = loop_clock_ns();
    int code = reading->vm_state ? -ENOTSUP : io_check_range(io, reading->offset, (uint64_t)reading->bytes);
    if (code == 0 && (code = io_memory_take(io, &memory, (uint64_t)reading->bytes, UNREAD)) < 0) {
        return code;
    }
    struct iovec iov = {memory.data, (size_t)reading->bytes};
    if (code == 0) {
        start = loop_clock_ns();
        code = backend_read(io->backend, (uint64_t)reading->offset, iov.iov_len, buffers_one(&iov), 0);
    }
    if (code < 0) {
        printf("read failed: %s\n", g_strerror(code == -ENOTSUP ? EOPNOTSUPP : -code));
        io_memory_release(&memory);
        return code;
    }
    if (reading->verify) {
        code = io_verify(memory.data + reading->start, reading->pattern, (uint64_t)(reading->offset + reading->start),
                         (uint64_t)reading->length);
    }
    if (!reading->quiet) {
        if (reading->dump) {
            io_dump(memory.data, (uint64_t)reading->offset, iov.iov_len);
        }
        io_report("read", start, (uint64_t)reading->offset, iov.iov_len, iov.iov_len, reading->for_programs);
    }
    io_memory_release(&memory);
    return code;
}

int coroutine_fn io_command_read(struct io *io, int argc, char **argv)
{
    struct reading reading = {0};
    int code = 0;
    for (int option; code == 0 && (option = getopt(argc, argv, "bCl:pP:qrs:v")) != -1;) {
        code = read_option(&reading, option, argv[0]);
    }
    if (code < 0) {
        return code;
    }
    if (optind != argc - 2) {
        return io_usage(argv[0]);
    }
    if ((code = io_number_or_tell(argv[optind], &reading.offset)) < 0 ||
        (code = io_number_or_tell(argv[optind + 1], &reading.bytes)) < 0) {
        return code;
    }
    if (reading.bytes > IO_LENGTH_MAX) {
        printf("length cannot exceed %d, given %s\n", (int)IO_LENGTH_MAX, argv[optind + 1]);
        return -EINVAL;
    }
    if (!reading.verify && (reading.part_start || reading.part_length)) {
        return io_usage(argv[0]);
    }
    code = settle_part(&reading);
    code = code < 0 ? code : check_alignment(&reading);
    return code < 0 ? code : read_now(io, &reading);
}

int coroutine_fn io_command_readv(struct io *io, int argc, char **argv)
{
    struct reading reading = {0};
    struct io_vector vector;
    int code = 0;
    for (int option; code == 0 && (option = getopt(argc, argv, "CP:qrv")) != -1;) {
        code = read_option(&reading, option, argv[0]);
    }
    if (code < 0) {
        return code;
    }
    if (optind > argc - 2) {
        return io_usage(argv[0]);
    }
    if ((code = io_number_or_tell(argv[optind], &reading.offset)) < 0 ||
        (code = io_vector_take(io, &vector, argv + optind + 1, (unsigned)(argc - optind - 1), UNREAD)) < 0) {
        return code;
    }
    int64_t start = loop_clock_ns();
    uint64_t offset = (uint64_t)reading.offset;
    code = io_check_range(io, reading.offset, vector.bytes);
    if (code == 0) {
        code = backend_read(io->backend, offset, vector.bytes, (struct buffers){vector.iov, vector.count, 0}, 0);
    }
    if (code < 0) {
        printf("readv failed: %s\n", g_strerror(-code));
        io_vector_release(&vector);
        return code;
    }
    if (reading.verify) {
        code = io_verify(vector.memory.data, reading.pattern, offset, vector.bytes);
    }
    if (!reading.quiet) {
        if (reading.dump) {
            io_dump(vector.memory.data, offset, vector.bytes);
        }
        io_report("read", start, offset, vector.bytes, vector.bytes, reading.for_programs);
    }
    io_vector_release(&vector);
    return code;
}

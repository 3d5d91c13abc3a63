/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * write, writev and discard: what excludes each other among their options, where the data come from, and the report.
 *
 * 1. Arguments are looked at in the order in which qemu-io does, so that the same one is told.
 * 2. Writes to the state of a virtual machine (-b) are checked and then refused: nothing here has any.
 */
#include "base/buffers.h"
#include "block/user.h"
#include "loop/loop.h"
#include "tool/io/io.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>

struct writing {
    bool vm_state, compressed, for_programs, fua, no_fallback, quiet, unmap, zeroes;
    bool has_pattern;
    uint8_t pattern;
    const char *source;
    int64_t offset, bytes;
};

static int write_option(struct writing *writing, int option, const char *name)
{
    switch (option) {
    case 'b':
        writing->vm_state = true;
        return 0;
    case 'c':
        writing->compressed = true;
        return 0;
    case 'C':
        writing->for_programs = true;
        return 0;
    case 'f':
        writing->fua = true;
        return 0;
    case 'n':
        writing->no_fallback = true;
        return 0;
    case 'p':
    case 'r':
        return 0;
    case 'q':
        writing->quiet = true;
        return 0;
    case 'u':
        writing->unmap = true;
        return 0;
    case 'P':
        writing->has_pattern = true;
        return io_pattern(optarg, &writing->pattern);
    case 's':
        writing->source = optarg;
        return 0;
    case 'z':
        writing->zeroes = true;
        return 0;
    default:
        return io_usage(name);
    }
}

/* What must not stand together, in the order in which it is told. */
static int check_options(const struct writing *writing)
{
    const char *wrong = NULL;
    if (writing->vm_state && writing->zeroes) {
        wrong = "-b and -z cannot be specified at the same time";
    } else if (writing->fua && (writing->vm_state || writing->compressed)) {
        wrong = "-f and -b or -c cannot be specified at the same time";
    } else if (writing->no_fallback && !writing->zeroes) {
        wrong = "-n requires -z to be specified";
    } else if (writing->unmap && !writing->zeroes) {
        wrong = "-u requires -z to be specified";
    } else if (writing->zeroes + writing->has_pattern + (writing->source != NULL) > 1) {
        wrong = "Only one of -z, -P, and -s can be specified at the same time";
    }
    if (wrong) {
        printf("%s\n", wrong);
    }
    return wrong ? -EINVAL : 0;
}

static int check_alignment(const struct writing *writing)
{
    if (!writing->vm_state && !writing->compressed) {
        return 0;
    }
    if (writing->offset % 512) {
        printf("%" G_GINT64_FORMAT " is not a sector-aligned value for 'offset'\n", writing->offset);
        return -EINVAL;
    }
    if (writing->bytes % 512) {
        printf("%" G_GINT64_FORMAT " is not a sector-aligned value for 'count'\n", writing->bytes);
        return -EINVAL;
    }
    return 0;
}

static int coroutine_fn write_data(struct io *io, const struct writing *writing, const struct io_memory *memory)
{
    uint64_t offset = (uint64_t)writing->offset, bytes = (uint64_t)writing->bytes;
    unsigned flags = writing->fua ? REQUEST_FUA : 0;
    if (writing->vm_state) {
        return -ENOTSUP;
    }
    int code = io_check_range(io, writing->offset, bytes);
    if (code < 0) {
        return code;
    }
    if (writing->zeroes) {
        flags |= writing->unmap ? REQUEST_MAY_UNMAP : 0;
        flags |= writing->no_fallback ? REQUEST_NO_FALLBACK : 0;
        return backend_write_zeroes(io->backend, offset, bytes, flags);
    }
    struct iovec iov = {memory->data, bytes};
    flags |= writing->compressed ? REQUEST_COMPRESSED : 0;
    return backend_write(io->backend, offset, bytes, buffers_one(&iov), flags);
}

static int coroutine_fn write_now(struct io *io, const struct writing *writing)
{
    struct io_memory memory = {0};
    uint64_t bytes = (uint64_t)writing->bytes;
    int code = 0;
    if (writing->source) {
        code = io_memory_take_file(io, &memory, bytes, writing->source);
    } else if (!writing->zeroes && io_check_range(io, writing->offset, bytes) == 0) {
        code = io_memory_take(io, &memory, bytes, writing->pattern);
    }
    if (code < 0) {
        return code;
    }
    int64_t start = loop_clock_ns();
    code = write_data(io, writing, &memory);
    io_memory_release(&memory);
    if (code < 0) {
        printf("write failed: %s\n", g_strerror(code == -ENOTSUP ? EOPNOTSUPP : -code));
    } else if (!writing->quiet) {
        io_report("wrote", start, (uint64_t)writing->offset, bytes, bytes, writing->for_programs);
    }
    return code;
}

int coroutine_fn io_command_write(struct io *io, int argc, char **argv)
{
    struct writing writing = {.pattern = 0xcd};
    int code = 0;
    for (int option; code == 0 && (option = getopt(argc, argv, "bcCfnpP:qrs:uz")) != -1;) {
        code = write_option(&writing, option, argv[0]);
    }
    if (code < 0) {
        return code;
    }
    if (optind != argc - 2) {
        return io_usage(argv[0]);
    }
    code = check_options(&writing);
    if (code < 0 || (code = io_number_or_tell(argv[optind], &writing.offset)) < 0 ||
        (code = io_number_or_tell(argv[optind + 1], &writing.bytes)) < 0) {
        return code;
    }
    if (writing.bytes > IO_LENGTH_MAX && !writing.no_fallback) {
        printf("length cannot exceed %d without -n, given %s\n", (int)IO_LENGTH_MAX, argv[optind + 1]);
        return -EINVAL;
    }
    code = check_alignment(&writing);
    return code < 0 ? code : write_now(io, &writing);
}

int coroutine_fn io_command_writev(struct io *io, int argc, char **argv)
{
    struct writing writing = {.pattern = 0xcd};
    struct io_vector vector;
    int code = 0;
    for (int option; code == 0 && (option = getopt(argc, argv, "CfqrP:")) != -1;) {
        code = write_option(&writing, option, argv[0]);
    }
    if (code < 0) {
        return code;
    }
    if (optind > argc - 2) {
        return io_usage(argv[0]);
    }
    if ((code = io_number_or_tell(argv[optind], &writing.offset)) < 0 ||
        (code = io_vector_take(io, &vector, argv + optind + 1, (unsigned)(argc - optind - 1), writing.pattern)) < 0) {
        return code;
    }
    int64_t start = loop_clock_ns();
    uint64_t offset = (uint64_t)writing.offset;
    code = io_check_range(io, writing.offset, vector.bytes);
    if (code == 0) {
        code = backend_write(io->backend, offset, vector.bytes, (struct buffers){vector.iov, vector.count, 0},
                             writing.fua ? REQUEST_FUA : 0);
    }
    if (code < 0) {
        printf("writev failed: %s\n", g_strerror(-code));
    } else if (!writing.quiet) {
        io_report("wrote", start, offset, vector.bytes, vector.bytes, writing.for_programs);
    }
    io_vector_release(&vector);
    return code;
}

int coroutine_fn io_command_discard(struct io *io, int argc, char **argv)
{
    struct writing discard = {0};
    int code = 0;
    for (int option; code == 0 && (option = getopt(argc, argv, "Cq")) != -1;) {
        code = write_option(&discard, option, argv[0]);
    }
    if (code < 0) {
        return code;
    }
    if (optind != argc - 2) {
        return io_usage(argv[0]);
    }
    if ((code = io_number_or_tell(argv[optind], &discard.offset)) < 0 ||
        (code = io_number_or_tell(argv[optind + 1], &discard.bytes)) < 0) {
        return code;
    }
    if (discard.bytes > IO_LENGTH_MAX) {
        printf("length cannot exceed %d, given %s\n", (int)IO_LENGTH_MAX, argv[optind + 1]);
        return -EINVAL;
    }
    int64_t start = loop_clock_ns();
    uint64_t bytes = (uint64_t)discard.bytes;
    code = io_check_range(io, discard.offset, bytes);
    code = code < 0 ? code : backend_discard(io->backend, (uint64_t)discard.offset, bytes);
    if (code < 0) {
        printf("discard failed: %s\n", g_strerror(-code));
    } else if (!discard.quiet) {
        io_report("discard", start, (uint64_t)discard.offset, bytes, bytes, discard.for_programs);
    }
    return code;
}

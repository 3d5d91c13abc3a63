/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * aio_read, aio_write and aio_flush: requests that go on while further commands run.
 *
 * 1. A request runs in a coroutine of its own, owns its memory, and counts among io->requests until it has told its
 *    result. Whoever closes the image waits for all of them.
 * 2. The command is good once the request has begun; what becomes of that is told and changes no exit status.
 */
#include "base/buffers.h"
#include "block/user.h"
#include "loop/loop.h"
#include "tool/io/io.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>

struct request {
    struct io *io;
    bool for_programs, quiet, dump, verify, zeroes, invalid;
    uint8_t pattern;
    unsigned flags;
    uint64_t offset, bytes;
    int64_t start_ns;
    struct io_vector vector; /* not of zeroes */
};

static int request_option(struct request *request, int option, const char *name)
{
    switch (option) {
    case 'C':
        request->for_programs = true;
        return 0;
    case 'f':
        request->flags |= REQUEST_FUA;
        return 0;
    case 'i':
        request->invalid = true;
        return 0;
    case 'P':
        request->verify = true;
        return io_pattern(optarg, &request->pattern);
    case 'q':
        request->quiet = true;
        return 0;
    case 'r':
        return 0;
    case 'u':
        request->flags |= REQUEST_MAY_UNMAP;
        return 0;
    case 'v':
        request->dump = true;
        return 0;
    case 'z':
        request->zeroes = true;
        return 0;
    default:
        return io_usage(name);
    }
}

static struct buffers request_buffers(const struct request *request)
{
    return (struct buffers){request->vector.iov, request->vector.count, 0};
}

static void request_end(struct request *request)
{
    if (!request->zeroes) {
        io_vector_release(&request->vector);
    }
    request->io->request_count--;
    co_group_leave(&request->io->requests);
    g_free(request);
}

static void coroutine_fn read_entry(void *argument)
{
    struct request *request = argument;
    int code = io_check_range(request->io, (int64_t)request->offset, request->bytes);
    if (code == 0) {
        code = backend_read(request->io->backend, request->offset, request->bytes, request_buffers(request), 0);
    }
    if (code < 0) {
        printf("readv failed: %s\n", g_strerror(-code));
        request_end(request);
        return;
    }
    if (request->verify) {
        (void)io_verify(request->vector.memory.data, request->pattern, request->offset, request->bytes);
    }
    if (!request->quiet) {
        if (request->dump) {
            io_dump(request->vector.memory.data, request->offset, request->bytes);
        }
        io_report("read", request->start_ns, request->offset, request->bytes, request->bytes, request->for_programs);
    }
    request_end(request);
}

static void coroutine_fn write_entry(void *argument)
{
    struct request *request = argument;
    struct backend *backend = request->io->backend;
    int code = io_check_range(request->io, (int64_t)request->offset, request->bytes);
    if (code == 0 && request->zeroes) {
        code = backend_write_zeroes(backend, request->offset, request->bytes, request->flags);
    } else if (code == 0) {
        code = backend_write(backend, request->offset, request->bytes, request_buffers(request), request->flags);
    }
    if (code < 0) {
        printf("aio_write failed: %s\n", g_strerror(-code));
    } else if (!request->quiet) {
        io_report("wrote", request->start_ns, request->offset, request->bytes, request->bytes, request->for_programs);
    }
    request_end(request);
}

/* Takes it over. */
static int request_begin(struct request *request, void (*entry)(void *argument))
{
    request->start_ns = loop_clock_ns();
    request->io->request_count++;
    co_group_enter(&request->io->requests);
    coroutine_enter(coroutine_create(entry, request));
    return 0;
}

static int read_arguments(struct request *request, int argc, char **argv)
{
    int64_t offset;
    int code = io_number_or_tell(argv[optind], &offset);
    if (code == 0) {
        code = io_vector_take(request->io, &request->vector, argv + optind + 1, (unsigned)(argc - optind - 1), 0xab);
    }
    if (code == 0) {
        request->offset = (uint64_t)offset;
        request->bytes = request->vector.bytes;
    }
    return code;
}

int coroutine_fn io_command_aio_read(struct io *io, int argc, char **argv)
{
    struct request request = {.io = io};
    int code = 0;
    for (int option; code == 0 && (option = getopt(argc, argv, "CP:iqrv")) != -1;) {
        code = request_option(&request, option, argv[0]);
    }
    if (code < 0) {
        return code;
    }
    if (request.invalid) {
        printf("injecting invalid read request\n");
        return 0;
    }
    if (optind > argc - 2) {
        return io_usage(argv[0]);
    }
    code = read_arguments(&request, argc, argv);
    return code < 0 ? code : request_begin(g_memdup2(&request, sizeof(request)), read_entry);
}

static int zero_arguments(struct request *request, int argc, char **argv)
{
    int64_t offset, bytes;
    int code = io_number_or_tell(argv[optind], &offset);
    if (code == 0 && optind != argc - 2) {
        printf("-z supports only a single length parameter\n");
        code = -EINVAL;
    }
    code = code < 0 ? code : io_number_or_tell(argv[optind + 1], &bytes);
    if (code == 0) {
        request->offset = (uint64_t)offset;
        request->bytes = (uint64_t)bytes;
    }
    return code;
}

static int write_arguments(struct request *request, int argc, char **argv)
{
    int64_t offset;
    int fill = request->verify ? request->pattern : 0xcd;
    int code = io_number_or_tell(argv[optind], &offset);
    if (code == 0) {
        code = io_vector_take(request->io, &request->vector, argv + optind + 1, (unsigned)(argc - optind - 1), fill);
    }
    if (code == 0) {
        request->offset = (uint64_t)offset;
        request->bytes = request->vector.bytes;
    }
    return code;
}

int coroutine_fn io_command_aio_write(struct io *io, int argc, char **argv)
{
    struct request request = {.io = io};
    int code = 0;
    for (int option; code == 0 && (option = getopt(argc, argv, "CfiqrP:uz")) != -1;) {
        code = request_option(&request, option, argv[0]);
    }
    if (code < 0) {
        return code;
    }
    if (request.invalid) {
        printf("injecting invalid write request\n");
        return 0;
    }
    if (optind > argc - 2) {
        return io_usage(argv[0]);
    }
    if (request.flags & REQUEST_MAY_UNMAP && !request.zeroes) {
        printf("-u requires -z to be specified\n");
        return -EINVAL;
    }
    code = request.zeroes ? zero_arguments(&request, argc, argv) : write_arguments(&request, argc, argv);
    return code < 0 ? code : request_begin(g_memdup2(&request, sizeof(request)), write_entry);
}

int coroutine_fn io_command_aio_flush(struct io *io, int argc, char **argv)
{
    co_group_wait(&io->requests);
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock img bench`: so many requests to an image, so many at a time, at evenly spaced places; then how long it
 * took.
 *
 * 1. The command's own coroutine sends the requests in order and is the only one that waits for a free place; each
 *    request is a coroutine. Places are reckoned modulo the size of the image.
 * 2. Before each multiple of the flush interval (counted from the end) all requests come home and a flush is made; with
 *    --no-drain the flush is one more request beside the others.
 * 3. The first failure ends it.
 */
#include "base/size.h"
#include "block/graph.h"
#include "block/user.h"
#include "loop/file.h"
#include "loop/loop.h"
#include "tool/image_open.h"
#include "tool/img/img.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct bench {
    struct img_common common;
    uint64_t count, depth, bytes, step, offset, interval, pattern;
    bool write, no_drain;
    /* while it runs */
    struct backend *backend;
    GPtrArray *unused; /* memory of `bytes` each */
    uint64_t in_flight;
    int error;
    struct loop_sleep sleep; /* the dispatcher's */
};

struct request {
    struct bench *bench;
    uint64_t offset;
    bool flush;
};

static int coroutine_fn request_run(const struct request *request)
{
    struct bench *bench = request->bench;
    if (request->flush) {
        return backend_flush(bench->backend);
    }
    void *memory = bench->unused->len ? g_ptr_array_steal_index_fast(bench->unused, bench->unused->len - 1) : NULL;
    if (!memory) {
        memory = file_memory(bench->bytes);
        if (!memory) {
            return -ENOMEM;
        }
        memset(memory, (int)bench->pattern, bench->bytes);
    }
    struct iovec iov = {memory, bench->bytes};
    int result = bench->write ? backend_write(bench->backend, request->offset, bench->bytes, buffers_one(&iov), 0)
                              : backend_read(bench->backend, request->offset, bench->bytes, buffers_one(&iov), 0);
    g_ptr_array_add(bench->unused, memory);
    return result == -EINVAL ? -EIO : result; /* behind the end */
}

static void coroutine_fn request_entry(void *argument)
{
    struct request request = *(struct request *)argument; /* whose memory goes at the first yield */
    struct bench *bench = request.bench;
    int result = request_run(&request);
    bench->error = bench->error ? bench->error : result;
    bench->in_flight--;
    loop_sleep_wake(&bench->sleep);
}

/* Until no more than `most` are under way. */
static void coroutine_fn settle(struct bench *bench, uint64_t most)
{
    while (bench->in_flight > most) {
        loop_sleep_ns(&bench->sleep, INT64_C(3600000000000));
    }
}

static void coroutine_fn send_request(struct bench *bench, uint64_t offset, bool flush)
{
    struct request request = {bench, offset, flush};
    settle(bench, bench->depth - 1);
    bench->in_flight++;
    coroutine_enter(coroutine_create(request_entry, &request));
}

static int coroutine_fn send_all(struct bench *bench)
{
    uint64_t size = backend_size(bench->backend), offset = bench->offset;
    for (uint64_t i = 0; i < bench->count && !bench->error; i++) {
        if (bench->interval && i && (bench->count - i) % bench->interval == 0) {
            settle(bench, bench->no_drain ? bench->depth - 1 : 0);
            send_request(bench, 0, true);
            settle(bench, bench->no_drain ? bench->depth : 0);
        }
        send_request(bench, offset, false);
        offset += bench->step;
        offset = size && offset >= size ? offset % size : offset;
    }
    settle(bench, 0);
    return bench->error;
}

static int coroutine_fn bench_run(struct img *img, struct bench *bench, struct error **err)
{
    struct node *node;
    bench->common.name.writable = bench->write;
    int result = image_open(img->graph, &bench->common.name, &node, err);
    if (result < 0) {
        return result;
    }
    result = image_backend(img->graph, node, bench->write, &bench->backend, err);
    if (result == 0) {
        printf("Sending %" G_GUINT64_FORMAT " %s requests, %" G_GUINT64_FORMAT " bytes each, %" G_GUINT64_FORMAT
               " in parallel (starting at offset %" G_GUINT64_FORMAT ", step size %" G_GUINT64_FORMAT ")\n",
               bench->count, bench->write ? "write" : "read", bench->bytes, bench->depth, bench->offset, bench->step);
        if (bench->interval) {
            printf("Sending flush every %" G_GUINT64_FORMAT " requests\n", bench->interval);
        }
        fflush(stdout);
        bench->unused = g_ptr_array_new_with_free_func(free);
        int64_t before = loop_clock_ns();
        result = send_all(bench);
        if (result < 0) {
            error_set_errno(err, result, "Failed request");
        } else {
            printf("Run completed in %3.3f seconds.\n", (double)(loop_clock_ns() - before) / 1e9);
        }
        g_ptr_array_free(bench->unused, TRUE);
    }
    image_backend_destroy(bench->backend);
    node_release(node);
    return result;
}

/* --- options --- */

enum { OPTION_PATTERN = 1000, OPTION_FLUSH_INTERVAL, OPTION_NO_DRAIN };

static const char bench_help[] =
    "[-f FORMAT | --image-opts] [-c COUNT] [-d DEPTH] [-s SIZE] [-S STEP] [-o OFFSET]\n"
    "        [-w [--pattern BYTE] [--flush-interval COUNT [--no-drain]]] [-t MODE] FILENAME\n\n"
    "  -c, --count COUNT       how many requests (75000)\n"
    "  -d, --depth DEPTH       how many at a time (64)\n"
    "  -s, --buffer-size SIZE  bytes of each (4k)\n"
    "  -S, --step-size STEP    from one to the next (SIZE)\n"
    "  -o, --offset OFFSET     of the first\n"
    "  -w, --write             write instead of reading\n"
    "  --pattern BYTE          what is written (0)\n"
    "  --flush-interval COUNT  a flush after so many\n"
    "  --no-drain              without waiting for those before it\n"
    "  -i, --aio MODE          by io_uring or threads (default: io_uring where it is allowed)\n"
    "  -t, --cache MODE        of the image (writeback)\n" IMG_HELP_QUIET IMG_HELP_SHARE IMG_HELP_SOURCE;

static int set_aio(const char *mode, struct error **err)
{
    if (!strcmp(mode, "native")) {
        error_set(err, -ENOTSUP, "The kernel's older asynchronous I/O (native) is not used by this program");
        error_hint(err, "-i io_uring is its successor, -i threads does without either");
        return -ENOTSUP;
    }
    if (strcmp(mode, "threads") != 0 && strcmp(mode, "io_uring") != 0) {
        return error_set(err, -EINVAL, "Invalid aio option: %s", mode);
    }
    return 0;
}

/* -ENOENT: none of these. */
static int set_option(struct bench *bench, int option, struct error **err)
{
    switch (option) {
    case 'c':
        return img_number("request count", optarg, 1, INT32_MAX, &bench->count, err);
    case 'd':
        return img_number("queue depth", optarg, 1, INT32_MAX, &bench->depth, err);
    case 's':
        return img_number("buffer size", optarg, 1, INT32_MAX, &bench->bytes, err);
    case 'S':
        return img_number("step size", optarg, 0, INT32_MAX, &bench->step, err);
    case 'o':
        return img_number("offset", optarg, 0, INT64_MAX, &bench->offset, err);
    case OPTION_PATTERN:
        return img_number("pattern byte", optarg, 0, 255, &bench->pattern, err);
    case OPTION_FLUSH_INTERVAL:
        return img_number("flush interval", optarg, 0, INT32_MAX, &bench->interval, err);
    case OPTION_NO_DRAIN:
        bench->no_drain = true;
        return 0;
    case 'w':
        bench->write = true;
        return 0;
    case 'n':
        return set_aio("native", err);
    case 'i':
        return set_aio(optarg, err);
    case 't':
        bench->common.name.cache = optarg;
        return image_cache_mode(optarg, &(bool){0}, &(bool){0}, NULL) < 0
                   ? error_set(err, -EINVAL, "Invalid cache mode")
                   : 0;
    default:
        return -ENOENT;
    }
}

#define BENCH_SHORT "hc:d:f:ni:o:qs:S:t:wU"
static const struct option bench_options[] = {{"count", required_argument, NULL, 'c'},
                                              {"depth", required_argument, NULL, 'd'},
                                              {"buffer-size", required_argument, NULL, 's'},
                                              {"step-size", required_argument, NULL, 'S'},
                                              {"offset", required_argument, NULL, 'o'},
                                              {"write", no_argument, NULL, 'w'},
                                              {"pattern", required_argument, NULL, OPTION_PATTERN},
                                              {"flush-interval", required_argument, NULL, OPTION_FLUSH_INTERVAL},
                                              {"no-drain", no_argument, NULL, OPTION_NO_DRAIN},
                                              {"aio", required_argument, NULL, 'i'},
                                              {"native", no_argument, NULL, 'n'},
                                              {"cache", required_argument, NULL, 't'},
                                              IMG_QUIET_OPTION,
                                              IMG_SHARE_OPTION,
                                              IMG_COMMON_OPTIONS,
                                              {0}};

enum engine_kind img_bench_engine(int argc, char **argv)
{
    enum engine_kind kind = ENGINE_AUTO;

    optind = 0;
    opterr = 0;
    for (int option; (option = getopt_long(argc, argv, BENCH_SHORT, bench_options, NULL)) != -1;) {
        if (option == 'i') {
            kind = !strcmp(optarg, "threads") ? ENGINE_EPOLL : !strcmp(optarg, "io_uring") ? ENGINE_URING : kind;
        }
    }
    opterr = 1;
    return kind;
}

/* 0, or the exit status plus 1. */
static int read_options(struct bench *bench, int argc, char **argv)
{
    struct error *error = NULL;
    bool step_given = false;
    for (int option; (option = getopt_long(argc, argv, BENCH_SHORT, bench_options, NULL)) != -1;) {
        if (option == 'h') {
            return 1 + img_help("bench", bench_help);
        }
        step_given = step_given || option == 'S';
        int result = set_option(bench, option, &error);
        int status = result == -ENOENT ? img_common_option("bench", &bench->common, option) : 0;
        if (status || error) {
            return 1 + (status ? status : img_fail("bench", error));
        }
    }
    int status = img_common_name("bench", &bench->common, argc, argv);
    if (status) {
        return 1 + status;
    }
    bench->step = step_given ? bench->step : bench->bytes;
    if (bench->interval && !bench->write) {
        error_set(&error, -EINVAL, "--flush-interval is only available in write tests");
    } else if (bench->interval && bench->interval < bench->depth) {
        error_set(&error, -EINVAL, "Flush interval can't be smaller than depth");
    }
    return error ? 1 + img_fail("bench", error) : 0;
}

int coroutine_fn img_bench(struct img *img, int argc, char **argv)
{
    struct bench bench = {.count = 75000, .depth = 64, .bytes = 4096};
    struct error *error = NULL;
    int status = read_options(&bench, argc, argv);
    if (status) {
        return status - 1;
    }
    return bench_run(img, &bench, &error) < 0 ? img_fail("bench", error) : 0;
}

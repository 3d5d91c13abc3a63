/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock io`: the program. Owns the command line, the one loop and graph, the commands of -c or those that are read
 * from standard input behind a prompt, and the exit status.
 *
 * 1. A command that fails makes the status 1, and the next one runs all the same.
 * 2. While a line is waited for, requests under way go on: it is read on a worker.
 * 3. At the end, the requests under way are waited for and the image is closed, whatever failed.
 */
#include "tool/io/io.h"
#include "block/graph.h"
#include "loop/loop.h"
#include "loop/worker.h"
#include "tool/image_open.h"
#include "tool/registry.h"
#include "tool/tool.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>
#include <stdlib.h>
#include <string.h>

struct invocation {
    struct io io;
    struct io_opening how;
    GPtrArray *commands; /* -c */
    bool opens;          /* an image is named */
    int status;
};

/* --- the command line --- */

enum { OPTION_OBJECT = 256, OPTION_IMAGE_OPTS };

static const struct option options[] = {{"help", no_argument, NULL, 'h'},
                                        {"version", no_argument, NULL, 'V'},
                                        {"cmd", required_argument, NULL, 'c'},
                                        {"format", required_argument, NULL, 'f'},
                                        {"read-only", no_argument, NULL, 'r'},
                                        {"snapshot", no_argument, NULL, 's'},
                                        {"nocache", no_argument, NULL, 'n'},
                                        {"copy-on-read", no_argument, NULL, 'C'},
                                        {"misalign", no_argument, NULL, 'm'},
                                        {"native-aio", no_argument, NULL, 'k'},
                                        {"aio", required_argument, NULL, 'i'},
                                        {"cache", required_argument, NULL, 't'},
                                        {"discard", required_argument, NULL, 'd'},
                                        {"trace", required_argument, NULL, 'T'},
                                        {"force-share", no_argument, NULL, 'U'},
                                        {"object", required_argument, NULL, OPTION_OBJECT},
                                        {"image-opts", no_argument, NULL, OPTION_IMAGE_OPTS},
                                        {NULL, 0, NULL, 0}};

static void print_help(const char *program, FILE *to)
{
    fprintf(to,
            "Usage: %s [OPTIONS]... [-c STRING]... [file]\n"
            "Reads, writes and looks at a disk image, command by command\n\n"
            "  --object OBJECTDEF   a key: secret,id=ID,...\n"
            "  --image-opts         file is a list of options: driver=...,file.filename=...\n"
            "  -c, --cmd STRING     run this command; without any, commands are read from standard input\n"
            "  -f, --format FMT     the format of file; it must be given unless -r is\n"
            "  -r, --read-only      open it for reading only\n"
            "  -s, --snapshot       changes go to a temporary overlay\n"
            "  -n, --nocache        without the host's cache, as -t none\n"
            "  -C, --copy-on-read   what is read from below is stored in the image\n"
            "  -m, --misalign       misalign the memory of transfers\n"
            "  -k, --native-aio     without effect: the engine is chosen by itself\n"
            "  -i, --aio=MODE       without effect (threads, native or io_uring)\n"
            "  -t, --cache=MODE     none, writeback, writethrough, directsync or unsafe\n"
            "  -d, --discard=MODE   ignore or unmap (if not said)\n"
            "  -U, --force-share    even if another program writes to it\n"
            "  -h, --help           show this help and exit\n"
            "  -V, --version        show the version and exit\n\n"
            "'%s -c help' lists the commands.\n",
            program, program);
}

static void print_version(const char *program)
{
    if (!strcmp(program, "qemu-io")) { /* those who read it look for a number of that program's */
        printf("qemu-io version 10.0.2 (Interlock %s)\n", INTERLOCK_VERSION);
    } else {
        printf("%s version %s\n", program, INTERLOCK_VERSION);
    }
}

static int usage_error(const struct invocation *invocation, const char *text)
{
    fprintf(stderr, "%s: %s\n", invocation->io.program, text);
    return -EINVAL;
}

static int set_option(struct invocation *invocation, int option)
{
    struct io_opening *how = &invocation->how;
    struct error *error = NULL;
    switch (option) {
    case 'c':
        g_ptr_array_add(invocation->commands, optarg);
        return 0;
    case 'f':
        g_free(how->format);
        how->format = g_strdup(optarg);
        return 0;
    case 'r':
        how->read_only = true;
        return 0;
    case 's':
        how->snapshot = true;
        return 0;
    case 'n':
    case 't':
        g_free(how->cache);
        how->cache = g_strdup(option == 'n' ? "none" : optarg);
        return io_check_cache(&invocation->io, how->cache);
    case 'C':
        how->copy_on_read = true;
        return 0;
    case 'm':
        invocation->io.misalign = true;
        return 0;
    case 'k':
        return 0;
    case 'i':
        return io_check_aio(&invocation->io, optarg);
    case 'd':
        g_free(how->discard);
        how->discard = g_strdup(optarg);
        return io_check_discard(&invocation->io, optarg);
    case 'T':
        return usage_error(invocation, "Tracing (-T, --trace) is not supported");
    case 'U':
        how->force_share = true;
        return 0;
    case OPTION_OBJECT:
        if (image_object_add(optarg, &error) < 0) {
            io_tell_error(&invocation->io, error);
            return -EINVAL;
        }
        return 0;
    default:
        print_help(invocation->io.program, stderr);
        return -EINVAL;
    }
}

/* 0: go on; 1: *ret_status is the program's. */
static int read_options(struct invocation *invocation, int argc, char **argv, int *ret_status)
{
    bool image_opts = false;
    *ret_status = 1;
    for (int option; (option = getopt_long(argc, argv, "hVc:d:f:rsnCmki:t:T:U", options, NULL)) != -1;) {
        if (option == 'h' || option == 'V') {
            if (option == 'h') {
                print_help(invocation->io.program, stdout);
            } else {
                print_version(invocation->io.program);
            }
            *ret_status = 0;
            return 1;
        }
        image_opts = image_opts || option == OPTION_IMAGE_OPTS;
        if (option != OPTION_IMAGE_OPTS && set_option(invocation, option) < 0) {
            return 1;
        }
    }
    if (argc - optind > 1) {
        print_help(invocation->io.program, stderr);
        return 1;
    }
    if (image_opts && invocation->how.format) {
        usage_error(invocation, "--image-opts and -f are mutually exclusive");
        return 1;
    }
    if (optind < argc) {
        *(image_opts ? &invocation->how.options : &invocation->how.name) = g_strdup(argv[optind]);
        invocation->opens = true;
    }
    return 0;
}

/* --- commands from standard input --- */

static int read_line(void *argument)
{
    char **line = argument;
    size_t room = 0;
    ssize_t length = getline(line, &room, stdin);
    if (length > 0 && (*line)[length - 1] == '\n') {
        (*line)[length - 1] = 0;
    }
    return length < 0 ? -ENODATA : 0;
}

static int coroutine_fn run_interactively(struct io *io)
{
    int worst = 0;
    while (!io->quits) {
        char *line = NULL;
        printf("qemu-io> ");
        fflush(stdout);
        int code = worker_run(read_line, &line);
        if (code == 0) {
            code = io_command_run(io, line);
            worst = code < 0 ? code : worst;
        } else {
            io->quits = true;
        }
        free(line);
    }
    return worst;
}

static int coroutine_fn run_commands(struct invocation *invocation)
{
    struct io *io = &invocation->io;
    int worst = 0;
    if (!invocation->commands->len) {
        return run_interactively(io);
    }
    for (unsigned i = 0; i < invocation->commands->len && !io->quits; i++) {
        int code = io_command_run(io, invocation->commands->pdata[i]);
        worst = code < 0 ? code : worst;
    }
    return worst;
}

static void coroutine_fn run_entry(void *argument)
{
    struct invocation *invocation = argument;
    struct io *io = &invocation->io;
    if (!invocation->opens || io_open(io, &invocation->how) == 0) {
        invocation->status = run_commands(invocation) < 0;
    } else {
        invocation->status = 1;
    }
    io_close(io);
}

static int run(struct invocation *invocation)
{
    struct error *error = NULL;
    struct loop *loop;
    register_all();
    if (loop_create(ENGINE_AUTO, &loop, &error) < 0) {
        return tool_fail(invocation->io.program, error);
    }
    invocation->io.graph = graph_create();
    co_group_init(&invocation->io.requests);
    loop_run_coroutine(loop, run_entry, invocation);
    co_group_destroy(&invocation->io.requests);
    graph_destroy(invocation->io.graph);
    loop_destroy(loop);
    if ((fflush(stdout) || ferror(stdout)) && invocation->status == 0) {
        error_set(&error, -EIO, "Cannot write to standard output");
        return tool_fail(invocation->io.program, error);
    }
    return invocation->status;
}

int tool_io(int argc, char **argv)
{
    g_autofree char *called = g_path_get_basename(argv[0]);
    struct invocation invocation = {.commands = g_ptr_array_new()};
    invocation.io.program = !strcmp(called, "qemu-io") ? "qemu-io" : "interlock io";
    argv[0] = (char *)invocation.io.program; /* getopt_long() puts it before what it has to say */
    int status;
    if (read_options(&invocation, argc, argv, &status) == 0) {
        status = run(&invocation);
    }
    g_ptr_array_free(invocation.commands, TRUE);
    io_opening_clear(&invocation.how);
    return status;
}

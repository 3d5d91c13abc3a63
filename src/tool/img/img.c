/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock img`: the frame. Owns the table of sub-commands, the one loop and the one graph of the program, the words
 * of errors and helps, and the exit status.
 *
 * 1. A sub-command runs in a coroutine of that loop; when it returns, its graph is empty (graph_destroy() asserts it).
 * 2. Errors are told on standard error, behind the name that the program was called by; what was asked for goes to
 *    standard output. Output that could not be written makes the status 1.
 *
 * Nothing here knows what an image is: the sub-commands do, each in a file of its name.
 */
#include "tool/img/img.h"
#include "block/graph.h"
#include "loop/loop.h"
#include "tool/registry.h"
#include "tool/tool.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

static const struct img_command {
    const char *name;
    int coroutine_fn (*run)(struct img *img, int argc, char **argv);
    const char *help;
    enum engine_kind (*engine)(int argc, char **argv); /* NULL: whatever is best */
} img_commands[] = {
    {"amend", img_amend, "change options of an image", NULL},
    {"bench", img_bench, "time requests to an image", img_bench_engine},
    {"bitmap", img_bitmap, "make, remove and change the dirty bitmaps of an image", NULL},
    {"check", img_check, "look for what is wrong with an image, and repair it", NULL},
    {"commit", img_commit, "move the changes of an image into its backing file", NULL},
    {"compare", img_compare, "see whether two images have the same content", NULL},
    {"convert", img_convert, "copy images into another, of any format", NULL},
    {"create", img_create, "make a new image", NULL},
    {"dd", img_dd, "copy blocks of an image into a new one", NULL},
    {"info", img_info, "show what an image says of itself", NULL},
    {"map", img_map, "show where an image has data", NULL},
    {"measure", img_measure, "tell how large a new image will be", NULL},
    {"rebase", img_rebase, "lean an image on another backing file", NULL},
    {"resize", img_resize, "make an image longer or shorter", NULL},
    {"snapshot", img_snapshot, "list, make, apply and delete snapshots inside an image", NULL},
    {NULL, NULL, NULL, NULL},
};

/* How the program was called: "interlock img" or "qemu-img". */
static const char *program = "interlock img";

static const struct img_command *command_find(const char *name)
{
    for (const struct img_command *command = img_commands; command->name; command++) {
        if (!strcmp(command->name, name)) {
            return command;
        }
    }
    return NULL;
}

/* --- words --- */

static int hint_help(const char *command)
{
    fprintf(stderr, "Try '%s%s%s --help' for more info\n", program, command ? " " : "", command ? command : "");
    return 1;
}

int img_fail(const char *command, struct error *error)
{
    fflush(stdout);
    return tool_fail(program, error);
}

int img_usage(const char *command, const char *format, ...)
{
    fflush(stdout);
    if (format) {
        va_list arguments;
        va_start(arguments, format);
        fprintf(stderr, "%s: ", program);
        vfprintf(stderr, format, arguments);
        fprintf(stderr, "\n");
        va_end(arguments);
    }
    return hint_help(command);
}

void img_warn(const char *format, ...)
{
    va_list arguments;
    fflush(stdout);
    va_start(arguments, format);
    fprintf(stderr, "%s: warning: ", program);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
}

int img_help(const char *command, const char *text)
{
    printf("%s %s: %s\n\nUsage: %s %s %s", program, command, command_find(command)->help, program, command, text);
    return 0;
}

void img_print_json(json_t *json)
{
    json_dumpf(json, stdout, JSON_INDENT(4));
    printf("\n");
    json_decref(json);
}

static void print_help(void)
{
    printf("Usage: %s [-h | -V] COMMAND [--help | OPTION...]\n\n"
           "Disk images: making, looking at, checking, converting and changing them.\n\n"
           "  -h, --help     show this help and exit\n"
           "  -V, --version  show the version and exit\n\n"
           "Commands ('%s COMMAND --help' has each one's options):\n\n",
           program, program);
    for (const struct img_command *command = img_commands; command->name; command++) {
        printf("  %-9s %s\n", command->name, command->help);
    }
}

static void print_version(void)
{
    if (!strcmp(program, "qemu-img")) { /* those who read it look for a number of that program's */
        printf("qemu-img version 10.0.2 (Interlock %s)\n", INTERLOCK_VERSION);
    } else {
        printf("interlock img version %s\n", INTERLOCK_VERSION);
    }
}

/* --- running --- */

struct run {
    const struct img_command *command;
    struct img img;
    int argc;
    char **argv;
    int status;
};

static void coroutine_fn run_entry(void *argument)
{
    struct run *run = argument;
    run->status = run->command->run(&run->img, run->argc, run->argv);
}

static int run_command(const struct img_command *command, int argc, char **argv)
{
    struct error *error = NULL;
    struct loop *loop;
    g_autofree char *name = g_strdup_printf("%s %s", program, command->name);
    argv[0] = name; /* getopt_long() puts it before what it has to say */
    register_all();
    enum engine_kind engine = command->engine ? command->engine(argc, argv) : ENGINE_AUTO;
    optind = 0;
    if (loop_create(engine, &loop, &error) < 0) {
        return img_fail(command->name, error);
    }
    struct run run = {.command = command, .img.graph = graph_create(), .argc = argc, .argv = argv};
    loop_run_coroutine(loop, run_entry, &run);
    g_assert(!run.img.made);
    graph_destroy(run.img.graph);
    loop_destroy(loop);
    if ((fflush(stdout) || ferror(stdout)) && run.status == 0) {
        error_set(&error, -EIO, "Cannot write to standard output");
        return img_fail(command->name, error);
    }
    return run.status;
}

int tool_img(int argc, char **argv)
{
    static const struct option options[] = {{"help", no_argument, NULL, 'h'},
                                            {"version", no_argument, NULL, 'V'},
                                            {"trace", required_argument, NULL, 'T'},
                                            {NULL, 0, NULL, 0}};
    g_autofree char *called = g_path_get_basename(argv[0]);
    program = !strcmp(called, "qemu-img") ? "qemu-img" : "interlock img";
    char *arguments_name = argv[0];
    argv[0] = (char *)program;
    for (int option; (option = getopt_long(argc, argv, "+hVT:", options, NULL)) != -1;) {
        switch (option) {
        case 'h':
            print_help();
            return 0;
        case 'V':
            print_version();
            return 0;
        case 'T':
            return img_usage(NULL, "Tracing (-T, --trace) is not supported");
        default:
            return hint_help(NULL);
        }
    }
    argv[0] = arguments_name;
    if (optind >= argc) {
        return img_usage(NULL, "Not enough arguments");
    }
    const struct img_command *command = command_find(argv[optind]);
    if (!command) {
        return img_usage(NULL, "Command not found: %s", argv[optind]);
    }
    return run_command(command, argc - optind, argv + optind);
}

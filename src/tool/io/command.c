/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The table of commands, and running one line: what every command has in common before it runs.
 *
 * 1. A line is split at spaces, and nothing in it quotes; a command ends the line's life, and keeps none of its words.
 * 2. Told in this order: an unknown command, no image, too few or too many arguments, an image that may not be written.
 * 3. The commands read their options with getopt(), which is started anew for each.
 */
#include "block/node.h"
#include "block/user.h"
#include "tool/io/io.h"
#include <errno.h>
#include <getopt.h>
#include <glib.h>
#include <string.h>

#define HELP_READ                                                                                             \
    "\n -C  the result for programs: bytes,operations,time,bytes per second,operations per second"            \
    "\n -P  tell when a byte read is not this one\n -q  print no result\n -r  without effect (a peer's hint)" \
    "\n -v  dump what was read\n"
#define HELP_WRITE                                                                                    \
    "\n -C  the result for programs: bytes,operations,time,bytes per second,operations per second"    \
    "\n -f  on stable storage when it returns\n -P  this byte in place of 0xcd\n -q  print no result" \
    "\n -r  without effect (a peer's hint)\n"
#define HELP_ASYNC                                                                                                 \
    "\n It is good once it has begun, whatever becomes of it; aio_flush waits for all that have.\n -i  a request " \
    "that is counted as invalid: nothing is done\n"

static const struct io_command commands[] = {
    {"abort", NULL, io_command_abort, 0, 0, IO_WITHOUT_IMAGE, "", "simulate a program crash using abort(3)", NULL},
    {"aio_flush", NULL, io_command_aio_flush, 0, 0, 0, "", "completes all outstanding aio requests", NULL},
    {"aio_read", NULL, io_command_aio_read, 2, -1, 0, "[-Ciqrv] [-P pattern] off len [len..]",
     "asynchronously reads a number of bytes", HELP_READ HELP_ASYNC},
    {"aio_write", NULL, io_command_aio_write, 2, -1, IO_WRITES, "[-Cfiqruz] [-P pattern] off len [len..]",
     "asynchronously writes a number of bytes",
     HELP_WRITE " -u  with -z: what was there may be freed\n -z  zeroes, without data\n" HELP_ASYNC},
    {"alloc", "a", io_command_alloc, 1, 2, 0, "offset [count]", "checks if offset is allocated in the file",
     "\n How many of the bytes the image itself has; without count, of one sector.\n"},
    {"break", NULL, io_command_break, 2, 2, 0, "event tag",
     "sets a breakpoint on event and tags the stopped request as tag",
     "\n The image lies on a blkdebug node. The request goes on by `resume tag`.\n"},
    {"close", "c", io_command_close, 0, 0, 0, "", "close the current open file", NULL},
    {"discard", "d", io_command_discard, 2, -1, IO_WRITES, "[-Cq] off len",
     "discards a number of bytes at a specified offset", NULL},
    {"flush", "f", io_command_flush, 0, 0, 0, "", "flush all in-core file state to disk", NULL},
    {"help", "?", io_help, 0, 1, IO_WITHOUT_IMAGE, "[command]", "help for one or all commands", NULL},
    {"info", "i", io_command_info, 0, 0, 0, "", "prints information about the current file", NULL},
    {"length", "l", io_command_length, 0, 0, 0, "", "gets the length of the current file", NULL},
    {"map", NULL, io_command_map, 0, 0, 0, "", "prints the allocated areas of a file", NULL},
    {"open", "o", io_command_open, 1, -1, IO_WITHOUT_IMAGE, "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
     "open the file specified by path",
     "\n For writing, the format is given: open -o driver=FORMAT PATH.\n"
     "\n -r  for reading only\n -s  changes go to a temporary overlay\n -C  what is read from below is stored in the "
     "image\n -n  without the host's cache, as -t none\n -U  even if another program writes to it\n -k, -i  without "
     "effect (a peer's hint)\n -t  none, writeback, writethrough, directsync or unsafe\n -d  ignore or unmap\n"
     " -o  KEY=VALUE,...: options of the image\n"},
    {"quit", "q", io_quit, 0, -1, IO_WITHOUT_IMAGE, "", "exit the program", NULL},
    {"read", "r", io_command_read, 2, -1, 0, "[-abCqrv] [-P pattern [-s off] [-l len]] off len",
     "reads a number of bytes at a specified offset",
     HELP_READ " -s, -l  with -P: which part of what was read is held against it\n -b  the state of a virtual machine: "
               "not supported\n -p  without effect\n"},
    {"readv", NULL, io_command_readv, 2, -1, 0, "[-Cqrv] [-P pattern] off len [len..]",
     "reads a number of bytes at a specified offset", HELP_READ},
    {"remove_break", NULL, io_command_remove_break, 1, 1, 0, "tag", "remove a breakpoint by tag", NULL},
    {"reopen", NULL, io_command_reopen, 0, -1, 0, "[(-r|-w)] [-c cache] [-o options]",
     "reopens an image with new options",
     "\n -r  for reading only\n -w  for writing\n -c  with this cache mode\n -o  KEY=VALUE,...: options of the image "
     "that "
     "change\n"},
    {"resume", NULL, io_command_resume, 1, 1, 0, "tag", "resumes the request tagged as tag", NULL},
    {"sigraise", NULL, io_command_sigraise, 1, 1, IO_WITHOUT_IMAGE, "signal", "raises a signal", "\n By its number.\n"},
    {"sleep", NULL, io_command_sleep, 1, 1, 0, "", "waits for the given value in milliseconds", NULL},
    {"truncate", "t", io_command_truncate, 1, 3, IO_WRITES, "[-m prealloc_mode] off",
     "truncates the current file at the given offset",
     "\n -m  how what is added is allocated: off, metadata, falloc, "
     "full\n"},
    {"wait_break", NULL, io_command_wait_break, 1, 1, 0, "tag", "waits for the suspension of a request", NULL},
    {"write", "w", io_command_write, 2, -1, IO_WRITES, "[-bcCfnqruz] [-P pattern | -s source_file] off len",
     "writes a number of bytes at a specified offset",
     HELP_WRITE
     " -b  the state of a virtual machine: not supported\n -c  stored compressed\n -n  with -z: not by writing "
     "data\n -p  without effect\n -s  the content of a file, again and again\n -u  with -z: what was there "
     "may be freed\n -z  zeroes, without data\n"},
    {"writev", NULL, io_command_writev, 2, -1, IO_WRITES, "[-Cfqr] [-P pattern] off len [len..]",
     "writes a number of bytes at a specified offset", HELP_WRITE},
    {"zone_append", "zap", io_command_zone_append, 3, 4, 0, "offset len [len..]",
     "append write a number of bytes at a specified offset", NULL},
    {"zone_close", "zc", io_command_zone, 2, 2, 0, "offset len", "close a range of zones in zone block device", NULL},
    {"zone_finish", "zf", io_command_zone, 2, 2, 0, "offset len", "finish a range of zones in zone block device", NULL},
    {"zone_open", "zo", io_command_zone, 2, 2, 0, "offset len", "explicit open a range of zones in zone block device",
     NULL},
    {"zone_report", "zrp", io_command_zone, 2, 2, 0, "offset number", "report zone information", NULL},
    {"zone_reset", "zrs", io_command_zone, 2, 2, 0, "offset len", "reset a zone write pointer in zone block device",
     NULL},
};

const struct io_command *io_command_find(const char *name)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(commands); i++) {
        const struct io_command *command = &commands[i];
        if (!strcmp(command->name, name) || (command->short_name && !strcmp(command->short_name, name))) {
            return command;
        }
    }
    return NULL;
}

/* --- help --- */

static void print_usage(const struct io_command *command)
{
    printf("%s ", command->name);
    if (*command->arguments || !strcmp(command->name, "map")) { /* as it has always been printed */
        printf("%s ", command->arguments);
    }
    printf("-- %s\n", command->summary);
}

int io_usage(const char *name)
{
    print_usage(io_command_find(name));
    return -EINVAL;
}

int coroutine_fn io_help(struct io *io, int argc, char **argv)
{
    if (argc == 1) {
        for (unsigned i = 0; i < G_N_ELEMENTS(commands); i++) {
            print_usage(&commands[i]);
        }
        printf("\nUse 'help commandname' for extended help.\n");
        return 0;
    }
    const struct io_command *command = io_command_find(argv[1]);
    if (!command) {
        printf("command %s not found\n", argv[1]);
        return -EINVAL;
    }
    print_usage(command);
    printf("%s", command->help ? command->help : "");
    return 0;
}

int coroutine_fn io_quit(struct io *io, int argc, char **argv)
{
    io->quits = true;
    return 0;
}

/* --- running --- */

char **io_command_split(const char *line, int *ret_count)
{
    g_auto(GStrv) parts = g_strsplit(line, " ", 0);
    int count = 0;
    for (char **part = parts; *part; part++) { /* drops empty ones */
        if (**part) {
            parts[count++] = *part;
        } else {
            g_free(*part);
        }
    }
    parts[count] = NULL;
    *ret_count = count;
    return count ? g_steal_pointer(&parts) : NULL;
}

static int check_arguments(const struct io_command *command, const char *name, int count)
{
    if (count >= command->least && (command->most < 0 || count <= command->most)) {
        return 0;
    }
    fflush(stdout);
    fprintf(stderr, "bad argument count %d to %s, expected ", count, name);
    if (command->most < 0) {
        fprintf(stderr, "at least %d arguments\n", command->least);
    } else if (command->least == command->most) {
        fprintf(stderr, "%d arguments\n", command->least);
    } else {
        fprintf(stderr, "between %d and %d arguments\n", command->least, command->most);
    }
    return -EINVAL;
}

static int coroutine_fn run(struct io *io, int argc, char **argv)
{
    const struct io_command *command = io_command_find(argv[0]);
    int code = 0;
    if (!command) {
        fflush(stdout);
        fprintf(stderr, "command \"%s\" not found\n", argv[0]);
        return -EINVAL;
    }
    if (!io->backend && !(command->flags & IO_WITHOUT_IMAGE)) {
        fflush(stdout);
        fprintf(stderr, "no file open, try 'help open'\n");
        return -EINVAL;
    }
    code = check_arguments(command, argv[0], argc - 1);
    if (code == 0 && command->flags & IO_WRITES && io->how.read_only) {
        struct error *error = NULL;
        code = error_set(&error, -EROFS, "Block node is read-only");
        io_tell_error(io, error);
    }
    optind = 0;
    return code < 0 ? code : command->run(io, argc, argv);
}

int coroutine_fn io_command_run(struct io *io, const char *line)
{
    int count;
    g_auto(GStrv) words = io_command_split(line, &count);
    if (!words) {
        return 0;
    }
    /* getopt() moves words about, so it gets an array of its own. */
    g_autofree char **argv = g_memdup2(words, sizeof(*words) * ((size_t)count + 1));
    int code = run(io, count, argv);
    fflush(stdout);
    return code;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The one binary: picks a sub-command by its first argument, or a personality by the name that it was called by.
 * Each sub-command is a main() of its own in a file of its name; this table is the only list of them.
 */
#include "tool/tool.h"
#include <glib.h>
#include <locale.h>
#include <stdio.h>
#include <string.h>

static const struct sub_command {
    const char *name;
    const char *personality; /* the name of the program that it takes the place of, or NULL */
    int (*run)(int argc, char **argv);
    const char *help;
} sub_commands[] = {
    {"daemon", "qemu-storage-daemon", tool_daemon, "serve images and run live operations on them"},
    {"img", "qemu-img", tool_img, "make, look at, check, convert and change disk images"},
    {"io", "qemu-io", tool_io, "read, write and look at a disk image, command by command"},
    {"nbd", "qemu-nbd", tool_nbd, "serve a disk image to NBD clients, or list what a server serves"},
    {"status", NULL, tool_status, "nodes, exports and jobs of a running daemon at a glance"},
    {"graph", NULL, tool_graph, "the picture of its nodes: text, dot or SVG"},
    {"commit", NULL, tool_verb, "merge an image down into one below it, live"},
    {"stream", NULL, tool_verb, "pull the data of the images below up into one, live"},
    {"mirror", NULL, tool_verb, "copy an image in use, and let its users go on with the copy or not"},
    {"backup", NULL, tool_verb, "copy images in use as they are at this moment"},
    {"snapshot", NULL, tool_verb, "put a new image over one, which keeps this moment"},
    {"bitmap", NULL, tool_verb, "dirty bitmaps, for incremental backups"},
    {"resize", NULL, tool_verb, "make an image in use longer or shorter"},
    {"create", NULL, tool_verb, "make an image, by the daemon"},
    {"amend", NULL, tool_verb, "change options of an image that is open"},
    {"close", NULL, tool_verb, "close nodes that nobody uses"},
    {"job", NULL, tool_job, "list, wait for, cancel, pause, change jobs"},
    {"access", NULL, tool_access, "who holds what on which node; would a command be admitted?"},
};

static void print_help(FILE *to)
{
    fprintf(to, "Usage: interlock SUBCOMMAND [OPTION...]\n\nA live block-storage engine. Sub-commands:\n");
    for (unsigned i = 0; i < G_N_ELEMENTS(sub_commands); i++) {
        fprintf(to, "  %-8s %s\n", sub_commands[i].name, sub_commands[i].help);
    }
    fprintf(to, "\n'interlock SUBCOMMAND --help' has each one's options. A daemon is found by --qmp SOCKET or by the "
                "environment\nvariable INTERLOCK_QMP.\n");
}

int main(int argc, char **argv)
{
    g_autofree char *called = g_path_get_basename(argv[0]);

    setlocale(LC_CTYPE, "C.UTF-8");
    for (unsigned i = 0; i < G_N_ELEMENTS(sub_commands); i++) {
        if (sub_commands[i].personality && !strcmp(called, sub_commands[i].personality)) {
            return sub_commands[i].run(argc, argv);
        }
    }
    if (argc < 2) {
        print_help(stderr);
        return 1;
    }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
        print_help(stdout);
        return 0;
    }
    if (!strcmp(argv[1], "--version") || !strcmp(argv[1], "-V")) {
        printf("interlock version %s\n", INTERLOCK_VERSION);
        return 0;
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(sub_commands); i++) {
        if (!strcmp(argv[1], sub_commands[i].name)) {
            g_autofree char *name = g_strdup_printf("interlock %s", argv[1]);

            g_set_prgname(name);
            return sub_commands[i].run(argc - 1, argv + 1);
        }
    }
    fprintf(stderr, "interlock: there is no sub-command '%s'; 'interlock --help' lists them\n", argv[1]);
    return 1;
}

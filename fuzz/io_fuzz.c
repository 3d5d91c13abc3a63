/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fuzz target: what scripts give to `interlock io`. What begins with '[' is a file of blkdebug's rules, which are then
 * run through every event and kind of request. Else there are lines of commands behind the first byte, which are
 * carried out on an image that holds nothing. Left out are the commands that end the program, wait, or open files.
 */
#include "block/graph.h"
#include "block/user.h"
#include "driver/filter/blkdebug_rules.h"
#include "loop/loop.h"
#include "tool/io/io.h"
#include "tool/registry.h"
#include <glib.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

struct input {
    const char *text;
    size_t size;
};

static struct loop *loop;
static struct io io = {.program = "fuzz"};

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    register_all();
    if (!freopen("/dev/null", "w", stdout) || loop_create(ENGINE_EPOLL, &loop, NULL) < 0) {
        abort();
    }
    opterr = 0;
    return 0;
}

static void run_rules(const struct input *input)
{
    struct blkdebug_rules rules;
    auto_error error = NULL;
    bool immediately;
    blkdebug_rules_init(&rules);
    int code = blkdebug_rules_read(&rules, input->text, input->size, &error);
    g_assert((code == 0) == !error && (code == 0 || rules.count == 0));
    for (unsigned event = 0; event < BLKDEBUG_EVENT_COUNT; event++) {
        g_assert(!blkdebug_rules_event(&rules, event)); /* a file has no breakpoints */
        for (unsigned kind = 0; kind < BLKDEBUG_IOTYPE_COUNT; kind++) {
            code = blkdebug_rules_request(&rules, kind, event * 512, 512, &immediately);
            g_assert(code <= 0 && code >= -4095);
        }
    }
    blkdebug_rules_finish(&rules);
}

static bool is_allowed(const char *line)
{
    static const char *const left_out[] = {"abort",      "sigraise", "sleep", "open", "close",
                                           "wait_break", "reopen",   "quit",  NULL};
    int count;
    g_auto(GStrv) words = io_command_split(line, &count);
    const struct io_command *command = words ? io_command_find(words[0]) : NULL;
    bool reads_file = false;
    for (int i = 1; i < count; i++) {
        reads_file = reads_file || (words[i][0] == '-' && strchr(words[i], 's'));
    }
    bool counts = command && count > command->least && (command->most < 0 || count <= command->most + 1);
    return counts && !g_strv_contains(left_out, command->name) && !reads_file;
}

static void coroutine_fn run_commands(void *argument)
{
    const struct input *input = argument;
    struct io_opening how = {.options = g_strdup("driver=null-co,size=1M,read-zeroes=on")};
    g_autofree char *text = g_strndup(input->text, input->size);
    g_auto(GStrv) lines = g_strsplit(text, "\n", 32);
    io.graph = graph_create();
    co_group_init(&io.requests);
    if (io_open(&io, &how) < 0) {
        abort();
    }
    for (char **line = lines; *line; line++) {
        if (is_allowed(*line)) {
            (void)io_command_run(&io, *line);
        }
    }
    io_close(&io);
    g_assert(io.request_count == 0);
    co_group_destroy(&io.requests);
    graph_destroy(io.graph);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {(const char *)data + 1, size - 1};
    if (size && data[0] == '[') {
        input = (struct input){(const char *)data, size};
        run_rules(&input);
    } else if (size) {
        loop_run_coroutine(loop, run_commands, &input);
    }
    return 0;
}

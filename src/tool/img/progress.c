/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How far a long command has come: with -p a line on standard output that overwrites itself, without it a line on
 * standard error whenever SIGUSR1 arrives.
 *
 * 1. At most one command is under way in a program, so there is one progress at a time; it is its owner's, who ends it.
 * 2. A line is printed when the value has moved by a hundredth of a per cent, and nothing else is printed meanwhile.
 */
#include "loop/loop.h"
#include "tool/img/img.h"
#include <glib.h>
#include <signal.h>
#include <stdio.h>

static struct img_progress *current;

static void asked(int signal_number, void *argument)
{
    if (current) {
        fprintf(stderr, "    (%.2f/100%%)\n", current->now);
    }
}

static void print_line(struct img_progress *progress)
{
    progress->last = progress->now;
    printf("    (%.2f/100%%)\r", progress->now);
    fflush(stdout);
}

void img_progress_begin(struct img_progress *progress, bool shown)
{
    *progress = (struct img_progress){.shown = shown};
    g_assert(!current);
    current = progress;
    if (shown) {
        print_line(progress);
    } else {
        loop_watch_signal(SIGUSR1, asked, NULL); /* -EBUSY: it is watched already */
    }
}

void img_progress_report(uint64_t done, uint64_t of, void *argument)
{
    struct img_progress *progress = argument;
    progress->now = of ? MIN((double)done / (double)of, 1.0) * 100 : 100;
    if (progress->shown && (progress->now - progress->last >= 0.01 || progress->now < progress->last)) {
        print_line(progress);
    }
}

void img_progress_abandon(struct img_progress *progress)
{
    g_assert(current == progress);
    current = NULL;
    if (progress->shown) {
        printf("\n");
        fflush(stdout);
    }
}

void img_progress_end(struct img_progress *progress)
{
    if (progress->shown) {
        progress->now = 100;
        print_line(progress);
    }
    img_progress_abandon(progress);
}

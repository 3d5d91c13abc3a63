/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CONTROL_CONTROL_H
#define INTERLOCK_CONTROL_CONTROL_H

#include "base/list.h"
#include "schema/command.h"
#include <jansson.h>
#include <stdbool.h>

/*
 * What the commands of one program share. One of these exists, on the control loop; all of it is used there only.
 * Whoever creates it zeroes it, calls control_init() and destroys what it added itself.
 */
struct loop;
struct graph;
struct jobs;
struct exports;
struct iothreads;

struct control {
    struct loop *loop;
    const struct command *commands; /* the table that the monitors serve */
    unsigned command_count;
    struct list monitors; /* struct monitor */
    struct graph *graph;  /* these four: service.h's */
    struct jobs *jobs;
    struct exports *exports;
    struct iothreads *iothreads;
    struct list runs;    /* struct run: handlers of commands with claims that are running (dispatch.c) */
    struct list waiting; /* struct waiting: operations that wait for their claims (waiting.c) */
    unsigned changes;    /* of the ledger, counted */
    bool allow_override; /* --allow-override */
    bool quitting;       /* commands that begin something new are refused from now on */
};

/* Sets the loop and the command table, and no monitors. */
void control_init(struct control *control, struct loop *loop, const struct command *commands, unsigned command_count);
/* Sends an event ({"event", "data"}; taken over) with a time stamp to every session that has finished its negotiation.
 * Control loop; never yields. */
void control_emit(struct control *control, json_t *event);
/* The command of that name, or NULL. */
const struct command *control_find_command(const struct control *control, const char *name);
/* {"qemu": {...}, "package": ...}: the greeting's and query-version's. A new reference. */
json_t *control_version(void);

#endif

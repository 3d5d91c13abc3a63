/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CONTROL_SERVICE_H
#define INTERLOCK_CONTROL_SERVICE_H

#include "control/control.h"
#include "loop/loop.h"
#include "schema/types.h"

/* The whole of what a daemon serves: graph, jobs, exports, I/O threads, monitors; made and ended in order. */

/* On the control thread, whose loop it is. */
struct control *service_create(struct loop *loop, enum engine_kind engine);
/* Any time, control loop: ends the program in order; loop_run() returns and service_shutdown() is to follow. */
void service_quit(struct control *control, enum shutdown_cause cause);
/* Refuses new work, ends what waits, cancels jobs and waits for them, removes exports, closes nodes, says goodbye to
 * the monitors. */
void coroutine_fn service_shutdown(struct control *control);
/* After service_shutdown(): asserts that nothing is left. */
void service_destroy(struct control *control);

#endif

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A daemon's whole: what exists beside the loop, in the order in which it is made, and ended in the opposite one.
 * Nothing is force-closed: jobs are cancelled and waited for, exports let their requests end, nodes close when their
 * last reference goes; service_destroy() asserts that the graph is empty then.
 *
 * Events of jobs and exports leave through control_emit(), to every monitor.
 */
#include "control/service.h"
#include "block/graph.h"
#include "control/dispatch.h"
#include "control/iothread.h"
#include "control/monitor.h"
#include "control/object.h"
#include "control/waiting.h"
#include "export/export.h"
#include "job/job.h"
#include "job/resize.h"
#include "schema/commands.h"
#include "schema/events.h"
#include <glib.h>

static void emit(json_t *event, void *argument)
{
    control_emit(argument, event);
}

static void export_deleted(void *argument, const char *id)
{
    control_emit(argument, event_block_export_deleted(id));
}

static struct loop *find_iothread(void *argument, const char *name)
{
    struct control *control = argument;

    return iothreads_find(control->iothreads, name);
}

static int coroutine_fn resize_export(void *argument, struct export *export, uint64_t size)
{
    struct control *control = argument;
    g_autofree char *name = g_strdup(export_node_name(export));
    struct block_resize_args args = {.node_name = name, .size = (int64_t)size};

    return resize_node(control->graph, &args, NULL);
}

static bool iothread_is_busy(void *argument, struct loop *loop)
{
    struct control *control = argument;

    return exports_use_loop(control->exports, loop);
}

struct control *service_create(struct loop *loop, enum engine_kind engine)
{
    struct control *control = g_new0(struct control, 1);
    struct exports_config exports = {
        .deleted = export_deleted, .find_iothread = find_iothread, .resize = resize_export, .argument = control};

    control_init(control, loop, command_table, command_table_count);
    control->graph = graph_create();
    dispatch_init(control);
    control->iothreads = iothreads_create(engine);
    control->jobs = jobs_create(control->graph, emit, control);
    exports.graph = control->graph;
    control->exports = exports_create(&exports);
    iothreads_set_busy(control->iothreads, iothread_is_busy, control);
    return control;
}

void service_quit(struct control *control, enum shutdown_cause cause)
{
    if (!control->quitting) {
        control->quitting = true;
        control_emit(control, event_shutdown(false, cause));
        waiting_cancel_all(control);
    }
    loop_stop(control->loop);
}

void coroutine_fn service_shutdown(struct control *control)
{
    control->quitting = true;
    waiting_shutdown(control);
    jobs_cancel_all_and_wait(control->jobs);
    exports_shutdown(control->exports);
    graph_delete_all(control->graph);
    monitor_close_all(control);
}

void service_destroy(struct control *control)
{
    dispatch_finish(control);
    exports_destroy(control->exports);
    jobs_destroy(control->jobs);
    graph_destroy(control->graph);
    iothreads_destroy(control->iothreads);
    object_remove_all();
    g_free(control);
}

int coroutine_fn command_quit(struct control *control, struct error **err)
{
    service_quit(control, SHUTDOWN_CAUSE_HOST_QMP_QUIT);
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `interlock status`: one screen about a running daemon: nodes, exports and jobs. A client of the monitor; three
 * queries, so what it shows of one list may be older than of the next.
 * It is for people; programs ask query-graph and query-jobs.
 */
#include "tool/client.h"
#include "tool/tool.h"
#include <errno.h>
#include <glib.h>
#include <stdio.h>
#include <string.h>

static void print_nodes(json_t *graph)
{
    size_t index;
    json_t *node;

    printf("nodes: %zu\n", json_array_size(json_object_get(graph, "nodes")));
    json_array_foreach(json_object_get(graph, "nodes"), index, node)
    {
        const char *name = "", *driver = "", *filename = "", *stale = NULL;
        int writable = 0;
        json_int_t size = 0;

        json_unpack(node, "{s:s, s:s, s:I, s:b, s?s, s?s}", "node-name", &name, "driver", &driver, "size", &size,
                    "writable", &writable, "filename", &filename, "stale", &stale);
        printf("  %-16s %-8s %s %12lld  %s%s%s\n", name, driver, writable ? "rw" : "ro", (long long)size, filename,
               stale ? "  STALE: " : "", stale ? stale : "");
    }
}

static void print_exports(json_t *exports)
{
    size_t index;
    json_t *export;

    printf("exports: %zu\n", json_array_size(exports));
    json_array_foreach(exports, index, export)
    {
        const char *id = "", *type = "", *node = "";

        json_unpack(export, "{s:s, s:s, s:s}", "id", &id, "type", &type, "node-name", &node);
        printf("  %-16s %-8s %s\n", id, type, node);
    }
}

static void print_jobs(json_t *jobs)
{
    size_t index;
    json_t *job;

    printf("jobs: %zu\n", json_array_size(jobs));
    json_array_foreach(jobs, index, job)
    {
        const char *id = "", *type = "", *status = "";
        json_int_t done = 0, total = 0;

        json_unpack(job, "{s:s, s:s, s:s, s:I, s:I}", "id", &id, "type", &type, "status", &status, "current-progress",
                    &done, "total-progress", &total);
        printf("  %-16s %-8s %-10s %5.1f %%\n", id, type, status, total ? 100.0 * (double)done / (double)total : 0.0);
    }
}

static int show(const char *qmp, struct error **err)
{
    auto_client client = NULL;
    auto_json graph = NULL;
    auto_json exports = NULL;
    auto_json jobs = NULL;
    int code = client_connect(qmp, &client, err);

    code = code ? code : client_execute(client, "query-graph", NULL, &graph, err);
    code = code ? code : client_execute(client, "query-block-exports", NULL, &exports, err);
    code = code ? code : client_execute(client, "query-jobs", NULL, &jobs, err);
    if (!code) {
        print_nodes(graph);
        print_exports(exports);
        print_jobs(jobs);
    }
    return code;
}

int tool_status(int argc, char **argv)
{
    g_autofree char *qmp = NULL;
    struct error *err = NULL;
    int code = tool_parse(&argc, &argv, NULL, NULL, "Nodes, exports and jobs of a running daemon at a glance.", NULL,
                          &qmp, &err);

    code = code ? code : show(qmp, &err);
    return code ? tool_fail("interlock status", err) : 0;
}

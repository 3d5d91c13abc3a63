/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What people read, in the layout that those who parse it anyway are used to: sizes in three digits, and the table of
 * snapshots. Pure functions but for their printing. Everything else about an image is printed by the sub-command.
 */
#include "schema/types.h"
#include "tool/img/img.h"
#include <glib.h>
#include <stdio.h>

char *img_human_size(uint64_t bytes, char out[32])
{
    static const char *const units[] = {"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"};
    double value = (double)bytes;
    unsigned unit = 0;
    for (; value >= 1000 && unit + 1 < G_N_ELEMENTS(units); unit++) {
        value /= 1024;
    }
    snprintf(out, 32, "%.3g %sB", value, units[unit]);
    return out;
}

static char *format_date(int64_t seconds)
{
    g_autoptr(GDateTime) date = g_date_time_new_from_unix_local(seconds);
    return date ? g_date_time_format(date, "%Y-%m-%d %H:%M:%S") : g_strdup("--");
}

void img_print_snapshots(const struct snapshot_info_list *list, unsigned indent)
{
    printf("%*s%-7s %-16s %8s %19s %15s %10s\n", indent, "", "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT");
    for (size_t i = 0; i < list->count; i++) {
        const struct snapshot_info *snapshot = list->items[i];
        int64_t clock = snapshot->vm_clock_sec;
        char size[32];
        g_autofree char *date = format_date(snapshot->date_sec);
        g_autofree char *time =
            g_strdup_printf("%04" G_GINT64_FORMAT ":%02d:%02d.%03d", clock / 3600, (int)(clock / 60 % 60),
                            (int)(clock % 60), (int)(snapshot->vm_clock_nsec / 1000000));
        g_autofree char *count =
            snapshot->has_icount ? g_strdup_printf("%" G_GINT64_FORMAT, snapshot->icount) : g_strdup("--");
        printf("%*s%-7s %-16s %8s %19s %15s %10s\n", indent, "", snapshot->id, snapshot->name,
               img_human_size((uint64_t)snapshot->vm_state_size, size), date, time, count);
    }
}

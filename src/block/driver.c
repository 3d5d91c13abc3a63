/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The list of drivers. src/tool registers all of them at start, before any thread but the first runs; after that the
 * list is read only. Drivers are const tables that live for ever: nothing is copied, nothing is freed. Opening by
 * driver is open.c's.
 */
#include "block/driver.h"
#include <glib.h>

#define DRIVER_LIMIT 64

static const struct driver *drivers[DRIVER_LIMIT];
static unsigned driver_count;

void driver_register(const struct driver *driver)
{
    if (driver_find(driver->name) == driver) {
        return;
    }
    g_assert(!driver_find(driver->name) && driver_count < DRIVER_LIMIT);
    drivers[driver_count++] = driver;
}

const struct driver *driver_find(const char *name)
{
    for (unsigned i = 0; i < driver_count; i++) {
        if (g_str_equal(drivers[i]->name, name)) {
            return drivers[i];
        }
    }
    return NULL;
}

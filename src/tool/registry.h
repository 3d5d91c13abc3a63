/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_REGISTRY_H
#define INTERLOCK_TOOL_REGISTRY_H

/* Makes every driver known; called once, before any loop. The only place that names them all. */
void register_all(void);

#endif

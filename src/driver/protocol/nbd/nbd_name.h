/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_PROTOCOL_NBD_NBD_NAME_H
#define INTERLOCK_DRIVER_PROTOCOL_NBD_NBD_NAME_H

#include "base/error.h"
#include "schema/types.h"
#include <jansson.h>
#include <stdbool.h>

/*
 * Names of NBD exports:
 *   nbd://HOST[:PORT][/EXPORT]              nbd+tcp:// is the same
 *   nbd+unix://[/EXPORT]?socket=PATH
 *   nbds://... nbds+tcp://... nbds+unix://...   with TLS: ?tls-creds=ID&tls-hostname=NAME, the id of an object
 *   nbd:HOST:PORT[:exportname=EXPORT]
 *   nbd:unix:PATH[:exportname=EXPORT]
 */
bool nbd_name_is(const char *name);
/* The options of blockdev-add for one, without a node-name. A new reference. */
int nbd_name_parse(const char *name, json_t **ret, struct error **err);
/* The URI for options; g_free(). */
char *nbd_name_format(const struct blockdev_options_nbd *options);

#endif
